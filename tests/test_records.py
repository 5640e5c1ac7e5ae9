"""Records made by the constructor in C behave as the dataclasses that they are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers import record

from geventaudit import AuditType, CallerIdentity, Msg, OperationType, Record, TargetResource
from geventaudit.encoder.engine import ENCODER


def twin_of(cls: type[Any]) -> type[Any]:
    """Return the same dataclass, which nothing has made cheap."""
    twins: list[Any] = []
    for each in dataclasses.fields(cls):
        options = {name: getattr(each, name) for name in ("default", "default_factory")}
        twins.append((each.name, Any, field(**options)))
    return dataclasses.make_dataclass(cls.__name__, twins, slots=True)


CLASSES = [Record, Msg, CallerIdentity, TargetResource]
NAMES = [each.name for each in dataclasses.fields(Record)]
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    (("a",), {}),
    (("a", "b"), {}),
    (("a", "b", "c", "d"), {}),
    (("a", "b", "c", "d", "e"), {}),
    (tuple(range(13)), {}),
    (tuple(range(14)), {}),
    (("a",), {"description": "b"}),
    ((), {"description": "b", "identity": "a"}),
    (("a",), {"identity": "a"}),
    ((), {"region": "r", "name": "n"}),
    ((), {"name": "n", "strange": 1}),
    ((), {"record": 1, "type": 2}),
    ((), {"custom_data": {}, "operation_name": "n"}),
    ((), {name: name for name in reversed(NAMES)}),
    ((), {"".join(["operation", "_name"]): "not interned"}),
    (tuple(range(12)), {"custom_data": 1}),
    (tuple(range(13)), {"custom_data": 1}),
]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_a_call_has_the_outcome_of_the_dataclass(cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def outcome(make: type[Any]) -> Any:
        try:
            made = make(*args, **kwargs)
        except TypeError as error:
            return str(error)
        return repr(made).rpartition(".")[2].removeprefix("twin_of.<locals>.")

    assert outcome(cls) == outcome(twin_of(cls))


def test_defaults_are_not_shared() -> None:
    one, other = Record(), Record()
    for name in (
        "operation_categories",
        "caller_identities",
        "caller_access_levels",
        "target_resources",
        "custom_data",
    ):
        assert getattr(one, name) is not getattr(other, name)
        assert type(getattr(one, name)) in (list, dict)


def test_they_stay_dataclasses() -> None:
    one = record()
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(one, protocol)) == one
    assert copy.copy(one) == copy.deepcopy(one) == dataclasses.replace(one) == one.replace() == one
    assert copy.deepcopy(one).custom_data is not one.custom_data
    assert one.replace().custom_data is one.custom_data
    assert dataclasses.replace(one, caller_agent="b").caller_agent == one.replace(caller_agent="b").caller_agent == "b"
    assert repr(one).startswith("Record(operation_name='CreateUser', operation_categories=[<OperationCategory.")
    assert Record.__match_args__ == tuple(NAMES)
    assert not hasattr(one, "__dict__")
    assert AuditType.DATA_PLANE in AuditType
    assert [*OperationType] == list(OperationType.__members__.values())
    assert pickle.loads(pickle.dumps(OperationType.READ)) is OperationType.READ is OperationType["READ"]
    with pytest.raises(AttributeError):
        _ = OperationType.NONE  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", CLASSES)
def test_equality_and_repr_are_those_of_the_dataclass(cls: type[Any]) -> None:
    twin, count = twin_of(cls), len(dataclasses.fields(cls))
    for made in cls, twin:
        one, other = made(*range(count)), made(*range(count - 1), "other")
        assert one == made(*range(count))
        assert one != other
        assert one != tuple(range(count))
        assert made.__hash__ is None
        one.__setattr__(dataclasses.fields(cls)[0].name, one)
        assert "=..., " in repr(one)
    assert cls(*range(count)) != twin(*range(count))


def test_replace_raises_the_errors_of_dataclasses() -> None:
    for changes in ({"strange": 1}, {"operation_name": "a", "strange": 1}):
        texts = []
        for replace in (Record.replace, dataclasses.replace):
            with pytest.raises(TypeError) as caught:
                replace(record(), **changes)  # type: ignore[operator]
            texts.append(str(caught.value))
        assert texts[0] == texts[1]
    incomplete = record()
    del incomplete.caller_agent
    with pytest.raises(AttributeError, match="caller_agent"):
        incomplete.replace(operation_name="a")


@dataclass(slots=True)
class More(Record):
    ticket: int = 0

    def __post_init__(self) -> None:
        self.ticket += 1


class Loose(Record):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = 1


def test_subclasses_keep_their_own_ways() -> None:
    more = More(operation_name="a", ticket=5)
    assert (more.operation_name, more.ticket, more.custom_data) == ("a", 6, {})
    assert more.replace(operation_name="b") == More("b", ticket=6)
    loose = Loose("a")
    assert (loose.operation_name, loose.extra, loose.caller_agent) == ("a", 1, "")
    assert isinstance(copy.copy(loose), Loose)


@pytest.mark.skipif(ENCODER == "pure", reason="the references are counted in C there")
def test_no_reference_is_lost_or_kept() -> None:
    values = [object() for _ in NAMES]
    before = [sys.getrefcount(each) for each in values]
    for _ in range(100):
        Record(*values)  # type: ignore[arg-type]
        Record(**dict(zip(NAMES, values, strict=True))).replace(operation_name=values[0])  # type: ignore[arg-type]
        for wrong in ({"strange": values[0]}, {NAMES[0]: values[0], "strange": values[1]}):
            with pytest.raises(TypeError):
                Record(*values[:3], **wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                Record(*values[:3]).replace(**wrong)  # type: ignore[arg-type]
    del wrong
    assert [sys.getrefcount(each) for each in values] == before
