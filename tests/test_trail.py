"""Stamped and sealed trails of real clients: restarts, signal handlers, threads, forks, spools, kills."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import PATCHED, eventually, mapping, message, on_signal, once
from trails import copy_of_key

from geventaudit import (
    BaseClient,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Msg,
    QueueFullError,
    Seal,
    Spool,
    SpoolError,
    ValidationError,
)
from geventaudit.agent import Agent, Received
from geventaudit.agent.shown import json_of
from geventaudit.cli import main
from geventaudit.trail import key_file
from geventaudit.trail.canonical import KEY
from geventaudit.verify.findings import TrailReport
from geventaudit.verify.keyring import KeyCopy
from geventaudit.verify.trail import Verifier

MASTER = bytes(range(32))


@pytest.fixture
def agent(socket_path: str, got: list[Received]) -> Iterator[Agent]:
    with Agent(socket_path, got.append) as running:
        yield running


@pytest.fixture
def seal() -> Seal:
    return Seal(key=MASTER)


def client_of(path: str, **options: Any) -> Client:
    return Client(lambda: DomainSocket(path), **options)


def custom_data(got: list[Received]) -> list[Any]:
    return [each.message.record.custom_data for each in got if isinstance(each.message, Msg)]


def stamps(got: list[Received]) -> list[dict[str, Any]]:
    return [each[KEY] for each in custom_data(got)]


def own(got: list[Received]) -> list[dict[str, Any]]:
    """The stamps of the users' records."""
    return [stamp for stamp in stamps(got) if "checkpoint" not in stamp]


def checkpoints(got: list[Received]) -> list[dict[str, Any]]:
    return [stamp["checkpoint"] for stamp in stamps(got) if "checkpoint" in stamp]


def verified(got: list[Received], folder: Path, key: KeyCopy | None = None) -> TrailReport:
    path = folder / "trail.jsonl"
    path.write_text(
        "".join(json.dumps(json_of(each), ensure_ascii=False) + "\n" for each in got if isinstance(each.message, Msg))
    )
    verifier = Verifier([key or copy_of_key(start=0)])
    verifier.read(str(path))
    return verifier.check()


# -- stamps ------------------------------------------------------------------------------------------------------------


def test_without_a_stamp_the_wire_is_the_references(agent: Agent, got: list[Received], socket_path: str) -> None:
    with client_of(socket_path) as client:
        client.send(message(1))
    assert isinstance(got[0].message, Msg)
    assert got[0].message.record.custom_data == {"n": 1}


def test_a_stamp_numbers_the_records(agent: Agent, got: list[Received], socket_path: str) -> None:
    with client_of(socket_path, stamp=True) as client:
        for number in range(5):
            client.send(message(number))
        client.send({"Type": "DataPlane", "Record": mapping(CustomData=None)})
    found = stamps(got)
    assert [stamp["seq"] for stamp in found] == [1, 2, 3, 4, 5, 6]
    assert len({stamp["stream"] for stamp in found}) == 1
    assert [stamp["tag"] for stamp in found] == ["AsmAuditCP"] * 5 + ["AsmAuditDP"]
    assert all(set(stamp) == {"seq", "stream", "tag", "time"} for stamp in found)
    assert sorted(stamp["time"] for stamp in found) == [stamp["time"] for stamp in found]


@pytest.mark.parametrize("sealed", [False, True])
def test_a_refused_record_uses_no_number(socket_path: str, got: list[Received], sealed: bool) -> None:
    client = client_of(
        socket_path,
        queue_size=3,
        before_send=lambda msg: None if msg.record.operation_name == "left out" else msg,
        **({"seal": Seal(key=MASTER)} if sealed else {"stamp": True}),
    )
    client.send(message(1))
    with pytest.raises(ValidationError):
        client.send(message(operation_name=""))
    client.send(message(operation_name="left out"))
    client.send(message(2))
    client.send(message(3))
    for _ in range(5):
        with pytest.raises(QueueFullError):
            client.send(message(4))
    with Agent(socket_path, got.append):
        assert client.flush(20)
        client.send(message(5))
        client.close()
    with pytest.raises(ClientClosedError):
        client.send(message(6))
    assert [stamp["seq"] for stamp in stamps(got)] == list(range(1, 5 + 2 * sealed))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("sealed", [False, True])
def test_the_key_is_reserved(agent: Agent, socket_path: str, sealed: bool, by_name: bool) -> None:
    with client_of(socket_path, stamp=True, seal=Seal(key=MASTER) if sealed else None) as client:
        data = {KEY: {"seq": 1}}
        msg = {"Type": "ControlPlane", "Record": mapping(CustomData=data)} if by_name else message(custom_data=data)
        with pytest.raises(ValidationError) as caught:
            client.send(msg)
        assert str(caught.value).startswith("CustomData.geventaudit: is reserved")
    client = client_of(socket_path, stamp=True, before_send=lambda msg: message(custom_data=data))
    with client, pytest.raises(ValidationError, match="reserved"):
        client.send(message())


def test_records_that_were_handed_back_may_be_sent_again(socket_path: str, got: list[Received], seal: Seal) -> None:
    client = client_of(socket_path, seal=seal)
    client.send(message(1))
    client.send(message(2))
    back = client.close(0.0)
    assert [each.record.custom_data["n"] for each in back] == [1, 2], "no checkpoint is handed back"
    with Agent(socket_path, got.append), client_of(socket_path, seal=seal) as again:
        for each in back:
            again.send(each)
        again.send({"Type": "ControlPlane", "Record": mapping(CustomData=back[0].record.custom_data)})
    first, second, third = own(got)
    old = back[0].record.custom_data[KEY]["stream"]
    assert first["was"] == [[old, 2]]
    assert second["was"] == [[old, 3]]
    assert third["was"] == [[old, 2]]
    assert first["stream"] != old


def test_base_clients_stamp_too(agent: Agent, got: list[Received], socket_path: str, folder: Path, seal: Seal) -> None:
    client = BaseClient(DomainSocket(socket_path), seal=seal)
    client.send(message(1))
    assert client.flush(20)
    agent.stop(0)
    eventually(lambda: client.error is not None)
    with pytest.raises(ConnectionFailedError):
        client.send(message(2))
    with Agent(socket_path, got.append):
        client.reset(DomainSocket(socket_path))
        client.send(message(3))
        client.close()
    assert [stamp["seq"] for stamp in stamps(got)] == [1, 2, 3, 4]
    assert verified(got, folder).problems() == []


@pytest.mark.parametrize("options", [{"stamp": 1}, {"seal": "key"}, {"stamp": None}])
def test_arguments_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        client_of("x", **options)


def test_a_frame_has_room_for_its_stamp(agent: Agent, got: list[Received], socket_path: str) -> None:
    with pytest.raises(ValueError, match="max_frame_bytes"):
        client_of(socket_path, stamp=True, max_frame_bytes=2048)
    with client_of(socket_path, stamp=True, max_frame_bytes=10_000) as client:
        client.send(message(caller_agent="x" * 7000))
        with pytest.raises(ValidationError):
            client.send(message(caller_agent="x" * 8000))


# -- seals -------------------------------------------------------------------------------------------------------------


def test_a_sealed_trail_is_authentic(agent: Agent, got: list[Received], socket_path: str, folder: Path) -> None:
    path = str(folder / "seal.key")
    assert main(["seal-key", path]) == 0
    copy = KeyCopy("copy", *key_file.read_copy(path))
    for start in (1, 2, 3):
        with client_of(socket_path, seal=Seal(key_file=path)) as client:
            for number in range(10):
                client.send(message(number, target_resources=message().record.target_resources))
        assert stamps(got)[-1]["stream"].split("/")[1:] == [str(start), "1"]
    report = verified(got, folder, copy)
    assert report.problems() == []
    assert [(each.records, each.has_end) for each in report.streams] == [(12, True)] * 3
    kinds = [each["kind"] for each in checkpoints(got)]
    assert kinds == ["open", "end"] * 3
    assert checkpoints(got)[1]["delivered"] == 11


def test_clients_share_a_seal(agent: Agent, got: list[Received], socket_path: str, folder: Path, seal: Seal) -> None:
    for _ in range(3):
        with client_of(socket_path, seal=seal) as client:
            client.send(message(1))
    report = verified(got, folder)
    assert report.problems() == []
    assert [each.stream.split("/")[1:] for each in report.streams] == [["0", "1"], ["0", "2"], ["0", "3"]]


def test_checkpoints_come_by_themselves(agent: Agent, got: list[Received], socket_path: str, folder: Path) -> None:
    with client_of(socket_path, seal=Seal(key=MASTER, checkpoint_interval=0.05)) as client:
        client.send(message(1))
        eventually(lambda: len(checkpoints(got)) >= 4)
        with pytest.raises(ValidationError):
            client.send(message(operation_name=""))
    assert checkpoints(got)[-1]["refused"] == 1
    assert checkpoints(got)[-1]["kind"] == "end"
    assert verified(got, folder).problems() == []


def test_values_that_json_would_change_are_sealed_as_text(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, seal: Seal
) -> None:
    with client_of(socket_path, seal=seal) as client:
        client.send(message(custom_data={"z": 1.5, "a": 1 << 60, "h": b"x", "deep": {"z": [0.1], "a": 1}}))
        with pytest.raises(ValidationError, match=r"CustomData\.a"):
            client.send(message(custom_data={"a": float("nan")}))
    assert verified(got, folder).problems() == []
    data = next(each for each in custom_data(got) if "z" in each)
    assert data["z"] == "1.5"


# -- re-entrancy and threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_signal_handlers_that_send_get_numbers_of_their_own(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, sealed: bool
) -> None:
    client = client_of(socket_path, queue_size=100_000, **({"seal": Seal(key=MASTER)} if sealed else {"stamp": True}))
    sent = [0]

    def send() -> None:
        client.send(message(1))
        sent[0] += 1

    with on_signal(send):
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        for number in range(4000):
            client.send(message(number))
            if number % 50 == 0:
                gevent.sleep(0)
    client.close()
    numbers = [stamp["seq"] for stamp in stamps(got)]
    assert sorted(numbers) == list(range(1, 4001 + sent[0] + 2 * sealed))
    assert sent[0] > 10
    if sealed:
        assert verified(got, folder).problems() == []


class _InterruptedError(Exception):
    pass


def test_a_handler_that_raises_uses_no_number_twice(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, seal: Seal
) -> None:
    client = client_of(socket_path, queue_size=100_000, seal=seal)
    client.send(message(0))

    def handler(*_: object) -> None:
        raise _InterruptedError

    def attempt(number: int) -> None:
        msg = message(number)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.000001 + (number % 97) * 0.0000005)
            client.send(msg)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    old = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for number in range(20_000):
            try:
                attempt(number)
            except _InterruptedError:
                interrupted += 1
            except ValidationError as error:  # the handler came while the record was validated
                assert "_Interrupted" in str(error)
                interrupted += 1
            if interrupted == 1000:
                break
    finally:
        signal.signal(signal.SIGALRM, old)
    client.close()
    assert interrupted
    report = verified(got, folder)
    (stream,) = report.streams
    assert stream.two_contents.count == 0
    assert stream.altered.count == 0
    assert stream.missing.count == stream.explained


def test_threads_that_send_get_numbers_in_the_hub(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, seal: Seal
) -> None:
    client = client_of(socket_path, queue_size=100_000, seal=seal)

    def send() -> None:
        for number in range(200):
            client.send(message(number))

    if PATCHED:
        start = gevent.get_hub().threadpool.spawn
        waits = [start(send) for _ in range(3)]
        for number in range(200):
            client.send(message(number))
            gevent.sleep(0)
        gevent.joinall(waits, timeout=60)
    else:
        threads = [threading.Thread(target=send) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(200):
            client.send(message(number))
            gevent.sleep(0)
        while any(thread.is_alive() for thread in threads):
            gevent.sleep(0.01)
    client.close()
    report = verified(got, folder)
    assert report.problems() == []
    assert report.streams[0].records == 802


def test_records_of_other_threads_get_numbers_at_close(socket_path: str, seal: Seal, folder: Path) -> None:
    client = client_of(socket_path, seal=seal, spool=Spool(folder / "spool"))
    thread = threading.Thread(target=lambda: client.send(message(1)))
    if PATCHED:
        gevent.get_hub().threadpool.apply(client.send, (message(1),))
    else:
        thread.start()
        thread.join()
    client.close(0.1)
    got: list[Received] = []
    with Agent(socket_path, got.append), client_of(socket_path, seal=seal, spool=Spool(folder / "spool")) as later:
        later.send(message(2))
        eventually(lambda: len(own(got)) == 2)
        assert later.flush(20)
    assert verified(got, folder).problems() == []
    assert checkpoints(got)[-1]["kind"] == "end"


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["overflow", "always"])
def test_spooled_records_keep_their_stamps(socket_path: str, folder: Path, seal: Seal, mode: Any) -> None:
    spool = Spool(folder / "spool", mode=mode)
    client = client_of(socket_path, queue_size=5, seal=seal, spool=spool)
    for number in range(30):
        client.send(message(number), timeout=20)
    assert client.close(0.1) == []
    got: list[Received] = []
    with Agent(socket_path, got.append), client_of(socket_path, seal=seal, spool=spool) as later:
        later.send(message(99), timeout=20)
        assert later.flush(30)
        eventually(lambda: len(own(got)) == 31)
    report = verified(got, folder)
    assert report.problems() == []
    assert sorted(each.records for each in report.streams) == [3, 32]
    adopted = {name: last for each in checkpoints(got) for name, last in each.get("adopted", {}).items()}
    old = min(report.streams, key=lambda each: each.start_time)
    assert adopted == {old.stream: 32}


def test_a_disk_that_fails_leaves_void_numbers_and_no_gap(socket_path: str, folder: Path, seal: Seal) -> None:
    spool = Spool(folder / "spool", mode="always")
    got: list[Received] = []
    with Agent(socket_path, got.append), client_of(socket_path, seal=seal, spool=spool) as client:
        client.send(message(1), timeout=20)
        store = client._life.outbox.store  # type: ignore[union-attr]
        assert store is not None
        assert client.flush(20)
        pending = store.pending
        add = pending.add

        def failing(frame: bytes) -> Any:
            made = add(frame)
            pending.records.remove(made)
            made.error, made.is_over = SpoolError("the disk fails"), True
            return made

        pending.add = failing  # type: ignore[method-assign]
        for number in (2, 3):
            with pytest.raises(SpoolError):
                client.send(message(number))
        pending.add = add  # type: ignore[method-assign]
        client.send(message(4), timeout=20)
        assert client.flush(20)
    report = verified(got, folder)
    (stream,) = report.streams
    assert stream.missing.ranges == [(3, 4)]
    assert stream.explained == 2
    assert checkpoints(got)[-1]["delivered"] == 5


def test_a_record_that_is_given_up_causes_a_checkpoint(folder: Path, socket_path: str, seal: Seal) -> None:
    client = client_of(socket_path, seal=seal)
    client.send(message(1))
    client.send(message(2))
    outbox: Any = client._life.outbox
    outbox.next_batch(1 << 16)
    outbox.reject_first("test")
    outbox.rewind()
    outbox.next_batch(1 << 16)
    outbox.reject_first("test")
    outbox.rewind()
    got: list[Received] = []
    with Agent(socket_path, got.append):
        client.close()
    assert [each.get("given_up") for each in checkpoints(got)] == [[[1, 2]], None] or [
        each.get("given_up") for each in checkpoints(got)
    ] == [[[1, 1]], [[2, 2]], None]
    report = verified(got, folder)
    assert report.streams[0].missing.count == report.streams[0].explained == 2


# -- forks -------------------------------------------------------------------------------------------------------------

FORKS = """
import os, sys
if sys.argv[3] == "patched":
    from gevent import monkey
    monkey.patch_all()
import gevent
sys.path.insert(0, sys.argv[4])
from helpers import message
from geventaudit import Client, DomainSocket, Seal
client = Client(lambda: DomainSocket(sys.argv[1]), seal=Seal(key_file=sys.argv[2]))
second = Client(lambda: DomainSocket(sys.argv[1]), seal=client._trail._seal)
client.send(message(0))
assert client.flush(60)
children = []
for number in range(3):
    pid = os.fork()
    if not pid:
        for number in range(5):
            client.send(message(number))
        if not os.fork():
            client.send(message(7))
            client.close()
            os._exit(0)
        os.wait()
        client.close()
        os._exit(0)
    children.append(pid)
    client.send(message(number))
    second.send(message(number))
for pid in children:
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
second.close()
client.close()
"""


@once
@pytest.mark.parametrize("patched", ["patched", "unpatched"])
def test_forked_children_have_streams_of_their_own(
    agent: Agent, got: list[Received], socket_path: str, folder: Path, patched: str
) -> None:
    path = str(folder / "seal.key")
    key_file.create(path)
    copy = KeyCopy("copy", *key_file.read_copy(path))
    here = str(Path(__file__).parent)
    with subprocess.Popen([sys.executable, "-c", FORKS, socket_path, path, patched, here]) as process:
        eventually(lambda: process.poll() is not None, "the program ends", 120)
    assert process.returncode == 0
    report = verified(got, folder, copy)
    assert report.problems() == []
    names = sorted(tuple(map(int, each.stream.split("/")[1:])) for each in report.streams)
    # The second client takes its number with its first record, after the first fork.
    assert names == [(1, 1), (1, 2, 1), (1, 2, 2, 1), (1, 3), (1, 4, 1), (1, 4, 2, 1), (1, 5, 1), (1, 5, 2, 1)]
    assert len(own(got)) == 1 + 3 * 2 + 3 * 6


def test_a_forked_child_has_no_keys_of_its_parent(seal: Seal) -> None:
    seal.take_stream()
    node = seal._node
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, b"ok" if seal._node is not node and seal._node.name.path == (2,) else b"no")  # type: ignore[union-attr]
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 2) == b"ok"
    os.close(reader)
    os.close(writer)
    assert seal._forking == {}
    assert str(seal.take_stream()[0]).endswith("/0/3")


def test_a_stream_that_is_taken_while_the_process_forks_leaves_the_child_its_key(seal: Seal) -> None:
    """By another thread, or by another library's hook that sends a record before each fork."""
    seal.before_fork()
    parents, _ = seal.take_stream()
    seal.after_fork_in_child()
    childs, _ = seal.take_stream()
    assert (parents.start, parents.path, childs.start, childs.path) == (0, (1,), 0, (1,))
    assert parents.salt != childs.salt


# -- a whole life ------------------------------------------------------------------------------------------------------

LIFE = """
import os, sys
sys.path.insert(0, sys.argv[4])
import gevent
from helpers import message
from geventaudit import Client, DomainSocket, QueueFullError, Seal, Spool
path, key, spool, _, first, count, ends = sys.argv[1:]
client = Client(lambda: DomainSocket(path, require_ack=True), seal=Seal(key_file=key), queue_size=200,
                spool=Spool(spool, mode="always", synchronous="OFF"))
print("started", flush=True)
def send(numbers):
    for number in numbers:
        client.send(message(number), timeout=60)
numbers = range(int(first), int(first) + int(count))
gevent.joinall([gevent.spawn(send, numbers[place::10]) for place in range(10)], raise_error=True)
print("sent", flush=True)
if ends == "killed":
    os.kill(os.getpid(), 9)
client.close(60)
"""


def live(folder: Path, records: int) -> tuple[list[Received], list[int], KeyCopy]:
    """Make a trail through restarts of the agent and killed processes with adopted spools; *records* a process."""
    path, key = str(folder / "agent.sock"), str(folder / "seal.key")
    key_file.create(key)
    copy = KeyCopy("copy", *key_file.read_copy(key))
    got: list[Received] = []
    sent: list[int] = []
    command = [sys.executable, "-c", LIFE, path, key, str(folder / "spool-{pid}"), str(Path(__file__).parent)]
    agent = Agent(path, got.append)
    agent.start()
    for turn, ends in enumerate(["killed", "closed", "killed", "closed"]):
        first = turn * records
        with subprocess.Popen([*command, str(first), str(records), ends], stdout=subprocess.PIPE) as process:
            while process.poll() is None:
                gevent.sleep(0.2)
                if process.poll() is None:
                    agent.stop(0)
                    agent = Agent(path, got.append)
                    agent.start()
        assert process.returncode == (-9 if ends == "killed" else 0)
        sent += range(first, first + records)
    # The last process may have closed before it had sent all that it found in the spools of killed ones.
    drain = [sys.executable, "-m", "geventaudit", "spool", "drain", str(folder / "spool-{pid}"), "--unix", path]
    with subprocess.Popen(drain, stdout=subprocess.DEVNULL) as process:
        eventually(lambda: process.poll() is not None, "the spools are drained", 120)
    assert process.returncode == 0
    eventually(lambda: len(numbers_of(got)) == len(sent), "all records arrive", 120)
    agent.stop(1)
    return got, sent, copy


def numbers_of(got: list[Received]) -> set[int]:
    return {each["n"] for each in custom_data(got) if "n" in each}


@once
def test_a_trail_through_restarts_and_kills_has_no_gaps(folder: Path) -> None:
    records = int(os.environ.get("TRAIL_RECORDS", "1000")) // 4
    got, sent, copy = live(folder, records)
    assert numbers_of(got) == set(sent)
    report = verified(got, folder, copy)
    assert report.problems() == []
    assert sum(each.missing.count for each in report.streams) == 0
    assert len(report.streams) == 4
    once = len({(stamp["stream"], stamp["seq"]) for stamp in stamps(got)})
    assert sum(each.duplicates for each in report.streams) == len(stamps(got)) - once
