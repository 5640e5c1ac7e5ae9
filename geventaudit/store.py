"""A spool at work: the disk behind the queue.

::

    send() --> queue --> window --> agent        while nothing waits on disk and the queue has room
    send() --> tail --> disk --> queue --> ...   otherwise, or always: then send() returns when it is on disk

Order is kept by one rule: what comes while older records wait in the tail or on disk goes behind them. What the queue
takes from the disk stays there until it is delivered. All work on the disk is done by one native thread (its jobs are
the methods of :mod:`geventaudit.spoolfile`). The hub hands it one write at a time, so that all records that come during
one write share the next, and is called back.

A disk that fails is told of and tried again. Meanwhile, in mode ``overflow``, records go to the queue as if there were
no spool, and may overtake what is on disk; in mode ``always``, :class:`~geventaudit.SpoolError` is raised.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import gevent
from gevent.event import Event
from gevent.queue import Full, Queue

from .backoff import Backoff
from .errors import ClientClosedError, SpoolError
from .notifications import NotificationKind
from .runtime import fork, native
from .runtime.threads import Home, pause
from .spool import Spool
from .stats import Counters

if TYPE_CHECKING:  # SQLite is loaded when the first Spool is made
    from .spoolfile import Loaded, Row, SpoolFile, TakenOver

__all__ = ["Batch", "Store", "Tell"]

_T = TypeVar("_T")

_OVERHEAD = 40  # bytes that a record takes on disk beside its frame, about
_TAIL_BYTES = 8 << 20  # that may wait in memory for the disk
_LOAD_RECORDS = 500
_LOAD_BYTES = 1 << 20
_CLOSE_SECONDS = 1.0  # that keeping what is left may take when closing has no more time
_ADOPT_SECONDS = 30.0  # how often to look for files of processes that are no more


class Batch:
    """Frames that are written to disk together, and whoever waits for that."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.rows: list[Row] = []
        """The frames by their ``seq``, once they are being written."""
        self.size = 0
        self._done = Event()
        self._error: Exception | None = None
        self._others: list[Batch] = []

    def add(self, frame: bytes) -> None:
        """One more frame."""
        self.frames.append(frame)
        self.size += len(frame) + _OVERHEAD

    def join(self, older: Batch) -> None:
        """The frames of *older* go before these; whoever waits there has to know when these are finished."""
        self.frames[:0] = older.frames
        self.size += older.size
        older.frames = []
        self._others += [older, *older._others]

    def finish(self, error: Exception | None = None) -> None:
        """Let go whoever waits."""
        for batch in (self, *self._others):
            batch._error = error
            batch._done.set()

    def wait(self) -> None:
        """Until the frames are on disk.

        :raises SpoolError, ClientClosedError: they are not.
        """
        while not self._done.wait(60.0):  # with an end, since the disk's thread alone does not keep a hub running
            pass
        if self._error is not None:
            raise type(self._error)(str(self._error)) from self._error


class Tell(Protocol):
    """How the application is told."""

    def __call__(self, kind: NotificationKind, error: BaseException | None = None) -> None:
        """One notification."""


class Store:
    """A spool at work: the part of it in the hub. For one client in one process.

    :param queue: the sender's; filled from here, and read by the sender only.
    :param undelivered: gives all frames in memory that were put on the queue and not settled, in their order.
    :param found: told how many older records were found when the file was opened: they go first.
    :param arrived: called when something was put on the queue.
    :param room: set when there may be room again.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        home: Home,
        queue: Queue[bytes],
        counters: Counters,
        tell: Tell,
        undelivered: Callable[[], list[bytes]],
        found: Callable[[int], None],
        arrived: Callable[[], None],
        room: Event,
    ) -> None:
        self._spool = spool
        self._always = spool.mode == "always"
        self._home = home
        self._queue = queue
        self._counters = counters
        self._tell = tell
        self._undelivered = undelivered
        self._found = found
        self._arrived = arrived
        self._room = room

        template = os.path.abspath(os.fspath(spool.path))
        self._template = template if "{pid}" in template else None
        self._path = template.replace("{pid}", str(os.getpid()))
        self._disk = _DiskThread(home)
        self._file: SpoolFile | None = None
        self._ready = False  # the file is open and what is in it is known
        self._opened_before = False
        self._error: SpoolError | None = None  # why the disk cannot be used now
        self._failures = 0
        self._backoff = Backoff(initial=1.0, maximum=30.0)
        self._abandoned = False
        self._adopter: gevent.Greenlet[..., None] | None = None
        self._retry: gevent.Greenlet[..., None] | None = None

        self._filling = Batch()  # the tail: what the next write takes
        self._writing: Batch | None = None
        self._nothing_is_written = Event()
        self._loading = False
        self._resuming = False
        self._unread = 0  # records on disk that the queue has not taken
        self._cursor = 0  # the seq of the last record on disk that the queue took
        self._last = 0  # the last seq given away
        self._order: deque[tuple[int, int]] = deque()  # (seq, bytes on disk or 0) of what is on the queue and beyond it
        self._bytes = 0  # on disk, and undelivered
        self._was_large = False
        self._forget = 0  # up to here the rows on disk are delivered
        self._forgotten = 0
        self._again: list[Row] = []  # frames in memory whose file was put aside
        self._last_written: list[Row] = []  # what was being written when closing began, and is on disk
        self.overtaken = False
        """Whether records went past others that a failing disk holds back."""
        self.closing = False
        """Whether nothing more is taken, loaded or written, but by the last job."""
        self.unkept: list[bytes] = []
        """After :meth:`keep`: what could not be kept. Meanwhile: what the queue took and was not settled."""
        self._outcome: list[tuple[int | None, Exception | None]] = []
        # What the last job says when it is done: how many records are in the file, where that had to be found out.

    # -- the sender's side ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the file, in the background."""
        self._open()
        if self._template:
            self._adopter = gevent.spawn(self._adopt_now_and_then)

    def put(self, frame: bytes) -> Batch | None:
        """Take *frame*, which is accepted then; or a batch to wait for, which accepts it when it is on disk.

        :raises gevent.queue.Full: there is no room, on the queue or on disk.
        :raises SpoolError: the disk cannot be used, and has to be.
        """
        if self._always:
            return self._put_always(frame)
        if self._is_first_in_line():
            try:
                self._queue.put(frame, False)
            except Full:
                if self._error is not None:
                    raise
            else:
                self.overtaken = self.overtaken or self._unread > 0 or self._writing is not None
                self._order.append((self._next_seq(), 0))
                self._counters.accepted += 1
                return None
        elif self._error is not None:
            raise Full
        self._check_room(frame, _TAIL_BYTES)
        self._filling.add(frame)
        self._counters.accepted += 1
        self._write()
        return None

    def _put_always(self, frame: bytes) -> Batch:
        if self._error is not None:
            raise SpoolError(str(self._error)) from self._error
        if gevent.getcurrent() is self._home.hub:
            raise SpoolError("in a callback of the hub there is no waiting for the disk: send from a greenlet")
        self._check_room(frame, self._spool.max_bytes)
        batch = self._filling
        batch.add(frame)
        self._write()
        return batch

    def refill(self) -> None:
        """After the sender took from the queue: fetch more from disk, where there is more."""
        if self._error is not None and not self._always:
            self._tail_to_queue()
        if self._unread and self._ready and not self._loading and not self.closing:
            free = (self._queue.maxsize or 0) - self._queue.qsize()
            if free * 2 >= (self._queue.maxsize or 0):
                self._loading = True
                count = min(free, _LOAD_RECORDS)
                self._disk.submit(partial(self._sure_file().load, self._cursor, count, _LOAD_BYTES), self._loaded)

    def settled(self, count: int) -> None:
        """The *count* oldest records that the queue took are delivered."""
        for _ in range(count):
            seq, size = self._order.popleft()
            if size:
                self._forget = seq
                self._bytes -= size
        if not self._order and not self._unread:
            self.overtaken = False
            self._bytes = 0
            if self._error is not None and self._ready:  # a full disk has room when the file is empty
                self._resume()
        if not self.closing:
            self._room.set()
            self._write()

    def reject(self, frame: bytes, reason: str) -> None:
        """The oldest record that the queue took is given up: keep it among the rejected."""
        seq, size = self._order.popleft()
        self._bytes -= size
        if self._ready:
            self._disk.submit(partial(self._sure_file().reject, seq, frame, reason), self._after_rejecting)

    @property
    def waiting(self) -> int:
        """Accepted records that are not on the queue."""
        writing = self._writing
        tail = 0 if self._always else len(self._filling.frames) + (len(writing.frames) if writing is not None else 0)
        return self._unread + len(self._last_written) + tail

    def why_full(self) -> str:
        """For whoever was refused."""
        if self._error is not None:
            return f"and its spool cannot be used: {self._error}"
        if not self._ready:
            return "and its spool is still being opened: more than waits for that has no room"
        if self._tail_size() + self._bytes >= self._spool.max_bytes:
            return f"and so is its spool ({self._spool.max_bytes} bytes)"
        return "and its spool has no room for this record now"

    def keep(self, frames: list[bytes], timeout: float) -> None:
        """Close for good; keep on disk what is undelivered. The sender is stopped, and takes nothing any more.

        What could not be kept is ``unkept`` afterwards, also when this is interrupted.

        :param frames: what the queue took and was not settled, in its order.
        :param timeout: seconds that this may take, and a second at least.
        """
        self.closing = True
        self.unkept = frames
        self._end_greenlets()
        deadline = time.monotonic() + max(timeout, _CLOSE_SECONDS)
        ended = Event()
        try:
            while self._writing is not None and time.monotonic() < deadline:
                self._nothing_is_written.clear()
                self._nothing_is_written.wait(deadline - time.monotonic())
            self._submit_last(ended.set)
            ended.wait(max(deadline - time.monotonic(), 0.0))
        finally:
            if not self._abandoned:
                if not self._disk.ended:  # interrupted before the last job: nothing is kept but what is there
                    self._disk.submit(self._let_go_of_file, lambda result, error: None)
                    self._disk.end()
                self._filling.finish(ClientClosedError("the client was closed"))
                if self._writing is not None:
                    why = "the client was closed before the disk had answered, and may have kept the record"
                    self._writing.finish(ClientClosedError(why))
                self._account()

    def keep_without_hub(self, frames: list[bytes]) -> None:
        """:meth:`keep` when the hub is gone, in any thread; it may have been at it already. ``closing`` is set before.

        :param frames: as for :meth:`keep`.
        """
        self.unkept = frames
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            if not self._disk.ended:
                self._submit_last(lambda: None)
            while not self._outcome and time.monotonic() < deadline:
                pause(0.002)
        finally:
            self._account()

    def _submit_last(self, done: Callable[[], None]) -> None:
        rows = [(seq, frame) for (seq, _), frame in self._in_memory()]
        if not self._always:
            if self._writing is not None:  # it may still fail, and nobody would do it again
                rows += self._writing.rows
            rows += [(self._next_seq(), frame) for frame in self._filling.frames]

        def work() -> None:
            try:
                self._outcome.append((self._keep_on_disk(rows), None))
            except Exception as error:
                self._outcome.append((None, error))

        self._disk.submit(work, lambda result, error: done())
        self._disk.end()

    def _let_go_of_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def _in_memory(self) -> list[tuple[tuple[int, int], bytes]]:
        """While closing: all frames in memory that got a ``seq``, with it and their bytes on disk."""
        queued = list(zip(self._order, self.unkept, strict=True))
        return queued + [((seq, len(frame) + _OVERHEAD), frame) for seq, frame in self._last_written]

    def _account(self) -> None:
        """What became of everything, when the last job is done, or is not waited for any more."""
        count, error = self._outcome[0] if self._outcome else (None, TimeoutError("the disk did not answer"))
        in_memory = self._in_memory()
        tail = [] if self._always else [*(self._writing.frames if self._writing else ()), *self._filling.frames]
        undelivered = len(in_memory) + len(tail) + self._unread
        if error is None:
            self._counters.kept += undelivered if count is None else count
            self._counters.dropped += 0 if count is None else undelivered - count
            self.unkept = []
        else:
            from .spoolfile import is_damage

            # What was written to a file that is in order is there; of another, nothing is known.
            removed = not os.path.exists(self._path)
            lost_on_disk = removed or is_damage(error) or bool(self._again) or not (self._ready or self._error is None)
            self.unkept = [frame for (_, size), frame in in_memory if lost_on_disk or not size] + tail
            lost = self._unread if removed or (self._file is not None and self._file.is_put_aside) else 0
            self._counters.dropped += lost
            self._counters.kept += undelivered - len(self.unkept) - lost
        self._unread = 0
        self._filling, self._writing = Batch(), None
        self._order.clear()
        self._last_written.clear()
        if error is not None and undelivered:  # otherwise all that came was refused, with this very error
            self._report(SpoolError(f"{self._path}: what was undelivered at the end could not all be kept: {error}"))

    def abandon(self) -> None:
        """In a forked child, where all this is the parent's. Must not wait."""
        self.closing = self._abandoned = True
        self._end_greenlets()
        error = ClientClosedError("the process was forked")
        self._filling.finish(error)
        if self._writing is not None:
            self._writing.finish(error)

    # -- where a record goes -------------------------------------------------------------------------------------------

    def _is_first_in_line(self) -> bool:
        """Whether nothing older waits that could be sent."""
        if self._error is not None:
            return not self._filling.frames
        return self._ready and not self._unread and not self._filling.frames and self._writing is None

    def _tail_size(self) -> int:
        return self._filling.size + (self._writing.size if self._writing is not None else 0)

    def _check_room(self, frame: bytes, tail_bytes: int) -> None:
        tail = self._tail_size()
        if tail >= tail_bytes or self._bytes + tail + len(frame) + _OVERHEAD > self._spool.max_bytes:
            raise Full

    def _next_seq(self) -> int:
        self._last = max(self._last + 1, time.time_ns())
        return self._last

    def _enqueue(self, seq: int, frame: bytes, size: int) -> bool:
        """Put one on the queue; False when there is no room."""
        try:
            self._queue.put(frame, False)
        except Full:
            return False
        self._order.append((seq, size))
        if size:
            self._cursor = seq
        return True

    def _tail_to_queue(self) -> None:
        """While the disk fails: what waits for it goes to the queue."""
        frames = self._filling.frames
        taken = 0
        while taken < len(frames) and self._enqueue(self._next_seq(), frames[taken], 0):
            self._filling.size -= len(frames[taken]) + _OVERHEAD
            taken += 1
        if taken:
            self.overtaken = self.overtaken or self._unread > 0 or self._writing is not None
            del frames[:taken]
            self._arrived()

    # -- jobs for the disk, and what comes of them ---------------------------------------------------------------------

    def _sure_file(self) -> SpoolFile:
        if self._file is None:
            from .spoolfile import SpoolFile

            self._file = SpoolFile(self._path, self._spool.synchronous, self._disk.breathe)
        return self._file

    def _open(self) -> None:
        forget, cursor, template = self._forget, self._cursor, None if self._opened_before else self._template

        def work() -> tuple[tuple[int, int, int], TakenOver | None]:
            file = self._sure_file()
            file.open()
            if forget:
                file.write((), forget)
            adopted = file.adopt(template, None) if template else None
            return file.measure(cursor), adopted

        self._disk.submit(work, self._opened)

    def _opened(self, result: tuple[tuple[int, int, int], TakenOver | None], error: Exception | None) -> None:
        if error is not None:
            self._recover(error)
            return
        (count, size, last), adopted = result
        self._ready = True
        self._last = max(self._last, last)
        self._bytes = size + count * _OVERHEAD + sum(size for _, size in self._order)
        more = count - self._unread
        self._unread = count
        if more > 0:
            self._counters.adopted += more
            self._found(more)
        elif more < 0:
            self._counters.dropped -= more
            self._report(SpoolError(f"{self._path}: {-more} records in it could not be read any more"))
        self._opened_before = True
        if adopted is not None:
            self._report_problems(adopted)
        self._in_order()

    def _write(self) -> None:
        """Write what waits for the disk, and forget what is delivered, unless a write is under way."""
        if not self._ready or self._writing is not None or self.closing or self._error is not None:
            return
        if not self._filling.frames and not self._again and self._forget == self._forgotten:
            return
        batch, self._filling = self._filling, Batch()
        again, self._again = self._again, []
        self._writing = batch
        rows = batch.rows = [(self._next_seq(), frame) for frame in batch.frames]
        file, forget = self._sure_file(), self._forget
        self._was_large = self._was_large or self._bytes > _LOAD_BYTES
        shrink = self._was_large and not rows and not self._order and not self._unread
        self._was_large = self._was_large and not shrink

        def work() -> str:
            if again:
                file.write(again, 0, known=True)
            if file.write(rows, forget):
                return "was removed while it was in use, and is made anew"
            problem = file.shrink() if shrink else None
            return "" if problem is None else f"could not be made smaller: {problem}"

        self._disk.submit(work, lambda result, error: self._written(error, result, rows, again, forget))

    def _written(
        self, error: Exception | None, problem: str | None, rows: list[Row], again: list[Row], forget: int
    ) -> None:
        self._nothing_is_written.set()
        batch, self._writing = self._writing, None
        if batch is None:  # closed meanwhile, and nobody waits
            return
        if error is not None:
            self._again = again + self._again
            self._filling.join(batch)
            self._failed(error)
            if self._error is not None and not self._always and not self.closing:
                self._tail_to_queue()
            return
        if problem:
            self._report(SpoolError(f"{self._path} {problem}"))
        self._forgotten = forget
        if self._always:
            self._counters.accepted += len(rows)
        for seq, frame in rows:
            size = len(frame) + _OVERHEAD
            self._bytes += size
            if self.closing:
                self._last_written.append((seq, frame))
            elif self._unread or not self._enqueue(seq, frame, size):
                self._unread += 1
        batch.finish()
        self._room.set()
        self._arrived()
        self._write()
        self.refill()

    def _loaded(self, loaded: Loaded, error: Exception | None) -> None:
        self._loading = False
        if self.closing:
            return
        if error is not None:
            self._ready = False
            self._recover(error)
            return
        for seq, frame in loaded.rows:
            if not self._enqueue(seq, frame, len(frame) + _OVERHEAD):
                break
            self._unread -= 1
        missing = loaded.damaged if loaded.rows or loaded.damaged else self._unread
        if missing:
            missing = min(missing, self._unread)
            self._unread -= missing
            self._bytes -= loaded.damaged_bytes + missing * _OVERHEAD
            self._counters.dropped += missing
            self._report(SpoolError(f"{self._path}: {missing} records in it were damaged or are gone"))
        self._arrived()
        self._write()
        self.refill()
        self._room.set()

    def _after_rejecting(self, _: Any, error: Exception | None) -> None:
        if error is not None:
            self._failed(error)

    def _adopt_now_and_then(self) -> None:
        template = self._template or ""
        while True:
            gevent.sleep(_ADOPT_SECONDS)
            if self._ready:
                # Room for the seq of what may come, between what there is and whatever comes next.
                first = self._next_seq() + 1
                self._last = first + (1 << 32)
                self._disk.submit(partial(self._sure_file().adopt, template, first), self._adopted)

    def _adopted(self, adopted: TakenOver, error: Exception | None) -> None:
        if error is not None:
            self._failed(error)
            return
        if self.closing:
            return
        self._counters.adopted += adopted.records
        self._unread += adopted.records
        self._bytes += adopted.size + adopted.records * _OVERHEAD
        self._found(adopted.records)
        self._report_problems(adopted)
        self.refill()

    # -- trouble -------------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        """A write failed. Reading goes on: what is delivered makes room on a disk that is full."""
        if self._ready and self._error is None:
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """The disk, or the file, is not in order: tell, go on without, and try again."""
        if self.closing:
            return
        from .spoolfile import is_damage

        self._failures += 1
        if is_damage(error) and self._failures <= 2:  # one that is damaged again at once is not put aside for ever
            self._put_aside(error)
            return
        if is_damage(error):
            self._ready = False
        problem = error if isinstance(error, SpoolError) else SpoolError(f"{self._path}: {error}")
        self._go_without(problem, partial(self._put_aside, error) if is_damage(error) else self._resume)

    def _go_without(self, problem: SpoolError, mend: Callable[[], None]) -> None:
        """Let nobody wait for the disk, and *mend* it after a while; never more than one waits for that."""
        self._error = problem
        if self._always:
            refused, self._filling = self._filling, Batch()
            refused.finish(problem)
        else:
            self._tail_to_queue()
        self._room.set()
        if self._retry is not None:
            self._retry.kill(block=False)
        self._retry = gevent.spawn_later(self._backoff.delay(self._failures), mend)
        self._report(problem)

    def _resume(self) -> None:
        """See whether the disk takes something again."""
        if self.closing or self._error is None or self._resuming:
            return
        if not self._ready:
            self._open()
            return
        self._resuming = True
        file = self._sure_file()
        empty = not self._order and not self._unread and self._writing is None
        self._disk.submit(partial(file.renew if empty else file.probe, self._forget), self._resumed)

    def _resumed(self, _: Any, error: Exception | None) -> None:
        self._resuming = False
        if error is not None:
            self._ready = self._sure_file().is_open
            self._recover(error)
        elif not self.closing:
            self._in_order()

    def _in_order(self) -> None:
        self._failures = 0
        if self._error is not None:
            self._error = None
            self._say(NotificationKind.SPOOL_RESTORED)
        self._write()
        self.refill()
        self._room.set()

    def _put_aside(self, error: Exception) -> None:
        if self.closing:
            return
        self._ready = False
        self._disk.submit(
            partial(self._sure_file().set_aside, self._cursor),
            lambda result, problem: self._aside(error, result, problem),
        )

    def _aside(self, damage: Exception, result: tuple[str, TakenOver], error: Exception | None) -> None:
        if self.closing:
            return
        if error is not None:
            self._failures += 1
            problem = SpoolError(f"{self._path} is damaged ({damage}) and could not be put aside: {error}")
            self._go_without(problem, partial(self._put_aside, damage))
            return
        aside, saved = result
        self._again = [
            (seq, frame) for (seq, size), frame in zip(self._order, self._undelivered(), strict=True) if size
        ]
        self._report(
            SpoolError(
                f"{self._path} is damaged ({damage}); it is {aside} now, and {saved.records} records of it that could "
                "be read and were not in memory go on in a new one"
            )
        )
        self._open()

    def _report(self, error: Exception) -> None:
        self._counters.spool_failures += 1
        self._say(NotificationKind.SPOOL_FAILED, error)

    def _say(self, kind: NotificationKind, error: Exception | None = None) -> None:
        if gevent.getcurrent() is self._home.hub:  # a log handler may wait, and there nothing may
            gevent.spawn(self._tell, kind, error)
        else:
            self._tell(kind, error)

    def _report_problems(self, adopted: TakenOver) -> None:
        for problem in adopted.problems:
            self._report(SpoolError(problem))

    def _end_greenlets(self) -> None:
        for greenlet in (self._adopter, self._retry):
            if greenlet is not None:
                greenlet.kill(block=False)

    def _keep_on_disk(self, rows: Sequence[Row]) -> int | None:
        """In the disk's thread, as its last job; how many records are in the file, where that has to be found out."""
        from .spoolfile import is_damage

        file = self._sure_file()
        count = None
        try:
            damaged = file.is_put_aside
            if not damaged:
                try:
                    if not file.is_open:
                        file.open()
                    file.write(rows, self._forget, known=True)
                except Exception as error:
                    if not is_damage(error):
                        raise
                    damaged = True
            if damaged:
                file.set_aside(self._cursor)
                file.write(rows, self._forget, known=True)
                count, _, _ = file.measure(-1)
        finally:
            file.close(remove_if_empty=self._template is not None)
        return count


class _DiskThread:
    """A native thread that does one job after the other, and has the hub called with what comes of each."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._jobs: deque[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = deque()
        self._mutex = native.allocate_lock()  # held while a job is done
        self._fork_waits = False
        self._sleep = native.allocate_lock()
        self._sleep.acquire()
        self._begun = False
        self.ended = False
        """Whether no more jobs are taken."""
        fork.track(self)

    def submit(self, work: Callable[[], _T], done: Callable[[_T, Exception | None], None]) -> None:
        """From the hub's thread: do *work* in the disk's, then *done* in the hub, with its result or its error."""
        if self.ended:
            return
        self._jobs.append((work, done))
        if not self._begun:
            try:
                native.start_new_thread(self._run, ())
            except RuntimeError as error:  # there are too many threads: the same as a disk that fails
                self._jobs.clear()
                self._home.call(done, None, error)
                return
            self._begun = True
        self._wake()

    def end(self) -> None:
        """No more jobs; the thread ends after those it has."""
        self.ended = True
        self._wake()

    def breathe(self) -> None:
        """In the middle of a long job: let a fork pass that waits."""
        if self._fork_waits:
            self._mutex.release()
            native.sleep(0.001)  # or this thread would have it again before the other is awake
            self._mutex.acquire()

    def before_fork(self) -> None:
        """Wait for the job: SQLite, forked in the middle of its work, would stand still in the child."""
        self._fork_waits = True
        self._mutex.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._fork_waits = False
        self._mutex.release()

    def after_fork_in_child(self) -> None:
        """There is no such thread here, and a fork of this child's has nothing to wait for."""
        self.ended = True
        self._fork_waits = False
        self._mutex = native.allocate_lock()

    def _wake(self) -> None:
        if self._sleep.locked():
            self._sleep.release()

    def _run(self) -> None:
        while True:
            self._sleep.acquire()
            while self._jobs:
                work, done = self._jobs.popleft()
                result, problem = None, None
                try:
                    with self._mutex:
                        result = work()
                except Exception as error:
                    problem = error
                try:
                    self._home.call(done, result, problem)
                except ClientClosedError:  # the hub is gone, and whoever wanted to know with it
                    pass
            if self.ended:
                return
