"""The user's settings of a spool."""

from __future__ import annotations

import glob
import os
from typing import Literal

from ..errors import show

__all__ = ["Spool"]

Mode = Literal["overflow", "always"]
Synchronous = Literal["OFF", "NORMAL", "FULL"]


class Spool:
    """A disk behind the queue of a :class:`~geventaudit.Client`, for records that cannot be delivered yet.

    Constructing one opens nothing. Records that an earlier client left in the folder are sent first, oldest first.

    ===============  =======================  ==========================================  ==============================
    ``synchronous``  the process is killed    the machine loses power                     costs
    ===============  =======================  ==========================================  ==============================
    ``"OFF"``        nothing on disk is lost  the last records may be lost or damaged     nothing
    ``"NORMAL"``     nothing on disk is lost  the last records may be lost or damaged,    a sync for each 4 MiB
                                              4 MiB at most
    ``"FULL"``       nothing on disk is lost  nothing on disk is lost, if the disk        a sync for each write, which
                                              honours syncs                               all waiting senders share
    ===============  =======================  ==========================================  ==============================

    :param path: the path of a folder. It is created, with access for this user only, if its parent exists. ``{pid}`` in
        the folder's name is replaced by the process identifier: each process, such as a worker of gunicorn, then has
        its own folder, and exactly one living process sends the records of a dead one. If that folder is taken (by a
        process that sends the records of a dead one with the same identifier, by another client, by another user), it
        is replaced by the identifier and a number: ``4711.2``.
    :param max_bytes: the most bytes of undelivered records in the folder. ``send`` raises
        :class:`~geventaudit.QueueFullError` if folder and queue are full.
    :param mode: ``"overflow"``: records that do not fit on the queue go to disk, and so do records that are undelivered
        when the client closes. ``"always"``: ``send`` returns when the record is on disk (other greenlets run
        meanwhile), and delivery removes the record from disk.
    :param synchronous: the guarantee for records on disk; see above.
    :raises TypeError, ValueError: an argument is invalid.
    """

    __slots__ = ("absolute_path", "max_bytes", "mode", "path", "synchronous")

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 256 << 20,
        mode: Mode = "overflow",
        synchronous: Synchronous = "NORMAL",
    ) -> None:
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise TypeError(f"path must be a text or a Path, got {show(path)}")
        folder, name = os.path.split(os.fspath(path).rstrip("/"))
        if not name or "\0" in name:
            raise ValueError(f"path must be the name of a folder, got {show(path)}")
        if "{pid}" in folder or name.count("{pid}") > 1:
            raise ValueError(f"path may have one {{pid}}, in the folder's name, got {show(path)}")
        if "{" in name.replace("{pid}", ""):  # a misspelt {pid}: all processes would share the folder
            raise ValueError(f"path must have no braces other than {{pid}}, got {show(path)}")
        if folder.startswith("~"):
            raise ValueError(f"path must not begin with ~, got {show(path)}: use os.path.expanduser")
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes must be a whole number of at least 1, got {show(max_bytes)}")
        if mode not in ("overflow", "always"):
            raise ValueError(f"mode must be 'overflow' or 'always', got {show(mode)}")
        if synchronous not in ("OFF", "NORMAL", "FULL"):
            raise ValueError(f"synchronous must be 'OFF', 'NORMAL' or 'FULL', got {show(synchronous)}")
        self.path = path
        self.absolute_path = os.path.abspath(os.fspath(path))
        """The absolute path, with ``{pid}`` not replaced. A later change of the working directory has no effect."""
        self.max_bytes = max_bytes
        self.mode = mode
        self.synchronous = synchronous

    @property
    def is_for_each_process(self) -> bool:
        """True if each process has its own folder."""
        return "{pid}" in os.fspath(self.path)

    def folder_of_process(self, number: int = 1) -> str:
        """Return the folder of this process.

        :param number: from 2 on, the folder to open if those before are taken: ``{pid}`` becomes ``4711.2``.
        """
        identifier = str(os.getpid())
        return self.absolute_path.replace("{pid}", identifier if number == 1 else f"{identifier}.{number}")

    def folders_of(self, pid: int) -> list[str]:
        """Return the folders of the process with that identifier, of any user; none without ``{pid}`` in the path."""
        if not self.is_for_each_process:
            return []
        template = glob.escape(self.absolute_path)
        return [path for name in (f"{pid}", f"{pid}.*") for path in glob.glob(template.replace("{pid}", name))]

    def __repr__(self) -> str:
        return f"Spool({self.path!r}, {self.max_bytes}, {self.mode!r}, {self.synchronous!r})"
