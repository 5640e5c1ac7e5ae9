"""The jobs of a spool's disk thread: plain functions that block, on folders that only this thread touches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ..errors import SpoolError
from .folder import Check, Folder, orphans
from .settings import Spool
from .writer import Append, encode_runs

__all__ = ["Adopted", "Kept", "Written", "adopt", "keep", "open_and_keep", "open_folder", "rewrite", "write"]

_READ_BYTES = 1 << 20


class Written(NamedTuple):
    """The outcome of one write."""

    error: Exception | None
    """The reason if the frames are not on disk."""
    check: Check | None
    """The state of the files after the write; None if nothing was appended."""
    problems: list[str]
    """What else failed."""
    removed: set[bytes]
    """The magics of the segments that were removed, since all in them is delivered."""
    size: int
    """Bytes of undelivered frames in the folder."""


class Adopted(NamedTuple):
    """Folders of dead processes, which this process has locked now."""

    folders: list[Folder]
    problems: list[str]


class Kept(NamedTuple):
    """The outcome of the last job."""

    left: list[bytes]
    """The frames that are not on disk."""
    lost: int
    """Records that are neither on disk nor in memory."""
    error: Exception | None
    """The reason."""


def open_folder(path: str, synchronous: str) -> Folder:
    """Open the folder of this process, and lock it."""
    folder = Folder(path, synchronous)
    folder.open()
    return folder


def write(
    folder: Folder, append: Append | None, advances: Sequence[tuple[Folder, int]], finished: Sequence[Folder]
) -> Written:
    """Append frames, note deliveries, and close the folders whose records are all delivered."""
    error: Exception | None = None
    check = None
    problems: list[str] = []
    removed: set[bytes] = set()
    if append is not None:
        try:
            folder.append(append.first, append.magic, append.data, append.amount)
        except (OSError, SpoolError) as problem:
            error = problem
        try:
            check = folder.check()
        except (OSError, SpoolError) as problem:
            problems.append(f"{folder.path}: a file was removed and cannot be restored now: {problem}")
    for each, number in advances:
        try:
            removed |= set(each.advance(number))
        except OSError as problem:
            problems.append(f"{each.path}: the delivery could not be noted: {problem}")
    for each in finished:
        each.close(remove_if_empty=True)
    return Written(error, check, problems, removed, folder.undelivered_bytes)


def rewrite(folder: Folder, appends: Sequence[Append]) -> None:
    """Write frames, each run to a segment of its own."""
    for append in appends:
        folder.insert(append.first, append.magic, append.data, append.amount)


def adopt(spool: Spool, known: Collection[str]) -> Adopted:
    """Lock the folders that dead processes left with records in them."""
    folders, problems = [], []
    for path in orphans(spool.absolute_path):
        if path in known:
            continue
        folder = Folder(path, spool.synchronous)
        try:
            folder.open(create=False)
        except (SpoolError, FileNotFoundError):
            continue  # its process is alive, or another one was faster
        except OSError as error:
            problems.append(f"{path} cannot be adopted now: {error}")
            continue
        problems += folder.problems
        if folder.count:
            folders.append(folder)
        else:
            folder.close(remove_if_empty=True)
    return Adopted(folders, problems)


def open_and_keep(path: str, synchronous: str, frames: Sequence[bytes], remove_if_empty: bool) -> Kept:
    """Open the folder and leave *frames* there."""
    try:
        folder = open_folder(path, synchronous)
    except (OSError, SpoolError) as error:
        return Kept(list(frames), 0, error)
    numbered = list(enumerate(frames, folder.last_seq + 1))
    return keep(folder, numbered, numbered, [], [], remove_if_empty)


def keep(
    folder: Folder,
    memory: Sequence[tuple[int, bytes]],
    unwritten: Sequence[tuple[int, bytes]],
    advances: Sequence[tuple[Folder, int]],
    others: Sequence[Folder],
    remove_if_empty: bool,
) -> Kept:
    """Leave all undelivered records on disk, and close the folders.

    :param memory: the frames that the outbox held, by number on disk.
    :param unwritten: the frames that are not on disk yet.
    :param others: folders of dead processes.
    """
    written = write(folder, None, advances, ())
    error = written.error
    left: list[bytes] = []
    lost = 0
    appends = encode_runs(unwritten)
    try:
        while appends:
            rewrite(folder, appends[:1])
            appends.pop(0)
    except (OSError, SpoolError) as problem:
        error = problem
        first = appends[0].first
        left = [frame for number, frame in unwritten if number >= first]
    try:
        check = folder.check()
        for first, last in check.missing:
            found = [each for each in memory if first <= each[0] <= last]
            lost += last - first + 1 - len(found)
            rewrite(folder, encode_runs(found))
        if lost:
            error = SpoolError(f"a file was cut off; {lost} records are lost")
    except (OSError, SpoolError) as problem:
        # A file that was removed and cannot be restored ends with this process. Its records can still be read.
        error = problem
        left = _read_all(folder) + left
    folder.close(remove_if_empty=remove_if_empty)
    for other in others:
        other.close(remove_if_empty=True)
    return Kept(left, lost, error)


def _read_all(folder: Folder) -> list[bytes]:
    frames: list[bytes] = []
    after = folder.cursor
    while True:
        read = folder.read(after, _READ_BYTES)
        frames += [frame for _, frame in read.frames]
        if not read.frames and not read.damaged:
            return frames
        after = read.last
