"""Values of a record, as names to be counted. Records may hold anything: no value is trusted to have its type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import show
from ..filling import UNKNOWN, UNKNOWN_ADDRESS
from ..records import CallerIdentityType, OperationCategory, OperationResult, OperationType

__all__ = ["FIELDS", "callers_of", "has_unknown", "name_of", "names_of", "status_of"]

MAX_NAME = 200
"""Characters of a name that are kept."""

FIELDS = (
    *("OperationName", "OperationCategories", "OperationType", "OperationResult", "OperationAccessLevel"),
    *("CallerIdentities", "CallerIpAddress", "CallerAccessLevels", "CallerAgent", "TargetResources"),
)
"""The fields that every record has, and that a client may not know."""

_UNKNOWN = frozenset(
    (
        *(UNKNOWN, UNKNOWN_ADDRESS, OperationCategory.UNKNOWN.value, OperationType.UNKNOWN.value),
        *(OperationResult.UNKNOWN.value, CallerIdentityType.UNKNOWN.value),
    )
)


def name_of(value: Any) -> str:
    """Return a text for counting, cut to 200 characters."""
    if type(value) is str:
        return value if 0 < len(value) <= MAX_NAME else f"{value[:MAX_NAME]}..." if value else "(empty)"
    return "(missing)" if value is None else f"(no text) {show(value)}"


def names_of(value: Any) -> list[str]:
    """Return the texts in a list, each once."""
    return list({name_of(each): None for each in value}) if type(value) is list and value else [name_of(value or None)]


def has_unknown(value: Any) -> bool:
    """Return True if a field is missing or empty, or if one of its values stands for an unknown one."""
    if type(value) is str:
        return not value or value in _UNKNOWN
    if type(value) is list:
        return not value or any(type(each) is str and each in _UNKNOWN for each in value)
    if type(value) is dict:
        return not value or any(kind in _UNKNOWN or _has_unknown_name(group) for kind, group in value.items())
    return value is None


def _has_unknown_name(group: Any) -> bool:
    """Return True if an identity or a target in *group* is unknown."""
    if type(group) is not list:
        return False
    for each in group:
        if type(each) is dict:
            name = each.get("Identity", each.get("Name"))
            if type(name) is str and name in _UNKNOWN:
                return True
    return False


def callers_of(groups: Any) -> Iterator[str]:
    """Yield the identities of the callers, each with its kind: ``UPN user@example.com``."""
    if type(groups) is not dict:
        yield name_of(groups)
        return
    for kind, group in groups.items():
        for each in group if type(group) is list else ():
            if type(each) is dict:
                yield name_of(f"{kind} {name_of(each.get('Identity'))}")


def status_of(body: Mapping[str, Any]) -> str:
    """Return the status code of an HTTP record; empty for others."""
    data = body.get("CustomData")
    status = data.get("status") if type(data) is dict else None
    return str(status) if type(status) is int and 100 <= status <= 999 else ""
