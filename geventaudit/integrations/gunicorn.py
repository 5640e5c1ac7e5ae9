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
                      worker are sent without waiting for a request; and notes when the worker is to end, and how
``worker_exit``       in a worker that ends: closes its clients, all at once, within what is left of
                      ``graceful_timeout``
``child_exit``        in the master, when a worker is gone: says in gunicorn's log which spool it left
====================  ==============================================================================================

The master itself takes over nothing: that needs a client at work, and greenlets that run in a master go on in every
worker that it forks later. Nor does it have to. The lock of a spool's folder ends with its process; the worker that the
master starts in the place of a dead one sends the records of that folder, and the others look for it every 30 seconds.

A worker that gave no sign of life for ``timeout`` is sent SIGABRT, and SIGKILL a second later: where Python can still
answer, ``worker_exit`` drains for half of that, and keeps the rest in a spool. A worker that is killed at once runs no
hook. Its accepted records are in its spool then with ``mode="always"``, and undelivered ones are lost without.
"""

from __future__ import annotations

import glob
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent

from geventaudit import AuditClient, Client, ConnectionFailedError, live_clients

__all__ = ["child_exit", "post_worker_init", "worker_exit"]

# What of the graceful timeout is not for draining: a spool may take that long to keep what is left. Seconds.
_RESERVE = 1.0

# How long an aborted worker drains. gunicorn kills it a second after the SIGABRT, also while it keeps what is left.
_ABORTED = 0.5

_told_to_end: float | None = None  # when this worker got SIGTERM, on the monotonic clock
_aborted = False  # whether it got SIGABRT


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
            pass  # not yet: the client goes on trying, and has opened its spool


def worker_exit(server: Any, worker: Any) -> None:
    """Close all clients, and let them drain: a second less than what is left of ``graceful_timeout``.

    Requests may have used some of that time; gunicorn's gevent worker may take a second to notice the signal. What is
    still undelivered then is kept, where a client has a spool; otherwise its number is in gunicorn's log. A worker that
    was aborted has half a second.
    """
    if worker.pid != os.getpid():
        return  # gunicorn calls this in the master too, for a worker whose process it finds gone
    seconds = worker.cfg.graceful_timeout
    if _told_to_end is not None:
        seconds -= time.clock_gettime(time.CLOCK_MONOTONIC) - _told_to_end
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
    for left in sorted({path for client in live_clients() for path in _folders(client, worker.pid)}):
        server.log.warning(
            "Worker (pid:%s) left the spool %s; the worker that is started next, or another one, sends what is in it",
            worker.pid,
            left,
        )


def _folders(client: AuditClient, pid: int) -> list[str]:
    """Return the folders that a client with that process identifier may have left."""
    spool = client.spool
    if spool is None or not spool.is_for_each_process:
        return []
    template = glob.escape(spool.absolute_path)
    return [path for name in (f"{pid}", f"{pid}.*") for path in glob.glob(template.replace("{pid}", name))]


def _stand_before(number: signal.Signals, note: Callable[[], None]) -> None:
    """Call *note* before gunicorn's handler of a signal; gunicorn has no hook for it that a configuration may share."""
    handler = signal.getsignal(number)
    if not callable(handler):
        return

    def told(number: int, frame: FrameType | None) -> None:
        note()
        handler(number, frame)

    signal.signal(number, told)
    signal.siginterrupt(number, False)  # as gunicorn set it; setting a handler takes that back


def _note_end() -> None:
    global _told_to_end
    if _told_to_end is None:
        _told_to_end = time.clock_gettime(time.CLOCK_MONOTONIC)


def _note_abort() -> None:
    global _aborted
    _aborted = True
