"""The jobs of a spool's disk thread: plain functions that block, on folders that only this thread touches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from ..errors import SpoolError, show
from .backlogs import Backlogs
from .directory import FolderTakenError
from .folder import Check, Folder, Read, orphans
from .format import Append, encode_runs
from .recovery import TRANSIENT
from .settings import Spool
from .stream import Entry

__all__ = ["Adopted", "Kept", "Written", "adopt", "keep", "last", "open_own", "read", "rewrite", "write"]


_MAX_NAMES = 100  # that a process tries for its folder, with {pid} in the path


class Written(NamedTuple):
    """The outcome of one write."""

    error: Exception | None
    """The reason if the frames cannot be written."""
    check: Check | None
    """Changes of other programs to the files. If there are any, the frames are not written; try again at once."""
    problems: list[str]
    """Other failures."""
    has_removed: bool
    """True if segments were removed, since all their frames are delivered."""
    size: int
    """Bytes of undelivered frames in the folder."""


class Adopted(NamedTuple):
    """A folder of a dead process that this process has locked."""

    folder: Folder | None
    """None if there was no other."""
    problems: list[str]


class Kept(NamedTuple):
    """The outcome of the last job."""

    left: list[bytes]
    """The frames that are not on disk."""
    lost: int
    """Records that are neither on disk nor in memory."""
    error: Exception | None
    """The reason."""


def open_own(folder: Folder, spool: Spool) -> None:
    """Open the folder of this process, unless it is open. With ``{pid}``, the next name is for a folder that is taken.

    The folder of a dead process with the same identifier may be taken by the process that sends its records. A new one
    may be taken for a moment by a process that takes it for such a folder.

    :raises SpoolError, OSError: see :meth:`.Folder.open`.
    """
    for number in range(1, _MAX_NAMES + 1):
        if folder.is_open:
            return
        folder.path = spool.folder_of_process(number)
        try:
            folder.open()
        except FolderTakenError:
            if number == _MAX_NAMES or not spool.is_for_each_process:
                raise


def write(
    folder: Folder, append: Append | None, advances: Sequence[tuple[Folder, int]], finished: Sequence[Folder]
) -> Written:
    """Append frames, note deliveries, and close the *finished* folders.

    The files are checked first: a write after the end of a truncated file would hide the loss.
    """
    error: Exception | None = None
    check = None
    problems: list[str] = []
    has_removed = False
    if append is not None:
        try:
            check = folder.check()
            if not check:
                folder.append(append)
        except Exception as problem:
            error = problem
    unnoted: list[Folder] = []
    for each, number in advances:
        try:
            has_removed |= each.advance(number)
        except Exception as problem:  # for lack of memory, too: the frames are written already
            problems.append(f"{each.path}: the delivery could not be noted: {str(problem) or show(problem)}")
            unnoted.append(each)
    for each in finished:
        if each not in unnoted:  # else a later process would send the records again, and so would this one
            each.close(remove_if_empty=True)
    return Written(error, check, problems, has_removed, folder.undelivered_bytes)


def read(folder: Folder, after: int, max_bytes: int, skips: bool) -> Read:
    """Read the frames after the number *after*; see :meth:`.Folder.read`.

    :param skips: True to give up frames that the disk cannot read.
    :raises OSError: for want of descriptors or memory, say; without *skips*, a failure of the disk.
    """
    try:
        return folder.read(after, max_bytes, skips=skips)
    except OSError as error:
        if not skips or error.errno in TRANSIENT:
            raise
        return Read(last=sys.maxsize, problems=[f"{folder.path} is unreadable: {error.strerror}; check the disk"])


def rewrite(folder: Folder, appends: Sequence[Append]) -> None:
    """Write frames, each run to a new segment."""
    for append in appends:
        folder.insert(append)


def adopt(spool: Spool, known: Collection[str], opened: list[Folder]) -> Adopted:
    """Lock one folder with records of a dead process. Other jobs may come before the next.

    :param opened: each folder is added before it is opened, since the client may close, or fork, meanwhile.
    """
    problems: list[str] = []
    for path in orphans(spool.absolute_path):
        if path in known:
            continue
        folder = Folder(path, spool.synchronous)
        opened.append(folder)
        try:
            folder.open(create=False)
        except (SpoolError, FileNotFoundError):
            continue  # its process is alive, or another process has locked it
        except OSError as error:
            problems.append(f"{path} cannot be adopted now: {error}")
            continue
        problems += folder.problems
        if folder.count:
            return Adopted(folder, problems)
        folder.close(remove_if_empty=True)
    return Adopted(None, problems)


def last(
    backlogs: Backlogs, spool: Spool, entries: Sequence[Entry], pending: Sequence[bytes], next_number: int
) -> Callable[[], Kept]:
    """Return the last job, which leaves all undelivered records on disk.

    :param entries: the records that the outbox held.
    :param pending: frames behind these.
    :param next_number: the number on disk of the first of *pending*, if the folder is open.
    """
    folder, is_open = backlogs.folder, backlogs.own is not None
    frames = [*(frame for _, _, frame in entries), *pending]
    memory, unread = backlogs.remains(entries)
    memory.update(enumerate(pending, next_number))
    advances = [(each.folder, number) for each, number in backlogs.advances()]

    def work() -> Kept:
        try:
            return keep(folder, spool, memory, unread, advances) if is_open else open_and_keep(folder, spool, frames)
        finally:
            for orphan in backlogs.orphans:
                orphan.close(remove_if_empty=True)

    return work


def open_and_keep(folder: Folder, spool: Spool, frames: Sequence[bytes]) -> Kept:
    """Open the folder, unless an earlier job has opened it, and leave *frames* there."""
    try:
        open_own(folder, spool)
    except (OSError, SpoolError) as error:
        return Kept(list(frames), 0, error)
    return keep(folder, spool, dict(enumerate(frames, folder.last_seq + 1)), [], [])


def keep(
    folder: Folder,
    spool: Spool,
    memory: dict[int, bytes],
    unread: Sequence[tuple[int, int]],
    advances: Sequence[tuple[Folder, int]],
) -> Kept:
    """Leave all undelivered records on disk, and close the folder.

    :param memory: the frames in memory, by number on disk. Some of them are on disk.
    :param unread: ranges of the records that are not in memory, both ends included.
    """
    write(folder, None, advances, ())
    error: Exception | None = None
    left: dict[int, bytes] = {}
    lost = 0
    try:
        missing = folder.check().missing
    except (OSError, SpoolError) as problem:
        # A removed file that cannot be restored ends with this process. Its records can still be read.
        error = problem
        missing = folder.changes.missing
        detached = folder.read_detached()
        left, lost = dict(detached.frames), detached.damaged
    for first, last in missing:
        cut_off = sum(max(min(last, high) - max(first, low) + 1, 0) for low, high in unread)
        lost += cut_off
        if cut_off:
            error = SpoolError(f"a file was cut off; {cut_off} records are lost")
    for append in encode_runs(folder.without_held(memory)):
        try:
            if not folder.is_in_place:
                raise SpoolError("the folder was removed or replaced")
            rewrite(folder, [append])
        except (OSError, SpoolError) as problem:
            error = problem
            numbers = range(append.first, append.first + len(append.frames))
            left.update((number, memory[number]) for number in numbers)
    folder.close(remove_if_empty=spool.is_for_each_process, notes_counts=True)
    return Kept([frame for _, frame in sorted(left.items())], lost, error)
