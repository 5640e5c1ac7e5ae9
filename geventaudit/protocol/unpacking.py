"""MessagePack to values, within limits. Pure: no I/O, no clock.

Received bytes are first scanned for the ends of values, without unpacking. Then values are unpacked one at a time,
since a value may take one byte in a frame and a hundred bytes in memory.
"""

from __future__ import annotations

from typing import Any

import msgpack

from ..errors import FrameError, show
from ..schema.values import MAX_VALUES

__all__ = [
    "MAX_ITEMS",
    "EventTime",
    "OutOfData",
    "Scanner",
    "Timestamp",
    "ValueReader",
    "is_array",
    "kind_of",
    "unpack_error",
    "unpacker",
]

MAX_ITEMS = 3 * MAX_VALUES
"""The most values in one entry of a frame, nested ones included. No record of 1 MiB has as many."""

_ROOM = 1 << 20  # bytes of a buffer beyond the longest frame, for one more read

# An attacker can choose integers and floats so that a dict of N keys takes N * N steps. (Hashes of text and bytes are
# random.) A dict with this number of them takes less than 20 ms.
_MAX_NUMBERS = 4096
_TEXTS = frozenset({str})
_KEYS = frozenset({str, bytes, bool, int, float, type(None)})
_NUMBERS = frozenset({int, float})

EventTime = msgpack.ExtType
Timestamp = msgpack.Timestamp
OutOfData = msgpack.OutOfData


def unpacker(max_bytes: int, max_items: int, limits: _Limits | None = None, text_errors: str = "strict") -> Any:
    """Return an ``Unpacker`` of values of at most *max_bytes*.

    :param max_items: the most items of one array, and twice the most items of one map.
    :param limits: hooks for arrays and maps.
    :param text_errors: the handling of text that is not UTF-8, as for ``bytes.decode()``.
    """
    return msgpack.Unpacker(
        raw=False,
        unicode_errors=text_errors,
        strict_map_key=False,
        timestamp=0,
        read_size=min(max_bytes, 4096),
        max_buffer_size=max_bytes + _ROOM,
        max_str_len=max_bytes,
        max_bin_len=max_bytes,
        max_ext_len=max_bytes,
        max_array_len=min(max_bytes, max_items),  # msgpack allocates as many items as a header announces
        max_map_len=min(max_bytes, max_items // 2),
        list_hook=limits and limits.array,
        object_pairs_hook=limits and limits.map,
    )


def unpack_error(error: Exception, offset: int) -> FrameError:
    """Return msgpack's *error* as a FrameError. msgpack's errors have no common base."""
    return FrameError(f"not MessagePack: {str(error) or type(error).__name__}", offset)


def is_array(first: int) -> bool:
    """Return True if a value with that first byte is an array."""
    return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)


def kind_of(first: int) -> str:
    """Return the kind of a value with that first byte, for errors."""
    if first <= 0x8F:
        return f"the number {first}" if first <= 0x7F else "a map"
    if first <= 0x9F or first in (0xDC, 0xDD):
        return "an array"
    if first <= 0xBF or 0xD9 <= first <= 0xDB:
        return "text"
    if first in _KINDS:
        return _KINDS[first]
    return "a number" if 0xCA <= first <= 0xD3 or first >= 0xE0 else "an extension"


_KINDS = {
    0xC0: "nil", 0xC1: "not MessagePack", 0xC2: "False", 0xC3: "True", 0xC4: "bytes", 0xC5: "bytes", 0xC6: "bytes",
    0xDE: "a map", 0xDF: "a map",
}  # fmt: skip


class Scanner:
    """Finds the ends of values in a stream, without unpacking.

    An operation that needs more bytes raises :data:`OutOfData` and can be repeated after the next :meth:`feed`. Other
    errors are a :class:`FrameError` at *offset*.

    :param max_bytes: the most bytes that are fed and not scanned.
    """

    def __init__(self, max_bytes: int, offset: int = 0) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=max_bytes + _ROOM, read_size=4096)
        self.offset = offset
        """The start of the current frame in bytes, for the errors."""

    @property
    def position(self) -> int:
        """Bytes scanned."""
        return int(self._unpacker.tell())

    def feed(self, data: bytes) -> bool:
        """Take *data*. Return False if there is no room for it."""
        try:
            self._unpacker.feed(data)
        except msgpack.BufferFull:
            return False
        return True

    def array_header(self) -> int:
        """Return the number of items of an array, and move to the first item."""
        try:
            return int(self._unpacker.read_array_header())
        except OutOfData:
            raise
        except Exception as error:
            raise unpack_error(error, self.offset) from error

    def skip(self) -> int:
        """Skip the next value and return its end."""
        try:
            self._unpacker.skip()
        except OutOfData:
            raise
        except Exception as error:
            raise unpack_error(error, self.offset) from error
        return int(self._unpacker.tell())


class _Limits:
    """The limits of one value, as the hooks of an ``Unpacker``."""

    def __init__(self, most: int, most_numbers: int) -> None:
        self._most = most
        self._most_numbers = most_numbers
        self.problem = ""
        self.reset()

    def reset(self) -> None:
        self.problem = ""
        self._left = self._most
        self._numbers_left = self._most_numbers

    @property
    def taken(self) -> int:
        return self._most - self._left

    def array(self, items: list[Any]) -> list[Any]:
        self._take(len(items))
        return items

    def map(self, items: Any) -> dict[Any, Any]:
        pairs = list(items)  # an iterator, from msgpack without its C extension
        self._take(2 * len(pairs))
        kinds = {type(key) for key, _ in pairs}
        if not kinds <= _TEXTS and not self._may_be_keys(kinds, pairs):
            return {}
        result = dict(pairs)
        if len(result) != len(pairs) and not self.problem:
            seen: set[Any] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self.problem = f"a map has the key {show(twice)} twice"
        return result

    def _may_be_keys(self, kinds: set[type], pairs: list[tuple[Any, Any]]) -> bool:
        if strange := kinds - _KEYS:
            key = next(key for key, _ in pairs if type(key) in strange)
            self.problem = self.problem or f"the keys of a map must be text or numbers, got {show(key)}"
            return False
        if kinds & _NUMBERS:
            self._numbers_left -= sum(type(key) in _NUMBERS for key, _ in pairs)
            if self._numbers_left < 0:
                self.problem = self.problem or f"must have at most {self._most_numbers} numbers as keys of maps"
                return False
        return True

    def _take(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise ValueError(f"more than {self._most} values in one")


class ValueReader:
    """Unpacks complete values. All errors are a :class:`FrameError`.

    :param max_bytes: the most bytes of one value.
    :param offset: the offset of the frame in its stream, for the errors.
    :param most: the most values in one value, nested ones included.
    :param most_numbers: the most numbers among the keys of all maps of one value.
    """

    def __init__(self, max_bytes: int, offset: int, most: int = MAX_ITEMS, most_numbers: int = _MAX_NUMBERS) -> None:
        self._offset = offset
        # A separate object: hooks that are methods of the reader would make a reference cycle.
        self._limits = _Limits(most, most_numbers)
        # Text that is not UTF-8 gets lone surrogates, which the rules for records refuse, with their path.
        self._unpacker = unpacker(max(max_bytes, 1), most, self._limits, "surrogateescape")

    @property
    def problem(self) -> str:
        """The reason for which the last value cannot be used, or "": a map has a forbidden or repeated key. Such a map
        is read as an empty one."""
        return self._limits.problem

    @property
    def values(self) -> int:
        """The number of values in all arrays and maps of the last value."""
        return self._limits.taken

    def read(self, data: bytes) -> Any:
        """Return the value that *data* holds."""
        self._limits.reset()
        try:
            self._unpacker.feed(data)
            return self._unpacker.unpack()
        except Exception as error:
            raise unpack_error(error, self._offset) from error
