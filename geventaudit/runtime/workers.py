"""The library's own greenlets, and the check that the caller may wait.

A signal handler runs in the greenlet that runs at that moment. In the hub, waiting is forbidden. In a greenlet that
does the library's work, a wait for that work would never end.
"""

from __future__ import annotations

from collections.abc import Callable

import gevent
from gevent._hub_local import get_hub_if_exists

__all__ = ["OneWorker", "Worker", "may_wait"]


class Worker(gevent.Greenlet):  # type: ignore[type-arg]
    """A greenlet that does the library's work."""


class OneWorker:
    """A function that at most one worker runs at a time. It can be started again after a kill.

    A signal handler may start a second worker while the first is being started, and wait for its work. The first that
    gets a turn does the work; the other ends.

    :param is_needed: called in the hub when a worker has ended, whatever ended it; returns True to start the next.
    """

    def __init__(self, function: Callable[[], None], is_needed: Callable[[], bool] | None = None) -> None:
        self._function = function
        self._is_needed = is_needed
        self.greenlet: Worker | None = None
        """The greenlet that was started last; falsy once it has ended."""
        self._at_work: Worker | None = None

    def ensure_running(self) -> None:
        """Start the worker unless it runs."""
        if not self.greenlet:
            worker = self.greenlet = Worker(self._run)
            if self._is_needed is not None:
                worker.rawlink(self._go_on)
            worker.start()

    def kill(self) -> None:
        """Kill the worker, without waiting for its end."""
        for worker in (self.greenlet, self._at_work):
            if worker:
                worker.kill(block=False)

    def join(self, timeout: float) -> None:
        """Wait for the worker's end, at most *timeout* seconds."""
        if self.greenlet:
            self.greenlet.join(timeout)

    def _go_on(self, ended: object) -> None:
        if self._is_needed is not None and self._is_needed():
            self.ensure_running()

    def _run(self) -> None:
        current = gevent.getcurrent()
        if not self._at_work:
            self._at_work = current  # type: ignore[assignment]  # a Worker
        self.greenlet = self._at_work
        if self.greenlet is current:
            self._function()


def may_wait() -> bool:
    """Return True unless the caller runs in the hub or in a :class:`Worker`."""
    current = gevent.getcurrent()
    return current is not get_hub_if_exists() and not isinstance(current, Worker)
