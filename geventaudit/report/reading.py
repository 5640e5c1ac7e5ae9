"""Files of a trail that are read twice: to verify them, then to count their authentic records."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from ..verify.findings import TrailReport
from ..verify.lines import blocks_of
from ..verify.parsing import Parsed, parse
from ..verify.records import is_stamp
from .summary import Summary

__all__ = ["Source", "count_records", "open_sources"]

_CHUNK = 1 << 20


class Source:
    """A file, as long as it was when the report began. A log may grow meanwhile.

    :param name: for people.
    :param path: of a file that can be read twice.
    """

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self.size = os.stat(path).st_size
        """Bytes."""
        self.sha256 = self._hash()
        """Hexadecimal digits."""

    @property
    def has_changed(self) -> bool:
        """True if the file holds something else than at the beginning."""
        return self._hash() != self.sha256

    def _hash(self) -> str:
        digest, left = hashlib.sha256(), self.size
        with open(self.path, "rb") as file:
            while left and (data := file.read(min(left, _CHUNK))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest()


def open_sources(stack: ExitStack, paths: Sequence[str]) -> list[Source]:
    """Return the files. Pipes and standard input are copied to temporary files, which *stack* removes.

    :raises OSError: one cannot be read. Its ``filename`` is its name.
    """
    return [Source(path, path if _is_regular(path) else _copy_of(stack, path)) for path in paths]


def _is_regular(path: str) -> bool:
    return path != "-" and stat.S_ISREG(os.stat(path).st_mode)


def _copy_of(stack: ExitStack, path: str) -> str:
    copy = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "copy")
    with ExitStack() as opened:
        file = sys.stdin.buffer if path == "-" else opened.enter_context(open(path, "rb"))
        shutil.copyfileobj(file, opened.enter_context(open(copy, "wb")))
    return copy


def count_records(
    summary: Summary, trail: TrailReport, sources: Sequence[Source], on_read: Callable[[int], object]
) -> None:
    """Count the records of a trail that was verified. With keys, only the authentic ones.

    :param on_read: called with the number of bytes read.
    :raises OSError: a file cannot be read.
    """
    streams = trail.rejected.streams
    for index, source in enumerate(sources):
        lines, number = trail.rejected.lines_of(index), 0
        rejected = next(lines, 0)
        try:
            for block in blocks_of(source.path, on_read, source.size):
                for line in block[:-1].split(b"\n"):
                    number += 1
                    if number == rejected:
                        summary.left_out += 1
                        rejected = next(lines, 0)
                        continue
                    record = parse(line)
                    if type(record) is not Parsed:
                        continue
                    stamp = record.stamp
                    if trail.is_authenticated and (stamp is None or not is_stamp(stamp) or stamp["stream"] in streams):
                        summary.left_out += 1
                    else:
                        summary.add(record)
        except EOFError:
            pass  # the end of a gzip file that was cut: the verification has named it
