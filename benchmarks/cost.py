"""The cost of one ``send()`` for the greenlet that calls it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gevent
import msgpack
from gevent.event import Event

from geventaudit import Client, DomainSocket, MsgSchema, NoOp, RecordSchema, ValidationError

from .measure import Bound, Row, Samples, Spread, interleave, percentile, ratios
from .reader import Reader
from .records import CALLERS, FIRST, body, dated, frame_of, from_many, invalid, message, nested, sized, wire_form

__all__ = [
    "greenlets",
    "invalid_record",
    "pack_calls",
    "record_kinds",
    "record_size",
    "records_and_clients",
    "refusals",
    "send_calls",
    "sends_by",
    "valid_record",
]

_BLOCK = 1000  # records sent before the sender is let run; fewer than the queue holds


def each_call(function: Callable[[Any], object], arguments: Sequence[Any]) -> list[float]:
    """Seconds that each call takes, without those of looking at the clock."""
    clock = time.perf_counter
    durations = []
    for argument in arguments:
        start = clock()
        function(argument)
        durations.append(clock() - start)
    own = statistics.median(-clock() + clock() for _ in range(1000))
    return [max(each - own, 0.0) for each in durations]


def all_calls(function: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    """Seconds that a call takes, on average."""
    start = time.perf_counter()
    for argument in arguments:
        function(argument)
    return (time.perf_counter() - start) / len(arguments)


def send_calls(client: Client, messages: Sequence[Any]) -> float:
    """Return the mean seconds of one ``send``. The records are written afterwards, which is no part of the cost."""
    seconds = all_calls(client.send, messages)
    client.flush()
    return seconds


def pack_calls(forms: Sequence[Any]) -> float:
    """Seconds that one bare ``pack`` by a Packer that is kept takes, on average."""
    return all_calls(msgpack.Packer().pack, forms)


def valid_record(rounds: int, blocks: int) -> list[Row]:
    """``send()`` of a typical record over one bare pack: mean over mean, median over median, 99.9th percentile over
    median."""
    messages = [message(FIRST + number) for number in range(_BLOCK)]
    forms = [wire_form(msg) for msg in messages]
    pack = msgpack.Packer().pack
    sends: list[list[float]] = []
    packs: list[list[float]] = []

    def timed_sends() -> float:
        durations: list[float] = []
        for _ in range(blocks):
            durations += each_call(client.send, messages)
            client.flush()
        sends.append(durations)
        return statistics.mean(send_calls(client, messages) for _ in range(blocks))

    def timed_packs() -> float:
        packs.append([each for _ in range(blocks) for each in each_call(pack, forms)])
        return statistics.mean(all_calls(pack, forms) for _ in range(blocks))

    with Reader() as reader, Client(lambda: DomainSocket(reader.path)) as client:
        means = interleave({"send": timed_sends, "pack": timed_packs}, rounds)
    del sends[0], packs[0]  # the round that does not count
    medians = {"send": [statistics.median(each) for each in sends], "pack": [statistics.median(each) for each in packs]}
    rare = {"send": [percentile(each, 99.9) for each in sends], "pack": medians["pack"]}
    name = "send() over Packer.pack"
    bar, aim = Bound("at most", 0.6), Bound("at most", 0.35)
    return [
        _row(f"{name}, mean", means, "send", "pack", bar, aim),
        _row(f"{name}, median", medians, "send", "pack"),
        _row(f"{name}, 99.9th percentile over median", rare, "send", "pack"),
    ]


def invalid_record(rounds: int, blocks: int) -> list[Row]:
    """``send()`` of an invalid record over plain ``schema.load`` of it."""
    messages = [invalid(FIRST + number) for number in range(_BLOCK // 4)] * blocks
    schema = MsgSchema()
    client = Client(lambda: DomainSocket("/nothing is sent"))

    samples = interleave(
        {
            "send": partial(refusals, client.send, messages),
            "load": partial(refusals, schema.load, messages),
        },
        rounds,
    )
    client.close(0)
    name = "send() of an invalid record over schema.load"
    return [_row(name, samples, "send", "load", Bound("at most", 1.2), Bound("at most", 1.1))]


def refusals(function: Callable[[Any], object], messages: Sequence[Any]) -> float:
    """Seconds that *function* takes to refuse a message, on average."""

    def refused(msg: Any) -> None:
        try:
            function(msg)
        except ValidationError:
            return
        raise RuntimeError("an invalid record was accepted")

    return all_calls(refused, messages)


def greenlets(rounds: int, records: int) -> list[Row]:
    """``send()`` with many sending greenlets, all letting the others run after each record, over one bare pack."""
    numbers = [1, 100, 10_000]
    forms = [wire_form(message(FIRST + each)) for each in range(_BLOCK)]
    contenders: dict[str, Callable[[], float]] = {"pack": partial(pack_calls, forms)}
    samples = interleave(contenders | {str(each): partial(sends_by, each, records) for each in numbers}, rounds)
    bounds = {10_000: (Bound("at most", 1.0), Bound("at most", 0.6))}
    return [
        _row(f"send() over Packer.pack, {number:,} greenlets", samples, str(number), "pack", *bounds.get(number, ()))
        for number in numbers
    ]


def sends_by(number: int, records: int) -> float:
    """Seconds that one ``send`` takes, on average, when that many greenlets send in turn.

    The connection comes afterwards: the sender greenlet would have more to do for one greenlet than for many, which
    would distort the comparison.
    """
    gate = Event()
    messages = [message(FIRST + each) for each in range(records)]
    spent = 0.0

    def sending(mine: list[Any]) -> None:
        nonlocal spent
        clock = time.perf_counter
        for msg in mine:
            start = clock()
            client.send(msg)
            spent += clock() - start
            gevent.sleep(0)

    def connect() -> NoOp:
        gate.wait()
        return NoOp()

    with Client(connect, queue_size=records) as client:
        gevent.joinall([gevent.spawn(sending, messages[each::number]) for each in range(number)], raise_error=True)
        gate.set()
    return spent / records


def record_size(rounds: int, kib_in_all: int) -> list[Row]:
    """``send()`` over one bare pack, as the record grows."""
    sizes = [0.5, 2, 8, 64]
    rows = []
    with Reader() as reader, Client(lambda: DomainSocket(reader.path)) as client:
        contenders: dict[str, Callable[[], float]] = {}
        lengths = {}
        for kib in sizes:
            number = min(round(kib_in_all / kib), _BLOCK)
            messages = [sized(FIRST + each, kib) for each in range(number)]
            lengths[kib] = len(frame_of(messages[0]))
            contenders[f"send {kib}"] = partial(send_calls, client, messages)
            contenders[f"pack {kib}"] = partial(pack_calls, [wire_form(msg) for msg in messages])
        samples = interleave(contenders, rounds)
    for kib in sizes:
        name = f"send() over Packer.pack, {kib} KiB"
        row = _row(name, samples, f"send {kib}", f"pack {kib}")
        rows.append(Row(name, row.value, absolute=row.absolute, note=f"a frame of {lengths[kib]:,} bytes"))
    return rows


def record_kinds(rounds: int, blocks: int) -> list[Row]:
    """``send()`` over one bare pack, for records that are not as plain as the typical one."""
    kinds = {
        _CALLERS_IN_TURN: [from_many(FIRST + each) for each in range(CALLERS)],
        "a datetime and a UUID in custom data": [dated(FIRST + each) for each in range(_BLOCK)],
        "5 changes in custom data": [nested(FIRST + each, 5) for each in range(_BLOCK)],
        "100 changes in custom data": [nested(FIRST + each, 100) for each in range(_BLOCK // 10)],
    }
    lengths = {kind: len(frame_of(messages[0])) for kind, messages in kinds.items()}
    contenders: dict[str, Callable[[], float]] = {}
    with Reader() as reader, Client(lambda: DomainSocket(reader.path), queue_size=_BLOCK) as client:

        def sends(messages: list[Any]) -> float:
            """All callers in turn, a block at a time."""
            starts = range(0, min(blocks * _BLOCK, len(messages)), _BLOCK)
            return statistics.mean(send_calls(client, messages[start : start + _BLOCK]) for start in starts)

        for kind, messages in kinds.items():
            contenders[f"send {kind}"] = partial(sends, messages)
            contenders[f"pack {kind}"] = partial(pack_calls, [wire_form(msg) for msg in messages[:_BLOCK]])
        samples = interleave(contenders, rounds)
    rows = []
    for kind in kinds:
        bar, aim = _KIND_BOUNDS.get(kind, (None, None))
        row = _row(f"send() over Packer.pack, {kind}", samples, f"send {kind}", f"pack {kind}", bar, aim)
        rows.append(replace(row, note=f"a frame of {lengths[kind]:,} bytes"))
    return rows


def records_and_clients(rounds: int, number: int) -> list[Row]:
    """Building a ``Msg`` over building the equal dict; ``send()`` by a schema of one's own; and making a ``Client``."""

    class Own(RecordSchema):
        """A schema that changes nothing."""

    def build(make: Callable[[int], object]) -> float:
        return all_calls(make, range(FIRST, FIRST + number))

    def clients() -> float:
        start = time.perf_counter()
        made = [Client(NoOp) for _ in range(20)]
        seconds = (time.perf_counter() - start) / len(made)
        for client in made:
            client.close()
        return seconds

    messages = [message(FIRST + each) for each in range(100)]
    with Client(NoOp) as plain, Client(NoOp, schema=Own()) as own:
        samples = interleave(
            {
                "message": partial(build, message),
                "dict": partial(build, body),
                "own": partial(send_calls, own, messages),
                "plain": partial(send_calls, plain, messages),
                "client": clients,
            },
            rounds,
        )
    milliseconds = Spread.of(value * 1e3 for value in samples["client"])
    most = Bound("at most", 1.0)
    return [
        _row("building a Msg over building the equal dict", samples, "message", "dict", Bound("at most", 1.5), most),
        Row("making a Client", milliseconds, unit="ms", bar=most, aim=Bound("at most", 0.3)),
        _row("send() with a schema of one's own over without", samples, "own", "plain"),
    ]


_CALLERS_IN_TURN = f"{CALLERS:,} callers in turn"
_KIND_BOUNDS = {
    _CALLERS_IN_TURN: (Bound("at most", 0.6), Bound("at most", 0.4)),
    "a datetime and a UUID in custom data": (Bound("at most", 0.8), Bound("at most", 0.5)),
}


def _row(name: str, samples: Samples, over: str, under: str, bar: Bound | None = None, aim: Bound | None = None) -> Row:
    absolute = {f"{each}, us": Spread.of(value * 1e6 for value in samples[each]) for each in (over, under)}
    return Row(name, ratios(samples[over], samples[under]), bar=bar, aim=aim, absolute=absolute)
