"""Samples taken in turn, and their ratios, medians and spread.

A machine that is shared is fast in one second and slow in the next. So contenders are sampled in turn, in alternating
order, and a ratio is always one of two samples of the same round.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Bound", "Row", "Samples", "Spread", "differences", "interleave", "percentile", "ratios"]

Samples = dict[str, list[float]]
"""For each contender its samples, one a round."""


@dataclass(frozen=True)
class Spread:
    """The median of some samples, with the lowest and the highest."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        values = tuple(samples)
        return cls(statistics.median(values), min(values), max(values), values)


@dataclass(frozen=True)
class Bound:
    """A limit of a figure: at least, or at most, a value."""

    kind: Literal["at least", "at most"]
    value: float

    def met_by(self, value: float) -> bool:
        return value >= self.value if self.kind == "at least" else value <= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio or milliseconds, and the figures behind it."""

    name: str
    value: Spread | None
    """None if it was not measured; then ``note`` has the reason."""
    unit: Literal["", "ms"] = ""
    """Empty for ratios."""
    bar: Bound | None = None
    aim: Bound | None = None
    absolute: Mapping[str, Spread] | None = None
    """The figures behind the ratio, by name and unit. They hold for this machine only."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """True if the median keeps the bar; None without a bar or a measurement."""
        return None if self.bar is None or self.value is None else self.bar.met_by(self.value.median)


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Samples:
    """Sample every contender once a round, after a round that does not count.

    Every other round goes backwards, so that none always follows the same one.
    """
    samples: Samples = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in list(contenders) if number % 2 else reversed(list(contenders)):
            gc.collect()  # no contender pays for the garbage of the one before
            sample = contenders[name]()
            if number:
                samples[name].append(sample)
    return samples


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratio of two contenders' samples, round by round."""
    return Spread.of(a / b for a, b in zip(over, under, strict=True))


def differences(of: Sequence[float], less: Sequence[float]) -> Spread:
    """The difference of two contenders' samples, round by round."""
    return Spread.of(a - b for a, b in zip(of, less, strict=True))


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of *values* that at least so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(-int(-len(ordered) * percent // 100), 1) - 1]
