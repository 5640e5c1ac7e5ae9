"""The records of all contenders: one typical record, built anew each time."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import UUID

import msgpack

from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    MsgSchema,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from geventaudit.encoder.encoding import encode

__all__ = [
    "CALLERS",
    "FIRST",
    "TAG",
    "body",
    "dated",
    "frame_of",
    "from_many",
    "from_many_body",
    "invalid",
    "message",
    "nested",
    "sized",
    "wire_form",
]

TAG = AuditType.CONTROL_PLANE.value

FIRST = 1 << 20
"""The number of the first record. From here on all numbers, and so all frames, have the same length."""

CALLERS = 20_000
"""Of :func:`from_many`: each with an address, a name and a resource of its own. More than anybody remembers."""


_MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC)
_ID = UUID("e6c9fcb1-7f08-4c1d-9e7a-123456789abc")

_ONE = ("192.0.2.7", "user@example.com", "res1")


def message(number: int, caller: tuple[str, str, str] = _ONE) -> Msg:
    """The typical record, as a user of geventaudit builds it."""
    address, name, resource = caller
    return Msg(
        AuditType.CONTROL_PLANE,
        Record(
            operation_name="CreateUser",
            operation_categories=[OperationCategory.USER_MANAGEMENT],
            operation_type=OperationType.CREATE,
            operation_result=OperationResult.SUCCESS,
            operation_access_level="Contributor",
            caller_agent="agent/1.0",
            caller_ip_address=address,
            caller_identities={CallerIdentityType.UPN: [CallerIdentity(name, "the caller")]},
            caller_access_levels=["Reader"],
            target_resources={"SubscriptionId": [TargetResource(resource, region="westeurope")]},
            custom_data={"ticket": number},
        ),
    )


def body(number: int, caller: tuple[str, str, str] = _ONE) -> dict[str, Any]:
    """The same record as the mapping that it is on the wire, as a user of a peer builds it."""
    address, name, resource = caller
    return {
        "CallerIpAddress": address,
        "CallerIdentities": {"UPN": [{"Identity": name, "Description": "the caller"}]},
        "OperationCategories": ["UserManagement"],
        "CustomData": {"ticket": number},
        "TargetResources": {
            "SubscriptionId": [{"Name": resource, "Cluster": "", "DataCenter": "", "Region": "westeurope"}]
        },
        "CallerAccessLevels": ["Reader"],
        "OperationAccessLevel": "Contributor",
        "OperationName": "CreateUser",
        "OperationResultDescription": "",
        "CallerAgent": "agent/1.0",
        "OperationCategoryDescription": "",
        "OperationType": "Create",
        "OperationResult": "Success",
    }


@cache
def _callers() -> list[tuple[str, str, str]]:
    """Address, name and resource of each; of the same length for all."""
    return [
        (
            f"{10 + each // 10_000}.{100 + each // 100 % 100}.{100 + each % 100}.7",
            f"user{10_000 + each}@example.com",
            f"res{10_000 + each}",
        )
        for each in range(CALLERS)
    ]


def from_many(number: int) -> Msg:
    """The typical record, from one of many callers."""
    return message(number, _callers()[number % CALLERS])


def from_many_body(number: int) -> dict[str, Any]:
    """The same record as the mapping that it is on the wire."""
    return body(number, _callers()[number % CALLERS])


def dated(number: int) -> Msg:
    """The typical record, with a time and an id in its custom data."""
    msg = message(number)
    msg.record.custom_data = {"ticket": number, "at": _MOMENT, "id": _ID}
    return msg


def nested(number: int, changes: int) -> Msg:
    """The typical record, with a list of so many small changes in its custom data."""
    msg = message(number)
    msg.record.custom_data = {
        "changes": [{"field": f"field{each}", "old": each, "new": "x" * 10, "valid": True} for each in range(changes)],
        "ticket": number,
    }
    return msg


def invalid(number: int) -> Msg:
    """A record with one mistake, of three kinds in turn: at the top, deep inside, between two fields."""
    msg = message(number)
    if number % 3 == 0:
        msg.record.caller_ip_address = "127.0.0.1"
    elif number % 3 == 1:
        msg.record.target_resources = {"SubscriptionId": [TargetResource("")]}
    else:
        msg.record.operation_result = OperationResult.FAILURE
    return msg


def sized(number: int, kib: float) -> Msg:
    """Return a record of about that many KiB: the typical one, with texts of 100 letters in its custom data."""
    msg = message(number)
    texts = max(round((kib * 1024 - len(frame_of(msg))) / 111), 0)
    msg.record.custom_data = {"ticket": number, **{f"text{each:04}": "x" * 100 for each in range(texts)}}
    return msg


def frame_of(msg: Msg) -> bytes:
    """Its frame, as if sent now."""
    return encode(MsgSchema().load(msg), time.time())


def wire_form(msg: Msg) -> Any:
    """The plain lists, maps and texts that its frame is the MessagePack of.

    Equal texts are one object, as they are in the message, where nearly all are constants of the program: were each of
    its own, packing a thousand records would wait for memory, and be an easier baseline.
    """
    return _sharing_texts(msgpack.unpackb(frame_of(msg)))


def _sharing_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {sys.intern(key): _sharing_texts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_sharing_texts(each) for each in value]
    return sys.intern(value) if isinstance(value, str) else value
