"""``geventaudit doctor`` names the fault and the remedy in each set-up that can be broken."""

from __future__ import annotations

import contextlib
import os
import socket as std_socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from gevent import socket as gsocket
from gevent import subprocess
from gevent.pool import Pool
from gevent.server import StreamServer
from helpers import free_port

from geventaudit import transport
from geventaudit.agent import Agent
from geventaudit.agent.doctor import Outcome, examine
from geventaudit.cli import main
from geventaudit.encoder.engine import ENCODER

Setup = contextlib.AbstractContextManager[list[str]]

AS_NOBODY = """
import contextlib, io, os, sys
from geventaudit.cli import main
from geventaudit import ConnectionFailedError, DomainSocket
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ConnectionFailedError):
    main(["doctor", "--unix", "/nonexistent"])  # that user may not be permitted to read what is imported on the way
    DomainSocket("/nonexistent")
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


def unix(path: Path) -> list[str]:
    return ["--unix", str(path)]


@contextlib.contextmanager
def serving(path: Path, handle: Callable[[Any], object]) -> Iterator[list[str]]:
    """Call *handle* with each connection, as an agent, and hang up after it."""

    def serve(sock: Any, peer: Any) -> None:
        with sock, contextlib.suppress(OSError):
            handle(sock)

    listener = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)
    server = StreamServer(listener, serve, spawn=Pool())
    server.start()
    try:
        yield unix(path)
    finally:
        server.stop(timeout=0)


def reads_to_the_end(sock: Any) -> None:
    while sock.recv(65536):
        pass


# Each is a set-up that is broken in one way, the status, and words of the finding and of the advice.


@contextlib.contextmanager
def nothing_there(folder: Path) -> Iterator[list[str]]:
    yield unix(folder / "agent.sock")


@contextlib.contextmanager
def folder_missing(folder: Path) -> Iterator[list[str]]:
    yield unix(folder / "mdsd" / "agent.sock")


@contextlib.contextmanager
def file_in_its_place(folder: Path) -> Iterator[list[str]]:
    (folder / "agent.sock").write_text("")
    yield unix(folder / "agent.sock")


@contextlib.contextmanager
def folder_in_its_place(folder: Path) -> Iterator[list[str]]:
    (folder / "agent.sock").mkdir()
    yield unix(folder / "agent.sock")


@contextlib.contextmanager
def file_on_the_way(folder: Path) -> Iterator[list[str]]:
    (folder / "mdsd").write_text("")
    yield unix(folder / "mdsd" / "agent.sock")


@contextlib.contextmanager
def no_path(folder: Path) -> Iterator[list[str]]:
    yield ["--unix", ""]


@contextlib.contextmanager
def dangling_link(folder: Path) -> Iterator[list[str]]:
    (folder / "agent.sock").symlink_to(folder / "gone.sock")
    yield unix(folder / "agent.sock")


@contextlib.contextmanager
def long_path(folder: Path) -> Iterator[list[str]]:
    yield unix(folder / ("x" * 108))


@contextlib.contextmanager
def left_behind(folder: Path) -> Iterator[list[str]]:
    with std_socket.socket(std_socket.AF_UNIX) as dead:
        dead.bind(str(folder / "agent.sock"))
    yield unix(folder / "agent.sock")


@contextlib.contextmanager
def datagrams(folder: Path) -> Iterator[list[str]]:
    with std_socket.socket(std_socket.AF_UNIX, std_socket.SOCK_DGRAM) as other:
        other.bind(str(folder / "agent.sock"))
        yield unix(folder / "agent.sock")


@contextlib.contextmanager
def accepts_nobody(folder: Path) -> Iterator[list[str]]:
    with std_socket.socket(std_socket.AF_UNIX) as listener, std_socket.socket(std_socket.AF_UNIX) as filler:
        listener.bind(str(folder / "agent.sock"))
        listener.listen(0)
        filler.connect(str(folder / "agent.sock"))
        yield unix(folder / "agent.sock")


@contextlib.contextmanager
def reads_nothing(folder: Path) -> Iterator[list[str]]:
    with serving(folder / "agent.sock", lambda sock: gevent.sleep(60)) as arguments:
        yield arguments


@contextlib.contextmanager
def hangs_up_at_once(folder: Path) -> Iterator[list[str]]:
    with serving(folder / "agent.sock", lambda sock: None) as arguments:
        yield arguments


@contextlib.contextmanager
def another_protocol(folder: Path) -> Iterator[list[str]]:
    def answer(sock: Any) -> None:
        sock.recv(10)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with serving(folder / "agent.sock", answer) as arguments:
        yield arguments


@contextlib.contextmanager
def serving_tcp(handle: Callable[[Any], object]) -> Iterator[list[str]]:
    def serve(sock: Any, peer: Any) -> None:
        with sock, contextlib.suppress(OSError):
            handle(sock)

    server = StreamServer(("127.0.0.1", 0), serve, spawn=Pool())
    server.start()
    try:
        yield ["--tcp", f"127.0.0.1:{server.server_port}"]
    finally:
        server.stop(timeout=0)


def http_over_tcp(folder: Path) -> Setup:
    return serving_tcp(lambda sock: (sock.recv(10), sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")))


def tls_alert_over_tcp(folder: Path) -> Setup:
    return serving_tcp(lambda sock: (sock.recv(10), sock.sendall(b"\x15\x03\x01\x00\x02\x02\x46")))


def reads_nothing_over_tcp(folder: Path) -> Setup:
    return serving_tcp(lambda sock: gevent.sleep(60))


def never_acknowledges_over_tcp(folder: Path) -> Setup:
    return serving_tcp(reads_to_the_end)


def resets_over_tcp(folder: Path) -> Setup:
    """The agent hangs up with unread data, while the doctor waits for an acknowledgement or for the end."""
    return serving_tcp(lambda sock: gevent.sleep(0.9))


@contextlib.contextmanager
def never_acknowledges(folder: Path) -> Iterator[list[str]]:
    with serving(folder / "agent.sock", reads_to_the_end) as arguments:
        yield arguments


@contextlib.contextmanager
def acknowledges_nonsense(folder: Path) -> Iterator[list[str]]:
    def answer(sock: Any) -> None:
        while sock.recv(65536):
            sock.sendall(b"\xc1\xc1\xc1\xc1")

    with serving(folder / "agent.sock", answer) as arguments:
        yield arguments


@contextlib.contextmanager
def nobody_at_the_port(folder: Path) -> Iterator[list[str]]:
    yield ["--tcp", f"127.0.0.1:{free_port()}"]


@contextlib.contextmanager
def no_such_host(folder: Path) -> Iterator[list[str]]:
    yield ["--tcp", "no-such-host.invalid:24224"]


@contextlib.contextmanager
def wants_a_key(folder: Path) -> Iterator[list[str]]:
    with Agent(("127.0.0.1", 0), lambda received: None, shared_key="secret") as agent:
        yield ["--tcp", f"127.0.0.1:{agent.address[1]}"]


@contextlib.contextmanager
def no_defaults(folder: Path) -> Iterator[list[str]]:
    usual = transport.unix.MDSD_SOCKETS
    transport.unix.MDSD_SOCKETS = (str(folder / "a.sock"), str(folder / "b.sock"))
    try:
        yield []
    finally:
        transport.unix.MDSD_SOCKETS = usual


@contextlib.contextmanager
def anybody_may_replace_it(folder: Path) -> Iterator[list[str]]:
    folder.chmod(0o777)
    with Agent(str(folder / "agent.sock"), lambda received: None):
        yield unix(folder / "agent.sock")


BROKEN: list[tuple[Callable[[Path], Setup], int, str, str]] = [
    (no_defaults, 1, "FAILED  {folder}/b.sock does not exist", "or give its address"),
    (nothing_there, 1, "FAILED  {folder}/agent.sock does not exist", "start the agent"),
    (folder_missing, 1, "FAILED  {folder}/mdsd does not exist", "mount the folder"),
    (file_in_its_place, 1, "FAILED  {folder}/agent.sock is not a socket: -rw", "Do not remove it unseen"),
    (folder_in_its_place, 1, "FAILED  {folder}/agent.sock is not a socket: drwx", "a container runtime makes one"),
    (file_on_the_way, 1, "FAILED  {folder}/mdsd is not a folder", "give the address of the agent"),
    (no_path, 1, "FAILED  the path of the socket is empty", "give the address of the agent"),
    (dangling_link, 1, "FAILED  {folder}/agent.sock is a link to {folder}/gone.sock, which does not", "the link point"),
    (long_path, 1, "can have at most 107 bytes, this path has", "a shorter path"),
    (
        left_behind,
        1,
        "FAILED  unix:{folder}/agent.sock: could not connect: Connection refused",
        "left over from a dead agent",
    ),
    (datagrams, 1, "FAILED  unix:{folder}/agent.sock: could not connect: Protocol wrong type", "datagram"),
    (accepts_nobody, 1, "accepted no connection for 0.3 seconds", "is stopped or stuck"),
    (reads_nothing, 1, "FAILED  it read nothing in 0.3 s", "its input is paused"),
    (hangs_up_at_once, 1, "FAILED  unix:{folder}/agent.sock: ", "does not take Forward messages"),
    (another_protocol, 1, "FAILED  unix:{folder}/agent.sock: ", "another protocol (HTTP"),
    (reads_nothing_over_tcp, 1, "FAILED  it neither acknowledged nor hung up", "its input is paused"),
    (never_acknowledges_over_tcp, 0, "note    it acknowledged nothing in 0.3 s", "Fluentd and Vector over TCP only"),
    (resets_over_tcp, 1, "FAILED  ", "does not take Forward messages"),
    (http_over_tcp, 1, "FAILED  tcp:127.0.0.1:", "another protocol (HTTP"),
    (tls_alert_over_tcp, 1, "FAILED  tcp:127.0.0.1:", "TLS (--tls)"),
    (never_acknowledges, 0, "note    it acknowledged nothing in 0.3 s", "Fluentd and Vector over TCP only"),
    (
        acknowledges_nonsense,
        1,
        "unix:{folder}/agent.sock: the agent's answer is invalid",
        "is not an acknowledgement",
    ),
    (nobody_at_the_port, 1, "FAILED  tcp:127.0.0.1:", "no process listens there"),
    (no_such_host, 1, "FAILED  tcp:no-such-host.invalid:24224: could not connect", "check the name"),
    (wants_a_key, 1, "the agent asks for a shared key", "TCP(..., shared_key=...)"),
    (anybody_may_replace_it, 0, "note    {folder}/agent.sock: refused: all users can write to {folder}", "chmod o-w"),
]


@pytest.mark.parametrize(
    ("setup", "status", "text", "advice"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_setup(
    setup: Any, status: int, text: str, advice: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with setup(folder) as arguments:
        assert main(["doctor", "--timeout", "0.3", *arguments]) == status
    out, err = capsys.readouterr()
    assert err == "", "no traceback of a greenlet"
    lines = out.splitlines()
    number = next((n for n, line in enumerate(lines) if text.format(folder=folder) in line), None)
    assert number is not None, lines
    assert lines[number + 1].startswith("        -> "), "a line of advice follows"
    assert advice in lines[number + 1]
    if status:
        assert number == len(lines) - 2, "what comes after a failure cannot be told"
        assert sum(line.startswith("FAILED") for line in lines) == 1


def run_as_nobody(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", AS_NOBODY, "doctor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.stderr == b""
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize("closed", ["socket", "folder"])
def test_no_permission(closed: str, folder: Path) -> None:
    """As the user 65534 if the tests run as root, else as the user of the tests."""
    inner = folder / "inner"
    inner.mkdir()
    path = inner / "agent.sock"
    folder.chmod(0o755)
    with Agent(str(path), lambda received: None):
        path.chmod(0o600 if os.geteuid() == 0 else 0)
        inner.chmod(0o755 if closed == "socket" else 0o700 if os.geteuid() == 0 else 0)
        try:
            status, out = run_as_nobody(*unix(path))
        finally:
            inner.chmod(0o700)
    finding, advice = out.splitlines()[-2:]
    assert status == 1
    if closed == "socket":
        assert f"may not write to {path}: srw" in finding
        assert finding.startswith("FAILED  this user, ")
        assert "to the group of the socket" in advice
    else:
        assert f"may not enter {inner}: d" in finding
        assert "give the service's user access" in advice


def test_another_user_may_connect_where_the_modes_say_so(folder: Path) -> None:
    folder.chmod(0o755)
    path = folder / "agent.sock"
    with Agent(str(path), lambda received: None):
        path.chmod(0o666)
        status, out = run_as_nobody(*unix(path))
    assert (status, "FAILED" in out) == (0, False), out


def test_all_is_well(socket_path: str) -> None:
    beats: list[Any] = []
    with Agent(socket_path, beats.append) as agent:
        findings = list(examine(socket_path, 5.0))
        assert [each.outcome for each in findings[1:]] == [Outcome.OK] * 4
        encoder, place, connected, reads, acks = (each.text for each in findings)
        assert ("compiled" if ENCODER == "compiled" else "plain Python") in encoder
        assert place.startswith(f"{socket_path} is a socket: s")
        assert f"process {os.getpid()} (" in connected
        assert reads == "it reads"
        assert acks.startswith("it acknowledges")
        assert agent.counts.heartbeats == len(beats) == 2, "heartbeats, and no records"


def test_all_is_well_over_tcp_and_at_an_abstract_address() -> None:
    with Agent(("127.0.0.1", 0), lambda received: None) as agent:
        assert [each.outcome for each in examine(agent.address, 5.0)][1:] == [Outcome.OK] * 3
    name = f"\0geventaudit-{os.getpid()}"
    with Agent(name, lambda received: None):
        assert [each.outcome for each in examine(name, 5.0)][1:] == [Outcome.OK] * 3


def test_the_default_that_exists_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = str(folder / "first.sock"), str(folder / "second.sock")
    monkeypatch.setattr(transport.unix, "MDSD_SOCKETS", (first, second))
    with Agent(second, lambda received: None):
        findings = list(examine(timeout=5.0))
    assert [(each.outcome, each.text) for each in findings[1:3]] == [
        (Outcome.NOTE, f"{first}: missing"),
        (Outcome.OK, f"{second}: exists"),
    ]
    assert findings[-1].outcome is Outcome.OK


def test_an_abandoned_examination_leaves_nothing_open(folder: Path) -> None:
    with reads_nothing(folder) as (_, path):
        examination = examine(path, 30.0)
        next(examination)  # the encoder
        assert next(examination).outcome is Outcome.OK
        assert next(examination).outcome is Outcome.OK, "connected"
        examination.close()  # type: ignore[attr-defined]
        with gevent.Timeout(0.05, False):
            list(examine(path, 30.0))


def test_an_agent_that_acknowledges_late_is_waited_for(folder: Path) -> None:
    def answer(sock: Any) -> None:
        unpacker = msgpack.Unpacker()
        while data := sock.recv(65536):
            unpacker.feed(data)
            for frame in unpacker:
                if "chunk" in frame[-1]:
                    gevent.sleep(0.1)
                    sock.sendall(msgpack.packb({"ack": frame[-1]["chunk"]}))

    with serving(folder / "agent.sock", answer) as (_, path):
        assert [each.outcome for each in examine(path, 10.0)][1:] == [Outcome.OK] * 4
