"""The summary for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..agent.shown import printable
from ..trail.keys import parse_stream
from ..verify.findings import NO_RECORD, StreamReport, TrailReport, counted
from .controls import controls_for
from .counting import BoundedCounts
from .fields import FIELDS
from .reading import Source
from .summary import FAILED, Summary, moment

__all__ = [
    "caution_of",
    "counts_of",
    "duplicates_of",
    "key_of",
    "left_out_of",
    "lines_of_report",
    "span_name",
    "stream_order",
    "verdict_of",
]

_TOP = 15
_STREAMS = 20
_SPANS = 24
_BAR = 30


def lines_of_report(summary: Summary, trail: TrailReport, sources: Sequence[Source]) -> Iterator[str]:
    """Yield the lines of the report, safe for a terminal."""
    yield f"Audit report of {counted(len(sources), 'file')}"
    for source in sources:
        size = counted(source.size, "byte")
        yield f"file        {printable(source.name, 500)}, {size}, SHA-256 {source.sha256}"
    yield f"period      {moment(summary.first)} to {moment(summary.last)}"
    yield f"records     {counts_of(summary, trail)}; {duplicates_of(trail)}"
    if summary.left_out:
        yield f"left out    {left_out_of(summary)}"
    yield f"integrity   {verdict_of(trail)}"
    refused = counted(trail.refused, "record")
    yield f"refusals    {refused} refused by send(), {trail.left_out} left out (as the checkpoints say)"
    yield f"note        {caution_of(trail)}"
    for reason in approximations_of(summary, trail):
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
    no_key = "" if trail.is_authenticated else "; nothing is authenticated without a key"
    return trail.verdict(problems) + (" (listed below)" if problems or trail.without_end else "") + no_key


def counts_of(summary: Summary, trail: TrailReport) -> str:
    """Return the numbers of operations and checkpoints, and their sum, which ``verify`` counts too."""
    total = counted(summary.records + summary.checkpoints, "authentic record" if trail.is_authenticated else "record")
    text = f"{total}: {counted(summary.records, 'operation')} and {counted(summary.checkpoints, 'checkpoint')}"
    unstamped = 0 if trail.is_authenticated else trail.unstamped.count
    return text + (f" ({unstamped} without a stamp)" if unstamped else "")


def duplicates_of(trail: TrailReport) -> str:
    """Return the number of duplicates, as ``verify`` counts them."""
    return counted(trail.duplicates, "duplicate")


def left_out_of(summary: Summary) -> str:
    """Return the number of records that the figures leave out."""
    verb = "is" if summary.left_out == 1 else "are"
    return f"{counted(summary.left_out, 'record')} that no key authenticates {verb} in no figure about operations"


def caution_of(trail: TrailReport) -> str:
    """Return one line about the records that are counted."""
    if trail.is_authenticated:
        return "Each authentic record is counted once."
    return "Each number of a stream is counted once, in the first copy that was read. Some may be forged."


def key_of(stream: StreamReport) -> str:
    """Return the key file and the start that authenticate a stream; empty if nothing does."""
    if stream.key is None:
        return ""
    name = parse_stream(stream.stream)
    return f"{printable(stream.key)}, " + (f"start {name.start}" if name is not None and name.start else "static key")


def approximations_of(summary: Summary, trail: TrailReport) -> list[str]:
    """Return the reasons for which some counts may be wrong; none if all are exact."""
    found = summary.approximations()
    if not trail.rejected.is_complete:
        found.append("too many altered records to leave them all out")
    return found


def stream_order(trail: TrailReport) -> list[StreamReport]:
    """Return the streams, those with problems first, then those with warnings, then by time."""
    return sorted(
        trail.streams, key=lambda each: (not each.problems(False), not each.warnings(), each.start_time, each.stream)
    )


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
        facts = [each.records_text, f"{each.missing.count} missing", f"{each.altered_only.count} only in altered form"]
        facts += [printable(each.duplicates_text, 500), "ended" if each.has_end else "no end"]
        facts += [f"key {key_of(each)}"] if each.key is not None else []
        yield f"{each.completeness:>8.2%}  {each.stream}  {', '.join(facts)}"
        for problem in each.problems(False):
            yield f"          PROBLEM {printable(problem, 500)}"
        for warning in each.warnings():
            yield f"          WARNING {printable(warning, 500)}"
    if len(streams) > _STREAMS:
        yield f"          ... and {counted(len(streams) - _STREAMS, 'other stream')}"
    if trail.is_empty:
        yield f"          PROBLEM {NO_RECORD}"
    for text, _ in trail.bad_lines:
        yield f"          PROBLEM {text}"
    for text in (*trail.missing_starts, *trail.repeated_starts, *trail.missing_streams, *trail.missing_children):
        yield f"          PROBLEM {printable(text, 500)}"


def _counts(title: str, counts: BoundedCounts) -> Iterator[str]:
    if not counts.total:
        return
    yield from _heading(title)
    shown = counts.top(_TOP)
    for name, count, failures in shown:
        yield f"{count:>10}  {failures:>8} failed  {printable(name)}"
    if len(counts) > len(shown):
        yield f"            ... and {counted(len(counts) - len(shown), 'other')}"


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
    yield from _heading(f"Failures over time, in spans of {counted(width, 'second')}")
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
