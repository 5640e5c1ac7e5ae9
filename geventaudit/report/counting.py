"""Counts in bounded memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BoundedCounts", "Count", "SeenNumbers", "Timeline"]


class Count(NamedTuple):
    """The count of a name."""

    name: str
    records: int
    failures: int


class BoundedCounts:
    """Counts of names, and of the failures among them.

    Exact up to twice *capacity* different names. Beyond, the rarest are forgotten; a name that comes again begins at
    zero. So a count may be too low, by :attr:`error` at most.

    :param capacity: names to keep when there are too many.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._counts: dict[str, list[int]] = {}
        self.total = 0
        """Occurrences of all names, forgotten ones included."""
        self.error = 0

    def add(self, name: str, failures: int = 0) -> None:
        """Count *name* once, with so many failures (0 or 1)."""
        self.total += 1
        counts = self._counts.get(name)
        if counts is None:
            if len(self._counts) >= 2 * self._capacity:
                self._forget_rarest()
            self._counts[name] = [1, failures]
        else:
            counts[0] += 1
            counts[1] += failures

    def _forget_rarest(self) -> None:
        ranked = sorted(self._counts.items(), key=lambda item: item[1][0], reverse=True)
        self.error += ranked[self._capacity][1][0]
        self._counts = dict(ranked[: self._capacity])

    def top(self, most: int) -> list[Count]:
        """Return the *most* frequent names, the most frequent one first."""
        ranked = sorted(self._counts.items(), key=lambda item: (-item[1][0], item[0]))
        return [Count(name, count, failures) for name, (count, failures) in ranked[:most]]

    def count_of(self, name: str) -> int:
        """Return how often *name* occurs."""
        return self._counts.get(name, (0,))[0]

    def __len__(self) -> int:
        """Return the number of different names that are kept."""
        return len(self._counts)


class SeenNumbers:
    """The numbers of each stream that have been seen, as ranges: a few for each stream, whatever its length.

    :param max_ranges: of all streams together. Beyond them, repeated records are counted again.
    """

    def __init__(self, max_ranges: int = 1_000_000) -> None:
        self._streams: dict[str, tuple[list[int], list[int]]] = {}
        self._room = max_ranges
        self.is_exact = True
        """False if there were too many ranges."""

    def add(self, stream: str, number: int) -> bool:
        """Return True if this number of the stream is new."""
        ranges = self._streams.get(stream)
        if ranges is None:
            if not self._takes_room():
                return True
            self._streams[stream] = [number], [number]
            return True
        firsts, lasts = ranges
        if number == lasts[-1] + 1:  # the common case
            lasts[-1] = number
            return True
        place = bisect_right(firsts, number)  # the ranges before this place begin at or below the number
        if place and number <= lasts[place - 1]:
            return False
        self._insert(firsts, lasts, place, number)
        return True

    def _insert(self, firsts: list[int], lasts: list[int], place: int, number: int) -> None:
        follows = bool(place) and lasts[place - 1] == number - 1
        precedes = place < len(firsts) and firsts[place] == number + 1
        if follows and precedes:
            lasts[place - 1] = lasts[place]
            del firsts[place], lasts[place]
            self._room += 1
        elif follows:
            lasts[place - 1] = number
        elif precedes:
            firsts[place] = number
        elif self._takes_room():
            firsts.insert(place, number)
            lasts.insert(place, number)

    def _takes_room(self) -> bool:
        if not self._room:
            self.is_exact = False
            return False
        self._room -= 1
        return True


class Timeline:
    """Counts of several kinds in spans of equal length. The length grows with the period.

    :param kinds: how many counts a span has.
    :param max_spans: different spans to hold.
    """

    WIDTHS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86_400, 7 * 86_400, 28 * 86_400, 364 * 86_400)
    """Lengths in seconds. Each is a multiple of some shorter ones."""

    def __init__(self, kinds: int, max_spans: int = 4000) -> None:
        self._kinds = kinds
        self._max_spans = max_spans
        self._spans: dict[int, list[int]] = {}  # by their first second
        self._width = self.WIDTHS[0]

    def add(self, second: int, kind: int) -> None:
        """Count one of a kind at this time, in seconds since 1970."""
        start = second - second % self._width
        counts = self._spans.get(start)
        if counts is None:
            counts = self._spans[start] = [0] * self._kinds
            if len(self._spans) > self._max_spans:
                self._widen()
                return self.add(second, kind)
        counts[kind] += 1
        return None

    def _widen(self) -> None:
        longer = [width for width in self.WIDTHS if width > self._width]
        if not longer:
            self._max_spans = 2 * len(self._spans)
            return
        self._spans = self._in_spans_of(longer[0])
        self._width = longer[0]

    def _in_spans_of(self, width: int) -> dict[int, list[int]]:
        made: dict[int, list[int]] = {}
        for start, counts in self._spans.items():
            into = made.setdefault(start - start % width, [0] * self._kinds)
            for kind, count in enumerate(counts):
                into[kind] += count
        return made

    def spans(self, most: int) -> tuple[int, list[tuple[int, Sequence[int]]]]:
        """Return the length of a span in seconds, and first second and counts of each, without a gap between them.

        :param most: of them. The longest length may need more: the last ones are returned then.
        """
        used = [start for start, counts in self._spans.items() if any(counts)]
        if not used:
            return self._width, []
        width = next(
            (each for each in self.WIDTHS if each >= self._width and (max(used) - min(used)) // each + 2 <= most),
            self.WIDTHS[-1],
        )
        spans = self._in_spans_of(width)
        last = max(used) - max(used) % width
        first = max(min(used) - min(used) % width, last - (most - 1) * width)
        empty = (0,) * self._kinds
        return width, [(start, spans.get(start, empty)) for start in range(first, last + 1, width)]
