"""The format of a segment file, and a reader that continues after damage.

All numbers are big-endian.

======  ===========================  ======================================================
bytes   header                       remark
======  ===========================  ======================================================
8       signature
4       format version
8       magic                        random for each segment
8       sequence number              of the first frame
4       CRC-32                       of the above
======  ===========================  ======================================================

======  ===========================  ======================================================
bytes   before each frame            remark
======  ===========================  ======================================================
8       magic
4       index                        of the frame within the segment, from 0
4       length                       of the frame in bytes
4       CRC-32                       of index, length and frame
======  ===========================  ======================================================

The name of the file, ``{first}-{magic}.seg``, replaces a damaged header. ``{first}-{magic}.{limit}.seg`` has no frames
from index *limit* on; later bytes belong to a failed append.

After damage, a reader continues at the next magic followed by a frame with the right CRC. Frames contain the magic only
by chance, so no frame contains another one.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "HEADER_SIZE",
    "MAX_FRAME",
    "OVERHEAD",
    "Append",
    "Found",
    "Reader",
    "encode",
    "encode_runs",
    "make_header",
    "make_name",
    "make_torn",
    "new_magic",
    "parse_header",
    "parse_name",
]

OVERHEAD = 20
"""Bytes before each frame."""

MAX_FRAME = 64 << 20
"""The longest frame in bytes."""

_SIGNATURE = b"gaSEGM\r\n"
_VERSION = 1
_HEADER = struct.Struct(">8sL8sQ")
HEADER_SIZE = _HEADER.size + 4
_MAGIC_SIZE = 8
_MAX_SEQ = 1 << 62
_CHECKED = struct.Struct(">LL")
_CRC = struct.Struct(">L")
_FIELDS = struct.Struct(">LLL")
_PIECE = 1 << 18
_PAGE = 4096
_RUN_BYTES = 8 << 20
_MAX_UNREADABLE = 256  # pages in a row, after which a disk counts as broken
_NAME = re.compile(r"([0-9]{20})-([0-9a-f]{16})(?:\.([0-9]{1,10}))?\.seg", re.ASCII)


def new_magic() -> bytes:
    """Return the magic for a new segment."""
    return os.urandom(_MAGIC_SIZE)


def encode(
    magic: bytes,
    index: int,
    frames: Sequence[bytes],
    _pack: Callable[[int, int], bytes] = _CHECKED.pack,
    _pack_crc: Callable[[int], bytes] = _CRC.pack,
    _crc32: Callable[..., int] = zlib.crc32,
) -> bytes:
    """Return *frames*, of MAX_FRAME bytes at most, with their headers; the first frame gets *index*."""
    parts: list[bytes] = []
    for frame in frames:
        checked = _pack(index, len(frame))
        parts += magic, checked, _pack_crc(_crc32(frame, _crc32(checked))), frame
        index += 1
    return b"".join(parts)


def make_header(magic: bytes, first: int) -> bytes:
    """Return the header of a segment."""
    header = _HEADER.pack(_SIGNATURE, _VERSION, magic, first)
    return header + zlib.crc32(header).to_bytes(4, "big")


def make_torn(magic: bytes, index: int, size: int) -> bytes:
    """Return *size* bytes that look like the beginning of an incomplete frame."""
    return (magic + _FIELDS.pack(index, MAX_FRAME, 0)).ljust(size, b"\0")[:size]


def parse_header(data: bytes) -> tuple[bytes, int] | None:
    """Return magic and first sequence number, or None for a damaged header."""
    if len(data) < HEADER_SIZE or zlib.crc32(data[: _HEADER.size]) != int.from_bytes(data[_HEADER.size :], "big"):
        return None
    signature, version, magic, first = _HEADER.unpack_from(data)
    return (magic, first) if (signature, version) == (_SIGNATURE, _VERSION) and first <= _MAX_SEQ else None


def make_name(magic: bytes, first: int) -> str:
    """Return the file name of a segment."""
    return f"{first:020d}-{magic.hex()}.seg"


def parse_name(name: str) -> tuple[int, bytes, int | None] | None:
    """Return first sequence number, magic and limit, or None if *name* is not the name of a segment."""
    match = _NAME.fullmatch(name)
    if not match or int(match[1]) > _MAX_SEQ:
        return None
    return int(match[1]), bytes.fromhex(match[2]), int(match[3]) if match[3] else None


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


def encode_runs(numbered: Iterable[tuple[int, bytes]]) -> list[Append]:
    """Encode frames for new segments, one for each run of consecutive numbers."""
    runs: list[tuple[int, list[bytes]]] = []
    end = size = 0
    for number, frame in numbered:
        if not runs or number != end or size >= _RUN_BYTES:
            runs.append((number, []))
            size = 0
        runs[-1][1].append(frame)
        end, size = number + 1, size + len(frame)
    return [Append(first, magic := new_magic(), encode(magic, 0, run), run) for first, run in runs]


class Found(NamedTuple):
    """A whole frame in a segment."""

    start: int
    end: int
    position: int
    """The index within the segment."""
    frame: bytes


class Reader:
    """Bytes of a file up to *end*, read in pieces.

    :param skips: True to read zeros in place of pages that the disk cannot read; False to raise its error there.
    """

    def __init__(self, descriptor: int, magic: bytes, end: int, *, skips: bool = True) -> None:
        self._fd = descriptor
        self._magic = magic
        self._end = end
        self._skips = skips
        self.skipped = 0
        """Pages that were skipped."""
        self._skipped_in_a_row = 0
        self._base = 0
        self._data = b""

    def _load(self, offset: int, length: int) -> None:
        most = max(0, self._end - offset)
        size = min(max(length, _PIECE), most)
        try:
            self._data = os.pread(self._fd, size, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._data = self._load_pages(offset, offset + size, offset + min(length, most))
        self._base = offset

    def _load_pages(self, start: int, end: int, needed: int) -> bytes:
        """Return the bytes from *start* to *end*, read page by page; without skips, the readable ones at the start.

        :raises OSError: too many pages in a row are unreadable; without skips, one before *needed* is.
        """
        pages: list[bytes] = []
        while start < end:
            stop = min(start - start % _PAGE + _PAGE, end)
            try:
                page = os.pread(self._fd, stop - start, start)
                self._skipped_in_a_row = 0
            except OSError as error:
                if not self._skips and start >= needed:
                    break
                if error.errno != errno.EIO or not self._skips or self._skipped_in_a_row >= _MAX_UNREADABLE:
                    raise
                self.skipped += 1
                self._skipped_in_a_row += 1
                page = bytes(stop - start)
            pages.append(page)
            start = stop
        return b"".join(pages)

    def get(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*, fewer at the end of the file."""
        at = offset - self._base
        if at < 0 or at + length > len(self._data):
            self._load(offset, length)
            at = 0
        return self._data[at : at + length]

    def find(self, pattern: bytes, offset: int) -> int:
        """Return the offset of the first *pattern* at or after *offset*, or -1."""
        while offset + len(pattern) <= self._end:
            if not 0 <= offset - self._base <= len(self._data) - len(pattern):
                self._load(offset, len(pattern))
                if len(self._data) < len(pattern):
                    break
            at = self._data.find(pattern, offset - self._base)
            if at >= 0:
                return self._base + at
            offset = self._base + len(self._data) - len(pattern) + 1
        return -1

    def frame_at(self, offset: int) -> Found | None:
        """Return the frame that begins at *offset*, or None if there is none or it is damaged."""
        head = self.get(offset, OVERHEAD)
        if len(head) < OVERHEAD or not head.startswith(self._magic):
            return None
        index, length, crc = _FIELDS.unpack_from(head, _MAGIC_SIZE)
        start = offset + OVERHEAD
        if length > MAX_FRAME or start + length > self._end:
            return None
        frame = self.get(start, length)
        if len(frame) < length or zlib.crc32(frame, zlib.crc32(head[_MAGIC_SIZE:-4])) != crc:
            return None
        return Found(offset, start + length, index, frame)

    def next(self, offset: int) -> Found | None:
        """Return the first whole frame at or after *offset*, or None."""
        found = self.frame_at(offset)
        while found is None and (offset := self.find(self._magic, offset + 1)) >= 0:
            found = self.frame_at(offset)
        return found

    def has_later(self, found: Found) -> bool:
        """Return True if a frame with the same index begins after this one."""
        pattern = self._magic + found.position.to_bytes(4, "big")
        offset = found.start
        while (offset := self.find(pattern, offset + 1)) >= 0:
            if self.frame_at(offset):
                return True
        return False

    def magics(self, offset: int) -> tuple[int, int]:
        """Return the number of magics from *offset* on, and the offset of the last one, or -1."""
        count, last = 0, -1
        while offset + _MAGIC_SIZE <= self._end:
            self._load(offset, _PIECE << 2)
            if here := self._data.count(self._magic):
                count += here
                last = offset + self._data.rfind(self._magic)
            # A magic that began in this piece is not found again in the next.
            if len(self._data) < _MAGIC_SIZE:
                break
            offset = max(offset + len(self._data) - _MAGIC_SIZE + 1, last + _MAGIC_SIZE)
        return count, last

    def is_torn(self, offset: int, index: int) -> bool:
        """Return True if the file from *offset* on is only the beginning of the frame *index*."""
        head = self.get(offset, OVERHEAD)
        expected = self._magic + index.to_bytes(4, "big")
        if head[: len(expected)] != expected[: len(head)]:
            return False
        if len(head) >= _MAGIC_SIZE + 8:
            length = int.from_bytes(head[_MAGIC_SIZE + 4 : _MAGIC_SIZE + 8], "big")
            if length > MAX_FRAME or offset + OVERHEAD + length <= self._end:
                return False
        return self.find(self._magic, offset + 1) < 0
