"""Small files beside the segments: the cursor, and the rotating pairs for rejected frames and damaged regions."""

from __future__ import annotations

import base64
import errno
import json
import os
import struct
import time
import zlib
from collections.abc import Iterable

from .directory import Directory, close_all, close_descriptor, write_all

__all__ = ["Cursor", "RotatingPair", "damaged_entry", "rejected_entry"]

_MAX_COUNTS = 1 << 16
_NOTE_BYTES = 1 << 13
_REASON_CHARACTERS = 500


class Cursor:
    """The file ``cursor``: a record with the sequence number up to which all frames are delivered.

    ========  =====================
    bytes     field (big-endian)
    ========  =====================
    8         signature
    8         sequence number
    4         CRC-32 of the above
    ========  =====================

    A missing or damaged record counts as 0. The file is made when the first value is written.

    Behind it, a folder whose client was closed has the magic (8 bytes) and the number of frames (4 bytes) of each
    segment, and the CRC-32 of these (4 bytes): if the end of a segment is damaged, it is known how many frames it had.
    """

    NAME = "cursor"
    _RECORD = struct.Struct(">8sQL")
    _SIGNATURE = b"gaCURS1\n"
    _COUNT = struct.Struct(">8sL")

    def __init__(self) -> None:
        self.seq = 0
        self.counts: dict[bytes, int] = {}
        """The number of frames of the segments with these magics."""
        self._written = 0
        self._fd = -1

    def load(self, directory: Directory) -> None:
        """Read the record."""
        try:
            self._fd = directory.open(self.NAME)
        except FileNotFoundError:
            return
        try:
            data = os.pread(self._fd, self._RECORD.size, 0)
            self._load_counts()
        except OSError:
            return
        if len(data) == self._RECORD.size:
            signature, seq, crc = self._RECORD.unpack(data)
            if signature == self._SIGNATURE and crc == zlib.crc32(data[:-4]):
                self.seq = self._written = seq

    def _load_counts(self) -> None:
        data = os.pread(self._fd, _MAX_COUNTS * self._COUNT.size + 4, self._RECORD.size)
        counts, crc = data[:-4], data[-4:]
        if counts and len(counts) % self._COUNT.size == 0 and zlib.crc32(counts).to_bytes(4, "big") == crc:
            self.counts = dict(self._COUNT.iter_unpack(counts))

    def _open(self, directory: Directory) -> None:
        if self._fd < 0:
            self._fd = directory.open(self.NAME, os.O_CREAT)

    def write_counts(self, directory: Directory, counts: Iterable[tuple[bytes, int]]) -> None:
        """Write the numbers of frames of the segments with these magics.

        :raises OSError: they are not written.
        """
        self._open(directory)
        data = b"".join(self._COUNT.pack(magic, count) for magic, count in counts)
        os.ftruncate(self._fd, self._RECORD.size)
        os.pwrite(self._fd, data + zlib.crc32(data).to_bytes(4, "big"), self._RECORD.size)

    def write(self, directory: Directory) -> None:
        """Write the record if it has changed.

        :raises OSError: the record is not written; the next call tries again.
        """
        if self.seq <= self._written:
            return
        self._open(directory)
        record = self._RECORD.pack(self._SIGNATURE, self.seq, 0)[:-4]
        data = record + zlib.crc32(record).to_bytes(4, "big")
        if os.pwrite(self._fd, data, 0) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory.full_path(self.NAME))
        self._written = self.seq

    def restore(self, directory: Directory) -> bool:
        """Make the file anew if it was removed, replaced or truncated, and return True then."""
        if not self._written or (
            self._fd >= 0 and directory.holds(self.NAME, self._fd) and os.fstat(self._fd).st_size >= self._RECORD.size
        ):
            return False
        self.close()
        self._written = 0
        self.write(directory)
        return True

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        descriptor, self._fd = self._fd, -1
        close_all(descriptor)


class RotatingPair:
    """Two files of bounded size: entries go to the first, which is renamed over the second when it is full."""

    LIMIT = 1 << 20

    def __init__(self, stem: str, ending: str) -> None:
        self.names = (f"{stem}.{ending}", f"{stem}.1.{ending}")

    def append(self, directory: Directory, entry: bytes) -> None:
        """Append one entry of at most LIMIT bytes with a line feed at its end: all of it, or nothing.

        :raises OSError: the entry is not written.
        """
        current, previous = self.names
        descriptor = directory.open(current, os.O_CREAT)
        try:
            size = os.fstat(descriptor).st_size
            if size and size + len(entry) >= self.LIMIT:
                directory.rename(current, previous)
                fresh = directory.open(current, os.O_CREAT)
                close_descriptor(descriptor)
                descriptor, size = fresh, 0
            # A dead process may have left an incomplete entry.
            separator = b"" if not size or os.pread(descriptor, 1, size - 1) == b"\n" else b"\n"
            try:
                write_all(descriptor, [separator, entry], size)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            close_descriptor(descriptor)


def rejected_entry(frame: bytes, reason: str) -> bytes:
    """Return the line of JSON for a rejected frame. A frame that is too long for the file is cut."""
    entry = {"time": time.time(), "reason": reason[:_REASON_CHARACTERS]}
    room = (RotatingPair.LIMIT - _NOTE_BYTES) // 4 * 3
    if len(frame) > room:
        entry |= {"length": len(frame), "cut_to": room}
    entry["frame"] = base64.b64encode(frame[:room]).decode()
    return json.dumps(entry).encode() + b"\n"


def damaged_entry(name: str, descriptor: int, start: int, end: int) -> bytes:
    """Return the entry for a damaged region of the segment *name*: a line of JSON, the bytes, a line feed.

    A region that is too long for the file is cut.
    """
    data = os.pread(descriptor, min(end - start, RotatingPair.LIMIT - _NOTE_BYTES), start)
    note = {"time": time.time(), "segment": name, "offset": start, "length": end - start}
    if len(data) < end - start:
        note["cut_to"] = len(data)
    return json.dumps(note).encode() + b"\n" + data + b"\n"
