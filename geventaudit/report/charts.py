"""Charts as inline SVG, drawn by pygal, without scripts and styles: the page's style sheet has the colours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pygal
from pygal.etree import etree
from pygal.style import Style

from ..agent.shown import printable
from .counting import Count
from .fields import FIELDS
from .summary import OUTCOMES, Summary
from .text import span_name

# pygal's finder for plug-ins would warn about each import that fails, on Python 3.11. No plug-in is used here.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

__all__ = ["counts_chart", "timeline_chart", "unknown_chart"]

_LABELS = 6
_NAME = 40
# Interactive parts, and texts that are for them.
_UNUSED = frozenset({"script", "style", "title", "desc"})


def timeline_chart(width: int, spans: Sequence[tuple[int, Sequence[int]]]) -> str:
    """Return records over time as stacked bars by result; empty without any time.

    :param width: seconds of a span.
    :param spans: first second and counts of each.
    """
    if not spans:
        return ""
    names = [span_name(second, width) for second, _ in spans]
    chart = pygal.StackedBar(
        **_options(320),
        show_legend=True,
        legend_at_bottom=True,
        legend_at_bottom_columns=len(OUTCOMES),
        show_minor_x_labels=False,
        x_label_rotation=15,
    )
    chart.x_labels = names
    chart.x_labels_major = names[:: -(-len(names) // _LABELS)]
    for place, outcome in enumerate(OUTCOMES):
        chart.add(outcome, [counts[place] for _, counts in spans])
    return _svg(chart, f"Records by result, {names[0]} to {names[-1]}. The table has the numbers.")


def counts_chart(label: str, counts: Sequence[Count]) -> str:
    """Return counts as bars, the failures among them in another colour; empty without any."""
    if not counts:
        return ""
    chart = pygal.HorizontalStackedBar(**_options(70 + 26 * len(counts)), show_legend=True, legend_at_bottom=True)
    chart.x_labels = [printable(each.name, _NAME) for each in reversed(counts)]
    chart.add("Not failed", [each.records - each.failures for each in reversed(counts)])
    chart.add("Failure", [each.failures for each in reversed(counts)])
    return _svg(chart, f"{label}. The table has the numbers.")


def unknown_chart(summary: Summary) -> str:
    """Return the share of unknown values by field as bars."""
    chart = pygal.HorizontalBar(**_options(60 + 26 * len(FIELDS)), show_legend=False, range=(0, 100))
    chart.x_labels = list(reversed(FIELDS))
    chart.add("Unknown", [round(100 * summary.unknown_share(field), 2) for field in reversed(FIELDS)])
    return _svg(chart, "Share of unknown values by field, in percent. The table has the numbers.")


def _options(height: int) -> dict[str, Any]:
    # pygal makes room for labels of these sizes.
    style = Style(label_font_size=12, major_label_font_size=12, legend_font_size=12)
    return {"width": 900, "height": height, "margin": 8, "truncate_label": -1, "style": style, "js": ()}


def _svg(chart: Any, label: str) -> str:
    root = chart.render_tree()
    for parent in list(root.iter()):
        # A page with several charts would have them twice.
        parent.attrib.pop("id", None)
        for child in list(parent):
            # The tag of a comment is a function.
            if child.tag in _UNUSED or not isinstance(child.tag, str):
                parent.remove(child)
    root.set("role", "img")
    root.set("aria-label", label)
    svg: str = etree.tostring(root, encoding="unicode")
    return svg
