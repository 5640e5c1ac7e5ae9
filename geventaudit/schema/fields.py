"""The fields of the schemas. Each extends a field of marshmallow, so that schema tools (apispec) know them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import marshmallow
from marshmallow import fields, validate
from marshmallow.exceptions import SCHEMA

from ..errors import ValidationError, count_errors, show
from ..records import AuditType
from .addresses import canonical_address
from .values import MAX_ERRORS, items_of, normal_form, surrogate_problem, text_of

__all__ = ["SENDABLE", "TYPE_NAMES", "Address", "CustomData", "Groups", "Items", "Member", "Text", "Type"]

TYPE_NAMES: dict[AuditType, str] = {
    AuditType.DATA_PLANE: "DataPlane",
    AuditType.CONTROL_PLANE: "ControlPlane",
    AuditType.HEARTBEAT: "Heartbeat",
    AuditType.DIAGNOSTIC: "Diagnostic",
}
"""The names of the types in mappings."""

SENDABLE = {TYPE_NAMES[kind]: kind for kind in (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE)}
"""The types that users send, by their names in mappings."""

COMMON_MESSAGES: dict[str, str | list[Any] | dict[Any, Any]] = {"required": "is required", "null": "must not be null"}
EMPTY = "must not be empty"
_NOT_EMPTY = validate.Length(min=1, error=EMPTY)
# Unicode White_Space. str.isspace() and \s also accept U+001C to U+001F, which are not in White_Space.
_BLANKS = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
_NOT_BLANK = validate.Regexp(f"[\\s\\S]*[^{_BLANKS}]", error="must not be blank")


def _with(rule: Callable[[Any], Any], more: Any) -> list[Any]:
    """Return the validators of a field: that of the protocol, and those of the user."""
    return [rule, *([] if more is None else [more] if callable(more) else more)]


class _Given:
    """Errors that show the given value, and errors for exceptions of its methods."""

    def problem(self, wanted: str, value: Any) -> ValidationError:
        return ValidationError(f"must be {wanted}, got {show(value)} ({type(value).__name__})")

    def deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Load *value*. An exception of its methods, or of a validator, becomes an error at its path."""
        try:
            return super().deserialize(value, *args, **kwargs)  # type: ignore[misc]  # that of marshmallow's Field
        except (marshmallow.ValidationError, MemoryError, RecursionError):
            raise
        except Exception as error:
            raise ValidationError(f"must be a valid value; validating it raised {show(error)}") from error


class Text(_Given, fields.String):
    """Text that UTF-8 can write; not empty if it is required.

    :param may_be_blank: False to refuse a text that is all white space.
    """

    default_error_messages = COMMON_MESSAGES

    def __init__(
        self, *, required: bool = False, may_be_blank: bool = True, validate: Any = None, **kwargs: Any
    ) -> None:
        if not required:
            kwargs.setdefault("load_default", "")
        if required:
            validate = _with(_NOT_EMPTY, validate)
        if not may_be_blank:
            validate = _with(_NOT_BLANK, validate)
        super().__init__(required=required, validate=validate, **kwargs)
        self.may_be_blank = may_be_blank

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = text_of(value)
        if text is None:
            raise self.problem("text", value)
        if not text.isascii() and (problem := surrogate_problem(text)):
            raise ValidationError(problem)
        return text


class Member(_Given, fields.Enum[StrEnum]):
    """A member of an enumeration, or its name on the wire."""

    default_error_messages = COMMON_MESSAGES

    def __init__(self, enum: type[StrEnum], **kwargs: Any) -> None:
        super().__init__(enum, by_value=True, **kwargs)
        self.by_value_text: dict[str, StrEnum] = {member.value: member for member in enum}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> StrEnum:
        is_text = isinstance(value, str) and (isinstance(value, self.enum) or not isinstance(value, StrEnum))
        member = self.by_value_text.get(text_of(value) or "") if is_text else None
        if member is None:
            raise ValidationError(f"must be one of {self.choices_text}; got {show(value)}")
        return member


class Type(fields.String):
    """The type of a message: an AuditType, or its name in mappings."""

    default_error_messages = COMMON_MESSAGES

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(metadata={"enum": list(SENDABLE)}, **kwargs)

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str:
        return TYPE_NAMES[value]

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        name = TYPE_NAMES[value] if isinstance(value, AuditType) else value
        if isinstance(name, str) and name in SENDABLE:
            return SENDABLE[name]
        own = isinstance(value, AuditType) or (isinstance(name, str) and name in TYPE_NAMES.values())
        problem = f"must be {' or '.join(SENDABLE)}, got {show(name)}"
        raise ValidationError(f"{problem} (only the library itself sends it)" if own else problem)


class Items(_Given, fields.List[Any]):
    """A list or tuple, with an *order* also a set. Each item follows the rules of the inner field.

    :param order: sorts the items and removes duplicates.
    """

    default_error_messages = COMMON_MESSAGES

    def __init__(
        self,
        inner: fields.Field[Any],
        *,
        order: Callable[[Iterable[Any]], list[Any]] | None = None,
        may_be_empty: bool = False,
        validate: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(inner, validate=validate if may_be_empty else _with(_NOT_EMPTY, validate), **kwargs)
        self.order = order
        self.may_be_empty = may_be_empty

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        kinds = Sequence if self.order is None else Collection  # with an order, a set is allowed
        if not isinstance(value, kinds) or isinstance(value, str | bytes | bytearray | memoryview | Mapping):
            raise self.problem("a list", value)
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
            raise ValidationError(errors, valid_data=result)
        return result if self.order is None else self.order(result)


class Groups(_Given, fields.Dict):
    """A mapping of lists. Unlike those of marshmallow's Dict, its errors have their paths on the wire.

    :param order: sorts the items of the mapping.
    """

    default_error_messages = COMMON_MESSAGES
    key_field: fields.Field[Any]
    value_field: fields.Field[Any]

    def __init__(
        self,
        keys: fields.Field[Any],
        values: fields.Field[Any],
        *,
        order: Callable[[Mapping[Any, Any]], list[tuple[Any, Any]]] | None = None,
        validate: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(keys, values, validate=_with(_NOT_EMPTY, validate), **kwargs)
        self.order = order

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise self.problem("a mapping", value)
        result: dict[Any, Any] = {}
        errors: dict[Any, Any] = {}
        found = 0
        for key, items in items_of(value):
            of_key: list[str] = []
            plain_key: Any = None
            try:
                plain_key = self.key_field.deserialize(key)
            except marshmallow.ValidationError as error:
                of_key = [f"(its key) {text}" for text in error.messages]
            try:
                result[plain_key] = self.value_field.deserialize(items)
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


class Address(_Given, fields.IP):
    """The caller's address, as text or an ``ipaddress`` object, loaded as text.

    Not unspecified, loopback or multicast.
    """

    default_error_messages = COMMON_MESSAGES

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> str:
        return str(value)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, IPv4Address | IPv6Address):
            value = str(value)
        text = text_of(value)
        if text is None:
            raise self.problem("an IP address", value)
        if not text:
            raise ValidationError(EMPTY)
        if problem := surrogate_problem(text):
            raise ValidationError(problem)
        try:
            text, forbidden = canonical_address(text)
        except ValueError:
            raise ValidationError(f"must be an IP address (without port or brackets), got {show(value)}") from None
        if forbidden:
            raise ValidationError(forbidden)
        return text


class CustomData(_Given, fields.Dict):
    """A mapping with text keys, of values that MessagePack can carry. None is an empty mapping."""

    default_error_messages = COMMON_MESSAGES

    def deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Load *value*; None is an empty mapping."""
        return super().deserialize({} if value is None else value, *args, **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.problem("a mapping with text keys", value)
        return normal_form(value)
