"""Checks of callable arguments when they are given, not when they are first called."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import show

__all__ = ["check_takes"]


def check_takes(name: str, function: Any, *parameters: str) -> None:
    """Check that *function*, the argument *name*, can be called with *parameters* as positional arguments.

    :raises TypeError: *function* has another signature.
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
