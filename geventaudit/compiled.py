"""Validation at the price of an encoding: a function compiled from a schema, which is sure of a message or says nothing.

marshmallow is the only statement of the rules and the only author of messages, but it takes dozens of times as long as
packing a record. :class:`Compiled` reads a schema once and writes the source of a function that goes through a message
one time, checks it, and puts its frame together. Whenever it is not sure that a message is valid, and what its frame
is, the function returns None, and the message is loaded and encoded as if there were no such function.

It is sure of the plain case only: exactly the types that a record is annotated with (or mappings and lists, of text),
and the fields of :mod:`geventaudit.schemas` as they are there. A field of the user's own is called, with what
marshmallow would call it with, and what it returns has to keep the rules too; it is called a second time where the
message turns out to be wrong. A schema with hooks on whole records, or with methods of its own in place of
marshmallow's, is not compiled at all. ``source`` shows what was written, or why nothing was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import getattr_static
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeAlias

from . import wire
from .records import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record, TargetResource
from .schemas import (
    NEEDS_DESCRIPTION,
    TYPE_NAMES,
    MsgSchema,
    RecordSchema,
    _Address,
    _CustomData,
    _Groups,
    _Items,
    _Member,
    _Text,
    canonical_address,
)
from .values import MAX_VALUES, SCALARS, normal_form

__all__ = ["Compiled"]

Pack: TypeAlias = Callable[[Any], bytes]

# One record with something in every place: how its body looks on the wire is how all bodies do.
_EXAMPLE = Record(
    operation_categories=[OperationCategory.UNKNOWN],
    caller_ip_address="192.0.2.1",
    caller_identities={CallerIdentityType.UNKNOWN: [CallerIdentity("", "")]},
    caller_access_levels=[""],
    target_resources={"": [TargetResource("")]},
    custom_data={"": ""},
)

# What every class has for itself, and what of a field or a schema no load looks at.
_OF_EACH_CLASS = {
    "__init__", "__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__static_attributes__",
    "__firstlineno__", "__parameters__", "Meta", "opts", "error_messages", "_declared_fields", "_hooks",
}  # fmt: skip
_OF_EACH_FIELD = {"parent", "name", "root", "metadata", "error_messages", "dump_default", "load_only", "validate"}


# What is remembered of each field: this many values, of so many bytes with their key.
_MOST = 1024
_LONGEST = 128


class _NotCompiledError(Exception):
    """Why a schema is left to marshmallow."""


class Compiled:
    """The function compiled from one schema, for the frames of one encoder (and its twins).

    ``frame_of(message, unix_time, pack)`` is the frame, or None where it is not sure; *pack* is the encoder's, so that
    each thread brings its own. It raises nothing but what is no ``Exception``.
    """

    def __init__(self, schema: MsgSchema, encoder: wire.Encoder) -> None:
        self.frame_of: Callable[[Any, float, Pack], bytes | None] = lambda message, unix_time, pack: None
        try:
            _refuse_strange(schema, MsgSchema())
            record_schema = schema.fields["record"].schema
            _refuse_strange(record_schema, RecordSchema())
            source = _Source()
            for by_name in (True, False):
                _Function(source, schema, record_schema, encoder, by_name).write()
            self.source = source.text()
            exec(compile(self.source, "<compiled schema>", "exec"), source.names)
            self.frame_of = source.names["frame_of"]
        except _NotCompiledError as reason:
            self.source = f"# left to marshmallow: {reason}\n"


# -- what may be compiled ----------------------------------------------------------------------------------------------


def _refuse_strange(schema: Any, stock: Any) -> None:
    """Leave *schema* to marshmallow if it does more than *stock*, its fields and the validators of fields apart."""
    for name in set(dir(type(stock))) - _OF_EACH_CLASS:
        if getattr_static(type(schema), name, None) is not getattr_static(type(stock), name):
            raise _NotCompiledError(f"{type(schema).__name__} has its own {name}")
    for name in (vars(schema).keys() - vars(stock).keys()) & set(dir(type(stock))):
        raise _NotCompiledError(f"{name} was set on an instance of {type(schema).__name__}")
    for tag in ("pre_load", "post_load", "validates_schema", "validates"):
        methods = [name for name, *_ in schema._hooks[tag]]
        expected = [name for name, *_ in stock._hooks[tag]]
        if methods != expected and (tag != "validates" or type(stock) is not RecordSchema):
            raise _NotCompiledError(f"{type(schema).__name__} has {tag} methods: {', '.join(methods)}")
    for name, field in schema.fields.items():
        if field.attribute not in (None, name) or (type(stock) is MsgSchema and not _same(field, stock.fields[name])):
            raise _NotCompiledError(f"{name} of {type(schema).__name__} is another field")


def _same(field: Any, stock: Any) -> bool:
    """Whether *field* does what *stock* does. The schema of a record may differ; it is looked at by itself."""
    ignored = _OF_EACH_FIELD | ({"nested", "_schema"} if stock.name == "record" else set())
    mine = {name: value for name, value in vars(field).items() if name not in ignored}
    return type(field) is type(stock) and mine == {name: vars(stock)[name] for name in vars(stock) if name in mine}


# -- what is remembered ------------------------------------------------------------------------------------------------


class _Packed(dict[Any, bytes]):
    """Values that were found valid, packed, behind what always stands before them. Bounded.

    Most texts of a trail come again and again. Threads may share it: what two of them miss at once is made twice.
    """

    def __init__(self, before: bytes, pack: Pack) -> None:
        self._before = before
        self._pack = pack

    def __missing__(self, value: Any) -> bytes:
        packed = self._before + self._pack(value)
        if len(packed) <= _LONGEST:
            if len(self) >= _MOST:
                self.clear()  # costs less than knowing which were used last
            self[value] = packed
        return packed


def _text_packer(required: bool, may_be_blank: bool) -> Pack:
    def pack(text: str) -> bytes:
        if (required and not text) or not (may_be_blank or (text and not text.isspace())):
            raise ValueError("empty, or perhaps blank")
        return wire.pack(text)  # raises for text that UTF-8 cannot write

    return pack


def _address_text(address: Any) -> str:
    if type(address) is not IPv4Address and type(address) is not IPv6Address:
        raise TypeError("perhaps no address")
    return str(address)


def _pack_address(text: str) -> bytes:
    address, forbidden = canonical_address(text)
    if forbidden:
        raise ValueError(forbidden)
    return wire.pack(address)


def _order_of(kinds: set[type], order: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def ordered(values: Any) -> Any:
        if not kinds.issuperset(map(type, values)):
            raise TypeError("no code of anybody's is to have a say in the order")
        return order(values)

    return ordered


# -- what is written ---------------------------------------------------------------------------------------------------


class _Source:
    """Lines of Python, and the values that they go by. Pieces of the frame are collected between other lines."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._lines: list[str] = []
        self._pieces: list[bytes | str] = []
        self._indent = 0

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def name(self, name: str, value: Any) -> str:
        """A name for *value* in the source."""
        self.names.setdefault(name, value)
        return name

    def line(self, line: str) -> None:
        """One line, behind what the pieces so far make."""
        pieces = [piece if isinstance(piece, str) else repr(piece) for piece in self._pieces]
        if len(pieces) < 4:  # cheaper one by one than as a tuple
            self._lines += ["    " * self._indent + f"add({piece})" for piece in pieces]
        else:
            self._lines.append("    " * self._indent + f"parts += ({', '.join(pieces)})")
        self._pieces = []
        self._lines.append("    " * self._indent + line)

    def step(self, line: str) -> None:
        """One line that may stand before what the pieces so far make."""
        self._lines.append("    " * self._indent + line)

    def unsure_if(self, condition: str) -> None:
        """A step that gives up."""
        self.step(f"if {condition}: return None")

    def piece(self, piece: bytes | str) -> None:
        """The next bytes of the frame: themselves, or an expression. Neighbours become one where they can."""
        if isinstance(piece, bytes) and self._pieces and isinstance(self._pieces[-1], bytes):
            self._pieces[-1] += piece
        else:
            self._pieces.append(piece)

    def looked_up(self, value: str, packed: Pack | dict[Any, bytes]) -> None:
        """As the next piece, what *packed* has for the local *value*, or makes of it.

        The key before it is kept with it: half as many pieces to join.
        """
        before = self._pieces.pop() if self._pieces and isinstance(self._pieces[-1], bytes) else b""
        if isinstance(packed, dict):
            table = {each: before + bytes for each, bytes in packed.items()}
        else:
            table = _Packed(before, packed)
        name = "packed_" + "".join(each if each.isalnum() else "_" for each in value).strip("_")
        self._pieces.append(f"{self.name(name, table)}[{value}]")

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """The lines below *header*."""
        self.line(header)
        self._indent += 1
        yield
        self.line("# end")
        self._lines.pop()
        self._indent -= 1


class _Function:
    """The writing of one function: for objects of the records' classes, or for mappings by wire names."""

    def __init__(
        self, source: _Source, schema: MsgSchema, record_schema: Any, encoder: wire.Encoder, by_name: bool
    ) -> None:
        self._source = source
        self._message = schema
        self._record = record_schema
        self._encoder = encoder
        self._by_name = by_name
        self._stock = RecordSchema()
        self._called = {name for name, field in record_schema.fields.items() if not _same(field, self._stock.fields[name])}
        self._methods = [(name, names["field_names"]) for name, _, names in record_schema._hooks["validates"]]
        self._called |= {name for _, names in self._methods for name in names}
        if self._called and type(record_schema) is RecordSchema:
            raise _NotCompiledError(f"fields of a RecordSchema were changed: {', '.join(sorted(self._called))}")

    def write(self) -> None:
        source = self._source
        source.name("Record", Record)
        with source.block(f"def {'frame_of_mapping' if self._by_name else 'frame_of'}(message, unix_time, pack):"):
            if not self._by_name:
                source.line(f"if type(message) is not {source.name('Msg', Msg)}: "
                            "return frame_of_mapping(message, unix_time, pack)")  # fmt: skip
            with source.block("try:"):
                self._envelope()
                self._values()
                self._body()
                source.piece(wire.envelope(AuditType.DATA_PLANE)[1])
                source.line("frame = b''.join(parts)")
                # A value takes a byte at the least: a shorter frame cannot hold more of them than custom data may.
                source.line(f"return frame if len(frame) <= {min(self._encoder.max_frame_bytes, MAX_VALUES)} else None")
            source.line("except Exception: return None")

    def _envelope(self) -> None:
        """The type and the time of the message."""
        source, kind, record = self._source, self._message.fields["type"], self._message.fields["record"]
        if self._by_name:
            source.unsure_if("type(message) is not dict or len(message) != 2")
            source.line(f"kind = message[{kind.data_key!r}]")
            source.line(f"record = message[{record.data_key!r}]")
        else:
            source.line("kind = message.type")
            source.line("record = message.record")
        given: list[Any] = list(TYPE_NAMES.values() if self._by_name else AuditType)
        heads = {each: wire.envelope(loaded)[0] for each in given if (loaded := _accepted(kind, each))}
        source.unsure_if(f"type(kind) is not {source.name(type(given[0]).__name__, type(given[0]))}")
        source.name("floor", math.floor)
        self._head = f"{source.name('names' if self._by_name else 'kinds', heads)}[kind], pack(floor(unix_time))"

    def _values(self) -> None:
        """The values of the record, each by the name of its field; what is not the stock's own is called for them."""
        source, record = self._source, self._record
        self._refuse_other("record", record, Record, self._by_name)
        if self._called:
            source.line(f"record = {source.name('as_mapping', record._as_mapping)}(record)")
        for name, field in record.load_fields.items():
            if name in self._called:
                call = source.name(f"load_{name}", field.deserialize)
                source.line(f"{name} = {call}(record[{field.data_key!r}], {field.data_key!r}, record)")
            else:
                source.line(f"{name} = {self._read('record', name, field, self._by_name or bool(self._called))}")
        for method, names in self._methods:
            for name in names:
                call = source.name(method, getattr(record, method))
                source.line(f"{call}({name}, data_key={record.fields[name].data_key!r})")

    def _read(self, owner: str, name: str, field: Any, by_name: bool) -> str:
        if not by_name:
            return f"{owner}.{name}"
        if field.required:
            return f"{owner}[{field.data_key!r}]"
        default = field.load_default() if callable(field.load_default) else field.load_default
        return f"{owner}.get({field.data_key!r}, {self._source.name(f'no_{name}', default)})"

    def _refuse_other(self, owner: str, schema: Any, kind: type, mapped: bool) -> None:
        source = self._source
        if mapped:
            keys = source.name(f"of_{kind.__name__}", {field.data_key for field in schema.load_fields.values()})
            source.unsure_if(f"type({owner}) is not dict or not {keys}.issuperset({owner})")
        else:
            source.unsure_if(f"type({owner}) is not {source.name(kind.__name__, kind)}")

    def _body(self) -> None:
        """The body as the wire has it; each value by the field of the stock, whose rules hold in any case."""
        source, body = self._source, wire.record_body(_EXAMPLE, self._encoder.service_tree_id)
        by_key = {field.data_key: name for name, field in self._stock.fields.items()}
        first = b"".join(wire.pack(key) + wire.pack(value) for key, value in body.items() if key not in by_key)
        for name, field in self._stock.fields.items():
            if isinstance(field, _CustomData):
                self._custom_data(name)
                with_it, without = (wire.map_header(len(body) - missing) + first for missing in (0, 1))
                source.line(f"parts = [{self._head}, {with_it!r} if {name} else {without!r}]")
                source.line("add = parts.append")
        for key, example in body.items():
            if key not in by_key:
                continue
            name = by_key[key]
            field = self._stock.fields[name]
            if isinstance(field, _CustomData):
                source.piece(f"{wire.pack(key)!r} + pack({name}) if {name} else b''")
            else:
                source.piece(wire.pack(key))
                self._value(field, name, example, mapped=self._by_name and name not in self._called)
        for description, (name, value) in NEEDS_DESCRIPTION.items():
            given = source.name(value.name, value)
            among = isinstance(self._stock.fields[name], _Items)
            source.unsure_if(f"not {description} and " + (f"{given} in {name}" if among else f"{name} == {given}"))

    def _value(self, field: Any, value: str, example: Any, mapped: bool) -> None:
        """Check *value*, the name of a local, by *field*, and make its pieces."""
        source = self._source
        if isinstance(field, _Text):
            source.unsure_if(f"type({value}) is not str")
            source.looked_up(value, _text_packer(field.required, field.may_be_blank))
        elif isinstance(field, _Member):
            source.unsure_if(f"type({value}) is not {source.name(field.enum.__name__, field.enum)} and type({value}) is not str")
            source.looked_up(value, {member: wire.pack(each) for each, member in field.by_value.items()})
        elif isinstance(field, _Address):
            source.step(f"if type({value}) is not str: {value} = {source.name('address_text', _address_text)}({value})")
            source.looked_up(value, _pack_address)
        elif isinstance(field, _Items):
            self._items(field, value, example, mapped)
        elif isinstance(field, _Groups):
            self._groups(field, value, example, mapped)
        else:
            self._nested(field.schema, value, example, mapped)

    def _items(self, field: _Items, value: str, example: list[Any], mapped: bool) -> None:
        source, item = self._source, f"one_of_{value}"
        lists = (list, tuple) if field.order is None else (list, tuple, set, frozenset)
        others = source.name(f"kinds_of_lists_{len(lists)}", frozenset(lists))
        source.unsure_if(f"type({value}) is not list and type({value}) not in {others}")
        if not field.may_be_empty:
            source.unsure_if(f"not {value}")
        if field.order is not None:  # of one item there is only one order
            kinds = {str} if isinstance(field.inner, _Text) else {str, getattr(field.inner, "enum", str)}
            order = source.name(f"order_of_{value}", _order_of(kinds, field.order))
            source.step(f"if len({value}) > 1: {value} = {order}({value})")
        source.looked_up(f"len({value})", wire.array_header)
        with source.block(f"for {item} in {value}:"):
            self._value(field.inner, item, example[0], mapped)

    def _groups(self, field: _Groups, value: str, example: dict[Any, Any], mapped: bool) -> None:
        source, kind, items = self._source, f"kind_of_{value}", f"group_of_{value}"
        source.unsure_if(f"type({value}) is not dict or not {value}")
        pairs = f"{value}.items()"
        if field.order is not None:
            order = source.name(field.order.__name__, field.order)
            pairs = f"({order}({value}) if len({value}) > 1 else {pairs})"
        source.looked_up(f"len({value})", wire.map_header)
        with source.block(f"for {kind}, {items} in {pairs}:"):
            self._value(field.key, kind, None, mapped)
            self._value(field.items, items, next(iter(example.values())), mapped)

    def _nested(self, schema: Any, value: str, example: dict[str, Any], mapped: bool) -> None:
        source = self._source
        self._refuse_other(value, schema, schema.describes, mapped)
        by_key = {each.data_key: (name, each) for name, each in schema.fields.items()}
        for key in example:
            name, each = by_key[key]
            source.line(f"{name} = {self._read(value, name, each, mapped)}")
        source.piece(wire.map_header(len(example)))
        for key in example:
            name, each = by_key[key]
            source.piece(wire.pack(key))
            self._value(each, name, example[key], mapped)

    def _custom_data(self, value: str) -> None:
        """Custom data in normal form. Most is flat and plain; the rest is left to the rule."""
        source = self._source
        source.unsure_if(f"type({value}) is not dict")
        with source.block(f"for key, each in {value}.items():"):
            with source.block(f"if type(key) is not str or type(each) not in {source.name('SCALARS', SCALARS)}:"):
                source.line(f"{value} = {source.name('normal_form', normal_form)}({value})")
                source.line("break")


def _accepted(field: Any, value: Any) -> Any:
    """*value* as *field* loads it; None where it does not."""
    try:
        return field.deserialize(value)
    except Exception:
        return None
