"""Random bytes for the decoder and the agent, in a short form. The long form is started by hand:

GEVENTAUDIT_FUZZ=200000 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gevent import socket
from helpers import SERVICE_TREE_ID, mapping, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geventaudit import FrameError, Heartbeat, Msg
from geventaudit.agent import Agent, Received, Refused
from geventaudit.agent.reception import Inspector
from geventaudit.agent.shown import json_line, line_of, line_of_refusal
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import AckDecoder, Decoder, EntryReader, unpack_first
from geventaudit.protocol.handshake import AgentSide, HandshakeError

EXAMPLES = int(os.environ.get("GEVENTAUDIT_FUZZ", "150"))
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
ACK = msgpack.packb({"ack": "last"})
LAST = msgpack.packb(["AsmAuditCP", [[5, mapping()]], {"chunk": "last"}])

# -- MessagePack of every kind, also such as no packer makes -----------------------------------------------------------

_numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(width=64) | st.booleans() | st.none()
_texts = st.text(max_size=8) | st.sampled_from(
    [
        "OperationName",
        "CustomData",
        "TargetResources",
        "Name",
        "env_ikey",
        "chunk",
        "compressed",
        "gzip",
        "size",
        "\x1b",
    ]
)
_extensions = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12)) | st.builds(
    msgpack.Timestamp, st.integers(-(2**62), 2**62), st.integers(0, 10**9 - 1)
)
_leaves = (_numbers | _texts | st.binary(max_size=8) | _extensions).map(msgpack.packb) | st.sampled_from(
    [
        b"\xa2\xff\xfe",
        b"\xd7\x00\x00\x00\x00\x05\x00\x00\x00\x01",
        b"\xc7\x08\x00\0\0\0\5\0\0\0\1",
        b"\xc1",
        b"\xd9\x01x",
    ]
)


def _array(items: list[bytes]) -> bytes:
    return b"\xdc" + len(items).to_bytes(2, "big") + b"".join(items)


def _map(pairs: list[tuple[bytes, bytes]]) -> bytes:
    return b"\xde" + len(pairs).to_bytes(2, "big") + b"".join(key + value for key, value in pairs)


_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=4).map(_array) | st.lists(st.tuples(inner, inner), max_size=4).map(_map),
    max_leaves=12,
)


def _changed(body: dict[str, Any], name: str, value: bytes) -> bytes:
    pairs = [(msgpack.packb(key), value if key == name else msgpack.packb(each)) for key, each in body.items()]
    return _map(pairs if name in body else [*pairs, (msgpack.packb(name), value)])


_bodies = _values | st.builds(_changed, st.just(mapping()), st.sampled_from([*mapping(), "Extra", "env_ikey"]), _values)
_times = st.sampled_from([b"\x05", b"\xd7\x00\x00\x00\x00\x05\x00\x00\x00\x01", b"\xcb?\xf0\0\0\0\0\0\0"]) | _values
_entries = st.builds(lambda time, body: b"\x92" + time + body, _times, _bodies) | st.builds(
    lambda time, metadata, body: b"\x92\x92" + time + metadata + body, _times, _values, _bodies
)
_tags = (
    st.sampled_from(["AsmAuditCP", "AsmAuditDP", "AsmAuditHB", "AsmAuditDG", "\x1b[2J"]).map(msgpack.packb) | _values
)
_options = st.sampled_from([b"", b"\xc0", b"\x80"]) | st.dictionaries(
    st.sampled_from(["chunk", "compressed", "size", "fluent_signal"]),
    st.sampled_from(["gzip", "text", "x", 0, 1, 5, None, b"x"]),
).map(msgpack.packb)  # fmt: skip


def _frame(tag: bytes, middle: bytes, option: bytes) -> bytes:
    size = 2 + bool(option) + (middle[:1] == b"\x05")
    return bytes([0x90 + size]) + tag + middle + option


def _packed(entries: list[bytes], compressed: bool) -> bytes:
    joined = b"".join(entries)
    return bytes(msgpack.packb(gzip.compress(joined, mtime=0) if compressed else joined))


_middles = (
    st.lists(_entries, max_size=3).map(_array)
    | st.builds(_packed, st.lists(_entries, max_size=3), st.booleans())
    | _bodies.map(lambda body: b"\x05" + body)
    | _values
)
_frames = st.builds(_frame, _tags, _middles, _options) | st.sampled_from(
    [encode(message(1), 5, SERVICE_TREE_ID), encode(Heartbeat("a", "b", "c", "d", "TCP"), 5), LAST]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Frames of all modes, whole or damaged."""
    data = bytearray(b"".join(draw(st.lists(_frames, max_size=4))))
    for _ in range(draw(st.integers(0, 3)) if data else 0):
        position = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[position : position + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[position:position] = draw(st.binary(max_size=6))
            case 2:
                del data[position : position + draw(st.integers(1, 40))]
            case _:
                data[position:position] = data[: draw(st.integers(0, 60))]
    return bytes(data)


def outcome(stream: bytes, cuts: list[int]) -> tuple[list[Any], str]:
    """Return the frames of a stream that arrives in pieces, and its end."""
    decoder, results = Decoder(max_frame_bytes=1 << 16), list[Any]()
    pieces = []
    for size in [*cuts, len(stream)]:
        pieces.append(stream[:size])
        stream = stream[size:]
    try:
        for piece in filter(None, pieces):
            for frame in decoder.feed(piece):
                results.append((frame.tag, repr(frame.option), frame.offset))
                reader = EntryReader(frame)
                results += [INSPECTOR.examine(frame.tag, reader, each) for each in frame.pieces() if each]
    except FrameError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 2000
        return results, str(error)
    return results, f"{decoder.unfinished} bytes unfinished"


INSPECTOR = Inspector(None)


@fuzzed
@given(streams() | st.binary(max_size=300), st.lists(st.integers(1, 50), max_size=10))
def test_a_stream_is_frames_or_a_frame_error(stream: bytes, cuts: list[int]) -> None:
    """For all cuts of the stream; the frames can be shown."""
    results, end = outcome(stream, [])
    assert repr(outcome(stream, cuts)) == repr((results, end))
    for each in results:
        if isinstance(each, Received):
            assert line_of(each).isprintable()
            if isinstance(each.message, Msg):
                line = json_line(each)
                assert line.isprintable()
                assert json.loads(line)["Time"] == each.time
        elif isinstance(each, Refused):
            assert line_of_refusal(each).isprintable()
            assert len(line_of_refusal(each)) < 10_000


@fuzzed
@given(st.lists(st.tuples(_texts, _numbers | _texts | st.binary(max_size=9)), max_size=5))
def test_entries_equal_those_of_msgpack(pairs: list[tuple[str, Any]]) -> None:
    """Another way to read the same bytes, as the oracle."""
    body = dict(pairs)
    data = msgpack.packb(["AsmAuditCP", [[5, body], [[6, {"m": 1}], body]], {"chunk": "c"}])
    (frame,) = Decoder().feed(data)
    read = msgpack.unpackb(data, strict_map_key=False)[1][0][1]
    assert repr([tuple(each) for each in frame.entries]) == repr([(5, read, {}, ""), (6, read, {"m": 1}, "")])


@fuzzed
@given(streams() | st.binary(max_size=100) | _values)
def test_acks_and_handshakes_of_random_bytes(data: bytes) -> None:
    try:
        list(AckDecoder().feed(data))
    except FrameError as error:
        assert str(error).isprintable()
    try:
        first = unpack_first(data, 4096)
        if first is not None:
            pong, reason = AgentSide("agent", "key", {"user": "password"}).pong(first[0])
            assert reason
            assert msgpack.unpackb(pong)[1] is False
    except (FrameError, HandshakeError) as error:
        assert str(error).isprintable()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    path = str(Path(tmp_path_factory.mktemp("f")) / "s")
    logging.getLogger("geventaudit").setLevel(logging.CRITICAL)  # a long run would keep millions of records
    with Agent(path, lambda received: None, on_refused=lambda refused: None, stall_timeout=5) as agent:
        yield agent
    logging.getLogger("geventaudit").setLevel(logging.NOTSET)


@fuzzed
@given(streams() | st.binary(max_size=300))
def test_an_agent_goes_on(agent: Agent, stream: bytes) -> None:
    """The connection ends or goes on, and the next is served. A long run collects garbage for more than a second."""
    began = time.process_time()
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as honest:
        for each in (sock, honest):
            each.settimeout(20)
            each.connect(agent.address)
        sock.sendall(stream)
        sock.shutdown(socket.SHUT_WR)
        try:
            while sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        honest.sendall(LAST)
        assert honest.recv(100) == ACK
    assert time.process_time() - began < 5
    assert agent._unfinished == 0
