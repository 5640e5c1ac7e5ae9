"""What custom data may hold, and how it is carried."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import ipaddress
import uuid
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import gevent
import msgpack
import pytest
from helpers import mapping, message
from msgpack import ExtType, Timestamp
from strategies import Hostile

from geventaudit import Client, Msg, NoOp, ValidationError
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import decode
from geventaudit.schema.values import MAX_DEPTH, MAX_VALUES, normal_form


class Level(enum.IntEnum):
    HIGH = 3


class Name(enum.StrEnum):
    BLUE = "blue"


class Text(str):
    __slots__ = ()


UTC = dt.UTC
CEST = dt.timezone(dt.timedelta(hours=2))


@pytest.mark.parametrize(
    ("given", "carried"),
    [
        ((1, 2), [1, 2]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({1, "a", None}, [None, 1, "a"]),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (Level.HIGH, "HIGH"),
        (Name.BLUE, "blue"),
        (decimal.Decimal("1.50"), "1.50"),
        (ipaddress.ip_address("10.0.0.1"), "10.0.0.1"),
        (ipaddress.ip_network("10.0.0.0/8"), "10.0.0.0/8"),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        (Text("x"), "x"),
        (OrderedDict(a=(1,)), {"a": [1]}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        ({1: "a", None: "b", b"c": 2}, {1: "a", None: "b", b"c": 2}),
        (dt.datetime(2026, 1, 1, 2, tzinfo=CEST), dt.datetime(2026, 1, 1, tzinfo=UTC)),
        (Timestamp(1, 1000), dt.datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC)),
        (Timestamp(1, 1), Timestamp(1, 1)),
        (Timestamp(2**60, 0), Timestamp(2**60, 0)),
        (ExtType(5, b"x"), ExtType(5, b"x")),
        (-(2**63), -(2**63)),
        (2**64 - 1, 2**64 - 1),
    ],
)
def test_carried(given: Any, carried: Any) -> None:
    plain = normal_form({"v": given})["v"]
    assert plain == carried
    assert type(plain) is type(carried)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dt.datetime(2026, 1, 1), "naive"),
        (dt.date(2026, 1, 1), "cannot|must be a value that MessagePack can carry"),
        (dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-1))), "years 1 to 9999"),
        (object(), "must be a value that MessagePack can carry"),
        (print, "must be a value"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        ("\ud800", r"lone surrogate U\+D800 at position 0"),
        ({(1, 2): 3}, "plain value as its key"),
        ({dt.datetime(2026, 1, 1, tzinfo=UTC): 3}, "plain value as its key"),
        (Timestamp(2**63, 0), "64 bits"),
    ],
)
def test_refused(given: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        normal_form({"a": {"b": [0, given]}})
    assert caught.value.messages["a"]["b"][1]
    assert str(caught.value).startswith("a.b[1]")


def nested(levels: int) -> dict[str, Any]:
    """Custom data of so many levels, itself being the first."""
    data: Any = 1
    for _ in range(levels - 1):
        data = [data]
    return {"v": data}


def test_depth() -> None:
    normal_form(nested(MAX_DEPTH))
    with pytest.raises(ValidationError, match="deeper than 56 levels"):
        normal_form(nested(MAX_DEPTH + 1))
    with pytest.raises(ValidationError, match="deeper than 56 levels"):
        normal_form(nested(100_000))


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def in_maps(levels: int) -> dict[str, Any]:
    """The same, in maps."""
    data: Any = 1
    for _ in range(levels):
        data = {"v": data}
    return data  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [nested, in_maps])
@pytest.mark.parametrize("entry", ["send", "mapping", "operation", "encode"])
def test_a_frame_is_no_deeper_than_fluent_bit_takes(make: Any, entry: str) -> None:
    """It takes 60 levels and hangs up on 61, by measurement."""

    class Sink(NoOp):
        def write(self, frames: Any) -> None:
            written.extend(frames)
            super().write(frames)

    def send(data: dict[str, Any]) -> None:
        if entry == "send":
            client.send(message(custom_data=data))
        elif entry == "mapping":
            client.send({"Type": "ControlPlane", "Record": mapping(CustomData=data)})
        elif entry == "encode":
            written.append(encode(message(custom_data=data), 5))
        else:
            with client.operation(message(custom_data=data)):
                pass

    written: list[bytes] = []
    with Client(Sink) as client:
        send(make(MAX_DEPTH))
        assert client.flush(10)
        assert depth_of(msgpack.unpackb(written[0])) == 60
        if entry == "operation":
            send(make(MAX_DEPTH + 1))
            assert client.stats().rejected == {"invalid": 1}
        elif entry != "encode":  # which trusts its caller
            with pytest.raises(ValidationError, match=r"^CustomData\.v.* nested deeper than 56 levels"):
                send(make(MAX_DEPTH + 1))


def test_into_itself() -> None:
    data: dict[str, Any] = {"a": 1}
    data["self"] = data
    with pytest.raises(ValidationError) as caught:
        normal_form(data)
    assert caught.value.messages == {"self": ["must not contain itself"]}
    inner: list[Any] = []
    inner.append({"up": inner})
    with pytest.raises(ValidationError, match=r"v\[0\]\.up: must not contain itself"):
        normal_form({"v": inner})


def test_shared_parts_are_fine_until_they_explode() -> None:
    shared = [1, 2]
    assert normal_form({"v": [shared, shared]}) == {"v": [[1, 2], [1, 2]]}
    bomb: Any = 1
    for _ in range(MAX_DEPTH - 2):
        bomb = [bomb, bomb]
    with pytest.raises(ValidationError, match=str(MAX_VALUES)):
        normal_form({"v": bomb})


def test_keys_that_become_the_same_text() -> None:
    with pytest.raises(ValidationError, match="unique"):
        normal_form({"v": {Name.BLUE: 1, uuid.UUID(int=7): 2, str(uuid.UUID(int=7)): 3}})


@pytest.mark.parametrize("key", [10**5000, Hostile()], ids=["an integer too long to print", "an object"])
def test_keys_that_cannot_be_printed(key: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        normal_form({"v": {key: object()}})
    assert str(caught.value).startswith("v[")


def test_everything_wrong_is_told() -> None:
    with pytest.raises(ValidationError) as caught:
        normal_form({"a": object(), "b": [2**70, {"c": "\ud800"}], "ok": 1})
    assert set(caught.value.messages) == {"a", "b"}
    assert set(caught.value.messages["b"]) == {0, 1}


class Later(dt.datetime):
    """A time whose methods are somebody's own; pendulum and pandas have such."""

    def utcoffset(self) -> dt.timedelta | None:
        gevent.sleep(0)
        return super().utcoffset()

    def __sub__(self, other: Any) -> Any:
        raise AssertionError("it is not to be asked while a frame is packed")

    isoformat = __sub__  # type: ignore[assignment]


class Instant(Timestamp):
    pass


class Extension(ExtType):
    @property
    def data(self) -> Any:  # type: ignore[override]
        gevent.sleep(0)
        return b"own"


@pytest.mark.parametrize("datetimes", ["extension", "text"])
def test_subclasses_of_values_run_no_code_while_a_frame_is_packed(datetimes: Any) -> None:
    data = {
        "later": Later(2020, 1, 2, 3, 4, 5, 6, tzinfo=dt.timezone(dt.timedelta(hours=1))),
        "instant": Instant(5, 7),
        "extension": Extension(3, b"a"),
    }
    normal = normal_form(data)
    assert [type(each) for each in normal.values()] == [dt.datetime, Timestamp, ExtType]
    assert normal["later"] == dt.datetime(2020, 1, 2, 2, 4, 5, 6, tzinfo=UTC)
    assert normal["extension"] == ExtType(3, b"own")
    with Client(NoOp, datetimes=datetimes) as client:
        frames: list[bytes] = []
        client._accept = lambda frame, timeout: frames.append(frame)  # type: ignore[method-assign]
        gevent.joinall([gevent.spawn(client.send, message(custom_data=data)) for number in range(5)], raise_error=True)
        for frame in frames:
            msg, _ = decode(frame)
            assert isinstance(msg, Msg)
            assert list(msg.record.custom_data) == ["later", "instant", "extension"]
