"""The ends of connections: agents that close after each message, answers that lie in the socket, agents without end."""

from __future__ import annotations

import gc
import random
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from gevent import socket, subprocess
from helpers import eventually, first_arrivals, message

from geventaudit import TCP, Backoff, BaseClient, Client, ConnectionFailedError, DomainSocket, FrameError
from geventaudit.delivery.quarantine import ENDS, Disconnect, Quarantine, Step
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.acks import MAX_STRANGERS, AckWindow, ack_of
from geventaudit.transport import release

QUICK = Backoff(initial=0.01, maximum=0.05)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Place:
    """The address of an agent of a kind, and the connection to it."""

    def __init__(self, kind: str, folder: Path, authority: trustme.CA) -> None:
        self.server: Any = None
        self.client: Any = None
        self.listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        self.listener.bind(str(folder / "s") if kind == "unix" else ("127.0.0.1", 0))
        self.listener.listen(64)
        if kind == "tls":
            self.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            authority.issue_cert("127.0.0.1").configure_cert(self.server)
            self.client = ssl.create_default_context()
            authority.configure_trust(self.client)

    def accept(self) -> Any:
        sock, _ = self.listener.accept()
        if self.server is None:
            return sock
        from gevent.ssl import SSLSocket

        return SSLSocket(sock=sock, server_side=True, do_handshake_on_connect=False, _context=self.server)

    def connect(self, **options: Any) -> DomainSocket | TCP:
        address = self.listener.getsockname()
        if isinstance(address, str):
            return DomainSocket(address, **options)
        return TCP(address, ssl=self.client, **options)


@pytest.fixture(params=["unix", "tcp", "tls"])
def place(request: pytest.FixtureRequest, folder: Path, authority: trustme.CA) -> Iterator[Place]:
    place = Place(request.param, folder, authority)
    yield place
    place.listener.close()


@contextmanager
def serving(place: Place, serve: Callable[[Any], None]) -> Iterator[list[Any]]:
    made: list[Any] = []

    def handle(sock: Any) -> None:
        with sock:
            try:
                if place.server is not None:
                    sock.do_handshake()
                serve(sock)
            except OSError:
                pass

    def accept() -> None:
        while True:
            made.append(gevent.spawn(handle, place.accept()))

    accepting = gevent.spawn(accept)
    try:
        yield made
    finally:
        accepting.kill()
        gevent.killall(made)


def numbers_in(frames: list[Any]) -> list[int]:
    return [
        body["CustomData"]["n"]
        for _, entries, *_ in frames
        for _, body in entries
        if body.get("CustomData") is not None
    ]


# -- agents that close after each message ------------------------------------------------------------------------------


class OneShot:
    """An agent that closes: after each read that holds a frame (``read``), after exactly one frame (``frame``), a while
    after its first (``late``), after every second read that holds one, over all connections (``second``), or not."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.numbers: list[int] = []
        self.reads = 0

    def __call__(self, sock: Any) -> None:
        unpacker = msgpack.Unpacker(strict_map_key=False)
        while data := sock.recv(1 if self.how == "frame" else 65536):
            unpacker.feed(data)
            frames = list(unpacker)
            self.numbers += numbers_in(frames)
            for _, _, option in frames:
                if "chunk" in option:
                    sock.sendall(ack_of(option["chunk"]))
            if frames:
                if self.how == "late":
                    gevent.sleep(0.02)
                self.reads += 1
                if self.how in ("read", "frame", "late") or (self.how == "second" and not self.reads % 2):
                    return


@pytest.mark.parametrize("acks", [False, True], ids=["no acks", "acks"])
@pytest.mark.parametrize("how", ["read", "frame", "late", "second"])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_an_agent_that_closes_after_each_message(
    place: Place, how: str, count: int, acks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geventaudit.transport.tcp.BLIND_SECONDS", 0.3)  # up to 20 of them are waited for
    agent = OneShot(how)
    with serving(place, agent):
        client = Client(lambda: place.connect(require_ack=acks, batch_records=1), backoff=QUICK)
        for number in range(count):
            client.send(message(number))
        assert client.flush(60), client.stats()
        stats = client.stats()
        assert (stats.delivered, stats.dropped) == (count, 0)
        assert client.close() == []
    assert set(agent.numbers) == set(range(count))
    assert max(agent.numbers.count(number) for number in range(count)) < 20, "not again and again"


def test_records_that_come_one_by_one(place: Place) -> None:
    agent = OneShot("read")
    with serving(place, agent), Client(lambda: place.connect(), backoff=QUICK) as client:
        for number in range(20):
            client.send(message(number))
            gevent.sleep(0.05)
        assert client.flush(60)
        assert set(agent.numbers) == set(range(20))
        assert len(agent.numbers) < 20 + 4 * ENDS, "once it is known, each arrives once"


def test_an_agent_that_is_healthy_again(place: Place) -> None:
    agent = OneShot("read")
    with serving(place, agent), Client(lambda: place.connect(), backoff=QUICK, heartbeat_interval=0.05) as client:
        for number in range(10):
            client.send(message(number))
        assert client.flush(60)
        agent.how = "not"
        for number in range(10, 300):
            client.send(message(number))
        assert client.flush(60)
        eventually(lambda: client.stats().heartbeats > 3)
        connects = client.stats().connects
        for number in range(300, 400):
            client.send(message(number))
        assert client.flush(60)
        assert client.stats().connects == connects
    assert set(agent.numbers) == set(range(400))


@pytest.mark.parametrize("recovers", [False, True])
def test_a_base_client_gets_further_too(place: Place, recovers: bool) -> None:
    agent = OneShot("read")
    with serving(place, agent), BaseClient(place.connect()) as client:
        for number in range(5):
            client.send(message(number))
        for _ in range(60):
            eventually(lambda: client.error is not None or client.stats().delivered >= 5)
            if client.stats().delivered >= 5:
                break
            again = client.recover() if recovers else []
            client.reset(place.connect())
            for each in again:
                client.send(each)
        else:
            pytest.fail(f"{client.stats()}")
    assert set(agent.numbers) == set(range(5))


def test_an_end_in_order_reports_the_frames_read(place: Place) -> None:
    connection = gevent.spawn(place.connect)
    agent = place.accept()
    if place.server is not None:
        agent.do_handshake()
    with connection.get(timeout=10) as client, agent:
        frame = encode(message(1), 0)
        client.write([frame] * 3)
        left = 3 * len(frame)
        while left:
            left -= len(agent.recv(left))
        agent.close()
        with pytest.raises(ConnectionFailedError, match="hung up") as caught:
            client.wait_broken()
        # All of a TLS record is read at once, and the agent may have read only the first frame of it.
        assert caught.value.frames_read == (1 if place.server else 3)
        assert caught.value.agent_had_read


@pytest.mark.parametrize("case", ["a part unread", "it had said something", "acks"])
def test_no_end_in_order(place: Place, case: str) -> None:
    connection = gevent.spawn(place.connect, require_ack=case == "acks")
    agent = place.accept()
    if place.server is not None:
        agent.do_handshake()
    with connection.get(timeout=10) as client, agent:
        frame = encode(message(1), 0)
        client.write([frame] * 3)
        unread = 10 if case == "a part unread" else 0
        agent.recv(10_000 if not unread else 3 * len(frame) - unread)
        if place.server is not None and unread:
            client.write([frame])  # the kernel does not count decrypted, unread bytes
        if case == "it had said something":
            agent.sendall(b"\xc0")
        agent.close()
        with pytest.raises(ConnectionFailedError) as caught:
            client.wait_broken()
        assert caught.value.frames_read == 0


def end(quarantine: Quarantine, first: object, read: int = 1, delivered: int = 0, in_flight: int = 1) -> None:
    quarantine.on_disconnect(Disconnect(first, in_flight, delivered, bool(read), read))


def test_ends_are_trusted_after_so_many_in_a_row() -> None:
    for breaks in ("nothing", "reset", "delivered", "away"):
        quarantine = Quarantine()
        for number in range(ENDS - 1):
            quarantine.on_connect(number)
            end(quarantine, "a")
            assert not quarantine.trusts_ends
        if breaks == "reset":
            end(quarantine, "a", read=0)
        elif breaks == "delivered":
            quarantine.on_delivered(0.0)
        quarantine.on_connect(10.0, failed_attempts=breaks == "away")
        end(quarantine, "a")
        assert quarantine.trusts_ends is (breaks == "nothing"), breaks


def trusting() -> Quarantine:
    quarantine = Quarantine()
    for number in range(ENDS):
        quarantine.on_connect(number)
        end(quarantine, "a")
    assert quarantine.trusts_ends
    assert not quarantine.allows_heartbeats
    return quarantine


def test_more_and_more_at_once_while_ends_are_trusted() -> None:
    quarantine = trusting()
    sizes = []
    for number in range(100):
        quarantine.on_connect(number)
        assert quarantine.next_step(0, 1000, number) is (Step.ONE if quarantine.some == 1 else Step.SOME)
        sizes.append(quarantine.some)
        quarantine.on_written(Step.SOME, quarantine.some)
        assert quarantine.next_step(quarantine.some, 1000, number) is Step.NOTHING
        end(quarantine, "a", read=quarantine.some)
        quarantine.on_delivered(number, quarantine.some)  # as the sender settles the records that were read
    assert sizes[:16] == [1] * 16
    assert sizes[-1] > 100
    most = quarantine.some
    quarantine.on_connect(200)
    end(quarantine, "a", read=0, in_flight=most)
    assert quarantine.trusts_ends, "the agent reads less before it ends a connection"
    assert quarantine.some == most // 2
    while quarantine.some > 1:
        end(quarantine, "a", read=0)
    end(quarantine, "a", read=0)
    assert not quarantine.trusts_ends, "nor is one read"


def test_a_connection_that_stays_open_ends_the_trust() -> None:
    quarantine = trusting()
    quarantine.on_connect(10.0)
    quarantine.on_written(quarantine.next_step(0, 5, 10.0), 1)
    quarantine.on_delivered(10.1)
    assert quarantine.next_step(0, 4, 10.1) is Step.NOTHING
    assert quarantine.seconds_to_wait(10.1) == pytest.approx(0.2)
    assert quarantine.next_step(0, 4, 10.31) is Step.BATCH
    assert not quarantine.trusts_ends
    assert quarantine.allows_heartbeats


# -- answers that lie in the socket ------------------------------------------------------------------------------------


def acked_and_gone(place: Place, client: Any, agent: Any, answer: Callable[[list[str]], bytes], count: int) -> None:
    """Let the agent take *count* frames, answer, and close with something unread. Nothing of it is read here yet."""
    unpacker = msgpack.Unpacker(strict_map_key=False)
    chunks: list[str] = []
    while len(chunks) < count:
        unpacker.feed(agent.recv(65536))
        chunks += [option["chunk"] for _, _, option in unpacker]
    client.write([encode(message(99), 0)])  # stays unread
    agent.sendall(answer(chunks))
    gevent.sleep(0.02)


@pytest.mark.parametrize("end_by", ["write", "close", "release", "kill", "wait_broken", "write timeout"])
@pytest.mark.parametrize("garbage", [b"", b"HTTP"])
def test_acknowledgements_in_the_socket_count(place: Place, end_by: str, garbage: bytes) -> None:
    connecting = gevent.spawn(place.connect, require_ack=True, batch_records=1, write_timeout=0.3)
    agent = place.accept()
    if place.server is not None:
        agent.do_handshake()
    client = connecting.get(timeout=10)
    if place.listener.family == socket.AF_INET:
        agent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, agent:
        client.write([encode(message(number), 0) for number in range(50)])
        acked_and_gone(place, client, agent, lambda chunks: b"".join(map(ack_of, chunks)) + garbage, 50)
        assert client.delivered() == 0
        big = encode(message(100, caller_agent="x" * 1_000_000), 0)
        if end_by in ("write", "wait_broken", "close", "release"):
            agent.close()
            gevent.sleep(0.02)
        if end_by == "write":
            with pytest.raises(ConnectionFailedError):  # noqa: PT012
                for _ in range(10):
                    client.write([big])
                    gevent.sleep(0.01)
        elif end_by == "write timeout":
            with pytest.raises(ConnectionFailedError, match="took nothing"):
                client.write([big] * 16)
        elif end_by == "kill":
            writing = gevent.spawn(client.write, [big] * 16)
            gevent.sleep(0.02)
            writing.kill()
        elif end_by == "wait_broken":
            with pytest.raises(ConnectionFailedError):
                client.wait_broken()
        elif end_by == "close":
            client.close()
        else:
            release(client)
            client._sock.close()
        assert client.delivered() == 50


def test_few_arrive_twice_when_the_agent_pauses(place: Place) -> None:
    """Like Fluent Bit with a full buffer: acknowledge taken records, and close connections with unread data."""
    numbers: list[int] = []

    def serve(sock: Any) -> None:
        if place.listener.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        unpacker = msgpack.Unpacker(strict_map_key=False)
        most = len(numbers) + random.randint(500, 1500)
        while data := sock.recv(16384):
            unpacker.feed(data)
            frames = list(unpacker)
            numbers.extend(numbers_in(frames))
            sock.sendall(b"".join(ack_of(option["chunk"]) for _, _, option in frames))
            if len(numbers) > most:
                return

    with serving(place, serve) as made, Client(lambda: place.connect(require_ack=True), backoff=QUICK) as client:
        for number in range(6000):
            client.send(message(number), timeout=60)
        assert client.flush(60)
        assert len(made) > 2
    assert first_arrivals(numbers) == list(range(6000))
    assert len(numbers) - 6000 < 300 * len(made), "no more than the records of an acknowledgement for each connection"


def test_acknowledgements_before_an_error_count() -> None:
    window = AckWindow(batch_records=1)
    unpacker = msgpack.Unpacker()
    unpacker.feed(window.written([encode(message(1), 0), encode(message(2), 0)], 0.0))
    first, second = (option["chunk"] for _, _, option in unpacker)
    with pytest.raises(FrameError):
        window.feed(ack_of(first) + ack_of(second) + b"\xc1")
    assert window.delivered == 2


def test_an_agent_that_acknowledges_only_strangers() -> None:
    window = AckWindow(batch_records=1)
    (_, _, option) = msgpack.unpackb(window.written([encode(message(1), 0)], 0.0))
    window.feed(ack_of("x") * MAX_STRANGERS)
    window.feed(ack_of(option["chunk"]))
    window.feed(ack_of("x") * MAX_STRANGERS)
    with pytest.raises(FrameError, match="acknowledgements in a row"):
        window.feed(ack_of(option["chunk"]))


# -- agents without end ------------------------------------------------------------------------------------------------

FLOOD = """
import socket, sys
kind, where, words = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])
listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
listener.bind(where if kind == "unix" else ("127.0.0.1", 0))
listener.listen(8)
print(listener.getsockname()[1] if kind == "tcp" else 0, flush=True)
import threading
def flood(sock):
    try:
        while True:
            sock.sendall(words * 1000)
    except OSError:
        pass
while True:
    threading.Thread(target=flood, args=(listener.accept()[0],), daemon=True).start()
"""


@pytest.mark.parametrize("kind", ["unix", "tcp", "handshake"])
@pytest.mark.parametrize("acks", [False, True])
@pytest.mark.parametrize("words", [b"\x81\xa3ack\xa1x", b"\xc0", b"\x91"], ids=["acks", "nil", "nesting"])
def test_an_agent_that_sends_without_end(kind: str, acks: bool, words: bytes, folder: Path) -> None:
    path = str(folder / "flood")
    agent: Any = subprocess.Popen(
        [sys.executable, "-c", FLOOD, kind.replace("handshake", "tcp"), path, words.hex()], stdout=subprocess.PIPE
    )
    port = int(agent.stdout.readline())

    def factory() -> DomainSocket | TCP:
        if kind == "unix":
            return DomainSocket(path, require_ack=acks)
        return TCP(("127.0.0.1", port), require_ack=acks, shared_key="key" if kind == "handshake" else None)

    client = Client(factory, backoff=Backoff(0.2, 0.5))
    try:
        client.send(message(1))
        gevent.sleep(0.05)
        gc.collect()
        gaps = []
        last = begun = time.monotonic()
        # A hub that is held has few gaps, each of them long.
        while last < begun + 1.5 and len(gaps) < 100:
            gevent.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now
    finally:
        client.close(0)
        agent.kill()
        agent.wait()
        agent.stdout.close()
    gaps.sort()
    # A busy machine may stand still now and then; a hub that is held would do nothing else.
    assert len(gaps) > 40, gaps[-5:]
    assert gaps[int(len(gaps) * 0.9)] < 0.1, gaps[-5:]
