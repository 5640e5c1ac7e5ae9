"""The receiving end: strict, clear, and hard to bring down."""

from __future__ import annotations

import logging
import os
import socket as std_socket
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket
from helpers import SERVICE_TREE_ID, eventually, mapping, message

from geventaudit import Diagnostic, Heartbeat, Msg, RecordSchema, ValidationError
from geventaudit.agent import Agent, Received, Refused
from geventaudit.encoder.encoding import encode


def connect(agent: Agent) -> Any:
    if isinstance(agent.address, tuple):
        return socket.create_connection(agent.address, timeout=10)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(agent.address)
    return sock


def frame(number: int = 0, option: Any = None, **changes: Any) -> bytes:
    body = {"env_ikey": SERVICE_TREE_ID, **mapping(CustomData={"n": number}, **changes)}
    return bytes(msgpack.packb(["AsmAuditCP", [[5, body]], option or {}]))


def test_messages_of_all_kinds(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        sock.sendall(encode(message(), 7, SERVICE_TREE_ID))
        sock.sendall(encode(Heartbeat("a", "b", "c", "d", "TCP"), 8))
        sock.sendall(encode(Diagnostic(), 9))
        eventually(lambda: len(got) == 3)
    assert got[0] == Received(message(), 7, SERVICE_TREE_ID)
    assert [type(each.message) for each in got] == [Msg, Heartbeat, Diagnostic]
    assert agent.counts.messages == 3
    assert agent.counts.heartbeats == 1
    eventually(lambda: agent.counts.open_connections == 0)


def test_a_byte_at_a_time_and_many_at_once(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        for byte in frame(1):
            sock.sendall(bytes([byte]))
        sock.sendall(b"".join(frame(n) for n in range(2, 52)))
        eventually(lambda: len(got) == 51)


def test_refusals_are_reported_and_the_stream_stays_open(
    agent: Agent, got: list[Received], refused: list[Refused]
) -> None:
    with connect(agent) as sock:
        sock.sendall(frame(1, CallerIpAddress="127.0.0.1", OperationType="x"))
        sock.sendall(msgpack.packb(["Nonsense", [[5, {}]]]))
        sock.sendall(msgpack.packb(["AsmAuditHB", [[5, {}]]]))
        sock.sendall(msgpack.packb(["AsmAuditCP", [[5, {"env_ikey": "x", **mapping()}]]]))
        sock.sendall(frame(2))
        eventually(lambda: len(got) == 1)
    assert agent.counts.refused == 4
    assert isinstance(refused[0].error, ValidationError)
    assert set(refused[0].error.messages) == {"CallerIpAddress", "OperationType"}
    assert "the type must be one of" in str(refused[1].error)
    assert refused[1].tag == "Nonsense"
    assert "AuditVersion" in str(refused[2].error)
    assert "UUID" in str(refused[3].error)


def test_rule_breakers_are_logged_without_a_callback(socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    with Agent(socket_path, print) as agent, connect(agent) as sock:
        sock.sendall(frame(1, OperationName=""))
        eventually(lambda: agent.counts.refused == 1)
    assert "OperationName: must not be empty" in caplog.text


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xc1", b"\x93\xa1x\xc3\x80", bytes(range(100)) + b"\xc1"]
)
def test_garbage_costs_its_own_connection_only(
    agent: Agent, got: list[Received], garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), connect(agent) as honest, connect(agent) as sock:
        honest.sendall(frame(1)[:50])
        sock.sendall(frame(2) + garbage)
        try:
            assert sock.recv(1) == b"", "closed"
        except ConnectionResetError:
            pass  # closed with some of it unread
        honest.sendall(frame(1)[50:])
        eventually(lambda: len(got) == 2)
    assert agent.counts.broken_streams == 1
    assert f"at byte {len(frame(2))}" in caplog.text


def test_good_entries_before_a_bad_one_are_kept_without_an_ack(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        sock.sendall(msgpack.packb(["AsmAuditCP", [[5, mapping()], ["text", mapping()]], {"chunk": "c"}]))
        assert sock.recv(100) == b""
    assert len(got) == 1
    assert agent.counts.acks == 0


def test_a_half_frame(agent: Agent, got: list[Received], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with connect(agent) as sock:
            sock.sendall(frame(1) + frame(2)[:100])
        eventually(lambda: agent.counts.half_frames == 1)
    assert "100 bytes" in caplog.text
    assert len(got) == 1


def test_acks(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        sock.sendall(frame(1, {"chunk": "first"}) + frame(2) + frame(3, {"chunk": "second"}))
        unpacker = msgpack.Unpacker()
        acks: list[Any] = []
        while len(acks) < 2:
            unpacker.feed(sock.recv(100))
            acks += unpacker
    assert acks == [{"ack": "first"}, {"ack": "second"}]
    assert agent.counts.acks == 2


def test_a_callback_that_raises_closes_without_an_ack(socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    def raises(received: Received) -> None:
        raise ZeroDivisionError("the disk is full")

    with Agent(socket_path, raises) as agent, connect(agent) as sock:
        sock.sendall(frame(1, {"chunk": "c"}))
        assert sock.recv(10) == b""
        assert agent.counts.broken_streams == 1
    assert "the disk is full" in caplog.text


def test_a_stricter_schema(socket_path: str, refused: list[Refused]) -> None:
    import marshmallow

    class Stricter(RecordSchema):
        @marshmallow.validates("operation_name")
        def _never(self, value: str, **kwargs: Any) -> None:
            raise marshmallow.ValidationError("never good")

    agent = Agent(socket_path, print, on_refused=refused.append, schema=Stricter())
    with agent, connect(agent) as sock:
        sock.sendall(frame(1))
        eventually(lambda: refused)
    assert "never good" in str(refused[0].error)


def test_thousands_of_connections(agent: Agent, got: list[Received]) -> None:
    socks = []
    for number in range(2000):
        sock = connect(agent)
        sock.sendall(frame(number))
        socks.append(sock)
    eventually(lambda: len(got) == 2000)
    assert agent.counts.open_connections == 2000
    for sock in socks:
        sock.close()
    eventually(lambda: agent.counts.open_connections == 0)


def test_stop_reading_and_resume(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        sock.sendall(frame(1))
        eventually(lambda: len(got) == 1)
        agent.stop_reading()
        sock.sendall(frame(2))
        gevent.sleep(0.05)
        assert len(got) == 1
        agent.resume_reading()
        eventually(lambda: len(got) == 2)


def test_hang_up_leaves_it_listening(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        sock.sendall(frame(1))
        eventually(lambda: len(got) == 1)
        agent.hang_up()
        assert sock.recv(1) == b""
    with connect(agent) as sock:
        sock.sendall(frame(2))
        eventually(lambda: len(got) == 2)


def test_hang_up_closes_connections_that_are_not_accepted_yet(agent: Agent) -> None:
    socks = [connect(agent) for _ in range(3)]
    agent.hang_up()
    for sock in socks:
        with sock:
            sock.settimeout(10)
            assert sock.recv(1) == b""
    assert agent.counts.connections == 3


def test_stop_reads_sent_messages(agent: Agent, got: list[Received]) -> None:
    with connect(agent) as sock:
        sock.sendall(b"".join(frame(n) for n in range(200)))

        def hang_up_when_told() -> None:
            assert sock.recv(1) == b""
            sock.close()

        polite = gevent.spawn(hang_up_when_told)
        agent.stop(timeout=10)
        polite.get(timeout=10)
    assert len(got) == 200


def test_restart_on_the_same_address(got: list[Received], folder: Path) -> None:
    for address in (str(folder / "s"), ("127.0.0.1", 0)):
        with Agent(address, got.append) as agent:
            before = agent.address
            for _ in range(3):
                agent.restart()
            assert agent.address == before
            connect(agent).close()


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_a_file_in_place_of_the_socket_is_refused_and_kept(socket_path: str, kind: str) -> None:
    path = Path(socket_path)
    {"file": path.touch, "folder": path.mkdir}.get(kind, lambda: path.symlink_to("/nowhere"))()
    with pytest.raises(OSError, match=f"a {kind} is there, and no socket: {path}"):
        Agent(socket_path, print).start()
    assert path.is_symlink() or path.exists()


def test_a_path_that_is_empty() -> None:
    with pytest.raises(OSError, match="the path of the socket is empty"):
        Agent("", print).start()


@pytest.mark.parametrize("port", [-1, 65536, 1 << 40, True])
def test_ports_that_cannot_be(port: int) -> None:
    with pytest.raises(ValueError, match=r"^the port in address must be a whole number from 0 to 65535, got "):
        Agent(("127.0.0.1", port), print)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"address": 5}, "address must be the path of a socket, or a tuple of host and port, got 5"),
        ({"address": b"/run/s"}, "address must be the path of a socket, or a tuple of host and port, got b'/run/s'"),
        ({"address": ("localhost",)}, r"address must be a host name and a port number, .* got \('localhost',\)"),
        ({"on_message": None}, "on_message must be callable, got None: pass a function"),
        ({"on_refused": 5}, "on_refused must be callable, got 5: pass a function"),
        ({"ssl": True}, "ssl must be an ssl.SSLContext, got True"),
        ({"stall_timeout": "5"}, "stall_timeout must be a number of seconds above 0, got '5'"),
        ({"stall_timeout": None}, "stall_timeout must be a number of seconds above 0, got None"),
    ],
)
def test_parameters_of_another_kind(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=f"^{words}"):
        Agent(**{"address": "unused", "on_message": print, **parameters})


def test_a_path_object(folder: Path) -> None:
    with Agent(folder / "s", print) as agent:
        assert agent.address == str(folder / "s")


def test_the_socket_file(socket_path: str, folder: Path) -> None:
    left_behind = std_socket.socket(std_socket.AF_UNIX)
    left_behind.bind(socket_path)
    left_behind.close()
    with Agent(socket_path, print), pytest.raises(OSError, match="in use"):
        Agent(socket_path, print).start()
    assert not os.path.exists(socket_path), "it is taken away at the end"
    plain = folder / "plain"
    plain.write_text("precious")
    with pytest.raises(OSError, match="a file is there, and no socket"):
        Agent(str(plain), print).start()
    assert plain.read_text() == "precious"
    with Agent(socket_path, print):
        os.unlink(socket_path)
        Path(socket_path).write_text("somebody else's")
    assert os.path.exists(socket_path)


def test_starting_twice(agent: Agent) -> None:
    with pytest.raises(RuntimeError, match="already running"):
        agent.start()
    agent.stop()
    agent.stop()
    assert "stopped" in repr(agent)


def test_control_from_the_callback_of_a_connection(socket_path: str) -> None:
    got: list[Received] = []

    def take(received: Received) -> None:
        got.append(received)
        if len(got) == 1:
            agent.restart(timeout=0.05)

    agent = Agent(socket_path, take)
    with agent:
        with connect(agent) as sock:
            sock.sendall(frame(1))
            eventually(lambda: len(got) == 1 and "running" in repr(agent))
        with connect(agent) as sock:
            sock.sendall(frame(2))
            eventually(lambda: len(got) == 2)


def test_an_abstract_address() -> None:
    name = f"\0geventaudit-{os.getpid()}"
    got: list[Received] = []
    with Agent(name, got.append) as agent, connect(agent) as sock:
        sock.sendall(frame(1))
        eventually(lambda: len(got) == 1)


# -- received messages when an agent stops -----------------------------------------------------------------------------


def chunked(number: int, acks: bool) -> bytes:
    return frame(number, {"chunk": str(number)} if acks else None)


def acks_of(sock: Any) -> list[str]:
    """Return the acknowledged chunks until the agent hangs up."""
    unpacker = msgpack.Unpacker()
    while data := sock.recv(4096):
        unpacker.feed(data)
    return [each["ack"] for each in unpacker]


ADDRESSES = pytest.mark.parametrize("kind", ["unix", "tcp"])
ACKS = pytest.mark.parametrize("acks", [False, True], ids=["without acks", "with acks"])


@pytest.fixture
def either(kind: str, socket_path: str, got: list[Received]) -> Any:
    with Agent(socket_path if kind == "unix" else ("127.0.0.1", 0), got.append) as agent:
        yield agent


def numbers(got: list[Received]) -> list[int]:
    return [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)]


def hang_up_when_told(sock: Any) -> Any:
    def wait() -> list[str]:
        acks = acks_of(sock)
        sock.close()
        return acks

    return gevent.spawn(wait)


@ADDRESSES
@ACKS
@pytest.mark.parametrize("is_known", [False, True], ids=["not accepted yet", "accepted"])
def test_received_messages_are_handed_over_at_stop(
    either: Agent, got: list[Received], acks: bool, is_known: bool
) -> None:
    with connect(either) as sock:
        if is_known:
            sock.sendall(chunked(0, acks))
            eventually(lambda: got)
        else:
            sock.sendall(chunked(0, acks))
        sock.sendall(b"".join(chunked(number, acks) for number in range(1, 150)))
        sender = hang_up_when_told(sock)
        either.stop(timeout=20)
        assert numbers(got) == list(range(150))
        assert sender.get(timeout=10) == ([str(number) for number in range(150)] if acks else [])


@ADDRESSES
@ACKS
def test_messages_of_a_sender_that_hung_up_are_handed_over(
    either: Agent, got: list[Received], kind: str, acks: bool
) -> None:
    """More than one read takes from the Unix socket, and no sender for the acknowledgements."""
    sent = 0
    with connect(either) as sock:
        sock.settimeout(0.0)
        try:
            while sent < (400 if kind == "unix" else 140):  # over TCP, as many as the agent's system takes at once
                sock.sendall(chunked(sent, acks))
                sent += 1
        except (BlockingIOError, TimeoutError):
            pass  # a Unix socket holds no more; the last frame may be cut
    assert sent >= 140
    assert kind == "tcp" or sent * len(frame()) > 1 << 16
    either.stop(timeout=20)
    assert numbers(got) == list(range(sent))


@ADDRESSES
@ACKS
def test_messages_that_arrive_during_a_callback_are_handed_over(
    kind: str, socket_path: str, got: list[Received], acks: bool
) -> None:
    def take(received: Received) -> None:
        got.append(received)
        if len(got) == 1:
            gevent.sleep(0.2)

    agent = Agent(socket_path if kind == "unix" else ("127.0.0.1", 0), take).start()
    with connect(agent) as sock:
        sock.sendall(b"".join(chunked(number, acks) for number in range(50)))
        eventually(lambda: got)
        sock.sendall(b"".join(chunked(number, acks) for number in range(50, 60)))
        sender = hang_up_when_told(sock)
        agent.stop(timeout=20)
        assert numbers(got) == list(range(60))
        assert sender.get(timeout=10) == ([str(number) for number in range(60)] if acks else [])


@ADDRESSES
@ACKS
def test_a_sender_that_goes_on_does_not_hold_it_up(either: Agent, got: list[Received], acks: bool) -> None:
    sent: list[int] = []
    sock = connect(either)
    is_told = gevent.spawn(acks_of, sock)

    def send() -> None:
        try:
            while not is_told.ready():
                sock.sendall(chunked(len(sent), acks))
                sent.append(len(sent))
                gevent.sleep(0.0001)
        except BrokenPipeError:
            pass
        finally:
            is_told.join(10)
            sock.close()

    sender = gevent.spawn(send)
    eventually(lambda: len(got) > 10)
    before = len(sent)
    with gevent.Timeout(20):
        either.stop(timeout=60)
    sender.get(timeout=10)
    assert numbers(got) == list(range(len(got))), "nothing is left out"
    assert before <= len(got) <= len(sent) + 1
    assert set(is_told.get(timeout=10)) <= {str(number) for number in numbers(got)}


@ACKS
def test_a_sender_that_does_not_hang_up_is_not_waited_for(socket_path: str, got: list[Received], acks: bool) -> None:
    agent = Agent(socket_path, got.append).start()
    with connect(agent) as sock:
        sock.sendall(chunked(1, acks))
        with gevent.Timeout(20):
            agent.stop(timeout=60)
        assert numbers(got) == [1]
        assert acks_of(sock) == (["1"] if acks else [])
        with pytest.raises(BrokenPipeError):
            sock.sendall(b"x")


@ADDRESSES
def test_stopping_takes_no_longer_than_it_may(kind: str, socket_path: str) -> None:
    """A callback and a sender that take too long do not delay it."""

    def take(received: Received) -> None:
        gevent.sleep(60)

    agent = Agent(socket_path if kind == "unix" else ("127.0.0.1", 0), take).start()
    with connect(agent) as sock, connect(agent):
        sock.sendall(frame(1) + frame(2))
        eventually(lambda: agent.counts.messages == 1)
        with gevent.Timeout(20):
            agent.stop(timeout=0.2)


@ADDRESSES
@ACKS
def test_stopping_at_once_leaves_it_unread(either: Agent, got: list[Received], acks: bool) -> None:
    with connect(either) as sock:
        sock.sendall(chunked(1, acks))
        either.stop(timeout=0)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    gevent.sleep(0.05)
    assert not got


def test_a_listener_that_cannot_accept_is_closed(
    socket_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent(socket_path, print).start()

    def fails() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(agent._server, "do_read", fails)
    agent.stop()
    assert "not accepted yet are lost" in caplog.text
    with agent:
        connect(agent).close()
