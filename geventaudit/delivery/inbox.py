"""Frames that other native threads hand over to a client's hub, without a lock.

A thread appends an entry and wakes the hub; the hub moves entries to the queue. The client closes the inbox before it
takes the entries for the last time. So a thread checks ``is_closed`` after its append. If it can still claim its own
entry, the record is refused; if not, the hub has the record.
"""

from __future__ import annotations

from collections import deque

from ..errors import ClientClosedError
from ..runtime.copying import copied

__all__ = ["HandedOver", "Inbox"]


class HandedOver:
    """A frame, and the claim on it."""

    __slots__ = ("_claims", "frame")

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self._claims: dict[str, str] = {}

    def claim(self, claimant: str) -> bool:
        """Return True if *claimant* is the first to claim this entry. The same claimant may ask again."""
        # setdefault is atomic, since the key is text.
        return self._claims.setdefault("owner", claimant) == claimant

    def is_claimed_by(self, claimant: str) -> bool:
        """Return True if *claimant* was the first."""
        return self._claims.get("owner") == claimant


class Inbox:
    """The entries of one client, oldest first."""

    def __init__(self) -> None:
        self.entries: deque[HandedOver] = deque()
        self.is_closed = False

    def __len__(self) -> int:
        return len(self.entries)

    def put(self, frame: bytes) -> HandedOver:
        """Hand over *frame*, and return its entry. Thread-safe.

        :raises ClientClosedError: the inbox was closed, and nothing was accepted.
        """
        entry = HandedOver(frame)
        self.entries.append(entry)
        if self.is_closed and self.withdraw(entry):
            raise ClientClosedError("the client is closed")
        return entry

    def withdraw(self, entry: HandedOver) -> bool:
        """Take *entry* back. Return False if the client has its frame already. For the thread of :meth:`put`."""
        if not entry.claim("thread"):
            return False
        self.remove(entry)
        return True

    def remove(self, entry: HandedOver) -> None:
        """Remove *entry* if it is still there. An entry equals only itself."""
        try:
            self.entries.remove(entry)
        except ValueError:
            pass

    def claim_all(self) -> list[bytes]:
        """Return the frames of all entries. For the client, after it has closed the inbox; it removes them later."""
        return [entry.frame for entry in copied(self.entries) if entry.claim("hub")]

    def take_all(self) -> list[bytes]:
        """Return the frames of all entries, and remove them. For the client, which has closed the inbox."""
        frames = self.claim_all()
        self.remove_claimed()
        return frames

    def remove_claimed(self) -> None:
        """Remove the entries that :meth:`claim_all` has claimed."""
        for entry in copied(self.entries):
            if entry.is_claimed_by("hub"):
                self.remove(entry)
