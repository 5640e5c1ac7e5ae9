"""Ctrl-C, a Timeout or a kill in the middle of the library: no turn, no worker and no record is lost by it."""

from __future__ import annotations

import dis
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import gevent
import pytest
from gevent.event import Event
from helpers import eventually, message

from geventaudit import Backoff, Client, NoOp, Spool
from geventaudit.runtime import native, workers
from geventaudit.runtime.clock import Deadline
from geventaudit.spool.disk import DiskThread

PACKAGE = str(Path(sys.modules["geventaudit"].__file__ or "").parent)
QUICK = Backoff(initial=0.001, maximum=0.001)

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="a trace function of Python 3.12 sees few of the bytecodes"
)


class Silent(NoOp):
    """A NoOp that does not warn."""

    def __init__(self) -> None:
        self._written = 0
        self._closed = Event()


class Interruption(BaseException):
    """Stands for KeyboardInterrupt, which gevent would raise in the main greenlet, too."""


@cache
def _bytecode(code: CodeType) -> bytes:
    return code.co_code


class Tracer:
    """Raises before the bytecode number *at* of the library in the greenlets for which *selects* is true.

    :param everywhere: count all bytecodes, and not only those before which Python looks for signals.
    """

    def __init__(
        self,
        at: int,
        selects: Callable[[Any], bool],
        kind: type[BaseException] = Interruption,
        *,
        everywhere: bool = False,
    ) -> None:
        self.at = at
        self.has_raised = False
        self._selects = selects
        self._kind = kind
        self._everywhere = everywhere
        self._looks: set[Any] = set()  # the frames in which Python looks for signals next
        self._steps = 0

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if self.has_raised or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and self._selects(gevent.getcurrent()):
            is_point = self._everywhere or frame in self._looks
            self._looks.discard(frame)
            name = dis.opname[_bytecode(frame.f_code)[frame.f_lasti]]
            if name == "RESUME" or name.startswith("CALL") or "JUMP_BACKWARD" in name:
                self._looks.add(frame)
            self._steps += is_point
            if is_point and self._steps > self.at:
                self.has_raised = True
                self._looks.clear()  # they would keep the objects of the frames alive
                sys.settrace(None)
                raise self._kind()
        return self

    def __enter__(self) -> Tracer:
        self._old = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *arguments: object) -> None:
        sys.settrace(self._old)


def steps(first: int, width: int) -> Iterator[int]:
    """Yield every *width*-th number from *first* on."""
    while True:
        yield first
        first += width


def numbers(messages: Any) -> list[int]:
    return [each.record.custom_data["n"] for each in messages]


@pytest.mark.parametrize("kind", [Interruption, gevent.Timeout, gevent.GreenletExit])
def test_a_waiting_send_that_is_interrupted_gives_its_turn_back(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geventaudit.runtime.signal._LOOK_SECONDS", 0.02)
    at = 0
    for at in steps({Interruption: 0, gevent.Timeout: 1, gevent.GreenletExit: 2}[kind], 3):
        has_agent = Event()
        client = Client(lambda: (has_agent.wait(), Silent())[1], queue_size=1)  # noqa: B023
        client.send(message(0))
        outcomes: dict[int, str] = {}

        def send(number: int, client: Client = client, outcomes: dict[int, str] = outcomes) -> None:
            try:
                client.send(message(number), timeout=20)
                outcomes[number] = "accepted"
            except BaseException as error:
                outcomes[number] = type(error).__name__

        first = gevent.Greenlet(send, 1)
        with Tracer(at, lambda greenlet: greenlet is first, kind, everywhere=True) as tracer:  # noqa: B023
            first.start()
            gevent.sleep(0)
            second = gevent.spawn(send, 2)
            gevent.sleep(0)
            has_agent.set()
            gevent.joinall([first, second], timeout=10)
        assert outcomes.get(2) == "accepted", at
        assert outcomes[1] == (kind.__name__ if tracer.has_raised else "accepted")
        client.send(message(3), timeout=5)
        assert client.flush(5)
        assert client.close(5) == []
        assert client.stats().accepted == client.stats().delivered
        if not tracer.has_raised:
            break
    assert at > 30


@pytest.mark.parametrize("mode", [None, "overflow", "always"])
def test_a_first_send_that_is_interrupted_leaves_a_client_that_works(folder: Path, mode: Any) -> None:
    at = 0
    for at in steps(0, 5):
        spool = None if mode is None else Spool(folder / f"spool{at}", mode=mode)
        client = Client(Silent, backoff=QUICK, spool=spool)
        main = gevent.getcurrent()
        try:
            with Tracer(at, lambda greenlet: greenlet is main) as tracer:  # noqa: B023
                client.send(message(1))
        except Interruption:
            pass
        with gevent.Timeout(20):
            client.send(message(2))
            assert client.flush(10)
            assert client.close(10) == []
        stats = client.stats()
        assert stats.accepted == stats.delivered
        assert stats.delivered in (1, 2) if tracer.has_raised else stats.delivered == 2
        if not tracer.has_raised:
            break
    assert at > 30


@pytest.mark.parametrize("mode", [None, "overflow", "always"])
def test_a_worker_that_is_killed_anywhere_is_started_again(folder: Path, mode: Any) -> None:
    at = 0
    for at in steps(0, 11):
        spool = None if mode is None else Spool(folder / f"spool{at}", mode=mode)
        client = Client(Silent, backoff=QUICK, spool=spool)
        with (
            gevent.Timeout(20),
            Tracer(at, lambda greenlet: isinstance(greenlet, workers.Worker), gevent.GreenletExit) as tracer,
        ):
            client.send(message(1))
            client.send(message(2))
            assert client.flush(10)
        with gevent.Timeout(20):
            client.send(message(3))
            assert client.flush(10)
            assert client.close(10) == []
        assert client.stats().accepted == client.stats().delivered == 3
        if not tracer.has_raised:
            break
    assert at > 30


def test_a_job_that_is_interrupted_when_it_is_given_to_the_disk_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one thread: two would write at once."""
    started: list[None] = []
    start_thread = native.start_new_thread

    def start(*arguments: Any) -> None:
        start_thread(*arguments)
        started.append(None)
        raise Interruption

    class Jobs(deque[Any]):
        def append(self, job: Any) -> None:
            super().append(job)
            raise Interruption

    monkeypatch.setattr(native, "start_new_thread", start)
    disk = DiskThread()
    done: list[int] = []
    with pytest.raises(Interruption):
        disk.submit(lambda: None, lambda job: done.append(1))
    disk._jobs = Jobs()
    with pytest.raises(Interruption):
        disk.submit(lambda: None, lambda job: done.append(2))
    eventually(lambda: done == [2])
    disk._jobs = deque()
    disk.submit(lambda: None, lambda job: done.append(3))
    eventually(lambda: done == [2, 3])
    assert len(started) == 1
    disk.run_last(lambda: None, Deadline(30))
    disk.end_watching()


@pytest.mark.parametrize("kind", [gevent.GreenletExit, MemoryError])
@pytest.mark.parametrize("mode", ["overflow", "always"])
def test_a_callback_of_the_hub_that_fails_anywhere_costs_nothing(
    folder: Path, mode: Any, kind: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    """As one about a job that the disk thread has done: the record is on disk, and its sender waits."""
    at = 0
    for at in steps(0 if kind is MemoryError else 1, 3):
        client = Client(Silent, backoff=QUICK, spool=Spool(folder / f"spool{at}", mode=mode), queue_size=1)
        with (
            gevent.Timeout(20),
            Tracer(at, lambda greenlet: greenlet is gevent.get_hub(), kind) as tracer,
        ):
            for number in range(4):
                client.send(message(number), timeout=10)
            assert client.flush(10)
        with gevent.Timeout(20):
            client.send(message(4))
            assert client.flush(10)
            assert client.close(10) == []
        stats = client.stats()
        assert (stats.accepted, stats.delivered, stats.dropped, stats.kept) == (5, 5, 0, 0), at
        if not tracer.has_raised:
            break
    assert at > 30
    assert "MemoryError" in capsys.readouterr().err or kind is not MemoryError


class FailingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("no log")


@pytest.mark.parametrize("mode", [None, "overflow", "always"])
def test_a_log_handler_that_raises_costs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """Connections fail and are lost meanwhile, and the spool has files that are no segments."""
    reported: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: reported.append(arguments))
    handler = FailingHandler()
    logging.getLogger("geventaudit").addHandler(handler)
    outcomes = iter([None, Silent(), None, Silent()])

    def factory() -> NoOp:
        connection = next(outcomes)
        if connection is None:
            raise OSError("no agent")
        made.append(connection)
        return connection

    made: list[NoOp] = []
    (folder / "spool").mkdir(mode=0o700)
    (folder / "spool" / "x.seg").touch()
    try:
        client = Client(factory, backoff=QUICK, spool=None if mode is None else Spool(folder / "spool", mode=mode))
        client.send(message(1))
        assert client.flush(10)
        made[0].close()
        eventually(lambda: len(made) == 2)
        client.send(message(2))
        assert client.flush(10)
        assert client.close(10) == []
        assert client.stats().delivered == client.stats().accepted == 2
        assert reported
    finally:
        logging.getLogger("geventaudit").removeHandler(handler)


def test_a_close_that_is_interrupted_can_be_repeated() -> None:
    at = 0
    for at in steps(0, 7):
        client = Client(broken, backoff=Backoff(1000, 1000))
        client.send(message(1))
        main = gevent.getcurrent()
        left: list[int] = []
        try:
            with Tracer(at, lambda greenlet: greenlet is main) as tracer:  # noqa: B023
                left += numbers(client.close(0.01))
        except Interruption:
            pass
        with gevent.Timeout(20):
            left += numbers(client.close(1))
        assert client.is_closed
        assert left in ([1], []) if tracer.has_raised else left == [1]
        assert client.stats().dropped == 1
        eventually(lambda: client.stats().queued == 0)  # noqa: B023
        if not tracer.has_raised:
            break
    assert at > 30


def broken() -> NoOp:
    raise OSError("no agent")
