"""The disk behind the queue: what it keeps, in which order, and what happens when it fails."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess as std_subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import count, islice
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from gevent.threadpool import ThreadPool
from geventaudit.spoolfile import SpoolFile, TakenOver
from helpers import Receiver, eventually, first_arrivals, message, receiving
from test_acks import scripted
from test_poison import Picky

from benchmarks import chaos
from geventaudit import (
    Backoff,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    NoOp,
    NotificationKind,
    QueueFullError,
    Spool,
    SpoolError,
    spoolfile,
)
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import decode
from geventaudit.runtime import native

MODES = ["overflow", "always"]
KILLS = int(os.environ.get("GEVENTAUDIT_KILLS", "30"))


def nobody() -> NoOp:
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
    """The errors of the notifications of that kind, up to now."""
    channel = client.notify()
    texts = []
    while True:
        try:
            notification = channel.get(timeout=0.01)
        except gevent.queue.Empty:
            return texts
        if notification is StopIteration:
            return texts
        if notification.kind is kind:
            texts.append(str(notification.error))


def rows(path: Path, table: str = "frames") -> list[Any]:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
    except sqlite3.OperationalError:  # it is not made yet
        return []


@contextmanager
def a_file(path: Path) -> Iterator[SpoolFile]:
    file = SpoolFile(str(path), "NORMAL", lambda: None)
    file.open()
    try:
        yield file
    finally:
        file.close()


class Clock:
    """The clock on the wall, which somebody sets forward and back by years, at each look at it."""

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
    """Holds the first write of rows to a spool until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False, after: bool = False) -> None:
        self.reached = False
        self._opened = native.allocate_lock()
        self._opened.acquire()
        write = SpoolFile.write

        def held(file: SpoolFile, frames: Any, forget: int, **options: Any) -> bool:
            if not frames or self.reached:
                return write(file, frames, forget, **options)
            done = write(file, frames, forget, **options) if after else False
            self.reached = True
            self._opened.acquire()
            if fails:
                raise OSError("the disk has no mind to")
            return done if after else write(file, frames, forget, **options)

        monkeypatch.setattr(SpoolFile, "write", held)

    def open(self) -> None:
        self._opened.release()


# -- the way of a record -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_more_than_the_queue_holds_waits_on_disk(folder: Path, mode: Any) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db", mode=mode))
        send_all(client, range(500))
        assert balanced(client)
        assert client.stats().accepted == 500
        assert client.stats().spooled >= 450, "the queue holds 50"
        receiver.start()
        assert client.flush(30)
        assert balanced(client)
        assert client.close() == []
        eventually(lambda: receiver.numbers() == list(range(500)), "read, and stored")
    assert rows(folder / "spool.db") == [], "what is delivered leaves the disk"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_left_is_sent_first_by_the_next_client(folder: Path, mode: Any) -> None:
    spool = Spool(folder / "spool.db", mode=mode)
    with receiving(folder) as receiver:
        for start in (0, 300, 600):
            client = client_of(receiver, spool)
            send_all(client, range(start, start + 300))
            assert client.close(0.0) == []
            assert client.stats().kept == start + 300
            assert client.stats().spooled == 0
            assert balanced(client)
            assert not client.flush(), "kept is not delivered"
        receiver.start()
        client = client_of(receiver, spool)
        send_all(client, range(900, 1000))
        assert client.flush(30), "what came before goes before, and is waited for"
        eventually(lambda: receiver.numbers() == list(range(1000)))
        assert client.stats().adopted == 900
        client.close()


@pytest.mark.parametrize("mode", MODES)
def test_what_an_agent_did_not_read_is_kept(folder: Path, mode: Any) -> None:
    spool = Spool(folder / "spool.db", mode=mode)
    with receiving(folder) as receiver:
        receiver.start()
        client = client_of(receiver, spool)
        client.send(message(0))
        assert client.flush(10)
        receiver.pause()
        send_all(client, range(1, 400))
        eventually(lambda: client.stats().in_flight, "written, and not read")
        assert client.close(0.0) == []
        receiver.end(signal.SIGKILL)
        receiver.start()
        with client_of(receiver, spool) as client:
            client.connect()
            assert client.flush(10) or client.flush(10)
            eventually(lambda: len(set(receiver.numbers())) == 400)
        assert first_arrivals(receiver.numbers()) == list(range(400))


def test_a_client_without_records_touches_no_disk(folder: Path) -> None:
    with Client(lambda: DomainSocket(folder / "nobody"), spool=Spool(folder / "spool.db")):
        pass
    assert list(folder.iterdir()) == []


def test_always_is_on_disk_when_send_returns(folder: Path) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool.db", mode="always")) as client:
        for number in range(20):
            client.send(message(number))
            assert len(rows(folder / "spool.db")) == number + 1
        receiver.start()
        assert client.flush(10)
        eventually(lambda: rows(folder / "spool.db") == [], "delivered, and gone from the disk")


def test_in_order_while_records_come_and_go(folder: Path) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool.db")) as client:
        receiver.start()
        number = 0
        for round_ in range(12):
            if round_ % 3 == 0:
                receiver.end(signal.SIGTERM)
            if round_ % 3 == 1:
                receiver.start()
            send_all(client, range(number, number + 200))
            number += 200
            gevent.sleep(0.005 * round_)
        assert client.flush(30)
        eventually(lambda: first_arrivals(receiver.numbers()) == list(range(number)))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_clock_that_jumps_changes_neither_deadlines_nor_order(
    folder: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    spool = Spool(folder / "spool.db", mode=mode) if mode else None

    def in_time(seconds: float, waiting: Callable[[float], object]) -> object:
        """What *waiting* returns: not before those seconds are over, and not years later."""
        began = time.monotonic()
        with gevent.Timeout(60):
            result = waiting(seconds)
        assert time.monotonic() - began >= seconds
        return result

    with receiving(folder) as receiver:
        client = Client(lambda: DomainSocket(receiver.where), backoff=Backoff(0.01, 0.05), queue_size=200, spool=spool)
        send_all(client, range(200))
        assert in_time(0.2, client.flush) is False, "nobody is there"
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


def test_the_file_is_for_its_owner_only(folder: Path) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool.db", mode="always")) as client:
        client.send(message(1))
        for path in folder.glob("spool.db*"):
            assert path.stat().st_mode & 0o777 == 0o600, path
        client.close(0.0)


def test_a_record_that_the_agent_never_takes_is_among_the_rejected(folder: Path) -> None:
    agent = Picky(3)
    with scripted(str(folder / "agent.sock"), agent):
        client = Client(
            lambda: DomainSocket(folder / "agent.sock", require_ack=True),
            backoff=Backoff(0.005, 0.02),
            spool=Spool(folder / "s.db", mode="always"),
        )
        for number in range(10):
            client.send(message(number))
        eventually(lambda: (client.stats().delivered, client.stats().dropped) == (9, 1))
        client.close()
    assert rows(folder / "s.db") == []
    ((_, at, reason, frame),) = rows(folder / "s.db", "rejected")
    assert at > 0
    assert "hung up" in reason
    assert decode(frame)[0].record.custom_data == {"n": 3}  # type: ignore[union-attr]


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_full_spool_refuses(folder: Path, mode: Any) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db", mode=mode, max_bytes=100_000))
        accepted = 0

        def send_on() -> None:
            nonlocal accepted
            for number in range(5000):
                client.send(message(number))
                accepted += 1
                gevent.sleep(0)

        with pytest.raises(QueueFullError, match="spool"):
            send_on()
        assert 100 < accepted < 1000
        assert client.stats().rejected == {"queue_full": 1}
        assert client.stats().accepted == accepted
        receiver.start()
        client.send(message(accepted), timeout=10.0)  # there is room again before long
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == list(range(accepted + 1)))
        client.close()


def test_a_large_file_shrinks_when_it_is_empty(folder: Path) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool.db", mode="always")) as client:
        for number in range(120):
            client.send(message(custom_data={"n": number, "text": "x" * 100_000}))
        eventually(lambda: (folder / "spool.db").stat().st_size + (folder / "spool.db-wal").stat().st_size > 4 << 20)
        receiver.start()
        assert client.flush(30)
        eventually(lambda: (folder / "spool.db").stat().st_size < 1 << 20, "the file is small again")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"path": "/tmp/"}, "the name of a file"),
        ({"path": "/var/{pid}/x.db"}, r"one \{pid\}"),
        ({"path": "/var/{pdi}.db"}, r"no other braces than \{pid\}'s, got '/var/\{pdi\}\.db'"),
        ({"path": "~/x.db"}, "expanduser"),
        ({"max_bytes": 0}, "max_bytes must be"),
        ({"mode": "sometimes"}, "mode must be"),
        ({"synchronous": "EXTRA"}, "synchronous must be"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Spool(**{"path": "/tmp/x.db", **options})


@pytest.mark.parametrize("path", [None, b"/tmp/x.db", 7])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match="path must be a text or a Path, got"):
        Spool(path)


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    with Client(NoOp, spool=Spool(folder / "nowhere" / "s.db")) as client:
        client.send(message(1))
        (error,) = eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
        assert str(error).endswith(f"s.db cannot be made: there is no folder {folder / 'nowhere'}")


def test_why_there_is_no_room_while_the_file_is_being_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, opening = native.allocate_lock(), SpoolFile.open
    with gate, monkeypatch.context() as patch:
        patch.setattr(SpoolFile, "open", lambda file: (gate.acquire(), gate.release(), opening(file))[2])
        patch.setattr("geventaudit.store._TAIL_BYTES", 1000)
        client = Client(NoOp, spool=Spool(folder / "s.db"))
        with pytest.raises(QueueFullError, match="its spool is still being opened"):
            send_all(client, range(50))
    assert client.close() == []


def test_no_thread_is_to_be_had_for_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as a disk that fails: told, gone without, tried again."""

    def none(*arguments: Any) -> int:
        raise RuntimeError("can't start new thread")

    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "s.db")) as client:
        receiver.start()
        with monkeypatch.context() as patch:
            patch.setattr(native, "start_new_thread", none)
            client.send(message(1))
            (error,) = eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
            assert "can't start new thread" in str(error)
            assert client.flush(30)
        eventually(lambda: told(client, NotificationKind.SPOOL_RESTORED))
        client.send(message(2))
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == [1, 2])


def test_what_is_no_spool() -> None:
    with pytest.raises(TypeError, match="spool must be a Spool"):
        Client(lambda: DomainSocket(), spool="/tmp/x.db")  # type: ignore[arg-type]


# -- who else has it ---------------------------------------------------------------------------------------------------


def test_a_file_that_another_client_has(folder: Path) -> None:
    """It is the other's; when that one closes, it can be had."""
    with receiving(folder) as receiver:
        receiver.start()
        spool = Spool(folder / "spool.db")
        first, second = client_of(receiver, spool), client_of(receiver, spool)
        first.send(message(0))
        assert first.flush(10)
        send_all(second, range(1, 20))
        assert second.flush(10), "the queue has room"
        assert any("in use by another" in text for text in told(second, NotificationKind.SPOOL_FAILED))
        assert second.stats().spool_failures >= 1
        for number in range(20, 60):
            second.send(message(number))
            assert second.flush(10), "one delivery after the other"
        assert second.stats().spool_failures < 10, "which is no reason to try again each time"
        first.close()
        eventually(lambda: told(second, NotificationKind.SPOOL_RESTORED), "it is tried again")
        second.close()
        eventually(lambda: sorted(receiver.numbers()) == list(range(60)))


def test_always_cannot_do_without_the_file(folder: Path) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        spool = Spool(folder / "spool.db", mode="always")
        with client_of(receiver, spool) as first, client_of(receiver, spool) as second:
            first.send(message(0))
            with pytest.raises(SpoolError, match="in use by another"):
                second.send(message(1))
            assert second.stats().rejected == {"spool": 1}
            assert second.stats().accepted == 0


LOCKER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """With SQLite's own means, by another process: somebody looks into it."""
    command = [sys.executable, "-c", LOCKER, str(path)]
    with std_subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdin
        assert locker.stdout
        assert locker.stdout.readline() == b"locked\n"
        yield
        locker.stdin.close()


def test_a_file_that_another_process_has_locked(folder: Path) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "spool.db")) as client:
        send_all(client, range(100))
        eventually(lambda: len(rows(folder / "spool.db")) >= 50)
        with locked(folder / "spool.db"):
            send_all(client, range(100, 120))  # not one raises
            eventually(lambda: "locked" in " ".join(told(client, NotificationKind.SPOOL_FAILED)))
            receiver.start()
            eventually(lambda: len(receiver.numbers()) >= 50, "the client goes on")
        eventually(lambda: told(client, NotificationKind.SPOOL_RESTORED), "it is tried again")
        assert client.flush(30)
        eventually(lambda: sorted(receiver.numbers()) == list(range(120)), "not one is lost, not one comes twice")


def test_orphans_are_adopted_by_exactly_one(folder: Path) -> None:
    """Five processes died; four that live begin at once."""
    for number in range(5):
        with a_file(folder / f"audit-{99999990 + number}.db") as file:
            frames = [encode(message(number * 100 + n), 0.0) for n in range(100)]
            file.write([(number * 1000 + n + 1, frame) for n, frame in enumerate(frames)], 0)
    with receiving(folder) as receiver:
        receiver.start()
        programs = [
            subprocess.Popen(
                [
                    *(sys.executable, str(Path(__file__).parent / "spool_program.py"), receiver.where),
                    *(str(folder / "audit-{pid}.db"), "overflow", str(1000 + number * 100), "100"),
                ],
                stdout=subprocess.PIPE,
            )
            for number in range(4)
        ]
        for program in programs:
            assert program.communicate(timeout=60)[0].endswith(b"delivered\n")
        expected = Counter([*range(500), *range(1000, 1400)])
        eventually(lambda: Counter(receiver.numbers()) == expected)
    assert [path.name for path in folder.glob("audit-*")] == [], "nothing is left of files that are empty"


def test_an_orphan_is_adopted_by_a_process_that_already_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geventaudit.store._ADOPT_SECONDS", 0.05)
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}.db")) as client:
        receiver.start()
        client.send(message(0))
        assert client.flush(10)
        with a_file(folder / "audit-99999999.db") as file:
            file.write([(5, encode(message(1), 0.0))], 0)
            client.send(message(2))
            assert client.flush(10)
            gevent.sleep(0.2)
            assert sorted(receiver.numbers()) == [0, 2], "its owner is alive"
        eventually(lambda: sorted(receiver.numbers()) == [0, 1, 2])
        assert client.stats().adopted == 1
        assert balanced(client)


def test_an_orphan_is_not_to_blame_for_the_file_it_goes_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geventaudit.store._ADOPT_SECONDS", 0.05)
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}.db")) as client:
        receiver.start()
        client.send(message(0))
        assert client.flush(10)
        with locked(folder / f"audit-{os.getpid()}.db"):
            with a_file(folder / "audit-99999999.db") as file:
                file.write([(n, encode(message(n), 0.0)) for n in range(1, 100)], 0)
            eventually(lambda: "now: database is locked" in " ".join(told(client, NotificationKind.SPOOL_FAILED)))
        eventually(lambda: sorted(set(receiver.numbers())) == list(range(100)), "it is taken over a while later")
        assert list(folder.glob("*.damaged-*")) == []
        assert client.flush(10)


def limit(file: SpoolFile, pages: int) -> None:
    """Let SQLite find the disk full when the file has so many."""
    file._open().execute(f"PRAGMA max_page_count = {pages}")


def fill(path: Path, numbers: range, first: int = 1) -> None:
    """Rows of these *numbers*, whose ``seq`` begins at *first*."""
    with a_file(path) as file:
        file.write([(first + place, encode(message(number), 0.0)) for place, number in enumerate(numbers)], 0)


def numbers_in(path: Path) -> list[Any]:
    return [decode(frame)[0].record.custom_data["n"] for _, _, frame in rows(path)]  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [None, 10**6])
@pytest.mark.parametrize("busy", [False, True])
def test_what_is_taken_over_in_parts_comes_once(first: int | None, busy: bool, folder: Path) -> None:
    """The disk is full in the middle of an orphan; what is taken over by then is counted, and not in two files."""
    orphan, own = folder / "audit-99999999.db", folder / "audit-1.db"
    fill(orphan, range(1, 1001))
    with a_file(own) as file, a_file(folder / "audit-2.db") as other:
        limit(file, 60)
        with locked(orphan) if busy else nullcontext():
            taken = file.adopt(f"{folder}/audit-{{pid}}.db", first)
        there = numbers_in(own)
        assert 0 < taken.records < 1000
        assert taken.records == len(there)
        assert taken.size == sum(len(frame) for _, _, frame in rows(own))
        assert taken.problems == (f"{orphan} cannot be taken over now: database or disk is full",)
        if busy:  # nothing could be taken away there, so nobody else may have it
            assert len(rows(orphan)) == 1000
            assert other.adopt(f"{folder}/audit-{{pid}}.db", first).records == 0
        else:
            assert numbers_in(orphan) == list(range(len(there) + 1, 1001))
        limit(file, 10_000)
        rest = file.adopt(f"{folder}/audit-{{pid}}.db", None if first is None else first + len(there))
        assert taken.records + rest.records == 1000
        assert rest.problems == ()
        assert numbers_in(own) == list(range(1, 1001))
        assert not orphan.exists()
        assert not Path(f"{orphan}.lock").exists()


def test_what_an_owner_did_not_get_done_with_another_goes_on_with(folder: Path) -> None:
    orphan = folder / "audit-99999999.db"
    fill(orphan, range(1, 1001))
    with a_file(folder / "audit-1.db") as file:
        limit(file, 60)
        taken = file.adopt(f"{folder}/audit-{{pid}}.db", None).records
    with a_file(folder / "audit-2.db") as other:
        assert other.adopt(f"{folder}/audit-{{pid}}.db", None).records == 1000, "all that is left, and of the first"
        assert 0 < taken < 1000
        assert numbers_in(folder / "audit-2.db") == list(range(1, 1001))


def test_numbers_that_are_taken_in_a_file_that_is_full(folder: Path) -> None:
    """Rows whose place is taken go behind all others, in their order: some at a time, all of those or none."""
    orphan, own = folder / "audit-99999999.db", folder / "audit-1.db"
    fill(own, range(5001, 5101), first=501)
    fill(orphan, range(1, 1001))
    with a_file(own) as file:
        limit(file, 60)
        taken = file.adopt(f"{folder}/audit-{{pid}}.db", None)
        assert taken.records == len(rows(own)) - 100
        assert taken.records + len(rows(orphan)) == 1000
        limit(file, 10_000)
        file.adopt(f"{folder}/audit-{{pid}}.db", None)
        assert numbers_in(own) == [*range(1, 401), *range(5001, 5101), *range(401, 1001)] or (
            numbers_in(own) == [*range(1, 501), *range(5001, 5101), *range(501, 1001)]
        )


def test_two_files_with_the_same_numbers_are_taken_over_in_no_time(folder: Path) -> None:
    """Not one question to the disk for each place that is taken."""
    fill(folder / "audit-1.db", range(1, 2001))
    fill(folder / "audit-99999999.db", range(3001, 5001))
    asked: list[str] = []
    with a_file(folder / "audit-1.db") as file:
        assert file._db
        file._db.set_trace_callback(asked.append)
        assert file.adopt(f"{folder}/audit-{{pid}}.db", None).records == 2000
    assert len(asked) < 500
    assert numbers_in(folder / "audit-1.db") == [*range(1, 2001), *range(3001, 5001)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("first", [None, 10**6])
def test_whoever_is_killed_while_it_adopts_leaves_little_in_both(
    first: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoolfile, "_TRIM_ROWS", 400)
    template = f"{folder}/audit-{{pid}}.db"
    fill(folder / "audit-99999999.db", range(1, 2001))
    batches = count()

    def breathe() -> None:
        if next(batches) == 6:
            raise Killed

    file = SpoolFile(str(folder / "audit-1.db"), "NORMAL", breathe)
    file.open()
    with pytest.raises(Killed):
        file.adopt(template, first)
    file.close()
    (folder / "audit-1.db").rename(folder / "audit-99999998.db")  # as if its process were no more
    with a_file(folder / "audit-2.db") as other:
        other.adopt(template, None)
    found = numbers_in(folder / "audit-2.db")
    assert set(found) == set(range(1, 2001))
    assert len(found) == 2000 if first is None else len(found) <= 2400, "none that has the same place is there twice"
    assert [path.name for path in folder.glob("*.db")] == ["audit-2.db"]


def test_a_damaged_file_that_is_put_aside_in_two_attempts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "spool.db"
    fill(path, range(1, 1001))
    connect = spoolfile._connect

    def small(*args: Any) -> Any:
        database = connect(*args)
        database.execute("PRAGMA max_page_count = 60").fetchall()
        return database

    with a_file(path) as file:
        monkeypatch.setattr(spoolfile, "_connect", small)
        with pytest.raises(sqlite3.OperationalError, match="full"):
            file.set_aside(-1)
        monkeypatch.undo()
        aside, taken = file.set_aside(-1)
        assert taken.records == 1000
        assert numbers_in(path) == list(range(1, 1001))
        assert len(rows(Path(aside))) == 1000


@pytest.mark.parametrize("mode", MODES)
def test_an_orphan_on_a_disk_that_has_no_room_for_two(
    folder: Path, small_disk: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geventaudit.store._ADOPT_SECONDS", 0.05)
    with receiving(folder) as receiver:
        receiver.start()
        client = client_of(receiver, Spool(small_disk / "audit-{pid}.db", mode=mode))
        with client:
            client.send(message(0))
            assert client.flush(30)
            orphan = small_disk / "audit-99999999.db"
            fill(orphan, range(1, 251))
            eventually(lambda: len(receiver.numbers()) >= 251 and not orphan.exists())
            assert balanced(client)
            assert client.flush(30)
            assert client.stats().adopted == 250
        assert sorted(receiver.numbers()) == list(range(251)), "each once"
        assert list(small_disk.iterdir()) == []


def test_flush_waits_for_what_is_adopted_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is adopted may go before what flush() is asked after."""
    monkeypatch.setattr("geventaudit.store._ADOPT_SECONDS", 0.01)
    gate, waiting, adopt = native.allocate_lock(), [], SpoolFile.adopt

    def adopt_behind_gate(file: SpoolFile, template: str, first: int | None) -> TakenOver:
        waiting.append(first)
        with gate:
            return adopt(file, template, first)

    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}.db")) as client:
        send_all(client, range(100))
        eventually(lambda: client.stats().spooled == 50)
        with gate:
            monkeypatch.setattr(SpoolFile, "adopt", adopt_behind_gate)
            with a_file(folder / "audit-99999999.db") as file:
                file.write([(n, encode(message(n), 0.0)) for n in range(1000, 4000)], 0)
            eventually(lambda: waiting)
            client.send(message(100))  # goes to the disk behind what is adopted
            flushed = gevent.spawn(lambda: client.flush(60) and client.stats().delivered)
            gevent.sleep(0)
        eventually(lambda: client.stats().adopted == 3000)
        receiver.start()
        assert flushed.get() == 3101
        receiver.pause()  # what it read is stored then
        assert receiver.numbers() == [*range(100), *range(1000, 4000), 100]


# -- what can happen to a disk -----------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    """The file is damaged in one way."""
    data = bytearray(path.read_bytes())
    chance = random.Random(how)
    if how == "truncated":
        del data[len(data) * 2 // 3 :]
    elif how == "header":
        data[:100] = chance.randbytes(100)
    elif how == "nonsense":
        data = bytearray(chance.randbytes(5000))
    elif how.startswith("flipped"):
        for _ in range(200):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "tables":
        with closing(sqlite3.connect(path)) as database:
            database.execute("DROP TABLE rejected")
        return
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "how", ["truncated", "header", "nonsense", "tables", "flipped 1", "flipped 2", "flipped 3", "flipped 4"]
)
def test_a_file_that_was_damaged_between_two_clients(folder: Path, mode: Any, how: str) -> None:
    spool = Spool(folder / "spool.db", mode=mode)
    with receiving(folder) as receiver:
        client = client_of(receiver, spool)
        send_all(client, range(300))
        assert client.close(0.0) == []
        spoil(folder / "spool.db", how)
        receiver.start()
        client = client_of(receiver, spool)
        for number in range(300, 600):
            client.send(message(number))
            gevent.sleep(0)
        assert client.flush(30) or client.stats().dropped
        assert told(client, NotificationKind.SPOOL_FAILED), "it is told"
        eventually(lambda: 599 in receiver.numbers())
        arrived = receiver.numbers()
        assert [number for number in first_arrivals(arrived) if number >= 300] == list(range(300, 600))
        assert set(arrived) <= set(range(600)), "nothing that was never sent"
        if how in ("tables", "flipped 1"):
            assert len(set(arrived)) > 300, "what could be read is sent"
        assert balanced(client)
        assert client.close() == []
    if how not in ("flipped 1", "flipped 2", "flipped 3", "flipped 4"):  # in these, single records may be all
        assert len(list(folder.glob("spool.db.damaged-*"))) >= 1, "put aside under another name"


def test_a_file_that_is_damaged_under_a_running_client(folder: Path) -> None:
    with receiving(folder) as receiver:
        spool = Spool(folder / "spool.db", mode="always")
        client = client_of(receiver, spool)
        send_all(client, range(2000))
        assert client.stats().spooled == 1950
        with closing(sqlite3.connect(folder / "spool.db")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with open(folder / "spool.db", "r+b") as file:
            file.seek(4096)
            file.write(bytes(4096 * 40))
        receiver.start()
        eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
        eventually(lambda: client.stats().spooled == 0)
        client.send(message(2000))
        eventually(lambda: 2000 in receiver.numbers())
        assert client.flush(30) or client.stats().dropped
        assert set(range(50)) <= set(receiver.numbers()), "what was in memory is not lost"
        assert balanced(client)
        assert client.stats().dropped == 2001 - len(set(receiver.numbers()))
        assert client.close() == []


def test_whoever_waits_is_told_when_a_damaged_file_cannot_be_put_aside(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mode always; the fault is injected, since root may rename whatever it likes."""

    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    (folder / "spool.db").write_bytes(b"nonsense" * 1000)
    with receiving(folder) as receiver, monkeypatch.context() as patch:
        patch.setattr("geventaudit.spoolfile._move_aside", refuse)
        client = client_of(receiver, Spool(folder / "spool.db", mode="always"))
        with gevent.Timeout(10), pytest.raises(SpoolError, match=r"could not be put aside: .*Permission denied"):
            client.send(message(0))
        patch.undo()
        receiver.start()
        eventually(lambda: told(client, NotificationKind.SPOOL_RESTORED), "it is tried again")
        client.send(message(1))
        assert client.flush(10)
        client.close()


def test_a_single_record_that_was_damaged(folder: Path) -> None:
    spool = Spool(folder / "spool.db")
    with receiving(folder) as receiver:
        client = client_of(receiver, spool)
        send_all(client, range(100))
        client.close(0.0)
        with closing(sqlite3.connect(folder / "spool.db")) as database, database:
            database.execute(
                "UPDATE frames SET frame = x'0102' WHERE seq = (SELECT seq FROM frames ORDER BY seq LIMIT 1 OFFSET 7)"
            )
        receiver.start()
        with client_of(receiver, spool) as client:
            client.connect()
            eventually(lambda: len(receiver.numbers()) == 99)
            assert set(range(100)) - set(receiver.numbers()) == {7}
            assert client.stats().dropped == 1
            assert told(client, NotificationKind.SPOOL_FAILED)
    assert [row[2:] for row in rows(folder / "spool.db", "rejected")] == [("it was damaged on disk", b"\1\2")]


def test_somebody_elses_database_is_not_touched(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "shop.db")) as database, database:
        database.execute("CREATE TABLE orders (id INTEGER)")
    before = (folder / "shop.db").read_bytes()
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "shop.db")) as client:
        receiver.start()
        client.send(message(1))
        assert client.flush(10)
        assert any("the database of something else" in text for text in told(client, NotificationKind.SPOOL_FAILED))
    assert (folder / "shop.db").read_bytes() == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["no-such-folder/spool.db", "a-file/spool.db", "a-folder"])
def test_a_file_that_cannot_be_made(folder: Path, mode: Any, where: str) -> None:
    (folder / "a-file").touch()
    (folder / "a-folder").mkdir()
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / where, mode=mode)) as client:
        receiver.start()
        if mode == "always":
            with pytest.raises(SpoolError, match=where):
                client.send(message(1))
        else:
            send_all(client, range(40))
            assert client.flush(10)
            eventually(lambda: receiver.numbers() == list(range(40)))
        assert told(client, NotificationKind.SPOOL_FAILED)
        assert balanced(client)
        client.close()
        assert not told(client, NotificationKind.SPOOL_FAILED), "nothing was left to keep"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without permission")
def test_a_folder_without_permission(folder: Path) -> None:
    (folder / "mine").mkdir(mode=0o700)
    folder.chmod(0o755)
    with receiving(folder) as receiver:
        receiver.start()
        os.chmod(receiver.where, 0o777)
        program = subprocess.run(
            [
                *(sys.executable, str(Path(__file__).parent / "spool_program.py"), receiver.where),
                *(str(folder / "mine" / "spool.db"), "overflow", "0", "80", "65534"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        assert program.stdout.endswith(b"delivered\n"), program.stderr.decode()
        eventually(lambda: receiver.numbers() == list(range(80)))
    assert list((folder / "mine").iterdir()) == []


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if std_subprocess.run(mount, stderr=std_subprocess.DEVNULL).returncode:
        pytest.skip("nobody may mount here")
    try:
        yield disk
    finally:
        std_subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk(folder: Path, small_disk: Path, mode: Any) -> None:
    with receiving(folder) as receiver, client_of(receiver, Spool(small_disk / "spool.db", mode=mode)) as client:
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
            # Before the disk is full, what waits for it may be as much as is allowed.
            return refused > 10 and "full" in " ".join(texts)

        eventually(is_full)
        assert len(accepted) > 20
        assert balanced(client)
        receiver.start()
        eventually(lambda: set(receiver.numbers()) >= set(accepted), "what was accepted arrives")
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


# -- the end -----------------------------------------------------------------------------------------------------------


def test_closing_over_a_ruined_file_keeps_what_is_in_memory(folder: Path) -> None:
    spool = Spool(folder / "spool.db", mode="always")
    with receiving(folder) as receiver:
        client = client_of(receiver, spool)
        send_all(client, range(40))
        with closing(sqlite3.connect(folder / "spool.db")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        (folder / "spool.db").write_bytes(b"nonsense" * 5000)
        left = client.close(0.0)
        assert len(left) + client.stats().kept == 40
        assert balanced(client)
        receiver.start()
        with client_of(receiver, spool) as client:
            client.connect()
            eventually(lambda: len(receiver.numbers()) == 40 - len(left))


def test_a_write_that_fails_while_closing_is_not_forgotten(folder: Path) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db"))
        send_all(client, range(100))
        eventually(lambda: len(rows(folder / "spool.db")) >= 50)
        with locked(folder / "spool.db"):
            send_all(client, range(100, 300))
            left = client.close(0.0)
        kept = [decode(row[2])[0] for row in rows(folder / "spool.db")]
        numbers = {msg.record.custom_data["n"] for msg in [*left, *kept]}  # type: ignore[union-attr, index]
        assert numbers == set(range(300)), "each is here or there"
        assert client.stats().kept + client.stats().dropped == 300
        assert client.stats().dropped == len(left)


def test_a_close_that_is_interrupted_keeps_count(folder: Path) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db"))
        send_all(client, range(40))
        with locked(folder / "spool.db"):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
                client.close(0.0)
            assert balanced(client)
            assert not client.flush()
            assert len(client.close()) == client.stats().dropped
        assert client.stats().dropped + client.stats().kept == 40


@pytest.mark.parametrize("how", ["timeout", "kill"])
def test_a_close_that_is_interrupted_lets_go_of_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    gate = Gate(monkeypatch)
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db"))
        send_all(client, range(3))
        eventually(lambda: gate.reached)
        if how == "timeout":
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
                client.close(0.0)
        else:
            closer = gevent.spawn(client.close, 0.0)
            gevent.sleep(0.01)
            closer.kill()
        gate.open()
        assert len(client.close()) == 3
        with client_of(receiver, Spool(folder / "spool.db")) as heir:
            receiver.start()
            heir.connect(60)
            eventually(lambda: heir.stats().adopted == 3 or not heir._sender or not heir._sender.store._ready)  # type: ignore[union-attr]
            heir.send(message(7))
            assert heir.flush(60)
            assert told(heir, NotificationKind.SPOOL_FAILED) == []


def test_always_without_an_agent_needs_no_other_greenlet(folder: Path) -> None:
    """Waiting for the disk is all that goes on in this hub."""
    program = (
        "import sys\nfrom helpers import message\nfrom geventaudit import Client, NoOp, Spool\n"
        "client = Client(NoOp, spool=Spool(sys.argv[1], mode='always'))\n"
        "for number in range(5): client.send(message(number))\nclient.close()\n"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for first in ("", "from gevent import monkey; monkey.patch_all()\n"):
        command = [sys.executable, "-c", first + program, str(folder / "spool.db")]
        done = subprocess.run(command, env=path, timeout=60, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("times", [1, 1000])
def test_closing_before_all_is_taken_from_a_damaged_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It was put aside, and the disk had no room for what was to be saved of it."""
    client = Client(nobody, spool=Spool(folder / "s.db"), queue_size=1)
    send_all(client, range(10))
    eventually(lambda: client.stats().spooled == 9)
    take, failures = SpoolFile._take_from, 0

    def damaged(*arguments: Any, **options: Any) -> bool:
        patch.undo()
        raise spoolfile._DamagedError("found while writing")

    def full(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures > times:
            return take(*arguments, **options)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(SpoolFile, "_take_from", full)
    patch = pytest.MonkeyPatch()
    patch.setattr(SpoolFile, "write", damaged)
    client.send(message(10))
    eventually(lambda: failures)
    eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
    left = client.close(0.0)
    stats = client.stats()
    assert (stats.accepted, stats.kept + stats.dropped) == (11, 11)
    kept = {decode(row[2])[0].record.custom_data["n"] for row in rows(folder / "s.db")}  # type: ignore[union-attr]
    if times == 1:
        assert (stats.kept, left, kept) == (11, [], set(range(11)))
    else:
        assert (stats.kept, kept) == (0, set())
        assert {each.record.custom_data["n"] for each in left} >= {10}


# -- this process, and others ------------------------------------------------------------------------------------------


def test_killed_at_any_instant_nothing_is_lost_that_was_returned_for(folder: Path) -> None:
    """KILLS times kill -9 under load in mode always; the agent comes and goes as well."""
    outcome = chaos.killed(folder, kills=KILLS, seed=4)
    assert outcome.accepted > KILLS
    assert outcome.lost == 0, outcome


def test_a_fork_leaves_the_spool_to_the_parent(folder: Path) -> None:
    """Forked again and again while the disk's thread is at work; the children have files of their own."""
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "audit-{pid}.db", mode="always"))
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

        greenlets = [gevent.spawn(sending)]
        eventually(lambda: len(sent) > 10)
        for child in range(10):
            gevent.sleep(0.003 * child)
            pid = gevent.os.fork()
            if pid == 0:
                status = 1
                try:
                    stop.append(True)
                    client.send(message(1_000_000 + child))
                    client.close(0.0)
                    stats = client.stats()  # it may have adopted what an earlier child left
                    status = 0 if (stats.accepted, stats.kept) == (1, 1 + stats.adopted) else 2
                    if status:
                        os.write(2, f"{stats} {told(client, NotificationKind.SPOOL_FAILED)}\n".encode())
                finally:
                    os._exit(status)
            assert gevent.os.waitpid(pid, 0)[1] == 0
        stop.append(True)
        gevent.joinall(greenlets, raise_error=True)
        assert client.stats().accepted == len(sent)
        receiver.start()
        assert client.flush(30)
        client.close()
        with client_of(receiver, Spool(folder / "audit-{pid}.db")) as client:  # what the children left
            client.connect()
            eventually(lambda: len(set(receiver.numbers())) == len(sent) + 10)
        eventually(lambda: sorted(receiver.numbers()) == [*sent, *range(1_000_000, 1_000_010)])


@pytest.mark.parametrize("mode", MODES)
def test_a_child_of_a_child(folder: Path, mode: Any) -> None:
    """The child has no thread for its parent's file, and its own forks have none to wait for."""
    with Client(NoOp, spool=Spool(folder / "audit-{pid}.db", mode=mode)) as client:
        client.send(message(1))
        assert client.flush(30)
        pid = gevent.os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(60)  # ends it where a fork waits for ever
                for _ in range(2):
                    if (grandchild := os.fork()) == 0:
                        os._exit(0)
                    os.waitpid(grandchild, 0)
                    client.send(message(2))
                    assert client.flush(30)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(gevent.os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_child_adopts_what_its_parent_left(folder: Path, mode: Any) -> None:
    """Of that file it inherited what SQLite knew when it was forked, which is not so any more."""
    with receiving(folder) as receiver:
        receiver.start()

        def parent() -> None:
            me = os.getpid()
            client = Client(nobody, spool=Spool(folder / "audit-{pid}.db", mode=mode), queue_size=1)
            send_all(client, range(5))
            eventually(lambda: client.stats().spooled >= 4)
            if os.fork() == 0:
                signal.alarm(120)
                eventually(lambda: os.getppid() != me, "the parent is dead")
                child()
            assert client.close(0) == []
            client = Client(nobody, spool=Spool(folder / "audit-{pid}.db", mode=mode), queue_size=1)
            send_all(client, range(5, 25))
            eventually(lambda: client.stats().adopted == 5 and client.stats().spooled >= 23)
            os.kill(os.getpid(), signal.SIGKILL)

        def child() -> None:
            try:
                heir = client_of(receiver, Spool(folder / "audit-{pid}.db", mode=mode))
                heir.connect(30)
                eventually(lambda: heir.stats().adopted >= 23)
                heir.flush(30)
                heir.close()
            finally:
                os._exit(0)

        pid = gevent.os.fork()
        if pid == 0:
            try:
                parent()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(gevent.os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        eventually(lambda: len(set(receiver.numbers())) >= 24, "all that were on disk")
        assert set(receiver.numbers()) >= set(range(5)) | set(range(6, 25))
        eventually(lambda: not list(folder.glob("audit-*")), "the child is done")


@pytest.mark.parametrize("mode", MODES)
def test_other_threads_send_too(folder: Path, mode: Any) -> None:
    pool = ThreadPool(4)
    try:
        with receiving(folder) as receiver, client_of(receiver, Spool(folder / "s.db", mode=mode)) as client:
            client.send(message(0))

            def sending(start: int) -> None:
                for number in range(start, start + 100):
                    client.send(message(number))

            results = [pool.spawn(sending, 1000 * (1 + thread)) for thread in range(4)]
            gevent.joinall(results, raise_error=True)
            for result in results:
                result.get()
            assert client.stats().accepted == 401
            assert balanced(client)
            receiver.start()
            assert client.flush(30)
            eventually(lambda: len(receiver.numbers()) == 401)
            arrived = receiver.numbers()
            for thread in range(4):
                mine = [number for number in arrived if number // 1000 == thread + 1]
                assert mine == list(range(1000 * (1 + thread), 1000 * (1 + thread) + 100)), "in order for each"
    finally:
        pool.kill()


def test_whoever_waits_for_the_disk_can_be_interrupted(folder: Path) -> None:
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db", mode="always"))
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
        assert isinstance(waiting.exception, ClientClosedError | None)
        assert balanced(client)


def test_hundreds_of_clients(folder: Path) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        clients = [client_of(receiver, Spool(folder / f"{number}.db", mode="always")) for number in range(200)]
        gevent.joinall([gevent.spawn(client.send, message(number)) for number, client in enumerate(clients)])
        for client in clients:
            assert client.flush(30)
            client.close()
        eventually(lambda: sorted(receiver.numbers()) == list(range(200)))


def test_a_child_goes_on_with_the_file_of_its_parent_that_is_no_more(folder: Path) -> None:
    """A service sends, and only then becomes a daemon. Others look into the file; the daemon is killed."""
    program = """
import os, sys, time
from helpers import message
from geventaudit import Client, NoOp, Spool, DomainSocket
client = Client(lambda: DomainSocket("/nowhere"), spool=Spool(sys.argv[1], mode="always"))
client.send(message(0))
if os.fork():
    os._exit(0)
while True:
    try:
        client.send(message(1))
        break
    except Exception:  # the parent still has it
        time.sleep(0.05)
for number in range(2, 100):
    client.send(message(number))
print("sent", os.getpid(), flush=True)
time.sleep(60)
"""
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", program, str(folder / "spool.db")]
    with std_subprocess.Popen(command, env=path, stdout=subprocess.PIPE, stderr=std_subprocess.DEVNULL) as process:
        assert process.stdout
        _, pid = process.stdout.readline().split()
        look = (
            "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('select count(*) from frames').fetchone())"
        )
        for _ in range(2):
            std_subprocess.run([sys.executable, "-c", look, str(folder / "spool.db")], check=True)
        os.kill(int(pid), signal.SIGKILL)
    assert len(rows(folder / "spool.db")) == 100


@pytest.mark.parametrize("what", ["file", "folder", "lock"])
@pytest.mark.parametrize("mode", ["overflow", "always"])
def test_what_is_removed_under_a_running_client_is_made_anew(folder: Path, mode: Any, what: str) -> None:
    """SQLite would write on into a file that nobody can find again."""
    place = folder / "spools"
    place.mkdir()
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(place / "spool.db", mode=mode), queue_size=2)
        send_all(client, range(10))
        eventually(lambda: len(rows(place / "spool.db")) >= 8)
        if what == "folder":
            shutil.rmtree(place)
            place.mkdir()
        else:
            (place / ("spool.db" if what == "file" else "spool.db.lock")).unlink()
        send_all(client, range(10, 20))
        eventually(lambda: len(rows(place / "spool.db")) >= 18)
        assert (place / "spool.db").stat().st_mode & 0o777 == 0o600
        with client_of(receiver, Spool(place / "spool.db")) as other:
            other.send(message(100))
            eventually(lambda: "in use" in " ".join(told(other, NotificationKind.SPOOL_FAILED)))
            assert len(other.close(0.0)) == 1
        assert client.close(0.0) == []
        assert client.stats().kept == 20
        assert what == "lock" or "was removed" in " ".join(told(client, NotificationKind.SPOOL_FAILED))
        receiver.start()
        with client_of(receiver, Spool(place / "spool.db", mode=mode)) as client:
            client.connect(30)
            eventually(lambda: client.stats().adopted == 20)
            assert client.flush(60)
        assert receiver.numbers() == list(range(20))


@pytest.mark.parametrize("mode", ["overflow", "always"])
def test_a_folder_that_is_removed_for_good(folder: Path, mode: Any) -> None:
    place = folder / "spools"
    place.mkdir()
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(place / "spool.db", mode=mode), queue_size=2)
        send_all(client, range(2))
        eventually(lambda: len(rows(place / "spool.db")) == 2)
        shutil.rmtree(place)
        if mode == "always":
            with pytest.raises(SpoolError, match=r"no folder|No such file"):
                client.send(message(2))
        assert [each.record.custom_data["n"] for each in client.close(0.0)] == [0, 1]
        stats = client.stats()
        assert (stats.accepted, stats.kept, stats.dropped) == (2, 0, 2)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_being_written_when_closing_began_is_still_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    gate = Gate(monkeypatch, after=True)
    place = folder / "spools"
    place.mkdir()
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(place / "spool.db", mode=mode))
        sending = [gevent.spawn(client.send, message(number)) for number in range(2)]
        eventually(lambda: gate.reached)
        closing_down = gevent.spawn(client.close, 0.0)
        gevent.sleep(0)
        shutil.rmtree(place)
        gate.open()
        assert [each.record.custom_data["n"] for each in closing_down.get(timeout=60)] == [0, 1]
        for each in sending:
            each.get(timeout=60)
        stats = client.stats()
        assert (stats.accepted, stats.kept, stats.dropped, stats.spooled) == (2, 0, 2, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_write_that_ends_when_closing_waited_long_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The last job repeats it: it may fail when nobody is left to do it again."""
    monkeypatch.setattr("geventaudit.store._CLOSE_SECONDS", 0.0)
    gate = Gate(monkeypatch, fails=fails)
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(folder / "spool.db"))
        send_all(client, range(3))
        eventually(lambda: gate.reached)
        assert client._sender
        assert client._sender.store
        disk = client._sender.store._disk
        submit = disk.submit
        answers = []

        def submit_and_wait(work: Any, done: Any) -> None:
            submit(work, lambda *outcome: (done(*outcome), answers.append(outcome)))
            gate.open()
            eventually(lambda: answers)

        monkeypatch.setattr(disk, "submit", submit_and_wait)
        assert client.close(0.0) == []
        assert client.stats().kept == len(rows(folder / "spool.db")) == 3
