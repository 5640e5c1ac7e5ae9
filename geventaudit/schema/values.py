"""The values of custom data, and their normal form.

:func:`normal_form` converts ``custom_data`` to plain ``dict``, ``list``, ``str``, ``bytes``, ``int``, ``float``,
``bool``, ``None``, aware UTC ``datetime`` and MessagePack's own two value types, so that a decoded record equals the
accepted one. All values have exactly these types: methods of subclasses run here, and never while a frame is packed.
Other values are refused with their path. So are values that are too deep, contain themselves, or are too many.
:mod:`geventaudit.encoder.encoding` packs the result; this module uses only the value types of msgpack.
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
"""The most levels of nesting; the custom data itself is the first. Fluent Bit hangs up on a frame of more than 60
levels, and a frame has four around the custom data."""

MAX_VALUES = 1 << 17
"""The most values in the custom data of one record. Validation holds the hub, and this limits the time. A small
structure that contains its parts many times cannot expand to billions of values."""

MAX_ERRORS = 100
"""Errors after which validation of a list, of a mapping of lists, or of custom data stops."""

SCALARS = frozenset({str, int, float, bool, bytes, type(None)})
"""Valid values of exactly these types are not converted."""

_LEAST, _MOST = -(1 << 63), (1 << 64) - 1  # integers
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_GETTERS = ("getlist", "getall", "get_list")  # of werkzeug and Django; WebOb, Bottle and multidict; httpx
_AS_TEXT = (UUID, Decimal, IPv4Address, IPv6Address, IPv4Interface, IPv6Interface, IPv4Network, IPv6Network)


def surrogate_problem(text: str) -> str | None:
    """Return an error text if *text* has a lone surrogate, so that UTF-8 cannot write it; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"must be text that UTF-8 can write, got the lone surrogate U+{ord(text[error.start]):04X} "
            f"at position {error.start}"
        )
    return None


def exact_datetime(timestamp: Timestamp) -> datetime | Timestamp:
    """Return the UTC datetime that equals *timestamp*; *timestamp* itself if there is none."""
    if timestamp.nanoseconds % 1000:
        return timestamp
    try:
        return _EPOCH + timedelta(seconds=timestamp.seconds, microseconds=timestamp.nanoseconds // 1000)
    except OverflowError:
        return timestamp


def items_of(mapping: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the items of *mapping*. A mapping with several values for a key gives each key once, with a list."""
    if type(mapping) is not dict:
        for name in _GETTERS:
            if callable(get := getattr(mapping, name, None)):
                return [(key, list(get(key))) for key in dict.fromkeys(mapping.keys())]
    return mapping.items()


def text_of(value: object) -> str | None:
    """Return *value* as a plain text, also if it is a proxy or a lazy object of a text; None if it is not a text.

    :raises Exception: a method of *value* raised.
    """
    if type(value) is str:
        return value
    return _exact_text(value) if isinstance(value, str) else None


def _exact_text(value: Any) -> str:
    return str.__str__(value if issubclass(type(value), str) else str(value))


def _exact(value: Any) -> Any:
    """Return the plain value of an instance of a plain type, or of its proxy; ``_REFUSED`` for other values.

    The methods of a subclass are ignored. The real type of a proxy is another one than ``isinstance`` says.
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
    """Return the normal form of *data*. *data* is not changed.

    :raises ValidationError: *data* has values that cannot be carried; the error has their paths.
    """
    walk = _Walk(data)
    result: dict[str, Any] = walk.guarded(walk.mapping, data, True)
    if walk.errors:
        raise ValidationError(walk.errors)
    return result


class _Walk:
    """A pass over the custom data of one record: the current path, the open containers, and the errors."""

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
        """Return ``read(*arguments)``. An exception of a method of the value becomes an error at its path."""
        depth = len(self._path)
        try:
            return read(*arguments)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            del self._path[depth:]
            return self._refuse(f"{_UNREADABLE} {show(error)}")

    def _other(self, value: Any) -> Any:
        """Return the normal form of a value of another type than the plain ones."""
        if isinstance(value, Enum):  # before str and int: a member of a StrEnum or an IntEnum is one of these too
            return self._member(value)
        if isinstance(value, datetime):
            return self._moment(value)
        if isinstance(value, _AS_TEXT):
            return self._text(_exact_text(str(value)))
        if isinstance(value, Timestamp | ExtType):  # before tuple: an ExtType is a tuple
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
        """Return a member as its own number, text or bytes, else as its value if that is text, else as its name."""
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
        # The custom data itself is a level that is not part of the path.
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
        """Return True if *value* needs no conversion, and count it as *room* values. The fast path of most values."""
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
        """Note *problem* at the current path. Return ``_REFUSED``."""
        self._refused += 1
        if self._refused >= MAX_ERRORS:
            self._room = -2  # ends all loops
        note_error(self.errors, self._path or ["_schema"], problem)
        return _REFUSED


def note_error(errors: dict[Any, Any], path: Sequence[Any], problem: str) -> None:
    """Add *problem* to nested error messages. Below a refused key, there are no messages."""
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
    """Return the items of a set in an order that does not depend on hashing: their own, else by type and repr."""
    try:
        return sorted(items)
    except TypeError:
        return sorted(items, key=lambda item: (type(item).__name__, repr(item)))
