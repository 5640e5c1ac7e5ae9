"""Every field and type of a record, as Fluent Bit stores it as JSON and as it passes it on in the Forward protocol."""

from __future__ import annotations

import datetime as dt
import math
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
from fluent_bit import QUICK, fluent_bit, needs_fluent_bit, parsed
from helpers import SERVICE_TREE_ID, eventually, message
from msgpack import ExtType, Timestamp

from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Client,
    Heartbeat,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    TargetResource,
)
from geventaudit.agent import Agent, Received
from geventaudit.schema.values import MAX_DEPTH

pytestmark = [needs_fluent_bit, pytest.mark.slow]

TEXTS = [
    "x",
    " ",
    "Größe 😀 \u202e",
    "\u2028\u2029\x85\x9b\x7f",
    "".join(map(chr, range(1, 32))),
    "a\0b",
    '"\\/{}[],:',
    "\ufffe\uffff\U0010ffff",
    "x" * 31,
    "x" * 32,
    "x" * 255,
    "x" * 256,
    "x" * 65_535,
    "x" * 65_536,
]
CUSTOM: dict[str, Any] = {
    "none": None,
    "booleans": [True, False],
    "integers": [0, 1, -1, 127, 128, 255, 256, 65_535, 65_536, -32, -33, -128, -129, (1 << 53) - 1, -(1 << 53) + 1],
    "floats": [0.5, -0.25, 1e-7, 1e300, 123456.75],
    "empty": {"text": "", "list": [], "mapping": {}},
    "nested": {"a": {"b": [{"c": [1, [2, [3]]]}]}},
    "long list": list(range(70_000)),
    "many keys": {f"key {number}": number for number in range(300)},
    "uuid": uuid.UUID(int=7),
    'Schlüssel 😀\n"': "a key",
}
MOMENT = dt.datetime(2026, 11, 30, 12, 0, 0, 5, dt.UTC)
NO_JSON: dict[str, Any] = {
    "times": [MOMENT, Timestamp(5, 7)],
    "floats": [math.nan, math.inf, -math.inf],
    "integers": [1 << 53, -(1 << 63), (1 << 64) - 1],
    "bytes": b"\0\xff\xfe",
    "keys": {1: "a", 1.5: "b", None: "c", False: "d", b"\xff": "e"},
}
AS_JSON = {
    "times": ["2026-11-30T12:00:00.000005+00:00", "1970-01-01T00:00:05.000000007+00:00"],
    "floats": ["NaN", "Infinity", "-Infinity"],
    "integers": ["9007199254740992", "-9223372036854775808", "18446744073709551615"],
    "bytes": "AP_-",
    "keys": {"1": "a", "1.5": "b", "null": "c", "false": "d", "_w==": "e"},
}


def every_message() -> list[Msg]:
    """Messages that have each enumeration member, each text in each place, and each type of custom data."""
    messages = [
        *(message(operation_type=each) for each in OperationType),
        *(message(operation_result=each, operation_result_description="why") for each in OperationResult),
        *(message(operation_categories=[each], operation_category_description="other") for each in OperationCategory),
        *(message(caller_identities={each: [CallerIdentity("name", "why")]}) for each in CallerIdentityType),
        *(message(caller_ip_address=each) for each in ("192.0.2.7", "2001:db8::1", "::ffff:192.0.2.7", "fe80::1%eth0")),
        message(operation_categories=list(OperationCategory), operation_category_description="other"),
        message(caller_access_levels=["b", "a", "é"]),
        message(custom_data={}),
        message(custom_data=CUSTOM),
    ]
    for text in TEXTS:
        name = text if text.strip() else "blank"
        messages += [
            message(
                operation_name=name,
                operation_access_level=name,
                operation_result_description=text,
                operation_category_description=text,
                caller_agent=name,
                caller_identities={CallerIdentityType.UPN: [CallerIdentity(name, name)]},
                caller_access_levels=[name],
                target_resources={name: [TargetResource(name, text, text, text)]},
                custom_data={text: [text, {text: text}]},
            )
        ]
    return [Msg(kind, each.record) for each in messages for kind in (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE)]


def as_body(msg: Msg) -> dict[str, Any]:
    """The body of *msg* on the wire, made without the encoder."""
    from geventaudit.schema.rules import MsgSchema

    body: dict[str, Any] = MsgSchema().dump(MsgSchema().load(msg))["Record"]
    body["env_ikey"] = SERVICE_TREE_ID
    if not body["CustomData"]:
        del body["CustomData"]
    return body


@pytest.mark.parametrize("acks", [False, True])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_every_field_as_json(kind: str, acks: bool, folder: Path) -> None:
    messages = every_message()
    with fluent_bit(folder, kind) as agent:
        options: dict[str, Any] = {"backoff": QUICK, "max_frame_bytes": 4 << 20, "json_safe": True}
        with Client(lambda: agent.connect(require_ack=acks), service_tree_id=SERVICE_TREE_ID, **options) as client:
            for each in messages:
                client.send(each, timeout=60.0)
            assert client.flush(60.0)
            assert client.stats().connects == 1
        eventually(lambda: len(agent.lines()) >= len(messages) + 1)
        lines = agent.lines()
    (beat,) = (parsed(body) for tag, body in lines if tag == "AsmAuditHB")
    assert beat["AsmAuditServiceId"] == SERVICE_TREE_ID
    got = [(tag, parsed(body)) for tag, body in lines if tag != "AsmAuditHB"]
    for kind_of_audit in (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE):  # each tag has chunks of its own
        expected = [as_body(each) for each in messages if each.type is kind_of_audit]
        assert [body for tag, body in got if tag == kind_of_audit.value] == expected


def test_json_safe_makes_valid_json(folder: Path) -> None:
    with fluent_bit(folder) as agent:
        with Client(agent.connect, json_safe=True) as client:
            client.send(message(custom_data={**NO_JSON, "deep": [{"x": NO_JSON}]}))
            assert client.flush(30.0)
        (body,) = eventually(agent.records)
    assert body["CustomData"] == {**AS_JSON, "deep": [{"x": AS_JSON}]}


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 1}, {None: 1}, MOMENT, ExtType(5, b"ab")], ids=repr)
def test_without_it_the_json_is_invalid(value: Any, folder: Path) -> None:
    """The reason for which the option exists."""
    with fluent_bit(folder) as agent:
        with Client(agent.connect) as client:
            client.send(message(custom_data={"x": value}))
            assert client.flush(30.0)
        eventually(lambda: len(agent.lines()) == 2)
        with pytest.raises(ValueError, match=r"\w"):
            agent.records()


def test_floats_have_sixteen_digits(folder: Path) -> None:
    with fluent_bit(folder) as agent:
        with Client(agent.connect, json_safe=True) as client:
            client.send(message(custom_data={"x": [0.1 + 0.2, 1 / 3]}))
            assert client.flush(30.0)
        (body,) = eventually(agent.records)
    assert body["CustomData"] == {"x": [0.3, 0.3333333333333333]}


def test_text_for_datetimes_makes_valid_json(folder: Path) -> None:
    with fluent_bit(folder) as agent:
        with Client(agent.connect, datetimes="text") as client:
            client.send(message(custom_data={"x": [MOMENT]}))
            assert client.flush(30.0)
        (body,) = eventually(agent.records)
    assert body["CustomData"] == {"x": [MOMENT.isoformat()]}


def forwarding(folder: Path, address: Any, **options: Any) -> Any:
    """Fluent Bit that passes everything on to *address* in the Forward protocol."""
    where = {"unix_path": address} if isinstance(address, str) else {"host": "127.0.0.1", "port": address[1]}
    output = {"name": "forward", "match": "*", "retry_limit": "no_limits", **where, **options}
    return fluent_bit(folder, outputs=[output])


def test_every_field_and_type_passed_on(folder: Path) -> None:
    """Types that JSON has not, too: Fluent Bit passes on the bytes of a record as they are."""
    messages = [*every_message(), message(custom_data={**NO_JSON, "ext": ExtType(5, b"ab")})]
    got: list[Received] = []
    with (
        Agent(("127.0.0.1", 0), got.append) as receiver,
        forwarding(folder, receiver.address, retain_metadata_in_forward_mode=False) as agent,
    ):
        with Client(agent.connect, service_tree_id=SERVICE_TREE_ID, max_frame_bytes=4 << 20) as client:
            for each in messages:
                client.send(each, timeout=60.0)
            assert client.flush(60.0)
        eventually(lambda: len(got) > len(messages), f"{agent.log()} {receiver.counts}")
    assert receiver.counts.refused == 0
    received = [each.message for each in got if not isinstance(each.message, Heartbeat)]
    assert len(received) == len(messages)
    for kind in (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE):
        expected = [repr(loaded(each)) for each in messages if each.type is kind]
        assert [repr(each) for each in received if isinstance(each, Msg) and each.type is kind] == expected
    assert {each.service_tree_id for each in got if isinstance(each.message, Msg)} == {SERVICE_TREE_ID}


def loaded(msg: Msg) -> Any:
    from geventaudit.schema.rules import MsgSchema

    return MsgSchema().load(msg)


def nested(levels: int) -> dict[str, Any]:
    data: Any = "bottom"
    for _ in range(levels):
        data = {"k": data}
    return dict(data)


def test_the_deepest_record_that_is_accepted(folder: Path) -> None:
    with fluent_bit(folder) as agent:
        with Client(agent.connect, backoff=QUICK) as client:
            client.send(message(custom_data=nested(MAX_DEPTH)))
            client.send(message(1))
            assert client.flush(30.0)
            assert client.stats().connects == 1
        eventually(lambda: len(agent.records()) == 2)
        assert agent.records()[0]["CustomData"] == nested(MAX_DEPTH)


@pytest.mark.parametrize("size", [1 << 20, 6_143_000], ids=["default", "limit"])
@pytest.mark.parametrize("acks", [False, True])
def test_the_longest_frame(size: int, acks: bool, folder: Path) -> None:
    overhead = 700
    with fluent_bit(folder) as agent:
        with Client(lambda: agent.connect(require_ack=acks), max_frame_bytes=size, backoff=QUICK) as client:
            client.send(message(custom_data={"text": "x" * (size - overhead)}))
            client.send(message(1))
            assert client.flush(60.0)
            assert client.stats().connects == 1
        eventually(lambda: len(agent.records()) == 2)
        assert len(agent.records()[0]["CustomData"]["text"]) == size - overhead


def test_a_frame_above_the_limit_is_given_up_and_the_rest_arrives(folder: Path) -> None:
    dropped: list[Any] = []
    with fluent_bit(folder) as agent:
        with Client(agent.connect, max_frame_bytes=8 << 20, backoff=QUICK) as client:
            channel = client.notify()
            client.send(message(0))
            client.send(message(custom_data={"text": "x" * 6_200_000}))
            for number in range(1, 50):
                client.send(message(number))
            assert not client.flush(60.0)  # since one record is given up meanwhile
            while not dropped:
                dropped += channel.get(timeout=5.0).undelivered
            assert client.flush(60.0)
        eventually(lambda: len(agent.records()) >= 50)
        assert sorted(set(agent.numbers())) == list(range(50))
    assert [len(each.record.custom_data["text"]) for each in dropped] == [6_200_000]


@pytest.mark.parametrize(("kind", "acks"), [("unix", False), ("unix", True), ("tcp", True)])
def test_hot_reload(kind: str, acks: bool, folder: Path) -> None:
    """Fluent Bit opens its sockets again in the same process."""
    with fluent_bit(folder, kind, service={"hot_reload": True}) as agent:
        with Client(lambda: agent.connect(require_ack=acks), backoff=QUICK, queue_size=5000) as client:
            for number in range(5000):
                client.send(message(number), timeout=60.0)
                if number % 1000 == 500:
                    agent.signal(signal.SIGHUP)
            assert client.flush(60.0)
        eventually(lambda: len(set(agent.numbers())) == 5000, "records are lost")
