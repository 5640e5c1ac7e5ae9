"""``geventaudit seal-key`` and ``geventaudit verify`` from the command line."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
from pathlib import Path

import pytest
from gevent import subprocess
from trails import as_fluent_bit_lines, key_file_in, stamp_of, whole_trail, writer

from geventaudit.cli import main
from geventaudit.verify import lines

TRAIL = whole_trail()
LINES = [as_fluent_bit_lines(body) for body in TRAIL.bodies()]


@pytest.fixture
def trail(tmp_path: Path) -> str:
    path = tmp_path / "trail.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


@pytest.fixture
def key(tmp_path: Path) -> str:
    return key_file_in(tmp_path)


def test_seal_key_makes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "seal.key"
    assert main(["seal-key", str(path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text()
    assert content.split()[2] not in capsys.readouterr().out
    assert main(["seal-key", str(path)]) == 2
    assert path.read_text() == content
    assert main(["seal-key", str(tmp_path / "none" / "key")]) == 2
    assert os.listdir(tmp_path) == ["seal.key"]


def test_a_whole_trail(trail: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", trail, "--key-file", key]) == 0
    out = capsys.readouterr().out
    assert out.endswith("authentic and whole\n")
    assert "26 lines, 1 stream, 26 authentic records, 6 of them checkpoints, 0 duplicates, 0 missing, 0 only" in out


def test_without_a_key_nothing_is_authenticated(trail: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", trail]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nothing is authenticated")
    assert out.endswith("without gaps\n")


def test_problems_are_printed_safely_and_end_with_status_1(
    trail: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "\x1b[31mbad"
    bad.write_text("\n".join(LINES[:3] + LINES[5:]).replace("CreateUser", "DeleteUser", 1))
    assert main(["verify", str(bad), "--key-file", key]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM" in out
    assert "4-5" in out
    assert "NOT WHOLE" in out
    assert "\x1b" not in out


def test_findings_as_json(trail: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", trail, "--key-file", key, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] is True
    assert found["streams"][0]["stream"] == TRAIL.stream
    assert found["streams"][0]["problems"] == []


def test_state_is_written_if_the_trail_is_whole(trail: str, key: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert main(["verify", trail, "--key-file", key, "--state", str(state)]) == 0
    before = state.read_text()
    assert TRAIL.stream in before
    cut = tmp_path / "cut"
    cut.write_text("\n".join(LINES[:20]))
    assert main(["verify", str(cut), "--key-file", key]) == 0, "a cut tail looks like a crash"
    assert main(["verify", str(cut), "--key-file", key, "--state", str(state)]) == 1
    assert state.read_text() == before


@pytest.mark.parametrize("content", ["", "\n\n", '{"AuditVersion": "1", "AuditType": "Heartbeat"}\n'])
@pytest.mark.parametrize("command", ["verify", "report"])
@pytest.mark.parametrize("has_key", [False, True])
def test_files_without_a_record_are_not_whole(
    content: str, command: str, has_key: bool, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty"
    path.write_text(content)
    assert main([command, str(path), *(["--key-file", key] if has_key else [])]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM there is no readable record" in out
    assert "NOT WHOLE: 1 problem" in out


def test_files_without_a_record_leave_the_state_as_it_was(
    trail: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, path = tmp_path / "state", tmp_path / "empty"
    path.write_text("")
    assert main(["verify", str(path), "--key-file", key, "--state", str(state)]) == 1
    assert not state.exists()
    assert main(["verify", trail, "--key-file", key, "--state", str(state)]) == 0
    before = state.read_text()
    capsys.readouterr()
    assert main(["verify", str(path), "--key-file", key, "--state", str(state), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] is False
    assert found["problems"] == ["there is no readable record of an audit trail in these files"]
    assert state.read_text() == before


def test_explained_gaps_are_accepted_on_demand(key: str, tmp_path: Path) -> None:
    made = writer()
    for _ in range(5):
        made.send()
    made.stamper.give_up(4)
    made.checkpoint()
    path = tmp_path / "trail"
    path.write_text("\n".join(as_fluent_bit_lines(body) for body in made.bodies() if stamp_of(body)["seq"] != 4))
    arguments = ["verify", str(path), "--key-file", key]
    assert main(arguments) == 1
    assert main([*arguments, "--accept-explained"]) == 0


@pytest.mark.parametrize(
    "arguments", [["none"], ["{trail}", "--key-file", "none"], ["{trail}", "--key-file", "{trail}"]]
)
def test_unreadable_arguments_are_refused(arguments: list[str], trail: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *(each.replace("{trail}", trail) for each in arguments)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_state_that_is_none(trail: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", trail, "--state", trail]) == 2
    assert "no state file" in capsys.readouterr().err


def test_gzip_that_was_cut_is_found(tmp_path: Path, key: str) -> None:
    data = gzip.compress("\n".join(LINES).encode())
    for name, content in (("cut", data[:-20]), ("damaged", data[:100] + b"xxxx" + data[104:])):
        path = tmp_path / name
        path.write_bytes(content)
        assert main(["verify", str(path), "--key-file", key]) == 1


def test_standard_input(trail: str, key: str) -> None:
    with open(trail, "rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "geventaudit", "verify", "-", "--key-file", key], stdin=file, check=False, timeout=60
        )
    assert done.returncode == 0


def test_long_lines_are_not_held(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_CHUNK", 1 << 10)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 12)
    path = tmp_path / "long"
    for junk in ([], ["x" * 10_000], ["", "x" * 10_000, "y" * 10_000]):
        path.write_text("\n".join([*LINES[:5], *junk, *LINES[5:], *junk]))
        assert main(["verify", str(path), "--key-file", key]) == bool(junk)
