"""The command ``geventaudit report``."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ..report.reading import Source, count_records, open_sources
from ..report.summary import Summary
from ..report.text import lines_of_report
from ..verify.findings import TrailReport
from ..verify.trail import Verifier
from .terminal import CommandError, Progress, cannot
from .trail import add_file_arguments, read_copies

__all__ = ["add_command"]


def add_command(command: Callable[..., Any], file: Callable[[argparse.Action], None]) -> None:
    """Add the command to the parser.

    :param command: adds one, by name, function, description and examples.
    :param file: marks an argument that is a file.
    """
    report = command(
        "report",
        _report,
        "summarize a trail for people who must sign it",
        """\
  geventaudit report /var/log/audit/*.jsonl.gz --key-file app.key --html report.html
  geventaudit report trail.jsonl                   in the terminal; nothing is authenticated""",
    )
    add_file_arguments(report, file)
    file(
        report.add_argument(
            "--html",
            metavar="OUT.html",
            help="write one HTML page with charts, readable by this user only, instead of the text (needs "
            "geventaudit[report])",
        )
    )


def _report(arguments: argparse.Namespace) -> int:
    page_of = _page_maker() if arguments.html else None
    if page_of is not None:
        _refuse_input(arguments.html, arguments.files)
    summary, verifier = Summary(), Verifier(read_copies(arguments.key_file))
    with ExitStack() as stack:
        sources, trail = _read(stack, summary, verifier, arguments.files)
    if page_of is None:
        for line in lines_of_report(summary, trail, sources):
            print(line)
    else:
        try:
            _write(arguments.html, page_of(summary, trail, sources))
        except OSError as error:
            raise cannot("write", arguments.html, error) from None
    return 1 if trail.problems() else 0


def _read(
    stack: ExitStack, summary: Summary, verifier: Verifier, paths: Sequence[str]
) -> tuple[list[Source], TrailReport]:
    """Read all files twice: to verify them, then to count their records.

    :raises CommandError: one cannot be read, or has changed meanwhile.
    """
    try:
        sources = open_sources(stack, paths)
        with Progress(2 * sum(each.size for each in sources), "B") as progress:
            for each in sources:
                verifier.read(each.path, progress.advance, name=each.name, size=each.size)
            trail = verifier.check()
            count_records(summary, trail, sources, progress.advance)
        changed = [each.name for each in sources if each.has_changed]
    except OSError as error:
        raise cannot("read", error.filename or "the files", error) from None
    if changed:
        raise CommandError(
            f"{changed[0]} has changed while it was read: copy the files first, and report on the copies"
        )
    return sources, trail


def _page_maker() -> Callable[..., str]:
    try:
        from ..report.page import page_of
    except ImportError as error:
        raise CommandError(
            f"--html is made by jinja2 and pygal ({error}): pip install 'geventaudit[report]'; without --html, the "
            "report is printed as text"
        ) from None
    return page_of


def _refuse_input(path: str, files: Sequence[str]) -> None:
    for each in files:
        if os.path.exists(path) and os.path.exists(each) and os.path.samefile(path, each):
            raise CommandError(f"--html would replace {each}, which is to be read: give another name")


def _write(path: str, page: str) -> None:
    """Write the page, readable for this user only, in the place of an older one.

    :raises OSError: it cannot be written.
    """
    fresh = f"{path}.{secrets.token_hex(4)}.new"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Text of records may have lone surrogates; printable() has escaped them.
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise
    print(f"{path}: written", file=sys.stderr)
