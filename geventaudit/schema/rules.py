"""The rules: what a message must be, stated once, as marshmallow schemas.

Whatever else checks them is derived from these schemas. The rules are those of the audit protocol's reference
implementation, which the golden data in ``tests/golden`` records, and a few that are stricter on purpose: no
enumeration value outside the members, no unspecified address in any spelling, no ``null`` for a list.

Loading gives the *normal form*: plain lists and dicts, categories and access levels sorted and without duplicates,
identities sorted by their kind, the address in its canonical spelling, custom data as
:mod:`geventaudit.schema.values` describes. What is loaded is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import fields as dataclass_fields
from datetime import datetime
from decimal import Decimal
from enum import Enum, StrEnum
from functools import lru_cache
from inspect import getattr_static
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, TypeVar, cast
from uuid import UUID

import marshmallow
from marshmallow import fields, validates_schema
from marshmallow.exceptions import SCHEMA

from ..errors import ValidationError, count_errors, show
from ..records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from .values import MAX_ERRORS, MAX_VALUES, SCALARS, normal_form, surrogate_problem

__all__ = [
    "BLANK",
    "NEEDS_DESCRIPTION",
    "SENDABLE",
    "TYPE_NAMES",
    "Address",
    "CallerIdentitySchema",
    "CustomData",
    "Groups",
    "Items",
    "Member",
    "MsgSchema",
    "RecordSchema",
    "TargetResourceSchema",
    "Text",
    "Type",
    "canonical_address",
    "comes_again",
    "default_of",
    "fields_of_its_own",
    "is_bare",
    "service_tree_uuid",
    "sorted_categories",
    "sorted_identities",
    "sorted_levels",
    "validating_methods",
    "ways_of_its_own",
]

TYPE_NAMES: dict[AuditType, str] = {
    AuditType.DATA_PLANE: "DataPlane",
    AuditType.CONTROL_PLANE: "ControlPlane",
    AuditType.HEARTBEAT: "Heartbeat",
    AuditType.DIAGNOSTIC: "Diagnostic",
}
"""What the types are called in mappings."""

SENDABLE = {TYPE_NAMES[kind]: kind for kind in (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE)}
"""The types that users send, by those names."""

_CATEGORY_NUMBERS = {member: number for number, member in enumerate(OperationCategory)}
_IDENTITY_NUMBERS = {member: number for number, member in enumerate(CallerIdentityType)}

_T = TypeVar("_T")

# Unicode White_Space. str.isspace() differs: it has U+001C to U+001F besides, which are not in it.
BLANK = re.compile("[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*")

_REQUIRED = "is required"
_EMPTY = "must not be empty"
_BLANK_PROBLEM = "must not be blank"
_NO_MAPPING = "must be a mapping"


def sorted_categories(categories: Iterable[OperationCategory]) -> list[OperationCategory]:
    """*categories* as the wire has them: by their number, each once."""
    return sorted(set(categories), key=_CATEGORY_NUMBERS.__getitem__)


def sorted_identities(identities: Mapping[CallerIdentityType, _T]) -> list[tuple[CallerIdentityType, _T]]:
    """The items of *identities* as the wire has them: by the number of their type."""
    return sorted(identities.items(), key=lambda item: _IDENTITY_NUMBERS[item[0]])


def sorted_levels(levels: Iterable[str]) -> list[str]:
    """*levels* as the wire has them: by their UTF-8 bytes (which is by code point), each once."""
    return sorted(set(levels))


# -- addresses ---------------------------------------------------------------------------------------------------------


MISSING = marshmallow.missing
"""What a validating method returns to have its field left out."""

_OCTETS = frozenset(map(str, range(256)))
_FIRST_OF_SPECIAL = frozenset(
    map(str, (0, 127, *range(224, 240)))
)  # unspecified, loopback and multicast are among these


def canonical_address(text: str) -> tuple[str, str | None]:
    """The spelling of an address on the wire, and what forbids it as a caller's address (or None).

    :raises ValueError: when it is no IP address.
    """
    octets = text.split(".", 4)
    if len(octets) == 4 and octets[0] not in _FIRST_OF_SPECIAL and _OCTETS.issuperset(octets):
        return text, None  # as most are, and in a tenth of the time
    if len(text) > 64:  # a zone can be of any length, and callers choose their addresses: not to be remembered
        return _canonical_address.__wrapped__(text)
    return _canonical_address(text)


@lru_cache(maxsize=4096)
def _canonical_address(text: str) -> tuple[str, str | None]:
    bare, percent, zone = text.partition("%")
    address = ip_address(bare)
    if percent and (not zone or isinstance(address, IPv4Address)):
        raise ValueError(f"{show(text)} has an empty zone, or a zone without being IPv6")
    plain: IPv4Address | IPv6Address = address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        # str() of a mapped address is hexadecimal before Python 3.13; the wire has it dotted.
        plain = address.ipv4_mapped
        bare = f"::ffff:{plain}"
    else:
        bare = str(address)
    problem = None
    for kind in ("unspecified", "loopback", "multicast"):
        if getattr(plain, f"is_{kind}"):
            problem = f"must not be {'an' if kind[0] == 'u' else 'a'} {kind} address, got {show(text)}"
    return bare + percent + zone, problem


def service_tree_uuid(value: object) -> str:
    """A service tree id in its canonical spelling.

    :raises ValidationError: when it is no UUID, or the nil UUID.
    """
    try:
        uuid = value if isinstance(value, UUID) else UUID(cast(str, value))
    except (ValueError, TypeError, AttributeError):
        uuid = UUID(int=0)
    if uuid.int == 0:
        problem = f"the service tree id must be a UUID and not the nil UUID, got {show(value)}"
        raise ValidationError({"env_ikey": [problem]})
    return str(uuid)


# -- fields ------------------------------------------------------------------------------------------------------------

_COMMON_MESSAGES: dict[str, str | list[Any] | dict[Any, Any]] = {"required": _REQUIRED, "null": "must not be null"}


def _of_its_own(inner: fields.Field[Any]) -> fields.Field[Any]:
    """A copy of a field below another: what is changed in one schema is to have no effect on others."""
    own = copy(inner)
    own.validators = list(own.validators)
    for name in _BELOW & vars(own).keys():
        setattr(own, name, _of_its_own(getattr(own, name)))
    if isinstance(own, fields.Nested):
        own._schema = None
    return own


_BELOW = {"inner", "key", "items"}  # what fields that have others call them


class Text(fields.Field[str]):
    """Text that UTF-8 can write; not empty where it is required."""

    default_error_messages = _COMMON_MESSAGES

    def __init__(self, *, required: bool = False, may_be_blank: bool = True, **kwargs: Any) -> None:
        if not required:
            kwargs.setdefault("load_default", "")
        super().__init__(required=required, **kwargs)
        self.may_be_blank = may_be_blank

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if not isinstance(value, str):
            raise ValidationError(f"must be text, got {show(value)} ({type(value).__name__})")
        text: str = str.__str__(value)
        if self.required and not text:
            raise ValidationError(_EMPTY)
        if not self.may_be_blank and BLANK.fullmatch(text):
            raise ValidationError(_BLANK_PROBLEM)
        if not text.isascii() and (problem := surrogate_problem(text)):
            raise ValidationError(problem)
        return text


class Member(fields.Field[StrEnum]):
    """A member of an enumeration, or its name on the wire."""

    default_error_messages = _COMMON_MESSAGES

    def __init__(self, enum: type[StrEnum], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.enum = enum
        self.by_value: dict[str, StrEnum] = {member.value: member for member in enum}

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str:
        return str(value)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> StrEnum:
        if isinstance(value, StrEnum) and not isinstance(value, self.enum):
            member = None
        else:
            member = self.by_value.get(value) if isinstance(value, str) else None
        if member is None:
            raise ValidationError(f"must be one of {', '.join(self.by_value)}; got {show(value)}")
        return member


class Items(fields.Field[list[Any]]):
    """A list (or tuple, or set where order means nothing), each item by the rules of *inner*."""

    default_error_messages = _COMMON_MESSAGES

    def __init__(
        self,
        inner: fields.Field[Any],
        *,
        order: Callable[[Iterable[Any]], list[Any]] | None = None,
        may_be_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inner = inner
        self.order = order
        self.may_be_empty = may_be_empty

    def _bind_to_schema(self, field_name: str, parent: Any) -> None:
        super()._bind_to_schema(field_name, parent)
        self.inner = _of_its_own(self.inner)

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> list[Any]:
        return [self.inner._serialize(item, attr, obj, **kwargs) for item in value]

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        kinds = Sequence if self.order is None else Collection  # where order means nothing, a set will do
        if not isinstance(value, kinds) or isinstance(value, str | bytes | bytearray | memoryview | Mapping):
            raise ValidationError(f"must be a list, got {show(value)} ({type(value).__name__})")
        if not value and not self.may_be_empty:
            raise ValidationError(_EMPTY)
        result: list[Any] = []
        errors: dict[int, Any] = {}
        found = 0
        for index, item in enumerate(value):
            try:
                result.append(self.inner.deserialize(item))
            except marshmallow.ValidationError as error:
                errors[index] = error.messages
                found += count_errors(error.messages)
                if found >= MAX_ERRORS:
                    break
        if errors:
            raise ValidationError(errors)
        return result if self.order is None else self.order(result)


class Groups(fields.Field[dict[Any, Any]]):
    """A mapping of lists. Unlike marshmallow's Dict, its errors stand at the path that they have on the wire."""

    default_error_messages = _COMMON_MESSAGES

    def __init__(
        self,
        key: fields.Field[Any],
        items: fields.Field[Any],
        *,
        order: Callable[[Mapping[Any, Any]], list[tuple[Any, Any]]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.key = key
        self.items = items
        self.order = order

    def _bind_to_schema(self, field_name: str, parent: Any) -> None:
        super()._bind_to_schema(field_name, parent)
        self.key, self.items = _of_its_own(self.key), _of_its_own(self.items)

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> dict[str, Any]:
        return {
            self.key._serialize(key, attr, obj, **kwargs): self.items._serialize(items, attr, obj, **kwargs)
            for key, items in value.items()
        }

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise ValidationError(f"must be a mapping, got {show(value)} ({type(value).__name__})")
        if not value:
            raise ValidationError(_EMPTY)
        result: dict[Any, Any] = {}
        errors: dict[Any, Any] = {}
        found = 0
        for key, items in value.items():
            of_key: list[str] = []
            plain_key: Any = None
            try:
                plain_key = self.key.deserialize(key)
            except marshmallow.ValidationError as error:
                of_key = [f"(its key) {text}" for text in error.messages]
            try:
                result[plain_key] = self.items.deserialize(items)
                if of_key:
                    errors[key] = of_key
            except marshmallow.ValidationError as error:
                found += count_errors(error.messages)
                if not of_key:
                    errors[str(plain_key)] = error.messages
                elif isinstance(error.messages, dict):
                    errors[key] = {SCHEMA: of_key, **error.messages}
                else:
                    errors[key] = of_key + error.messages
            found += len(of_key)
            if found >= MAX_ERRORS:
                break
        if errors:
            raise ValidationError(errors)
        return result if self.order is None else dict(self.order(result))


class Address(fields.Field[str]):
    """The caller's address: text or an ``ipaddress`` object; not unspecified, loopback or multicast."""

    default_error_messages = _COMMON_MESSAGES

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if isinstance(value, IPv4Address | IPv6Address):
            value = str(value)
        if not isinstance(value, str):
            raise ValidationError(f"must be an IP address, got {show(value)} ({type(value).__name__})")
        if not value:
            raise ValidationError(_EMPTY)
        if problem := surrogate_problem(value):
            raise ValidationError(problem)
        try:
            text, forbidden = canonical_address(str.__str__(value))
        except ValueError:
            raise ValidationError(f"must be an IP address (without port or brackets), got {show(value)}") from None
        if forbidden:
            raise ValidationError(forbidden)
        return text


class CustomData(fields.Field[dict[str, Any]]):
    """A mapping with text keys, of anything that MessagePack can carry; null is an empty one."""

    default_error_messages = _COMMON_MESSAGES

    def deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return super().deserialize({} if value is None else value, *args, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValidationError(f"must be a mapping with text keys, got {show(value)} ({type(value).__name__})")
        return normal_form(value)


class Type(fields.Field[AuditType]):
    """The type of a message: an AuditType, or its name in mappings."""

    default_error_messages = _COMMON_MESSAGES

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str:
        return TYPE_NAMES[value]

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> AuditType:
        name = TYPE_NAMES[value] if isinstance(value, AuditType) else value
        if isinstance(name, str) and name in SENDABLE:
            return SENDABLE[name]
        own = isinstance(value, AuditType) or (isinstance(name, str) and name in TYPE_NAMES.values())
        problem = f"must be {' or '.join(SENDABLE)}, got {show(name)}"
        raise ValidationError(f"{problem} (only the library itself sends it)" if own else problem)


# -- schemas -----------------------------------------------------------------------------------------------------------

NEEDS_DESCRIPTION: dict[str, tuple[str, StrEnum]] = {
    "operation_category_description": ("operation_categories", OperationCategory.OTHER),
    "operation_result_description": ("operation_result", OperationResult.FAILURE),
}
"""Which description is required with which value of which field. The two hooks of :class:`RecordSchema` read it, and so
does what is compiled from it."""


class _TypedSchema(marshmallow.Schema):
    """A schema that loads a mapping, or an object of the class it describes, into such an object.

    Names on the wire are the field names in camel case; a field that says ``data_key`` keeps its own.
    """

    error_messages = {"unknown": "is not a field of this protocol", "type": _NO_MAPPING}  # noqa: RUF012
    describes: type[Any]

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        if field_obj.data_key is None:
            field_obj.data_key = "".join(part.capitalize() for part in field_name.split("_"))
        field_obj.validators = list(field_obj.validators)  # marshmallow's copies of a field share one list

    def load(self, data: Any, *, many: bool | None = None, **kwargs: Any) -> Any:
        """The object that *data* describes, in normal form.

        :param data: a mapping by wire names, or an object of the described class; a list of them with ``many=True``.
        :raises ValidationError: with everything that is wrong with it.
        """
        many = self.many if many is None else many
        try:
            loaded = super().load(self._as_mappings(data, many), many=many, **kwargs)
        except ValidationError:
            raise
        except marshmallow.ValidationError as error:
            messages = self._say_what_it_is(error.messages, data)
            raise ValidationError(messages, data=error.data, valid_data=error.valid_data) from None
        return [self._build(each) for each in loaded] if many else self._build(loaded)

    def validate(self, data: Any, *, many: bool | None = None, **kwargs: Any) -> dict[Any, Any]:
        """What is wrong with *data*, as nested messages by wire path; empty when nothing is."""
        many = self.many if many is None else many
        return cast(
            dict[Any, Any],
            self._say_what_it_is(super().validate(self._as_mappings(data, many), many=many, **kwargs), data),
        )

    def _as_mappings(self, data: Any, many: bool) -> Any:
        if many and isinstance(data, Sequence) and not isinstance(data, str):
            return [self._as_mapping(each) for each in data]
        return self._as_mapping(data)

    def _as_mapping(self, data: Any) -> Any:
        if isinstance(data, self.describes):
            return {field.data_key: getattr(data, name) for name, field in self.load_fields.items()}
        return dict(data) if isinstance(data, Mapping) else data  # a copy, so that a pre_load hook changes nobody's

    def _say_what_it_is(self, messages: Any, data: Any) -> Any:
        """*messages* about *data*, where marshmallow's text for what is no mapping cannot say what it is instead."""
        problems = messages.get(SCHEMA) if isinstance(messages, dict) else None
        if isinstance(problems, list) and not isinstance(data, Mapping):
            messages[SCHEMA] = [self._no_mapping(data) if each == _NO_MAPPING else each for each in problems]
        return messages

    def _no_mapping(self, data: Any) -> str:
        """What is wrong with *data*, which is neither a mapping nor an object of the class."""
        return f"must be a {self.describes.__name__} or a mapping, got {show(data)} ({type(data).__name__})"

    def _build(self, loaded: Any) -> Any:
        return self.describes(**loaded) if isinstance(loaded, dict) else loaded


class CallerIdentitySchema(_TypedSchema):
    """The rules of a :class:`~geventaudit.CallerIdentity`."""

    describes = CallerIdentity
    identity = Text(required=True)
    description = Text(required=True)


class TargetResourceSchema(_TypedSchema):
    """The rules of a :class:`~geventaudit.TargetResource`."""

    describes = TargetResource
    name = Text(required=True)
    cluster = Text()
    data_center = Text()
    region = Text()


class RecordSchema(_TypedSchema):
    """The rules of a :class:`~geventaudit.Record`.

    Loads a mapping by wire names, or a ``Record``, into a ``Record`` in normal form. Make a subclass for stricter rules
    (marshmallow's validators and hooks work as usual; the fields go by their snake_case names) and pass an instance to
    the client. A record has no other fields than these: what else there is belongs into ``custom_data``. It may be
    validated more than once: validators and hooks must neither change what they are given nor remember it.

    :raises TypeError: when a subclass adds a field that a record does not have, or takes one away.
    """

    describes = Record
    operation_name = Text(required=True)
    operation_categories = Items(Member(OperationCategory), order=sorted_categories, required=True)
    operation_category_description = Text()
    operation_type = Member(OperationType, load_default=OperationType.UNKNOWN)
    operation_result = Member(OperationResult, load_default=OperationResult.UNKNOWN)
    operation_result_description = Text()
    operation_access_level = Text(required=True)
    caller_agent = Text(required=True)
    caller_ip_address = Address(required=True)
    caller_identities = Groups(
        Member(CallerIdentityType),
        Items(fields.Nested(CallerIdentitySchema)),
        order=sorted_identities,
        required=True,
    )
    caller_access_levels = Items(Text(may_be_blank=False), order=sorted_levels, required=True)
    target_resources = Groups(
        Text(may_be_blank=False), Items(fields.Nested(TargetResourceSchema), may_be_empty=True), required=True
    )
    custom_data = CustomData(load_default=dict)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.many or self.partial:
            raise TypeError(f"{type(self).__name__} is for one whole record: neither many nor partial")
        names = {field.name for field in dataclass_fields(Record)}
        if strange := set(self.load_fields) ^ names:
            raise TypeError(
                f"{type(self).__name__} must have the fields of a Record, neither more nor less; these differ: "
                f"{', '.join(sorted(strange))} (more belongs into custom_data)"
            )

    # The two rules that look at more than one field still speak when other fields are wrong: all errors at once.

    @validates_schema(skip_on_field_errors=False, pass_original=True)
    def _other_needs_description(self, data: Mapping[str, Any], original: Any, **kwargs: Any) -> None:
        name, other = NEEDS_DESCRIPTION["operation_category_description"]
        categories = data.get(name)
        if categories is None:  # some of them are wrong; the others count all the same
            given = original.get("OperationCategories") if isinstance(original, Mapping) else None
            categories = given if isinstance(given, list | tuple) else ()
        described = data.get("operation_category_description", True)
        if not described and any(isinstance(each, str) and each == other for each in categories):
            raise ValidationError({"OperationCategoryDescription": [f"is required with the category {other}"]})

    @validates_schema(skip_on_field_errors=False)
    def _failure_needs_description(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        name, failure = NEEDS_DESCRIPTION["operation_result_description"]
        if data.get(name) == failure and not data.get("operation_result_description", True):
            raise ValidationError({"OperationResultDescription": [f"is required with the result {failure}"]})


class _RecordField(fields.Nested):
    """The record of a message, by the very schema that is given: Nested would copy it, with its fields as declared."""

    @property
    def schema(self) -> Any:
        return self.nested if isinstance(self.nested, RecordSchema) else super().schema


class MsgSchema(_TypedSchema):
    """The rules of a :class:`~geventaudit.Msg`: ``{"Type": "ControlPlane", "Record": {"OperationName": ...}}``.

    :param record: the schema of the record, where it has stricter rules than :class:`RecordSchema`.
    """

    describes = Msg
    type = Type(required=True)
    record = _RecordField(RecordSchema, required=True, error_messages=_COMMON_MESSAGES)

    def __init__(self, *, record: RecordSchema | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if record is not None:
            cast(Any, self.fields["record"]).nested = record

    def _no_mapping(self, data: Any) -> str:
        wanted = "must be a Msg, or a mapping with Type and Record"
        if isinstance(data, Record):
            return f"{wanted}, got {show(data)}: wrap it in Msg(AuditType.CONTROL_PLANE, record)"
        return f"{wanted}, got {show(data)} ({type(data).__name__})"

    def shape(self, data: Any) -> Msg:
        """The Msg that a mapping describes, its values not validated yet (they are when it is loaded); a Msg as it is.

        :raises ValidationError: when its keys are not those of a message; everything else that is wrong is named too.
        """
        if isinstance(data, Msg):
            return data
        of_record = cast(Any, self.fields["record"]).schema.load_fields
        names = {field.data_key: name for name, field in of_record.items()}
        try:
            kind, values = data["Type"], data["Record"]
            if len(data) == 2 and kind in TYPE_NAMES.values():
                given = {names[key]: _shape(names[key], value) for key, value in values.items()}
                for name in of_record.keys() - given.keys():
                    if (default := default_of(of_record[name])) is not MISSING:
                        given[name] = default
                record = Record(**given)
                return Msg(next(each for each, name in TYPE_NAMES.items() if name == kind), record)
        except (KeyError, TypeError, AttributeError):
            pass
        return cast(Msg, self.load(data))


def default_of(field: fields.Field[Any]) -> Any:
    """What *field* has in a record where a mapping leaves it out."""
    return field.load_default() if callable(field.load_default) else field.load_default


def _shape(name: str, value: Any) -> Any:
    """A field of a mapping as a record has it: members and objects where they can be told, all else as it is."""
    try:
        if name in ("operation_type", "operation_result"):
            return _ENUMS[name](value)
        if name == "operation_categories":
            return [_ENUMS[name](each) for each in value]
        if name == "caller_identities":
            return {
                CallerIdentityType(kind): [CallerIdentity(**_snake(each)) for each in items]
                for kind, items in value.items()
            }
        if name == "target_resources":
            return {kind: [TargetResource(**_snake(each)) for each in items] for kind, items in value.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        pass  # it is wrong, and will be told so when it is loaded
    return value


_ENUMS: dict[str, type[StrEnum]] = {
    "operation_type": OperationType,
    "operation_result": OperationResult,
    "operation_categories": OperationCategory,
}
_SNAKES = {
    "Identity": "identity",
    "Description": "description",
    "Name": "name",
    "Cluster": "cluster",
    "DataCenter": "data_center",
    "Region": "region",
}


def _snake(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {_SNAKES[key]: value for key, value in mapping.items()}


# -- what a schema of somebody's own does besides ---------------------------------------------------------------------

# What each class has for itself, and what of a field no load looks at.
_OF_EACH_CLASS = {
    "__init__", "__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__parameters__",
    "__abstractmethods__", "__slotnames__", "__static_attributes__", "__firstlineno__", "_abc_impl",
    "Meta", "opts", "error_messages", "_declared_fields", "_hooks",
}  # fmt: skip
_OF_EACH_FIELD = {"parent", "name", "root", "metadata", "error_messages", "dump_default", "load_only", "validate"}


def ways_of_its_own(schema: marshmallow.Schema, stock: marshmallow.Schema) -> set[str]:
    """By what names *schema* does anything else than *stock*, its fields and what validates one field apart."""
    own = {name for name in vars(schema) if name not in vars(stock) and hasattr(type(stock), name)}
    own |= {"many"} if schema.many else set()
    own |= {"partial"} if schema.partial is not None else set()
    for name in set(dir(type(stock))) - _OF_EACH_CLASS:
        if getattr_static(type(schema), name, None) is not getattr_static(type(stock), name):
            own.add(name)
    for tag in ("pre_load", "post_load", "validates_schema"):
        own.update({name for name, *_ in schema._hooks[tag]} - {name for name, *_ in stock._hooks[tag]})
    return own | {name for name, field in schema.fields.items() if field.attribute not in (None, name)}


def fields_of_its_own(schema: marshmallow.Schema, stock: marshmallow.Schema) -> set[str]:
    """The fields that *schema* does not load just as *stock* does. The schema in a record's field is not looked at."""
    pairs = ((field, stock.load_fields[name]) for name, field in schema.load_fields.items())
    own = {str(a.name) for a, b in pairs if not _loads_as(a, b)}
    return own | {name for _, name in validating_methods(schema)}


def _loads_as(field: fields.Field[Any], stock: fields.Field[Any]) -> bool:
    def settings(of: fields.Field[Any]) -> dict[str, Any]:
        return {name: value for name, value in vars(of).items() if name not in ignored}

    ignored = _OF_EACH_FIELD | _BELOW | {"_schema"}
    if isinstance(field, _RecordField):
        ignored = ignored | {"nested"}
    elif isinstance(field, fields.Nested) and type(field) is type(stock):
        pair = field.schema, cast(Any, stock).schema
        if ways_of_its_own(*pair) or fields_of_its_own(*pair):
            return False
    below = _BELOW & vars(field).keys()
    return (
        type(field) is type(stock)
        and settings(field) == settings(stock)
        and all(_loads_as(getattr(field, name), getattr(stock, name)) for name in below)
    )


def is_bare(field: fields.Field[Any]) -> bool:
    """Whether *field* has nothing but the rule of its class."""
    nested = field.schema._hooks if isinstance(field, fields.Nested) else {}
    steps = [getattr(field, name, None) for name in ("pre_load", "post_load")]  # marshmallow 4.0 has none
    return not (field.validators or any(steps) or field.allow_none or any(nested.values()))


def comes_again(value: Any) -> bool:
    """Whether who reads *value* a second time finds the same: it has no iterator, and no code of somebody's own."""
    left = MAX_VALUES
    found = [value]
    while found and left > 0:
        each = found.pop()
        kind = type(each)
        inside: Collection[Any] = ()
        if kind is dict:
            inside = [*each, *each.values()]
        elif kind in (list, tuple, set, frozenset):
            inside = each
        elif kind in (CallerIdentity, TargetResource):
            inside = [getattr(each, field.name) for field in dataclass_fields(kind)]
        elif kind not in _COME_AGAIN and not isinstance(each, Enum):
            return False
        left -= len(inside)
        if left > 0:
            found += inside
    return left > 0


_COME_AGAIN = SCALARS | {datetime, UUID, Decimal, IPv4Address, IPv6Address}


def validating_methods(schema: marshmallow.Schema) -> list[tuple[Callable[..., Any], str]]:
    """The methods that ``validates`` marks, in their order, each with the name of a field that it validates."""
    hooks = schema._hooks["validates"]
    return [(getattr(schema, method), name) for method, _, marked in hooks for name in marked["field_names"]]


def by_record(messages: Mapping[Any, Any]) -> dict[Any, Any]:
    """A message's errors by the paths of its record: those of the record on top, beside those of its type."""
    flat = {key: value for key, value in messages.items() if key != "Record"}
    of_record = messages.get("Record", {})
    flat.update(of_record if isinstance(of_record, Mapping) else {"Record": of_record})
    return flat
