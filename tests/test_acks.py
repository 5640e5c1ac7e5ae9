"""Acknowledgements: the agent decides on delivery."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket
from helpers import eventually, first_arrivals, message, receiving

from geventaudit import (
    TCP,
    AuditType,
    Backoff,
    Client,
    DomainSocket,
    FrameError,
    Heartbeat,
    Msg,
    NotificationKind,
)
from geventaudit.agent import Agent
from geventaudit.delivery.outbox import MAX_WINDOW_BYTES
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.acks import AckWindow, ack_of
from geventaudit.protocol.decoding import Decoder

QUICK = Backoff(initial=0.01, maximum=0.05)


def frames(count: int, kind: AuditType = AuditType.CONTROL_PLANE) -> list[bytes]:
    return [encode(Msg(kind, message(n).record), 5) for n in range(count)]


def unpack(data: bytes) -> list[Any]:
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    return list(unpacker)


def test_frames_of_one_tag_share_a_message() -> None:
    window = AckWindow(batch_records=3)
    beat = encode(Heartbeat(), 7)
    written = unpack(window.written([*frames(4), beat, *frames(1, AuditType.DATA_PLANE)], now=1.0))
    assert [(tag, len(entries)) for tag, entries, _ in written] == [
        ("AsmAuditCP", 3), ("AsmAuditCP", 1), ("AsmAuditHB", 1), ("AsmAuditDP", 1),
    ]  # fmt: skip
    assert [entry for _, entries, _ in written for entry in entries] == [
        msgpack.unpackb(frame)[1][0] for frame in [*frames(4), beat, *frames(1, AuditType.DATA_PLANE)]
    ]
    options = [option for _, _, option in written]
    assert all(option["TimeFormat"] == "DateTime" for option in options)
    assert [option["size"] for option in options] == [3, 1, 1, 1]
    assert len({option["chunk"] for option in options}) == 4


def test_unknown_doubled_and_unordered_acks_are_harmless() -> None:
    window = AckWindow(batch_records=2)
    chunks = [option["chunk"] for _, _, option in unpack(window.written(frames(6), now=1.0))]
    acks = [ack_of(chunk) for chunk in chunks]
    window.feed(acks[1] + ack_of("stranger") + acks[1])
    assert window.delivered == 0
    for byte in acks[0]:
        window.feed(bytes([byte]))
    assert window.delivered == 4
    window.feed(acks[0] + acks[1])
    assert window.waiting_since() == 1.0
    window.feed(acks[2])
    assert (window.delivered, window.waiting_since()) == (6, None)
    for _ in range(1000):
        window.feed(ack_of("stranger"))
    assert len(window._early) == 0


@pytest.mark.parametrize("answer", [b"\xc1", msgpack.packb({"nack": "x"}), msgpack.packb([1]), b"\xa1\xff", b"HTTP"])
def test_an_invalid_ack_is_refused(answer: bytes) -> None:
    with pytest.raises(FrameError):
        AckWindow(1).feed(answer)


def test_chunks_are_unique_across_connections() -> None:
    assert not {unpack(AckWindow(1).written(frames(1), 0.0))[0][2]["chunk"] for _ in range(100)} & {
        unpack(AckWindow(1).written(frames(1), 0.0))[0][2]["chunk"] for _ in range(100)
    }


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_with_our_agent(kind: str, socket_path: str) -> None:
    got: list[Any] = []
    with Agent(socket_path if kind == "unix" else ("127.0.0.1", 0), got.append) as agent:

        def factory() -> DomainSocket | TCP:
            if isinstance(agent.address, str):
                return DomainSocket(agent.address, require_ack=True)
            return TCP(agent.address, require_ack=True)

        with Client(factory) as client:
            for number in range(1000):
                client.send(message(number))
            assert client.flush(30)
            assert client.stats().delivered == 1000
        assert 1000 / 256 <= agent.counts.acks < 1000, "records share acknowledgements"
    assert [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)] == list(range(1000))


@contextmanager
def scripted(path: str, serve: Callable[[Any], None]) -> Iterator[list[Any]]:
    """Call *serve* with each connection, as an agent; yield the connections made so far."""
    made: list[Any] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)

        def handle(sock: Any) -> None:
            with sock:
                try:
                    serve(sock)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                sock, _ = listener.accept()
                made.append(gevent.spawn(handle, sock))

        accepting = gevent.spawn(accept)
        try:
            yield made
        finally:
            accepting.kill()
            gevent.killall(made)


def read_forever(sock: Any) -> None:
    while sock.recv(65536):
        pass


def test_the_error_names_an_agent_that_never_acks(socket_path: str) -> None:
    with scripted(socket_path, read_forever) as made:
        client = Client(lambda: DomainSocket(socket_path, require_ack=True, ack_timeout=0.1), backoff=QUICK)
        client.send(message(1))
        eventually(lambda: len(made) > 5, "given up and tried again")
        lost = next(each for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST)
        assert "never acknowledged anything" in str(lost.error)
        assert client.stats().dropped == 0, "and its record is not to blame"
        assert client.close(timeout=0) == [message(1)]


def test_an_agent_that_stops_acking(socket_path: str) -> None:
    def ack_once(sock: Any) -> None:
        decoder = Decoder()
        acked = False
        while data := sock.recv(65536):
            for frame in decoder.feed(data):
                if not acked:
                    sock.sendall(ack_of(frame.chunk or ""))
                acked = True

    with scripted(socket_path, ack_once) as made:
        client = Client(
            lambda: DomainSocket(socket_path, require_ack=True, ack_timeout=0.1, batch_records=1), backoff=QUICK
        )
        for number in range(5):
            client.send(message(number))
        assert client.flush(30), "one for each connection"
        assert len(made) >= 5
        lost = next(each for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST)
        assert "acknowledged nothing for 0.1 seconds" in str(lost.error)
        client.close()


def test_an_agent_that_answers_nonsense(socket_path: str) -> None:
    def nonsense(sock: Any) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        read_forever(sock)

    with scripted(socket_path, nonsense):
        client = Client(lambda: DomainSocket(socket_path, require_ack=True), backoff=QUICK)
        client.send(message(1))
        lost = next(each for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST)
        assert "the agent's answer is invalid" in str(lost.error)
        client.close(timeout=0)


def test_an_agent_that_reads_and_never_acks_does_not_fill_the_memory(socket_path: str) -> None:
    with scripted(socket_path, read_forever):
        client = Client(lambda: DomainSocket(socket_path, require_ack=True), queue_size=100)
        sent = 0
        with pytest.raises(Exception, match="queue is full"):  # noqa: PT012
            while True:
                client.send(message(sent, caller_agent="x" * 100_000), timeout=1.0)
                sent += 1
        assert client.stats().in_flight_bytes < 1.2 * MAX_WINDOW_BYTES
        assert len(client.close(timeout=0)) == sent


@pytest.mark.parametrize("options", [{"ack_timeout": 0}, {"batch_records": 0}, {"timeout": 0}, {"write_timeout": -1}])
def test_parameters_that_cannot_be(options: dict[str, Any]) -> None:
    for make in (lambda: DomainSocket("unused", **options), lambda: TCP(("127.0.0.1", 1), **options)):
        with pytest.raises(ValueError, match=next(iter(options))):
            make()


def test_an_agent_killed_at_any_time_loses_nothing(folder: Path) -> None:
    """The receiver stores records before it acknowledges them, and is killed without warning."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with receiving(folder) as receiver:
        receiver.start()
        client = Client(lambda: DomainSocket(receiver.where, require_ack=True), backoff=QUICK)

        def send() -> None:
            for number in range(20_000):
                client.send(message(number), timeout=60)

        sending = gevent.spawn(send)
        for _ in range(15):
            gevent.sleep(chance.random() * 0.2)
            receiver.end(signal.SIGKILL)
            receiver.start()
        sending.get(timeout=120)
        assert client.flush(60)
        assert client.close() == []
        receiver.end(signal.SIGTERM)
        assert first_arrivals(receiver.numbers()) == list(range(20_000))


def test_throughput_with_acks_is_not_far_below_that_without(folder: Path) -> None:
    """A ratio, in one run, with a lot of room: Fluent Bit itself is measured by hand (benchmarks)."""
    rates = {}
    for acks in (False, True):
        path = folder / f"acks-{acks}"
        path.mkdir()
        with receiving(path) as receiver:
            receiver.start()
            with Client(lambda acks=acks, path=receiver.where: DomainSocket(path, require_ack=acks)) as client:
                client.connect()
                began = time.perf_counter()
                for number in range(5000):
                    client.send(message(number), timeout=60)
                assert client.flush(60)
                rates[acks] = 5000 / (time.perf_counter() - began)
    assert rates[True] > 0.3 * rates[False]
