"""A record for each run of a Celery task, with the caller of the HTTP request that queued the task. Extra: ``celery``.

::

    def make_client():
        return geventaudit.Client(lambda: geventaudit.DomainSocket("/run/audit/agent.sock"))

    app = Celery("shop", broker="redis://localhost")
    Audit(make_client, app)

Run the same lines in the worker and in the service that queues tasks: the worker records, and the service puts the
caller of the current request into a header of each message. A task that queues another task hands its own caller on.

The worker makes a client in each process that runs tasks, with any pool: prefork, gevent, threads, solo. A process that
is not monkey-patched has no running gevent hub, so its client lives in a native thread with a hub of its own. The
clients are closed when their processes shut down. A process that is killed cannot do that: see the guide on Celery.
"""

from __future__ import annotations

try:
    import celery  # noqa: F401
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.celery needs celery: pip install 'geventaudit[celery]'"
    raise ModuleNotFoundError(needs) from error

from .audit import Audit, Describe, TaskCounts
from .callers import HEADER

__all__ = ["HEADER", "Audit", "Describe", "TaskCounts"]
