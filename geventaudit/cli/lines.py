"""Lines of a file, as far as it goes or as it grows. Waiting for them blocks no other greenlet."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

import gevent
from gevent.fileobject import FileObjectThread

__all__ = ["MAX_LINE_BYTES", "followed", "lines"]

MAX_LINE_BYTES = 16 << 20
"""A line that is longer is not held. What a client takes, a frame of 1 MiB, is less than 8 MiB of JSON."""

_POLL_SECONDS = 0.2


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of the file at *path*, "-" being standard input, with their numbers.

    Of a line that is longer than ``MAX_LINE_BYTES``, the first ``MAX_LINE_BYTES + 1`` bytes: the rest is skipped.

    :raises OSError: it cannot be read.
    """
    number = 0
    with contextlib.closing(_open(path)) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)


def followed(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of the file at *path* and those that come, for ever; of standard input, a pipe or a device, to its end.

    A line is one when its newline is there, or when it is too long; that is cut as by :func:`lines`. A file that
    another takes the place of is read to its end, and the other from its beginning; one that was cut short is read
    from its beginning. Numbers begin anew then. A file that is cut and has grown beyond its old length 0.2 seconds
    later does not look cut: rotate by renaming.

    :raises OSError: it cannot be read.
    """
    if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
        yield from lines(path)
        return
    while True:
        with contextlib.closing(_open(path)) as file:
            yield from _until_replaced(file, path)


def _until_replaced(file: Any, path: str) -> Iterator[tuple[int, bytes]]:
    number, line, skipping, position, last_look = 1, b"", False, 0, False
    while True:
        if more := file.readline(MAX_LINE_BYTES + 1 - len(line)):
            position += len(more)
            line += more
            ended, too_long = line.endswith(b"\n"), len(line) > MAX_LINE_BYTES
            if (ended or too_long) and not skipping:
                yield number, line
            if ended:
                number, line, skipping = number + 1, b"", False
            elif too_long:
                line, skipping = b"", True
            continue
        if last_look:
            if line and not skipping:
                yield number, line
            return
        mine = os.fstat(file.fileno())
        if mine.st_size < position:
            file.seek(0)
            number, line, skipping, position = 1, b"", False, 0
        elif _is_another(path, mine):
            last_look = True  # what was written between the last read and the renaming
        else:
            gevent.sleep(_POLL_SECONDS)


def _is_another(path: str, mine: os.stat_result) -> bool:
    try:
        return not os.path.samestat(os.stat(path), mine)
    except FileNotFoundError:  # moved away, and no other in its place yet
        return False


def _open(path: str) -> Any:
    if path == "-" and sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    descriptor = sys.stdin.fileno() if path == "-" else os.open(path, os.O_RDONLY)
    return FileObjectThread(descriptor, "rb", closefd=path != "-")
