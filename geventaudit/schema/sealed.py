"""Custom data of sealed records: sorted, and only values that JSON and its tools do not change.

==========================================  ==========================================================================
value                                       is written as
==========================================  ==========================================================================
integer of 2**53 or more, or its negative   decimal text
float                                       its ``repr``
datetime, timestamp that equals one          ISO 8601 text in UTC
bytes                                       base64url text (RFC 4648, section 5, with padding)
NaN, infinities, other timestamps            refused
MessagePack extension                       refused
key that is not text                        refused
==========================================  ==========================================================================
"""

from __future__ import annotations

import math
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..errors import ValidationError, show
from .json_safe import MAX_SAFE_INTEGER
from .values import note_error

__all__ = ["sealed_form"]

_PLAIN = frozenset({str, bool, type(None)})


def sealed_form(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return custom data in the form of a sealed record: sorted, and only values that JSON can carry.

    :param data: custom data in the form of :func:`~geventaudit.schema.values.normal_form`.
    :raises ValidationError: values or keys are refused, by their wire paths.
    """
    for key, value in data.items():
        kind = type(value)
        if type(key) is not str or (
            kind not in _PLAIN and (kind is not int or not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER)
        ):
            break
    else:  # the common case
        return dict(sorted(data.items()))
    form = _SealedForm()
    result: dict[str, Any] = form.value(data, ())
    if form.errors:
        raise ValidationError({"CustomData": form.errors})
    return result


class _SealedForm:
    """A pass over the custom data of one record."""

    def __init__(self) -> None:
        self.errors: dict[Any, Any] = {}

    def value(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind is str or kind is bool or value is None:
            return value
        if kind is int:
            return value if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER else str(value)
        if kind is dict:
            return self._mapping(value, path)
        if kind is list:
            return [self.value(each, (*path, index)) for index, each in enumerate(value)]
        if kind is float:
            if math.isfinite(value):
                return repr(value)
            return self._refuse(path, f"must be a finite number in a sealed record, got {value}")
        if isinstance(value, datetime):
            return value.isoformat()
        if isinstance(value, bytes):
            return urlsafe_b64encode(value).decode("ascii")
        return self._refuse(path, f"must be a value that JSON can carry in a sealed record, got {show(value)}")

    def _mapping(self, data: Mapping[Any, Any], path: tuple[Any, ...]) -> dict[str, Any]:
        for key in data:
            if type(key) is not str:
                self._refuse((*path, key), f"must have text as its key in a sealed record, got {show(key)}")
        keys = sorted(key for key in data if type(key) is str)
        return {key: self.value(data[key], (*path, key)) for key in keys}

    def _refuse(self, path: tuple[Any, ...], problem: str) -> None:
        note_error(self.errors, path, problem)
