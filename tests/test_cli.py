"""The command line, as a person uses it: processes, pipes, signals, mistakes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import signal
import socket as std_socket
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from commands import command, run
from gevent import subprocess
from gevent.os import tp_read
from helpers import eventually, free_port, mapping

from geventaudit import Msg, Stats, __version__
from geventaudit.agent import Agent
from geventaudit.cli import lines as file_lines
from geventaudit.transport.unix import MDSD_SOCKETS

GOOD = {"Type": "ControlPlane", "Record": mapping()}
BAD = {"Type": "ControlPlane", "Record": mapping(OperationName="")}
pytestmark = pytest.mark.usefixtures("command_server")


def start(*arguments: str, **environment: str) -> Any:
    """Begin a command in a Python of its own, as a person does."""
    program = [sys.executable, "-X", "dev", "-W", "error", "-m", "geventaudit", *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(program, env={**os.environ, **environment}, **pipes)


def started(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run a command in a Python of its own."""
    with start(*arguments, **environment) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


def lines(*messages: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in messages)


@pytest.fixture
def listening(socket_path: str, folder: Path) -> Any:
    process = command("listen", "--unix", socket_path, "--output", str(folder / "out.jsonl"))
    with process:
        assert process.stderr.readline().startswith(b"listening on")
        yield process
        if process.poll() is None:
            process.kill()


def test_listen_and_send(listening: Any, socket_path: str, folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(lines(GOOD, GOOD) + b"\n  \n" + lines(GOOD))
    status, out, err = run("send", str(file), "--unix", socket_path)
    assert (status, out, err) == (0, "3 delivered, 0 not delivered, 0 refused\n", "")
    first = listening.stdout.readline().decode()
    assert "ControlPlane CreateUser Success: user@example.com from 192.0.2.7 on SubscriptionId/res1" in first
    eventually(lambda: len((folder / "out.jsonl").read_text().splitlines()) == 3)
    stored = json.loads((folder / "out.jsonl").read_text().splitlines()[0])
    assert stored["Type"] == "ControlPlane"
    assert stored["Record"]["CustomData"] == {"ticket": 4711}
    assert "env_ikey" not in stored
    listening.send_signal(signal.SIGTERM)
    rest = listening.communicate(timeout=30)
    assert listening.returncode == 0
    assert b"4 messages received, 0 refused" in rest[1], "three and a heartbeat"


def test_send_from_a_pipe_that_is_slow(listening: Any, socket_path: str, folder: Path) -> None:
    with command("send", "-", "--unix", socket_path) as process:
        process.stdin.write(lines(GOOD))
        process.stdin.flush()
        eventually(lambda: (folder / "out.jsonl").read_text().count("\n") == 1, "it does not wait for the end")
        out, err = process.communicate(lines(GOOD), timeout=30)
    assert (process.returncode, out) == (0, b"2 delivered, 0 not delivered, 0 refused\n"), err


def test_refused_lines_are_named(listening: Any, socket_path: str) -> None:
    given = lines(GOOD, BAD) + b"not json\n[1]\n" + lines({**GOOD, "Type": "Heartbeat"}) + b'{"a": "\xff"}\n'
    status, out, err = run("send", "-", "--unix", socket_path, given=given)
    assert status == 1
    assert out == "1 delivered, 0 not delivered, 5 refused\n"
    complaints = err.splitlines()
    assert complaints[0] == "line 2: OperationName: must not be empty"
    assert complaints[1].startswith("line 3: not JSON: ")
    assert complaints[2] == "line 4: must be a Msg, or a mapping with Type and Record, got [1] (list)"
    assert complaints[3].startswith("line 5: Type: must be DataPlane or ControlPlane")
    assert complaints[4].startswith("line 6: not JSON: ")


def test_check(folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(lines(GOOD, BAD, GOOD))
    status, out, err = run("check", str(file))
    assert (status, out) == (1, "2 valid, 1 refused\n")
    assert err == "line 2: OperationName: must not be empty\n"
    status, out, err = run("check", "-", given=lines(GOOD))
    assert (status, out, err) == (0, "1 valid, 0 refused\n", "")


def test_check_refuses_a_message_that_is_too_long(folder: Path) -> None:
    long = {"Type": "ControlPlane", "Record": mapping(CustomData={"text": "x" * (1 << 20)})}
    status, out, err = run("check", "-", given=lines(long, GOOD))
    assert (status, out) == (1, "1 valid, 1 refused\n")
    assert err.startswith("line 1: must fit into a frame of 1048576 bytes, takes ")


def test_a_line_of_any_length_is_refused_and_the_next_is_read(folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(lines(GOOD))
    with open(file, "r+b") as holes:
        holes.truncate(50 << 20)  # zeros that take no place
        holes.seek(0, os.SEEK_END)
        holes.write(b"\n" + lines(GOOD, BAD) + b" " * ((16 << 20) + 1) + b"x")
    status, out, err = run("check", str(file))
    assert (status, out) == (1, "2 valid, 3 refused\n")
    assert err.splitlines() == [
        "line 2: longer than 16777216 bytes",
        "line 4: OperationName: must not be empty",
        "line 5: longer than 16777216 bytes",
    ]


@pytest.mark.parametrize("read", [file_lines.lines, file_lines.followed])
def test_no_more_than_the_bound_is_held_of_a_line(read: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lines, "MAX_LINE_BYTES", 10)
    file = folder / "lines"
    exactly, longer, much_longer, last = b"123456789\n", b"1234567890\n", b"x" * 75 + b"\n", b"end\n"
    file.write_bytes(exactly + longer + much_longer + b"\n" + much_longer[2:] + last)
    expected = [(1, exactly), (2, longer), (3, b"x" * 11), (4, b"\n"), (5, b"x" * 11), (6, last)]
    with contextlib.closing(read(str(file))) as got:
        assert list(itertools.islice(got, 6)) == expected


def test_over_tcp() -> None:
    port = free_port()
    with command("listen", "--tcp", f"127.0.0.1:{port}") as listening:
        assert listening.stderr.readline() == f"listening on 127.0.0.1:{port}\n".encode()
        status, out, _ = run("send", "-", "--tcp", f"127.0.0.1:{port}", given=lines(GOOD))
        assert (status, out) == (0, "1 delivered, 0 not delivered, 0 refused\n")
        assert b"CreateUser" in listening.stdout.readline()
        listening.send_signal(signal.SIGINT)
        listening.communicate(timeout=30)
        assert listening.returncode == 0


def test_refused_messages_are_shown_by_the_listener(listening: Any, socket_path: str) -> None:
    import msgpack

    with std_socket.socket(std_socket.AF_UNIX) as sock:
        sock.connect(socket_path)
        sock.sendall(msgpack.packb(["AsmAuditCP", [[5, BAD["Record"]]]]))
        assert listening.stderr.readline() == b"refused 'AsmAuditCP': OperationName: must not be empty\n"


def test_a_wrong_type_is_named_once_with_the_right_ones(listening: Any, socket_path: str) -> None:
    import msgpack

    with std_socket.socket(std_socket.AF_UNIX) as sock:
        sock.connect(socket_path)
        sock.sendall(msgpack.packb(["app.log\x1b", [[5, {"log": "x"}]]]))
        assert listening.stderr.readline().decode() == (
            "refused 'app.log\\x1b': the type must be one of AsmAuditDP, AsmAuditCP, AsmAuditHB, AsmAuditDG\n"
        )


def test_the_line_of_a_failure_shows_its_reason(listening: Any, socket_path: str) -> None:
    failures = [
        {"Type": "DataPlane", "Record": mapping(OperationResult="Failure", OperationResultDescription=reason)}
        for reason in ("the disk is full\x1b[1m\n", "x" * 10_000)
    ]
    run("send", "-", "--unix", socket_path, given=lines(GOOD, *failures))
    printed = [line for line in (listening.stdout.readline().decode() for _ in range(4)) if "CreateUser" in line]
    assert printed[0].endswith(" on SubscriptionId/res1\n")
    assert printed[1].endswith(' on SubscriptionId/res1: "the disk is full\\x1b[1m\\x0a"\n')
    assert printed[2].endswith(f' on SubscriptionId/res1: "{"x" * 500}... (9500 more characters)"\n')


def test_output_for_a_terminal_has_no_control_characters(listening: Any, socket_path: str) -> None:
    evil = {"Type": "ControlPlane", "Record": mapping(OperationName="a\x1b[31m\nb\x9b")}
    run("send", "-", "--unix", socket_path, given=lines(evil))
    assert b"a\\x1b[31m\\x0ab\\x9b" in listening.stdout.readline()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "nonsense"),
        (["listen", "--nonsense"], "unrecognized arguments: --nonsense (see geventaudit listen --help)"),
        (["doctor", "agent.sock"], "unrecognized arguments: agent.sock (see geventaudit doctor --help)"),
        (["spool", "list", "x", "y"], "unrecognized arguments: y (see geventaudit spool list --help)"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see geventaudit --help)"),
        (["listen", "--tcp", "nowhere"], "must be HOST:PORT, got 'nowhere'"),
        (["listen", "--tcp", "h:99999"], "must be HOST:PORT"),
        (["send", "--tcp", "h:0", "-"], "with a port above 0, got 'h:0'"),
        (["doctor", "--tcp", "h:0"], "with a port above 0, got 'h:0'"),
        (["listen", "--unix", "/nonexistent/x"], "cannot listen on /nonexistent/x: No such file or directory\n"),
        (["listen", "--unix", "a", "--tcp", "h:1"], "not allowed with"),
        (["listen", "--unix", "unused.sock", "--output", "/nonexistent/x"], "cannot write /nonexistent/x"),
        (["send"], "FILE"),
        (
            ["send", "-", "--unix", "unused.sock"],
            (
                "unix:unused.sock: could not connect: No such file or directory; "
                "to find the reason: geventaudit doctor --unix unused.sock\n"
            ),
        ),
        (["send", "/nonexistent", "--unix", "unused.sock"], "cannot read /nonexistent: No such file or directory"),
        (["send", "/", "--unix", "unused.sock"], "cannot read /: Is a directory"),
        (["send", "--follow", "/nonexistent", "--unix", "unused.sock"], "cannot read /nonexistent: No such file"),
        (
            ["send", "-", "--tcp", "127.0.0.1:1"],
            (
                "tcp:127.0.0.1:1: could not connect: Connection refused; "
                "to find the reason: geventaudit doctor --tcp 127.0.0.1:1\n"
            ),
        ),
        (["send", "-", "--tcp", "[::1]:1"], "geventaudit doctor --tcp [::1]:1\n"),
        (["send", "-", "--timeout", "soon"], "must be a number of seconds, got 'soon'"),
        (
            ["send", "-", "--service-tree-id", "x"],
            "argument --service-tree-id: must be a UUID and not the nil UUID, got 'x'",
        ),
        (["listen", "--unix", ""], "argument --unix: must be the path of a socket, got an empty text"),
        (["send", "-", "--unix", ""], "argument --unix: must be the path of a socket, got an empty text"),
        (["listen", "--unix", "/"], "cannot listen on /: a folder is there, and no socket\n"),
        (["check", "/nonexistent"], "cannot read /nonexistent: No such file or directory"),
        (["check", "/"], "cannot read /: Is a directory"),
        (["spool", "list", "/nonexistent"], "there is no spool /nonexistent"),
        (["demo", "--records", "0"], "argument --records: must be a whole number of at least 1, got '0'"),
        (["demo", "--records", "x"], "argument --records: must be a whole number of at least 1, got 'x'"),
        (["check", "\x1b[31m\n.jsonl"], "cannot read \\x1b[31m\\x0a.jsonl: No such file"),
    ],
)
def test_mistakes_get_one_line_and_status_2(arguments: list[str], words: str, folder: Path) -> None:
    status, out, err = run(*arguments, cwd=folder)
    assert status == 2, err
    assert out == ""
    assert err.startswith("geventaudit: ")
    assert words in err
    assert err.count("\n") == 1


def test_the_error_names_the_options_for_an_address(folder: Path) -> None:
    """The usual socket is not there on a developer's machine."""
    if any(os.path.exists(path) for path in MDSD_SOCKETS):
        pytest.skip("an agent has its socket at the usual path")
    status, out, err = run("send", "-", cwd=folder)
    assert (status, out) == (2, "")
    assert err.endswith("; give the address of the agent: --unix PATH or --tcp HOST:PORT\n")


def test_a_file_that_is_not_there_while_the_agent_is(listening: Any, socket_path: str) -> None:
    status, out, err = run("send", "/nonexistent", "--unix", socket_path)
    assert (status, out, err) == (2, "", "geventaudit: cannot read /nonexistent: No such file or directory\n")


def test_an_agent_that_never_reads_is_reported(socket_path: str) -> None:
    with std_socket.socket(std_socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        began = time.monotonic()
        status, out, _ = run("send", "-", "--unix", socket_path, "--timeout", "0.3", given=lines(GOOD))
        assert (status, out) == (1, "0 delivered, 1 not delivered, 0 refused\n")
        assert time.monotonic() - began < 30


def test_sending_ends_where_there_is_no_room(socket_path: str, folder: Path) -> None:
    """Otherwise each line would wait as long, and leave a gap."""
    file = folder / "records.jsonl"
    file.write_bytes(numbered(*range(4000)))
    with std_socket.socket(std_socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen()
        status, out, err = run("send", str(file), "--unix", socket_path, "--timeout", "0.3")
    delivered, left, refused = (int(word) for word in out.split() if word.isdigit())
    assert (status, delivered, refused) == (1, 0, 0)
    assert 2048 < left < 4000
    assert err.count("the queue is full (2048 records)") == 2, "the client's word, and the line's"
    assert f"stopped at line {left} of {file}: the following lines were not sent\n" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_send_reports_its_deliveries_after_a_signal(
    listening: Any, socket_path: str, folder: Path, number: int
) -> None:
    with command("send", "-", "--unix", socket_path) as sending:
        sending.stdin.write(numbered(1, 2))
        sending.stdin.flush()
        eventually(lambda: arrived(folder) == [1, 2])
        sending.send_signal(number)
        sending.wait(timeout=30)
        out, err = sending.stdout.read(), sending.stderr.read()
    assert (sending.returncode, out) == (1, b"2 delivered, 0 not delivered, 0 refused\n")
    assert err == b"stopped at line 2 of -: the following lines were not sent\n"


def test_ctrl_c_prints_no_traceback(folder: Path) -> None:
    with command("check", "-") as checking:
        checking.stdin.write(lines(BAD))
        checking.stdin.flush()
        assert checking.stderr.readline().startswith(b"line 1: ")
        checking.send_signal(signal.SIGINT)
        checking.wait(timeout=30)
        assert (checking.returncode, checking.stderr.read()) == (130, b"")
    with command("demo", "--records", "300000") as demo:
        assert demo.stdout.readline().startswith(b"300 greenlets send")
        demo.send_signal(signal.SIGINT)
        demo.wait(timeout=30)
        err = demo.stderr.read()
    assert demo.returncode == 130
    assert b"Traceback" not in err
    assert b"KeyboardInterrupt" not in err


def test_a_closed_output_ends_the_command(socket_path: str) -> None:
    read, write = os.pipe()
    with command("listen", "--unix", socket_path, stdout=write) as listening:
        os.close(write)
        os.close(read)
        assert listening.stderr.readline().startswith(b"listening on")
        run("send", "-", "--unix", socket_path, "--timeout", "0.2", given=lines(GOOD))
        _, err = listening.communicate(timeout=30)
    assert listening.returncode == 1
    assert b"Exception ignored" not in err


def test_a_full_disk_is_reported_and_nothing_is_called_stored(socket_path: str) -> None:
    with command("listen", "--unix", socket_path, "--output", "/dev/full") as listening:
        assert listening.stderr.readline().startswith(b"listening on")
        run("send", "-", "--unix", socket_path, "--timeout", "0.2", given=lines(GOOD))
        _, err = listening.communicate(timeout=30)
    assert listening.returncode == 1
    assert b"cannot store: [Errno 28] No space left" in err


def check_demo(lines: list[str]) -> None:
    """Check the tables at the end of a demo of 3,000 records."""
    figures = {}
    for line in lines[
        lines.index("  all delivered") + 2 : lines.index("The first record of each operation, as it arrived:") - 1
    ]:
        name, number = re.fullmatch(r"  +(\S+) +(\d+)  \S.*", line).groups()  # type: ignore[union-attr]
        figures[name] = int(number)
        assert line.index(number) + len(number) == lines[lines.index("  all delivered") + 2].index("3000") + 4, (
            "aligned"
        )
    assert figures["accepted"] == figures["delivered"] == figures["distinct"] == 3000
    assert figures["lost"] == 0
    assert figures["resent"] == figures["unread"] + figures["duplicates"]
    records = lines[lines.index("The first record of each operation, as it arrived:") + 2 :]
    column = records[0].index("result")
    rows = {line[2:column].strip(): line[column:].split()[0] for line in records[1:] if line}
    assert rows == {
        "RotateKey": "Success",
        "CreateVault": "Success",
        "ReadSecret": "Success",
        "DeleteVault": "Failure",
        "GrantRole": "Success",
    }


def test_demo() -> None:
    status, out, err = run("demo", "--records", "3000")
    assert status == 0, err
    assert (out + err).replace("\n", "").isprintable(), "no control characters in a pipe"
    assert out.count("the agent was restarted") == 2
    check_demo(out.splitlines())


def test_listen_prints_a_rate_each_second(socket_path: str) -> None:
    with command("listen", "--unix", socket_path, "--stats") as process:
        process.stderr.readline()
        run("send", "-", "--unix", socket_path, given=lines(*[GOOD] * 50, BAD))
        seen = []
        while not seen or " 50 received" not in seen[-1] or len(seen) < 3:
            seen.append(process.stdout.readline().decode())
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    seen += out.decode().splitlines(keepends=True)
    pattern = r"\d\d:\d\d:\d\d +([\d,]+) records/s +([\d,]+) received +([\d,]+) refused +([\d,]+) connections\n"
    figures = [[int(each) for each in re.fullmatch(pattern, line).groups()] for line in seen]  # type: ignore[union-attr]
    assert len({len(line) for line in seen}) == 1, "aligned"
    assert max(rate for rate, *_ in figures) <= 50
    assert sum(rate for rate, *_ in figures) > 0
    assert figures[-1][1] == 50


def test_rates_go_beside_json_lines(socket_path: str) -> None:
    with command("listen", "--unix", socket_path, "--stats", "--output", "-") as process:
        process.stderr.readline()
        run("send", "-", "--unix", socket_path, given=lines(GOOD))
        assert json.loads(process.stdout.readline())["Record"]["OperationName"]
        while b" 1 received" not in process.stderr.readline():
            pass
        process.terminate()
        assert process.communicate(timeout=60)[0] == b""


def test_rates_end_with_their_reader(socket_path: str) -> None:
    with command("listen", "--unix", socket_path, "--stats") as process:
        process.stdout.close()
        assert process.wait(60) != 0
        assert b"Traceback" not in process.stderr.read()


def test_help_and_version() -> None:
    version = f"geventaudit {__version__} ({Stats().encoder} encoder)\n"
    assert started("--version") == run("--version") == (0, version, "")
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)
    assert "examples:\n" in out
    assert run() == (0, out, ""), "without a command too"
    assert run("spool") == (0, run("spool", "--help")[1], "")


COMMANDS = ("listen", "send", "check", "spool", "schema", "routes", "doctor", "completion", "demo")


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_can_be_parsed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from geventaudit.cli import _parser

    with pytest.raises(SystemExit):
        _parser().parse_args([name, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        words = shlex.split(example.partition("geventaudit ")[2].split("  ")[0])
        words = words[: next((n for n, word in enumerate(words) if word in "<>|"), len(words))]
        assert words[0] == name
        _parser().parse_args(words)


def test_the_schema_is_printed() -> None:
    from geventaudit import MsgSchema
    from geventaudit.schema.json_schema import json_schema

    status, out, err = run("schema")
    assert (status, err) == (0, "")
    assert json.loads(out) == json_schema(MsgSchema())


# -- send --follow -----------------------------------------------------------------------------------------------------


def arrived(folder: Path) -> list[int]:
    text = (folder / "out.jsonl").read_text()
    return [json.loads(line)["Record"]["CustomData"]["n"] for line in text.splitlines()]


def numbered(*numbers: int) -> bytes:
    return lines(*({"Type": "ControlPlane", "Record": mapping(CustomData={"n": number})} for number in numbers))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_follow(listening: Any, socket_path: str, folder: Path, number: int) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(numbered(1, 2) + b"not json\n")
    with command("send", "--follow", str(file), "--unix", socket_path) as following, open(file, "ab") as writer:
        eventually(lambda: arrived(folder) == [1, 2])
        assert following.stderr.readline().startswith(b"line 3: not JSON: ")
        half = numbered(3)
        writer.write(half[:40])
        writer.flush()
        writer.write(half[40:] + numbered(4))
        writer.flush()
        eventually(lambda: arrived(folder) == [1, 2, 3, 4], "what is appended is sent")
        os.rename(file, folder / "records.jsonl.1")
        writer.write(numbered(5))
        writer.flush()
        file.write_bytes(b"\n" + numbered(6) + b"[]\n")
        eventually(lambda: arrived(folder) == [1, 2, 3, 4, 5, 6], "first the rest of the old file")
        assert following.stderr.readline().startswith(b"line 3: must be a Msg"), "numbers begin anew"
        file.write_bytes(numbered(7))
        eventually(lambda: arrived(folder)[6:] == [7], "a file that was cut short is read from its beginning")
        following.send_signal(number)
        out, err = following.communicate(timeout=30)
    assert (following.returncode, out, err) == (1, b"7 delivered, 0 not delivered, 2 refused\n", b"")


def test_follow_waits_for_the_agent_with_more_than_the_queue_holds(socket_path: str, folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(b"")
    first = Agent(socket_path, lambda received: None).start()
    with command("send", "--follow", "--timeout", "0.1", str(file), "--unix", socket_path) as following:
        eventually(lambda: first.counts.connections == 1)
        first.stop()
        file.write_bytes(numbered(*range(3000)))
        got: list[int] = []

        def keep(received: Any) -> None:
            if isinstance(received.message, Msg):
                got.append(received.message.record.custom_data["n"])

        assert following.stderr.readline().startswith(b"geventaudit: connect failed")
        with Agent(socket_path, keep):
            eventually(lambda: len(got) >= 3000)
            following.send_signal(signal.SIGTERM)
            out, _ = following.communicate(timeout=30)
    assert (following.returncode, out) == (0, b"3000 delivered, 0 not delivered, 0 refused\n")
    assert got == list(range(3000))


def test_follow_waits_for_an_agent_that_is_not_there_yet(socket_path: str, folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(numbered(1, 2))
    got: list[Any] = []
    with command("send", "--follow", str(file), "--unix", socket_path) as following:
        first = following.stderr.readline().decode()
        assert first.startswith(f"geventaudit: unix:{socket_path}: could not connect: ")
        assert first.endswith(": waiting for the agent\n")
        with Agent(socket_path, got.append):
            eventually(lambda: sum(isinstance(each.message, Msg) for each in got) == 2)
            following.send_signal(signal.SIGTERM)
            out, _ = following.communicate(timeout=30)
    assert (following.returncode, out) == (0, b"2 delivered, 0 not delivered, 0 refused\n")


def test_follow_counts_the_waiting_line_after_a_signal(socket_path: str, folder: Path) -> None:
    """The line that waited for room is counted too: nothing is called delivered that is not."""
    file = folder / "records.jsonl"
    file.write_bytes(b"")
    agent = Agent(socket_path, lambda received: None).start()
    with command("send", "--follow", "--timeout", "0.1", str(file), "--unix", socket_path) as following:
        eventually(lambda: agent.counts.connections == 1)
        agent.stop()
        file.write_bytes(numbered(*range(2500)))
        assert following.stderr.readline().startswith(b"geventaudit: connect failed")
        following.send_signal(signal.SIGINT)
        out, _ = following.communicate(timeout=30)
    assert following.returncode == 1
    delivered, left, refused = (int(word) for word in out.decode().split() if word.isdigit())
    assert (delivered, refused) == (0, 0)
    assert 0 < left <= 2049


def test_follow_ends_with_standard_input(socket_path: str) -> None:
    with Agent(socket_path, lambda received: None):
        status, out, _ = run("send", "--follow", "-", "--unix", socket_path, given=numbered(1))
    assert (status, out) == (0, "1 delivered, 0 not delivered, 0 refused\n")


def test_follow_ends_with_a_pipe(socket_path: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with (
        Agent(socket_path, lambda received: None),
        command("send", "--follow", str(folder / "pipe"), "--unix", socket_path) as following,
    ):
        (folder / "pipe").write_bytes(numbered(1, 2, 3))
        out, err = following.communicate(timeout=30)
    assert (following.returncode, out, err) == (0, b"3 delivered, 0 not delivered, 0 refused\n", b"")


def test_follow_skips_the_rest_of_a_line_that_is_too_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is refused before its end, and its rest is not taken for another line."""
    monkeypatch.setattr(file_lines, "MAX_LINE_BYTES", 10)
    file = folder / "lines"
    file.write_bytes(b"x" * 25)
    with contextlib.closing(file_lines.followed(str(file))) as got, open(file, "ab") as writer:
        assert next(got) == (1, b"x" * 11)
        writer.write(b"yy\ngood\n" + b"z" * 25)
        writer.flush()
        assert next(got) == (2, b"good\n")
        assert next(got) == (3, b"z" * 11)
        os.rename(file, folder / "lines.1")
        file.write_bytes(b"other\n")
        assert next(got) == (1, b"other\n"), "and the end of the old file is no line either"
        file.write_bytes(b"other\n" + b"w" * 25)
        assert next(got) == (2, b"w" * 11)
        file.write_bytes(b"cut\n")
        assert next(got) == (1, b"cut\n"), "nor is a file that was cut in such a line"


def test_follow_needs_its_file(socket_path: str) -> None:
    with Agent(socket_path, lambda received: None):
        status, _, err = run("send", "--follow", "/nonexistent", "--unix", socket_path)
    assert (status, err) == (2, "geventaudit: cannot read /nonexistent: No such file or directory\n")


# -- at a terminal -----------------------------------------------------------------------------------------------------


def at_a_terminal(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run it with a terminal for standard output and error; its status and all that it wrote."""
    main, other = pty.openpty()
    termios.tcsetwinsize(main, (24, 80))
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=other,
        stderr=other,
        env={**plain, "TERM": "xterm", **environment},
    )
    os.close(other)
    written = b""
    with contextlib.suppress(OSError):  # EIO: the other side has closed
        while data := tp_read(main, 4096):
            written += data
    os.close(main)
    return int(process.wait(timeout=60)), written.decode()


def test_colours_only_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from geventaudit.cli.terminal import coloured

    doctor = ("doctor", "--unix", "/nonexistent")
    assert "\x1b[31mFAILED \x1b[0m /nonexistent" in at_a_terminal("-m", "geventaudit", *doctor)[1]
    assert run(*doctor)[1].splitlines()[1].startswith("FAILED  /nonexistent"), "nor in a pipe"
    main, other = pty.openpty()
    with open(main, "rb", buffering=0), open(other, "w") as terminal:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert coloured("x", "green", terminal) == "\x1b[32mx\x1b[0m"
        monkeypatch.setenv("NO_COLOR", "")
        assert coloured("x", "green", terminal) == "\x1b[32mx\x1b[0m", "empty is as good as not set"
        monkeypatch.setenv("NO_COLOR", "1")
        assert coloured("x", "green", terminal) == "x"
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert coloured("x", "green", terminal) == "x"


def test_progress_only_at_a_terminal(folder: Path) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(lines(GOOD, BAD) * 500)
    check = ("-m", "geventaudit", "check", str(file))
    status, out = at_a_terminal(*check)
    assert status == 1
    assert "%|" in out
    complaints = [line for line in out.replace("\r", "\n").splitlines() if line.startswith("line ")]
    assert complaints == [f"line {number}: OperationName: must not be empty" for number in range(2, 1001, 2)]
    assert [line for line in out.replace("\r", "\n").splitlines() if line.strip()][-1] == "500 valid, 500 refused"
    assert "%|" not in run("check", str(file))[2], "nor in a pipe"
    without = "import sys; sys.modules['tqdm'] = None; from geventaudit.cli import main; sys.exit(main(sys.argv[1:]))"
    status, out = at_a_terminal("-c", without, "check", str(file))
    assert (status, "%|" in out) == (1, False), "nor without tqdm"
    assert out.endswith("500 valid, 500 refused\r\n")


def visible(written: str) -> list[str]:
    """The lines that a terminal shows at the end, which is a terminal of any height."""
    screen, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[(?:\d*)A|\r|\n|[^\r\n\x1b]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        else:
            line = screen[row].ljust(column)
            screen[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in screen]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_the_demo_at_a_terminal(environment: dict[str, str]) -> None:
    status, out = at_a_terminal("-m", "geventaudit", "demo", "--records", "3000", **environment)
    assert status == 0, out
    lives = re.findall(r"\r  ([\d,]+) of 3,000 arrived, [\d,]+ records/s, restarts: [012]", out)
    assert bool(lives) is ("TERM" not in environment)
    assert all(0 <= int(each.replace(",", "")) <= 3000 for each in lives)
    assert ("\x1b[32m  lost" in out or "\x1b[32mlost" in out) is (not environment), "in colour"
    assert not environment or "\x1b" not in out
    shown = [re.sub(r"\x1b\[\d*m", "", line) for line in visible(re.sub(r"\x1b\[\d*m", "", out))]
    assert not [line for line in shown if "of 3,000 arrived" in line], "the live line is gone"
    assert sum("the agent was restarted" in line for line in shown) == 2
    check_demo(shown)


def test_tables_align() -> None:
    from geventaudit.cli.terminal import table

    assert table(
        [["name", "n", "why"], ["é", "10", ""], ["日本", "7", "a\x1b[31m\nb"], ["e\u0301x", "123", "c"]], right=[1]
    ) == [
        "name    n  why",
        "é      10",
        "日本    7  a\\x1b[31m\\x0ab",
        "e\u0301x    123  c",
    ]
    assert table([]) == []


def test_log_lines_stand_above_the_progress_bar(socket_path: str, folder: Path) -> None:
    """The client's log has a line for each connection that is lost; the program goes on reading meanwhile."""
    file = folder / "records.jsonl"
    file.write_bytes(numbered(*range(6000)))
    seen = itertools.count(1)

    def receive(received: Any) -> None:
        if next(seen) % 1500 == 0:
            raise OSError("hangs up")

    with Agent(socket_path, receive):
        status, out = at_a_terminal("-m", "geventaudit", "send", str(file), "--unix", socket_path, "--require-ack")
    assert status == 0, out
    assert "%|" in out
    shown = [line for line in visible(out) if line]
    lost = [line for line in shown if "connection lost" in line]
    assert len(lost) >= 3
    assert all(line.startswith(f"geventaudit: connection lost: unix:{socket_path}: ") for line in lost), shown
    assert not any("%|" in line for line in shown), "the bar is gone at the end"
    others = [line for line in shown if line not in lost and line != "geventaudit: connected"]
    assert others == ["6000 delivered, 0 not delivered, 0 refused"]


# -- completion --------------------------------------------------------------------------------------------------------


def test_completion_in_bash(folder: Path) -> None:
    status, script, err = run("completion", "bash")
    assert (status, err) == (0, "")
    (folder / "script").write_text(script)
    (folder / "records.jsonl").touch()

    def completed(*words: str) -> list[str]:
        typed = " ".join(word or "''" for word in words)
        program = (
            f"cd {folder}; source ./script; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            "_shtab_geventaudit; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", program], stdout=subprocess.PIPE, timeout=60, check=True)
        return str(done.stdout.decode()).split()

    assert completed("geventaudit", "sen") == ["send"]
    assert set(completed("geventaudit", "")) >= set(COMMANDS)
    assert completed("geventaudit", "send", "--fol") == ["--follow"]
    assert completed("geventaudit", "send", "rec") == ["records.jsonl"]
    assert completed("geventaudit", "completion", "ba") == ["bash"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_completion_in_other_shells(shell: str) -> None:
    status, out, _ = run("completion", shell)
    assert status == 0
    assert all(name in out for name in COMMANDS)


def test_completion_without_shtab() -> None:
    without = "import sys; sys.modules['shtab'] = None; from geventaudit.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", without, "completion", "bash"], stderr=subprocess.PIPE, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == b"geventaudit: completion is made by shtab: pip install 'geventaudit[cli]'\n"


def test_the_timeout_holds_for_connecting_too(socket_path: str) -> None:
    with std_socket.socket(std_socket.AF_UNIX) as listener, std_socket.socket(std_socket.AF_UNIX) as filler:
        listener.bind(socket_path)
        listener.listen(0)
        filler.connect(socket_path)
        status, _, err = run("send", "-", "--unix", socket_path, "--timeout", "0.2", given=lines(GOOD))
    assert status == 2
    assert "accepted no connection for 0.2 seconds" in err


def test_an_output_that_cannot_show_everything(socket_path: str, folder: Path) -> None:
    unusual = {"Type": "ControlPlane", "Record": mapping(OperationName="Größe", CustomData={"x": 1})}
    options = ("--unix", socket_path, "--output", str(folder / "out"))
    with start("listen", *options, PYTHONIOENCODING="ascii") as listening:
        listening.stderr.readline()
        assert run("send", "-", "--unix", socket_path, given=lines(unusual))[0] == 0
        assert b"Gr\\xf6\\xdfe" in listening.stdout.readline()
        eventually(lambda: "Größe" in (folder / "out").read_text("utf-8"))
        listening.kill()


def test_closed_streams_and_full_output(folder: Path) -> None:
    import subprocess as std_subprocess

    (folder / "bad.jsonl").write_bytes(lines(BAD, GOOD))
    geventaudit = f"{sys.executable} -X dev -W error -m geventaudit"
    for arguments, status, words in (
        ("check - <&-", 2, "cannot read -: standard input is closed"),
        ("check /dev/null >/dev/full", 1, "cannot write the output"),
        ("check /dev/null >&-", 0, ""),
        (f"check {folder}/bad.jsonl >&-", 1, "line 1: OperationName: must not be empty"),
        (f"check {folder}/bad.jsonl 2>&-", 1, ""),
        ("schema <&- >&- 2>&-", 0, ""),
        (f"listen --tcp {'x' * 300}:1", 2, "must be HOST:PORT"),
    ):
        result = std_subprocess.run(
            ["sh", "-c", f"{geventaudit} {arguments}"], capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, words in result.stderr) == (status, True), result.stderr
        assert "Traceback" not in result.stderr
        assert "ResourceWarning" not in result.stderr
        if "2>&-" in arguments and ">&- 2" not in arguments:
            assert result.stdout == "1 valid, 1 refused\n", "complaints do not go to standard output instead"
