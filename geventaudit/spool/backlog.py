"""Records on disk that are still to be sent, read ahead in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count as count_up
from itertools import islice, repeat
from typing import TYPE_CHECKING, Protocol

from ..runtime.copying import copied
from .stream import Entry, Stream

if TYPE_CHECKING:
    from ..stats import Counters
    from .folder import Folder, Read

__all__ = ["Backlog"]

AHEAD_BYTES = 1 << 20
"""The approximate limit in bytes of frames that are read ahead."""

_MAX_RECORDS = 256  # that the window takes at once


class Outcome(Protocol):
    """The outcome of a job of the disk thread."""

    is_noted: bool
    """Set in the moment in which the state changes."""


class Backlog:
    """The undelivered records of one folder, oldest first.

    :param folder: holds the records.
    :param stream: the records' numbers.
    :param counters: count the records that are lost.
    :param base: a record's number on disk less its number in the stream.
    :param last: the number on disk of the last record.
    :param count: the number of records.
    """

    def __init__(self, folder: Folder, stream: Stream, counters: Counters, *, base: int, last: int, count: int) -> None:
        self.folder = folder
        self.stream = stream
        self._counters = counters
        self.base = base
        self.last = last
        self.count = count
        """Records that the window has not taken."""
        self.failed_reads = 0
        """Failed attempts to read, in a row."""
        self.read_at = 0.0
        """The time of the next attempt, in monotonic seconds."""
        self.advanced = base + stream.settled
        """The number on disk up to which the folder knows of the delivery."""
        self.read_up_to = base + stream.taken
        """The number on disk of the last frame that was read."""
        self._ahead: deque[Entry] = deque()
        self._ahead_bytes = 0

    @property
    def is_loading_due(self) -> bool:
        """True if frames should be read from disk."""
        return self.count > len(self._ahead) and self._ahead_bytes < AHEAD_BYTES // 2

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

    def with_written(self, first: int, count: int) -> tuple[int, int, int]:
        """Return ``last``, ``count`` and ``read_up_to`` after *count* frames, from *first* on, were written."""
        read = first - 1 if self.read_up_to >= self.last else self.read_up_to
        return first + count - 1, self.count + count, read

    def keep_in_memory(self, first: int, frames: Sequence[bytes]) -> None:
        """Keep *frames*, which were just written and are numbered on disk from *first*, if there is room."""
        if self.read_up_to == first - 1 and self._ahead_bytes < AHEAD_BYTES:
            size, last = sum(map(len, frames)), first + len(frames) - 1
            entries = zip(repeat(self.stream), count_up(first - self.base), frames)
            # No signal handler comes between these lines.
            self._ahead_bytes += size
            self.read_up_to = last
            self._ahead.extend(entries)

    def loaded(self, read: Read, outcome: Outcome) -> int:
        """Take the frames that were read, and return how many records turned out to be lost."""
        entries = [(self.stream, number - self.base, frame) for number, frame in read.frames if number <= self.last]
        size = sum(len(frame) for _, _, frame in entries)
        unread = self.count - len(self._ahead)
        lost = min(read.damaged, max(unread - len(entries), 0))
        last = min(read.last, self.last)
        if last >= self.last or not (read.frames or read.damaged):
            lost, last = unread - len(entries), self.last
        # No signal handler comes between these lines.
        self._counters.dropped += lost
        self.stream.dropped += lost
        self.count -= lost
        self._ahead_bytes += size
        self.read_up_to = last
        outcome.is_noted = True
        self._ahead.extend(entries)
        self.settle_rest()
        return lost

    def take(self, window: deque[Entry], max_bytes: int) -> None:
        """Move the next records to *window*, up to *max_bytes* and one more; none if they have to be read first."""
        if not self._ahead:
            return
        self._settle_up_to(self._ahead[0][1] + self.base - 1)
        amount, size = 0, 0
        for _, number, frame in copied(self._ahead, 0, _MAX_RECORDS):
            if size >= max_bytes or number != self.stream.taken + amount + 1:
                break
            amount += 1
            size += len(frame)
        moved = islice(iter(self._ahead.popleft, None), amount)
        # No signal handler comes between these lines.
        self._ahead_bytes -= size
        self.count -= amount
        self.stream.taken += amount
        window.extend(moved)
        self.settle_rest()

    def in_memory(self, first: int, last: int, window: Iterable[Entry]) -> list[tuple[int, bytes]]:
        """Return the frames that are in memory, of the numbers on disk *first* to *last*."""
        entries = [
            (number + self.base, frame) for stream, number, frame in (*window, *self._ahead) if stream is self.stream
        ]
        return sorted(each for each in entries if first <= each[0] <= last)

    def note_lost(self, count: int) -> None:
        """Note that *count* records cannot be read any more."""
        self._counters.dropped += count
        self.stream.dropped += count
        self.count -= count
        self.settle_rest()

    def settle_rest(self) -> None:
        """Settle the numbers behind the last readable record, once there is no other."""
        if not self._ahead and not self.count:
            self._settle_up_to(self.last)

    def _settle_up_to(self, number: int) -> None:
        """Settle the numbers without a readable record after the last taken one, up to *number* on disk."""
        if number - self.base > self.stream.taken:
            self.stream.settle(self.stream.taken + 1, number - self.base)
            self.stream.taken = number - self.base
