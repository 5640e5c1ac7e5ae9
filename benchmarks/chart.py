"""The rows as a picture: SVG, written by hand.

Two panels. Above: records per second end to end, geventaudit and its peers. Below: every figure that has a bar, on a
scale of how many times better than its bar it is; the bar is the line at 1, the aim is a small diamond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from .measure import Bound, Row, Spread

__all__ = ["svg"]

_WIDTH = 920
_LEFT = 430  # where the labels end
_RIGHT = 830  # where the scales end
_LINE = 26
_GOOD, _BAD, _PEER, _INK, _FAINT = "#2a7f62", "#b5483a", "#9aa5b1", "#1f2933", "#d7dde3"


def svg(rows: Mapping[str, Sequence[Row]], machine: Mapping[str, str]) -> str:
    """Return the picture of the figures."""
    parts: list[str] = []
    y = 40
    if rates := _rates(rows.get("end-to-end", ())):
        y = _records_per_second(parts, y, rates)
    against = [row for each in rows.values() for row in each if row.bar is not None and row.value is not None]
    if against:
        y = _against_bars(parts, y, against)
    caption = f"{machine['processor']}; {machine['python']}, gevent {machine['gevent']}"
    parts.append(_text(_WIDTH - 20, y + 8, caption, anchor="end", size=11, colour="#66727f"))
    height = y + 24
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" role="img">',
            "<title>How fast geventaudit is</title>",
            f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _rates(rows: Sequence[Row]) -> dict[str, Spread]:
    """Return the records per second by sender, geventaudit first. The reading process is not a contender."""
    rates: dict[str, Spread] = {}
    for row in rows:
        for name, spread in (row.absolute or {}).items():
            who, _, unit = name.rpartition(", ")
            if unit == "records/s" and not who.startswith("bare"):
                rates[who] = spread
    return rates


def _records_per_second(parts: list[str], y: int, rates: Mapping[str, Spread]) -> int:
    parts.append(_text(20, y, "Records per second, end to end", size=16, weight="600"))
    y += 20
    scale = (_RIGHT - _LEFT) / max(spread.high for spread in rates.values())
    for who, spread in rates.items():
        y += _LINE
        colour = _GOOD if who == "geventaudit" else _PEER
        parts.append(_text(_LEFT - 12, y, who, anchor="end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y - 13}" width="{spread.median * scale:.1f}" height="17" rx="2" fill="{colour}"/>'
        )
        parts.append(_whisker(_LEFT + spread.low * scale, _LEFT + spread.high * scale, y - 4))
        parts.append(_text(_LEFT + spread.high * scale + 8, y, f"{spread.median:,.0f}"))
    return y + 50


def _against_bars(parts: list[str], y: int, rows: Sequence[Row]) -> int:
    parts.append(_text(20, y, "Times better than its bar", size=16, weight="600"))
    goodness = [[_times_better(row, at) for at in _ends(row)] for row in rows]
    low = min(0.5, *(min(each) for each in goodness))
    high = max(2.0, *(max(each) for each in goodness))
    low, high = 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))

    def place(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * math.log2(value / low) / math.log2(high / low)

    top, bottom = y + 24, y + 34 + _LINE * len(rows)
    step = max(round(math.log2(high / low) / 8), 1)
    for power in range(round(math.log2(low)), round(math.log2(high)) + 1):
        if power % step == 0:
            x = place(2.0**power)
            colour = _INK if power == 0 else _FAINT
            parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="{colour}"/>')
            label = f"{2**power}" if power >= 0 else f"1/{2**-power}"
            parts.append(_text(x, top - 5, label, anchor="middle", size=11, colour="#66727f"))
    y = top + 8
    for row in rows:
        y += _LINE
        assert row.value is not None
        x = place(_times_better(row, row.value.median))
        colour = _GOOD if row.met else _BAD
        parts.append(_text(_LEFT - 12, y, row.name, anchor="end", size=12))
        ends = [place(_times_better(row, each)) for each in (row.value.low, row.value.high)]
        parts.append(_whisker(ends[0], ends[1], y - 4, colour))
        if row.aim is not None:
            aim = place(_times_better(row, row.aim.value))
            parts.append(f'<path d="M{aim:.1f} {y - 9} l5 5 -5 5 -5 -5z" fill="none" stroke="{_INK}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y - 4}" r="5" fill="{colour}"/>')
        unit = f" {row.unit}" if row.unit else ""
        parts.append(_text(_WIDTH - 20, y, f"{row.value.median:.3g}{unit}", anchor="end", size=12))
    return bottom + 24


def _ends(row: Row) -> list[float]:
    assert row.value is not None
    return [row.value.low, row.value.high, *([row.aim.value] if row.aim else [])]


def _times_better(row: Row, value: float) -> float:
    """Above 1 where the bar is met, whichever way it goes; a difference may be nothing, or less."""
    assert isinstance(row.bar, Bound)
    value = max(value, row.bar.value / 64)
    return value / row.bar.value if row.bar.kind == "at least" else row.bar.value / value


def _whisker(start: float, end: float, y: int, colour: str = _INK) -> str:
    return f'<line x1="{start:.1f}" y1="{y}" x2="{end:.1f}" y2="{y}" stroke="{colour}" stroke-width="2"/>'


def _text(
    x: float, y: int, text: str, *, anchor: str = "start", size: int = 13, weight: str = "400", colour: str = _INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
