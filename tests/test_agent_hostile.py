"""Hostile and strange senders, and their cost for the agent and for others."""

from __future__ import annotations

import gzip
import logging
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import marshmallow
import msgpack
import pytest
from gevent import socket, subprocess
from helpers import SERVICE_TREE_ID, eventually, mapping, message, once

from geventaudit import Backoff, Client, DomainSocket, Heartbeat, Msg, MsgSchema, RecordSchema, ValidationError
from geventaudit.agent import Agent, Received, Refused
from geventaudit.errors import show
from geventaudit.schema.rules import Text

HEAD = b"\x93\xaaAsmAuditCP\x91\x92\x05"
CHUNK = b"\x81\xa5chunk\xa1c"
ACK = msgpack.packb({"ack": "c"})


def connect(agent: Agent) -> Any:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(agent.address)
    return sock


def frame(body: Any, tag: str = "AsmAuditCP", option: bytes = CHUNK) -> bytes:
    packed = body if isinstance(body, bytes) else msgpack.packb(body, unicode_errors="surrogateescape")
    return b"\x93" + msgpack.packb(tag) + b"\x91\x92\x05" + packed + option


def good(number: int = 1) -> bytes:
    return frame(mapping(CustomData={"n": number}), option=b"\x80")


# -- strange senders, and their cost -----------------------------------------------------------------------------------


def test_a_heartbeat_of_the_reference_without_its_service(agent: Agent, got: list[Received]) -> None:
    """As v0.2.2 of the Go reference sends it."""
    beat = {"AuditVersion": "0.2.2", "OsVersion": "6.1", "Language": "go1.22", "Destination": "UnixDomainSocket"}
    with connect(agent) as sock:
        sock.sendall(frame(beat, "AsmAuditHB"))
        assert sock.recv(100) == ACK
    assert got[0].message == Heartbeat("", "0.2.2", "6.1", "go1.22", "UnixDomainSocket")


@pytest.mark.parametrize("value", [5, None, [], {}, b"x", True, msgpack.ExtType(1, b"x"), "\udcff"], ids=repr)
@pytest.mark.parametrize("name", ["AsmAuditServiceId", "AuditVersion", "OsVersion", "Language", "Destination"])
def test_a_heartbeat_of_something_else_than_text(
    name: str, value: Any, agent: Agent, got: list[Received], refused: list[Refused]
) -> None:
    beat = dict.fromkeys(("AsmAuditServiceId", "AuditVersion", "OsVersion", "Language", "Destination"), "x")
    with connect(agent) as sock:
        sock.sendall(frame({**beat, name: value}, "AsmAuditHB"))
        assert sock.recv(100) == ACK
    assert not got
    assert str(refused[0].error).startswith(f"{name} must be text")


BAD = {
    "text that is not UTF-8": (mapping(OperationName="x\udcff"), "OperationName: must be text that UTF-8 can write"),
    "text deep below": (mapping(CustomData={"a": [{"b": "\udcff"}]}), "CustomData.a[0].b: must be text that UTF-8"),
    "a key that is not UTF-8": (mapping(CustomData={"a": {"\udcff": 1}}), "must be text that UTF-8 can write"),
    "a field's name that is not UTF-8": ({**mapping(), "\udcff": 1}, "must be text that UTF-8 can write"),
    "a surrogate in CESU-8": (mapping(CallerAgent="\udced\udca0\udc80"), "CallerAgent: must be text that UTF-8"),
    "a timestamp as a key": (
        mapping(CustomData={"a": {msgpack.Timestamp(5): 1}}),
        "the keys of a map must be text or numbers, got Timestamp",
    ),
    "an extension as a key": (mapping(CustomData={msgpack.ExtType(5, b"x"): 1}), "text or numbers, got ExtType"),
    "an array as a key": (frame({}).replace(b"\x80", b"\x81\x91\x01\x02", 1), "text or numbers, got [1]"),
    "a map as a key": (frame({}).replace(b"\x80", b"\x81\x81\x01\x02\x03", 1), "text or numbers, got {1: 2}"),
    "a key twice": (frame({}).replace(b"\x80", b"\x82\xa1a\x01\xa1a\x02", 1), "a map has the key 'a' twice"),
    "4097 numbers as keys": (mapping(CustomData={"a": dict.fromkeys(range(4097))}), "at most 4096 numbers as keys"),
    "numbers as keys of many maps": (
        mapping(CustomData={"a": [dict.fromkeys(range(1000)) for _ in range(5)]}),
        "at most 4096 numbers as keys",
    ),
    "an extra key that cannot be carried": (
        {**mapping(), "Extra": {"a": msgpack.Timestamp(1 << 33, 0), 5: "\udcff"}},
        "must be text that UTF-8 can write",
    ),
    "a number as a field's name": ({**mapping(), 5: 1}, "must have text as its key, got 5"),
    "a nil service": ({**mapping(), "env_ikey": 5}, "env_ikey: the service tree id must be a UUID"),
    "too many fields": ({**mapping(), **{f"k{n}": n for n in range(1000)}}, "must have the fields of a record"),
    "deeper than 64 levels": (
        frame(mapping(CustomData={"a": 0})).replace(b"\x81\xa1a\x00", b"\x81\xa1a" + b"\x91" * 70 + b"\x00"),
        "must not be nested deeper than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_an_invalid_record_costs_only_that_record(
    kind: str, agent: Agent, got: list[Received], refused: list[Refused]
) -> None:
    """The connection and the other records of its frame are not affected."""
    body, words = BAD[kind]
    data = body if isinstance(body, bytes) and body.startswith(HEAD) else frame(body)
    with connect(agent) as sock:
        sock.sendall(good(1) + data + good(2))
        assert sock.recv(100) == ACK, "the agent has it, and it is told"
        eventually(lambda: len(got) == 2)
    assert len(refused) == 1
    assert words in str(refused[0].error)
    assert isinstance(refused[0].body, dict)
    assert agent.counts.broken_streams == 0


@pytest.mark.parametrize("numbers", [[1, 1.0], [1, True], [0, False], [0.0, -0.0]], ids=repr)
def test_keys_that_python_takes_for_one(numbers: list[Any], agent: Agent, refused: list[Refused]) -> None:
    pairs = b"".join(msgpack.packb(number) + b"\x01" for number in numbers)
    data = frame(mapping(CustomData={"m": 0})).replace(b"\xa1m\x00", b"\xa1m\x82" + pairs)
    with connect(agent) as sock:
        sock.sendall(data)
        assert sock.recv(100) == ACK
    assert "twice" in str(refused[0].error)


def test_keys_that_clients_send(socket_path: str, got: list[Received], refused: list[Refused]) -> None:
    """The agent takes all keys that send() accepts."""
    keys = {1: "a", "1": "b", 1.5: "c", b"x": "d", None: "e", False: "f", -(2**63): "g", 2**64 - 1: "h"}
    with Agent(socket_path, got.append, on_refused=refused.append), Client(lambda: DomainSocket(socket_path)) as client:
        client.send(message(custom_data={"m": keys, "many": {n: n for n in range(4000)}}))
        client.send(message(custom_data={"l": [[]] * 100_000, "d": {str(n): n for n in range(10_000)}}))
        assert client.flush(30)
        eventually(lambda: len(got) == 3)
    assert not refused
    assert got[0].message.record.custom_data["m"] == keys  # type: ignore[union-attr]


def test_keys_beside_those_of_a_message_are_kept(agent: Agent, got: list[Received], refused: list[Refused]) -> None:
    """As the filters of examples/agents/fluent-bit.yaml add them."""
    beat = dict.fromkeys(("AuditVersion", "OsVersion", "Language", "Destination"), "x")
    with connect(agent) as sock:
        sock.sendall(
            frame({**mapping(), "env_ikey": SERVICE_TREE_ID, "AuditType": "ControlPlane", "Extra": {"a": [1]}})
            + frame({**mapping(), "AuditType": "DataPlane"}, "AsmAuditDP")
            + frame({**beat, "AuditType": "Heartbeat"}, "AsmAuditHB")
            + frame({"AuditType": "Diagnostic", "why": "x"}, "AsmAuditDG")
        )
        eventually(lambda: len(got) == 4)
    assert not refused
    assert [each.extra for each in got] == [
        {"AuditType": "ControlPlane", "Extra": {"a": [1]}},
        {"AuditType": "DataPlane"},
        {"AuditType": "Heartbeat"},
        {"AuditType": "Diagnostic", "why": "x"},
    ]
    assert got[0].service_tree_id == SERVICE_TREE_ID


def test_a_schema_with_names_of_its_own(socket_path: str, got: list[Received]) -> None:
    class Renamed(RecordSchema):
        caller_agent = Text(required=True, data_key="Agent")

    body = {**mapping(CallerAgent=None), "Agent": "a", "CallerAgent": "extra"}
    with Agent(socket_path, got.append, schema=Renamed()) as agent, connect(agent) as sock:
        sock.sendall(frame(body))
        assert sock.recv(100) == ACK
    assert got[0].message.record.caller_agent == "a"  # type: ignore[union-attr]
    assert got[0].extra == {"CallerAgent": "extra"}


def test_a_schema_that_raises_closes_without_an_ack(socket_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """For small records and for those that are validated in a thread."""

    class Broken(RecordSchema):
        @marshmallow.validates("operation_name")
        def _broken(self, value: str, **kwargs: Any) -> None:
            raise ZeroDivisionError("broken")

    for size in (1, 100_000):
        with Agent(socket_path, print, schema=Broken()) as agent, connect(agent) as sock:
            sock.sendall(frame(mapping(CallerAgent="x" * size)))
            assert sock.recv(100) == b""
    assert caplog.text.count("ZeroDivisionError: broken") == 2


# -- errors end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"TargetResources": {"a": [{}] * 100_000}},
        {"TargetResources": {str(n): [{}] for n in range(10_000)}},
        {"TargetResources": {" " * n: [{}, {}] for n in range(1, 500)}},
        {"TargetResources": {"a": [{"Name": 1, "Cluster": 1, "DataCenter": 1, "Region": 1}] * 1000}},
        {"CallerIdentities": {"UPN": [{}] * 100_000}},
        {"CallerAccessLevels": [0] * 100_000},
        {"OperationCategories": [0] * 100_000},
        {"CustomData": {"a": ["\udcff"] * 100_000}},
        {"CustomData": {"a": {"\udcff" * n: 1 for n in range(1, 1000)}}},
        {"CustomData": {f"\udcff{n}": 1 for n in range(1000)}},
    ],
)
def test_validation_stops_after_a_hundred_errors(changes: dict[str, Any]) -> None:
    began = time.process_time()
    with pytest.raises(ValidationError) as caught:
        MsgSchema().load({"Type": "ControlPlane", "Record": mapping(**changes)})
    assert time.process_time() - began < 1
    assert 100 <= str(caught.value).count(": ") <= 120


def test_an_error_about_a_huge_map_is_cheap() -> None:
    huge = {f"k{n * 7919 % 100_003}": n for n in range(100_000)}
    began = time.process_time()
    for _ in range(100):
        assert show(huge) == "{'k0': 0, 'k7919': 1, 'k15838': 2, 'k23757': 3, ...}"
    assert time.process_time() - began < 0.5
    assert show([{}, {1: {2: 3}}]) == "[{}, {1: {2: 3}}]"
    assert show({1: {2: {3: {4: {5: {6: {7: 8}}}}}}}) == "{1: {2: {3: {4: {5: {6: {...}}}}}}}"


def test_a_long_name_in_a_path_is_cut() -> None:
    with pytest.raises(ValidationError) as caught:
        MsgSchema().load({"Type": "ControlPlane", "Record": {**mapping(), "a" * 100_000: 1}})
    assert len(str(caught.value)) < 200


# -- the hub -----------------------------------------------------------------------------------------------------------


def equal_hashes(count: int) -> bytes:
    """Timestamps with one hash, as keys of a map."""
    most, p1, p2, p5 = 1 << 64, 11400714785074694791, 14029467366897019727, 2870177450012600261
    i1, i2 = pow(p1, -1, most), pow(p2, -1, most)
    found: list[bytes] = []
    nanoseconds = 0
    while len(found) < count:
        turned = (12345 - nanoseconds * p2) * i1 % most
        seconds = (((turned >> 31) | (turned << 33)) % most - p5) * i2 % most
        if seconds < (1 << 61) - 1:
            found.append(b"\xc7\x0c\xff" + struct.pack(">Iq", nanoseconds, seconds) + b"\xc0")
        nanoseconds += 1
    return b"".join(found)


def custom(packed: bytes) -> bytes:
    return frame(b"\x81\xaaCustomData" + packed)


def targets(packed: bytes) -> bytes:
    return frame(b"\x81\xafTargetResources" + packed)


def array(count: int, item: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + item * count


HOSTILE: dict[str, Callable[[], bytes]] = {
    "keys with equal hashes": lambda: custom(b"\xdf\x00\x00\x0f\xa0" + equal_hashes(4000)),
    "empty targets": lambda: targets(b"\x81\xa1a" + array(50_000, b"\x80")),
    "empty targets in groups": lambda: targets(
        b"\xdf\x00\x00\x13\x88"
        + b"".join(msgpack.packb(str(n)) + b"\x9a" + b"\x80" * 10 for n in range(5000))
    ),
    "valid targets": lambda: frame(mapping(TargetResources={"a": [{"Name": "x"}] * 400})) * 4,
    "many valid targets": lambda: frame(mapping(TargetResources={"a": [{"Name": "x"}] * 50_000})),
    "many values": lambda: frame(mapping(CustomData={"a": [[]] * 131_000})),
    "valid records": lambda: good() * 100,
    "frames of nothing": lambda: b"\x92\xa1t\x90" * 20_000,
    "acknowledged frames of nothing": lambda: b"\x93\xa1t\x90" + CHUNK,
    "refused entries": lambda: b"\x92\xaaAsmAuditCP\xdc\xff\xff" + b"\x92\x05\x80" * 65_535,
    "refused frames": lambda: b"\x92\xaaAsmAuditCP\x91\x92\x05\x80" * 5000,
    "a bomb": lambda: msgpack.packb(["AsmAuditCP", gzip.compress(bytes(8 << 20)), {"compressed": "gzip"}]),
    "members of nothing": lambda: msgpack.packb(["AsmAuditCP", gzip.compress(b"") * 50_000, {"compressed": "gzip"}]),
    "a large option": lambda: msgpack.packb(["AsmAuditCP", [], {"a": [[]] * 131_000}]),
    "numbers as keys": lambda: frame(mapping(CustomData={"m": {n << 17: 0 for n in range(4000)}})),
    "unfinished frames": lambda: HEAD + b"\xdb\x00\x70\x00\x00" + b"x" * (6 << 20),
    "garbage": lambda: random.Random(1).randbytes(65536),
}  # fmt: skip
AGENT = """
import logging, sys, gevent
from geventaudit.agent import Agent
logging.disable()
with Agent(sys.argv[1], lambda received: None):
    print("listening", flush=True)
    while True:
        gevent.sleep(1)
"""
PEERS = """
import socket, sys, threading, time

def peer():
    while True:
        try:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(sys.argv[1])
            threading.Thread(target=drain, args=(sock,), daemon=True).start()
            while True:
                sock.sendall(data)
        except OSError:
            time.sleep(0.01)

def drain(sock):
    try:
        while sock.recv(65536):
            pass
    except OSError:
        pass

data = sys.stdin.buffer.read()
for _ in range(20):
    threading.Thread(target=peer, daemon=True).start()
time.sleep(60)
"""


@once
@pytest.mark.parametrize("kind", HOSTILE)
def test_an_honest_sender_among_twenty_hostile_ones(kind: str, socket_path: str) -> None:
    """Each of its acknowledgements comes before the agent has worked for half a second. A busy machine may take longer
    for that, by a clock on the wall."""
    with (
        subprocess.Popen([sys.executable, "-c", AGENT, socket_path], stdout=subprocess.PIPE) as agent,
        subprocess.Popen([sys.executable, "-c", PEERS, socket_path], stdin=subprocess.PIPE) as peers,
    ):
        try:
            assert agent.stdout.readline() == b"listening\n"
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(60)
                sock.connect(socket_path)
                peers.stdin.write(HOSTILE[kind]())
                peers.stdin.close()
                gevent.sleep(0.3)
                longest = max(ack_seconds(sock, agent.pid) for _ in range(20))
            assert longest < 0.5
            assert agent.poll() is None
        finally:
            peers.kill()
            agent.kill()


def ack_seconds(sock: Any, process: int) -> float:
    """Return the seconds of processor time that *process* takes, all its threads together, until it acknowledges."""
    began = processor_seconds(process)
    sock.sendall(frame(mapping()))
    assert sock.recv(100) == ACK
    ended = processor_seconds(process)
    gevent.sleep(0.02)
    return ended - began


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_large_record_is_unpacked_in_a_thread(agent: Agent, got: list[Received]) -> None:
    """Meanwhile the hub goes on: also for a valid one that takes long. The hub's thread works for little of that."""
    turns = 0
    hub_began, began = time.thread_time(), time.process_time()
    with connect(agent) as sock:
        sock.sendall(frame(mapping(TargetResources={"a": [{"Name": "x"}] * 100_000})))
        while not got:
            gevent.sleep(0.001)
            turns += 1
    assert turns > 10
    assert time.thread_time() - hub_began < (time.process_time() - began) / 2


def test_the_connection_that_holds_most_is_closed(
    socket_path: str, got: list[Received], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent does not close the connection that happens to be the next."""
    monkeypatch.setattr("geventaudit.agent.server.MAX_UNFINISHED_BYTES", 1 << 20)
    with Agent(socket_path, got.append) as agent, connect(agent) as large, connect(agent) as honest:
        large.sendall(HEAD + b"\xdb\x00\x70\x00\x00" + b"x" * ((1 << 20) - 2000))
        eventually(lambda: agent.counts.bytes > (1 << 20) - 2000)
        data = frame(mapping(CustomData={"text": "x" * 4000}))
        honest.sendall(data[:-10])
        assert large.recv(1) == b""
        honest.sendall(data[-10:])
        assert honest.recv(100) == ACK
    assert len(got) == 1
    assert caplog.text.count("unfinished frames of more than 1048576 bytes") == 1


# -- connections that do nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_an_idle_connection_is_closed(
    kind: str, socket_path: str, got: list[Received], caplog: pytest.LogCaptureFixture
) -> None:
    address: Any = socket_path if kind == "unix" else ("127.0.0.1", 0)
    with caplog.at_level(logging.INFO), Agent(address, got.append, idle_timeout=0.1) as agent:
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        with socket.socket(family) as sock, socket.socket(family) as silent:
            for each in (sock, silent):
                each.settimeout(20)
                each.connect(agent.address)
            for number in range(5):
                sock.sendall(good(number))
                gevent.sleep(0.03)
            assert sock.recv(1) == b""
            assert silent.recv(1) == b""
            if kind == "tcp":  # a message that is written before the end is noticed is not lost
                sock.sendall(good(5))
        eventually(lambda: agent.counts.open_connections == 0)
        assert agent.counts.idle == 2
    assert len(got) == (6 if kind == "tcp" else 5)
    assert "no data for 0.1 seconds" in caplog.text
    assert agent.counts.turned_away == agent.counts.broken_streams == 0


def test_a_stalled_frame_is_not_idle(socket_path: str) -> None:
    with Agent(socket_path, print, idle_timeout=0.05, stall_timeout=0.4) as agent, connect(agent) as sock:
        began = time.monotonic()
        sock.sendall(good()[:20])
        assert sock.recv(1) == b""
        assert time.monotonic() - began > 0.3
        assert (agent.counts.idle, agent.counts.turned_away) == (0, 1)


def test_a_client_comes_back_after_it_was_idle(socket_path: str, got: list[Received]) -> None:
    with (
        Agent(socket_path, got.append, idle_timeout=0.1) as agent,
        Client(lambda: DomainSocket(socket_path, require_ack=True), backoff=Backoff(0.01, 0.1)) as client,
    ):
        client.send(message(1))
        eventually(lambda: agent.counts.idle == 1)
        client.send(message(2))
        assert client.flush(20)
    records = [each.message.record.custom_data for each in got if isinstance(each.message, Msg)]
    assert records == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", True])
def test_an_idle_timeout_that_cannot_be(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^idle_timeout must be a number of seconds above 0, or None"):
        Agent("unused", print, idle_timeout=value)


@once
def test_sigpipe_at_its_default_does_not_end_the_agent(socket_path: str, folder: Path) -> None:
    """For acknowledgements and for the handshake."""
    program = (
        "import signal, sys, gevent\n"
        "from geventaudit.agent import Agent\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "with Agent(sys.argv[1], lambda received: None), Agent(sys.argv[2], print, shared_key='x'):\n"
        "    print('listening', flush=True)\n"
        "    while True: gevent.sleep(1)\n"
    )
    locked = str(folder / "locked.sock")
    with subprocess.Popen([sys.executable, "-c", program, socket_path, locked], stdout=subprocess.PIPE) as agent:
        try:
            assert agent.stdout.readline() == b"listening\n"
            for path in (socket_path, locked) * 20:
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(path)
                sock.sendall(frame(mapping()) * 20)
                sock.close()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(20)
                sock.connect(socket_path)
                sock.sendall(frame(mapping()))
                assert sock.recv(100) == ACK
            assert agent.poll() is None
        finally:
            agent.kill()
        assert agent.wait(30) == -signal.SIGKILL
