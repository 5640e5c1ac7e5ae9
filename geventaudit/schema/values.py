"""Custom values: what MessagePack can carry, and the one form in which it is carried.

:func:`normal_form` turns what people put into ``custom_data`` into plain ``dict``, ``list``, ``str``, ``bytes``,
``int``, ``float``, ``bool``, ``None``, aware UTC ``datetime`` and MessagePack's own two value types, so that a decoded
record equals the one that was accepted. All are of exactly these types: what a subclass does in its methods it does
here, and never while a frame is being packed. Everything else is refused with its path, and so is what would hurt to
carry: too deep, into itself, too much. Packing itself is :mod:`geventaudit.encoder.encoding`'s; only the value types of
msgpack are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any
from uuid import UUID

from msgpack import ExtType, Timestamp

from ..errors import ValidationError, show

__all__ = [
    "MAX_DEPTH",
    "MAX_ERRORS",
    "MAX_VALUES",
    "SCALARS",
    "exact_datetime",
    "items_of",
    "normal_form",
    "note_error",
    "surrogate_problem",
    "text_of",
]

MAX_DEPTH = 56
"""Levels of nesting, the custom data itself being the first. Fluent Bit hangs up on a frame of more than 60 levels, and
a frame has four around the custom data."""

MAX_VALUES = 1 << 17
"""Values in one record's custom data. To go through them holds the hub, so this bounds how long, and it stops a small
structure that shares its parts from unfolding into billions."""

MAX_ERRORS = 100
"""Errors after which the rest of a list, of a mapping of lists, or of custom data is not validated any more."""

SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
"""Values of exactly these types are carried as they are, if they can be at all."""

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1  # integers
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_GETTERS = ("getlist", "getall", "get_list")  # of werkzeug and Django; WebOb, Bottle and multidict; httpx
_AS_TEXT = (UUID, Decimal, IPv4Address, IPv6Address, IPv4Interface, IPv6Interface, IPv4Network, IPv6Network)


def surrogate_problem(text: str) -> str | None:
    """What is wrong with *text* as UTF-8 (only a lone surrogate can be), or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"must be text that UTF-8 can write, got the lone surrogate U+{ord(text[error.start]):04X} "
            f"at position {error.start}"
        )
    return None


def exact_datetime(timestamp: Timestamp) -> datetime | Timestamp:
    """The UTC datetime that says the same as *timestamp*; *timestamp* itself where none does."""
    if timestamp.nanoseconds % 1000:
        return timestamp
    try:
        return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanoseconds // 1000)
    except OverflowError:
        return timestamp


def items_of(mapping: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the items of *mapping*. If it holds several values for a key: each key once, with a list of its values."""
    if type(mapping) is not dict:
        for name in _GETTERS:
            if callable(get := getattr(mapping, name, None)):
                return [(key, list(get(key))) for key in dict.fromkeys(mapping.keys())]
    return mapping.items()


def text_of(value: object) -> str | None:
    """Return the text that *value* is or, as a proxy or lazy object, stands for; None if it is no text.

    :raises Exception: whatever reading the object raises.
    """
    if type(value) is str:
        return value
    return _exact_text(value) if isinstance(value, str) else None


def _exact_text(value: Any) -> str:
    return str.__str__(value if issubclass(type(value), str) else str(value))


def _exact(value: Any) -> Any:
    """Return the plain value that an instance of a plain type is, or stands for; ``_REFUSED`` for all others.

    The methods of a subclass have no say. A proxy has another type than ``isinstance`` says.
    """
    kind = type(value)
    if isinstance(value, type(None) | bool):
        return None if isinstance(value, type(None)) else bool(value)
    if isinstance(value, str):
        return _exact_text(value)
    if isinstance(value, int):
        return int.__int__(value) if issubclass(kind, int) else int(value)
    if isinstance(value, float):
        return float.__float__(value) if issubclass(kind, float) else float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(memoryview(value) if issubclass(kind, bytes | bytearray | memoryview) else value)
    return _REFUSED


def normal_form(data: Mapping[str, Any]) -> dict[str, Any]:
    """*data* as it is carried; *data* itself stays untouched.

    :raises ValidationError: with everything that cannot be carried, by its path.
    """
    walk = _Walk(data)
    result: dict[str, Any] = walk.guarded(walk.mapping, data, True)
    if walk.errors:
        raise ValidationError(walk.errors)
    return result


class _Walk:
    """One pass over one record's custom data: the path to here, what is open above, what was wrong."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.errors: dict[Any, Any] = {}
        self._path: list[Any] = []
        self._open = {id(data)}
        self._room = MAX_VALUES
        self._refused = 0

    def value(self, value: Any) -> Any:
        self._room -= 1
        if self._room < 0:
            if self._room == -1:
                self._refuse(f"must hold at most {MAX_VALUES} values in all")
            return _REFUSED
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind is bool or kind is float or value is None or kind is bytes:
            return value
        if kind is int:
            return self._integer(value)
        return self.guarded(self._container if kind is dict or kind is list else self._other, value)

    def guarded(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``read(*arguments)``. What the methods of a value raise is an error at its path."""
        depth = len(self._path)
        try:
            return read(*arguments)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            del self._path[depth:]
            return self._refuse(f"{_UNREADABLE} {show(error)}")

    def _other(self, value: Any) -> Any:
        """Return the normal form of a value that is of none of the plain types, but may stand for one."""
        if isinstance(value, Enum):  # before str and int: members of a StrEnum and an IntEnum are those too
            return self._member(value)
        if isinstance(value, datetime):
            return self._moment(value)
        if isinstance(value, _AS_TEXT):
            return self._text(_exact_text(str(value)))
        if isinstance(value, Timestamp | ExtType):  # before tuple: an ExtType is one
            return self._native(value)
        if isinstance(value, Mapping | list | tuple | Set):
            return self._container(value)
        plain = _exact(value)
        if plain is _REFUSED:
            hint = ": use a datetime with a tzinfo" if isinstance(value, date) else ""
            return self._refuse(
                f"must be a value that MessagePack can carry, got {show(value)} ({type(value).__name__}){hint}"
            )
        return self._scalar(plain)

    def _scalar(self, plain: Any) -> Any:
        if type(plain) is str:
            return self._text(plain)
        return self._integer(plain) if type(plain) is int else plain

    def _member(self, member: Enum) -> Any:
        """A member is carried as the number, text or bytes that it is, as its text, or else by its name."""
        plain = _exact(member)
        if plain is not _REFUSED:
            return self._scalar(plain)
        if isinstance(member.value, str):
            return self._text(_exact_text(member.value))
        if member.name is None:
            return self._refuse(f"must have a name, got {show(member)} (write its value, {show(member.value)})")
        return self._text(member.name)

    def mapping(self, data: Mapping[Any, Any], top: bool = False) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, value in items_of(data):
            if type(key) is str and key not in result and key.isascii() and self._is_plain(value, 2):
                result[key] = value
                continue
            self._path.append(key)
            plain = self.guarded(self._key, key, top)
            if plain is not _REFUSED:
                if plain in result:
                    self._refuse(f"must be unique, but another key is written as {show(plain)} too")
                result[plain] = self.value(value)
            self._path.pop()
            if self._room < 0:
                break
        return result

    def _key(self, key: Any, top: bool) -> Any:
        if top and not isinstance(key, str):
            return self._refuse(f"must have text as its key, got {show(key)} ({type(key).__name__})")
        if not isinstance(key, str | bytes | int | float | UUID | Enum | None):
            return self._refuse(f"must have a plain value as its key, got {show(key)} ({type(key).__name__})")
        return self.value(key)

    def _container(self, value: Any) -> Any:
        # The custom data itself is one level that the path does not show, and the value stands below the path's last.
        if len(self._path) >= MAX_DEPTH:
            return self._refuse(f"must not be nested deeper than {MAX_DEPTH} levels")
        if id(value) in self._open:
            return self._refuse("must not contain itself")
        self._open.add(id(value))
        try:
            if type(value) is dict or (type(value) is not list and isinstance(value, Mapping)):
                return self.mapping(value)
            items = []
            for index, item in enumerate(value):
                if self._is_plain(item, 1):
                    items.append(item)
                    continue
                self._path.append(index)
                items.append(self.value(item))
                self._path.pop()
                if self._room < 0:
                    break
            return _sorted(items) if type(value) is not list and isinstance(value, Set) else items
        finally:
            self._open.discard(id(value))

    def _is_plain(self, value: Any, room: int) -> bool:
        """Whether *value* is carried as it is; it counts for *room* values then. The short way, which most go."""
        kind = type(value)
        if kind is str:
            plain = value.isascii()
        elif kind is int:
            plain = _LEAST <= value <= _MOST
        else:
            plain = kind in SCALARS
        if not plain or self._room < room:
            return False
        self._room -= room
        return True

    def _text(self, text: str) -> Any:
        if not text.isascii() and (problem := surrogate_problem(text)):
            return self._refuse(problem)
        return text

    def _integer(self, value: int) -> Any:
        if _LEAST <= value <= _MOST:
            return value
        return self._refuse("must be an integer of at most 64 bits (write it as text)")

    def _moment(self, value: datetime) -> Any:
        if value.utcoffset() is None:
            return self._refuse("must be an aware datetime, got a naive one (give it a tzinfo)")
        try:
            moment = value.astimezone(UTC)
        except OverflowError:
            return self._refuse("must be a datetime within the years 1 to 9999 in UTC")
        if type(moment) is datetime:
            return moment
        return datetime.combine(moment.date(), moment.time(), UTC)

    def _native(self, value: Any) -> Any:
        if isinstance(value, ExtType):
            return ExtType(int(value.code), bytes(value.data))
        if not -(1 << 63) <= value.seconds < 1 << 63:
            return self._refuse("must be a timestamp of at most 64 bits of seconds")
        return exact_datetime(Timestamp(int(value.seconds), int(value.nanoseconds)))

    def _refuse(self, problem: str) -> Any:
        """Note what is wrong at the path. Return ``_REFUSED``."""
        self._refused += 1
        if self._refused >= MAX_ERRORS:
            self._room = -2  # ends all loops
        note_error(self.errors, self._path or ["_schema"], problem)
        return _REFUSED


def note_error(errors: dict[Any, Any], path: Sequence[Any], problem: str) -> None:
    """Add *problem* to nested error messages. A key that is refused has no messages below it."""
    node = errors
    for step in path[:-1]:
        node = node.setdefault(step, {})
        if isinstance(node, list):
            return
    texts = node.setdefault(path[-1], [])
    if isinstance(texts, list):
        texts.append(problem)


_REFUSED: Any = object()
_UNREADABLE = "must be a value that can be read; reading it raised"


def _sorted(items: list[Any]) -> list[Any]:
    """*items* of a set in an order that does not depend on hashing: their own, or else by type and text."""
    try:
        return sorted(items)
    except TypeError:
        return sorted(items, key=lambda item: (type(item).__name__, repr(item)))
