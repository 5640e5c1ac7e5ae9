"""The rules of schema/rules.py, and how their errors read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import date
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import marshmallow
import pytest
from helpers import mapping, message, record
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import fields, validate, validates, validates_schema

from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Client,
    Msg,
    MsgSchema,
    NoOp,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    RecordSchema,
    TargetResource,
    ValidationError,
)
from geventaudit.records import __all__ as record_names
from geventaudit.schema.addresses import _canonical_address, canonical_address


def messages_of(data: Any, schema: RecordSchema | None = None) -> Any:
    with pytest.raises(ValidationError) as caught:
        (schema or RecordSchema()).load(data)
    return caught.value.messages


def test_a_mapping_and_a_record_load_alike() -> None:
    assert RecordSchema().load(mapping()) == RecordSchema().load(record()) == record()


def test_msg_loads_from_a_mapping() -> None:
    loaded = MsgSchema().load({"Type": "ControlPlane", "Record": mapping()})
    assert loaded == message()
    assert type(loaded.type) is AuditType
    assert type(loaded.record) is Record


def test_dump_gives_the_mapping() -> None:
    dumped = MsgSchema().dump(message())
    assert MsgSchema().load(dumped) == message()
    assert dumped["Type"] == "ControlPlane"
    assert dumped["Record"]["CallerIdentities"]["UPN"][0] == {
        "Identity": "user@example.com",
        "Description": "the caller",
    }


def test_all_errors_at_once_by_wire_path() -> None:
    messages = messages_of(
        mapping(
            OperationName="",
            OperationCategories=["OCOther", "Nonsense"],
            OperationResult="Failure",
            CallerIpAddress="127.0.0.1",
            CallerAgent=None,
            CallerAccessLevels=["Reader", "  "],
            TargetResources={"SubscriptionId": [{"Name": "ok"}, {"Name": "", "Cluster": 7}], " ": []},
            CustomData={"deep": {"er": [1, object]}},
            Extra=1,
        )
    )
    assert messages["OperationName"] == ["must not be empty"]
    assert messages["OperationCategories"][1][0].startswith("must be one of UnknownOperationCategory, OCOther, ")
    assert messages["OperationResultDescription"] == ["is required with the result Failure"]
    assert messages["CallerIpAddress"] == [
        "must not be a loopback address (fill_unknown(record) replaces it), got '127.0.0.1'"
    ]
    assert messages["CallerAgent"] == ["is required"]
    assert messages["CallerAccessLevels"] == {1: ["must not be blank"]}
    assert messages["TargetResources"] == {
        "SubscriptionId": {1: {"Name": ["must not be empty"], "Cluster": ["must be text, got 7 (int)"]}},
        " ": ["(its key) must not be blank"],
    }
    assert messages["CustomData"]["deep"]["er"][1][0].startswith("must be a value that MessagePack can carry")
    assert messages["Extra"] == ["is not a field of this protocol"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("operation_name", "OperationName"),
        ("operationName", "OperationName"),
        ("OPERATION-NAME", "OperationName"),
        ("custom_data", "CustomData"),
        ("caller_ip_address", "CallerIpAddress"),
    ],
)
def test_another_spelling_of_a_name(given: str, meant: str) -> None:
    messages = messages_of(mapping(**{given: "x"}))
    assert messages == {given: [f"is not a field of this protocol: did you mean {meant}?"]}


def test_other_spellings_in_nested_places_and_around_the_record() -> None:
    given = mapping(
        TargetResources={"T": [{"Name": "n", "data_center": "x"}]},
        CallerIdentities={"UPN": [{"identity": "a", "Description": "b"}]},
    )
    messages = messages_of(given)
    hint = "is not a field of this protocol: did you mean {}?".format
    assert messages["TargetResources"]["T"][0]["data_center"] == [hint("DataCenter")]
    assert messages["CallerIdentities"]["UPN"][0]["identity"] == [hint("Identity")]
    with pytest.raises(ValidationError) as caught, Client(NoOp) as client:
        client.send({"type": "ControlPlane", "record": mapping()})
    assert (caught.value.messages["type"], caught.value.messages["record"]) == ([hint("Type")], [hint("Record")])


def test_errors_name_the_next_step() -> None:
    for address in ("127.0.0.1", "::1", "0.0.0.0"):
        assert "fill_unknown(record)" in messages_of(mapping(CallerIpAddress=address))["CallerIpAddress"][0]
    given = mapping(CustomData={"day": date(2026, 1, 1)})
    assert messages_of(given)["CustomData"]["day"][0].endswith("(date): use a datetime with a tzinfo")


def test_the_text_of_an_error_names_paths() -> None:
    with pytest.raises(ValidationError) as caught:
        RecordSchema().load(mapping(TargetResources={"SubscriptionId": [{"Name": ""}]}, OperationName=None))
    assert str(caught.value) == "OperationName: is required; TargetResources.SubscriptionId[0].Name: must not be empty"


def test_marshmallow_users_catch_it() -> None:
    with pytest.raises(marshmallow.ValidationError):
        RecordSchema().load({})


def test_both_descriptions_are_asked_for_beside_other_errors() -> None:
    messages = messages_of(mapping(OperationCategories=["OCOther"], OperationResult="Failure", OperationName=""))
    assert set(messages) == {"OperationName", "OperationCategoryDescription", "OperationResultDescription"}


def test_a_description_of_the_wrong_type_is_not_called_missing_too() -> None:
    assert messages_of(mapping(OperationResult="Failure", OperationResultDescription=5)) == {
        "OperationResultDescription": ["must be text, got 5 (int)"]
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OperationName", b"bytes"),
        ("OperationName", 5),
        ("OperationCategories", "UserManagement"),
        ("OperationCategories", {"UserManagement": 1}),
        ("OperationCategories", (x for x in ["UserManagement"])),
        ("OperationCategories", [b"UserManagement"]),
        ("OperationCategories", [["UserManagement"]]),
        ("OperationType", "read"),
        ("OperationType", 1),
        ("OperationType", OperationResult.SUCCESS),
        ("OperationResult", "Ok"),
        ("CallerIpAddress", 0x7F000002),
        ("CallerIpAddress", b"\x0a\0\0\1"),
        ("CallerIdentities", [("UPN", [])]),
        ("CallerIdentities", {"UPN": {"Identity": "i", "Description": "d"}}),
        ("CallerIdentities", {"upn": [{"Identity": "i", "Description": "d"}]}),
        ("CallerIdentities", {"UPN": [{"Identity": "i", "Description": "d", "More": 1}]}),
        ("CallerIdentities", {"UPN": ["i"]}),
        ("CallerIdentities", {"UPN": {("i", "d")}}),
        ("CallerAccessLevels", "Reader"),
        ("CallerAccessLevels", [None]),
        ("TargetResources", {"T": None}),
        ("TargetResources", {5: []}),
        ("TargetResources", {"T": [{"Name": "n", "Region": None}]}),
        ("CustomData", [1]),
        ("CustomData", {1: "a"}),
    ],
)
def test_wrong_types_are_refused(name: str, value: Any) -> None:
    assert set(messages_of(mapping(**{name: value}))) == {name}


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "::", "::%eth0", "::ffff:0.0.0.0", "127.0.0.1", "127.9.9.9", "::1", "::1%lo", "::ffff:127.0.0.1",
     "::ffff:7f00:1", "224.0.0.1", "ff02::1", "ff02::1%eth0", "::ffff:224.0.0.1", "0:0:0:0:0:ffff:e000:1%z"],
)  # fmt: skip
def test_addresses_that_are_no_callers(address: str) -> None:
    assert messages_of(mapping(CallerIpAddress=address))["CallerIpAddress"][0].endswith(repr(address))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (IPv4Address("10.0.0.1"), "10.0.0.1"),
        (IPv6Address("2001:DB8::1"), "2001:db8::1"),
        (IPv6Address("::ffff:1.2.3.4"), "::ffff:1.2.3.4"),
        ("::FFFF:102:304", "::ffff:1.2.3.4"),
        ("FE80::1%Eth0", "fe80::1%Eth0"),
    ],
)
def test_addresses_are_written_in_one_spelling(given: Any, written: str) -> None:
    assert RecordSchema().load(record(caller_ip_address=given)).caller_ip_address == written


@pytest.mark.parametrize(
    "address", ["1.2.3.4:80", "[::1]", "localhost", "fe80::1%", "1.2.3.4%eth0", "1.2.3.4/8", "::/0", "\u0661.2.3.4"]
)
def test_invalid_addresses_are_refused(address: str) -> None:
    assert messages_of(mapping(CallerIpAddress=address))["CallerIpAddress"][0].startswith("must be an IP address")


def test_lone_surrogates_are_refused_everywhere() -> None:
    bad = "a\ud800"
    messages = messages_of(
        mapping(
            OperationName=bad,
            CallerAgent=bad,
            OperationResultDescription=bad,
            CallerIpAddress="fe80::1%" + bad,
            CallerAccessLevels=[bad],
            CallerIdentities={"UPN": [{"Identity": bad, "Description": bad}]},
            TargetResources={bad: [], "T": [{"Name": bad}]},
            CustomData={bad: 1, "k": bad},
        )
    )
    assert set(messages) >= {"OperationName", "CallerAgent", "OperationResultDescription", "CallerAccessLevels"}
    assert "U+D800" in messages["CustomData"]["k"][0]
    assert "U+D800" in messages["CustomData"][bad][0]
    assert messages["CallerIdentities"]["UPN"][0].keys() == {"Identity", "Description"}
    assert set(messages["TargetResources"]) == {bad, "T"}


def test_normal_form_leaves_the_callers_objects_alone() -> None:
    mine = record(
        operation_categories=(OperationCategory.EUII, OperationCategory.USER_MANAGEMENT, OperationCategory.EUII),
        caller_access_levels=["b", "é", "a", "b", "Z"],
        custom_data={"t": (1, {"s": {3, 1, 2}})},
    )
    before = copy.deepcopy(mine)
    loaded = RecordSchema().load(mine)
    assert mine == before
    assert loaded.operation_categories == [OperationCategory.USER_MANAGEMENT, OperationCategory.EUII]
    assert loaded.caller_access_levels == ["Z", "a", "b", "é"]
    assert loaded.custom_data == {"t": [1, {"s": [1, 2, 3]}]}
    assert loaded.custom_data is not mine.custom_data


@pytest.mark.parametrize("kind", [AuditType.HEARTBEAT, AuditType.DIAGNOSTIC, "Heartbeat", "AsmAuditCP", "", 5, None])
def test_only_two_types_can_be_sent(kind: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        MsgSchema().load({"Type": kind, "Record": mapping()})
    assert list(caught.value.messages) == ["Type"]
    assert kind is None or "must be DataPlane or ControlPlane" in str(caught.value)


@pytest.mark.parametrize("data", [None, 5, "text", [], [mapping()], b"{}"])
def test_values_that_are_not_messages_are_refused(data: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        MsgSchema().load(data)
    assert str(caught.value).startswith("must be a Msg, or a mapping with Type and Record, got ")
    assert str(caught.value).endswith(f" ({type(data).__name__})")
    assert MsgSchema().validate(data) == caught.value.messages


def test_a_record_that_is_not_in_a_message() -> None:
    with pytest.raises(ValidationError, match=r"got Record\(.*\): wrap it in Msg\(AuditType.CONTROL_PLANE, record\)$"):
        MsgSchema().load(record())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"CallerIdentities": {"UPN": ["ada"]}},
            "CallerIdentities.UPN[0]: must be a CallerIdentity or a mapping, got 'ada' (str)",
        ),
        (
            {"TargetResources": {"Vault": [{"Name": "a"}, 5]}},
            "TargetResources.Vault[1]: must be a TargetResource or a mapping, got 5 (int)",
        ),
    ],
)
def test_items_that_are_none(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RecordSchema().load(mapping(**changes))
    assert str(caught.value) == problem
    assert RecordSchema().validate(mapping(**changes)) == caught.value.messages


def test_a_value_that_is_not_a_record_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"must be a Record or a mapping, got \[\] \(list\)"):
        MsgSchema().load(Msg(AuditType.DATA_PLANE, []))  # type: ignore[arg-type]


def test_empty_custom_data_and_null_are_the_same() -> None:
    assert RecordSchema().load(mapping(CustomData={})) == RecordSchema().load({**mapping(), "CustomData": None})


def test_stricter_rules_by_subclass() -> None:
    class Stricter(RecordSchema):
        caller_agent = fields.String(required=True, validate=validate.Regexp("^portal/"))

        @validates("operation_name")
        def _name(self, value: str, **kwargs: Any) -> None:
            if not value.startswith("Create"):
                raise marshmallow.ValidationError("must start with Create")

        @validates_schema
        def _whole(self, data: Any, **kwargs: Any) -> None:
            if data["operation_type"] is not OperationType.CREATE:
                raise marshmallow.ValidationError("must create", "OperationType")

    schema = Stricter()
    assert schema.load(record(caller_agent="portal/2")).caller_agent == "portal/2"
    assert "CallerAgent" in messages_of(record(), schema)
    assert messages_of(record(operation_name="Drop", caller_agent="portal/2"), schema) == {
        "OperationName": ["must start with Create"]
    }
    assert messages_of(record(operation_type=OperationType.READ, caller_agent="portal/2"), schema) == {
        "OperationType": ["must create"]
    }
    with pytest.raises(ValidationError):
        MsgSchema(record=schema).load(message())


def test_a_subclass_with_other_fields_is_refused_at_once() -> None:
    class More(RecordSchema):
        ticket = fields.String()

    with pytest.raises(TypeError, match="ticket"):
        More()


def test_validate_gives_messages_without_raising() -> None:
    assert RecordSchema().validate(record()) == {}
    assert RecordSchema().validate(record(operation_name="")) == {"OperationName": ["must not be empty"]}
    assert RecordSchema().load([record(), mapping()], many=True) == [record(), record()]


def test_the_defaults_of_a_record() -> None:
    bare = Record()
    assert (bare.operation_type, bare.operation_result) == (OperationType.UNKNOWN, OperationResult.UNKNOWN)
    assert bare.operation_name == bare.operation_category_description == ""
    assert bare.custom_data == {}
    with pytest.raises(AttributeError):
        bare.operation_nam = "typo"  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        bare.replace(operation_nam="typo")


def test_replace_makes_a_template_useful() -> None:
    template = record()
    other = template.replace(operation_name="DeleteUser", operation_type=OperationType.DELETE)
    assert (template.operation_name, other.operation_name) == ("CreateUser", "DeleteUser")


@pytest.mark.parametrize("name", ["\u200b", "\ufeff", "\u180e", "\x1c", "\x1f", "\0"])
def test_names_that_look_blank_are_accepted(name: str) -> None:
    assert RecordSchema().load(mapping(CallerAccessLevels=[name])).caller_access_levels == [name]


def test_every_member_says_when_to_use_it() -> None:
    """Each member of each enumeration is followed by its docstring."""
    import ast
    import inspect

    from geventaudit import records

    assert {"AuditType", "CallerIdentityType"} <= set(record_names)
    for node in ast.parse(inspect.getsource(records)).body:
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "StrEnum" for base in node.bases):
            for member, doc in zip(node.body[1:-1:2], node.body[2::2], strict=True):
                assert isinstance(member, ast.Assign), node.name
                assert isinstance(doc, ast.Expr), node.name


def test_identities_and_targets_as_objects_or_mappings() -> None:
    mixed = record(
        caller_identities={"UPN": [{"Identity": "i", "Description": "d"}]},
        target_resources={"T": ({"Name": "n"}, TargetResource("m", data_center="dc"))},
    )
    loaded = RecordSchema().load(mixed)
    assert loaded.caller_identities == {CallerIdentityType.UPN: [CallerIdentity("i", "d")]}
    assert loaded.target_resources == {"T": [TargetResource("n"), TargetResource("m", data_center="dc")]}
    assert isinstance(Msg(AuditType.DATA_PLANE, loaded), Msg)


@pytest.mark.parametrize(
    "options",
    [{"exclude": ("caller_agent",)}, {"only": ("caller_agent",)}, {"dump_only": ("operation_type",)},
     {"partial": True}, {"many": True}],
)  # fmt: skip
def test_a_schema_that_would_leave_fields_out_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="RecordSchema"):
        RecordSchema(**options)


def test_errors_beside_errors_of_the_same_field() -> None:
    messages = messages_of(
        mapping(
            OperationCategories=["OCOther", "Bogus"],
            CallerIdentities={"Bogus": [{"Identity": ""}]},
            TargetResources={" ": [{"Name": ""}], "": "x"},
        )
    )
    assert messages["OperationCategoryDescription"] == ["is required with the category OCOther"]
    assert messages["CallerIdentities"]["Bogus"][0] == {
        "Identity": ["must not be empty"],
        "Description": ["is required"],
    }
    assert messages["CallerIdentities"]["Bogus"]["_schema"][0].startswith("(its key) must be one of")
    assert messages["TargetResources"][" "][0] == {"Name": ["must not be empty"]}
    assert messages["TargetResources"][""][1] == "must be a list, got 'x' (str)"


def test_any_collection_is_a_list() -> None:
    from collections import deque

    loaded = RecordSchema().load(
        record(
            operation_categories=deque([OperationCategory.EUII]),
            caller_access_levels={"Reader": 1}.keys(),
            target_resources={"T": deque([TargetResource("n")])},
        )
    )
    assert loaded.operation_categories == [OperationCategory.EUII]
    assert loaded.caller_access_levels == ["Reader"]
    assert loaded.target_resources == {"T": [TargetResource("n")]}


def test_errors_show_no_control_characters() -> None:
    text = str(ValidationError(messages_of(mapping(CallerIpAddress="::1%\x1b[31m\nFAKE"))))
    assert text.isprintable()


def test_a_hook_cannot_change_the_callers_mapping() -> None:
    class Changing(RecordSchema):
        @marshmallow.pre_load
        def _change(self, data: Any, **kwargs: Any) -> Any:
            data["OperationName"] = "Changed"
            return data

    mine = mapping()
    assert Changing().load(mine).operation_name == "Changed"
    assert mine == mapping()


@given(
    st.lists(st.integers(-1, 300).map(str) | st.sampled_from(["01", "", " 1", "1 ", "+1", "1_0", "\u0661"]), max_size=5)
)
def test_both_paths_for_dotted_addresses_agree(octets: list[str]) -> None:
    def outcome(way: Callable[[str], Any]) -> Any:
        try:
            return way(".".join(octets))
        except ValueError:
            return None

    assert outcome(canonical_address) == outcome(_canonical_address.__wrapped__)


def test_schema_tools_understand_the_schema_as_it_is() -> None:
    from apispec import APISpec
    from apispec.ext.marshmallow import MarshmallowPlugin

    spec = APISpec("t", "1", "3.1.0", plugins=[MarshmallowPlugin()])
    spec.components.schema("Record", schema=RecordSchema)
    schemas = spec.to_dict()["components"]["schemas"]
    properties = schemas["Record"]["properties"]
    assert set(properties) == set(mapping()) | {"OperationCategoryDescription", "OperationResultDescription"}
    assert properties["OperationName"] == {"type": "string", "minLength": 1}
    assert properties["OperationType"]["enum"] == [each.value for each in OperationType]
    assert properties["OperationCategories"]["items"]["enum"][1] == "OCOther"
    assert properties["CallerIpAddress"]["type"] == "string"
    identities = properties["CallerIdentities"]["additionalProperties"]
    assert identities["items"] == {"$ref": "#/components/schemas/CallerIdentity"}
    assert sorted(schemas["CallerIdentity"]["required"]) == ["Description", "Identity"]


@pytest.mark.parametrize("call", ["load", "validate", "construct"])
def test_a_part_of_a_record_is_refused_with_the_reason(call: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "load": lambda: RecordSchema().load({}, partial=("caller_agent",)),
        "validate": lambda: RecordSchema().validate({}, partial=True),
        "construct": lambda: RecordSchema(partial=True),
    }
    with pytest.raises(TypeError, match="for one whole Record"):
        calls[call]()


@pytest.mark.parametrize("options", [{"only": ("name",)}, {"exclude": ("region",)}])
def test_a_part_of_a_nested_schema_is_refused_with_the_reason(options: dict[str, Any]) -> None:
    from geventaudit.schema.rules import TargetResourceSchema

    with pytest.raises(TypeError, match=r"these differ: .*only, exclude and dump_only remove fields"):
        TargetResourceSchema(**options)
