"""The findings of a verification: numbers, a bounded list of examples, and their text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NO_RECORD", "Examples", "Ranges", "StreamReport", "TrailReport"]

NO_RECORD = "there is no readable record of an audit trail in these files"

_MAX_EXAMPLES = 20
_MAX_RANGES = 10_000  # of one stream


class Examples:
    """A count, and the first of the things counted."""

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


@dataclass
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
    missing: Ranges = field(default_factory=Ranges)
    explained: int = 0
    """Missing numbers that a checkpoint, or a record that was sent again, accounts for."""
    delivered_missing: int = 0
    """Missing numbers that had been delivered to the agent."""
    cut: str = ""
    """The evidence that the end of the stream is missing."""
    duplicates: int = 0
    altered: Examples = field(default_factory=Examples)
    """Records that no key authenticates, or whose envelope says something else."""
    beside_valid: Examples = field(default_factory=Examples)
    """Altered copies of a number that has an authentic record too."""
    two_contents: Examples = field(default_factory=Examples)
    too_far: Examples = field(default_factory=Examples)
    digest_mismatch: Examples = field(default_factory=Examples)
    unchecked_digests: int = 0
    """Checkpoints whose digest cannot be computed, since records before are missing."""
    checkpoints: int = 0
    refused: int = 0
    left_out: int = 0
    has_end: bool = False
    after_end: int = 0
    is_unsealed: bool = False
    """True if a key was given, and the stream has no seal."""
    clock_steps: int = 0
    state_mismatch: bool = False

    def problems(self, accept_explained: bool) -> list[str]:
        """Return a line for each problem."""
        found = []
        unexplained = self.missing.count - self.explained
        if self.missing.count and not (accept_explained and not unexplained):
            explained = f", {self.explained} of them explained" if self.explained else ""
            delivered = f", {self.delivered_missing} of them delivered before" if self.delivered_missing else ""
            found.append(f"{self.missing.count} missing{explained}{delivered}: {self.missing}")
        if self.cut:
            found.append(f"the end is cut off: {self.cut}")
        if self.is_unsealed:
            found.append("its records have no seal: not authenticated")
        for examples, text in (
            (self.altered, "altered, inserted, or sealed with another key"),
            (self.beside_valid, "altered copies beside a valid one"),
            (self.two_contents, "numbers with two valid contents"),
            (self.too_far, "numbers too far ahead to be checked (--max-jump)"),
            (self.digest_mismatch, "checkpoints whose digest does not match"),
        ):
            if examples:
                shown = "; ".join(map(str, examples.first)) + ("; ..." if examples.count > len(examples.first) else "")
                found.append(f"{examples.count} {text}: {shown}")
        if self.after_end:
            found.append(f"{self.after_end} records after the end of the stream")
        if self.state_mismatch:
            found.append("other records than the ones that --state remembers")
        return found

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
            "missing": self.missing.count,
            "missing_ranges": self.missing.ranges[:1000],
            "explained": self.explained,
            "missing_after_delivery": self.delivered_missing,
            "cut": self.cut,
            "duplicates": self.duplicates,
            "altered": self.altered.count,
            "altered_beside_valid": self.beside_valid.count,
            "two_contents": self.two_contents.count,
            "too_far": self.too_far.count,
            "digest_mismatches": self.digest_mismatch.count,
            "unchecked_digests": self.unchecked_digests,
            "checkpoints": self.checkpoints,
            "refused": self.refused,
            "left_out": self.left_out,
            "end": self.has_end,
            "after_end": self.after_end,
            "clock_steps": self.clock_steps,
            "problems": self.problems(accept_explained),
        }


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
    missing_children: list[str] = field(default_factory=list)
    """Clients and forked processes of which nothing is there, although a later one is."""
    missing_streams: list[str] = field(default_factory=list)
    """Streams that another one has adopted, and of which nothing is there."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """True if there is no record at all, so that there is nothing to be whole."""
        return not self.streams and not self.unstamped

    def problems(self, *, accept_explained: bool = False, accept_missing_children: bool = False) -> list[str]:
        """Return a line for each problem; none if the trail is whole."""
        found = [NO_RECORD] if self.is_empty else []
        for examples, text in ((self.unreadable, "lines cannot be read"), (self.unstamped, "records have no stamp")):
            if examples:
                found.append(f"{examples.count} {text}: " + "; ".join(map(str, examples.first[:5])))
        found += self.missing_starts + self.missing_streams
        if not accept_missing_children:
            found += self.missing_children
        for stream in self.streams:
            found += [f"{stream.stream}: {problem}" for problem in stream.problems(accept_explained)]
        return found
