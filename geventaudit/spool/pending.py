"""Records that wait to be written to disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count, islice, repeat
from operator import attrgetter

from ..runtime.copying import copied
from ..runtime.signal import Change
from .format import OVERHEAD
from .stream import Memory

__all__ = ["Pending", "PendingRecords"]


class Pending:
    """A record that waits to be written."""

    __slots__ = ("error", "frame", "is_over")

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.is_over = False
        """True once the record is on disk or refused."""
        self.error: Exception | None = None
        """The reason if the record was refused."""


class PendingRecords:
    """The records that wait to be written, in their order, and the greenlets that wait for the writes.

    A signal handler may add a record at any moment, so records are copied first and removed after.
    """

    def __init__(self) -> None:
        self.records: deque[Pending] = deque()
        self.size = 0
        """Bytes that the records will take on disk."""
        self.writing = 0
        """The number of records, from the oldest on, that the disk thread writes now."""
        self.written = Change()
        """Set when records were written or refused."""
        self.has_news = False
        """True if it has to be set."""

    def __len__(self) -> int:
        return len(self.records)

    def add(self, frame: bytes) -> Pending:
        """Add a record after all others."""
        pending = Pending(frame)
        self.size = self.size + len(frame) + OVERHEAD if self.records else len(frame) + OVERHEAD
        self.records.append(pending)
        return pending

    def start_writing(self, max_bytes: int) -> list[bytes]:
        """Return the oldest frames, about *max_bytes*, for the disk thread."""
        frames = self._oldest(max_bytes)
        self.writing = len(frames)
        return frames

    def _oldest(self, max_bytes: int) -> list[bytes]:
        frames: list[bytes] = []
        for pending in copied(self.records):
            if max_bytes <= 0:
                break
            frames.append(pending.frame)
            max_bytes -= len(pending.frame)
        return frames

    def end_writing(self, error: Exception | None) -> tuple[Iterator[object], int]:
        """End the wait for the records that were being written: with *error*, or since they are on disk.

        :returns: an iterator that removes them from ``records``, and their size. The caller subtracts that from
            ``size``, sets ``writing`` to 0 and ``has_news`` to True, and exhausts the iterator, without a call between.
        """
        ended = copied(self.records, 0, self.writing)
        for pending in ended:
            pending.error, pending.is_over = error, True
        size = sum(len(pending.frame) + OVERHEAD for pending in ended)
        return islice(iter(self.records.popleft, None), len(ended)), size

    def refuse_writing(self, error: Exception | None) -> None:
        """Refuse the records that were being written."""
        removal, size = self.end_writing(error)
        self.size -= size
        self.writing = 0
        self.has_news = True
        deque(removal, maxlen=0)

    def call_senders(self) -> None:
        """Wake the senders whose records were written or refused."""
        if self.has_news:
            self.written.set()
            self.has_news = False

    def take(self, memory: Memory, max_bytes: int) -> None:
        """Move the oldest records to the window, about *max_bytes*."""
        frames = self._oldest(max_bytes)
        size = sum(len(frame) + OVERHEAD for frame in frames)
        amount = len(frames)
        removed = map(attrgetter("frame"), islice(iter(self.records.popleft, None), amount))
        entries = zip(repeat(memory.stream), count(memory.stream.taken + 1), removed)
        # No signal handler comes between these lines.
        self.size -= size
        memory.stream.taken += amount
        memory.window.extend(entries)

    def refuse(self, error: Exception, spared: int = 0) -> None:
        """Refuse all records but the oldest *spared*."""
        while len(self.records) > spared:
            pending = self.records.pop()
            self.size -= len(pending.frame) + OVERHEAD
            pending.error, pending.is_over = error, True
        self.written.set()

    def frames(self) -> list[bytes]:
        """Return the frames of all records."""
        return [pending.frame for pending in copied(self.records)]

    def withdraw(self, pending: Pending) -> bool:
        """Take a record back. Return False if it is not here any more."""
        if any(each is pending for each in copied(self.records, 0, self.writing)):
            return False
        try:
            self.records.remove(pending)
        except ValueError:
            return False
        self.size -= len(pending.frame) + OVERHEAD
        return True
