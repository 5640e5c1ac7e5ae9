"""Receivers that others wrote, to find the limit: it is the receiver if the receiver's core is all taken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from geventaudit import Client, DomainSocket

from .measure import Bound, Row, Samples, Spread, interleave, ratios
from .processes import ROOT, elsewhere, scheduling
from .records import FIRST, message

__all__ = ["fluent_bit", "fluent_logger_js"]

_VERSION = "1.0.10"
_BAR = Bound("at least", 0.95)  # all the time, but for the beginning and the end
_WARM_UP = 1000  # records for its compiler to see before those that count


def fluent_logger_js(rounds: int, records: int) -> list[Row]:
    """The server of the npm package @fluent-org/logger, fetched with npm and kept in the user's cache."""
    receiver = "@fluent-org/logger's server"
    if not (shutil.which("node") and shutil.which("npm")):
        return _missing(receiver, "node and npm are not here")
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / f"geventaudit-fluent-logger-{_VERSION}"
    if not (folder / "node_modules" / "@fluent-org" / "logger").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--silent", "--no-fund", "--no-audit", f"@fluent-org/logger@{_VERSION}"]
        if subprocess.call(install, cwd=folder, stdout=subprocess.DEVNULL):
            return _missing(receiver, "npm could not install it")
    script = str(Path(__file__).parent / "fluent_server.js")

    def serving(what_it_does: str) -> Callable[[str], list[str]]:
        return lambda path: ["node", script, str(folder / "node_modules"), path, what_it_does]

    return [
        _into(f"{receiver} writing JSON", serving("write"), rounds, records, counts=True, bar=_BAR),
        _into(f"{receiver} only counting", serving("count"), rounds, records, counts=True),
        _acknowledged(receiver, serving("count"), rounds, records),
    ]


def fluent_bit(rounds: int, records: int) -> list[Row]:
    """Fluent Bit's forward input, where the binary is on the PATH."""
    receiver = "Fluent Bit's forward input"
    binary = shutil.which("fluent-bit")
    if binary is None:
        return _missing(receiver, "there is no fluent-bit on the PATH")

    def command(path: str) -> list[str]:
        return [binary, "-q", "-i", "forward", "-p", f"unix_path={path}", "-o", "null", "-m", "*"]

    return [
        _into(receiver, command, rounds, records, counts=False, bar=_BAR),
        _acknowledged(receiver, command, rounds, records),
    ]


def _missing(receiver: str, reason: str) -> list[Row]:
    return [Row(f"core taken by {receiver}", None, bar=_BAR, aim=_BAR, note=reason)]


def _into(
    receiver: str,
    command: Callable[[str], list[str]],
    rounds: int,
    records: int,
    *,
    counts: bool,
    bar: Bound | None = None,
) -> Row:
    """Send to a receiver, and measure the parts of a core that its busiest thread and this process had.

    :param counts: the receiver prints its number of records on standard error when it is stopped.
    """
    samples: Samples = {"theirs": [], "ours": [], "rate": []}
    for number in range(rounds + 1):
        with _serving(command, counts) as (process, path):
            sample = _sample(process.pid, path, records)
            if counts:
                process.send_signal(signal.SIGTERM)
                got = int(process.communicate(timeout=60)[1])
                if got != _WARM_UP + records + 1:  # and one heartbeat
                    raise RuntimeError(f"{receiver}: {got} arrived, not {_WARM_UP + records + 1}")
        if number:  # the first does not count
            for name, value in sample.items():
                samples[name].append(value)
    return Row(
        f"core taken by {receiver}",
        Spread.of(samples["theirs"]),
        bar=bar,
        aim=bar,
        absolute={
            "geventaudit's core that is taken": Spread.of(samples["ours"]),
            "records/s": Spread.of(samples["rate"]),
        },
        note="time that its busiest thread ran, or was kept waiting by other processes, over wall time",
    )


def _acknowledged(receiver: str, command: Callable[[str], list[str]], rounds: int, records: int) -> Row:
    """Records per second until the last is delivered: acknowledged over not."""

    def rate(require_ack: bool) -> float:
        with ExitStack() as stack:
            _, path = stack.enter_context(_serving(command, counts=False))
            client = stack.enter_context(Client(lambda: DomainSocket(path, require_ack=require_ack)))
            _send(client, _WARM_UP)
            client.flush()
            start = time.perf_counter()
            _send(client, records)
            if not client.flush(60):
                raise RuntimeError(f"{receiver}: not all were delivered within a minute: {client.stats()}")
            return records / (time.perf_counter() - start)

    samples = interleave({"acknowledged": partial(rate, True), "not": partial(rate, False)}, rounds)
    return Row(
        f"records/s into {receiver}, acks over none",
        ratios(samples["acknowledged"], samples["not"]),
        bar=Bound("at least", 0.5),
        absolute={f"{name}, records/s": Spread.of(each) for name, each in samples.items()},
    )


def _sample(pid: int, path: str, records: int) -> dict[str, float]:
    """Return the parts of a core that the receiver's busiest thread and this process had, and records per second.

    The time ends when the last record is accepted: the client's look for its delivery is no part of the figure.
    """
    with Client(lambda: DomainSocket(path)) as client:
        _send(client, _WARM_UP)
        client.flush()
        theirs, ours = _threads(pid), _threads(os.getpid())
        start = time.perf_counter()
        _send(client, records)
        wall = time.perf_counter() - start
        return {
            "theirs": _busiest(pid, theirs) / wall,
            "ours": _busiest(os.getpid(), ours) / wall,
            "rate": records / wall,
        }


def _busiest(pid: int, before: dict[str, float]) -> float:
    """Seconds that the busiest thread of a process has had since."""
    return max(spent - before.get(thread, 0.0) for thread, spent in _threads(pid).items())


def _send(client: Client, records: int) -> None:
    for number in range(records):
        client.send(message(FIRST + number), timeout=None)


@contextmanager
def _serving(command: Callable[[str], list[str]], counts: bool) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with tempfile.TemporaryDirectory(prefix="ga-") as folder:
        path = f"{folder}/socket"
        process = subprocess.Popen(
            elsewhere(command(path)),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if counts else subprocess.DEVNULL,
            text=True,
        )
        with process:
            try:
                _wait_for(path, process)
                yield process, path
            finally:
                process.kill()


def _wait_for(path: str, process: subprocess.Popen[str], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
                return
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
        time.sleep(0.01)


def _threads(pid: int) -> dict[str, float]:
    """Seconds that each thread of a process has run or been kept from running."""
    spent = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        schedstat = os.open(thread / "schedstat", os.O_RDONLY)
        spent[thread.name] = sum(scheduling(schedstat))
        os.close(schedstat)
    return spent
