"""The client option ``json_safe``: custom data that every JSON reader understands, or an error at its path."""

from __future__ import annotations

import base64
import datetime as dt
import enum
import json
import logging
import math
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
from helpers import mapping, message, record
from hypothesis import given
from hypothesis import strategies as st
from msgpack import ExtType, Timestamp
from strategies import messages

from geventaudit import AuditType, BaseClient, Client, Msg, NoOp, RecordSchema, Rejection, ValidationError
from geventaudit.encoder.encoding import Encoder
from geventaudit.integrations.logging import AuditHandler
from geventaudit.schema.json_safe import MAX_SAFE_INTEGER
from geventaudit.schema.rules import MsgSchema

UTC = dt.UTC
MOMENT = dt.datetime(2026, 1, 1, 2, 3, 4, 5, dt.timezone(dt.timedelta(hours=2)))


class Float(float):
    pass


class Integer(int):
    pass


class Bytes(bytes):
    pass


class Level(enum.IntEnum):
    HIGH = 3


class Strict(RecordSchema):
    """A schema that marshmallow loads: no compiled function."""

    def load(self, *args: Any, **kwargs: Any) -> Any:
        return super().load(*args, **kwargs)


class Recording(NoOp):
    """A connection that keeps the frames of records."""

    def __init__(self, frames: list[bytes]) -> None:
        super().__init__()
        self._frames = frames

    def write(self, frames: Sequence[bytes]) -> None:
        self._frames += [each for each in frames if b"AsmAuditHB" not in each[:16]]
        super().write(frames)


@contextmanager
def recording(**options: Any) -> Iterator[tuple[Client, list[bytes]]]:
    """A client, and the frames that it has written; complete once the client is closed."""
    frames: list[bytes] = []
    with Client(lambda: Recording(frames), **options) as client:
        yield client, frames


def custom_data_of(frame: bytes) -> Any:
    refuse_extensions = {"ext_hook": lambda code, data: pytest.fail(f"extension {code}"), "timestamp": 0}
    body = msgpack.unpackb(frame, strict_map_key=False, **refuse_extensions)[1][0][1]
    return body.get("CustomData", {})


def sent(*several: Any, **options: Any) -> list[Any]:
    """*several* custom data on the wire."""
    with recording(json_safe=True, **options) as (client, frames):
        for data in several:
            client.send(message(custom_data=data))
        for data in several:
            client.send({"Type": "ControlPlane", "Record": mapping(CustomData=data)})
    assert len(frames) == 2 * len(several)
    got = [*map(custom_data_of, frames)]
    assert repr(got[: len(several)]) == repr(got[len(several) :])
    return got[: len(several)]


VALUES = [
    ("text", "text"),
    ("Jörg\u2028\0\x9b", "Jörg\u2028\0\x9b"),
    (None, None),
    (True, True),
    (0, 0),
    (1.5, 1.5),
    (-0.0, -0.0),
    (1e300, 1e300),
    (5e-324, 5e-324),
    (math.nan, "NaN"),
    (-math.nan, "NaN"),
    (math.inf, "Infinity"),
    (-math.inf, "-Infinity"),
    (Float("nan"), "NaN"),
    (Float(2.5), 2.5),
    (MAX_SAFE_INTEGER, MAX_SAFE_INTEGER),
    (-MAX_SAFE_INTEGER, -MAX_SAFE_INTEGER),
    (1 << 53, "9007199254740992"),
    (-(1 << 53), "-9007199254740992"),
    ((1 << 64) - 1, "18446744073709551615"),
    (-(1 << 63), "-9223372036854775808"),
    (Integer(1 << 60), "1152921504606846976"),
    (Level.HIGH, 3),
    (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    (b"", ""),
    (b"\xfb\xff\0", "-_8A"),
    (Bytes(b"\xff"), "_w=="),
    (bytearray(b"x"), "eA=="),
    pytest.param(memoryview(b"x"), "eA==", id="memoryview"),
    (MOMENT, "2026-01-01T00:03:04.000005+00:00"),
    (dt.datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00+00:00"),
    (dt.datetime.min.replace(tzinfo=UTC), "0001-01-01T00:00:00+00:00"),
    (Timestamp(5, 6000), "1970-01-01T00:00:05.000006+00:00"),
    (Timestamp(5, 7), "1970-01-01T00:00:05.000000007+00:00"),
    (Timestamp(-1, 999_999_999), "1969-12-31T23:59:59.999999999+00:00"),
    (Timestamp(-62135596800, 1), "0001-01-01T00:00:00.000000001+00:00"),
    ({3, 1 << 60}, [3, "1152921504606846976"]),
    ((math.nan, (b"x",)), ["NaN", ["eA=="]]),
    (OrderedDict(a=math.inf), {"a": "Infinity"}),
    (MappingProxyType({1: {2: math.nan}}), {"1": {"2": "NaN"}}),
]


@pytest.mark.parametrize(("given", "carried"), VALUES, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("options", [{}, {"datetimes": "text"}, {"schema": Strict()}], ids=["fast", "text", "schema"])
def test_values(given: Any, carried: Any, options: dict[str, Any]) -> None:
    before = repr(given)
    got = sent({"v": given}, {"v": [given]}, {"v": {"k": [1, {"m": given}]}}, **options)
    assert repr(got) == repr([{"v": carried}, {"v": [carried]}, {"v": {"k": [1, {"m": carried}]}}])
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert repr(given) == before


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", ""),
        (1, "1"),
        (-7, "-7"),
        (1 << 60, "1152921504606846976"),
        (Level.HIGH, "3"),
        (1.5, "1.5"),
        (Float(0.1), "0.1"),
        (1e300, "1e+300"),
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        (True, "true"),
        (False, "false"),
        (None, "null"),
        (b"\xff", "_w=="),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ],
    ids=repr,
)
def test_keys(key: Any, text: str) -> None:
    got = sent({"m": {key: "value"}}, {"m": [{key: {key: math.nan}}]})
    assert got == [{"m": {text: "value"}}, {"m": [{text: {text: "NaN"}}]}]


def test_times_round_trip() -> None:
    (got,) = sent({"t": MOMENT, "b": b"\0\xff~~~"})
    assert dt.datetime.fromisoformat(got["t"]) == MOMENT
    assert base64.urlsafe_b64decode(got["b"]) == b"\0\xff~~~"


@pytest.mark.parametrize(
    ("data", "path", "words"),
    [
        ({"x": ExtType(3, b"a")}, ["x"], "got the MessagePack extension 3 (give its data as bytes or text)"),
        ({"a": [0, {"x": ExtType(3, b"a")}]}, ["a", 1, "x"], "MessagePack extension 3"),
        ({"x": Timestamp(1 << 60, 0)}, ["x"], "within the years 1 to 9999"),
        ({"x": Timestamp(-62135596801, 0)}, ["x"], "within the years 1 to 9999"),
        ({"x": [Timestamp(253402300800, 5)]}, ["x", 0], "got 253402300800 s since 1970"),
        ({"x": {1: "a", "1": "b"}}, ["x", "1"], "another key is written as '1' too"),
        ({"x": {"null": "a", None: "b"}}, ["x", None], "another key is written as 'null' too"),
        ({"x": {"true": "a", True: "b"}}, ["x", True], "another key is written as 'true' too"),
        ({"x": {"eA==": "a", b"x": "b"}}, ["x", b"x"], "another key is written as 'eA==' too"),
        ({"x": {"1.5": "a", 1.5: "b"}}, ["x", 1.5], "another key is written as '1.5' too"),
        ({"x": {"NaN": "a", math.nan: "b"}}, ["x"], "another key is written as 'NaN' too"),
        ({"n": 1 << 64}, ["n"], "at most 64 bits"),
        ({"n": [-(1 << 70)]}, ["n", 0], "at most 64 bits"),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("options", [{}, {"schema": Strict()}], ids=["fast", "schema"])
def test_refusals(data: Any, path: list[Any], words: str, options: dict[str, Any]) -> None:
    with Client(NoOp, json_safe=True, **options) as client:
        with pytest.raises(ValidationError) as caught:
            client.send(message(custom_data=data))
        assert client.stats().accepted == 0
        assert client.stats().rejected[Rejection.INVALID] == 1
        assert words in str(caught.value)
        node = caught.value.messages["CustomData"]
        for step in path:
            node = node[step]
        client.send(message())
        assert client.stats().accepted == 1


def test_all_refusals_are_reported_at_once() -> None:
    data = {"a": ExtType(1, b""), "b": [ExtType(2, b""), {1: 1, "1": ExtType(3, b"")}]}
    with Client(NoOp, json_safe=True) as client, pytest.raises(ValidationError) as caught:
        client.send(message(custom_data=data))
    errors = caught.value.messages["CustomData"]
    assert list(errors) == ["a", "b"]
    assert list(errors["b"]) == [0, 1]
    assert len(errors["b"][1]["1"]) == 2


def test_without_the_option_nothing_changes() -> None:
    data = {"n": math.inf, "i": 1 << 60, "m": {1: b"x"}, "x": ExtType(3, b"a")}
    with recording() as (client, frames):
        client.send(message(custom_data=data))
    body = msgpack.unpackb(frames[0], strict_map_key=False)[1][0][1]
    assert body["CustomData"] == data


@pytest.mark.parametrize("given", [1, 0, "yes", None])
def test_the_option_is_a_boolean(given: Any) -> None:
    with pytest.raises(TypeError, match="json_safe must be True or False"):
        Client(NoOp, json_safe=given)
    with pytest.raises(TypeError, match="json_safe must be True or False"):
        BaseClient(NoOp(), json_safe=given)


def test_every_way_to_send() -> None:
    """A client of either kind, an operation, logging, and a value that ``before_send`` adds."""

    def add(msg: Msg) -> Msg:
        return Msg(msg.type, msg.record.replace(custom_data={**msg.record.custom_data, "added": math.nan}))

    base_frames: list[bytes] = []
    with (
        recording(json_safe=True, before_send=add) as (client, frames),
        BaseClient(Recording(base_frames), json_safe=True) as base,
    ):
        client.send(message(custom_data={"n": math.nan}))
        with client.operation(record(), custom_data={"n": math.nan}):
            pass
        logger = logging.getLogger("test_json_safe")
        logger.addHandler(handler := AuditHandler(client))
        try:
            logger.error("x", extra={"audit": message(custom_data={"n": math.nan})})
        finally:
            logger.removeHandler(handler)
        base.send(message(custom_data={"n": math.nan, "added": math.nan}))
    assert (len(frames), len(base_frames)) == (3, 1)
    for frame in frames + base_frames:
        assert custom_data_of(frame) == {"n": "NaN", "added": "NaN"}


def test_a_schema_that_changes_custom_data_is_converted_afterwards() -> None:
    from marshmallow import post_load

    class Adds(RecordSchema):
        @post_load
        def add(self, loaded: Any, **kwargs: Any) -> Any:
            return {**loaded, "custom_data": {**loaded["custom_data"], "added": math.nan}}

    assert sent({"n": 1}, schema=Adds()) == [{"n": 1, "added": "NaN"}]


_SCHEMA = MsgSchema()
_ENCODER = Encoder(json_safe=True)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, int):
        return -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER
    return value is None or (isinstance(value, float) and math.isfinite(value)) or isinstance(value, str)


@given(messages)
def test_any_valid_record_is_json_or_refused_at_a_path(msg: Any) -> None:
    loaded = _SCHEMA.load(msg)
    try:
        frame = _ENCODER.encode(loaded, 5)
    except ValidationError as error:
        assert list(error.messages) == ["CustomData"]
        return
    body = msgpack.unpackb(frame, strict_map_key=False)[1][0][1]
    assert _is_json(body)
    assert json.loads(json.dumps(body, allow_nan=False)) == body


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(), st.binary()
)
_keys = st.one_of(
    st.integers(-3, 3), st.booleans(), st.none(), st.sampled_from(["1", "true", "null", "NaN"]), st.floats()
)
_nested = st.recursive(
    _scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_keys, inner, max_size=3))
)


@given(st.dictionaries(st.text(), _nested, max_size=3))
def test_the_compiled_way_and_marshmallow_agree(data: dict[str, Any]) -> None:
    msg = Msg(AuditType.CONTROL_PLANE, record(custom_data=data))
    results = []
    for client in _FAST, _SLOW:
        try:
            results.append(repr(custom_data_of(client._frame_of(msg) or b"")))
        except ValidationError as error:
            results.append(str(error))
    assert results[0] == results[1]


_FAST, _SLOW = Client(NoOp, json_safe=True), Client(NoOp, json_safe=True, schema=Strict())
