"""Checks of the peer: by the client, by the agent, and the effect of hostile peers on an agent."""

from __future__ import annotations

import gzip
import logging
import os
import resource
import ssl
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
import trustme
from gevent import socket, subprocess
from gevent.event import Event
from helpers import eventually, message, once

from geventaudit import TCP, Backoff, Client, ConnectionFailedError, DomainSocket, Msg
from geventaudit.agent import Agent, Received
from geventaudit.encoder.encoding import bundle, encode

QUICK = Backoff(initial=0.01, maximum=0.05)
KEY, PASSWORD = "the-secret-key-of-this-test", "the-secret-password-of-this-test"


def numbers_of(got: list[Received]) -> list[int]:
    return [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)]


# -- Unix sockets ------------------------------------------------------------------------------------------------------


def test_an_agent_of_the_right_user(socket_path: str, got: list[Received]) -> None:
    with Agent(socket_path, got.append):
        DomainSocket(socket_path, peer_uid=os.getuid()).close()
        with pytest.raises(ConnectionFailedError, match=f"refused: the agent runs as user {os.getuid()}, not 4711"):
            DomainSocket(socket_path, peer_uid=4711)


def test_a_directory_that_all_users_can_write_to_is_refused(folder: Path, got: list[Received]) -> None:
    inner = folder / "inner"
    inner.mkdir()
    path = str(inner / "s")
    with Agent(path, got.append):
        DomainSocket(path, strict=True).close()
        for open_to_all in (inner, folder):
            open_to_all.chmod(0o777)
            with pytest.raises(ConnectionFailedError, match=f"all users can write to {open_to_all},"):
                DomainSocket(path, strict=True)
            DomainSocket(path).close()
            open_to_all.chmod(0o1777)
            DomainSocket(path, strict=True).close()
            open_to_all.chmod(0o700)


@pytest.mark.parametrize("target", ["{safe}", "../safe", "{safe}/agent.sock", "../safe/agent.sock", "link"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_in_a_directory_of_all_users_is_refused(
    target: str, relative: bool, folder: Path, got: list[Received], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target of the link is safe, but every user can replace the link."""
    safe, open_to_all = folder / "safe", folder / "open"
    safe.mkdir()
    open_to_all.mkdir()
    link = open_to_all / ("agent.sock" if target.endswith("sock") else "link")
    link.symlink_to(target.format(safe=safe))
    path = str(link if target.endswith("sock") else link / "agent.sock")
    if relative:
        monkeypatch.chdir(safe)
        path = os.path.join("..", os.path.relpath(path, folder))
    with Agent(str(safe / "agent.sock"), got.append):
        if target == "link":
            with pytest.raises(ConnectionFailedError, match="could not connect: Too many levels of symbolic links"):
                DomainSocket(path, strict=True)
        else:
            DomainSocket(path, strict=True).close()
        open_to_all.chmod(0o777)
        with pytest.raises(ConnectionFailedError, match=f"all users can write to {open_to_all},"):
            DomainSocket(path, strict=True)
        with pytest.raises(ConnectionFailedError, match="could not connect: No such file"):
            DomainSocket(str(safe / "nothing" / "agent.sock"), strict=True)


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*(names or ("localhost", "127.0.0.1"))).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def tls_agent(authority: trustme.CA, got: list[Received]) -> Iterator[Agent]:
    with Agent(("127.0.0.1", 0), got.append, ssl=server_context(authority), stall_timeout=5.0) as agent:
        yield agent


def port_of(agent: Agent) -> int:
    assert isinstance(agent.address, tuple)
    return agent.address[1]


@pytest.mark.parametrize("acks", [False, True])
def test_messages_received_over_tls_are_handed_over_at_stop(
    tls_agent: Agent, got: list[Received], authority: trustme.CA, acks: bool
) -> None:
    """Messages are decrypted, also those that come after the agent has announced its end."""
    connection = TCP(("localhost", port_of(tls_agent)), ssl=client_context(authority), require_ack=acks)
    connection.write([encode(message(0), 0)])
    eventually(lambda: got)
    connection.write([encode(message(number), 0) for number in range(1, 100)])
    stopping = gevent.spawn(tls_agent.stop, 20.0)
    eventually(lambda: len(got) == 100)
    gevent.sleep(0.05)
    connection.write([encode(message(100), 0)])  # nothing is read here, so it does not know
    connection.close()
    stopping.get(timeout=20)
    assert len(got) == 101
    assert not tls_agent.counts.broken_streams


@pytest.mark.parametrize("acks", [False, True])
def test_tls(tls_agent: Agent, got: list[Received], authority: trustme.CA, acks: bool) -> None:
    context = client_context(authority)

    def factory() -> TCP:
        return TCP(("localhost", port_of(tls_agent)), ssl=context, require_ack=acks, write_timeout=2.0)

    with Client(factory, backoff=QUICK) as client:
        for number in range(1000):
            client.send(message(number, caller_agent="x" * (1 + number * 20)), timeout=30)
        assert client.flush(30)
        gevent.sleep(2.1)  # beyond the write timeout, with nothing to do
        client.send(message(1000))
        assert client.flush(30)
        assert client.stats().connects == 1
    eventually(lambda: numbers_of(got) == list(range(1001)))


def test_tls_through_restarts(tls_agent: Agent, got: list[Received], authority: trustme.CA) -> None:
    context = client_context(authority)
    with Client(lambda: TCP(("localhost", port_of(tls_agent)), ssl=context, require_ack=True), backoff=QUICK) as client:
        for number in range(2000):
            client.send(message(number), timeout=30)
            if number % 400 == 399:
                tls_agent.restart(timeout=0)
        assert client.flush(60)
    assert list(dict.fromkeys(numbers_of(got))) == list(range(2000))


def test_a_certificate_of_an_unknown_authority(tls_agent: Agent) -> None:
    with pytest.raises(ConnectionFailedError, match=r"unable to get local issuer certificate|self-signed"):
        TCP(("localhost", port_of(tls_agent)), ssl=ssl.create_default_context())
    eventually(lambda: tls_agent.counts.turned_away == 1)


def test_a_certificate_of_another_host(authority: trustme.CA, got: list[Received]) -> None:
    with Agent(("127.0.0.1", 0), got.append, ssl=server_context(authority, "elsewhere.example")) as agent:
        with pytest.raises(ConnectionFailedError, match="Hostname mismatch"):
            TCP(("localhost", port_of(agent)), ssl=client_context(authority))
        TCP(("localhost", port_of(agent)), ssl=client_context(authority), server_hostname="elsewhere.example").close()


@pytest.mark.parametrize("value", [True, False, "context", ssl.SSLContext])
def test_an_invalid_context_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^ssl must be an ssl\.SSLContext, got "):
        TCP(("localhost", 1), ssl=value)


@once
def test_a_context_that_was_made_before_patching() -> None:
    program = (
        "import ssl\n"
        "context = ssl.create_default_context()\n"
        "import gevent.monkey, geventaudit.agent\n"
        "gevent.monkey.patch_all()\n"
        "assert not isinstance(context, ssl.SSLContext)\n"
        "for each in (context, ssl.create_default_context()):\n"
        "    geventaudit.agent.Agent('unused', print, ssl=each)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_the_name_in_a_certificate_without_tls() -> None:
    with pytest.raises(ValueError, match=r"^server_hostname is .*, got 'elsewhere.example': give ssl too"):
        TCP(("localhost", 1), server_hostname="elsewhere.example")


def test_client_certificates(authority: trustme.CA, got: list[Received]) -> None:
    context = server_context(authority)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with Agent(("127.0.0.1", 0), got.append, ssl=context) as agent:
        certified = client_context(authority)
        authority.issue_cert("client@example.com").configure_cert(certified)
        with Client(lambda: TCP(("localhost", port_of(agent)), ssl=certified)) as client:
            client.send(message(1))
            assert client.flush(10)
        eventually(lambda: numbers_of(got) == [1])
        plain = client_context(authority)
        with Client(lambda: TCP(("localhost", port_of(agent)), ssl=plain, require_ack=True), backoff=QUICK) as client:
            client.send(message(2))
            eventually(lambda: agent.counts.turned_away >= 1)
            assert client.close(timeout=0) == [message(2)]
    assert numbers_of(got) == [1]


def test_tls_to_an_agent_without_tls(got: list[Received], authority: trustme.CA) -> None:
    with Agent(("127.0.0.1", 0), got.append) as agent:
        with pytest.raises(ConnectionFailedError, match="could not connect"):
            TCP(("localhost", port_of(agent)), ssl=client_context(authority), timeout=5)
        assert agent.counts.broken_streams == 1
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ConnectionFailedError, match=r"not within 0\.2 seconds"):
            TCP(("localhost", silent.getsockname()[1]), ssl=client_context(authority), timeout=0.2)


# -- shared key --------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyed_agent(got: list[Received]) -> Iterator[Agent]:
    with Agent(("127.0.0.1", 0), got.append, shared_key=KEY, users={"alice": PASSWORD}) as agent:
        yield agent


def keyed(agent: Agent, key: str = KEY, password: str = PASSWORD, **options: Any) -> TCP:
    return TCP(("127.0.0.1", port_of(agent)), shared_key=key, username="alice", password=password, **options)


def test_shared_key_and_user(keyed_agent: Agent, got: list[Received]) -> None:
    with Client(lambda: keyed(keyed_agent), backoff=QUICK) as client:
        for number in range(100):
            client.send(message(number))
        assert client.flush(10)
    eventually(lambda: numbers_of(got) == list(range(100)))


def test_with_tls(authority: trustme.CA, got: list[Received]) -> None:
    with Agent(("127.0.0.1", 0), got.append, shared_key=KEY, ssl=server_context(authority)) as agent:
        context = client_context(authority)
        with Client(lambda: TCP(("localhost", port_of(agent)), ssl=context, shared_key=KEY)) as client:
            client.send(message(1))
            assert client.flush(10)
        eventually(lambda: numbers_of(got) == [1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": "wrong"}, "the agent refuses: shared_key mismatch"),
        ({"password": "wrong"}, "the agent refuses: username/password mismatch"),
    ],
)
def test_a_client_with_a_wrong_key_is_refused(
    keyed_agent: Agent, options: dict[str, str], words: str, got: list[Received]
) -> None:
    with pytest.raises(ConnectionFailedError, match=words):
        keyed(keyed_agent, **options)
    eventually(lambda: keyed_agent.counts.turned_away == 1)
    with pytest.raises(ConnectionFailedError, match="username/password mismatch"):
        TCP(("127.0.0.1", port_of(keyed_agent)), shared_key=KEY)
    assert not got


def test_the_error_names_a_missing_key(keyed_agent: Agent) -> None:
    with Client(lambda: TCP(("127.0.0.1", port_of(keyed_agent))), backoff=QUICK) as client:
        client.send(message(1))
        lost = next(each for each in client.notify() if each.error is not None)
        assert "asks for a shared key" in str(lost.error)
        assert client.close(timeout=0) == [message(1)]


def impostor(answer: Any) -> Any:
    """Return the socket of an agent that says HELO, and gives *answer* to the PING."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()

    def serve() -> None:
        while True:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(msgpack.packb(["HELO", {"nonce": b"n" * 16, "auth": b"", "keepalive": True}]))
                ping = msgpack.unpackb(sock.recv(4096))
                sock.sendall(msgpack.packb(answer(ping)))
                sock.recv(1)

    return listener, gevent.spawn(serve)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda ping: ["PONG", True, "", "agent", "0" * 128], "does not know the shared key"),
        (lambda ping: ["PONG", True, "", ping[1], ping[3]], "has the name of this client"),
        (lambda ping: ["PONG", True, "", ping[1].encode(), ping[3]], "has the name of this client"),
        (lambda ping: ["PONG", True, "", "agent", ping[3]], "does not know the shared key"),
        (lambda ping: ["PONG", True, "", "agent", 5], "does not know the shared key"),
        (lambda ping: ["PONG", True, "", 5, ""], "must be text or bytes"),
        (lambda ping: ["PONG", 1, "", "agent", ""], "the agent refuses"),
        (lambda ping: ["PONG"], "is not a PONG"),
        (lambda ping: {"ack": "x"}, "is not a PONG"),
    ],
)
def test_an_agent_that_does_not_know_the_key_is_refused(answer: Any, words: str) -> None:
    listener, serving = impostor(answer)
    try:
        with pytest.raises(ConnectionFailedError, match=words):
            TCP(listener.getsockname(), shared_key=KEY, timeout=5)
    finally:
        serving.kill()
        listener.close()


@pytest.mark.parametrize(
    "first", [b"HTTP/1.1 200 OK\r\n", msgpack.packb(["HELO", 5]), b"\xc1", b"\xdd\xff\xff\xff\xff"]
)
def test_an_agent_that_says_no_helo(first: bytes) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def greet() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(first)
                sock.recv(1)

        greeting = gevent.spawn(greet)
        with pytest.raises(ConnectionFailedError):
            TCP(listener.getsockname(), shared_key=KEY, timeout=1)
        greeting.get(timeout=5)


def test_no_secret_is_ever_shown(keyed_agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    with caplog.at_level(logging.DEBUG):
        connection = keyed(keyed_agent)
        shown.append(repr(connection))
        connection.close()
        for options in ({"key": KEY + "x"}, {"password": PASSWORD + "x"}):
            try:
                keyed(keyed_agent, **options)
            except ConnectionFailedError as error:
                shown.append(str(error) + repr(error) + "".join(traceback.format_exception(error)))
            client = Client(lambda options=options: keyed(keyed_agent, **options), backoff=QUICK)
            client.send(message(1))
            eventually(lambda client=client: client.stats().connect_failures)
            shown.append(repr(client) + repr(client.stats()))
            client.close(timeout=0)
            shown.extend(map(repr, client.notify()))
        shown.append(repr(keyed_agent))
    text = "".join(shown) + caplog.text
    assert "refuses" in text
    assert KEY not in text
    assert PASSWORD not in text


def test_users_without_a_key(got: list[Received]) -> None:
    with pytest.raises(ValueError, match="shared_key"):
        Agent("unused", got.append, users={"a": "b"})
    with pytest.raises(ValueError, match="shared_key"):
        TCP(("127.0.0.1", 1), username="a", password="b")


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (f"{KEY}\udce9", ValueError, "must be text that UTF-8 can write"),
        (KEY.encode(), TypeError, "must be text, got a value of type bytes"),
        (4711, TypeError, "must be text, got a value of type int"),
    ],
)
@pytest.mark.parametrize("name", ["shared_key", "username", "password"])
def test_secrets_that_cannot_be(name: str, value: Any, kind: type[Exception], words: str, got: list[Received]) -> None:
    """Such secrets are refused before any connection, and the error does not contain them."""
    options: dict[str, Any] = {"shared_key": "x", "username": "u", "password": "p", name: value}
    with Agent(("127.0.0.1", 0), got.append, shared_key="x") as agent:
        with pytest.raises(kind, match=f"^{name} {words}") as caught:
            TCP(("127.0.0.1", port_of(agent)), **options)
        assert agent.counts.connections == 0
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert str(value) not in repr(caught.value)
    with pytest.raises(kind, match=words) as caught:
        Agent("unused", got.append, shared_key=options["shared_key"], users={options["username"]: options["password"]})
    assert caught.value.__context__ is None
    assert str(value) not in repr(caught.value)


# -- strangers at the agent's door -------------------------------------------------------------------------------------


def memory() -> int:
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hostile_peer(kind: str, agent: Agent) -> None:
    """Do harm until the agent ends it."""
    with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
        try:
            match kind:
                case "endless frame":
                    sock.sendall(b"\x93\xaaAsmAuditCP\x91\x92\x05\xdb\x7f\xff\xff\xff")
                    while True:
                        sock.sendall(b"x" * 65536)
                        gevent.sleep(0)
                case "a frame just below the limit, never finished":
                    sock.sendall(b"\x93\xaaAsmAuditCP\x91\x92\x05\xdb\x00\x70\x00\x00" + b"x" * (6 << 20))
                    sock.recv(1)
                case "deep nesting":
                    sock.sendall(b"\x91" * 100_000)
                    sock.recv(1)
                case "huge announcements":
                    sock.sendall(b"\xdd\x00\x0f\xff\xff" * 400)
                    sock.recv(1)
                case "slow bytes":
                    for byte in b"\x93\xaaAsmAuditCP\x91\x92\x05\x81\xa1" + b"a" * 10_000:
                        sock.sendall(bytes([byte]))
                        gevent.sleep(0.01)
                case "a million entries":
                    sock.sendall(FRAME + b"\xdd\x00\x10\x00\x00" + WRONG * (1 << 20) + b"\x80")
                    sock.recv(1)
                case "entries that break the rules":
                    sock.sendall(FRAME + b"\xdc\x20\x00" + WRONG * 8192 + b"\x80")
                    sock.shutdown(socket.SHUT_WR)
                    sock.recv(1)
                case "a map of a hundred thousand fields":
                    fields = b"".join(b"\xce" + number.to_bytes(4, "big") + b"\x80" for number in range(100_000))
                    sock.sendall(FRAME + b"\x91\x92\x05\xdf" + (100_000).to_bytes(4, "big") + fields + b"\x80")
                    sock.shutdown(socket.SHUT_WR)
                    sock.recv(1)
                case "arrays of nothing":
                    sock.sendall(FRAME + b"\x91\x92\x05\x81\xa1a\x97" + NOTHING * 7 + b"\x80")
                    sock.recv(1)
                case "arrays of nothing, never finished":
                    sock.sendall(FRAME + b"\x91\x92\x05\x81\xa1a\x97" + NOTHING * 3)
                    sock.recv(1)
                case "bomb":
                    sock.sendall(BOMB)
                    sock.recv(1)
                case "garbage":
                    while True:
                        sock.sendall(os.urandom(65536))
                        gevent.sleep(0)
        except OSError:
            pass  # ended


KINDS = [
    "endless frame", "a frame just below the limit, never finished", "deep nesting", "huge announcements", "slow bytes",
    "garbage", "a million entries", "entries that break the rules", "a map of a hundred thousand fields",
    "arrays of nothing", "arrays of nothing, never finished", "bomb",
]  # fmt: skip

FRAME = b"\x93\xaaAsmAuditCP"
WRONG = b"\x92\x05\x80"
NOTHING = b"\xdd\x00\x0f\xff\xff" + b"\x90" * ((1 << 20) - 1)
ENTRY = b"\x92\x05\x81\xa1a\xdb\x00\x70\x00\x00" + bytes(7 << 20)
BOMB = msgpack.packb(["AsmAuditCP", gzip.compress(ENTRY), {"compressed": "gzip", "chunk": "c"}])


def test_twenty_hostile_peers(got: list[Received], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, all of them are ended, and the honest client is not affected."""
    monkeypatch.setattr("geventaudit.agent.server.MAX_UNFINISHED_BYTES", 32 << 20)
    with Agent(("127.0.0.1", 0), got.append, max_frame_bytes=8 << 20, stall_timeout=0.5) as agent:
        before = memory()
        peers = [gevent.spawn(hostile_peer, KINDS[n % len(KINDS)], agent) for n in range(20)]
        with Client(lambda: TCP(("127.0.0.1", port_of(agent)))) as client:
            for number in range(1000):
                client.send(message(number), timeout=30)
                if number % 50 == 0:
                    gevent.sleep(0.01)
            assert client.flush(60)
            assert client.stats().connects == 1
        gevent.joinall(peers, timeout=60)
        assert all(peer.ready() for peer in peers), "nobody is left hanging on"
        eventually(lambda: numbers_of(got) == list(range(1000)))
        eventually(lambda: agent.counts.open_connections == 0)
        assert agent._unfinished == 0
        assert memory() - before < 200 << 20


def test_bombs_take_little_memory(folder: Path) -> None:
    """Twenty at once, in a process of their own, whose memory is not that of other tests."""
    program = f"""
import resource, gevent
from gevent import socket
from geventaudit.agent import Agent
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
with Agent({str(folder / "s")!r}, print) as agent:
    socks, before = [socket.socket(socket.AF_UNIX) for _ in range(20)], peak()
    for sock in socks:
        sock.connect(agent.address)
        sock.sendall({BOMB!r})
    assert not any(sock.recv(9) for sock in socks)
    print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert int(done.stdout) < 250, "MiB: seven times twenty, and copies, were 500"


def test_a_large_frame_takes_turns_with_others(got: list[Received], caplog: pytest.LogCaptureFixture) -> None:
    """An honest client is served while a frame full of invalid records is checked. Not all of these are reported."""
    entries = 20_000
    with Agent(("127.0.0.1", 0), got.append) as agent:
        with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
            sock.sendall(FRAME + b"\xdc" + entries.to_bytes(2, "big") + WRONG * entries + b"\x80")
            eventually(lambda: agent.counts.refused)
            with Client(lambda: TCP(("127.0.0.1", port_of(agent)))) as client:
                for number in range(100):
                    client.send(message(number))
                eventually(lambda: len(numbers_of(got)) == 100)
            assert agent.counts.refused < entries, "the hostile one is not through yet"
            agent.hang_up()
            assert agent.counts.refused < entries, "and need not come to its end"
            sock.close()
        with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
            sock.sendall(FRAME + b"\xdc\x01\x00" + WRONG * 256 + b"\x81\xa5chunk\xa1c")
            caplog.clear()
            assert msgpack.unpackb(sock.recv(100)) == {"ack": "c"}
    told = [record.message for record in caplog.records if record.message.startswith("geventaudit: refused")]
    assert len(told) == 101
    assert told[-1] == "geventaudit: refused 156 more messages of one frame"


def test_a_killed_connection_hands_over_read_messages(got: list[Received]) -> None:
    """A sender without acknowledgements counts read records as delivered."""
    agent: Agent

    def take(received: Received) -> None:
        got.append(received)
        for _ in range(20_000):  # long enough for many turns
            pass
        if len(got) == 1:
            gevent.spawn(agent.hang_up)

    with Agent(("127.0.0.1", 0), take) as agent:
        wrong = FRAME + b"\x91" + WRONG + b"\x80"
        frames = b"".join(encode(message(number), 5) + wrong for number in range(30))
        assert len(frames) < 16384, "one read"
        agent.stop_reading()
        with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
            sock.sendall(frames)
            agent.resume_reading()
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass
    assert numbers_of(got) == list(range(30))


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_killed_connection_ends(stubborn: bool, monkeypatch: pytest.MonkeyPatch, got: list[Received]) -> None:
    """The connection ends even if handing over takes long: stop() neither waits for all read messages nor raises."""
    monkeypatch.setattr("geventaudit.agent.connections._TURN_SECONDS", (-1.0, -1.0))  # a pause behind each message
    monkeypatch.setattr("geventaudit.agent.connections._LAST_SECONDS", 0.05)
    monkeypatch.setattr("geventaudit.agent.server._KILL_SECONDS", 0.2 if stubborn else 30.0)
    free = Event()
    stopping = Event()

    def take(received: Received) -> None:
        got.append(received)
        while stubborn and not free.is_set():
            with suppress(gevent.GreenletExit):
                free.wait()
        if stopping.is_set():
            gevent.sleep(0.02)

    with Agent(("127.0.0.1", 0), take) as agent:
        with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
            # The stubborn callback gets all of them in the end.
            sent = 100 if stubborn else 1000
            sock.sendall(bundle([encode(message(number), 5) for number in range(sent)], "chunk"))
            eventually(lambda: got)
            stopping.set()
            agent.stop(0.0)
            handed_over = len(got)
            assert handed_over < sent
            if not stubborn:
                gevent.sleep(0.05)
                assert len(got) == handed_over
        stopping.clear()
        free.set()


def test_valid_messages_are_handed_over_as_soon_as_they_are_read(got: list[Received]) -> None:
    """So in one process, a message that the agent has read is one that the agent has."""
    with Agent(("127.0.0.1", 0), got.append) as agent:
        agent.stop_reading()
        with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
            sock.sendall(b"".join(encode(message(number), 5) for number in range(30)))
            agent.resume_reading()
            eventually(lambda: got)
            assert numbers_of(got) == list(range(30))


def test_strangers_at_a_door_with_a_lock(authority: trustme.CA, got: list[Received]) -> None:
    """Plain text to TLS, silence, wrong words: turned away in time."""
    with Agent(("127.0.0.1", 0), got.append, ssl=server_context(authority), shared_key=KEY, stall_timeout=0.5) as agent:
        for words in (b"plain text", b"", b"\x16\x03\x01\x02\x00" + b"\0" * 512):
            with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=20) as sock:
                sock.sendall(words)
                while True:
                    try:
                        if not sock.recv(4096):
                            break
                    except ConnectionResetError:
                        break
        eventually(lambda: agent.counts.turned_away == 3)
        context = client_context(authority)
        with pytest.raises(ConnectionFailedError):
            TCP(("localhost", port_of(agent)), ssl=context, shared_key="wrong")
        with Client(lambda: TCP(("localhost", port_of(agent)), ssl=context, shared_key=KEY)) as client:
            client.send(message(1))
            assert client.flush(10)
        eventually(lambda: numbers_of(got) == [1])


def test_too_many_connections(got: list[Received]) -> None:
    with Agent(("127.0.0.1", 0), got.append, max_connections=5) as agent:
        socks = [socket.create_connection(("127.0.0.1", port_of(agent)), timeout=10) for _ in range(8)]
        eventually(lambda: agent.counts.turned_away == 3)
        assert agent.counts.open_connections == 5
        for sock in socks:
            sock.close()


def test_idle_between_frames_is_no_stall(got: list[Received]) -> None:
    with (
        Agent(("127.0.0.1", 0), got.append, stall_timeout=0.05) as agent,
        Client(lambda: TCP(("127.0.0.1", port_of(agent)))) as client,
    ):
        client.send(message(1))
        assert client.flush(10)
        gevent.sleep(0.2)
        client.send(message(2))
        assert client.flush(10)
        assert client.stats().connects == 1
