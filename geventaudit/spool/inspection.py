"""Inspection of a folder of segments, also of one in use by a live process. Locks, writes and removes nothing.

A live process continues meanwhile. The records found are those of a moment shortly before; some of them may have been
delivered since.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from .directory import Directory, close_descriptor, is_temporary, with_path
from .recovery import load, read_segment
from .segment import Part, Segment
from .sidefiles import Cursor

__all__ = ["FolderView", "SegmentSummary"]

_ATTEMPTS = 10
_PIECE = 1 << 20
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_LOCK = "lock"


class _ReadOnlyDirectory(Directory):
    """A directory whose files are opened for reading only."""

    has_changed = False
    """True once a file was removed between listing the names and opening the file."""

    @classmethod
    def at(cls, path: str) -> _ReadOnlyDirectory:
        """Open the directory at *path*, without its lock."""
        directory = cls._open(path.rstrip("/") or "/", create=False)
        assert isinstance(directory, cls)
        return directory

    def names(self) -> list[str]:
        """Return the names of all entries, without unfinished copies."""
        return [name for name in super().names() if not is_temporary(name)]

    def open(self, name: str, flags: int = 0) -> int:
        """Open a regular file for reading, and return its descriptor."""
        try:
            descriptor = os.open(name, _FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            self.has_changed = self.has_changed or name.endswith(".seg")
            raise
        except OSError as error:
            raise with_path(error, self.full_path(name)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            close_descriptor(descriptor)
            raise self._irregular(name)
        return descriptor

    def set_aside(self, name: str) -> str:
        """Return the name of a file that the disk cannot read."""
        return name

    def owner(self) -> int | None:
        """Return the process that holds the lock; None if there is none, or if /proc does not show it."""
        try:
            with open("/proc/locks") as locks:
                lines = locks.readlines()
        except OSError:
            return None
        # The file may have been removed, and some file systems lock no directory.
        for status in filter(None, (self.stat(_LOCK), os.fstat(self._fd))):
            for line in lines:
                # "1: FLOCK ADVISORY WRITE 1234 fe:01:2162998 0 EOF"
                _, kind, _, _, pid, file, *_ = [*line.split(), *[""] * 6]
                if kind != "FLOCK" or not file.endswith(f":{status.st_ino}"):
                    continue
                major, minor, _ = file.split(":")
                # Some file systems show another device number here than stat() does.
                if os.makedev(int(major, 16), int(minor, 16)) == status.st_dev or _has_open(int(pid), status):
                    return int(pid)
        return None


class SegmentSummary(NamedTuple):
    """The numbers of a segment."""

    name: str
    first: int
    """The first sequence number."""
    last: int
    """The last sequence number."""
    undelivered: int
    """Readable records that are not known to be delivered."""
    damaged: int
    """Undelivered records that are lost."""
    size: int
    """Bytes of the file."""


class FolderView:
    """A snapshot of a folder of segments. A context manager, which closes the files.

    :param path: the path of the folder.
    :raises FileNotFoundError: the folder does not exist.
    :raises SpoolError: a link, a file, a spool of an earlier version, or a folder of another user.
    :raises OSError: another failure. Nothing stays open.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[str] = []
        """Files that cannot be read, with the reasons."""
        self.cursor = 0
        """The sequence number up to which all frames are delivered."""
        self.segments: list[Segment] = []
        self._directory = _ReadOnlyDirectory.at(path)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        for attempt in range(_ATTEMPTS):
            self._close_segments()
            self.problems.clear()
            self._directory.has_changed = False
            load(self._directory, self.segments, self.problems)
            if not self._directory.has_changed or attempt == _ATTEMPTS - 1:
                break
        # After the segments: a record up to the cursor is delivered, in whichever segment it is.
        for _ in range(_ATTEMPTS):
            cursor = Cursor()
            cursor.load(self._directory)
            cursor.close()
            self.cursor = cursor.seq
            # A live process may write the record at this moment.
            if self.cursor or self._directory.stat(Cursor.NAME) is None:
                break

    @property
    def is_spool(self) -> bool:
        """True if the folder has a lock file or segments."""
        return bool(self.segments) or self._directory.stat(_LOCK) is not None

    @property
    def owner(self) -> int | None:
        """The live process that has locked the folder, as far as /proc shows; None for none."""
        return self._directory.owner()

    def read(self, segment: Segment) -> Iterator[Part]:
        """Yield the undelivered frames of a segment, in pieces."""
        after = max(self.cursor, segment.first - 1)
        while after < segment.last:
            part = read_segment(self._directory, segment, after, _PIECE, lambda *region: None)
            if isinstance(part.error, FileNotFoundError):
                # The segment was closed to save a descriptor, and has been delivered and removed meanwhile.
                return
            yield part
            after = part.last

    def summary(self, segment: Segment) -> SegmentSummary:
        """Return the numbers of a segment. Reads its undelivered frames."""
        undelivered = damaged = 0
        for part in self.read(segment):
            undelivered += len(part.frames)
            damaged += part.damaged
        return SegmentSummary(segment.name, segment.first, segment.last, undelivered, damaged, segment.file_size)

    def close(self) -> None:
        """Close all files. Idempotent."""
        self._close_segments()
        self._directory.close()

    def _close_segments(self) -> None:
        for segment in self.segments:
            segment.close()
        self.segments.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _has_open(pid: int, status: os.stat_result) -> bool:
    """Return True if the process has the file open, as far as this user may see."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_is_same(entry, status) for entry in entries)
    except OSError:
        return False


def _is_same(entry: os.DirEntry[str], status: os.stat_result) -> bool:
    try:
        return os.path.samestat(entry.stat(), status)
    except OSError:
        return False
