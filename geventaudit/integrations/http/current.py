"""The request that is served now, for integrations that hand its caller on: to a task that the request queues, say."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from geventaudit import Record

__all__ = ["current_record", "set_current"]

Source = Callable[[], Record | None]

_source: ContextVar[Source | None] = ContextVar("geventaudit.request", default=None)


def set_current(source: Source | None) -> None:
    """Note the request that this greenlet or thread serves from now on; None for none.

    :param source: returns the record of the request as far as it is known, or None when the request is over.
    """
    _source.set(source)


def current_record() -> Record | None:
    """Return the record of the current request as far as it is known; None outside of a recorded request."""
    source = _source.get()
    return None if source is None else source()
