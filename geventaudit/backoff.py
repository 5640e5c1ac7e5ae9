"""How long to wait between attempts. Pure: no clock, no sleep."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Backoff"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that grow by a factor up to a maximum, each shifted by chance so that many clients do not come at once.

    :param initial: seconds before the second attempt (the first is made at once).
    :param maximum: seconds that no delay exceeds.
    :param multiplier: by which each delay is longer than the one before; at least 1.
    :param jitter: the part of a delay by which chance may shorten or lengthen it; 0 to 1.
    :raises ValueError: for anything else.
    """

    initial: float = 1.0
    maximum: float = 60.0
    multiplier: float = 2.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.initial <= self.maximum < float("inf"):
            raise ValueError(f"initial must be above 0 and at most maximum, got {self.initial} and {self.maximum}")
        if not 1 <= self.multiplier < float("inf"):
            raise ValueError(f"multiplier must be at least 1, got {self.multiplier}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, got {self.jitter}")

    def delay(self, failures: int) -> float:
        """Seconds to wait after *failures* failed attempts in a row (1 or more)."""
        try:
            plain = min(self.initial * self.multiplier ** (failures - 1), self.maximum)
        except OverflowError:  # a float's exponent ends somewhere; the maximum was reached long before
            plain = self.maximum
        return min(plain * (1 + self.jitter * random.uniform(-1, 1)), self.maximum)
