"""Checks of the functions that applications hand over, at the line that hands them over."""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["check_hook"]


def check_hook(name: str, hook: Any, *parameters: str) -> None:
    """Check that *hook* can be called with so many positional arguments.

    :raises TypeError: it cannot.
    """
    wanted = f"{name} must be a function of ({', '.join(parameters)})"
    if not callable(hook):
        raise TypeError(f"{wanted}, got {hook!r}")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise TypeError(f"{wanted}, got {hook!r}: {error}") from None
