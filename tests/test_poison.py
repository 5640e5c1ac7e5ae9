"""A record that makes the agent hang up is set aside; a record is never blamed for an agent that merely restarts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from helpers import eventually, message, receiving
from test_acks import scripted

from geventaudit import TCP, Backoff, Client, ConnectionFailedError, DomainSocket, FrameError, NotificationKind
from geventaudit.agent import Agent
from geventaudit.protocol.acks import ack_of
from geventaudit.protocol.decoding import Decoder

QUICK = Backoff(initial=0.005, maximum=0.02)


class Picky:
    """An agent that hangs up on some numbers, at once; takes and acknowledges the others."""

    def __init__(self, *poison: int) -> None:
        self.poison = set(poison)
        self.numbers: list[int] = []
        self.hang_ups = 0

    def __call__(self, sock: Any) -> None:
        decoder = Decoder()
        while data := sock.recv(65536):
            for frame in decoder.feed(data):
                for entry in frame.entries if frame.tag == "AsmAuditCP" else []:
                    number = entry.body["CustomData"]["n"]
                    if number in self.poison:
                        self.hang_ups += 1
                        return
                    self.numbers.append(number)
                if frame.chunk:
                    sock.sendall(ack_of(frame.chunk))


@pytest.mark.parametrize("acks", [False, True], ids=["without acks", "with acks"])
@pytest.mark.parametrize("poison", [(0,), (57,), (99,), (10, 11, 60)], ids=str)
def test_poison_is_set_aside_and_the_rest_goes_on(socket_path: str, poison: tuple[int, ...], acks: bool) -> None:
    agent = Picky(*poison)
    with scripted(socket_path, agent):
        client = Client(lambda: DomainSocket(socket_path, require_ack=acks), backoff=QUICK)
        for number in range(100):
            client.send(message(number))
        more = range(100, 103 if 99 in poison else 100)
        for number in more:  # a suspect that has no other record beside it is not rejected
            eventually(lambda: client.stats().queued + client.stats().in_flight == 1)
            assert client.stats().dropped == 0
            client.send(message(number))
        client.flush(60)
        assert {*range(100), *more} - set(agent.numbers) == set(poison)
        stats = client.stats()
        if acks:  # without, the agent may have read it long enough before it hung up for it to count as delivered
            assert (stats.delivered, stats.dropped) == (100 + len(more) - len(poison), len(poison))
        assert stats.delivered + stats.dropped == 100 + len(more)
        assert client.close() == []
        dropped = [each for each in client.notify() if each.kind is NotificationKind.DROPPED]
        assert len(dropped) == stats.dropped
        assert {msg.record.custom_data["n"] for each in dropped for msg in each.undelivered} <= set(poison)
        assert all("3 times in a row" in str(each.error) for each in dropped)
        if 99 not in poison:  # a lone suspect is retried under the backoff
            assert agent.hang_ups <= 10 * len(poison)
        assert client.flush(0) is (stats.dropped == 0)


def test_an_agent_that_hangs_up_without_reading_rejects_no_record(socket_path: str) -> None:
    rounds = 0

    def slam(sock: Any) -> None:
        nonlocal rounds
        rounds += 1
        if rounds < 12:
            gevent.sleep(0.005)  # time enough to be written to
            return
        agent(sock)

    agent = Picky()
    with scripted(socket_path, slam):
        client = Client(lambda: DomainSocket(socket_path), backoff=QUICK)
        for number in range(50):
            client.send(message(number))
        assert client.flush(60)
        assert rounds >= 12
        assert client.stats().dropped == 0
        client.close()
    assert sorted(set(agent.numbers)) == list(range(50))


def test_an_agent_that_reads_some_and_restarts_rejects_no_record(socket_path: str) -> None:
    """Each time it takes a few records more before it goes."""
    numbers: list[int] = []
    rounds = 0

    def a_few(sock: Any) -> None:
        nonlocal rounds
        rounds += 1
        decoder = Decoder()
        taken = 0
        while taken < 3 and (data := sock.recv(100)):
            for frame in decoder.feed(data):
                if frame.tag == "AsmAuditCP":
                    numbers.append(frame.entries[0].body["CustomData"]["n"])
                    taken += 1
            gevent.sleep(0.001)
        gevent.sleep(0.01)

    with scripted(socket_path, a_few):
        client = Client(lambda: DomainSocket(socket_path), backoff=QUICK)
        for number in range(60):
            client.send(message(number))
        assert client.flush(60)
        assert rounds > 5
        assert client.stats().dropped == 0
        client.close()
    assert sorted(set(numbers)) == list(range(60))


def test_real_restarts_reject_no_record(folder: Path) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        client = Client(lambda: DomainSocket(receiver.where), backoff=QUICK)
        sending = gevent.spawn(lambda: [client.send(message(n), timeout=60) for n in range(5000)])
        for restart in range(8):
            receiver.pause()
            eventually(lambda: client.stats().in_flight > 0)
            receiver.end(signal.SIGTERM if restart % 2 else signal.SIGKILL)
            receiver.start()
        sending.get(timeout=60)
        assert client.flush(60)
        assert client.stats().dropped == 0
        client.close()
        receiver.end(signal.SIGTERM)  # so that all that it read is stored
        assert sorted(set(receiver.numbers())) == list(range(5000))


def test_a_frame_that_is_too_long_for_the_agent(socket_path: str) -> None:
    """The agent hangs up in the middle of the frame, as Fluent Bit does above its limit."""
    numbers: list[int] = []

    def limited(sock: Any) -> None:
        decoder = Decoder(max_frame_bytes=1 << 20)
        while data := sock.recv(65536):
            try:
                for frame in decoder.feed(data):
                    if frame.tag == "AsmAuditCP":
                        numbers.append(frame.entries[0].body["CustomData"]["n"])
            except FrameError:
                return

    with scripted(socket_path, limited):
        client = Client(lambda: DomainSocket(socket_path), backoff=QUICK, max_frame_bytes=8 << 20)
        client.send(message(1))
        client.send(message(2, caller_agent="x" * (4 << 20)))
        for number in (3, 4, 5):
            client.send(message(number))
        client.flush(60)
        assert client.stats().dropped == 1
        client.close()
    assert set(numbers) == {1, 3, 4, 5}


def test_the_socket_of_a_closed_agent_is_no_reader(socket_path: str) -> None:
    """Frames in a connection that was never accepted were not read."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen(8)
        connection = DomainSocket(socket_path)
        connection.write([b"x" * 100])
    with pytest.raises(ConnectionFailedError, match=r"reset|hung up") as caught:
        connection.wait_broken()
    assert not caught.value.agent_had_read
    connection.close()


@pytest.mark.parametrize("acks", [False, True], ids=["without acks", "with acks"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_an_agent_that_can_store_nothing_for_a_while_costs_no_record(folder: Path, kind: str, acks: bool) -> None:
    """The agent's disk is full: it reads, fails, and hangs up, again and again."""
    got: list[int] = []
    full = True

    def store(received: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        if hasattr(received.message, "record"):
            got.append(received.message.record.custom_data["n"])

    with Agent(str(folder / "s") if kind == "unix" else ("127.0.0.1", 0), store) as agent:

        def factory() -> DomainSocket | TCP:
            if isinstance(agent.address, str):
                return DomainSocket(agent.address, require_ack=acks)
            return TCP(agent.address, require_ack=acks)

        client = Client(factory, backoff=QUICK)
        for number in range(20):
            client.send(message(number))
        eventually(lambda: client.stats().connects > 15)
        full = False
        client.flush(60)
        stats = client.stats()
        assert stats.dropped == 0
        if acks:  # without, records that it read some time before it failed count as delivered
            assert sorted(set(got)) == list(range(20))
        client.close()


def test_an_agent_that_hangs_up_on_heartbeats_blames_no_record(socket_path: str) -> None:
    got: list[int] = []

    def no_heartbeats(sock: Any) -> None:
        decoder = Decoder()
        while data := sock.recv(65536):
            for frame in decoder.feed(data):
                if frame.tag == "AsmAuditHB":
                    return
                got.append(frame.entries[0].body["CustomData"]["n"])

    with scripted(socket_path, no_heartbeats):
        client = Client(lambda: DomainSocket(socket_path), backoff=QUICK)
        for number in range(20):
            client.send(message(number))
        eventually(lambda: set(got) == set(range(20)))
        assert client.flush(30)
        assert client.stats().dropped == 0
        client.close()
