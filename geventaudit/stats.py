"""What a client has done so far, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .threads import Inbox

__all__ = ["Counters", "Rejection", "Stats"]


class Rejection:
    """Why ``send`` did not accept a message: the keys of :attr:`Stats.rejected`."""

    INVALID = "invalid"
    """It breaks the rules (:class:`~geventaudit.ValidationError`)."""
    QUEUE_FULL = "queue_full"
    """There was no room (:class:`~geventaudit.QueueFullError`)."""
    CLOSED = "closed"
    """The client was closing or closed (:class:`~geventaudit.ClientClosedError`)."""
    BROKEN = "broken"
    """The base client's connection was broken (:class:`~geventaudit.ConnectionFailedError`)."""
    LEFT_OUT = "left_out"
    """``before_send`` returned None."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of a client's numbers. Records are counted, heartbeats are not, except where it says so.

    ``accepted == delivered + dropped + recovered + queued + in_flight`` holds at every moment.
    """

    accepted: int = 0
    """Taken by ``send``."""
    written: int = 0
    """Written to a connection, each time that a record was."""
    delivered: int = 0
    """Known to be taken by the agent, as far as the kind of connection can know."""
    resent: int = 0
    """Written because a connection broke before they were known to be delivered over it."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Not taken by ``send``, by reason: ``invalid``, ``queue_full``, ``closed``, ``broken``, ``left_out``."""
    dropped: int = 0
    """Accepted, and given up when the client closed."""
    recovered: int = 0
    """Accepted, and handed back by ``BaseClient.recover``."""
    connects: int = 0
    """Connections made."""
    connect_failures: int = 0
    """Attempts to make one that failed."""
    heartbeats: int = 0
    """Heartbeats written."""
    queued: int = 0
    """Waiting to be written now, those that are to be written once more included."""
    in_flight: int = 0
    """Written, and not known to be delivered, now."""
    in_flight_bytes: int = 0
    """The same in bytes of frames."""
    connected: bool = False
    """Whether there is a connection now."""


class Counters:
    """The numbers that only grow, while they grow."""

    def __init__(self) -> None:
        self.accepted = 0
        self.written = 0
        self.delivered = 0
        self.resent = 0
        self.dropped = 0
        self.recovered = 0
        self.connects = 0
        self.connect_failures = 0
        self.heartbeats = 0
        self.rejected: Counter[str] = Counter()

    @property
    def settled(self) -> int:
        """Accepted records that are no longer the sender's to deliver."""
        return self.delivered + self.dropped + self.recovered

    def snapshot(
        self, inbox: Inbox, *, queued: int = 0, in_flight: int = 0, in_flight_bytes: int = 0, connected: bool = False
    ) -> Stats:
        """All numbers as they are now, with what other threads did."""
        handed_over = len(inbox)
        return Stats(
            accepted=self.accepted + handed_over,
            written=self.written,
            delivered=self.delivered,
            resent=self.resent,
            rejected=dict(self.rejected + Counter(inbox.rejected)),
            dropped=self.dropped,
            recovered=self.recovered,
            connects=self.connects,
            connect_failures=self.connect_failures,
            heartbeats=self.heartbeats,
            queued=queued + handed_over,
            in_flight=in_flight,
            in_flight_bytes=in_flight_bytes,
            connected=connected,
        )
