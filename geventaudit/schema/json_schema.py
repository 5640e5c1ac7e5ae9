"""The rules as JSON Schema, for other languages and for editors, derived from an instance of the schema.

All JSON that the rules accept is valid under the JSON Schema. Some JSON is valid there that the rules refuse, since
JSON Schema cannot express forbidden addresses, lone surrogates, the length of a frame, and the limits of custom data.
Only ``send`` and ``geventaudit check`` check all rules. Of the validators and hooks in Python code, the JSON Schema has
only marshmallow's ``Length``, ``OneOf`` and ``Regexp`` of texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import marshmallow
from marshmallow import fields, validate

from .fields import SENDABLE, Address, CustomData, Groups, Items, Member, Type
from .rules import NEEDS_DESCRIPTION, MsgSchema

__all__ = ["json_schema"]

_WITH_ZONE = "^[0-9A-Fa-f:.]+%."  # fe80::1%eth0, which the formats do not include
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(schema: MsgSchema) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a message, ``{"Type": ..., "Record": {...}}``."""
    definitions: dict[str, Any] = {}
    return {"$schema": _DIALECT, "title": "geventaudit message", **_object(schema, definitions), "$defs": definitions}


def _object(schema: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "description": schema.describes.__doc__.partition("\n")[0].replace(":meth:", "").replace("`", ""),
        "type": "object",
        "properties": {field.data_key: _value(field, definitions) for field in schema.load_fields.values()},
        "required": [field.data_key for field in schema.load_fields.values() if field.required],
    }
    if schema.unknown == marshmallow.RAISE:
        result["additionalProperties"] = False
    if conditions := list(_conditions(schema.load_fields)):
        result["allOf"] = conditions
    return result


def _conditions(by_name: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for description, (name, value) in NEEDS_DESCRIPTION.items():
        if description in by_name and name in by_name:
            there, needed = by_name[name].data_key, by_name[description].data_key
            is_value = {"const": str(value)}
            has_value = {"contains": is_value} if isinstance(by_name[name], Items) else is_value
            yield {
                "if": {"properties": {there: has_value}, "required": [there]},
                "then": {"properties": {needed: {"minLength": 1}}, "required": [needed]},
            }


def _value(field: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    result = _by_kind(field, definitions)
    if isinstance(field.load_default, str) and field.load_default:
        result["default"] = str(field.load_default)
    if result.get("type") == "string":
        for validator in field.validators:
            result |= _by_validator(validator)
    return {"anyOf": [result, {"type": "null"}]} if field.allow_none else result


def _by_kind(field: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if isinstance(field, fields.Nested):
        nested: Any = field.schema
        name = nested.describes.__name__
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = _object(nested, definitions)
        return {"$ref": f"#/$defs/{name}"}
    if isinstance(field, Member):
        return {"enum": [member.value for member in field.enum]}
    if isinstance(field, Type):
        return {"enum": list(SENDABLE)}
    if isinstance(field, Items):
        items: dict[str, Any] = {"type": "array", "items": _value(field.inner, definitions)}
        return items if field.may_be_empty else {**items, "minItems": 1}
    if isinstance(field, Groups):
        return {
            "type": "object",
            "propertyNames": _value(field.key_field, definitions),
            "additionalProperties": _value(field.value_field, definitions),
            "minProperties": 1,
        }
    if isinstance(field, Address):
        return {
            "description": "An IPv4 or IPv6 address without port; not unspecified, loopback or multicast.",
            "type": "string",
            "minLength": 1,
            "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}, {"pattern": _WITH_ZONE}],
        }
    if isinstance(field, CustomData):
        return {"type": ["object", "null"]}
    if isinstance(field, fields.String):
        return {"type": "string"}
    return {}  # the values of a user-defined field are unknown


def _by_validator(validator: Any) -> dict[str, Any]:
    if isinstance(validator, validate.Length):
        least = validator.min if validator.equal is None else validator.equal
        most = validator.max if validator.equal is None else validator.equal
        limits = {"minLength": least, "maxLength": most}
        return {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(validator, validate.OneOf):
        return {"enum": list(validator.choices)}
    if isinstance(validator, validate.Regexp):
        return {"pattern": f"^(?:{validator.regex.pattern!s})"}  # marshmallow matches from the beginning
    return {}
