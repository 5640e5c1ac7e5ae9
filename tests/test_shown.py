"""Arrived records as lines and as JSON: no text from outside moves, colours, begins a line, or hides another."""

from __future__ import annotations

import datetime as dt
import json
import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gevent import socket, subprocess
from helpers import SERVICE_TREE_ID, eventually, mapping, message, once

from geventaudit import (
    CallerIdentity,
    CallerIdentityType,
    Diagnostic,
    Heartbeat,
    Msg,
    TargetResource,
    ValidationError,
)
from geventaudit.agent import Agent, Received, Refused
from geventaudit.agent.shown import json_line, json_of, line_of, line_of_refusal, printable

CONTROLS = "".join(
    map(
        chr,
        [
            *(*range(0x20), *range(0x7F, 0xA0), 0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F)),
            *(*range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC), 0xE0001, 0xE0020, 0x1D173, 0xE000),
        ],
    )
)
FORGED = "\n2026-01-01T00:00:00Z ControlPlane Grant Success: root from 192.0.2.1 on everything\x1b[2J\x1b]0;title\x07"
EVIL = f"x{CONTROLS}{FORGED}"
NOT_UTF8 = b"\xff\xfe\x1b[31m\xed\xa0\x80"
TEXTS = (
    "OperationName", "OperationCategoryDescription", "OperationResultDescription", "OperationAccessLevel",
    "CallerAgent", "CallerIpAddress", "OperationType", "OperationResult",
)  # fmt: skip
BEAT = dict.fromkeys(("AsmAuditServiceId", "AuditVersion", "OsVersion", "Language", "Destination"), "x")


def bodies(evil: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Tags and bodies with *evil* in every place."""
    key = evil if isinstance(evil, str | bytes) else "x"
    for name in TEXTS:
        yield "AsmAuditCP", mapping(**{name: evil})
    yield "AsmAuditCP", mapping(OperationCategories=[evil])
    yield "AsmAuditCP", mapping(OperationCategories=evil)
    yield "AsmAuditCP", mapping(CallerAccessLevels=[evil])
    yield "AsmAuditCP", mapping(CallerIdentities={"UPN": [{"Identity": evil, "Description": evil}]})
    yield "AsmAuditCP", mapping(CallerIdentities={"UPN": [{"Identity": "x", "Description": "y", key: evil}]})
    yield "AsmAuditCP", mapping(CallerIdentities={key: [{"Identity": "x", "Description": "y"}]})
    yield "AsmAuditCP", mapping(TargetResources={key: [{"Name": evil}]})
    yield "AsmAuditCP", mapping(TargetResources={"x": [{"Name": "x", "Cluster": evil, "DataCenter": evil}]})
    yield "AsmAuditCP", mapping(TargetResources={"x": [{"Name": "x", "Region": evil, key: evil}]})
    yield "AsmAuditCP", mapping(TargetResources={key: []})
    yield "AsmAuditCP", mapping(CustomData={"x": evil, "y": [evil], "z": {key: evil}})
    yield "AsmAuditCP", mapping(CustomData={key: evil})
    yield "AsmAuditCP", {**mapping(), key: evil}
    yield "AsmAuditCP", {**mapping(), "env_ikey": evil}
    for name in BEAT:
        yield "AsmAuditHB", {**BEAT, name: evil}
    yield "AsmAuditHB", {**BEAT, key: evil}
    yield "AsmAuditDG", {key: evil}
    if isinstance(evil, str):
        yield evil[:3900], mapping()
        yield evil[:3], {}


def frames(evil: Any) -> list[bytes]:
    made = [msgpack.packb([tag, [[5, body]], {}], unicode_errors="surrogateescape") for tag, body in bodies(evil)]
    made += [msgpack.packb(["AsmAuditCP", [[[5, {"m": evil}], mapping()]]], unicode_errors="surrogateescape")]
    return made


EVILS = {
    "control characters": EVIL,
    "text that is not UTF-8": NOT_UTF8.decode("utf-8", "surrogateescape"),
    "bytes": EVIL.encode(),
    "an extension": msgpack.ExtType(5, EVIL.encode()),
    "a timestamp": msgpack.Timestamp(5, 123456789),
    "a list": [EVIL],
    "a map": {EVIL: EVIL},
    "long": EVIL * 1000,
}


@pytest.mark.parametrize("kind", EVILS)
def test_every_field_with_every_control_character(
    kind: str, socket_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[Received] = []
    refused: list[Refused] = []
    sent = frames(EVILS[kind])
    with Agent(socket_path, got.append, on_refused=refused.append) as agent, connected(socket_path) as sock:
        sock.sendall(b"".join(sent))
        eventually(lambda: len(got) + len(refused) == len(sent), "a message costs neither others nor the stream")
    with (
        caplog.at_level(logging.INFO),
        Agent(socket_path, lambda received: None) as agent,
        connected(socket_path) as sock,
    ):
        sock.sendall(b"".join(sent))
        eventually(lambda: agent.counts.messages + agent.counts.refused == len(sent))
    assert refused
    lines = [line_of(each) for each in got] + [line_of_refusal(each) for each in refused]
    lines += [record.getMessage() for record in caplog.records]
    lines += [json_line(each) for each in got if isinstance(each.message, Msg)]
    for line in lines:
        assert line.isprintable(), line[:500]
    for line in [line_of(each) for each in got] + [line_of_refusal(each) for each in refused]:
        assert len(line) < 20_000
    for refusal in refused:
        assert len(line_of_refusal(refusal)) < 10_000
    for each in got:
        if isinstance(each.message, Msg):
            assert json.loads(json_line(each)) == json.loads(json.dumps(json_of(each))), "only spelled differently"


def connected(path: str) -> Any:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(path)
    return sock


@once
def test_listen_prints_one_line_a_message(socket_path: str, folder: Path) -> None:
    sent = [each for evil in EVILS.values() for each in frames(evil)]
    out, printed, complained = (folder / name for name in ("out.jsonl", "stdout", "stderr"))
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "geventaudit", "listen", "--unix", socket_path]
    with (
        printed.open("wb") as stdout_file,
        complained.open("wb") as stderr_file,
        subprocess.Popen([*command, "--output", str(out)], stdout=stdout_file, stderr=stderr_file) as listening,
    ):
        try:
            eventually(lambda: complained.read_bytes().endswith(b"\n"))
            with connected(socket_path) as sock:
                sock.sendall(b"".join(sent) + msgpack.packb(["AsmAuditHB", [[5, BEAT]], {"chunk": "last"}]))
                assert sock.recv(100)
            listening.send_signal(signal.SIGTERM)
            listening.wait(timeout=60)
        finally:
            listening.kill()
    stdout, stderr = printed.read_bytes(), complained.read_bytes()
    _, *refusals, summary = stderr.decode().splitlines()
    lines = stdout.decode().splitlines()
    assert len(lines) + len(refusals) == len(sent) + 1
    assert summary == f"{len(lines)} messages received, {len(refusals)} refused"
    assert all(line.startswith("refused '") for line in refusals)
    assert all(line.startswith("1970-01-01T00:00:05Z ") for line in lines)
    for text in (stdout, stderr, out.read_bytes()):
        assert all(line.isprintable() for line in text.decode().split("\n"))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(each["Type"] == "ControlPlane" for each in records)
    assert out.stat().st_mode & 0o777 == 0o600, "it has personal data"


@once
def test_an_output_file_that_is_there_keeps_its_mode(socket_path: str, folder: Path) -> None:
    out = folder / "out.jsonl"
    out.write_text("before\n")
    out.chmod(0o640)
    command = [sys.executable, "-m", "geventaudit", "listen", "--unix", socket_path, "--output", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as listening:
        assert listening.stderr.readline().startswith(b"listening on")
        listening.send_signal(signal.SIGTERM)
        listening.communicate(timeout=60)
    assert (out.read_text(), out.stat().st_mode & 0o777) == ("before\n", 0o640)


# -- lines -------------------------------------------------------------------------------------------------------------


def received(msg: Any = None, **parts: Any) -> Received:
    return Received(
        **{"message": msg or message(), "time": 5, "service_tree_id": None, "extra": {}, "metadata": {}, **parts}
    )


def test_a_line() -> None:
    assert line_of(received()) == (
        "1970-01-01T00:00:05Z ControlPlane CreateUser Success: user@example.com from 192.0.2.7 on SubscriptionId/res1"
    )
    assert line_of(received(Heartbeat(destination="TCP"))) == "1970-01-01T00:00:05Z Heartbeat via TCP"
    assert line_of(received(Diagnostic())) == "1970-01-01T00:00:05Z Diagnostic"
    assert line_of(received(extra={"AuditType": "x", "a b": 1})).endswith('res1 (besides: AuditType, "a b")')
    assert line_of(received(time=1e300)).startswith("@1e+300 ControlPlane")


@pytest.mark.parametrize(
    "forged",
    [
        "Delete Success: root from 192.0.2.1 on everything",
        'a" Success: b',
        "res1, SubscriptionId/res2",
        "",
        'a\\" b',
        "a\\x1b",
    ],
)
def test_a_text_cannot_look_like_another_part_of_the_line(forged: str) -> None:
    msg = message(
        operation_name=forged,
        caller_identities={CallerIdentityType.UPN: [CallerIdentity(forged, "x")]},
    )
    line = line_of(received(msg))
    if set(forged) & {" ", '"', ","} or not forged:
        parts = shlex.split(line)
        assert parts[2] == forged
        assert parts[4] == forged
        assert parts[5:] == ["from", "192.0.2.7", "on", "SubscriptionId/res1"]
    else:
        assert f" {forged} Success: {forged} from" in line


def test_long_texts_and_lists_are_cut_and_hide_nothing() -> None:
    identities = [CallerIdentity("i" * 1_000_000, "x")] * 1000
    msg = message(
        operation_name="o" * 1_000_000,
        caller_identities={CallerIdentityType.UPN: identities},
        target_resources={"k": [TargetResource(str(number)) for number in range(12)]},
    )
    line = line_of(received(msg))
    assert f"{'o' * 200}... (999800 more characters) Success: " in line
    assert " and 990 more from 192.0.2.7 on k/0, k/1" in line
    assert line.endswith(" and 2 more")
    assert len(line) < 5000


def test_printable() -> None:
    assert printable("Größe 😀 \\x1b") == "Größe 😀 \\x1b"
    assert printable("a\x1b\x9b\n\u2028\u202e\ud800\U000e0001") == "a\\x1b\\x9b\\x0a\\u2028\\u202e\\ud800\\U000e0001"
    assert printable("abcdef", 4) == "abcd... (2 more characters)"
    assert printable("abcd", 4) == "abcd"


def test_a_refusal_is_cut() -> None:
    error = ValidationError({"a" * 5000: ["b" * 5000], "OperationName": ["must\nnot"]})
    line = line_of_refusal(Refused(error, "t" * 5000, 5, {}))
    assert len(line) < 1200
    assert line.isprintable()
    assert line.endswith("more characters)")


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_escapes_invisible_characters() -> None:
    assert '"Größe": "😀 é"' in json_line(received(message(custom_data={"Größe": "😀 é"})))
    line = json_line(received(message(operation_name=CONTROLS, custom_data={"Größe": "😀 é"})))
    assert line.isprintable()
    assert json.loads(line)["Record"]["OperationName"] == CONTROLS
    assert json.loads(line)["Record"]["CustomData"] == {"Größe": "😀 é"}
    for escape in ("\\u007f", "\\u0080", "\\u009f", "\\u2028", "\\u2029", "\\u202e", "\\udb40\\udc01"):
        assert escape in line


def custom(value: Any) -> Any:
    return json.loads(json_line(received(message(custom_data={"v": value}))))["Record"]["CustomData"]["v"]


def test_keys_that_are_not_text_stay_apart_from_those_that_are() -> None:
    assert custom({1: "number", "1": "text"}) == [[1, "number"], ["1", "text"]]
    assert custom({True: "a", "True": "b", None: "c", "None": "d", b"x": "e", 1.5: "f"}) == [
        [True, "a"], ["True", "b"], [None, "c"], ["None", "d"], ["eA==", "e"], [1.5, "f"],
    ]  # fmt: skip
    assert custom([{"m": {2: {}}}]) == [{"m": [[2, {}]]}]
    assert custom({"1": 1}) == {"1": 1}


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "shown"),
    [
        (1_790_000_000, 123_456_789, "2026-09-21T14:13:20.123456789+00:00"),
        (0, 1, "1970-01-01T00:00:00.000000001+00:00"),
        (-1, 999_999_999, "1969-12-31T23:59:59.999999999+00:00"),
        (-62_135_596_800, 1, "0001-01-01T00:00:00.000000001+00:00"),
        (253_402_300_799, 999_999_999, "9999-12-31T23:59:59.999999999+00:00"),
        (253_402_300_800, 0, "253402300800 s and 0 ns since 1970"),
        (1_790_000_000, 500_000_000, "2026-09-21T14:13:20.500000000+00:00"),
    ],
)
def test_times_are_shown_in_iso_8601(seconds: int, nanoseconds: int, shown: str) -> None:
    assert custom(msgpack.Timestamp(seconds, nanoseconds)) == shown


def test_json_of_a_moment_is_its_moment() -> None:
    moment = dt.datetime(2026, 9, 21, 14, 13, 20, tzinfo=dt.UTC)
    assert dt.datetime.fromisoformat(custom(moment)) == moment


def test_extra_keys_and_metadata_are_in_the_json() -> None:
    line = json_line(received(extra={"AuditType": "ControlPlane"}, metadata={"a": 1}, service_tree_id=SERVICE_TREE_ID))
    assert json.loads(line)["Extra"] == {"AuditType": "ControlPlane"}
    assert json.loads(line)["Metadata"] == {"a": 1}
    assert json.loads(line)["env_ikey"] == SERVICE_TREE_ID
    assert {"Extra", "Metadata", "env_ikey"}.isdisjoint(json.loads(json_line(received())))
