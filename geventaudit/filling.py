"""Placeholders for the missing fields of a record.

A field counts as missing by the checks of this module, and as required by the rules of the schema. The rules refuse a
record with missing fields: only an explicit call puts placeholders into a trail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import AF_INET, AF_INET6, SOCK_DGRAM
from typing import Any

from .errors import show
from .records import (
    CallerIdentity,
    CallerIdentityType,
    OperationCategory,
    OperationResult,
    Record,
    TargetResource,
)
from .runtime import native
from .schema.values import items_of

__all__ = ["FILLED_KEY", "UNKNOWN", "UNKNOWN_ADDRESS", "fill_unknown"]

UNKNOWN = "Unknown"
"""The placeholder for a missing text."""

UNKNOWN_ADDRESS = "192.0.0.8"
"""The placeholder for a missing address: the IPv4 dummy address of RFC 7600, which no host has."""

FILLED_KEY = "filled_unknown"
"""The key of the custom data with the list of the filled fields, by their paths on the wire."""

_TEXTS = (
    ("operation_name", "OperationName"),
    ("operation_access_level", "OperationAccessLevel"),
    ("caller_agent", "CallerAgent"),
)

# The socket of gevent would resolve numeric addresses too.
_native_socket = native.original("socket", "socket")
# Addresses for documentation: packets to them would take the default route.
_FAR_AWAY = ((AF_INET, "192.0.2.1"), (AF_INET6, "2001:db8::1"))


def fill_unknown(record: Record) -> Record:
    """Return a copy of *record* with placeholders for missing fields; *record* itself if none is missing.

    - A missing required text becomes ``Unknown``. Categories, identities, access levels and targets that are missing as
      a whole get one unknown entry.
    - A loopback address of the caller, which the rules refuse, becomes the address of this host on its default route.
    - A missing or unspecified address of the caller becomes 192.0.0.8, the IPv4 dummy address. So does a loopback
      address on a host without any other address.

    ``custom_data["filled_unknown"]`` lists the fields that were filled: ``["CallerIpAddress", "CallerAccessLevels"]``.
    A value that is present and invalid stays unchanged, and the rules refuse it.

    :raises TypeError: *record* is not a Record.
    """
    if not isinstance(record, Record):
        raise TypeError(f"record must be a Record (of a Msg, its record), got {show(record)}")
    changes: dict[str, Any] = {}
    filled: list[str] = []
    steps: list[Callable[[dict[str, Any], list[str]], None]] = [
        *(partial(_fill_text, record, name, path) for name, path in _TEXTS),
        partial(_fill_address, record.caller_ip_address),
        partial(_fill_categories, record),
        partial(_fill_levels, record.caller_access_levels),
        partial(_fill_identities, record.caller_identities),
        partial(_fill_targets, record.target_resources),
        partial(_fill_result, record),
    ]
    for step in steps:
        found: list[str] = []
        try:
            step(changes, found)
        except Exception:  # the value cannot be read: the rules refuse it
            continue
        filled += found
    if filled:
        try:
            _note_filled(record.custom_data, changes, filled)
        except Exception:
            pass
    return record.replace(**changes) if changes else record


def _note_filled(custom: Any, changes: dict[str, Any], filled: list[str]) -> None:
    custom = custom or {}
    if isinstance(custom, Mapping):
        before = custom.get(FILLED_KEY)
        if isinstance(before, list):
            filled = [*before, *(path for path in filled if path not in before)]
        changes["custom_data"] = {**dict(items_of(custom)), FILLED_KEY: filled}


def _fill_text(record: Record, name: str, path: str, changes: dict[str, Any], filled: list[str]) -> None:
    if getattr(record, name) in (None, ""):  # 0 is not missing but invalid
        changes[name] = UNKNOWN
        filled.append(path)


def _fill_address(value: Any, changes: dict[str, Any], filled: list[str]) -> None:
    if address := _address_instead_of(value):
        changes["caller_ip_address"] = address
        filled.append("CallerIpAddress")


def _fill_result(record: Record, changes: dict[str, Any], filled: list[str]) -> None:
    if record.operation_result == OperationResult.FAILURE and not record.operation_result_description:
        changes["operation_result_description"] = UNKNOWN
        filled.append("OperationResultDescription")


def _fill_categories(record: Record, changes: dict[str, Any], filled: list[str]) -> None:
    if not record.operation_categories:
        changes["operation_categories"] = [OperationCategory.UNKNOWN]
        filled.append("OperationCategories")
    elif (
        not record.operation_category_description
        and isinstance(record.operation_categories, list | tuple | Set)
        and OperationCategory.OTHER in record.operation_categories
    ):
        changes["operation_category_description"] = UNKNOWN
        filled.append("OperationCategoryDescription")


def _fill_levels(levels: Any, changes: dict[str, Any], filled: list[str]) -> None:
    if not levels:
        changes["caller_access_levels"] = [UNKNOWN]
        filled.append("CallerAccessLevels")
    elif isinstance(levels, list | tuple | Set):
        whole = [UNKNOWN if isinstance(level, str) and not level.strip() else level for level in levels]
        if whole != list(levels):
            changes["caller_access_levels"] = whole
            filled.append("CallerAccessLevels")


def _fill_identities(identities: Any, changes: dict[str, Any], filled: list[str]) -> None:
    if not identities:
        changes["caller_identities"] = {CallerIdentityType.UNKNOWN: [CallerIdentity(UNKNOWN, UNKNOWN)]}
        filled.append("CallerIdentities")
    elif isinstance(identities, Mapping):
        whole: dict[Any, Any] = {}
        before = len(filled)
        for kind, items in items_of(identities):
            path = f"CallerIdentities.{kind}"
            if not items:
                whole[kind] = [CallerIdentity(UNKNOWN, UNKNOWN)]
                filled.append(path)
            else:
                whole[kind] = _without_gaps(items, CallerIdentity, path, ("identity", "description"), filled)
        if len(filled) > before:
            changes["caller_identities"] = whole


def _fill_targets(targets: Any, changes: dict[str, Any], filled: list[str]) -> None:
    if not targets:
        changes["target_resources"] = {UNKNOWN: [TargetResource(UNKNOWN)]}
        filled.append("TargetResources")
    elif isinstance(targets, Mapping):
        before = len(filled)
        whole = {
            kind: _without_gaps(items, TargetResource, f"TargetResources.{kind}", ("name",), filled)
            for kind, items in items_of(targets)
        }
        if len(filled) > before:
            changes["target_resources"] = whole


def _without_gaps(items: Any, kind: type[Any], path: str, names: tuple[str, ...], filled: list[str]) -> Any:
    """Return *items* with placeholders for missing texts. Items of another class than *kind* stay unchanged."""
    if not isinstance(items, list | tuple):
        return items
    whole = []
    for index, item in enumerate(items):
        missing = [name for name in names if isinstance(item, kind) and not getattr(item, name)]
        filled.extend(f"{path}[{index}].{name.capitalize()}" for name in missing)
        whole.append(replace(item, **dict.fromkeys(missing, UNKNOWN)) if missing else item)
    return whole


def _address_instead_of(value: Any) -> str | None:
    """Return the replacement of a caller's address; None if the address is usable, or invalid."""
    if value is None or value == "":
        return UNKNOWN_ADDRESS
    if not isinstance(value, str | IPv4Address | IPv6Address):
        return None
    try:
        is_unspecified, is_loopback = _is_nowhere_or_here(str(value).partition("%")[0])
    except ValueError:
        return None
    if is_unspecified:
        return UNKNOWN_ADDRESS
    return _own_address() if is_loopback else None


@lru_cache(maxsize=1024)
def _is_nowhere_or_here(text: str) -> tuple[bool, bool]:
    address = ip_address(text)
    plain = getattr(address, "ipv4_mapped", None) or address
    return plain.is_unspecified, plain.is_loopback


def _own_address() -> str:
    """Return the address of this host on its default route; the dummy address if there is none.

    Connects a datagram socket, which sends nothing, and reads its own address.
    """
    for family, far in _FAR_AWAY:
        try:
            with _native_socket(family, SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                own: str = probe.getsockname()[0]
        except OSError:  # no such route, or no such protocol
            continue
        if not ip_address(own.partition("%")[0]).is_loopback:
            return own
    return UNKNOWN_ADDRESS
