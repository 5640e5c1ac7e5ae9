"""Work that a signal ends."""

from __future__ import annotations

from collections.abc import Callable

import gevent

__all__ = ["until_told"]


def until_told(work: Callable[[], bool], *signals: int) -> bool | None:
    """Do *work* until it is done, and return its result, or until one of *signals* comes, and return None.

    By watchers of the hub: Python's own handler has no turn if the signal comes just before the hub waits, and it
    raises in whatever greenlet runs.
    """
    trouble: list[Exception] = []

    def working() -> bool:
        try:
            return work()
        except Exception as error:
            # gevent would print the exception.
            trouble.append(error)
            return False

    worker = gevent.spawn(working)
    handlers = [gevent.signal_handler(number, worker.kill, block=False) for number in signals]
    try:
        done = worker.get()
    finally:
        for handler in handlers:
            handler.cancel()
    if trouble:
        raise trouble[0]
    return None if isinstance(done, gevent.GreenletExit) else done
