"""A long trail through all kinds of faults, and its verification by ``geventaudit verify``.

``python -m benchmarks.trail [--records 1000000] [--restarts 8] [--seal] [--folder FOLDER]`` sends stamped records from
processes that fork, and from one with a spool that is killed, to an agent that is restarted meanwhile and writes JSON
lines: Fluent Bit if ``FLUENT_BIT`` names its binary, otherwise ``geventaudit listen``. Then it verifies the trail as it
is, with copies injected, and with a record removed, and compares the numbers with its own count of the lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import gevent.os

from geventaudit import Backoff, Client, DomainSocket, Seal, Spool

from .processes import ROOT, module
from .records import message

_COPIES = 1000
_TIMEOUT = 600.0


class Outcome(NamedTuple):
    """The numbers of one run."""

    accepted: int
    """Records for which ``send()`` returned, in all processes."""
    records: int
    """Different records in the trail, checkpoints included."""
    checkpoints: int
    streams: int
    copies: int
    """Further copies, since records are resent when the agent restarts."""
    seconds: float
    """To send and deliver all of them."""
    verify_seconds: float


# -- processes that send -----------------------------------------------------------------------------------------------


def _client(folder: Path, *, with_spool: bool) -> Client:
    key_file = folder / "seal.key"
    return Client(
        lambda: DomainSocket(str(folder / "agent.sock"), require_ack=True),
        backoff=Backoff(initial=0.02, maximum=0.2),
        stamp=True,
        seal=Seal(key_file=key_file) if key_file.exists() else None,
        spool=Spool(str(folder / "spool-{pid}"), mode="always") if with_spool else None,
    )


def _send(client: Client, records: int) -> None:
    msg = message(0)
    for _ in range(records):
        client.send(msg, timeout=_TIMEOUT)


def _finish(client: Client, folder: Path, records: int) -> None:
    if not client.flush(_TIMEOUT):
        raise RuntimeError(f"not delivered: {client.stats()}")
    client.close()
    (folder / f"accepted-{os.getpid()}").write_text(str(records))


def send_and_fork(folder: Path, records: int) -> None:
    """Send a half by this process, and a quarter by each of two that it forks in the middle."""
    client = _client(folder, with_spool=False)
    half, quarter = records - records // 4 * 2, records // 4
    _send(client, half // 2)
    children = []
    for _ in range(2):
        child = gevent.os.fork()
        if child == 0:
            _send(client, quarter)
            _finish(client, folder, quarter)
            os._exit(0)
        children.append(child)
    _send(client, half - half // 2)
    for child in children:
        _, status = gevent.os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"a child ended with {status}")
    _finish(client, folder, half)


def send_by_spool(folder: Path, records: int, *, until_killed: bool) -> None:
    """Send by several greenlets. Note each accepted record, for the case of a kill."""
    client = _client(folder, with_spool=True)
    log = os.open(folder / f"sent-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def sender(own: int) -> None:
        msg = message(0)
        for _ in range(own):
            client.send(msg, timeout=_TIMEOUT)
            os.write(log, b".")

    shares = [sys.maxsize if until_killed else records // 50 + (place < records % 50) for place in range(50)]
    gevent.joinall([gevent.spawn(sender, share) for share in shares], raise_error=True)
    deadline = time.monotonic() + _TIMEOUT
    while len(list(folder.glob("spool-*"))) > 1:  # the folder of the killed process is being delivered
        if time.monotonic() > deadline:
            raise RuntimeError("the spool of the killed process is still there")
        gevent.sleep(0.1)
    _finish(client, folder, records)


# -- the agent ---------------------------------------------------------------------------------------------------------


class _Agent:
    """Fluent Bit or ``geventaudit listen``, which writes JSON lines to a new file at each start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "agent.sock"
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.binary = os.environ.get("FLUENT_BIT", "")

    def start(self) -> None:
        self._starts += 1
        self._socket.unlink(missing_ok=True)
        output = f"trail-{self._starts:03}.jsonl"
        command = self._fluent_bit(output) if self.binary else self._listen(output)
        with open(self._folder / "agent.log", "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        _wait_until(self._socket.exists, "socket of the agent")

    def stop(self) -> None:
        """Stop the agent by a signal that it handles: it writes out all acknowledged records."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)

    def _listen(self, output: str) -> list[str]:
        command = [sys.executable, "-m", "geventaudit", "listen", "--unix", str(self._socket)]
        return [*command, "--output", str(self._folder / output)]

    def _fluent_bit(self, output: str) -> list[str]:
        storage = {"storage.path": str(self._folder / "storage"), "storage.checksum": "off", "flush": 0.2, "grace": 30}
        source = {"name": "forward", "unix_path": str(self._socket), "storage.type": "filesystem"}
        target = {"name": "file", "match_regex": "^AsmAudit[CD]P$", "path": str(self._folder), "file": output}
        target |= {"format": "plain", "retry_limit": "no_limits"}
        config = self._folder / "fluent-bit.yaml"  # JSON is YAML too
        config.write_text(json.dumps({"service": storage, "pipeline": {"inputs": [source], "outputs": [target]}}))
        return [self.binary, "--config", str(config)]


# -- the run -----------------------------------------------------------------------------------------------------------


def run(folder: Path, records: int, restarts: int, *, is_sealed: bool = False) -> Outcome:
    """Send so many records, verify the trail, and return its numbers.

    :param folder: empty.
    :raises RuntimeError: a record is missing, or ``verify`` counts otherwise than this program.
    """
    key: list[str] = []
    if is_sealed:
        _command("seal-key", str(folder / "seal.key"))
        copy = folder / "copy.key"
        copy.write_bytes((folder / "seal.key").read_bytes())
        copy.chmod(0o600)
        key = ["--key-file", str(copy)]
    begin = time.monotonic()
    accepted = _send_all(folder, records, restarts)
    seconds = time.monotonic() - begin
    files = sorted(map(str, folder.glob("trail-*.jsonl")))
    lines = [line for file in files for line in Path(file).read_bytes().splitlines()]
    seen, checkpoints = _count(lines)
    begin = time.monotonic()
    found = _verify([*files, *key], 0)
    verify_seconds = time.monotonic() - begin
    copies = sum(seen.values()) - len(seen)
    _expect(found, len(seen), copies, 0)
    if len(seen) - checkpoints < accepted:
        raise RuntimeError(f"{accepted} records were accepted, and {len(seen) - checkpoints} are there")
    injected, cut = folder / "injected.jsonl", folder / "cut.jsonl"
    injected.write_bytes(b"".join(line + b"\n" for line in random.Random(1).choices(lines, k=_COPIES)))
    _expect(_verify([*files, str(injected), *key], 0), len(seen), copies + _COPIES, 0)
    removed = next(name for name in seen if name[1] > 10 and (name[0], name[1] + 1) in seen)
    kept = [line for line in lines if _name_of(line)[:2] != removed]
    cut.write_bytes(b"".join(line + b"\n" for line in kept))
    _expect(_verify([str(cut), *key], 1), len(seen) - 1, copies - seen[removed] + 1, 1)
    streams = len({stream for stream, _ in seen})
    return Outcome(accepted, len(seen), checkpoints, streams, copies, seconds, verify_seconds)


def _send_all(folder: Path, records: int, restarts: int) -> int:
    """Run all processes. Return the number of records that were accepted."""
    agent = _Agent(folder)
    spooled = records // 7
    agent.start()
    with contextlib.ExitStack() as stack:
        stack.callback(agent.stop)
        forking = _start(stack, folder, "fork", records - 2 * spooled)
        victim = _start(stack, folder, "victim", spooled)
        _wait_for_records(victim, folder / f"sent-{victim.pid}", spooled)
        agent.stop()  # so that the spool of the victim has records when it is killed
        victim.kill()
        victim.wait()
        agent.start()
        heir = _start(stack, folder, "heir", spooled)
        for _ in range(restarts):
            time.sleep(0.5 + random.random())
            agent.stop()
            agent.start()
        for process in (forking, heir):
            if process.wait(_TIMEOUT):
                raise RuntimeError(f"a sender ended with {process.returncode}: see {folder}")
    accepted = sum(int(path.read_text()) for path in folder.glob("accepted-*"))
    return accepted + (folder / f"sent-{victim.pid}").stat().st_size


def _start(stack: contextlib.ExitStack, folder: Path, role: str, records: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        module("trail", "--role", role, "--folder", str(folder), "--records", str(records)), cwd=ROOT
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _wait_for_records(process: subprocess.Popen[bytes], log: Path, records: int) -> None:
    _wait_until(lambda: process.poll() is not None or (log.exists() and log.stat().st_size >= records), "records sent")
    if process.poll() is not None:
        raise RuntimeError(f"the process with the spool ended with {process.returncode}")


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} in {_TIMEOUT:.0f} seconds")
        time.sleep(0.01)


def _name_of(line: bytes) -> tuple[str, int, bool]:
    """Return stream and number of a record, and True if it is a checkpoint. By another way than ``verify`` does."""
    value: Any = json.loads(line)
    stamp = value.get("Record", value)["CustomData"]["geventaudit"]
    return stamp["stream"], stamp["seq"], "checkpoint" in stamp


def _count(lines: list[bytes]) -> tuple[Counter[tuple[str, int]], int]:
    seen: Counter[tuple[str, int]] = Counter()
    checkpoints = set()
    for line in lines:
        stream, seq, is_checkpoint = _name_of(line)
        seen[stream, seq] += 1
        if is_checkpoint:
            checkpoints.add((stream, seq))
    return seen, len(checkpoints)


def _verify(arguments: list[str], status: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_command("verify", "--json", *arguments, status=status))
    return found


def _command(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "geventaudit", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with {done.returncode}: {done.stdout[:2000]}")
    return done.stdout


def _expect(found: dict[str, Any], records: int, duplicates: int, missing: int) -> None:
    sums = {name: sum(each[name] for each in found["streams"]) for name in ("records", "duplicates", "missing")}
    expected = {"records": records, "duplicates": duplicates, "missing": missing}
    if sums != expected:
        raise RuntimeError(f"verify counts {sums}, and this program {expected}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trail", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--seal", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--role", choices=("fork", "victim", "heir"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        logging.disable(logging.CRITICAL)  # that the agent is away is on purpose
    if options.role == "fork":
        send_and_fork(options.folder, options.records)
    elif options.role:
        send_by_spool(options.folder, options.records, until_killed=options.role == "victim")
    else:
        with _folder(options.folder) as folder:
            outcome = run(folder, options.records, options.restarts, is_sealed=options.seal)
        print("; ".join(f"{name} {value:,.1f}".removesuffix(".0") for name, value in outcome._asdict().items()))
    return 0


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


if __name__ == "__main__":
    # The driver ends its processes too if a signal ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
