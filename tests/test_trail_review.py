"""Trails as an auditor meets them: long ones through everything that can go wrong, and one that was tampered with."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from fluent_bit import BINARY
from helpers import message, once
from trails import MASTER, as_fluent_bit_lines, as_listen, changed, stamp_of, writer

from benchmarks import trail
from geventaudit.cli import main
from geventaudit.trail.canonical import NO_MAC, canonical_bytes, canonical_digest

RECORDS = 10_000


@once
@pytest.mark.parametrize("agent", ["listen", "fluent-bit"])
def test_a_trail_through_restarts_forks_and_a_kill(tmp_path: Path, agent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form of ``python -m benchmarks.trail``, which compares all numbers with a count of its own."""
    if agent == "fluent-bit" and not BINARY:
        pytest.skip("needs Fluent Bit: FLUENT_BIT names no binary")
    if agent == "listen":
        monkeypatch.delenv("FLUENT_BIT", raising=False)
    outcome = trail.run(tmp_path, 1400, 1, is_sealed=agent == "listen")
    assert outcome.accepted >= 1400
    assert outcome.records - outcome.checkpoints >= outcome.accepted
    assert outcome.streams == 5


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    made = writer()
    made.checkpoint("open")
    for number in range(2, RECORDS):
        made.send(message(number)) if number % 2000 else made.checkpoint(delivered=number - 1)
    made.checkpoint("end", delivered=RECORDS - 1)
    return made.bodies()


def resealed(body: dict[str, Any], steps: int) -> dict[str, Any]:
    """The body with another operation, sealed with the key of a record that is so many numbers later."""
    made = copy.deepcopy(body)
    made["OperationName"] = "DeleteUser"
    stamp_of(made)["mac"] = NO_MAC
    first = writer().stamper.chain.state.key
    assert first is not None
    key = first.evolve_by(stamp_of(body)["seq"] - 1 + steps)
    stamp_of(made)["mac"] = key.mac(canonical_digest(canonical_bytes(made))).hex()
    return made


def test_every_manipulation_of_a_long_trail_is_found(
    tmp_path: Path, bodies: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the commands of the guide: each record that was touched is named, and no other one."""
    key, state, path = tmp_path / "app.key", tmp_path / "app.state", tmp_path / "trail.jsonl"
    key.write_text(f"geventaudit-seal-key 1 {MASTER.hex()} 1\n")
    command = ["verify", str(path), "--key-file", str(key), "--state", str(state)]

    def verified(lines: list[str]) -> str:
        path.write_text("".join(f"{line}\n" for line in lines))
        status = main(command)
        out = capsys.readouterr().out
        assert (status == 0) is out.endswith("authentic and whole\n")
        return out

    agents = [as_fluent_bit_lines, as_listen]
    lines = {stamp_of(body)["seq"]: agents[number % 2](body) for number, body in enumerate(bodies)}
    assert "authentic and whole" in verified(list(lines.values()))

    assert f"{RECORDS - 100 + 1}-{RECORDS}" in verified([lines[seq] for seq in lines if seq <= RECORDS - 100])

    tampered = dict(lines)
    for seq in (*range(50, 61), 777, *range(3000, 3101)):
        del tampered[seq]
    tampered[120] = tampered[120].replace("CreateUser", "CreateUsr")
    tampered[1500] = json.dumps(resealed(bodies[1499], 1))
    tampered[1600] = json.dumps(resealed(bodies[1599], 500))
    one, other = bodies[4999], bodies[5999]
    tampered[5000] = json.dumps(changed(one, seq=6000))
    tampered[6000] = json.dumps(changed(other, seq=5000))
    foreign = writer(start=1, salt=bytes(16))
    foreign.send(message(1))
    tampered[8000] = json.dumps(changed(foreign.bodies()[0], stream=stamp_of(one)["stream"], seq=8000))
    bare = copy.deepcopy(bodies[8999])
    del stamp_of(bare)["mac"]
    tampered[9000] = json.dumps(bare)
    beside = [json.dumps(changed(bodies[99], time=stamp_of(bodies[100])["time"])), lines[200], lines[200]]
    order = [*tampered.values(), *beside]
    random.Random(3).shuffle(order)
    out = verified(order)
    altered = next(line for line in out.splitlines() if "altered, inserted, or sealed with another key" in line)
    assert set(map(int, re.findall(r"(\d+) \(", altered))) == {120, 1500, 1600, 5000, 6000, 8000, 9000}
    assert altered.split()[2] == "7"
    missing = next(line for line in out.splitlines() if " missing" in line and line.startswith("PROBLEM"))
    assert missing.endswith(": 50-60, 777, 3000-3100")
    assert missing.split()[2] == str(11 + 1 + 101)
    assert re.search(r"1 altered copy beside a valid one: 100 \(", out)
    assert "2 duplicates of 200 (" in out
    for place in re.findall(r"\(([^()]+:\d+)\)", altered):
        name, _, line = place.rpartition(":")
        assert Path(name).read_text().splitlines()[int(line) - 1] in order
    assert os.path.getsize(state) > 0


def test_a_trail_continued_with_stolen_keys_is_found(
    tmp_path: Path, bodies: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A thief has the keys from record 501 on: the records before cannot be replaced, only removed."""
    key, path = tmp_path / "app.key", tmp_path / "trail.jsonl"
    key.write_text(f"geventaudit-seal-key 1 {MASTER.hex()} 1\n")
    thief = writer()
    for body in bodies[:500]:
        thief.checkpoint() if "checkpoint" in stamp_of(body) else thief.send()
    for _ in range(100):
        thief.send()
    path.write_text("\n".join(map(as_fluent_bit_lines, [*bodies[:400], *thief.bodies()[500:]])))
    assert main(["verify", str(path), "--key-file", str(key)]) == 1
    assert re.search(r"PROBLEM \S+ 100 missing.*: 401-500\n", capsys.readouterr().out)
