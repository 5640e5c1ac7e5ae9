"""The search of one client for the folders of dead processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

from ..runtime.clock import monotonic
from . import jobs
from .folder import Folder
from .settings import Spool

__all__ = ["ADOPT_SECONDS", "MAX_ORPHANS", "Adoption"]

ADOPT_SECONDS = 30.0
"""Seconds between two searches for orphans."""

MAX_ORPHANS = 4
"""The folders of dead processes that one client locks at a time. Limits its descriptors and what it reads ahead."""


class Adoption:
    """The folders of dead processes that one client has locked, and the time of the next look for others.

    Each look is a job of its own, and locks one folder at most: its opening reads all of it, and other jobs wait.

    :param folders: filled by the disk thread.
    """

    def __init__(self, spool: Spool, folders: list[Folder]) -> None:
        self._spool = spool
        self._folders = folders
        self._next_look = monotonic()

    def seconds_left(self) -> float:
        """Return the seconds until the next look, negative if it is late; infinity while there are enough folders."""
        self._folders[:] = [each for each in self._folders if each.is_open]
        is_wanted = self._spool.is_for_each_process and len(self._folders) < MAX_ORPHANS
        return self._next_look - monotonic() if is_wanted else inf

    @property
    def is_late(self) -> bool:
        """True if the disk had no time for a look so far: it comes before other work."""
        return self.seconds_left() < -ADOPT_SECONDS

    def look_soon(self) -> None:
        """Let the next look come at once: there may be more folders, or there is room for another."""
        self._next_look = monotonic()

    def next_job(self, own_path: str) -> Callable[[], jobs.Adopted]:
        """Return the job that looks for a folder other than *own_path*."""
        self._next_look = monotonic() + ADOPT_SECONDS
        known = [own_path, *(each.path for each in self._folders)]
        return partial(jobs.adopt, self._spool, known, self._folders)
