"""The low-level client: one connection; the caller handles its failures."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from helpers import descriptors, eventually, message

from geventaudit import (
    BaseClient,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Heartbeat,
    Msg,
    NoOp,
    NotificationKind,
    QueueFullError,
    ValidationError,
)
from geventaudit.agent import Agent, Received


@pytest.fixture
def agent(socket_path: str, got: list[Received]) -> Any:
    with Agent(socket_path, got.append) as agent:
        yield agent


def numbers_of(got: list[Received]) -> list[int]:
    return [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)]


def broken(client: BaseClient) -> ConnectionFailedError:
    return eventually(lambda: client.error)  # type: ignore[no-any-return]


def test_sends_over_its_connection(agent: Agent, got: list[Received], socket_path: str) -> None:
    with BaseClient(DomainSocket(socket_path)) as client:
        for number in range(10):
            client.send(message(number))
        assert client.flush(10)
        assert client.error is None
        assert client.recover() == []
    assert numbers_of(got) == list(range(10))


def test_after_the_connection_broke_it_accepts_nothing(agent: Agent, socket_path: str) -> None:
    with BaseClient(DomainSocket(socket_path)) as client:
        client.send(message(0))
        assert client.flush(10)
        agent.stop()
        error = broken(client)
        assert socket_path in str(error)
        with pytest.raises(ConnectionFailedError, match="hung up"):
            client.send(message(1))
        assert client.flush(60) is True, "nothing is undelivered, and waiting would not help"
        assert client.stats().rejected == {"broken": 1}
        assert client.recover() == []


def test_undelivered_is_handed_back_once(agent: Agent, socket_path: str) -> None:
    agent.stop_reading()
    with BaseClient(DomainSocket(socket_path), queue_size=5000) as client:
        for number in range(3000):  # more than the kernel buffers: some written, some on the queue
            client.send(message(number))
        eventually(lambda: client.stats().in_flight)
        agent.hang_up()
        broken(client)
        assert client.flush(60) is False
        assert client.recover() == [message(n) for n in range(3000)]
        assert client.recover() == []
        stats = client.stats()
        assert (stats.accepted, stats.recovered, stats.queued, stats.in_flight) == (3000, 3000, 0, 0)
        assert client.close(timeout=60) == [], "and closing does not wait for what is not there"


def test_reset_sends_the_undelivered_first(agent: Agent, got: list[Received], socket_path: str) -> None:
    agent.stop_reading()
    with BaseClient(DomainSocket(socket_path), queue_size=5000) as client:
        for number in range(3000):
            client.send(message(number))
        eventually(lambda: client.stats().in_flight)
        agent.hang_up()
        broken(client)
        agent.resume_reading()
        client.reset(DomainSocket(socket_path))
        assert client.error is None
        client.send(message(3000))
        assert client.flush(30)
        # The agent may have read some just before it stopped reading: those arrive twice.
        assert list(dict.fromkeys(numbers_of(got))) == list(range(3001))
        assert client.stats().resent > 0


def test_reset_after_recover_sends_only_new_messages(agent: Agent, got: list[Received], socket_path: str) -> None:
    agent.stop_reading()
    with BaseClient(DomainSocket(socket_path)) as client:
        client.send(message(1))
        eventually(lambda: client.stats().in_flight)
        agent.hang_up()
        broken(client)
        assert client.recover() == [message(1)]
        agent.resume_reading()
        client.reset(DomainSocket(socket_path))
        client.send(message(2))
        assert client.flush(30)
    assert numbers_of(got) == [2]


def test_reset_replaces_a_connection_in_order(agent: Agent, got: list[Received], socket_path: str) -> None:
    before = descriptors()
    with BaseClient(DomainSocket(socket_path)) as client:
        client.reset(DomainSocket(socket_path))  # before it ever started
        client.send(message(1))
        assert client.flush(10)
        client.reset(DomainSocket(socket_path))
        client.send(message(2))
        assert client.flush(10)
        assert client.error is None
        assert client.stats().connects == 2
    eventually(lambda: descriptors() == before)
    assert numbers_of(got) == [1, 2]


def test_reset_frees_a_write_that_waits(agent: Agent, got: list[Received], socket_path: str) -> None:
    agent.stop_reading()
    with BaseClient(DomainSocket(socket_path, write_timeout=None), queue_size=5000) as client:
        for number in range(3000):
            client.send(message(number))
        eventually(lambda: client.stats().in_flight)
        agent.resume_reading()
        client.reset(DomainSocket(socket_path))
        assert client.flush(30)
    assert list(dict.fromkeys(numbers_of(got))) == list(range(3000))


def test_heartbeats_are_never_handed_back(agent: Agent, got: list[Received], socket_path: str) -> None:
    with BaseClient(DomainSocket(socket_path), heartbeat_interval=0.01) as client:
        client.send(message(1))
        eventually(lambda: sum(isinstance(each.message, Heartbeat) for each in got) > 2)
        agent.stop_reading()
        eventually(lambda: client.stats().heartbeats > 10)
        agent.hang_up()
        broken(client)
        assert client.recover() == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "got None, which has no name, write, delivered, wait_broken, close; a factory is for Client"),
        (lambda: NoOp(), "got <function .*, which has no name, write, .*; a factory is for Client"),
        (DomainSocket, "got the class DomainSocket, not an instance: call it"),
    ],
)
def test_an_invalid_connection_is_refused(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^connection must be a Connection, {words}$"):
        BaseClient(given)
    with BaseClient(NoOp()) as client:
        with pytest.raises(TypeError, match=f"^connection must be a Connection, {words}$"):
            client.reset(given)
        client.send(message(1))
        assert client.flush(10), "the connection that it has is as it was"
    with pytest.raises(TypeError, match=r"^connection must be a Connection"):
        client.reset(given)


def test_closing(agent: Agent, socket_path: str) -> None:
    before = descriptors()
    connection = DomainSocket(socket_path)
    client = BaseClient(connection)
    assert client.close() == []
    with pytest.raises(ConnectionFailedError):
        connection.write([b"x"])
    with pytest.raises(ClientClosedError):
        client.send(message(1))
    with pytest.raises(ClientClosedError):
        client.reset(DomainSocket(socket_path))
    eventually(lambda: descriptors() <= before)


def test_closing_a_broken_one_hands_back_without_waiting(agent: Agent, socket_path: str) -> None:
    agent.stop_reading()
    client = BaseClient(DomainSocket(socket_path))
    client.send(message(1))
    eventually(lambda: client.stats().in_flight)
    closing = gevent.spawn(client.close, 60)
    gevent.sleep(0.01)
    agent.hang_up()
    assert closing.get(timeout=10) == [message(1)]


def test_notifications_and_errors(agent: Agent, socket_path: str) -> None:
    with BaseClient(DomainSocket(socket_path), queue_size=1) as client:
        client.send(message(1))
        with pytest.raises(QueueFullError):
            client.send(message(2))
        with pytest.raises(ValidationError):
            client.send({})
        assert client.flush(10)
        agent.stop()
        broken(client)
        kinds = [client.notify().get(timeout=5).kind for _ in range(3)]
        assert kinds == [NotificationKind.QUEUE_FULL, NotificationKind.CONNECTED, NotificationKind.CONNECTION_LOST]


def test_noop() -> None:
    with BaseClient(NoOp()) as client:
        client.send(message(1))
        assert client.flush(10)


def test_a_send_that_waits_when_it_breaks_accepts_nothing(agent: Agent, socket_path: str) -> None:
    agent.stop_reading()
    with BaseClient(DomainSocket(socket_path), queue_size=1, max_frame_bytes=4 << 20) as client:
        client.send(message(0, caller_agent="x" * (3 << 20)))
        eventually(lambda: client.stats().in_flight)
        client.send(message(1))
        waiting = gevent.spawn(client.send, message(2), timeout=60)
        gevent.sleep(0.01)
        agent.hang_up()
        with pytest.raises(ConnectionFailedError):
            waiting.get(timeout=10)
        assert [msg.record.custom_data["n"] for msg in client.recover()] == [0, 1]
        assert client.recover() == []


def test_a_killed_sender_greenlet_is_a_broken_connection(agent: Agent, got: list[Received], socket_path: str) -> None:
    with BaseClient(DomainSocket(socket_path)) as client:
        client.send(message(1))
        assert client.flush(10)
        assert client._life.sender is not None
        assert client._life.sender.worker.greenlet is not None
        client._life.sender.worker.greenlet.kill()
        broken(client)
        client.reset(DomainSocket(socket_path))
        client.send(message(2))
        assert client.flush(10)
    assert numbers_of(got) == [1, 2]
