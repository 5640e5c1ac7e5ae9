"""The findings of a verification: numbers, a bounded list of examples, and their text."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

__all__ = ["NO_RECORD", "Examples", "Gaps", "Ranges", "Rejected", "StreamReport", "TrailReport", "counted"]

NO_RECORD = "there is no readable record of an audit trail in these files"

_MAX_EXAMPLES = 20
_MAX_RANGES = 10_000  # of one stream
_MAX_DUPLICATES_SHOWN = 5
_MAX_REJECTED = 1_000_000
_LINE_BITS = 40


def counted(count: int, one: str, many: str = "") -> str:
    """Return a count and its noun: ``1 file``, ``2 files``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


class Examples:
    """A count, and the first of the things counted."""

    __slots__ = ("count", "first")

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Any] = []

    def add(self, example: Any) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < _MAX_EXAMPLES:
            self.first.append(example)

    def __bool__(self) -> bool:
        return self.count > 0


class Ranges:
    """Missing numbers, ascending: their count, and the ranges up to a limit."""

    __slots__ = ("count", "ranges")

    def __init__(self) -> None:
        self.count = 0
        self.ranges: list[tuple[int, int]] = []

    def add(self, first: int, last: int) -> None:
        """Add the numbers from *first* to *last*, if there are any."""
        if last < first:
            return
        self.count += last - first + 1
        if self.ranges and self.ranges[-1][1] == first - 1:
            self.ranges[-1] = self.ranges[-1][0], last
        elif len(self.ranges) < _MAX_RANGES:
            self.ranges.append((first, last))

    def extend(self, others: Ranges, last: int) -> None:
        """Add the numbers of *others* up to *last*. They follow these."""
        beyond = sum(max(end - max(first - 1, last), 0) for first, end in others.ranges)
        unlisted = others.count - sum(end - first + 1 for first, end in others.ranges)
        for first, end in others.ranges:
            self.add(first, min(end, last))
        if not beyond:
            self.count += unlisted

    def covered_by(self, others: Iterable[tuple[int, int]]) -> int:
        """Return how many of these numbers are in *others*."""
        total, mine = 0, iter(self.ranges)
        current = next(mine, None)
        for first, last in _merged(others):
            while current is not None and current[1] < first:
                current = next(mine, None)
            while current is not None and current[0] <= last:
                total += min(last, current[1]) - max(first, current[0]) + 1
                if current[1] > last:
                    break
                current = next(mine, None)
        return total

    def __str__(self) -> str:
        shown = [str(first) if first == last else f"{first}-{last}" for first, last in self.ranges[:_MAX_EXAMPLES]]
        return ", ".join(shown) + (", ..." if len(self.ranges) > _MAX_EXAMPLES else "")


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    before: tuple[int, int] | None = None
    for first, last in sorted(ranges):
        if before is not None and first <= before[1] + 1:
            before = before[0], max(before[1], last)
            continue
        if before is not None:
            yield before
        before = first, last
    if before is not None:
        yield before


class Gaps:
    """Finds the numbers of a stream without any line, in the order of the numbers.

    A number without an authentic record counts only if a later one is authentic: anybody can insert a high number.

    :param missing: takes the numbers.
    """

    def __init__(self, missing: Ranges) -> None:
        self._missing = missing
        self._pending = Ranges()
        self._last = 0

    def skip(self, number: int, after: int) -> None:
        """Note a number that has a line, but nothing authentic. *after* is the last authentic one."""
        self._pending.add(max(self._last, after) + 1, number - 1)
        self._last = number

    def close(self, number: int, after: int) -> None:
        """Note that a number is known to be authentic. *after* is the last one before it."""
        if self._last > after:
            self._missing.extend(self._pending, number - 1)
            self._pending = Ranges()
        self._missing.add(max(self._last, after) + 1, number - 1)


class Rejected:
    """The lines of records that no key authenticates: a million of them, and streams as a whole."""

    def __init__(self) -> None:
        self.streams: set[str] = set()
        """Streams of which nothing is authentic. Their lines are not listed."""
        self.is_complete = True
        """False if there were too many lines."""
        self._places = array("Q")
        self._stream_begin = 0

    def begin_stream(self) -> None:
        """Begin with the lines of another stream."""
        self._stream_begin = len(self._places)

    def add(self, file: int, line: int) -> None:
        """Add a line of the present stream."""
        if len(self._places) < _MAX_REJECTED:
            self._places.append(file << _LINE_BITS | line)
        else:
            self.is_complete = False

    def reject_stream(self, stream: str) -> None:
        """Reject the present stream as a whole."""
        del self._places[self._stream_begin :]
        self.streams.add(stream)

    def close(self) -> None:
        """Sort the lines."""
        self._places = array("Q", sorted(self._places))

    def lines_of(self, file: int) -> Iterator[int]:
        """Yield the lines of a file, ascending."""
        start = bisect_left(self._places, file << _LINE_BITS)
        end = bisect_left(self._places, (file + 1) << _LINE_BITS)
        for place in range(start, end):
            yield self._places[place] & ((1 << _LINE_BITS) - 1)


@dataclass(slots=True)
class StreamReport:
    """The findings about one stream."""

    stream: str
    key: str | None = None
    """The key file that authenticates it; None if nothing does."""
    records: int = 0
    """Different numbers with an authentic record; without a key, with any."""
    first: int = 0
    last: int = 0
    start_time: str = ""
    end_time: str = ""
    """The earliest and the latest time of a record."""
    last_time: str = ""
    """The time of the record with the highest number."""
    missing: Ranges = field(default_factory=Ranges)
    """Numbers without any record."""
    altered_only: Ranges = field(default_factory=Ranges)
    """Numbers with records, but without an authentic one."""
    explained: int = 0
    """Missing numbers that a checkpoint, or a record that was sent again, accounts for."""
    delivered_missing: int = 0
    """Missing numbers that the agent had taken, as a checkpoint says."""
    cut: str = ""
    """The evidence that the end of the stream is missing."""
    duplicates: int = 0
    """Further copies of a record, with the same number and the same content (without a key, the same stamp)."""
    duplicate_numbers: int = 0
    """Numbers with duplicates."""
    duplicate_places: list[str] = field(default_factory=list)
    """The first numbers with duplicates, each with places."""
    altered: Examples = field(default_factory=Examples)
    """Records that no key authenticates, or that contradict their envelope."""
    beside_valid: Examples = field(default_factory=Examples)
    """Altered copies of a number that has an authentic record too."""
    two_contents: Examples = field(default_factory=Examples)
    too_far: Examples = field(default_factory=Examples)
    digest_mismatch: Examples = field(default_factory=Examples)
    unchecked_digests: int = 0
    """Checkpoints with a digest that cannot be computed, since records before are missing or altered."""
    first_unchecked: int = 0
    """The number of the first one."""
    checkpoints: int = 0
    refused: int = 0
    left_out: int = 0
    has_end: bool = False
    after_end: int = 0
    is_unsealed: bool = False
    """True if a key was given, and the stream has no seal."""
    clock_steps: int = 0
    state_mismatch: bool = False

    @property
    def is_authentic(self) -> bool:
        """True if a key has authenticated the records that are counted."""
        return self.key is not None

    @property
    def completeness(self) -> float:
        """The share of the numbers that have an authentic record (without a key, any), from 0 to 1."""
        expected = self.records + self.missing.count + self.altered_only.count
        return self.records / expected if expected else 0.0

    @property
    def records_text(self) -> str:
        """The number of records, and of the checkpoints among them."""
        checkpoints = f", {self.checkpoints} of them {'a checkpoint' if self.checkpoints == 1 else 'checkpoints'}"
        records = "authentic record" if self.is_authentic else "record"
        return counted(self.records, records) + (checkpoints if self.checkpoints else "")

    @property
    def duplicates_text(self) -> str:
        """The number of duplicates, and the first of them."""
        places = ", ".join(self.duplicate_places)
        places += ", ..." if self.duplicate_numbers > len(self.duplicate_places) else ""
        return counted(self.duplicates, "duplicate") + (f" of {places}" if self.duplicates else "")

    @property
    def digests_text(self) -> str:
        """A text about the checkpoints with an unchecked digest; empty for none."""
        count, first = self.unchecked_digests, self.first_unchecked
        if not count:
            return ""
        which = f"digest of the checkpoint {first}" if count == 1 else f"digests of {count} checkpoints from {first} on"
        return f"{which} not checked, since records before are missing, altered or void"

    def add_duplicates(self, count: int, number: int, places: Iterable[str]) -> None:
        """Count further copies of a number.

        :param places: of the copies. A few are shown.
        """
        self.duplicates += count
        self.duplicate_numbers += count > 0
        if count and len(self.duplicate_places) < _MAX_DUPLICATES_SHOWN:
            self.duplicate_places.append(f"{number} ({', '.join(islice(places, 3))})")

    def warnings(self) -> list[str]:
        """Return a line for each fact that is no problem by itself, and that a reader has to judge."""
        if self.has_end or not self.records:
            return []
        if "/" not in self.stream:
            reason = "a stream without a seal has none, so later records may have been cut"
        else:
            reason = "it goes on, crashed, or later records were cut"
        advice = "compare with --state, or ask whether the service was stopped then"
        return [f"no end after {self.last} ({self.last_time}): {reason}; {advice}"]

    def problems(self, accept_explained: bool) -> list[str]:
        """Return a line for each problem."""
        found = []
        unexplained = self.missing.count - self.explained
        if self.missing.count and not (accept_explained and not unexplained):
            facts = [f"{self.explained} of them explained"] if self.explained else []
            if self.delivered_missing:
                facts.append(
                    f"a checkpoint says that the agent had taken {self.delivered_missing} of them, so they were lost "
                    "or removed after it"
                )
            reasons = f" ({'; '.join(facts)})" if facts else ""
            found.append(f"{self.missing.count} missing{reasons}: {self.missing}")
        if self.cut:
            found.append(f"the end is cut off: {self.cut}")
        if self.is_unsealed:
            found.append("its records have no seal: not authenticated")
        if self.altered:
            found.append(f"{self._altered_text()}: {_shown(self.altered)}")
        for examples, one, many in (
            (self.beside_valid, "altered copy beside a valid one", "altered copies beside a valid one"),
            (self.two_contents, "number with two valid contents", "numbers with two valid contents"),
            (
                self.too_far,
                "number too far ahead to be checked (--max-jump)",
                "numbers too far ahead to be checked (--max-jump)",
            ),
            (
                self.digest_mismatch,
                "checkpoint whose digest does not match",
                "checkpoints whose digest does not match",
            ),
        ):
            if examples:
                found.append(f"{counted(examples.count, one, many)}: {_shown(examples)}")
        if self.after_end:
            found.append(f"{counted(self.after_end, 'record')} after the end of the stream")
        if self.state_mismatch:
            found.append("other records than the ones that --state remembers")
        return found

    def _altered_text(self) -> str:
        if not self.altered_only.count:
            return f"{counted(self.altered.count, 'record')} as no client has written it"
        lines = "" if self.altered.count == self.altered_only.count else f", in {self.altered.count} lines"
        reason = "altered, inserted, or sealed with another key"
        return f"{self.altered_only.count} only in altered form{lines} ({reason})"

    def as_json(self, accept_explained: bool) -> dict[str, Any]:
        """Return all findings as JSON."""
        return {
            "stream": self.stream,
            "key": self.key,
            "records": self.records,
            "first": self.first,
            "last": self.last,
            "from": self.start_time,
            "to": self.end_time,
            "last_time": self.last_time,
            "missing": self.missing.count,
            "missing_ranges": self.missing.ranges[:1000],
            "only_altered": self.altered_only.count,
            "only_altered_ranges": self.altered_only.ranges[:1000],
            "explained": self.explained,
            "missing_after_delivery": self.delivered_missing,
            "cut": self.cut,
            "duplicates": self.duplicates,
            "duplicate_places": self.duplicate_places,
            "altered": self.altered.count,
            "altered_places": self.altered.first,
            "altered_beside_valid": self.beside_valid.count,
            "two_contents": self.two_contents.count,
            "too_far": self.too_far.count,
            "digest_mismatches": self.digest_mismatch.count,
            "unchecked_digests": self.unchecked_digests,
            "first_unchecked": self.first_unchecked,
            "checkpoints": self.checkpoints,
            "refused": self.refused,
            "left_out": self.left_out,
            "end": self.has_end,
            "after_end": self.after_end,
            "clock_steps": self.clock_steps,
            "warnings": self.warnings(),
            "problems": self.problems(accept_explained),
        }


def _shown(examples: Examples) -> str:
    return "; ".join(map(str, examples.first)) + ("; ..." if examples.count > len(examples.first) else "")


@dataclass
class TrailReport:
    """The findings about a whole trail."""

    is_authenticated: bool
    streams: list[StreamReport] = field(default_factory=list)
    lines: int = 0
    unreadable: Examples = field(default_factory=Examples)
    unstamped: Examples = field(default_factory=Examples)
    uncovered: dict[str, int] = field(default_factory=dict)
    """Keys that agents added, which no seal covers, and how often."""
    missing_starts: list[str] = field(default_factory=list)
    repeated_starts: list[str] = field(default_factory=list)
    """Starts whose key was used by more than one process."""
    missing_children: list[str] = field(default_factory=list)
    """Clients and forked processes of which nothing is there, although a later one is."""
    missing_streams: list[str] = field(default_factory=list)
    """Streams that another one has adopted, and of which nothing is there."""
    notes: list[str] = field(default_factory=list)
    rejected: Rejected = field(default_factory=Rejected)
    """With keys: the lines that they do not authenticate."""

    @property
    def records_text(self) -> str:
        """The number of records, and of the checkpoints among them."""
        proven = [each for each in self.streams if each.is_authentic or not self.is_authenticated]
        records, checkpoints = sum(each.records for each in proven), sum(each.checkpoints for each in proven)
        text = counted(records, "authentic record" if self.is_authenticated else "record")
        text += f", {checkpoints} of them {'a checkpoint' if checkpoints == 1 else 'checkpoints'}"
        others = sum(each.records for each in self.streams) - records
        return text + (f", {counted(others, 'record')} without a seal" if others else "")

    @property
    def without_end(self) -> int:
        """The number of streams without an end."""
        return sum(not each.has_end for each in self.streams)

    @property
    def duplicates(self) -> int:
        """Further copies of records."""
        return sum(each.duplicates for each in self.streams)

    @property
    def refused(self) -> int:
        """Messages that ``send()`` has not accepted, as the checkpoints say."""
        return sum(each.refused for each in self.streams)

    @property
    def left_out(self) -> int:
        """Messages that ``before_send`` has left out, as the checkpoints say."""
        return sum(each.left_out for each in self.streams)

    @property
    def bad_lines(self) -> list[tuple[str, Examples]]:
        """The kinds of lines that are no stamped records: their number in words, and the first of them."""
        kinds = (
            (self.unreadable, "line cannot be read", "lines cannot be read"),
            (self.unstamped, "record has no stamp", "records have no stamp"),
        )
        return [(counted(each.count, one, many), each) for each, one, many in kinds if each]

    def verdict(self, problems: int) -> str:
        """Return one line about the whole trail.

        :param problems: the number of them that are not accepted.
        """
        whole = "authentic and whole" if self.is_authenticated else "without gaps"
        text = f"NOT WHOLE: {counted(problems, 'problem')}" if problems else whole
        ends = f"; {counted(self.without_end, 'stream')} without an end" if self.without_end else ""
        return text + ends

    def warnings(self) -> list[str]:
        """Return a line for each fact that is no problem by itself, and that a reader has to judge."""
        return [f"{each.stream}: {warning}" for each in self.streams for warning in each.warnings()]

    @property
    def is_empty(self) -> bool:
        """True if there is no record at all, so that there is nothing to be whole."""
        return not self.streams and not self.unstamped

    def problems(self, *, accept_explained: bool = False, accept_missing_children: bool = False) -> list[str]:
        """Return a line for each problem; none if the trail is whole."""
        found = [NO_RECORD] if self.is_empty else []
        found += [f"{text}: " + "; ".join(map(str, each.first[:5])) for text, each in self.bad_lines]
        found += self.missing_starts + self.repeated_starts + self.missing_streams
        if not accept_missing_children:
            found += self.missing_children
        for stream in self.streams:
            found += [f"{stream.stream}: {problem}" for problem in stream.problems(accept_explained)]
        return found
