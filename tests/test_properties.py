"""Properties of records of every shape, and of all values that are no records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gevent
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import anything, messages, mutated_messages

from geventaudit import Client, FrameError, MsgSchema, NoOp, QueueFullError, ValidationError
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import Decoder, Frame, decode
from geventaudit.protocol.messages import message_of

_schema = MsgSchema()


@given(messages, st.integers(-(2**40), 2**40), st.none() | st.uuids().filter(lambda each: each.int))
def test_accepted_messages_decode_to_equal_ones(msg: Any, time: int, service_tree_id: Any) -> None:
    loaded = _schema.load(msg)
    frame = encode(loaded, time, service_tree_id)
    decoded, decoded_time = decode(frame)
    assert (decoded, decoded_time) == (loaded, time)
    assert _schema.load(decoded) == loaded, "the normal form is its own normal form"
    assert encode(decoded, time, service_tree_id) == frame


@given(messages)
def test_the_normal_form_encodes_like_the_record_itself(msg: Any) -> None:
    """A receiver sees the same, whichever of the two is encoded; the record's custom data has to be plain for it."""
    msg.record.custom_data = {}
    assert encode(msg, 5) == encode(_schema.load(msg), 5)


@given(messages)
def test_a_mapping_by_wire_names_is_the_same_message(msg: Any) -> None:
    assert _schema.load(_schema.dump(msg)) == _schema.load(msg)


@given(messages)
def test_text_for_datetimes_leaves_no_extension(msg: Any) -> None:
    frame = encode(_schema.load(msg), 5, datetimes="text")
    extensions: list[Any] = []
    msgpack.unpackb(frame, strict_map_key=False, timestamp=0, ext_hook=lambda *args: extensions.append(args))
    assert not extensions
    assert "Timestamp(" not in repr(msgpack.unpackb(frame, strict_map_key=False, timestamp=0))


@given(st.lists(messages, max_size=4), st.lists(st.integers(1, 400), max_size=20))
def test_a_stream_is_the_same_however_it_is_cut(msgs: list[Any], cuts: list[int]) -> None:
    frames = [encode(_schema.load(msg), 7) for msg in msgs]
    stream, decoder, got = b"".join(frames), Decoder(), list[Frame]()
    for size in [*cuts, len(stream)]:
        got += decoder.feed(stream[:size])
        stream = stream[size:]
    assert len(got) == len(frames)
    assert [frame.offset for frame in got] == [sum(map(len, frames[:i])) for i in range(len(frames))]
    assert decoder.unfinished == 0


@given(st.binary(max_size=200))
def test_garbage_is_frames_or_a_frame_error(data: bytes) -> None:
    decoder = Decoder()
    try:
        for frame in decoder.feed(data):
            for entry in frame.entries:
                message_of(frame.tag, entry.body)
    except FrameError as error:
        assert 0 <= error.offset <= len(data)


@given(messages, st.data())
def test_a_broken_frame_decodes_or_is_a_frame_error(msg: Any, data: st.DataObject) -> None:
    frame = bytearray(encode(_schema.load(msg), 7))
    position = data.draw(st.integers(0, len(frame) - 1))
    frame[position] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(frame))
    except FrameError as error:
        assert str(error)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(NoOp, queue_size=64) as client:
        client.connect()
        yield client


@given(mutated_messages() | anything)
def test_send_raises_nothing_but_its_errors(client: Client, msg: Any) -> None:
    before = client.stats()
    try:
        client.send(msg)
        assert client.stats().accepted == before.accepted + 1
    except ValidationError as error:
        assert isinstance(error.messages, dict)
        assert error.messages
        assert str(error)
        assert client.stats().rejected["invalid"] == before.rejected.get("invalid", 0) + 1
    except QueueFullError:
        pytest.fail("the queue is emptied after each message")
    gevent.sleep(0)


@given(mutated_messages() | anything)
def test_before_send_gets_a_msg_and_changes_nothing_else(msg: Any) -> None:
    """With and without a hook that does nothing, the verdict is the same."""
    verdicts = []
    for hook in (None, lambda each: each):
        with Client(NoOp, before_send=hook) as client:
            try:
                client.send(msg)
                verdicts.append(True)
            except ValidationError:
                verdicts.append(False)
    assert verdicts[0] == verdicts[1]
