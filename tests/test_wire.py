"""Frames: encoding and decoding."""

from __future__ import annotations

import datetime as dt
import string
from itertools import product
from typing import Any

import msgpack
import pytest
from helpers import SERVICE_TREE_ID, message, record
from hypothesis import given
from hypothesis import strategies as st

from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Heartbeat,
    Msg,
    OperationCategory,
    ValidationError,
)
from geventaudit.encoder.encoding import encode, text_packer
from geventaudit.errors import FrameError
from geventaudit.protocol.acks import ack_of
from geventaudit.protocol.decoding import Decoder, decode
from geventaudit.protocol.unpacking import MAX_ITEMS
from geventaudit.schema.values import MAX_VALUES

EXAMPLE = {"TimeFormat": "DateTime"}
ENDLESS: dict[str, Any] = {}
ENDLESS["self"] = ENDLESS


def body_of(frame: bytes) -> Any:
    return msgpack.unpackb(frame, timestamp=3)[1][0][1]


def test_the_frame_of_the_example() -> None:
    tag, entries, option = msgpack.unpackb(encode(message(), 1717243200.9, SERVICE_TREE_ID))
    assert tag == "AsmAuditCP"
    assert option == EXAMPLE
    ((time, body),) = entries
    assert time == 1717243200
    assert list(body) == [
        "env_ikey", "CallerIpAddress", "CallerIdentities", "OperationCategories", "CustomData", "TargetResources",
        "CallerAccessLevels", "OperationAccessLevel", "OperationName", "OperationResultDescription", "CallerAgent",
        "OperationCategoryDescription", "OperationType", "OperationResult",
    ]  # fmt: skip


def test_without_service_tree_id_and_custom_data_their_keys_are_absent() -> None:
    body = body_of(encode(message(custom_data={}), 0))
    assert "env_ikey" not in body
    assert "CustomData" not in body


def test_sorted_and_each_once_and_the_callers_objects_untouched() -> None:
    categories = [OperationCategory.EUII, OperationCategory.OTHER, OperationCategory.EUII]
    levels = ["b", "é", "a", "b", "\U0001f600", "\uffff"]
    identities = {CallerIdentityType.SYSTEM: [CallerIdentity("s", "d")], CallerIdentityType.UPN: []}
    msg = message(operation_categories=categories, caller_access_levels=levels, caller_identities=identities)
    body = body_of(encode(msg, 0))
    assert body["OperationCategories"] == ["OCOther", "EUII"]
    assert body["CallerAccessLevels"] == ["a", "b", "é", "\uffff", "\U0001f600"]
    assert list(body["CallerIdentities"]) == ["UPN", "System"]
    assert categories == [OperationCategory.EUII, OperationCategory.OTHER, OperationCategory.EUII]
    assert levels == ["b", "é", "a", "b", "\U0001f600", "\uffff"]
    assert list(identities) == [CallerIdentityType.SYSTEM, CallerIdentityType.UPN]


def test_times_are_exact_in_both_forms() -> None:
    moment = dt.datetime(1969, 12, 31, 23, 59, 59, 500001, tzinfo=dt.UTC)
    msg = message(custom_data={"t": moment})
    assert body_of(encode(msg, 0))["CustomData"]["t"] == moment
    frame = encode(msg, 0)
    assert decode(frame)[0] == msg
    assert body_of(encode(msg, 0, datetimes="text"))["CustomData"]["t"] == "1969-12-31T23:59:59.500001+00:00"


@pytest.mark.parametrize(("given", "written"), [(-1.5, -2), (0, 0), (1.999, 1), (17179869184.0, 17179869184)])
def test_fractions_of_a_second_are_dropped_downward(given: float, written: int) -> None:
    assert decode(encode(message(), given))[1] == written


def test_a_frame_above_the_limit() -> None:
    frame = encode(message(), 0)
    assert encode(message(), 0, max_frame_bytes=len(frame)) == frame
    with pytest.raises(ValidationError, match=f"must fit into a frame of {len(frame) - 1} bytes, takes {len(frame)}"):
        encode(message(), 0, max_frame_bytes=len(frame) - 1)
    with pytest.raises(ValidationError, match="1048576 bytes"):
        encode(message(custom_data={"long": "x" * (1 << 20)}), 0)


@pytest.mark.parametrize("changes", [{"custom_data": {"o": object()}}, {"operation_categories": ["Nonsense"]},
                                     {"caller_ip_address": "nowhere"}, {"custom_data": {"n": 2**64}},
                                     {"caller_identities": None}, {"target_resources": {"T": [None]}},
                                     {"custom_data": {"t": msgpack.Timestamp(1 << 70)}},
                                     {"custom_data": ENDLESS}])  # fmt: skip
def test_messages_that_were_not_validated_raise_a_validation_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="must be a valid message"):
        encode(message(**changes), 0)


@pytest.mark.parametrize("given", ["", "x", "00000000-0000-0000-0000-000000000000", 5, b"x", "é"])
def test_a_service_tree_id_that_is_none(given: Any) -> None:
    with pytest.raises(ValidationError, match="must be a UUID and not the nil UUID"):
        encode(message(), 0, given)


def test_a_service_tree_id_is_written_in_one_spelling() -> None:
    assert body_of(encode(message(), 0, "{" + SERVICE_TREE_ID.upper() + "}"))["env_ikey"] == SERVICE_TREE_ID


def test_an_unknown_choice_of_datetimes() -> None:
    with pytest.raises(ValueError, match="'extension' or 'text'"):
        encode(message(), 0, datetimes="iso")  # type: ignore[arg-type]


def test_heartbeat() -> None:
    beat = Heartbeat("id", "1.0", "6.1", "python3.11.7", "TCP")
    frame = encode(beat, 5)
    assert msgpack.unpackb(frame)[0] == "AsmAuditHB"
    assert decode(frame) == (beat, 5)


def frame_with(**parts: Any) -> bytes:
    tag, time, body, option = (parts.get(name, default) for name, default in (
        ("tag", "AsmAuditCP"), ("time", 5), ("body", {"a": 1}), ("option", EXAMPLE)))  # fmt: skip
    entries = parts.get("entries", [[time, body]])
    return bytes(msgpack.packb([tag, entries] if option == "absent" else [tag, entries, option]))


@pytest.mark.parametrize("option", [EXAMPLE, {}, None, "absent", {"chunk": "abc", "size": 1}])
def test_options_that_agents_take(option: Any) -> None:
    (frame,) = Decoder().feed(frame_with(option=option))
    assert frame.entries == [(5, {"a": 1}, {}, "")]
    assert frame.chunk == ("abc" if option == {"chunk": "abc", "size": 1} else None)


@pytest.mark.parametrize(
    ("time", "seconds"), [(5, 5), (5.5, 5.5), (-1, -1), (msgpack.ExtType(0, b"\0\0\0\5\x1d\xcd\x65\0"), 5.5)]
)
def test_times_that_agents_take(time: Any, seconds: float) -> None:
    (frame,) = Decoder().feed(frame_with(time=time))
    assert frame.entries[0].time == seconds


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (frame_with(tag=b"AsmAuditCP"), "tag must be text"),
        (frame_with(tag=5), "tag must be text"),
        (frame_with(option=[]), "option must be a map"),
        (frame_with(option="x"), "option must be a map"),
        (frame_with(entries=5, option="absent"), "second element must be an array"),
        (frame_with(entries={"a": 1}, option="absent"), "second element must be an array"),
        (frame_with(option={"chunk": b"c"}), "chunk must be text, got b'c'"),
        (frame_with(option={"chunk": 5}), "chunk must be text, got 5"),
        (frame_with(option={"compressed": "zstd"}), "compressed with gzip only, got 'zstd'"),
        (frame_with(option={"fluent_signal": "x"}), "fluent_signal must be a number"),
        (b"\x93\xa1t\x90\x82\xa1a\x01\xa1a\x02", "a map has the key 'a' twice"),
        (msgpack.packb(["tag", [], {}, 1]), "mode must have at most 3 elements, has 4"),
        (msgpack.packb(["tag", b"", {}, 1]), "mode must have at most 3 elements, has 4"),
        (msgpack.packb({"a": 1}), "frame must be an array"),
        (msgpack.packb(5), "frame must be an array"),
        (msgpack.packb(["tag"]), "2 to 4 elements, has 1"),
        (msgpack.packb(["tag", [], {}, 1, 1]), "2 to 4 elements, has 5"),
        (b"\xc1", "frame must be an array, got not MessagePack"),
        (b"\x92\xa1t\xc1", "not MessagePack: (FormatError|Unknown header)"),
        (b"\x81", "frame must be an array, got a map"),
        (b"\xdb\x7f\xff\xff\xff", "frame must be an array, got text"),
        (b"GET / HTTP/1.1\r\n", "frame must be an array"),
        (b"\x92" * 5000, "not MessagePack"),
    ],
)
def test_streams_that_are_closed(frame: bytes, words: str) -> None:
    good = frame_with()
    decoder, got = Decoder(), []
    with pytest.raises(FrameError, match=words) as caught:  # noqa: PT012
        for each in decoder.feed(good + frame):
            got.append(each)
    assert len(got) == 1, "the good frame before it is kept"
    assert caught.value.offset == len(good)


@pytest.mark.parametrize(
    "bad",
    [
        [float("nan"), {}],
        [float("inf"), {}],
        ["text", {}],
        [None, {}],
        [True, {}],
        [msgpack.Timestamp(5), {}],
        [5, []],
        [5],
        5,
    ],
)
def test_good_entries_before_a_bad_one_are_kept(bad: Any) -> None:
    (frame,) = Decoder().feed(frame_with(entries=[[5, {"a": 1}], bad, [6, {"b": 1}]]))
    got = []
    with pytest.raises(FrameError, match="entry 1"):  # noqa: PT012
        for each in frame.unpack():
            got.append(each)
    assert got == [(5, {"a": 1}, {}, "")]


@pytest.mark.slow
def test_values_that_unfold_are_refused_before_they_do() -> None:
    """Three megabytes of arrays that hold nothing would take two hundred."""
    few: list[Any] = [[]] * (MAX_ITEMS // 8)
    (frame,) = Decoder().feed(frame_with(body={"CustomData": [few] * 7}))
    assert len(frame.entries) == 1
    many: list[Any] = [[few] * 9, [[{}] * len(few)] * 9, [{n: {} for n in range(len(few))}] * 5]
    for bad in many:
        (frame,) = Decoder().feed(frame_with(body={"CustomData": bad}))
        with pytest.raises(FrameError, match=f"more than {MAX_ITEMS} values"):
            list(frame.unpack())


@pytest.mark.slow
def test_the_largest_accepted_records_can_be_unpacked() -> None:
    """By an agent: the most values that custom data can hold, and about as many levels as fit beside them."""
    levels = sorted("".join(three) for three in product(string.printable[:60], repeat=3))
    wide = message(custom_data={"l": [[]] * (MAX_VALUES - 1)}, caller_access_levels=levels)
    frame = encode(wide, 0)
    assert len(frame) > 900_000
    assert len(next(Decoder().feed(frame)).entries) == 1
    assert decode(frame) == (wide, 0)
    pairs = message(custom_data={str(n): n for n in range(MAX_VALUES // 2)})
    assert decode(encode(pairs, 0)) == (pairs, 0)


def test_a_record_of_many_values_can_be_decoded() -> None:
    """An accepted record is never lost because of its size."""
    levels = [f"{n:06x}" for n in range(MAX_ITEMS + 1)]
    much = message(caller_access_levels=levels)
    assert decode(encode(much, 0, max_frame_bytes=8 << 20)) == (much, 0)


def test_a_frame_of_too_many_entries() -> None:
    """Shorter ones than any message is would else be millions."""
    for count in (65537, MAX_ITEMS + 1):
        with pytest.raises(FrameError, match=f"at most 65536 entries, has {count}"):
            list(Decoder().feed(b"\x92\xa1t\xdd" + count.to_bytes(4, "big") + b"\x92\x01\x80" * count))


@pytest.mark.parametrize("part", ["tag", "option"])
def test_a_part_that_is_too_long(part: str) -> None:
    """Tag and option are unpacked with the frame, on the hub."""
    for right, wrong in ((16_000, 17_000), (16_000, 1 << 20)):
        values = [("x" * length if part == "tag" else {"chunk": "x" * length}) for length in (right, wrong)]
        assert len(list(Decoder().feed(frame_with(**{part: values[0]})))) == 1
        with pytest.raises(FrameError, match=f"the {part} must have at most 16384 bytes, has {wrong}"[:-2]):
            list(Decoder().feed(frame_with(**{part: values[1]})))


def test_an_entry_with_too_long_an_array() -> None:
    """The frame is whole, and the entries before that one are kept."""
    many = [0] * (MAX_ITEMS + 1)
    (frame,) = Decoder().feed(frame_with(entries=[[5, {"a": 1}], [6, {"b": many}]]))
    got = []
    with pytest.raises(FrameError, match="exceeds max_array_len"):  # noqa: PT012
        for each in frame.unpack():
            got.append(each)
    assert got == [(5, {"a": 1}, {}, "")]


def test_a_frame_above_the_decoders_limit() -> None:
    decoder = Decoder(max_frame_bytes=1000)
    assert len(list(decoder.feed(frame_with(body={"a": "x" * 900})))) == 1
    with pytest.raises(FrameError, match="more than 1000 bytes"):
        list(decoder.feed(frame_with(body={"a": "x" * 2000})[:1500]))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b"", "one whole frame"),
        (encode(message(), 0)[:-1], "one whole frame"),
        (encode(message(), 0) * 2, "one whole frame"),
        (frame_with(entries=[]), "one entry"),
        (frame_with(entries=[[5, {}], [6, {}]]), "one entry"),
        (frame_with(body={}), "has no 'OperationName'"),
        (frame_with(tag="Nonsense"), "the type must be one of AsmAuditDP"),
        (frame_with(entries=[[5, 6]]), "record of entry 0"),
    ],
)
def test_frames_that_decode_refuses(frame: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        decode(frame)


def test_decode_gives_plain_types() -> None:
    msg, _ = decode(encode(message(), 0))
    assert isinstance(msg, Msg)
    assert type(msg.type) is AuditType
    assert msg == message()
    assert msg.record == record()
    assert ack_of("x") == msgpack.packb({"ack": "x"})


def test_a_frame_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(FrameError("x", 5)))
    assert (str(error), error.reason, error.offset) == ("x (at byte 5)", "x", 5)


@given(st.text(max_size=80) | st.text("a\u00e9\u20ac", min_size=50, max_size=300))
def test_texts_are_packed_as_msgpack_does(text: str) -> None:
    pack_text = text_packer(b"<", empty=True, blank=True)
    try:
        expected = b"<" + msgpack.packb(text)
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            pack_text(text)
    else:
        assert pack_text(text) == expected


@pytest.mark.parametrize(
    ("empty", "blank", "refused"),
    [(True, True, []), (False, True, [""]), (True, False, ["", " "]), (False, False, ["", " "])],
)
def test_texts_that_may_not_be_packed(empty: bool, blank: bool, refused: list[str]) -> None:
    pack_text = text_packer(b"", empty=empty, blank=blank)
    for text in ("", " ", "a", " a"):
        if text in refused:
            with pytest.raises(ValueError, match="blank"):
                pack_text(text)
        else:
            assert pack_text(text) == msgpack.packb(text)
