"""The cost of geventaudit for its process: time of the hub, memory, and time to import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
from gevent.event import Event

from geventaudit import Client, Connection, DomainSocket, Spool

from .measure import Bound, Row, Samples, Spread, differences, interleave, percentile, ratios
from .processes import ROOT, module, scheduling
from .reader import Reader
from .records import FIRST, message

__all__ = ["disk_hold", "hub_hold", "import_time", "importing", "queue_memory", "queued"]


def hub_hold(rounds: int, seconds: float) -> list[Row]:
    """How long other greenlets wait for their turn under full load, less their wait for one that does not send.

    Many greenlets send a record each and let the others run, all the time. A ticker only lets the others run, and
    measures the time until its next turn: all of them, and the sender, had theirs in between. Time that the kernel gave
    to other processes meanwhile does not count; waiting in a system call does.
    """
    rows = []
    for number, bar, aim in (
        (100, Bound("at most", 1.0), Bound("at most", 0.5)),
        (1, Bound("at most", 2.0), Bound("at most", 1.0)),
    ):
        samples = _turns(number, rounds, seconds)
        rows.append(
            Row(
                f"hub held, 99.9th percentile, {number} sending",
                differences(samples["sending"], samples["idle"]),
                unit="ms",
                bar=bar,
                aim=aim,
                absolute={f"{name}, ms": Spread.of(each) for name, each in samples.items()},
                note="a whole turn of the loop: one send() of each greenlet, and one batch written",
            )
        )
    return rows


def _turns(number: int, rounds: int, seconds: float) -> Samples:
    with Reader() as reader, Client(lambda: DomainSocket(reader.path)) as client:
        return interleave(
            {
                "idle": partial(_turn, number, lambda msg: None, seconds),
                "sending": partial(_turn, number, partial(client.send, timeout=None), seconds),
            },
            rounds,
        )


def disk_hold(rounds: int, seconds: float) -> list[Row]:
    """How late a greenlet wakes up that sleeps a millisecond, while 5,000 records/s go to disk.

    ``always``: every record is written before ``send`` returns. ``overflow``: no agent takes them, so that all records
    beyond the queue go to disk.
    """

    def away() -> Connection:
        Event().wait()
        raise AssertionError("the event is never set")

    def late(wait: Callable[[], Connection], mode: Any = None) -> float:
        with tempfile.TemporaryDirectory(prefix="ga-") as folder:
            # Without a spool, the queue has to take all records, since no agent reads them.
            options: dict[str, Any] = (
                {"spool": Spool(f"{folder}/spool", mode=mode)} if mode else {"queue_size": 1 << 20}
            )
            client = Client(wait, **options)
            waits = _waits(50, client.send, seconds, pause=0.01, tick=0.001)
            client.close(0.0)
        return percentile(waits, 99.0)

    rows = []
    with Reader() as reader:

        def there() -> Connection:
            return DomainSocket(reader.path)

        for mode, wait in (("always", there), ("overflow", away)):
            samples = interleave({"without": partial(late, wait), "with": partial(late, wait, mode)}, rounds)
            rows.append(
                Row(
                    f"hub late with a spool, 99th percentile, {mode}",
                    Spread.of(samples["with"]),
                    unit="ms",
                    bar=Bound("at most", 5.0),
                    absolute={f"{name} a spool, ms": Spread.of(each) for name, each in samples.items()},
                    note="at 5,000 records/s from 50 greenlets; all that goes on in the hub together",
                )
            )
    return rows


def _turn(number: int, send: Callable[..., object], seconds: float) -> float:
    """The 99.9th percentile of the time between two turns of the ticker, in milliseconds."""
    return percentile(_waits(number, send, seconds, pause=0.0, tick=0.0), 99.9)


def _waits(number: int, send: Callable[..., object], seconds: float, *, pause: float, tick: float) -> list[float]:
    """Return the delay of each turn of the ticker, in milliseconds.

    :param number: greenlets that send.
    :param pause: seconds from one record of each of them to its next; 0 for as fast as it can.
    :param tick: seconds that the ticker wants to wait.
    """
    schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def clock() -> float:
        return time.perf_counter() - scheduling(schedstat).kept_waiting

    deadline = time.monotonic() + seconds

    def load() -> None:
        each = FIRST
        due = now = time.monotonic()
        while now < deadline:
            send(message(each))
            each += 1
            due += pause
            now = time.monotonic()
            gevent.sleep(max(due - now, 0))

    loads = [gevent.spawn(load) for _ in range(number)]
    waits = []
    gevent.sleep(0)
    last = clock()
    while time.monotonic() < deadline:
        gevent.sleep(tick)
        now = clock()
        waits.append((now - last - tick) * 1e3)
        last = now
    gevent.joinall(loads, raise_error=True)
    os.close(schedstat)
    return waits


def queue_memory(rounds: int, records: int) -> list[Row]:
    """Bytes that a queued record takes over the length of its frame, asked of Python and of the kernel."""
    samples = interleave(
        {
            "tracemalloc": partial(queued, "tracemalloc", records),
            # More of them: memory that was free before, in the allocator's hands, is taken first.
            "rss": partial(queued, "rss", records * 10),
        },
        rounds,
    )
    of_python = Spread.of(samples["tracemalloc"])
    of_kernel = Spread.of(samples["rss"])
    name = "memory per queued record over its frame"
    return [
        Row(
            f"{name}, by tracemalloc",
            of_python,
            bar=Bound("at most", 1.15),
            aim=Bound("at most", 1.1),
            note="what Python asked for",
        ),
        Row(
            f"{name}, by resident memory",
            of_kernel,
            note="what the kernel gave for it, in a process of its own, with the allocator's overhead",
        ),
    ]


def queued(kind: str, records: int) -> float:
    """Bytes that a queued record takes over the length of its frame, in a process of its own; see ``queued.py``."""
    return float(subprocess.check_output(module("queued", kind, str(records)), cwd=ROOT, text=True))


def import_time(rounds: int) -> list[Row]:
    """``import geventaudit`` over importing its dependencies, each in a fresh interpreter."""
    contenders = {"geventaudit": "geventaudit", "dependencies": "gevent, msgpack, marshmallow"}
    with tempfile.TemporaryDirectory(prefix="ga-") as cache:
        samples = interleave({name: partial(importing, modules, cache) for name, modules in contenders.items()}, rounds)
    return [
        Row(
            "import geventaudit over importing its dependencies",
            ratios(samples["geventaudit"], samples["dependencies"]),
            bar=Bound("at most", 1.15),
            aim=Bound("at most", 1.1),
            absolute={f"import {contenders[name]}, ms": Spread.of(each) for name, each in samples.items()},
        )
    ]


def importing(modules: str, cache: str) -> float:
    """Milliseconds, in a fresh interpreter, with byte code in the folder *cache* from the second time on.

    Otherwise an installed package would have byte code, and a checkout, where Python writes none, would not.
    """
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    program = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    return float(subprocess.check_output([sys.executable, "-c", program], text=True, env=environ)) * 1e3
