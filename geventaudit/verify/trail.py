"""A whole trail: reads files, sorts their records, and checks one stream after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from ..trail.keys import StreamName, parse_stream
from .findings import TrailReport, counted
from .keyring import MAX_STEPS, KeyCopy, KeyRing
from .lines import blocks_of
from .parsing import Unreadable
from .records import RecordReader, Stamped, plain_stamps
from .rows import PREFIX, Row, RowStore
from .state import Remembered
from .streams import StreamCheck

__all__ = ["Verifier"]

MAX_STREAMS = 2_000_000
"""The most streams in one run: their names are held in memory."""


class Verifier:
    """Verifies files, in two steps: :meth:`read` each file, then :meth:`check`.

    :param copies: the auditor's copies of key files; none to check numbers only.
    :param state: the streams that an earlier verification has seen.
    :param max_jump: the steps that keys may be evolved in vain.
    :param folder: for temporary files, 130 bytes for each record beyond the first 200,000.
    """

    def __init__(
        self,
        copies: Sequence[KeyCopy] = (),
        state: dict[str, Remembered] | None = None,
        *,
        max_jump: int = MAX_STEPS,
        folder: str | None = None,
    ) -> None:
        self._ring = KeyRing(list(copies), max_jump) if copies else None
        self._state = state or {}
        self._reader = RecordReader(with_digest=bool(copies))
        self._store = RowStore(folder)
        self._files: list[str] = []
        self._streams: dict[bytes, int] = {}
        self._report = TrailReport(is_authenticated=bool(copies))
        self.remembered: dict[str, Remembered] = dict(self._state)
        """The streams, for the next verification; complete after :meth:`check`."""

    def read(
        self,
        path: str,
        on_read: Callable[[int], object] = lambda size: None,
        *,
        name: str | None = None,
        size: int | None = None,
    ) -> None:
        """Read one file.

        :param path: see :func:`~geventaudit.verify.lines.blocks_of`.
        :param on_read: called with the number of bytes read.
        :param name: for people; None for the path.
        :param size: reads so many bytes at most.
        :raises OSError: the file cannot be read.
        """
        name = path if name is None else name
        self._files.append(name)
        number, file = 0, len(self._files) - 1
        try:
            for block in blocks_of(path, on_read, size):
                lines = block.count(b"\n")
                stamps = plain_stamps(block, lines) if self._reader.is_plain else None
                if stamps is None:
                    self._read_each(block, file, number)
                else:
                    for stream in {stamp[2] for stamp in stamps} - self._streams.keys():
                        self._add_stream(stream)
                    self._store.add_plain(self._streams, stamps, file, number + 1)
                number += lines
        except EOFError as error:
            self._report.unreadable.add(f"{name}:{number}: {error}")
        self._report.lines += number

    def _read_each(self, block: bytes, file: int, number: int) -> None:
        read, add, streams = self._reader.read, self._store.add, self._streams
        for line in block[:-1].split(b"\n"):
            number += 1
            record = read(line)
            if type(record) is Stamped:
                name = record.stream.encode()
                stream = streams.get(name)
                if stream is None:
                    stream = self._add_stream(name)
                add(stream, record, file, number)
            elif isinstance(record, Unreadable):
                examples = self._report.unstamped if record.is_record else self._report.unreadable
                examples.add(f"{self._files[file]}:{number}: {record.reason}")

    def _add_stream(self, name: bytes) -> int:
        if len(self._streams) >= MAX_STREAMS:
            raise OSError(f"more than {MAX_STREAMS} streams: verify fewer files at once")
        return self._streams.setdefault(name, len(self._streams))

    def check(self) -> TrailReport:
        """Check all that was read, and return the findings."""
        try:
            self._check_streams()
        finally:
            self._store.close()
        self._report.uncovered = self._reader.uncovered
        return self._report

    def _check_streams(self) -> None:
        report, names = self._report, [name.decode() for name in self._streams]
        checks = []
        for index, group in groupby(self._store.sorted(), key=itemgetter(slice(0, 4))):
            checks.append(self._check_stream(names[int.from_bytes(index, "big")], group))
        report.rejected.close()
        self._finish(checks)
        for check in checks:
            remembered = check.to_remember()
            if remembered is not None and (self._ring is None or check.report.key is not None):
                self.remembered[check.report.stream] = remembered
        report.streams = [check.report for check in checks]
        absent = self._state.keys() - set(names)
        if absent:
            verb = "is" if len(absent) == 1 else "are"
            report.notes.append(f"{counted(len(absent), 'stream')} that --state remembers {verb} not in these files")
        if self._ring is not None:
            self._check_starts(checks)
            report.missing_children = self._missing_children(checks)

    def _check_stream(self, name: str, rows: Iterable[bytes]) -> StreamCheck:
        rejected = self._report.rejected
        rejected.begin_stream()
        check = StreamCheck(name, self._ring, self._state.get(name), self._store.note, self._place_of, self._reject)
        copies: list[bytes] = []
        prefix = b""
        for data in rows:
            if data[:PREFIX] == prefix:
                copies.append(data)
                continue
            if copies:
                check.add(copies)
            copies, prefix = [data], data[:PREFIX]
        check.add(copies)
        if self._ring is not None and check.key is None:
            rejected.reject_stream(name)
        return check

    def _finish(self, checks: list[StreamCheck]) -> None:
        """Let each stream know what the others say of it. With keys, only authentic ones have a say."""
        adopted: dict[str, tuple[int, str]] = {}
        sent_again: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for check in checks:
            if self._ring is not None and check.key is None:
                continue
            for name, last in check.adopted.items():
                if last > adopted.get(name, (0, ""))[0]:
                    adopted[name] = last, f"a checkpoint of {check.report.stream} names"
            for name, seq in check.was:
                sent_again[name].append((seq, seq))
        for check in checks:
            last_known, evidence = adopted.pop(check.report.stream, (0, ""))
            check.finish(last_known, evidence, sent_again[check.report.stream])
        for name, (last, evidence) in adopted.items():
            if name not in self._state:
                self._report.missing_streams.append(f"{name}: nothing of it is there, and {evidence} {last}")

    def _check_starts(self, checks: list[StreamCheck]) -> None:
        salts: dict[KeyCopy, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for check in checks:
            key, name = check.key, parse_stream(check.report.stream)
            if key is not None and name is not None and name.start:
                salts[key][name.start].add(name.salt)
        remembered = {name.start for each in self._state if (name := parse_stream(each)) is not None}
        for key, starts in salts.items():
            gaps = _gaps(key.start, max(starts), starts.keys() | remembered)
            if gaps:
                self._report.missing_starts.append(f"{key.name}: nothing is there of the starts {gaps}")
            self._report.repeated_starts += [
                f"{key.name}: {len(found)} processes have used the key of start {start}: {', '.join(sorted(found)[:5])}"
                for start, found in sorted(starts.items())
                if len(found) > 1
            ]

    def _missing_children(self, checks: list[StreamCheck]) -> list[str]:
        seen: dict[StreamName, set[int]] = defaultdict(set)
        most: dict[StreamName, int] = defaultdict(int)
        for check in checks:
            name = parse_stream(check.report.stream)
            if check.key is None or name is None:
                continue
            for depth, number in enumerate(name.path):
                parent = name._replace(path=name.path[:depth])
                seen[parent].add(number)
                most[parent] = max(most[parent], number)
            parent = name._replace(path=name.path[:-1])
            most[parent] = max(most[parent], check.children)
        for each in self._state:
            name = parse_stream(each)
            if name is not None:
                for depth, number in enumerate(name.path):
                    parent = name._replace(path=name.path[:depth])
                    if parent in seen:
                        seen[parent].add(number)
        return [
            f"{parent}: nothing is there of the children {gaps} (a fork that sent nothing leaves nothing)"
            for parent, numbers in seen.items()
            if (gaps := _gaps(1, most[parent], numbers))
        ]

    def _reject(self, row: Row) -> None:
        self._report.rejected.add(row.file, row.line)

    def _place_of(self, row: Row) -> str:
        return f"{self._files[row.file]}:{row.line}"


def _gaps(first: int, last: int, numbers: set[int]) -> str:
    """Return the numbers between *first* and *last* that are not there, for people."""
    shown: list[str] = []
    before = first - 1
    for number in [*sorted(each for each in numbers if first <= each <= last), last + 1]:
        if number > before + 1:
            shown.append(f"{before + 1}-{number - 1}" if number > before + 2 else str(before + 1))
        before = number
        if len(shown) > 20:
            return ", ".join(shown) + ", ..."
    return ", ".join(shown)
