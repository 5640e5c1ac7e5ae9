"""What is compiled from a schema agrees with the schema: in verdict, frame and messages, or by saying nothing."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import sys
import threading
import time
from collections import UserDict
from collections.abc import Callable
from typing import Any

import marshmallow
import pytest
from gevent.threadpool import ThreadPool
from helpers import SERVICE_TREE_ID, mapping, message, record
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import fields, validate, validates, validates_schema
from strategies import anything, filled, messages, mutated_messages, text
from test_golden import FRAMES, VALIDATION, input_of

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
from geventaudit.encoder.compiled import Compiled
from geventaudit.encoder.encoding import Encoder, Packed
from geventaudit.protocol.decoding import decode
from geventaudit.schema import rules
from geventaudit.schema.rules import TargetResourceSchema

ENCODER = Encoder(SERVICE_TREE_ID)
RULES = MsgSchema()
TIME = 1_700_000_000.5


def plain(schema: MsgSchema, msg: Any, encoder: Encoder = ENCODER) -> Any:
    """What becomes of *msg* without anything compiled: its frame, or the messages of its errors."""
    try:
        loaded = schema.load(msg)
        if type(schema.fields["record"].schema) is not RecordSchema:  # type: ignore[attr-defined]
            loaded = RULES.load(loaded)
        return encoder.encode(loaded, TIME)
    except ValidationError as error:
        return error.messages
    except Exception as error:
        return f"raised {type(error).__name__}"


def agrees(schema: MsgSchema, compiled: Compiled, msg: Any, encoder: Encoder = ENCODER) -> bytes | None:
    """Compare both ways; what was compiled says the frame that the plain way makes, or nothing."""
    frame = compiled.frame_of(msg, TIME, encoder.pack)
    assert frame is None or frame == plain(schema, msg, encoder)
    return frame


def mapping_message(**changes: Any) -> dict[str, Any]:
    return {"Type": "ControlPlane", "Record": mapping(**changes)}


def by_names(msg: Any) -> Any:
    return MsgSchema().dump(msg)


class Text(str):
    """Text that is its own idea of equality."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.lower())


class Likeness(str):
    """Equal to what is remembered, and not the same."""

    def __new__(cls, other: str) -> Likeness:
        self = str.__new__(cls, "something else")
        self.other = other
        return self

    other: str

    def __eq__(self, other: object) -> bool:
        return other == self.other

    def __hash__(self) -> int:
        return hash(self.other)


class Other(enum.StrEnum):
    """Members of another enumeration with the same values."""

    READ = "Read"
    UPN = "UPN"
    OC_OTHER = "OCOther"
    SUCCESS = "Success"


class Number(enum.IntEnum):
    ONE = 1


# -- the schemas that users may make -----------------------------------------------------------------------------------


class Stock(RecordSchema):
    """A subclass that changes nothing."""


class Longest(RecordSchema):
    operation_name = fields.String(required=True, validate=validate.Length(max=5))
    caller_agent = fields.Str(required=True, validate=[validate.Regexp("^[ -~]*$"), validate.Length(max=9)])
    operation_type = fields.Enum(OperationType, by_value=True)


def _short(value: str) -> None:
    if len(value) > 5:
        raise marshmallow.ValidationError("must be short")


class OwnValidator(RecordSchema):
    operation_name = rules.Text(required=True, validate=_short)
    caller_agent = rules.Text(required=True, validate=[_short, validate.NoneOf(["x"])])
    custom_data = fields.Dict(load_default=dict, validate=validate.Length(max=2))
    operation_categories = fields.List(fields.String(), required=True, validate=validate.Length(max=2))


class Upper(fields.Field[str]):
    """A field of somebody's own, which looks at other fields too."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if data.get("OperationType") is OperationType.DELETE:
            raise marshmallow.ValidationError(f"{attr} must not be deleted")
        if not isinstance(value, str):  # the str() of a structure with shared parts can fill all memory
            raise marshmallow.ValidationError("must be text")
        return value.upper()


class Reversed(fields.Raw):
    """Another, which says nothing of what it cannot take."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return dict(reversed(value.items()))


class OwnFields(RecordSchema):
    operation_name = Upper(required=True)
    operation_access_level = Upper(required=True, data_key="Level")
    caller_identities = Reversed(required=True)


class OwnMethods(RecordSchema):
    @validates("operation_name", "caller_agent")
    def _name(self, value: str, data_key: str, **kwargs: Any) -> None:
        if len(value) > 5:
            raise marshmallow.ValidationError(f"{data_key} is long")

    @validates("operation_categories")
    def _categories(self, value: list[Any], **kwargs: Any) -> None:
        value.sort(reverse=True)
        if len(value) > 1:
            raise marshmallow.ValidationError("must be one")


class OwnRule(RecordSchema):
    @validates_schema
    def _whole(self, data: Any, **kwargs: Any) -> None:
        if data["operation_type"] is not OperationType.CREATE:
            raise marshmallow.ValidationError("must create", "OperationType")
        data["operation_name"] = "changed"


class PreLoad(RecordSchema):
    @marshmallow.pre_load
    def _before(self, data: Any, **kwargs: Any) -> Any:
        return {**data, "OperationName": "before"} if isinstance(data, dict) else data


class PostLoad(RecordSchema):
    @marshmallow.post_load
    def _after(self, data: Any, **kwargs: Any) -> Any:
        return {**data, "operation_name": ""} if data["operation_type"] is OperationType.READ else data


class WithoutItsRule(RecordSchema):
    def _failure_needs_description(self, data: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """A record may fail without saying why, says this schema; the rules say otherwise."""


class OwnLoad(RecordSchema):
    def load(self, data: Any, **kwargs: Any) -> Any:
        loaded = super().load(data, **kwargs)
        return loaded.replace(caller_agent="own load")


class Lenient(RecordSchema):
    class Meta:
        unknown = marshmallow.INCLUDE

    operation_name = fields.Raw(allow_none=True, load_default=None)
    caller_access_levels = fields.Raw(load_default=list)
    target_resources = fields.Raw(load_default=dict)


class WithLimit(RecordSchema):
    """Takes a setting; that alone is no reason to be slow."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    @validates("caller_agent")
    def _agent(self, value: str, **kwargs: Any) -> None:
        if len(value) > self.limit:
            raise marshmallow.ValidationError(f"must be at most {self.limit} long")


class Brittle(RecordSchema):
    operation_name = rules.Text(required=True, validate=lambda value: [None][len(value) - 5])


SCHEMAS: dict[str, Callable[[], RecordSchema]] = {
    "RecordSchema": RecordSchema,
    "lenient about names": lambda: RecordSchema(unknown=marshmallow.EXCLUDE),
    **{each.__name__: each for each in (Stock, Longest, OwnValidator, OwnFields, OwnMethods, OwnRule, PreLoad)},
    **{each.__name__: each for each in (PostLoad, WithoutItsRule, OwnLoad, Lenient, Brittle)},
    "WithLimit": lambda: WithLimit(5),
}
MADE = {name: MsgSchema(record=make()) for name, make in SCHEMAS.items()}
COMPILED = {name: Compiled(schema, ENCODER) for name, schema in MADE.items()}
SLOW = {"OwnRule", "PreLoad", "PostLoad", "WithoutItsRule", "OwnLoad"}

# Values that resemble good ones, for whatever place.
almost = (
    anything
    | text
    | st.sampled_from(["", " ", "\u2003", "\x1c", "\ud800", "a\udfff", "Read", "read", "OCOther", "UPN", "x" * 200])
    | st.sampled_from([*Other, *OperationCategory, *CallerIdentityType, *OperationResult, Number.ONE, True, None, 0])
    | st.sampled_from(["::1", "0.0.0.0", "::ffff:1.2.3.4", "FE80::1%eth0", "1.2.3.4 ", "224.0.0.1", b"1.2.3.4"])
    | st.builds(Text, text | st.just("READER"))
    | st.builds(Likeness, st.sampled_from(["CreateUser", "", "Reader", "res1", "192.0.2.7", "Success", "DataPlane"]))
    | st.lists(st.sampled_from(["Reader", Text("reader"), Likeness("Reader"), "Writer", ""]), max_size=3)
    | st.sets(st.sampled_from([*OperationCategory, "OCOther"]), max_size=3)
    | st.lists(st.sampled_from([*OperationCategory, *Other, "OCOther", Likeness("OCOther"), "?"]), max_size=3)
    | st.dictionaries(st.sampled_from([*CallerIdentityType, *Other, "UPN", "T", Likeness("UPN"), ""]), st.lists(
        st.sampled_from([CallerIdentity("i", "d"), CallerIdentity("", "d"), {"Identity": "i", "Description": "d"},
                         TargetResource("n"), TargetResource(Text("n"), "c"), TargetResource("", "c"), {"Name": "n"}]),
        max_size=2) | st.none() | st.tuples(), max_size=2)
    | st.recursive(st.none() | st.sampled_from([2**64, -(2**63) - 1, float("nan"), dt.datetime(2020, 1, 1)]),
                   lambda inner: st.lists(inner) | st.dictionaries(text | st.integers(), inner), max_leaves=4)
)  # fmt: skip


@st.composite
def nearly_good(draw: st.DrawFn) -> Any:
    """A good message, or one with up to three things in it replaced, as an object or by wire names."""
    msg = draw(st.just(message()) | messages)
    msg = Msg(msg.type, msg.record.replace())
    places: list[tuple[Any, str]] = [(msg.record, name) for name in Record.__dataclass_fields__]
    places += [(msg, "type"), (msg, "record")]
    for group in (msg.record.caller_identities, msg.record.target_resources):
        for kind, items in group.items():
            group[kind] = [type(each)(**{name: getattr(each, name) for name in each.__slots__}) for each in items]
            places += [(each, name) for each in group[kind] for name in each.__slots__]
    mapped = by_names(msg) if draw(st.booleans()) else None
    if mapped is not None:
        places = [(each, key) for each in _mappings(mapped) for key in each]
        places += [(mapped["Record"], "Unknown"), (mapped, "Unknown")]
    for owner, name in draw(st.lists(st.sampled_from(places), max_size=3)):
        if not isinstance(owner, dict):
            setattr(owner, name, draw(almost))
        elif draw(st.booleans()):
            owner[name] = draw(almost)
        else:
            owner.pop(name, None)
    return msg if mapped is None else mapped


def _mappings(value: Any) -> list[dict[Any, Any]]:
    found = [value] if isinstance(value, dict) else []
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += _mappings(each)
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_compiled_agrees_with_its_schema(name: str) -> None:
    schema, compiled = MADE[name], COMPILED[name]

    @given(nearly_good() | mutated_messages() | messages)
    def agree(msg: Any) -> None:
        agrees(schema, compiled, msg)

    agree()


@given(nearly_good() | mutated_messages() | anything)
def test_send_raises_what_the_schema_says(msg: Any) -> None:
    """The two ways through a whole client: with what is compiled, and without."""
    outcomes: list[Any] = []
    for compiles in (True, False):
        with Client(NoOp) as client:
            if not compiles:
                client._compiled.frame_of = lambda message, unix_time, pack: None
            try:
                client.send(msg)
                outcomes.append(client.stats().accepted)
            except ValidationError as error:
                outcomes.append(str(error))  # whose repr() may be hostile: what was a key is one there
    assert outcomes[0] == outcomes[1]


@given(messages)
def test_most_good_records_are_told_by_what_is_compiled(msg: Any) -> None:
    frame = agrees(MADE["RecordSchema"], COMPILED["RecordSchema"], msg)
    assert frame is not None


@given(messages)
def test_good_mappings_are_told_by_what_is_compiled(msg: Any) -> None:
    assert agrees(MADE["RecordSchema"], COMPILED["RecordSchema"], by_names(msg)) is not None


@pytest.mark.parametrize("name", SCHEMAS)
def test_which_schemas_are_compiled(name: str) -> None:
    msg = message(operation_name="Short", caller_agent="a/1")
    compiled = COMPILED[name]
    assert (agrees(MADE[name], compiled, msg) is not None) == (name not in SLOW)
    if name not in SLOW:
        assert "def frame_of(message, unix_time, pack):" in compiled.source
    else:
        assert compiled.source.startswith("# left to marshmallow: it has its own ")


def test_the_example_is_told_at_once() -> None:
    compiled = COMPILED["RecordSchema"]
    assert agrees(RULES, compiled, message()) is not None
    assert agrees(RULES, compiled, {"Type": "ControlPlane", "Record": mapping()}) is not None
    assert agrees(RULES, compiled, message(custom_data={"when": dt.datetime.now(dt.UTC), "deep": [{"a": (1, 2)}]}))
    assert agrees(RULES, compiled, message(caller_ip_address=ipaddress.ip_address("2001:db8::1")))
    several = {OperationCategory.EUII, OperationCategory.OTHER}
    msg = message(
        operation_categories=several, operation_category_description="d", caller_access_levels=("b", "a", "b")
    )
    assert agrees(RULES, compiled, msg)


@pytest.mark.parametrize(
    "changes",
    [
        {"caller_access_levels": ["Reader", Likeness("Reader")]},
        {"caller_access_levels": [Text("READER"), Text("reader")]},
        {"caller_access_levels": ["Reader", "\u2003"]},
        {"operation_categories": ["UserManagement", Likeness("UserManagement")]},
        {"operation_categories": [OperationCategory.EUII, Other.OC_OTHER]},
        {"operation_categories": ["OCOther", OperationCategory.OTHER]},
        {"operation_type": Other.READ},
        {"operation_type": "Read"},
        {"operation_result": True},
        {"operation_name": Likeness("CreateUser")},
        {"caller_ip_address": Likeness("192.0.2.7")},
        {"caller_ip_address": int(ipaddress.ip_address("192.0.2.7"))},
        {"caller_identities": {Likeness("UPN"): [CallerIdentity("user@example.com", "the caller")]}},
        {"caller_identities": {Other.UPN: [CallerIdentity("user@example.com", "the caller")], "PUID": []}},
        {"caller_identities": {"UPN": [TargetResource("user@example.com")]}},
        {"target_resources": {Likeness("SubscriptionId"): [TargetResource("res1")]}},
        {"target_resources": {"SubscriptionId": [TargetResource(Likeness("res1"))]}},
        {"custom_data": {Likeness("ticket"): 4711}},
        {"custom_data": {"ticket": Number.ONE, "other": Other.READ, "text": Text("t"), "bytes": bytearray(b"b")}},
        {"custom_data": {"many": 2**64}},
        {"custom_data": {"deep": eval("[" * 64 + "]" * 64)}},
        {"custom_data": {"deep": eval("[" * 63 + "]" * 63)}},
        {"custom_data": {"nan": float("nan"), "none": None, "text": "\ud800"}},
        {"custom_data": {"view": {memoryview(b"v"): 1}}},
    ],
    ids=str,
)
def test_what_resembles_something_good(changes: dict[str, Any]) -> None:
    for compiled in (COMPILED["RecordSchema"], Compiled(RULES, ENCODER)):
        agrees(RULES, compiled, message())  # so that what is good is remembered
        agrees(RULES, compiled, message(**changes))
        agrees(RULES, compiled, by_names(message()) | {"Record": by_names(message())["Record"] | _camel(changes)})


def _camel(changes: dict[str, Any]) -> dict[str, Any]:
    return {"".join(part.capitalize() for part in name.split("_")): value for name, value in changes.items()}


def test_golden_records_are_told_at_once() -> None:
    good = [entry for entry in FRAMES if entry["valid"]]
    quick = 0
    for entry in good:
        service_tree_id, body = input_of(entry)
        encoder = Encoder(service_tree_id)
        frame = agrees(RULES, Compiled(RULES, encoder), {"Type": entry["type"], "Record": body}, encoder)
        quick += frame is not None
    assert quick > len(good) * 0.8
    for entry in VALIDATION:
        body = {key: value for key, value in entry["record"].items() if key != "env_ikey"}
        agrees(RULES, COMPILED["RecordSchema"], {"Type": "DataPlane", "Record": body})


@pytest.mark.parametrize("name", ["Longest", "OwnValidator", "OwnMethods", "WithLimit"])
def test_a_validator_of_the_users_is_honoured(name: str) -> None:
    schema, compiled = MADE[name], COMPILED[name]
    assert compiled.frame_of(message(operation_name="Short", caller_agent="a/1"), TIME, ENCODER.pack)
    for changes in ({"operation_name": "far too long"}, {"caller_agent": "far too long"}):
        msg = message(**{"operation_name": "Short", "caller_agent": "a/1", **changes})
        if "operation_name" in changes and name == "WithLimit":
            continue
        assert compiled.frame_of(msg, TIME, ENCODER.pack) is None
        assert isinstance(plain(schema, msg), dict)


def test_a_field_of_the_users_is_called_once_for_a_good_record() -> None:
    seen: list[Any] = []

    class Counting(RecordSchema):
        operation_name = rules.Text(required=True, validate=seen.append)

    with Client(NoOp, schema=Counting()) as client:
        client.send(message())
        assert seen == ["CreateUser"]
        with pytest.raises(ValidationError, match="CallerAgent"):
            client.send(message(caller_agent=""))


@pytest.mark.parametrize("change", ["validators", "required", "load", "MsgSchema", "many", "class"])
def test_an_instance_that_was_changed_is_left_to_marshmallow(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = RecordSchema()
    whole = None
    if change == "validators":
        schema.fields["operation_name"].validators = [_short]
    elif change == "required":
        schema.fields["operation_name"].required = False
    elif change == "load":
        schema.load = lambda data, **kwargs: record()  # type: ignore[method-assign]
    elif change == "many":
        whole = MsgSchema(many=True)
    elif change == "class":

        class Odd(MsgSchema):
            type = fields.Raw(required=True)  # type: ignore[assignment]

        whole = Odd()
    else:

        class Strange(MsgSchema):
            def _build(self, loaded: Any) -> Any:
                return super()._build({**loaded, "type": AuditType.DATA_PLANE})

        whole = Strange()
    compiled = Compiled(whole or MsgSchema(record=schema), ENCODER)
    assert compiled.frame_of(message(), TIME, ENCODER.pack) is None
    assert compiled.source.startswith("# left to marshmallow")


def _refuses(*_: Any, **__: Any) -> None:
    raise marshmallow.ValidationError("refused by the user")


class _RefusingText(rules.Text):
    def _deserialize(self, *_: Any, **__: Any) -> Any:
        _refuses()


class _RefusingField(TargetResourceSchema):
    name = _RefusingText(required=True)


class _RefusingLoad(TargetResourceSchema):
    def load(self, *_: Any, **__: Any) -> Any:
        _refuses()


BELOW: dict[str, Callable[[Any, Any], object]] = {
    "inner's way": lambda levels, targets: setattr(levels.inner, "_deserialize", _refuses),
    "inner's validators": lambda levels, targets: levels.inner.validators.append(_refuses),
    "key's way": lambda levels, targets: setattr(targets.key, "deserialize", _refuses),
    "items' way": lambda levels, targets: setattr(targets.items, "deserialize", _refuses),
    "another nested field": lambda levels, targets: setattr(targets.items.inner, "nested", _RefusingField),
    "another nested schema": lambda levels, targets: setattr(targets.items.inner, "nested", _RefusingLoad),
    "nested schema's way": lambda levels, targets: setattr(targets.items.inner.schema, "load", _refuses),
    "nested field's validators": lambda levels, targets: targets.items.inner.schema.fields["name"].validators.append(
        _refuses
    ),
    "nested field's way": lambda levels, targets: setattr(
        targets.items.inner.schema.fields["name"], "_deserialize", _refuses
    ),
}


@pytest.mark.parametrize("what", BELOW)
def test_what_is_changed_below_a_field_counts_and_only_there(what: str) -> None:
    changed = RecordSchema()
    BELOW[what](changed.fields["caller_access_levels"], changed.fields["target_resources"])
    with Client(NoOp, schema=changed) as client, pytest.raises(ValidationError, match="refused by the user"):
        client.send(message())
    with Client(NoOp) as client:
        client.send(message())


def test_a_field_that_was_replaced_in_an_instance_counts() -> None:
    changed, short = RecordSchema(), rules.Text(required=True, validate=validate.Length(max=3))
    changed._bind_field("operation_name", short)
    changed.fields["operation_name"] = changed.load_fields["operation_name"] = short
    with Client(NoOp, schema=changed) as client:
        with pytest.raises(ValidationError, match="OperationName: Longer than maximum length 3"):
            client.send(message())
        client.send(message(operation_name="Get"))


def test_a_validator_that_is_added_to_one_schema_is_not_in_others() -> None:
    RecordSchema().fields["operation_name"].validators.append(_refuses)
    RecordSchema().load(message().record)


class _OwnLists(RecordSchema):
    target_resources = fields.Dict(fields.String(), fields.List(fields.Nested(TargetResourceSchema)), required=True)
    caller_access_levels = fields.List(fields.String(), required=True)


@pytest.mark.parametrize("custom_data", [{"a": 1}, UserDict(a=1), {"a": UserDict()}])
def test_what_can_be_read_only_once_is_read_once(custom_data: Any) -> None:
    """A user's field may take a generator; nothing of it would be left for marshmallow."""
    with Client(NoOp, schema=_OwnLists()) as client:
        frames: list[bytes] = []
        client._accept = lambda frame, timeout: frames.append(frame)  # type: ignore[method-assign]
        names = (TargetResource(name) for name in "ab")
        client.send(
            message(
                target_resources={"Sub": names}, caller_access_levels=(each for each in "xy"), custom_data=custom_data
            )
        )
        msg, _ = decode(frames[0])
        assert isinstance(msg, Msg)
        assert [each.name for each in msg.record.target_resources["Sub"]] == ["a", "b"]
        assert msg.record.caller_access_levels == ["x", "y"]


def test_what_comes_again_is_found_out_in_bounded_time() -> None:
    tangle: list[Any] = []
    tangle += [tangle] * 100
    assert not rules.comes_again(tangle)
    assert rules.comes_again([CallerIdentity("a", "b"), "a", {"b": (1, None)}])
    assert not rules.comes_again({"a": [iter(())]})


def test_a_hook_before_sending_sees_the_defaults_of_the_users_schema() -> None:
    class WithDefault(RecordSchema):
        operation_access_level = rules.Text(load_default="Contributor")

    kept: list[Msg] = []
    with Client(NoOp, schema=WithDefault(), before_send=lambda msg: kept.append(msg) or msg) as client:
        client.send(mapping_message(OperationAccessLevel=None, OperationType=None))
    assert kept[0].record.operation_access_level == "Contributor"
    assert kept[0].record.operation_type is OperationType.UNKNOWN


def test_a_frame_that_is_too_long_is_left_to_the_encoder() -> None:
    encoder = Encoder(max_frame_bytes=len(ENCODER.encode(RULES.load(message()), TIME)))
    compiled = Compiled(RULES, encoder)
    assert agrees(RULES, compiled, message(), encoder)
    assert agrees(RULES, compiled, message(operation_name="x" * 99), encoder) is None


def test_more_custom_values_than_there_may_be_are_not_told_by_a_long_frame() -> None:
    encoder = Encoder(max_frame_bytes=1 << 24)
    msg = message(custom_data={str(number): None for number in range((1 << 19) + 1)})
    assert agrees(RULES, Compiled(RULES, encoder), msg, encoder) is None
    assert isinstance(plain(RULES, msg, encoder), dict)


@given(st.lists(filled | st.integers(), max_size=40), st.data())
def test_what_is_remembered_is_bounded_and_right(values: list[Any], data: st.DataObject) -> None:
    class Small(Packed):
        MOST = 3
        LONGEST = 6

    packed = Small(lambda value: str(value).encode())
    for value in values:
        assert packed[value] == str(value).encode()
        assert len(packed) <= 3
        assert all(len(each) <= 6 for each in packed.values())


def test_what_is_remembered_is_forgotten_when_it_does_not_help() -> None:
    class Small(Packed):
        MOST = 3
        PATIENCE = 5

    packed = Small(lambda value: str(value).encode())
    for value in range(5):
        assert packed[value]
    assert list(packed) == [0, 1, 2], "the first are kept"
    for value in range(100, 103):
        assert packed[value]
    assert not packed, "five others in a row were missing"
    assert packed[100]
    assert list(packed) == [100]


def test_threads_share_what_is_compiled() -> None:
    compiled, wrong = COMPILED["RecordSchema"], list[Any]()
    expected = {number: plain(RULES, message(operation_name=f"n{number}")) for number in range(50)}

    def work() -> None:
        for _ in range(40):
            for number, frame in expected.items():
                if compiled.frame_of(message(operation_name=f"n{number}"), TIME, ENCODER.pack) != frame:
                    wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_kill_or_timeout_interrupts_is_not_swallowed() -> None:
    class Interrupted(RecordSchema):
        @validates("operation_name")
        def _name(self, value: str, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    compiled = Compiled(MsgSchema(record=Interrupted()), ENCODER)
    with pytest.raises(KeyboardInterrupt):
        compiled.frame_of(message(), TIME, ENCODER.pack)


def test_the_result_of_a_failure_is_not_needed_for_a_success() -> None:
    compiled = COMPILED["RecordSchema"]
    for result in OperationResult:
        assert bool(agrees(RULES, compiled, message(operation_result=result))) == (
            result is not OperationResult.FAILURE
        )


def test_it_pays() -> None:
    """As a ratio within one run, with a wide margin: it takes a thirtieth where this asks for an eighth."""
    compiled, msg = COMPILED["RecordSchema"], message()
    ratios = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(20):
            plain(RULES, msg)
        middle = time.perf_counter()
        for _ in range(20):
            compiled.frame_of(msg, TIME, ENCODER.pack)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    assert sorted(ratios)[3] < 1 / 8


def test_validators_with_equal_names_are_all_asked() -> None:
    def at_most(length: int) -> Any:
        def check(self: Any, value: str, **_: Any) -> None:
            if len(value) > length:
                raise marshmallow.ValidationError(f"at most {length}")

        return check

    class Both(RecordSchema):
        first = marshmallow.validates("operation_name")(at_most(100))
        second = marshmallow.validates("caller_agent")(at_most(3))
        load_operation_name = marshmallow.validates("operation_access_level")(at_most(100))

    with Client(NoOp, schema=Both()) as client:
        with pytest.raises(ValidationError, match="CallerAgent: at most 3"):
            client.send(message(caller_agent="far too long"))
        client.send(message(caller_agent="abc"))
        assert client._compiled.source.count("if validates_") == 6, "three, for messages and for mappings"


def test_long_addresses_are_not_remembered() -> None:
    before = rules._canonical_address.cache_info().currsize
    for number in range(10):
        assert rules.canonical_address(f"fe80::1%{number}" + "z" * 1000)[0].endswith("z")
    assert rules._canonical_address.cache_info().currsize == before


def test_another_thread_may_change_a_record_meanwhile() -> None:
    """What is sent is one state of it or another, or refused; never a frame that nobody can read."""
    target = TargetResource("res1")
    record = message().record.replace(caller_access_levels=["a"], target_resources={"Thing": [target]})
    assert isinstance(record.custom_data, dict)
    stop: list[bool] = []

    def change() -> None:
        while not stop:
            record.caller_access_levels.append("b")  # type: ignore[attr-defined]
            record.caller_access_levels.pop()  # type: ignore[attr-defined]
            record.target_resources["More"] = [target]  # type: ignore[index]
            del record.target_resources["More"]  # type: ignore[attr-defined]
            record.custom_data.clear()  # type: ignore[attr-defined]
            record.custom_data["n"] = 1  # type: ignore[index]

    pool = ThreadPool(1)
    interval = sys.getswitchinterval()
    try:
        with Client(NoOp) as client:
            pool.spawn(change)
            sys.setswitchinterval(1e-6)
            for _ in range(20_000):
                frame = client._compiled.frame_of(Msg(AuditType.CONTROL_PLANE, record), 1.0, client._encoder.pack)
                if frame is not None:
                    decode(frame)
    finally:
        sys.setswitchinterval(interval)
        stop.append(True)
        pool.kill()
