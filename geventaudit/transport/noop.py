"""The connection that discards all records."""

from __future__ import annotations

from collections.abc import Sequence

from gevent.event import Event

from ..errors import ConnectionFailedError, logger
from .connection import Closing

__all__ = ["NoOp"]


class NoOp(Closing):
    """A connection that discards all frames, which count as delivered. For tests, and to switch auditing off.

    Each construction logs a warning, so that auditing is never off without a trace.
    """

    name = "NoOP"

    def __init__(self) -> None:
        self._written = 0
        self._closed = Event()
        logger().warning("audit records are discarded: the connection is a NoOp; use DomainSocket or TCP for an agent")

    def write(self, frames: Sequence[bytes]) -> None:
        """See :meth:`Connection.write`."""
        if self._closed.is_set():
            raise ConnectionFailedError("noop: the connection is closed")
        self._written += len(frames)

    def delivered(self) -> int:
        """See :meth:`Connection.delivered`."""
        return self._written

    def wait_broken(self) -> None:
        """See :meth:`Connection.wait_broken`. Only :meth:`close` ends the wait."""
        self._closed.wait()
        raise ConnectionFailedError("noop: the connection is closed")

    def close(self) -> None:
        """See :meth:`Connection.close`."""
        self._closed.set()
