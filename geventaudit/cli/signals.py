"""Work that a signal can end."""

from __future__ import annotations

from collections.abc import Callable

import gevent

__all__ = ["run_until_signal"]


def run_until_signal(work: Callable[[], bool], *signals: int) -> bool | None:
    """Return the result of *work*, or None if one of *signals* comes first and ends it.

    The signals are watched by the hub. Python's own handler does not run if the signal comes just before the hub waits,
    and it would raise in any greenlet.
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
