"""The life of a client: constructing, the first use, close() by all callers, interpreter exit, frozen clocks."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import HERE, eventually, greenlets, message, on_signal, once

from geventaudit import (
    Backoff,
    BaseClient,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Heartbeat,
    NoOp,
    QueueFullError,
    Spool,
    WouldBlockError,
)
from geventaudit.runtime import workers
from geventaudit.testing import AuditAgent

QUICK = Backoff(initial=0.01, maximum=0.05)


def broken() -> NoOp:
    raise OSError("no agent")


def run(*arguments: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


# -- the end of processes ----------------------------------------------------------------------------------------------


CHILDREN = [
    "used-fork", "unused-fork", "used-forkserver", "used-spawn", "pool-fork", "pool-spawn", "executor-fork",
    "executor-forkserver", "recycled", "nested", "sysexit", "billiard-fork", "billiard-spawn", "billiardpool-fork",
    "billiardpool-spawn",
]  # fmt: skip
EXITS = {
    "exit_first_use": [1],
    "exit_used_before": [1, 2],
    "exit_after_the_drain_of_another": [1, 2],
    "exit_new_client": [1],
    "exit_other_thread": [1],
    "exit_other_thread_in_a_handler": [1],
}


def numbers_of(agent: AuditAgent) -> list[int]:
    return sorted(each.custom_data["n"] for each in agent.records)


@once
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("scenario", EXITS)
def test_records_accepted_in_exit_handlers_are_delivered(scenario: str, patched: bool) -> None:
    if scenario == "exit_other_thread_in_a_handler" and not patched and sys.version_info >= (3, 12):
        pytest.skip("Python 3.12 starts no thread at interpreter shutdown")
    with AuditAgent() as agent:
        how = ["-m", "gevent.monkey"] if patched else []
        said = run(*how, str(HERE / "exit_program.py"), scenario, agent.address)
        assert sorted(map(int, said.stdout.split())) == EXITS[scenario]
        agent.wait_for(len(EXITS[scenario]))
        assert numbers_of(agent) == EXITS[scenario]


@once
def test_sending_after_the_exit_hook_is_refused() -> None:
    with AuditAgent() as agent:
        said = run(str(HERE / "exit_program.py"), "exit_after_the_hook", agent.address)
        assert said.stdout.split() == ["1", "refused"]
        agent.wait_for(1)
        assert numbers_of(agent) == [1]


@once
@pytest.mark.parametrize("scenario", CHILDREN)
def test_records_accepted_in_children_are_delivered(scenario: str) -> None:
    if scenario.startswith("billiard") and importlib.util.find_spec("billiard") is None:
        pytest.skip("billiard is not installed")
    with AuditAgent() as agent:
        said = run(str(HERE / "exit_program.py"), scenario, agent.address)
        accepted = sorted(map(int, said.stdout.split()))
        assert accepted
        agent.wait_for(len(accepted))
        assert numbers_of(agent) == accepted


LOOPS = pytest.mark.parametrize("loop", ["libev-cext", "libuv-cffi"])


def check_loop(loop: str) -> None:
    if loop == "libuv-cffi" and importlib.util.find_spec("gevent.libuv._corecffi") is None:
        pytest.skip("this gevent has no libuv")


# -- constructing ------------------------------------------------------------------------------------------------------


CONSTRUCT = """
import logging, os, sys, gevent
from gevent._hub_local import get_hub_if_exists
import geventaudit as ga
from geventaudit.agent import Agent
from geventaudit.integrations.logging import AuditHandler
from geventaudit.integrations.wsgi import AuditMiddleware
from geventaudit.testing import AuditAgent

def state():
    assert get_hub_if_exists() is None, "a hub"
    return sorted(os.listdir("/proc/self/fd")), os.listdir("/proc/self/task")

path, log = sys.argv[1:]
before = state()
client = ga.Client(lambda: ga.DomainSocket(path))
spooled = ga.Client(lambda: ga.DomainSocket(path), spool=ga.Spool(path + ".spool", mode="always"))
made = [
    client,
    spooled,
    ga.BaseClient(ga.NoOp()),
    AuditMiddleware(lambda environ, start_response: [], client),
    AuditHandler(client),
    AuditAgent(),
    Agent(path + ".other", print),
]
client.stats(), client.operation(), repr(client), ga.live_clients()
assert state() == before, "a descriptor or a thread"
assert not os.path.exists(path + ".spool")

# What every daemon library does.
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
os.setsid()
os.closerange(3, 1024)
file = open(log, "w")  # gets descriptor 3
assert file.fileno() == 3
record = ga.fill_unknown(ga.Record(operation_name="x"))
for each in (client, spooled):
    each.send(ga.Msg(ga.AuditType.CONTROL_PLANE, record))
    assert each.flush(30)
file.write("the daemon's own log")
file.flush()
for each in (client, spooled):
    assert each.close() == []
file.write("!")
file.close()
os._exit(0)
"""


@once
@LOOPS
def test_constructing_makes_no_hub_and_daemonising_is_harmless(folder: Path, loop: str) -> None:
    check_loop(loop)
    with AuditAgent() as agent:
        run("-W", "ignore::ResourceWarning", "-c", CONSTRUCT, agent.address, str(folder / "log"), GEVENT_LOOP=loop)
        agent.wait_for(2)
        assert (folder / "log").read_text() == "the daemon's own log!"


def construct(count: int) -> list[Client]:
    return [Client(NoOp) for _ in range(count)]


def test_a_client_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [each.getMessage() for each in caplog.records if "live clients" in each.getMessage()]

    for _ in range(100):
        (client,) = construct(1)
        client.close()
    del client
    for _ in range(100):
        construct(1)
        gc.collect()
    clients = construct(16)
    elsewhere = [Client(NoOp) for _ in range(16)]
    elsewhere += [Client(NoOp) for _ in range(16)]
    assert not warnings()
    clients += construct(1)
    (text,) = warnings()
    assert text.startswith("geventaudit: 17 live clients were constructed at ")
    assert __file__ in text
    clients += construct(20)
    assert len(warnings()) == 1, "once for each line"
    for each in (*clients, *elsewhere):
        each.close()


def test_a_client_for_each_request_by_a_subclass_is_the_callers_line(caplog: pytest.LogCaptureFixture) -> None:
    with AuditAgent() as agent:
        for _ in range(17):
            agent.make_client()
    assert f"{__file__}:" in caplog.text


# -- in the hub --------------------------------------------------------------------------------------------------------


Outcome = tuple[Any, BaseException | None]


def outcome(function: Callable[[], Any]) -> Outcome:
    try:
        return function(), None
    except BaseException as error:
        return None, error


def by_callback(function: Callable[[], Any]) -> Outcome:
    got: list[Outcome] = []
    gevent.get_hub().loop.run_callback(lambda: got.append(outcome(function)))
    return eventually(lambda: got)[0]  # type: ignore[no-any-return]


def by_timer(function: Callable[[], Any]) -> Outcome:
    got: list[Outcome] = []
    timer = gevent.get_hub().loop.timer(0.01)
    timer.start(lambda: got.append(outcome(function)))
    eventually(lambda: got)
    timer.close()
    return got[0]


def by_signal(function: Callable[[], Any]) -> Outcome:
    """In a signal handler of an idle process."""
    got: list[Outcome] = []

    def act() -> None:
        if not got and gevent.getcurrent() is gevent.get_hub():
            got.append(outcome(function))

    with on_signal(act):
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        deadline = time.monotonic() + 30
        while not got:
            assert time.monotonic() < deadline
            gevent.sleep(0.05)
    return got[0]


def by_worker(function: Callable[[], Any]) -> Outcome:
    """In a signal handler that interrupts a greenlet of the library."""
    got: list[Outcome] = []

    def work() -> None:
        with on_signal(lambda: got.append(outcome(function))):
            signal.raise_signal(signal.SIGALRM)

    workers.Worker.spawn(work)
    return eventually(lambda: got)[0]  # type: ignore[no-any-return]


IN_THE_HUB = pytest.mark.parametrize("call", [by_callback, by_timer, by_signal, by_worker])


@IN_THE_HUB
@pytest.mark.parametrize("spool", ["none", "overflow"])
def test_calls_that_would_wait_in_the_hub_change_nothing(
    call: Callable[..., Outcome], spool: str, folder: Path
) -> None:
    disk = None if spool == "none" else Spool(folder / "spool", max_bytes=1)
    client = Client(broken, backoff=QUICK, queue_size=2, spool=disk)
    client.send(message(0))
    eventually(lambda: client.stats().connect_failures)
    before = client.stats()
    for function in (client.close, lambda: client.close(0), client.flush, lambda: client.flush(5), client.connect):
        result, error = call(function)
        assert isinstance(error, WouldBlockError), (function, result, error)
        assert "spawn a greenlet" in str(error)
    after = client.stats()
    assert (after.accepted, after.queued, after.dropped) == (before.accepted, before.queued, before.dropped)
    assert not client.is_closed
    assert call(lambda: client.send(message(1), timeout=1)) == (None, None), "there is room"
    for timeout in (0.0, 1.0, None):
        assert type(call(lambda timeout=timeout: client.send(message(2), timeout=timeout))[1]) is QueueFullError
    closing = gevent.spawn(client.close, 0.3)
    gevent.sleep(0.01)
    assert isinstance(call(client.close)[1], WouldBlockError)
    assert closing.get(timeout=30) == ([message(0), message(1)] if disk is None else [])
    assert call(client.close) == ([], None)
    assert client.stats().accepted == 2


@IN_THE_HUB
@pytest.mark.parametrize("kind", ["new", "delivered", "base", "unused base", "broken base"])
def test_closing_in_the_hub_when_nothing_has_to_wait(call: Callable[..., Outcome], kind: str) -> None:
    with AuditAgent() as agent:
        client: Client | BaseClient
        if "base" in kind:
            client = BaseClient(DomainSocket(agent.address))
        else:
            client = Client(lambda: DomainSocket(agent.address), backoff=QUICK)
        if kind in ("delivered", "base", "broken base"):
            client.send(message(0))
            assert client.flush(30)
        if isinstance(client, BaseClient) and kind == "broken base":
            agent.hang_up()
            eventually(lambda: client.error)
        assert call(client.flush) == (True, None)
        if kind == "delivered":
            assert call(client.connect) == (None, None)  # type: ignore[union-attr]
        assert call(client.close) == ([], None)
        assert client.is_closed
        assert isinstance(call(lambda: client.send(message(1)))[1], ClientClosedError)


@IN_THE_HUB
def test_mode_always_in_the_hub(call: Callable[..., Outcome], folder: Path) -> None:
    """The record has to be on disk before send() returns, and in the hub nothing waits for that."""
    client = Client(NoOp, spool=Spool(folder / "spool", mode="always"))
    client.send(message(0))
    error = call(lambda: client.send(message(1), timeout=1))[1]
    assert isinstance(error, QueueFullError)
    assert isinstance(call(client.close)[1], WouldBlockError)
    client.send(message(2))
    assert client.flush(30)
    assert (client.stats().accepted, client.stats().delivered) == (2, 2)
    assert client.close() == []


def test_close_in_a_handler_that_interrupts_the_sender() -> None:
    errors: list[Outcome] = []

    class Signalling(NoOp):
        def write(self, frames: Any) -> None:
            signal.raise_signal(signal.SIGALRM)
            super().write(frames)

    client = Client(Signalling)

    def act() -> None:
        for function in (client.close, lambda: client.flush(5), lambda: client.send(message(9))):
            if len(errors) < 3:
                errors.append(outcome(function))

    with on_signal(act):
        client.send(message(0))
        eventually(lambda: len(errors) == 3)
        assert client.flush(30)
    assert [type(error) for _, error in errors[:2]] == [WouldBlockError, WouldBlockError]
    assert errors[2] == (None, None)
    assert client.close() == []
    assert client.stats().delivered == 2


# -- close() -----------------------------------------------------------------------------------------------------------


def test_close_in_a_handler_during_close() -> None:
    """In the greenlet that closes, the call returns at once, and the greenlet goes on."""
    got: list[Outcome] = []

    class Silent(NoOp):
        def delivered(self) -> int:
            return 0

        def close(self) -> None:
            if not got:
                signal.raise_signal(signal.SIGALRM)
            super().close()

    client = Client(Silent)
    for number in range(3):
        client.send(message(number))
    with on_signal(lambda: got.append(outcome(client.close))):
        assert client.close(0.05) == [message(number) for number in range(3)]
    assert got == [([], None)]
    assert client.close() == []


def test_close_in_a_handler_while_another_greenlet_closes() -> None:
    client = Client(broken, backoff=QUICK)
    client.send(message(0))
    closing = gevent.spawn(client.close, 0.1)
    gevent.sleep(0.01)
    got: list[Outcome] = []
    with on_signal(lambda: got.append(outcome(client.close))):
        signal.raise_signal(signal.SIGALRM)  # the handler runs in this greenlet, which may wait
    assert closing.get(timeout=30) + got[0][0] == [message(0)]


class HandlerError(Exception):
    """Raised by a handler in the middle of close()."""


@pytest.mark.parametrize("spool", [False, True], ids=["memory", "spool"])
@pytest.mark.parametrize("how", ["timeout", "kill", "handler"])
@pytest.mark.parametrize("others", [0, 2])
def test_an_interrupted_close_hands_everything_back_once(folder: Path, spool: bool, how: str, others: int) -> None:
    client = Client(broken, backoff=QUICK, spool=Spool(folder / "spool") if spool else None)
    for number in range(5):
        client.send(message(number))
    waiting = []

    def close() -> list[Any]:
        if how == "timeout":
            with gevent.Timeout(0.05):
                return client.close(60)
        return client.close(60)

    def raising() -> None:
        raise HandlerError

    closing = gevent.spawn(lambda: outcome(close))
    gevent.sleep(0.02)
    waiting = [gevent.spawn(client.close, 30) for _ in range(others)]
    gevent.sleep(0.01)
    if how == "kill":
        closing.kill(timeout=30)
    elif how == "handler":
        closing.kill(HandlerError, timeout=30)
    gevent.joinall([closing, *waiting], timeout=30, raise_error=True)
    if how != "kill":
        assert isinstance(closing.value[1], gevent.Timeout if how == "timeout" else HandlerError)
    left = sum((each.value for each in waiting), client.close())
    stats = client.stats()
    assert client.is_closed
    assert (stats.accepted, stats.dropped, stats.kept) == ((5, 0, 5) if spool else (5, 5, 0))
    assert sorted(each.record.custom_data["n"] for each in left) == ([] if spool else [0, 1, 2, 3, 4])
    assert client.close() == []
    if spool:
        with Client(NoOp, spool=Spool(folder / "spool")) as heir:
            heir.connect()
            eventually(lambda: heir.stats().delivered == 5)


def test_closing_during_a_reconnect() -> None:
    with AuditAgent() as agent:
        attempts: list[bool] = []

        def factory() -> DomainSocket:
            attempts.append(True)
            if len(attempts) > 1:
                gevent.sleep(0.1)
            return DomainSocket(agent.address)

        client = Client(factory, backoff=QUICK)
        client.connect(30)
        agent.hang_up()
        eventually(lambda: len(attempts) > 1)
        for number in range(10):
            client.send(message(number))
        assert client.close(30) == []
        agent.wait_for(10)
        assert numbers_of(agent) == list(range(10))


def test_closing_during_a_reconnect_that_takes_too_long() -> None:
    started, before = [], greenlets()

    def factory() -> NoOp:
        started.append(True)
        gevent.sleep(1000)
        raise AssertionError

    client = Client(factory)
    client.send(message(0))
    eventually(lambda: started)
    assert client.close(0.05) == [message(0)]
    eventually(lambda: greenlets() <= before, "the attempt ends")


# -- frozen clocks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen() -> Iterator[None]:
    freezegun = pytest.importorskip("freezegun")
    with gevent.Timeout(30), freezegun.freeze_time("2026-01-02 03:04:05"):
        yield


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("spool", [None, "overflow", "always"])
def test_time_limits_while_time_is_frozen(folder: Path, spool: Any) -> None:
    settings = None if spool is None else Spool(folder / "spool", mode=spool, max_bytes=4000)
    client = Client(broken, backoff=QUICK, queue_size=2, spool=settings)
    for number in range(2):
        client.send(message(number))
    assert not client.flush(0.05)
    with pytest.raises(ConnectionFailedError):
        client.connect(0.05)
    for _ in range(20):
        last = outcome(lambda: client.send(message(2), timeout=0.05))[1]
    assert isinstance(last, QueueFullError)
    assert client.stats().connect_failures > 2, "the backoff goes on"
    accepted = client.stats().accepted
    left = client.close(0.1)
    assert client.stats().dropped == len(left)
    assert accepted == len(left) + client.stats().kept


@pytest.mark.usefixtures("frozen")
def test_delivery_and_heartbeats_while_time_is_frozen() -> None:
    with AuditAgent() as agent, Client(lambda: DomainSocket(agent.address), heartbeat_interval=0.05) as client:
        client.connect(5)
        client.send(message(0))
        assert client.flush(5)
        while sum(isinstance(each.message, Heartbeat) for each in agent.received) < 3:
            gevent.sleep(0.01)
        agent.hang_up()
        client.send(message(1))
        while len(agent.records) < 2:
            gevent.sleep(0.01)
        assert client.close(5) == []


# -- libuv -------------------------------------------------------------------------------------------------------------


LOOP = """
import os, sys
if sys.argv[1] == "patched":
    from gevent import monkey
    monkey.patch_all()
import gevent, gevent.os, gevent.subprocess
from helpers import message
from geventaudit import Client, DomainSocket, Spool

def make():
    spool = Spool(sys.argv[3] + "-{pid}", mode="always") if len(sys.argv) > 3 else None
    return Client(lambda: DomainSocket(sys.argv[2]), spool=spool)

clients = [make()]
if len(sys.argv) == 3:
    clients.append(make())
number = 0
for turn in range(15):
    for client in clients:
        for _ in range(5):
            client.send(message(number), timeout=10)
            number += 1
    if turn % 3 == 0:
        pid = os.fork() if sys.argv[1] == "patched" else gevent.os.fork()
        if not pid:
            status = 1
            try:
                clients[0].send(message(10_000 + turn), timeout=10)
                status = 0 if clients[0].close(20) == [] and clients[0].stats().kept == 0 else 2
            finally:
                os._exit(status)
        while not (done := gevent.os.waitpid(pid, os.WNOHANG))[0]:
            gevent.sleep(0.005)
        assert done[1] == 0, done
    else:
        assert gevent.subprocess.run(["true"], stdout=-1, stderr=-1, timeout=20).returncode == 0
for client in clients:
    assert client.flush(20)
    assert client.close() == []
print(number)
"""


@once
@pytest.mark.parametrize("spool", [False, True], ids=["memory", "always"])
@pytest.mark.parametrize("patched", ["unpatched", "patched"])
@LOOPS
def test_forks_and_subprocesses(folder: Path, loop: str, patched: str, spool: bool) -> None:
    check_loop(loop)
    with AuditAgent() as agent:
        more = [str(folder / "spool")] if spool else []
        said = run("-W", "ignore::ResourceWarning", "-c", LOOP, patched, agent.address, *more, GEVENT_LOOP=loop)
        expected = [*range(int(said.stdout)), *range(10_000, 10_015, 3)]
        agent.wait_for(len(expected))
        assert numbers_of(agent) == expected
