"""Records on disk that are still to be sent, read ahead in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .stream import Entry, Stream

if TYPE_CHECKING:
    from .folder import Folder, Read

__all__ = ["Backlog"]

AHEAD_BYTES = 1 << 20
"""The approximate limit in bytes of frames that are read ahead."""


class Ranges:
    """A set of numbers that is mostly consecutive."""

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def __contains__(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self._ranges)

    def add(self, first: int, last: int) -> None:
        """Add the numbers *first* to *last*, which are above all others."""
        if self._ranges and self._ranges[-1][1] == first - 1:
            first, _ = self._ranges.pop()
        self._ranges.append((first, last))

    def forget_up_to(self, number: int) -> None:
        """Remove the ranges that end at *number* or before."""
        self._ranges = [each for each in self._ranges if each[1] > number]


class Backlog:
    """The undelivered records of one folder, oldest first.

    :param folder: holds the records.
    :param stream: the records' numbers.
    :param base: a record's number on disk less its number in the stream.
    :param last: the number on disk of the last record.
    :param count: the number of records.
    """

    def __init__(self, folder: Folder, stream: Stream, base: int, last: int, count: int) -> None:
        self.folder = folder
        self.stream = stream
        self.base = base
        self.last = last
        self.count = count
        """Records that the window has not taken."""
        self.failed_reads = 0
        """Failed attempts to read, in a row."""
        self.advanced = base + stream.settled
        """The number on disk up to which the folder knows of the delivery."""
        self.on_disk = Ranges()
        """The numbers on disk of the records that this run wrote."""
        self._read = base + stream.taken
        self._ahead: deque[tuple[int, bytes]] = deque()
        self._ahead_bytes = 0

    @property
    def is_loading_due(self) -> bool:
        """True if frames should be read from disk."""
        return self.count > len(self._ahead) and self._ahead_bytes < AHEAD_BYTES // 2

    @property
    def read_up_to(self) -> int:
        """The number on disk of the last frame that was read."""
        return self._read

    @property
    def is_advance_due(self) -> bool:
        """True if the folder does not know of all deliveries."""
        return self.advanced < self.settled_on_disk

    @property
    def settled_on_disk(self) -> int:
        """The number on disk up to which all records are settled."""
        return min(self.stream.settled + self.base, self.last)

    @property
    def is_finished(self) -> bool:
        """True if all records are settled."""
        return not self.count and self.settled_on_disk >= self.last

    def add(self, first: int, frames: Sequence[bytes]) -> None:
        """Note that *frames*, numbered on disk from *first*, were written. The first ones stay in memory."""
        self.on_disk.add(first, first + len(frames) - 1)
        self.on_disk.forget_up_to(self.settled_on_disk)
        if self._read >= self.last and self._ahead_bytes < AHEAD_BYTES:
            self._ahead.extend(zip(range(first, first + len(frames)), frames, strict=False))
            self._ahead_bytes += sum(map(len, frames))
            self._read = first + len(frames) - 1
        elif self._read >= self.last:
            self._read = first - 1
        self.last = first + len(frames) - 1
        self.count += len(frames)

    def loaded(self, read: Read) -> int:
        """Take the frames that were read, and return how many records turned out to be lost."""
        frames = [each for each in read.frames if each[0] <= self.last]
        self._ahead.extend(frames)
        self._ahead_bytes += sum(len(frame) for _, frame in frames)
        unread = self.count - len(self._ahead) + len(frames)
        lost = min(read.damaged, max(unread - len(frames), 0))
        self._read = min(read.last, self.last)
        if self._read >= self.last or not (read.frames or read.damaged):
            lost = unread - len(frames)
            self._read = self.last
        self.count -= lost
        self.stream.dropped += lost
        if not self._ahead and not self.count:
            self._settle_up_to(self.last)
        return lost

    def take(self, max_bytes: int) -> list[Entry]:
        """Return the next records, up to *max_bytes* and one more; none if they have to be read first."""
        entries: list[Entry] = []
        size = 0
        while self._ahead and size < max_bytes:
            number, frame = self._ahead[0]
            self._settle_up_to(number - 1)
            entries.append((self.stream, number - self.base, frame))
            self.stream.taken = number - self.base
            self._ahead.popleft()
            size += len(frame)
        self._ahead_bytes -= size
        self.count -= len(entries)
        if not self.count and not self._ahead:
            self._settle_up_to(self.last)
        return entries

    def in_memory(self, first: int, last: int, window: Iterable[Entry]) -> list[tuple[int, bytes]]:
        """Return the frames that are in memory, of the numbers on disk *first* to *last*."""
        taken = [(number + self.base, frame) for stream, number, frame in window if stream is self.stream]
        return sorted(each for each in (*taken, *self._ahead) if first <= each[0] <= last)

    def note_lost(self, count: int) -> None:
        """Note that *count* records cannot be read any more, and are counted as dropped already."""
        self.stream.dropped += count
        self.count -= count
        if not self._ahead and not self.count:
            self._settle_up_to(self.last)

    def _settle_up_to(self, number: int) -> None:
        """Settle the numbers without a readable record after the last taken one, up to *number* on disk."""
        if number - self.base > self.stream.taken:
            self.stream.settle(self.stream.taken + 1, number - self.base)
            self.stream.taken = number - self.base
