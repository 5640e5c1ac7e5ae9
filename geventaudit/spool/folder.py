"""A folder of segments that this process has locked.

=====================================  ===============================================================================
file                                   holds
=====================================  ===============================================================================
``lock``                               nothing; the owner of the folder holds its ``flock``
``cursor``                             the sequence number up to which all frames are delivered
``{first}-{magic}.seg``                frames (see :mod:`.segment`); the names give the order
``rejected.jsonl, rejected.1.jsonl``   frames that the agent did not take, one JSON object a line
``damaged.bin, damaged.1.bin``         unreadable regions of segments: a line of JSON, the bytes, a line feed
=====================================  ===============================================================================

All methods block and belong to one native thread, but for :meth:`Folder.prepare` and :meth:`Folder.without_held`.
Segments of earlier runs are read and removed, never appended to. One segment at a time, the *current* one, takes
appends. Segments stay open, so that a removed or replaced file can be copied back. Only if there are very many, the
newest are closed, except for the current one, until they are read.

After a failed append, the segment is truncated to its size before. If that is impossible, or if a sync fails, the
segment is abandoned: its undelivered frames go to a new file, without those of the failed append.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from ..errors import SpoolError
from .directory import Directory, orphans, with_path, write_all
from .format import Append, encode, new_magic
from .recovery import Check, Read, is_cut_back, load, mark_end, park_if_many, read_segment, remove, rewrite
from .segment import Segment
from .sidefiles import Cursor, RotatingPair, damaged_entry, rejected_entry

__all__ = ["SEGMENT_BYTES", "Check", "Folder", "Read", "orphans"]

SEGMENT_BYTES = 8 << 20
"""A segment takes no more frames once it has this size, or an eighth of ``max_bytes``."""

_SYNC_BYTES = 4 << 20


class Folder:
    """A folder of segments.

    :param path: the path of the folder. Its parent must exist.
    :param synchronous: ``FULL`` syncs each append, ``NORMAL`` every 4 MiB and each finished segment, ``OFF`` never.
    :param segment_bytes: a segment takes no more frames once it has this size.
    """

    def __init__(self, path: str, synchronous: str = "NORMAL", segment_bytes: int = SEGMENT_BYTES) -> None:
        # The working directory may change.
        self.path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self.problems: list[str] = []
        """Files that were left alone when the folder was opened, with the reasons."""
        self.last_seq = 0
        """The highest sequence number that is or was in use; 0 for none."""
        self._synchronous = synchronous
        self._segment_bytes = segment_bytes
        self._directory: Directory | None = None
        self._cursor = Cursor()
        self._segments: list[Segment] = []
        self._current: Segment | None = None
        self._has_failed = False  # an append to the current segment: it takes no more frames
        self._unsynced = 0
        self.changes = Check()
        """The changes that the next :meth:`check` returns: those found by a failed one."""
        self._rejected = RotatingPair("rejected", "jsonl")
        self._damaged = RotatingPair("damaged", "bin")

    def open(self, create: bool = True) -> None:
        """Claim the folder and open the segments of earlier runs.

        :param create: make the folder if it is missing.
        :raises FileNotFoundError: it is missing, and *create* is False.
        :raises SpoolError: another process or user has the folder, it is a link or a file, or has no parent.
        :raises OSError: another failure. Nothing stays open.
        """
        if self._directory is not None:
            raise SpoolError(f"the spool {self.path} is open already; close it first")
        self._directory = Directory.claim(self.path, create=create)
        try:
            if self._synchronous == "FULL":
                self._directory.sync_parent()
            self._cursor.load(self._directory)
            self._load(self._directory)
        except BaseException:
            self.leave()
            raise

    def _load(self, directory: Directory) -> None:
        last = load(directory, self._segments, self.problems, self._cursor.counts)
        self.last_seq = max(last, self._cursor.seq)
        try:
            self._drop_delivered(directory)
        except OSError as error:
            self.problems.append(f"a delivered segment of {self.path} cannot be removed: {error.strerror}")

    @property
    def is_open(self) -> bool:
        """True while the folder is claimed."""
        return self._directory is not None

    @property
    def is_in_place(self) -> bool:
        """True while the folder is open and still at its path."""
        return self._directory is not None and self._directory.is_at_path()

    @property
    def cursor(self) -> int:
        """The sequence number up to which all frames are delivered."""
        return self._cursor.seq

    @property
    def count(self) -> int:
        """The number of undelivered frames, lost ones included until :meth:`advance` passes them."""
        return sum(segment.undelivered(self._cursor.seq)[0] for segment in self._segments)

    @property
    def undelivered_bytes(self) -> int:
        """The approximate bytes of the undelivered frames, with OVERHEAD for each."""
        return sum(segment.undelivered(self._cursor.seq)[1] for segment in self._segments)

    def without_held(self, numbered: Mapping[int, bytes]) -> list[tuple[int, bytes]]:
        """Return the frames that no segment has, sorted by number. Thread-safe: the disk may not answer."""
        segments = self._segments.copy()
        firsts = [-1, *(segment.first for segment in segments)]
        lasts = [-1, *(segment.last for segment in segments)]
        return [each for each in sorted(numbered.items()) if each[0] > lasts[bisect_right(firsts, each[0]) - 1]]

    def prepare(self, first: int, frames: Sequence[bytes]) -> Append:
        """Encode *frames*, which are numbered from *first*, for the current segment, or for a new one.

        In the hub, so that the disk thread only writes, and while that thread is idle. The next change of a segment
        must be the :meth:`append` of the result.
        """
        segment = self._current
        if segment is None or self._has_failed or first != segment.last + 1 or segment.end >= self._segment_bytes:
            return Append(first, magic := new_magic(), encode(magic, 0, frames), frames)
        return Append(first, segment.magic, encode(segment.magic, segment.count, frames), frames)

    def append(self, append: Append) -> None:
        """Append the frames of :meth:`prepare`: all of them, or none.

        :raises OSError: nothing is appended.
        """
        directory, segment = self._claimed(), self._current
        if segment is not None and segment.magic == append.magic:
            self._write(directory, segment, append, is_new=False)
            return
        self._finish()
        segment = Segment.create(directory, append.magic, append.first)
        self._write(directory, segment, append, is_new=True)
        self._current = segment

    def insert(self, append: Append) -> None:
        """Write frames, which may be older than others, to a new segment. No other frame has one of their numbers.

        :raises OSError: nothing is written.
        """
        directory = self._claimed()
        segment = Segment.create(directory, append.magic, append.first)
        self._write(directory, segment, append, is_new=True, syncs=self._synchronous != "OFF")

    def _write(
        self, directory: Directory, segment: Segment, append: Append, *, is_new: bool, syncs: bool = False
    ) -> None:
        """Write frames at the end of a segment, and add a new one to the list.

        :param syncs: True to sync, whatever is due for an append.
        """
        is_written = False
        data, offset = ([segment.header, append.data], 0) if is_new else ([append.data], segment.end)
        try:
            write_all(segment.fd, data, offset)
            is_written = True
            self._sync(directory, segment, is_new, len(append.data), syncs)
            if is_new:
                self._segments.insert(bisect_right([each.first for each in self._segments], segment.first), segment)
            segment.extend(len(append.frames), len(append.data))
        except BaseException as error:
            self._has_failed |= not is_new
            # After a failed sync, the state of the file is uncertain.
            if is_new or is_written or not is_cut_back(segment, durable=self._synchronous == "FULL"):
                self._abandon(segment)
            raise with_path(error, directory.full_path(segment.name)) from None
        self.last_seq = max(self.last_seq, segment.last)

    def _sync(self, directory: Directory, segment: Segment, is_new: bool, size: int, is_due: bool) -> None:
        self._unsynced += size
        if is_due or self._synchronous == "FULL":
            os.fdatasync(segment.fd)
            if is_new:
                directory.sync()
        elif self._synchronous == "NORMAL" and self._unsynced >= _SYNC_BYTES:
            os.fdatasync(segment.fd)
            directory.sync()
            self._unsynced = 0

    def _finish(self) -> None:
        """Sync the current segment and end it.

        :raises OSError: the sync failed. The frames are in another file, if possible.
        """
        segment = self._current
        if segment is not None and self._synchronous == "NORMAL" and self._unsynced:
            try:
                os.fdatasync(segment.fd)
                self._claimed().sync()
            except OSError as error:
                self._abandon(segment)
                raise with_path(error, self._claimed().full_path(segment.name)) from None
        if segment is not None:
            park_if_many(self._claimed(), self._segments)
        self._end_current()

    def _end_current(self) -> None:
        self._current = None
        self._has_failed = False
        self._unsynced = 0

    def _abandon(self, segment: Segment) -> None:
        """Move the undelivered frames of a segment to a new file, without those of a failed append.

        If the move fails, the old file stays, and gets a name that says where its frames end. Never raises an OSError.
        """
        directory = self._claimed()
        is_full = self._synchronous == "FULL"
        if segment is self._current:
            self._end_current()
        try:
            copies = rewrite(directory, segment, self._cursor.seq, durable=self._synchronous != "OFF")
        except OSError:
            mark_end(directory, segment, durable=is_full)
            if not segment.count:
                segment.close()
            return
        at = self._segments.index(segment) if segment in self._segments else len(self._segments)
        self._segments[at : at + 1] = copies
        try:
            remove(directory, segment)
            if is_full:
                directory.sync()
        except OSError:
            mark_end(directory, segment, durable=is_full)
            segment.close()

    def check(self) -> Check:
        """Compare the open segments with the files in the folder, and undo changes of other programs.

        A removed or replaced file is copied back. The folder, its lock and the cursor are made anew. Frames that were
        cut off are lost. After a true result, start a new segment.

        :raises OSError: some files are not restored; the next call tries again, and returns the results of both.
        """
        if not self._claimed().is_in_place():
            self._reclaim()
        directory = self._claimed()
        errors: list[OSError] = []
        try:
            if self._cursor.restore(directory):
                self.changes.problems.append(f"{directory.full_path(Cursor.NAME)} was changed; it is written anew")
        except OSError as error:
            errors.append(error)
        for segment in self._segments.copy():
            try:
                self._check_segment(directory, segment)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        result, self.changes = self.changes, Check()
        return result

    def _reclaim(self) -> None:
        """Lock the folder that is at the path now, or make one."""
        directory = self._claimed()
        try:
            if not (directory.is_at_path() and directory.take_lock()):  # else only the file ``lock`` was removed
                directory = Directory.claim(self.path, create=True)
        except SpoolError as error:
            raise OSError(errno.EBUSY, f"the spool was removed or replaced, and cannot be restored: {error}") from error
        if directory is not self._claimed():
            self._replace_directory(directory)
        self.changes.problems.append(f"the spool {self.path} or its lock was removed or replaced; it is made anew")

    def _replace_directory(self, directory: Directory) -> None:
        own = {segment.name for segment in self._segments}
        if not directory.is_new and any(name.endswith(".seg") and name not in own for name in directory.names()):
            directory.close()
            raise OSError(
                errno.EBUSY, f"the spool {self.path} was replaced, and has records of another client; move it"
            )
        self._claimed().close()
        self._directory = directory
        if self._synchronous == "FULL":
            directory.sync_parent()

    def _check_segment(self, directory: Directory, segment: Segment) -> None:
        path = directory.full_path(segment.name)
        if segment.is_parked:
            if not segment.is_in_place(directory):
                self.changes.problems.append(f"{path} was removed or replaced; keep other programs away")
                self.changes.missing.append((max(segment.first, self._cursor.seq + 1), segment.last))
                self._segments.remove(segment)
            return
        size = os.fstat(segment.fd).st_size
        if size < segment.end:
            self.changes.problems.append(f"{path} was cut from {segment.end} to {size} bytes; keep other programs away")
            last = segment.last
            segment.shrink(size)
            lost = max(segment.last, self._cursor.seq) + 1
            if lost <= last:
                self.changes.missing.append((lost, last))
            if segment is self._current:
                self._finish()
            if not segment.count or segment.last <= self._cursor.seq:
                remove(directory, segment)
                self._segments.remove(segment)
                return
        elif size > segment.file_size:
            self.changes.problems.append(f"{path} was appended to by another program; keep other programs away")
            segment.file_size = size
            if segment is self._current:
                self._finish()
        if not segment.is_in_place(directory):
            is_durable = self._synchronous != "OFF"
            segment.replace(directory.copy(segment.fd, segment.end, segment.name, durable=is_durable), segment.end)
            self.changes.restored += 1

    def read(self, after: int, max_bytes: int, *, skips: bool = True) -> Read:
        """Read the undelivered frames after the sequence number *after*, oldest first.

        :param max_bytes: about how many to read; at least one frame is read if there is any.
        :param skips: True to read on behind pages that the disk cannot read; False to raise its error.
        :returns: frames and losses. The losses are counted again if the same range is read again.
        :raises OSError: no file can be opened; without *skips*, the disk cannot read the first frame.
        """
        directory = self._claimed()
        result = Read(last=max(after, self._cursor.seq))

        def save(segment: Segment, start: int, end: int) -> None:
            try:
                entry = damaged_entry(segment.name, segment.fd, start, end)
                self._damaged.append(directory, entry)
            except OSError as error:
                result.problems.append(f"{directory.full_path(segment.name)}: damage is not saved: {error.strerror}")

        for segment in self._segments:
            if segment.last <= result.last:
                continue
            after = max(result.last, segment.first - 1)
            was_unreadable = segment.is_unreadable
            try:
                part = read_segment(directory, segment, after, max_bytes, save, skips=skips)
            except OSError:
                if not result.frames:
                    raise
                break
            result.frames += part.frames
            result.damaged += part.damaged
            result.last = part.last
            if part.error is not None:
                path = directory.full_path(segment.name)
                result.problems.append(f"{path} is unreadable: {part.error.strerror}; check the disk")
            elif segment.is_unreadable > was_unreadable:
                path = directory.full_path(segment.name)
                result.problems.append(f"{path} is unreadable in part; check the disk")
            max_bytes -= part.size
            if max_bytes <= 0 or (part.last < segment.last and not skips):
                break
        return result

    def read_detached(self) -> Read:
        """Read the undelivered frames of all segments that are not in the folder any more."""
        directory = self._claimed()
        result = Read(last=self._cursor.seq)
        for segment in self._segments:
            if segment.is_parked or (self.is_in_place and segment.is_in_place(directory)):
                continue
            part = segment.read(max(self._cursor.seq, segment.first - 1), segment.end)
            result.frames += part.frames
            result.damaged += part.damaged
        return result

    def advance(self, seq: int) -> bool:
        """Note that all frames up to *seq* are delivered, and remove the segments that have no others.

        The cursor is written first: the numbers of removed segments must not be used again after a crash.

        :returns: True if there are any.
        :raises OSError: the next call tries again.
        """
        directory = self._claimed()
        self._cursor.seq = max(self._cursor.seq, seq)
        self.last_seq = max(self.last_seq, seq)
        try:
            self._cursor.write(directory)
        except OSError:
            # The disk may be full until the segments are removed.
            pass
        before = len(self._segments)
        self._drop_delivered(directory)
        self._cursor.write(directory)
        return len(self._segments) < before

    def _drop_delivered(self, directory: Directory) -> None:
        errors: list[OSError] = []
        for segment in self._segments.copy():
            if segment.count and segment.last > self._cursor.seq:
                continue
            try:
                remove(directory, segment)
            except OSError as error:
                errors.append(error)
                continue
            self._segments.remove(segment)
            if segment is self._current:
                self._end_current()
        if errors:
            raise errors[0]

    def reject(self, frame: bytes, reason: str) -> None:
        """Append a frame to the rejected ones; a frame that is too long for the file is cut.

        :raises OSError: the frame is not written.
        """
        self._rejected.append(self._claimed(), rejected_entry(frame, reason))

    def close(self, remove_if_empty: bool = False, *, notes_counts: bool = False) -> None:
        """Write the cursor, close all files and release the lock. Idempotent, never raises an OSError.

        :param notes_counts: write beside the cursor how many frames each segment has: whatever is damaged later, the
            loss is known.
        :param remove_if_empty: remove the folder too if it holds no segment, no rejected and no damaged data.
        """
        directory = self._directory
        if directory is None:
            return
        try:
            self._cursor.write(directory)
        except OSError:
            pass
        try:
            self._finish()
            if notes_counts and self._segments:
                self._cursor.write_counts(directory, ((each.magic, each.count) for each in self._segments))
        except OSError:
            pass
        try:
            if remove_if_empty and not self._segments and directory.is_in_place():
                names = directory.names()
                if not set(names) - {"lock", Cursor.NAME}:
                    directory.unlink(Cursor.NAME)
                    directory.remove()
        except OSError:
            pass
        self.leave()

    def leave(self) -> None:
        """Close all descriptors, without any other change. For a forked child. Idempotent, never raises."""
        for segment in self._segments:
            segment.close()
        self._segments = []
        self._cursor.close()
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.close()
        self._end_current()
        self._cursor = Cursor()
        self.changes = Check()
        self.problems = []

    def _claimed(self) -> Directory:
        if self._directory is None:
            raise SpoolError(f"the spool {self.path} is closed; open it first")
        return self._directory
