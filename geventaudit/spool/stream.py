"""The numbers of the records of one client in one process, and the progress of their delivery."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

from gevent.queue import Queue

__all__ = ["Entry", "Memory", "Stream"]


class Stream:
    """Consecutively numbered records, and the settled ones among them: delivered, dropped or handed back.

    Records are settled in the order of their numbers, except for the few that the quarantine sends ahead.

    :param before: the number before that of the first record.
    """

    __slots__ = ("_ahead", "dropped", "settled", "taken")

    def __init__(self, before: int = 0) -> None:
        self.taken = before
        """The number of the last record that the window took."""
        self.settled = before
        """All records up to this number are settled."""
        self.dropped = 0
        """Records that were given up: rejected, or lost on disk."""
        self._ahead: list[tuple[int, int]] = []

    def settle(self, first: int, last: int) -> None:
        """Note that the records *first* to *last* are settled."""
        if first > self.settled + 1:
            self._ahead.append((first, last))
            return
        self.settled = max(self.settled, last)
        while ahead := [each for each in self._ahead if each[0] <= self.settled + 1]:
            self._ahead = [each for each in self._ahead if each[0] > self.settled + 1]
            self.settled = max(self.settled, *(last for _, last in ahead))


Entry: TypeAlias = tuple[Stream, int, bytes]
"""A record in the window: its stream, its number there, and its frame."""


class Memory(NamedTuple):
    """The frames of this run in the outbox. The store only reads them."""

    stream: Stream
    window: deque[Entry]
    queue: Queue[bytes]
