"""The connection that goes nowhere."""

from __future__ import annotations

from collections.abc import Sequence

from gevent.event import Event

from ..errors import ConnectionFailedError, logger
from .connection import Closing

__all__ = ["NoOp"]


class NoOp(Closing):
    """A connection that goes nowhere: frames count as delivered and are gone. For tests, and to switch auditing off.

    It says so in the log whenever one is made, so that auditing is never off without anybody noticing.
    """

    name = "NoOP"

    def __init__(self) -> None:
        self._written = 0
        self._closed = Event()
        logger().warning("audit records go nowhere: the connection is a NoOp; use DomainSocket or TCP for an agent")

    def write(self, frames: Sequence[bytes]) -> None:
        """See :meth:`Connection.write`."""
        if self._closed.is_set():
            raise ConnectionFailedError("noop: the connection is closed")
        self._written += len(frames)

    def delivered(self) -> int:
        """See :meth:`Connection.delivered`."""
        return self._written

    def wait_broken(self) -> None:
        """See :meth:`Connection.wait_broken`: when it is closed."""
        self._closed.wait()
        raise ConnectionFailedError("noop: the connection is closed")

    def close(self) -> None:
        """See :meth:`Connection.close`."""
        self._closed.set()
