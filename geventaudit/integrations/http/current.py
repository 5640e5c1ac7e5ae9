"""The request that is served now, for the declarations of its view, and for integrations that hand its caller on."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from geventaudit import Record

if TYPE_CHECKING:
    from .facts import RequestFacts

__all__ = ["current_facts", "current_record", "set_current"]

_facts: ContextVar[RequestFacts | None] = ContextVar("geventaudit.request", default=None)


def set_current(facts: RequestFacts | None) -> None:
    """Note the facts of the request that this greenlet or thread serves from now on; None for none."""
    _facts.set(facts)


def current_facts() -> RequestFacts | None:
    """Return the facts of the current request; None outside of a recorded request, and after its end."""
    facts = _facts.get()
    while facts is not None and facts.record_so_far is None:
        facts = facts.outer
    return facts


def current_record() -> Record | None:
    """Return the record of the current request as far as it is known; None outside of a recorded request."""
    facts = current_facts()
    return None if facts is None or facts.record_so_far is None else facts.record_so_far()
