"""Packing that is entered again, that fails half-way, or that many threads share."""

from __future__ import annotations

import datetime as dt
import signal
import threading
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from helpers import message

from geventaudit import Client, DomainSocket
from geventaudit.encoder import encoding
from geventaudit.encoder.encoding import Encoder, Packed
from geventaudit.encoder.engine import Walker
from geventaudit.encoder.plan import plan_of
from geventaudit.protocol.decoding import Decoder, decode
from geventaudit.testing import AuditAgent

MOMENT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
TIME = 1717243200


class Zone(dt.tzinfo):
    """UTC with an action that runs when the offset is asked for: packing a datetime asks."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def utcoffset(self, moment: dt.datetime | None) -> dt.timedelta:
        self._act()
        return dt.timedelta(0)


def times(act: Callable[[], object]) -> dict[str, Any]:
    """Return custom data with three values; packing the second one runs *act*."""
    return {"a": MOMENT, "b": MOMENT.replace(tzinfo=Zone(act)), "c": MOMENT}


def by_a_call(act: Callable[[], object]) -> None:
    act()


def by_a_signal(act: Callable[[], object]) -> None:
    old = signal.signal(signal.SIGALRM, lambda *_: act())
    try:
        signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, old)


def by_a_finalizer(act: Callable[[], object]) -> None:
    class Goes:
        def __del__(self) -> None:
            act()

    Goes()


WAYS = pytest.mark.parametrize("interrupt", [by_a_call, by_a_signal, by_a_finalizer])


@WAYS
@pytest.mark.parametrize("datetimes", ["extension", "text"])
def test_encode_within_encode(interrupt: Callable[[Callable[[], object]], None], datetimes: Any) -> None:
    encoder, inner, depth = Encoder(datetimes=datetimes), list[bytes](), [0]

    def act() -> None:
        if depth[0] < 3:
            depth[0] += 1
            interrupt(lambda: inner.append(encoder.encode(message(custom_data=times(act)), TIME)))

    outer = encoder.encode(message(custom_data=times(act)), TIME)
    expected = Encoder(datetimes=datetimes).encode(message(custom_data={"a": MOMENT, "b": MOMENT, "c": MOMENT}), TIME)
    assert len(inner) == 3
    assert {outer, *inner} == {expected}


@WAYS
def test_a_walk_within_a_walk(interrupt: Callable[[Callable[[], object]], None]) -> None:
    """The pieces of the frame, and the caches, are as safe as the packing."""
    inner: list[bytes | None] = []

    def act() -> None:
        if len(inner) < 3:
            inner.append(None)
            number = len(inner)
            interrupt(lambda: inner.__setitem__(number - 1, frame_of(number)))

    def frame_of(number: int) -> bytes | None:
        custom = {**times(act), "n": number, "more": [times(act)] * 3}
        msg = message(operation_name=f"name {number}", custom_data=custom)
        return walker.frame_of(msg, TIME + number)

    encoder = Encoder()
    walker = Walker(plan_of(encoder), encoder)
    outer = frame_of(0)
    again = [frame_of(number) for number in range(4)]
    assert [outer, *inner] == again
    for number, frame in enumerate(again):
        assert frame is not None
        decoded, unix_time = decode(frame)
        assert (decoded.record.operation_name, unix_time) == (f"name {number}", TIME + number)  # type: ignore[union-attr]


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt, RecursionError, ZeroDivisionError, ValueError])
def test_the_next_frame_is_whole_after_an_exception(raised: type[BaseException]) -> None:
    def act() -> None:
        raise raised

    encoder = Encoder()
    for _ in range(3):
        with pytest.raises(raised):
            encoder.pack(times(act))
        assert encoder.pack({"a": MOMENT}) == msgpack.packb({"a": msgpack.Timestamp.from_datetime(MOMENT)})


def test_the_next_frame_is_whole_when_the_interrupted_one_goes_on_after_a_nested_failure() -> None:
    def act() -> None:
        with pytest.raises(MemoryError):
            encoder.pack({"n": MOMENT, **times(fail)})

    def fail() -> None:
        raise MemoryError

    encoder = Encoder()
    expected = Encoder().pack({"a": MOMENT, "b": MOMENT, "c": MOMENT})
    assert encoder.pack(times(act)) == expected
    assert encoder.pack(times(lambda: None)) == expected


def test_eight_threads_share_an_encoder() -> None:
    encoder = Encoder()
    walker = Walker(plan_of(encoder), encoder)
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def switch() -> None:
        passing.wait(0.0001)  # another thread runs while this one is in the middle of a frame

    passing = threading.Event()

    def work(thread: int) -> None:
        start.wait()
        for number in range(50):
            name = f"{thread}.{number}"
            custom = {"name": name, "many": [MOMENT] * 20}
            for frame in (
                encoder.encode(message(operation_name=name, custom_data={**custom, **times(switch)}), TIME),
                walker.frame_of(message(operation_name=name, custom_data=custom), TIME),
            ):
                assert frame is not None
                (one,) = Decoder().feed(frame)
                ((_, body, *_),) = one.entries
                if not body["OperationName"] == body["CustomData"]["name"] == name or one.option != encoding._OPTION:
                    wrong.append(name)

    def safely(thread: int) -> None:
        try:
            work(thread)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=safely, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert not wrong


def test_the_size_of_the_cache_survives_lost_counts() -> None:
    """A nested call between reading and writing a count would make the outer call write an old one."""

    class Interrupted(Packed):
        MAX_ENTRIES = 3
        RESET_AFTER_MISSES = 5
        fresh = iter(range(1000, 2000))
        nested = False

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_left" and not Interrupted.nested:  # has been read, and not been written back
                Interrupted.nested = True
                self[next(self.fresh)]
                Interrupted.nested = False
            return value

    packed = Interrupted(lambda value: str(value).encode())
    for value in range(500):
        assert packed[value] == str(value).encode()
        assert len(packed) <= 3


# -- the whole client --------------------------------------------------------------------------------------------------


@WAYS
def test_send_within_send(interrupt: Callable[[Callable[[], object]], None]) -> None:
    """Accepted records arrive, however a second send() comes into the first."""
    accepted: list[int] = []

    def act() -> None:
        if len(accepted) < 20:
            accepted.append(0)
            number = len(accepted)
            interrupt(lambda: client.send(message(custom_data={"n": number, **times(act)})))

    with AuditAgent() as agent:
        with Client(lambda: DomainSocket(agent.address), queue_size=1000) as client:
            client.send(message(custom_data={"n": 0, **times(act), "more": [times(act)] * 50}))
            assert client.flush(10)
            assert client.stats().connects == 1
        agent.wait_for(21)
        assert sorted(each.custom_data["n"] for each in agent.records) == list(range(21))
        assert not agent.refused
