"""The stamp and the canonical form of a record: by the compiled module if there is one, otherwise in plain Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..trail.canonical import canonical_bytes

__all__ = ["canonical_form", "plain_stamp"]

compiled: Callable[[Any], bytes | None] | None = None
compiled_stamp: Callable[[Any], tuple[str, int, bytes, bytes] | None] | None = None
try:
    if os.environ.get("PURE_PYTHON"):
        raise ImportError("PURE_PYTHON is set")
    from ._packing import canonical_or_none
    from ._packing import plain_stamp as _compiled_stamp
except ImportError:
    pass
else:
    compiled, compiled_stamp = canonical_or_none, _compiled_stamp


def plain_stamp(stamp: Any) -> tuple[str, int, bytes, bytes] | None:
    """Return stream, number, time and MAC of the stamp of a sealed record with nothing special about it.

    Return None for other stamps, and for all of them without the compiled module.
    """
    return None if compiled_stamp is None else compiled_stamp(stamp)


def canonical_form(body: Mapping[str, Any]) -> bytes:
    """Return :func:`~geventaudit.trail.canonical.canonical_bytes` of a body that a JSON parser has read.

    :raises NotCanonicalError: no sealing client has written this body.
    """
    packed = None if compiled is None else compiled(body)
    return canonical_bytes(body) if packed is None else packed
