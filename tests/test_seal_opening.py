"""The key file of a seal is read in a native thread: records wait for it, and send() does not."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import descriptors, destroys_a_hub, eventually, message, on_signal, once, threads
from test_trail import client_of, verified
from trails import MASTER, copy_of_key

from geventaudit import (
    AuditClient,
    BaseClient,
    Client,
    DomainSocket,
    Msg,
    NotificationKind,
    Seal,
    SealError,
    Spool,
)
from geventaudit.agent import Agent, Received
from geventaudit.delivery.stamped_outbox import StampedOutbox
from geventaudit.runtime import native
from geventaudit.trail import key_file
from geventaudit.trail.canonical import KEY
from geventaudit.verify.keyring import KeyCopy


class Key:
    """A key file, and the auditor's copy of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "seal.key"
        key_file.create(str(self.path))
        self.copy = KeyCopy("copy", *key_file.read_copy(str(self.path)))

    def seal(self) -> Seal:
        return Seal(key_file=self.path)

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Keep the file locked, as another process that starts does; yield a function that ends that."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield lambda: fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


@pytest.fixture
def key(folder: Path) -> Key:
    return Key(folder)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_file, "_LOCK_SECONDS", 60.0)


def own(got: list[Received]) -> list[int]:
    """The numbers of the users' records."""
    found = [each.message.record.custom_data for each in got if isinstance(each.message, Msg)]
    return [data["n"] for data in found if "checkpoint" not in data[KEY]]


def kinds(client: AuditClient) -> list[NotificationKind]:
    found = []
    channel = client.notify()
    with gevent.Timeout(0.05, False):
        while (item := channel.get()) is not StopIteration:
            found.append(item.kind)
    return found


def is_held(client: AuditClient, records: int) -> bool:
    outbox = client._life.outbox
    return outbox is not None and len(outbox.inbox) == records


# -- the key is being read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spooled", [False, True])
def test_send_does_not_wait_for_the_lock(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key, spooled: bool
) -> None:
    options = {"spool": Spool(folder / "spool")} if spooled else {}
    with key.locked() as unlock, client_of(socket_path, seal=key.seal(), queue_size=600, **options) as client:
        for number in range(600):
            client.send(message(number))  # returns, though the file stays locked until unlock()
        stats = client.stats()
        assert (stats.queued, stats.accepted) == (600, 600)
        assert not client.flush(0.05)
        unlock()
        assert client.flush(60)
        client.send(message(600))
    assert own(got) == list(range(601))
    report = verified(got, folder, key.copy)
    assert report.problems() == []
    assert [(each.records, each.has_end) for each in report.streams] == [(603, True)]


def test_a_static_key_on_a_slow_disk(agent: Agent, got: list[Received], socket_path: str, folder: Path) -> None:
    path = folder / "mounted.key"
    os.mkfifo(path, 0o600)
    with client_of(socket_path, seal=Seal(key_file=path, static=True)) as client:
        client.send(message(0))  # returns, though the file cannot be opened before something writes to it
        gevent.sleep(0.05)
        client.send(message(1))
        path.write_text(bytes(range(32)).hex())
    assert own(got) == [0, 1]
    assert verified(got, folder, copy_of_key(start=0)).problems() == []


def test_a_key_in_memory_needs_no_thread(socket_path: str) -> None:
    before = threads()
    with client_of(socket_path, seal=Seal(key=bytes(range(32)))) as client:
        client.send(message(0))
        outbox: Any = client._life.outbox
        assert outbox._stamper.is_open
        assert threads() == before
        client.close(0.0)


def test_clients_that_share_a_seal_read_it_once(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key
) -> None:
    seal = key.seal()
    clients = [client_of(socket_path, seal=seal) for _ in range(3)]
    for client in clients:
        client.send(message(1))
    for client in clients:
        client.close()
    report = verified(got, folder, key.copy)
    assert report.problems() == []
    assert sorted(each.stream.split("/")[1:] for each in report.streams) == [["1", "1"], ["1", "2"], ["1", "3"]]


def test_nothing_is_left_behind(agent: Agent, socket_path: str, key: Key) -> None:
    with client_of(socket_path, seal=key.seal()) as client:
        client.send(message(1))
    before = descriptors(), threads()
    for number in range(6):
        with key.locked() as unlock:
            client = client_of(socket_path, seal=key.seal())
            client.send(message(number))
            if number % 2:
                unlock()
            client.close(0.0 if number % 3 else 10.0 * (number % 2))
        eventually(lambda: (descriptors(), threads()) <= before, "the thread ends, and its descriptors are closed")


@pytest.mark.parametrize("spooled", [False, True])
def test_a_key_that_comes_while_the_client_closes_starts_no_timer(
    socket_path: str, folder: Path, key: Key, spooled: bool
) -> None:
    seal = key.seal()
    client = client_of(socket_path, seal=seal, **({"spool": Spool(folder / "spool")} if spooled else {}))
    client.send(message(0))
    while seal.needs_reading:  # and the hub does not run
        native.sleep(0.001)
    outbox: Any = client._life.outbox
    left = client.close(0.0)
    assert [each.record.custom_data["n"] for each in left if isinstance(each.record.custom_data, dict)] == (
        [] if spooled else [0]
    )
    assert outbox._stamper.is_open
    assert outbox._timer is None


def test_the_first_checkpoint_goes_before_a_handler_that_connects(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler may call connect() of a base client, which accepts records again, and send, while the stream opens."""
    client = client_of(socket_path, seal=Seal(key=MASTER))
    checkpoint = StampedOutbox._checkpoint

    def interrupted(outbox: StampedOutbox, kind: Any, put: Any) -> Any:
        if kind == "open":
            outbox.refuse(None)
            client.send(message(1))
        return checkpoint(outbox, kind, put)

    monkeypatch.setattr(StampedOutbox, "_checkpoint", interrupted)
    client.connect()
    client.send(message(0))
    outbox: Any = client._life.outbox
    assert outbox.is_plain
    assert client.close() == []
    first = got[0].message
    assert isinstance(first, Msg)
    stamp = first.record.custom_data[KEY]
    assert (stamp["seq"], stamp["checkpoint"]["kind"]) == (1, "open")
    assert verified(got, folder).problems() == []


def test_threads_and_signal_handlers_that_send_meanwhile(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key
) -> None:
    handled = iter(range(1000, 2000))
    over: list[int] = []
    with key.locked() as unlock, client_of(socket_path, seal=key.seal(), queue_size=5000) as client:

        def send_all(first: int) -> None:
            for number in range(first, first + 100):
                client.send(message(number))
            over.append(first)

        with on_signal(lambda: client.send(message(next(handled)))):
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            for first in (100, 200):
                native.start_new_thread(send_all, (first,))
            for number in range(100):
                client.send(message(number))
                gevent.sleep(0.001)
            unlock()
            eventually(lambda: len(over) == 2)
    numbers = own(got)
    nested = next(handled) - 1000
    assert sorted(numbers) == [*range(300), *range(1000, 1000 + nested)]
    for first in (0, 100, 200):
        assert [each for each in numbers if first <= each < first + 100] == list(range(first, first + 100))
    assert nested
    assert verified(got, folder, key.copy).problems() == []


# -- the key cannot be read --------------------------------------------------------------------------------------------


def test_a_key_that_cannot_be_read(agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key) -> None:
    hidden = key.path.rename(folder / "hidden.key")
    client = client_of(socket_path, seal=key.seal(), queue_size=3)
    for number in range(3):
        client.send(message(number))
    eventually(lambda: NotificationKind.SEAL_FAILED in kinds(client))
    with pytest.raises(SealError, match=r"No such file.*make one with geventaudit seal-key.*queue is full.*\(3\)"):
        client.send(message(3))
    failures: list[Any] = []

    def send() -> None:
        try:
            client.send(message(3))
        except SealError as error:
            failures.append(error)

    native.start_new_thread(send, ())
    eventually(lambda: failures)
    assert "geventaudit seal-key" in str(failures[0])
    assert client.stats().rejected == {"seal": 2}
    assert not set(kinds(client)) & {NotificationKind.QUEUE_FULL, NotificationKind.NOT_RECORDED}
    assert got == []
    hidden.rename(key.path)
    client.send(message(4), timeout=60)
    client.close()
    assert NotificationKind.SEAL_RESTORED in kinds(client)
    assert own(got) == [0, 1, 2, 4]
    assert verified(got, folder, key.copy).problems() == []


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_close_hands_back_waiting_records(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key, missing: bool, spooled: bool
) -> None:
    if missing:
        key.path.rename(folder / "hidden.key")
    options = {"spool": Spool(folder / "spool")} if spooled else {}
    with key.locked() if not missing else open(os.devnull):
        client = client_of(socket_path, seal=key.seal(), **options)
        for number in range(5):
            client.send(message(number))
        back = client.close(0.05)
    assert [each.record.custom_data for each in back] == [{"n": number} for number in range(5)]
    stats = client.stats()
    assert (stats.dropped, stats.kept, stats.queued) == (5, 0, 0)
    assert client.close() == []
    with client_of(socket_path, seal=Seal(key=bytes(range(32))), **options) as later:
        for each in back:
            later.send(each)
    assert own(got) == list(range(5))
    assert verified(got, folder, copy_of_key(start=0)).problems() == []


def test_a_base_client_recovers_waiting_records(
    agent: Agent, got: list[Received], socket_path: str, folder: Path
) -> None:
    key = Key(folder)
    with key.locked() as unlock:
        client = BaseClient(DomainSocket(socket_path), seal=key.seal())
        client.send(message(1))
        agent.stop(0)
        eventually(lambda: client.error is not None)
        flushing = gevent.spawn(client.flush)
        assert [each.record.custom_data for each in client.recover()] == [{"n": 1}]
        assert flushing.get(timeout=30) in (True, False)
        with Agent(socket_path, got.append):
            client.reset(DomainSocket(socket_path))
            client.send(message(2))
            unlock()
            assert client.flush(60)
            client.close()
    assert own(got) == [2]
    assert verified(got, folder, key.copy).problems() == []
    assert client.stats().recovered == 1


@destroys_a_hub
def test_a_thread_that_ends_while_the_key_is_read(socket_path: str, key: Key) -> None:
    clients: list[Client] = []

    def use() -> None:
        client = client_of(socket_path, seal=key.seal())
        client.send(message(1))
        clients.append(client)
        gevent.sleep(0.01)  # the sender has its first turn
        gevent.get_hub().destroy(destroy_loop=True)

    before = threads()
    with key.locked():
        native.start_new_thread(use, ())
        eventually(lambda: clients and not clients[0]._life.thread.is_alive())
        assert [each.record.custom_data for each in clients[0].close(0.0)] == [{"n": 1}]
    eventually(lambda: threads() <= before, "the thread that reads the key ends")


# -- mode always -------------------------------------------------------------------------------------------------------


def test_with_a_spool_for_everything_send_returns_when_the_record_is_on_disk(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key
) -> None:
    spool = Spool(folder / "spool", mode="always")
    with key.locked() as unlock, client_of(socket_path, seal=key.seal(), spool=spool) as client:
        sending = [gevent.spawn(client.send, message(number)) for number in range(3)]
        gevent.sleep(0.1)
        assert not any(each.ready() for each in sending)
        refusals: list[Any] = []

        def send() -> None:
            try:
                client.send(message(9))
            except SealError as error:
                refusals.append(error)

        gevent.get_hub().loop.run_callback(send)
        eventually(lambda: refusals)
        unlock()
        gevent.joinall(sending, timeout=60, raise_error=True)
    assert own(got) == [0, 1, 2]
    assert verified(got, folder, key.copy).problems() == []
    key.path.unlink()
    with client_of(socket_path, seal=key.seal(), spool=spool) as client, pytest.raises(SealError, match="seal-key"):
        client.send(message(1))


# -- forks -------------------------------------------------------------------------------------------------------------

FORK = """
import fcntl, os, sys
sys.path.insert(0, sys.argv[3])
import gevent
from helpers import message
from geventaudit import Client, DomainSocket, Seal
path = sys.argv[2]
lock = os.open(path, os.O_RDONLY)
fcntl.flock(lock, fcntl.LOCK_EX)
client = Client(lambda: DomainSocket(sys.argv[1]), seal=Seal(key_file=path))
client.send(message(0))
gevent.sleep(0.05)  # the thread reads by then
pid = os.fork()
if not pid:
    ours = os.stat(path)
    for each in os.listdir("/proc/self/fd"):
        try:
            assert not os.path.samestat(os.fstat(int(each)), ours), "the child has a copy of the lock"
        except OSError:
            pass
    client.send(message(1))
    assert client.close(60) == []
    os._exit(0)
os.close(lock)
assert client.close(60) == []
assert os.waitpid(pid, 0)[1] == 0
"""


@once
def test_a_child_that_is_forked_meanwhile_begins_anew(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, key: Key
) -> None:
    command = [sys.executable, "-c", FORK, socket_path, str(key.path), str(Path(__file__).parent)]
    with subprocess.Popen(command) as process:
        eventually(lambda: process.poll() is not None, "the program ends", 120)
    assert process.returncode == 0
    assert sorted(own(got)) == [0, 1]
    report = verified(got, folder, key.copy)
    assert report.problems() == []
    assert sorted(each.stream.split("/")[1:] for each in report.streams) == [["1", "1"], ["2", "1"]]
