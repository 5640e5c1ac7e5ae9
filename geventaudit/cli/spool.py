"""``geventaudit spool list | show | drain``: the spools of live and of dead processes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gevent

from ..agent import Received
from ..agent.shown import json_of, printable
from ..client import Client
from ..errors import AuditError, ConnectionFailedError, FrameError, SpoolError
from ..protocol.decoding import Decoder, EntryReader
from ..protocol.messages import message_of
from ..records import Msg
from ..runtime.clock import Deadline
from ..spool import Spool
from ..spool.directory import foreign, orphans
from ..spool.folder import Folder
from ..spool.inspection import FolderView
from ..stats import Stats
from ..transport import Connection
from .arguments import Parser, add_address, add_client_options, factory_of, seconds, unreachable
from .signals import run_until_signal
from .terminal import CommandError, Progress, complain

__all__ = ["add_actions", "drain", "list_segments", "show_records", "spool_of"]

_POLL_SECONDS = 0.01
_CLOSE_SECONDS = 5.0


def spool_of(path: str) -> Spool:
    """Return the spool with that path or template.

    :raises argparse.ArgumentTypeError: *path* is invalid.
    """
    try:
        return Spool(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def list_segments(spool: Spool) -> bool:
    """Print a JSON line for each folder and each segment. Return False if there is damage."""
    is_whole = True
    for view in _views(spool):
        summaries = [view.summary(segment) for segment in view.segments]
        undelivered, damaged = sum(each.undelivered for each in summaries), sum(each.damaged for each in summaries)
        _print(
            folder=view.path,
            process=view.owner,
            segments=len(summaries),
            first=summaries[0].first if summaries else None,
            last=summaries[-1].last if summaries else None,
            undelivered=undelivered,
            damaged=damaged,
            bytes=sum(each.size for each in summaries),
        )
        for each in summaries:
            _print(
                folder=view.path,
                segment=each.name,
                first=each.first,
                last=each.last,
                undelivered=each.undelivered,
                damaged=each.damaged,
                bytes=each.size,
            )
        is_whole = _complain(view, damaged) and is_whole
    return is_whole


def show_records(spool: Spool) -> bool:
    """Print the undelivered records, oldest first in each folder. Return False if some cannot be read."""
    is_whole = True
    for view in _views(spool):
        damaged = 0
        for part in (part for segment in view.segments for part in view.read(segment)):
            damaged += part.damaged
            for number, frame in part.frames:
                try:
                    line = json_of(_received(frame))
                except AuditError as error:
                    damaged += 1
                    Progress.say(f"{view.path}: record {number}: {printable(str(error), 1000)}", sys.stderr)
                else:
                    _print(**line)
        is_whole = _complain(view, damaged) and is_whole
    return is_whole


def drain(spool: Spool, factory: Callable[[], Connection], timeout: float) -> bool:
    """Deliver the records of dead processes, and remove the emptied folders.

    :param factory: makes connections to the agent.
    :param timeout: seconds without a delivery after which to give up.
    :returns: True if all records of all folders are delivered.
    :raises CommandError: the spool cannot be drained, or the agent cannot be reached.
    """
    if not spool.is_for_each_process:
        return _drain_folder(spool.absolute_path, factory, timeout)
    is_complete = True
    for path in _folders(spool):
        try:
            is_complete = _drain_folder(path, factory, timeout) and is_complete
        except SpoolError as error:
            complain(error)
            is_complete = False
    return is_complete


def _drain_folder(path: str, factory: Callable[[], Connection], timeout: float) -> bool:
    count = _count_undelivered(path)
    stats = Stats()
    done: bool | None = True
    if count:
        # Connect once first: the client would wait for the agent.
        factory().close()
        client = Client(factory, spool=Spool(path))
        try:
            with Progress(count, " records") as progress:
                done = run_until_signal(lambda: _deliver(client, timeout, progress), signal.SIGTERM, signal.SIGINT)
        finally:
            client.close(_CLOSE_SECONDS)
        stats = client.stats()
    left = count - stats.delivered - stats.dropped
    print(f"{path}: {stats.delivered} delivered, {left} not delivered, {stats.dropped} dropped")
    if not left:
        _remove(path)
    elif done is None:
        raise CommandError("stopped by a signal", 1)
    return not left and not stats.dropped


def _count_undelivered(path: str) -> int:
    """Lock the folder for a moment, and return the number of undelivered records.

    :raises SpoolError: the folder is in use, or is not a spool.
    """
    with _view(path) as view:
        owner = view.owner
    if owner is not None:
        raise SpoolError(f"the spool {path} is in use by process {owner}, which delivers it; stop that process first")
    folder = Folder(path)
    try:
        folder.open(create=False)
    except OSError as error:
        raise _cannot_open(path, error) from None
    try:
        return folder.count
    finally:
        folder.close()


def _deliver(client: Client, timeout: float, progress: Progress) -> bool:
    """Wait until all records are delivered. Return False after *timeout* seconds without a delivery."""
    client.connect(max(timeout, 0.001))
    settled, deadline = 0, Deadline(timeout)
    while True:
        stats = client.stats()
        if stats.adopted and not stats.queued + stats.in_flight + stats.spooled:
            return True
        now_settled = stats.delivered + stats.dropped
        if now_settled > settled:
            progress.advance(now_settled - settled)
            settled, deadline = now_settled, Deadline(timeout)
        if deadline.has_passed() or (stats.spool_failures and not stats.adopted):
            return False
        gevent.sleep(_POLL_SECONDS)


def _remove(path: str) -> None:
    """Remove the folder unless other files are left in it."""
    folder = Folder(path)
    try:
        folder.open(create=False)
    except (OSError, SpoolError):
        # Another process uses the folder now.
        return
    problems = folder.problems.copy()
    folder.close(remove_if_empty=not folder.count)
    for problem in problems:
        complain(problem)
    try:
        left = sorted(set(os.listdir(path)) - {"lock", "cursor"})
    except OSError:
        return
    complain(f"{path} is not removed, because of {', '.join(left)}")


def _folders(spool: Spool) -> list[str]:
    """Return the folders of a template, or the one folder.

    :raises CommandError: there is no parent folder, or all folders are those of other users.
    """
    if not spool.is_for_each_process:
        return [spool.absolute_path]
    parent = os.path.dirname(spool.absolute_path)
    if not os.path.isdir(parent):
        raise CommandError(f"there is no folder {parent}")
    paths, others = orphans(spool.absolute_path), foreign(spool.absolute_path)
    for path, owner in others:
        complain(f"{path} belongs to user {owner}, and is left out; run as its owner")
    if not paths:
        if others:
            raise CommandError(f"all folders that match {spool.absolute_path} belong to other users")
        complain(f"no folder of this user matches {spool.absolute_path}")
    return paths


def _views(spool: Spool) -> Iterator[FolderView]:
    for path in _folders(spool):
        with _view(path) as view:
            yield view


def _view(path: str) -> FolderView:
    try:
        view = FolderView(path)
    except OSError as error:
        raise _cannot_open(path, error) from None
    if not view.is_spool:
        view.close()
        raise SpoolError(f"{path} is not a spool: it has neither a lock file nor segments")
    return view


def _cannot_open(path: str, error: OSError) -> SpoolError:
    if isinstance(error, FileNotFoundError):
        return SpoolError(f"there is no spool {path}")
    return SpoolError(f"the spool {path} cannot be opened: {error.strerror or error}")


def _complain(view: FolderView, damaged: int) -> bool:
    """Print the problems of a folder. Return True if there are none."""
    for problem in view.problems:
        complain(problem)
    if damaged:
        complain(f"{view.path}: {damaged} records are damaged")
    return not view.problems and not damaged


def _received(frame: bytes) -> Received:
    """Return the record in a frame.

    :raises FrameError: the frame has no record.
    """
    frames = list(Decoder(max_frame_bytes=max(len(frame), 1)).feed(frame))
    entries = list(frames[0].unpack(EntryReader(frames[0], is_own=True))) if len(frames) == 1 else []
    if len(entries) != 1:
        raise FrameError("is not one frame with one record")
    (entry,) = entries
    message = message_of(frames[0].tag, entry.body)
    if not isinstance(message, Msg):
        raise FrameError(f"is not a record: {type(message).__name__}")
    return Received(message, entry.time, entry.body.get("env_ikey"))


def _print(**line: object) -> None:
    # In ASCII, so that no text of a record can affect the terminal.
    print(json.dumps(line).replace("\x7f", "\\u007f"))


# -- arguments ---------------------------------------------------------------------------------------------------------


def add_actions(parser: Parser, file: Callable[[argparse.Action], None], folders: Any) -> None:
    """Add ``list``, ``show`` and ``drain`` to the parser of ``spool``."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", parser_class=Parser)

    def action(name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str) -> Parser:
        made = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", examples=examples)
        made.set_defaults(run=run)
        path = made.add_argument(
            "path",
            metavar="PATH",
            type=spool_of,
            help="the spool's folder, or its path with {pid}: the folders of all processes",
        )
        path.complete = folders  # type: ignore[attr-defined]
        return made

    action(
        "list",
        _list,
        "print a JSON line for each folder and segment, also of a live process; changes nothing",
        """\
  geventaudit spool list /var/lib/app/audit
  geventaudit spool list '/var/lib/app/audit-{pid}'""",
    )
    action(
        "show",
        _show,
        "print the undelivered records as JSON lines, also of a live process; changes nothing",
        """\
  geventaudit spool show /var/lib/app/audit
  geventaudit spool show '/var/lib/app/audit-{pid}' > undelivered.jsonl""",
    )
    deliver = action(
        "drain",
        _drain,
        "deliver the records of a dead process, oldest first, then remove the folder",
        """\
  geventaudit spool drain /var/lib/app/audit --unix /run/audit/agent.sock
  geventaudit spool drain '/var/lib/app/audit-{pid}' --tcp agent.example.com:24224 --tls --require-ack""",
    )
    file(add_address(deliver, "deliver to"))
    deliver.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=20.0,
        help="limit for connecting, and for the time without a delivery (default: 20)",
    )
    add_client_options(deliver, file)


def _list(arguments: argparse.Namespace) -> int:
    return 0 if list_segments(arguments.path) else 1


def _show(arguments: argparse.Namespace) -> int:
    return 0 if show_records(arguments.path) else 1


def _drain(arguments: argparse.Namespace) -> int:
    try:
        return 0 if drain(arguments.path, factory_of(arguments), arguments.timeout) else 1
    except ConnectionFailedError as error:
        raise unreachable(error, arguments) from None
