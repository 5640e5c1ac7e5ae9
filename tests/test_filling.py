"""Missing fields are filled in and marked; wrong fields stay wrong."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from helpers import message, record
from hypothesis import given
from hypothesis import strategies as st

from geventaudit import (
    CallerIdentity,
    CallerIdentityType,
    OperationCategory,
    OperationResult,
    Record,
    RecordSchema,
    TargetResource,
    ValidationError,
    fill_unknown,
)

RULES = RecordSchema()
FILLED = "filled_unknown"


def test_a_whole_record_is_left_alone() -> None:
    whole = record()
    assert fill_unknown(whole) is whole


def test_an_empty_record_is_acceptable_afterwards() -> None:
    filled = fill_unknown(Record())
    assert filled.operation_name == filled.caller_agent == filled.operation_access_level == "Unknown"
    assert filled.caller_ip_address == "192.0.0.8"
    assert RULES.load(filled).custom_data[FILLED] == [
        *("OperationName", "OperationAccessLevel", "CallerAgent", "CallerIpAddress", "OperationCategories"),
        *("CallerAccessLevels", "CallerIdentities", "TargetResources"),
    ]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"operation_name": ""}, "OperationName"),
        ({"caller_agent": None}, "CallerAgent"),
        ({"operation_access_level": ""}, "OperationAccessLevel"),
        ({"operation_categories": set()}, "OperationCategories"),
        ({"operation_categories": {OperationCategory.OTHER}}, "OperationCategoryDescription"),
        ({"operation_result": OperationResult.FAILURE}, "OperationResultDescription"),
        ({"caller_ip_address": "0.0.0.0"}, "CallerIpAddress"),
        ({"caller_ip_address": ip_address("::")}, "CallerIpAddress"),
        ({"caller_access_levels": []}, "CallerAccessLevels"),
        ({"caller_access_levels": ["Reader", " "]}, "CallerAccessLevels"),
        ({"caller_identities": {}}, "CallerIdentities"),
        ({"caller_identities": {CallerIdentityType.UPN: []}}, "CallerIdentities.UPN"),
        (
            {"caller_identities": {CallerIdentityType.UPN: (CallerIdentity("a", "b"), CallerIdentity("c", ""))}},
            "CallerIdentities.UPN[1].Description",
        ),
        ({"target_resources": {}}, "TargetResources"),
        ({"target_resources": {"Disk": [TargetResource("")]}}, "TargetResources.Disk[0].Name"),
    ],
)
def test_missing_fields_are_filled_and_named(changes: dict[str, Any], path: str) -> None:
    incomplete = record(**changes)
    with pytest.raises(ValidationError):
        RULES.load(incomplete)
    filled = fill_unknown(incomplete)
    assert RULES.load(filled).custom_data == {"ticket": 4711, FILLED: [path]}
    assert incomplete == record(**changes), "the given record is not changed"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", ip_address("127.0.0.1")])
def test_a_caller_on_this_host_gets_its_address(address: Any) -> None:
    filled = RULES.load(fill_unknown(record(caller_ip_address=address)))
    assert not ip_address(str(filled.caller_ip_address).partition("%")[0]).is_loopback
    assert filled.custom_data[FILLED] == ["CallerIpAddress"]


def test_a_host_without_an_address_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geventaudit.filling._FAR_AWAY", ())
    assert fill_unknown(record(caller_ip_address="127.0.0.1")).caller_ip_address == "192.0.0.8"


def test_filling_twice_keeps_the_first_list() -> None:
    once = fill_unknown(record(caller_agent=""))
    assert fill_unknown(once) is once
    again = fill_unknown(once.replace(operation_name="", caller_agent=""))
    assert again.custom_data[FILLED] == ["CallerAgent", "OperationName"]
    assert once.custom_data[FILLED] == ["CallerAgent"]


@pytest.mark.parametrize(
    "changes",
    [
        {"caller_ip_address": "nonsense"},
        {"caller_ip_address": "224.0.0.1"},
        {"caller_ip_address": b"\x7f\0\0\1"},
        {"caller_ip_address": 2130706433},
        {"caller_identities": [1]},
        {"caller_identities": {CallerIdentityType.UPN: 7}},
        {"caller_access_levels": "Reader"},
        {"caller_access_levels": [7]},
        {"target_resources": "x"},
        {"target_resources": {"": [TargetResource("x")]}},
        {"operation_categories": 7},
        {"operation_name": 7},
        {"operation_name": 0},
        {"caller_agent": []},
        {"caller_ip_address": 0},
        {"custom_data": 7},
    ],
)
def test_invalid_fields_stay_unchanged(changes: dict[str, Any]) -> None:
    wrong = record(**changes)
    assert fill_unknown(wrong) is wrong
    with pytest.raises(ValidationError):
        RULES.load(wrong)


@pytest.mark.parametrize("value", [message(), {}, None, "x"])
def test_it_takes_a_record(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^record must be a Record \(of a Msg, its record\), got "):
        fill_unknown(value)


texts = st.sampled_from(["", "x", "Reader"])
people = st.builds(CallerIdentity, texts, texts)


@given(
    st.builds(
        Record,
        operation_name=texts,
        operation_categories=st.sets(st.sampled_from(OperationCategory), max_size=2),
        operation_category_description=texts,
        operation_result=st.sampled_from(OperationResult),
        operation_result_description=texts,
        operation_access_level=texts,
        caller_agent=texts,
        caller_ip_address=st.sampled_from(["", "::", "127.0.0.1", "192.0.2.1"]) | st.ip_addresses(network="10.0.0.0/8"),
        caller_identities=st.dictionaries(
            st.sampled_from(CallerIdentityType), st.lists(people, max_size=2), max_size=2
        ),
        caller_access_levels=st.lists(texts | st.just("\t"), max_size=3),
        target_resources=st.dictionaries(
            st.sampled_from(["Disk", "Unknown"]), st.lists(st.builds(TargetResource, texts), max_size=2), max_size=2
        ),
    )
)
def test_the_rules_accept_each_filled_record(incomplete: Record) -> None:
    filled = fill_unknown(incomplete)
    loaded = RULES.load(filled)
    try:
        RULES.load(incomplete)
    except ValidationError:
        assert loaded.custom_data[FILLED]
    else:
        assert filled is incomplete, "nothing is filled without need"
