"""What a user says of a spool: the disk behind the queue. At work it is a :class:`~geventaudit.store.Store`."""

from __future__ import annotations

import os
from typing import Literal

from .errors import show

__all__ = ["Spool"]

Mode = Literal["overflow", "always"]
Synchronous = Literal["OFF", "NORMAL", "FULL"]


class Spool:
    """Where a client keeps what it cannot deliver yet; given to :class:`~geventaudit.Client` as ``spool``.

    Nothing is opened before the client's first ``send`` or ``connect``. What an earlier client left in the file is sent
    first, oldest first.

    ===============  =======================  ==========================================  ==============================
    ``synchronous``  the process is killed    the machine loses power                     costs
    ===============  =======================  ==========================================  ==============================
    ``"OFF"``        nothing on disk is lost  the file may be damaged (it is put aside,   nothing
                                              and what can be read of it is sent)
    ``"NORMAL"``     nothing on disk is lost  the last records may be lost, no more       a sync every few MB
    ``"FULL"``       nothing on disk is lost  nothing on disk is lost, as far as the      a sync for each write, which
                                              disk keeps its word                         all waiting senders share
    ===============  =======================  ==========================================  ==============================

    :param path: of the file, in a folder that exists. ``{pid}`` in its name stands for the process: each process then
        has a file of its own (with gunicorn, say), and exactly one living process takes over what a dead one left.
    :param max_bytes: of records in the spool; ``send`` raises :class:`~geventaudit.QueueFullError` when they and the
        queue are full. The file may be a little larger.
    :param mode: ``"overflow"``: what does not fit on the queue goes to disk, and what is undelivered when the client
        closes is kept. ``"always"``: ``send`` returns when the record is on disk (other greenlets run meanwhile), and
        it leaves the disk when it is delivered.
    :param synchronous: what a record on disk survives; see above.
    :raises TypeError, ValueError: for what cannot be.
    :raises ImportError: this Python was built without SQLite.
    """

    __slots__ = ("max_bytes", "mode", "path", "synchronous")

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 256 << 20,
        mode: Mode = "overflow",
        synchronous: Synchronous = "NORMAL",
    ) -> None:
        from . import spoolfile  # noqa: F401  SQLite is loaded here, by who uses it, and not in the disk's thread

        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise TypeError(f"path must be a text or a Path, got {show(path)}")
        folder, name = os.path.split(os.fspath(path))
        if not name or "\0" in name:
            raise ValueError(f"path must be the name of a file, got {show(path)}")
        if "{pid}" in folder or name.count("{pid}") > 1:
            raise ValueError(f"path may have one {{pid}}, in the file's name, got {show(path)}")
        if "{" in name.replace("{pid}", ""):  # a misspelt one, which all processes would share
            raise ValueError(f"path may have no other braces than {{pid}}'s, got {show(path)}")
        if folder.startswith("~"):
            raise ValueError(f"path must be one that needs no shell, got {show(path)}: use os.path.expanduser")
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes must be a whole number of at least 1, got {show(max_bytes)}")
        if mode not in ("overflow", "always"):
            raise ValueError(f"mode must be 'overflow' or 'always', got {show(mode)}")
        if synchronous not in ("OFF", "NORMAL", "FULL"):
            raise ValueError(f"synchronous must be 'OFF', 'NORMAL' or 'FULL', got {show(synchronous)}")
        self.path = path
        self.max_bytes = max_bytes
        self.mode = mode
        self.synchronous = synchronous

    def __repr__(self) -> str:
        return f"Spool({self.path!r}, {self.max_bytes}, {self.mode!r}, {self.synchronous!r})"
