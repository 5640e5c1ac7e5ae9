"""The quarantine: finds a record that makes the agent hang up, and never blames a record for a dying agent.

Pure: no I/O and no clock. The sender reports events and requests the next step.

A record is rejected only on evidence: the agent hung up on it three times in a row; then, three times, it took another
*record* and hung up on this one over the same connection. An agent that dies on every record takes no other record
first, so no record is lost to it. An agent that dies now and then may die during one trial by chance, but hardly during
three. After a rejection, one trial is enough for each next suspect, until records go in batches again or a suspect is
cleared: a row of poison needs as many other records.

=========  =====================================  =====================================  ==============================
phase      sends                                  leaves to                              when
=========  =====================================  =====================================  ==============================
NORMAL     batches; after a hang-up, the records  PROBE                                  three hang-ups in a row on the
           that were in flight go one by one                                             same first record, the suspect
PROBE      one other record, alone; the suspect,  TRIAL                                  the agent took the other record
           once all others were tried             PROBE, with the following record       the connection broke before
                                                  NORMAL; the suspect is cleared         it was delivered
TRIAL      the suspect, alone                     NORMAL; the suspect is rejected        the agent hung up on it, in the
                                                                                         last trial
                                                  NORMAL; the suspect is cleared         it was delivered
                                                  PROBE, with the record at that place   the connection broke otherwise
=========  =====================================  =====================================  ==============================

A record counts as taken when it is delivered and the connection is still open ``TAKEN_SECONDS`` later: an agent that
reads and dies has not taken it. A heartbeat proves nothing.

A connection is stalled when a record that was sent alone is not delivered within ``STALL_SECONDS``, in any phase. Then
batches are sent: only a write that does not end can show that the agent is stuck. A stalled connection rejects no
record. The suspect is cleared if a record is delivered; else it remains the suspect. After each stall the quarantine
waits twice as long, up to ``MAX_STALL_SECONDS``, so that it also finds a record on which the agent hangs up slowly.

An agent may end every connection after a message (Fluentd's ``deny_keepalive``, proxies). On the wire it looks like an
agent that hangs up on every record. After ``ENDS`` such connections in a row, which ended in order and with all records
read, and without a failed attempt to connect in between, an end in order counts as delivery
(:attr:`Quarantine.trusts_ends`). Then records are sent one by one, and more at once after each success, until a
connection stays open after a delivery. The quarantine finds a record on which the agent hangs up before that, if there
is another record that the agent takes.

A cleared suspect arrives after the records that were sent before it in PROBE. So does a record that was tried in PROBE
and not delivered. No other record arrives late.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["STRIKES", "TRIALS", "Disconnect", "Phase", "Quarantine", "Step"]

STRIKES = 3
"""Hang-ups in a row on the same first record that make it a suspect under test."""

TRIALS = 3
"""Trials that the first suspect has to fail."""

TAKEN_SECONDS = 0.2
"""Seconds that a connection must stay open after a record was delivered, for the record to count as taken."""

ALONE = 16
"""Records that are sent one by one before 2, 4, 8, ... are sent at once."""

ENDS = 5
"""Connections in a row that ended in order, with all records read, after which such an end counts as delivery. More
than the rejection of a suspect and of the record after it takes, if both are poison."""

STALL_SECONDS = 5.0
"""Seconds without a delivery after which records are sent in batches again."""

MAX_STALL_SECONDS = 80.0
"""The longest such time. Longer than the 60 seconds that an agent has to acknowledge."""


_MOST = 1024  # records at once, while records are sent one by one


class Phase(Enum):
    """The phase of the quarantine; see the module."""

    NORMAL = "normal"
    PROBE = "probe"
    TRIAL = "trial"


class Step(Enum):
    """The permitted next write."""

    BATCH = "batch"
    """As many records as fit."""
    ONE = "one"
    """The next record, alone."""
    SOME = "some"
    """The next :attr:`Quarantine.some` records."""
    PROBE = "probe"
    """The record at :attr:`Quarantine.probe` after the next one, alone."""
    NOTHING = "nothing"
    """Nothing until the record in flight is delivered, or taken."""


class Disconnect(NamedTuple):
    """The state in which a connection broke. Deliveries are reported first."""

    first: object | None
    """The first record in flight; None if there was none. Compared by identity."""
    in_flight: int
    """The records in flight."""
    delivered: int
    """The frames that were delivered over this connection."""
    agent_had_read: bool
    """True if the agent hung up and is known to have read a part of the first record in flight. A read of earlier
    records only is not enough: the suspect would be blamed for an agent that died before."""
    read: int = 0
    """The frames that the agent had read over this connection when it ended the connection in order; 0 if unknown."""


class Quarantine:
    """The state machine of one client; see the module."""

    def __init__(self) -> None:
        self.phase = Phase.NORMAL
        self.serial_remaining = 0
        """Records to be delivered one by one, including the one in flight."""
        self.failed_connections = 0
        """Connections in a row over which nothing was delivered."""
        self.suspect: object | None = None
        self.strikes = 0
        """Hang-ups in a row on the suspect."""
        self._failed_trials = 0  # of the suspect
        self._trials = TRIALS  # that the suspect has to fail
        self.probe = 1
        """The place of the record that is sent ahead of the suspect: 1 is the next one, 0 the suspect itself."""
        self._is_written = False  # a record was written alone, in this phase and over this connection
        self._delivered_at: float | None = None  # the time of the probe's delivery
        # The start of the wait for a delivery. None after a write, until the next step: a write may take long.
        self._waits_since: float | None = None
        self._stall_seconds = STALL_SECONDS
        self._is_stalled = False
        self._in_a_row = 0  # records delivered over this connection, while records are sent one by one
        self.trusts_ends = False
        """True if an end in order counts as delivery of all frames that the agent had read."""
        self._ends = 0  # connections in a row that ended in order, without another delivery
        self._most = _MOST  # records at once, while ends are trusted
        self._failed_attempts = 0

    @property
    def is_quiet(self) -> bool:
        """True if heartbeats may be sent: no record is under suspicion, or the connection is stalled."""
        if self._is_stalled:
            return True
        is_normal = self.phase is Phase.NORMAL and not self.serial_remaining and self.suspect is None
        return is_normal and not self.trusts_ends

    @property
    def allows_heartbeats(self) -> bool:
        """True if heartbeats may be sent. An agent that ends connections early may not read them, and reset it."""
        return self.is_quiet and self.failed_connections < 2

    @property
    def some(self) -> int:
        """The number of records that are sent at once. It doubles with every ``ALONE`` deliveries in a row."""
        return min(1 << min(self._in_a_row // ALONE, 10), self._most)

    def on_connect(self, now: float, failed_attempts: int = 0) -> None:
        """Note a new connection.

        :param now: monotonic seconds.
        :param failed_attempts: all failed attempts to connect so far. An agent that was away has died, and not only
            ended a connection.
        """
        if self.phase is Phase.TRIAL:  # the proof is valid only over the connection that took the other record
            self.phase = Phase.PROBE
        if failed_attempts != self._failed_attempts:
            self._failed_attempts = failed_attempts
            self._distrust_ends()
        self._is_written = self._is_stalled = False
        if not self.trusts_ends:
            self._in_a_row = 0
        self._delivered_at = None
        self._waits_since = now

    def next_step(self, in_flight: int, waiting: int, now: float) -> Step:
        """Return the next step. Call this again after each event, and after :meth:`seconds_to_wait`.

        :param in_flight: records in flight over this connection.
        :param waiting: records that wait to be sent, the suspect included. May stop counting at :attr:`probe` + 1.
        """
        self._note_time(in_flight, now)
        if self._is_stalled:
            return Step.BATCH
        if self.phase is Phase.NORMAL:
            if not (self.serial_remaining or self.trusts_ends):
                return Step.BATCH
            if in_flight or (self.trusts_ends and self._is_written):
                return Step.NOTHING
            return Step.ONE if self.some == 1 else Step.SOME
        if in_flight or self._is_written:
            return Step.NOTHING
        if self.phase is Phase.TRIAL:
            return Step.ONE
        # The round includes the suspect: it may be accepted by now, and all others may be poison.
        self.probe %= max(waiting, 1)
        return Step.PROBE if self.probe else Step.ONE

    def seconds_to_wait(self, now: float) -> float | None:
        """Return the seconds after which :meth:`next_step` may change without an event; None for never."""
        if self._delivered_at is not None:
            return max(self._delivered_at + TAKEN_SECONDS - now, 0.0)
        if self.is_quiet or self._waits_since is None:
            return None
        return max(self._waits_since + self._stall_seconds - now, 0.0)

    def on_written(self, step: Step, count: int) -> None:
        """Note that *count* records were written in that step."""
        self._waits_since = None
        if count and step is not Step.BATCH:
            self._is_written = True

    def on_delivered(self, now: float, count: int = 1) -> None:
        """Note that *count* records in flight were delivered. Heartbeats do not count."""
        self._waits_since = now
        self.failed_connections = self._ends = 0
        if self.trusts_ends and not self._is_stalled:
            self._in_a_row += count
            self._delivered_at = now
            return
        if self._is_stalled:
            # Batches followed the single record, so it is not known here which records were delivered.
            self.forget_records()
            self._distrust_ends()
            return
        place = self.probe if self.phase is Phase.PROBE else 0
        if place < self.serial_remaining:
            self.serial_remaining = max(self.serial_remaining - count, 0)
            self._in_a_row += count
        if place:
            self._delivered_at = now
        else:
            if self.suspect is not None or not self.serial_remaining:
                self._trials = TRIALS
            self.clear()
            self._stall_seconds = STALL_SECONDS

    def on_disconnect(self, event: Disconnect) -> bool:
        """Note that the connection broke, and return True if its first record in flight is rejected."""
        self.failed_connections = 0 if event.delivered else self.failed_connections + 1
        hung_up_on = event.first if event.agent_had_read else None
        is_stalled, self._is_stalled = self._is_stalled, False
        self._ends = self._ends + 1 if event.read and not event.delivered else 0
        if self._is_usual_end(event):
            return False
        if self.phase is Phase.TRIAL:
            self.phase = Phase.PROBE
            if hung_up_on is not None and hung_up_on is self.suspect and not is_stalled:
                self._failed_trials += 1
                if self._failed_trials >= self._trials:
                    self._reject()
                    return True
        elif self.phase is Phase.PROBE:
            # A delivered probe has left the window, so the same place has another record.
            self.probe += bool(event.in_flight)
        else:
            self._count(event, hung_up_on)
        return False

    def forget_records(self) -> None:
        """Clear all suspicion: other records are in flight now, or the delivered ones are not known."""
        self.clear()
        self.serial_remaining = 0
        self._trials = TRIALS

    def _distrust_ends(self) -> None:
        self.trusts_ends = False
        self._ends = 0
        self._most = _MOST

    def _is_usual_end(self, event: Disconnect) -> bool:
        """Return True if the agent ends every connection after a message, so that this end is no evidence."""
        if not self.trusts_ends:
            if self._ends < ENDS:
                return False
            self.forget_records()
            self.trusts_ends = True
        elif event.delivered + event.in_flight > max(event.read, event.delivered):  # not all of them were read
            if self.some == 1 and not event.read and not event.delivered:
                self._distrust_ends()
                return False
            self._most = max(self.some // 2, 1)
        self.failed_connections = 0
        return True

    def clear(self) -> None:
        """Clear the suspect."""
        self.phase, self.suspect, self.strikes, self.probe = Phase.NORMAL, None, 0, 1
        self._failed_trials = 0
        self._is_written = self._is_stalled = False
        self._delivered_at = None

    def _reject(self) -> None:
        # The next record may be poison too. The records tried before the taken one are not tried again: the number of
        # connections would grow with the square of the poison records.
        probe = max(self.probe - 1, 1)
        self.clear()
        self.probe = probe
        self._trials = 1
        self.serial_remaining = max(self.serial_remaining - 1, 0)

    def _count(self, event: Disconnect, hung_up_on: object | None) -> None:
        if event.delivered:
            return
        # Also without a hang-up: the kernel does not report how much of a large write the agent took, and an agent that
        # takes only a little over each connection would make no progress.
        if hung_up_on is not None or self.serial_remaining or self.failed_connections >= STRIKES:
            self.serial_remaining = max(self.serial_remaining, event.in_flight)
        if hung_up_on is None:
            return
        self.strikes = self.strikes + 1 if hung_up_on is self.suspect else 1
        self.suspect = hung_up_on
        if self.strikes >= STRIKES:
            self.phase = Phase.PROBE

    def _note_time(self, in_flight: int, now: float) -> None:
        if self._delivered_at is not None:
            if now >= self._delivered_at + TAKEN_SECONDS:
                if self.trusts_ends:
                    self._distrust_ends()
                else:
                    self.phase = Phase.TRIAL
                self._is_written, self._delivered_at = False, None
        elif self.is_quiet or not in_flight or self._waits_since is None:
            self._waits_since = now
        elif now >= self._waits_since + self._stall_seconds:
            self._is_stalled = True
            self._stall_seconds = min(2 * self._stall_seconds, MAX_STALL_SECONDS)
