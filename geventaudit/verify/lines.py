"""Lines of files, compressed or not, in bounded memory."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import BinaryIO, cast

__all__ = ["MAX_LINE_BYTES", "TOO_LONG", "blocks_of"]

MAX_LINE_BYTES = 16 << 20
"""The longest line. A longer one counts as unreadable."""

TOO_LONG = b"a line that is too long"
"""Stands for such a line. It is no JSON."""

_CHUNK = 1 << 20


def blocks_of(path: str, on_read: Callable[[int], object], size: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file in blocks, each line with its newline. :data:`TOO_LONG` replaces one that is too long.

    :param path: of a file, compressed by gzip if it begins like one; ``-`` for standard input.
    :param on_read: called with the number of bytes that were read from the file.
    :param size: bytes of the file to read at most; None for all.
    :raises OSError: it cannot be read.
    :raises EOFError: the compressed data is damaged, or ends in the middle. All whole lines before that came.
    """
    with ExitStack() as stack:
        file = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        counted = cast(BinaryIO, _Counted(file, on_read, size))
        if counted.peek(2)[:2] == b"\x1f\x8b":  # type: ignore[attr-defined]
            yield from _blocks(_inflated(stack.enter_context(gzip.open(counted))))
        else:
            yield from _blocks(iter(lambda: counted.read(_CHUNK), b""))


class _Counted:
    """A file that reports how far it was read, and that may end early."""

    def __init__(self, file: BinaryIO, on_read: Callable[[int], object], size: int | None) -> None:
        self._file = file
        self._on_read = on_read
        self._left = sys.maxsize if size is None else size
        self.peek = file.peek  # type: ignore[attr-defined]

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self._on_read(len(data))
        return data


def _inflated(file: gzip.GzipFile) -> Iterator[bytes]:
    """Yield the data of a compressed file, also those right before an error.

    :raises EOFError: the compressed data is damaged, or ends in the middle.
    """
    parts: list[bytes] = []
    size = 0
    try:
        while part := file.read1(_CHUNK):
            parts.append(part)
            size += len(part)
            if size >= _CHUNK:
                yield b"".join(parts)
                parts, size = [], 0
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield b"".join(parts)
        raise EOFError(f"the compressed data is damaged: {error}") from error
    yield b"".join(parts)


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest, is_skipping = b"", False
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if end:
            if is_skipping:
                yield TOO_LONG + chunk[chunk.index(b"\n") : end]
            else:
                yield rest + chunk[:end]
            rest, is_skipping = chunk[end:], False
        elif not is_skipping:
            rest += chunk
        if len(rest) > MAX_LINE_BYTES:
            rest, is_skipping = b"", True
    if rest or is_skipping:
        yield (TOO_LONG if is_skipping else rest) + b"\n"
