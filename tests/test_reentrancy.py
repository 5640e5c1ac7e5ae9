"""send() within send(): at every bytecode, in signal handlers and finalizers, without memory and without stack."""

from __future__ import annotations

import datetime as dt
import itertools
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.queue import Queue
from helpers import eventually, message, on_signal

from geventaudit import Backoff, BaseClient, Client, ClientClosedError, DomainSocket, NoOp, QueueFullError, Spool
from geventaudit import ValidationError as Invalid
from geventaudit.delivery.inbox import HandedOver, Inbox
from geventaudit.encoder.encoding import Encoder
from geventaudit.runtime import exits, native, workers
from geventaudit.runtime.hub_thread import HubThread
from geventaudit.runtime.signal import Signal
from geventaudit.runtime.workers import OneWorker
from geventaudit.testing import AuditAgent

QUICK = Backoff(initial=0.01, maximum=0.05)
MOMENT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
PACKAGE = str(Path(sys.modules["geventaudit"].__file__ or "").parent)


def broken() -> NoOp:
    raise OSError("no agent")


def natively(function: Callable[[], Any]) -> Any:
    """Run *function* in another native thread, while this one's hub does not run."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:
            done.append((None, error))

    native.start_new_thread(run, ())
    deadline = time.monotonic() + 60
    while not done:
        assert time.monotonic() < deadline, "the other thread waits for this one"
        native.sleep(0.0005)
    result, error = done[0]
    if error is not None:
        raise error
    return result


# -- at every bytecode -------------------------------------------------------------------------------------------------


of_3_11 = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="a trace function of Python 3.12 sees few of the bytecodes"
)


def interrupted(call: Callable[[], Any], at: int, act: Callable[[], Any]) -> bool:
    """Call *call*, and *act* before the bytecode number *at* of the library in it; return True if there was one."""
    steps = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if steps == at:
                sys.settrace(None)
                act()
            steps += 1
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(old)
    return steps > at


class Situations:
    """The states in which the outer send() finds the client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def make(self, situation: str) -> Client:
        self._count += 1
        spool = None
        if situation in ("disk", "opening"):
            spool = Spool(self._folder / f"spool{self._count}")
        client = Client(broken, backoff=Backoff(1000, 1000), queue_size=3 if situation == "disk" else 100, spool=spool)
        if situation not in ("first use", "opening"):
            client.send(message(-1))
        if situation == "running":
            client._gate = None  # only the path for messages that the gate did not accept
        if situation == "disk":
            client.send(message(-2))
            client.send(message(-3))
            eventually(lambda: not self.is_full(client))
        if situation == "inbox":
            natively(lambda: client.send(message(-2)))
        return client

    @staticmethod
    def is_full(client: Client) -> bool:
        try:
            client.send(message(-4))
        except QueueFullError:
            return True
        return False


@of_3_11
@pytest.mark.parametrize(
    ("situation", "step"), [("first use", 17), ("running", 2), ("gate", 1), ("inbox", 5), ("disk", 11)]
)
def test_send_at_every_bytecode_of_send(folder: Path, situation: str, step: int) -> None:
    situations = Situations(folder)
    at, more = 0, True
    while more:
        client = situations.make(situation)
        before = client.stats().accepted
        more = interrupted(lambda: client.send(message(1)), at, lambda: client.send(message(2)))  # noqa: B023
        assert client.stats().accepted == before + 1 + more
        left = [each.record.custom_data["n"] for each in client.close(0)]
        stats = client.stats()
        assert stats.accepted == before + 1 + more == stats.dropped + stats.kept
        assert sorted(each for each in left if each > 0) == ([] if situation == "disk" else [1, 2] if more else [1])
        at += step
    assert at > (50 if situation != "gate" else 0)


@of_3_11
def test_close_at_every_bytecode_of_close() -> None:
    """A signal handler closes the client in the middle of its close()."""
    at, more = 0, True
    while more:
        client = Client(broken, backoff=Backoff(1000, 1000))
        client.send(message(1))
        left: list[Any] = []
        with gevent.Timeout(30):
            more = interrupted(lambda: left.extend(client.close(0.01)), at, lambda: left.extend(client.close(0)))  # noqa: B023
        left += client.close()
        assert len(left) == 1
        assert client.is_closed
        at += 7
    assert at > 50


@of_3_11
def test_send_at_every_bytecode_of_close() -> None:
    """The record is refused, or handed back."""
    at, more = 0, True
    while more:
        client = Client(broken, backoff=Backoff(1000, 1000))
        client.send(message(1))
        results: list[BaseException | None] = []

        def nested(client: Client = client, results: list[BaseException | None] = results) -> None:
            try:
                client.send(message(2))
                results.append(None)
            except ClientClosedError as error:
                results.append(error)

        left: list[Any] = []
        more = interrupted(lambda: left.extend(client.close(0.0)), at, nested)  # noqa: B023
        numbers = sorted(each.record.custom_data["n"] for each in left + client.close())
        assert numbers == ([1, 2] if results == [None] else [1])
        assert client.stats().dropped == len(numbers)
        at += 23
    assert at > 300


@of_3_11
@pytest.mark.parametrize(
    ("situation", "step"), [("first use", 29), ("running", 3), ("gate", 1), ("inbox", 7), ("disk", 23)]
)
def test_close_at_every_bytecode_of_send(folder: Path, situation: str, step: int) -> None:
    situations = Situations(folder)
    at, more = 0, True
    while more:
        client = situations.make(situation)
        before = client.stats().accepted
        left: list[Any] = []
        try:
            more = interrupted(lambda: client.send(message(1)), at, lambda: left.extend(client.close(0)))  # noqa: B023
            accepted = 1
        except ClientClosedError:
            accepted = 0
        left += client.close(0)
        stats = client.stats()
        assert stats.accepted == before + accepted == stats.dropped + stats.kept
        assert len(left) == stats.dropped
        at += step
    assert at > (50 if situation != "gate" else 0)


# -- signal handlers and finalizers ------------------------------------------------------------------------------------


class Sends:
    """Sends records and remembers the numbers of those that were accepted."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.accepted: list[int] = []
        self.refused = 0
        self.busy: set[int] = set()  # a handler may have interrupted a greenlet that waits for the disk
        self._next = iter(range(50_000))

    def __call__(self) -> None:
        number = next(self._next)
        self.busy.add(number)
        try:
            self.client.send(message(custom_data={"n": number, "at": [MOMENT] * 5}))
        except QueueFullError:
            self.refused += 1
        else:
            self.accepted.append(number)
        finally:
            self.busy.discard(number)


@pytest.mark.parametrize("thread", [False, True], ids=["alone", "beside a thread"])
@pytest.mark.parametrize("how", ["signal", "finalizer"])
@pytest.mark.parametrize("mode", [None, "overflow", "always"])
def test_thousands_of_nested_sends(folder: Path, mode: Any, how: str, thread: bool) -> None:
    outer_sends = 100 if mode == "always" else 300
    spool = None if mode is None else Spool(folder / "spool", mode=mode)
    with AuditAgent() as agent:
        client = Client(lambda: DomainSocket(agent.address), queue_size=50_000 if mode is None else 100, spool=spool)
        outer, nested, beside = Sends(client), Sends(client), Sends(client)
        over = not thread

        class Finalized:
            def __init__(self) -> None:
                self.cycle = self

            def __del__(self) -> None:
                nested()

        def another() -> None:
            nonlocal over
            for _ in range(outer_sends):
                beside()
                native.sleep(0.0001)
            over = True

        def interrupt() -> None:
            # On a slow disk, one handler would interrupt the other until the stack ends. On a slow machine, they would
            # leave no time for the interrupted sends.
            if len(nested.busy) > 50 or len(nested.accepted) + nested.refused > 3_000:
                return
            # Without a spool, the interrupted sends are quick: the agent would get many thousands of them.
            for _ in range(20 if mode is None else 3):
                if how == "signal":
                    nested()
                else:
                    Finalized().cycle = None  # type: ignore[assignment]

        if thread:
            native.start_new_thread(another, ())
        with on_signal(interrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            while len(outer.accepted) < outer_sends or len(nested.accepted) + nested.refused < 500:
                refused = outer.refused
                outer()
                if len(outer.accepted) % 20 == 0 or outer.refused > refused:
                    gevent.sleep(0)
            eventually(lambda: over)
        each = (outer, nested, beside)
        eventually(lambda: not any(sends.busy for sends in each))
        assert client.flush(60)
        stats = client.stats()
        total = sum(len(sends.accepted) for sends in each)
        assert (stats.accepted, stats.delivered, stats.connects) == (total, total, 1)
        assert sum(stats.rejected.values()) == sum(sends.refused for sends in each)
        assert client.close() == []
        agent.wait_for(total, timeout=60)
        assert not agent.refused
        numbers = sorted(record.custom_data["n"] for record in agent.records)
        assert numbers == sorted(itertools.chain.from_iterable(sends.accepted for sends in each))
        if mode is None:
            assert not nested.refused


# -- no lock -----------------------------------------------------------------------------------------------------------


class Stop:
    """A native thread stops here until the gate is opened."""

    def __init__(self) -> None:
        self.is_here = False
        self._main = native.thread_ident()
        self._gate = native.allocate_lock()
        self._gate.acquire()

    def __call__(self) -> None:
        if native.thread_ident() != self._main and not self.is_here:
            self.is_here = True
            self._gate.acquire()

    def open(self) -> None:
        self._gate.release()


class StoppingDeque(deque[HandedOver]):
    before: Callable[[], None]
    after: Callable[[], None]

    def append(self, entry: HandedOver) -> None:
        self.before()
        super().append(entry)
        self.after()


@pytest.mark.parametrize("closes", [False, True], ids=["send", "close"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("where", ["before the append", "after the append", "claim", "post"])
def test_a_thread_that_stops_in_the_middle_blocks_no_other(
    monkeypatch: pytest.MonkeyPatch, where: str, used: bool, closes: bool
) -> None:
    """As a plain lock would, for ever, if the handler of a signal sends in the hub's thread."""
    stop, results = Stop(), list[BaseException | None]()
    with AuditAgent() as agent:
        client = Client(lambda: DomainSocket(agent.address), backoff=QUICK)
        if used:
            client.send(message(0))
            assert client.flush(30)
        if where == "claim":
            claim = HandedOver.claim
            monkeypatch.setattr(HandedOver, "claim", lambda *arguments: (stop(), claim(*arguments))[1])
        elif where == "post":
            post = HubThread.post
            monkeypatch.setattr(HubThread, "post", lambda *arguments: (stop(), post(*arguments))[1])
        else:
            entries = StoppingDeque()
            entries.before, entries.after = (stop, lambda: None) if where.startswith("before") else (lambda: None, stop)
            client._life.inbox.entries = entries

        def beside() -> None:
            try:
                client.send(message(1))
                results.append(None)
            except ClientClosedError as error:
                results.append(error)

        def late() -> None:
            raise AssertionError("it hangs")

        native.start_new_thread(beside, ())
        deadline = time.monotonic() + 30
        while not stop.is_here and not results:
            assert time.monotonic() < deadline
            native.sleep(0.001)
        with on_signal(late), on_signal(lambda: client.send(message(2)), signal.SIGUSR1):
            signal.setitimer(signal.ITIMER_REAL, 20)
            signal.raise_signal(signal.SIGUSR1)
            client.send(message(3))
            if closes:
                assert client.close(0.5) == []
            else:
                gevent.sleep(0.05)
        stop.open()
        eventually(lambda: results)
        left = client.close(30)
        expected = [*([0] if used else []), 2, 3]
        if results == [None]:
            expected.append(1)
        arrived = [each.record.custom_data["n"] for each in [*agent.messages, *left]]
        eventually(lambda: len(agent.messages) + len(left) >= len(expected))
        arrived = [each.record.custom_data["n"] for each in [*agent.messages, *left]]
        assert sorted(arrived) == sorted(expected)
        assert client.stats().accepted == len(expected)


# -- no stack, no memory -----------------------------------------------------------------------------------------------


def with_frames_left(count: int, call: Callable[[], None]) -> None:
    """Call *call* where the interpreter allows about *count* more nested calls."""

    def descend(more: int) -> None:
        if more > 0:
            descend(more - 1)
        else:
            call()

    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    descend(sys.getrecursionlimit() - depth - count)


@pytest.fixture
def shallow() -> Iterator[None]:
    old = sys.getrecursionlimit()
    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    sys.setrecursionlimit(depth + 250)
    try:
        yield
    finally:
        sys.setrecursionlimit(old)


FEW = 12  # frames without which not even an error can be made


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("form", "situation"),
    [("record", each) for each in ("first use", "running", "inbox", "disk", "opening", "full", "thread")]
    + [("mapping", each) for each in ("running", "thread")],
)
def test_send_with_little_stack_is_done_or_refused(folder: Path, situation: str, form: str) -> None:
    msg: Any = message(1)
    if form == "mapping":
        from helpers import mapping

        msg = {"Type": "ControlPlane", "Record": mapping(CustomData={"n": 1})}
    situations, outcomes = Situations(folder), set[str]()
    for left in range(1, 150, 1 if situation == "running" else 5):
        client = situations.make(situation)
        if situation == "full":
            while not situations.is_full(client):
                pass
        before = client.stats()
        said: list[str] = []

        def call(client: Client = client, said: list[str] = said) -> None:
            client.send(msg)
            said.append("accepted")

        def attempt(left: int = left, call: Callable[[], None] = call, said: list[str] = said) -> None:
            try:
                with_frames_left(left, call)
            except (Invalid, QueueFullError) as error:
                said.append(type(error).__name__)
            except RecursionError:
                said.append("RecursionError")

        if situation == "thread":
            natively(attempt)
        else:
            attempt()
        after = client.stats()
        assert len(said) == 1
        assert after.accepted == before.accepted + (said == ["accepted"]), (left, said)
        assert left <= FEW or said != ["RecursionError"], left
        outcomes.add(said[0])
        if situation != "full":
            client.send(message(2))
        expected = after.accepted + (situation != "full")
        handed_back = client.close(0)
        assert client.stats().accepted == expected == len(handed_back) + client.stats().kept
    assert "accepted" in outcomes or situation == "full"
    assert len(outcomes) > 1


def raising(*arguments: Any, **options: Any) -> Any:
    raise MemoryError


class Failing(Queue):  # type: ignore[type-arg]
    fails = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> Any:
        if self.fails:
            raise MemoryError
        return super().put(item, block, timeout)


@pytest.mark.parametrize("place", ["constructed", "started"])
@pytest.mark.parametrize("which", ["sender", "writer"])
def test_a_send_that_waits_while_a_worker_is_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, which: str, place: str
) -> None:
    """The send() starts a worker of its own; one of the two does the work, and the other ends."""
    interrupted: list[bool] = []
    works = "Sender._run" if which == "sender" else "Store._run"

    class Interrupted(workers.Worker):
        def __init__(self, function: Any, *arguments: Any) -> None:
            super().__init__(function, *arguments)
            self._is_meant = works in repr(getattr(getattr(function, "__self__", None), "_function", None))
            if place == "constructed":
                self._interrupt()

        def start(self) -> None:
            if place == "started":
                self._interrupt()
            super().start()

        def _interrupt(self) -> None:
            if self._is_meant and not interrupted:
                interrupted.append(True)
                client.send(message(0))
                assert client.flush(30)

    monkeypatch.setattr(workers, "Worker", Interrupted)
    with AuditAgent() as agent:
        client = Client(lambda: DomainSocket(agent.address), spool=Spool(folder / "spool", mode="always"))
        for number in range(1, 100):
            client.send(message(number))
        assert client.flush(30)
        assert interrupted
        assert client.stats().connects == 1
        assert client.close() == []
        agent.wait_for(100)
        assert sorted(each.custom_data["n"] for each in agent.records) == list(range(100))


PLACES: dict[str, tuple[Any, str]] = {
    "encoder": (Encoder, "pack"),
    "queue": (Failing, "fails"),
    "wake": (Signal, "set"),
    "inbox": (Inbox, "put"),
    "post": (HubThread, "post"),
    "start": (HubThread, "start"),
    "worker": (OneWorker, "ensure_running"),
    "register": (exits, "register_in_worker"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("caller", ["own", "thread"])
def test_a_memory_error_refuses(monkeypatch: pytest.MonkeyPatch, place: str, used: bool, caller: str) -> None:
    monkeypatch.setattr("geventaudit.delivery.outbox.Queue", Failing)
    with AuditAgent() as agent:
        client = Client(lambda: DomainSocket(agent.address))
        number = 0
        if used:
            client.send(message(number))
            number += 1
        owner, name = PLACES[place]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, True if place == "queue" else raising)
            refusal = None
            try:
                if caller == "own":
                    client.send(message(number))
                else:
                    natively(lambda: client.send(message(number)))
            except (Invalid, QueueFullError) as error:
                refusal = error
            assert client.stats().accepted == number + (refusal is None)
            assert sum(client.stats().rejected.values()) == (refusal is not None)
        if refusal is None:
            number += 1
        client.send(message(number))
        assert client.flush(30)
        assert client.close() == []
        agent.wait_for(number + 1)
        assert [each.custom_data["n"] for each in agent.records] == list(range(number + 1))


def test_no_memory_for_a_base_client(monkeypatch: pytest.MonkeyPatch) -> None:
    with BaseClient(NoOp()) as client:
        with monkeypatch.context() as patch:
            patch.setattr(OneWorker, "ensure_running", raising)
            with pytest.raises((Invalid, QueueFullError)):
                client.send(message(0))
        client.send(message(1))
        assert client.flush(10)
        assert client.stats().accepted == 1


def test_the_program_is_not_patched_by_this() -> None:
    assert monkey.get_original("_thread", "allocate_lock") is native.allocate_lock
