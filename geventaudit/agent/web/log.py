"""The last messages of an agent, its connections, and its rates by the second."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import gevent

from ...records import Heartbeat, Msg, OperationResult
from ..arrivals import Received, Refused

__all__ = ["CHART_SECONDS", "KEPT_BYTES", "KEPT_MESSAGES", "Arrival", "Link", "Log", "Second"]

KEPT_MESSAGES = 10_000
"""The most messages that are kept. The oldest are dropped."""
KEPT_BYTES = 16 << 20
"""The most bytes of the kept messages, packed. A single longer message is kept too."""
CHART_SECONDS = 120
"""The seconds of rates that are kept."""

_KEPT_CLOSED = 20


class Arrival(NamedTuple):
    """A message with its circumstances."""

    number: int
    """1 for the first message of the agent."""
    time: float
    """The time of arrival, in seconds since 1970."""
    link: Link
    frame_size: int
    """Bytes of its frame on the wire."""
    size: int
    """Bytes of the message in its frame, unpacked."""
    message: Received | Refused


@dataclass(slots=True, eq=False)
class Link:
    """A connection."""

    number: int
    """1 for the first connection of the agent."""
    peer: str
    opened: float
    """In seconds since 1970."""
    closed: float | None = None
    """In seconds since 1970; None while it is open."""
    reason: str = ""
    """The reason for which the connection was closed."""
    frames: int = 0
    bytes: int = 0
    """Bytes of its whole frames."""
    messages: int = 0
    refused: int = 0
    heartbeat: float | None = None
    """The time of the last heartbeat, in seconds since 1970."""
    frame_size: int = 0
    """Bytes of the current frame."""


@dataclass(slots=True)
class Second:
    """The messages of one second."""

    second: int
    """Since 1970."""
    success: int = 0
    failure: int = 0
    unknown: int = 0
    refused: int = 0


class Log:
    """An :class:`~geventaudit.agent.arrivals.Observer` that keeps the last messages.

    It encodes nothing: a message costs about a microsecond, so that an agent is as fast as one without a page while the
    page is not open.
    """

    def __init__(self) -> None:
        self.first = 1
        """The number of the oldest message that is kept, or of the next one."""
        self.cleared = 1
        """The number of the first message after the last :meth:`clear`."""
        self.dropped = 0
        """Messages dropped because too many are kept; without those that were cleared."""
        self.seconds: deque[Second] = deque(maxlen=CHART_SECONDS)
        """The seconds in which messages arrived, oldest first."""
        self._arrivals: deque[Arrival] = deque()
        self._bytes = 0
        self._numbers = count(1)
        self._open: dict[Any, Link] = {}  # by greenlet
        self._closed: deque[Link] = deque(maxlen=_KEPT_CLOSED)

    @property
    def next(self) -> int:
        """The number of the next message."""
        return self.first + len(self._arrivals)

    @property
    def links(self) -> list[Link]:
        """The open connections and the last closed ones, by number."""
        return [*self._closed, *self._open.values()]

    def after(self, number: int, most: int) -> list[Arrival]:
        """Return the first *most* kept messages after message *number*."""
        start = max(number + 1 - self.first, 0)
        # Not islice, which would walk from the start of the deque.
        return [self._arrivals[index] for index in range(start, min(start + most, len(self._arrivals)))]

    def clear(self) -> None:
        """Drop all kept messages."""
        self.first = self.cleared = self.next
        self._arrivals.clear()
        self._bytes = 0

    # -- Observer ------------------------------------------------------------------------------------------------------

    def connected(self, peer: str) -> None:
        self._open[gevent.getcurrent()] = Link(next(self._numbers), peer, time.time())

    def frame_began(self, size: int) -> None:
        link = self._open[gevent.getcurrent()]
        link.frame_size = size
        link.frames += 1
        link.bytes += size

    def handed_over(self, message: Received | Refused, size: int) -> None:
        link = self._open[gevent.getcurrent()]
        now = time.time()
        self._arrivals.append(Arrival(self.next, now, link, link.frame_size, size, message))
        self._bytes += size
        while len(self._arrivals) > KEPT_MESSAGES or (self._bytes > KEPT_BYTES and len(self._arrivals) > 1):
            self._bytes -= self._arrivals.popleft().size
            self.first += 1
            self.dropped += 1
        if not self.seconds or self.seconds[-1].second < int(now):  # a clock that was set back changes an old second
            self.seconds.append(Second(int(now)))
        second = self.seconds[-1]
        if isinstance(message, Refused):
            link.refused += 1
            second.refused += 1
            return
        link.messages += 1
        if isinstance(message.message, Msg):
            result = message.message.record.operation_result
            if result == OperationResult.SUCCESS:
                second.success += 1
            elif result == OperationResult.FAILURE:
                second.failure += 1
            else:
                second.unknown += 1
        elif isinstance(message.message, Heartbeat):
            link.heartbeat = now

    def disconnected(self, reason: str) -> None:
        link = self._open.pop(gevent.getcurrent(), None)
        if link is not None:
            link.closed, link.reason = time.time(), reason
            self._closed.append(link)
