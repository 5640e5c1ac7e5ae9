"""The smart client, on real sockets."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import itertools
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event
from helpers import SERVICE_TREE_ID, eventually, free_port, mapping, message, once, record

from geventaudit import (
    TCP,
    AuditType,
    Backoff,
    BaseClient,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Heartbeat,
    Msg,
    NoOp,
    NotificationKind,
    QueueFullError,
    RecordSchema,
    Spool,
    ValidationError,
    __version__,
    live_clients,
)
from geventaudit.agent import Agent, Received

QUICK = Backoff(initial=0.01, maximum=0.05)


@pytest.fixture
def agent(socket_path: str, got: list[Received]) -> Any:
    with Agent(socket_path, got.append) as agent:
        yield agent


def records_of(got: list[Received]) -> list[Any]:
    return [each.message.record for each in got if isinstance(each.message, Msg)]


def numbers_of(got: list[Received]) -> list[int]:
    return [each.custom_data["n"] for each in records_of(got)]


def client_of(path: str, **options: Any) -> Client:
    return Client(lambda: DomainSocket(path), backoff=QUICK, **options)


def test_the_example_of_the_readme_arrives_as_it_was_sent(agent: Agent, got: list[Received], socket_path: str) -> None:
    before = int(time.time())
    with client_of(socket_path, service_tree_id=SERVICE_TREE_ID) as client:
        client.send(message())
        assert client.flush(timeout=10)
        eventually(lambda: len(got) == 2)
    assert got[0].message == message()
    assert got[0].service_tree_id == SERVICE_TREE_ID
    assert before <= got[0].time <= time.time()
    assert got[1].message == Heartbeat(
        SERVICE_TREE_ID, __version__, platform.release(), f"python{platform.python_version()}", "UnixDomainSocket"
    )


def test_a_mapping_arrives_too_and_needs_no_service_tree_id(
    agent: Agent, got: list[Received], socket_path: str
) -> None:
    with client_of(socket_path) as client:
        client.send({"Type": "DataPlane", "Record": mapping()})
        assert client.flush(10)
        eventually(lambda: len(got) == 2)
    assert got[0].message == Msg(AuditType.DATA_PLANE, record())
    assert got[0].service_tree_id is None
    assert isinstance(got[1].message, Heartbeat)
    assert got[1].message.service_id == ""


def test_over_tcp(got: list[Received]) -> None:
    with Agent(("127.0.0.1", 0), got.append) as agent, Client(lambda: TCP(agent.address)) as client:  # type: ignore[arg-type]
        client.send(message(1))
        assert client.flush(10)
        eventually(lambda: len(got) == 2)
    assert got[1].message.destination == "TCP"  # type: ignore[union-attr]


def test_send_takes_a_snapshot(agent: Agent, got: list[Received], socket_path: str) -> None:
    data = {"n": 1}
    mine = record(custom_data=data)
    with client_of(socket_path) as client:
        client.send(Msg(AuditType.CONTROL_PLANE, mine))
        data["n"] = 2
        mine.operation_name = "Changed"
        assert client.flush(10)
    assert records_of(got) == [record(custom_data={"n": 1})]


def test_nothing_starts_before_it_is_needed(socket_path: str) -> None:
    calls: list[int] = []

    def factory() -> Any:
        calls.append(1)
        raise OSError("away")

    client = Client(factory)
    client.notify()
    gevent.sleep(0.02)
    assert not calls
    assert client.stats().accepted == 0
    assert client.flush(0)
    assert client.close() == []
    assert client.close() == []
    gevent.sleep(0.02)
    assert not calls, "closing a client that never started starts nothing"
    with pytest.raises(ClientClosedError):
        client.send(message())
    with pytest.raises(ClientClosedError):
        client.connect()
    assert [each.kind for each in client.notify()] == [NotificationKind.CLOSED]


def test_before_the_agent_exists(socket_path: str, got: list[Received]) -> None:
    with client_of(socket_path) as client:
        for number in range(100):
            client.send(message(number))
        eventually(lambda: client.stats().connect_failures > 1)
        assert not client.stats().connected
        with Agent(socket_path, got.append):
            assert client.flush(30)
            assert numbers_of(got) == list(range(100))
            assert client.stats().delivered == 100


def test_connect_says_why_not(socket_path: str, agent: Agent) -> None:
    with client_of(socket_path) as client:
        client.connect(timeout=10)
        assert client.stats().connected
        client.connect(timeout=0)
    with client_of(socket_path + "x") as client, pytest.raises(ConnectionFailedError, match="No such file"):
        client.connect(timeout=0.1)


def test_connect_ends_when_the_client_is_closed(socket_path: str) -> None:
    client = client_of(socket_path)
    waiting = gevent.spawn(client.connect, timeout=60)
    eventually(lambda: client.stats().connect_failures)
    client.close()
    with pytest.raises(ClientClosedError):
        waiting.get(timeout=10)


def test_queue_full(socket_path: str) -> None:
    client = client_of(socket_path, queue_size=3)
    for number in range(3):
        client.send(message(number))
    for _ in range(5):
        with pytest.raises(QueueFullError, match="3 records"):
            client.send(message())
    with pytest.raises(QueueFullError, match=r"after 0\.05 s"):
        client.send(message(), timeout=0.05)
    stats = client.stats()
    assert (stats.accepted, stats.queued, stats.rejected) == (3, 3, {"queue_full": 6})
    undelivered = client.close(timeout=0)
    assert undelivered == [message(n) for n in range(3)]
    told = [each for each in client.notify() if each.kind is NotificationKind.QUEUE_FULL]
    assert len(told) == 1
    assert client.close() == [], "each message is handed back once"


def test_send_waits_for_room_until_its_timeout(socket_path: str, got: list[Received]) -> None:
    with client_of(socket_path, queue_size=1) as client:
        client.send(message(0))
        waiting = [gevent.spawn(client.send, message(n), timeout=30) for n in range(1, 20)]
        gevent.sleep(0.05)
        assert not any(each.ready() for each in waiting)
        with Agent(socket_path, got.append):
            gevent.joinall(waiting, timeout=30, raise_error=True)
            assert client.flush(30)
            assert numbers_of(got) == list(range(20)), "whoever waited first goes first"


def test_closing_while_others_wait_for_room(socket_path: str) -> None:
    client = client_of(socket_path, queue_size=2)
    client.send(message(0))
    client.send(message(1))
    waiting = [gevent.spawn(client.send, message(n), timeout=60) for n in range(2, 12)]
    gevent.sleep(0)
    undelivered = client.close(timeout=0.05)
    refused = 0
    for each in waiting:
        each.join(timeout=10)
        assert each.ready()
        refused += isinstance(each.exception, ClientClosedError)
    assert refused == 10
    assert undelivered == [message(0), message(1)]
    stats = client.stats()
    assert (stats.accepted, stats.dropped, stats.rejected["closed"]) == (2, 2, 10)


def test_a_killed_sender_of_a_message_has_sent_nothing(socket_path: str, got: list[Received]) -> None:
    with client_of(socket_path, queue_size=1) as client:
        client.send(message(0))
        killed = gevent.spawn(client.send, message(1), timeout=60)
        gevent.sleep(0)
        killed.kill()
        with gevent.Timeout(0.05, False):
            client.send(message(2), timeout=60)
        assert client.stats().accepted == 1
        with Agent(socket_path, got.append):
            assert client.flush(30)
            client.send(message(3))
            assert client.flush(30)
            assert numbers_of(got) == [0, 3]


def test_invalid_messages_are_the_callers(agent: Agent, got: list[Received], socket_path: str) -> None:
    with client_of(socket_path) as client:
        with pytest.raises(ValidationError) as caught:
            client.send(message(operation_name="", custom_data={"a": object()}))
        assert set(caught.value.messages) == {"OperationName", "CustomData"}
        with pytest.raises(ValidationError) as caught:
            client.send({"Type": "Heartbeat", "Record": {**mapping(), "Extra": 1}})
        assert set(caught.value.messages) == {"Type", "Extra"}
        client.send(message(1))
        assert client.flush(10)
        assert client.stats().rejected == {"invalid": 2}
    assert numbers_of(got) == [1]


def test_before_send(agent: Agent, got: list[Received], socket_path: str) -> None:
    seen: list[Any] = []

    def hook(msg: Msg) -> Msg | None:
        seen.append(msg)
        number = msg.record.custom_data["n"]
        if number == 1:
            return None
        if number == 2:
            raise LookupError("not this one")
        if number == 3:
            return "nonsense"  # type: ignore[return-value]
        return Msg(msg.type, msg.record.replace(caller_agent="hook/1"))

    with client_of(socket_path, before_send=hook) as client:
        client.send(message(0, caller_agent=""))
        client.send(message(1))
        with pytest.raises(ValidationError, match="not this one"):
            client.send(message(2))
        with pytest.raises(ValidationError):
            client.send(message(3))
        client.send({"Type": "ControlPlane", "Record": mapping(CustomData={"n": 4}, CallerAgent=None)})
        assert client.flush(10)
        assert client.stats().rejected == {"left_out": 1, "invalid": 2}
    assert all(isinstance(msg, Msg) for msg in seen)
    assert [(each.custom_data["n"], each.caller_agent) for each in records_of(got)] == [(0, "hook/1"), (4, "hook/1")]


def test_an_interruption_in_before_send_is_the_callers(socket_path: str) -> None:
    def hook(msg: Msg) -> Msg:
        gevent.sleep(60)
        return msg

    with client_of(socket_path, before_send=hook) as client:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
            client.send(message())
        assert client.stats().accepted == 0


def test_stricter_schema(agent: Agent, socket_path: str) -> None:
    import marshmallow

    class Stricter(RecordSchema):
        @marshmallow.validates("operation_name")
        def _name(self, value: str, **kwargs: Any) -> None:
            if value == "Boom":
                raise ZeroDivisionError
            raise marshmallow.ValidationError("never good")

    with client_of(socket_path, schema=Stricter()) as client:
        with pytest.raises(ValidationError, match="OperationName: never good"):
            client.send(message())
        with pytest.raises(ValidationError, match="ZeroDivisionError"):
            client.send(message(operation_name="Boom"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"queue_size": 0}, ValueError),
        ({"queue_size": -1}, ValueError),
        ({"queue_size": 1.5}, ValueError),
        ({"heartbeat_interval": 0}, ValueError),
        ({"heartbeat_interval": "60"}, ValueError),
        ({"max_frame_bytes": 0}, ValueError),
        ({"max_frame_bytes": "1M"}, ValueError),
        ({"heartbeat_interval": float("nan")}, ValueError),
        ({"datetimes": "iso"}, ValueError),
        ({"service_tree_id": ""}, ValidationError),
        ({"service_tree_id": "00000000-0000-0000-0000-000000000000"}, ValidationError),
        ({"schema": RecordSchema}, TypeError),
    ],
)
def test_parameters_that_cannot_be(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Client(NoOp, **options)


class NeedsNothing:
    def method(self) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backoff": 2}, r"^backoff must be a Backoff, such as Backoff\(initial=2.0\), got 2$"),
        ({"backoff": Backoff}, "^backoff must be a Backoff, .* got <class"),
        ({"before_send": 5}, "^before_send must be callable, got 5: pass a function"),
        ({"before_send": lambda: None}, r"^before_send must take one argument \(the message\), got <function"),
        ({"before_send": lambda msg, more: msg}, "missing a required argument: 'more'"),
        ({"before_send": lambda *, msg: msg}, "too many positional arguments"),
        ({"before_send": NeedsNothing().method}, r"^before_send must take one argument"),
        ({"before_send": NeedsNothing}, r"^before_send must take one argument"),
    ],
)
def test_parameters_of_another_kind(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Client(NoOp, **options)


@pytest.mark.parametrize("hook", [lambda *args: None, lambda msg, more=1: msg, functools.partial(max, 1), print])
def test_hooks_that_take_one_argument(hook: Any) -> None:
    Client(NoOp, before_send=hook).close()
    BaseClient(NoOp(), before_send=hook).close()


@pytest.mark.parametrize("factory", [TCP, lambda address: NoOp()])
def test_a_factory_that_wants_arguments(factory: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^factory must take no arguments, got .*missing a required argument: 'address'"
    ):
        Client(factory)


def test_a_connection_instead_of_a_factory() -> None:
    with NoOp() as connection, pytest.raises(TypeError, match="factory must be callable"):
        Client(connection)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (DomainSocket, "got the class DomainSocket, not an instance: call it"),
        (None, "got None, which has no name, write, delivered, wait_broken, close"),
    ],
)
def test_a_factory_that_makes_no_connection(made: Any, words: str) -> None:
    with Client(lambda: made, backoff=QUICK) as client, pytest.raises(ConnectionFailedError) as caught:
        client.connect(timeout=0.2)
    assert f"the factory must return a Connection, {words}" in str(caught.value)


class Uncommon(BaseException):
    """No Exception."""


def raising(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: None,
        lambda: "not a connection",
        lambda: DomainSocket,
        lambda: (_ for _ in ()).throw(ZeroDivisionError("x")),
        lambda: (_ for _ in ()).throw(gevent.Timeout(1)),
        lambda: (_ for _ in ()).throw(ConnectionFailedError("x")),
        lambda: raising(asyncio.CancelledError()),
        lambda: raising(GeneratorExit()),
        lambda: raising(gevent.GreenletExit()),
        lambda: raising(Uncommon("x")),
        lambda: gevent.getcurrent().kill(),
    ],
)
def test_factories_in_trouble_are_asked_again(
    trouble: Callable[[], Any], agent: Agent, got: list[Received], socket_path: str
) -> None:
    calls: list[int] = []

    def factory() -> Any:
        calls.append(1)
        return trouble() if len(calls) < 3 else DomainSocket(socket_path)

    with Client(factory, backoff=QUICK) as client:
        client.send(message(1))
        assert client.flush(30)
        assert client.stats().connect_failures == 2
        failed = client.notify().get(timeout=5)
        assert failed.kind is NotificationKind.CONNECT_FAILED
        assert isinstance(failed.error, ConnectionFailedError)
    assert numbers_of(got) == [1]


@once
def test_a_factory_that_wants_the_process_to_end(socket_path: str) -> None:
    """The SystemExit of the factory ends the process, like that of any other greenlet."""
    program = """
import sys
import gevent
from geventaudit import Client
client = Client(lambda: sys.exit(7))
client.connect(30)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert ended.returncode == 7, ended.stderr


@pytest.mark.parametrize("killed", ["connecting", "waiting to connect"])
def test_a_sender_that_is_killed_before_it_is_connected(
    killed: str, agent: Agent, got: list[Received], socket_path: str
) -> None:
    """The sender ends, kill() need not wait, and the next use of the client starts another sender."""
    calls: list[int] = []

    def factory() -> DomainSocket:
        calls.append(1)
        if len(calls) == 1:
            if killed == "connecting":
                gevent.sleep(1000)
            raise ConnectionFailedError("x")
        return DomainSocket(socket_path)

    slow = Backoff(1000, 1000) if killed == "waiting to connect" else QUICK
    with Client(factory, backoff=slow) as client:
        client.send(message(1))
        eventually(lambda: calls and (killed == "connecting" or client.stats().connect_failures))
        client._connector._failures = 0  # or the next would wait as well
        assert client._life.sender is not None
        assert client._life.sender.worker.greenlet is not None
        client._life.sender.worker.greenlet.kill(timeout=30)
        assert client._life.sender.worker.greenlet.dead
        client.send(message(2))
        assert client.flush(10)
        assert client.stats().connect_failures == (killed == "waiting to connect")
    assert numbers_of(got) == [1, 2]


def test_a_factory_that_hangs_does_not_keep_close_waiting() -> None:
    client = Client(lambda: gevent.sleep(1000))  # type: ignore[arg-type,return-value]
    client.send(message(1))
    began = time.monotonic()
    assert client.close(timeout=0.1) == [message(1)]
    assert time.monotonic() - began < 10


def test_a_factory_that_swallows_the_kill_is_closed() -> None:
    made: list[NoOp] = []

    def factory() -> NoOp:
        try:
            gevent.sleep(1000)
        except gevent.GreenletExit:
            pass
        made.append(NoOp())
        return made[0]

    client = Client(factory)
    client.send(message(1))
    assert client.close(timeout=0.05) == [message(1)]
    with pytest.raises(ConnectionFailedError):
        made[0].write([b"x"])


class Broken:
    """A connection of one's own, in trouble."""

    name = "Broken"

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble
        self.closed = 0

    def write(self, frames: Any) -> None:
        if self.trouble == "write":
            raise RuntimeError("no write")

    def delivered(self) -> int:
        if self.trouble == "delivered":
            raise RuntimeError("no count")
        return 10**6 if self.trouble == "boasts" else 0

    def wait_broken(self) -> None:
        if self.trouble == "returns":
            return
        if self.trouble == "timeout":
            raise gevent.Timeout(1)
        gevent.sleep(1000)

    def close(self) -> None:
        self.closed += 1
        raise RuntimeError("no close")


@pytest.mark.parametrize("trouble", ["write", "delivered", "returns", "timeout"])
def test_connections_of_ones_own_in_trouble(
    trouble: str, agent: Agent, got: list[Received], socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(trouble)
    connections = iter([broken])
    with Client(lambda: next(connections, None) or DomainSocket(socket_path), backoff=QUICK) as client:
        client.send(message(1))
        assert client.flush(30)
        assert broken.closed == 1, "what is replaced is closed"
        assert client.stats().connects == 2
    assert numbers_of(got) == [1]
    assert "could not be closed" in caplog.text


def test_a_connection_that_reports_too_many_deliveries_settles_only_written_ones() -> None:
    with Client(lambda: Broken("boasts")) as client:
        client.send(message(1))
        client.send(message(2))
        assert client.flush(10)
        assert client.stats().delivered == 2


def test_heartbeats(agent: Agent, got: list[Received], socket_path: str) -> None:
    def beats() -> int:
        return sum(isinstance(each.message, Heartbeat) for each in got)

    with client_of(socket_path, heartbeat_interval=0.05) as client:
        client.connect()
        gevent.sleep(0.2)
        assert beats() == 0, "never before a record has gone out"
        client.send(message(1))
        eventually(lambda: beats() >= 3)
        assert isinstance(got[0].message, Msg)
        assert client.stats().heartbeats >= 3
        assert client.stats().delivered == 1
        before = beats()
        agent.restart()
        gevent.sleep(0.2)
        assert beats() <= before + 1, "a new connection begins without"
        client.send(message(2))
        eventually(lambda: beats() > before + 1)


def test_notifications_report_each_event_in_order(agent: Agent, socket_path: str) -> None:
    story: list[Any] = []
    client = client_of(socket_path)
    reader = gevent.spawn(lambda: story.extend(client.notify()))
    assert client.notify() is client.notify()
    client.send(message(1))
    assert client.flush(10)
    agent.stop()
    client.send(message(2))
    eventually(lambda: client.stats().connect_failures > 2)
    agent.start()
    assert client.flush(30)
    client.close()
    reader.get(timeout=10)
    kinds = [each.kind for each in story]
    kinds = [kind for i, kind in enumerate(kinds) if i == 0 or kind is not kinds[i - 1]]
    assert kinds == ["connected", "connection lost", "connect failed", "connected", "closed"]
    assert all(each.time.utcoffset() is not None for each in story)
    assert "hung up" in str(next(each.error for each in story if each.kind is NotificationKind.CONNECTION_LOST))


def test_dropped_messages_come_back_decoded(socket_path: str) -> None:
    client = client_of(socket_path)
    client.send(message(1))
    client.send(message(2))
    assert client.close(timeout=0.02) == [message(1), message(2)]
    dropped = [each for each in client.notify() if each.kind is NotificationKind.DROPPED]
    assert [each.undelivered for each in dropped] == [(message(1), message(2))]


def test_the_log_has_no_line_per_record(agent: Agent, socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "geventaudit"), client_of(socket_path, queue_size=50) as client:
        for number in range(200):
            try:
                client.send(message(number))
            except QueueFullError:
                pass
            with pytest.raises(ValidationError):
                client.send(message(operation_name=""))
        assert client.flush(10)
    assert 0 < len(caplog.records) < 10
    assert {line.levelname for line in caplog.records if "queue" in line.getMessage()} == {"WARNING"}
    assert {line.levelname for line in caplog.records if "connected" in line.getMessage()} == {"INFO"}


def test_an_agent_that_hangs_up_at_once_is_not_hammered(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen(16)
        accepted: list[float] = []

        def slam() -> None:
            while True:
                sock, _ = listener.accept()
                accepted.append(time.monotonic())
                sock.close()

        slamming = gevent.spawn(slam)
        client = Client(lambda: DomainSocket(socket_path), backoff=Backoff(initial=0.05, maximum=10, jitter=0))
        client.send(message(1))
        eventually(lambda: len(accepted) >= 4)
        gaps = [later - earlier for earlier, later in itertools.pairwise(accepted)]
        assert gaps[2] > gaps[0], "the delays grow although connecting succeeds"
        assert client.close(timeout=0) == [message(1)]
        slamming.kill()


def test_the_sender_greenlet_survives_being_killed(agent: Agent, got: list[Received], socket_path: str) -> None:
    with client_of(socket_path) as client:
        client.send(message(1))
        assert client.flush(10)
        assert client._life.sender is not None
        assert client._life.sender.worker.greenlet is not None
        client._life.sender.worker.greenlet.kill()
        assert not client.stats().connected
        client.send(message(2))
        assert client.flush(10)
    assert numbers_of(got) == [1, 2]


def test_flush_waits_for_earlier_messages_only(agent: Agent, socket_path: str) -> None:
    with client_of(socket_path) as client:
        client.send(message(1))
        assert not client.flush(timeout=0)
        assert client.flush(timeout=None)
        agent.stop_reading()
        client.send(message(2))
        flushing = gevent.spawn(client.flush, 30)
        gevent.sleep(0.02)
        assert not flushing.ready()
        agent.resume_reading()
        assert flushing.get(timeout=30)


def test_close_during_flush_and_close(agent: Agent, socket_path: str) -> None:
    agent.stop_reading()
    client = client_of(socket_path)
    client.send(message(1))
    flushing = gevent.spawn(client.flush, 60)
    closing = [gevent.spawn(client.close, 0.1) for _ in range(3)]
    gevent.joinall([flushing, *closing], timeout=10)
    assert flushing.get(block=False) is False
    assert sorted(each.get(block=False) for each in closing) == [[], [], [message(1)]]


def test_an_interrupted_close_closes(agent: Agent, socket_path: str) -> None:
    agent.stop_reading()
    client = client_of(socket_path)
    client.send(message(1))
    with gevent.Timeout(0.05, False):
        client.close(timeout=60)
    with pytest.raises(ClientClosedError):
        client.send(message(2))
    assert client.close() == [message(1)], "what the interruption kept from being returned is not lost"


def test_hundreds_of_clients(agent: Agent, got: list[Received], socket_path: str) -> None:
    clients = [client_of(socket_path) for _ in range(300)]
    for number, client in enumerate(clients):
        client.send(message(number))
    assert all(client.flush(30) for client in clients)
    closing = [gevent.spawn(client.close) for client in clients]
    gevent.joinall(closing, timeout=30, raise_error=True)
    assert sorted(numbers_of(got)) == list(range(300))


@once
@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()\n"])
def test_a_client_left_open_drains_at_exit(patch: str, agent: Agent, got: list[Received], socket_path: str) -> None:
    program = patch + (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import geventaudit, helpers\n"
        "client = geventaudit.Client(lambda: geventaudit.DomainSocket(sys.argv[2]))\n"
        "for n in range(50): client.send(helpers.message(n))\n"
    )
    run(program, str(Path(__file__).parent), socket_path)
    eventually(lambda: len(records_of(got)) == 50)


@once
def test_exit_does_not_wait_for_an_agent_that_is_away(socket_path: str) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import geventaudit, helpers\n"
        "clients = [geventaudit.Client(lambda: geventaudit.TCP(('127.0.0.1', int(sys.argv[2])))) for _ in range(20)]\n"
        "for client in clients: client.send(helpers.message(1))\n"
    )
    began = time.monotonic()
    run(program, str(Path(__file__).parent), str(free_port()))
    assert time.monotonic() - began < 30, "2 seconds for all together"


def run(program: str, *arguments: str) -> None:
    process = gevent.subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert b"Traceback" not in output[1]


def test_a_client_closed_while_a_hook_waits_accepts_nothing(agent: Agent, socket_path: str) -> None:
    def hook(msg: Msg) -> Msg:
        gevent.sleep(0.05)
        return msg

    client = client_of(socket_path, before_send=hook)
    sending = gevent.spawn(client.send, message(1))
    gevent.sleep(0.01)
    client.close()
    with pytest.raises(ClientClosedError):
        sending.get(timeout=10)
    assert client.stats().accepted == 0


@pytest.mark.parametrize("raised", [ValidationError("no"), ValidationError({"OperationName": ["no"]}), KeyError("no")])
def test_each_exception_of_a_hook_is_a_validation_error(raised: Exception) -> None:
    def hook(msg: Msg) -> Msg:
        raise raised

    with Client(NoOp, before_send=hook) as client:
        with pytest.raises(ValidationError, match="no") as caught:
            client.send(message(1))
        assert isinstance(caught.value.messages, dict)
        assert client.stats().rejected == {"invalid": 1}


def test_a_hook_may_change_a_message_given_as_a_mapping(agent: Agent, got: list[Received], socket_path: str) -> None:
    def redact(msg: Msg) -> Msg:
        for identities in msg.record.caller_identities.values():
            for each in identities:
                each.identity = "redacted"
        return msg

    with client_of(socket_path, before_send=redact) as client:
        client.send({"Type": "ControlPlane", "Record": mapping()})
        assert client.flush(10)
    assert [each.identity for each in records_of(got)[0].caller_identities["UPN"]] == ["redacted"]


def test_no_timeout_means_for_ever(socket_path: str, got: list[Received]) -> None:
    client = client_of(socket_path, queue_size=1)
    client.send(message(1))
    waiting = gevent.spawn(client.send, message(2), timeout=None)
    closing = gevent.spawn_later(0.05, client.close, timeout=None)
    gevent.sleep(0.02)
    assert not waiting.ready()
    with Agent(socket_path, got.append):
        waiting.get(timeout=30)
        assert closing.get(timeout=30) == []
    assert numbers_of(got) == [1, 2]


def test_deliveries_are_known_during_a_write(socket_path: str) -> None:
    """The sender greenlet waits in a write that the agent does not take; the records before it are delivered."""
    big = message(4, caller_agent="x" * 900_000)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        client = client_of(socket_path)
        for number in range(200):
            client.send(message(number))
        peer, _ = listener.accept()
        with peer:
            eventually(lambda: client.stats().heartbeats == 1)
            client.send(big)
            eventually(lambda: client.stats().in_flight == 201)
            flushing = gevent.spawn(client.flush, 0.5)
            read = len(peer.recv(60_000))
            assert read == 60_000
            # The kernel counts its overhead too, so not all that was read is known to be.
            eventually(lambda: client.stats().delivered > 0)
            assert flushing.get(timeout=10) is False
            delivered = client.stats().delivered
            assert delivered * 400 < read
            assert client.close(timeout=0) == [*(message(n) for n in range(delivered, 200)), big]


def test_flush_after_close_returns_false_for_undelivered_messages(socket_path: str) -> None:
    client = client_of(socket_path)
    client.send(message(1))
    assert client.close(timeout=0) == [message(1)]
    assert client.flush(1) is False


def test_a_looser_schema_does_not_loosen_the_rules(socket_path: str) -> None:
    from marshmallow import fields, post_load

    class Looser(RecordSchema):
        operation_type = fields.String()
        custom_data = fields.Dict()

        @post_load
        def _add(self, data: Any, **kwargs: Any) -> Any:
            import uuid

            return {**data, "custom_data": {**data["custom_data"], "id": uuid.UUID(int=5)}}

    client = client_of(socket_path, schema=Looser())
    with pytest.raises(ValidationError, match="OperationType"):
        client.send({"Type": "ControlPlane", "Record": mapping(OperationType="Rotate")})
    with pytest.raises(ValidationError, match="CustomData"):
        client.send(message(custom_data={"a": {(1, (2,)): 3}}))
    client.send(message(1))
    (msg,) = client.close(timeout=0)
    assert msg.record.custom_data == {"n": 1, "id": "00000000-0000-0000-0000-000000000005"}


def test_an_exception_of_a_signals_handler_loses_no_batch(agent: Agent, got: list[Received], socket_path: str) -> None:
    """The exception may come anywhere: here in the sender, between its look at the queue and its first take."""

    class Interrupted:
        def __init__(self, queue: Any) -> None:
            self._queue = queue
            self.is_interrupted = False

        @property
        def get_nowait(self) -> Any:
            if not self.is_interrupted:
                self.is_interrupted = True
                raise gevent.GreenletExit
            return self._queue.get_nowait

        def __getattr__(self, name: str) -> Any:
            return getattr(self._queue, name)

    with client_of(socket_path) as client:
        client.connect()
        outbox: Any = client._life.outbox
        outbox.queue = queue = Interrupted(outbox.queue)
        for number in range(5):
            client.send(message(number))
        assert client.flush(10)
        assert queue.is_interrupted
        eventually(lambda: set(numbers_of(got)) == set(range(5)))
    assert list(dict.fromkeys(numbers_of(got))) == list(range(5))


def test_stats_can_be_copied_and_pickled() -> None:
    import pickle

    with Client(NoOp) as client:
        with pytest.raises(ValidationError):
            client.send(None)  # type: ignore[arg-type]
        stats = client.stats()
    assert stats._asdict()["rejected"] == {"invalid": 1}
    assert pickle.loads(pickle.dumps(stats)) == stats


def test_a_connection_that_lived_for_a_while_was_a_success(socket_path: str) -> None:
    """Delivered or not: an agent that restarts under an idle service is tried again at once."""
    with (
        Agent(socket_path, print) as agent,
        Client(
            lambda: DomainSocket(socket_path), backoff=Backoff(initial=0.05, maximum=3600, multiplier=1000)
        ) as client,
    ):
        client.connect()
        for connects in range(2, 5):
            gevent.sleep(0.1)
            agent.hang_up()
            eventually(lambda connects=connects: client.stats().connects == connects)


def test_live_clients(agent: Agent, socket_path: str, folder: Path) -> None:
    before = set(live_clients())
    spool = Spool(folder / "audit.db")
    new, running = Client(NoOp, spool=spool), client_of(socket_path)
    running.send(message(1))
    assert set(live_clients()) - before == {new, running}
    assert (new.spool, running.spool) == (spool, None)
    new.close()
    assert set(live_clients()) - before == {running}
    running.close()
    assert set(live_clients()) == before


def test_degraded_is_at_work_without_a_connection(socket_path: str) -> None:
    client = client_of(socket_path)
    assert not client.stats().degraded, "it has not begun"
    client.send(message(1))
    assert client.stats().degraded
    with Agent(socket_path, print):
        assert client.flush(30)
        assert not client.stats().degraded
    eventually(lambda: client.stats().degraded, "it is noticed while there is nothing to send")
    client.close(0)
    assert not client.stats().degraded


def test_a_heartbeat_that_goes_down_with_its_connection_is_counted(agent: Agent, socket_path: str) -> None:
    with client_of(socket_path) as client:
        client.connect()
        agent.stop_reading()
        client.send(message(1))
        eventually(lambda: client.stats().heartbeats == 1)
        assert client.stats().heartbeats_dropped == 0
        agent.hang_up()
        eventually(lambda: client.stats().connects == 2)
        eventually(lambda: client.stats().heartbeats == 2)
        assert client.stats().heartbeats_dropped == 1
        client.close(0)
        assert client.stats().heartbeats_dropped == 1, "the second was only not waited for"


@pytest.mark.parametrize("fails", [False, True])
def test_a_factory_that_ends_during_close_is_not_notified(fails: bool) -> None:
    """In one turn of the hub, the closing first: nothing comes after the end."""
    go = Event()

    def factory() -> NoOp:
        go.wait()
        if fails:
            raise OSError("too late")
        return NoOp()

    client = Client(factory)
    client.send(message())
    gevent.sleep(0.01)
    closing = gevent.spawn(lambda: (go.wait(), client.close(0.0))[1])
    gevent.sleep(0)
    go.set()
    assert len(closing.get(timeout=60)) == 1
    gevent.sleep(0.01)
    assert [each.kind for each in client.notify()][-1] is NotificationKind.CLOSED
    assert client.stats().connect_failures == 0


@pytest.mark.parametrize("timeout", ["1", dt.timedelta(seconds=1), float("nan"), ""])
def test_an_invalid_timeout_is_refused_first(agent: Agent, socket_path: str, timeout: Any) -> None:
    with client_of(socket_path) as client:
        client.send(message(1))
        for call in (lambda: client.send(message(2), timeout=timeout), lambda: client.flush(timeout),
                     lambda: client.close(timeout), lambda: client.connect(timeout)):  # fmt: skip
            with pytest.raises((TypeError, ValueError), match="timeout must be a number of seconds, or None, got "):
                call()
        client.send(message(3))
        assert client.flush(30)
        assert client.stats().accepted == 2
