"""Segments of earlier runs, segments that are closed to save descriptors, and those with a failed append or sync."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .directory import Directory, is_temporary
from .format import OVERHEAD, make_torn, new_magic, parse_name
from .segment import Part, Segment, Sink

__all__ = [
    "MAX_OPEN", "TRANSIENT", "Check", "Read", "is_cut_back", "load", "mark_end", "park_if_many",
    "read_segment", "remove", "rewrite",
]  # fmt: skip

MAX_OPEN = 64
"""The segments of a folder that are kept open."""

_PIECE = 1 << 20
TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM)


@dataclass(slots=True)
class Check:
    """Changes of other programs to the files, as found by :meth:`.Folder.check`."""

    restored: int = 0
    """Segments that were removed or replaced, and copied back."""
    missing: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of sequence numbers, both ends included, whose frames were cut off before they were delivered."""
    problems: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.restored or self.missing or self.problems)


@dataclass(slots=True)
class Read:
    """The result of :meth:`.Folder.read`."""

    frames: list[tuple[int, bytes]] = field(default_factory=list)
    """Frames by sequence number, in order."""
    damaged: int = 0
    """Frames that are lost, among those up to ``last``."""
    last: int = 0
    """The sequence number up to which the folder is read."""
    problems: list[str] = field(default_factory=list)


def load(
    directory: Directory, segments: list[Segment], problems: list[str], counts: Mapping[bytes, int] | None = None
) -> int:
    """Open the segments of earlier runs, in order, and return the highest sequence number that may be in use.

    Files that are not segments or cannot be read are left alone and reported in *problems*.

    :param segments: is filled one by one, so that the caller can close them after an error.
    :param counts: numbers of frames, by magic, where they are known.
    """
    highest = 0
    changed: dict[str, int] = {}
    for name in directory.names():
        try:
            if is_temporary(name):
                directory.unlink(name)
            elif name.endswith(".seg"):
                segment, last = Segment.load(directory, name, counts or {})
                segments.append(segment)
                changed[name] = os.fstat(segment.fd).st_mtime_ns
                highest = max(highest, last)
        except OSError as error:
            highest = max(highest, _leave_alone(directory, name, error, problems))
        park_if_many(directory, segments)
    segments.sort(key=lambda segment: (segment.first, changed.get(segment.name, 0), segment.name))
    for at, segment in enumerate(segments):
        # A segment of the same magic is a copy.
        for later in (other for other in segments[at + 1 :] if other.magic != segment.magic):
            segment.end_before(later)
            if later.known:
                break
    return highest


def park_if_many(directory: Directory, segments: Sequence[Segment]) -> None:
    """Close the last segment to save its descriptor if very many are open."""
    if len(segments) > MAX_OPEN and not segments[-1].is_parked:
        segments[-1].park(directory)


def _leave_alone(directory: Directory, name: str, error: OSError, problems: list[str]) -> int:
    """Report a file that is not a segment or cannot be read. Return its highest possible sequence number.

    :raises OSError: *error*, if a later attempt may succeed, as over a network.
    """
    parsed, status = parse_name(name), directory.stat(name)
    path = _printable(directory.full_path(name))
    if error.errno in _UNREADABLE:  # renamed, since it would be removed when later records are delivered
        path = _printable(directory.full_path(directory.set_aside(name)))
    elif error.errno not in (errno.EINVAL, errno.ENOENT):  # not a segment; removed meanwhile
        raise error
    problems.append(f"{path} is left alone: {error.strerror}")
    return parsed[0] + status.st_size // OVERHEAD if parsed and status else 0


def read_segment(
    directory: Directory, segment: Segment, after: int, max_bytes: int, sink: Sink, *, skips: bool = True
) -> Part:
    """Read a segment that may be parked (see :meth:`.Segment.read`)."""
    if not segment.is_parked:
        return segment.read(after, max_bytes, sink, skips=skips)
    try:
        segment.unpark(directory)
    except OSError as error:
        if error.errno in TRANSIENT:
            raise
        return Part(damaged=segment.last - after, last=segment.last, error=error)
    try:
        return segment.read(after, max_bytes, sink, skips=skips)
    finally:
        segment.park(directory)


def _printable(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()


def remove(directory: Directory, segment: Segment) -> None:
    """Remove the file of a segment, unless another file has its name, and close it.

    A file that the disk could not read to its end gets another name.

    :raises OSError: the segment stays open.
    """
    if segment.is_in_place(directory):
        if segment.is_unreadable:
            directory.set_aside(segment.name)
        else:
            directory.unlink(segment.name)
    segment.close()


def rewrite(directory: Directory, segment: Segment, cursor: int, *, durable: bool) -> list[Segment]:
    """Copy the frames of a segment after the sequence number *cursor* to a new one.

    :returns: the new segment, or nothing if the segment has no such frames.
    :raises OSError: nothing is left of the copy.
    """
    after = max(cursor, segment.first - 1)
    if segment.last <= after:
        return []
    # An incomplete copy must not look like a segment.
    copy = Segment.create(directory, new_magic(), after + 1, is_temporary=True)
    try:
        while after < segment.last:
            part = segment.read(after, _PIECE)
            if part.error is not None:
                raise part.error
            if part.frames:
                copy.write_frames(part.frames)
            after = part.last
        # Frames that are lost at the end count as damaged when the copy is read.
        copy.count = max(copy.count, segment.last + 1 - copy.first)
        if durable:
            os.fdatasync(copy.fd)
        copy.publish(directory)
        if durable:
            directory.sync()
    except BaseException:
        try:
            remove(directory, copy)
        except OSError:
            copy.close()
        raise
    return [copy]


def is_cut_back(segment: Segment, *, durable: bool) -> bool:
    """Remove the bytes of a failed append. Return False if that is impossible."""
    try:
        os.ftruncate(segment.fd, segment.end)
        if durable:
            os.fdatasync(segment.fd)
    except OSError:
        return False
    segment.file_size = segment.end
    return True


def mark_end(directory: Directory, segment: Segment, *, durable: bool) -> None:
    """Mark the end of a segment for later runs: by its name, else by a torn frame. Best effort."""
    try:
        size = os.fstat(segment.fd).st_size
        segment.file_size = max(size, segment.end)
        if size > segment.end and is_cut_back(segment, durable=durable):
            return
        if not segment.is_in_place(directory):
            return
        name = f"{segment.name.split('.', 1)[0]}.{segment.count}.seg"
        try:
            directory.rename(segment.name, name)
            segment.name = name
            if durable:
                directory.sync()
        except OSError:
            os.pwrite(segment.fd, make_torn(segment.magic, segment.count, size - segment.end), segment.end)
    except OSError:
        pass
