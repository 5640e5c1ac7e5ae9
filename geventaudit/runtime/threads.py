"""The way in from other native threads.

A client lives in the hub of the thread that made it: gevent's queues and events are not safe across threads. Another
thread validates and encodes by itself, leaves the frame in the inbox, and tells the hub, which puts it on the queue;
neither waits for the other. The bound of the queue holds for both together. A client that only its own thread uses
pays one comparison for all this.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.queue import Queue

from ..errors import ClientClosedError
from . import fork, native

__all__ = ["Home", "Inbox", "pause"]

_T = TypeVar("_T")
_Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]

_GONE = "the client's thread has ended, or its hub was destroyed"

_local: Any = native.original("_thread", "_local")()


def pause(seconds: float) -> None:
    """Sleep as befits this thread: cooperatively where it has a hub, natively where it has none."""
    if get_hub_if_exists() is None:
        native.sleep(seconds)
    else:
        gevent.sleep(seconds)


class Home:
    """A thread that clients live in, and its hub; :meth:`here` is that of the present thread.

    Other threads have things called there. Not by ``loop.run_callback_threadsafe``: it counts up, in the other thread,
    what keeps the loop running, while the loop, which runs without the interpreter's lock, counts it down as its timers
    end. Now and then one is lost, and a hub that has work to do says LoopExit. An async watcher is what libev allows
    other threads to touch.
    """

    def __init__(self) -> None:
        self.ident = native.thread_ident()
        """Of the thread; 0 once it has ended, or has another hub: a number that is free is soon another thread's."""
        self.hub = gevent.get_hub()
        self._pending: deque[_Call] = deque()
        self._wake = self.hub.loop.async_(ref=False)  # a hub that has nothing else to wait for may end
        # A watcher that runs is never collected, and outlives the loop: so it is not to know this object.
        self._wake.start(_answer, self._pending)
        fork.track(self)

    @staticmethod
    def here() -> Home:
        """That of the present thread; always the same while that has the same hub."""
        stay: _Stay | None = getattr(_local, "stay", None)
        if stay is None or stay.home.hub is not gevent.get_hub():
            stay = _local.stay = _Stay(Home())
        return stay.home

    def after_fork_in_child(self) -> None:
        """The threads that wanted these called are the parent's."""
        self._pending.clear()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """From any thread: call *function* in the hub, soon; it must not wait.

        :raises ClientClosedError: the thread has ended, or the hub was destroyed.
        """
        self.check()
        self._pending.append((function, arguments))
        try:
            self._wake.send()
        except ValueError:  # the loop was destroyed at this instant
            raise ClientClosedError(_GONE) from None

    def is_there(self) -> bool:
        """From any thread: whether there is still somebody to call."""
        return bool(self.ident) and self.hub.loop is not None

    def check(self) -> None:
        """From any thread: make sure that there is.

        :raises ClientClosedError: the thread has ended, or the hub was destroyed.
        """
        if not self.is_there():
            raise ClientClosedError(_GONE)

    def run(
        self,
        function: Callable[[], _T],
        timeout: float | None,
        otherwise: _T,
        late: Callable[[_T], object] = lambda result: None,
        *,
        withdraw: bool = False,
    ) -> _T:
        """From another thread: run *function* in a greenlet of the hub, and wait for what it returns or raises.

        :param timeout: seconds that the function may take by itself; a hub that does not answer by then is not waited
            for, and *otherwise* is returned.
        :param late: given what the function returned when nobody waited for it any more.
        :param withdraw: a function that has not begun by then never begins; one that has is waited for. When an
            exception ends the waiting, it ends the function too.
        :raises ClientClosedError: the thread has ended, or the hub was destroyed, and nothing came of it.
        """
        answer: list[tuple[_T | None, BaseException | None]] = []
        running: list[gevent.Greenlet[..., None]] = []
        gone: list[bool] = []
        begun = native.allocate_lock()  # whoever gets it: the function may begin, or it is withdrawn
        claimed = native.allocate_lock()  # whoever gets it has to do with the answer, when nobody waits for it

        def answering() -> None:
            if withdraw and not begun.acquire(False):
                return
            running.append(gevent.getcurrent())  # type: ignore[arg-type]
            try:
                answer.append((function(), None))
            except BaseException as error:
                answer.append((None, error))
            if gone:
                pass_on()

        def pass_on() -> None:
            if claimed.acquire(False):
                result, error = answer[0]
                if error is None:
                    late(result)  # type: ignore[arg-type]

        def wait(deadline: float | None) -> bool:
            while not answer:
                if deadline is not None and time.monotonic() > deadline:
                    if not withdraw or begun.acquire(False):
                        return False
                    deadline = None
                    continue
                pause(0.002)
                if not answer:
                    self.check()
            return True

        self.call(gevent.spawn, answering)
        try:
            answered = wait(None if timeout is None else time.monotonic() + timeout + 1.0)
        except BaseException:
            gone.append(True)
            if answer:
                pass_on()
            elif withdraw and not begun.acquire(False) and running and self.is_there():
                self.call(gevent.kill, running[0])  # as an exception in this thread ends the waiting of its own calls
            raise
        if not answered:
            gone.append(True)
            if not answer or not claimed.acquire(False):
                return otherwise
        result, error = answer[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


class _Stay:
    """Kept by a thread: when this goes, the thread has ended, or has another hub."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def __del__(self) -> None:
        self.home.ident = 0


def _answer(pending: deque[_Call]) -> None:
    for _ in range(len(pending)):  # whoever adds more now wakes the hub again
        function, arguments = pending.popleft()
        try:
            function(*arguments)
        except BaseException:
            gevent.get_hub().handle_error(function, *sys.exc_info())


class Inbox:
    """Frames that other threads have handed over and the hub has not put on the queue yet.

    :param size: records that may wait, here and on the queue together.
    :param notify: tells the hub that something is there; called in the other thread.
    """

    def __init__(self, size: int, notify: Callable[[], None]) -> None:
        self.lock = native.allocate_lock()
        self.used = False
        """Whether another thread has ever been here: the hub's own puts are to hold the lock from then on."""
        self._size = size
        self._notify = notify
        self._frames: deque[bytes] = deque()
        self._told = False
        self._known = False
        self._closed = ""
        self.rejected: dict[str, int] = {}
        """What other threads were refused, by reason."""

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: bytes, queued: Callable[[], int]) -> bool:
        """From another thread: hand over *frame*; False when there is no room.

        :raises ClientClosedError: the client was closed, or its thread has ended.
        """
        self.used = True
        with self.lock:
            if self._closed:
                raise ClientClosedError(self._closed)
            # Until the hub has seen that others are here, one put of its own may be under way without the lock.
            taken = queued() + len(self._frames)
            accepted = taken + (not self._known) < self._size
            if accepted:
                self._frames.append(frame)
            elif taken >= self._size:
                return False
            if self._told:
                return accepted
            self._told = True  # also when only that reserve was in the way: the hub takes it away
        try:
            self._notify()
        except ClientClosedError as error:  # nobody will ever come to fetch it
            with self.lock:
                self._closed = str(error)
                if accepted and not any(each is frame for each in self._frames):
                    return True  # but whoever closes the client, and hands it back
                if accepted:
                    self._frames = deque(each for each in self._frames if each is not frame)
            raise
        return accepted

    def empty_into(self, queue: Queue[bytes]) -> int:
        """In the hub's thread, holding the lock: put what is here on *queue*, which has room; how many there were."""
        self._known = True
        self._told = False
        count = 0
        while self._frames:
            queue.put(self._frames[0], False)
            self._frames.popleft()
            count += 1
        return count

    def take(self) -> list[bytes]:
        """In another thread, when nobody will come for them: take the frames away."""
        with self.lock:
            frames = list(self._frames)
            self._frames.clear()
            return frames

    def close(self, why: str) -> None:
        """Take no more."""
        with self.lock:
            self._closed = why

    def reject(self, reason: str) -> None:
        """From another thread: count a refusal."""
        with self.lock:
            self.rejected[reason] = self.rejected.get(reason, 0) + 1
