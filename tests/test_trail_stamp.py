"""Stamps: their place in a frame, their bytes, and the canonical form that a seal covers."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgpack
import pytest
from helpers import SERVICE_TREE_ID, message
from hypothesis import given
from hypothesis import strategies as st
from strategies import messages

from geventaudit import MsgSchema, ValidationError
from geventaudit.encoder.draft import Draft
from geventaudit.encoder.encoding import Encoder, pack, record_body
from geventaudit.protocol.decoding import decode
from geventaudit.schema.sealed import sealed_form
from geventaudit.schema.values import normal_form
from geventaudit.trail.canonical import (
    BODY_KEYS,
    NO_MAC,
    NotCanonicalError,
    canonical_bytes,
    canonical_digest,
)
from geventaudit.trail.secret import Secret
from geventaudit.trail.stamp import (
    HandedBackStamp,
    StampLayout,
    draft_of,
    handed_back,
    number_of,
    time_text,
    with_checkpoint,
    with_earlier,
    without_handed_back_stamp,
)

STREAM = "ab" * 16
ENCODER = Encoder()


def frame_of(msg: Any, encoder: Encoder = ENCODER) -> bytes:
    return encoder.encode(MsgSchema().load(msg), 1700000000.25)


def body_of(frame: bytes) -> Any:
    (_, ((_, body),), _) = msgpack.unpackb(frame, timestamp=0, strict_map_key=False)
    return body


def drafted(
    frame: bytes, *, is_sorted: bool = False, was: list[Any] | None = None, checkpoint: dict[str, Any] | None = None
) -> Draft:
    draft = draft_of(frame, 1700000000.25, is_sorted=is_sorted)
    if was is not None:
        draft = with_earlier(draft, was)
    return draft if checkpoint is None else with_checkpoint(draft, checkpoint)


def stamped(frame: bytes, number: int = 1, *, is_sealed: bool = False, **options: Any) -> bytes:
    draft = drafted(frame, is_sorted=is_sealed, **options)
    return StampLayout(STREAM, is_sealed=is_sealed).frame_of(draft, number)


# -- the place of a stamp ----------------------------------------------------------------------------------------------


@given(messages, st.sampled_from([None, SERVICE_TREE_ID]), st.integers(1, 1 << 53))
def test_a_stamp_is_one_more_key_of_custom_data(msg: Any, service: Any, number: int) -> None:
    frame = frame_of(msg, Encoder(service))
    draft = drafted(frame)
    assert handed_back([draft]) == handed_back([frame])
    with_stamp = StampLayout(STREAM, is_sealed=False).frame_of(draft, number)
    stamp = {"seq": number, "stream": STREAM, "tag": decode(frame)[0].type, "time": "2023-11-14T22:13:20.250000Z"}
    plain, body = body_of(frame), body_of(with_stamp)
    assert body["CustomData"].pop("geventaudit") == stamp
    if "CustomData" not in plain:
        assert body.pop("CustomData") == {}
    assert body == plain
    assert list(body) == list(plain)
    assert decode(with_stamp)[1] == 1700000000
    assert number_of(with_stamp) == (STREAM, number)
    assert number_of(frame) is None


@pytest.mark.parametrize("size", [0, 1, 14, 15, 16, 65534, 65535, 65536])
def test_sizes_of_custom_data(size: int) -> None:
    frame = Encoder(max_frame_bytes=1 << 24).encode(message(custom_data={str(n): n for n in range(size)}), 1)
    assert len(body_of(stamped(frame))["CustomData"]) == size + 1


@pytest.mark.parametrize("text", ["OperationCategories", "³OperationCategories", "ªCustomData", "«geventaudit", "\x91"])
def test_texts_that_look_like_keys(text: str) -> None:
    """The bytes of some keys and their headers are valid UTF-8 behind another byte."""
    msg = message(operation_name=text, custom_data={text: {text: [text]}, "z": 1})
    for place in ("caller_identities", "target_resources"):
        kinds = getattr(msg.record, place)
        for group in kinds.values():
            for one in group:
                setattr(one, "identity" if place == "caller_identities" else "name", text)
    frame = frame_of(msg)
    body = body_of(stamped(frame))
    assert body["CustomData"].pop("geventaudit")["seq"] == 1
    assert body == body_of(frame)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, -1, 200, -200, 1 << 40, -(1 << 40), 1.5, b"", [], {}),
        *("x" * 40, "x" * 300, "x" * 70000, b"y" * 300, b"y" * 70000),
        *(list(range(20)), list(range(70000)), {str(n): n for n in range(20)}, {str(n): n for n in range(60000)}),
        *(datetime(2024, 1, 1, tzinfo=UTC), datetime(1900, 1, 1, 0, 0, 0, 5, tzinfo=UTC)),
        *(msgpack.ExtType(5, b"z" * size) for size in (1, 2, 3, 4, 8, 16, 300, 70000)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_every_kind_of_value_is_passed_over(value: Any) -> None:
    """On the way to the sorted place, behind it."""
    frame = frame_of(message(custom_data={"a": value, "z": 1}))
    body = body_of(stamped(frame, is_sealed=True))
    assert list(body["CustomData"]) == ["a", "geventaudit", "z"]
    assert body["CustomData"]["geventaudit"]["mac"] == NO_MAC


@pytest.mark.parametrize(
    ("keys", "place"),
    [("", 0), ("a", 1), ("z", 0), ("geventaudis", 1), ("geventaudiz", 0), ("Z", 1), ("é", 0), ("geventaudit2", 0)],
)
def test_the_sorted_place_is_by_code_point(keys: str, place: int) -> None:
    frame = frame_of(message(custom_data=dict.fromkeys([keys], 1) if keys else {}))
    assert list(body_of(stamped(frame, is_sealed=True))["CustomData"]).index("geventaudit") == place


@pytest.mark.parametrize(
    "data", [{"geventaudit": 1}, {"a": 1, "geventaudit": {}, "z": 1}, {"z": 1, "geventaudit": None}]
)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_the_key_is_reserved(data: dict[str, Any], is_sorted: bool) -> None:
    with pytest.raises(ValidationError, match=r"CustomData\.geventaudit: is reserved"):
        draft_of(frame_of(message(custom_data=data)), 1, is_sorted=is_sorted)


def test_the_place_of_the_mac() -> None:
    frame = frame_of(message(custom_data={"a": 1, "z": 1}))
    for options in ({}, {"checkpoint": {"kind": "open"}}, {"was": [[STREAM, 5]]}):
        draft = drafted(frame, is_sorted=True, **options)  # type: ignore[arg-type]
        layout = StampLayout(STREAM, is_sealed=True)
        made = layout.frame_of(draft, 77)
        at = layout.place_of_mac(draft)
        assert made[at : at + 64] == b"0" * 64
        assert made[at - 6 : at] == b"\xa3mac\xd9\x40"
        stamp = body_of(made)["CustomData"]["geventaudit"]
        assert list(stamp) == sorted(stamp)
        assert options.items() <= stamp.items()


# -- time --------------------------------------------------------------------------------------------------------------


@given(st.floats(0, 253402300799.0))
def test_the_time_is_a_later_part_of_the_second_of_the_entry(unix_time: float) -> None:
    text = time_text(unix_time).decode()
    assert len(text) == 27
    exact = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=math.floor(unix_time))
    assert datetime.fromisoformat(text).replace(microsecond=0) == exact
    assert abs((datetime.fromisoformat(text) - exact).total_seconds() - (unix_time - math.floor(unix_time))) < 2e-6


# -- records that were handed back -------------------------------------------------------------------------------------


def test_a_record_that_was_handed_back_names_its_old_number() -> None:
    (back,) = handed_back([stamped(frame_of(message(custom_data={"a": 1})), 7)])
    assert type(back.record.custom_data["geventaudit"]) is HandedBackStamp
    plain_and_was = without_handed_back_stamp(back)
    assert plain_and_was is not None
    plain, was = plain_and_was
    assert plain == message(custom_data={"a": 1})
    assert was == [[STREAM, 7]]
    again = stamped(frame_of(plain), 9, was=was)
    assert body_of(again)["CustomData"]["geventaudit"]["was"] == [[STREAM, 7]]
    (back,) = handed_back([again])
    assert without_handed_back_stamp(back) == (plain, [[STREAM, 7], [STREAM, 9]])


def test_a_stamp_of_the_users_own_is_refused() -> None:
    (back,) = handed_back([stamped(frame_of(message()), 7)])
    back.record.custom_data = {**back.record.custom_data, "geventaudit": dict(back.record.custom_data["geventaudit"])}
    with pytest.raises(ValidationError, match="reserved"):
        without_handed_back_stamp(back)
    assert without_handed_back_stamp(message()) is None


def test_checkpoints_are_not_handed_back() -> None:
    frame = frame_of(message())
    assert handed_back([stamped(frame, checkpoint={"kind": "mark"}), frame]) == [message()]


# -- the canonical form ------------------------------------------------------------------------------------------------

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("data").joinpath("seal_vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda each: each["case"])
def test_the_canonical_form_is_the_one_of_the_vector_file(vector: dict[str, Any]) -> None:
    body = json.loads(json.dumps(vector["body"], sort_keys=True))
    stamp = body["CustomData"]["geventaudit"]
    mac, stamp["mac"] = stamp["mac"], NO_MAC
    canonical = canonical_bytes(body)
    assert canonical.hex() == vector["canonical"]
    digest = canonical_digest(canonical)
    assert digest.hex() == vector["digest"]
    assert digest == hashlib.sha256(b"geventaudit seal 1\0" + canonical).digest()
    key = VECTORS["key_tree"]["record_keys"][stamp["stream"]][stamp["seq"] - 1]
    assert Secret(bytes.fromhex(key)).mac(digest).hex() == mac


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in sorted(value, reverse=True)}
    return [shuffled(each) for each in value] if isinstance(value, list) else value


def test_the_keys_of_a_body_are_in_the_order_of_the_wire() -> None:
    assert tuple(record_body(message().record, SERVICE_TREE_ID)) == BODY_KEYS


def test_the_order_of_json_does_not_matter() -> None:
    body = body_of(frame_of(message(custom_data={"b": {"d": 1, "c": 2}, "a": [1, {"z": 1, "y": 1}]})))
    assert canonical_bytes(json.loads(json.dumps(shuffled(body)))) == canonical_bytes(body)
    assert list(msgpack.unpackb(canonical_bytes(body))) == [key for key in BODY_KEYS if key != "env_ikey"]


@pytest.mark.parametrize("value", [1.5, 1.0, 1 << 53, -(1 << 53), float("nan"), "\ud800", {"a": 1.5}, [[2.5]]])
def test_values_of_unsealed_records_have_no_canonical_form(value: Any) -> None:
    with pytest.raises(NotCanonicalError):
        canonical_bytes({"CustomData": {"x": value}})


@pytest.mark.parametrize(
    "body",
    [
        {"CustomData": 5.5},
        {"TargetResources": 1 << 60},
        {"CallerIdentities": {"Nobody": []}},
        {"CallerIdentities": {"UPN": [{}]}},
        {"CallerIdentities": [1]},
        {"CallerIdentities": {"UPN": 5}},
    ],
)
def test_bodies_of_another_shape(body: dict[str, Any]) -> None:
    with pytest.raises(NotCanonicalError):
        canonical_bytes(body)


# -- custom data as a sealing client writes it -------------------------------------------------------------------------


def test_values_are_written_as_text_where_json_would_change_them() -> None:
    moment = datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=timezone(timedelta(hours=2)))
    data = {
        "z": 1 << 53,
        "y": -(1 << 53),
        "x": (1 << 53) - 1,
        "w": 1.5,
        "v": 1e300,
        "u": moment,
        "t": b"\xff\xfe",
        "s": [{"b": 0.1, "a": None}],
        "r": True,
    }
    written = sealed_form(normal_form(data))
    assert list(written) == sorted(data)
    assert list(written["s"][0]) == ["a", "b"]
    assert written == {
        "z": "9007199254740992",
        "y": "-9007199254740992",
        "x": 9007199254740991,
        "w": "1.5",
        "v": "1e+300",
        "u": "2024-05-06T05:08:09.000010+00:00",
        "t": "__4=",
        "s": [{"a": None, "b": "0.1"}],
        "r": True,
    }
    assert json.loads(json.dumps(written)) == written
    assert pack(json.loads(json.dumps(written))) == pack(written)


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"a": math.nan}, "CustomData.a"),
        ({"a": [1, {"b": math.inf}]}, "CustomData.a[1].b"),
        ({"a": {1: 2}}, "CustomData.a[1]"),
        ({"a": {b"x": 2}}, "CustomData.a[b'x']"),
        ({"a": msgpack.ExtType(5, b"")}, "CustomData.a"),
        ({"a": msgpack.Timestamp(1, 1)}, "CustomData.a"),
    ],
)
def test_values_that_json_cannot_carry_are_refused_at_their_path(data: dict[str, Any], path: str) -> None:
    with pytest.raises(ValidationError) as caught:
        sealed_form(normal_form(data))
    assert str(caught.value).startswith(path + ": must "), str(caught.value)
