"""Functions that applications hand over: checked where they are handed over, and by the result of ``describe``."""

from __future__ import annotations

import inspect
from typing import Any

from geventaudit import AuditClient, AuditError, Record

from .text import named

__all__ = ["check_described", "check_hook", "report_missing"]


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


def check_described(described: Any) -> Record | None:
    """Return the result of a hook ``describe``.

    :raises TypeError: it is neither a record nor None.
    """
    if isinstance(described, Record | None):
        return described
    raise TypeError(f"describe must return a Record, or None for none, returned a {type(described).__name__}")


def report_missing(client: AuditClient, part: str, error: Exception) -> None:
    """Report to *client* that *error* kept a part out of a record."""
    missing = AuditError(f"recorded without {part}: {named(error)}")
    missing.__cause__ = error
    client.report(missing, recorded=True)
