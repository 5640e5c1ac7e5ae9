"""The bytes that a seal covers.

Canonical form C of a record is its MessagePack body as on the wire, with its ``mac`` set to 64 zeros. The record's own
fields are in the order of the wire; ``TargetResources``, ``CustomData`` and every map below them are sorted by code
point. Headers are the shortest. Text is taken as it is, without Unicode normalization. A verifier that reads JSON, of
any order, gets the same bytes.

Custom data holds only what :mod:`geventaudit.schema.sealed` lets through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ..encoder.draft import KEY, NO_MAC
from ..encoder.encoding import pack
from ..errors import show
from ..records import CallerIdentityType
from ..schema.json_safe import MAX_SAFE_INTEGER

__all__ = [
    "BODY_KEYS",
    "KEY",
    "NO_MAC",
    "NotCanonicalError",
    "canonical_bytes",
    "canonical_digest",
]

_LABEL = b"geventaudit seal 1\0"

BODY_KEYS = (
    *("env_ikey", "CallerIpAddress", "CallerIdentities", "OperationCategories", "CustomData", "TargetResources"),
    *("CallerAccessLevels", "OperationAccessLevel", "OperationName", "OperationResultDescription", "CallerAgent"),
    *("OperationCategoryDescription", "OperationType", "OperationResult"),
)
"""The keys of a body, in the order of the wire."""

_IDENTITY_KINDS = {kind.value: place for place, kind in enumerate(CallerIdentityType)}
_IDENTITY_KEYS = ["Identity", "Description"]
_SORTED = frozenset({"CustomData", "TargetResources"})


class NotCanonicalError(Exception):
    """A body holds something that no sealing client writes."""


def canonical_digest(canonical: bytes) -> bytes:
    """Return h, which the MAC authenticates and the digest of a stream is made of."""
    return hashlib.sha256(_LABEL + canonical).digest()


def canonical_bytes(body: Mapping[str, Any]) -> bytes:
    """Return C of a body, whatever the order of its maps. The stamp's ``mac`` must be :data:`NO_MAC` already.

    :raises NotCanonicalError: no sealing client has written this body.
    """
    try:
        ordered = {key: body[key] for key in BODY_KEYS if key in body}
        for key in ordered.keys() & _SORTED:
            ordered[key] = _sorted(ordered[key])
        if "CallerIdentities" in ordered:
            ordered["CallerIdentities"] = _identities(ordered["CallerIdentities"])
        return pack(ordered)
    except NotCanonicalError:
        raise
    except Exception as error:  # a lone surrogate, text in the place of a map: msgpack's errors have no common base
        raise NotCanonicalError(show(error)) from error


def _identities(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {
        kind: [
            one
            if list(one) == _IDENTITY_KEYS
            else {"Identity": one["Identity"], "Description": one["Description"], **one}
            for one in groups[kind]
        ]
        for kind in sorted(groups, key=_IDENTITY_KINDS.__getitem__)
    }


def _sorted(value: Any) -> Any:
    """Return *value* with all its maps sorted. A map that is sorted, and holds no list, is returned itself."""
    kind = type(value)
    if kind is dict:
        return _sorted_map(value)
    if kind is list:
        return [each if type(each) is str else _sorted(each) for each in value]
    if kind is str or kind is bool or value is None:
        return value
    if kind is int and -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
        return value
    raise NotCanonicalError(f"a sealed record has no such number: {show(value)}")


def _sorted_map(value: dict[str, Any]) -> dict[str, Any]:
    names = list(value)
    ordered = sorted(names)
    made = value if names == ordered else {name: value[name] for name in ordered}
    for name, each in value.items():
        kind = type(each)
        if kind is str or (kind is int and -MAX_SAFE_INTEGER <= each <= MAX_SAFE_INTEGER):
            continue
        new = _sorted_map(each) if kind is dict else _sorted(each)
        if new is not each:
            made = dict(made) if made is value else made
            made[name] = new
    return made
