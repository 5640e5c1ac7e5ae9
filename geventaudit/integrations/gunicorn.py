"""Hooks for gunicorn's configuration: workers drain before they go, and the spools of dead workers are sent.

::

    # gunicorn.conf.py
    from geventaudit.integrations.gunicorn import child_exit, post_worker_init, worker_exit

They find the clients by :func:`geventaudit.live_clients`, wherever the application made them. A configuration that has
such hooks already calls these from them.

====================  ==============================================================================================
hook                  does
====================  ==============================================================================================
``post_worker_init``  in a worker that is ready: starts its clients that have a spool, so that the records of a dead
                      worker are sent without waiting for a request; and notes the signals that end the worker
``worker_exit``       in a worker that ends: closes its clients, all at once, within the rest of ``graceful_timeout``
``child_exit``        in the master, when a worker is gone: says in gunicorn's log which spool it left
====================  ==============================================================================================

The master itself sends no spool: that needs a running client, and greenlets of a master continue in every worker that
it forks later. The lock of a spool's folder ends with its process; the worker that the
master starts in the place of a dead one sends the records of that folder, and the others look for it every 30 seconds.

A worker without a sign of life for ``timeout`` gets SIGABRT, and SIGKILL a second later. If Python can still answer,
``worker_exit`` drains for half a second, and keeps the rest in a spool. A worker that is killed at once runs no hook:
undelivered records are lost, unless the spool has ``mode="always"``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent

from geventaudit import AuditClient, Client, ConnectionFailedError, live_clients

__all__ = ["child_exit", "post_worker_init", "worker_exit"]

# Seconds of the graceful timeout that are not for draining: a spool may take that long to keep the rest.
_RESERVE = 1.0

# Seconds that an aborted worker drains. gunicorn kills it a second after the SIGABRT, also while it keeps the rest.
_ABORTED = 0.5

_sigterm_time: float | None = None  # when this worker got SIGTERM, on the monotonic clock
_aborted = False  # True once it got SIGABRT


def post_worker_init(worker: Any) -> None:
    """Start the clients that have a spool; none of them waits for the agent."""
    _stand_before(signal.SIGTERM, _note_end)
    _stand_before(signal.SIGABRT, _note_abort)
    for client in live_clients():
        start_spool(client)


def start_spool(client: AuditClient) -> None:
    """Start *client* if it has a spool, so that the spools of dead processes are sent. Does not wait for the agent."""
    if isinstance(client, Client) and client.spool is not None:
        try:
            client.connect(timeout=0.0)
        except ConnectionFailedError:
            pass  # not yet: the client continues to try, and has opened its spool


def worker_exit(server: Any, worker: Any) -> None:
    """Close all clients, and let them drain until a second before the end of ``graceful_timeout``.

    Requests may have used some of that time; gunicorn's gevent worker may take a second to notice the signal. Records
    that are undelivered then are kept if the client has a spool; otherwise their number is in gunicorn's log.

    An aborted worker has half a second.
    """
    if worker.pid != os.getpid():
        return  # gunicorn calls this in the master too, for a worker whose process it finds gone
    seconds = worker.cfg.graceful_timeout
    if _sigterm_time is not None:
        seconds -= time.clock_gettime(time.CLOCK_MONOTONIC) - _sigterm_time
    if worker.cfg.timeout:  # from now on the worker gives no sign of life, and would be aborted after that
        seconds = min(seconds, worker.cfg.timeout)
    seconds = _ABORTED if _aborted else max(seconds - _RESERVE, 0.0)
    closing = [gevent.spawn(client.close, seconds) for client in live_clients()]
    gevent.joinall(closing)
    undelivered = sum(len(each.value or ()) for each in closing)
    if undelivered:
        worker.log.warning("Worker (pid:%s) ends with %d audit records undelivered", worker.pid, undelivered)


def child_exit(server: Any, worker: Any) -> None:
    """Log the spool that the worker left. Only looks for the folder, so it is safe in the master.

    With ``preload_app`` only: otherwise the master knows no client, and this does nothing.
    """
    spools = [client.spool for client in live_clients() if client.spool is not None]
    for left in sorted({path for spool in spools for path in spool.folders_of(worker.pid)}):
        server.log.warning(
            "Worker (pid:%s) left the spool %s; the worker that is started next, or another one, sends what is in it",
            worker.pid,
            left,
        )


def _stand_before(number: signal.Signals, note: Callable[[], None]) -> None:
    """Call *note* before gunicorn's handler of a signal; gunicorn has no hook for it that a configuration may share."""
    handler = signal.getsignal(number)
    if not callable(handler):
        return

    def noted(number: int, frame: FrameType | None) -> None:
        note()
        handler(number, frame)

    signal.signal(number, noted)
    signal.siginterrupt(number, False)  # as gunicorn set it; setting a handler takes that back


def _note_end() -> None:
    global _sigterm_time
    if _sigterm_time is None:
        _sigterm_time = time.clock_gettime(time.CLOCK_MONOTONIC)


def _note_abort() -> None:
    global _aborted
    _aborted = True
