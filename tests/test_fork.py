"""Forks: what is the parent's stays the parent's, and the child starts anew. Real forks of a real process."""

from __future__ import annotations

import gc
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket, subprocess
from helpers import eventually, message, receiving

from geventaudit import BaseClient, Client, ConnectionFailedError, NoOp
from geventaudit.runtime import fork, native

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


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_child_does_not_keep_the_parents_connection_open(socket_path: str, kind: tuple[str, str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        with program("parent_hangs_up", kind, socket_path) as process:
            agent, _ = listener.accept()
            with agent:
                agent.settimeout(30)
                while agent.recv(65536):  # ends only when nobody has that connection open
                    pass
            assert process.stdout.readline() == b"closed\n"


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


def test_closed_clients_are_collected() -> None:
    with Client(NoOp) as client:
        client.send(message(1))
        assert client.flush(10)
        reference = weakref.ref(client)
        assert client in fork._tracked
    del client
    gevent.sleep(0)
    gc.collect()
    eventually(lambda: gc.collect() is not None and reference() is None, timeout=10)


def test_a_base_client_in_a_child_wants_a_connection_of_its_own() -> None:
    """The hook is called as the fork would: the process of the tests itself is not forked."""
    with BaseClient(NoOp()) as client:
        client.send(message(1))
        assert client.flush(10)
        client.after_fork_in_child()
        assert client.stats().accepted == 0
        with pytest.raises(ConnectionFailedError, match="parent process"):
            client.send(message(2))
        client.reset(NoOp())
        client.send(message(3))
        assert client.flush(10)
        assert client.stats().delivered == 1


def test_one_that_fails_does_not_keep_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def after_fork_in_child(self) -> None:
            raise RuntimeError("cannot")

    class Counting:
        called = 0

        def after_fork_in_child(self) -> None:
            self.called += 1

    things = [Counting(), Failing(), Counting()]
    for thing in things:
        fork.track(thing)
    tracked = set(fork._tracked)
    for other in tracked - set(things):
        fork._tracked.discard(other)
    fork._in_child()
    for other in tracked:
        fork._tracked.add(other)
    assert [getattr(thing, "called", None) for thing in things] == [1, None, 1]
    assert "cannot" in caplog.text


def test_two_threads_that_fork_at_once_let_go_of_what_is_theirs() -> None:
    class Busy:
        def __init__(self) -> None:
            self.lock = native.allocate_lock()
            self.owner = 0
            self.wrong = 0

        def before_fork(self) -> None:
            self.lock.acquire()
            self.owner = native.thread_ident()

        def after_fork_in_parent(self) -> None:
            self.wrong += self.owner != native.thread_ident()
            self.lock.release()
            native.sleep(0.002)  # for the other thread to come in

        def after_fork_in_child(self) -> None:
            pass

    busy, done = [Busy(), Busy()], []
    for each in busy:
        fork.track(each)

    def forking() -> None:
        for _ in range(20):
            fork._before()
            fork._in_parent()
        done.append(True)

    for _ in range(2):
        native.start_new_thread(forking, ())
    eventually(lambda: len(done) == 2)
    assert [each.wrong for each in busy] == [0, 0]
    assert not fork._held
