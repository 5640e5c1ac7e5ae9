"""Acknowledgements of the Forward protocol, for the messages of one connection. Pure: no I/O, no clock.

Frames of one tag that are written together share one message with a unique ``chunk`` in its option. The agent answers
``{"ack": chunk}`` when it has taken them. Frames are delivered when all frames up to them are acknowledged. Unknown and
repeated acknowledgements have no effect. An agent that sends more than ``MAX_STRANGERS`` of them in a row is refused.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

from ..encoder.encoding import bundle, pack, tag_bytes
from ..errors import FrameError
from .decoding import AckDecoder

__all__ = ["MAX_STRANGERS", "AckWindow", "ack_of"]

MAX_STRANGERS = 10_000
"""The most unknown or repeated acknowledgements in a row."""


class AckWindow:
    """The acknowledgements of one connection.

    :param batch_records: frames that may share a message.
    """

    def __init__(self, batch_records: int) -> None:
        self._batch_records = batch_records
        self._prefix = os.urandom(9).hex()
        self._count = 0
        self._open: deque[tuple[str, int, float]] = deque()  # chunk, frames, when written
        self._waiting: set[str] = set()  # chunks that are not acknowledged
        self._early: set[str] = set()  # acknowledged before an earlier chunk
        self._strangers = 0  # unknown or repeated acknowledgements since the last valid one
        self._decoder = AckDecoder()
        self.delivered = 0
        """Frames acknowledged from the first one on, without a gap."""
        self.acknowledged = 0
        """Messages acknowledged."""

    def written(self, frames: Sequence[bytes], now: float) -> bytes:
        """Return the bytes to write for *frames*, at *now* in monotonic seconds."""
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
            self._waiting.add(chunk)
            messages.append(bundle(frames[start:end], chunk))
            start = end
        return b"".join(messages)

    def feed(self, data: bytes) -> None:
        """Take bytes that the agent sent. Acknowledgements before an error count.

        :raises FrameError: *data* is not an acknowledgement, or too many in a row were unknown or repeated.
        """
        try:
            for chunk in self._decoder.feed(data):
                self._acknowledge(chunk)
        finally:
            while self._open and self._open[0][0] in self._early:
                chunk, frames, _ = self._open.popleft()
                self._early.discard(chunk)
                self.delivered += frames
                self.acknowledged += 1

    def _acknowledge(self, chunk: str) -> None:
        if chunk in self._waiting:
            self._waiting.discard(chunk)
            self._early.add(chunk)
            self._strangers = 0
            return
        self._strangers += 1
        if self._strangers > MAX_STRANGERS:
            raise FrameError(f"{MAX_STRANGERS} unknown or repeated acknowledgements in a row")

    def waiting_since(self) -> float | None:
        """Return the time at which the oldest unacknowledged message was written; None if all are acknowledged."""
        return self._open[0][2] if self._open else None


def ack_of(chunk: str) -> bytes:
    """Return the agent's acknowledgement of a frame with that ``chunk``."""
    return pack({"ack": chunk})
