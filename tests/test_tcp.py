"""TCP: every address of a name, dead peers, and the difference between agents that refuse and that take records."""

from __future__ import annotations

import ctypes
import datetime
import errno
import hashlib
import logging
import os
import re
import resource
import signal
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from gevent import socket, subprocess
from helpers import descriptors, eventually, greenlets, message, once

from geventaudit import (
    TCP,
    Backoff,
    BaseClient,
    Client,
    ConnectionFailedError,
    DomainSocket,
    NotificationKind,
)
from geventaudit.agent import Agent
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.handshake import AgentSide
from geventaudit.transport import connecting, unix
from geventaudit.transport.tcp import BLIND_SECONDS

QUICK = Backoff(initial=0.01, maximum=0.05)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str = "dual.test") -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name, "127.0.0.1").configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def port_of(agent: Agent) -> int:
    assert isinstance(agent.address, tuple)
    return agent.address[1]


@contextmanager
def serving(serve: Callable[[Any], None], host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Call *serve* with each connection of a server; yield its port."""
    made: list[Any] = []
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(64)

        def handle(sock: Any) -> None:
            with sock:
                try:
                    serve(sock)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                made.append(gevent.spawn(handle, listener.accept()[0]))

        accepting = gevent.spawn(accept)
        try:
            yield listener.getsockname()[1]
        finally:
            accepting.kill()
            gevent.killall(made)


def read_forever(sock: Any) -> None:
    while sock.recv(65536):
        pass


# -- every address of a name -------------------------------------------------------------------------------------------


@contextmanager
def hole(host: str, port: int) -> Iterator[None]:
    """A port that swallows SYNs, as a broken IPv6 route does: its backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(3):
            fill = stack.enter_context(socket.socket())
            fill.settimeout(0.0)
            fill.connect_ex((host, port))
        yield


@contextmanager
def named(*addresses: str) -> Iterator[None]:
    """Let ``dual.test`` have these addresses."""
    resolver = gevent.get_hub().resolver
    real = resolver.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **more: Any) -> Any:
        if host in ("dual.test", b"dual.test"):
            return [each for address in addresses for each in real(address, *rest, **more)]
        return real(host, *rest, **more)

    resolver.getaddrinfo = getaddrinfo
    try:
        yield
    finally:
        resolver.getaddrinfo = real


@pytest.mark.parametrize("timeout", [5.0, None])
@pytest.mark.parametrize("first", ["hole", "silent", "refused", "two holes", "hole and refused"])
@pytest.mark.parametrize("kind", ["plain", "tls", "key", "tls and key"])
def test_the_next_address_is_tried(kind: str, first: str, timeout: float | None, authority: trustme.CA) -> None:
    """The first swallows SYNs, or accepts and says nothing to TLS or to the handshake."""
    options: dict[str, Any] = {"ssl": client_context(authority)} if "tls" in kind else {}
    offers: dict[str, Any] = {"ssl": server_context(authority)} if "tls" in kind else {}
    if "key" in kind:
        options["shared_key"] = offers["shared_key"] = "key"
    before = (descriptors(), greenlets())
    with Agent(("127.0.0.1", 0), lambda received: None, **offers) as agent, ExitStack() as stack:
        port = port_of(agent)
        if "hole" in first:
            stack.enter_context(hole("127.0.0.2", port))
        elif first == "silent":
            if kind == "plain":
                pytest.skip("nothing is waited for there")
            stack.enter_context(serving(lambda sock: gevent.sleep(60), "127.0.0.2", port))
        if first == "two holes":
            stack.enter_context(hole("127.0.0.3", port))
        others = ["127.0.0.2", "127.0.0.3"] if " " in first else ["127.0.0.2"]
        with named(*others, "127.0.0.1"):
            began = time.monotonic()
            with TCP(("dual.test", port), timeout=timeout, **options) as connection:
                connection.write([encode(message(1), 0)])
                assert connection._sock.getpeername()[0] == "127.0.0.1"
                assert time.monotonic() - began < 4, "not after a timeout"
                eventually(lambda: agent.counts.messages == 1)
    eventually(lambda: (descriptors(), greenlets()) <= before, "the other attempts are over")


def test_all_addresses_within_the_timeout() -> None:
    before = (descriptors(), greenlets())
    with Agent(("127.0.0.1", 0), print) as agent, ExitStack() as stack:
        port = port_of(agent)
        for host in ("127.0.0.2", "127.0.0.3"):
            stack.enter_context(hole(host, port))
        with named("127.0.0.2", "127.0.0.3"):
            began = time.monotonic()
            with pytest.raises(ConnectionFailedError, match=r"not within 0\.6 seconds: it does not answer"):
                TCP(("dual.test", port), timeout=0.6)
            assert time.monotonic() - began < 3
    with named("127.0.0.2", "127.0.0.3"), pytest.raises(ConnectionFailedError, match="Connection refused"):
        TCP(("dual.test", port), timeout=5.0)
    eventually(lambda: (descriptors(), greenlets()) <= before)


def test_each_address_is_named_with_its_cause() -> None:
    with (
        serving(lambda sock: None) as port,
        named("127.0.0.2", "127.0.0.1"),
        pytest.raises(ConnectionFailedError) as caught,
    ):
        TCP(("dual.test", port), timeout=5.0, shared_key="key")
    text = str(caught.value)
    assert f"tcp:dual.test:{port}: 127.0.0.2: could not connect: Connection refused; 127.0.0.1: refused: " in text


def test_a_name_service_that_hangs_holds_one_thread() -> None:
    """The threads of gevent's pool are for the application too. The attempts after the first wait for its lookup."""
    hub = gevent.get_hub()
    real, asked = hub.resolver.getaddrinfo, list[Any]()
    reading, writing = os.pipe()

    def hang(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        hub.threadpool.apply(os.read, (reading, 1))
        raise socket.gaierror(-3, "no answer")

    hub.resolver.getaddrinfo = hang
    try:
        for _ in range(2 * hub.threadpool.maxsize):
            with pytest.raises(ConnectionFailedError, match="not within"):
                TCP(("slow.test", 9), timeout=0.05)
        assert len(asked) == 1
        (lookup,) = connecting._lookups.values()
        gevent.spawn(lookup.kill)
        with pytest.raises(ConnectionFailedError, match="the lookup of the name was interrupted"):
            TCP(("slow.test", 9), timeout=None)
        gevent.spawn(os.write, writing, b"xx")
        with pytest.raises(ConnectionFailedError, match="no answer"):
            TCP(("slow.test", 9), timeout=None)
        assert len(asked) == 2
    finally:
        hub.resolver.getaddrinfo = real
        os.write(writing, bytes(99))
        eventually(lambda: not connecting._lookups)
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("interruption", [gevent.Timeout(1), gevent.GreenletExit(), ValueError("interrupted")])
def test_an_interrupted_attempt_leaves_nothing(interruption: BaseException) -> None:
    before = (descriptors(), greenlets())
    with (
        serving(lambda sock: gevent.sleep(60)) as port,
        serving(lambda sock: gevent.sleep(60), "127.0.0.2", port),
        named("127.0.0.2", "127.0.0.1"),
    ):
        connecting = gevent.spawn(TCP, ("dual.test", port), shared_key="key")
        gevent.sleep(0.4)
        connecting.kill(interruption)
        assert connecting.ready()
    eventually(lambda: (descriptors(), greenlets()) <= before)


def test_families_take_turns() -> None:
    with named("::1", "::2", "127.0.0.1", "127.0.0.2"):
        found = [address[0] for _, address in connecting._addresses("dual.test", 5)]
    assert found == ["::1", "127.0.0.1", "::2", "127.0.0.2"]


# -- dead peers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write_timeout", "seconds"), [(None, 60), (15.0, 15), (100.0, 60), (float("inf"), 60), (30, 30), (0.01, 1)]
)
def test_the_kernel_watches_the_far_side(write_timeout: float | None, seconds: int) -> None:
    if write_timeout == float("inf"):
        with pytest.raises(ValueError, match="write_timeout"):
            TCP(("127.0.0.1", 1), write_timeout=write_timeout)
        return
    with serving(read_forever) as port, TCP(("127.0.0.1", port), write_timeout=write_timeout) as connection:
        sock = connection._sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        user_timeout, idle, interval = (
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL")
        )
        assert user_timeout == seconds * 1000
        assert idle + interval <= max(seconds, 2)
        assert seconds % interval == 0 or seconds < 60, "a probe is due when a minute is over"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_a_half_open_connection_is_noticed(idle: bool, tls: bool, authority: trustme.CA) -> None:
    """The far side drops every segment: no end, no reset."""
    context = server_context(authority) if tls else None
    with Agent(("127.0.0.1", 0), lambda received: None, ssl=context) as agent:
        connection = TCP(
            ("127.0.0.1", port_of(agent)), write_timeout=1.0, ssl=client_context(authority) if tls else None
        )
        with connection:
            eventually(lambda: agent._connections)
            drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
            there = next(iter(agent._connections.values())).sock
            there.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(drop)))  # SO_ATTACH_FILTER
            if not idle:
                connection.write([encode(message(1), 0)])
            with pytest.raises(ConnectionFailedError, match=r"broke: .*timed out|hung up"):
                gevent.spawn(connection.wait_broken).get(timeout=30)
            assert connection.delivered() == 0


# -- refused by a living agent -----------------------------------------------------------------------------------------


def late_helo(seconds: float) -> Callable[[Any], None]:
    def serve(sock: Any) -> None:
        gevent.sleep(seconds)
        sock.sendall(msgpack.packb(["HELO", {"nonce": b"x" * 16, "auth": b"", "keepalive": True}]))
        read_forever(sock)

    return serve


def byte_by_byte(words: bytes) -> Callable[[Any], None]:
    def serve(sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in words:
            sock.sendall(bytes([byte]))
            gevent.sleep(0.002)
        read_forever(sock)

    return serve


REFUSALS = {
    "HELO after 0.3 s": (late_helo(0.3), "asks for a shared key"),
    "HELO after 0.7 s": (late_helo(0.7), "asks for a shared key"),
    "HELO in pieces": (byte_by_byte(b"\x92\xa4HELO\x80"), "asks for a shared key"),
    "HELO as str 8": (byte_by_byte(b"\xdc\x00\x02\xd9\x04HELO\x80"), "asks for a shared key"),
    "a TLS alert": (byte_by_byte(b"\x15\x03\x03\x00\x02\x02\x46"), "speaks TLS"),
    "HTTP": (byte_by_byte(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "answers in HTTP"),
    "a hang-up with something unread": (lambda sock: gevent.sleep(0.05), "Connection reset"),
    "a hang-up at once": (lambda sock: None, r"hung up|reset|Broken pipe"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_nothing_counts_that_a_living_agent_refused(name: str) -> None:
    serve, words = REFUSALS[name]
    with serving(serve) as port:
        client = Client(lambda: TCP(("127.0.0.1", port)), backoff=QUICK)
        for number in range(100):
            client.send(message(number))
            gevent.sleep(0.002)
        lost = next(each for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST)
        assert client.flush(1.0) is False
        assert client.stats().delivered == 0
        assert len(client.close(timeout=0)) == 100
    assert re.search(words, str(lost.error)), lost


@pytest.mark.parametrize("key", [False, True], ids=["client certificate wanted", "key wanted"])
def test_nothing_counts_over_tls_that_a_living_agent_refused(key: bool, authority: trustme.CA) -> None:
    """With TLS 1.3, the client's side is ready before the agent has looked for its certificate."""
    context = server_context(authority)
    options: dict[str, Any] = {"shared_key": "key"} if key else {}
    if not key:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    trusting = client_context(authority)
    with Agent(("127.0.0.1", 0), print, ssl=context, **options) as agent:
        client = Client(lambda: TCP(("127.0.0.1", port_of(agent)), ssl=trusting), backoff=QUICK)
        for number in range(100):
            client.send(message(number))
            gevent.sleep(0.005)
        assert client.flush(0.5) is False
        assert client.stats().delivered == 0
        assert len(client.close(timeout=0)) == 100
        # An agent that closes with something unread may not have sent its last words.
        lost = [str(each.error) for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST]
        assert any(("shared key" if key else "client certificate") in each for each in lost), lost


def test_plain_text_to_a_tls_port(authority: trustme.CA) -> None:
    with Agent(("127.0.0.1", 0), print, ssl=server_context(authority)) as agent:
        client = Client(lambda: TCP(("127.0.0.1", port_of(agent))), backoff=QUICK)
        for number in range(100):
            client.send(message(number))
            gevent.sleep(0.005)
        lost = next(each for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST)
        assert "TLS" in str(lost.error)
        assert client.stats().delivered == 0
        assert len(client.close(timeout=0)) == 100


def test_flush_waits_for_the_first_second() -> None:
    with Agent(("127.0.0.1", 0), lambda received: None) as agent, Client(lambda: TCP(agent.address)) as client:  # type: ignore[arg-type]
        client.connect()
        began = time.monotonic()
        client.send(message(1))
        assert client.flush(0.2) is False
        assert client.flush(30)
        assert time.monotonic() - began > BLIND_SECONDS / 2
        client.send(message(2))
        began = time.monotonic()
        assert client.flush(30)
        assert time.monotonic() - began < BLIND_SECONDS / 2, "only the first"


@pytest.mark.parametrize("base", [False, True], ids=["Client", "BaseClient"])
def test_best_effort_is_said_once(base: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "geventaudit"), Agent(("127.0.0.1", 0), lambda received: None) as agent:
        address: Any = agent.address
        for acks in (False, True):
            caplog.clear()
            client: Any = (
                BaseClient(TCP(address, require_ack=acks))
                if base
                else Client(lambda acks=acks: TCP(address, require_ack=acks), backoff=QUICK)
            )
            kinds: list[NotificationKind] = []
            for restart in range(3):
                client.send(message(restart))
                assert client.flush(30)
                if base:
                    client.reset(TCP(address, require_ack=acks))
                else:
                    agent.restart()
            client.close()
            kinds = [each.kind for each in client.notify()]
            said = [each for each in caplog.messages if "TCP without require_ack is best effort" in each]
            assert kinds.count(NotificationKind.BEST_EFFORT) == len(said) == (0 if acks else 1)


def test_best_effort_is_not_said_of_unix_sockets(socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    with Agent(socket_path, lambda received: None), Client(lambda: DomainSocket(socket_path)) as client:
        client.send(message(1))
        assert client.flush(30)
    assert "best effort" not in caplog.text


# -- the error names the likely mistake --------------------------------------------------------------------------------


def hangs_up_on_ping(sock: Any) -> None:
    sock.sendall(AgentSide("agent", "key", None).helo())
    sock.recv(4096)


KEY: dict[str, Any] = {"shared_key": "another", "timeout": 2.0}
LOOKS: dict[str, tuple[Callable[[Any], None] | dict[str, Any], dict[str, Any], str]] = {
    "wrong key": ({"shared_key": "key"}, KEY, "refused: the agent refuses: shared_key mismatch"),
    "wrong key, hung up on": (hangs_up_on_ping, KEY, "hung up on the PING: the shared key, user or password may be"),
    "key, plain port": (
        {},
        KEY,
        r"sends no HELO: it looks like an agent that asks for no shared key \(leave shared_key",
    ),
    "key, silent port": (lambda sock: gevent.sleep(60), KEY, "sends no HELO: it looks like an agent that asks for no"),
    "key, TLS port": ({"ssl": True}, KEY, r"sends no HELO, and speaks TLS \(TCP\(\.\.\., ssl=\.\.\.\)\)"),
    "key, web server": (lambda sock: sock.sendall(b"HTTP/1.1 400 No\r\n"), KEY, "refused: .* HTTP"),
    "key, TLS, no key": ({"ssl": True}, {**KEY, "ssl": True}, "sends no HELO: it looks like an agent that asks for no"),
    "users, none given": ({"shared_key": "key", "users": {"a": "b"}}, {"shared_key": "key"}, "give username and passw"),
    "TLS, silent port": (read_forever, {"ssl": True, "timeout": 0.5}, "TLS handshake: it looks like an agent that sp"),
    "TLS, plain port": ({}, {"ssl": True}, "could not connect: .*speaks no TLS"),
    "TLS, HELO": ({"shared_key": "key"}, {"ssl": True}, "could not connect: .*speaks no TLS"),
    "TLS, reset": (lambda sock: None, {"ssl": True}, "could not connect: .*speaks no TLS"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_error_names_the_likely_mistake(name: str, authority: trustme.CA) -> None:
    there, options, words = LOOKS[name]
    options = {"timeout": 5.0, **options}
    if options.get("ssl"):
        options["ssl"] = client_context(authority)
    with ExitStack() as stack:
        if callable(there):
            port = stack.enter_context(serving(there))
        else:
            offers = {**there, "ssl": server_context(authority) if there.get("ssl") else None}
            port = port_of(stack.enter_context(Agent(("127.0.0.1", 0), print, **offers)))
        began = time.monotonic()
        with pytest.raises(ConnectionFailedError, match=words):
            TCP(("127.0.0.1", port), **options)
        assert time.monotonic() - began < 10


# -- shared key without a user -----------------------------------------------------------------------------------------


class SaltingAgent(AgentSide):
    """An agent like Fluent Bit: its HELO has a salt for users even if it has none."""

    def __init__(self) -> None:
        super().__init__("fluent-bit", "key", None)
        self._auth = os.urandom(16)
        self.pings: list[Any] = []

    def __call__(self, sock: Any) -> None:
        sock.sendall(self.helo())
        ping = msgpack.unpackb(sock.recv(4096))
        self.pings.append(ping)
        pong, refused = self.pong(ping)
        assert not refused
        assert ping[4:] == ["", hashlib.sha512(self._auth).hexdigest()], "an empty user, and its digest"
        sock.sendall(pong)
        read_forever(sock)


def test_a_key_without_a_user() -> None:
    agent = SaltingAgent()
    with serving(agent) as port, TCP(("127.0.0.1", port), shared_key="key", timeout=5):
        assert len(agent.pings) == 1


# -- no descriptor, no memory, no family -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAFNOSUPPORT])
def test_no_socket_to_be_had(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def new_socket(family: int) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(unix, "new_socket", new_socket)
    monkeypatch.setattr(connecting, "new_socket", new_socket)
    for connect, where in (
        (lambda: DomainSocket("/run/a.sock"), "unix:/run/a.sock"),
        (lambda: DomainSocket("/run/a.sock", strict=True, peer_uid=0), "unix:/run/a.sock"),
        (lambda: TCP(("127.0.0.1", 9)), "tcp:127.0.0.1:9"),
        (lambda: TCP(("localhost", 9)), "tcp:localhost:9"),
    ):
        with pytest.raises(ConnectionFailedError, match=f"{where}: could not connect: {os.strerror(code)}") as caught:
            connect()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == code


def test_at_the_limit_of_descriptors(socket_path: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    with Agent(socket_path, print), Client(lambda: DomainSocket(socket_path), backoff=QUICK) as client:
        gevent.get_hub().resolver  # noqa: B018  # its import needs descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 20, hard))
        try:
            while True:
                try:
                    held.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    break
            for connect in (lambda: DomainSocket(socket_path), lambda: TCP(("127.0.0.1", 9))):
                with pytest.raises(ConnectionFailedError, match="could not connect: Too many open files"):
                    connect()
            client.send(message(1))
            eventually(lambda: client.stats().connect_failures > 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in held:
                os.close(each)
        assert client.flush(30), "it goes on when there are descriptors again"


# -- SIGPIPE -----------------------------------------------------------------------------------------------------------

SIGPIPE_PROGRAM = """
import signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
import gevent
from gevent import socket
import geventaudit as ga
from geventaudit.agent import Agent
sys.path.insert(0, sys.argv[2])
from helpers import message
kind = sys.argv[1]

def closing(listener, greet=b"", reads=0):
    while True:
        sock, _ = listener.accept()
        if greet:
            sock.sendall(greet)
        if reads:
            sock.recv(reads)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
        sock.close()

if kind == "agent":
    # Senders that go before their acknowledgements come.
    with Agent(("127.0.0.1", 0), lambda received: gevent.sleep(0.02)) as agent:
        for number in range(20):
            connection = ga.TCP(agent.address, require_ack=True, batch_records=1)
            from geventaudit.encoder.encoding import encode
            connection.write([encode(message(number), 0)] * 5)
            connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
            connection.close()
        gevent.sleep(0.5)
elif kind == "agent handshake":
    with Agent(("127.0.0.1", 0), print, shared_key="key") as agent:
        for _ in range(20):
            with socket.create_connection(agent.address) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
        gevent.sleep(0.5)
else:
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    listener = socket.socket(family)
    listener.bind("" if kind == "unix" else ("127.0.0.1", 0))
    listener.listen(50)
    address = listener.getsockname()
    address = address.decode() if isinstance(address, bytes) else address
    helo = __import__("msgpack").packb(["HELO", {"nonce": b"n", "auth": b""}])
    gevent.spawn(closing, listener, helo if kind == "handshake" else b"", 0 if kind == "handshake" else 2000)
    def factory():
        if kind == "handshake":
            return ga.TCP(address, shared_key="key", timeout=2)
        return ga.DomainSocket(address) if kind == "unix" else ga.TCP(address)
    client = ga.Client(factory, backoff=ga.Backoff(initial=0.005, maximum=0.01))
    with gevent.Timeout(2, False):
        number = 0
        while True:
            try:
                client.send(message(number))
            except ga.QueueFullError:
                pass
            number += 1
            gevent.sleep(0.0005)
    client.close(0)
print("alive")
"""


@once
@pytest.mark.parametrize("kind", ["unix", "tcp", "handshake", "agent", "agent handshake"])
def test_sigpipe_at_its_default(kind: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SIGPIPE_PROGRAM, kind, str(HERE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, b"alive\n"), (signal.Signals(-process.returncode), errors[-2000:])


# -- certificates that change ------------------------------------------------------------------------------------------


def test_a_certificate_that_expires_between_connections() -> None:
    authority = trustme.CA()
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", not_after=soon).configure_cert(context)
    trusting = client_context(authority)
    with Agent(("127.0.0.1", 0), print, ssl=context) as agent:
        TCP(("127.0.0.1", port_of(agent)), ssl=trusting).close()
        gevent.sleep(max((soon - datetime.datetime.now(datetime.UTC)).total_seconds(), 0) + 1.1)
        with pytest.raises(ConnectionFailedError, match="certificate has expired"):
            TCP(("127.0.0.1", port_of(agent)), ssl=trusting)


@pytest.mark.parametrize("how", ["a context for each connection", "load_verify_locations"])
def test_an_authority_that_changes_between_connections(how: str, folder: Path) -> None:
    """The file is rewritten while the client runs; no new client, no restart."""
    old, new = trustme.CA(), trustme.CA()
    file = folder / "ca.crt"
    old.cert_pem.write_to_path(str(file))
    lasting = ssl.create_default_context(cafile=str(file))

    def factory() -> TCP:
        if how == "load_verify_locations":
            lasting.load_verify_locations(cafile=str(file))
            return TCP(address, ssl=lasting, require_ack=True)
        return TCP(address, ssl=ssl.create_default_context(cafile=str(file)), require_ack=True)

    agent = Agent(("127.0.0.1", 0), lambda received: None, ssl=server_context(old)).start()
    address = ("127.0.0.1", port_of(agent))
    with Client(factory, backoff=QUICK) as client:
        client.send(message(1))
        assert client.flush(30)
        agent.stop()
        agent = Agent(address, lambda received: None, ssl=server_context(new)).start()
        client.send(message(2))
        eventually(lambda: client.stats().connect_failures)
        assert client.flush(0.2) is False, "it does not know the new authority"
        new.cert_pem.write_to_path(str(file))
        assert client.flush(30)
    agent.stop()
