# gunicorn with gevent workers; see gunicorn_app.py.
worker_class = "gevent"
workers = 2
preload_app = True
graceful_timeout = 10


def worker_exit(server, worker):
    """Let what was accepted drain before the worker goes; after graceful_timeout gunicorn would kill it."""
    from gunicorn_app import client

    client.close(timeout=worker.cfg.graceful_timeout / 2)
