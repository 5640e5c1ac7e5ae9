"""The values of custom data, and their form on the wire."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import http
import ipaddress
import signal
import uuid
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import gevent
import msgpack
import pytest
from helpers import import_old, mapping, message, record
from msgpack import ExtType, Timestamp
from strategies import Hostile

from geventaudit import (
    AuditType,
    Client,
    Msg,
    NoOp,
    Record,
    RecordSchema,
    TargetResource,
    ValidationError,
    fill_unknown,
)
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import decode
from geventaudit.schema.fields import Text as TextField
from geventaudit.schema.values import MAX_DEPTH, MAX_VALUES, normal_form


class Level(enum.IntEnum):
    HIGH = 3


class Name(enum.StrEnum):
    BLUE = "blue"


class Text(str):
    __slots__ = ()


class Permission(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag):
    READ = 1


class Coded(bytes, enum.Enum):
    A = b"a"


class LyingText(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class LyingNumber(int):
    def __int__(self) -> int:
        return 99

    def __str__(self) -> str:
        return "99"


class LyingFloat(float):
    def __float__(self) -> float:
        return 9.9


class LyingBytes(bytes):
    def __bytes__(self) -> bytes:
        return b"another"


class NoZone(dt.tzinfo):
    def utcoffset(self, moment: dt.datetime | None) -> dt.timedelta:
        raise RuntimeError("no such zone")


class NoItems(dict[str, Any]):
    def items(self) -> Any:
        raise LookupError("no items")


def unbound() -> Any:
    raise RuntimeError("outside of a request")


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
        (Level.HIGH, 3),
        (http.HTTPStatus.NOT_FOUND, 404),
        (http.HTTPMethod.GET, "GET"),
        (signal.SIGTERM, 15),
        (Bits(8), 8),
        (Permission.READ, "READ"),
        (Permission.READ | Permission.WRITE, "READ|WRITE"),
        (Coded.A, b"a"),
        (LyingText("x"), "x"),
        (LyingNumber(1), 1),
        (LyingFloat(0.5), 0.5),
        (LyingBytes(b"x"), b"x"),
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
        (dt.date(2026, 1, 1), "use a datetime"),
        (Permission(0), "must have a name"),
        (dt.datetime(2026, 1, 1, tzinfo=NoZone()), "no such zone"),
        (NoItems(a=1), "no items"),
        ({LyingNumber(1): dt.datetime(2026, 1, 1, tzinfo=NoZone())}, "no such zone"),
        ({Permission(0): 1}, "must have a name"),
        ((1, [Permission(0)]), "must have a name"),
        ({"x", Permission(0)}, "must have a name"),
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
    """Fluent Bit takes 60 levels and hangs up on 61, by measurement."""

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


def test_all_errors_are_reported() -> None:
    with pytest.raises(ValidationError) as caught:
        normal_form({"a": object(), "b": [2**70, {"c": "\ud800"}], "ok": 1})
    assert set(caught.value.messages) == {"a", "b"}
    assert set(caught.value.messages["b"]) == {0, 1}


class Later(dt.datetime):
    """A time with methods of its own, as those of pendulum and pandas."""

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


# -- lazy objects, proxies, and mappings with several values -----------------------------------------------------------


@pytest.mark.parametrize("wrap", ["werkzeug", "django"])
@pytest.mark.parametrize(
    "value",
    [
        "ada",
        "J\xf6rg",
        None,
        {"a": ["b"]},
        ["x", {"y": 1}],
        {"s"},
        b"x",
        Name.BLUE,
        dt.datetime(2026, 1, 1, tzinfo=UTC),
    ],
)
def test_a_proxy_is_carried_as_its_value(wrap: str, value: Any) -> None:
    proxy = proxy_of(wrap)
    plain = normal_form({"v": value})["v"]
    for given in ({"v": proxy(lambda: value)}, {"v": proxy(lambda: proxy(lambda: value))}, proxy(lambda: {"v": value})):
        found = normal_form(given)["v"]
        assert (found, type(found)) == (plain, type(plain))
    assert normal_form({"v": [proxy(lambda: value)]}) == {"v": [plain]}


@pytest.mark.parametrize("value", [7, 0.5, True])
def test_numbers_behind_a_proxy(value: Any) -> None:
    """Django's lazy objects do not convert to numbers: those are refused where they stand."""
    assert normal_form({"v": {"w": proxy_of("werkzeug")(lambda: value)}}) == {"v": {"w": value}}
    with_lazy = {"v": {"w": proxy_of("django")(lambda: value)}}
    try:
        assert normal_form(with_lazy) == {"v": {"w": value}}
    except ValidationError as error:
        assert list(error.messages["v"]) == ["w"]


@pytest.mark.parametrize("wrap", ["werkzeug", "django"])
def test_proxies_as_keys(wrap: str) -> None:
    proxy = proxy_of(wrap)
    assert normal_form({proxy(lambda: "k"): 1}) == {"k": 1}
    assert normal_form({"v": {proxy(lambda: "k"): 1}}) == {"v": {"k": 1}}
    assert normal_form({"v": {http.HTTPStatus.OK: 1, Name.BLUE: 2, Level.HIGH: 3}}) == {"v": {200: 1, "blue": 2, 3: 3}}
    with pytest.raises(ValidationError, match="must be unique"):
        normal_form({"v": {"k": 1, Named("k"): 2}})


class Named(str):
    """Another key than its text."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize("wrap", ["werkzeug", "django"])
def test_unreadable_values_are_refused_at_their_path(wrap: str) -> None:
    value = proxy_of(wrap)(unbound)
    for given in ({"v": [1, value]}, {"v": {"w": {"x": value}}}, {"v": (value,), "ok": 1}):
        with pytest.raises(ValidationError) as caught:
            normal_form(given)
        assert list(caught.value.messages) == ["v"]
    with pytest.raises(ValidationError) as caught, Client(NoOp) as client:
        client.send(message(operation_name=value, custom_data={"a": value, "b": NoItems(a=1)}))
    assert {"OperationName", "CustomData"} == set(caught.value.messages), caught.value
    assert set(caught.value.messages["CustomData"]) == {"a", "b"}
    with pytest.raises(ValidationError) as caught, Client(NoOp) as client:
        client.send(message(custom_data=NoItems(a=1)))
    assert list(caught.value.messages) == ["CustomData"]


def test_a_validator_that_raises_is_an_error_at_its_path() -> None:
    class Strict(RecordSchema):
        operation_name = TextField(required=True, validate=lambda name: 1 / 0)

    with pytest.raises(ValidationError) as caught, Client(NoOp, schema=Strict()) as client:
        client.send(message())
    problem = "must be a valid value; validating it raised ZeroDivisionError('division by zero')"
    assert caught.value.messages == {"OperationName": [problem]}


@pytest.mark.parametrize("wrap", ["werkzeug", "django"])
def test_filling_keeps_unreadable_values(wrap: str) -> None:
    value = proxy_of(wrap)(unbound)
    for field in dataclasses.fields(Record):
        filled = fill_unknown(record(**{field.name: value}))
        if getattr(filled, field.name) is not value:
            assert not value, "unbound proxies of werkzeug are false, which is missing"
            continue
        with pytest.raises(ValidationError) as caught:
            RecordSchema().load(filled)
        with pytest.raises(ValidationError), Client(NoOp) as client:
            client.send(Msg(AuditType.CONTROL_PLANE, record(operation_categories=[value, "OCOther"])))
        path = "".join(part.capitalize() for part in field.name.split("_"))
        assert path in caught.value.messages, caught.value


@pytest.mark.parametrize("wrap", ["werkzeug", "django"])
def test_texts_of_a_record_behind_a_proxy(wrap: str) -> None:
    """In every field that is a text, or an enumeration's."""
    proxy = proxy_of(wrap)

    def lazy(text: str) -> Any:
        return proxy(lambda: text)

    given = mapping(
        OperationName=lazy("CreateUser"),
        OperationCategories=[lazy("UserManagement")],
        OperationType=lazy("Create"),
        CallerIpAddress=lazy("192.0.2.7"),
        CallerAccessLevels=[lazy("Reader")],
        CallerIdentities={"UPN": [{"Identity": lazy("user@example.com"), "Description": lazy("the caller")}]},
        TargetResources={"SubscriptionId": [{"Name": lazy("res1"), "Region": lazy("westeurope")}]},
    )
    assert RecordSchema().load(given) == RecordSchema().load(mapping())


def proxy_of(wrap: str) -> Any:
    if wrap == "werkzeug":
        return pytest.importorskip("werkzeug.local", reason="needs flask, which the extra [test] brings").LocalProxy
    return pytest.importorskip("django.utils.functional", reason="needs django, from the extra [test]").SimpleLazyObject


def appended(form: Any) -> Any:
    for key, value in PAIRS:
        form.append(key, value)
    return form


PAIRS = [("role", "admin"), ("role", "reader"), ("name", "ada")]
MULTI_VALUED: dict[str, Callable[[Any], Any]] = {
    "werkzeug.datastructures.MultiDict": lambda kind: kind(PAIRS),
    "werkzeug.datastructures.ImmutableMultiDict": lambda kind: kind(PAIRS),
    "werkzeug.datastructures.CombinedMultiDict": lambda kind: kind(
        [import_old("werkzeug.datastructures").MultiDict(each) for each in (PAIRS[:1], PAIRS[1:])]
    ),
    "django.utils.datastructures.MultiValueDict": lambda kind: kind({"role": ["admin", "reader"], "name": ["ada"]}),
    "webob.multidict.MultiDict": lambda kind: kind(PAIRS),
    "webob.multidict.NestedMultiDict": lambda kind: kind(import_old("webob.multidict").MultiDict(PAIRS)),
    "bottle.FormsDict": lambda kind: appended(kind()),
}


@pytest.mark.parametrize("name", MULTI_VALUED)
def test_all_values_of_a_key_are_carried(name: str) -> None:
    module, _, kind = name.rpartition(".")
    form = MULTI_VALUED[name](getattr(import_old(module), kind))
    whole = {"role": ["admin", "reader"], "name": ["ada"]}
    assert normal_form({"form": form}) == {"form": whole}
    assert normal_form({"deep": [{"form": form}]}) == {"deep": [{"form": whole}]}
    assert normal_form(form) == whole
    filled = fill_unknown(Record(custom_data=form)).custom_data
    assert {key: list(filled[key]) for key in whole} == whole
    kept: list[Msg] = []
    with Client(NoOp, before_send=lambda msg: kept.append(msg)) as client:  # type: ignore[func-returns-value]
        with client.operation(custom_data=form) as operation:
            operation.add(custom_data={"more": 1})
        with client.operation(custom_data={"more": 1}) as operation:
            operation.add(custom_data=form)
    assert [normal_form(msg.record.custom_data) for msg in kept] == [{**whole, "more": 1}] * 2


def test_all_targets_of_a_kind_are_carried() -> None:
    forms = pytest.importorskip("werkzeug.datastructures", reason="needs flask, which the extra [test] brings")
    targets = forms.MultiDict([("Disk", TargetResource("a")), ("Disk", TargetResource("b"))])
    loaded = RecordSchema().load(record(target_resources=targets))
    assert loaded.target_resources == {"Disk": [TargetResource("a"), TargetResource("b")]}
