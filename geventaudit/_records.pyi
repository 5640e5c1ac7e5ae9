from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeVar

_T = TypeVar("_T")

def make_cheap(*classes: type[Any]) -> None:
    """Give each dataclass with slots a constructor in C."""

def make_lookups_cheap(metaclass: type[type], classes: Sequence[type[Enum]]) -> None:
    """Let the members of enumerations be found as attributes of a class are."""

def replace(record: _T, /, **changes: Any) -> _T:
    """Return a copy of a record with *changes*."""
