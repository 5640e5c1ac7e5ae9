"""Delays between attempts to connect. Pure: no clock, no sleep."""

from __future__ import annotations

import random

from .errors import show

__all__ = ["Backoff"]


class Backoff:
    """Delays that grow by a factor up to a maximum, with jitter, so that many clients do not connect at once.

    :param initial: seconds before the second attempt (the first is made at once).
    :param maximum: the longest delay in seconds.
    :param multiplier: the factor from one delay to the next; at least 1.
    :param jitter: the fraction by which a delay is randomly shortened or lengthened; 0 to 1.
    :raises ValueError, TypeError: an argument is invalid.
    """

    __slots__ = ("initial", "jitter", "maximum", "multiplier")

    def __init__(
        self, initial: float = 0.1, maximum: float = 5.0, multiplier: float = 2.0, jitter: float = 0.5
    ) -> None:
        for name, number in (
            ("initial", initial), ("maximum", maximum), ("multiplier", multiplier), ("jitter", jitter)
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{name} must be a number, got {show(number)}")
        if not 0 < initial <= maximum < float("inf"):
            raise ValueError(f"initial must be above 0 and at most maximum, got {initial} and {maximum}")
        if not 1 <= multiplier < float("inf"):
            raise ValueError(f"multiplier must be at least 1, got {multiplier}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, got {jitter}")
        self.initial = initial
        self.maximum = maximum
        self.multiplier = multiplier
        self.jitter = jitter

    def __repr__(self) -> str:
        return f"Backoff({self.initial}, {self.maximum}, {self.multiplier}, {self.jitter})"

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after *failures* failed attempts in a row (1 or more)."""
        try:
            plain = min(self.initial * self.multiplier ** (failures - 1), self.maximum)
        except OverflowError:  # the exponent of a float is limited; the delay reached its maximum long before
            plain = self.maximum
        return min(plain * (1 + self.jitter * random.uniform(-1, 1)), self.maximum)
