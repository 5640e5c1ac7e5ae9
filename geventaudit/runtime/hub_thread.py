"""The native thread that owns a client, and its gevent hub.

gevent's queues and events are not safe across native threads. So a client belongs to the hub of the thread that
constructed it, and other threads call functions in that hub.

=========================  =========================================================================================
the thread                 another thread's call
=========================  =========================================================================================
has no hub yet             waits until the thread first uses a client
has a hub                  runs in the hub, at its next turn
has ended, or has           raises ``ClientClosedError``
destroyed its hub
=========================  =========================================================================================

An async watcher wakes the hub, since libev allows other threads to use only these. ``run_callback_threadsafe`` is not
safe: it increases the loop's reference count in the other thread, while the loop decreases the count without the GIL,
so that a wakeup may be lost.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.event import Event

from ..errors import ClientClosedError
from . import forks, native
from .clock import Deadline

__all__ = ["GONE", "HubThread", "NoAnswerError", "Waiter"]

_T = TypeVar("_T")
_Callback: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]

GONE = "the client's thread has ended, or its hub was destroyed"
"""The reason of a ClientClosedError."""

_GRACE = 1.0  # seconds for a hub to begin a call, or to end it after its own time limit
_CHECK_SECONDS = 0.5  # between two checks that the other thread and its hub exist: their end gives no event

_local: Any = native.original("_thread", "_local")()


class NoAnswerError(Exception):
    """The hub of the other thread did not run a function in time; the function never runs."""


class HubThread:
    """A native thread and its hub; see :meth:`current`."""

    def __init__(self) -> None:
        self.ident = native.thread_ident()
        """The thread's identifier; 0 once the thread has ended, since the system reuses identifiers."""
        self.hub: Any = None
        """The thread's hub; None until :meth:`start`."""
        self._callbacks: deque[_Callback] = deque()
        self._wake: Any = None
        forks.register(self)
        if get_hub_if_exists() is not None:
            self.start()

    @staticmethod
    def current() -> HubThread:
        """Return the object of this thread; the same one while the thread keeps its hub. Makes no hub."""
        guard: _ThreadExitGuard | None = getattr(_local, "guard", None)
        if guard is not None:
            hub = guard.thread.hub
            if hub is None or hub is get_hub_if_exists():
                return guard.thread
        guard = _local.guard = _ThreadExitGuard(HubThread())
        return guard.thread

    def start(self) -> None:
        """Make the hub if there is none, and let other threads wake it. In this thread.

        :raises OSError: the process has no descriptor left.
        """
        if self.hub is not None:
            return
        if get_hub_if_exists() is None:
            _check_descriptors()
        hub = gevent.get_hub()
        # ref=False: a hub without other watchers may end. A running watcher is never garbage-collected and outlives the
        # loop, so it must not refer to this object.
        self._wake = hub.loop.async_(ref=False)
        self._wake.start(_run_callbacks, self._callbacks)
        self.hub = hub
        if self._callbacks:
            self._wake.send()

    def stop(self) -> None:
        """Stop the watcher before the hub is destroyed: libuv requires it. In this thread."""
        if self._wake is not None:
            self._wake.stop()
            self._wake.close()
            self._wake = None

    def is_current(self) -> bool:
        """Return True in this thread."""
        return native.thread_ident() == self.ident

    def is_alive(self) -> bool:
        """Return True if the thread exists and has not destroyed its hub. Thread-safe."""
        return bool(self.ident) and (self.hub is None or self.hub.loop is not None)

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call *function* in the hub, soon, or when the thread has a hub. *function* must not wait. Thread-safe.

        :raises ClientClosedError: the thread has ended, or the hub was destroyed.
        """
        if not self.is_alive():
            raise ClientClosedError(GONE)
        self._callbacks.append((function, arguments))
        if self._wake is not None:
            try:
                self._wake.send()
            except ValueError:  # the loop was destroyed at this moment
                raise ClientClosedError(GONE) from None

    def call(self, function: Callable[[], _T], timeout: float | None, late: Callable[[_T], object] | None = None) -> _T:
        """Run *function* in a greenlet of the hub, and return its result. From another thread.

        :param timeout: the longest time in seconds that *function* takes by itself.
        :param late: called with a result that comes after the end of the wait. With *late*, the wait for a running
            function ends after *timeout* and a second; without it, when the function ends.
        :raises NoAnswerError: the hub did not begin *function* in that time, or did not end it.
        :raises ClientClosedError: the thread has ended, or the hub was destroyed.
        """
        call = _Call(function, late)
        try:
            self.post(gevent.spawn, call.run)
            call.wait(self, Deadline(None if timeout is None else timeout + _GRACE))
        except BaseException:
            call.abandon(self)
            raise
        return call.result()

    def after_fork_in_child(self) -> None:
        """Drop the calls of the parent's threads."""
        self._callbacks.clear()


_HUB_DESCRIPTORS = 4  # a hub needs two or three, which depends on the loop
_close: Callable[[int], None] = native.original("os", "close")


def _check_descriptors() -> None:
    """Check that a hub can open its descriptors: libev and libuv would abort the process.

    :raises OSError: the process has too few descriptors left.
    """
    opened: list[int] = []
    try:
        for _ in range(_HUB_DESCRIPTORS):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for descriptor in opened:
            _close(descriptor)


class _ThreadExitGuard:
    """An object in a thread's local storage. It is deleted when the thread ends or uses another hub."""

    def __init__(self, thread: HubThread) -> None:
        self.thread = thread

    def __del__(self) -> None:
        self.thread.ident = 0


def _run_callbacks(callbacks: deque[_Callback]) -> None:
    for _ in range(len(callbacks)):  # a callback added meanwhile wakes the hub again
        function, arguments = callbacks.popleft()
        try:
            function(*arguments)
        except BaseException:
            gevent.get_hub().handle_error(function, *sys.exc_info())


class _Call(Generic[_T]):
    """A function that runs in another thread's hub, and its result.

    Hub and caller claim "begin": the hub to run the function, the caller to withdraw it. The first claim wins. A result
    that the caller does not wait for is passed to *late* once, by the first that claims "late".
    """

    def __init__(self, function: Callable[[], _T], late: Callable[[_T], object] | None) -> None:
        self._function = function
        self._late = late
        self._claims: dict[str, str] = {}
        self._outcome: list[tuple[Any, BaseException | None]] = []
        self._greenlet: Any = None
        self._waiter = Waiter()

    def run(self) -> None:
        """Run the function, in a greenlet of the hub."""
        if not self._claim("begin", "hub"):
            return
        self._greenlet = gevent.getcurrent()
        try:
            self._outcome.append((self._function(), None))
        except BaseException as error:
            self._outcome.append((None, error))
        self._waiter.wake()
        if "abandoned" in self._claims:
            self._hand_over_late("hub")

    def wait(self, thread: HubThread, deadline: Deadline) -> None:
        """Wait for the outcome."""
        while not self._outcome:
            left = deadline.left()
            if left == 0.0 and (self._claim("begin", "caller") or self._late is not None):
                raise NoAnswerError
            self._waiter.wait(min(left or _CHECK_SECONDS, _CHECK_SECONDS))
            if not self._outcome and not thread.is_alive():
                raise ClientClosedError(GONE)

    def abandon(self, thread: HubThread) -> None:
        """Withdraw the function, or handle its result: the caller has stopped waiting."""
        if self._claim("begin", "caller"):
            return
        if self._late is not None:
            self._claim("abandoned", "caller")
            if self._outcome:
                self._hand_over_late("caller")
        elif self._greenlet is not None and thread.is_alive():
            thread.post(gevent.kill, self._greenlet)

    def result(self) -> _T:
        """Return the function's result, or raise its error."""
        value, error = self._outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def _claim(self, part: str, claimant: str) -> bool:
        # setdefault is atomic, since the keys are text.
        return self._claims.setdefault(part, claimant) == claimant

    def _hand_over_late(self, claimant: str) -> None:
        value, error = self._outcome[0]
        if self._claim("late", claimant) and error is None and self._late is not None:
            self._late(value)


class Waiter:
    """A wait of one thread for another: as a greenlet if the waiting thread has a hub, else natively."""

    def __init__(self) -> None:
        self._lock = native.allocate_lock()
        self._lock.acquire()
        self._event: Event | None = None
        if get_hub_if_exists() is not None:
            self._event = Event()
            self._thread = HubThread.current()
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for :meth:`wake`, at most *seconds*."""
        if self._event is None:
            self._lock.acquire(True, seconds)
        else:
            self._event.wait(seconds)

    def wake(self) -> None:
        """End the wait. Thread-safe."""
        try:
            if self._event is None:
                self._lock.release()
            else:
                self._thread.post(self._event.set)
        except (RuntimeError, ClientClosedError):  # woken before, or the waiting thread has ended
            pass
