"""The last number of a stream, and the key of its next record, in plain Python.

``Chain`` of ``geventaudit/encoder/_fast.pyx`` is the same in C. The compiled gate reads and advances that one itself.
"""

from __future__ import annotations

import hashlib
from binascii import hexlify
from typing import NamedTuple

from ..encoder.draft import Draft
from ..encoder.encoding import OPTION_BYTES
from .canonical import canonical_digest
from .secret import Secret
from .stamp import StampLayout

__all__ = ["Chain"]


class _State(NamedTuple):
    number: int
    key: Secret | None


class Chain:
    """The numbers and keys of one stream.

    :param stream: its name.
    :param key: of the first record; None without a seal.
    """

    def __init__(self, stream: str, key: Secret | None) -> None:
        self.is_busy = False
        """True while a record gets its number."""
        self.state = _State(0, key)
        """The last number that was given, and the key of the next record. Set it to :meth:`following`, or back."""
        self.digest = hashlib.sha256()
        """SHA-256 over the h of all records."""
        self._layout = StampLayout(stream, is_sealed=key is not None)

    @property
    def number(self) -> int:
        """The last number that was given."""
        return self.state.number

    def frame_of(self, draft: Draft) -> tuple[bytes, bytes]:
        """Return the frame of the next record, and its h; h is empty without a seal. Changes nothing."""
        frame = self._layout.frame_of(draft, self.state.number + 1)
        key = self.state.key
        if key is None:
            return frame, b""
        digest = canonical_digest(frame[draft.body : -OPTION_BYTES])
        at = self._layout.place_of_mac(draft)
        return b"".join((frame[:at], hexlify(key.mac(digest)), frame[at + 64 :])), digest

    def following(self) -> _State:
        """Return the state after the next record."""
        key = self.state.key
        return _State(self.state.number + 1, None if key is None else key.evolve())

    def forget(self) -> None:
        """Drop the key."""
        self.state = _State(0, None)
