"""Frames with stamps and seals: the compiled gate, both executors of the plan and marshmallow agree, byte by byte."""

from __future__ import annotations

import datetime as dt
import decimal
import gc
import math
import os
import resource
import signal
import sys
import uuid
from typing import Any
from unittest import mock

import gevent
import pytest
from helpers import SERVICE_TREE_ID, mapping, message, on_signal
from hypothesis import given
from hypothesis import strategies as st
from strategies import messages, mutated_messages
from test_reentrancy import broken, interrupted, of_3_11

from geventaudit import Backoff, Client, MsgSchema, QueueFullError, Seal, ValidationError
from geventaudit.encoder import engine, fallback
from geventaudit.encoder.draft import KEY, Draft
from geventaudit.encoder.encoding import Encoder
from geventaudit.encoder.plan import plan_of
from geventaudit.trail.chain import Chain
from geventaudit.trail.secret import Secret
from geventaudit.trail.stamp import draft_of, number_of, with_checkpoint, with_earlier

RULES = MsgSchema()
TIME = 1_700_000_000.123456
MASTER = bytes(range(32))
COMPILED = engine.Chain is not None
WALKERS: list[Any] = [fallback.Walker, engine.Walker] if COMPILED else [fallback.Walker]
is_compiled = pytest.mark.skipif(not COMPILED, reason="there is no compiled encoder here")


class Kind:
    """The encoder of one kind of client, with the executors of its plan."""

    def __init__(self, **options: Any) -> None:
        self.encoder = Encoder(is_stamped=True, **options)
        self.walkers = [walker(plan_of(self.encoder), self.encoder) for walker in WALKERS]

    def agree(self, msg: Any) -> Draft | None:
        """Compare; return the draft if all executors are sure."""
        drafts = [walker.frame_of(msg, TIME) for walker in self.walkers]
        if any(each is not None for each in drafts):
            frame = self.encoder.encode(RULES.load(msg), TIME)
            expected = draft_of(frame, TIME, is_sorted=self.encoder.is_sealed)
            for each in drafts:
                if each is not None:
                    assert each == expected
                    assert vars(each) == vars(expected)
        return drafts[-1] if all(each is not None for each in drafts) else None


STAMPED = Kind()
SEALED = Kind(service_tree_id=SERVICE_TREE_ID, is_sealed=True)
KINDS = [STAMPED, SEALED, Kind(json_safe=True), Kind(datetimes="text"), Kind(is_sealed=True, datetimes="text")]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["stamped", "sealed", "json safe", "text", "sealed, text"])


@given(st.sampled_from(KINDS), messages)
def test_messages(kind: Kind, msg: Any) -> None:
    try:
        kind.encoder.encode(RULES.load(msg), TIME)
    except ValidationError:  # sealed records cannot hold it, or JSON
        assert kind.agree(msg) is None
    else:
        kind.agree(msg)
        kind.agree(RULES.dump(msg))


@given(st.sampled_from(KINDS), mutated_messages())
def test_mutated_messages(kind: Kind, msg: Any) -> None:
    try:
        kind.encoder.encode(RULES.load(msg), TIME)
    except Exception:
        assert all(walker.frame_of(msg, TIME) is None for walker in kind.walkers)
    else:
        kind.agree(msg)


ZONE = dt.timezone(dt.timedelta(hours=5, minutes=30))
VALUES: list[Any] = [
    *(None, True, False, "", "é", "x" * 300, b"", b"\xff" * 40, [], (), {}, [1, [2.5, {"b": 1, "a": 2}]]),
    *(0, -1, -32, -33, 127, 128, 255, 256, 65535, 65536, 1 << 32, -(1 << 31), -(1 << 31) - 1),
    *((1 << 53) - 1, 1 << 53, -(1 << 53), 1 - (1 << 53), (1 << 63) - 1, -(1 << 63), 1 << 63, (1 << 64) - 1),
    *(0.0, -0.0, 1.0, 0.1, 1e16, 1e-7, 1e300, 5e-324, math.pi, 123456789.125),
    *(dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC), dt.datetime(1, 1, 1, 0, 0, 0, 7, tzinfo=dt.UTC)),
    *(dt.datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=dt.UTC), dt.datetime(2026, 1, 2, tzinfo=ZONE)),
    *(uuid.UUID(int=0), uuid.UUID(int=(1 << 128) - 1), decimal.Decimal("1.50"), {3, 1, 2}, frozenset({"b", "a"})),
]


@each_kind
def test_values(kind: Kind) -> None:
    for value in VALUES:
        deep = {"z": {"y": value, "b": [value, {"d": value, "c": value}]}, "A": value}
        for data in ({"a": value}, {"z": value}, deep):
            assert kind.agree(message(custom_data=data)) is not None, value


@pytest.mark.parametrize("kind", [STAMPED, SEALED], ids=["stamped", "sealed"])
def test_sizes_of_custom_data(kind: Kind) -> None:
    for size in (0, 1, 14, 15, 16, 31, 32, 33, 300, 5000):
        keys = [f"{n * 7919 % 99991}" for n in range(size)]
        draft = kind.agree(message(custom_data=dict.fromkeys(keys, 1)))
        assert draft is not None
        assert draft[draft.cut] == 0xC0


@each_kind
@pytest.mark.parametrize(
    "key", ["geventaudis", "geventaudiz", "geventaudi", "geventaudit2", "Geventaudit", "é", "\U0001f600"]
)
def test_keys_beside_the_reserved_one(kind: Kind, key: str) -> None:
    for data in ({key: 1}, {"z": 1, key: 2, "a": 3}, {key: {"geventaudit": 1}}, {"a": {key: 1, "geventaudit": 2}}):
        assert kind.agree(message(custom_data=data)) is not None


@each_kind
def test_the_reserved_key_is_left_to_the_slow_path(kind: Kind) -> None:
    for data in ({KEY: None}, {"a": 1, KEY: {}, "z": 1}, {KEY: 1, "d": decimal.Decimal(1)}):
        for msg in (message(custom_data=data), {"Type": "ControlPlane", "Record": mapping(CustomData=data)}):
            assert all(walker.frame_of(msg, TIME) is None for walker in kind.walkers)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {"a": {None: 1}}, {b"x": 1}])
def test_values_that_a_seal_refuses_take_the_slow_path(value: Any) -> None:
    msg = message(custom_data={"a": value})
    assert all(walker.frame_of(msg, TIME) is None for walker in SEALED.walkers)


def test_targets_of_a_sealed_record_are_sorted() -> None:
    targets = message().record.target_resources["SubscriptionId"]
    for kinds in ("ba", "ab", "é𐀀z", [f"{n * 7919 % 997}" for n in range(60)]):
        assert SEALED.agree(message(target_resources=dict.fromkeys(kinds, targets))) is not None
    assert SEALED.agree(message(target_resources={"b": targets, " ": targets})) is None


# -- numbers and keys --------------------------------------------------------------------------------------------------


def drafts(kind: Kind) -> list[Draft]:
    frame = kind.encoder.encode(message(custom_data={"a": 1, "z": "x" * 3000}), 1.0)
    made = [draft_of(frame, each, is_sorted=kind is SEALED) for each in (0.0, 1.5, 0.9999995, 1e9 + 0.1, TIME)]
    made += [with_earlier(draft_of(frame, TIME, is_sorted=kind is SEALED), [["ab", 5]])]
    return [*made, with_checkpoint(draft_of(frame, TIME, is_sorted=kind is SEALED), {"kind": "open"})]


@is_compiled
@pytest.mark.parametrize("kind", [STAMPED, SEALED], ids=["stamped", "sealed"])
def test_both_chains_agree(kind: Kind) -> None:
    key = None if kind is STAMPED else Secret(MASTER)
    both: list[Any] = [Chain("ab" * 16, key), engine.Chain("ab" * 16, key)]
    made = drafts(kind)
    for number in range(66_000):
        if number in (0, 1, 126, 127, 254, 255, 65_534, 65_535):
            for draft in made:
                assert both[0].frame_of(draft) == both[1].frame_of(draft)
            assert number_of(both[1].frame_of(made[-1])[0]) == ("ab" * 16, number + 1)
        for chain in both:
            before = chain.state
            chain.state = chain.following()
            if number == 1:
                chain.state = before
                chain.state = chain.following()
        assert both[0].number == both[1].number == number + 1


@is_compiled
def test_a_compiled_chain_shows_no_key() -> None:
    chain: Any = engine.Chain("ab" * 16, Secret(MASTER))
    for each in (chain, chain.state, chain.following()):
        assert repr(each) == "<secret>"
        with pytest.raises(TypeError):
            each.__reduce_ex__(4)
    assert not {"key", "next_key"} & set(dir(chain))


# -- the gate ----------------------------------------------------------------------------------------------------------


def client_of(sealed: bool, **options: Any) -> Client:
    seal = {"seal": Seal(key=MASTER)} if sealed else {"stamp": True}
    return Client(broken, backoff=Backoff(1000, 1000), **seal, **options)


def queued(client: Client) -> list[bytes]:
    outbox: Any = client._life.outbox
    return [frame for _, _, frame in outbox.window] + list(outbox.queue.queue)


@is_compiled
@pytest.mark.parametrize("sealed", [False, True])
def test_the_gate_and_the_slow_path_write_the_same(sealed: bool) -> None:
    salt = mock.patch("secrets.token_bytes", lambda size: bytes(size))
    name = mock.patch("secrets.token_hex", lambda size: "ab" * size)
    frames = []
    for fast in (True, False):
        with salt, name, mock.patch("time.time", return_value=TIME), client_of(sealed) as client:
            if not fast:
                client._gate = None
            for number in range(300):
                client.send(message(number, operation_name="x" * (number * 20 + 1)))
                client.send({"Type": "DataPlane", "Record": mapping(CustomData=None)})
            frames.append(queued(client))
            client.close(0.0)
    assert frames[0] == frames[1]
    assert [number_of(frame)[1] for frame in frames[0]] == list(range(1, 601 + sealed))  # type: ignore[index]


@pytest.mark.parametrize("sealed", [False, True])
def test_a_full_queue_uses_no_number(sealed: bool) -> None:
    with client_of(sealed, queue_size=3) as client:
        for number in range(10):
            try:
                client.send(message(number))
            except QueueFullError:
                assert number >= 3
        outbox: Any = client._life.outbox
        assert outbox.chain.number == 3 + sealed
        client.close(0.0)


@of_3_11
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_send_at_every_bytecode_of_send(gate: bool, sealed: bool) -> None:
    """Each record has a number of its own, wherever a signal handler sends."""
    at, more = 0, True
    while more:
        client = client_of(sealed)
        client.send(message(0))
        if not gate:
            client._gate = None
        more = interrupted(lambda: client.send(message(1)), at, lambda: client.send(message(2)))  # noqa: B023
        outbox: Any = client._life.outbox
        outbox.move_inbox()
        numbers = sorted(number_of(frame)[1] for frame in queued(client))  # type: ignore[index]
        assert numbers == list(range(1, 3 + sealed + more))
        assert len(client.close(0.0)) == 2 + more
        at += 5
    assert at > 50 or gate


@pytest.mark.parametrize("sealed", [False, True])
def test_memory_does_not_grow(sealed: bool) -> None:
    """A million records with ``GEVENTAUDIT_LEAK=1000000``."""
    records = int(os.environ.get("GEVENTAUDIT_LEAK", "40000" if COMPILED else "10000"))
    good = [message(number) for number in range(90)]
    good += [message(custom_data={"f": 1.5, "d": dt.datetime.now(dt.UTC), "b": b"x", "n": {"z": 1, "a": [1]}})] * 5
    good += [message(custom_data={str(n): n for n in range(60)}), message(operation_name="x" * 5000)]
    bad = [message(custom_data={KEY: 1}), message(operation_name="")]
    with client_of(sealed, queue_size=200) as client:
        outbox: Any = None

        def send(rounds: int) -> int:
            nonlocal outbox
            for _ in range(rounds):
                for msg in good:
                    client.send(msg)
                for msg in bad:
                    with pytest.raises(ValidationError):
                        client.send(msg)
                outbox = client._life.outbox
                outbox.queue.queue.clear()
            gc.collect()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        before = send(100)
        blocks = sys.getallocatedblocks()
        after = send(records // len(good))
        assert sys.getallocatedblocks() - blocks < 2000
        assert after - before < 4096, "KiB"
        outbox.queue.queue.clear()
        outbox.window.clear()
        client.close(0.0)


def test_a_handler_that_sends_while_a_record_is_put() -> None:
    """Its record has its number and its place when the interrupted send() returns, without another one."""
    client = client_of(False)
    client.send(message(0))
    client._gate = None  # no handler can interrupt the compiled one
    outbox: Any = client._life.outbox
    put = outbox._put_now

    def interrupted(frame: bytes) -> None:
        outbox._put_now = put
        client.send(message(2))
        put(frame)

    outbox._put_now = interrupted
    client.send(message(1))
    assert [number_of(frame)[1] for frame in queued(client)] == [1, 2, 3]  # type: ignore[index]
    client.close(0.0)


@pytest.mark.parametrize("sealed", [False, True])
def test_handlers_that_send_in_the_gate(sealed: bool) -> None:
    client = client_of(sealed, queue_size=100_000)
    nested: list[None] = []

    def send() -> None:
        if len(nested) < 500:
            client.send(message(1))
            nested.append(None)

    with on_signal(send):
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        for number in range(1500):
            client.send(message(number))
            if number % 100 == 0:
                gevent.sleep(0)
    numbers = [number_of(frame)[1] for frame in queued(client)]  # type: ignore[index]
    assert numbers == list(range(1, 1501 + len(nested) + sealed)), "in the order of the queue"
    client.close(0.0)
