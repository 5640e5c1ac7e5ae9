"""Rows of fixed size, sorted on disk: any number of records in bounded memory.

A row begins with the stream and the number, big-endian, so that the order of its bytes is the order of the trail.
"""

from __future__ import annotations

import heapq
import json
import struct
import tempfile
from binascii import unhexlify
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from .records import Stamped

__all__ = ["PLAIN_SEALED", "PREFIX", "Row", "RowStore", "has_note", "plain_parts", "sealed_parts", "unpack_row"]

_ROW = struct.Struct(">IQ32s32s27sBIQQ")
PREFIX = 12
"""The bytes of a row that are its stream and its number."""
SIZE = _ROW.size
_RUN_ROWS = 200_000
_READ_ROWS = 4096
_MAX_RUNS = 64  # merged at once; more runs are merged in steps

_NOTHING = bytes(32)
_SEALED, _NOTE, _PROBLEM = 1, 2, 4


class Row(NamedTuple):
    """The facts about one record, and its place."""

    stream: int
    seq: int
    digest: bytes
    mac: bytes
    time: bytes
    flags: int
    file: int
    line: int
    note: int

    @property
    def is_sealed(self) -> bool:
        """True if it has a MAC."""
        return bool(self.flags & _SEALED)

    @property
    def has_problem(self) -> bool:
        """True if no client has written the record so."""
        return bool(self.flags & _PROBLEM)

    @property
    def has_note(self) -> bool:
        """True if there is more to be had from :meth:`RowStore.note`."""
        return has_note(self.flags)


plain_parts = struct.Struct(">4xQ64x27sB").unpack_from
"""Return the number, the time and the flags of a packed row."""


sealed_parts = struct.Struct(">4xQ32s32s27sB").unpack_from
"""Return the number, h, the MAC, the time and the flags of a packed row."""

PLAIN_SEALED = _SEALED
"""The flags of a sealed row that has nothing special about it."""


def has_note(flags: int) -> bool:
    """Return True if there is more to be had from :meth:`RowStore.note`."""
    return bool(flags & (_NOTE | _PROBLEM))


def unpack_row(data: bytes) -> Row:
    """Return a row."""
    return Row._make(_ROW.unpack(data))


class RowStore:
    """Takes rows in any order, and gives them back sorted. Its files have no name."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._rows: list[bytes] = []
        self._runs: list[IO[bytes]] = []
        self._notes: IO[bytes] | None = None

    def add(self, stream: int, record: Stamped, file: int, line: int) -> None:
        """Add one record."""
        flags, place = _SEALED if record.is_sealed else 0, 0
        if record.note is not None or record.problem:
            flags |= (_NOTE if record.note is not None else 0) | (_PROBLEM if record.problem else 0)
            place = self._write_note({"problem": record.problem, **(record.note or {})})
        self._rows.append(
            _ROW.pack(stream, record.seq, record.digest, record.mac, record.time, flags, file, line, place)
        )
        if len(self._rows) >= _RUN_ROWS:
            self._spill()

    def add_plain(
        self, streams: Mapping[bytes, int], stamps: Sequence[tuple[bytes, bytes, bytes, bytes]], file: int, line: int
    ) -> None:
        """Add the records of consecutive lines that have nothing special about them.

        :param stamps: MAC (empty for none), number, stream and time of each, as digits.
        :param line: of the first one.
        """
        pack, at = _ROW.pack, streams.__getitem__
        self._rows += [
            pack(at(name), int(seq), _NOTHING, unhexlify(mac), time, _SEALED if mac else 0, file, number, 0)
            for number, (mac, seq, name, time) in enumerate(stamps, line)
        ]
        if len(self._rows) >= _RUN_ROWS:
            self._spill()

    def note(self, row: Row) -> dict[str, Any]:
        """Return the problem of a record, and the rare parts of its stamp."""
        if not row.has_note or self._notes is None:
            return {}
        self._notes.seek(row.note)
        (size,) = struct.unpack(">I", self._notes.read(4))
        note: dict[str, Any] = json.loads(self._notes.read(size))
        return note

    def sorted(self) -> Iterator[bytes]:
        """Yield all rows in order."""
        self._rows.sort()
        if not self._runs:
            yield from self._rows
            return
        self._spill()
        while len(self._runs) > _MAX_RUNS:
            merged = self._file()
            for row in heapq.merge(*map(_rows_in, self._runs[:_MAX_RUNS])):
                merged.write(row)
            for run in self._runs[:_MAX_RUNS]:
                run.close()
            self._runs = [*self._runs[_MAX_RUNS:], merged]
        yield from heapq.merge(*map(_rows_in, self._runs))

    def close(self) -> None:
        """Remove the files."""
        for file in (*self._runs, *([self._notes] if self._notes else [])):
            file.close()

    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._folder)

    def _spill(self) -> None:
        if self._rows:
            self._rows.sort()
            run = self._file()
            self._runs.append(run)
            run.write(b"".join(self._rows))
            self._rows = []

    def _write_note(self, note: dict[str, Any]) -> int:
        if self._notes is None:
            self._notes = self._file()
        place = self._notes.seek(0, 2)
        data = json.dumps(note).encode()
        self._notes.write(struct.pack(">I", len(data)) + data)
        return place


def _rows_in(run: IO[bytes]) -> Iterator[bytes]:
    run.seek(0)
    while block := run.read(SIZE * _READ_ROWS):
        for at in range(0, len(block), SIZE):
            yield block[at : at + SIZE]
