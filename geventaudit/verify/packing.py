"""The canonical form of a record, built by the fastest MessagePack library that is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..trail.canonical import BODY_KEYS, NotCanonicalError, canonical_bytes, ordered_identities

__all__ = ["canonical_form"]

packb: Callable[..., bytes] | None = None
try:
    import ormsgpack
except ImportError:
    pass
else:
    packb = ormsgpack.packb
    _SORT_KEYS = ormsgpack.OPT_SORT_KEYS

_SORTED = ("CustomData", "TargetResources")
_BEFORE = BODY_KEYS[: BODY_KEYS.index("CustomData")]
_BEHIND = BODY_KEYS[BODY_KEYS.index("TargetResources") + 1 :]


def canonical_form(body: Mapping[str, Any]) -> bytes:
    """Return :func:`~geventaudit.trail.canonical.canonical_bytes` of a body, or other bytes if no client writes it so.

    :raises NotCanonicalError: no sealing client has written this body. With ``ormsgpack``, numbers that no client
        writes are let through: no MAC fits them.
    """
    if packb is None:
        return canonical_bytes(body)
    try:
        before = {key: body[key] for key in _BEFORE if key in body}
        if "CallerIdentities" in before:
            before["CallerIdentities"] = ordered_identities(before["CallerIdentities"])
        between = {key: body[key] for key in _SORTED if key in body}
        behind = {key: body[key] for key in _BEHIND if key in body}
        # The header of a map of up to 15 keys is one byte.
        return b"%c%b%b%b" % (
            0x80 | len(before) + len(between) + len(behind),
            packb(before)[1:],
            packb(between, option=_SORT_KEYS)[1:],
            packb(behind)[1:],
        )
    except Exception as error:  # text in the place of a map: a KeyError, an AttributeError, or one of ormsgpack's
        raise NotCanonicalError(str(error)) from error
