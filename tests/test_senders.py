"""Frames of other senders of the Forward protocol: all modes, in recorded bytes and by the libraries themselves."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gevent import socket, subprocess
from helpers import eventually, mapping

from geventaudit import FrameError, Msg
from geventaudit.agent import Agent, Received, Refused
from geventaudit.protocol.decoding import Decoder, Frame
from geventaudit.testing import AuditAgent

HERE = Path(__file__).parent
TAG = "AsmAuditCP"
SECONDS = 1_790_000_000


def body(number: int) -> dict[str, Any]:
    return mapping(CustomData={"n": number})


def event_time(seconds: int = SECONDS, nanoseconds: int = 500_000_000) -> msgpack.ExtType:
    return msgpack.ExtType(0, struct.pack(">II", seconds, nanoseconds))


def packed(*entries: Any) -> bytes:
    return b"".join(msgpack.packb(each) for each in entries)


def frame(*parts: Any, **options: Any) -> bytes:
    return bytes(msgpack.packb([TAG, *parts], **options))


def entries_of(count: int, time: Any = SECONDS) -> list[Any]:
    return [[time, body(number)] for number in range(count)]


def numbers_of(got: list[Received]) -> list[int]:
    return [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)]


WITH_METADATA = [[[event_time(), {}], body(number)] for number in range(3)]
OLD = {"use_bin_type": False}  # "raw": the text type of MessagePack for bytes too, as before 2013

# As Fluent Bit's out_forward, Fluentd's, and the loggers for Python, Go, Ruby and Node write them.
FRAMES = {
    "Message": b"".join(frame(SECONDS, body(n)) for n in range(3)),
    "Message with an option": b"".join(frame(SECONDS, body(n), {"chunk": f"c{n}"}) for n in range(3)),
    "Message with nil as its option": b"".join(frame(SECONDS, body(n), None) for n in range(3)),
    "Message, EventTime": b"".join(frame(event_time(), body(n)) for n in range(3)),
    "Message, float": b"".join(frame(SECONDS + 0.5, body(n)) for n in range(3)),
    "Forward": frame(entries_of(3)),
    "Forward with an option": frame(entries_of(3), {"size": 3, "chunk": "p8n9gmxTQVC8/nh2wlKKeQ=="}),
    "Forward, EventTime": frame(entries_of(3, event_time())),
    "Forward, EventTime as ext8": frame(entries_of(3, event_time())).replace(b"\xd7\x00", b"\xc7\x08\x00"),
    "Fluent Bit, default": frame(WITH_METADATA, {"fluent_signal": 0, "size": 3}),
    "Fluent Bit, acks": frame(WITH_METADATA, {"chunk": "0c37", "fluent_signal": 0, "size": 3}),
    "Fluent Bit, metadata": frame([[[event_time(), {"otlp": {"severity": 9}}], body(n)] for n in range(3)]),
    "Fluent Bit, Message, metadata": b"".join(
        frame(event_time(), body(n), {"metadata": {"otlp": {"severity": 9}}, "fluent_signal": 0}) for n in range(3)
    ),
    "Fluent Bit, gzip": frame(gzip.compress(packed(*WITH_METADATA)), {"compressed": "gzip", "fluent_signal": 0}),
    "PackedForward, bin": frame(packed(*entries_of(3)), {"size": 3}),
    "PackedForward, str": frame(packed(*entries_of(3)), {"size": 3}, **OLD),
    "PackedForward without an option": frame(packed(*entries_of(3))),
    "PackedForward, not compressed by its option": frame(packed(*entries_of(3)), {"compressed": "text"}),
    "gzip, str": frame(gzip.compress(packed(*entries_of(3))), {"compressed": "gzip"}, **OLD),
    "gzip, a member for each entry": frame(
        b"".join(gzip.compress(packed(each)) for each in entries_of(3)), {"compressed": "gzip", "size": 3}
    ),
    "gzip, members that cut entries": frame(
        b"".join(gzip.compress(bytes([byte])) for byte in packed(*entries_of(3))), {"compressed": "gzip"}
    ),
    "gzip with a name": frame(
        b"\x1f\x8b\x08\x08\0\0\0\0\0\x03chunk.log\0" + gzip.compress(packed(*entries_of(3)), mtime=0)[10:],
        {"compressed": "gzip"},
    ),
}


def connect(agent: Agent) -> Any:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(agent.address)
    return sock


@pytest.mark.parametrize("cut", [1, 7, None], ids=["a byte at a time", "seven", "at once"])
@pytest.mark.parametrize("name", FRAMES)
def test_frames_of_other_senders(name: str, cut: int | None) -> None:
    stream, decoder, found = FRAMES[name], Decoder(), list[Frame]()
    for start in range(0, len(stream), cut or len(stream)):
        found += decoder.feed(stream[start : start + (cut or len(stream))])
    assert decoder.unfinished == 0
    assert {each.tag for each in found} == {TAG}
    entries = [entry for each in found for entry in each.entries]
    assert [entry.body for entry in entries] == [body(number) for number in range(3)]
    half = any(word in name for word in ("EventTime", "Fluent Bit", "float"))
    assert {entry.time for entry in entries} == {SECONDS + 0.5 if half else SECONDS}


@pytest.mark.parametrize("name", FRAMES)
def test_records_of_other_senders_arrive(name: str, agent: Agent, got: list[Received], refused: list[Refused]) -> None:
    frames = list(Decoder().feed(FRAMES[name]))
    chunks = [each.chunk for each in frames if each.chunk is not None]
    with connect(agent) as sock:
        sock.sendall(FRAMES[name])
        eventually(lambda: len(got) == 3)
        unpacker, acks = msgpack.Unpacker(), list[Any]()
        while len(acks) < len(chunks):
            unpacker.feed(sock.recv(1000))
            acks += unpacker
    assert [each["ack"] for each in acks] == chunks
    assert numbers_of(got) == [0, 1, 2]
    assert not refused
    assert {each.metadata == {"otlp": {"severity": 9}} for each in got} == {name.endswith(", metadata")}


def gzipped(data: bytes) -> bytes:
    return frame(data, {"compressed": "gzip", "chunk": "c"})


BROKEN: dict[str, tuple[bytes, str]] = {
    "no gzip": (gzipped(b"not gzip"), "the entries are not gzip"),
    "nothing": (gzipped(b""), "gzip that was cut short"),
    "cut short": (gzipped(gzip.compress(packed(*entries_of(3)))[:-1]), "gzip that was cut short"),
    "a wrong sum": (
        gzipped(gzip.compress(packed(*entries_of(3)))[:-8] + b"\0" * 8),
        "the entries are not gzip: .*check",
    ),
    "something behind it": (gzipped(gzip.compress(packed(*entries_of(3))) + b"xyz"), "the entries are not gzip"),
    "a second member cut short": (
        gzipped(gzip.compress(packed(*entries_of(3))) + gzip.compress(b"\x92")[:-5]),
        "gzip that was cut short",
    ),
    "zlib": (gzipped(zlib.compress(packed(*entries_of(3)))), "the entries are not gzip"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_gzip_is_neither_recorded_nor_acknowledged(
    name: str, agent: Agent, got: list[Received], caplog: pytest.LogCaptureFixture
) -> None:
    data, words = BROKEN[name]
    with connect(agent) as sock:
        sock.sendall(data)
        assert sock.recv(10) == b""
    assert not got
    (found,) = Decoder().feed(data)
    with pytest.raises(FrameError, match=words):
        _ = found.entries
    assert agent.counts.broken_streams == 1


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (packed(*entries_of(2))[:-1], "end in the middle"),
        (packed(*entries_of(2)) + b"\x05", "entry 2 must be an array"),
        (packed(*entries_of(2)) + b"\xc1", "not MessagePack"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_packed_entries_that_are_none(
    payload: bytes, words: str, compressed: bool, agent: Agent, got: list[Received], caplog: pytest.LogCaptureFixture
) -> None:
    """The good ones before it are kept, without an acknowledgement, and the stream ends: as in the Forward mode."""
    data = gzipped(gzip.compress(payload)) if compressed else frame(payload, {"chunk": "c"})
    with connect(agent) as sock:
        sock.sendall(data)
        assert sock.recv(10) == b""
    assert numbers_of(got) == list(range(2 if b"\xc1" in payload[-1:] or payload[-1:] == b"\x05" else 1))
    assert words in caplog.text


BOMB = gzip.compress(bytes(64 << 20))  # 64 MiB in 64 KiB


@pytest.mark.parametrize(
    "data",
    [
        BOMB,
        gzip.compress(bytes(1 << 20)) * 65,
        gzip.compress(b"\xdb\x04\x00\x00\x00" + bytes(64 << 20)),
        gzip.compress(b"\x92\x05\x81\xa1a\xdb\x04\x00\x00\x00" + bytes(64 << 20)),
    ],
    ids=["one member", "many members", "one value", "one entry"],
)
def test_a_bomb_is_bounded(data: bytes) -> None:
    (found,) = Decoder(max_frame_bytes=1 << 20).feed(gzipped(data))
    largest = 0
    with pytest.raises(FrameError, match=r"unpack to more than 1048576 bytes"):  # noqa: PT012
        for piece in found.pieces():
            largest = max(largest, len(piece))
    assert largest == 0, "nothing of it is handed over"


def test_a_compressed_entry_has_at_most_a_quarter_of_a_frame() -> None:
    """Many connections may hold one each, of a few kilobytes of gzip."""
    for size, is_longer in ((2 << 20) - 100, False), ((2 << 20) + (1 << 15), True):
        data = packed(*entries_of(1), [SECONDS, {"a": "x" * size}])
        (found,) = Decoder().feed(gzipped(gzip.compress(data)))
        (plain,) = Decoder().feed(frame(data))
        assert len(plain.entries) == 2
        if is_longer:
            with pytest.raises(FrameError, match="a compressed entry of more than 2097152 bytes"):
                _ = found.entries
        else:
            assert found.entries == plain.entries


def test_too_many_packed_entries() -> None:
    for compress in (bytes, gzip.compress):
        option = {} if compress is bytes else {"compressed": "gzip"}
        (found,) = Decoder().feed(frame(compress(packed([5, {}]) * 65537), option))
        with pytest.raises(FrameError, match="at most 65536 entries, has more"):
            _ = found.entries


@pytest.mark.parametrize(("signal", "words"), [(1, "must be logs, got metrics"), (2, "got traces"), (9, "got no logs")])
def test_metrics_and_traces_of_fluent_bit_are_refused(
    signal: int, words: str, agent: Agent, got: list[Received], refused: list[Refused]
) -> None:
    """The frame is refused, and the stream goes on."""
    with connect(agent) as sock:
        sock.sendall(frame(b"\x83whatever it is", {"fluent_signal": signal, "chunk": "m"}) + frame(entries_of(1)))
        eventually(lambda: got)
        assert msgpack.unpackb(sock.recv(100)) == {"ack": "m"}
    assert [str(each.error) for each in refused] == [words if words.startswith("must") else f"must be logs, {words}"]


# -- fluent-logger for Python ------------------------------------------------------------------------------------------


def fluent(kind: str) -> Any:
    module = "fluent.asyncsender" if kind == "async" else "fluent.sender"
    return pytest.importorskip(module, reason="needs fluent-logger, which the extra [test] brings")


@pytest.mark.parametrize("nanoseconds", [False, True])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_fluent_logger_for_python(kind: str, nanoseconds: bool) -> None:
    sender_class = fluent(kind).FluentSender
    with AuditAgent() as agent:
        sender = sender_class(TAG, host=f"unix://{agent.address}", nanosecond_precision=nanoseconds)
        try:
            for number in range(200):
                assert sender.emit(None, body(number)), sender.last_error
            sender.emit_with_time(None, SECONDS, body(200))
            sender.emit_with_time(None, SECONDS + 0.25, body(201))
            agent.wait_for(202)
        finally:
            sender.close()
    assert numbers_of(agent.received) == list(range(202))
    assert [each.time for each in agent.received[-2:]] == [SECONDS, SECONDS + 0.25]
    assert not agent.refused


def test_fluent_logger_for_python_that_cannot_pack_its_record() -> None:
    """The library sends a complaint in the record's place, which is refused."""
    sender_class = fluent("sync").FluentSender
    with AuditAgent() as agent:
        sender = sender_class(TAG, host=f"unix://{agent.address}")
        try:
            sender.emit(None, {"OperationName": object()})
            eventually(lambda: agent.refused)
        finally:
            sender.close()
    assert "OperationName: is required" in str(agent.refused[0].error)


# -- @fluent-org/logger for Node ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")
@pytest.mark.parametrize("acks", [False, True], ids=["without acks", "with acks"])
@pytest.mark.parametrize("milliseconds", [False, True], ids=["integers", "EventTime"])
@pytest.mark.parametrize("mode", ["Message", "Forward", "PackedForward", "CompressedPackedForward"])
def test_fluent_logger_for_node(
    mode: str, milliseconds: bool, acks: bool, node_modules: Callable[[], Path], agent: Agent, got: list[Received]
) -> None:
    options = {
        "socket": {"path": agent.address, "reconnectEnabled": False},
        "eventMode": mode,
        "milliseconds": milliseconds,
        **({"ack": {"ackTimeout": 20_000}} if acks else {}),
    }
    script = str(HERE / "fluent_client.js")
    arguments = [str(node_modules()), json.dumps(options), TAG, json.dumps(mapping(CustomData=None)), "100"]
    with subprocess.Popen(["node", script, *arguments], stderr=subprocess.PIPE) as process:
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    eventually(lambda: len(got) == 100)
    assert sorted(numbers_of(got)) == list(range(100))
    assert bool(agent.counts.acks) is acks
    assert {isinstance(each.time, float) for each in got} == {milliseconds}
