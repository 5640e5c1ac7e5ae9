"""Files of a spool that are cut, removed, overwritten and replaced under a client that runs, closes or is killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import HERE, Receiver, destroys_a_hub, eventually, message, receiving
from test_segments import BadPages
from test_spool import MODES, balanced, client_of, fill, forked, numbers_of, on_disk, send_all, told, unreachable

from geventaudit import (
    Backoff,
    Client,
    ClientClosedError,
    DomainSocket,
    NotificationKind,
    QueueFullError,
    Spool,
    SpoolError,
    ValidationError,
)
from geventaudit.agent import Agent
from geventaudit.runtime import native
from geventaudit.spool.folder import Folder

COUNT = 210
QUEUE = 5
SEGMENT = 40  # records, about: an eighth of max_bytes
DAMAGE = ["cut to nothing", "cut in the middle", "removed", "overwritten", "replaced"]
FOLDER_DAMAGE = [
    "cursor cut", "cursor removed", "cursor overwritten", "lock removed", "lock replaced",
    "folder removed", "folder moved", "folder replaced",
]  # fmt: skip


def damage(file: Path, how: str) -> None:
    size = file.stat().st_size
    if how == "cut to nothing":
        os.truncate(file, 0)
    elif how == "cut in the middle":
        os.truncate(file, size // 2)
    elif how == "removed":
        file.unlink()
    elif how == "overwritten":
        with open(file, "r+b") as opened:
            opened.seek(size // 3)
            opened.write(b"\xff" * 50)
    elif how == "replaced":
        other = file.with_name("other")
        other.write_bytes(b"nonsense" * 100)
        other.replace(file)


def damage_folder(path: Path, how: str) -> None:
    if how == "cursor cut":
        os.truncate(path / "cursor", 3)
    elif how == "cursor overwritten":
        (path / "cursor").write_bytes(b"\xff" * 20)
    elif how in ("cursor removed", "lock removed"):
        (path / how.split()[0]).unlink()
    elif how == "lock replaced":
        damage(path / "lock", "replaced")
    elif how == "folder removed":
        shutil.rmtree(path)
    else:
        path.rename(path.with_name("elsewhere"))
        if how == "folder replaced":
            path.mkdir(mode=0o700)


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.seg"))


def filled(receiver: Receiver, path: Path, mode: Any, first: int = 0) -> Client:
    """A client without an agent, with COUNT records in several segments."""
    client = client_of(receiver, Spool(path, mode=mode, max_bytes=160_000), queue_size=QUEUE)
    for number in range(first, first + COUNT):
        client.send(message(number))
        if mode == "overflow" and number % 25 == 24:
            # Records that are sent at once are written at once, to one segment.
            eventually(lambda number=number: on_disk(path)[-1:] == [number])
    on_queue = 0 if mode == "always" else QUEUE
    eventually(lambda: on_disk(path) == list(range(first + on_queue, first + COUNT)))
    assert len(segments(path)) >= 4
    return client


def forget_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let almost no frames of the disk stay in memory."""
    monkeypatch.setattr("geventaudit.spool.backlog.AHEAD_BYTES", 2000)
    monkeypatch.setattr("geventaudit.spool.store.AHEAD_BYTES", 2000)


def send_and_notice(client: Client, mode: str, number: int, *, is_noticed: bool = True) -> None:
    """Send; in mode always the damage is noticed before that returns."""
    client.send(message(number))
    if mode == "always":
        assert bool(client.stats().spool_failures) is is_noticed
        assert bool(told(client, NotificationKind.SPOOL_FAILED)) is is_noticed
    elif is_noticed:
        eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
        assert client.stats().spool_failures


def deliver_rest(receiver: Receiver, path: Path, *, adopted: int | None = None) -> int:
    """Let another client deliver the rest, and return how many records it counts as dropped."""
    if receiver.process is None:
        receiver.start()
    client = client_of(receiver, Spool(path))
    client.send(message(9999))
    eventually(lambda: 9999 in receiver.numbers())
    eventually(lambda: not client.stats().spooled and not client.stats().in_flight)
    stats = client.stats()
    assert stats.accepted == 1
    assert client.close() == []
    return stats.dropped


# -- one segment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_in_memory", [True, False], ids=["in memory", "on disk only"])
@pytest.mark.parametrize("which", [-1, 2], ids=["live", "older"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("mode", MODES)
def test_a_segment_that_is_damaged_under_a_running_client(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, how: str, which: int, is_in_memory: bool
) -> None:
    if not is_in_memory:
        forget_frames(monkeypatch)
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = filled(receiver, path, mode)
        damage(segments(path)[which], how)
        send_and_notice(client, mode, COUNT, is_noticed=how != "overwritten")
        assert client.stats().accepted == COUNT + 1
        receiver.start()
        eventually(lambda: COUNT in receiver.numbers())
        eventually(lambda: client.stats().spooled == client.stats().in_flight == 0)
        client.send(message(COUNT + 1))
        client.flush(30)
        eventually(lambda: COUNT + 1 in receiver.numbers(), "it goes on")
        stats, arrived = client.stats(), receiver.numbers()
        assert arrived == sorted(set(arrived)), "oldest first, each once"
        assert (stats.accepted, stats.delivered) == (COUNT + 2, len(arrived))
        assert stats.dropped == COUNT + 2 - len(arrived)
        if is_in_memory or how in ("removed", "replaced"):
            assert stats.dropped == 0
        elif how == "overwritten":
            assert 1 <= stats.dropped <= 2
        else:
            assert 1 <= stats.dropped <= 2 * SEGMENT
        if stats.dropped:
            assert stats.spool_failures
        assert client.close() == []
        assert segments(path) == []


@pytest.mark.parametrize("which", [-1, 2], ids=["live", "older"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("mode", MODES)
def test_a_segment_that_is_damaged_before_the_client_is_killed(folder: Path, mode: Any, how: str, which: int) -> None:
    """All frames are still in memory: removed and cut ones are on disk again when the next send() returns."""
    path = folder / "spool"
    with receiving(folder) as receiver:

        def run_and_die() -> None:
            client = filled(receiver, path, mode)
            damage(segments(path)[which], how)
            send_and_notice(client, mode, COUNT, is_noticed=how != "overwritten")
            if mode == "overflow":
                eventually(lambda: on_disk(path)[-1:] == [COUNT])
            else:
                assert on_disk(path)[-1:] == [COUNT]
            os.kill(os.getpid(), signal.SIGKILL)

        assert forked(run_and_die) == -signal.SIGKILL
        dropped = deliver_rest(receiver, path)
        arrived = receiver.numbers()
        on_queue = 0 if mode == "always" else QUEUE
        lost = set(range(on_queue, COUNT + 1)) - set(arrived)
        assert len(lost) == dropped
        assert arrived == sorted(set(arrived))
        assert len(lost) <= 2 if how == "overwritten" else not lost


@pytest.mark.parametrize("is_in_memory", [True, False], ids=["in memory", "on disk only"])
@pytest.mark.parametrize("which", [-1, 2], ids=["live", "older"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("mode", MODES)
def test_a_segment_that_is_damaged_before_close(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, how: str, which: int, is_in_memory: bool
) -> None:
    if not is_in_memory:
        forget_frames(monkeypatch)
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = filled(receiver, path, mode)
        damage(segments(path)[which], how)
        assert client.close(0.0) == [], "all that can be read is kept"
        stats = client.stats()
        assert (stats.accepted, stats.kept) == (COUNT, COUNT - stats.dropped)
        if stats.dropped:
            assert "cut off" in " ".join(told(client, NotificationKind.SPOOL_FAILED))
        dropped = stats.dropped + deliver_rest(receiver, path)
        arrived = [number for number in receiver.numbers() if number != 9999]
        assert arrived == sorted(set(arrived))
        assert dropped == COUNT - len(arrived)
        if how in ("removed", "replaced") or (is_in_memory and how != "overwritten"):
            assert dropped == 0
        elif how == "overwritten":
            assert 1 <= dropped <= 2
        else:
            assert 1 <= dropped <= 2 * SEGMENT


DAMAGES: list[list[tuple[str, float, float]]] = [
    [("write", 0.9, 1.0)],
    [("write", 0.4, 1.3)],
    [("cut", 0.6, 0.0), ("write", 0.5, 0.6)],
    [("write", 0.5, 0.7), ("cut", 0.6, 0.0)],
    [("write", 0.1, 0.3), ("write", 0.8, 0.9), ("cut", 0.85, 0.0), ("write", 0.0, 0.01)],
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("which", [-1, 1], ids=["live", "older"])
@pytest.mark.parametrize("damages", DAMAGES)
@pytest.mark.parametrize("mode", MODES)
def test_a_segment_that_is_overwritten_and_cut_around_close_is_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, damages: list[Any], which: int, when: str
) -> None:
    """The number of records is known, even if nothing readable follows the damage."""
    forget_frames(monkeypatch)
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = filled(receiver, path, mode)
        file = segments(path)[which]
        if when == "after":
            assert client.close(0.0) == []
        size = file.stat().st_size
        for how, start, end in damages:
            if how == "cut":
                os.truncate(file, int(size * start))
            else:
                with open(file, "r+b") as opened:
                    opened.seek(int(size * start))
                    opened.write(b"\xff" * int(size * (end - start)))
        assert client.close(0.0) == []
        dropped = client.stats().dropped + deliver_rest(receiver, path)
        arrived = [number for number in receiver.numbers() if number != 9999]
        assert arrived == sorted(set(arrived))
        assert dropped == COUNT - len(arrived) > 0


def test_records_that_the_disk_cannot_read_for_a_while_are_read_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_frames(monkeypatch)
    monkeypatch.setattr("geventaudit.spool.store.READ_AGAIN_SECONDS", 0.02)
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = filled(receiver, path, "always")
        BadPages(monkeypatch, segments(path)[1], {1, 2}, attempts=12)
        receiver.start()
        assert client.flush(30)
        stats = client.stats()
        assert (stats.delivered, stats.dropped) == (COUNT, 0)
        assert stats.spool_failures
        assert client.close() == []
        assert receiver.numbers() == list(range(COUNT))


def test_records_that_the_disk_cannot_read_for_long_are_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_frames(monkeypatch)
    monkeypatch.setattr("geventaudit.spool.store.READ_AGAIN_SECONDS", 0.01)
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = filled(receiver, path, "always")
        BadPages(monkeypatch, segments(path)[1], {1, 2})
        receiver.start()
        eventually(lambda: not client.stats().spooled and not client.stats().in_flight)
        stats = client.stats()
        assert 2 <= stats.dropped <= 20
        assert stats.delivered + stats.dropped == COUNT
        client.flush(30)
        assert client.close() == []
        assert receiver.numbers() == sorted(set(receiver.numbers()))
        assert len(receiver.numbers()) == stats.delivered
        assert [each.name.rsplit(".", 1)[1] for each in path.glob("*.seg*")] == ["left"], "for a better disk"


# -- the other files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["goes on", "killed", "closed"])
@pytest.mark.parametrize("how", FOLDER_DAMAGE)
@pytest.mark.parametrize("mode", MODES)
def test_files_removed_under_a_running_client_are_made_anew(folder: Path, mode: Any, how: str, end: str) -> None:
    path = folder / "spool"
    with receiving(folder) as receiver:
        receiver.start()

        def run() -> None:
            client = client_of(receiver, Spool(path, mode=mode), queue_size=1)
            # Delivered before, so that there is a cursor.
            send_all(client, range(1000, 1020))
            assert client.flush(30)
            os.kill(receiver.process.pid, signal.SIGKILL)
            eventually(lambda: not client.stats().connected)
            send_all(client, range(COUNT))
            eventually(lambda: on_disk(path)[-1:] == [COUNT - 1])
            eventually(lambda: (path / "cursor").exists())
            damage_folder(path, how)
            # A cursor that is overwritten in place is not looked at before the next start.
            is_noticed = how != "cursor overwritten"
            if end != "closed":
                send_and_notice(client, mode, COUNT, is_noticed=is_noticed)
                eventually(lambda: on_disk(path)[-1:] == [COUNT])
                assert path.stat().st_mode & 0o777 == 0o700
            other = Client(unreachable, spool=Spool(path, mode="always"))
            if end != "closed":
                with pytest.raises(SpoolError, match="in use"):
                    other.send(message(-1))
            other.close()
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif end == "closed":
                assert client.close(0.0) == []
                assert client.stats().kept + client.stats().delivered == COUNT + 20
                if is_noticed:
                    assert on_disk(path)[-1:] == [COUNT - 1]
            else:
                receiver.start()
                assert client.flush(30)
                assert client.stats().delivered == COUNT + 21
                assert client.close() == []
                receiver.end(signal.SIGTERM)

        assert forked(run) == (-signal.SIGKILL if end == "killed" else 0)
        if end != "goes on":
            receiver.end(signal.SIGKILL)
            assert deliver_rest(receiver, path) == 0
        arrived = receiver.numbers()
        # In mode overflow, one record was on the queue.
        assert set(range(mode == "overflow" and end == "killed", COUNT)) <= set(arrived)
        if end == "goes on":
            assert [number for number in arrived if number < 1000] == list(range(COUNT + 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_running", [True, False], ids=["running", "between two runs"])
def test_two_damaged_places_cost_only_the_records_in_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, is_running: bool
) -> None:
    forget_frames(monkeypatch)
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(path, mode=mode), queue_size=1)
        # Of the first write, the frames stay in memory.
        send_all(client, range(10))
        eventually(lambda: on_disk(path)[-1:] == [9])
        send_all(client, range(10, 2000))
        eventually(lambda: on_disk(path)[-1:] == [1999])
        if not is_running:
            assert client.close(0.0) == []
        for file in segments(path):
            size = file.stat().st_size
            with open(file, "r+b") as opened:
                for part in (0.2, 0.8):
                    opened.seek(int(size * part) // 4096 * 4096)
                    if size > 100_000:
                        opened.write(bytes(4096))
        if not is_running:
            client = client_of(receiver, Spool(path, mode=mode))
        receiver.start()
        client.send(message(2000))
        eventually(lambda: 2000 in receiver.numbers())
        stats, arrived = client.stats(), receiver.numbers()
        lost = sorted(set(range(2001)) - set(arrived))
        assert arrived == sorted(set(arrived))
        assert 2 <= len(lost) <= 40
        assert stats.dropped == len(lost)
        assert max(lost) - min(lost) > 1000, "all between them arrives"
        assert "damaged" in " ".join(told(client, NotificationKind.SPOOL_FAILED))
        client.close()


# -- a file that cannot be made anew -----------------------------------------------------------------------------------


class Limit:
    """Limits of this process, which is a forked child."""

    def __init__(self, kind: int, value: int) -> None:
        self._kind = kind
        self._before = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, self._before[1]))

    def lift(self) -> None:
        resource.setrlimit(self._kind, self._before)


def no_large_files() -> Limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return Limit(resource.RLIMIT_FSIZE, 4096)


def no_descriptors() -> Limit:
    return Limit(resource.RLIMIT_NOFILE, 3)


@pytest.mark.parametrize("limit", [no_large_files, no_descriptors])
@pytest.mark.parametrize(
    "how", ["segment removed", "segment cut", "all segments removed", "lock removed", "folder removed"]
)
@pytest.mark.parametrize("when", ["at close", "before a send", "lifted before close"])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_cannot_be_made_anew(
    folder: Path, mode: Any, limit: Callable[[], Limit], how: str, when: str
) -> None:
    """Each record is handed back or kept, never both."""
    path = folder / "spool"
    with receiving(folder) as receiver:

        def run() -> None:
            client = filled(receiver, path, mode)
            if how == "folder removed":
                shutil.rmtree(path)
            elif how == "lock removed":
                (path / "lock").unlink()
            elif how == "segment cut":
                os.truncate(segments(path)[2], 0)
            else:
                for file in segments(path) if how == "all segments removed" else segments(path)[2:3]:
                    file.unlink()
            accepted = COUNT
            limited = limit()
            if when != "at close":
                try:
                    client.send(message(COUNT))
                    accepted += 1
                except SpoolError:
                    assert mode == "always"
                assert mode == "overflow" or told(client, NotificationKind.SPOOL_FAILED)
                if mode == "overflow":
                    eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
            if when == "lifted before close":
                limited.lift()
            left = numbers_of(client.close(0.0))
            limited.lift()
            stats = client.stats()
            assert (stats.accepted, stats.dropped, stats.kept) == (accepted, len(left), accepted - len(left)), stats
            if left:
                assert told(client, NotificationKind.SPOOL_FAILED)
            kept = on_disk(path) if path.exists() else []
            assert sorted([*left, *kept]) == list(range(accepted))
            if when == "lifted before close":
                assert left == []

        assert forked(run) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_that_is_removed_with_its_parent(folder: Path, mode: Any) -> None:
    place = folder / "spools"
    place.mkdir()
    with receiving(folder) as receiver:
        client = filled(receiver, place / "spool", mode)
        shutil.rmtree(place)
        if mode == "always":
            with pytest.raises(SpoolError, match="parent folder is missing"):
                client.send(message(COUNT))
        assert numbers_of(client.close(0.0)) == list(range(COUNT))
        stats = client.stats()
        assert (stats.accepted, stats.kept, stats.dropped) == (COUNT, 0, COUNT)
        assert stats.spool_failures


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_that_comes_back_is_restored(folder: Path, mode: Any) -> None:
    place = folder / "spools"
    place.mkdir()
    with receiving(folder) as receiver:
        client = filled(receiver, place / "spool", mode)
        shutil.rmtree(place)
        try:
            client.send(message(COUNT))
            accepted = COUNT + 1
        except SpoolError:
            accepted = COUNT
        eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
        place.mkdir()

        def accepts() -> bool:
            try:
                client.send(message(COUNT + 1))
            except QueueFullError:
                return False
            return True

        eventually(accepts)
        eventually(lambda: told(client, NotificationKind.SPOOL_RESTORED))
        expected = [*range(accepted), COUNT + 1]
        eventually(lambda: on_disk(place / "spool")[-1:] == [COUNT + 1])
        assert client.close(0.0) == []
        assert client.stats().kept == len(expected)
        assert on_disk(place / "spool") == expected


@pytest.mark.parametrize("mode", MODES)
def test_an_earlier_run_is_damaged_while_it_is_drained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """The earlier run's records and this run's are in one folder."""
    path = folder / "spool"
    with receiving(folder) as receiver:
        assert filled(receiver, path, mode).close(0.0) == []
        forget_frames(monkeypatch)
        client = client_of(receiver, Spool(path, mode=mode, max_bytes=200_000), queue_size=QUEUE)
        client.send(message(COUNT))
        eventually(lambda: client.stats().adopted == COUNT)
        files = segments(path)
        os.truncate(files[1], 100)
        files[2].unlink()
        send_all(client, range(COUNT + 1, COUNT + 20))
        eventually(lambda: told(client, NotificationKind.SPOOL_FAILED))
        receiver.start()
        eventually(lambda: COUNT + 19 in receiver.numbers())
        assert client.flush(30) or client.stats().dropped
        arrived, stats = receiver.numbers(), client.stats()
        assert arrived == sorted(set(arrived))
        assert (stats.adopted, stats.accepted) == (COUNT, 20)
        assert stats.dropped == COUNT + 20 - len(arrived)
        assert 1 <= stats.dropped <= 2 * SEGMENT
        assert client.close() == []


@pytest.mark.parametrize("how", DAMAGE)
def test_an_orphan_that_is_damaged_while_it_is_drained(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    forget_frames(monkeypatch)
    fill(folder / "audit-99999999", range(COUNT))
    with receiving(folder) as receiver, client_of(receiver, Spool(folder / "audit-{pid}"), queue_size=QUEUE) as client:
        client.send(message(COUNT))
        eventually(lambda: client.stats().adopted == COUNT)
        damage(segments(folder / "audit-99999999")[0], how)
        receiver.start()
        eventually(lambda: client.stats().delivered + client.stats().dropped == COUNT + 1)
        arrived, stats = receiver.numbers(), client.stats()
        eventually(lambda: len(receiver.numbers()) == stats.delivered)
        arrived = receiver.numbers()
        assert (stats.adopted, stats.accepted, len(set(arrived))) == (COUNT, 1, stats.delivered)
        if how in ("removed", "replaced"):
            assert stats.dropped == 0
        else:
            assert stats.dropped
            assert stats.spool_failures
        assert client.flush(30) or stats.dropped


# -- the first send() --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_first_send_without_a_free_descriptor(folder: Path, mode: Any) -> None:
    with receiving(folder) as receiver:
        receiver.start()

        def run() -> None:
            spool = Spool(folder / "spool", mode=mode) if mode else None
            client = client_of(receiver, spool)  # type: ignore[arg-type]
            gevent.sleep(0.001)  # after a fork, libev itself needs a descriptor
            limited = no_descriptors()
            accepted = []
            for number in range(3):
                try:
                    client.send(message(number))
                    accepted.append(number)
                except (ValidationError, QueueFullError, ClientClosedError):
                    pass
            limited.lift()
            assert client.stats().accepted == len(accepted)

            def accepts() -> bool:
                try:
                    client.send(message(3))
                except QueueFullError:
                    return False
                return True

            eventually(accepts)
            assert client.flush(30)
            eventually(lambda: receiver.numbers() == [*accepted, 3])
            assert client.close() == []

        assert forked(run) == 0


FIRST = """
import json, resource, sys
from helpers import message
from geventaudit import AuditError, Client, DomainSocket, Spool
path, mode, where = sys.argv[1:]
client = Client(lambda: DomainSocket(where), spool=Spool(path, mode=mode) if mode else None)
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
message(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
try:
    client.send(message(0))
    outcome = "accepted"
except AuditError as error:
    outcome = type(error).__name__
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
print(json.dumps([outcome, client.flush(30), client.close() == [], client.stats().delivered]))
"""


@pytest.mark.parametrize("mode", ["", *MODES])
def test_a_first_send_without_a_hub_and_a_free_descriptor(folder: Path, mode: str) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", FIRST, str(folder / "spool"), mode, receiver.where]
        done = subprocess.run(command, env=environment, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()
        outcome, is_flushed, is_empty, delivered = json.loads(done.stdout)
        assert outcome in ("accepted", "QueueFullError", "SpoolError", "ValidationError", "ClientClosedError")
        assert (is_flushed, is_empty) == (True, True)
        assert delivered == (outcome == "accepted")


# -- at the wrong moment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_segment_that_is_removed_again_and_again(folder: Path, mode: Any) -> None:
    path, total = folder / "spool", 70
    with receiving(folder) as receiver:
        client = client_of(receiver, Spool(path, mode=mode, max_bytes=160_000), queue_size=QUEUE)
        for number in range(total):
            client.send(message(number))
            gevent.sleep(0)
            if number >= QUEUE and number % 7 in (3, 5):
                eventually(lambda number=number: on_disk(path)[-1:] == [number])
                if number % 7 == 3:
                    segments(path)[-1].unlink()
                else:
                    os.truncate(segments(path)[0], 200)
        assert client.stats().accepted == total
        receiver.start()
        assert client.flush(30)
        eventually(lambda: receiver.numbers() == list(range(total)), "all of them are in memory")
        assert client.stats().dropped == 0
        assert client.stats().spool_failures
        assert balanced(client)
        assert client.close() == []


@pytest.mark.parametrize("mode", MODES)
def test_a_disk_that_fails_when_cut_frames_are_written_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    path = folder / "spool"
    with receiving(folder) as receiver:
        client = filled(receiver, path, mode)
        os.truncate(segments(path)[2], 0)
        failed: list[int] = []
        insert = Folder.insert

        def fail(self: Folder, *args: Any) -> None:
            if len(failed) < 2:
                failed.append(native.thread_ident())
                raise OSError(28, "No space left on device")
            insert(self, *args)

        monkeypatch.setattr(Folder, "insert", fail)
        accepted = COUNT
        try:
            client.send(message(COUNT))
            accepted += 1
        except SpoolError:
            assert mode == "always"
        eventually(lambda: "No space" in " ".join(told(client, NotificationKind.SPOOL_FAILED)))
        left = numbers_of(client.close(0.0))
        assert sorted([*left, *on_disk(path)]) == list(range(accepted))
        assert client.stats().kept == accepted - len(left)


# -- the writer, waiting senders, and a hub that is gone ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "without memory"])
def test_a_writer_that_dies_is_started_again(
    folder: Path, socket_path: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mode ``always``, every send() waits for it."""
    with (
        Agent(socket_path, lambda received: None),
        Client(lambda: DomainSocket(socket_path), spool=Spool(folder / "spool", mode="always")) as client,
    ):
        client.send(message(0))
        store: Any = client._life.outbox.store  # type: ignore[union-attr]
        if how == "killed":
            store._writer.greenlet.kill(timeout=30)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(Folder, "prepare", lambda *arguments: [][0])
                with pytest.raises(SpoolError):
                    client.send(message(1))
        with gevent.Timeout(30):
            while True:
                try:
                    client.send(message(2))
                    break
                except SpoolError:  # until the disk is tried again
                    gevent.sleep(0.05)
        assert client.flush(30)


def test_a_folder_that_can_be_opened_late_makes_room(folder: Path) -> None:
    client = Client(unreachable, backoff=Backoff(1000, 1000), queue_size=2, spool=Spool(folder / "parent" / "spool"))
    client.send(message(0))
    client.send(message(1))
    eventually(lambda: client.stats().spool_failures)
    waiting = gevent.spawn(client.send, message(2), timeout=60)
    gevent.sleep(0)
    (folder / "parent").mkdir()
    eventually(waiting.ready, "it is told that there is room", timeout=50)
    assert waiting.exception is None
    assert client.close(0) == []
    assert client.stats().kept == 3


@destroys_a_hub
@pytest.mark.parametrize("mode", ["overflow", "always"])
def test_a_hub_that_was_destroyed_loses_nothing(folder: Path, mode: Any) -> None:
    outcome: list[Any] = []

    def run() -> None:
        client = Client(unreachable, backoff=Backoff(1000, 1000), spool=Spool(folder / "spool", mode=mode))
        for number in range(3):
            client.send(message(number))
        gevent.sleep(0.05)
        gevent.get_hub().destroy(destroy_loop=True)
        try:
            client.send(message(3))
        except ClientClosedError as error:
            outcome.append(error)
        outcome.append((client.close(0), client.stats().kept))

    native.start_new_thread(run, ())
    eventually(lambda: len(outcome) == 2)
    assert outcome[1] == ([], 3)
