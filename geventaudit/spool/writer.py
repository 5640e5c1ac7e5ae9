"""Assignment of frames to segments, and the bytes to append there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from .format import encode, new_magic

__all__ = ["Append", "SegmentWriter", "encode_runs"]


_RUN_BYTES = 8 << 20


class Append(NamedTuple):
    """Bytes to append to one segment."""

    first: int
    """The number of the first frame."""
    magic: bytes
    """The segment's magic."""
    data: bytes
    """The encoded frames."""
    frames: Sequence[bytes]
    """The frames by themselves."""

    @property
    def amount(self) -> int:
        """The number of frames."""
        return len(self.frames)


class SegmentWriter:
    """Assigns frames to segments. Runs in the hub, and computes the checksums, so that the disk thread only writes.

    :param segment_bytes: a segment takes no more frames once it has this size.
    """

    def __init__(self, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes
        self._magic = b""
        self._index = 0
        self._next = 0
        self._size = 0

    def encode(self, first: int, frames: Sequence[bytes]) -> Append:
        """Encode *frames*, which are numbered from *first*, for one segment: the current one, or a new one."""
        if not self._magic or first != self._next or self._size >= self._segment_bytes:
            self._magic, self._index, self._size = new_magic(), 0, 0
        data = encode(self._magic, self._index, frames)
        append = Append(first, self._magic, data, frames)
        count, size = len(frames), len(data)
        # No signal handler comes between these lines.
        self._index += count
        self._next = first + count
        self._size += size
        return append

    def start_new_segment(self) -> None:
        """Append nothing more to the current segment: its state on disk is uncertain."""
        self._magic = b""

    def note_removed(self, magics: Collection[bytes]) -> None:
        """Start a new segment if the current one was removed."""
        if self._magic in magics:
            self._magic = b""


def encode_runs(numbered: Iterable[tuple[int, bytes]]) -> list[Append]:
    """Encode frames for new segments, one for each run of consecutive numbers."""
    appends: list[Append] = []
    first, run = 0, list[bytes]()
    for number, frame in numbered:
        if run and (number != first + len(run) or sum(map(len, run)) >= _RUN_BYTES):
            appends.append(SegmentWriter(0).encode(first, run))
            run = []
        if not run:
            first = number
        run.append(frame)
    if run:
        appends.append(SegmentWriter(0).encode(first, run))
    return appends
