"""Lines of a file, to its end or as it grows. Waiting for them blocks no other greenlet."""

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
"""A longer line is not held in memory. A frame of 1 MiB, the limit of a client, is less than 8 MiB of JSON."""

_POLL_SECONDS = 0.2


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1.

    Of a line that is longer than ``MAX_LINE_BYTES``, only the first ``MAX_LINE_BYTES + 1`` bytes are yielded.

    :param path: "-" for standard input.
    :raises OSError: the file cannot be read.
    """
    number = 0
    with contextlib.closing(_open(path)) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)


def followed(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, and those that are appended, without an end.

    Standard input, a pipe and a device have an end. A line is yielded when its newline has been read, or when it is too
    long, cut as by :func:`lines`. If another file takes the place of the file, the old one is read to its end, and the
    new one from its beginning. A file that was truncated is read from its beginning. Numbers begin anew then. A file
    that is truncated and longer than before 0.2 seconds later is not noticed: rotate by renaming.

    :raises OSError: the file cannot be read.
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
            # Something may have been written between the last read and the renaming.
            last_look = True
        else:
            gevent.sleep(_POLL_SECONDS)


def _is_another(path: str, mine: os.stat_result) -> bool:
    try:
        return not os.path.samestat(os.stat(path), mine)
    except FileNotFoundError:
        # Moved away, and no other file is in its place yet.
        return False


def _open(path: str) -> Any:
    if path == "-" and sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    descriptor = sys.stdin.fileno() if path == "-" else os.open(path, os.O_RDONLY)
    return FileObjectThread(descriptor, "rb", closefd=path != "-")
