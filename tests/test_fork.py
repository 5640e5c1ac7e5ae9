"""Forks: the parent keeps its records and connections, and the child starts anew. Real forks of a real process."""

from __future__ import annotations

import gc
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from typing import Any, NamedTuple

import gevent
import pytest
import trustme
from gevent import socket, subprocess
from helpers import eventually, message, once, receiving

from geventaudit import Client, Msg, NoOp
from geventaudit.agent import Agent, Received
from geventaudit.runtime import forks

EACH = int(os.environ.get("GEVENTAUDIT_FORK_RECORDS", "5000"))
KINDS = [
    ("os", "unpatched"), ("os", "patched"), ("gevent", "unpatched"), ("multiprocessing", "unpatched"),
    ("multiprocessing", "patched"),
]  # fmt: skip


@contextmanager
def program(scenario: str, kind: tuple[str, str], path: str, *more: object) -> Iterator[Any]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning:multiprocessing"),
            *("-W", "ignore:This process:DeprecationWarning"),  # 3.12 on: forking with threads; that is the point here
            *(str(Path(__file__).parent / "fork_program.py"), scenario, *kind, path, *map(str, more)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def finish(process: Any) -> None:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out.decode(), err.decode())
    assert b"Traceback" not in err, err.decode()


@once
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_four_children_and_the_parent_send_at_once(folder: Path, kind: tuple[str, str]) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        with program("four_children", kind, receiver.where, EACH) as process:
            finish(process)
        numbers = receiver.numbers()
        assert len(numbers) == 5 * EACH, "as often as it was accepted"
        for index in range(5):
            mine = [number for number in numbers if number // EACH == index]
            assert mine == list(range(index * EACH, (index + 1) * EACH)), "all, once, in order"


@once
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_in_the_middle_of_a_write(folder: Path, kind: tuple[str, str]) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        receiver.pause()
        with program("middle_of_a_write", kind, receiver.where) as process:
            assert process.stdout.readline() == b"forked\n", process.stderr.read().decode()
            receiver.resume()
            finish(process)
        numbers = receiver.numbers()
        assert sorted(numbers) == [*range(13), *range(100, 300)], "every frame whole, every record once"


@once
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_child_does_not_keep_the_parents_connection_open(socket_path: str, kind: tuple[str, str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        with program("parent_hangs_up", kind, socket_path) as process:
            agent, _ = listener.accept()
            with agent:
                agent.settimeout(30)
                while agent.recv(65536):  # ends only when no process has that connection open
                    pass
            assert process.stdout.readline() == b"closed\n"


@once
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_fork_while_the_parent_closes(folder: Path, kind: tuple[str, str]) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        receiver.pause()
        with program("closing_parent", kind, receiver.where) as process:
            assert process.stdout.readline() == b"forked\n", process.stderr.read().decode()
            receiver.resume()
            finish(process)
        assert receiver.numbers() == [1]


@once
@pytest.mark.parametrize("kind", [("os", "patched"), ("multiprocessing", "unpatched")], ids="-".join)
def test_a_base_client_in_a_child_wants_a_connection_of_its_own(folder: Path, kind: tuple[str, str]) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        with program("base_client", kind, receiver.where) as process:
            finish(process)
        assert sorted(receiver.numbers()) == [1, 2, 3]


class Links(NamedTuple):
    """One kind of connection: its agent, and the arguments of the program."""

    agent: Agent
    arguments: list[str]


@contextmanager
def linked(kind: str, folder: Path, got: list[Received]) -> Iterator[Links]:
    ssl = None
    authority = folder / "authority.pem"
    if kind == "tls":
        trust = trustme.CA()
        trust.cert_pem.write_to_path(authority)
        ssl = SSLContext(PROTOCOL_TLS_SERVER)
        trust.issue_cert("localhost", "127.0.0.1").configure_cert(ssl)
    address = str(folder / "agent.sock") if kind.startswith("unix") else ("127.0.0.1", 0)
    with Agent(address, got.append, ssl=ssl) as agent:
        where = agent.address if isinstance(agent.address, str) else str(agent.address[1])
        yield Links(agent, [where, kind, str(authority)])


@once
@pytest.mark.skipif(
    "libuv" in gevent.config.loop.__module__,
    reason="on libuv, a child that runs its copy of the loop before that is initialized anew changes what the parent's "
    "loop waits for",
)
@pytest.mark.parametrize("kind", ["unix", "unix acks", "tcp", "tcp acks", "tls"])
def test_hooks_of_other_libraries(folder: Path, kind: str) -> None:
    """Hooks that switch or send run before the client's own: frames stay whole, and arrive once."""
    got: list[Received] = []
    with linked(kind, folder, got) as (agent, (where, *more)), program("hooks", ("os", "patched"), where, *more) as run:
        act = {b"stop\n": agent.stop_reading, b"resume\n": agent.resume_reading}
        expected: list[int] = []
        while line := run.stdout.readline():
            if line in act:
                act[line]()
                run.stdin.write(b"\n")
                run.stdin.flush()
            else:
                expected += map(int, line.split())
        finish(run)
        records = [each.message.record for each in got if isinstance(each.message, Msg)]
        assert sorted(each.custom_data["n"] for each in records) == sorted(expected)
        assert agent.counts.broken_streams == agent.counts.half_frames == agent.counts.refused == 0
        mine = [each.custom_data["n"] for each in records if each.custom_data["n"] < 100_000]
        for client in range(100):  # each has 1,000 numbers, and a connection of its own
            numbers = [number for number in mine if number // 1000 == client]
            assert numbers == sorted(numbers), "the parent's are in order"


def test_closed_clients_are_collected() -> None:
    before = len(forks.registered())
    with Client(NoOp) as client:
        client.send(message(1))
        assert client.flush(10)
        reference = weakref.ref(client)
        assert len(forks.registered()) > before
    del client
    gevent.sleep(0)
    eventually(lambda: gc.collect() is not None and reference() is None, timeout=10)


def test_one_that_fails_does_not_keep_the_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting:
        called = 0

        def after_fork_in_child(self) -> None:
            self.called += 1

    class Failing(Counting):
        def after_fork_in_child(self) -> None:
            super().after_fork_in_child()
            raise RuntimeError("cannot")

    things = [Counting(), Failing(), Counting()]
    monkeypatch.setattr(forks, "registered", lambda: things)
    monkeypatch.setattr(forks, "_pid", -1)  # as if the process had been forked
    monkeypatch.setattr(forks, "under_way", [None])
    forks.check()
    forks.check()
    assert [thing.called for thing in things] == [1, 1, 1]
    assert "cannot" in caplog.text
