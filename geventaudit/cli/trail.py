"""The commands ``geventaudit seal-key`` and ``geventaudit verify``."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from ..agent.shown import printable
from ..errors import SealError
from ..trail import key_file
from ..verify.findings import StreamReport, TrailReport, counted
from ..verify.keyring import MAX_STEPS, KeyCopy
from ..verify.state import read_state, write_state
from ..verify.trail import Verifier
from .terminal import CommandError, Progress, cannot

__all__ = ["add_commands", "add_file_arguments", "read_copies"]

_MAX_STREAMS_SHOWN = 20
_MAX_PROBLEMS_SHOWN = 100


def add_commands(command: Callable[..., Any], file: Callable[[argparse.Action], None]) -> None:
    """Add the commands to the parser.

    :param command: adds one, by name, function, description and examples.
    :param file: marks an argument that is a file.
    """
    seal_key = command(
        "seal-key",
        _seal_key,
        "make the key file of a seal",
        """\
  geventaudit seal-key /var/lib/app/seal.key
  scp /var/lib/app/seal.key auditor:app.key        at once: each start of the service replaces the key""",
    )
    file(seal_key.add_argument("file", metavar="FILE", help="must not exist yet; its owner runs the service"))

    verify = command(
        "verify",
        _verify,
        "prove that a trail is whole",
        """\
  geventaudit verify /var/log/audit/*.jsonl.gz --key-file app.key
  geventaudit verify trail.jsonl                   numbers only: gaps and duplicates, nothing authenticated
  geventaudit verify today.jsonl --key-file app.key --state app.state --json""",
    )
    add_file_arguments(verify, file)
    file(
        verify.add_argument(
            "--state",
            metavar="FILE",
            help="remembers the end of each stream from one verification to the next, so that a cut end is found; "
            "written if the trail is whole",
        )
    )
    verify.add_argument("--json", action="store_true", help="print the findings as JSON")
    verify.add_argument(
        "--accept-explained",
        action="store_true",
        help="accept missing records that the client itself has reported as given up, void or sent again",
    )
    verify.add_argument(
        "--accept-missing-children",
        action="store_true",
        help="accept clients and forked processes without any record, as forks that sent nothing",
    )
    verify.add_argument(
        "--max-jump",
        metavar="STEPS",
        type=int,
        default=MAX_STEPS,
        help=f"steps that keys are evolved for gaps in vain ({MAX_STEPS})",
    )


def add_file_arguments(parser: argparse.ArgumentParser, file: Callable[[argparse.Action], None]) -> None:
    """Add the files of a trail, and the keys of its seals."""
    file(
        parser.add_argument(
            "files", metavar="FILE", nargs="+", help='JSON lines, plain or gzip, in any order; "-" for standard input'
        )
    )
    file(
        parser.add_argument(
            "--key-file",
            metavar="KEY",
            action="append",
            default=[],
            help="the first copy of a service's key file; may be given several times",
        )
    )


def read_copies(paths: Sequence[str]) -> list[KeyCopy]:
    """Return the auditor's copies of key files.

    :raises CommandError: one cannot be read, or is no key file.
    """
    return [_copy(path) for path in paths]


def _read_files(verifier: Verifier, paths: Sequence[str]) -> None:
    """Read all files, with a progress bar.

    :raises CommandError: one cannot be read.
    """
    with Progress(_total_bytes(paths), "B") as progress:
        for path in paths:
            try:
                verifier.read(path, progress.advance)
            except OSError as error:
                raise cannot("read", path, error) from None


def _seal_key(arguments: argparse.Namespace) -> int:
    path = arguments.file
    try:
        key_file.create(path)
    except FileExistsError:
        raise CommandError(f"{path} exists already: a new key would make the auditor's copy worthless") from None
    except OSError as error:
        raise cannot("write", path, error) from None
    print(f"{path}: made. Copy it now to a place that this host cannot reach: the service replaces it when it starts.")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    verifier = Verifier(
        read_copies(arguments.key_file),
        _state(arguments.state) if arguments.state else None,
        max_jump=max(arguments.max_jump, 1),
    )
    _read_files(verifier, arguments.files)
    report = verifier.check()
    problems = report.problems(
        accept_explained=arguments.accept_explained, accept_missing_children=arguments.accept_missing_children
    )
    if arguments.json:
        print(json.dumps(_as_json(report, problems, arguments.accept_explained), indent=2))
    else:
        _print_report(report, problems)
    if arguments.state:
        if problems:
            print(f"{arguments.state} is left as it was, since the trail is not whole") if not arguments.json else None
        else:
            try:
                write_state(arguments.state, verifier.remembered)
            except OSError as error:
                raise cannot("write", arguments.state, error) from None
    return 1 if problems else 0


def _copy(path: str) -> KeyCopy:
    try:
        master, start = key_file.read_copy(path)
    except SealError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise cannot("read", path, error) from None
    return KeyCopy(path, master, start)


def _state(path: str) -> Any:
    try:
        return read_state(path)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise cannot("read", path, error) from None


def _total_bytes(paths: Sequence[str]) -> int | None:
    total = 0
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        total += status.st_size
    return total


def _as_json(report: TrailReport, problems: list[str], accept_explained: bool) -> dict[str, Any]:
    return {
        "whole": not problems,
        "authenticated": report.is_authenticated,
        "lines": report.lines,
        "unreadable": report.unreadable.count,
        "unstamped": report.unstamped.count,
        "not_covered": report.uncovered,
        "missing_starts": report.missing_starts,
        "repeated_starts": report.repeated_starts,
        "missing_children": report.missing_children,
        "missing_streams": report.missing_streams,
        "notes": report.notes,
        "warnings": report.warnings(),
        "streams_without_end": report.without_end,
        "problems": problems,
        "streams": [stream.as_json(accept_explained) for stream in report.streams],
    }


def _print_report(report: TrailReport, problems: list[str]) -> None:
    streams = sorted(report.streams, key=lambda each: (each.start_time, each.stream))
    if not report.is_authenticated:
        print("nothing is authenticated: without --key-file, only the numbers are checked")
    for stream in streams[:_MAX_STREAMS_SHOWN]:
        print(_line_of(stream))
    if len(streams) > _MAX_STREAMS_SHOWN:
        print(f"... and {counted(len(streams) - _MAX_STREAMS_SHOWN, 'other stream')} (--json lists all)")
    if report.uncovered:
        names = ", ".join(sorted(report.uncovered)[:20])
        print(f"keys that agents added, which no seal covers: {printable(names)}")
    for note in report.notes:
        print(f"note: {printable(note)}")
    print(
        f"{counted(report.lines, 'line')}, {counted(len(streams), 'stream')}, {report.records_text}, "
        f"{counted(report.duplicates, 'duplicate')}, "
        f"{sum(each.missing.count for each in streams)} missing, "
        f"{sum(each.altered_only.count for each in streams)} only in altered form"
    )
    warnings = report.warnings()
    for warning in warnings[:_MAX_STREAMS_SHOWN]:
        print(f"WARNING {printable(warning, 500)}")
    if len(warnings) > _MAX_STREAMS_SHOWN:
        print(f"... and {counted(len(warnings) - _MAX_STREAMS_SHOWN, 'other warning')} (--json lists all)")
    for problem in problems[:_MAX_PROBLEMS_SHOWN]:
        print(f"PROBLEM {printable(problem)}")
    if len(problems) > _MAX_PROBLEMS_SHOWN:
        print(f"... and {counted(len(problems) - _MAX_PROBLEMS_SHOWN, 'other problem')} (--json lists all)")
    print(report.verdict(len(problems)))


def _line_of(stream: StreamReport) -> str:
    records = f"{stream.records_text}, {stream.first}-{stream.last}" if stream.records else stream.records_text
    facts = [records, printable(stream.duplicates_text, 500), "ended" if stream.has_end else "no end"]
    if stream.clock_steps:
        facts.append(f"the clock went back {counted(stream.clock_steps, 'time')}")
    if stream.refused or stream.left_out:
        facts.append(f"{stream.refused} refused and {stream.left_out} left out by the client")
    if stream.unchecked_digests:
        facts.append(stream.digests_text)
    period = f" {stream.start_time} to {stream.end_time}" if stream.records else ""
    return f"{stream.stream}{period}: {', '.join(facts)}"
