"""Checks of callables at the line that hands them over, not where they are called first."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import show

__all__ = ["check_takes"]


def check_takes(name: str, function: Any, *parameters: str) -> None:
    """Check that *function*, a callable argument of that *name*, can be called with so many positional arguments.

    :raises TypeError: it cannot.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        wanted = f"one argument ({parameters[0]})" if parameters else "no arguments"
        raise TypeError(f"{name} must take {wanted}, got {show(function)}: {error}") from None
