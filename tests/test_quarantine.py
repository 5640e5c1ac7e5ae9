"""The quarantine rejects each record that makes the agent hang up, and no other."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, combinations, product, repeat
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geventaudit.delivery.quarantine import (
    MAX_STALL_SECONDS,
    STALL_SECONDS,
    STRIKES,
    TAKEN_SECONDS,
    TRIALS,
    Disconnect,
    Phase,
    Quarantine,
    Step,
)

# -- each transition ---------------------------------------------------------------------------------------------------
#
# A script is a list of events. ``next`` and ``wait`` check the answers of the quarantine; all times are absolute.

Event = tuple[object, ...]

SUSPECTED: list[Event] = [
    ("connect", 0), ("next", 0, 3, 0, Step.BATCH), ("written", Step.BATCH, 3), ("hang up", "a", 3),
    ("connect", 1), ("next", 0, 3, 1, Step.ONE), ("written", Step.ONE, 1), ("hang up", "a", 1),
    ("connect", 2), ("next", 0, 3, 2, Step.ONE), ("written", Step.ONE, 1), ("hang up", "a", 1),
    ("state", Phase.PROBE, "a"), ("connect", 10),
]  # fmt: skip
PROBED: list[Event] = [*SUSPECTED, ("next", 0, 3, 10, Step.PROBE, 1), ("written", Step.PROBE, 1)]
TAKEN: list[Event] = [*PROBED, ("delivered", 10), ("next", 0, 2, 10 + TAKEN_SECONDS, Step.ONE)]
TRIED: list[Event] = [*TAKEN, ("written", Step.ONE, 1), ("state", Phase.TRIAL, "a")]


def failed(place: int = 1) -> list[Event]:
    """All trials but the last: the suspect fails, and the next record at *place* is taken."""
    return [
        event
        for now in range(12, 12 + 2 * (TRIALS - 1), 2)
        for event in [
            ("hang up", "a", 1, 1), ("state", Phase.PROBE, "a"), ("connect", now),
            ("next", 0, 9, now, Step.PROBE, place), ("written", Step.PROBE, 1), ("delivered", now),
            ("next", 0, 8, now + 1, Step.ONE), ("written", Step.ONE, 1), ("state", Phase.TRIAL, "a"),
        ]
    ]  # fmt: skip


LAST_TRIAL: list[Event] = [*TRIED, *failed()]
LONE: list[Event] = [*SUSPECTED, ("next", 0, 1, 10, Step.ONE), ("written", Step.ONE, 1)]
STALLED = 10 + STALL_SECONDS

SCRIPTS: dict[str, list[Event]] = {
    "a new client sends batches": [
        ("state", Phase.NORMAL, None), ("quiet", True), ("connect", 0), ("next", 0, 0, 0, Step.BATCH),
        ("next", 7, 9, 99, Step.BATCH), ("wait", 99, None),
    ],
    "a hang-up makes the records in flight go one by one": [
        *SUSPECTED[:4], ("quiet", False), ("connect", 1), ("next", 0, 5, 1, Step.ONE), ("written", Step.ONE, 1),
        ("next", 1, 4, 1, Step.NOTHING), ("delivered", 1), ("state", Phase.NORMAL, None),
        ("next", 0, 4, 1, Step.ONE), ("written", Step.ONE, 1), ("delivered", 1),
        ("next", 0, 3, 1, Step.ONE), ("written", Step.ONE, 1),
        ("next", 1, 2, 1, Step.NOTHING), ("delivered", 1), ("next", 0, 2, 1, Step.BATCH), ("quiet", True),
    ],
    "nothing follows a single record that was hung up on": [
        ("connect", 0), ("written", Step.BATCH, 1), ("hang up", "a", 1), ("connect", 1),
        ("next", 0, 2, 1, Step.ONE), ("written", Step.ONE, 1), ("next", 1, 1, 1, Step.NOTHING),
    ],
    "a reset is no strike": [
        ("connect", 0), ("written", Step.BATCH, 3), ("reset", "a", 3), ("state", Phase.NORMAL, None),
        ("connect", 1), ("next", 0, 3, 1, Step.BATCH),
    ],
    "after three connections without a delivery, records go one by one": [
        *[("connect", 0), ("written", Step.BATCH, 3), ("reset", "a", 3)] * STRIKES,
        ("state", Phase.NORMAL, None), ("connect", 1), ("next", 0, 3, 1, Step.ONE),
    ],
    "a reset between hang-ups is neither strike nor acquittal": [
        *SUSPECTED[:8], ("connect", 2), ("written", Step.ONE, 1), ("reset", "a", 1), ("state", Phase.NORMAL, "a"),
        ("connect", 2), ("written", Step.ONE, 1), ("hang up", "a", 1), ("state", Phase.PROBE, "a"),
    ],
    "hang-ups on two records in turn are not in a row": [
        *[("connect", 0), ("written", Step.ONE, 1), ("hang up", "a", 1),
          ("connect", 0), ("written", Step.ONE, 1), ("hang up", "b", 1)] * 5,
        ("state", Phase.NORMAL, "b"),
    ],
    "a delivery acquits": [
        *SUSPECTED[:8], ("connect", 2), ("next", 0, 3, 2, Step.ONE), ("written", Step.ONE, 1), ("delivered", 2),
        ("state", Phase.NORMAL, None), ("hang up", "b", 1, 1), ("state", Phase.NORMAL, None),
    ],
    "a hang-up after a delivery over the same connection is no strike": [
        ("connect", 0), ("written", Step.BATCH, 3), ("delivered", 0), ("hang up", "b", 2, 1),
        ("state", Phase.NORMAL, None), ("connect", 1), ("next", 0, 2, 1, Step.BATCH),
    ],
    "records that go one by one still do after a delivery and a hang-up": [
        *SUSPECTED[:6], ("written", Step.ONE, 1), ("delivered", 1), ("next", 0, 2, 1, Step.ONE),
        ("written", Step.ONE, 1), ("hang up", "b", 1, 1), ("state", Phase.NORMAL, None),
        ("connect", 2), ("next", 0, 2, 2, Step.ONE), ("written", Step.ONE, 1), ("delivered", 2),
        ("next", 0, 1, 2, Step.ONE), ("written", Step.ONE, 1), ("delivered", 2), ("quiet", True),
    ],
    "another record goes ahead of the suspect, alone": [
        *PROBED, ("next", 1, 2, 10, Step.NOTHING), ("quiet", False), ("wait", 10, STALL_SECONDS),
        ("delivered", 11), ("next", 0, 2, 11, Step.NOTHING), ("wait", 11, TAKEN_SECONDS),
        ("state", Phase.PROBE, "a"), ("next", 0, 2, 11.1, Step.NOTHING),
        ("next", 0, 2, 11 + TAKEN_SECONDS, Step.ONE), ("state", Phase.TRIAL, "a"),
    ],
    "the probe was not taken: the following one": [
        *PROBED, ("hang up", "b", 1), ("state", Phase.PROBE, "a"), ("connect", 20),
        ("next", 0, 4, 20, Step.PROBE, 2), ("written", Step.PROBE, 1), ("reset", "c", 1), ("connect", 20),
        ("next", 0, 4, 20, Step.PROBE, 3), ("written", Step.PROBE, 1), ("reset", "d", 1), ("connect", 20),
        ("next", 0, 4, 20, Step.ONE, 0), ("written", Step.ONE, 1), ("hang up", "a", 1), ("connect", 20),
        ("next", 0, 4, 20, Step.PROBE, 1),
    ],
    "the connection broke before the probe was written: the same one": [
        *SUSPECTED, ("next", 0, 4, 10, Step.PROBE, 1), ("reset", None, 0), ("connect", 20),
        ("next", 0, 4, 20, Step.PROBE, 1),
    ],
    "the write of the probe raised: the following one": [
        *SUSPECTED, ("next", 0, 4, 10, Step.PROBE, 1), ("reset", "b", 1), ("connect", 20),
        ("next", 0, 4, 20, Step.PROBE, 2),
    ],
    "the agent read the probe and died: the record that is at its place now": [
        *PROBED, ("delivered", 10), ("hang up", None, 0, 1), ("state", Phase.PROBE, "a"), ("connect", 20),
        ("next", 0, 2, 20, Step.PROBE, 1),
    ],
    "however many records are poison, the one behind them is tried": [
        *SUSPECTED,
        *chain.from_iterable(
            [("next", 0, 1000, 10, Step.PROBE, probe), ("written", Step.PROBE, 1), ("hang up", "x", 1), ("connect", 10)]
            for probe in range(1, 500)
        ),
    ],
    "a lone suspect is retried": [
        *LONE, ("next", 1, 1, 10, Step.NOTHING), ("hang up", "a", 1), ("state", Phase.PROBE, "a"), ("connect", 20),
        ("next", 0, 1, 20, Step.ONE), ("written", Step.ONE, 1), ("hang up", "a", 1), ("state", Phase.PROBE, "a"),
        ("connect", 30), ("next", 0, 5, 30, Step.PROBE, 1),
    ],
    "a lone suspect whose write raises: the next probe is the following record": [
        *SUSPECTED, ("next", 0, 1, 10, Step.ONE), ("hang up", "a", 1), ("connect", 20),
        ("next", 0, 5, 20, Step.PROBE, 1),
    ],
    "the suspect is good by now, and all others are poison": [
        *PROBED, ("hang up", "b", 1), ("connect", 20), ("next", 0, 2, 20, Step.ONE), ("written", Step.ONE, 1),
        ("delivered", 20), ("state", Phase.NORMAL, None),
    ],
    "a lone suspect is delivered": [*LONE, ("delivered", 10), ("state", Phase.NORMAL, None)],
    "the suspect is rejected": [
        *LAST_TRIAL, ("next", 1, 1, 19, Step.NOTHING), ("reject", "a", 1, 1), ("state", Phase.NORMAL, None),
        ("connect", 20), ("next", 0, 1, 20, Step.BATCH), ("quiet", True),
    ],
    "after a rejection, the probes that failed are not repeated": [
        *PROBED, ("hang up", "b", 1), ("connect", 20), ("next", 0, 4, 20, Step.PROBE, 2), ("written", Step.PROBE, 1),
        ("delivered", 20), ("next", 0, 3, 21, Step.ONE), ("written", Step.ONE, 1), *failed(2), ("reject", "a", 1, 1),
        *[("connect", 30), ("next", 0, 2, 30, Step.ONE), ("written", Step.ONE, 1), ("hang up", "b", 1)] * STRIKES,
        ("connect", 40), ("next", 0, 3, 40, Step.PROBE, 1),
    ],
    "after a rejection, one trial is enough": [
        *LAST_TRIAL, ("reject", "a", 1, 1),
        *[("connect", 30), ("written", Step.BATCH, 1), ("hang up", "b", 1)] * STRIKES,
        ("connect", 40), ("next", 0, 5, 40, Step.PROBE, 1), ("written", Step.PROBE, 1), ("delivered", 40),
        ("next", 0, 4, 41, Step.ONE), ("written", Step.ONE, 1), ("reject", "b", 1, 1),
    ],
    "after a suspect that was cleared, one trial is not enough": [
        *LAST_TRIAL, ("reject", "a", 1, 1),
        *[("connect", 30), ("written", Step.BATCH, 1), ("hang up", "b", 1)] * STRIKES,
        ("connect", 40), ("next", 0, 5, 40, Step.PROBE, 1), ("written", Step.PROBE, 1), ("delivered", 40),
        ("next", 0, 4, 41, Step.ONE), ("written", Step.ONE, 1), ("delivered", 41), ("state", Phase.NORMAL, None),
        *[("connect", 50), ("written", Step.BATCH, 1), ("hang up", "c", 1)] * STRIKES,
        ("connect", 60), ("next", 0, 5, 60, Step.PROBE, 1), ("written", Step.PROBE, 1), ("delivered", 60),
        ("next", 0, 4, 61, Step.ONE), ("written", Step.ONE, 1), ("hang up", "c", 1, 1), ("state", Phase.PROBE, "c"),
    ],
    "after records in batches, one trial is not enough": [
        *LAST_TRIAL, ("reject", "a", 1, 1), ("connect", 30), ("next", 0, 5, 30, Step.BATCH), ("written", Step.BATCH, 5),
        ("delivered", 30),
        *[("connect", 50), ("written", Step.BATCH, 1), ("hang up", "c", 1)] * STRIKES,
        ("connect", 60), ("next", 0, 5, 60, Step.PROBE, 1), ("written", Step.PROBE, 1), ("delivered", 60),
        ("next", 0, 4, 61, Step.ONE), ("written", Step.ONE, 1), ("hang up", "c", 1, 1), ("state", Phase.PROBE, "c"),
    ],
    "a reset between two trials does not count": [
        *TRIED, ("reset", "a", 1, 1), ("connect", 10), *TRIED[-6:], *failed(), ("reject", "a", 1, 1),
    ],
    "the suspect is cleared": [
        *TRIED, ("delivered", 12), ("state", Phase.NORMAL, None), ("next", 0, 1, 12, Step.ONE),
    ],
    "the suspect is cleared in the last trial": [
        *LAST_TRIAL, ("delivered", 19), ("state", Phase.NORMAL, None), ("next", 0, 1, 19, Step.BATCH),
    ],
    "a reset rejects no suspect": [
        *TRIED, ("reset", "a", 1, 1), ("state", Phase.PROBE, "a"), ("connect", 20), ("next", 0, 2, 20, Step.PROBE, 1),
    ],
    "a hang-up before the suspect is written rejects nothing": [
        *TAKEN, ("hang up", None, 0, 1), ("state", Phase.PROBE, "a"),
    ],
    "a connection that was replaced is no proof": [*TAKEN, ("connect", 20), ("state", Phase.PROBE, "a")],
    "a stall lets batches go, and the strikes stay": [
        *SUSPECTED[:6], ("written", Step.ONE, 1), ("next", 1, 2, 1, Step.NOTHING), ("wait", 1, STALL_SECONDS),
        ("next", 1, 2, 1 + STALL_SECONDS, Step.BATCH), ("quiet", True), ("wait", 9, None), ("written", Step.BATCH, 2),
        ("hang up", "a", 3), ("quiet", False), ("connect", 20), ("next", 0, 3, 20, Step.ONE),
        ("written", Step.ONE, 1), ("next", 1, 3, 20, Step.NOTHING), ("wait", 20, 2 * STALL_SECONDS),
        ("hang up", "a", 1), ("state", Phase.PROBE, "a"),
    ],
    "the time of a write is not the time of a stall": [
        *SUSPECTED, ("next", 0, 3, 10, Step.PROBE, 1), ("written", Step.PROBE, 1), ("next", 1, 2, 25, Step.NOTHING),
        ("wait", 25, STALL_SECONDS), ("next", 1, 2, 25 + STALL_SECONDS, Step.BATCH),
    ],
    "a probe that stalls is not taken": [
        *PROBED, ("next", 1, 2, 10, Step.NOTHING), ("next", 1, 2, STALLED, Step.BATCH), ("written", Step.BATCH, 2),
        ("hang up", "b", 3), ("state", Phase.PROBE, "a"), ("connect", 20), ("next", 0, 3, 20, Step.PROBE, 2),
    ],
    "a probe that is delivered after a stall acquits, since batches followed it": [
        *PROBED, ("next", 1, 2, 10, Step.NOTHING), ("next", 1, 2, STALLED, Step.BATCH), ("written", Step.BATCH, 2),
        ("delivered", 16), ("state", Phase.NORMAL, None), ("quiet", True), ("next", 2, 0, 16, Step.BATCH),
    ],
    "a stall during the trial rejects nothing": [
        *TRIED, ("next", 1, 2, 11, Step.NOTHING), ("next", 1, 2, 11 + STALL_SECONDS, Step.BATCH),
        ("written", Step.BATCH, 1), ("hang up", "a", 2, 1), ("state", Phase.PROBE, "a"),
    ],
    "the time of a stall has a limit": [
        *SUSPECTED,
        *chain.from_iterable(
            [
                ("connect", 100), ("next", 0, 1, 100, Step.ONE), ("written", Step.ONE, 1),
                ("next", 1, 0, 100, Step.NOTHING), ("wait", 100, min(STALL_SECONDS * 2**n, MAX_STALL_SECONDS)),
                ("next", 1, 0, 200, Step.BATCH), ("reset", "a", 1),
            ]
            for n in range(10)
        ),
    ],
    "a delivery in time ends the long stalls": [
        *SUSPECTED[:6], ("written", Step.ONE, 1), ("next", 1, 2, 1, Step.NOTHING), ("next", 1, 2, 6, Step.BATCH),
        ("hang up", "a", 1), ("connect", 20), ("next", 0, 3, 20, Step.ONE), ("written", Step.ONE, 1),
        ("delivered", 21), ("next", 0, 2, 21, Step.ONE), ("written", Step.ONE, 1), ("next", 1, 1, 21, Step.NOTHING),
        ("wait", 21, STALL_SECONDS),
    ],
    "a connection without a record in flight does not stall": [
        *SUSPECTED[:5], ("next", 0, 0, 99, Step.ONE), ("next", 0, 1, 200, Step.ONE), ("quiet", False),
    ],
    "a probe from behind the records that go one by one is none of them": [
        *[("connect", 0), ("written", Step.BATCH, 2), ("hang up", "a", 2)] * STRIKES,
        ("connect", 10), ("next", 0, 3, 10, Step.PROBE, 1), ("written", Step.PROBE, 1), ("hang up", "b", 1),
        ("connect", 20), ("next", 0, 3, 20, Step.PROBE, 2), ("written", Step.PROBE, 1), ("delivered", 20),
        ("next", 0, 2, 21, Step.ONE), ("written", Step.ONE, 1), *failed(2), ("reject", "a", 1, 1),
        ("connect", 30), ("next", 0, 5, 30, Step.ONE), ("written", Step.ONE, 1), ("next", 1, 4, 30, Step.NOTHING),
        ("delivered", 30), ("next", 0, 4, 30, Step.BATCH),
    ],
    "an empty write is none": [
        *SUSPECTED, ("next", 0, 0, 10, Step.ONE), ("written", Step.ONE, 0), ("next", 0, 2, 10, Step.ONE),
    ],
    "clear() forgets the suspect": [*PROBED, ("clear",), ("state", Phase.NORMAL, None), ("next", 0, 9, 10, Step.ONE)],
}  # fmt: skip


class Script:
    """Plays a script to a quarantine."""

    def __init__(self) -> None:
        self.quarantine = Quarantine()

    def play(self, events: Iterable[Event]) -> None:
        for name, *arguments in events:
            getattr(self, "do_" + str(name).replace(" ", "_"))(*arguments)

    def do_connect(self, now: float) -> None:
        self.quarantine.on_connect(now)

    def do_next(self, in_flight: int, waiting: int, now: float, step: Step, probe: int | None = None) -> None:
        assert self.quarantine.next_step(in_flight, waiting, now) is step
        assert probe is None or self.quarantine.probe == probe

    def do_wait(self, now: float, seconds: float | None) -> None:
        assert self.quarantine.seconds_to_wait(now) == (None if seconds is None else pytest.approx(seconds))

    def do_written(self, step: Step, count: int) -> None:
        self.quarantine.on_written(step, count)

    def do_delivered(self, now: float) -> None:
        self.quarantine.on_delivered(now)

    def do_hang_up(self, first: object, in_flight: int, delivered: int = 0) -> None:
        assert not self.quarantine.on_disconnect(Disconnect(first, in_flight, delivered, True))

    def do_reset(self, first: object, in_flight: int, delivered: int = 0) -> None:
        assert not self.quarantine.on_disconnect(Disconnect(first, in_flight, delivered, False))

    def do_reject(self, first: object, in_flight: int, delivered: int) -> None:
        assert self.quarantine.on_disconnect(Disconnect(first, in_flight, delivered, True))

    def do_state(self, phase: Phase, suspect: object) -> None:
        assert (self.quarantine.phase, self.quarantine.suspect) == (phase, suspect)

    def do_quiet(self, is_quiet: bool) -> None:
        assert self.quarantine.is_quiet is is_quiet

    def do_clear(self) -> None:
        self.quarantine.clear()


@pytest.mark.parametrize("name", SCRIPTS)
def test_transition(name: str) -> None:
    Script().play(SCRIPTS[name])


def test_failed_connections_are_counted_in_every_phase() -> None:
    script = Script()
    for number in range(1, 10):
        script.do_connect(number)
        script.do_next(0, 2, number, script.quarantine.next_step(0, 2, number))
        script.do_hang_up("a" if script.quarantine.phase is Phase.NORMAL else "b", 1)
        assert script.quarantine.failed_connections == number
    script.do_delivered(10)
    assert script.quarantine.failed_connections == 0


# -- the model: a window, a connection and an agent --------------------------------------------------------------------


class Fate(NamedTuple):
    """The reaction of the agent to one record."""

    is_taken: bool
    """The client learns that the record was delivered."""
    breaks: str | None = None
    """``hang-up``: the agent hangs up on the record. ``reset``: the connection breaks, not by it. ``stall``: nothing
    more is read. None: the agent goes on."""
    seconds: float = 0.01
    linger: float = 0.05
    """Seconds from the delivery to the break."""


TAKE = Fate(True)
DIE = Fate(False, "hang-up")
LAST = Fate(True, "hang-up")  # without acks: read, noticed, died; with acks: closes after each message
RESET = Fate(False, "reset")
STALL = Fate(False, "stall")

Behaviour = Callable[[int, bool], Fate]
"""Returns the fate of a record: its place in the connection, and whether it is poison."""


def healthy(place: int, is_poison: bool) -> Fate:
    return DIE if is_poison else TAKE


def noticed_poison(place: int, is_poison: bool) -> Fate:
    """Without acks, poison that was seen to be read counts as delivered."""
    return LAST if is_poison else TAKE


def dies(place: int, is_poison: bool) -> Fate:
    return DIE


def reads_and_dies(place: int, is_poison: bool) -> Fate:
    return DIE if is_poison else LAST


def resets(place: int, is_poison: bool) -> Fate:
    return RESET


def stalls(place: int, is_poison: bool) -> Fate:
    return STALL


def dies_on_second(place: int, is_poison: bool) -> Fate:
    """The only innocent agent that gives the evidence that the rule asks for."""
    return DIE if place or is_poison else TAKE


def resets_on_second(place: int, is_poison: bool) -> Fate:
    return DIE if is_poison else RESET if place else TAKE


def slow(behaviour: Behaviour, seconds: float) -> Behaviour:
    return lambda place, is_poison: behaviour(place, is_poison)._replace(seconds=seconds)


def drops_at_once(place: int, is_poison: bool) -> Fate:
    """Marks a connection that breaks before anything is written."""
    raise AssertionError


class World:
    """A sender in simulated time. Records are strings in the order of their names.

    :param batch: the records of one write.
    :param is_blind: a connection that breaks hides the deliveries of the write that broke it, as without acks.
    """

    def __init__(self, records: Sequence[str], poison: Iterable[str], batch: int = 99, is_blind: bool = False) -> None:
        self.quarantine = Quarantine()
        self.window = deque(records)
        self.poison = frozenset(poison)
        self.batch = batch
        self.is_blind = is_blind
        self.now = 0.0
        self.delivered: list[str] = []
        self.rejected: list[str] = []
        self.arrived: list[str] = []  # at the agent, in the order of first arrival
        self.may_be_late: set[str] = set()
        self.hang_ups: tuple[str, int] = ("", 0)  # of the present suspect, as counted here
        self.failed_trials = 0  # of the present suspect
        self.is_row = False  # a record was rejected, and since then no suspect was cleared and no batch taken
        self.connections = 0

    # -- one connection

    def connect(self, behaviour: Behaviour) -> bool:
        """Live through one connection; return False if it stays open with nothing left to do."""
        self.connections += 1
        self.now += 1.0
        self.quarantine.on_connect(self.now)
        if behaviour is drops_at_once:
            assert not self.quarantine.on_disconnect(Disconnect(None, 0, 0, False))
            return True
        connection = Connection(self, behaviour)
        while True:
            waiting = len(self.window) - connection.in_flight
            step = self.quarantine.next_step(connection.in_flight, waiting, self.now)
            if step is not Step.NOTHING and waiting:
                connection.write(step)
            elif not connection.wait():
                connection.give_back()  # the application replaces the connection, which is no disconnect
                return False
            if connection.is_over:
                return True

    def arrive(self, record: str) -> None:
        if record in self.arrived:
            return
        for earlier in [*self.window, *self.delivered]:
            if earlier < record and earlier not in self.arrived:
                assert earlier in self.may_be_late, f"{record} overtook {earlier}"
        self.arrived.append(record)

    # -- checks at the end

    def check_settled(self) -> None:
        """Only poison is left or rejected, and a record is left only if no other could prove it guilty."""
        assert set(self.rejected) <= self.poison
        assert set(self.window) <= self.poison
        assert not set(self.delivered) & set(self.rejected)

    def copy(self) -> World:
        new = copy.copy(self)
        new.quarantine = copy.copy(self.quarantine)
        new.window = self.window.copy()
        new.delivered, new.rejected, new.arrived = self.delivered[:], self.rejected[:], self.arrived[:]
        new.may_be_late = set(self.may_be_late)
        return new

    def key(self) -> object:
        """The facts that decide about the future."""
        state = dict(vars(self.quarantine), _waits_since=None, _delivered_at=None)
        state["failed_connections"] = min(self.quarantine.failed_connections, STRIKES)
        state["strikes"] = min(self.quarantine.strikes, STRIKES)
        name, count = self.hang_ups
        late = frozenset(self.may_be_late.intersection(self.window))
        return (
            tuple(self.window), tuple(state.items()), late, (name, min(count, STRIKES)), self.failed_trials,
            self.is_row, frozenset(self.arrived).intersection(self.window),
        )  # fmt: skip


class Connection:
    """One connection of a world: the actions of the sender, the kernel and the agent over it."""

    def __init__(self, world: World, behaviour: Behaviour) -> None:
        self.world = world
        self.behaviour = behaviour
        self.in_flight = 0
        self.delivered = 0
        self.is_over = False
        self.ahead: int | None = None
        self.writes: list[tuple[str, ...]] = []
        self.events: deque[tuple[float, str]] = deque()  # "delivered" or a way to break
        self.place = 0
        self.is_deaf = False
        self.has_batch = False
        self.taken_at: float | None = None

    def write(self, step: Step) -> None:
        world = self.world
        window, quarantine = world.window, world.quarantine
        if step is Step.PROBE:
            assert not self.in_flight
            assert 0 < quarantine.probe < len(window)
            record = window[quarantine.probe]
            world.may_be_late |= {record, str(quarantine.suspect)}
            del window[quarantine.probe]
            window.appendleft(record)
            self.ahead = quarantine.probe
        if step is Step.ONE and quarantine.suspect is not None:
            assert window[0] is quarantine.suspect
        self.has_batch |= step is Step.BATCH
        count = min(world.batch if step is Step.BATCH else 1, len(window) - self.in_flight)
        records = tuple(window)[self.in_flight : self.in_flight + count]
        if self.is_deaf and len(self.writes) > 1 and not self.events:
            self.events.append((world.now + 15, "reset"))  # the buffers are full: the write times out
        self.writes.append(records)
        self.in_flight += count
        self.receive(records)
        quarantine.on_written(step, count)

    def receive(self, records: tuple[str, ...]) -> None:
        """Let the agent decide about *records*."""
        seconds = self.world.now
        deliveries: list[tuple[float, str]] = []
        for record in records:
            if self.is_deaf:
                return
            fate = self.behaviour(self.place, record in self.world.poison)
            self.place += 1
            seconds = max(seconds, self.events[-1][0] if self.events else 0.0) + fate.seconds
            if fate.is_taken:
                self.world.arrive(record)
                deliveries.append((seconds, "delivered"))
            if fate.breaks is not None:
                self.is_deaf = True
                if self.world.is_blind:
                    deliveries = deliveries[-1:] if fate.is_taken and len(deliveries) == 1 else []
                if fate.breaks != "stall":
                    deliveries.append((seconds + fate.linger, fate.breaks))
                break
        self.events.extend(deliveries)

    def wait(self) -> bool:
        """Wait for the next event or for the quarantine; return False if neither will come."""
        world = self.world
        seconds = world.quarantine.seconds_to_wait(world.now)
        if self.events and (seconds is None or self.events[0][0] <= world.now + seconds):
            self.handle(*self.events.popleft())
            return True
        if seconds is None:
            return False
        world.now += max(seconds, 1e-6)
        return True

    def handle(self, when: float, event: str) -> None:
        world = self.world
        world.now = max(world.now, when)
        if event == "delivered":
            self.delivered += 1
            self.in_flight -= 1
            record = world.window.popleft()
            self.ahead = None
            self.taken_at = world.now
            world.delivered.append(record)
            if record == world.hang_ups[0]:
                world.hang_ups, world.failed_trials = ("", 0), 0
                world.is_row = False
            if self.has_batch:
                world.is_row = False
            world.quarantine.on_delivered(world.now)
            return
        self.is_over = True
        first = world.window[0] if self.in_flight else None
        if world.quarantine.on_disconnect(Disconnect(first, self.in_flight, self.delivered, event == "hang-up")):
            self.check_evidence(event)
            world.rejected.append(world.window.popleft())
            world.failed_trials, world.is_row = 0, True
            self.in_flight -= 1
        elif event == "hang-up" and first == world.hang_ups[0] and self.delivered == len(self.writes) - 1 == 1:
            world.failed_trials += 1
        elif event == "hang-up" and first is not None and self.ahead is None and not self.delivered:
            name, count = world.hang_ups
            world.hang_ups = (first, count + 1 if first == name else 1)
            if first != name:
                world.failed_trials = 0
        self.give_back()

    def give_back(self) -> None:
        """Put the record that went ahead, if it was not delivered, back to its place."""
        if self.ahead is not None:
            record = self.world.window.popleft()
            self.world.window.insert(self.ahead, record)

    def check_evidence(self, event: str) -> None:
        """Check the rule: the events that must come before the rejection of a record."""
        world = self.world
        suspect = world.window[0]
        assert event == "hang-up"
        assert world.hang_ups[0] == suspect
        assert world.hang_ups[1] >= STRIKES
        assert world.failed_trials + 1 >= (1 if world.is_row else TRIALS)
        assert [len(records) for records in self.writes] == [1, 1]
        assert self.writes[0][0] == world.delivered[-1] != suspect
        assert self.writes[1] == (suspect,)
        assert self.delivered == self.in_flight == 1
        assert self.taken_at is not None
        assert world.now >= self.taken_at + TAKEN_SECONDS


def run(world: World, behaviours: Iterable[Behaviour], most: int = 1000) -> None:
    """Live through one connection after the other until there is nothing left to send."""
    for behaviour in behaviours:
        if not world.window or most <= 0:
            return
        most -= 1
        if not world.connect(behaviour):
            assert not world.window or behaviour(0, False).breaks == "stall", "the sender waits for ever"


def recover(world: World, behaviour: Behaviour = healthy) -> None:
    """Let the agent be healthy, with fresh records for each poison that is left; check that all are settled soon."""
    poison = len(world.poison.intersection(world.window))
    size = len(world.window)
    before = world.connections
    fresh = iter(range(TRIALS * (poison + 1)))
    # Each poison: the connection that comes to it, the strikes, the trials. Then a full round of probes that fail, once
    # for a suspect from before and once for each record that is delivered ahead of it.
    bound = (STRIKES + TRIALS + 2) * (poison + 1) + (TRIALS + 1) * size + 8
    while world.window:
        if world.poison.issuperset(world.window) and (number := next(fresh, None)) is not None:
            world.window.append(f"z{number}")
        run(world, [behaviour])
        assert world.connections - before <= bound, "livelock"
    world.check_settled()
    assert not world.window


def names(count: int) -> list[str]:
    return [f"r{number:03}" for number in range(count)]


def subsets(records: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(records, size) for size in range(len(records) + 1))


# -- agents, one by one ------------------------------------------------------------------------------------------------

POISON = {
    "none": (), "first": (0,), "last": (19,), "middle": (7,), "neighbours": (7, 8), "first two": (0, 1),
    "last two": (18, 19), "three and one": (3, 4, 5, 12), "every other": tuple(range(0, 20, 2)),
    "all but the last": tuple(range(19)), "all but the first": tuple(range(1, 20)),
    "all but one": tuple(n for n in range(20) if n != 9), "all": tuple(range(20)),
}  # fmt: skip

LATENCIES = [0.01, STALL_SECONDS + 1, 50.0]


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_poison_is_rejected_and_the_rest_is_delivered(poison: tuple[int, ...]) -> None:
    records = names(20)
    guilty = {records[n] for n in poison}
    for batch, is_blind, seconds in product([1, 3, 99], [False, True], LATENCIES):
        world = World(records, guilty, batch, is_blind)
        run(world, repeat(slow(healthy, seconds)), 200)
        world.check_settled()
        assert set(world.delivered) == set(records) - guilty
        recover(world, slow(healthy, seconds))
        assert set(world.rejected) == guilty


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_poison_that_was_read_counts_as_delivered_without_acks(poison: tuple[int, ...]) -> None:
    records = names(20)
    world = World(records, [records[n] for n in poison])
    run(world, repeat(noticed_poison))
    assert world.delivered == records
    assert not world.rejected


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_a_crash_loop_costs_nothing(poison: tuple[int, ...]) -> None:
    records = names(20)
    for deaths, seconds in product([1, 2, 3, 4, 5, 22, 23, 24, 100], LATENCIES):
        world = World(records, [records[n] for n in poison])
        run(world, [slow(dies, seconds)] * deaths)
        assert list(world.window) == records
        recover(world)
        assert set(world.rejected) == world.poison


@pytest.mark.parametrize("behaviour", [dies, stalls, resets, drops_at_once])
def test_an_agent_that_takes_only_heartbeats_costs_nothing(behaviour: Behaviour) -> None:
    world = World(names(5), ())
    for _ in range(50):
        world.connect(behaviour)
    assert not world.rejected
    recover(world)
    assert not world.rejected


def test_heartbeats_are_sent_to_no_agent_under_test() -> None:
    """An acknowledged heartbeat is no evidence."""
    world = World(names(2), ())
    for _ in range(STRIKES + 20):
        world.connect(dies)
        assert not world.quarantine.is_quiet


@pytest.mark.parametrize("acks", [False, True])
def test_an_agent_that_closes_after_each_message(acks: bool) -> None:
    world = World(names(20), ["r005"], is_blind=not acks)
    run(world, repeat(reads_and_dies), 60)
    assert not world.rejected  # it has never taken a record and stayed
    assert list(world.window) in (["r005"], names(20)[5:])
    recover(world)
    assert world.rejected == ["r005"]


def test_an_agent_that_reads_nothing_is_found_out_by_a_write_that_does_not_end() -> None:
    world = World(names(9), (), batch=2)
    for _ in range(20):
        assert world.connect(stalls)
    assert not world.rejected
    assert list(world.window) == names(9)
    recover(world)


@pytest.mark.parametrize("count", [10, 100])
def test_a_row_of_poison_takes_a_number_of_connections_in_proportion(count: int) -> None:
    records = names(2 * count + TRIALS - 1)
    world = World(records, records[:count])
    run(world, repeat(healthy))
    assert world.rejected == records[:count]
    assert world.delivered == records[count:]
    assert world.connections <= (STRIKES + 1) * count + count + TRIALS


def test_poison_that_comes_all_the_time() -> None:
    world = World([], ())
    for number in range(200):
        world.window.append(f"r{number:03}")
        world.poison |= {f"r{number:03}"} if number % 3 == 0 else set()
        world.connect(healthy)
    recover(world)
    assert set(world.rejected) == world.poison


# -- all agents, for few records ---------------------------------------------------------------------------------------

INNOCENT: dict[str, Behaviour] = {
    "healthy": healthy,
    "dies": dies,
    "reads and dies": reads_and_dies,
    "resets": resets,
    "resets on second": resets_on_second,
    "stalls": stalls,
    "breaks before a write": drops_at_once,
    "notices poison": noticed_poison,
    "slow": slow(healthy, STALL_SECONDS + 1),
    "slow to die": slow(dies, STALL_SECONDS + 1),
    "slow to read and die": slow(reads_and_dies, STALL_SECONDS + 1),
}
"""Agents that never give evidence against a record that is not poison, in whatever order they come."""


def explore(start: World, behaviours: Iterable[Behaviour], connections: int) -> tuple[list[World], bool]:
    """Return a world for each state that some sequence of so many connections leads to, and if that was all of them.

    Worlds of the same state have the same future, so only one of them goes on.
    """
    behaviours = list(behaviours)
    seen = {start.key()}
    worlds = [start]
    edge = [start]
    for _ in range(connections):
        following: list[World] = []
        for world in edge:
            for behaviour in behaviours if world.window else ():
                new = world.copy()
                run(new, [behaviour])
                if (key := new.key()) not in seen:
                    seen.add(key)
                    following.append(new)
        worlds += following
        edge = following
    return worlds, not edge


def check_futures(worlds: Iterable[World], records: Sequence[str]) -> None:
    """From each of the worlds, a healthy agent settles everything."""
    for world in worlds:
        recover(world)
        assert {*world.rejected, *world.delivered}.issuperset(records)


@pytest.mark.parametrize("poison", list(subsets(names(4))), ids=lambda poison: ",".join(poison) or "none")
def test_six_connections_of_any_agents_reject_only_poison(poison: tuple[str, ...]) -> None:
    records = names(4)
    worlds, _ = explore(World(records, poison), INNOCENT.values(), 6)
    check_futures(worlds, records)


@pytest.mark.parametrize("poison", list(subsets(names(4))), ids=lambda poison: ",".join(poison) or "none")
def test_six_connections_that_hide_deliveries_reject_only_poison(poison: tuple[str, ...]) -> None:
    records = names(4)
    worlds, _ = explore(World(records, poison, batch=3, is_blind=True), INNOCENT.values(), 6)
    check_futures(worlds, records)


@pytest.mark.parametrize("is_blind", [False, True], ids=["seen", "blind"])
def test_any_number_of_connections_rejects_only_poison(is_blind: bool) -> None:
    """All states that two records and the agents above can ever come to."""
    records = names(2)
    for poison in subsets(records):
        worlds, are_all = explore(World(records, poison, is_blind=is_blind), INNOCENT.values(), 100)
        assert are_all
        check_futures(worlds, records)


def test_agents_that_die_at_random_cost_only_records_with_evidence() -> None:
    """Here an agent may give evidence against any record; :meth:`Connection.check_evidence` looks at it."""
    records = names(4)
    behaviours = [healthy, dies, dies_on_second, resets, reads_and_dies]
    rejected: set[str] = set()
    for poison in [(), ("r000",), ("r001", "r002")]:
        for world in explore(World(records, poison), behaviours, 8)[0]:
            rejected.update(set(world.rejected) - world.poison)
    # Three deaths on the record; then three times another one taken, and a death on this one: the rule allows this.
    # Only the first record has three others behind it.
    assert rejected == {records[0]}


# -- larger ones -------------------------------------------------------------------------------------------------------

ANY_INNOCENT = st.one_of(
    st.sampled_from([*INNOCENT.values(), healthy, dies]),
    st.builds(
        slow,
        st.sampled_from([healthy, dies, reads_and_dies, resets_on_second]),
        st.sampled_from([0.0, 0.15, 1.0, 4.9, 5.0, 12.0, 39.0, 59.0]),
    ),
)
WORLDS = st.builds(
    lambda size, poison, batch, is_blind: World(names(size), [names(size)[n % size] for n in poison], batch, is_blind),
    st.integers(1, 16),
    st.sets(st.integers(0, 15)),
    st.sampled_from([1, 2, 5, 99]),
    st.booleans(),
)


@settings(max_examples=300)
@given(world=WORLDS, agents=st.lists(ANY_INNOCENT, max_size=40), new=st.lists(st.integers(0, 40), max_size=8))
def test_any_agents_reject_only_poison(world: World, agents: list[Behaviour], new: list[int]) -> None:
    """Records come in between, too; every third of them is poison."""
    for number, agent in enumerate(agents):
        for _ in range(new.count(number)):
            record = f"s{len(world.window) + len(world.delivered) + len(world.rejected):03}"
            world.window.append(record)
            if int(record[1:]) % 3 == 0:
                world.poison |= {record}
        if world.window:
            world.connect(agent)
    records = [*world.window, *world.delivered, *world.rejected]
    recover(world)
    assert {*world.rejected, *world.delivered}.issuperset(records)


def test_a_row_of_poison_ends_with_a_stall() -> None:
    """After batches over a stalled connection, one trial is not enough."""
    world = World(names(8), names(3), batch=1)
    run(world, [*[healthy] * 15, slow(healthy, 12.0)])
    recover(world)
    assert set(world.rejected) == world.poison


@settings(max_examples=150)
@given(
    world=WORLDS,
    agents=st.lists(st.one_of(ANY_INNOCENT, st.sampled_from([dies_on_second, dies])), max_size=60),
)
def test_any_agents_reject_only_with_evidence(world: World, agents: list[Behaviour]) -> None:
    records = list(world.window)
    run(world, agents)
    run(world, repeat(healthy), 300)
    assert sorted([*world.window, *world.delivered, *world.rejected]) == records
    assert world.poison.issuperset(world.window)


@settings(max_examples=100)
@given(world=WORLDS, deaths=st.lists(st.sampled_from([0.0, 1.0, 6.0, 30.0]), max_size=100))
def test_any_crash_loop_costs_nothing(world: World, deaths: list[float]) -> None:
    records = list(world.window)
    run(world, [slow(dies, seconds) for seconds in deaths])
    assert list(world.window) == records
    recover(world)
