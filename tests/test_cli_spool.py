"""``geventaudit spool``: spools of live processes and of dead ones, as a person looks into them and delivers them."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from commands import command, run
from gevent import subprocess
from gevent.event import Event
from helpers import eventually, first_arrivals, free_port, message, receiving
from test_acks import scripted
from test_cli import started
from test_poison import Picky

from geventaudit import AuditError, Backoff, Client, DomainSocket, Spool
from geventaudit.agent import Agent
from geventaudit.cli import _parser
from geventaudit.cli.terminal import CommandError
from geventaudit.protocol.decoding import Decoder
from geventaudit.spool.folder import Folder
from geventaudit.spool.inspection import FolderView

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("command_server")


def no_agent() -> Any:
    return DomainSocket("/nonexistent/agent.sock")


def fill(path: Path, count: int, first: int = 0) -> None:
    """Leave records in a spool, as a process does that is closed while the agent is away."""
    client = Client(no_agent, queue_size=10, spool=Spool(path))
    for number in range(first, first + count):
        client.send(message(number), timeout=30.0)
    assert client.close(timeout=0.0) == []


def contents(path: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Everything that a command could change in a folder."""
    found = {}
    for each in [path, *sorted(path.iterdir())]:
        status = each.stat()
        data = each.read_bytes() if each.is_file() else b""
        found[each.name] = data, status.st_mode, status.st_ino, status.st_mtime_ns
    return found


def listed(*arguments: str) -> tuple[list[Any], list[Any]]:
    """The lines of ``spool list``: of folders, and of segments."""
    status, out, err = run("spool", "list", *arguments)
    assert (status, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    return [each for each in found if "segment" not in each], [each for each in found if "segment" in each]


def numbers_of(out: str) -> list[int]:
    return [json.loads(line)["Record"]["CustomData"]["n"] for line in out.splitlines()]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def live(folder: Path) -> Iterator[Any]:
    """A process with a spool at folder/live, no agent, and 20 records there."""
    arguments = [
        str(HERE / "spool_program.py"),
        str(folder / "nowhere.sock"),
        str(folder / "live"),
        "always",
        "0",
        "20",
    ]
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE)
    with process:
        for _ in range(20):
            assert process.stdout.readline().strip().isdigit()
        yield process
        if process.poll() is None:
            process.kill()


# -- list and show -----------------------------------------------------------------------------------------------------


def test_list_shows_the_records_of_a_dead_process(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 30)
    fill(path, 5, first=30)
    before = contents(path)
    (of_folder,), segments = listed(str(path))
    assert of_folder == {
        "folder": str(path),
        "process": None,
        "segments": len(segments),
        "first": 1,
        "last": 35,
        "undelivered": 35,
        "damaged": 0,
        "bytes": sum(each["bytes"] for each in segments),
    }
    assert sum(each["undelivered"] for each in segments) == 35
    assert [each["segment"] for each in segments] == sorted(each.name for each in path.glob("*.seg"))
    assert all((path / each["segment"]).stat().st_size == each["bytes"] for each in segments)
    assert segments[0]["first"] == 1
    assert segments[-1]["last"] == 35
    status, out, err = run("spool", "show", str(path))
    assert (status, err) == (0, "")
    assert numbers_of(out) == list(range(35))
    assert contents(path) == before, "nothing was changed"


def test_records_are_shown_as_listen_writes_them(folder: Path, socket_path: str) -> None:
    path, output = folder / "spool", folder / "out.jsonl"
    fill(path, 1)
    _, out, _ = run("spool", "show", str(path))
    with command("listen", "--unix", socket_path, "--output", str(output)) as listening:
        listening.stderr.readline()
        assert run("spool", "drain", str(path), "--unix", socket_path)[0] == 0
        eventually(output.read_text)
        listening.send_signal(signal.SIGTERM)
        listening.communicate(timeout=30)
    assert json.loads(out) == json.loads(output.read_text())


def test_a_live_process_is_looked_at_and_left_alone(live: Any, folder: Path) -> None:
    path = folder / "live"
    before = contents(path)
    (of_folder,), segments = listed(str(path))
    assert (of_folder["process"], of_folder["undelivered"], of_folder["damaged"]) == (live.pid, 20, 0)
    assert sum(each["undelivered"] for each in segments) == 20
    status, out, err = run("spool", "show", str(path))
    assert (status, err) == (0, "")
    assert sorted(numbers_of(out)) == list(range(20))
    assert contents(path) == before
    live.kill()
    live.wait()
    assert listed(str(path))[0][0]["process"] is None


def test_all_folders_of_a_template(folder: Path) -> None:
    for pid in (7, 12345678):
        fill(folder / f"audit-{pid}", 3, first=pid)
    (folder / "audit-x").mkdir()
    (folder / "audit-9").write_bytes(b"a file")
    folders, _ = listed(str(folder / "audit-{pid}"))
    assert sorted(each["folder"] for each in folders) == [str(folder / "audit-12345678"), str(folder / "audit-7")]
    status, out, err = run("spool", "show", str(folder / "audit-{pid}"))
    assert (status, err) == (0, "")
    assert sorted(numbers_of(out)) == [7, 8, 9, 12345678, 12345679, 12345680]


def test_a_template_that_no_folder_fits(folder: Path) -> None:
    template = str(folder / "audit-{pid}")
    for action in ("list", "show", "drain"):
        assert run("spool", action, template) == (0, "", f"geventaudit: no folder of this user matches {template}\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to other users")
def test_folders_of_other_users_are_named(folder: Path) -> None:
    template = str(folder / "audit-{pid}")
    for pid in (7, 8):
        fill(folder / f"audit-{pid}", 3)
        os.chown(folder / f"audit-{pid}", 65534, 65534)
    named = "".join(
        f"geventaudit: {folder}/audit-{pid} belongs to user 65534, and is left out; run as its owner\n"
        for pid in (7, 8)
    )
    for action in ("list", "show", "drain"):
        status, out, err = run("spool", action, template)
        assert (status, out) == (2, "")
        assert err == f"{named}geventaudit: all folders that match {template} belong to other users\n"
    fill(folder / "audit-9", 1, first=4)
    status, out, err = run("spool", "show", template)
    assert (status, numbers_of(out), err) == (0, [4], named)


def test_delivered_records_are_not_shown(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 30)
    of_disk = Folder(str(path))
    of_disk.open(create=False)
    of_disk.advance(12)
    of_disk.close()
    assert numbers_of(run("spool", "show", str(path))[1]) == list(range(12, 30))
    (of_folder,), _ = listed(str(path))
    assert (of_folder["undelivered"], of_folder["damaged"]) == (18, 0)


def test_damage_is_counted_and_not_touched(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 30)
    segment = max(path.glob("*.seg"), key=lambda each: each.stat().st_size)
    overwrite(segment, segment.stat().st_size // 2, b"\0" * 10)
    (path / "nonsense.seg").write_bytes(b"")
    (path / f".{'0' * 32}.tmp").write_bytes(b"an unfinished copy")
    before = contents(path)
    status, out, err = run("spool", "list", str(path))
    assert status == 1
    of_folder = json.loads(out.splitlines()[0])
    assert (of_folder["undelivered"], of_folder["damaged"]) == (29, 1)
    assert f"{path}: 1 records are damaged" in err
    assert f"{path}/nonsense.seg is left alone: its name is not" in err
    status, out, err = run("spool", "show", str(path))
    assert status == 1
    assert len(numbers_of(out)) == 29
    assert f"{path}: 1 records are damaged" in err
    assert contents(path) == before


def test_a_frame_that_is_no_record_is_named(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 1)
    of_disk = Folder(str(path))
    of_disk.open(create=False)
    of_disk.append(of_disk.prepare(2, [b"\xc1"]))
    of_disk.close()
    status, out, err = run("spool", "show", str(path))
    assert (status, numbers_of(out)) == (1, [0])
    assert err.startswith(f"{path}: record 2: ")
    assert "Traceback" not in err


def test_show_escapes_control_characters(folder: Path) -> None:
    path = folder / "spool"
    client = Client(no_agent, spool=Spool(path))
    client.send(message(operation_name="a\x1b[31m\nb\x9bö"))
    client.close(timeout=0.0)
    _, out, _ = started("spool", "show", str(path), LC_ALL="C", PYTHONIOENCODING="ascii")
    assert out.count("\n") == 1
    assert out.rstrip("\n").isprintable()
    assert json.loads(out)["Record"]["OperationName"] == "a\x1b[31m\nb\x9bö"


def test_a_segment_that_is_removed_meanwhile_is_no_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live process delivers while its folder is looked through."""
    path = folder / "spool"
    fill(path, 3)
    first = next(iter(path.glob("*.seg")))
    copy = path / first.name.replace(first.name[20:37], "-0000000000000000")
    copy.write_bytes(first.read_bytes())
    listed_once: list[None] = []

    def names(self: Any) -> list[str]:
        found = sorted(os.listdir(path))
        if not listed_once:
            listed_once.append(None)
            copy.unlink()
        return found

    monkeypatch.setattr("geventaudit.spool.directory.Directory.names", names)
    with FolderView(str(path)) as view:
        assert view.problems == []
        assert [each.name for each in view.segments] == [first.name]


def test_more_segments_than_are_kept_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "spool"
    for number in range(8):
        fill(path, 1, first=number)
    monkeypatch.setattr("geventaudit.spool.recovery.MAX_OPEN", 3)
    with FolderView(str(path)) as view:
        assert sum(segment.is_parked for segment in view.segments) == 5
        removed = next(segment for segment in view.segments if segment.is_parked)
        (path / removed.name).unlink()
        summaries = [view.summary(segment) for segment in view.segments]
        assert sum(each.undelivered for each in summaries) == 7
        assert sum(each.damaged for each in summaries) == 0


def test_nothing_is_renamed_to_look_at_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a file that the disk cannot read."""
    path = folder / "spool"
    fill(path, 1)
    (file,) = path.glob("*.seg")
    open_file = os.open

    def fail(name: str, *arguments: Any, **options: Any) -> int:
        if name == file.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(name, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    with FolderView(str(path)) as view:
        assert view.problems == [f"{file} is left alone: Input/output error"]
    assert file.exists()


@pytest.mark.parametrize("is_removed", [False, True])
def test_the_process_that_has_a_folder(folder: Path, is_removed: bool) -> None:
    path = folder / "spool"
    own = Folder(str(path))
    own.open()
    try:
        if is_removed:
            (path / "lock").unlink()
        with FolderView(str(path)) as view:
            assert view.owner == os.getpid()
    finally:
        own.close()
    with FolderView(str(path)) as view:
        assert view.owner is None


# -- drain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_drain(folder: Path, kind: str) -> None:
    path = folder / "spool"
    fill(path, 2000)
    fill(path, 500, first=2000)
    with receiving(folder, kind) as receiver:
        receiver.start()
        where = receiver.where if kind == "unix" else f"127.0.0.1:{receiver.where}"
        status, out, err = run("spool", "drain", str(path), f"--{kind}", where)
        assert (status, out) == (0, f"{path}: 2500 delivered, 0 not delivered, 0 dropped\n")
        assert err == ("" if kind == "unix" else "geventaudit: TCP without require_ack is best effort\n")
        eventually(lambda: len(receiver.numbers()) == 2500)
        assert receiver.numbers() == list(range(2500))
    assert not path.exists()


def test_drain_all_folders_of_a_template(folder: Path, live: Any, socket_path: str) -> None:
    """The folders of live processes are left alone."""
    (folder / "live").rename(folder / "audit-1")
    for pid in (2, 3):
        fill(folder / f"audit-{pid}", 10, first=pid * 10)
    got: list[Any] = []
    with Agent(socket_path, got.append):
        status, out, err = run("spool", "drain", str(folder / "audit-{pid}"), "--unix", socket_path)
    assert status == 1
    assert out == "".join(f"{folder}/audit-{pid}: 10 delivered, 0 not delivered, 0 dropped\n" for pid in (2, 3))
    assert f"the spool {folder}/audit-1 is in use by process {live.pid}" in err
    assert sorted(each.name for each in folder.glob("audit-*")) == ["audit-1"]


def test_a_live_process_is_not_drained(folder: Path, live: Any, socket_path: str) -> None:
    got: list[Any] = []
    before = contents(folder / "live")
    with Agent(socket_path, got.append):
        status, out, err = run("spool", "drain", str(folder / "live"), "--unix", socket_path)
    assert (status, out) == (2, "")
    assert err == (
        f"geventaudit: the spool {folder}/live is in use by process {live.pid}, which delivers it; "
        "stop that process first\n"
    )
    assert got == []
    assert contents(folder / "live") == before


def test_an_agent_that_restarts_loses_nothing(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 5000)
    with receiving(folder) as receiver:
        receiver.start()
        with command("spool", "drain", str(path), "--unix", receiver.where) as draining:
            eventually(lambda: len(receiver.numbers()) > 100)
            receiver.pause()
            receiver.end(signal.SIGKILL)
            receiver.start()
            out, err = draining.communicate(timeout=60)
        assert draining.returncode == 0, err
        assert out.decode() == f"{path}: 5000 delivered, 0 not delivered, 0 dropped\n"
        eventually(lambda: len(first_arrivals(receiver.numbers())) == 5000)
        assert first_arrivals(receiver.numbers()) == list(range(5000))
    assert not path.exists()


class Pausing:
    """An agent that reads about *limit* records, then no more until ``goes_on`` is set."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.numbers: list[int] = []
        self.goes_on = Event()

    def __call__(self, sock: Any) -> None:
        decoder = Decoder()
        while data := sock.recv(4096):
            for frame in decoder.feed(data):
                if frame.tag == "AsmAuditCP":
                    self.numbers += [entry.body["CustomData"]["n"] for entry in frame.entries]
            if len(self.numbers) >= self.limit:
                self.goes_on.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_that_is_stopped_goes_on_later(folder: Path, socket_path: str, number: int) -> None:
    path = folder / "spool"
    fill(path, 2000)
    agent = Pausing(1000)
    with scripted(socket_path, agent):
        with command("spool", "drain", str(path), "--unix", socket_path) as draining:
            eventually(lambda: len(agent.numbers) >= 1000)
            draining.send_signal(number)
            out, err = draining.communicate(timeout=60)
        assert draining.returncode == 1
        assert b"Traceback" not in err
        assert err.endswith(b"geventaudit: stopped by a signal\n")
        delivered, left, dropped = (int(word) for word in out.decode().partition(": ")[2].split() if word.isdigit())
        assert (delivered + left, dropped) == (2000, 0)
        assert 0 < delivered <= len(agent.numbers)
        (of_folder,), _ = listed(str(path))
        assert of_folder["undelivered"] == left, "the cursor is where the delivery was"
        agent.goes_on.set()
        status, out, _ = run("spool", "drain", str(path), "--unix", socket_path)
        assert (status, out) == (0, f"{path}: {left} delivered, 0 not delivered, 0 dropped\n")
        assert first_arrivals(agent.numbers) == list(range(2000))
    assert not path.exists()


def test_the_cursor_moves_while_records_are_delivered(folder: Path, socket_path: str) -> None:
    """A drain that is killed need not begin anew."""
    path = folder / "spool"
    fill(path, 2000)
    agent = Pausing(1000)
    with scripted(socket_path, agent), command("spool", "drain", str(path), "--unix", socket_path) as draining:
        eventually(lambda: json.loads(run("spool", "list", str(path))[1].splitlines()[0])["undelivered"] < 1900)
        draining.kill()
        draining.wait()
        agent.goes_on.set()
    assert listed(str(path))[0][0]["undelivered"] >= 2000 - len(agent.numbers)


def test_an_agent_that_takes_nothing_is_given_up(folder: Path, socket_path: str) -> None:
    import socket as std_socket

    path = folder / "spool"
    fill(path, 30)
    with std_socket.socket(std_socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        status, out, err = run("spool", "drain", str(path), "--unix", socket_path, "--timeout", "0.3")
    assert (status, out) == (1, f"{path}: 0 delivered, 30 not delivered, 0 dropped\n"), err
    assert listed(str(path))[0][0]["undelivered"] == 30


def test_an_agent_that_is_not_there(folder: Path, socket_path: str) -> None:
    path = folder / "spool"
    fill(path, 3)
    status, out, err = run("spool", "drain", str(path), "--unix", socket_path)
    assert (status, out) == (2, "")
    assert err.startswith(f"geventaudit: unix:{socket_path}: could not connect")
    status, _, err = run("spool", "drain", str(path), "--tcp", f"127.0.0.1:{free_port()}")
    assert (status, "Connection refused" in err) == (2, True)
    assert listed(str(path))[0][0]["undelivered"] == 3


def test_drain_keeps_damaged_bytes_aside(folder: Path, socket_path: str) -> None:
    path = folder / "spool"
    fill(path, 30)
    segment = max(path.glob("*.seg"), key=lambda each: each.stat().st_size)
    overwrite(segment, segment.stat().st_size // 2, b"\0" * 10)
    got: list[Any] = []
    with Agent(socket_path, got.append):
        status, out, err = run("spool", "drain", str(path), "--unix", socket_path)
    assert (status, out) == (1, f"{path}: 29 delivered, 0 not delivered, 1 dropped\n")
    assert f"{path} is not removed, because of damaged.bin" in err
    assert sorted(each.name for each in path.iterdir()) == ["cursor", "damaged.bin", "lock"]


def test_a_record_that_the_agent_never_takes(folder: Path, socket_path: str) -> None:
    path = folder / "spool"
    fill(path, 20)
    agent = Picky(7)
    with scripted(socket_path, agent):
        status, out, err = run("spool", "drain", str(path), "--unix", socket_path)
    # Without acknowledgements, the records that the agent read before it hung up may count as delivered.
    dropped = int(out.split()[-2])
    assert out == f"{path}: {20 - dropped} delivered, 0 not delivered, {dropped} dropped\n"
    assert status == dropped
    assert path.exists() == bool(dropped)
    if dropped:
        assert set(agent.numbers) == set(range(20)) - {7}
        assert f"{path} is not removed, because of rejected.jsonl" in err
        assert len((path / "rejected.jsonl").read_text().splitlines()) == 1


def test_an_empty_spool_needs_no_agent(folder: Path) -> None:
    path = folder / "spool"
    of_disk = Folder(str(path))
    of_disk.open()
    of_disk.close()
    assert run("spool", "drain", str(path), "--unix", "/nonexistent/agent.sock") == (
        *(0, f"{path}: 0 delivered, 0 not delivered, 0 dropped\n", ""),
    )
    assert not path.exists()


def test_a_process_that_comes_while_it_is_drained_is_refused_the_spool(folder: Path, socket_path: str) -> None:
    path = folder / "spool"
    fill(path, 30)
    import socket as std_socket

    with std_socket.socket(std_socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        listener.settimeout(60)
        with command("spool", "drain", str(path), "--unix", socket_path) as draining, ExitStack() as connections:
            for _ in range(2):  # before the second, the command has counted, and unlocked the folder again
                connections.enter_context(listener.accept()[0])
            eventually(lambda: listed(str(path))[0][0]["process"] == draining.pid)
            client = Client(no_agent, backoff=Backoff(), spool=Spool(path, mode="always"))
            with pytest.raises(Exception, match="in use by another process"):
                client.send(message(1))
            client.close(timeout=0.0)
            draining.kill()


# -- mistakes ----------------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    """The error that ends a command with status 2; in this process, since there are many."""

    def call() -> None:
        parsed = _parser().parse_args(arguments)
        parsed.run(parsed)

    with pytest.raises((CommandError, AuditError)) as caught:
        call()
    assert getattr(caught.value, "status", 2) == 2
    return str(caught.value)


@pytest.mark.parametrize("action", ["list", "show", "drain"])
def test_a_path_that_is_not_a_spool_is_refused(folder: Path, action: str) -> None:
    for name, kind, words in [
        ("missing", None, "there is no spool"),
        ("file", b"some text", "is a file; give a folder"),
        (
            "old.db",
            b"SQLite format 3\0 and so on",
            "is a spool of an earlier version (SQLite); drain it",
        ),
        ("empty", "folder", "is not a spool: it has neither a lock file nor segments"),
        ("link", "link", "is a symbolic link; give the folder itself"),
    ]:
        path = folder / name
        if isinstance(kind, bytes):
            path.write_bytes(kind)
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(folder / "empty")
        error = refused("spool", action, str(path))
        assert str(path) in error
        assert words in error
        assert "\n" not in error
    assert list((folder / "empty").iterdir()) == []
    status, out, err = run("spool", action, str(folder / "empty"))
    assert (status, out) == (2, "")
    assert err == f"geventaudit: {folder}/empty is not a spool: it has neither a lock file nor segments\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_spool_of_another_user(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 1)
    os.chown(path, 12345, 12345)
    for action in ("list", "show", "drain"):
        assert f"{path} belongs to user 12345" in refused("spool", action, str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "nonsense"),
        (["list"], "PATH"),
        (["list", "audit-{Pid}"], "argument PATH: path must have no braces other than {pid}"),
        (["show", "{pid}/audit"], "path may have one {pid}, in the folder's name"),
        (["list", "/nonexistent/audit-{pid}"], "there is no folder /nonexistent"),
        (["drain", "x", "--unix", "a", "--tcp", "h:1"], "not allowed with"),
        (["drain", "x", "--timeout", "soon"], "must be a number of seconds, got 'soon'"),
    ],
)
def test_mistakes(arguments: list[str], words: str) -> None:
    error = refused("spool", *arguments)
    assert words in error
    assert "\n" not in error


def test_a_closed_output_ends_the_command(folder: Path) -> None:
    path = folder / "spool"
    fill(path, 1000)
    pipeline = f"{shlex.quote(sys.executable)} -X dev -W error -m geventaudit spool show {path} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", pipeline], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert numbers_of(done.stdout.decode()) == [0]


@pytest.mark.parametrize("name", ["list", "show", "drain"])
def test_examples_in_the_help_can_be_parsed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["spool", name, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example.partition("geventaudit ")[2])
        words = words[: next((n for n, word in enumerate(words) if word in "<>|"), len(words))]
        assert words[:2] == ["spool", name]
        _parser().parse_args(words)


def test_completion_in_bash(folder: Path) -> None:
    _, script, _ = run("completion", "bash")
    (folder / "script").write_text(script)
    (folder / "audit-7").mkdir()

    def completed(*words: str) -> list[str]:
        program = (
            f"cd {folder}; source ./script; COMP_WORDS=({' '.join(word or repr('') for word in words)}); "
            f"COMP_CWORD={len(words) - 1}; _shtab_geventaudit; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(["bash", "-c", program], stdout=subprocess.PIPE, timeout=60, check=True)
        return str(done.stdout.decode()).split()

    assert set(completed("geventaudit", "spool", "")) >= {"list", "show", "drain"}
    assert completed("geventaudit", "spool", "drain", "--uni") == ["--unix"]
    assert completed("geventaudit", "spool", "list", "aud") == ["audit-7"]
