"""Output for people: colours, progress and a live line at a terminal, tables, log lines, errors of one line."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import unicodedata
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TextIO

from ..agent.shown import printable

__all__ = ["Colour", "CommandError", "LiveLine", "LogHandler", "Progress", "cannot", "coloured", "complain", "table"]

Colour = Literal["red", "green", "yellow"]

_CODES: dict[Colour, int] = {"red": 31, "green": 32, "yellow": 33}


class CommandError(Exception):
    """Ends the program with one line and an exit status."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


def cannot(verb: str, path: str, error: OSError) -> CommandError:
    """Return the error of a file that cannot be read or written."""
    return CommandError(f"cannot {verb} {path}: {error.strerror or error}")


def coloured(text: str, colour: Colour, stream: TextIO) -> str:
    """Return *text* in *colour* if *stream* is a terminal and colours are not switched off (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def complain(text: object) -> None:
    """Print a line on standard error that begins with the name of the program."""
    Progress.say(f"geventaudit: {text}", sys.stderr)


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), widest: int = sys.maxsize) -> list[str]:
    """Return a line for each row, with the columns aligned. Control characters are escaped.

    :param right: the indices of columns of numbers.
    :param widest: the width up to which cells are padded; a wider one moves the rest of its line.
    """
    cells = [[printable(each) for each in row] for row in rows]
    widths = [min(max(map(_width, column)), widest) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        blanks = [" " * (width - _width(each)) for each, width in zip(row, widths, strict=True)]
        padded = (
            blank + each if index in right else each + blank
            for index, (each, blank) in enumerate(zip(row, blanks, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return lines


def _width(text: str) -> int:
    """Return the number of columns that *text* takes at a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


class LiveLine:
    """A line on standard error that is written anew, again and again. Nothing if that is no terminal, or a dumb one.

    :meth:`Progress.say` prints above it. Only one is shown at a time.
    """

    _shown: ClassVar[LiveLine | None] = None

    def __init__(self) -> None:
        self._is_on = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._text = ""

    def show(self, text: str) -> None:
        """Write *text* in the place of the last one, cut to the width of the terminal."""
        if self._is_on and text != self._text:
            blank = " " * len(self._text)
            self._text = text[: shutil.get_terminal_size().columns - 1]
            # Without escape sequences, every terminal can do it.
            print(f"\r{blank}\r{self._text}", end="", file=sys.stderr, flush=True)

    def say(self, text: str, stream: TextIO) -> None:
        """Print a line on *stream*, above this one."""
        shown = self._text
        self.show("")
        print(text, file=stream, flush=True)
        self.show(shown)

    def __enter__(self) -> Self:
        LiveLine._shown = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        LiveLine._shown = None
        self.show("")


class Progress:
    """A progress bar on standard error, made by tqdm, if that is a terminal and tqdm is installed.

    :param total: the amount to do; None if unknown.
    :param unit: the unit of *total*. Without a unit, there is no bar.
    """

    _shown: ClassVar[Any] = None
    """The bar of tqdm that is on the terminal."""

    def __init__(self, total: int | None = None, unit: str = "") -> None:
        self._bar: Any = None
        if not unit or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        tqdm.monitor_interval = 0  # no monitor thread
        tqdm.set_lock(threading.RLock())  # no lock for other processes
        self._bar = tqdm(total=total, unit=unit, unit_scale=True, leave=False, file=sys.stderr)
        Progress._shown = self._bar

    def advance(self, amount: int) -> None:
        """Add *amount* to what is done."""
        if self._bar is not None:
            self._bar.update(amount)

    @staticmethod
    def say(text: str, stream: TextIO) -> None:
        """Print a line on *stream*, above the bar or the live line if there is one. Control characters are escaped."""
        if LiveLine._shown is not None:
            LiveLine._shown.say(printable(text), stream)
        elif Progress._shown is None:
            print(printable(text), file=stream, flush=True)
        else:
            Progress._shown.write(printable(text), file=stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            Progress._shown = None
            self._bar.close()


class LogHandler(logging.Handler):
    """Prints each log record as one line on standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """See :meth:`logging.Handler.emit`."""
        try:
            for line in self.format(record).splitlines():
                complain(line.removeprefix("geventaudit: "))  # with which the library begins its own
        except Exception:
            self.handleError(record)
