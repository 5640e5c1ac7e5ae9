"""A segment: one file of frames with consecutive sequence numbers."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .directory import Directory, close_all, close_descriptor, temporary_name, write_all
from .format import (
    HEADER_SIZE,
    MAX_FRAME,
    OVERHEAD,
    Found,
    Reader,
    encode,
    make_header,
    make_name,
    new_magic,
    parse_header,
    parse_name,
)

__all__ = ["HEADER_SIZE", "MAX_FRAME", "OVERHEAD", "Part", "Segment", "encode", "new_magic"]

_MARK_BYTES = 1 << 15

Sink = Callable[["Segment", int, int], None]
"""Called with a segment and the start and end of a damaged region."""


@dataclass(slots=True)
class Part:
    """The frames that :meth:`Segment.read` found."""

    frames: list[tuple[int, bytes]] = field(default_factory=list)
    damaged: int = 0
    last: int = 0
    """The sequence number up to which the segment is read."""
    size: int = 0
    """Bytes of the frames with their headers."""
    error: OSError | None = None
    """The reason for which the rest of the segment counts as damaged."""


class Segment:
    """An open segment file.

    ``count`` sequence numbers begin at ``first``; their frames are in the first ``end`` bytes. Frames in between may be
    damaged. Bytes after ``end`` do not belong to the segment.
    """

    def __init__(self, name: str, descriptor: int, magic: bytes, first: int) -> None:
        self.name = name
        self.fd = descriptor
        self.magic = magic
        self.first = first
        self.count = 0
        self.is_unreadable = False
        """True if the disk could not read some of it: the file is not removed."""
        # How many of them are certain: after the last whole frame, the number of frames is a guess.
        self.known = 0
        self.end = HEADER_SIZE
        self.file_size = HEADER_SIZE
        # The (index, offset) of some frames, where a reader can begin.
        self._marks = [(0, HEADER_SIZE)]
        # The starts of the damaged regions that were saved.
        self._saved: set[int] = set()
        # Device and inode while the file is parked.
        self._parked: tuple[int, int] | None = None

    @classmethod
    def create(cls, directory: Directory, magic: bytes, first: int, *, is_temporary: bool = False) -> Segment:
        """Make an empty file for the frames from *first* on, without a header; a temporary one for :meth:`publish`."""
        name = temporary_name() if is_temporary else make_name(magic, first)
        return cls(name, directory.open(name, os.O_CREAT | os.O_EXCL), magic, first)

    def publish(self, directory: Directory) -> None:
        """Rename a temporary file to the segment's name."""
        name = make_name(self.magic, self.first)
        directory.rename(self.name, name)
        self.name = name

    @classmethod
    def load(cls, directory: Directory, name: str, counts: Mapping[bytes, int]) -> tuple[Segment, int]:
        """Open a segment of an earlier run, and return it and its highest sequence number, torn frames included.

        :param counts: numbers of frames, by magic, where they are known.
        :raises OSError: the name is no segment's, or the file is not regular or not readable.
        """
        parsed = parse_name(name)
        if parsed is None:
            raise OSError(errno.EINVAL, "its name is not {20 digits}-{16 hex digits}.seg", directory.full_path(name))
        first, magic, limit = parsed
        descriptor = directory.open(name)
        try:
            header = Reader(descriptor, magic, HEADER_SIZE).get(0, HEADER_SIZE)
            magic, first = parse_header(header) or (magic, first)
            segment = cls(name, descriptor, magic, first)
            return segment, segment._measure(limit, counts.get(magic))
        except BaseException:
            close_descriptor(descriptor)
            raise

    def _measure(self, limit: int | None, count: int | None) -> int:
        """Set ``count`` and ``end``, and return the highest sequence number in the file, torn frames included.

        The frames are counted by their magics. All frames are read only if the last one does not confirm that number.
        """
        self.file_size = self.end = os.fstat(self.fd).st_size
        reader = self._reader()
        magics, last = reader.magics(HEADER_SIZE)
        found = reader.frame_at(last) if last >= 0 else None
        is_whole = found is not None and found.position + 1 == magics and found.end == self.file_size
        if limit is None and is_whole and count in (None, magics):
            self.count = self.known = magics
            return self.last
        self.count, end = 0, min(HEADER_SIZE, self.file_size)
        for _, found in self._walk(0):
            if limit is not None and found.position >= limit:
                break
            self.count, end = found.position + 1, found.end
        if limit is not None:
            self.count, self.known, self.end = limit, limit, end
            return max(self.last, self.first + magics - 1)
        self.known = self.count
        if count is not None:
            self.count = self.known = count
        elif end == self.file_size or reader.is_torn(end, self.count):
            self.end = end
        else:
            # An unreadable rest counts as one frame at least.
            self.count += max(1, reader.magics(end)[0])
        return max(self.last, self.first + magics - 1)

    def _reader(self, *, skips: bool = True) -> Reader:
        return Reader(self.fd, self.magic, self.end, skips=skips)

    @property
    def last(self) -> int:
        """The sequence number of the last frame; ``first - 1`` for none."""
        return self.first + self.count - 1

    @property
    def header(self) -> bytes:
        """The header of the file."""
        return make_header(self.magic, self.first)

    def extend(self, count: int, size: int) -> None:
        """Note that *count* frames were written in *size* bytes."""
        self._mark(self.count, self.end)
        self.count += count
        self.known = self.count
        self.end += size
        self.file_size = self.end

    def end_before(self, later: Segment) -> None:
        """Give up the numbers from the beginning of a later segment on.

        Frames with such numbers belong to a failed append that could not be removed. A *later* segment without a whole
        frame does not prove that, and ends only the guessed numbers.
        """
        limit = later.first - self.first
        self.count = min(self.count, limit if later.known else max(self.known, limit))
        self.known = min(self.known, self.count)

    def write_frames(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """Append frames with increasing sequence numbers, each at the index of its number."""
        buffers = [] if self.count else [self.header]
        buffers += [encode(self.magic, seq - self.first, [frame]) for seq, frame in frames]
        # The header is counted in ``end`` from the start.
        offset = self.end if self.count else 0
        written = write_all(self.fd, [b"".join(buffers)], offset)
        self.extend(frames[-1][0] + 1 - self.first - self.count, offset + written - self.end)

    def undelivered(self, cursor: int) -> tuple[int, int]:
        """Return the number of frames after the sequence number *cursor*, and their approximate size in bytes."""
        index = min(max(cursor + 1 - self.first, 0), self.count)
        if index == self.count:
            return 0, 0
        at = self._mark_before(index)
        low, offset = self._marks[at]
        high, end = self._marks[at + 1] if at + 1 < len(self._marks) else (self.count, self.end)
        if high > low:
            offset += (end - offset) * (index - low) // (high - low)
        return self.count - index, self.end - offset

    def read(self, after: int, max_bytes: int, sink: Sink | None = None, *, skips: bool = True) -> Part:
        """Read the frames after the sequence number *after*: at least one if there is any, about *max_bytes* at most.

        :param sink: called once for each damaged region that costs frames.
        :param skips: False to read up to a page only that the disk cannot read.
        :raises OSError: without *skips*, the first frame is in such a page.
        """
        expected = max(after + 1 - self.first, 0)
        part = Part(last=after)
        clean = self._marks[self._mark_before(expected)][1]
        try:
            for clean_end, found in self._walk(expected, skips=skips):
                if found.position >= self.count:
                    break
                clean = found.end
                if found.position < expected:
                    continue
                if found.position > expected:
                    part.damaged += found.position - expected
                    self._save(clean_end, found.start, sink)
                expected = found.position + 1
                self._mark(expected, found.end)
                part.frames.append((self.first + found.position, found.frame))
                part.size += found.end - found.start
                if part.size >= max_bytes and expected < self.count:
                    part.last = self.first + expected - 1
                    return part
            if expected < self.count:
                self._save(clean, self.end, sink)
        except OSError as error:
            if not skips:
                if not part.frames:
                    raise
                part.last = self.first + expected - 1
                return part
            self.is_unreadable = True
            part.error = error
        part.damaged += max(0, self.count - expected)
        part.last = max(after, self.last)
        return part

    def _walk(self, index: int, *, skips: bool = True) -> Iterator[tuple[int, Found]]:
        """Yield whole frames in order, from *index* or before it on, and where the frame before each ended.

        Frames in a wrong place are left out: those with a smaller index than the frame before, and those ahead of
        others that are found again later.
        """
        reader = self._reader(skips=skips)
        expected, position = self._marks[self._mark_before(index)]
        clean = position
        while True:
            found = reader.next(position)
            self.is_unreadable |= reader.skipped > 0
            if found is None:
                return
            position = found.end
            if found.position < expected or (found.position > expected and reader.has_later(found)):
                continue
            yield clean, found
            clean, expected = found.end, found.position + 1

    def _mark_before(self, index: int) -> int:
        return bisect_right(self._marks, index, key=lambda mark: mark[0]) - 1

    def _mark(self, index: int, offset: int) -> None:
        mark_index, mark_offset = self._marks[-1]
        if index > mark_index and offset >= mark_offset + _MARK_BYTES:
            self._marks.append((index, offset))

    def _save(self, start: int, end: int, sink: Sink | None) -> None:
        if sink is not None and start < end and start not in self._saved:
            sink(self, start, end)
            self._saved.add(start)

    def shrink(self, size: int) -> int:
        """Give up the frames that are not wholly within *size* bytes, and return the number of the others."""
        self.end = self.file_size = size
        while len(self._marks) > 1 and self._marks[-1][1] > size:
            self._marks.pop()
        count, end = self._marks[-1]
        for _, found in self._walk(count):
            count, end = found.position + 1, found.end
        self.count = self.known = min(self.count, count)
        self.end = min(end, size)
        return self.count

    @property
    def is_parked(self) -> bool:
        """True while the file is closed to save a descriptor."""
        return self._parked is not None

    def park(self, directory: Directory) -> None:
        """Close the file until :meth:`unpark`."""
        self._parked = directory.identity(self.name)
        self.close()

    def unpark(self, directory: Directory) -> None:
        """Open the file again.

        :raises OSError: the file was removed or replaced.
        """
        if not self.is_in_place(directory):
            raise OSError(errno.ENOENT, "removed or replaced by another program", directory.full_path(self.name))
        self.fd = directory.open(self.name)
        self._parked = None

    def is_in_place(self, directory: Directory) -> bool:
        """Return True if the file in the folder is this file."""
        if self._parked is not None:
            return directory.identity(self.name) == self._parked
        return directory.holds(self.name, self.fd)

    def replace(self, descriptor: int, size: int) -> None:
        """Continue with a copy of the file."""
        self.close()
        self.fd = descriptor
        self.file_size = size

    def close(self) -> None:
        """Close the descriptor. Idempotent, never raises."""
        descriptor, self.fd = self.fd, -1
        close_all(descriptor)
