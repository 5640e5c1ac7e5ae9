"""Records, and things that are none, for hypothesis."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import ipaddress
import uuid
from typing import Any

from hypothesis import strategies as st

from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


# Any Unicode but lone surrogates, which UTF-8 cannot write.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
filled = text.filter(bool)
not_blank = st.builds("{}x{}".format, text, text)

integers = st.integers(-(2**63), 2**64 - 1)
moments = st.datetimes(
    min_value=dt.datetime(2, 1, 1),
    max_value=dt.datetime(9998, 12, 31),
    timezones=st.sampled_from([dt.UTC, dt.timezone(dt.timedelta(hours=-7, minutes=-30))]),
)
scalars = (
    st.none()
    | st.booleans()
    | integers
    | st.floats(allow_nan=False)
    | text
    | st.binary(max_size=20)
    | moments
    | st.uuids()
    | st.sampled_from(Colour)
    | st.decimals(allow_nan=False)
    | st.ip_addresses()
)
keys = text | integers | st.binary(max_size=5) | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(text | integers, max_size=4)
        | st.frozensets(scalars, max_size=4)
    ),
    max_leaves=12,
)
callers = st.ip_addresses().filter(
    lambda address: (
        not (address.is_unspecified or address.is_loopback or address.is_multicast)
        and not (
            isinstance(address, ipaddress.IPv6Address)
            and address.ipv4_mapped is not None
            and (
                address.ipv4_mapped.is_unspecified
                or address.ipv4_mapped.is_loopback
                or address.ipv4_mapped.is_multicast
            )
        )
    )
)
identities = st.builds(CallerIdentity, filled, filled)
targets = st.builds(TargetResource, filled, text, text, text)

records = st.builds(
    Record,
    operation_name=filled,
    operation_categories=st.lists(st.sampled_from(OperationCategory), min_size=1, max_size=5)
    | st.sets(st.sampled_from(OperationCategory), min_size=1, max_size=5),
    operation_category_description=filled,
    operation_type=st.sampled_from(OperationType),
    operation_result=st.sampled_from(OperationResult),
    operation_result_description=filled,
    operation_access_level=filled,
    caller_agent=filled,
    caller_ip_address=callers | callers.map(str),
    caller_identities=st.dictionaries(
        st.sampled_from(CallerIdentityType), st.lists(identities, min_size=1, max_size=3), min_size=1, max_size=3
    ),
    caller_access_levels=st.lists(not_blank, min_size=1, max_size=4) | st.sets(not_blank, min_size=1, max_size=4),
    target_resources=st.dictionaries(not_blank, st.lists(targets, max_size=3), min_size=1, max_size=3),
    custom_data=st.dictionaries(text, values, max_size=4),
)
messages = st.builds(Msg, st.sampled_from([AuditType.DATA_PLANE, AuditType.CONTROL_PLANE]), records)


class Hostile:
    """An object on which everything raises."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "__dict__"):
            return object.__getattribute__(self, name)
        raise RuntimeError("hostile")

    def __repr__(self) -> str:
        raise RuntimeError("hostile")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("hostile")

    def __hash__(self) -> int:
        return 1


class HostileMapping(dict[str, Any]):
    """A mapping that cannot be read."""

    def items(self) -> Any:
        raise KeyError("hostile")

    def get(self, *args: Any) -> Any:
        raise LookupError("hostile")

    def __iter__(self) -> Any:
        raise ZeroDivisionError


def _cycle() -> list[Any]:
    result: list[Any] = []
    result.append(result)
    return result


def _bomb() -> Any:
    result: Any = "x"
    for _ in range(50):
        result = [result, result, result]
    return result


anything = st.one_of(
    values,
    st.floats(),
    st.integers(),
    st.text(),
    st.datetimes(),
    st.dates(),
    st.timedeltas(),
    st.complex_numbers(),
    st.builds(object),
    st.builds(Hostile),
    st.builds(HostileMapping),
    st.builds(_cycle),
    st.builds(_bomb),
    st.just(decimal.Decimal("NaN")),
    st.just(uuid.UUID(int=0)),
    st.just(dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-12)))),
    st.just(10**5000),
    st.just("\ud800"),
    st.just({"\udfff": "\ud800"}),
    st.just(bytearray(b"x")),
    st.just(memoryview(b"x")),
    st.just(float),
)


@st.composite
def mutated_messages(draw: st.DrawFn) -> Any:
    """A valid message with one thing in it replaced by anything, as an object or by wire names."""
    msg = draw(messages)
    name = draw(st.sampled_from([*(Record.__dataclass_fields__), "", "type"]))
    strange = draw(anything)
    if name == "type":
        return Msg(strange, msg.record)
    if name:
        if draw(st.booleans()) and name in ("caller_identities", "target_resources", "custom_data"):
            strange = {**getattr(msg.record, name), draw(st.text() | anything.filter(_hashable)): strange}
        elif draw(st.booleans()) and name in ("operation_categories", "caller_access_levels"):
            strange = [*getattr(msg.record, name), strange]
        setattr(msg.record, name, strange)
    if draw(st.booleans()):
        wire = {"".join(part.capitalize() for part in each.split("_")): getattr(msg.record, each)
                for each in Record.__dataclass_fields__}  # fmt: skip
        if not name:
            wire[draw(st.text())] = strange
        return {"Type": draw(st.sampled_from(["ControlPlane", "DataPlane"])), "Record": wire}
    return msg


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except Exception:
        return False
    return True
