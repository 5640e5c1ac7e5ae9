"""Identifiers of a request that its headers carry: ``X-Request-Id`` and ``traceparent``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["identifiers_of"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,128}")
# https://www.w3.org/TR/trace-context/: versions after 00 may have more parts, behind a dash.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_TRACEPARENT_LENGTH = 55


def identifiers_of(environ: Mapping[str, Any]) -> dict[str, str]:
    """Return ``request_id`` and ``traceparent``, as far as the headers are valid.

    A request id has 1 to 128 letters, digits and characters of ``._~+/=:@-``. Of a traceparent, the four parts of
    version 00 are kept: 55 characters.
    """
    found: dict[str, str] = {}
    request_id = environ.get("HTTP_X_REQUEST_ID")
    if isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id := request_id.strip(" \t")):
        found["request_id"] = request_id
    parent = environ.get("HTTP_TRACEPARENT")
    match = _TRACEPARENT.fullmatch(parent.strip(" \t")) if isinstance(parent, str) else None
    if match is not None and (match[1] != "00" or match[2] is None):
        found["traceparent"] = match[0][:_TRACEPARENT_LENGTH]
    return found
