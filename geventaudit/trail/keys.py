"""The key tree: from a master key to the key of one record. Pure.

::

    K (key file, start s) --next--> K of start s+1
     |
     +--HKDF, salt R, "root"--> F --next--> F --next--> ...        one for each child of this process
                                |           |
                              child 1     child 2
                              /     \
                         "stream"  "process"
                            |          |
                     K_1 -> K_2 ...    F of a forked process, which has children of its own

A child is a client, or a forked process. Every arrow is one-way. A process holds its F and the record keys of its
clients; nothing from which older ones could be computed. A stream is named ``hex(R)/start/i[/j...]``: the salt, the
start, and the numbers of the children from the root to the client.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import SealError
from .secret import Secret, hkdf_extract

__all__ = ["MAX_NUMBERS", "SALT_BYTES", "KeyNode", "StreamName", "next_start", "parse_stream", "root_of"]

SALT_BYTES = 16
MAX_NUMBERS = 16
"""The most numbers in the name of a stream: the start, and the children."""

_STREAM = re.compile(r"([0-9a-f]{32})((?:/(?:0|[1-9][0-9]{0,15})){2,16})", re.ASCII)


class StreamName(NamedTuple):
    """The parts of a stream's name."""

    salt: str
    start: int
    path: tuple[int, ...]

    def __str__(self) -> str:
        return "/".join([self.salt, str(self.start), *map(str, self.path)])


def parse_stream(text: str) -> StreamName | None:
    """Return the parts of the name of a sealed stream; None if it is no such name."""
    match = _STREAM.fullmatch(text)
    if match is None:
        return None
    start, *path = map(int, match[2][1:].split("/"))
    return StreamName(match[1], start, tuple(path)) if all(path) else None


def next_start(master: Secret) -> Secret:
    """Return the master key of the next start."""
    return master.derive(b"next")


class KeyNode:
    """The F of one process: hands out the keys of its children, each once. Not thread-safe.

    :param secret: F before its first child.
    :param name: of the process: its path is empty for the process that read the key file.
    :param children: how many were handed out before.
    """

    __slots__ = ("_secret", "children", "name")

    def __init__(self, secret: Secret, name: StreamName, children: int = 0) -> None:
        self._secret = secret
        self.name = name
        self.children = children

    def take_stream(self) -> tuple[StreamName, Secret]:
        """Return the name and the first record key of the next child, which is a client.

        :raises SealError: the name would be too long.
        """
        name, secret = self._take()
        return name, secret.derive(b"stream")

    def take_process(self) -> KeyNode:
        """Return the F of the next child, which is a forked process.

        :raises SealError: the names of its clients would be too long.
        """
        name, secret = self._take()
        if len(name.path) >= MAX_NUMBERS - 1:
            raise SealError(f"the process was forked by forked processes {len(name.path)} times, and cannot seal")
        return KeyNode(secret.derive(b"process"), name)

    def _take(self) -> tuple[StreamName, Secret]:
        # One assignment for both, since a signal handler may come between two; both values belong together.
        child = self._secret.derive(b"child")
        self._secret, self.children = self._secret.derive(b"next"), self.children + 1
        return self.name._replace(path=(*self.name.path, self.children)), child


def root_of(master: Secret, salt: bytes, start: int) -> KeyNode:
    """Return the F of a process that begins with *master*; *salt* are 16 random bytes."""
    return KeyNode(hkdf_extract(salt, master).derive(b"root"), StreamName(salt.hex(), start, ()))
