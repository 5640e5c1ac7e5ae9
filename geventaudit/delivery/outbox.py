"""The outbox: the owner of the undelivered frames in memory. A spool adds two places, for frames on their way to disk
(``PendingRecords``) and read ahead from there (``Backlog``).

::

    other threads -> inbox --+
                             v
    send() ------------> queue (bound) -> window [ in flight | to send ] -> connection
             |                                            ^ cursor
             +---------> spool ------------^

========================  ==================================================================  ==========================
state                     place                                                               leaves by
========================  ==================================================================  ==========================
handed over by a thread   :attr:`Outbox.inbox`; while it is not empty, the hub's own frames   the sender moves it to the
                          follow it                                                           queue, up to the bound
queued                    :attr:`Outbox.queue`, a gevent ``Queue``                            the sender takes a batch
to send                   :attr:`Outbox.window`, behind the cursor                            the sender writes it
in flight                 :attr:`Outbox.window`, before the cursor, from just before the      delivery pops it; a broken
                          write on                                                            connection sets the cursor
                                                                                              back to 0; nothing moves
given up                  ``given_up``, while the client closes                              the spool, or close()
========================  ==================================================================  ==========================

A signal handler or ``__del__`` may call ``send()`` again at any bytecode. So frames are copied first and removed after:
an interruption may duplicate a record, and never loses one. A deque that changes during an iteration raises, so loops
iterate over a copy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from itertools import accumulate, count, groupby, islice, repeat
from operator import itemgetter
from typing import TYPE_CHECKING

from gevent.event import Event
from gevent.queue import Full, Queue

from ..encoder.draft import Draft
from ..errors import QueueFullError, SpoolError
from ..runtime.clock import Deadline
from ..runtime.copying import copied
from ..runtime.signal import Change, Line, Place, Signal
from ..runtime.workers import may_wait
from ..spool.stream import Entry, Memory, Stream
from ..stats import Counters
from .inbox import Inbox

if TYPE_CHECKING:
    from ..notifications import Notifier
    from ..spool import Spool
    from ..spool.pending import Pending
    from ..spool.store import Store

__all__ = ["MAX_BATCH_BYTES", "MAX_WINDOW_BYTES", "Outbox"]

MAX_BATCH_BYTES = 1 << 16
"""Bytes of joined frames in one write. The last frame may exceed them."""

MAX_WINDOW_BYTES = 8 << 20
"""Bytes in flight at which writing stops. Limits the memory of frames that wait for acknowledgements."""

_MAX_BATCH_RECORDS = 256

_HEARTBEAT: Entry = (Stream(), 0, b"")  # stands for a heartbeat in flight, which is never written again
_UNNUMBERED = Stream()  # of records that have no number when the client closes, and are handed back


class Outbox:
    """The undelivered frames of one client in one process. Constructed and used in the hub's thread.

    :param inbox: the frames that other threads hand over.
    :param queue_size: the most queued records.
    :param spool: the settings of the disk behind the queue; None for no disk.
    """

    def __init__(
        self, inbox: Inbox, queue_size: int, spool: Spool | None, counters: Counters, notifier: Notifier
    ) -> None:
        self.inbox = inbox
        self.queue: Queue[bytes] = Queue(queue_size)
        self.window: deque[Entry] = deque()
        self.cursor = 0
        """The number of entries of the window, from the left, that are in flight."""
        self.in_flight_bytes = 0
        self.stream = Stream()
        """The numbers of this run's records."""
        self.wake = Signal()
        """Wakes the sender."""
        self._counters = counters
        self._room = Change()
        self._line = Line()
        self._refusal: Exception | None = None
        self.is_plain = spool is None
        """True if acceptance depends only on the queue."""
        self._to_resend = 0  # entries after the cursor that were written before
        self._ahead: int | None = None  # the place of the first entry before bring_forward()
        self._flushes: list[tuple[int, Event]] = []
        self.given_up: list[Entry] | None = None
        """The frames of a client that closes, until they are kept or handed back; None before."""
        self._is_moving = False
        self.store: Store | None = None
        if spool is not None:
            from ..spool.store import Store

            memory = Memory(self.stream, self.window, self.queue)
            self.store = Store(spool, memory, counters, notifier, self.wake, self._room)

    # -- in ------------------------------------------------------------------------------------------------------------

    def accept(self, frame: bytes, timeout: float | None) -> None:
        """Accept *frame*, or raise. In the hub, and in a worker, nothing waits.

        :param timeout: seconds to wait for room; None for no limit.
        :raises QueueFullError: there is no room; a SpoolError if the disk fails.
        :raises Exception: the refusal given to :meth:`refuse`, also during the wait.
        """
        # Wake the sender first: if this fails, nothing was accepted.
        if self.wake.is_armed:
            self.wake.set()
        if self.is_plain and not self.inbox.entries:  # the common case, without further calls
            try:
                self.queue.put(frame, False)
            except Full:
                pass
            else:
                if self._refusal is not None:
                    self._withdraw(frame, None)
                return
        self._accept_behind(frame, timeout)

    def _accept_behind(self, frame: bytes, timeout: float | None) -> None:
        pending = self._put_or_wait(frame, timeout)
        if pending is None or self.store is None or not self.store.is_always:
            return
        # Without calls of Python functions: a record on its way must not be refused for lack of stack.
        records = self.store.pending
        while True:
            event = records.written.event
            if pending.is_over:
                break
            try:
                event.wait()
            except (MemoryError, RecursionError):  # mostly of a signal handler
                if records.withdraw(pending):
                    raise
        if pending.error is not None:
            raise type(pending.error)(str(pending.error)) from pending.error

    def _put_or_wait(self, frame: bytes, timeout: float | None) -> Pending | None:
        """Put *frame* after all others, or wait until there is room; see :meth:`accept` and :meth:`_put`."""
        self._check_refusal()
        try:
            return self._put(frame)
        except Full:
            if (timeout is not None and timeout <= 0) or not may_wait():
                raise self.full() from None
            return self._put_when_there_is_room(frame, timeout)

    def _put(self, frame: bytes) -> Pending | None:
        """Put one of the hub's own frames after all others, which makes the order of the records final.

        :returns: the pending record if it goes to the spool; in mode ``always``, the caller has to wait for it.
        :raises gevent.queue.Full: there is no room.
        """
        if self.inbox.entries and self.store is not None:
            self.move_inbox()  # without an agent, the sender does not move it, and the disk may have room
        if self.inbox.entries:
            queued = self.queue.qsize() if self.store is None else 0  # with a spool, the other frames go to disk
            if len(self.inbox) + queued >= (self.queue.maxsize or 0):
                raise Full
            self.inbox.put(frame)
            return None
        pending = self._put_in_order(frame)
        if self._refusal is not None:
            self._withdraw(frame, pending)
        return pending

    def _withdraw(self, frame: bytes, pending: Pending | None) -> None:
        """Take *frame* back, and raise the refusal of a signal handler's close(), unless that has taken *frame*."""
        try:
            if pending is None:
                self.queue.queue.remove(frame)
        except ValueError:
            return
        if pending is not None and self.store is not None and not self.store.pending.withdraw(pending):
            return
        if self._refusal is not None:
            raise self._refusal

    def _put_in_order(self, frame: bytes) -> Pending | None:
        store = self.store
        if store is None or store.is_passed:
            try:
                self.queue.put(frame, False)
                return None
            except Full:
                if store is None:
                    raise
        if store.is_always and not may_wait():
            raise SpoolError("the record has to be on disk before send() returns, and waiting is forbidden here")
        return store.add(frame)

    def _put_when_there_is_room(self, frame: bytes, timeout: float | None) -> Pending | None:
        """Wait for room. Greenlets wait one after the other, in the order of their calls, so that each gets its turn.

        ``Queue.put(timeout=...)`` could put a frame onto the queue after the client was closed.
        """
        deadline = Deadline(timeout)
        place = Place()
        try:
            self._line.join(place)
            while self._refusal is None:
                room = self._room.event if self._line.is_first(place) else None
                if room is not None:
                    try:
                        return self._put(frame)
                    except Full:
                        pass
                if deadline.has_passed():
                    break
                self._line.wait(place, room, deadline.left())
        finally:
            place.is_over = True
            self._line.call_first()
        self._check_refusal()
        raise self.full(f" after {timeout} s")

    def _check_refusal(self) -> None:
        refusal = self._refusal
        if refusal is not None:
            raise type(refusal)(str(refusal)) from refusal

    def full(self, wait: str = "") -> QueueFullError:
        """Return the error of a record for which there is no room. From any thread."""
        why = "" if self.store is None else f" {self.store.why_full()}"
        return QueueFullError(f"the queue is full ({self.queue.maxsize} records){why}{wait}")

    def refuse(self, error: Exception | None) -> None:
        """Refuse all records, those that wait for room too, with *error*; None accepts again."""
        self._refusal = error
        self._set_plain()
        self._room.set()

    def _set_plain(self) -> None:
        self.is_plain = self.store is None and self._refusal is None

    def move_inbox(self, most: int | None = None) -> None:
        """Move what other threads handed over to the queue, or to the disk, up to the bound. In the hub's thread.

        A signal handler that sends meanwhile moves nothing: its record goes behind. *most* records are moved.
        """
        entries = self.inbox.entries
        if self._is_moving or not entries or self.given_up is not None:
            return
        try:
            self._is_moving = True
            for _ in range(len(entries) if most is None else min(most, len(entries))):
                entry = entries[0]
                if entry.claim("hub"):
                    self._put_in_order(entry.frame)
                self.inbox.remove(entry)
        except (Full, QueueFullError, IndexError):  # IndexError: another thread has withdrawn the last one
            return
        finally:
            self._is_moving = False
        if self.store is not None:
            self._room.set()

    # -- out -----------------------------------------------------------------------------------------------------------

    def next_batch(self, max_bytes: int, most: int | None = None) -> list[bytes]:
        """Return the next frames to write, about *max_bytes* and at most *most*, and mark them as in flight."""
        if self.cursor == len(self.window):
            self._fill(max_bytes)
        entries = copied(self.window, self.cursor, min(len(self.window), self.cursor + (most or _MAX_BATCH_RECORDS)))
        batch, size = _up_to([frame for _, _, frame in entries], max_bytes)
        self.cursor += len(batch)
        self.in_flight_bytes += size
        if self._to_resend:
            resent = min(len(batch), self._to_resend)
            self._to_resend -= resent
            self._counters.resent += resent
        return batch

    def _fill(self, max_bytes: int) -> None:
        """Take records into the window, from the oldest place that has some."""
        if self.store is not None and self.store.take_earlier(max_bytes):
            return
        frames, _ = _up_to(copied(self.queue.queue, 0, _MAX_BATCH_RECORDS), max_bytes)
        if frames:
            amount = len(frames)
            moved = islice(iter(self.queue.get_nowait, None), amount)
            entries = zip(repeat(self.stream), count(self.stream.taken + 1), moved)
            # No signal handler comes between these lines, or raises in the middle of the last one, a call in C.
            self.stream.taken += amount
            self.window.extend(entries)
        elif self.store is not None:
            self.store.take(max_bytes)
        self._room.set()

    def waiting(self, at_least: int) -> int:
        """Return the number of records in the window that can be written; fill the window up to *at_least*."""
        while len(self.window) - self.cursor < at_least:
            before = len(self.window)
            self._fill(1)
            if len(self.window) == before:
                break
        return len(self.window) - self.cursor

    def bring_forward(self, place: int) -> None:
        """Make the record at *place* after the next one the next one. Nothing is in flight."""
        self.window.appendleft(self.window[place])
        del self.window[place + 1]
        self._ahead = place

    def add_heartbeat(self) -> None:
        """Note that a heartbeat is in flight, after all other frames in flight."""
        self.window.insert(self.cursor, _HEARTBEAT)
        self.cursor += 1

    def settle(self, amount: int) -> int:
        """Remove the oldest *amount* entries in flight, which are delivered. Return the number of records."""
        delivered = copied(self.window, 0, amount)
        if not delivered:
            return 0
        records = sum(_settle(stream, group) for stream, group in groupby(delivered, key=itemgetter(0)))
        count, size = len(delivered), sum([len(frame) for _, _, frame in delivered])
        removal = islice(iter(self.window.popleft, None), count)
        # As in _fill().
        self._counters.delivered += records
        self.in_flight_bytes -= size
        self.cursor -= count
        self._ahead = None
        deque(removal, maxlen=0)
        self._after_settling()
        return records

    def reject_first(self, reason: str) -> bytes:
        """Give up the oldest record in flight, and return its frame."""
        stream, number, frame = self.window[0]
        self._counters.dropped += 1
        stream.dropped += 1
        if self.store is not None:
            self.store.reject(frame, reason)
        stream.settle(number, number)
        self.in_flight_bytes -= len(frame)
        self.cursor -= 1
        self.window.popleft()
        self._after_settling()
        return frame

    def rewind(self) -> int:
        """Move the cursor back, so that all frames in flight are sent again in order. Return the dropped heartbeats."""
        heartbeats = 0
        if self.cursor:
            in_flight = [entry for entry in self._entries_in_flight() if entry is not _HEARTBEAT]
            heartbeats = self.cursor - len(in_flight)
            self._to_resend += len(in_flight)
            self.cursor = 0
            self.in_flight_bytes = 0
            for _ in range(heartbeats):
                del self.window[next(place for place, entry in enumerate(self.window) if entry is _HEARTBEAT)]
        if self._ahead is not None and self.window:
            self.window.insert(self._ahead + 1, self.window[0])
            self.window.popleft()
        self._ahead = None
        return heartbeats

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def first_in_flight(self) -> Entry | None:
        """The oldest record in flight."""
        return next((entry for entry in self._entries_in_flight() if entry is not _HEARTBEAT), None)

    @property
    def in_flight(self) -> int:
        """Records in flight."""
        return sum(entry is not _HEARTBEAT for entry in self._entries_in_flight())

    def _entries_in_flight(self) -> list[Entry]:
        return copied(self.window, 0, self.cursor)

    @property
    def queued(self) -> int:
        """Records that wait to be written, in memory."""
        if self.given_up is not None:
            return len(self.given_up)
        return len(self.inbox) + self.queue.qsize() + len(self.window) - self.cursor

    @property
    def spooled(self) -> int:
        """Records in the spool and not in memory."""
        return 0 if self.store is None else self.store.waiting

    @property
    def last_accepted(self) -> int:
        """The number of the last record of this run."""
        behind = 0 if self.store is None else self.store.waiting_of_this_run
        return self.stream.taken + self.queue.qsize() + behind + len(self.inbox)

    def add_flush(self, flush: tuple[int, Event]) -> None:
        """Add a pending flush: its event is set when all records up to its number are settled."""
        self._flushes.append(flush)

    def remove_flush(self, flush: tuple[int, Event]) -> None:
        """Forget a flush."""
        if flush in self._flushes:  # else an interruption came before it was added
            self._flushes.remove(flush)

    def end_flushes(self) -> None:
        """End all pending flushes."""
        for _, event in list(self._flushes):
            event.set()

    def _after_settling(self) -> None:
        if self.store is not None:
            self.store.settled()
        for number, event in list(self._flushes):
            if self.stream.settled >= number:
                event.set()

    def take_all(self) -> list[Entry]:
        """Remove all frames, and return them."""
        entries = self._copy_all()
        self._clear(entries)
        return entries

    def _copy_all(self) -> list[Entry]:
        self.rewind()
        frames, claimed = copied(self.queue.queue), self.inbox.claim_all()
        numbered = [frame for frame in claimed if not isinstance(frame, Draft)]
        if self.store is None:
            frames += numbered
        else:
            self.store.add_last(numbered)
        drafts = [(_UNNUMBERED, 0, frame) for frame in claimed if isinstance(frame, Draft)]
        return [*copied(self.window), *zip(repeat(self.stream), count(self.stream.taken + 1), frames), *drafts]

    def _clear(self, entries: list[Entry]) -> None:
        own = [number for stream, number, _ in entries if stream is self.stream]
        self.stream.taken = max(own, default=self.stream.taken)
        self.window.clear()
        self.inbox.remove_claimed()
        deque(islice(iter(self.queue.get_nowait, None), self.queue.qsize()), maxlen=0)

    def settle_all(self) -> None:
        """Note that all frames are settled: :meth:`take_all` has handed them to the caller."""
        self.stream.settle(self.stream.settled + 1, self.stream.taken)
        self._after_settling()

    def end(self, deadline: Deadline) -> bool:
        """Put the last record of a stream with a seal; return False if there is none to put."""
        return False

    def forget(self) -> None:
        """Let go of the keys and the files, in a forked child: they are the parent's."""
        if self.store is not None:
            self.store.abandon()

    def give_up(self, seconds: float | None) -> tuple[list[bytes], BaseException | None]:
        """Remove all frames, and keep them in the spool. Thread-safe if the hub was destroyed.

        :param seconds: the time for the disk, at least a second; None for no limit.
        :returns: the frames that are not kept, and an exception that has interrupted the wait for the disk.
        """
        # They stay until they are counted: an exception may interrupt the close, or the thread may end while it waits
        # for the disk. Another call goes on then.
        if self.given_up is None:
            entries = self._copy_all()
            self.given_up = entries
            self._clear(entries)
        if self.store is None:
            return [frame for _, _, frame in self.given_up], None
        left, interruption = self.store.persist([each for each in self.given_up if each[0] is not _UNNUMBERED], seconds)
        return left + [frame for stream, _, frame in self.given_up if stream is _UNNUMBERED], interruption


def _settle(stream: Stream, entries: Iterable[Entry]) -> int:
    """Note that *entries* of a stream are settled, and return the number of records among them."""
    if stream is _HEARTBEAT[0]:
        return 0
    numbers = [number for _, number, _ in entries]
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        stream.settle(numbers[0], numbers[-1])
    else:
        for number in numbers:
            stream.settle(number, number)
    return len(numbers)


def _up_to(frames: list[bytes], max_bytes: int) -> tuple[list[bytes], int]:
    """Return the first *frames*, until they have *max_bytes* or more, and their size."""
    sizes = list(accumulate(map(len, frames)))
    end = bisect_left(sizes, max_bytes) + 1
    return frames[:end], sizes[:end][-1] if sizes else 0
