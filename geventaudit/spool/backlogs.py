"""All records on disk that one client has to send: of dead processes, of earlier runs, of this run."""

from __future__ import annotations

from collections.abc import Iterable

from ..stats import Counters
from .backlog import Backlog
from .folder import Check, Folder
from .stream import Entry, Stream

__all__ = ["Backlogs"]


class Backlogs:
    """The backlogs of one client, and their folders.

    :param folder: the folder of this process.
    """

    def __init__(self, folder: Folder, counters: Counters) -> None:
        self.folder = folder
        self._counters = counters
        self.own: Backlog | None = None
        """The records that this run wrote; None while the folder is not open."""
        self.earlier: list[Backlog] = []
        """Earlier records, oldest first."""
        self.orphans: list[Folder] = []
        """The folders of dead processes that the disk thread has opened."""
        self.unsaved: dict[int, bytes] = {}
        """Frames to be written again, by number on disk: their file was damaged."""

    def all(self) -> list[Backlog]:
        """Return the backlogs, oldest first."""
        return [*self.earlier, self.own] if self.own is not None else self.earlier

    def with_earlier(self, folders: Iterable[Folder]) -> tuple[list[Backlog], int]:
        """Return the earlier backlogs with those of *folders*, and the number of records in these."""
        counted = [(folder, count) for folder in folders if (count := folder.count)]
        added = [
            Backlog(folder, Stream(folder.cursor), self._counters, base=0, last=folder.last_seq, count=count)
            for folder, count in counted
        ]
        return [*self.earlier, *added], sum(count for _, count in counted)

    def own_of(self, stream: Stream) -> Backlog:
        """Return the backlog of this run. Its folder is open now."""
        last = self.folder.last_seq
        return Backlog(self.folder, stream, self._counters, base=last, last=last, count=0)

    def advances(self) -> list[tuple[Backlog, int]]:
        """Return the backlogs with deliveries that their folders do not know, and the numbers of the last settled ones.

        The numbers of this run are higher than those of an earlier run in the same folder, which come first.
        """
        advances = []
        open_folders: list[Folder] = []
        for backlog in self.all():
            if backlog.is_advance_due and backlog.folder not in open_folders:
                advances.append((backlog, backlog.settled_on_disk))
            if not backlog.is_finished:
                open_folders.append(backlog.folder)
        return advances

    def finished(self, advances: Iterable[tuple[Backlog, int]]) -> list[Backlog]:
        """Return the earlier backlogs without unsettled records, as their folders know after *advances*."""
        known = [backlog for backlog, _ in advances]
        return [each for each in self.earlier if each.is_finished and (each in known or not each.is_advance_due)]

    def take_damage(self, check: Check, window: Iterable[Entry]) -> int:
        """Note that frames were cut off. Those in memory become unsaved. Return the number of lost ones."""
        lost = 0
        for first, last in check.missing:
            for backlog in self._in_own_folder():
                low, high = max(first, backlog.settled_on_disk + 1), min(last, backlog.last)
                self.unsaved.update(backlog.in_memory(low, high, window))
                # Numbers up to read_up_to belong to records that are in memory, settled, or lost already.
                gone = max(high - max(low - 1, backlog.read_up_to), 0)
                backlog.note_lost(gone)
                lost += gone
        return lost

    def take_unsaved(self) -> list[tuple[int, bytes]]:
        """Return the frames to write again, oldest first."""
        for number in list(self.unsaved):
            if number <= self._settled():
                del self.unsaved[number]
        return sorted(self.unsaved.items())

    def remains(self, entries: Iterable[Entry]) -> tuple[dict[int, bytes], list[tuple[int, int]]]:
        """Return the records in the folder of this process: those in memory, and the ranges of all others.

        All numbers are those on disk.

        :param entries: the records that the outbox held.
        """
        entries = list(entries)
        memory: dict[int, bytes] = {}
        unread = []
        for backlog in self._in_own_folder():
            memory.update(backlog.in_memory(1, backlog.last, entries))
            unread.append((backlog.read_up_to + 1, backlog.last))
        if self.own is not None:
            own = self.own
            memory.update((number + own.base, frame) for stream, number, frame in entries if stream is own.stream)
        return memory, unread

    def unsaved_frames(self, entries: Iterable[Entry]) -> list[bytes]:
        """Return the frames that are in memory only, of those that the outbox held and the ones to write again."""
        if self.own is None:
            return [frame for _, _, frame in entries]
        memory, _ = self.remains(entries)
        return [frame for _, frame in self.folder.without_held(memory)]

    def _in_own_folder(self) -> list[Backlog]:
        return [each for each in self.all() if each.folder is self.folder]

    def _settled(self) -> int:
        return next((each.settled_on_disk for each in self._in_own_folder() if not each.is_finished), 0)
