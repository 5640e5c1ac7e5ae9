"""The disk behind the queue: the records that it keeps, their order, and its failures.

The files themselves are tested in test_segments.py; files that are damaged under a client, in test_spool_faults.py.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from gevent import subprocess
from gevent.threadpool import ThreadPool
from helpers import HERE, Receiver, descriptors, eventually, first_arrivals, message, once, receiving
from test_acks import scripted
from test_poison import Picky

from benchmarks import chaos
from geventaudit import (
    Backoff,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Msg,
    NoOp,
    NotificationKind,
    QueueFullError,
    Spool,
    SpoolError,
)
from geventaudit.encoder.encoding import encode
from geventaudit.runtime import native
from geventaudit.spool import jobs
from geventaudit.spool.adoption import MAX_ORPHANS
from geventaudit.spool.disk import DiskThread
from geventaudit.spool.folder import Folder, orphans
from geventaudit.spool.format import encode_runs

MODES = ["overflow", "always"]
KILLS = int(os.environ.get("GEVENTAUDIT_KILLS", "30"))


def unreachable() -> NoOp:
    raise OSError("no agent")


def client_of(receiver: Receiver, spool: Spool, **options: Any) -> Client:
    options = {"queue_size": 50, **options}
    return Client(lambda: DomainSocket(receiver.where), backoff=Backoff(0.01, 0.05), spool=spool, **options)


def send_all(client: Client, numbers: range) -> None:
    for number in numbers:
        client.send(message(number))
        if number % 20 == 0:
            gevent.sleep(0)


def balanced(client: Client) -> bool:
    stats = client.stats()
    have = stats.delivered + stats.dropped + stats.recovered + stats.kept + stats.queued + stats.in_flight
    return stats.accepted + stats.adopted == have + stats.spooled


def told(client: Client, kind: NotificationKind) -> list[str]:
    """Return the errors of all unread notifications of that kind. The others are forgotten."""
    channel = client.notify()
    texts = []
    while True:
        try:
            notification = channel.get(timeout=0.001)
        except gevent.queue.Empty:
            return texts
        if notification is StopIteration:
            return texts
        if notification.kind is kind:
            texts.append(str(notification.error))


def number_of(frame: bytes) -> int:
    return msgpack.unpackb(frame)[1][0][1]["CustomData"]["n"]  # type: ignore[no-any-return]


def numbers_of(messages: list[Msg]) -> list[int]:
    return [msg.record.custom_data["n"] for msg in messages]  # type: ignore[index]


def on_disk(path: Path) -> list[int]:
    """Return the numbers of the undelivered records in a folder, which may be in use: a copy is read."""
    with tempfile.TemporaryDirectory(prefix="ga-") as name:
        while path.exists():
            copy = Path(name) / f"{time.monotonic_ns()}"
            try:
                shutil.copytree(path, copy)
            except (shutil.Error, FileNotFoundError):  # a file was removed meanwhile
                continue
            return read_folder(copy)
    return []


def read_folder(path: Path) -> list[int]:
    folder = Folder(str(path), "OFF")
    folder.open()
    try:
        return [number_of(frame) for _, frame in folder.read(folder.cursor, 1 << 30).frames]
    finally:
        folder.close()


def fill(path: Path, numbers: range) -> None:
    """Make a folder as a dead process leaves it, with the records of these numbers: at once, since clients look."""
    with owned(path.with_name("filling")) as folder:
        for append in encode_runs(enumerate((encode(message(number), 0.0) for number in numbers), 1)):
            folder.append(append)
    path.with_name("filling").rename(path)


@contextmanager
def owned(path: Path) -> Iterator[Folder]:
    """The folder belongs to a process that is alive."""
    folder = Folder(str(path), "OFF")
    folder.open()
    try:
        yield folder
    finally:
        folder.close()


def forked(work: Callable[[], object]) -> int:
    """Run *work* in a forked child, and return its exit status: 0 if *work* returned, negative for a signal."""
    pid = gevent.os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(120)
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(gevent.os.waitpid(pid, 0)[1])


def is_gone(pid: int) -> bool:
    """Return True if the process and all its threads are gone.

    The parent's number of a child changes before: a thread of the dead process may still hold the lock of a folder.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def program(receiver: Receiver, spool: Path, mode: str, *numbers: int) -> Any:
    command = [sys.executable, str(HERE / "spool_program.py"), receiver.where, str(spool), mode, *map(str, numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Clock:
    """A wall clock that is set forward and back by years, at each look at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks = 0
        self._right = time.time_ns
        monkeypatch.setattr(time, "time_ns", self.time_ns)
        monkeypatch.setattr(time, "time", lambda: self.time_ns() / 1e9)

    def time_ns(self) -> int:
        years = (0, 3, -5, 10, -1)[self.looks % 5]
        self.looks += 1
        return self._right() + years * 365 * 86400 * 10**9


class Gate:
    """Holds the first call of a method of Folder until it is opened: before the work, or *after* it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, method: str, *, error: Exception | None = None, after: bool = False
    ) -> None:
        self.is_reached = False
        self._opened = native.allocate_lock()
        self._opened.acquire()
        original = getattr(Folder, method)

        def held(folder: Folder, *args: Any, **options: Any) -> Any:
            if self.is_reached:
                return original(folder, *args, **options)
            done = original(folder, *args, **options) if after else None
            self.is_reached = True
            self._opened.acquire()
            self._opened.release()
            if error is not None:
                raise error
            return done if after else original(folder, *args, **options)

        monkeypatch.setattr(Folder, method, held)

    def open(self) -> None:
        self._opened.release()


# -- the way of a record -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_more_than_the_queue_holds_waits_on_disk(folder: Path, mode: Any) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool", mode=mode))
        send_all(client, range(500))
        assert balanced(client)
        assert client.stats().accepted == 500
        assert client.stats().spooled >= 450, "the queue holds 50"
        receiver.start()
        assert client.flush(30)
        assert balanced(client)
        assert client.close() == []
        eventually(lambda: receiver.numbers() == list(range(500)), "read, and stored")
    assert list(folder.glob("spool/*.seg")) == [], "delivered records leave the disk"


def test_a_disk_that_hangs_when_the_spool_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a network, say. The agent is well."""
    monkeypatch.setattr("geventaudit.spool.store.HANG_SECONDS", 0.1)
    fill(folder / "spool", range(1000, 1010))
    gate = Gate(monkeypatch, "open")
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool")) as client:
        receiver.start()
        send_all(client, range(40))
        eventually(lambda: receiver.numbers() == list(range(40)), "as if there were no spool")
        assert client.flush(10)
        assert "the disk has not answered" in told(client, NotificationKind.SPOOL_FAILED)[0]
        assert balanced(client)
        gate.open()
        eventually(lambda: len(receiver.numbers()) == 50)
        send_all(client, range(40, 200))
        assert client.flush(30)
        assert first_arrivals(receiver.numbers()) == [*range(40), *range(1000, 1010), *range(40, 200)]
        assert told(client, NotificationKind.SPOOL_RESTORED)


@pytest.mark.parametrize("method", ["open", "append", "advance"])
def test_senders_do_not_wait_for_a_disk_that_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """In mode always: each request of a service would wait. Only records that may be half written wait."""
    monkeypatch.setattr("geventaudit.spool.store.HANG_SECONDS", 0.1)
    gate = Gate(monkeypatch, method)
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool", mode="always")) as client:
        receiver.start()
        kept = []

        def send(number: int) -> None:
            client.send(message(number))
            kept.append(number)

        first = gevent.spawn(send, 0)
        eventually(lambda: gate.is_reached)
        others = [gevent.spawn(send, number) for number in range(1, 20)]
        with pytest.raises(SpoolError, match="the disk has not answered"):
            gevent.joinall(others, raise_error=True, timeout=30)
        gevent.joinall(others, timeout=30)
        assert not any(each.successful() for each in others), "none is half accepted"
        assert first.ready() == (method != "append")
        assert balanced(client)
        gate.open()
        first.join(30)
        eventually(lambda: client.stats().spooled == 0 and not client._life.outbox.store._trouble.blocks)
        send(20)
        assert client.flush(30)
        assert receiver.numbers() == sorted(kept)
        assert kept == ([20] if method == "open" else [0, 20])


@pytest.mark.parametrize("mode", MODES)
def test_the_next_client_sends_left_records_first(folder: Path, mode: Any) -> None:
    """At close(), in mode overflow, older records are in memory and newer ones on disk."""
    spool = Spool(folder / "spool", mode=mode)
    with receiving(folder) as receiver:
        for start in (0, 300, 600):
            client = client_of(receiver, spool)
            send_all(client, range(start, start + 300))
            assert client.close(0.0) == []
            assert client.stats().kept == start + 300
            assert client.stats().spooled == 0
            assert balanced(client)
            assert not client.flush(), "kept is not delivered"
            assert on_disk(folder / "spool") == list(range(start + 300))
        receiver.start()
        client = client_of(receiver, spool)
        send_all(client, range(900, 1000))
        eventually(lambda: receiver.numbers() == list(range(1000)), "oldest first")
        assert client.flush(30)
        assert client.stats().adopted == 900
        client.close()


@pytest.mark.parametrize("mode", MODES)
def test_unread_records_are_kept(folder: Path, mode: Any) -> None:
    spool = Spool(folder / "spool", mode=mode)
    with receiving(folder) as receiver:
        receiver.start()
        client = client_of(receiver, spool)
        client.send(message(0))
        assert client.flush(10)
        receiver.pause()
        send_all(client, range(1, 400))
        eventually(lambda: client.stats().in_flight, "written, and not read")
        assert client.close(0.0) == []
        assert on_disk(folder / "spool")[-1] == 399
        receiver.end(signal.SIGKILL)
        receiver.start()
        with client_of(receiver, spool) as client:
            client.connect()
            eventually(lambda: len(set(receiver.numbers())) == 400)
        assert first_arrivals(receiver.numbers()) == list(range(400))


def test_a_client_without_records_touches_no_disk(folder: Path) -> None:
    with Client(unreachable, spool=Spool(folder / "spool")):
        pass
    assert list(folder.iterdir()) == []


def test_always_is_on_disk_when_send_returns(folder: Path) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool", mode="always")) as client:
        for number in range(20):
            client.send(message(number))
            assert on_disk(folder / "spool") == list(range(number + 1))
        receiver.start()
        assert client.flush(10)
        eventually(lambda: on_disk(folder / "spool") == [], "delivered, and gone from the disk")


@pytest.mark.parametrize("mode", MODES)
def test_in_order_while_records_come_and_go(folder: Path, mode: Any) -> None:
    """From the queue to the disk, and back to the queue, several times."""
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool", mode=mode)) as client:
        receiver.start()
        number = 0
        for round_ in range(12):
            if round_ % 3 == 0:
                receiver.end(signal.SIGTERM)
            if round_ % 3 == 1:
                receiver.start()
            send_all(client, range(number, number + 200))
            number += 200
            if round_ % 3 == 2:
                assert client.flush(30)
        assert client.flush(30)
        eventually(lambda: first_arrivals(receiver.numbers()) == list(range(number)))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_clock_that_jumps_changes_neither_deadlines_nor_order(
    folder: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    spool = Spool(folder / "spool", mode=mode) if mode else None

    def in_time(seconds: float, waiting: Callable[[float], object]) -> object:
        """Return the result of *waiting*: not before those seconds are over, and not years later."""
        began = time.monotonic()
        with gevent.Timeout(60):
            result = waiting(seconds)
        assert time.monotonic() - began >= seconds
        return result

    with receiving(folder) as receiver:
        client = Client(lambda: DomainSocket(receiver.where), backoff=Backoff(0.01, 0.05), queue_size=200, spool=spool)
        send_all(client, range(200))
        assert in_time(0.2, client.flush) is False, "there is no agent"
        with pytest.raises(ConnectionFailedError):
            in_time(0.2, client.connect)
        if spool is None:
            with pytest.raises(QueueFullError):
                in_time(0.2, lambda seconds: client.send(message(), timeout=seconds))
        receiver.start()
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == list(range(200)))
        assert client.stats().heartbeats == 1, "none is due for half an hour"
        receiver.end(signal.SIGKILL)
        eventually(lambda: not client.stats().connected)
        send_all(client, range(200, 300))
        left = in_time(0.2, client.close)
        assert left == ([] if spool else [message(number) for number in range(200, 300)])
        if spool:
            receiver.start()
            with client_of(receiver, spool) as client:
                send_all(client, range(300, 400))
                assert client.flush(30)
            eventually(lambda: receiver.numbers() == list(range(400)))
    assert clock.looks > 300


def test_a_record_that_the_agent_never_takes_is_among_the_rejected(folder: Path) -> None:
    with scripted(str(folder / "agent.sock"), Picky(3)):
        client = Client(
            lambda: DomainSocket(folder / "agent.sock", require_ack=True),
            backoff=Backoff(0.005, 0.02),
            spool=Spool(folder / "spool", mode="always"),
        )
        for number in range(10):
            client.send(message(number))
        eventually(lambda: (client.stats().delivered, client.stats().dropped) == (9, 1))
        client.close()
    assert on_disk(folder / "spool") == []
    (line,) = (folder / "spool" / "rejected.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert "hung up" in entry["reason"]
    assert number_of(base64.b64decode(entry["frame"])) == 3


def test_no_client_with_a_spool_takes_a_frame_that_no_segment_can_have(folder: Path) -> None:
    """The disk would refuse it, and all that is written together with it."""
    spool = Spool(folder / "spool", max_bytes=1 << 30)
    with pytest.raises(ValueError, match="max_frame_bytes must be at most 67108864 with a spool, got 67108865"):
        Client(unreachable, spool=spool, max_frame_bytes=(64 << 20) + 1)
    with Client(NoOp, spool=spool, max_frame_bytes=64 << 20) as client:
        client.send(message(1))
        assert client.flush(30)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_full_spool_refuses(folder: Path, mode: Any) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool", mode=mode, max_bytes=100_000))
        accepted = 0

        def send_on() -> None:
            nonlocal accepted
            for number in range(5000):
                client.send(message(number))
                accepted += 1
                gevent.sleep(0)
                if accepted == 60:  # 50 are on the queue, and there is little room while the folder is being opened
                    eventually(lambda: list((folder / "spool").glob("*.seg")))

        with pytest.raises(QueueFullError, match="spool"):
            send_on()
        assert 100 < accepted < 1000
        assert client.stats().rejected == {"queue_full": 1}
        assert client.stats().accepted == accepted
        assert sum(path.stat().st_size for path in (folder / "spool").iterdir()) < 110_000
        receiver.start()
        client.send(message(accepted), timeout=10.0)  # there is room again before long
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == list(range(accepted + 1)))
        client.close()


@pytest.mark.parametrize("mode", MODES)
def test_the_disk_is_given_back(folder: Path, mode: Any) -> None:
    def size() -> int:
        return sum(len(path.read_bytes()) for path in (folder / "spool").glob("*.seg") if path.exists())

    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool", mode=mode)) as client:
        for number in range(120):
            client.send(message(custom_data={"n": number, "text": "x" * 100_000}))
            gevent.sleep(0)
        eventually(lambda: size() > 4 << 20)
        receiver.start()
        assert client.flush(30)
        eventually(lambda: size() == 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"path": "/"}, "the name of a folder"),
        ({"path": "/var/{pid}/x"}, r"one \{pid\}"),
        ({"path": "/var/{pdi}"}, r"no braces other than \{pid\}, got '/var/\{pdi\}'"),
        ({"path": "~/x"}, "expanduser"),
        ({"max_bytes": 0}, "max_bytes must be"),
        ({"mode": "sometimes"}, "mode must be"),
        ({"synchronous": "EXTRA"}, "synchronous must be"),
    ],
)
def test_invalid_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Spool(**{"path": "/tmp/x", **options})


@pytest.mark.parametrize("path", [None, b"/tmp/x", 7])
def test_a_path_must_be_a_text_or_a_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path must be a text or a Path, got"):
        Spool(path)


def test_a_spool_must_be_a_spool() -> None:
    with pytest.raises(TypeError, match="spool must be a Spool"):
        Client(lambda: DomainSocket(), spool="/tmp/x")  # type: ignore[arg-type]


def test_a_missing_parent_is_named(folder: Path) -> None:
    with Client(NoOp, spool=Spool(folder / "nowhere" / "spool")) as client:
        client.send(message(1))
        (error,) = eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
        assert f"{folder / 'nowhere' / 'spool'} cannot be made: its parent folder is missing" in error


def test_why_there_is_no_room_while_the_folder_is_being_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, "open")
    monkeypatch.setattr("geventaudit.spool.store.PENDING_BYTES", 1000)
    client = Client(NoOp, spool=Spool(folder / "spool"), queue_size=10)
    with pytest.raises(QueueFullError, match="its spool is still being opened"):
        send_all(client, range(50))
    gate.open()
    assert client.close() == []


@pytest.mark.parametrize("mode", MODES)
def test_no_thread_can_be_started_for_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """The same as a disk that fails: notified, done without, tried again."""

    def fail(*arguments: Any) -> int:
        raise RuntimeError("can't start new thread")

    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool", mode=mode)) as client:
        receiver.start()
        with monkeypatch.context() as patch:
            patch.setattr(native, "start_new_thread", fail)
            if mode == "always":
                with pytest.raises(SpoolError, match="can't start new thread"):
                    client.send(message(0))
            else:
                client.send(message(1))
                assert client.flush(30)
            (error,) = eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
            assert "can't start new thread" in error
        eventually(lambda: told(client, NotificationKind.SPOOL_RESTORED))
        client.send(message(2))
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == ([2] if mode == "always" else [1, 2]))
        assert balanced(client)


# -- other owners ------------------------------------------------------------------------------------------------------


def test_a_folder_that_another_client_has(folder: Path) -> None:
    """The second client goes on without it, and has it once the first closes."""
    with receiving(folder) as receiver:
        receiver.start()
        spool = Spool(folder / "spool")
        first, second = client_of(receiver, spool), client_of(receiver, spool)
        first.send(message(0))
        assert first.flush(10)
        send_all(second, range(1, 20))
        assert second.flush(10), "the queue has room"
        eventually(lambda: "in use by another" in " ".join(told(second, NotificationKind.SPOOL_FAILED)))
        for number in range(20, 60):
            second.send(message(number))
            assert second.flush(10), "one delivery after the other"
        assert 1 <= second.stats().spool_failures < 10, "a delivery is no reason to try again"
        first.close()
        eventually(lambda: told(second, NotificationKind.SPOOL_RESTORED), "it is tried again")
        second.close()
        eventually(lambda: receiver.numbers() == list(range(60)))


def test_always_cannot_do_without_the_folder(folder: Path) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        spool = Spool(folder / "spool", mode="always")
        with client_of(receiver, spool) as first, client_of(receiver, spool) as second:
            first.send(message(0))
            with pytest.raises(SpoolError, match="in use by another"):
                second.send(message(1))
            assert second.stats().rejected == {"spool": 1}
            assert second.stats().accepted == 0


@pytest.mark.parametrize("mode", MODES)
def test_two_clients_of_a_process_have_a_folder_each(folder: Path, mode: Any) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        spool = Spool(folder / "audit-{pid}.spool", mode=mode)
        with client_of(receiver, spool) as first, client_of(receiver, spool) as second:
            for number, client in enumerate((first, second)):
                client.send(message(number))
                assert client.flush(30)
            names = {f"audit-{os.getpid()}.spool", f"audit-{os.getpid()}.2.spool"}
            eventually(lambda: {path.name for path in folder.glob("audit-*")} == names)
            assert [told(client, NotificationKind.SPOOL_FAILED) for client in (first, second)] == [[], []]
        assert receiver.numbers() == [0, 1]
    assert list(folder.glob("audit-*")) == [], "both are empty, and removed"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taken", ["by a process", "by another user"])
def test_the_folder_of_a_new_process_is_taken(folder: Path, taken: str, mode: Any) -> None:
    """A restarted container gives the same identifiers: the first new worker may send the records of them all."""
    path = folder / f"audit-{os.getpid()}"
    fill(path, range(10))
    if taken == "by another user":
        if os.geteuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(path, 12345, 12345)
    with receiving(folder) as receiver, ExitStack() as stack:
        other = stack.enter_context(owned(path)) if taken == "by a process" else None
        client = client_of(receiver, Spool(folder / "audit-{pid}", mode=mode))
        send_all(client, range(10, 20))
        assert client.close(0) == []
        assert told(client, NotificationKind.SPOOL_FAILED) == []
        if other is not None:
            assert other.count == 10
        assert on_disk(folder / f"audit-{os.getpid()}.2") == list(range(10, 20))
        stack.close()
        receiver.start()
        with client_of(receiver, Spool(folder / "audit-{pid}")) as client:
            client.connect(10)
            arrived = range(10, 20) if other is None else range(20)
            eventually(lambda: sorted(receiver.numbers()) == list(arrived))
    assert list(folder.glob("audit-*")) == ([path] if other is None else [])


def test_a_process_that_looks_for_orphans_never_disturbs_a_new_one(folder: Path) -> None:
    """The search may lock the folder that the new process has just made."""
    spool = Spool(folder / "audit-{pid}", mode="always")
    looks = 0
    is_over = False

    def look() -> None:
        nonlocal looks
        while not is_over:
            jobs.adopt(spool, (), [])
            looks += 1

    looking = ThreadPool(1).spawn(look)
    try:
        with receiving(folder) as receiver:
            receiver.start()
            for number in range(200):
                with client_of(receiver, spool) as client:
                    client.send(message(number))
                    assert client.stats().spool_failures == 0
    finally:
        is_over = True
        looking.get()
    assert looks > 200


def test_the_working_directory_may_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change between two searches for the folders of dead processes has no effect either."""
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.02)
    monkeypatch.chdir(folder)
    spool = Spool("audit-{pid}")
    monkeypatch.chdir("/")
    with receiving(folder) as receiver, client_of(receiver, spool) as client:
        receiver.start()
        client.send(message(0))
        assert client.flush(30)
        eventually(lambda: (folder / f"audit-{os.getpid()}").is_dir())
        fill(folder / "audit-99999990", range(1, 10))
        eventually(lambda: receiver.numbers() == list(range(10)))


def test_orphans_are_adopted_by_exactly_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five processes died; four that live begin at once."""
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.05)
    for number in range(5):
        fill(folder / f"audit-{99999990 + number}", range(number * 100, number * 100 + 100))
    with receiving(folder) as receiver:
        receiver.start()
        programs = [
            program(receiver, folder / "audit-{pid}", "overflow", 1000 + number * 100, 100) for number in range(4)
        ]
        for each in programs:
            output, errors = each.communicate(timeout=60)
            assert output.endswith(b"delivered\n"), errors.decode()
        # flush() does not wait for orphans: a program may have ended before it had sent all of one.
        with client_of(receiver, Spool(folder / "audit-{pid}")) as client:
            client.send(message(2000))
            eventually(lambda: set(receiver.numbers()) == {*range(500), *range(1000, 1400), 2000})
            eventually(lambda: [path.name for path in folder.glob("audit-*")] == [f"audit-{os.getpid()}"], "deleted")
        arrived = Counter(receiver.numbers())
        for number in range(5):
            part = [each for each in receiver.numbers() if each // 100 == number]
            assert first_arrivals(part) == list(range(number * 100, number * 100 + 100)), "in order"
        # Only records that were in flight when their program ended may come twice.
        assert all(times == 1 for number, times in arrived.items() if number >= 1000)
    assert list(folder.glob("audit-*")) == [], "empty folders are removed"


def test_an_orphan_is_adopted_by_a_process_that_already_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place: the records are sent from the dead process's folder, which is deleted then."""
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.02)
    looks: list[str] = []
    open_folder = Folder.open

    def opened(self: Folder, create: bool = True) -> None:
        looks.append(self.path)
        open_folder(self, create)

    monkeypatch.setattr(Folder, "open", opened)
    orphan = folder / "audit-99999999"
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}")) as client:
        receiver.start()
        client.send(message(0))
        assert client.flush(10)
        fill(orphan, range(1, 2))
        with owned(orphan):
            looks.clear()
            client.send(message(2))
            assert client.flush(10)
            eventually(lambda: looks.count(str(orphan)) >= 3)
            assert [number for number in receiver.numbers() if number != 1] == receiver.numbers(), "its owner is alive"
        eventually(lambda: receiver.numbers() == [0, 2, 1])
        eventually(lambda: not orphan.exists())
        assert client.stats().adopted == 1
        assert client.stats().spool_failures == 0
        assert balanced(client)


def test_flush_does_not_wait_for_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The orphan is drained later, and before younger records of this client that are on disk."""
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.01)
    monkeypatch.setattr("geventaudit.spool.store.READ_AGAIN_SECONDS", 0.05)
    fill(folder / "audit-99999999", range(1000, 1100))
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}")) as client:
        send_all(client, range(100))
        eventually(lambda: client.stats().adopted == 100)
        receiver.start()
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == [*range(1000, 1100), *range(100)], "the orphan is older")
        reading, read = [], Folder.read

        def read_never(self: Folder, after: int, max_bytes: int, **options: bool) -> Any:
            if "99999998" in self.path:
                reading.append(self.path)
                raise OSError(5, "Input/output error")
            return read(self, after, max_bytes, **options)

        monkeypatch.setattr(Folder, "read", read_never)
        fill(folder / "audit-99999998", range(2000, 2100))
        eventually(lambda: reading)
        send_all(client, range(100, 110))
        assert client.flush(30), "an orphan that cannot be read holds up nothing"
        eventually(lambda: client.stats().dropped == 100)
        assert balanced(client)


def test_an_orphan_on_a_disk_that_has_no_room_for_two(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.05)
    with receiving(folder) as receiver:
        receiver.start()
        with client_of(receiver, Spool(small_disk / "audit-{pid}", mode="always")) as client:
            client.send(message(0))
            assert client.flush(30)
            orphan = small_disk / "audit-99999999"
            fill(orphan, range(1, 501))
            eventually(lambda: len(receiver.numbers()) >= 501 and not orphan.exists())
            assert balanced(client)
            assert client.flush(30)
            assert client.stats().adopted == 500
        assert receiver.numbers() == list(range(501)), "each once"
        assert list(small_disk.iterdir()) == []


def test_very_many_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers were recycled during a long outage. Each folder of them takes descriptors and memory."""
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 3600.0)
    for number in range(30):
        fill(folder / f"audit-{99999900 + number}", range(number * 10, number * 10 + 10))
    before = descriptors()
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}", mode="always")) as client:
        eventually(lambda: client.send(message(1000)) or client.stats().adopted == MAX_ORPHANS * 10)
        most = descriptors()
        assert most < before + 10 + 4 * MAX_ORPHANS
        gevent.sleep(0.05)
        assert client.stats().adopted == MAX_ORPHANS * 10, "enough until some of these are sent"
        receiver.start()
        eventually(lambda: set(receiver.numbers()) == {*range(300), 1000}, "without another wait")
        eventually(lambda: [path.name for path in folder.glob("audit-*")] == [f"audit-{os.getpid()}"])
        assert client.stats().adopted == 300
        assert balanced(client)
        assert descriptors() <= most


def test_other_jobs_come_between_the_openings_of_orphans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All records in a folder are looked at when it is opened, which may take long."""
    for number in range(3):
        fill(folder / f"audit-{99999990 + number}", range(10))
    events: list[str] = []
    open_folder, append = Folder.open, Folder.append
    gate = native.allocate_lock()
    gate.acquire()

    def opened(self: Folder, create: bool = True) -> None:
        events.append("open")
        if events.count("open") == 2:  # the first is the own one
            gate.acquire(timeout=30)
        open_folder(self, create)

    def appended(self: Folder, *arguments: Any) -> None:
        events.append("write")
        append(self, *arguments)

    monkeypatch.setattr(Folder, "open", opened)
    monkeypatch.setattr(Folder, "append", appended)
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}", mode="always")) as client:
        client.send(message(0))
        eventually(lambda: events == ["open", "write", "open"])
        waiting = gevent.spawn(client.send, message(1))
        eventually(lambda: client._life.outbox.store.pending)
        gate.release()
        waiting.get(timeout=30)
        eventually(lambda: client.stats().adopted == 30)
        assert events == ["open", "write", "open", "write", "open", "open"]
        receiver.start()


def test_orphans_are_adopted_while_the_disk_is_never_idle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.05)
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}", mode="always")) as client:
        receiver.start()
        numbers = count(1000)

        def send() -> None:
            while True:
                client.send(message(next(numbers)))

        senders = [gevent.spawn(send) for _ in range(50)]
        eventually(lambda: next(numbers) > 2000)
        fill(folder / "audit-99999999", range(10))
        eventually(lambda: client.stats().adopted == 10)
        gevent.killall(senders)
        assert client.flush(30)


@pytest.mark.parametrize("mode", MODES)
def test_the_lock_of_an_idle_process_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """By a program that cleans folders of old files. No other process takes the process for dead."""
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "audit-{pid}", mode=mode), queue_size=10)
        send_all(client, range(30))
        path = folder / f"audit-{os.getpid()}"
        eventually(lambda: bool(list(path.glob("*.seg"))))
        (path / "lock").unlink()
        assert jobs.adopt(Spool(folder / "audit-{pid}"), (), []) == jobs.Adopted(None, [])
        send_all(client, range(30, 40))
        receiver.start()
        assert client.close(30) == []
        assert receiver.numbers() == list(range(40))
        assert client.stats().adopted == 0
    assert not path.exists()


def test_an_orphan_that_cannot_be_changed_is_sent_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without permission to remove the files, say."""
    monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.02)
    orphan = folder / "audit-99999999"
    fill(orphan, range(1, 4))
    advance = Folder.advance

    def fail(self: Folder, seq: int) -> list[bytes]:
        if self.path == str(orphan):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return advance(self, seq)

    monkeypatch.setattr(Folder, "advance", fail)
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}")) as client:
        receiver.start()
        client.send(message(0))
        eventually(lambda: len(receiver.numbers()) == 4)
        eventually(lambda: client.stats().spool_failures)
        looks: list[str] = []
        monkeypatch.setattr(jobs, "orphans", lambda template: looks.append(template) or orphans(template))
        eventually(lambda: len(looks) >= 3)
        assert sorted(receiver.numbers()) == [0, 1, 2, 3]
        assert client.stats().adopted == 3
    assert orphan.exists()


@pytest.mark.parametrize("moment", ["opening", "reading", "deleting"])
def test_killed_while_it_drains_an_orphan(folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    fill(folder / "audit-99999999", range(300))
    with receiving(folder) as receiver:
        receiver.start()

        def adopt_and_die() -> None:
            method = {"opening": "open", "reading": "read", "deleting": "advance"}[moment]
            original = getattr(Folder, method)

            def die(self: Folder, *args: Any, **options: Any) -> Any:
                result = original(self, *args, **options)
                if "99999999" in self.path:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            monkeypatch.setattr(Folder, method, die)
            client = client_of(receiver, Spool(folder / "audit-{pid}", mode="always"))
            client.send(message(1000))
            gevent.sleep(60)

        assert forked(adopt_and_die) == -signal.SIGKILL
        with client_of(receiver, Spool(folder / "audit-{pid}")) as client:
            client.send(message(1001))
            eventually(lambda: set(receiver.numbers()) == {*range(300), 1000, 1001})
            eventually(lambda: len(list(folder.glob("audit-*"))) == 1)
        assert first_arrivals([number for number in receiver.numbers() if number < 300]) == list(range(300))
        if moment != "deleting":
            assert len([number for number in receiver.numbers() if number < 300]) == 300, "each once"


# -- a disk that fails -------------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    """Damage all segments in a folder in one way."""
    for file in path.glob("*.seg"):
        data = bytearray(file.read_bytes())
        if how == "truncated":
            del data[len(data) * 2 // 3 :]
        elif how == "header":
            data[:32] = bytes(32)
        elif how == "nonsense":
            data = bytearray(b"nonsense" * 600)
        elif how == "two places":
            for part in (0.2, 0.8):
                at = int(len(data) * part)
                data[at : at + 1000] = bytes(1000)
        file.write_bytes(bytes(data))
    if how == "cursor":
        (path / "cursor").write_bytes(b"nonsense" * 10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["truncated", "header", "nonsense", "two places", "cursor"])
def test_a_folder_that_was_damaged_between_two_clients(folder: Path, mode: Any, how: str) -> None:
    spool = Spool(folder / "spool", mode=mode)
    with receiving(folder) as receiver:
        client = client_of(receiver, spool)
        send_all(client, range(300))
        assert client.close(0.0) == []
        spoil(folder / "spool", how)
        receiver.start()
        client = client_of(receiver, spool)
        for number in range(300, 600):
            client.send(message(number))
            gevent.sleep(0)
        eventually(lambda: 599 in receiver.numbers())
        assert client.flush(30) or client.stats().dropped
        stats, arrived = client.stats(), receiver.numbers()
        assert arrived == sorted(set(arrived)), "oldest first, each once"
        assert set(arrived) >= set(range(300, 600))
        assert balanced(client)
        if how in ("header", "cursor"):
            assert arrived == list(range(600))
        elif how == "two places":
            lost = sorted(set(range(600)) - set(arrived))
            assert lost, "two places"
            assert len(lost) <= 12
            assert stats.dropped == len(lost)
        if stats.dropped:
            assert "damaged" in " ".join(told(client, NotificationKind.SPOOL_FAILED))
            assert (folder / "spool" / "damaged.bin").stat().st_size > 0, "kept aside"
        assert client.close() == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["no-such-folder/spool", "a-file/spool", "a-file", "a-link", "sqlite"])
def test_a_folder_that_cannot_be_made(folder: Path, mode: Any, where: str) -> None:
    """An SQLite file is a spool of an earlier version."""
    (folder / "a-file").touch()
    (folder / "a-folder").mkdir()
    (folder / "a-link").symlink_to(folder / "a-folder")
    (folder / "sqlite").write_bytes(b"SQLite format 3\0" + bytes(1000))
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / where, mode=mode)) as client:
        receiver.start()
        if mode == "always":
            with pytest.raises(SpoolError, match=where):
                client.send(message(1))
        else:
            send_all(client, range(40))
            assert client.flush(10)
            eventually(lambda: receiver.numbers() == list(range(40)))
        text = " ".join(told(client, NotificationKind.SPOOL_FAILED))
        assert where in text
        if where == "sqlite":
            assert "a spool of an earlier version (SQLite)" in text
        assert balanced(client)
        client.close()
        assert not told(client, NotificationKind.SPOOL_FAILED), "no record was left to keep"
    assert (folder / "sqlite").read_bytes() == b"SQLite format 3\0" + bytes(1000)
    assert list((folder / "a-folder").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permission")
def test_a_folder_without_permission(folder: Path) -> None:
    (folder / "mine").mkdir(mode=0o700)
    folder.chmod(0o755)
    with receiving(folder) as receiver:
        receiver.start()
        os.chmod(receiver.where, 0o777)
        service = program(receiver, folder / "mine" / "spool", "overflow", 0, 80, 65534)
        output, errors = service.communicate(timeout=60)
        assert output.endswith(b"delivered\n"), errors.decode()
        eventually(lambda: receiver.numbers() == list(range(80)))
    assert list((folder / "mine").iterdir()) == []


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk(folder: Path, small_disk: Path, mode: Any) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(small_disk / "spool", mode=mode)) as client:
        accepted = []
        refused = 0
        numbers = count()
        texts: list[str] = []

        def is_full() -> bool:
            nonlocal refused
            for number in islice(numbers, 100):
                try:
                    client.send(message(number))
                except QueueFullError:  # in mode always a SpoolError, otherwise the queue is full too
                    refused += 1
                else:
                    accepted.append(number)
                gevent.sleep(0)
            texts.extend(told(client, NotificationKind.SPOOL_FAILED))
            return refused > 10 and "No space" in " ".join(texts)

        eventually(is_full)
        assert len(accepted) > 20
        assert balanced(client)
        receiver.start()
        eventually(lambda: len(receiver.numbers()) >= len(accepted))
        assert receiver.numbers() == accepted, "accepted records arrive, refused ones never"
        eventually(lambda: client.stats().spooled == 0)

        def accepts() -> bool:
            try:
                client.send(message(next(numbers)))
            except QueueFullError:
                return False
            return True

        eventually(accepts, "there is room again")
        assert client.flush(30)
        assert client.close() == []


@pytest.mark.parametrize("mode", MODES)
def test_a_write_that_fails_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """In mode always the record is refused; in mode overflow it stays in memory, in its place."""
    append = Folder.append
    failing = False

    def fail(self: Folder, *args: Any) -> None:
        if failing:
            raise OSError(5, "Input/output error")
        append(self, *args)

    monkeypatch.setattr(Folder, "append", fail)
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool", mode=mode), queue_size=5)
        send_all(client, range(20))
        expected = list(range(20))
        eventually(lambda: on_disk(folder / "spool")[-1:] == [19])
        failing = True
        if mode == "always":
            with pytest.raises(SpoolError, match="Input/output error"):
                client.send(message(20))
        else:
            client.send(message(20))
            expected.append(20)
        eventually(lambda: "Input/output" in " ".join(told(client, NotificationKind.SPOOL_FAILED)))
        failing = False

        def accepts() -> bool:
            try:
                client.send(message(21))
            except QueueFullError:
                return False
            return True

        eventually(accepts)
        eventually(lambda: told(client, NotificationKind.SPOOL_RESTORED))
        receiver.start()
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == [*expected, 21])
        assert balanced(client)
        assert client.close() == []


# -- the end -----------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_while_closing_is_not_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool"))
        send_all(client, range(100))
        eventually(lambda: on_disk(folder / "spool") == list(range(50, 100)))

        def fail(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Folder, "append", fail)
        monkeypatch.setattr(Folder, "insert", fail)
        send_all(client, range(100, 140))
        left = numbers_of(client.close(0.0))
        assert sorted([*left, *on_disk(folder / "spool")]) == list(range(140)), "each is here or there"
        assert client.stats().kept == 50
        assert client.stats().dropped == len(left)
        assert balanced(client)
        assert "No space" in " ".join(told(client, NotificationKind.SPOOL_FAILED))


@pytest.mark.parametrize("how", ["timeout", "kill"])
def test_a_close_that_is_interrupted_lets_go_of_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("geventaudit.spool.store.CLOSE_SECONDS", 0.1)
    gate = Gate(monkeypatch, "open")
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool"))
        send_all(client, range(3))
        eventually(lambda: gate.is_reached)
        if how == "timeout":
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
                client.close(0.0)
        else:
            closer = gevent.spawn(client.close, 0.0)
            gevent.sleep(0)
            closer.kill()
        assert balanced(client)
        gate.open()
        left = numbers_of(client.close())
        assert not client.flush()
        with client_of(receiver, Spool(folder / "spool")) as heir:
            receiver.start()
            heir.send(message(7))
            eventually(lambda: 7 in receiver.numbers())
            eventually(lambda: {*receiver.numbers(), *left} == {0, 1, 2, 7}, "each is handed back, or kept")
        assert client.stats().dropped == len(left)


def test_always_without_an_agent_needs_no_other_greenlet(folder: Path) -> None:
    """Waiting for the disk is all that goes on in this hub."""
    source = (
        "import sys\nfrom helpers import message\nfrom geventaudit import Client, NoOp, Spool\n"
        "client = Client(NoOp, spool=Spool(sys.argv[1], mode='always'))\n"
        "for number in range(5): client.send(message(number))\nclient.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    for first in ("", "from gevent import monkey; monkey.patch_all()\n"):
        command = [sys.executable, "-c", first + source, str(folder / "spool")]
        done = subprocess.run(command, env=environment, timeout=60, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("mode", MODES)
def test_records_being_written_when_closing_begins(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """The folder is removed meanwhile, with its parent: the records are still in memory, and are handed back."""
    gate = Gate(monkeypatch, "append", after=True)
    place = folder / "spools"
    place.mkdir()
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(place / "spool", mode=mode), queue_size=1)
        sending = [gevent.spawn(client.send, message(number)) for number in range(3)]
        eventually(lambda: gate.is_reached)
        closing = gevent.spawn(client.close, 0.0)
        gevent.sleep(0)
        shutil.rmtree(place)
        gate.open()
        left = numbers_of(closing.get(timeout=60))
        refused = [number for number, each in enumerate(sending) if each.exception is not None]
        gevent.joinall(sending, timeout=60)
        assert sorted([*left, *refused]) == [0, 1, 2]
        assert all(isinstance(sending[number].exception, ClientClosedError | SpoolError) for number in refused)
        stats = client.stats()
        assert (stats.kept, stats.dropped, stats.spooled) == (0, len(left), 0)
        assert balanced(client)


@pytest.mark.parametrize("fails", [False, True])
def test_a_write_that_ends_after_closing_stopped_waiting_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The last job writes its records again: it may have failed."""
    gate = Gate(monkeypatch, "append", error=OSError(5, "Input/output error") if fails else None)
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool"), queue_size=1)
        send_all(client, range(3))
        eventually(lambda: gate.is_reached)
        monkeypatch.setattr(DiskThread, "wait_idle", lambda disk, deadline: gate.open())
        assert client.close(0.0) == []
        assert client.stats().kept == 3
        assert on_disk(folder / "spool") == [0, 1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_does_not_answer_does_not_keep_close_waiting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr("geventaudit.spool.store.CLOSE_SECONDS", 0.05)
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool", mode=mode), queue_size=2)
        send_all(client, range(10))
        eventually(lambda: on_disk(folder / "spool")[-1:] == [9])
        gate = Gate(monkeypatch, "append")
        sending = gevent.spawn(client.send, message(10))
        eventually(lambda: gate.is_reached)
        left = numbers_of(client.close(0.0))
        gate.open()
        sending.join(60)
        assert left == ([] if mode == "always" else [0, 1, 10])
        assert isinstance(sending.exception, ClientClosedError if mode == "always" else type(None))
        assert balanced(client)
        eventually(lambda: {*on_disk(folder / "spool"), *left} >= set(range(10)))


# -- this process, and others ------------------------------------------------------------------------------------------


@once
def test_killed_at_any_instant_nothing_is_lost_that_was_returned_for(folder: Path) -> None:
    """KILLS times kill -9 under load in mode always; the agent comes and goes as well."""
    outcome = chaos.killed(folder, kills=KILLS, seed=4)
    assert outcome.accepted > KILLS
    assert outcome.lost == 0, outcome


def test_a_fork_leaves_the_spool_to_the_parent(folder: Path) -> None:
    """Forked again and again while the disk's thread is at work; the children have folders of their own."""
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "audit-{pid}", mode="always"))
        stop: list[bool] = []
        sent: list[int] = []
        parent = os.getpid()

        def sending() -> None:
            number = 0
            while not stop and os.getpid() == parent:  # its copy in a child may run before the fork returns there
                client.send(message(number))
                sent.append(number)
                number += 1
                gevent.sleep(0)

        greenlet = gevent.spawn(sending)
        eventually(lambda: len(sent) > 10)
        for child in range(10):
            before = len(sent) + child
            eventually(lambda before=before: len(sent) >= before)

            def work(child: int = child) -> None:
                stop.append(True)
                client.send(message(1_000_000 + child))
                client.close(0.0)
                stats = client.stats()  # it may have adopted the records of an earlier child
                assert (stats.accepted, stats.kept) == (1, 1 + stats.adopted), stats

            assert forked(work) == 0
        stop.append(True)
        greenlet.get(timeout=60)
        assert client.stats().accepted == len(sent)
        other = Client(unreachable, spool=Spool(folder / f"audit-{parent}"))
        other.send(message(-1))
        eventually(lambda: "in use" in " ".join(told(other, NotificationKind.SPOOL_FAILED)), "no child unlocked it")
        assert numbers_of(other.close(0.0)) == [-1]
        receiver.start()
        assert client.flush(30)
        client.close()
        with client_of(receiver, Spool(folder / "audit-{pid}")) as client:  # adopts the records of the children
            client.send(message(-2))
            eventually(lambda: len(set(receiver.numbers())) == len(sent) + 11)
        eventually(lambda: sorted(receiver.numbers()) == [-2, *sent, *range(1_000_000, 1_000_010)])


@pytest.mark.parametrize("moment", ["opening", "adopting"])
def test_a_child_forked_while_a_lock_is_taken_does_not_keep_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The disk's thread has no other trace in the child than the descriptor."""
    with receiving(folder) as receiver:
        receiver.start()
        orphan = folder / "audit-99999999"
        fill(orphan, range(5))
        held = Folder(str(orphan)) if moment == "adopting" else None

        def parent() -> None:
            if moment == "adopting":
                client = client_of(receiver, Spool(folder / "audit-{pid}"))
                monkeypatch.setattr("geventaudit.spool.adoption.ADOPT_SECONDS", 0.01)
            else:
                client = client_of(receiver, Spool(orphan))
            original = Folder.open
            gate = native.allocate_lock()
            gate.acquire()
            reached: list[str] = []

            def opened(self: Folder, create: bool = True) -> None:
                original(self, create)
                if "99999999" in self.path:
                    reached.append(self.path)
                    gate.acquire()

            with monkeypatch.context() as patch:
                patch.setattr(Folder, "open", opened)
                client.send(message(100))
                eventually(lambda: reached)
                me = os.getpid()
                if os.fork() == 0:
                    patch.undo()
                    signal.alarm(120)
                    eventually(lambda: is_gone(me), "the parent is dead")
                    heir = client_of(receiver, Spool(folder / "audit-{pid}"))
                    heir.send(message(101))
                    eventually(lambda: set(receiver.numbers()) >= set(range(5)))
                    heir.close()
                    (folder / "done").touch()
                    os._exit(0)
                os.kill(me, signal.SIGKILL)

        assert held is None or not held.is_open
        assert forked(parent) == -signal.SIGKILL
        eventually((folder / "done").exists)
        eventually(lambda: not list(folder.glob("audit-*")))


@pytest.mark.parametrize("mode", MODES)
def test_a_child_of_a_child(folder: Path, mode: Any) -> None:
    """The child has no thread for its parent's folder, and its own forks have none to wait for."""
    with Client(NoOp, spool=Spool(folder / "audit-{pid}", mode=mode)) as client:
        client.send(message(1))
        assert client.flush(30)

        def child() -> None:
            for _ in range(2):
                if (grandchild := os.fork()) == 0:
                    os._exit(0)
                os.waitpid(grandchild, 0)
                client.send(message(2))
                assert client.flush(30)

        assert forked(child) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_child_adopts_the_records_of_its_parent(folder: Path, mode: Any) -> None:
    """The parent goes on after the fork, closes, begins anew with the same folder, and is killed."""
    with receiving(folder) as receiver:
        receiver.start()

        def parent() -> None:
            me = os.getpid()
            client = Client(unreachable, spool=Spool(folder / "audit-{pid}", mode=mode), queue_size=1)
            send_all(client, range(5))
            eventually(lambda: len(on_disk(folder / f"audit-{me}")) >= 4)
            if os.fork() == 0:
                signal.alarm(120)
                eventually(lambda: is_gone(me), "the parent is dead")
                child()
            assert client.close(0) == []
            client = Client(unreachable, spool=Spool(folder / "audit-{pid}", mode=mode), queue_size=1)
            send_all(client, range(5, 25))
            # In mode overflow one record is on the queue.
            eventually(lambda: len(on_disk(folder / f"audit-{me}")) >= (25 if mode == "always" else 24))
            os.kill(me, signal.SIGKILL)

        def child() -> None:
            try:
                heir = client_of(receiver, Spool(folder / "audit-{pid}", mode=mode))
                heir.connect(30)
                eventually(lambda: heir.stats().adopted == (25 if mode == "always" else 24))
                eventually(lambda: not heir.stats().spooled and not heir.stats().in_flight)
                heir.close()
            finally:
                os._exit(0)

        assert forked(parent) == -signal.SIGKILL
        lost = set() if mode == "always" else {5}
        eventually(lambda: set(receiver.numbers()) == set(range(25)) - lost, "all that were on disk")
        eventually(lambda: not list(folder.glob("audit-*")), "the child is done")
        assert receiver.numbers() == sorted(set(range(25)) - lost), "in order, each once"


@pytest.mark.parametrize("mode", MODES)
def test_other_threads_send_too(folder: Path, mode: Any) -> None:
    pool = ThreadPool(4)
    try:
        with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool", mode=mode)) as client:
            client.send(message(0))

            def sending(start: int) -> None:
                for number in range(start, start + 100):
                    client.send(message(number), timeout=10.0)

            results = [pool.spawn(sending, 1000 * (1 + thread)) for thread in range(4)]
            for result in results:
                result.get()
            for number in range(1, 100):  # behind those of the threads
                client.send(message(number))
            assert client.stats().accepted == 500
            assert balanced(client)
            receiver.start()
            assert client.flush(30)
            eventually(lambda: len(receiver.numbers()) == 500)
            arrived = receiver.numbers()
            for thread in range(5):
                part = [number for number in arrived if number // 1000 == thread]
                assert part == list(range(1000 * thread, 1000 * thread + 100)), "in order for each"
    finally:
        pool.kill()


def test_a_send_that_waits_for_the_disk_can_be_interrupted(folder: Path) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool", mode="always"))
        waiting = gevent.spawn(client.send, message(0))
        gevent.sleep(0)
        waiting.kill()
        with pytest.raises(gevent.Timeout), gevent.Timeout(0):
            client.send(message(1))
        client.send(message(2))
        receiver.start()
        assert client.flush(10)
        eventually(lambda: receiver.numbers()[-1] == 2)
        assert balanced(client)
        waiting = gevent.spawn(client.send, message(3))
        gevent.sleep(0)
        client.close()
        waiting.join(60)
        assert isinstance(waiting.exception, ClientClosedError | None)
        assert balanced(client)


def test_hundreds_of_clients(folder: Path) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        clients = [client_of(receiver, Spool(folder / f"{number}", mode="always")) for number in range(200)]
        gevent.joinall([gevent.spawn(client.send, message(number)) for number, client in enumerate(clients)])
        for client in clients:
            assert client.flush(30)
            client.close()
        eventually(lambda: sorted(receiver.numbers()) == list(range(200)))


def test_a_child_goes_on_with_the_folder_of_its_parent_that_has_ended(folder: Path) -> None:
    """A service sends, and only then becomes a daemon. The daemon is killed."""
    read_end, write_end = os.pipe()

    def service() -> None:
        client = Client(unreachable, spool=Spool(folder / "spool", mode="always"))
        client.send(message(0))
        if os.fork():
            os._exit(0)
        signal.alarm(120)

        def accepts() -> bool:
            try:
                client.send(message(1))
            except SpoolError:  # the parent still has the folder
                return False
            return True

        eventually(accepts)
        send_all(client, range(2, 100))
        os.write(write_end, b"sent")
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(service) == 0
    os.close(write_end)
    assert gevent.os.tp_read(read_end, 10) == b"sent"
    assert gevent.os.tp_read(read_end, 10) == b"", "the daemon is dead"
    os.close(read_end)
    assert on_disk(folder / "spool") == list(range(100))
