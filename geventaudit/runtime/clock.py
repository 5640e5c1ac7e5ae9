"""The monotonic clock, and the durations and deadlines that it measures."""

from __future__ import annotations

import time

from ..errors import show

__all__ = ["TICK", "Deadline", "check_timeout", "monotonic"]

TICK = 0.001
"""The shortest time to wait, in seconds. libuv warns of shorter timers."""

_clock_gettime = time.clock_gettime


def monotonic() -> float:
    """Return the seconds of CLOCK_MONOTONIC. Tools that freeze time, such as freezegun, do not patch this clock."""
    return _clock_gettime(time.CLOCK_MONOTONIC)


class Deadline:
    """The point in time at which a wait must end.

    :param seconds: the time from now; None for no limit.
    """

    __slots__ = ("_at",)

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds that are left: 0, or at least a tick; None if there is no limit."""
        if self._at is None:
            return None
        left = self._at - monotonic()
        return max(left, TICK) if left > 0 else 0.0

    def has_passed(self) -> bool:
        """Return True if no time is left."""
        return self._at is not None and monotonic() >= self._at


def check_timeout(timeout: float | None) -> None:
    """Check that *timeout* is a number of seconds or None.

    :raises TypeError: *timeout* is not a number.
    :raises ValueError: *timeout* is NaN, which would wait for ever.
    """
    try:
        seconds = 0.0 if timeout is None else 0.0 + timeout
    except TypeError:
        raise TypeError(f"timeout must be a number of seconds, or None, got {show(timeout)}") from None
    if seconds != seconds:
        raise ValueError("timeout must be a number of seconds, or None, got nan")
