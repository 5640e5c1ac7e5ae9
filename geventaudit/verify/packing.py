"""The canonical form of a record: by the compiled module if there is one, otherwise in plain Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..trail.canonical import canonical_bytes

__all__ = ["canonical_form"]

compiled: Callable[[Any], bytes | None] | None = None
try:
    if os.environ.get("PURE_PYTHON"):
        raise ImportError("PURE_PYTHON is set")
    from ._packing import canonical_or_none
except ImportError:
    pass
else:
    compiled = canonical_or_none


def canonical_form(body: Mapping[str, Any]) -> bytes:
    """Return :func:`~geventaudit.trail.canonical.canonical_bytes` of a body that a JSON parser has read.

    :raises NotCanonicalError: no sealing client has written this body.
    """
    packed = None if compiled is None else compiled(body)
    return canonical_bytes(body) if packed is None else packed
