"""The summary for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..agent.shown import printable
from ..verify.findings import NO_RECORD, StreamReport, TrailReport
from .controls import controls_for
from .counting import BoundedCounts
from .fields import FIELDS
from .summary import FAILED, Summary, moment

__all__ = ["CAUTION", "completeness_of", "lines_of_report", "span_name", "stream_order"]

CAUTION = (
    "Each number of a stream is counted once, in the first copy that was read, authentic or not. The counts of a trail "
    "with problems may hold forged records."
)

_TOP = 15
_STREAMS = 20
_SPANS = 24
_BAR = 30


def lines_of_report(summary: Summary, trail: TrailReport, files: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the report, safe for a terminal."""
    yield f"Audit report of {len(files)} files: {printable(', '.join(files), 500)}"
    yield f"period      {moment(summary.first)} to {moment(summary.last)}"
    yield f"records     {summary.records}, and {summary.checkpoints} checkpoints; {summary.duplicates} further copies"
    yield f"integrity   {verdict_of(trail)}"
    refused, left_out = (sum(getattr(each, name) for each in trail.streams) for name in ("refused", "left_out"))
    yield f"refusals    {refused} records refused by send(), {left_out} left out (as the checkpoints say)"
    yield f"note        {CAUTION}"
    for reason in summary.approximations():
        yield f"note        not exact: {reason}"
    yield from _completeness(trail)
    for title, counts in (
        ("Services", summary.services),
        ("Audit types", summary.types),
        ("Operation types", summary.operation_types),
        ("Results", summary.results),
        ("Categories", summary.categories),
        ("Operations", summary.operations),
        ("Busiest callers", summary.callers),
        ("Failures by HTTP status", summary.statuses),
    ):
        yield from _counts(title, counts)
    yield from _unknown(summary)
    yield from _over_time(summary)
    yield from _controls(summary, trail)


def verdict_of(trail: TrailReport) -> str:
    """Return one line about the integrity of the trail."""
    problems = len(trail.problems())
    if problems:
        return f"NOT WHOLE: {problems} problems (geventaudit verify lists them)"
    return "authentic and whole" if trail.is_authenticated else "without gaps; nothing is authenticated without a key"


def stream_order(trail: TrailReport) -> list[StreamReport]:
    """Return the streams, those with problems first, then by time."""
    return sorted(trail.streams, key=lambda each: (not each.problems(False), each.start_time, each.stream))


def completeness_of(stream: StreamReport) -> float:
    """Return the share of the numbers of a stream that are there, from 0 to 1."""
    expected = stream.records + stream.missing.count
    return stream.records / expected if expected else 0.0


def span_name(second: int, width: int) -> str:
    """Return the beginning of a span of time, as exactly as its length needs."""
    text = moment(second).removesuffix(" UTC")
    return text[:10] if width >= 86_400 else text[:16] if width >= 60 else text


def _heading(title: str) -> Iterator[str]:
    yield ""
    yield title
    yield "-" * len(title)


def _completeness(trail: TrailReport) -> Iterator[str]:
    yield from _heading("Completeness by stream")
    streams = stream_order(trail)
    for each in streams[:_STREAMS]:
        end = "ended" if each.has_end else "no end"
        yield (
            f"{completeness_of(each):>8.2%}  {each.stream}  {each.records} records, {each.missing.count} missing, "
            f"{each.duplicates} duplicates, {end}"
        )
        for problem in each.problems(False):
            yield f"          PROBLEM {printable(problem, 500)}"
    if len(streams) > _STREAMS:
        yield f"          ... and {len(streams) - _STREAMS} other streams"
    if trail.is_empty:
        yield f"          PROBLEM {NO_RECORD}"
    for examples, text in ((trail.unreadable, "lines cannot be read"), (trail.unstamped, "records have no stamp")):
        if examples:
            yield f"          PROBLEM {examples.count} {text}"
    for text in (*trail.missing_starts, *trail.missing_streams, *trail.missing_children):
        yield f"          PROBLEM {printable(text, 500)}"


def _counts(title: str, counts: BoundedCounts) -> Iterator[str]:
    if not counts.total:
        return
    yield from _heading(title)
    shown = counts.top(_TOP)
    for name, count, failures in shown:
        yield f"{count:>10}  {failures:>8} failed  {printable(name)}"
    if len(counts) > len(shown):
        yield f"            ... and {len(counts) - len(shown)} others"


def _unknown(summary: Summary) -> Iterator[str]:
    yield from _heading("Share of unknown values by field, and the operations that cause it")
    for field in FIELDS:
        routes = summary.unknown[field]
        causes = ", ".join(f"{printable(name)} ({count})" for name, count, _ in routes.top(3))
        yield f"{summary.unknown_share(field):>8.2%}  {field}{': ' if causes else ''}{causes}"


def _over_time(summary: Summary) -> Iterator[str]:
    width, spans = summary.timeline.spans(_SPANS)
    if not spans:
        return
    yield from _heading(f"Failures over time, in spans of {width} seconds")
    most = max(counts[FAILED] for _, counts in spans) or 1
    for second, counts in spans:
        bar = "#" * -(-counts[FAILED] * _BAR // most)
        yield f"{span_name(second, width):<19} {counts[FAILED]:>9} of {sum(counts):>9}  {bar}".rstrip()


def _controls(summary: Summary, trail: TrailReport) -> Iterator[str]:
    yield from _heading("Evidence for requirements, and its limits")
    for each in controls_for(summary, trail):
        yield f"{each.standard} {each.number}: {each.title}"
        yield f"    shown here:      {printable(each.shown)}"
        yield f"    not shown here:  {each.not_shown}"
