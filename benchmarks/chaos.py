"""Test the promise while everything breaks at once: ``python -m benchmarks.chaos [--long] [--seed N]``.

Real processes: an agent that shares no code with geventaudit, services that are forked and killed. Each line of the
table is one run: its seed, the faults, and the fate of the records.

==============  ========================================================================================================
lost            accepted (``send`` returned) and never stored by the agent
excused         of those: without acknowledgements, read by an agent that was killed before it stored them: each such
                gap follows the last record that an agent had stored when it was killed. No client can know
duplicates      stored more than once
reordered       stored for the first time after one that was accepted later. Only records that the quarantine suspected
                may be: at most one for each death of an agent in a crash loop
==============  ========================================================================================================
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import gevent

from geventaudit import TCP, Backoff, Client, Connection, DomainSocket, Msg, QueueFullError, Spool, Stats

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from helpers import Receiver, message, receiving  # noqa: E402  (the tests' receiving process)

__all__ = ["Outcome", "agent_chaos", "broken_spool", "forked", "handlers", "killed"]

_HANDLERS = 1_000_000_000  # the first number of the records that a signal handler sends


@dataclass
class Outcome:
    """The fate of the records of one run."""

    name: str
    seed: int
    faults: str
    accepted: int
    delivered: int
    lost: int
    duplicates: int
    reordered: int
    excused: int = 0
    suspects: int = 0
    stats: Stats = field(default_factory=Stats)

    @property
    def is_as_promised(self) -> bool:
        """True if all lost records are excused, and all late records are suspects that were cleared."""
        return self.lost == self.excused and self.reordered <= self.suspects


def judge(
    name: str,
    seed: int,
    faults: str,
    accepted: list[int],
    stored: list[int],
    last_words: set[int] = frozenset(),  # type: ignore[assignment]
) -> Outcome:
    """Compare the accepted records, in that order, with the *stored* ones.

    :param last_words: the last record that an agent had stored when it was killed; -1 for none.
    """
    place = {number: index for index, number in enumerate(accepted)}
    seen: set[int] = set()
    reordered = 0
    furthest = -1
    for number in stored:
        if number not in seen:
            seen.add(number)
            reordered += place.get(number, furthest) < furthest
            furthest = max(furthest, place.get(number, furthest))
    lost = [number for number in accepted if number not in seen]
    excused = 0
    is_excused = False
    for before, number in zip([-1, *accepted], accepted, strict=False):
        if number not in seen:
            is_excused = is_excused or before in last_words
            excused += is_excused
        else:
            is_excused = False
    return Outcome(name, seed, faults, len(accepted), len(seen), len(lost), len(stored) - len(seen), reordered, excused)


# -- the agent ---------------------------------------------------------------------------------------------------------


class Faults:
    """The faults of an agent, one method each. After the method has returned, the agent reads again, or soon will."""

    def __init__(self, receiver: Receiver, chance: random.Random, acks: bool) -> None:
        self.receiver = receiver
        self.acks = acks
        self.chance = chance
        self.counts: dict[str, int] = {}
        self.last_words: set[int] = set()

    def one(self) -> None:
        """A fault, by chance."""
        names = ["restart", "kill", "stop_reading", "hang_up"]
        if self.acks:  # without, the agent has read the records, and no client can know that it stored none
            names.append("crash_loop")
        if self.receiver.kind == "unix":
            names += ["full_backlog", "delete_socket"]
        name = self.chance.choice(names)
        self.counts[name] = self.counts.get(name, 0) + 1
        getattr(self, name)()

    def restart(self) -> None:
        """End the agent with unread data in its socket, as agents end, and start it again."""
        self.receiver.end(signal.SIGTERM)
        self._pause(0.02)
        self.receiver.start()

    def kill(self) -> None:
        """Kill the agent, perhaps between reading and storing, and start it again."""
        self.receiver.end(signal.SIGKILL)
        stored = self.receiver.numbers()
        self.last_words.add(max(stored, default=-1))
        self._pause(0.02)
        self.receiver.start()

    def stop_reading(self) -> None:
        """Let the agent read nothing for a while."""
        self.receiver.pause()
        self._pause(0.15)
        self.receiver.resume()

    def hang_up(self) -> None:
        """Let the agent hang up in the middle of a frame."""
        self.receiver.process.send_signal(signal.SIGHUP)

    def crash_loop(self) -> None:
        """Let the agent hang up on each of the next records before it stores them; it acknowledges heartbeats."""
        self.receiver.process.send_signal(signal.SIGALRM)

    def full_backlog(self) -> None:
        """Accept no connection while the backlog is full, so that no other client can connect."""
        self.receiver.process.send_signal(signal.SIGHUP)
        self.receiver.pause()
        strangers = []
        try:
            for _ in range(200):
                stranger = socket.socket(socket.AF_UNIX)
                strangers.append(stranger)
                stranger.setblocking(False)
                try:
                    stranger.connect(self.receiver.where)
                except BlockingIOError:
                    break
            self._pause(0.1)
        finally:
            for stranger in strangers:
                stranger.close()
            self.receiver.resume()

    def delete_socket(self) -> None:
        """Delete the file of the socket, and restart the agent a while later."""
        Path(self.receiver.where).unlink()
        self.receiver.process.send_signal(signal.SIGHUP)
        self._pause(0.05)
        self.restart()

    def _pause(self, most: float) -> None:
        gevent.sleep(self.chance.random() * most)


def agent_chaos(folder: Path, *, kind: str, require_ack: bool, rounds: int, seed: int) -> Outcome:
    """Records without end over *rounds* faults of the agent, with a small queue and a spool of mode ``overflow``."""
    with receiving(folder, kind) as receiver:
        receiver.start()
        faults = Faults(receiver, random.Random(seed), require_ack)

        def factory() -> Connection:
            if kind == "tcp":
                address = ("127.0.0.1", int(receiver.where))
                return TCP(address, timeout=1.0, write_timeout=5.0, require_ack=require_ack, ack_timeout=5.0)
            return DomainSocket(
                receiver.where, timeout=1.0, write_timeout=5.0, require_ack=require_ack, ack_timeout=5.0
            )

        spool = Spool(folder / "spool")
        client = Client(factory, backoff=Backoff(initial=0.005, maximum=0.05), queue_size=500, spool=spool)
        accepted: list[int] = []
        over: list[bool] = []

        def load() -> None:
            while not over:
                number = len(accepted)
                client.send(message(number))
                accepted.append(number)
                gevent.sleep(0 if number % 50 else 0.002)

        loading = gevent.spawn(load)
        for _ in range(rounds):
            gevent.sleep(faults.chance.random() * 0.08)
            faults.one()
        over.append(True)
        loading.get()
        client.flush(120.0)
        stats = client.stats()
        client.close(5.0)
        deadline = time.monotonic() + 10
        while len(set(receiver.numbers())) < len(accepted) and time.monotonic() < deadline:
            gevent.sleep(0.1)
            if not require_ack and stats.delivered == len(accepted):
                break  # records that were read and not stored do not come
        gevent.sleep(0.3)
        name = f"agent, {kind}, {'acks' if require_ack else 'no acks'}"
        told = ", ".join(f"{count} {fault.replace('_', ' ')}" for fault, count in sorted(faults.counts.items()))
        excuses = set() if require_ack else faults.last_words
        outcome = judge(name, seed, told, accepted, receiver.numbers(), excuses)
        outcome.stats = stats
        outcome.suspects = 8 * faults.counts.get("crash_loop", 0)
        return outcome


# -- the sender --------------------------------------------------------------------------------------------------------


def _program(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(TESTS / name), *map(str, arguments)]


def _stored(receiver: Receiver, accepted: set[int]) -> list[int]:
    """Return the stored records, once all are there or after a while: the agent stores a moment after it reads."""
    deadline = time.monotonic() + 10
    while not accepted <= set(receiver.numbers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return receiver.numbers()


def killed(folder: Path, *, kills: int, seed: int) -> Outcome:
    """The sending process is killed *kills* times under load, in mode ``always``; the agent comes and goes as well."""
    chance = random.Random(seed)
    accepted: list[int] = []
    first = 0
    with receiving(folder) as receiver:
        for kill in range(kills):
            if kill % 3 == 0:
                receiver.start()
            elif kill % 3 == 2:
                receiver.end(signal.SIGTERM)
            command = _program("spool_program.py", receiver.where, folder / "spool", "always", first, 0)
            with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
                assert program.stdout
                line = program.stdout.readline()
                time.sleep(chance.random() * 0.3)
                program.kill()
                lines = [line, *program.stdout.readlines()]
            accepted += [int(line) for line in lines if line.endswith(b"\n")]
            first = max(accepted) + 1000
        if receiver.process is None:
            receiver.start()
        command = _program("spool_program.py", receiver.where, folder / "spool", "always", first, 10)
        output = subprocess.run(command, stdout=subprocess.PIPE, timeout=300, check=True).stdout
        assert output.endswith(b"delivered\n"), output
        accepted += [int(line) for line in output.split() if line.isdigit()]
        sent = set(accepted)
        stored = [number for number in _stored(receiver, sent) if number in sent]
    faults = f"{kills} kill -9 of the sender"
    return judge("sender, mode always", seed, faults, sorted(accepted), stored)


def broken_spool(folder: Path, *, rounds: int, seed: int) -> Outcome:
    """The files of a spool are removed, cut, overwritten and replaced under a running client, in mode ``always``.

    A record that is lost must be counted: ``lost`` here is the number of those that are not.
    """
    chance = random.Random(seed)
    spool = Spool(folder / "spool", max_bytes=8 << 20, mode="always")
    told: dict[str, int] = {}
    accepted: list[int] = []
    over: list[bool] = []
    with receiving(folder) as receiver:
        client = Client(lambda: DomainSocket(receiver.where), backoff=Backoff(initial=0.005, maximum=0.05), spool=spool)

        def load() -> None:
            while not over:
                number = len(accepted)
                try:
                    client.send(message(number))
                except QueueFullError:
                    gevent.sleep(0.01)
                else:
                    accepted.append(number)

        loading = gevent.spawn(load)
        for number in range(rounds):
            gevent.sleep(0.02 + chance.random() * 0.05)
            if number % 4 == 3:
                receiver.start()
                gevent.sleep(chance.random() * 0.2)
                receiver.end(signal.SIGTERM)
            fault = chance.choice(["remove", "cut", "overwrite", "replace", "remove folder"])
            told[fault] = told.get(fault, 0) + 1
            _break(folder / "spool", fault, chance)
        over.append(True)
        loading.get()
        receiver.start()
        client.flush(60.0)
        gevent.sleep(0.3)
        stats = client.stats()
        client.close(5.0)
        stored = _stored(receiver, set())
    outcome = judge("spool, broken files", seed, "", accepted, stored)
    outcome.lost = max(outcome.lost - stats.dropped, 0)
    outcome.faults = f"{stats.dropped} counted as dropped; " + ", ".join(f"{n} {what}" for what, n in told.items())
    return outcome


def _break(folder: Path, fault: str, chance: random.Random) -> None:
    files = sorted(folder.glob("*.seg"))
    if fault == "remove folder":
        shutil.rmtree(folder, ignore_errors=True)
    elif files:
        file = chance.choice(files)
        try:
            size = file.stat().st_size
            if fault == "remove":
                file.unlink()
            elif fault == "cut":
                os.truncate(file, chance.randrange(size + 1))
            elif fault == "replace":
                other = file.with_suffix(".other")
                other.write_bytes(b"something else")
                other.rename(file)
            else:
                with file.open("r+b") as opened:
                    opened.seek(chance.randrange(size))
                    opened.write(bytes(chance.randrange(256) for _ in range(200)))
        except FileNotFoundError:  # all in it was delivered just now
            pass


def handlers(folder: Path, *, seconds: float, seed: int) -> Outcome:
    """A signal handler sends, every few milliseconds, at any point of another ``send``.

    A handler may interrupt another one between its ``send`` and its note of that. So each depth has its own order.
    """
    chance = random.Random(seed)
    mine: list[int] = []
    theirs: list[list[int]] = []
    depth = -1
    with receiving(folder) as receiver:
        receiver.start()
        client = Client(lambda: DomainSocket(receiver.where, require_ack=True), queue_size=1_000_000)
        client.connect()
        now = datetime.now(UTC)
        numbers = itertools.count(_HANDLERS)

        def handler(*_: object) -> None:
            nonlocal depth
            number = next(numbers)
            depth += 1
            theirs.extend([[] for _ in range(len(theirs), depth + 1)])
            client.send(Msg(message().type, message(number).record.replace(custom_data={"n": number, "t": now})))
            theirs[depth].append(number)
            depth -= 1

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.0007 + chance.random() * 0.002)
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                client.send(message(len(mine)))
                mine.append(len(mine))
                if len(mine) % 20 == 0:
                    gevent.sleep(0)
                if len(mine) % 1000 == 0:
                    while client.stats().queued > 500_000:  # a handler may not wait for room
                        gevent.sleep(0.01)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        client.flush(60.0)
        client.close(5.0)
        stored = _stored(receiver, set(itertools.chain(mine, *theirs)))
    parts = []
    for accepted in (mine, *theirs):
        own = set(accepted)
        parts.append(judge("", seed, "", accepted, [number for number in stored if number in own]))
    return _sum(parts, "signal handlers", seed, f"{sum(map(len, theirs))} sends in a handler")


def forked(folder: Path, *, each: int, seed: int, loop: str = "") -> Outcome:
    """Four children forked from a running client, and their parent, send *each* at once."""
    with receiving(folder) as receiver:
        receiver.start()
        command = _program("fork_program.py", "four_children", "os", "patched", receiver.where, each)
        environment = {**os.environ, "GEVENT_LOOP": loop} if loop else None
        subprocess.run(command, check=True, timeout=600, env=environment)
        stored = _stored(receiver, set(range(5 * each)))
    # Five senders, each with an order of its own: judged one after the other.
    parts = []
    for sender in range(5):
        numbers = range(sender * each, (sender + 1) * each)
        parts.append(judge("", seed, "", list(numbers), [number for number in stored if number in numbers]))
    return _sum(parts, f"forks {loop}".strip(), seed, f"4 forks, {each} records each")


def _sum(parts: list[Outcome], name: str, seed: int, faults: str) -> Outcome:
    return Outcome(
        name,
        seed,
        faults,
        *(
            sum(getattr(part, name) for part in parts)
            for name in ("accepted", "delivered", "lost", "duplicates", "reordered")
        ),
    )


# -- the table ---------------------------------------------------------------------------------------------------------


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ga-") as name:
        yield Path(name)


def main(arguments: list[str] | None = None) -> int:
    """Run all, print the table; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--long", action="store_true", help="200 faults for each agent, 50,000 records for each process"
    )
    parser.add_argument("--seed", type=int, default=1, help="where chance begins (default: 1)")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    seed, rounds = options.seed, 200 if options.long else 20
    runs: list[Callable[[Path], Outcome]] = [
        lambda folder: agent_chaos(folder, kind="unix", require_ack=True, rounds=rounds, seed=seed),
        lambda folder: agent_chaos(folder, kind="unix", require_ack=False, rounds=rounds, seed=seed + 1),
        lambda folder: agent_chaos(folder, kind="tcp", require_ack=True, rounds=rounds, seed=seed + 2),
        lambda folder: killed(folder, kills=30 if options.long else 5, seed=seed + 3),
        lambda folder: forked(folder, each=50_000 if options.long else 2_000, seed=seed + 4),
        lambda folder: forked(folder, each=20_000 if options.long else 2_000, seed=seed + 5, loop="libuv"),
        lambda folder: broken_spool(folder, rounds=rounds, seed=seed + 6),
        lambda folder: handlers(folder, seconds=30.0 if options.long else 3.0, seed=seed + 7),
    ]
    columns = ("seed", "accepted", "delivered", "lost", "excused", "duplicates", "reordered")
    print(f"{'run':<24}" + "".join(f"{column:>11}" for column in columns) + "  faults", flush=True)
    kept = True
    for run in runs:
        with _folder() as folder:
            outcome = run(folder)
        kept = kept and outcome.is_as_promised
        figures = "".join(f"{getattr(outcome, column):>11}" for column in columns)
        print(f"{outcome.name:<24}{figures}  {outcome.faults}", flush=True)
    print("as promised" if kept else "A PROMISE WAS BROKEN")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
