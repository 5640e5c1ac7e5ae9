# gunicorn with gevent workers; see gunicorn_app.py.
from geventaudit.integrations.gunicorn import child_exit, post_worker_init, worker_exit  # noqa: F401

worker_class = "gevent"
workers = 2
preload_app = True
graceful_timeout = 10
