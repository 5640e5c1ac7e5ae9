"""Addresses, TLS, keys, users and acknowledgements on the command line: processes, sockets and files as in use.

Each connection kind is tried with every command that has one: ``listen`` at one end; ``send``, ``doctor`` and
``spool drain`` at the other.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket as std_socket
import ssl
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
import trustme
from commands import command, run
from helpers import eventually, free_port, mapping, receiving
from test_cli import GOOD, lines
from test_cli_spool import fill

from geventaudit.agent import Agent

CLIENTS = ("send", "doctor", "drain")
pytestmark = pytest.mark.usefixtures("command_server")


class Files:
    """Certificates, keys and secrets in a folder, as options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        trustme.CA().cert_pem.write_to_path(str(folder / "other-ca.pem"))
        self.issue("agent", "127.0.0.1")
        self.issue("named", "audit.example")
        self.issue("client", "client.example")
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        self.issue("expired", "127.0.0.1", not_after=past, not_before=past - datetime.timedelta(days=1))
        (folder / "key.txt").write_text("the shared key ü\n")
        (folder / "wrong-key.txt").write_text("another key\n")
        (folder / "password.txt").write_text("the password\n")
        (folder / "wrong-password.txt").write_text("another password\n")
        (folder / "records.jsonl").write_bytes(lines(GOOD))

    def issue(self, name: str, identity: str, **options: Any) -> None:
        issued = self.authority.issue_cert(identity, **options)
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.folder / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(self.folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(self.folder / f"{name}.crt"))

    def options(self, text: str) -> list[str]:
        """Return the words of *text*, with the folder in the place of "/"."""
        return [word.replace("@", f"{self.folder}/") for word in text.split()]


@pytest.fixture
def files(folder: Path) -> Files:
    return Files(folder)


@contextlib.contextmanager
def listening(files: Files, options: str, unix: bool = False) -> Iterator[tuple[Any, list[str]]]:
    """Run ``listen``, and yield its process and the options of its address."""
    path = files.folder / "agent.sock"
    address = ["--unix", str(path)] if unix else ["--tcp", f"127.0.0.1:{free_port()}"]
    output = ["--output", str(files.folder / "out.jsonl")]
    with command("listen", *address, *output, *files.options(options)) as process:
        try:
            first = process.stderr.readline()
            assert first.startswith(b"listening on "), first
            yield process, address
        finally:
            process.kill()


def run_client(name: str, files: Files, *options: str) -> tuple[int, str, str]:
    """Run a command that connects: with one record, which a spool holds for ``drain``."""
    if name == "send":
        return run("send", str(files.folder / "records.jsonl"), *options)
    if name == "doctor":
        return run("doctor", *options)
    if not (files.folder / "spool").exists():
        fill(files.folder / "spool", 1)
    return run("spool", "drain", str(files.folder / "spool"), *options)


def together(*calls: Callable[[], tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Call all at once, since commands wait more than they work. Return their results."""
    running = [gevent.spawn(each) for each in calls]
    try:
        return [each.get() for each in running]
    finally:
        gevent.killall(running)


def arrived(files: Files) -> int:
    return (files.folder / "out.jsonl").read_text().count("\n")


# Options of listen and of its clients, by the kind of connection.
KINDS = {
    "unix": ("", ""),
    "tcp": ("", ""),
    "tls": ("--cert @agent.pem", "--ca @ca.pem"),
    "tls with a key of its own file": ("--cert @agent.crt --key @agent.key", "--tls --ca @ca.pem"),
    "tls under another name": ("--cert @named.pem", "--ca @ca.pem --server-hostname audit.example"),
    "mutual tls": ("--cert @agent.pem --ca @ca.pem", "--ca @ca.pem --cert @client.crt --key @client.key"),
    "shared key": ("--shared-key-file @key.txt", "--shared-key-file @key.txt"),
    "user": (
        "--shared-key-file @key.txt --username ada --password-file @password.txt",
        "--shared-key-file @key.txt --username ada --password-file @password.txt",
    ),
    "tls and user": (
        "--cert @agent.pem --shared-key-file @key.txt --username ada --password-file @password.txt",
        "--ca @ca.pem --shared-key-file @key.txt --username ada --password-file @password.txt",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_connection(kind: str, files: Files) -> None:
    """With acknowledgements and without."""
    theirs, ours = KINDS[kind]
    with listening(files, theirs, unix=kind == "unix") as (_, address):
        options = [*address, *files.options(ours)]
        for acks in ([], ["--require-ack"]):
            sent, examined, drained = together(*(partial(run_client, name, files, *options, *acks) for name in CLIENTS))
            status, out, err = sent
            assert (status, out) == (0, "1 delivered, 0 not delivered, 0 refused\n"), err
            status, out, err = examined
            assert (status, err) == (0, ""), out
            assert out.splitlines()[-2:] == [
                "ok      it reads",
                "ok      it acknowledges: require_ack=True can be used",
            ]
            assert ("its certificate is trusted" in out) is ("tls" in kind)
            assert ("it knows the shared key" in out) is ("key.txt" in ours)
            status, out, err = drained
            assert (status, out.partition(": ")[2]) == (0, "1 delivered, 0 not delivered, 0 dropped\n"), err
            assert not (files.folder / "spool").exists()
        eventually(lambda: arrived(files) == 4)


# -- connections that are refused --------------------------------------------------------------------------------------

# Options of listen, of its clients, and words of the doctor's advice.
REFUSED = {
    "another authority": ("--cert @agent.pem", "--ca @other-ca.pem", "trust the authority"),
    "the system's authorities": ("--cert @agent.pem", "--tls", "trust the authority"),
    "another name": ("--cert @named.pem", "--ca @ca.pem", "--server-hostname NAME"),
    "an expired certificate": ("--cert @expired.pem", "--ca @ca.pem", "renew the agent's certificate"),
    "no client certificate": ("--cert @agent.pem --ca @ca.pem", "--ca @ca.pem", "requires a client certificate"),
    "a wrong key": ("--shared-key-file @key.txt", "--shared-key-file @wrong-key.txt", "compare the shared key"),
    "no key": ("--shared-key-file @key.txt", "", "--shared-key-file FILE"),
    "no key over tls": ("--cert @agent.pem --shared-key-file @key.txt", "--ca @ca.pem", "--shared-key-file FILE"),
    "a wrong password": (
        "--shared-key-file @key.txt --username ada --password-file @password.txt",
        "--shared-key-file @key.txt --username ada --password-file @wrong-password.txt",
        "the user name and the password",
    ),
    "an unknown user": (
        "--shared-key-file @key.txt --username ada --password-file @password.txt",
        "--shared-key-file @key.txt --username bob --password-file @password.txt",
        "the user name and the password",
    ),
    "a key for an agent without": ("", "--shared-key-file @key.txt", "uses no TLS or no shared key"),
    "tls for an agent without": ("", "--ca @ca.pem", "TLS"),
    "no tls for an agent with it": ("--cert @agent.pem", "", "TLS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_doctor_names_the_reason_of_a_refusal(case: str, files: Files) -> None:
    theirs, ours, advice = REFUSED[case]
    with listening(files, theirs) as (_, address):
        status, out, err = run_client("doctor", files, *address, *files.options(ours), "--timeout", "1")
    assert (status, err) == (1, "")
    assert out.splitlines()[-2].startswith("FAILED  tcp:127.0.0.1:")
    assert advice in out.splitlines()[-1]
    assert "the shared key ü" not in out
    assert "password\n" not in out


AT_CONNECTING = ("another authority", "another name", "an expired certificate", "a wrong key", "a wrong password")


@pytest.mark.parametrize("name", ["send", "drain"])
@pytest.mark.parametrize("case", AT_CONNECTING)
def test_a_refused_command_names_the_doctor_and_keeps_its_records(case: str, name: str, files: Files) -> None:
    theirs, ours, _ = REFUSED[case]
    with listening(files, theirs) as (_, address):
        status, out, err = run_client(name, files, *address, *files.options(ours), "--timeout", "2")
        assert (status, out) == (2, "")
        assert err.startswith(f"geventaudit: tcp:{address[1]}: ")
        assert err.endswith(f"; to find the reason: geventaudit doctor {' '.join(address)}\n")
        assert arrived(files) == 0
        if name == "drain":
            status, out, _ = run("spool", "show", str(files.folder / "spool"))
            assert (status, out.count("\n")) == (0, 1)


# -- agents that read nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls", "shared key"])
def test_a_stopped_agent_is_stuck(kind: str, files: Files) -> None:
    """The kernel accepts its connections and acknowledges over TCP; the process does neither."""
    theirs, ours = KINDS[kind]
    with listening(files, theirs, unix=kind == "unix") as (process, address):
        process.send_signal(signal.SIGSTOP)
        options = [*address, *files.options(ours), "--timeout", "0.5"]
        (status, out, err), *others = together(
            partial(run_client, "doctor", files, *options),
            *(partial(run_client, name, files, *options, "--require-ack") for name in ("send", "drain")),
        )
        finding, advice = out.splitlines()[-2:]
        assert (status, err) == (1, "")
        if kind == "unix":
            assert finding == "FAILED  it read nothing in 0.5 s"
            assert f"process {process.pid} is stopped" in advice
            assert f"kill -CONT {process.pid}" in advice
        elif kind == "tcp":
            assert finding.startswith("FAILED  it neither acknowledged nor hung up in 0.5 s")
            assert "its process is stopped or stuck, or its input is paused" in advice
        else:
            assert "not within 0.5 seconds" in finding
            assert "the address accepts connections, but no TLS or Forward handshake begins" in advice
        for status, out, err in others:
            if kind in ("unix", "tcp"):
                assert status == 1, "it can connect"
                assert "0 delivered, 1 not delivered, 0 " in out
            else:
                assert (status, out) == (2, "")
                assert "to find the reason: geventaudit doctor" in err
        process.send_signal(signal.SIGCONT)
        status, out, _ = run_client("doctor", files, *address, *files.options(ours))
        assert status == 0, "as soon as it goes on, nothing is wrong"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_paused_input_is_named(kind: str, files: Files) -> None:
    """An agent that is alive, listens, and reads nothing: Fluent Bit at its mem_buf_limit."""
    with receiving(files.folder, kind) as receiver:
        receiver.start()
        receiver.pause()
        address = ["--unix", receiver.where] if kind == "unix" else ["--tcp", f"127.0.0.1:{receiver.where}"]
        status, out, err = run_client("doctor", files, *address, "--timeout", "0.5")
        assert (status, err) == (1, "")
        assert "its input is paused: Fluent Bit pauses an input at mem_buf_limit" in out.splitlines()[-1]
        receiver.resume()
        assert run_client("doctor", files, *address)[0] == 0


@pytest.mark.parametrize("kind", ["tls", "shared key"])
def test_a_paused_input_behind_a_handshake_is_named(kind: str, files: Files) -> None:
    """The agent's process answers the handshake, and reads nothing after it."""
    _, ours = KINDS[kind]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(files.folder / "agent.pem"))
    options: dict[str, Any] = {"ssl": context} if kind == "tls" else {"shared_key": "the shared key ü"}
    with Agent(("127.0.0.1", 0), lambda received: None, **options) as agent:
        agent.stop_reading()
        address = ["--tcp", f"127.0.0.1:{agent.address[1]}", *files.options(ours)]
        status, out, err = run_client("doctor", files, *address, "--timeout", "0.5")
        assert (status, err) == (1, "")
        assert out.splitlines()[-2].startswith("FAILED  it neither acknowledged nor hung up in 0.5 s")
        assert "its input is paused: Fluent Bit pauses an input at mem_buf_limit" in out.splitlines()[-1]
        agent.resume_reading()
        assert run_client("doctor", files, *address)[0] == 0


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"])
def test_an_input_that_hangs_up_while_it_is_paused_is_named(kind: str, files: Files) -> None:
    with contextlib.ExitStack() as stack:
        unix = kind == "unix"
        listener = stack.enter_context(std_socket.socket(std_socket.AF_UNIX if unix else std_socket.AF_INET))
        listener.bind(str(files.folder / "agent.sock") if unix else ("127.0.0.1", 0))
        listener.listen()
        address = ["--unix", listener.getsockname()] if unix else ["--tcp", f"127.0.0.1:{listener.getsockname()[1]}"]
        options = files.options("--ca @ca.pem") if kind == "tls" else []
        with command("doctor", *address, *options, "--timeout", "1") as process:
            listener.accept()[0].close()
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")
    finding, advice = out.decode().splitlines()[-2:]
    assert finding.startswith("FAILED  ")
    if kind == "tls":
        assert "does the agent use" in advice
    else:
        assert "is the input paused: Fluent Bit hangs up at mem_buf_limit" in advice


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls", "shared key"])
def test_an_agent_that_does_not_acknowledge(kind: str, files: Files) -> None:
    """The doctor prints a note, or a fault with ``--require-ack``."""
    theirs, ours = KINDS[kind]
    with listening(files, f"--no-ack {theirs}", unix=kind == "unix") as (_, address):
        options = [*address, *files.options(ours), "--timeout", "1"]
        noted, *others = together(
            partial(run_client, "doctor", files, *options),
            *(partial(run_client, name, files, *options, "--require-ack") for name in ("doctor", "send", "drain")),
        )
        status, out, err = noted
        assert (status, err) == (0, "")
        assert "ok      it reads" in out.splitlines()
        assert out.splitlines()[-2] == "note    it acknowledged nothing in 1.0 s"
        status, out, err = others[0]
        assert (status, err) == (1, "")
        assert out.splitlines()[-2] == "FAILED  it acknowledged nothing in 1.0 s"
        for status, out, _ in others[1:]:
            assert status == 1
            assert "0 delivered, 1 not delivered, 0 " in out
        if kind == "unix":
            assert run_client("send", files, *options)[0] == 0, "without acknowledgements all is well"


# -- something else in the agent's place -------------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_agent_is_left_alone(files: Files) -> None:
    path = files.folder / "agent.sock"
    path.write_text("somebody's data")
    address = ["--unix", str(path)]
    status, out, err = run_client("doctor", files, *address)
    assert (status, err) == (1, "")
    assert out.splitlines()[-2].startswith(f"FAILED  {path} is not a socket: -rw")
    assert "Do not remove it unseen" in out.splitlines()[-1]
    for name in ("send", "drain"):
        status, out, err = run_client(name, files, *address)
        assert (status, out) == (2, "")
        assert f"to find the reason: geventaudit doctor --unix {path}" in err
    status, out, err = run("listen", *address)
    assert (status, out, err) == (
        2,
        "",
        f"geventaudit: cannot listen on {path}: a file is there, and no socket\n",
    )
    assert path.read_text() == "somebody's data"


# -- options that contradict each other, and files that cannot be used -------------------------------------------------

MISTAKES = {
    "--unix @a.sock --tls": "argument --tls: not supported on a Unix socket: add --tcp HOST:PORT",
    "--ca @ca.pem": "argument --ca: not supported on a Unix socket: add --tcp HOST:PORT",
    "--unix @a.sock --shared-key-file @key.txt": "argument --shared-key-file: not supported on a Unix socket",
    "--unix @a.sock --server-hostname x": "argument --server-hostname: not supported on a Unix socket",
    "--tcp h:1 --key @client.key": "argument --key: needs its certificate: add --cert FILE",
    "--tcp h:1 --username ada": "argument --username: needs a shared key: add --shared-key-file FILE",
    "--unix @a.sock --username ada": "argument --username: needs a shared key: add --shared-key-file FILE",
    "--tcp h:1 --password-file @key.txt": "argument --password-file: needs a user: add --username NAME",
    "--tcp h:1 --shared-key-file @nothing": "argument --shared-key-file: cannot read @nothing: No such file",
    "--tcp h:1 --shared-key-file @empty": "argument --shared-key-file: @empty is empty",
    "--tcp h:1 --shared-key-file @latin1": "argument --shared-key-file: @latin1 must be UTF-8 text",
    "--tcp h:1 --shared-key-file @key.txt --username a --password-file @empty": "--password-file: @empty is empty",
    "--tcp h:1 --ca @nothing": "argument --ca: cannot read @nothing: No such file or directory",
    "--tcp h:1 --ca @key.txt": "argument --ca: @key.txt has no certificate in PEM form",
    "--tcp h:1 --cert @nothing": "argument --cert: cannot read @nothing: No such file or directory",
    "--tcp h:1 --cert @key.txt": "argument --cert: @key.txt is no certificate and key in PEM form",
    "--tcp h:1 --cert @client.crt": "argument --cert: @client.crt is no certificate and key in PEM form, or has no "
    "private key: add --key FILE",
    "--tcp h:1 --cert @client.crt --key @nothing": "argument --key: cannot read @nothing: No such file",
    "--tcp h:1 --cert @client.crt --key @agent.key": "argument --key: @agent.key is not the key of @client.crt",
    "--tcp h:1 --cert @client.crt --key @encrypted.key": "argument --key: the private key in @encrypted.key is "
    "encrypted: decrypt it first",
}
MISTAKES_OF_LISTEN = {
    "--unix @a.sock --cert @agent.pem": "argument --cert: not supported on a Unix socket: use --tcp HOST:PORT",
    "--tcp h:1 --ca @ca.pem": "argument --ca: needs the agent's certificate: add --cert FILE",
    "--key @agent.key": "argument --key: needs the agent's certificate: add --cert FILE",
    "--username ada": "argument --username: needs a password: add --password-file FILE",
    "--username ada --password-file @password.txt": "argument --username: needs a shared key",
    "--password-file @password.txt": "argument --password-file: needs a user: add --username NAME",
    "--shared-key-file @nothing": "argument --shared-key-file: cannot read @nothing: No such file or directory",
    "--cert @agent.crt": "or has no private key: add --key FILE",
    "--cert @agent.pem --ca @key.txt": "argument --ca: @key.txt has no certificate in PEM form",
    "--tls": "unrecognized arguments: --tls",
}


def encrypted_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase"))


@pytest.mark.parametrize("name", CLIENTS)
def test_mistakes_of_clients(name: str, files: Files) -> None:
    (files.folder / "empty").write_text("\n")
    (files.folder / "latin1").write_bytes(b"schl\xfcssel")
    (files.folder / "encrypted.key").write_bytes(encrypted_key())
    # One command has all the cases; the others have the first and the last: the code is the same.
    cases = list(MISTAKES.items())
    for options, words in cases if name == "send" else [cases[0], cases[-1]]:
        status, out, err = run_client(name, files, *files.options(options))
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert words.replace("@", f"{files.folder}/") in err


def test_mistakes_of_listen(files: Files) -> None:
    for options, words in MISTAKES_OF_LISTEN.items():
        status, out, err = run("listen", *files.options(options))
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert words.replace("@", f"{files.folder}/") in err
        assert not (files.folder / "a.sock").exists()


# -- listen ------------------------------------------------------------------------------------------------------------


TAKEN = (
    b"geventaudit: cannot listen on %s: Address already in use: an agent is there already; "
    b"choose another address: --tcp HOST:PORT or --unix PATH\n"
)


@pytest.mark.parametrize("unix", [True, False])
def test_an_address_that_is_taken(unix: bool, files: Files) -> None:
    with listening(files, "", unix=unix) as (_, address):
        assert run("listen", *address) == (2, "", (TAKEN % address[1].encode()).decode())


def test_listen_without_an_address() -> None:
    """The default port may be in use; the output names it in each case."""
    with command("listen") as process:
        first = process.stderr.readline()
        if first == TAKEN % b"127.0.0.1:24224":
            assert process.wait(timeout=30) == 2
            return
        assert first == b"listening on 127.0.0.1:24224\n"
        hint = process.stderr.readline().decode()
        assert hint == "to send a record here: geventaudit send FILE --tcp 127.0.0.1:24224\n"
        status, out, err = run("send", "-", *hint.split()[-2:], given=lines(GOOD))
        assert (status, out) == (0, "1 delivered, 0 not delivered, 0 refused\n"), err
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert b"CreateUser" in out


def test_listen_writes_json_lines_to_standard_output_and_nothing_else(socket_path: str) -> None:
    unusual = mapping(OperationName="Größe\x9b\u2028", OperationResult="Failure", OperationResultDescription="no")
    with command("listen", "--unix", socket_path, "--output", "-") as process:
        assert process.stderr.readline().startswith(b"listening on ")
        given = lines(GOOD, {"Type": "DataPlane", "Record": unusual})
        assert run("send", "-", "--unix", socket_path, given=given)[0] == 0
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert err == b"3 messages received, 0 refused\n", "with the heartbeat, which is no record"
    got = [json.loads(line) for line in out.splitlines()]
    assert [each["Type"] for each in got] == ["ControlPlane", "DataPlane"]
    assert got[1]["Record"]["OperationName"] == unusual["OperationName"]
    assert out.isascii(), "it may be a terminal"


def test_a_closed_json_output_ends_the_command(socket_path: str) -> None:
    read, write = os.pipe()
    with command("listen", "--unix", socket_path, "--output", "-", stdout=write) as process:
        os.close(write)
        os.close(read)
        assert process.stderr.readline().startswith(b"listening on")
        status, out, _ = run("send", "-", "--unix", socket_path, "--timeout", "0.5", "--require-ack", given=lines(GOOD))
        assert (status, out) == (1, "0 delivered, 1 not delivered, 0 refused\n")
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"Traceback" not in err


def test_the_output_is_private(socket_path: str, folder: Path) -> None:
    path = folder / "out.jsonl"
    before = os.umask(0)
    try:
        with command("listen", "--unix", socket_path, "--output", str(path)) as process:
            assert process.stderr.readline().startswith(b"listening on")
            process.kill()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_certificates_are_loaded_for_each_connection(files: Files) -> None:
    """A file that is renewed while ``send --follow`` runs is used for the next connection."""
    records = files.folder / "growing.jsonl"
    records.write_bytes(lines(GOOD))
    ours = files.options("--ca @ca.pem --cert @client.pem")
    theirs = "--cert @agent.pem --ca @client-ca.pem"
    (files.folder / "client-ca.pem").write_bytes((files.folder / "ca.pem").read_bytes())
    with contextlib.ExitStack() as stack:
        first, address = stack.enter_context(listening(files, theirs))
        following = stack.enter_context(command("send", "--follow", str(records), *address, *ours, "--require-ack"))
        stack.callback(following.kill)
        eventually(lambda: arrived(files) == 1)
        # The agent comes back with another authority for its clients. Their certificate is renewed too.
        first.kill()
        first.wait(timeout=30)
        other = trustme.CA()
        other.cert_pem.write_to_path(str(files.folder / "client-ca.pem"))
        renewed = other.issue_cert("client.example")
        renewed.private_key_and_cert_chain_pem.write_to_path(str(files.folder / "client.pem"))
        output = ["--output", str(files.folder / "out.jsonl")]
        second = stack.enter_context(command("listen", *address, *output, *files.options(theirs)))
        stack.callback(second.kill)
        assert second.stderr.readline().startswith(b"listening on ")
        with open(records, "ab") as writer:
            writer.write(lines(GOOD))
        eventually(lambda: arrived(files) == 2)
        following.send_signal(signal.SIGTERM)
        out, _ = following.communicate(timeout=30)
    assert (following.returncode, out) == (0, b"2 delivered, 0 not delivered, 0 refused\n")
