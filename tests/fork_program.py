"""A service that forks, as a process of its own; see test_fork.py.

    python fork_program.py SCENARIO FORK PATCHED SOCKET [COUNT | KIND AUTHORITY]

FORK is "os", "gevent" or "multiprocessing". Exits with 0 if the accepted records of every process were delivered.
Prints the numbers for the test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

scenario, fork_kind, patched, path = sys.argv[1:5]
count = int(sys.argv[5]) if sys.argv[5:] and sys.argv[5].isdigit() else 0
if patched == "patched":
    from gevent import monkey

    monkey.patch_all()

import os

foreign: list[Callable[[], object]] = []  # called by the at-fork hooks of another library, in the child
if scenario == "hooks":  # they run before geventaudit's
    import gevent

    def foreign_hook() -> None:
        for action in foreign:
            action()

    os.register_at_fork(after_in_child=foreign_hook, after_in_parent=lambda: gevent.sleep(0))

import multiprocessing
import ssl

import gevent
import gevent.os
from helpers import message

from geventaudit import (
    TCP,
    Backoff,
    BaseClient,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Stats,
)

ZERO = Stats()


def make_client(**options: object) -> Client:
    return Client(lambda: DomainSocket(path), backoff=Backoff(initial=0.01, maximum=0.1), **options)  # type: ignore[arg-type]


def say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def in_child(work: Callable[[], bool]) -> Callable[[], bool]:
    """Run *work* in a forked child. Return a function that waits for its end, and returns True if it succeeded."""
    if os.fork is gevent.os.fork or fork_kind == "gevent":
        # It does that after the first fork only, and would not notice a child that has ended by then.
        gevent.get_hub().loop.install_sigchld()
    if fork_kind == "multiprocessing":

        def target() -> None:
            sys.exit(0 if work() else 1)

        process = multiprocessing.get_context("fork").Process(target=target)
        process.start()

        def wait() -> bool:
            while process.is_alive():
                gevent.sleep(0.01)
            return process.exitcode == 0

        return wait
    pid = gevent.os.fork() if fork_kind == "gevent" else os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    waitpid = gevent.os.waitpid if fork_kind == "gevent" else os.waitpid

    def wait_for_pid() -> bool:
        while True:
            done, status = waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            gevent.sleep(0.01)

    return wait_for_pid


def send(client: Client, first: int, amount: int) -> None:
    """Send numbers, in this process only: a copy of this greenlet that finds itself in a child stops."""
    pid = os.getpid()
    for number in range(first, first + amount):
        if os.getpid() != pid:
            return
        try:
            client.send(message(number), timeout=60)
        except ClientClosedError:
            if os.getpid() != pid:  # it was waiting for room when the process forked; the parent's copy sends it
                return
            raise
        if number % 50 == 0:
            gevent.sleep(0)


def four_children() -> bool:
    """Four children, forked while the parent sends, each sending as much as the parent."""
    client = make_client()
    sending = gevent.spawn(send, client, 0, count)
    waits = []
    for index in range(1, 5):
        while client.stats().delivered < count * index // 8:
            gevent.sleep(0.001)

        def work(first: int = index * count) -> bool:
            assert client.stats() == ZERO, client.stats()
            send(client, first, count)
            left = client.close(timeout=60)
            stats = client.stats()
            return not left and stats.accepted == stats.delivered == count and stats.heartbeats == 1

        waits.append(in_child(work))
    fine = [wait() for wait in waits]
    sending.get()
    left = client.close(timeout=60)
    stats = client.stats()
    return all(fine) and not left and stats.accepted == stats.delivered == count and stats.connects == 1


def middle_of_a_write() -> bool:
    """The agent is stuck, three megabytes are half written, and more waits for room: then it forks, twice deep."""
    client = make_client(queue_size=5, max_frame_bytes=4 << 20)
    for number in range(3):
        client.send(message(number, caller_agent="x" * (1 << 20)))
    while not client.stats().in_flight:
        gevent.sleep(0.001)
    waiting = [gevent.spawn(send, client, number, 1) for number in range(3, 13)]
    flushing = gevent.spawn(client.flush, 60)
    gevent.sleep(0.05)

    def grandchild() -> bool:
        assert client.stats() == ZERO, client.stats()
        send(client, 200, 100)
        return client.close(timeout=60) == []

    def child() -> bool:
        assert client.stats() == ZERO
        gevent.sleep(0.05)  # let the copies of the parent's greenlets run
        gevent.joinall([*waiting, flushing], timeout=10)
        assert flushing.value is False
        send(client, 100, 100)
        fine = in_child(grandchild)
        return client.flush(60) and fine() and client.close(timeout=60) == []

    wait = in_child(child)
    say("forked")
    fine = wait()
    gevent.joinall(waiting, timeout=60, raise_error=True)
    left = client.close(timeout=60)
    return fine and not left and client.stats().delivered == 13 and client.stats().connects == 1


def parent_hangs_up() -> bool:
    """The child does not keep the parent's connection open."""
    client = make_client()
    client.send(message(1))
    assert client.flush(30)
    read, write = os.pipe()

    def child() -> bool:
        gevent.sleep(0.01)  # its hub runs
        os.write(write, b"x")
        gevent.sleep(60)
        return True

    in_child(child)
    os.read(read, 1)
    client.close()
    say("closed")
    gevent.sleep(60)
    return True


def closing_parent() -> bool:
    """Fork while the client closes: the child's copy of the call ends, the parent's goes on."""
    client = make_client()
    client.send(message(1))
    closing = gevent.spawn(client.close, 60)
    gevent.sleep(0.05)

    def child() -> bool:
        assert closing.get(timeout=10) == []
        try:
            client.send(message(2))
        except ClientClosedError:
            return True
        return False

    fine = in_child(child)()
    say("forked")
    return fine and closing.get(timeout=60) == []


def base_client() -> bool:
    """The child gets an error that the connection is the parent's, and goes on with one of its own."""
    client = BaseClient(DomainSocket(path))
    client.send(message(1))
    assert client.flush(30)

    def child() -> bool:
        assert client.stats() == ZERO
        try:
            client.send(message(0))
        except ConnectionFailedError as error:
            assert "parent process" in str(error)
        else:
            return False
        client.reset(DomainSocket(path))
        client.send(message(2))
        return client.flush(30) and client.stats().delivered == 1 and client.close() == []

    fine = in_child(child)()
    client.send(message(3))
    return fine and client.error is None and client.close(30) == [] and client.stats().delivered == 2


def connect() -> TCP | DomainSocket:
    kind, authority = sys.argv[5:]
    if kind.startswith("unix"):
        return DomainSocket(path, require_ack=kind.endswith("acks"))
    context = ssl.create_default_context(cafile=authority) if kind == "tls" else None
    return TCP(("127.0.0.1", int(path)), require_ack=kind.endswith("acks"), ssl=context)


def hooks() -> bool:
    """Fork while the client does nothing, writes, or connects. Prints the numbers of all accepted records."""
    fine = True
    for sends in (0, 1):
        for when in ("idle", "writing", "connecting"):
            fine = hook(when, sends, sends * 10_000) and fine
    return fine


def ask(words: str) -> None:
    say(words)
    sys.stdin.readline()


def hook(when: str, sends: int, first: int) -> bool:
    first += ("idle", "writing", "connecting").index(when) * 1000
    connecting: list[bool] = []

    def factory() -> TCP | DomainSocket:
        connecting.append(True)
        if when == "connecting":
            gevent.sleep(0.1)
        return connect()

    client = Client(factory, backoff=Backoff(initial=0.01, maximum=0.1), max_frame_bytes=4 << 20)
    numbers = list(range(first, first + 203))
    big = "x" * (1 << 20) if when == "writing" else "x"
    if when == "writing":
        client.connect(30)
        ask("stop")
    for number in numbers[:3]:
        client.send(message(number, caller_agent=big))
    if when == "writing":
        while not client.stats().in_flight:
            gevent.sleep(0.001)
    elif when == "idle":
        client.connect(30)
    children = []
    for index in range(4):
        for number in numbers[3 + 50 * index : 53 + 50 * index]:
            client.send(message(number))
        if when == "connecting":
            while not connecting:
                gevent.sleep(0.001)
        mine = 100_000 + first + index  # of a child
        foreign[:] = [lambda mine=mine: client.send(message(mine))] if sends else []
        foreign.append(lambda: gevent.sleep(0.15 if when == "connecting" else 0.01))
        numbers += [mine] * sends
        pid = os.fork()
        if not pid:
            status = 1
            try:
                left, stats = client.close(30), client.stats()
                if not left and stats.accepted == sends:
                    status = 0
                else:
                    print(when, sends, len(left), stats, file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        children.append(pid)
    if when == "writing":
        gevent.sleep(0.05)  # the children's greenlets run
        ask("resume")
    fine = [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
    left = client.close(60)
    stats = client.stats()
    say(" ".join(map(str, numbers)))
    if not left and stats.connects == 1 and stats.accepted == stats.delivered == len(numbers) - 4 * sends:
        return fine
    print(when, sends, len(left), stats, file=sys.stderr, flush=True)
    return False


if __name__ == "__main__":
    sys.exit(0 if globals()[scenario]() else 1)
