"""How long to wait between attempts. Pure: no clock, no sleep."""

from __future__ import annotations

import random

from .errors import show

__all__ = ["Backoff"]


class Backoff:
    """Delays that grow by a factor up to a maximum, each shifted by chance so that many clients do not come at once.

    :param initial: seconds before the second attempt (the first is made at once).
    :param maximum: seconds that no delay exceeds.
    :param multiplier: by which each delay is longer than the one before; at least 1.
    :param jitter: the part of a delay by which chance may shorten or lengthen it; 0 to 1.
    :raises ValueError, TypeError: for anything else.
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
        """Seconds to wait after *failures* failed attempts in a row (1 or more)."""
        try:
            plain = min(self.initial * self.multiplier ** (failures - 1), self.maximum)
        except OverflowError:  # a float's exponent ends somewhere; the maximum was reached long before
            plain = self.maximum
        return min(plain * (1 + self.jitter * random.uniform(-1, 1)), self.maximum)
