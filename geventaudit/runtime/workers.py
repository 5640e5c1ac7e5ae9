"""The library's own greenlets, and the question whether the caller may wait.

A signal handler runs in whatever greenlet runs at that moment. In the hub nothing may wait, and in a greenlet that does
the library's work, a wait for that very work would never end.
"""

from __future__ import annotations

from collections.abc import Callable

import gevent
from gevent._hub_local import get_hub_if_exists

__all__ = ["Worker", "may_wait", "spawn"]


class Worker(gevent.Greenlet):  # type: ignore[type-arg]
    """A greenlet that does the library's work."""


def may_wait() -> bool:
    """Return True unless the caller runs in the hub or in a :class:`Worker`."""
    current = gevent.getcurrent()
    return current is not get_hub_if_exists() and not isinstance(current, Worker)


def spawn(function: Callable[..., None], *arguments: object) -> Worker:
    """Run *function* in a worker."""
    worker = Worker(function, *arguments)
    worker.start()
    return worker
