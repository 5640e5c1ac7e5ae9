"""The plan: the layout of a frame and the rules of its values, as plain data, derived once from the stock schema.

The plan is a tree of nodes, one for each value that is checked and written. ``before`` holds the constant bytes in
front of the value: its key, and the header of a map that begins there. :mod:`.fallback` and ``_fast.pyx`` execute the
plan. Both accept only values of the exact types of records. They return a frame, or None to let marshmallow decide.

Add a new rule to the schema first. If a node cannot express the rule, its executors must return None for such values.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeAlias, dataclass_transform

from ..records import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record, TargetResource
from ..schema.fields import SENDABLE, Address, CustomData, Groups, Items, Member, Text
from ..schema.rules import NEEDS_DESCRIPTION, MsgSchema, default_of
from ..schema.values import MAX_DEPTH, MAX_VALUES
from . import encoding

__all__ = ["REQUIRED", "Node", "Part", "Plan", "plan_of", "stock_schema"]

REQUIRED: Any = object()
"""The default of a part that a mapping must have."""

# A record with a value in every field: its body on the wire shows the layout of all bodies.
_EXAMPLE = Record(
    operation_categories=[OperationCategory.UNKNOWN],
    caller_ip_address="192.0.2.1",
    caller_identities={CallerIdentityType.UNKNOWN: [CallerIdentity("", "")]},
    caller_access_levels=[""],
    target_resources={"": [TargetResource("")]},
    custom_data={"": ""},
)


@dataclass_transform(kw_only_default=True)
class _Data(SimpleNamespace):
    """Named values. Python makes such a class in a tenth of the time of a NamedTuple, which counts at import."""


class TextNode(_Data):
    """A text."""

    before: bytes
    may_be_empty: bool
    may_be_blank: bool


class MemberNode(_Data):
    """A member of *enum*, or its value as text. *packed* includes the bytes before the value."""

    enum: type[StrEnum]
    packed: dict[StrEnum, bytes]


class AddressNode(_Data):
    """The caller's address."""

    before: bytes


class ItemsNode(_Data):
    """A list or tuple; with an *order* also a set: members sorted by number, texts by bytes, without duplicates."""

    before: bytes
    inner: Any
    order: Callable[[Any], list[Any]] | None
    may_be_empty: bool


class GroupsNode(_Data):
    """A mapping that is not empty; with an *order*, sorted by the number of its member keys, or by its text keys."""

    before: bytes
    key: Any
    items: Any
    order: Callable[[Any], list[tuple[Any, Any]]] | None


class CustomNode(_Data):
    """Custom data; left out if empty. MessagePack packs *native* types without a hook."""

    before: bytes
    max_depth: int
    native: frozenset[type] = frozenset()
    is_json_safe: bool = False
    """True if custom data is converted before it is packed; see :mod:`geventaudit.schema.json_safe`."""
    is_stamped: bool = False
    """True to leave place for a stamp: then custom data is never left out."""
    is_sealed: bool = False
    """True to write the form of :mod:`geventaudit.schema.sealed`."""


class Part(_Data):
    """A value of an object or a mapping."""

    name: str
    key: str
    default: Any
    node: Any


class NestedNode(_Data):
    """An object of the class *describes*, or a mapping by the keys of its parts, in the order of the wire."""

    describes: type[Any]
    parts: tuple[Part, ...]


Node: TypeAlias = TextNode | MemberNode | AddressNode | ItemsNode | GroupsNode | CustomNode | NestedNode


class Plan(_Data):
    """A frame: the head of its type, the seconds, the header of the body with or without custom data, parts, tail."""

    message: NestedNode
    record: NestedNode
    heads: dict[AuditType, bytes]
    names: dict[str, AuditType]
    with_custom: bytes
    without_custom: bytes
    tail: bytes
    needs: tuple[tuple[int, int, bytes], ...]
    """The position of a description, that of the part that may require it, and the bytes of that part that do."""
    max_bytes: int


@cache
def stock_schema() -> MsgSchema:
    """Return the schema of the protocol's rules; always the same one, never changed."""
    return MsgSchema()


def plan_of(encoder: encoding.Encoder) -> Plan:
    """Return the plan of the frames that *encoder* makes of messages by the stock schema."""
    record = _record_node(encoder.native, encoder.json_safe, encoder.is_stamped, encoder.is_sealed)
    heads = {kind: encoding.envelope(kind)[0] for kind in SENDABLE.values()}
    own = {} if encoder.service_tree_id is None else {"env_ikey": encoder.service_tree_id}
    first = b"".join(encoding.pack(key) + encoding.pack(value) for key, value in own.items())
    names = [part.name for part in record.parts]
    size = len(own) + len(names)
    return Plan(
        message=NestedNode(
            describes=Msg,
            parts=tuple(Part(name=name, key=name.title(), default=REQUIRED, node=None) for name in ("type", "record")),
        ),
        record=record,
        heads=heads,
        names=SENDABLE,
        with_custom=encoding.map_header(size) + first,
        without_custom=encoding.map_header(size - (not encoder.is_stamped)) + first,
        tail=encoding.envelope(AuditType.DATA_PLANE)[1],
        needs=tuple(
            (names.index(description), names.index(name), encoding.pack(value.value))
            for description, (name, value) in NEEDS_DESCRIPTION.items()
        ),
        # A value takes at least one byte: a frame within this limit cannot hold too many values of custom data.
        max_bytes=min(encoder.max_frame_bytes, MAX_VALUES),
    )


@cache
def _record_node(native: frozenset[type], is_json_safe: bool, is_stamped: bool, is_sealed: bool) -> NestedNode:
    field: Any = stock_schema().fields["record"]
    node = _nested(b"", field.schema, encoding.record_body(_EXAMPLE, None, is_sealed=is_sealed), headers=False)
    for part in node.parts:
        inner = part.node
        if isinstance(inner, CustomNode):
            inner.native, inner.is_json_safe = native, is_json_safe and not is_sealed
            inner.is_stamped, inner.is_sealed = is_stamped, is_sealed
        elif is_sealed and isinstance(inner, GroupsNode) and inner.order is None:
            inner.order = _by_key
    return node


def _by_key(groups: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the groups of a sealed record, sorted by the code points of their keys."""
    return sorted(groups.items())


def _nested(before: bytes, schema: Any, example: dict[str, Any], *, headers: bool = True) -> NestedNode:
    by_key = {field.data_key: (name, field) for name, field in schema.fields.items()}
    before += encoding.map_header(len(example)) if headers else b""
    parts = []
    for key, value in example.items():
        name, field = by_key[key]
        default = REQUIRED if field.required else default_of(field)
        parts.append(Part(name=name, key=key, default=default, node=_node(before + encoding.pack(key), field, value)))
        before = b""
    return NestedNode(describes=schema.describes, parts=tuple(parts))


def _node(before: bytes, field: Any, example: Any) -> Node:
    if isinstance(field, Text):
        return TextNode(before=before, may_be_empty=not field.required, may_be_blank=field.may_be_blank)
    if isinstance(field, Member):
        packed = {each: before + encoding.pack(each.value) for each in field.enum}
        return MemberNode(enum=field.enum, packed=packed)
    if isinstance(field, Address):
        return AddressNode(before=before)
    if isinstance(field, Items):
        inner = _node(b"", field.inner, example[0])
        return ItemsNode(before=before, inner=inner, order=field.order, may_be_empty=field.may_be_empty)
    if isinstance(field, Groups):
        (value,) = example.values()
        key, items = _node(b"", field.key_field, None), _node(b"", field.value_field, value)
        return GroupsNode(before=before, key=key, items=items, order=field.order)
    if isinstance(field, CustomData):
        return CustomNode(before=before, max_depth=MAX_DEPTH)
    return _nested(before, field.schema, example)
