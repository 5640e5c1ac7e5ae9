"""The native thread that owns a client, and its gevent hub.

gevent's queues and events are not safe across native threads. So a client lives in the hub of the thread that
constructed it, and other threads have functions called there.

=========================  =========================================================================================
the thread                 another thread's call
=========================  =========================================================================================
has no hub yet             waits until the thread first uses a client
has a hub                  runs in the hub, as soon as that gets a turn
has ended, or has           raises ``ClientClosedError``
destroyed its hub
=========================  =========================================================================================

The hub is woken by an async watcher, which is what libev allows other threads to touch. ``run_callback_threadsafe``
would count up, in the other thread, what keeps the loop running, while the loop counts it down without the
interpreter's lock: now and then a wakeup is lost.
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

_GRACE = 1.0  # seconds that a hub may take to begin, or to end, a call beyond the call's own time limit
_CHECK_SECONDS = 0.5  # how often a waiting thread checks that the hub still exists; destroying one tells nobody

_local: Any = native.original("_thread", "_local")()


class NoAnswerError(Exception):
    """The hub of the other thread did not run a function in time; the function never runs."""


class HubThread:
    """A native thread and its hub; see :meth:`current`."""

    def __init__(self) -> None:
        self.ident = native.thread_ident()
        """The thread's identifier; 0 once the thread has ended, since identifiers are used again."""
        self.hub: Any = None
        """The thread's hub; None until :meth:`start`."""
        self._callbacks: deque[_Callback] = deque()
        self._calls: set[_Call[Any]] = set()
        self._wake: Any = None
        forks.register(self)
        if get_hub_if_exists() is not None:
            self.start()

    @staticmethod
    def current() -> HubThread:
        """Return the one of this thread; the same as long as the thread keeps its hub. Makes no hub."""
        guard: _ThreadExitGuard | None = getattr(_local, "guard", None)
        if guard is not None:
            hub = guard.thread.hub
            if hub is None or hub is get_hub_if_exists():
                return guard.thread
        guard = _local.guard = _ThreadExitGuard(HubThread())
        return guard.thread

    def start(self) -> None:
        """In this thread: make the hub if there is none, and let other threads wake it.

        :raises OSError: the process has no descriptor left.
        """
        if self.hub is not None:
            return
        if get_hub_if_exists() is None:
            _check_descriptors()
        hub = gevent.get_hub()
        # Without a reference: a hub that has nothing else to wait for may end. A watcher that runs is never collected
        # and outlives the loop, so it must not refer to this object.
        self._wake = hub.loop.async_(ref=False)
        self._wake.start(_run_callbacks, self._callbacks)
        self.hub = hub
        if self._callbacks:
            self._wake.send()

    def stop(self) -> None:
        """Stop the watcher, in this thread, before its hub is destroyed: libuv must not lose a loop that is watched."""
        if self._wake is not None:
            self._wake.stop()
            self._wake.close()
            self._wake = None

    def is_current(self) -> bool:
        """Return True in this thread."""
        return native.thread_ident() == self.ident

    def is_alive(self) -> bool:
        """Return True if the thread exists and has not destroyed its hub. From any thread."""
        return bool(self.ident) and (self.hub is None or self.hub.loop is not None)

    def post(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call *function* in the hub, soon, or when the thread has a hub. *function* must not wait. From any thread.

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

        :param timeout: seconds that *function* takes at most by itself.
        :param late: called with the result if nobody waits for it any more. With it, a function that has begun is
            waited for up to *timeout* and a second; without it, to its end.
        :raises NoAnswerError: the hub did not begin *function* in that time, or did not end it.
        :raises ClientClosedError: the thread has ended, or the hub was destroyed.
        """
        call = _Call(function, late)
        self._calls.add(call)
        try:
            self.post(gevent.spawn, call.run)
            call.wait(self, Deadline(None if timeout is None else timeout + _GRACE))
        except BaseException:
            call.abandon(self)
            raise
        finally:
            self._calls.discard(call)
        return call.result()

    def fail_calls(self) -> None:
        """The thread has ended: no call comes to its end any more."""
        for call in list(self._calls):
            call.fail(ClientClosedError(GONE))

    def after_fork_in_child(self) -> None:
        """Forget the calls of the parent's threads."""
        self._callbacks.clear()
        self._calls.clear()


_HUB_DESCRIPTORS = 4  # a hub needs two or three, depending on its loop
_close: Callable[[int], None] = native.original("os", "close")


def _check_descriptors() -> None:
    """Raise an OSError if a hub cannot open its descriptors: libev and libuv would end the process."""
    opened: list[int] = []
    try:
        for _ in range(_HUB_DESCRIPTORS):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for descriptor in opened:
            _close(descriptor)


class _ThreadExitGuard:
    """Held by a thread's local storage: its end is the end of the thread, or of the use of a destroyed hub."""

    def __init__(self, thread: HubThread) -> None:
        self.thread = thread

    def __del__(self) -> None:
        self.thread.ident = 0
        self.thread.fail_calls()


def _run_callbacks(callbacks: deque[_Callback]) -> None:
    for _ in range(len(callbacks)):  # a callback that is added meanwhile wakes the hub again
        function, arguments = callbacks.popleft()
        try:
            function(*arguments)
        except BaseException:
            gevent.get_hub().handle_error(function, *sys.exc_info())


class _Call(Generic[_T]):
    """A function that runs in another thread's hub, and its result.

    Whoever claims "begin" first decides: the hub runs the function, or the caller withdraws it. A result that the
    caller does not wait for goes to *late*, once: to whoever claims "late".
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
        """Withdraw the function, or see to its result: the caller does not wait any more."""
        if self._claim("begin", "caller"):
            return
        if self._late is not None:
            self._claim("abandoned", "caller")
            if self._outcome:
                self._hand_over_late("caller")
        elif self._greenlet is not None and thread.is_alive():
            thread.post(gevent.kill, self._greenlet)

    def fail(self, error: BaseException) -> None:
        """End the wait with *error*."""
        self._outcome.append((None, error))
        self._waiter.wake()

    def result(self) -> _T:
        """Return the function's result, or raise its error."""
        value, error = self._outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def _claim(self, part: str, claimant: str) -> bool:
        # setdefault is atomic, since keys and values are text.
        return self._claims.setdefault(part, claimant) == claimant

    def _hand_over_late(self, claimant: str) -> None:
        value, error = self._outcome[0]
        if self._claim("late", claimant) and error is None and self._late is not None:
            self._late(value)


class Waiter:
    """Lets one thread wait for another: as a greenlet if this thread has a hub, natively if not."""

    def __init__(self) -> None:
        self._lock = native.allocate_lock()
        self._lock.acquire()
        self._event: Event | None = None
        if get_hub_if_exists() is not None:
            self._event = Event()
            self._thread = HubThread.current()
            self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait for :meth:`wake`, *seconds* at most."""
        if self._event is None:
            self._lock.acquire(True, seconds)
        else:
            self._event.wait(seconds)

    def wake(self) -> None:
        """End the wait. From any thread."""
        try:
            if self._event is None:
                self._lock.release()
            else:
                self._thread.post(self._event.set)
        except (RuntimeError, ClientClosedError):  # woken before; or the thread that waited has ended
            pass
