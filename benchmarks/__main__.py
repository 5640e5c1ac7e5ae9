"""The command line: ``python -m benchmarks [--quick] [--json FILE] [--svg FILE] [NAME...]``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from . import chart, report
from .figures import FIGURES
from .measure import Row
from .processes import stay_on_one


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="How fast geventaudit is, in ratios to baselines of the same run."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these figures (see --list)")
    parser.add_argument("--list", action="store_true", help="name the figures, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="shorter samples: a first impression, with more noise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw a chart there")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in FIGURES]:
        parser.error(f"there is no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
    if options.list:
        for name, figure in FIGURES.items():
            print(f"{name:18}{figure.summary}")
        return 0
    stay_on_one()
    logging.getLogger("geventaudit").setLevel(logging.ERROR)  # that NoOp goes nowhere is on purpose here
    rows: dict[str, list[Row]] = {}
    for name in options.names or FIGURES:
        figure = FIGURES[name]
        start = time.monotonic()
        rows[name] = figure.take(*(figure.quick if options.quick else figure.full))
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    machine = report.machine()
    print(report.table([row for each in rows.values() for row in each]))
    print("\n" + "; ".join(f"{name}: {value}" for name, value in machine.items()))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(rows, quick=options.quick), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(chart.svg(rows, machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
