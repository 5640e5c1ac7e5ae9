"""Execution of the plan in plain Python, by closures that check a value and return its MessagePack.

A closure raises if it cannot decide; then ``Walker.frame_of`` returns None. Sibling values are read, checked and looked
up by functions in C, such as ``map``. Packed texts and members are cached, since most of them repeat in an audit trail.
All containers are copied before they are read: another thread may change them meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from operator import attrgetter, call
from typing import Any, TypeAlias

from ..records import AuditType
from ..schema.addresses import canonical_address
from ..schema.values import SCALARS, normal_form
from . import encoding
from .draft import draft
from .plan import REQUIRED, AddressNode, CustomNode, GroupsNode, ItemsNode, MemberNode, NestedNode, Plan, TextNode

__all__ = ["Walker"]

Write: TypeAlias = Callable[[Any], bytes]

_SEQUENCES = frozenset({list, tuple})


class _UnsureError(Exception):
    """The walker cannot decide: marshmallow must."""


class Walker:
    """Writes frames by a plan, or drafts if it is the plan of a stamp. Thread-safe and re-entrant.

    :param encoder: packs custom data.
    """

    def __init__(self, plan: Plan, encoder: encoding.Encoder) -> None:
        self.frame_of = _frame_writer(plan, encoder)
        """Return the frame of a message at a Unix time, or None to let marshmallow decide. Raises no ``Exception``."""


def _frame_writer(plan: Plan, encoder: encoding.Encoder) -> Callable[[Any, float], bytes | None]:
    read_message, read_record = _reader(plan.message), _reader(plan.record)
    custom = [part.name for part in plan.record.parts].index("custom_data")
    good, check, writes = _writers(plan.record, encoder)
    heads, names, tail, needs, max_bytes = plan.heads, plan.names, plan.tail, plan.needs, plan.max_bytes
    with_custom, without_custom, is_stamped = plan.with_custom, plan.without_custom, encoder.is_stamped
    packed_time, floor = encoding.Packed(encoding.pack), math.floor

    def frame_of(message: Any, unix_time: float) -> bytes | None:
        try:
            kind, record = read_message(message)
            # By the type: the text "AsmAuditCP" equals a member, but is not a name of a type.
            if type(kind) is not AuditType:
                kind = names[kind] if type(kind) is str else None
            values = read_record(record)
            if (given := (*map(type, values),)) not in good:
                check(given)
            parts: list[Any] = [*map(call, writes, values)]
            for description, place, packed in needs:
                if not values[description] and packed in parts[place]:
                    return None
            before = heads[kind], packed_time[floor(unix_time)], with_custom if parts[custom] else without_custom
            frame = b"".join((*before, *parts, tail))
            if len(frame) > max_bytes:
                return None
            if not is_stamped:
                return frame
            body = len(before[0]) + len(before[1])
            cut = body + len(before[2]) + sum(map(len, parts[:custom])) + parts[custom].cut
            return draft(frame, cut, body, unix_time)
        except Exception:
            return None

    return frame_of


def _reader(node: NestedNode) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that returns the values of an object or mapping, in the order of the wire."""
    values_of = attrgetter(*(part.name for part in node.parts))
    describes, pairs = node.describes, [(part.key, part.default) for part in node.parts]
    keys = {part.key for part in node.parts}

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is describes:
            return values_of(value)
        if type(value) is not dict or not keys.issuperset(value):
            raise _UnsureError
        values = tuple([value.get(key, default) for key, default in pairs])
        for each in values:
            if each is REQUIRED:
                raise _UnsureError
        return values

    return read


def _writers(
    node: NestedNode, encoder: encoding.Encoder
) -> tuple[set[tuple[type, ...]], Callable[[tuple[type, ...]], None], list[Write]]:
    """Return the known combinations of types, a function that checks and adds one, and functions that write a value."""
    kinds, writes = zip(*(_writer(part.node, encoder) for part in node.parts), strict=True)
    good: set[tuple[type, ...]] = set()  # bounded, since few types are allowed

    def check(given: tuple[type, ...]) -> None:
        for each, allowed in zip(given, kinds, strict=True):
            if each not in allowed:
                raise _UnsureError
        good.add(given)

    return good, check, list(writes)


def _writer(node: Any, encoder: encoding.Encoder) -> tuple[frozenset[type], Write]:
    """Return the allowed types, which the caller checks, and a function that returns the MessagePack of a value."""
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
    return frozenset({dict}), _custom(node, encoder)


def _items(node: ItemsNode, encoder: encoding.Encoder) -> tuple[frozenset[type], Write]:
    """Return the types and the writer of a list of texts or members."""
    inner_kinds, write = _writer(node.inner, encoder)
    order, headers = node.order, encoding.Packed(lambda size: node.before + encoding.array_header(size))
    one = headers[1]

    def write_items(value: Any) -> bytes:
        items = [*value]
        for each in items:
            if type(each) not in inner_kinds:
                raise _UnsureError
        if len(items) == 1:
            return one + write(items[0])
        if not items:
            raise _UnsureError
        if order is not None:
            items = order(items)
        return headers[len(items)] + b"".join(map(write, items))

    return frozenset({list, tuple, set, frozenset}), write_items


def _groups(node: GroupsNode, encoder: encoding.Encoder) -> tuple[frozenset[type], Write]:
    """Return the types and the writer of a mapping of lists of objects. One function, since calls are expensive."""
    key_kinds, write_key = _writer(node.key, encoder)
    in_order, may_be_empty = node.order or dict.items, node.items.may_be_empty
    read, (good, check, writes) = _reader(node.items.inner), _writers(node.items.inner, encoder)
    packed = encoding.Packed(partial(_pack_groups, node.before, write_key, writes))

    def write_groups(value: Any) -> bytes:
        groups: dict[Any, Any] = value.copy()
        if not groups:
            raise _UnsureError
        if len(groups) == 1:  # mostly of one object: without the loops, a frame takes 6 % less
            ((key, items),) = groups.items()
            if type(key) in key_kinds and type(items) is list and len(items) == 1:
                values = read(items[0])
                if (given := (*map(type, values),)) not in good:
                    check(given)
                return packed[key, (values,)]
        found: list[Any] = []
        for key, items in in_order(groups):
            if type(key) not in key_kinds or type(items) not in _SEQUENCES:
                raise _UnsureError
            objects = (*map(read, items),)
            for values in objects:
                if (given := (*map(type, values),)) not in good:
                    check(given)
            if not (objects or may_be_empty):
                raise _UnsureError
            found += (key, objects)
        return packed[(*found,)]

    return frozenset({dict}), write_groups


def _pack_groups(before: bytes, write_key: Write, writes: list[Write], groups: tuple[Any, ...]) -> bytes:
    """Return the MessagePack of keys, each followed by the values of its objects."""
    parts = [before, encoding.map_header(len(groups) // 2)]
    for key, objects in zip(groups[::2], groups[1::2], strict=True):
        parts += (write_key(key), encoding.array_header(len(objects)))
        for values in objects:
            parts += map(call, writes, values)
    return b"".join(parts)


def _pack_address(before: bytes, value: Any) -> bytes:
    text, forbidden = canonical_address(str(value))
    if forbidden or not text:
        raise _UnsureError
    return encoding.text_packer(before, empty=False, blank=False)(text)


class _Cut(bytes):
    """Custom data with an empty stamp, and the place of its nil."""

    cut: int


def _custom(node: CustomNode, encoder: encoding.Encoder) -> Write:
    before, is_stamped = node.before, encoder.is_stamped
    pack = encoder.pack_custom_data if encoder.is_sealed or encoder.json_safe else encoder.pack

    def write_custom(value: dict[Any, Any]) -> bytes:
        value = value.copy()
        for key, each in value.items():
            if type(key) is not str or type(each) not in SCALARS:
                value = normal_form(value)  # the rule itself, for custom data that is not flat and plain
                break
        if not is_stamped:
            return before + pack(value) if value else b""
        packed, cut = encoder.pack_with_stamp(value)
        made = _Cut(before + packed)
        made.cut = len(before) + cut
        return made

    return write_custom
