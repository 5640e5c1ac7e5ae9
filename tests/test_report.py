"""``geventaudit report``: bounded counts, the summary of a trail, and its text and page."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import random
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import message
from hypothesis import given, settings
from hypothesis import strategies as st
from trails import AGENTS, Writer, as_fluent_bit_lines, body_of, changed, key_file_in, stamp_of, writer

from geventaudit import CallerIdentity, CallerIdentityType, OperationCategory, OperationResult, OperationType
from geventaudit.cli import main
from geventaudit.report.counting import BoundedCounts, SeenNumbers, Timeline
from geventaudit.report.fields import FIELDS
from geventaudit.report.reading import count_records, open_sources
from geventaudit.report.summary import Summary
from geventaudit.verify import findings
from geventaudit.verify.parsing import Parsed
from geventaudit.verify.trail import Verifier

needs_report_extra = pytest.mark.skipif(
    find_spec("pygal") is None, reason="needs pygal, which the extra [report] brings"
)

INJECTIONS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload=window.hacked=1>',
    "</svg></style></title><script>window.hacked = 1</script>",
    "{{ 7 * 7 }}{% for x in y %}${7*7}",
    "\u202ereversed \u200b \x00 \x1b[31m \u2028",
    "alone: \ud800",
    "&lt;b&gt;",
]


def various_trail() -> list[dict[str, Any]]:
    """One stream: two operations, one of which fails at times and does not know its category."""
    made = writer()
    made.checkpoint("open")
    for number in range(20):
        msg = message(number)
        msg.record.caller_identities = {CallerIdentityType.UPN: [CallerIdentity(f"user{number % 3}", "caller")]}
        if number % 2:
            msg.record.operation_name = "GET /things/<id>"
            msg.record.operation_type = OperationType.READ
            msg.record.operation_categories = [OperationCategory.UNKNOWN]
            msg.record.caller_access_levels = ["Unknown"]
        if number % 4 == 3:
            msg.record.operation_result = OperationResult.FAILURE
            msg.record.operation_result_description = "403 Forbidden"
            msg.record.custom_data = {"status": 403}
        made.send(msg)
    return [body_of(frame) for frame in made.frames]


BODIES = various_trail()


@pytest.fixture
def key(tmp_path: Path) -> str:
    return key_file_in(tmp_path)


def summarized(path: Path, lines: list[str]) -> Summary:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    summary = Summary()
    verifier = Verifier()
    verifier.read(str(path))
    with ExitStack() as stack:
        count_records(summary, verifier.check(), open_sources(stack, [str(path)]), lambda size: None)
    return summary


def numbers(counts: BoundedCounts) -> dict[str, tuple[int, int]]:
    return {name: (records, failures) for name, records, failures in counts.top(1000)}


# -- counting ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 1))))
def test_counts_are_exact_while_there_is_room(items: list[tuple[str, int]]) -> None:
    counts = BoundedCounts(capacity=8)
    for name, failures in items:
        counts.add(name, failures)
    assert {name: each[0] for name, each in numbers(counts).items()} == Counter(name for name, _ in items)
    assert sum(each[1] for each in numbers(counts).values()) == sum(failures for _, failures in items)
    assert counts.error == 0


@given(st.lists(st.integers(0, 40).map(str), max_size=300), st.integers(1, 6))
def test_counts_are_bounded_and_their_error_is_known(names: list[str], capacity: int) -> None:
    counts, exact = BoundedCounts(capacity), Counter(names)
    for name in names:
        counts.add(name)
        assert len(counts) <= 2 * capacity
    assert counts.total == len(names)
    for name, count in exact.items():
        assert count - counts.error <= counts.count_of(name) <= count


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 30))))
def test_numbers_are_seen_as_by_a_set(items: list[tuple[str, int]]) -> None:
    seen, expected = SeenNumbers(), set()
    for item in items:
        assert seen.add(*item) is (item not in expected)
        expected.add(item)
    assert seen.is_exact


def test_too_many_ranges_are_not_held() -> None:
    seen = SeenNumbers(max_ranges=3)
    assert all(seen.add("a", number) for number in (1, 3, 5))
    assert seen.is_exact
    assert seen.add("a", 7)
    assert seen.add("b", 1)
    assert not seen.is_exact
    assert not seen.add("a", 3)
    assert seen.add("a", 2), "joins two ranges, and makes room"
    assert seen.add("b", 1)
    assert not seen.add("b", 1)


@given(st.lists(st.tuples(st.integers(0, 4_000_000_000), st.integers(0, 2)), min_size=1), st.integers(3, 50))
def test_a_timeline_loses_no_count(items: list[tuple[int, int]], most: int) -> None:
    timeline = Timeline(3, max_spans=20)
    for second, kind in items:
        timeline.add(second, kind)
    width, spans = timeline.spans(200)
    assert len(spans) <= 200
    assert [second for second, _ in spans] == list(range(spans[0][0], spans[-1][0] + 1, width))
    for kind in range(3):
        assert sum(counts[kind] for _, counts in spans) == sum(each == kind for _, each in items)
    assert len(timeline.spans(most)[1]) <= most


# -- the summary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_the_summary_is_the_same_from_every_agent(tmp_path: Path, agent: Callable[[dict[str, Any]], str]) -> None:
    lines = [agent(body) for body in BODIES]
    random.Random(1).shuffle(lines)
    summary = summarized(tmp_path / "trail", [*lines, lines[0], lines[5], lines[5]])
    assert (summary.records, summary.checkpoints, summary.duplicates) == (20, 1, 3)
    assert numbers(summary.operations) == {"CreateUser": (10, 0), "GET /things/<id>": (10, 5)}
    assert numbers(summary.operation_types) == {"Create": (10, 0), "Read": (10, 5)}
    assert numbers(summary.results) == {"Success": (15, 0), "Failure": (5, 5)}
    assert numbers(summary.categories) == {"UserManagement": (10, 0), "UnknownOperationCategory": (10, 5)}
    assert numbers(summary.callers) == {"UPN user0": (7, 2), "UPN user1": (7, 2), "UPN user2": (6, 1)}
    assert numbers(summary.types) == {"ControlPlane": (20, 5)}
    assert numbers(summary.statuses) == {"403": (5, 5)}
    assert {field for field in FIELDS if summary.unknown_share(field)} == {"OperationCategories", "CallerAccessLevels"}
    assert numbers(summary.unknown["OperationCategories"]) == {"GET /things/<id>": (10, 5)}
    assert summary.unknown_share("OperationCategories") == 0.5
    assert summary.first is not None
    assert summary.last is not None
    times = [stamp_of(body)["time"][:19] for body in BODIES if "checkpoint" not in stamp_of(body)]
    assert (summary.last - summary.first, summary.undated) == (int(times[-1][17:]) - int(times[0][17:]), 0)
    assert summary.approximations() == []


def test_records_without_a_stamp_are_counted_by_the_time_of_the_agent(tmp_path: Path) -> None:
    bare = copy.deepcopy(BODIES[2])
    del bare["CustomData"]
    lines = [json.dumps({**bare, **extra}) for extra in ({"date": 5.5}, {"timestamp": "1970-01-01T00:00:07Z"}, {})]
    summary = summarized(tmp_path / "trail", lines)
    assert (summary.records, summary.first, summary.last, summary.undated) == (3, 5, 7, 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "CustomData", "env_ikey"]), JSON), JSON, JSON)
def test_records_of_any_form_are_counted(body: dict[str, Any], stamp: Any, time: Any) -> None:
    summary = Summary()
    summary.add(Parsed(body, {"time": time, "Type": time}, stamp if isinstance(stamp, dict) else None, "", {}))
    assert summary.records == 1
    assert summary.results.total == 1
    for field in FIELDS:
        assert (summary.unknown_share(field) == 1.0) or field in body


@pytest.mark.parametrize(
    "time", [1e300, -1e300, -5, 253_402_300_800 * 10**9, "9" * 400, True, [], "9999-12-31T23:59:59-23:00"]
)
def test_times_that_no_calendar_has_are_no_times(time: Any) -> None:
    summary = Summary()
    summary.add(Parsed({"OperationName": "x"}, {"time": time}, None, "", {}))
    assert (summary.records, summary.undated) == (1, 1)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_report_in_the_terminal(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [as_fluent_bit_lines(body) for body in BODIES]
    first, second = tmp_path / "a.gz", tmp_path / "b"
    first.write_bytes(gzip.compress("\n".join(lines[:10]).encode()))
    second.write_text("\n".join(lines[10:]))
    assert main(["report", str(first), str(second), "--key-file", key]) == 0
    out = capsys.readouterr().out
    assert "authentic and whole" in out
    assert re.search(r"50\.00%  OperationCategories: GET /things/<id> \(10\)", out)
    assert re.search(r"100\.00%  \S+/1/1  21 authentic records, 1 of them a checkpoint, 0 missing", out)
    for number in ("CC7.2", "CC7.3", "A.8.15", "10.2", "10.3", "AU-2", "AU-3", "AU-9", "AU-12"):
        assert f" {number}: " in out
    second.write_text("\n".join(lines[11:]))
    assert main(["report", str(first), str(second), "--key-file", key]) == 1
    out = capsys.readouterr().out
    assert "NOT WHOLE" in out
    assert "1 missing" in out
    assert main(["report", str(first), str(second)]) == 1
    assert "not authenticated (no key was given)" in capsys.readouterr().out


def hostile_trail(path: Path) -> None:
    lines = []
    for text in INJECTIONS:
        body = json.loads(json.dumps(BODIES[2]).replace("CreateUser", "T").replace("UserManagement", "T"))
        body.update(OperationName=text, OperationType=text, OperationResult=text, OperationCategories=[text], T=text)
        body.update(CallerIdentities={text: [{"Identity": text, "Description": text}]}, env_ikey=text, date=0)
        body[text] = text
        del body["CustomData"]
        lines.append(json.dumps({**body, "AuditType": text}))
        lines.append(json.dumps({**BODIES[3], text: text}).replace('"AsmAuditCP"', json.dumps(text)))
    lines.append(INJECTIONS[0])
    path.write_text("\n".join(lines))


def test_texts_of_records_cannot_act_in_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "\x1b[31mtrail"
    hostile_trail(path)
    assert main(["report", str(path)]) == 1
    out = capsys.readouterr().out
    assert "window.hacked" in out
    assert all(each.isprintable() for each in out.splitlines())


def test_a_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert main(["report", str(path)]) == 1
    assert "period      unknown to unknown" in capsys.readouterr().out


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
def test_with_a_key_only_authentic_records_are_counted(
    tmp_path: Path, key: str, agent: Callable[[dict[str, Any]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Forged, foreign, bare and plain records are left out, and the numbers tally with those of ``verify``."""
    path = tmp_path / "trail"
    forged = {**BODIES[3], "OperationName": "Forged"}
    stranger = writer(master=bytes(32), salt=bytes(16))
    stranger.send(message(1, operation_name="Stranger"))
    plain = Writer(None)
    plain.send(message(1, operation_name="Plain"))
    bare = {**BODIES[5], "OperationName": "Bare", "CustomData": {}}
    kept = [body for body in BODIES if stamp_of(body)["seq"] != 7]
    beside = {**BODIES[6], "OperationName": "OnlyAltered"}
    wrong = {**changed(BODIES[8], seq="x"), "OperationName": "NoStamp"}
    lines = [agent(body) for body in [forged, beside, *kept, *stranger.bodies(), *plain.bodies(), BODIES[2]]]
    lines += [json.dumps(bare), json.dumps(wrong)]
    path.write_text("\n".join(lines))
    assert main(["report", str(path), "--key-file", key]) == 1
    out = capsys.readouterr().out
    assert "records     20 authentic records: 19 operations and 1 checkpoint; 1 duplicate\n" in out
    assert "left out    6 records that no key authenticates are in no figure about operations\n" in out
    assert re.search(r"^ +10 +0 failed  CreateUser\n +9 +\d failed  GET /things/<id>$", out, re.MULTILINE)
    for name in ("Forged", "Stranger", "Plain", "Bare", "OnlyAltered", "NoStamp"):
        assert name not in out
    assert main(["verify", str(path), "--key-file", key]) == 1
    assert " 20 authentic records, 1 of them a checkpoint, 1 record without a seal, 1 duplicate, 0 missing, 2 only" in (
        capsys.readouterr().out
    )


def test_too_many_altered_records_are_not_all_left_out(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "_MAX_REJECTED", 1)
    path = tmp_path / "trail"
    forged = [{**BODIES[number], "OperationName": "Forged"} for number in (3, 4)]
    path.write_text("\n".join(map(as_fluent_bit_lines, [*BODIES, *forged])))
    assert main(["report", str(path), "--key-file", key]) == 1
    out = capsys.readouterr().out
    assert "left out    1 record that no key authenticates is in no figure about operations\n" in out
    assert "note        not exact: too many altered records to leave them all out\n" in out


def test_the_report_names_its_input_and_the_key(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report does so for standard input, too, which can be read only once."""
    path = tmp_path / "trail"
    path.write_text("\n".join(map(as_fluent_bit_lines, BODIES)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in (str(path), "-"):
        with path.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert main(["report", name, "--key-file", key]) == 0
        out = capsys.readouterr().out
        assert out.startswith("Audit report of 1 file\n")
        assert f"file        {name}, {path.stat().st_size} bytes, SHA-256 {digest}\n" in out
        assert f"key {key}, start 1\n" in out
        assert "(none: its client has no service_tree_id)" in out


def test_a_stream_without_an_end_is_a_warning(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trail"
    path.write_text("\n".join(map(as_fluent_bit_lines, BODIES)))
    for command in ("report", "verify"):
        assert main([command, str(path), "--key-file", key]) == 0
        out = capsys.readouterr().out
        assert (
            f"no end after 21 ({stamp_of(BODIES[-1])['time']}): it goes on, crashed, or later records were cut" in out
        )
        assert "authentic and whole; 1 stream without an end" in out


def test_a_log_that_grows_is_reported_as_it_was_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trail"
    path.write_text("".join(f"{as_fluent_bit_lines(body)}\n" for body in BODIES[:10]))
    with ExitStack() as stack:
        (source,) = open_sources(stack, [str(path)])
        with path.open("a") as file:
            file.write(as_fluent_bit_lines(BODIES[10]))
        summary, verifier = Summary(), Verifier()
        verifier.read(source.path, size=source.size)
        count_records(summary, verifier.check(), [source], lambda size: None)
        assert summary.records + summary.checkpoints == 10
        assert not source.has_changed
        path.write_text(path.read_text().replace("CreateUser", "DeleteUser", 1))
        assert source.has_changed


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_html_needs_the_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pygal", None)
    for name in ("charts", "page"):
        monkeypatch.delitem(sys.modules, f"geventaudit.report.{name}", raising=False)
    assert main(["report", str(tmp_path / "none"), "--html", str(tmp_path / "out.html")]) == 2
    assert "pip install 'geventaudit[report]'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# -- the page ----------------------------------------------------------------------------------------------------------


class _Elements(HTMLParser):
    """The elements of a page, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@needs_report_extra
def test_the_page_stands_alone(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "trail", tmp_path / "out.html"
    path.write_text("\n".join(map(as_fluent_bit_lines, BODIES)))
    assert main(["report", str(path), "--key-file", key, "--html", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    page = _Elements(out.read_text())
    assert page.tags["svg"] == 6
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "use", "a"}
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "xlink:href")}
    assert "url(" not in out.read_text()
    assert "authentic and whole; 1 stream without an end (listed below)" in page.texts
    assert "GET /things/<id> (10)" in page.texts
    assert main(["report", str(path), "--html", str(out)]) == 0, "an older page is replaced"
    assert sorted(os.listdir(tmp_path)) == ["app.key", "out.html", "trail"]


@needs_report_extra
def test_texts_of_records_are_texts_of_the_page(tmp_path: Path) -> None:
    path, out = tmp_path / "<b>trail", tmp_path / "out.html"
    path.write_text("\n".join(map(as_fluent_bit_lines, BODIES)))
    main(["report", str(path), "--html", str(out)])
    plain = _Elements(out.read_text())
    hostile_trail(path)
    main(["report", str(path), "--html", str(out)])
    page = _Elements(out.read_text())
    assert page.tags.keys() - plain.tags.keys() <= {"h3", "ul", "li"}, "the problems"
    assert {name for name, _ in page.attributes} - {"colspan"} == {name for name, _ in plain.attributes}
    shown = "".join(page.texts)
    assert "<script>window.hacked = 1</script>" in shown
    assert "{{ 7 * 7 }}" in shown
    assert "\\u202ereversed" in shown


@needs_report_extra
def test_a_page_of_nothing(tmp_path: Path) -> None:
    path, out = tmp_path / "empty", tmp_path / "out.html"
    path.touch()
    assert main(["report", str(path), "--html", str(out)]) == 1
    assert "no record has a time" in out.read_text()
    assert "NOT WHOLE" in out.read_text()


@needs_report_extra
def test_the_page_replaces_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = tmp_path / "trail", tmp_path / "link"
    path.write_text("\n".join(map(as_fluent_bit_lines, BODIES)))
    link.symlink_to(path)
    before = path.read_text()
    assert main(["report", str(path), "--html", str(link)]) == 2
    assert path.read_text() == before
    assert main(["report", str(path), "--html", str(tmp_path / "none" / "out.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
