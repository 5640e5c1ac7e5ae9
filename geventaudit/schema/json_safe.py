"""Custom data that every JSON reader understands, for the client option ``json_safe``.

MessagePack carries more than JSON. An agent that writes JSON either invents a spelling for such a value or writes
invalid JSON: Fluent Bit 5.1.1 writes ``nan``, bare integer keys and hexadecimal text in place of extensions.
:func:`json_safe` replaces these values before the frame is packed. Its result stays within I-JSON (RFC 7493).

==========================================  ==========================================================================
value                                       is written as
==========================================  ==========================================================================
datetime, MessagePack timestamp             ISO 8601 text in UTC, with nanoseconds where the timestamp has them
NaN, infinities                             the texts ``NaN``, ``Infinity``, ``-Infinity``
integer beyond 2**53 - 1, or its negative   decimal text
integer within these limits, finite float   the number
bytes                                       base64url text (RFC 4648, section 5, with padding)
key: integer, float, boolean, None, bytes   text: ``1``, ``1.5``, ``true``, ``null``, base64url
key equal to another key as text            refused
MessagePack extension                       refused
timestamp outside the years 1 to 9999       refused
==========================================  ==========================================================================
"""

from __future__ import annotations

import math
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from msgpack import ExtType, Timestamp

from ..errors import ValidationError, show
from .values import note_error

__all__ = ["MAX_SAFE_INTEGER", "json_safe"]

MAX_SAFE_INTEGER = (1 << 53) - 1
"""The largest integer that double-precision numbers represent exactly, like all smaller ones (RFC 7493)."""

_MAX_INTEGER = (1 << 64) - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def json_safe(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of custom data with only values that JSON can carry.

    Pure and thread-safe. *data* is not changed.

    :param data: custom data in the form of :func:`~geventaudit.schema.values.normal_form`.
    :raises ValidationError: values or keys are refused; the messages have their wire paths, below ``CustomData``.
    """
    converter = _Converter()
    result = converter.mapping(data)
    if converter.errors:
        raise ValidationError({"CustomData": converter.errors})
    return result


class _Converter:
    """A pass over the custom data of one record."""

    def __init__(self) -> None:
        self.errors: dict[Any, Any] = {}
        self._path: list[Any] = []

    def mapping(self, data: Mapping[Any, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in data.items():
            self._path.append(key)
            text = self._key(key)
            if text in result:
                self._refuse(f"must be unique as text, but another key is written as {show(text)} too (rename one)")
            result[text] = self._value(value)
            self._path.pop()
        return result

    def _value(self, value: Any) -> Any:
        if value is None or isinstance(value, str | bool):
            return value
        if isinstance(value, int):
            # Packing refuses integers of more than 64 bits.
            is_carried = -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER or not -_MAX_INTEGER <= value <= _MAX_INTEGER
            return value if is_carried else str(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else _text_of_float(value)
        if isinstance(value, Mapping):
            return self.mapping(value)
        if isinstance(value, bytes):
            return urlsafe_b64encode(value).decode("ascii")
        if isinstance(value, datetime):
            return value.isoformat()
        if isinstance(value, Timestamp):
            return self._timestamp(value)
        if isinstance(value, ExtType):  # before tuple: an ExtType is a tuple
            return self._refuse(
                f"must be a value that JSON can carry (json_safe=True), got the MessagePack extension {value.code} "
                "(give its data as bytes or text)"
            )
        if isinstance(value, list | tuple):
            return self._items(value)
        return value

    def _items(self, values: list[Any] | tuple[Any, ...]) -> list[Any]:
        result = []
        for index, value in enumerate(values):
            self._path.append(index)
            result.append(self._value(value))
            self._path.pop()
        return result

    def _key(self, key: Any) -> str:
        if isinstance(key, str):
            return key
        if key is None:
            return "null"
        if isinstance(key, bool):
            return "true" if key else "false"
        if isinstance(key, float):
            return _text_of_float(key)
        if isinstance(key, bytes):
            return urlsafe_b64encode(key).decode("ascii")
        return str(key)

    def _timestamp(self, value: Timestamp) -> str | None:
        try:
            second = _EPOCH + timedelta(seconds=value.seconds)
        except OverflowError:
            self._refuse(
                f"must be a time within the years 1 to 9999 for JSON (json_safe=True), got {value.seconds} s since 1970"
            )
            return None
        return f"{second.replace(tzinfo=None).isoformat()}.{value.nanoseconds:09d}+00:00"

    def _refuse(self, problem: str) -> None:
        note_error(self.errors, self._path, problem)


def _text_of_float(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(value)
