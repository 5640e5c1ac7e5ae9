"""Failures of a spool's disk, and the time of the next attempt."""

from __future__ import annotations

from ..backoff import Backoff
from ..errors import SpoolError
from ..runtime.clock import monotonic

__all__ = ["DiskHangsError", "Trouble"]


class DiskHangsError(SpoolError):
    """The disk does not answer: over a network, say."""


class Trouble:
    """The state of a disk: the last failure, and the time of the next attempt."""

    __slots__ = ("_backoff", "_failures", "_until", "error")

    def __init__(self) -> None:
        self.error: SpoolError | None = None
        """The reason; None while the disk works."""
        self._backoff = Backoff(initial=0.5, maximum=30.0)
        self._failures = 0
        self._until = 0.0

    @property
    def blocks(self) -> bool:
        """True while the disk must not be tried again."""
        return self.error is not None and monotonic() < self._until

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the disk may be tried again; None while the disk works."""
        return None if self.error is None else max(self._until - monotonic(), 0.0)

    def begin(self, error: SpoolError) -> None:
        """Note a failure."""
        self.error = error
        self._failures += 1
        self._until = monotonic() + self._backoff.delay(self._failures)

    def retry_now(self) -> None:
        """Allow the next attempt at once."""
        self._until = 0.0

    def end(self) -> bool:
        """Note a success, and return True if it ends the trouble."""
        was_on = self.error is not None
        self.error, self._failures, self._until = None, 0, 0.0
        return was_on
