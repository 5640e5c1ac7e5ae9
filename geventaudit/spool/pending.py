"""Records that wait to be written to disk."""

from __future__ import annotations

from collections import deque

from ..runtime.copying import copied
from ..runtime.signal import Change
from .format import OVERHEAD

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
        frames: list[bytes] = []
        for pending in copied(self.records):
            if max_bytes <= 0:
                break
            frames.append(pending.frame)
            max_bytes -= len(pending.frame)
        self.writing = len(frames)
        return frames

    def end_writing(self, *, keep: bool, error: Exception | None = None) -> None:
        """Let go of the records that were being written, or *keep* them to be written again."""
        count, self.writing = self.writing, 0
        for pending in copied(self.records, 0, count):
            pending.error, pending.is_over = error, not keep
        if not keep:
            self.remove(count)
        self.written.set()

    def remove(self, count: int) -> None:
        """Let go of the oldest *count* records."""
        for _ in range(count):
            self.size -= len(self.records.popleft().frame) + OVERHEAD

    def refuse_all(self, error: Exception) -> None:
        """Refuse all records."""
        while self.records:
            pending = self.records.popleft()
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
