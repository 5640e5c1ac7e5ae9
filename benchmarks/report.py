"""The rows as a table for people and as JSON for programs, with the machine that they were taken on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from .measure import Bound, Row, Spread

__all__ = ["as_json", "machine", "table"]

_PACKAGES = ["geventaudit", "gevent", "msgpack", "marshmallow", "fluent-logger", "opentelemetry-sdk"]


def machine() -> dict[str, str]:
    """Return the processor, kernel, Python and packages of this machine."""
    model = "unknown processor"
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(rows: Sequence[Row]) -> str:
    """Return a table in Markdown: median, lowest and highest round, bar, aim, and the result."""
    lines = [("figure", "median", "low to high", "bar", "aim", "met"), ("---",) * 6]
    lines += [
        (
            row.name,
            "not measured" if row.value is None else _number(row.value.median, row.unit),
            row.note if row.value is None else _range(row.value),
            _bound(row.bar),
            _bound(row.aim),
            "" if row.met is None else "yes" if row.met else "**no**",
        )
        for row in rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines[1] = tuple("-" * width for width in widths)  # type: ignore[assignment]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def as_json(rows: Mapping[str, Sequence[Row]], *, quick: bool) -> dict[str, Any]:
    """Everything: every sample of every figure."""
    return {
        "machine": machine(),
        "quick": quick,
        "figures": {name: [{**dataclasses.asdict(row), "met": row.met} for row in each] for name, each in rows.items()},
    }


def _number(value: float, unit: str = "") -> str:
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{text} {unit}".rstrip()


def _range(value: Spread) -> str:
    return f"{_number(value.low)} to {_number(value.high)}"


def _bound(bound: Bound | None) -> str:
    return "" if bound is None else f"{bound.kind} {bound.value:g}"
