"""What a person at a terminal gets and a pipe does not: colours, progress; and one line for a mistake."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any, Literal, Self, TextIO

__all__ = ["Colour", "CommandError", "Progress", "coloured"]

Colour = Literal["red", "green", "yellow"]

_CODES: dict[Colour, int] = {"red": 31, "green": 32, "yellow": 33}


class CommandError(Exception):
    """Ends the program with one line and a status."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


def coloured(text: str, colour: Colour, stream: TextIO) -> str:
    """*text* in *colour* where *stream* is a terminal, and nobody asked for none (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


class Progress:
    """A progress bar on standard error, by tqdm, where that is a terminal and tqdm is there; else nothing.

    :param total: how much there is to do; None where nobody knows.
    :param unit: of what. Without one, there is no bar.
    """

    def __init__(self, total: int | None = None, unit: str = "") -> None:
        self._bar: Any = None
        if not unit or not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        tqdm.monitor_interval = 0  # no thread that watches over the bar
        tqdm.set_lock(threading.RLock())  # nor a lock for other processes
        self._bar = tqdm(total=total, unit=unit, unit_scale=True, leave=False, file=sys.stderr)

    def advance(self, amount: int) -> None:
        """That much more is done."""
        if self._bar is not None:
            self._bar.update(amount)

    def say(self, text: str, stream: TextIO) -> None:
        """Print a line on *stream*, above the bar where there is one."""
        if self._bar is None:
            print(text, file=stream)
        else:
            self._bar.write(text, file=stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
