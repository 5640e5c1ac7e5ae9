"""The JSON Schema agrees with the rules, as far as JSON Schema can; checked by the package ``jsonschema``."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from helpers import mapping
from hypothesis import given
from marshmallow import fields, validate
from strategies import messages

from geventaudit import CallerIdentityType, Msg, MsgSchema, OperationCategory, RecordSchema
from geventaudit.schema.json_schema import json_schema

RULES = MsgSchema()
SCHEMA = json_schema(RULES)
JUDGE = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
UNCHECKED = jsonschema.Draft202012Validator(SCHEMA)  # many take formats for comments


def message(**changes: Any) -> dict[str, Any]:
    return {"Type": "ControlPlane", "Record": mapping(**changes)}


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"CustomData": {}},
        {"OperationType": None, "OperationResult": None, "CustomData": None},
        {"OperationCategories": [each.value for each in OperationCategory], "OperationCategoryDescription": "why"},
        {"OperationResult": "Failure", "OperationResultDescription": "why"},
        {"CallerIdentities": {each.value: [{"Identity": "i", "Description": "d"}] for each in CallerIdentityType}},
        {"TargetResources": {"T": []}},
        {"TargetResources": {"T": [{"Name": "n", "Cluster": "", "DataCenter": "d", "Region": ""}]}},
        {"CallerIpAddress": "2001:db8::1"},
        {"CallerIpAddress": "::ffff:1.2.3.4"},
        {"CallerIpAddress": "fe80::1%eth0"},
        {"CallerAccessLevels": ["\u200b", "Größe 🦊", "a", "a"]},
        {"CustomData": {"a": [1, 1.5, None, True, {"b": "c"}], "big": 1e300}},
    ],
)
def test_messages_that_the_rules_accept(changes: dict[str, Any]) -> None:
    data = message(**changes)
    RULES.load(data)
    JUDGE.validate(data)


@given(messages)
def test_generated_messages_that_the_rules_accept(msg: Msg) -> None:
    """Custom data apart, which JSON has no words for."""
    data = RULES.dump(RULES.load(msg))
    data["Record"]["CustomData"] = {"any": 1}
    JUDGE.validate(json.loads(json.dumps(data)))


REFUSED: list[Any] = [
    None,
    [],
    {},
    {"Type": "ControlPlane"},
    {"Record": mapping()},
    {**message(), "More": 1},
    {**message(), "Type": "Heartbeat"},
    {**message(), "Type": "AsmAuditCP"},
    {"Type": "DataPlane", "Record": None},
    *(message(**{name: None}) for name in mapping() if name not in ("OperationType", "OperationResult", "CustomData")),
    *(message(**{name: ""}) for name in mapping()),
    *(message(**{name: 5}) for name in mapping()),
    *({**message(), "Record": {**mapping(), name: None}} for name in mapping() if name != "CustomData"),
    message(Extra=1),
    message(OperationCategories=[]),
    message(OperationCategories=["Nonsense"]),
    message(OperationCategories=["OCOther"]),
    message(OperationCategories=["EUII", "OCOther"], OperationCategoryDescription=""),
    message(OperationType="read"),
    message(OperationResult="Failure"),
    message(OperationResult="Failure", OperationResultDescription=""),
    message(CallerAccessLevels=[]),
    message(CallerAccessLevels=["Reader", " \t\u2003"]),
    message(CallerAccessLevels=[None]),
    message(CallerIdentities={}),
    message(CallerIdentities={"UPN": []}),
    message(CallerIdentities={"upn": [{"Identity": "i", "Description": "d"}]}),
    message(CallerIdentities={"UPN": [{"Identity": "i"}]}),
    message(CallerIdentities={"UPN": [{"Identity": "", "Description": "d"}]}),
    message(CallerIdentities={"UPN": [{"Identity": "i", "Description": "d", "More": 1}]}),
    message(TargetResources={}),
    message(TargetResources={"": []}),
    message(TargetResources={"\u00a0": []}),
    message(TargetResources={"T": None}),
    message(TargetResources={"T": [{"Region": "r"}]}),
    message(TargetResources={"T": [{"Name": "n", "Region": None}]}),
    message(CustomData=[1]),
]


@pytest.mark.parametrize("data", REFUSED, ids=range(len(REFUSED)))
def test_messages_that_the_rules_refuse(data: Any) -> None:
    assert RULES.validate(data)
    assert not UNCHECKED.is_valid(data)


@pytest.mark.parametrize("address", ["localhost", "1.2.3.4:80", "[::1]", "1.2.3", ""])
def test_invalid_addresses_are_refused_by_checked_formats(address: str) -> None:
    assert RULES.validate(message(CallerIpAddress=address))
    assert not JUDGE.is_valid(message(CallerIpAddress=address))


@pytest.mark.parametrize(
    "changes",
    [
        {"CallerIpAddress": "127.0.0.1"},
        {"OperationName": "a\ud800"},
        {"CustomData": {"n": 2**64}},
        {"CustomData": {"deep": json.loads("[" * 70 + "]" * 70)}},
    ],
)
def test_rules_that_json_schema_cannot_express(changes: dict[str, Any]) -> None:
    """Said in the module's docstring; if one of them is refused one day, it belongs into the test above."""
    assert RULES.validate(message(**changes))
    assert JUDGE.is_valid(message(**changes))


def test_stricter_rules_are_derived_too() -> None:
    class Strict(RecordSchema):
        caller_agent = fields.String(required=True, validate=[validate.Regexp("portal/|cli/"), validate.Length(max=9)])
        operation_access_level = fields.String(required=True, validate=validate.OneOf(["Reader", "Writer"]))
        operation_name = fields.Field(required=True, allow_none=True)
        operation_result_description = fields.String(data_key="Why", validate=validate.Length(equal=3))

    rules = MsgSchema(record=Strict())
    judge = jsonschema.Draft202012Validator(json_schema(rules))
    good = mapping(CallerAgent="portal/1", OperationAccessLevel="Reader")
    for changes, valid in (
        ({}, True),
        ({"CallerAgent": "cli/2"}, True),
        ({"CallerAgent": "my portal/1"}, False),
        ({"CallerAgent": "portal/1234"}, False),
        ({"OperationAccessLevel": "Owner"}, False),
        ({"OperationName": 5}, True),
        ({"OperationResult": "Failure"}, False),
        ({"OperationResult": "Failure", "Why": "abc"}, True),
        ({"Why": "abcd"}, False),
    ):
        data = {"Type": "DataPlane", "Record": {**good, **changes}}
        assert judge.is_valid(data) is valid, changes
        if "OperationResult" not in changes:  # the hook of the rules names the field by its usual key
            assert (not rules.validate(data)) is valid, changes
    nothing = {"Type": "DataPlane", "Record": {**good, "OperationName": None}}
    assert judge.is_valid(nothing)
