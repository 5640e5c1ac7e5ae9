"""Copies of parts of a deque that a signal handler may change at any moment."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TypeVar

__all__ = ["copied"]

_T = TypeVar("_T")


def copied(items: deque[_T], start: int = 0, stop: int | None = None) -> list[_T]:
    """Return the items from *start* up to *stop*.

    A signal handler may run between any two bytecodes and append an item. Then an older iterator raises.
    """
    while True:
        try:
            return list(islice(items, start, stop))
        except RuntimeError:
            continue
