"""Work that a signal ends."""

from __future__ import annotations

from collections.abc import Callable

import gevent

__all__ = ["run_until_signal"]


def run_until_signal(work: Callable[[], bool], *signals: int) -> bool | None:
    """Run *work* in a greenlet and return its result, or None if one of *signals* ends it.

    The hub watches the signals. Python's own handler would not run for a signal just before the hub waits, and would
    raise in an arbitrary greenlet.
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
