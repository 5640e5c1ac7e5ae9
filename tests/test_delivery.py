"""The promise: accepted records arrive, through all faults of the agent. Real processes, real signals.

Each test numbers its records; an independent receiver process writes down the numbers that it read.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from helpers import Receiver, descriptors, eventually, first_arrivals, greenlets, message, receiving

from geventaudit import TCP, Backoff, Client, DomainSocket, QueueFullError
from geventaudit.agent import Agent
from geventaudit.delivery.outbox import MAX_BATCH_BYTES
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import Decoder

QUICK = Backoff(initial=0.005, maximum=0.05)
RESTARTS = 20
RECORDS = int(os.environ.get("GEVENTAUDIT_RECORDS", "100000"))
FRAME_BYTES = len(encode(message(RECORDS), time.time()))


def client_of(receiver: Receiver, **options: Any) -> Client:
    if receiver.kind == "unix":
        return Client(lambda: DomainSocket(receiver.where), backoff=QUICK, **options)
    return Client(lambda: TCP(("127.0.0.1", int(receiver.where))), backoff=QUICK, **options)


def send_all(client: Client, count: int) -> None:
    for number in range(count):
        client.send(message(number), timeout=60)


def check_arrivals(receiver: Receiver, count: int, restarts: int, resent: int) -> None:
    numbers = receiver.numbers()
    first = first_arrivals(numbers)
    assert len(first) == count, f"{count - len(first)} lost"
    assert first == list(range(count)), "first arrivals out of order"
    duplicates = len(numbers) - count
    print(f"{receiver.kind}: {count} records, {restarts} restarts, {duplicates} twice, none lost")
    assert duplicates <= resent
    if receiver.kind == "unix":
        buffer = int(Path("/proc/sys/net/core/wmem_default").read_text())  # the most that the kernel holds
        assert duplicates * FRAME_BYTES <= restarts * buffer


def restart_under_load(receiver: Receiver, client: Client, sending: Any) -> None:
    """Restart the agent process RESTARTS times, spread over the sending; each time with unread data in its socket."""
    for restart in range(RESTARTS):
        target = RECORDS * (restart + 1) // (RESTARTS + 1)
        eventually(lambda target=target: client.stats().accepted >= target, "sending goes on", timeout=120)
        receiver.pause()
        eventually(lambda: client.stats().in_flight > 10, "unread data in the socket")
        receiver.end(signal.SIGTERM)
        receiver.start()
    sending.get(timeout=120)
    assert client.flush(60)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_numbered_records_through_twenty_restarts(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # This agent reads each connection to its end. So nothing depends on that time, of which there are 20.
    monkeypatch.setattr("geventaudit.transport.tcp.BLIND_SECONDS", 0.1)
    with receiving(folder, kind) as receiver:
        receiver.start()
        client = client_of(receiver)
        sending = gevent.spawn(send_all, client, RECORDS)
        restart_under_load(receiver, client, sending)
        assert client.close() == []
        stats = client.stats()
        assert stats.accepted == stats.delivered == RECORDS
        assert stats.connects >= RESTARTS
        receiver.end(signal.SIGTERM)
        check_arrivals(receiver, RECORDS, RESTARTS, stats.resent)


def test_a_killed_agent_loses_only_records_that_it_had_read(folder: Path) -> None:
    """The agent is killed while it reads nothing, and has stored all read records: none may be lost."""
    with receiving(folder) as receiver:
        receiver.start()
        client = client_of(receiver)
        sending = gevent.spawn(send_all, client, 20_000)
        for restart in range(10):
            eventually(lambda restart=restart: client.stats().accepted >= 1800 * (restart + 1))
            receiver.pause()
            eventually(lambda: client.stats().in_flight > 10)
            receiver.end(signal.SIGKILL)
            receiver.start()
        sending.get(timeout=60)
        assert client.flush(60)
        client.close()
        receiver.end(signal.SIGTERM)
        check_arrivals(receiver, 20_000, 10, client.stats().resent)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_two_hundred_reconnects_leave_nothing_behind(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geventaudit.transport.tcp.BLIND_SECONDS", 0.0)  # 200 of them are not waited for
    got: list[int] = []
    address: Any = str(folder / "agent.sock") if kind == "unix" else ("127.0.0.1", 0)
    agent = Agent(address, lambda each: got.append(1)).start()
    client = Client(
        lambda: DomainSocket(agent.address) if kind == "unix" else TCP(agent.address),  # type: ignore[arg-type]
        backoff=QUICK,
    )
    client.send(message(0))
    assert client.flush(10)
    before = (descriptors(), greenlets())
    for number in range(1, 201):
        agent.restart()
        client.send(message(number))
        assert client.flush(30)
    assert client.stats().connects >= 201
    eventually(lambda: (descriptors(), greenlets()) == before, "the same as after the first connection")
    client.close()
    agent.stop()


def test_an_agent_that_never_reads(folder: Path) -> None:
    """Item by item: send returns at once or raises, memory is bounded, a ticker keeps its time, close its timeout."""
    path = str(folder / "agent.sock")
    arrived: list[Any] = []
    agent = Agent(path, arrived.append).start()
    agent.stop_reading()
    client = Client(lambda: DomainSocket(path), backoff=QUICK, queue_size=500)
    gaps: list[float] = []

    def tick() -> None:
        last = time.perf_counter()
        while True:
            gevent.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = gevent.spawn(tick)
    accepted = refused = 0
    for _ in range(20_000):  # so many that the ticker runs often: every 5 ms at the most
        try:
            client.send(message(accepted))
            accepted += 1
        except QueueFullError:
            refused += 1
        if accepted % 20 == 0 or refused:
            gevent.sleep(0)
    ticker.kill()
    stats = client.stats()
    assert refused > 0
    assert stats.accepted == accepted
    assert stats.queued == 500
    assert stats.in_flight_bytes <= int(Path("/proc/sys/net/core/wmem_default").read_text()) + 2 * MAX_BATCH_BYTES
    assert stats.queued + stats.in_flight == accepted
    # No absolute times: the ticker's usual gap against its longest, with a lot of room for a noisy machine.
    gaps.sort()
    assert len(gaps) > 20, "the ticker ran all the time"
    assert gaps[int(len(gaps) * 0.95)] < max(100 * gaps[len(gaps) // 2], 0.5)

    began = time.monotonic()
    closing = gevent.spawn(client.close, 0.3)
    undelivered = closing.get(timeout=20)
    assert 0.25 < time.monotonic() - began < 10
    assert [msg.record.custom_data["n"] for msg in undelivered] == list(range(accepted))
    agent.stop(0)


def test_when_it_reads_again_everything_arrives(folder: Path) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        receiver.pause()
        client = client_of(receiver, queue_size=3000)
        for number in range(3000):
            client.send(message(number))
        eventually(lambda: client.stats().in_flight > 0)
        gevent.sleep(0.2)
        assert client.stats().queued > 0
        receiver.resume()
        assert client.flush(30)
        client.close()
        receiver.end(signal.SIGTERM)
        check_arrivals(receiver, 3000, 0, 0)


def test_an_agent_stuck_beyond_the_write_timeout_gets_everything_later(folder: Path) -> None:
    path = str(folder / "agent.sock")
    numbers: list[int] = []

    def take(received: Any) -> None:
        if hasattr(received.message, "record"):
            numbers.append(received.message.record.custom_data["n"])

    agent = Agent(path, take).start()
    agent.stop_reading()
    client = Client(lambda: DomainSocket(path, write_timeout=0.05), backoff=QUICK)
    for number in range(1500):
        client.send(message(number))
    eventually(lambda: client.stats().connects > 3, "stuck connections are given up")
    agent.resume_reading()
    assert client.flush(30)
    assert first_arrivals(numbers) == list(range(1500))
    client.close()
    agent.stop()


def test_random_faults_of_a_hostile_agent(folder: Path) -> None:
    """The agent closes after any number of bytes, in the middle of frames, with or without reading them."""
    path = str(folder / "agent.sock")
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    numbers: list[int] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    faults = 0

    def serve(sock: Any) -> None:
        nonlocal faults
        decoder = Decoder()
        limit = chance.choice([0, 10, 1000, 30_000, 200_000]) if faults < 100 else 1 << 60
        faults += 1
        read = 0
        with sock:
            while read < limit and (data := sock.recv(min(limit - read, chance.choice([7, 500, 65536])))):
                read += len(data)
                for frame in decoder.feed(data):
                    if frame.tag == "AsmAuditCP":
                        numbers.append(frame.entries[0].body["CustomData"]["n"])
                if chance.random() < 0.01:
                    gevent.sleep(0.005)

    def accept() -> None:
        while True:
            gevent.spawn(serve, listener.accept()[0])

    accepting = gevent.spawn(accept)
    client = Client(lambda: DomainSocket(path), backoff=QUICK)
    send_all(client, 10_000)
    assert client.flush(60)
    client.close()
    accepting.kill()
    listener.close()
    assert faults > 10
    assert set(numbers) == set(range(10_000))
    assert first_arrivals(numbers) == list(range(10_000))
