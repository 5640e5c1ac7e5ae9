"""Real sockets: connecting, delivery, hang-ups, stuck agents."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from helpers import descriptors, eventually, free_port

from geventaudit import TCP, Connection, ConnectionFailedError, DomainSocket, NoOp
from geventaudit.transport import unix


@pytest.fixture(params=["unix", "tcp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def listener(kind: str, socket_path: str) -> Iterator[Any]:
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(socket_path)
    else:
        sock = socket.socket(socket.AF_INET)
        sock.bind(("127.0.0.1", 0))
    sock.listen(8)
    sock.settimeout(10)
    with sock:
        yield sock


def connected(listener: Any, **options: Any) -> tuple[Any, Any]:
    address = listener.getsockname()
    connection = DomainSocket(address, **options) if isinstance(address, str) else TCP(address, **options)
    return connection, listener.accept()[0]


def test_writes_whole_frames_and_knows_when_they_were_taken(listener: Any, kind: str) -> None:
    connection, agent = connected(listener)
    with connection, agent:
        assert isinstance(connection, Connection)
        connection.write([b"abc", b"defg"])
        connection.write([b"h"])
        if kind == "unix":
            assert connection.delivered() == 0
        assert agent.recv(3) == b"abc"
        assert agent.recv(100) == b"defgh"
        eventually(lambda: connection.delivered() == 3)
        assert connection.name == {"unix": "UnixDomainSocket", "tcp": "TCP"}[kind]


def test_a_part_that_was_read_is_not_a_frame_delivered(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        connection, agent = connected(listener)
        with connection, agent:
            connection.write([b"x" * 100])
            agent.recv(99)
            gevent.sleep(0.01)
            assert connection.delivered() == 0
            agent.recv(1)
            assert connection.delivered() == 1


def test_frames_unread_at_the_close_are_not_delivered(listener: Any, kind: str) -> None:
    connection, agent = connected(listener)
    with connection:
        if kind == "unix":
            connection.write([b"x" * 1000] * 5)
            agent.close()
            gevent.sleep(0.01)
            assert connection.delivered() == 0
        else:  # the kernel there had it; that is all that TCP can know
            connection.write([b"x" * 1000] * 5)
            eventually(lambda: connection.delivered() == 5)
            agent.close()
        with pytest.raises(ConnectionFailedError):
            connection.wait_broken()


def test_delivered_never_falls(listener: Any) -> None:
    connection, agent = connected(listener)
    with connection:
        connection.write([b"abc"])
        agent.recv(3)
        eventually(lambda: connection.delivered() == 1)
        agent.close()
        gevent.sleep(0.01)
        assert connection.delivered() == 1
        connection.close()
        assert connection.delivered() == 1


def test_hang_up_is_noticed_while_idle(listener: Any) -> None:
    connection, agent = connected(listener)
    with connection:
        waiting = gevent.spawn(connection.wait_broken)
        gevent.sleep(0.01)
        assert not waiting.ready()
        agent.close()
        with pytest.raises(ConnectionFailedError, match="hung up"):
            waiting.get(timeout=10)


def test_hang_up_is_noticed_beyond_the_write_timeout(listener: Any) -> None:
    connection, agent = connected(listener, write_timeout=0.02)
    with connection:
        waiting = gevent.spawn(connection.wait_broken)
        gevent.sleep(0.1)
        assert not waiting.ready(), "the write timeout is for writing"
        agent.close()
        with pytest.raises(ConnectionFailedError, match="hung up"):
            waiting.get(timeout=10)


def test_answers_without_a_meaning_are_read(listener: Any) -> None:
    connection, agent = connected(listener)
    with connection:
        waiting = gevent.spawn(connection.wait_broken)
        agent.sendall(b"chatter" * 10_000)
        agent.close()
        with pytest.raises(ConnectionFailedError, match="hung up"):
            waiting.get(timeout=10)


def test_an_agent_that_takes_nothing_costs_the_connection(listener: Any) -> None:
    connection, agent = connected(listener, write_timeout=0.1)
    with connection, agent:
        big = b"x" * (1 << 23)  # more than any kernel buffers
        with pytest.raises(ConnectionFailedError, match=r"took nothing for 0\.1 seconds"):
            connection.write([big])
        assert connection.delivered() == 0
        with pytest.raises(ConnectionFailedError, match="is closed"):
            connection.write([b"more"])


def test_a_slow_agent_is_not_a_stuck_one(listener: Any) -> None:
    connection, agent = connected(listener, write_timeout=2.0)
    with connection, agent:
        writer = gevent.spawn(connection.write, [b"x" * (1 << 23)])
        left = 1 << 23
        while left and (data := agent.recv(1 << 18)):
            left -= len(data)
            gevent.sleep(0.1)
        writer.get(timeout=10)
        eventually(lambda: connection.delivered() == 1)


@pytest.mark.parametrize("interruption", [gevent.Timeout(1), gevent.GreenletExit()])
def test_an_interrupted_write_costs_the_connection(listener: Any, interruption: BaseException) -> None:
    connection, agent = connected(listener)
    with connection, agent:
        writer = gevent.spawn(connection.write, [b"x" * (1 << 23)])
        gevent.sleep(0.05)
        writer.kill(interruption)
        with pytest.raises(ConnectionFailedError, match="is closed"):
            connection.write([b"more"])


def test_closed_under_a_writer(listener: Any) -> None:
    connection, agent = connected(listener)
    with agent:
        writer = gevent.spawn(connection.write, [b"x" * (1 << 23)])
        gevent.sleep(0.05)
        connection.close()
        connection.close()
        with pytest.raises(ConnectionFailedError):
            writer.get(timeout=10)


def test_an_address_without_an_agent(socket_path: str) -> None:
    before = descriptors()
    with pytest.raises(ConnectionFailedError, match=f"unix:{socket_path}: could not connect: No such file"):
        DomainSocket(socket_path)
    port = free_port()
    with pytest.raises(ConnectionFailedError, match=f"tcp:127.0.0.1:{port}: could not connect: Connection refused"):
        TCP(("127.0.0.1", port))
    assert descriptors() == before


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 200, "a\0b"])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(ConnectionFailedError, match="could not connect"):
        DomainSocket(path)


@pytest.mark.parametrize("address", [("x" * 300, 1), ("a\0b", 1)])
def test_addresses_that_cannot_be(address: tuple[str, int]) -> None:
    with pytest.raises(ConnectionFailedError, match="could not connect"):
        TCP(address)


@pytest.mark.parametrize("port", [0, -1, 65536, 70000, 1 << 40, True])
def test_ports_that_cannot_be(port: int) -> None:
    """The resolver would take 4464 for 70000."""
    with pytest.raises(ValueError, match=r"^the port in address must be a whole number from 1 to 65535, got "):
        TCP(("localhost", port))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("localhost:24224", r"such as \(.*\) and not '.*:24224', got 'localhost:24224'"),
        (("localhost", "24224"), r"got \('localhost', '24224'\)"),
        ((b"localhost", 24224), "got"),
        (("localhost",), r"got \('localhost',\)"),
        (24224, "got 24224"),
        (None, "got None"),
    ],
)
def test_addresses_of_another_kind(address: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^address must be a host name and a port number, .*{words}"):
        TCP(address)


@pytest.mark.parametrize("path", [5, b"/run/agent.sock", ("/run/agent.sock",)])
def test_paths_of_another_kind(path: Any) -> None:
    with pytest.raises(TypeError, match=r"^path must be text or a Path, such as '/var/.*', got "):
        DomainSocket(path)


def test_an_empty_path() -> None:
    with pytest.raises(ValueError, match=r"^path must not be empty: give the agent's socket, such as '/var/"):
        DomainSocket("")


@pytest.mark.parametrize("user", ["0", -1, True, 0.0])
def test_users_that_are_no_number(user: Any) -> None:
    """A user as text would equal no user id."""
    with pytest.raises(TypeError, match=r"^peer_uid must be .*, such as pwd.getpwnam\(name\).pw_uid, got "):
        DomainSocket("unused", peer_uid=user)


def both_with(**options: Any) -> Iterator[Callable[[], Any]]:
    yield lambda: DomainSocket("unused", **options)
    yield lambda: TCP(("127.0.0.1", 1), **options)


@pytest.mark.parametrize("name", ["timeout", "write_timeout", "ack_timeout"])
def test_seconds_that_are_none(name: str) -> None:
    for connect in (*both_with(**{name: "1"}), *both_with(**{name: [1]}), *both_with(**{name: True})):
        with pytest.raises(TypeError, match=f"^{name} must be a number of seconds above 0.*, got ['T[]"):
            connect()
    for connect in (*both_with(**{name: float("nan")}), *both_with(**{name: 0}), *both_with(**{name: -1.5})):
        with pytest.raises(ValueError, match=f"^{name} must be a number of seconds above 0.*, got [n0-]"):
            connect()


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": None, "write_timeout": None},
        {"timeout": 5, "write_timeout": 5, "ack_timeout": 5, "require_ack": True},
        {"ack_timeout": float("inf"), "require_ack": True, "batch_records": 1},
    ],
)
def test_seconds_that_are_right(listener: Any, options: dict[str, Any]) -> None:
    connection, agent = connected(listener, **options)
    with connection, agent:
        connection.write([b"\x93\xa1t\x00\x80"])


@pytest.mark.parametrize("number", ["2", 1.5, None, True, 0])
def test_batches_of_no_number(number: Any) -> None:
    for connect in both_with(batch_records=number):
        with pytest.raises(ValueError, match=r"^batch_records must be a whole number of at least 1, got "):
            connect()


def test_a_full_backlog_is_waited_for(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen(0)
        first = DomainSocket(socket_path)  # fills the backlog
        began = time.monotonic()
        with pytest.raises(ConnectionFailedError, match=r"accepted no connection for 0\.2 seconds"):
            DomainSocket(socket_path, timeout=0.2)
        assert time.monotonic() - began < 10
        second = gevent.spawn(DomainSocket, socket_path, timeout=10)
        gevent.sleep(0.05)
        assert not second.ready()
        agent, _ = listener.accept()
        second.get(timeout=10).close()
        first.close()
        agent.close()


def test_the_usual_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    usual = (str(folder / "asa.socket"), str(folder / "plain.socket"))
    monkeypatch.setattr(unix, "MDSD_SOCKETS", usual)
    with pytest.raises(ConnectionFailedError, match=r"plain\.socket"):
        DomainSocket()
    Path(usual[0]).touch()
    with pytest.raises(ConnectionFailedError, match=r"asa\.socket"):
        DomainSocket()


def test_tcp_options(kind: str) -> None:
    if kind == "unix":
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        connection, agent = connected(listener)
        with connection, agent:
            assert connection._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_names_resolve_without_stopping_the_hub() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with TCP(("localhost", listener.getsockname()[1])) as connection:
            listener.accept()[0].close()
            assert "localhost" in repr(connection)


def test_noop_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "geventaudit"), NoOp() as connection:
        assert "are discarded" in caplog.text
        assert isinstance(connection, Connection)
        connection.write([b"a", b"b"])
        assert connection.delivered() == 2
        assert connection.name == "NoOP"
        waiting = gevent.spawn(connection.wait_broken)
        gevent.sleep(0)
        connection.close()
        with pytest.raises(ConnectionFailedError):
            waiting.get(timeout=5)
        with pytest.raises(ConnectionFailedError):
            connection.write([b"c"])


def test_thousand_connections_leave_nothing(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(1000):
            connection, agent = connected(listener)
            connection.write([b"x"])
            connection.close()
            agent.close()
        assert len(os.listdir("/proc/self/fd")) == before
