"""Verification: whole trails of every agent are whole, and every manipulation is found."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgpack
import pytest
from helpers import SERVICE_TREE_ID, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import messages
from trails import (
    AGENTS,
    MASTER,
    SALT,
    Writer,
    as_fluent_bit_file,
    as_fluent_bit_lines,
    as_listen,
    body_of,
    changed,
    copy_of_key,
    seal_at,
    stamp_of,
    verified,
    whole_trail,
    writer,
)

from geventaudit import AuditType, MsgSchema, ValidationError
from geventaudit.agent.server import Received
from geventaudit.agent.shown import json_of
from geventaudit.encoder.encoding import Encoder
from geventaudit.protocol.decoding import decode
from geventaudit.trail.canonical import BODY_KEYS, KEY, NO_MAC, canonical_bytes, canonical_digest
from geventaudit.trail.keys import next_start, root_of
from geventaudit.trail.secret import Secret
from geventaudit.verify import packing, parsing, rows
from geventaudit.verify.findings import NO_RECORD, Ranges
from geventaudit.verify.keyring import KeyCopy
from geventaudit.verify.records import RecordReader, Stamped, is_stamp, kind_of
from geventaudit.verify.state import Remembered, read_state, write_state
from geventaudit.verify.trail import Verifier

TRAIL = whole_trail()
BODIES = TRAIL.bodies()
LAST = len(BODIES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trail.jsonl"


# -- whole trails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_a_whole_trail_is_whole_from_every_agent(path: Path, agent: Callable[[dict[str, Any]], str]) -> None:
    report = verified(path, BODIES, agent)
    assert report.problems() == []
    (stream,) = report.streams
    assert (stream.records, stream.first, stream.last) == (LAST, 1, LAST)
    assert stream.key == "app.key"
    assert stream.has_end
    assert stream.checkpoints == 6
    assert stream.unchecked_digests == 0


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_a_whole_trail_has_no_gaps_without_a_key(path: Path, agent: Callable[[dict[str, Any]], str]) -> None:
    report = verified(path, BODIES, agent, copies=[])
    assert report.problems() == []
    assert not report.is_authenticated
    assert [each.records for each in report.streams] == [LAST]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(messages, min_size=1, max_size=5), st.sampled_from([None, SERVICE_TREE_ID]))
def test_any_record_is_authentic_after_a_real_json_hop(tmp_path: Path, msgs: list[Any], service: Any) -> None:
    """Frames, decoded and written as ``listen`` does, and as an agent that knows nothing of records."""
    made = writer()
    made.encoder = made.stamper._encoder = Encoder(service, is_sealed=True)
    lines = []
    for msg in msgs:
        try:
            frame = made.send(MsgSchema().load(msg))
        except ValidationError:  # NaN, keys that are not text
            continue
        message_, seconds = decode(frame)
        lines.append(json.dumps(json_of(Received(message_, seconds, service)), ensure_ascii=False))
        lines.append(as_fluent_bit_lines(body_of(frame)))
    report = verified(tmp_path / "hop.jsonl", lines)
    assert report.problems() == ([] if lines else [NO_RECORD])
    assert sum(each.duplicates for each in report.streams) == len(lines) // 2


def test_the_order_of_lines_and_files_does_not_matter(tmp_path: Path) -> None:
    lines = [agent(body) for body, agent in zip(BODIES, AGENTS * LAST, strict=False)]
    random.Random(1).shuffle(lines)
    (tmp_path / "a").write_text("\n".join(lines[:10]))
    (tmp_path / "b.gz").write_bytes(gzip.compress("\n".join(lines[10:15]).encode()) + gzip.compress(b"\n\r\n"))
    (tmp_path / "c").write_text("\r\n".join(lines[15:]))
    verifier = Verifier([copy_of_key()])
    read: list[int] = []
    for name in ("c", "b.gz", "a"):
        verifier.read(str(tmp_path / name), read.append)
    assert verifier.check().problems() == []
    assert sum(read) == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("left", [0.2, 0.5, 0.9, 0.999, 1])
@pytest.mark.parametrize("is_checked", [True, False])
def test_a_damaged_gzip_file_gives_each_line_before_the_damage(path: Path, left: float, is_checked: bool) -> None:
    """A block more would be called missing otherwise: records that are there."""
    source = random.Random(1)
    lines = [json.dumps({**body, "pad": source.randbytes(9999).hex()}) for body in BODIES]
    whole = gzip.compress("".join(f"{line}\n" for line in lines).encode())
    cut = whole[: int(len(whole) * left) - 8] if left < 1 else whole[:-8] + bytes(8)  # a wrong checksum
    path.write_bytes(cut)
    there = zlib.decompressobj(31).decompress(cut[:-8] if left == 1 else cut).count(b"\n")
    verifier = Verifier([copy_of_key()] if is_checked else [])
    verifier.read(str(path))
    report = verifier.check()
    assert sum(each.records for each in report.streams) == there
    assert there == LAST if left == 1 else 0 < there < LAST
    assert report.unreadable.count == 1
    assert "compressed data is damaged" in report.unreadable.first[0]
    assert report.problems()


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
@pytest.mark.parametrize("copies", [None, []])
def test_a_byte_order_mark_is_passed_over(path: Path, agent: Callable[[dict[str, Any]], str], copies: Any) -> None:
    lines = [agent(body) for body in BODIES]
    for place in (0, 4):  # files that were put behind each other
        lines[place] = f"\ufeff{lines[place]}"
    assert verified(path, lines, copies=copies).problems() == []


def test_other_messages_of_the_client_are_passed_over(path: Path) -> None:
    heartbeat = json.dumps({"AuditVersion": "1", "OsVersion": "", "Language": "", "AuditType": "Heartbeat"})
    assert verified(path, [*BODIES, heartbeat, "", 'AsmAuditHB: [1.0, {"AuditVersion":"1"}]']).problems() == []


def test_rows_are_sorted_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_RUN_ROWS", 4)
    monkeypatch.setattr(rows, "_MAX_RUNS", 3)
    monkeypatch.setattr(rows, "_READ_ROWS", 2)
    shuffled = random.Random(2).sample(BODIES, LAST)
    report = verified(path, [*shuffled, *shuffled])
    assert report.problems() == []
    assert report.streams[0].duplicates == LAST


def test_keys_of_agents_are_listed_as_not_covered(path: Path) -> None:
    report = verified(path, [{**body, "host": "a", "k8s": {"pod": "b"}} for body in BODIES])
    assert report.problems() == []
    assert report.uncovered == {"host": LAST, "k8s": LAST}


# -- manipulations -----------------------------------------------------------------------------------------------------


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all leaves of a body."""
    if isinstance(value, dict):
        return [leaf for key, each in value.items() for leaf in _paths(each, (*path, key))] or [path]
    if isinstance(value, list):
        return [leaf for index, each in enumerate(value) for leaf in _paths(each, (*path, index))] or [path]
    return [path]


def _at(body: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        body = body[step]
    return body


LEAVES = _paths(BODIES[1])


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: ".".join(map(str, leaf)))
@pytest.mark.parametrize("how", ["changed", "removed", "added"])
def test_a_change_of_any_value_is_found(path: Path, leaf: tuple[Any, ...], how: str) -> None:
    bodies = copy.deepcopy(BODIES)
    parent = _at(bodies[7], leaf[:-1])
    if how == "removed":
        del parent[leaf[-1]]
    elif how == "changed":
        old = parent[leaf[-1]]
        parent[leaf[-1]] = old + 1 if isinstance(old, int) else f"{old}x"
    elif isinstance(parent, list):
        parent.append(parent[leaf[-1]])
    elif parent is bodies[7]:
        pytest.skip("keys that agents add at the top are listed, not refused")
    else:
        parent[f"{leaf[-1]}2"] = "x"
    report = verified(path, bodies, json.dumps)
    assert report.problems()
    if leaf[-1] not in ("stream", "seq"):
        (stream,) = report.streams
        assert (stream.missing.ranges, stream.altered_only.ranges) in (([(8, 8)], []), ([], [(8, 8)]))


def test_removed_records_are_found(path: Path) -> None:
    for first, last in ((1, 1), (2, 2), (7, 12), (2, LAST - 1)):
        report = verified(path, [body for body in BODIES if not first <= stamp_of(body)["seq"] <= last])
        (stream,) = report.streams
        assert stream.missing.ranges == [(first, last)]
        assert stream.missing.count == last - first + 1
        assert "missing" in "".join(report.problems())


def test_missing_delivered_records_are_counted(path: Path) -> None:
    report = verified(path, [body for body in BODIES if stamp_of(body)["seq"] not in (3, 4)])
    assert report.streams[0].delivered_missing == 2


def test_duplicates_are_counted_and_no_problem(path: Path) -> None:
    report = verified(path, [*BODIES, BODIES[3], BODIES[3], BODIES[9]])
    assert report.problems() == []
    assert report.streams[0].duplicates == 3


@pytest.mark.parametrize("copies", [None, []], ids=["key", "no key"])
def test_a_few_duplicates_are_named_with_their_places(path: Path, copies: Any) -> None:
    report = verified(path, [*BODIES, *BODIES, BODIES[3]], copies=copies)
    (stream,) = report.streams
    assert stream.duplicates == LAST + 1
    assert len(stream.duplicate_places) == 5
    assert stream.duplicate_places[3] == f"4 ({path}:4, {path}:{LAST + 4}, {path}:{2 * LAST + 1})"
    assert stream.as_json(False)["duplicate_places"] == stream.duplicate_places
    assert stream.duplicates_text.endswith(", ...")
    (stream,) = verified(path, [*BODIES, BODIES[3], BODIES[3]], copies=copies).streams
    assert stream.duplicates_text == f"2 duplicates of 4 ({path}:4, {path}:{LAST + 1}, {path}:{LAST + 2})"


def test_missing_numbers_are_distinguished_from_altered_ones(path: Path) -> None:
    """They may be neighbours, and a forged number may be far above the last authentic one."""
    bodies = [body for body in BODIES if stamp_of(body)["seq"] not in (5, 6, 9, 11)]
    for body in bodies:
        if stamp_of(body)["seq"] in (4, 7, 8, 10):
            bodies[bodies.index(body)] = {**body, "OperationName": "Forged"}
    report = verified(path, [*bodies, changed(BODIES[3], seq=LAST + 1000)])
    (stream,) = report.streams
    assert (stream.missing.ranges, stream.missing.count) == ([(5, 6), (9, 9), (11, 11)], 4)
    assert stream.altered_only.ranges == [(4, 4), (7, 8), (10, 10), (LAST + 1000, LAST + 1000)]
    found = stream.as_json(False)
    assert (found["missing"], found["only_altered"]) == (4, 5)
    assert "5 only in altered form" in "".join(report.problems())
    remembered = {TRAIL.stream: Remembered(LAST, None)}
    (stream,) = verified(path, [*bodies[:3], {**BODIES[5], "OperationName": "Forged"}], state=remembered).streams
    assert (stream.missing.ranges, stream.missing.count) == ([(4, 5), (7, LAST)], LAST - 4)


def test_times_are_the_earliest_and_the_latest(path: Path) -> None:
    """A checkpoint may have a later time than the records that waited for it."""
    made = writer()
    for step in (100, -50, 0, 200, -120):
        made._now += step
        made.send()
    times = sorted(stamp_of(body)["time"] for body in made.bodies())
    for copies in (None, []):
        (stream,) = verified(path, made.bodies(), copies=copies).streams
        assert (stream.start_time, stream.end_time) == (times[0], times[-1])


def test_a_record_that_was_given_up_was_not_taken(path: Path) -> None:
    made = writer()
    for _ in range(5):
        made.send()
    made.stamper.give_up(3)
    made.checkpoint(delivered=5)
    report = verified(path, [body for body in made.bodies() if stamp_of(body)["seq"] not in (3, 4)])
    assert "2 missing (1 of them explained; a checkpoint says that the agent had taken 1 of them" in (
        "".join(report.problems())
    )


def test_swapped_numbers_are_found(path: Path) -> None:
    one, other = BODIES[3], BODIES[8]
    swapped = [changed(one, seq=stamp_of(other)["seq"]), changed(other, seq=stamp_of(one)["seq"])]
    report = verified(path, [*BODIES[:3], swapped[0], *BODIES[4:8], swapped[1], *BODIES[9:]])
    assert report.streams[0].altered.count == 2


def test_swapped_macs_are_found(path: Path) -> None:
    one, other = stamp_of(BODIES[3]), stamp_of(BODIES[8])
    bodies = [*BODIES]
    bodies[3], bodies[8] = changed(BODIES[3], mac=other["mac"]), changed(BODIES[8], mac=one["mac"])
    assert verified(path, bodies).streams[0].altered.count == 2


def test_a_record_of_another_stream_is_found(path: Path) -> None:
    """Replayed with the numbers of this one, its own MAC included."""
    node = root_of(Secret(MASTER), bytes(16), 2)
    other = Writer(seal_at(node))
    for _ in range(LAST):
        other.send()
    foreign = changed(other.bodies()[5], stream=TRAIL.stream)
    report = verified(path, [*BODIES[:5], foreign, *BODIES[6:]])
    assert report.streams[0].altered.count == 1
    report = verified(path, [*BODIES, foreign])
    assert report.streams[0].beside_valid.count == 1


@pytest.mark.parametrize("copies", [None, []], ids=["key", "no key"])
@pytest.mark.parametrize("agent", [json.dumps, as_listen, as_fluent_bit_file], ids=lambda agent: agent.__name__)
@pytest.mark.parametrize("has_stamp", [True, False], ids=["stamp", "bare"])
@pytest.mark.parametrize(
    "disguise", ['"AuditVersion": "1", ', '"AuditType": "Heartbeat", ', '"AuditTag": "AsmAuditDG", ']
)
def test_a_record_in_the_disguise_of_a_heartbeat_is_found(
    path: Path, disguise: str, has_stamp: bool, agent: Callable[[dict[str, Any]], str], copies: Any
) -> None:
    forged = agent({**BODIES[4], "OperationName": "DeleteUser"}).replace("{", "{" + disguise, 1)
    forged = forged if has_stamp else forged.replace("geventaudit", "app")
    assert verified(path, [*BODIES, forged], copies=copies).problems() or (has_stamp and copies == [])


@pytest.mark.parametrize("parser", ["json", "orjson"])
def test_a_service_that_was_exchanged_in_a_record_of_listen_is_found(
    path: Path, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seal covers one env_ikey. A reader may take another one."""
    if parser == "json":
        monkeypatch.setattr(parsing, "loads", None)
    made = writer()
    made.encoder = made.stamper._encoder = Encoder(SERVICE_TREE_ID, is_sealed=True)
    made.send()
    line = json.loads(as_listen(made.bodies()[0]))
    assert verified(path, [json.dumps(line)]).problems() == []
    line["Record"]["env_ikey"], line["env_ikey"] = line["env_ikey"], "another"
    assert "env_ikey" in "".join(verified(path, [json.dumps(line)]).problems())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("AsmAuditCP: [", 'AsmAuditDP: [1, {"AuditTag": "AsmAuditCP", '),
        ("AsmAuditCP: [", 'AsmAuditCP: [1600000000.0, {"time": 1, '),
    ],
)
def test_a_prefix_of_a_line_is_compared_beside_the_same_key_in_it(path: Path, old: str, new: str) -> None:
    lines = [as_fluent_bit_file(body) for body in BODIES]
    moment = lines[4].partition("[")[2].partition(",")[0]
    head = new.replace("[1,", f"[{moment},").replace('"time": 1,', f'"time": {moment},')
    lines[4] = head + lines[4].partition("{")[2]
    report = verified(path, lines)
    assert report.streams[0].altered_only.ranges == [(5, 5)]


def test_an_altered_copy_beside_a_valid_one_is_found(path: Path) -> None:
    forged = copy.deepcopy(BODIES[4])
    forged["OperationName"] = "DeleteUser"
    report = verified(path, [*BODIES, forged])
    assert report.streams[0].beside_valid.count == 1
    assert report.streams[0].missing.count == 0
    assert report.problems()


def test_a_cut_tail_is_found_by_a_later_record(path: Path) -> None:
    """A checkpoint of another stream that has adopted it, --state, or any later record."""
    cut = BODIES[: LAST - 3]
    assert not verified(path, cut).streams[0].has_end
    assert verified(path, cut).problems() == [], "like a crash"
    remembered = {TRAIL.stream: Remembered(LAST, None)}
    report = verified(path, cut, state=remembered)
    assert "cut off" in "".join(report.problems())
    neighbour = writer(start=2, salt=bytes(16))
    neighbour.stamper.adopt(TRAIL.frames)
    neighbour.checkpoint("open")
    report = verified(path, [*cut, *neighbour.bodies()])
    assert "cut off" in "".join(report.problems())
    assert verified(path, [*BODIES, *neighbour.bodies()]).problems() == []
    report = verified(path, neighbour.bodies())
    assert report.missing_streams, "the whole of it is gone"


def test_records_after_an_end_are_found(path: Path) -> None:
    made = writer()
    made.checkpoint("open")
    made.checkpoint("end")
    made.stamper.has_ended = False
    made.send()
    report = verified(path, made.bodies())
    assert report.streams[0].after_end == 1
    assert report.problems()


def test_continuing_after_a_cut_is_found(path: Path) -> None:
    """With the key of number 15, an attacker cannot forge lower numbers, but may cut the tail and go on."""
    state = {TRAIL.stream: Remembered(LAST, None)}
    again = writer()
    for body in BODIES[:10]:
        again.send(message(1)) if "checkpoint" not in stamp_of(body) else again.checkpoint()
    report = verified(path, [*BODIES[:10], *again.bodies()[10:]], state=state)
    assert report.problems()


@pytest.mark.parametrize("later", [1, 5])
def test_sealing_anew_with_a_later_key_is_found(path: Path, later: int) -> None:
    """Records from before a takeover cannot be forged with the keys of the takeover."""
    forger = writer()
    for _ in range(10 + later):
        forger.send()
    key = forger.stamper.chain.state.key
    assert key is not None
    forged = copy.deepcopy(BODIES[9])
    forged["OperationName"] = "DeleteUser"
    stamp_of(forged)["mac"] = "0" * 64
    stamp_of(forged)["mac"] = key.mac(canonical_digest(canonical_bytes(forged))).hex()
    report = verified(path, [*BODIES[:9], forged, *BODIES[10:]])
    assert report.streams[0].altered.count == 1
    assert report.streams[0].altered_only.ranges == [(10, 10)]
    assert report.streams[0].missing.count == 0


def test_two_valid_contents_of_one_number_are_found(path: Path) -> None:
    one, other = writer(), writer()
    one.send(message(1))
    other.send(message(2))
    report = verified(path, [*one.bodies(), *other.bodies()])
    assert report.streams[0].two_contents.count == 1
    assert report.problems()


def test_a_wrong_key_is_found(path: Path) -> None:
    report = verified(path, BODIES, copies=[copy_of_key(bytes(32))])
    assert report.streams[0].key is None
    assert report.streams[0].altered.count == LAST
    assert verified(path, BODIES, copies=[copy_of_key(bytes(32)), copy_of_key()]).problems() == []


def test_a_digest_that_does_not_match_is_found(path: Path) -> None:
    made = writer()
    made.send()
    made.stamper.chain.digest.update(b"x")
    made.checkpoint()
    report = verified(path, made.bodies())
    assert report.streams[0].digest_mismatch.count == 1


def test_a_digest_after_a_gap_is_not_checked(path: Path) -> None:
    report = verified(path, [*BODIES[:3], *BODIES[4:]])
    assert report.streams[0].digest_mismatch.count == 0
    assert report.streams[0].unchecked_digests == 5
    assert "digests of 5 checkpoints from 7 on not checked" in report.streams[0].digests_text


@pytest.mark.parametrize("copies", [None, []], ids=["key", "no key"])
def test_records_without_a_stamp_are_found(path: Path, copies: Any) -> None:
    bare = copy.deepcopy(BODIES[1])
    del bare["CustomData"]["geventaudit"]
    bare_of_listen = json.loads(as_listen(BODIES[1]))
    del bare_of_listen["Record"]["CustomData"]
    report = verified(path, [*BODIES, json.dumps(bare), json.dumps(bare_of_listen)], copies=copies)
    assert report.unstamped.count == 2
    assert report.problems()


def test_records_without_a_seal_are_found(path: Path) -> None:
    plain = Writer(None)
    plain.send()
    report = verified(path, [*BODIES, *plain.bodies()])
    assert [each.is_unsealed for each in report.streams] == [False, True]
    assert "not authenticated" in "".join(report.problems())
    stripped = copy.deepcopy(BODIES[4])
    del stamp_of(stripped)["mac"]
    report = verified(path, [*BODIES[:4], stripped, *BODIES[5:]])
    assert "no seal" in "".join(report.problems())


@pytest.mark.parametrize(
    "line",
    [
        *(
            "{",
            "[]",
            "5",
            "null",
            "x",
            "{}",
            '{"a":1}',
            "[" * 100_000,
            '{"OperationName":"x","CustomData":5}',
            "\udcff",
        ),
        '{"OperationName":"x","CustomData":{"geventaudit":{}}}',
        '{"OperationName":"x","CustomData":{"geventaudit":{"seq":1e9,"stream":"x","tag":"x","time":"x"}}}',
    ],
)
@pytest.mark.parametrize("copies", [None, []], ids=["key", "no key"])
def test_strange_lines_are_found_and_stop_nothing(path: Path, line: str, copies: Any) -> None:
    report = verified(path, [*BODIES, line], copies=copies)
    assert report.unreadable.count + report.unstamped.count == 1
    assert report.streams[0].records == LAST


@pytest.mark.parametrize("depth", [60, 250, 300, 900, 1500])
@pytest.mark.parametrize("place", ["CustomData", "Other", "TargetResources"])
def test_deep_lines_stop_nothing(path: Path, depth: int, place: str) -> None:
    body = copy.deepcopy(BODIES[4])
    lines = []
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body.setdefault(place, {})["deep" if place != "Other" else "x"] = 7777
        lines.append(json.dumps(body).replace("7777", opening * depth + "1" + closing * depth))
    report = verified(path, [*BODIES, *lines])
    assert report.streams[0].records == LAST
    assert verified(path, [*BODIES, *lines], copies=[]).streams[0].records == LAST


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seq", 0), ("seq", -1), ("seq", 1.0), ("seq", True), ("seq", "1"), ("seq", 1 << 53), ("seq", 10**30)),
        *(("stream", ""), ("stream", "x" * 32), ("stream", "0" * 32 + "/1" * 17), ("stream", 5), ("stream", None)),
        *(("time", "now"), ("time", 5), ("mac", ""), ("mac", "0" * 63), ("mac", "A" * 64), ("mac", 5), ("tag", 5)),
        ("other", 1),
    ],
)
def test_stamps_that_no_client_writes(path: Path, name: str, value: Any) -> None:
    report = verified(path, [*BODIES, json.dumps(changed(BODIES[3], **{name: value}))])
    assert report.problems()
    assert report.streams[0].records == LAST


@pytest.mark.parametrize("parser", ["json", "orjson"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"OperationName":"CreateUser"', '"OperationName":"DeleteUser","OperationName":"CreateUser"'),
        ('"OperationName":"CreateUser"', '"OperationName" :"DeleteUser","OperationName":"CreateUser"'),
        ('"OperationName":"CreateUser"', '"OperationName"  \t:"x","OperationName"\t:"CreateUser"'),
        ('"OperationName":"CreateUser"', '"Operation\\u004eame":"DeleteUser","OperationName":"CreateUser"'),
        ('"seq":5,', '"seq":4,"seq":5,'),
        ('"n":4', '"n":2,"n":4'),
        ('"Region":"westeurope"', '"Region":"x","Region":"westeurope"'),
    ],
)
def test_a_key_that_stands_twice_is_an_alteration(
    path: Path, old: str, new: str, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = pytest.importorskip("orjson") if parser == "orjson" else None
    monkeypatch.setattr(parsing, "loads", None if fast is None else fast.loads)
    monkeypatch.setattr(parsing, "dumps", None if fast is None else fast.dumps)
    lines = [as_fluent_bit_lines(body) for body in BODIES]
    assert old in lines[4]
    lines[4] = lines[4].replace(old, new)
    report = verified(path, lines)
    assert report.streams[0].altered.count == 1
    assert "twice" in "".join(report.problems())


@pytest.mark.parametrize("parser", ["json", "orjson"])
@pytest.mark.parametrize("spelling", ["\\u003a", "\\u003A"])
def test_a_colon_of_another_spelling_does_not_hide_a_key_that_stands_twice(
    path: Path, spelling: str, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parser == "json":
        monkeypatch.setattr(parsing, "loads", None)
    lines = [as_fluent_bit_lines(body) for body in BODIES]
    time = stamp_of(BODIES[4])["time"]
    lines[4] = lines[4].replace(time, time.replace(":", spelling, 1))
    assert verified(path, lines).problems() == [], "the spelling alone changes nothing"
    lines[4] = lines[4].replace('"OperationName":', '"OperationName":"DeleteUser","OperationName":')
    assert "twice" in "".join(verified(path, lines).problems())


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_a_line_that_was_cut_is_found_without_a_key(path: Path, agent: Callable[[dict[str, Any]], str]) -> None:
    lines = [agent(body) for body in BODIES]
    lines[4] = lines[4][: lines[4].index('"OperationName"') + 20]
    report = verified(path, lines, copies=[])
    assert report.unreadable.count == 1
    assert report.streams[0].missing.ranges == [(5, 5)]


needs_compiled = pytest.mark.skipif(packing.compiled is None, reason="needs the compiled modules")


@needs_compiled
@settings(max_examples=100, deadline=None)
@given(messages, st.randoms())
def test_the_compiled_canonical_form_is_the_same(msg: Any, order: random.Random) -> None:
    made = writer()
    try:
        frame = made.send(MsgSchema().load(msg))
    except ValidationError:
        return
    body = {"env_ikey": SERVICE_TREE_ID, **body_of(frame)}
    stamp_of(body)["mac"] = NO_MAC
    shuffled = _shuffled(body, order)
    assert canonical_bytes(shuffled) == canonical_bytes(body)
    assert packing.compiled is not None
    assert packing.compiled(shuffled) in (canonical_bytes(body), None)
    if len(body["CallerIdentities"]) == 1:
        assert packing.compiled(shuffled) is not None, "the common case"


_EDGES = [
    sign * (1 << bits) + more
    for sign in (-1, 1)
    for bits in (0, 5, 7, 8, 15, 16, 31, 32, 53, 63)
    for more in (-1, 0, 1)
]
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(_EDGES)
    | st.floats()
    | st.text()
    | st.integers(0, 70_000).map("é".__mul__),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=20),
    max_leaves=40,
)


@needs_compiled
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.dictionaries(st.sampled_from([*BODY_KEYS, "host"]), _VALUES, max_size=5))
def test_the_compiled_form_of_anything_is_the_same_or_none(body: dict[str, Any]) -> None:
    assert packing.compiled is not None
    packed = packing.compiled(body)
    if packed is not None:
        assert packed == canonical_bytes(body)


@needs_compiled
@pytest.mark.parametrize("place", ["CustomData", "TargetResources", "CallerIdentities", "OperationCategories"])
def test_the_compiled_form_leaves_depth_to_python(place: str) -> None:
    value: Any = {}
    for _ in range(100_000):
        value = {"a": value}
    assert packing.compiled is not None
    assert packing.compiled({place: value}) is None
    while value:  # its own destructor would need as many frames
        value = value.pop("a")


_STAMP = stamp_of(BODIES[3])
_SALT = "0f" * 16
_ODD: dict[str, list[Any]] = {
    "seq": [0, 1, -1, 2**53 - 1, 2**53, 2**63, 2**64 + 1, 10**400, True, 1.0, "1", None],
    "stream": [
        *(_SALT, f"{_SALT}/", f"{_SALT}/1", f"{_SALT}/1/", f"{_SALT}//1"),
        *(f"{_SALT}{'/1' * 16}", f"{_SALT}{'/1' * 17}", f"{_SALT}/{'9' * 16}", f"{_SALT}/{'9' * 17}"),
        *(f"{_SALT}1", f"{_SALT}1/1", _SALT[:-1], _SALT.upper(), f"{_SALT}/a", f"{_SALT}/\u0661", "", None),
        *(f"{_SALT}/1\0", f"{_SALT}/1\ud800", "é" * 16),
    ],
    "time": [
        *("2026-11-30T22:35:39.122176Z", "2026-11-30T22:35:39.122176z", "2026-11-30 22:35:39.122176Z", ""),
        *("2026-11-30T22:35:39.12217Z", "2026-11-30T22:35:39.1221760Z", "\u0662026-11-30T22:35:39.12217Z", 27, None),
        *("9999-99-99T99:99:99.999999Z", "2026-11-30T22:35:39.122176\n", "\ud800026-11-30T22:35:39.122176Z"),
    ],
    "tag": ["AsmAuditCP", "", "\ud800", 1, None],
    "mac": ["0" * 64, "9f" * 32, "9F" * 32, "0" * 63, "0" * 65, "g" * 64, "`" * 64, "/:" * 32, "é" * 32, "", None, 0],
    "was": [[], None],
    "other": [1],
}


@needs_compiled
@pytest.mark.parametrize("key", _ODD)
def test_the_compiled_look_at_a_stamp_says_the_same_or_nothing(key: str) -> None:
    assert packing.plain_stamp({}) is packing.plain_stamp([]) is packing.plain_stamp(None) is None
    assert packing.plain_stamp({each: _STAMP[each] for each in _STAMP if each != key}) is None or key not in _STAMP
    for value in _ODD[key]:
        stamp = {**_STAMP, key: value}
        if key in ("was", "other") or value == "\ud800" or not is_stamp(stamp):
            expected = None
        else:
            expected = stamp["stream"], stamp["seq"], stamp["time"].encode(), bytes.fromhex(stamp["mac"])
        assert packing.plain_stamp(stamp) == expected, value


def _shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        items = [(key, _shuffled(each, order)) for key, each in value.items()]
        order.shuffle(items)
        return dict(items)
    return [_shuffled(each, order) for each in value] if isinstance(value, list) else value


def test_colons_in_texts_are_no_keys(path: Path) -> None:
    made = writer()
    for text in ('"a":1', "x :", '{"OperationName":"x"}', '":":":', "\t:"):
        made.send(message(operation_name=text, custom_data={text: text}))
    assert verified(path, made.bodies()).problems() == []


@pytest.mark.parametrize(
    "extra",
    [
        *({"AuditType": "DataPlane"}, {"AuditTag": "AsmAuditDP"}, {"date": 1.0}, {"timestamp": "2020-01-01T00:00:00Z"}),
        *({"@timestamp": "2020-01-01T00:00:00+02:00"}, {"AuditTime": 5}, {"time": "1600000000"}, {"AuditType": 5}),
    ],
)
def test_an_envelope_that_says_something_else_is_found(path: Path, extra: dict[str, Any]) -> None:
    bodies: list[Any] = [*BODIES]
    bodies[4] = json.dumps({**BODIES[4], **extra})
    report = verified(path, bodies)
    assert report.streams[0].altered.count == 1
    assert next(iter(extra)) in "".join(report.problems())


@pytest.mark.parametrize(
    "says", [{"was": [["{stream}", 4]]}, {"checkpoint": {"kind": "mark", "adopted": {"{stream}": 9_000}}}]
)
def test_a_stream_without_a_seal_says_nothing_about_a_sealed_one(path: Path, says: dict[str, Any]) -> None:
    said = json.loads(json.dumps(says).replace("{stream}", TRAIL.stream))
    stamp = {"seq": 1, "stream": "a" * 32, "tag": "AsmAuditCP", "time": "2023-01-01T00:00:00.000000Z", **said}
    forged = json.dumps({"OperationName": "x", "CustomData": {KEY: stamp}})
    report = verified(path, [*(each for each in BODIES if stamp_of(each)["seq"] != 4), forged])
    sealed = next(each for each in report.streams if each.stream == TRAIL.stream)
    assert (sealed.missing.count, sealed.explained, sealed.cut) == (1, 0, "")


@pytest.mark.parametrize("parser", ["json", "orjson"])
@pytest.mark.parametrize("key", ["timestamp", "Time"])
@pytest.mark.parametrize("value", ['"nan"', '"inf"', '"-1e999"', f'"{"9" * 400}"', "9" * 400, "NaN", "1e999"])
def test_a_time_of_an_agent_that_is_no_moment_ends_nothing(
    path: Path, value: str, key: str, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parser == "json":
        monkeypatch.setattr(parsing, "loads", None)
    lines = [as_fluent_bit_lines(body) for body in BODIES]
    lines[4] = f'{lines[4][:-1]},"{key}":{value}}}'
    report = verified(path, lines)
    assert (report.lines, report.streams[0].records + report.unreadable.count) == (LAST, LAST)


def test_a_key_that_was_added_to_a_record_of_listen_is_found(path: Path) -> None:
    line = json.loads(as_listen(BODIES[4]))
    line["Record"]["Extra"] = 1
    report = verified(path, [*BODIES[:4], json.dumps(line), *BODIES[5:]])
    assert "Extra" in "".join(report.problems())


@pytest.mark.parametrize("time", ["yesterday", "30 Nov 2020", True, None, [5], {"a": 1}])
def test_times_of_unknown_form_are_listed_as_not_covered(path: Path, time: Any) -> None:
    report = verified(path, [json.dumps({**body, "time": time}) for body in BODIES])
    assert report.problems() == []
    assert report.uncovered == {"time": LAST}


@pytest.mark.parametrize("key", ["date", "timestamp"])
@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_times_in_all_units_of_agents_are_compared(path: Path, unit: int, kind: type, key: str) -> None:
    """Fluent Bit's json_date_format epoch_ms, Fluentd's unixtime_millis and so on, Vector's unix_ms and so on."""
    seconds = [int(datetime.fromisoformat(stamp_of(body)["time"]).timestamp()) for body in BODIES]
    bodies = [{**body, key: kind(second * unit)} for body, second in zip(BODIES, seconds, strict=True)]
    report = verified(path, bodies, json.dumps)
    assert (report.problems(), report.uncovered) == ([], {})
    bodies[4][key] = kind((seconds[4] - 1) * unit)
    assert verified(path, bodies, json.dumps).streams[0].altered_only.ranges == [(5, 5)]


# -- gaps that are explained -------------------------------------------------------------------------------------------


def test_void_and_given_up_numbers_are_explained_and_still_missing(path: Path) -> None:
    made = writer()
    for number in range(1, 11):
        made.send()
        if number in (3, 4):
            made.stamper.void(number)
        if number == 7:
            made.stamper.give_up(number)
    made.checkpoint()
    report = verified(path, [body for body in made.bodies() if stamp_of(body)["seq"] not in (3, 4, 7)])
    (stream,) = report.streams
    assert (stream.missing.count, stream.explained) == (3, 3)
    assert report.problems()
    assert report.problems(accept_explained=True) == []
    report = verified(path, [body for body in made.bodies() if stamp_of(body)["seq"] not in (3, 4, 6, 7)])
    assert report.problems(accept_explained=True)


def test_a_record_that_was_sent_again_explains_its_old_number(path: Path) -> None:
    old, new = writer(), writer(start=2, salt=bytes(16))
    for _ in range(3):
        old.send()
    new.send(message(1), was=[[old.stream, 2]])
    report = verified(path, [old.bodies()[0], old.bodies()[2], *new.bodies()])
    stream = next(each for each in report.streams if each.stream == old.stream)
    assert (stream.missing.count, stream.explained) == (1, 1)


def test_a_forged_checkpoint_explains_nothing(path: Path) -> None:
    forged = changed(BODIES[5], checkpoint={"kind": "mark", "void": [[1, 4]], "given_up": [[1, 4]]})
    report = verified(path, [*BODIES[4:5], forged, *BODIES[6:]])
    assert report.streams[0].explained == 0


@pytest.mark.parametrize(
    "checkpoint", [5, {}, {"void": 5}, {"void": [5]}, {"adopted": 5}, {"delivered": "x", "digest": 5}]
)
def test_strange_checkpoints_stop_nothing(path: Path, checkpoint: Any) -> None:
    made = writer()
    made.send(checkpoint=checkpoint)
    verified(path, made.bodies(), copies=[])
    assert verified(path, made.bodies()).streams[0].records == 1


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60))), st.sets(st.integers(1, 60)))
def test_ranges_are_covered_as_sets_are(others: list[tuple[int, int]], missing: set[int]) -> None:
    ranges = Ranges()
    for number in sorted(missing):
        ranges.add(number, number)
    covered = {number for first, last in others for number in range(first, last + 1)}
    assert ranges.count == len(missing)
    assert ranges.covered_by([each for each in others if each[0] <= each[1]]) == len(missing & covered)


# -- starts and children -----------------------------------------------------------------------------------------------


def streams_of_tree() -> list[Writer]:
    """Two clients, a forked process with one, and another start."""
    node = root_of(Secret(MASTER), SALT, 1)
    first = Writer(seal_at(node))
    fork = node.take_process()
    inner, third = Writer(seal_at(fork)), Writer(seal_at(node))
    writers = [first, inner, third, writer(start=2, salt=bytes(16)), writer(start=3, salt=b"x" * 16)]
    for each in writers:
        each.checkpoint("open")
        each.send()
    return writers


def test_all_streams_of_a_tree_are_authentic(path: Path) -> None:
    writers = streams_of_tree()
    report = verified(path, [body for each in writers for body in each.bodies()])
    assert report.problems() == []
    assert len(report.streams) == 5


def test_a_missing_start_is_found(path: Path) -> None:
    writers = streams_of_tree()
    report = verified(path, [body for index in (0, 1, 2, 4) for body in writers[index].bodies()])
    assert report.missing_starts == ["app.key: nothing is there of the starts 2"]


def test_a_first_start_that_is_missing_is_found(path: Path) -> None:
    """The auditor's copy is of the first start. Only --state may let a trail begin later."""
    later = [body for each in streams_of_tree()[3:] for body in each.bodies()]
    assert verified(path, later).missing_starts == ["app.key: nothing is there of the starts 1"]
    assert verified(path, later).problems()
    assert verified(path, later, state={TRAIL.stream: Remembered(LAST, None)}).problems() == []
    own = Secret(MASTER)
    assert verified(path, later, copies=[KeyCopy("later.key", next_start(own), 2)]).problems() == []


def test_a_key_file_that_was_rolled_back_or_copied_is_found(path: Path) -> None:
    """Each start reads a key that no other one reads, and each process has a salt of its own."""
    again = writer(start=1, salt=b"y" * 16)
    again.send()
    report = verified(path, [*BODIES, *again.bodies()])
    assert "2 processes have used the key of start 1" in "".join(report.problems())
    static = [writer(start=0, salt=salt) for salt in (SALT, b"y" * 16)]
    for each in static:
        each.send()
    assert verified(path, [body for each in static for body in each.bodies()]).problems() == []


def test_a_missing_process_is_found(path: Path) -> None:
    writers = streams_of_tree()
    for lost in (0, 1):
        bodies = [body for index, each in enumerate(writers) if index != lost for body in each.bodies()]
        report = verified(path, bodies)
        assert len(report.missing_children) == 1
        assert f"children {lost + 1} " in report.missing_children[0]
        assert report.problems(accept_missing_children=True) == []


def test_a_copy_of_a_later_key_cannot_check_earlier_starts(path: Path) -> None:
    report = verified(path, BODIES, copies=[copy_of_key(start=2)])
    assert report.streams[0].key is None
    assert report.problems()


def test_a_static_key_has_the_start_0(path: Path) -> None:
    made = writer(start=0)
    made.send()
    assert verified(path, made.bodies()).problems() == []
    assert verified(path, made.bodies(), copies=[copy_of_key(start=0)]).problems() == []


# -- numbers that would stall a verifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1000, 10_000_000])
def test_forged_numbers_do_not_stall(path: Path, steps: int) -> None:
    """Each forged record asks for as many steps as are allowed; all of them together get no more."""
    forged = [changed(BODIES[3], seq=steps - number) for number in range(50)]
    forged += [changed(BODIES[3], stream=f"{number:032x}/{steps - number}/1") for number in range(50)]
    forged += [changed(BODIES[3], stream=f"{number:032x}/1/{steps - number}") for number in range(50)]
    forged += [changed(BODIES[3], stream=f"{number:032x}/1" + f"/{steps // 14}" * 14) for number in range(50)]
    report = verified(path, [*BODIES, *forged], max_jump=20_000)
    own = next(each for each in report.streams if each.stream == TRAIL.stream)
    assert own.records == LAST
    assert len(report.problems()) > 100


def test_a_real_gap_of_many_numbers_is_checked(path: Path) -> None:
    made = writer()
    made.send()
    state = made.stamper.chain.state
    assert state.key is not None
    made.stamper.chain.state = state._replace(number=50_001, key=state.key.evolve_by(50_000))
    made.send()
    report = verified(path, made.bodies(), max_jump=50_000)
    assert report.streams[0].records == 2
    assert report.streams[0].missing.count == 50_000
    report = verified(path, made.bodies(), max_jump=49_000)
    assert report.streams[0].too_far.count == 1
    assert "--max-jump" in "".join(report.problems())


# -- state -------------------------------------------------------------------------------------------------------------


def test_state_lets_one_verification_follow_another(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_text("\n".join(map(as_fluent_bit_lines, BODIES[:10])))
    second.write_text("\n".join(map(as_fluent_bit_lines, BODIES[10:])))
    state = tmp_path / "state"

    def run(*paths: Path) -> list[str]:
        verifier = Verifier([copy_of_key()], read_state(str(state)))
        for each in paths:
            verifier.read(str(each))
        problems = verifier.check().problems()
        if not problems:
            write_state(str(state), verifier.remembered)
        return problems

    assert run(first) == []
    assert read_state(str(state))[TRAIL.stream].seq == 10
    assert run(second) == [], "the first ones are remembered"
    assert run(first, second) == []
    assert read_state(str(state))[TRAIL.stream].seq == LAST
    assert "cut off" in "".join(run(first))


def test_state_remembers_other_records(path: Path) -> None:
    state = {TRAIL.stream: Remembered(10, "00" * 32)}
    assert "remembers" in "".join(verified(path, BODIES, state=state).problems())


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", '{"geventaudit_state": 2}', '{"geventaudit_state": 1, "streams": 5}'),
        *(f'{{"geventaudit_state": 1, "streams": {{"a": {entry}}}}}' for entry in ("[1]", '["x", null]', "5")),
    ],
)
def test_other_files_are_no_state(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no state file"):
        read_state(str(path))


# -- without a key -----------------------------------------------------------------------------------------------------


def test_the_strict_pattern_reads_as_the_whole_parser_does() -> None:
    plain = Writer(None)
    for number in range(3):
        plain.send(message(number))
    fast = RecordReader(with_digest=False)
    for body in [*BODIES, *plain.bodies()]:
        for agent in AGENTS:
            line = agent(body).encode()
            whole = fast.read(line.replace(b'"geventaudit"', b'"geventaudit" '))
            assert isinstance(whole, Stamped)
            if whole.note is None:
                assert fast.read(line) == whole


def test_gaps_and_differing_copies_are_found_without_a_key(path: Path) -> None:
    plain = Writer(None)
    for number in range(10):
        plain.send(message(number))
    bodies = plain.bodies()
    report = verified(path, [*bodies[:3], *bodies[5:], bodies[8]], copies=[])
    assert report.streams[0].missing.ranges == [(4, 5)]
    assert report.streams[0].duplicates == 1
    moved = changed(bodies[1], time=stamp_of(bodies[2])["time"])
    assert verified(path, [*bodies, moved], copies=[]).streams[0].two_contents.count == 1


def test_a_clock_that_goes_back_is_counted_and_no_problem(path: Path) -> None:
    made = writer()
    for _ in range(3):
        made.send()
        made._now -= 100
    report = verified(path, made.bodies())
    assert report.problems() == []
    assert report.streams[0].clock_steps == 2


def test_the_guide_lists_the_fields_in_the_order_of_the_canonical_form() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "howto" / "sealed-trails.md").read_text()
    order = guide.partition("*Order in C*")[2].partition(". Kinds")[0]
    assert tuple(re.findall(r"`(\w+)`", order)) == BODY_KEYS


# -- any mutation ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_bytes_is_found(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of lines are changed, removed, inserted, repeated: the trail is whole only if no record has changed."""
    agent = data.draw(st.sampled_from(AGENTS))
    lines = [agent(body) for body in BODIES]
    index = data.draw(st.integers(0, LAST - 1))
    line = lines[index]
    at = data.draw(st.integers(0, len(line) - 1))
    size = data.draw(st.integers(0, 8))
    new = data.draw(st.sampled_from(["", "0", "1", "x", '"', "\\", ",", " ", "{", "}", ":", "null", "1.0", "e"]))
    lines[index] = line[:at] + new + line[at + size :]
    report = verified(tmp_path / "trail.jsonl", lines)
    if not report.problems():
        reader = RecordReader(with_digest=True)
        before, after = reader.read(line.encode()), reader.read(lines[index].encode())
        assert before == after


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(LAST)), st.integers(1, LAST - 2))
def test_any_reordering_of_records_is_whole_and_any_selection_is_not(
    tmp_path: Path, order: list[int], size: int
) -> None:
    path = tmp_path / "trail.jsonl"
    assert verified(path, [BODIES[index] for index in order]).problems() == []
    some = [BODIES[index] for index in order[:size]]
    (stream,) = verified(path, some).streams
    last = max(stamp_of(body)["seq"] for body in some)
    assert stream.missing.count == last - size


def test_the_audit_type_is_covered(path: Path) -> None:
    made = writer()
    msg = message(1)
    msg.type = AuditType.DATA_PLANE
    made.send(msg)
    assert verified(path, made.bodies(), as_listen).problems() == []
    line = as_listen(made.bodies()[0]).replace('"Type": "DataPlane"', '"Type": "ControlPlane"')
    assert verified(path, [line]).problems()
    assert msgpack.unpackb(made.frames[0])[0] == "AsmAuditDP"


def test_the_kind_of_a_record_is_that_of_the_first_key_that_has_one() -> None:
    """For each order of the line, and each seed of hashes."""
    keys = {"Type": "DataPlane", "AuditType": "web-log", "AuditTag": "AsmAuditCP"}
    for order in itertools.permutations(keys):
        assert kind_of({key: keys[key] for key in order}) == "AsmAuditCP"
    assert kind_of({"Type": "DataPlane", "AuditTag": 5}) == "AsmAuditDP"
    assert kind_of({"Type": "DataPlane", "AuditType": "web-log"}) is None
    assert kind_of({"other": "DataPlane"}) is None
