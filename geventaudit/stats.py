"""The counters of a client, and the snapshot that ``stats()`` returns."""

# Without "from __future__ import annotations": NamedTuple compiles each annotation that is a text, at import.
import itertools
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from .encoder.engine import ENCODER

__all__ = ["Counters", "Rejection", "Stats"]


class Rejection(StrEnum):
    """The reasons for which ``send`` does not accept a message: the keys of :attr:`Stats.rejected`."""

    INVALID = "invalid"
    """The message breaks the rules (:class:`~geventaudit.ValidationError`)."""
    QUEUE_FULL = "queue_full"
    """The queue had no room (:class:`~geventaudit.QueueFullError`)."""
    CLOSED = "closed"
    """The client was closing or closed (:class:`~geventaudit.ClientClosedError`)."""
    BROKEN = "broken"
    """The base client's connection was broken (:class:`~geventaudit.ConnectionFailedError`)."""
    SPOOL = "spool"
    """The spool could not keep it (:class:`~geventaudit.SpoolError`)."""
    SEAL = "seal"
    """The key of the seal could not be read (:class:`~geventaudit.SealError`)."""
    LEFT_OUT = "left_out"
    """``before_send`` returned None."""


class Stats(NamedTuple):
    """A snapshot of the counters of a client. A counter counts records unless it names something else.

    ``accepted + adopted == delivered + dropped + recovered + kept + queued + in_flight + spooled`` always holds.
    Without a spool, ``adopted``, ``kept`` and ``spooled`` are 0. A snapshot in another thread than the client's own
    takes no lock: a record that moves at that moment may be counted in two places or in none.
    """

    accepted: int = 0
    """Accepted by ``send``."""
    written: int = 0
    """Written to a connection, counted at each write."""
    delivered: int = 0
    """Taken by the agent, as far as the kind of connection can know."""
    resent: int = 0
    """Written again because a connection broke before delivery was known."""
    rejected: Mapping[Rejection, int] = {}
    """Refused by ``send``, by :class:`Rejection`."""
    dropped: int = 0
    """Accepted, or found in the spool, and given up: undelivered at the end, never taken by the agent, or damaged."""
    recovered: int = 0
    """Accepted, and handed back by ``BaseClient.recover``."""
    adopted: int = 0
    """Found in the spool of an earlier or dead process."""
    kept: int = 0
    """Left in the spool for the next client when this one closed."""
    spool_failures: int = 0
    """Times that the spool could not be used, or that files in it were damaged, removed or truncated."""
    connects: int = 0
    """Connections made."""
    connect_failures: int = 0
    """Failed attempts to connect."""
    heartbeats: int = 0
    """Heartbeats written."""
    heartbeats_dropped: int = 0
    """Heartbeats not known to be delivered when their connection broke. They are not written again."""
    queued: int = 0
    """Waiting to be written now, including those to be written again."""
    in_flight: int = 0
    """Written, and not known to be delivered, now."""
    in_flight_bytes: int = 0
    """Bytes of the frames in flight now."""
    spooled: int = 0
    """In the spool, or on the way there, and not on the queue, now."""
    connected: bool = False
    """True while there is a connection."""
    degraded: bool = False
    """True while the client is in use and has no connection."""
    encoder: str = ENCODER
    """The encoder in use: ``"compiled"``, or ``"pure"`` for the slower one in plain Python."""


class _Count:
    """A counter that threads and signal handlers may increase at the same time: one step is one call in C."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = itertools.count()

    def increase(self) -> None:
        next(self._count)

    @property
    def value(self) -> int:
        return int(repr(self._count)[len("count(") : -1])


class Counters:
    """The counters of a client that only grow. Except for ``reject``, only the delivery changes them, in the hub."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counters to 0, also in a forked child."""
        self.written = 0
        self.delivered = 0
        self.resent = 0
        self.dropped = 0
        self.recovered = 0
        self.adopted = 0
        self.kept = 0
        self.spool_failures = 0
        self.connects = 0
        self.connect_failures = 0
        self.heartbeats = 0
        self.heartbeats_dropped = 0
        self._rejected = {reason: _Count() for reason in Rejection}

    def reject(self, reason: Rejection) -> None:
        """Count a refusal. Thread-safe."""
        self._rejected[reason].increase()

    @property
    def unsent(self) -> int:
        """Records that were given up, handed back or left in the spool."""
        return self.dropped + self.recovered + self.kept

    def snapshot(
        self,
        *,
        queued: int = 0,
        in_flight: int = 0,
        in_flight_bytes: int = 0,
        spooled: int = 0,
        connected: bool = False,
        degraded: bool = False,
    ) -> Stats:
        """Return a snapshot.

        ``accepted`` is the sum over all places of a record, so that ``send`` counts nothing.
        """
        settled = self.delivered + self.unsent
        return Stats(
            accepted=settled + queued + in_flight + spooled - self.adopted,
            written=self.written,
            delivered=self.delivered,
            resent=self.resent,
            rejected={reason: count.value for reason, count in self._rejected.items() if count.value},
            dropped=self.dropped,
            recovered=self.recovered,
            adopted=self.adopted,
            kept=self.kept,
            spool_failures=self.spool_failures,
            connects=self.connects,
            connect_failures=self.connect_failures,
            heartbeats=self.heartbeats,
            heartbeats_dropped=self.heartbeats_dropped,
            queued=queued,
            in_flight=in_flight,
            in_flight_bytes=in_flight_bytes,
            spooled=spooled,
            connected=connected,
            degraded=degraded,
        )
