"""The rules: the schemas of a message, stated once, with marshmallow.

All other checks of a message are derived from these schemas. The rules are those of the reference implementation of the
audit protocol, as recorded in ``tests/golden``. Some are stricter on purpose: no enumeration value outside the members,
no unspecified address in any spelling, no ``null`` for a list.

Loading returns the *normal form*: plain lists and dicts, categories and access levels sorted and without duplicates,
identities sorted by their kind, the address in its canonical spelling, custom data as described in
:mod:`geventaudit.schema.values`. The given object is never changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from typing import Any, TypeVar, cast

import marshmallow
from marshmallow import fields, validates_schema
from marshmallow.exceptions import SCHEMA

from ..errors import ValidationError, show
from ..records import (
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from .fields import COMMON_MESSAGES, TYPE_NAMES, Address, CustomData, Groups, Items, Member, Text, Type

__all__ = [
    "NEEDS_DESCRIPTION",
    "CallerIdentitySchema",
    "MsgSchema",
    "RecordSchema",
    "TargetResourceSchema",
    "by_record",
    "default_of",
    "sorted_categories",
    "sorted_identities",
    "sorted_levels",
]

_CATEGORY_NUMBERS = {member: number for number, member in enumerate(OperationCategory)}
_IDENTITY_NUMBERS = {member: number for number, member in enumerate(CallerIdentityType)}

_T = TypeVar("_T")


def sorted_categories(categories: Iterable[OperationCategory]) -> list[OperationCategory]:
    """Return *categories* in the order of the wire: by their number, each once."""
    return sorted(set(categories), key=_CATEGORY_NUMBERS.__getitem__)


def sorted_identities(identities: Mapping[CallerIdentityType, _T]) -> list[tuple[CallerIdentityType, _T]]:
    """Return the items of *identities* in the order of the wire: by the number of their type."""
    return sorted(identities.items(), key=lambda item: _IDENTITY_NUMBERS[item[0]])


def sorted_levels(levels: Iterable[str]) -> list[str]:
    """Return *levels* in the order of the wire: by their UTF-8 bytes (that is, by code points), each once."""
    return sorted(set(levels))


NEEDS_DESCRIPTION: dict[str, tuple[str, StrEnum]] = {
    "operation_category_description": ("operation_categories", OperationCategory.OTHER),
    "operation_result_description": ("operation_result", OperationResult.FAILURE),
}
"""The descriptions that a value of another field requires. The two hooks of :class:`RecordSchema` and the encoder's
plan use them."""

_NO_MAPPING = "must be a mapping"
_UNKNOWN_FIELD = "is not a field of this protocol"


def _letters(name: object) -> str:
    return "".join(filter(str.isalnum, str(name)[:100])).lower()


class _TypedSchema(marshmallow.Schema):
    """A schema that loads a mapping, or an object of the described class, into such an object.

    Names on the wire are the field names in camel case, unless a field has a ``data_key``.

    :raises TypeError: the options or a subclass add or remove fields, or load a part of them.
    """

    error_messages = {"unknown": _UNKNOWN_FIELD, "type": _NO_MAPPING}  # noqa: RUF012
    describes: type[Any]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        name, described = type(self).__name__, self.describes.__name__
        if self.partial:
            raise TypeError(f"{name} is for one whole {described}: partial has no meaning for an audit record")
        if strange := set(self.load_fields) ^ {field.name for field in dataclass_fields(self.describes)}:
            raise TypeError(
                f"{name} must load exactly the fields of a {described}; these differ: {', '.join(sorted(strange))} "
                "(put other data into custom_data; only, exclude and dump_only remove fields that a record needs)"
            )

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        """Set a field's name on the wire, and copy its validators, so that no other schema shares them."""
        if field_obj.data_key is None:
            field_obj.data_key = "".join(part.capitalize() for part in field_name.split("_"))
        below: list[Any] = [field_obj]
        while below:  # the copies of a field in marshmallow share one list of validators
            field = below.pop()
            field.validators = list(field.validators)
            below += [getattr(field, name) for name in ("inner", "key_field", "value_field") if hasattr(field, name)]
            below = [each for each in below if each is not None]

    def load(self, data: Any, *, many: bool | None = None, partial: Any = None, unknown: Any = None) -> Any:
        """Return the object that *data* describes, in normal form.

        :param data: a mapping by wire names, or an object of the described class; a list of them with ``many=True``.
        :raises ValidationError: *data* is invalid; the error has all reasons.
        :raises TypeError: *partial* is given: a part of a record cannot be sent.
        """
        many = self.many if many is None else many
        self._refuse_partial(partial)
        loaded = super().load(self._as_mappings(data, many), many=many, unknown=unknown)
        return [self._build(each) for each in loaded] if many else self._build(loaded)

    def validate(self, data: Any, *, many: bool | None = None, partial: Any = None) -> dict[Any, Any]:
        """Return all errors of *data*, as nested messages by wire path.

        :raises TypeError: *partial* is given: a part of a record cannot be sent.
        """
        many = self.many if many is None else many
        self._refuse_partial(partial)
        return cast(dict[Any, Any], super().validate(self._as_mappings(data, many), many=many))

    def handle_error(self, error: marshmallow.ValidationError, data: Any, **kwargs: Any) -> None:
        """Raise the package's own ValidationError. Its text shows *data* if that is not a mapping."""
        messages: Any = error.messages
        if isinstance(messages, dict):
            for key in [key for key, texts in messages.items() if texts == [_UNKNOWN_FIELD]]:
                if meant := self._meant_by(key):
                    messages[key] = [f"{_UNKNOWN_FIELD}: did you mean {meant}?"]
        problems = messages.get(SCHEMA) if isinstance(messages, dict) else None
        if isinstance(problems, list) and not isinstance(data, Mapping):
            messages[SCHEMA] = [self._no_mapping(data) if each == _NO_MAPPING else each for each in problems]
        raise ValidationError(messages, data=error.data, valid_data=error.valid_data) from None

    def _refuse_partial(self, partial: Any) -> None:
        if partial:
            raise TypeError(f"{type(self).__name__} is for one whole {self.describes.__name__}, not for a part of one")

    def _as_mappings(self, data: Any, many: bool) -> Any:
        if many and isinstance(data, Sequence) and not isinstance(data, str):
            return [self._as_mapping(each) for each in data]
        return self._as_mapping(data)

    def _as_mapping(self, data: Any) -> Any:
        if isinstance(data, self.describes):
            return {field.data_key: getattr(data, name) for name, field in self.load_fields.items()}
        return dict(data) if isinstance(data, Mapping) else data  # a copy, since a pre_load hook may change it

    def _meant_by(self, key: Any) -> str | None:
        """Return the name on the wire of which *key* is another spelling; None if there is none."""
        spelling = _letters(key)
        names = (str(field.data_key) for field in self.load_fields.values())
        return next((name for name in names if _letters(name) == spelling), None)

    def _no_mapping(self, data: Any) -> str:
        """Describe *data*, which is neither a mapping nor an object of the class."""
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

    Loads a mapping by wire names, or a ``Record``, into a ``Record`` in normal form. For stricter rules, make a
    subclass and pass an instance to the client. Marshmallow's validators and hooks work as usual; the fields have their
    snake_case names. A record has no other fields: other data belong into ``custom_data``. With a custom schema,
    marshmallow loads each record before it is encoded; ``before_send`` is a cheaper hook.

    :raises TypeError: a subclass or an option adds or removes a field.
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
        if self.many:
            raise TypeError(f"{type(self).__name__} is for one record: pass many=True to load() for a list")

    # These two rules read more than one field. They run despite errors of other fields, to report all errors at once.

    @validates_schema(skip_on_field_errors=False)
    def _other_needs_description(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        name, other = NEEDS_DESCRIPTION["operation_category_description"]
        if other in (data.get(name) or ()) and not data.get("operation_category_description", True):
            raise ValidationError({"OperationCategoryDescription": [f"is required with the category {other}"]})

    @validates_schema(skip_on_field_errors=False)
    def _failure_needs_description(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        name, failure = NEEDS_DESCRIPTION["operation_result_description"]
        if data.get(name) == failure and not data.get("operation_result_description", True):
            raise ValidationError({"OperationResultDescription": [f"is required with the result {failure}"]})


class _RecordField(fields.Nested):
    """The record of a message. Uses the given schema itself: Nested would copy it, with its fields as declared."""

    @property
    def schema(self) -> Any:
        return self.nested if isinstance(self.nested, RecordSchema) else super().schema


class MsgSchema(_TypedSchema):
    """The rules of a :class:`~geventaudit.Msg`: ``{"Type": "ControlPlane", "Record": {"OperationName": ...}}``.

    :param record: the schema of the record; None for :class:`RecordSchema`.
    """

    describes = Msg
    type = Type(required=True)
    record = _RecordField(RecordSchema, required=True, error_messages=COMMON_MESSAGES)

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
        """Return a mapping as a Msg, without validation of its values. A Msg is returned unchanged.

        :raises ValidationError: the keys are not those of a message; the error has all other reasons too.
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
                    if (default := default_of(of_record[name])) is not marshmallow.missing:
                        given[name] = default
                record = Record(**given)
                return Msg(next(each for each, name in TYPE_NAMES.items() if name == kind), record)
        except (KeyError, TypeError, AttributeError):
            pass
        return cast(Msg, self.load(data))


def default_of(field: fields.Field[Any]) -> Any:
    """Return the value of *field* for a mapping without it."""
    return field.load_default() if callable(field.load_default) else field.load_default


def _shape(name: str, value: Any) -> Any:
    """Return a value of a mapping as in a record: members and objects if possible, invalid values unchanged."""
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
        pass  # refused when the record is loaded
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


def by_record(messages: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the errors of a message by the paths of its record: those of ``Record`` move to the top level."""
    flat = {key: value for key, value in messages.items() if key != "Record"}
    of_record = messages.get("Record", {})
    flat.update(of_record if isinstance(of_record, Mapping) else {"Record": of_record})
    return flat
