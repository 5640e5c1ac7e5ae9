"""The summary as one HTML page: no script, no other file, charts as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..agent.shown import printable
from ..verify.findings import TrailReport, counted
from ..version import __version__
from .charts import counts_chart, timeline_chart, unknown_chart
from .controls import controls_for
from .counting import BoundedCounts, Count
from .fields import FIELDS
from .reading import Source
from .summary import OUTCOMES, Summary, moment
from .text import (
    approximations_of,
    caution_of,
    counts_of,
    duplicates_of,
    key_of,
    left_out_of,
    span_name,
    stream_order,
    verdict_of,
)

__all__ = ["page_of"]

_FOLDER = Path(__file__).parent
_ROWS, _BARS = 50, 12
_STREAMS = 1000
_PROBLEMS = 200
_SPANS = 60
_ROUTES = 10


class _Table(NamedTuple):
    """Counts, and their chart."""

    identifier: str
    title: str
    rows: Sequence[Count]
    total: int
    drawing: Markup


def page_of(summary: Summary, trail: TrailReport, sources: Sequence[Source]) -> str:
    """Return the report as HTML. Texts of records are escaped texts in it, and nothing else.

    :param sources: the files that were read.
    """
    # Without trim_blocks and a loader: one template, which escapes everything that is not Markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["shown"] = printable
    template = environment.from_string((_FOLDER / "page.html").read_text("utf-8"))
    streams = stream_order(trail)
    width, spans = summary.timeline.spans(_SPANS)
    return template.render(
        style=Markup((_FOLDER / "page.css").read_text("utf-8")),
        summary=summary,
        trail=trail,
        sources=sources,
        first=moment(summary.first),
        last=moment(summary.last),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        version=__version__,
        verdict=verdict_of(trail),
        caution=caution_of(trail),
        counts=counts_of(summary, trail),
        duplicates=duplicates_of(trail),
        left_out_records=left_out_of(summary) if summary.left_out else "",
        approximations=approximations_of(summary, trail),
        counted=counted,
        key_of=key_of,
        warnings=trail.warnings(),
        refused=trail.refused,
        left_out=trail.left_out,
        streams=streams[:_STREAMS],
        more_streams=max(len(streams) - _STREAMS, 0),
        problems=trail.problems(),
        most_problems=_PROBLEMS,
        outcomes=OUTCOMES,
        span_seconds=width,
        spans=[(span_name(second, width), counts) for second, counts in spans if any(counts)],
        timeline_drawing=Markup(timeline_chart(width, spans)),
        tables=_tables(summary),
        unknown=[_unknown(field, summary) for field in FIELDS],
        unknown_drawing=Markup(unknown_chart(summary)),
        controls=controls_for(summary, trail),
    )


def _tables(summary: Summary) -> list[_Table]:
    tables = [
        _table("services", "Services", summary.services, is_drawn=False),
        _table("types", "Audit types", summary.types, is_drawn=False),
        _table("operation-types", "Operation types", summary.operation_types),
        _table("results", "Results", summary.results, is_drawn=False),
        _table("categories", "Categories", summary.categories),
        _table("operations", "Operations", summary.operations),
        _table("callers", "Busiest callers", summary.callers),
    ]
    if summary.statuses.total:
        tables.append(_table("statuses", "Failures by HTTP status", summary.statuses, is_drawn=False))
    return tables


def _table(identifier: str, title: str, counts: BoundedCounts, *, is_drawn: bool = True) -> _Table:
    rows = counts.top(_ROWS)
    drawing = Markup(counts_chart(title, rows[:_BARS]) if is_drawn else "")
    return _Table(identifier, title, rows, len(counts), drawing)


def _unknown(field: str, summary: Summary) -> tuple[str, float, list[Count], int]:
    routes = summary.unknown[field]
    shown: list[Any] = routes.top(_ROUTES)
    return field, summary.unknown_share(field), shown, len(routes) - len(shown)
