"""Validation at the price of an encoding: functions compiled from a schema, sure of a message or silent about it.

marshmallow states the rules and writes the messages, but takes dozens of times as long as packing a record. From the
fields of a schema :class:`Compiled` writes the source of a function that checks a message and joins its frame in one
pass. Whenever it is not sure that the message is valid, and what its frame is, it returns None, and the message is
loaded and encoded as if there were no such function.

It is sure of the plain case only: values of exactly the types that records have, and the fields of ``rules`` as they
are there. A field of the user's own is called with what marshmallow calls it with, where all of that is plain, and once
more by marshmallow where the function is not sure in the end: so it must not change what it is given, nor remember it.
The rules then hold for what it returns. A schema with hooks on whole records, or with methods in place of
marshmallow's, is not compiled; what is changed in a schema later has no effect. ``source`` shows what was written, or
why nothing was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeAlias

from ..records import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record, TargetResource
from ..schema import rules
from ..schema.rules import MsgSchema, RecordSchema, fields_of_its_own, is_bare, validating_methods, ways_of_its_own
from ..schema.values import MAX_VALUES, SCALARS, normal_form
from . import encoding

__all__ = ["Compiled"]

Pack: TypeAlias = Callable[[Any], bytes]

# One record with something in every place: its body on the wire shows how all bodies are laid out.
_EXAMPLE = Record(
    operation_categories=[OperationCategory.UNKNOWN],
    caller_ip_address="192.0.2.1",
    caller_identities={CallerIdentityType.UNKNOWN: [CallerIdentity("", "")]},
    caller_access_levels=[""],
    target_resources={"": [TargetResource("")]},
    custom_data={"": ""},
)


class Compiled:
    """The functions compiled from one schema, for the frames of one encoder. Thread-safe and re-entrant.

    ``frame_of(message, unix_time, pack)`` returns the frame, or None to fall back to marshmallow. ``frame_of`` raises
    no ``Exception``. *pack* is the ``pack`` method of the encoder.
    """

    def __init__(self, schema: MsgSchema, encoder: encoding.Encoder) -> None:
        self.frame_of: Callable[[Any, float, Pack], bytes | None] = lambda message, unix_time, pack: None
        try:
            writer = _Writer(schema, encoder)
            writer.function("frame_of_mapping", by_name=True)
            writer.function("frame_of", by_name=False)
            self.source = "\n".join(writer.lines)
            exec(compile(self.source, "<compiled schema>", "exec"), writer.names)
            self.frame_of = writer.names["frame_of"]
        except Exception as reason:  # a schema may do anything, and marshmallow knows what to make of it
            self.source = f"# left to marshmallow: {reason}"


def _address_packer(before: bytes) -> Pack:
    pack_text = encoding.text_packer(before, empty=False, blank=False)

    def pack(value: Any) -> bytes:
        text, forbidden = rules.canonical_address(str(value))
        if forbidden:
            raise ValueError(forbidden)
        return pack_text(text)

    return pack


class _Writer:
    """Writes the functions: ``lines`` of Python, and the ``names`` they go by.

    Pieces of the frame are collected, and added together where the next block begins or ends.
    """

    def __init__(self, schema: MsgSchema, encoder: encoding.Encoder) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {"floor": math.floor, "packed_time": encoding.Packed(encoding.pack)}
        self._indent = ""
        self._pieces: list[str] = []
        self._before = b""  # the constant bytes that come next
        self._by_name = False

        self._message = schema
        record_field: Any = schema.fields["record"]
        self._record = record_field.schema
        self._stock = RecordSchema()
        own = {*ways_of_its_own(schema, MsgSchema()), *ways_of_its_own(self._record, self._stock)}
        own |= fields_of_its_own(schema, MsgSchema())
        self._called = fields_of_its_own(self._record, self._stock)
        if type(self._record) is RecordSchema:  # it is asked alone then, without the rules after it
            own |= self._called
        if own:
            raise TypeError(f"it has its own {', '.join(sorted(own))}")
        self._body = encoding.record_body(_EXAMPLE, encoder.service_tree_id)
        # A value takes a byte at the least: no shorter frame holds more values than custom data may.
        self._max_bytes = min(encoder.max_frame_bytes, MAX_VALUES)

    # -- lines and pieces ----------------------------------------------------------------------------------------------

    def _name(self, name: str, value: Any) -> str:
        """A name for *value*."""
        self.names.setdefault(name, value)
        return name

    def _line(self, line: str) -> None:
        self.lines.append(self._indent + line)

    def _unsure_if(self, condition: str) -> None:
        self._line(f"if {condition}: return None")

    @contextmanager
    def _block(self, header: str) -> Iterator[None]:
        self._add_pieces()
        self._line(header)
        self._indent += "    "
        yield
        self._add_pieces()
        self._indent = self._indent[4:]

    def _add_pieces(self) -> None:
        if self._before:
            self._pieces.append(repr(self._before))
        if len(self._pieces) < 4:  # cheaper one by one than as a tuple
            for piece in self._pieces:
                self._line(f"add({piece})")
        else:
            self._line(f"parts += ({', '.join(self._pieces)})")
        self._pieces, self._before = [], b""

    def _look_up(self, value: str, packed: Callable[[bytes], Pack] | dict[Any, bytes]) -> None:
        """The next piece is what *packed* has for *value*, or makes of it: behind its key, so that fewer are joined."""
        before, self._before = self._before, b""
        if isinstance(packed, dict):
            packed = {each: before + end for each, end in packed.items()}
        else:
            packed = encoding.Packed(packed(before))
        name = self._name("packed_" + value.replace("(", "_").rstrip(")"), packed)
        self._pieces.append(f"{name}[{value}]")

    # -- a message -----------------------------------------------------------------------------------------------------

    def function(self, name: str, by_name: bool) -> None:
        """Write the function for objects of the records' classes, or the one for mappings by wire names."""
        self._by_name = by_name
        with self._block(f"def {name}(message, unix_time, pack):"):
            with self._block("try:"):
                if by_name:
                    keys = ", ".join(repr(field.data_key) for field in self._message.fields.values())
                    self._unsure_if("type(message) is not dict or len(message) != 2")
                    self._line(f"kind, record = map(message.__getitem__, ({keys}))")
                    self._unsure_if("type(kind) is not str")
                else:
                    others = "return frame_of_mapping(message, unix_time, pack)"
                    self._line(f"if type(message) is not {self._name('Msg', Msg)}: {others}")
                    self._line("kind, record = message.type, message.record")
                    self._unsure_if(f"type(kind) is not {self._name('AuditType', AuditType)}")
                sendable = rules.SENDABLE.items()
                heads = {text if by_name else kind: encoding.envelope(kind)[0] for text, kind in sendable}
                self._read_record()
                self._write_body(f"{self._name(f'heads_for_{name}', heads)}[kind], packed_time[floor(unix_time)]")
                self._before += encoding.envelope(AuditType.DATA_PLANE)[1]
                self._add_pieces()
                self._line("frame = b''.join(parts)")
                self._line(f"return frame if len(frame) <= {self._max_bytes} else None")
            self._line("except Exception: return None")

    def _read_record(self) -> None:
        """The values of the record as locals; those with a field of the user's own as that loads them."""
        self._unsure_unless_of(self._record, "record", self._by_name)
        if self._called:
            self._line(f"record = {self._name('as_mapping', self._record._as_mapping)}(record)")
            # They may be called once more, by marshmallow: so only where they get the same again.
            self._unsure_if(f"not {self._name('comes_again', rules.comes_again)}(record)")
        for name, field in self._record.load_fields.items():
            if name in self._called:
                load = self._name(f"load_{name}", field.deserialize)
                self._line(f"{name} = {load}(record[{field.data_key!r}], {field.data_key!r}, record)")
            else:
                self._read("record", name, field, self._by_name or bool(self._called))
        for number, (method, name) in enumerate(validating_methods(self._record)):
            # By a name of ours: those of the user's methods may be anybody's.
            asked = (
                f"{self._name(f'validates_{number}', method)}({name}, data_key={self._record.fields[name].data_key!r})"
            )
            self._unsure_if(f"{asked} is {self._name('missing', rules.MISSING)}")

    def _read(self, owner: str, name: str, field: Any, by_name: bool) -> None:
        value = f"{owner}.{name}"
        if by_name and field.required:
            value = f"{owner}[{field.data_key!r}]"
        elif by_name:
            value = f"{owner}.get({field.data_key!r}, {self._name(f'no_{name}', rules.default_of(field))})"
        self._line(f"{name} = {value}")

    def _unsure_unless_of(self, schema: Any, value: str, by_name: bool) -> None:
        kind = schema.describes.__name__
        if by_name:
            keys = self._name(f"keys_of_{kind}", {field.data_key for field in schema.load_fields.values()})
            self._unsure_if(f"type({value}) is not dict or not {keys}.issuperset({value})")
        else:
            self._unsure_if(f"type({value}) is not {self._name(kind, schema.describes)}")

    def _write_body(self, head: str) -> None:
        """The frame up to the end of its body; each value by the stock's field, whose rules hold in any case."""
        by_key = {field.data_key: name for name, field in self._stock.fields.items()}
        first = b"".join(
            encoding.pack(key) + encoding.pack(value) for key, value in self._body.items() if key not in by_key
        )
        fuller, barer = (encoding.map_header(len(self._body) - missing) + first for missing in (0, 1))
        self._unsure_if("type(custom_data) is not dict")
        self._line("custom_data = custom_data.copy()")  # as with all containers: another thread may change it meanwhile
        self._line(f"parts = [{head}, {fuller!r} if custom_data else {barer!r}]")
        self._line("add = parts.append")
        for key in (key for key in self._body if key in by_key):
            if by_key[key] == "custom_data":
                with self._block("if custom_data:"):
                    self._pieces += [repr(encoding.pack(key)), "b''"]
                    self._add_pieces()
                    self._line("place = len(parts) - 1")
                continue
            self._before += encoding.pack(key)
            mapped = self._by_name and by_key[key] not in self._called
            self._write(self._stock.fields[by_key[key]], by_key[key], self._body[key], mapped)
        for description, (name, value) in rules.NEEDS_DESCRIPTION.items():
            among = "==" if isinstance(self._stock.fields[name], rules.Member) else "in"
            self._unsure_if(f"not {description} and {self._name(value.name, value)} {among} {name}")
        scalars, normal = self._name("SCALARS", SCALARS), self._name("normal_form", normal_form)
        unless_plain = f"if type(key) is not str or type(value) not in {scalars}:"
        with self._block("if custom_data:"):  # last, since it may be large, and nothing to go through for nothing
            with self._block("for key, value in custom_data.items():"), self._block(unless_plain):
                self._line(f"custom_data = {normal}(custom_data)")  # the rule itself, for what is not flat and plain
                self._line("break")
            self._line("parts[place] = pack(custom_data)")

    def _write(self, field: Any, value: str, example: Any, mapped: bool) -> None:
        """Check the local *value* by *field*, and add what it is on the wire."""
        if not is_bare(field):
            raise TypeError(f"{value} has more rules than those of {type(field).__name__}")
        if isinstance(field, rules.Text):
            self._unsure_if(f"type({value}) is not str")
            self._look_up(value, partial(encoding.text_packer, empty=not field.required, blank=field.may_be_blank))
        elif isinstance(field, rules.Member):
            enum = self._name(field.enum.__name__, field.enum)
            self._unsure_if(f"type({value}) is not {enum} and type({value}) is not str")
            self._look_up(value, {member: encoding.pack(text) for text, member in field.by_value.items()})
        elif isinstance(field, rules.Address):
            kinds = self._name("address_kinds", {str, IPv4Address, IPv6Address})
            self._unsure_if(f"type({value}) is not str and type({value}) not in {kinds}")
            self._look_up(value, _address_packer)
        elif isinstance(field, rules.Items):
            lists = self._name(f"kinds_of_{value}", {tuple} if field.order is None else {tuple, set, frozenset})
            self._unsure_if(f"type({value}) is not list and type({value}) not in {lists}")
            if field.order is not None:  # equals of other types are to have no say in what comes once
                kinds = self._name(f"kinds_in_{value}", {str, getattr(field.inner, "enum", str)})
                self._unsure_if(f"len({value}) > 1 and not {kinds}.issuperset(map(type, {value}))")
                self._line(f"if len({value}) > 1: {value} = {self._name(field.order.__name__, field.order)}({value})")
            self._line(f"{'' if field.order is None else 'else: '}{value} = [*{value}]")
            if not field.may_be_empty:
                self._unsure_if(f"not {value}")
            self._look_up(f"len({value})", lambda before: lambda size: before + encoding.array_header(size))
            with self._block(f"for one_of_{value} in {value}:"):
                self._write(field.inner, f"one_of_{value}", example[0], mapped)
        elif isinstance(field, rules.Groups):
            self._unsure_if(f"type({value}) is not dict")
            self._line(f"{value} = {value}.copy()")
            self._unsure_if(f"not {value}")
            pairs = f"{value}.items()"
            if field.order is not None:
                pairs = f"{self._name(field.order.__name__, field.order)}({value}) if len({value}) > 1 else {pairs}"
            self._look_up(f"len({value})", lambda before: lambda size: before + encoding.map_header(size))
            with self._block(f"for kind_of_{value}, group_of_{value} in {pairs}:"):
                self._write(field.key, f"kind_of_{value}", None, mapped)
                self._write(field.items, f"group_of_{value}", next(iter(example.values())), mapped)
        else:
            self._unsure_unless_of(field.schema, value, mapped)
            parts = {each.data_key: (name, each) for name, each in field.schema.fields.items()}
            for key in example:
                self._read(value, *parts[key], mapped)
            self._before += encoding.map_header(len(example))
            for key in example:
                self._before += encoding.pack(key)
                self._write(parts[key][1], parts[key][0], example[key], mapped)
