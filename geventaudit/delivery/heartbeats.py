"""Heartbeats: messages that show the agent that a client is alive."""

from __future__ import annotations

import platform
import time

from ..encoder.encoding import Encoder
from ..records import Heartbeat
from ..runtime.clock import monotonic
from ..version import __version__

__all__ = ["Heartbeats"]


class Heartbeats:
    """The heartbeats of one client: the first follows the first record of a connection.

    :param interval: seconds from one heartbeat to the next on a connection.
    """

    def __init__(self, encoder: Encoder, interval: float) -> None:
        self._encoder = encoder
        self._interval = interval
        self._due: float | None = None  # None before the first record of a connection

    def on_connect(self) -> None:
        """Start anew with a connection."""
        self._due = None

    def on_written(self) -> None:
        """Note that records were written."""
        if self._due is None:
            self._due = monotonic()

    def seconds_left(self) -> float | None:
        """Return the seconds until a heartbeat has to be written; None before the first record."""
        return None if self._due is None else max(self._due - monotonic(), 0.0)

    def make(self, destination: str) -> bytes:
        """Return the frame of a heartbeat. *destination* is the name of the connection."""
        self._due = monotonic() + self._interval
        beat = Heartbeat(
            service_id=self._encoder.service_tree_id or "",
            audit_version=__version__,
            os_version=platform.release(),
            language=f"python{platform.python_version()}",
            destination=destination,
        )
        return self._encoder.encode(beat, time.time())
