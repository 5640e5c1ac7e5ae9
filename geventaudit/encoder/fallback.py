"""The plan, executed in plain Python: closures that check a value and return its MessagePack.

A closure raises if it is not sure; ``Walker.frame_of`` returns None then. Values that stand beside each other are read,
checked and looked up by functions in C, such as ``map``. Packed texts and members are cached, since most of them repeat
in an audit trail. All containers are copied before they are read: another thread may change them meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from operator import attrgetter
from typing import Any, TypeAlias

from ..records import AuditType
from ..schema.addresses import canonical_address
from ..schema.values import SCALARS, normal_form
from . import encoding
from .plan import REQUIRED, AddressNode, CustomNode, GroupsNode, ItemsNode, MemberNode, NestedNode, Plan, TextNode

__all__ = ["Walker"]

Write: TypeAlias = Callable[[Any], bytes]
_ANY: frozenset[type] = frozenset()


class _UnsureError(Exception):
    """Let marshmallow decide."""


class Walker:
    """Writes frames by a plan. Thread-safe and re-entrant.

    :param encoder: packs custom data.
    """

    def __init__(self, plan: Plan, encoder: encoding.Encoder) -> None:
        self._plan = plan
        self._pack_time = encoding.Packed(encoding.pack)
        self._message = _reader(plan.message)
        self._record = _reader(plan.record)
        names = [part.name for part in plan.record.parts]
        self._custom = names.index("custom_data")
        self._check, self._writes = _writers(plan.record, encoder)

    def frame_of(self, message: Any, unix_time: float) -> bytes | None:
        """Return the frame of *message*, or None to let marshmallow decide. Raises no ``Exception``."""
        try:
            return self._frame_of(message, unix_time)
        except Exception:
            return None

    def _frame_of(self, message: Any, unix_time: float) -> bytes | None:
        plan = self._plan
        kind, record = self._message(message)
        # By the type: the text "AsmAuditCP" equals a member, and names no type.
        if type(kind) is not AuditType:
            kind = plan.names[kind] if type(kind) is str else None
        values = self._record(record)
        self._check(values)
        parts = [write(value) for write, value in zip(self._writes, values, strict=True)]
        for description, place, packed in plan.needs:
            if not values[description] and packed in parts[place]:
                return None
        header = plan.with_custom if parts[self._custom] else plan.without_custom
        frame = b"".join([plan.heads[kind], self._pack_time[math.floor(unix_time)], header, *parts, plan.tail])
        return frame if len(frame) <= plan.max_bytes else None


def _reader(node: NestedNode) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that returns the values of an object or mapping, in the order of the wire."""
    values_of = attrgetter(*(part.name for part in node.parts))
    pairs = [(part.key, part.default) for part in node.parts]
    keys = {part.key for part in node.parts}

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is node.describes:
            return values_of(value)
        if type(value) is not dict:
            raise _UnsureError
        values = tuple([value.get(key, default) for key, default in pairs])
        if not keys.issuperset(value) or any(each is REQUIRED for each in values):
            raise _UnsureError
        return values

    return read


def _writers(node: NestedNode, encoder: encoding.Encoder) -> tuple[Callable[[tuple[Any, ...]], None], list[Write]]:
    """Return a function that checks the types of all values at once, and the functions that write each of them."""
    kinds, writes = zip(*(_writer(part.node, encoder) for part in node.parts), strict=True)
    good: set[tuple[type, ...]] = set()  # bounded, since only few types are good

    def check(values: tuple[Any, ...]) -> None:
        given = tuple(map(type, values))
        if given not in good:
            if any(each not in allowed for each, allowed in zip(given, kinds, strict=True) if allowed):
                raise _UnsureError
            if all(kinds):
                good.add(given)

    return check, list(writes)


def _writer(node: Any, encoder: encoding.Encoder) -> tuple[frozenset[type], Write]:
    """Return the types that a value may have, to be checked before, and a function that returns its MessagePack.

    Without types, the function itself checks them.
    """
    if isinstance(node, TextNode):
        pack = encoding.text_packer(node.before, empty=node.may_be_empty, blank=node.may_be_blank)
        return frozenset({str}), encoding.Packed(pack).__getitem__
    if isinstance(node, MemberNode):
        return frozenset({str, node.enum}), node.packed.__getitem__
    if isinstance(node, AddressNode):
        kinds = frozenset({str, IPv4Address, IPv6Address})
        return kinds, encoding.Packed(partial(_pack_address, node.before)).__getitem__
    if isinstance(node, ItemsNode):
        return _items(node, encoder)
    if isinstance(node, GroupsNode):
        return _groups(node, encoder)
    if isinstance(node, CustomNode):
        return frozenset({dict}), partial(_pack_custom, node.before, encoder.pack)
    read = _reader(node)
    check, writes = _writers(node, encoder)

    def write(value: Any) -> bytes:
        values = read(value)
        check(values)
        return b"".join([write(each) for write, each in zip(writes, values, strict=True)])

    return _ANY, write


def _items(node: ItemsNode, encoder: encoding.Encoder) -> tuple[frozenset[type], Write]:
    inner_kinds, write = _writer(node.inner, encoder)
    kinds: set[type] = {list, tuple} if node.order is None else {list, tuple, set, frozenset}
    headers = encoding.Packed(lambda size: node.before + encoding.array_header(size))

    def write_items(value: Any) -> bytes:
        value = [*value]
        if inner_kinds and not inner_kinds.issuperset(map(type, value)):
            raise _UnsureError
        if node.order is not None and len(value) > 1:
            value = node.order(value)
        if not (value or node.may_be_empty):
            raise _UnsureError
        return headers[len(value)] + b"".join(map(write, value))

    return frozenset(kinds), write_items


def _groups(node: GroupsNode, encoder: encoding.Encoder) -> tuple[frozenset[type], Write]:
    key_kinds, write_key = _writer(node.key, encoder)
    items_kinds, write_items = _writer(node.items, encoder)
    headers = encoding.Packed(lambda size: node.before + encoding.map_header(size))

    def write_groups(value: Any) -> bytes:
        groups: Mapping[Any, Any] = value.copy()
        if not groups or not key_kinds.issuperset(map(type, groups)):
            raise _UnsureError
        if not items_kinds.issuperset(map(type, groups.values())):
            raise _UnsureError
        pairs = groups.items() if node.order is None or len(groups) == 1 else node.order(groups)
        return headers[len(groups)] + b"".join([write_key(key) + write_items(items) for key, items in pairs])

    return frozenset({dict}), write_groups


def _pack_address(before: bytes, value: Any) -> bytes:
    text, forbidden = canonical_address(str(value))
    if forbidden or not text:
        raise _UnsureError
    return encoding.text_packer(before, empty=False, blank=False)(text)


def _pack_custom(before: bytes, pack: Write, value: dict[Any, Any]) -> bytes:
    value = value.copy()
    for key, each in value.items():
        if type(key) is not str or type(each) not in SCALARS:
            value = normal_form(value)  # the rule itself, for custom data that is not flat and plain
            break
    return before + pack(value) if value else b""
