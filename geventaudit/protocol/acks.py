"""Acknowledgements of the Forward protocol: what was written and what the agent said of it. Pure: no I/O, no clock.

Frames of one tag that are written together share one message, with a ``chunk`` in its option that is used once; the
agent answers ``{"ack": chunk}`` when it has taken them. Delivered is what is acknowledged from the first frame on
without a gap. Acknowledgements that are unknown, doubled or out of order change nothing else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

from ..encoder.encoding import bundle, pack, tag_bytes
from .decoding import AckDecoder

__all__ = ["AckWindow", "ack_of"]


class AckWindow:
    """The acknowledgements of one connection.

    :param batch_records: frames that may share a message.
    """

    def __init__(self, batch_records: int) -> None:
        self._batch_records = batch_records
        self._prefix = os.urandom(9).hex()
        self._count = 0
        self._open: deque[tuple[str, int, float]] = deque()  # chunk, frames, when written
        self._early: set[str] = set()  # acknowledged before one that was written before it
        self._decoder = AckDecoder()
        self.delivered = 0
        """Frames acknowledged, from the first on without a gap."""
        self.acknowledged = 0
        """Messages acknowledged."""

    def written(self, frames: Sequence[bytes], now: float) -> bytes:
        """What to write for *frames*, written at *now* (monotonic seconds)."""
        messages = []
        start = 0
        while start < len(frames):
            tag = tag_bytes(frames[start])
            end = start + 1
            while end < len(frames) and end - start < self._batch_records and tag_bytes(frames[end]) == tag:
                end += 1
            self._count += 1
            chunk = f"{self._prefix}{self._count:x}"
            self._open.append((chunk, end - start, now))
            messages.append(bundle(frames[start:end], chunk))
            start = end
        return b"".join(messages)

    def feed(self, data: bytes) -> None:
        """Take what the agent sent.

        :raises FrameError: it is not an acknowledgement.
        """
        for chunk in self._decoder.feed(data):
            self._early.add(chunk)
        while self._open and self._open[0][0] in self._early:
            chunk, frames, _ = self._open.popleft()
            self._early.discard(chunk)
            self.delivered += frames
            self.acknowledged += 1
        if len(self._early) > len(self._open):  # more than there is to wait for: some of them are strangers
            self._early &= {chunk for chunk, _, _ in self._open}

    def waiting_since(self) -> float | None:
        """When the oldest message that is not acknowledged was written; None when all are."""
        return self._open[0][2] if self._open else None


def ack_of(chunk: str) -> bytes:
    """What an agent answers to a frame with that ``chunk``."""
    return pack({"ack": chunk})
