"""Native threads beside the client's own: nothing lost, order kept for each sender, one bound for all."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey, subprocess
from helpers import DESTROYED, destroys_a_hub, eventually, greenlets, message, once, receiving

from geventaudit import (
    Backoff,
    BaseClient,
    Client,
    ClientClosedError,
    ConnectionFailedError,
    DomainSocket,
    Msg,
    NoOp,
    QueueFullError,
    Spool,
    ValidationError,
)
from geventaudit.agent import Agent
from geventaudit.delivery.inbox import Inbox
from geventaudit.runtime import forks, native
from geventaudit.runtime.hub_thread import HubThread
from geventaudit.spool import jobs

QUICK = Backoff(initial=0.01, maximum=0.05)
_start_new_thread: Any = monkey.get_original("_thread", "start_new_thread")


class NativeThread:
    """A native thread, also if threading is patched; it has a ``result`` when it is done."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False

        def run() -> None:
            try:
                self.result = function()
            except BaseException as error:
                self.error = error
            finally:
                hub = gevent._hub_local.get_hub_if_exists()
                if hub is not None:
                    hub.destroy(destroy_loop=True)
                self.done = True

        _start_new_thread(run, ())

    def get(self, timeout: float = 60) -> Any:
        eventually(lambda: self.done, "the thread ends", timeout)
        if self.error is not None:
            raise self.error
        return self.result


def natively(thread: NativeThread) -> None:
    """Wait without letting this thread's hub run."""
    deadline = time.monotonic() + 30
    while not thread.done:
        assert time.monotonic() < deadline, "the other thread waits for this one"
        native.sleep(0.0005)


class Ending:
    """A native thread that runs *make* and ends; without destroying its hub, unless *make* does."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._homes: list[HubThread] = []
        self._hub: Any = None

        def run() -> None:
            make()
            self._hub = gevent._hub_local.get_hub_if_exists()
            self._homes.append(HubThread.current())

        _start_new_thread(run, ())

    def wait(self) -> None:
        """Wait for the end of the thread."""
        eventually(lambda: self._homes and not self._homes[0].is_alive(), "the thread ends")

    def clean_up(self) -> None:
        """Destroy the hub, which would leave descriptors otherwise."""
        if self._hub is not None and self._hub.loop is not None:
            self._hub.destroy(destroy_loop=True)


def broken() -> NoOp:
    raise OSError("no agent")


def never() -> NoOp:
    gevent.sleep(1000)
    raise AssertionError


def sender(client: Client, first: int, count: int, with_hub: bool) -> Callable[[], None]:
    def send() -> None:
        if with_hub:
            gevent.sleep(0)
        for number in range(first, first + count):
            client.send(message(number), timeout=60)

    return send


def test_threads_and_greenlets_send_at_once(folder: Path) -> None:
    """Eight native threads, four of them with a hub of their own, and two hundred greenlets."""
    with receiving(folder) as receiver:
        receiver.start()
        client = Client(lambda: DomainSocket(receiver.where), backoff=QUICK, queue_size=100)
        threads = [NativeThread(sender(client, 100_000 + 1000 * n, 500, n % 2 == 0)) for n in range(8)]
        greenlets = [gevent.spawn(sender(client, 20 * n, 20, False)) for n in range(200)]
        for thread in threads:
            thread.get(120)
        gevent.joinall(greenlets, timeout=60, raise_error=True)
        assert client.flush(60)
        stats = client.stats()
        assert stats.accepted == stats.delivered == 8 * 500 + 200 * 20
        assert client.close() == []
        receiver.end(signal.SIGTERM)
        numbers = receiver.numbers()
    assert len(numbers) == len(set(numbers)) == 8000
    for n in range(8):
        mine = [number for number in numbers if number // 1000 == 100 + n]
        assert mine == list(range(100_000 + 1000 * n, 100_000 + 1000 * n + 500))
    for n in range(200):
        mine = [number for number in numbers if number // 20 == n]
        assert mine == list(range(20 * n, 20 * n + 20))


def test_a_thread_may_be_the_first(socket_path: str) -> None:
    got: list[Any] = []
    with Agent(socket_path, got.append), Client(lambda: DomainSocket(socket_path)) as client:
        thread = NativeThread(lambda: [client.send(message(n)) for n in range(10)])
        thread.get()
        assert client.flush(10)
        assert [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)] == list(
            range(10)
        )


def test_geventss_threadpool(socket_path: str) -> None:
    got: list[Any] = []
    with Agent(socket_path, got.append), Client(lambda: DomainSocket(socket_path)) as client:
        pool = gevent.get_hub().threadpool
        pool.map(lambda n: client.send(message(n)), range(100))
        assert pool.apply(client.flush, (10,)) is True
        assert pool.apply(client.stats).delivered == 100
    pool.kill()


def test_the_bound_holds_for_both(socket_path: str) -> None:
    """The agent is away; threads and greenlets race for the last places, many times."""
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(20):
            client = Client(lambda: DomainSocket(socket_path), queue_size=20)
            accepted: list[int] = []
            refused: list[int] = []

            def race(client: Any = client, accepted: Any = accepted, refused: Any = refused) -> None:
                for number in range(30):
                    try:
                        client.send(message(number))
                        accepted.append(1)
                    except QueueFullError:
                        refused.append(1)

            threads = [NativeThread(race) for _ in range(3)]
            race()
            for thread in threads:
                thread.get()
            gevent.sleep(0)
            stats = client.stats()
            assert len(accepted) <= 20 + len(threads), "a place too many for each thread at most"
            assert len(accepted) >= 19, "it is not much too careful either"
            assert stats.accepted == stats.queued == len(accepted)
            assert stats.rejected["queue_full"] == len(refused)
            assert len(client.close(timeout=0)) == len(accepted)
    finally:
        sys.setswitchinterval(switch)


def test_errors_reach_the_thread_that_made_them(socket_path: str) -> None:
    client = Client(lambda: DomainSocket(socket_path), queue_size=1)
    with pytest.raises(ValidationError, match="OperationName"):
        NativeThread(lambda: client.send(message(operation_name=""))).get()
    client.send(message(1))
    with pytest.raises(QueueFullError):
        NativeThread(lambda: client.send(message(2))).get()
    with pytest.raises(QueueFullError):
        NativeThread(lambda: client.send(message(2), timeout=0.05)).get()
    with pytest.raises(ConnectionFailedError):
        NativeThread(lambda: client.connect(timeout=0.05)).get()
    assert NativeThread(lambda: client.flush(0.05)).get() is False
    assert NativeThread(lambda: client.stats().rejected).get() == {"invalid": 1, "queue_full": 2}
    assert NativeThread(lambda: client.close(timeout=0)).get() == [message(1)]
    with pytest.raises(ClientClosedError):
        NativeThread(lambda: client.send(message(3))).get()
    assert client.stats().rejected["closed"] == 1


def test_a_thread_that_waits_for_room_when_the_client_is_closed(socket_path: str) -> None:
    client = Client(lambda: DomainSocket(socket_path), queue_size=1)
    client.send(message(1))
    waiting = NativeThread(lambda: client.send(message(2), timeout=None))
    gevent.sleep(0.05)
    assert not waiting.done
    assert client.close(timeout=0) == [message(1)]
    with pytest.raises(ClientClosedError):
        waiting.get()
    assert client.stats().rejected == {"closed": 1}


def test_records_of_other_threads_are_handed_back_at_close(socket_path: str) -> None:
    """They are handed back even if the hub had no time to put them on the queue."""
    client = Client(lambda: DomainSocket(socket_path))
    client.send(message(0))
    thread = NativeThread(lambda: client.send(message(1)))
    natively(thread)
    assert client.close(timeout=0) == [message(0), message(1)]


def test_a_hub_that_does_not_run_blocks_no_thread() -> None:
    with Client(NoOp, queue_size=5) as client:

        def work() -> str:
            for number in range(5):
                try:
                    client.send(message(number))
                except QueueFullError:
                    return "full"
            return "sent"

        thread = NativeThread(work)
        natively(thread)
        assert thread.result in ("sent", "full")


def test_a_base_client_too(socket_path: str) -> None:
    got: list[Any] = []
    with Agent(socket_path, got.append), BaseClient(DomainSocket(socket_path)) as client:
        NativeThread(lambda: client.send(message(1))).get()
        assert client.flush(10)
        assert threading.active_count() >= 1
        assert got


def test_the_first_record_may_be_that_of_another_thread(socket_path: str) -> None:
    got: list[Any] = []
    with Agent(socket_path, got.append):
        client = Client(lambda: DomainSocket(socket_path))
        natively(NativeThread(lambda: client.send(message(1))))
        assert client.flush(10)
        assert client.stats().delivered == 1
        client.close()
        client = Client(lambda: DomainSocket(socket_path))
        natively(NativeThread(lambda: client.send(message(2))))
        assert client.close(10) == []
        assert client.stats().delivered == 1
    with pytest.raises(ClientClosedError):
        client.send(message(3))


@pytest.mark.parametrize("how", ["first use", "close"])
def test_records_wait_for_a_thread_that_has_no_hub(
    socket_path: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Until the thread that constructed the client uses it, the records of others wait. The log says so once."""
    made: list[Client] = []
    may_go_on: list[bool] = []
    results: list[Any] = []

    def own() -> None:
        made.append(Client(lambda: DomainSocket(socket_path)))
        while not may_go_on:
            native.sleep(0.001)
        assert gevent._hub_local.get_hub_if_exists() is None
        if how == "first use":
            made[0].send(message(20))
            results.append(made[0].flush(30))
        results.append(made[0].close(30))

    got: list[Any] = []
    with Agent(socket_path, got.append):
        thread = NativeThread(own)
        eventually(lambda: made)
        for number in range(20):
            made[0].send(message(number))
        assert (made[0].stats().accepted, made[0].stats().queued) == (20, 20)
        gevent.sleep(0.05)
        assert not got
        assert caplog.text.count("records of other threads wait until") == 1
        may_go_on.append(True)
        thread.get()
        assert results == ([True, []] if how == "first use" else [[]])
        expected = list(range(21 if how == "first use" else 20))
        eventually(lambda: sum(isinstance(each.message, Msg) for each in got) == len(expected))
    assert [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)] == expected


def test_stats_and_calls_from_other_threads_while_records_are_on_their_way(socket_path: str) -> None:
    over: list[bool] = []

    def look() -> int:
        looks = 0
        while not over:
            assert client.stats().delivered >= 0
            looks += 1
            native.sleep(0)
        return looks

    with Agent(socket_path, lambda received: None), Client(lambda: DomainSocket(socket_path)) as client:
        threads = [NativeThread(look) for _ in range(2)]
        for number in range(3000):
            client.send(message(number), timeout=30)
        assert client.flush(30)
        over.append(True)
        assert all(thread.get() for thread in threads)
        assert client.stats().accepted == client.stats().delivered == 3000


def test_a_base_client_that_breaks_and_is_reset_while_threads_send(socket_path: str) -> None:
    got: list[Any] = []
    with Agent(socket_path, got.append) as agent, BaseClient(DomainSocket(socket_path)) as client:
        client.send(message(0))
        assert client.flush(10)
        agent.hang_up()
        natively(NativeThread(lambda: client.send(message(1))))  # before this hub knows of the break
        eventually(lambda: client.error)
        client.reset(DomainSocket(socket_path))
        NativeThread(lambda: client.send(message(2))).get()
        assert client.flush(10)
        assert client.stats().delivered == 3
        assert client.stats().rejected == {}


def test_a_queue_for_one_from_threads_only() -> None:
    with Client(NoOp, queue_size=1) as client:
        NativeThread(lambda: client.send(message(1), timeout=30)).get()
        assert client.flush(10)


def test_a_hub_that_does_not_answer_is_no_success() -> None:
    client = Client(NoOp)
    thread = NativeThread(lambda: client.connect(timeout=0.05))
    natively(thread)
    with pytest.raises(ConnectionFailedError, match="did not answer"):
        thread.get()
    client.send(message(1))
    late = NativeThread(lambda: client.close(timeout=0))
    natively(late)
    assert late.result == []
    gevent.sleep(0.05)
    assert client.close() in ([], [message(1)])
    assert client.stats().accepted == client.stats().delivered + client.stats().dropped


def test_calls_from_another_thread_keep_the_reference_count_of_the_loop() -> None:
    """Too low, and a hub that waits for a timer says LoopExit; too high, and it never ends.

    The timers run out without the interpreter's lock, at the same time as the other thread calls.
    """
    home, calls, called = HubThread.current(), 100_000, 0
    loop: Any = home.hub.loop
    before = loop.activecnt

    def count() -> None:
        nonlocal called
        called += 1

    def call() -> None:
        for _ in range(calls):
            home.post(count)

    def tick() -> None:
        while not thread.done:
            gevent.sleep(0.0001)

    thread = NativeThread(call)
    gevent.joinall([gevent.spawn(tick) for _ in range(20)], raise_error=True)
    thread.get()
    eventually(lambda: called == calls)
    assert loop.activecnt == before


def test_a_failed_callback_does_not_stop_the_others() -> None:
    home, called, told = HubThread.current(), [], []
    hub: Any = home.hub
    before, hub.handle_error = hub.handle_error, lambda *problem: told.append(problem[1])
    try:
        NativeThread(lambda: [home.post(function) for function in (lambda: 1 / 0, lambda: called.append(True))]).get()
        eventually(lambda: called)
    finally:
        hub.handle_error = before
    assert told == [ZeroDivisionError]


@pytest.mark.parametrize("destroyed", DESTROYED)
def test_a_client_raises_after_the_end_of_its_thread(destroyed: bool) -> None:
    """The system gives the next thread the number of one that ended, and no thread can deliver anything."""
    made: list[Client] = []

    def make() -> None:
        client = Client(NoOp, queue_size=2)
        client.send(message(0))
        assert client.flush(10)
        made.append(client)
        if destroyed:
            gevent.get_hub().destroy(destroy_loop=True)

    ending = Ending(make)
    ending.wait()
    client = made.pop()
    for call in (lambda: client.send(message(1)), lambda: client.send(message(1), timeout=None), client.flush):
        for _ in range(3):
            thread = NativeThread(call)
            with pytest.raises(ClientClosedError, match="has ended"):
                thread.get()
    NativeThread(lambda: client.report(RuntimeError("untold"))).get()
    stats = client.stats()
    assert (stats.accepted, stats.delivered) == (1, 1)
    assert client.close() == []
    ending.clean_up()


@pytest.mark.parametrize("destroyed", DESTROYED)
@pytest.mark.parametrize("how", ["at work", "closing", "new", "overflow", "always"])
def test_records_are_kept_or_handed_back_after_the_end_of_the_thread(folder: Path, destroyed: bool, how: str) -> None:
    made: list[Client] = []

    def make() -> None:
        spool = Spool(folder / "spool", mode=how) if how in ("overflow", "always") else None  # type: ignore[arg-type]
        made.append(Client(broken, queue_size=10, spool=spool))
        for number in range(3 if how != "new" else 0):
            made[0].send(message(number))
        gevent.spawn(lambda: list(made[0].notify()))
        if how == "closing":
            gevent.spawn(made[0].close, 20.0)
            gevent.spawn(made[0].close, 20.0)
        gevent.sleep(0.01)
        if how == "at work":
            NativeThread(lambda: made[0].send(message(3))).get()
        if how == "new":
            natively(NativeThread(lambda: made[0].send(message(0))))  # the hub is not to hear of it
        if destroyed:
            gevent.get_hub().destroy(destroy_loop=True)

    ending = Ending(make)
    ending.wait()
    client = made.pop()
    heirs = [NativeThread(client.close) for _ in range(5)]
    left = sum((heir.get() for heir in heirs), client.close())
    stats = client.stats()
    assert stats.accepted == {"at work": 4, "new": 1}.get(how, 3)
    assert (stats.queued, stats.in_flight, stats.spooled) == (0, 0, 0)
    if how in ("overflow", "always"):
        assert left == []
        assert stats.kept == 3
        with Client(NoOp, spool=Spool(folder / "spool")) as heir:
            heir.connect()
            eventually(lambda: heir.stats().delivered == 3)
    else:
        assert [each.record.custom_data["n"] for each in left] == list(range(stats.accepted))
        assert stats.dropped == stats.accepted
    ending.clean_up()


@destroys_a_hub
@pytest.mark.parametrize("kind", ["client", "base", "unused base"])
def test_a_client_after_the_end_of_its_hub(folder: Path, kind: str) -> None:
    """In the thread that destroyed it: new records are refused, and undelivered ones are handed back."""

    def use() -> None:
        if kind == "client":
            client: Client | BaseClient = Client(broken)
        else:
            client = BaseClient(DomainSocket(receiver.where))
        if kind != "unused base":
            client.send(message(0))
            gevent.sleep(0.01)
            client.flush(0 if kind == "client" else 60)
        gevent.get_hub().destroy(destroy_loop=True)
        if kind == "base":
            with pytest.raises(ClientClosedError, match="was destroyed"):
                client.send(message(1))
        sent = client.stats().accepted
        assert len(client.close()) == (1 if kind == "client" else 0)
        assert sent == client.stats().accepted
        assert client.stats().dropped == (1 if kind == "client" else 0)
        assert client.close() == []

    with receiving(folder) as receiver:
        receiver.start()
        NativeThread(use).get()


@pytest.mark.parametrize("destroyed", DESTROYED)
def test_records_delivered_before_the_thread_ended_are_not_handed_back(socket_path: str, destroyed: bool) -> None:
    made: list[Client] = []

    def make() -> None:
        client = Client(lambda: DomainSocket(socket_path))
        for number in range(3):
            client.send(message(number))
        # The heartbeat is written first and not counted: all three records are on their way then.
        eventually(lambda: client.stats().written == 3)
        made.append(client)
        if destroyed:
            gevent.get_hub().destroy(destroy_loop=True)

    received: list[Any] = []
    with Agent(socket_path, received.append) as agent:
        ending = Ending(make)
        ending.wait()
        eventually(lambda: sum(isinstance(each.message, Msg) for each in received) == 3)
        client = made.pop()
        assert client.close() == []
        stats = client.stats()
        assert (stats.delivered, stats.connected) == (3, False)
        eventually(lambda: agent.counts.open_connections == 0, "the connection is closed")
        ending.clean_up()


class Gate:
    """Keeps the last job of a spool's disk thread waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = native.allocate_lock()
        self._lock.acquire()
        self.waiting: list[bool] = []
        keep, open_and_keep = jobs.keep, jobs.open_and_keep
        monkeypatch.setattr(jobs, "keep", lambda *arguments: (self._wait(), keep(*arguments))[1])
        monkeypatch.setattr(jobs, "open_and_keep", lambda *arguments: (self._wait(), open_and_keep(*arguments))[1])

    def _wait(self) -> None:
        if not self.waiting:  # the one calls the other
            self.waiting.append(True)
            self._lock.acquire()

    def open(self) -> None:
        self._lock.release()


@destroys_a_hub
@pytest.mark.parametrize("mode", ["overflow", "always"])
def test_closing_without_a_hub_that_is_interrupted_keeps_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    made: list[Client] = []

    def make() -> None:
        client = Client(never, spool=Spool(folder / "spool", mode=mode))
        for number in range(5):
            client.send(message(number))
        gevent.sleep(0.01)  # a greenlet that a destroyed hub never began stays for ever
        made.append(client)

    NativeThread(make).get()
    client = made.pop()
    gate = Gate(monkeypatch)
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        client.close()
    gate.open()
    left = client.close()
    stats = client.stats()
    assert (stats.accepted, stats.kept + stats.dropped, stats.dropped) == (5, 5, len(left))
    assert (stats.queued, stats.spooled) == (0, 0)


@destroys_a_hub
def test_records_are_kept_once_if_the_thread_ends_during_close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    made: list[Client] = []

    def make() -> None:
        client = Client(never, spool=Spool(folder / "spool"))
        for number in range(5):
            client.send(message(number))
        made.append(client)
        gevent.spawn(client.close, 0.0)
        eventually(lambda: gate.waiting)

    NativeThread(make).get()
    gate.open()
    left = made[0].close()
    stats = made[0].stats()
    assert (stats.accepted, stats.kept + stats.dropped, stats.dropped) == (5, 5, len(left))
    assert stats.spool_failures == (1 if left else 0)
    with Client(NoOp, spool=Spool(folder / "spool")) as heir:
        heir.connect()
        eventually(lambda: heir.stats().delivered == 5, "what was handed back may arrive, and nothing is lost")


@pytest.mark.parametrize("used", [False, True], ids=["new", "running"])
def test_closing_at_the_instant_of_a_send_from_another_thread(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    """The record is refused, or handed back. The other thread runs just before the inbox is closed, or just after."""
    results: list[Any] = []

    class Closing(Inbox):
        @property
        def is_closed(self) -> bool:
            return bool(results)

        @is_closed.setter
        def is_closed(self, is_closed: bool) -> None:
            for number in (1, 2) if is_closed and not results else ():
                thread = NativeThread(lambda number=number: client.send(message(number)))
                natively(thread)
                results.append(thread.error)

    monkeypatch.setattr("geventaudit.lifecycle.Inbox", Closing)
    client = Client(broken)
    if used:
        client.send(message(0))
    expected = [message(0), message(1)] if used else [message(1)]
    assert client.close(0.0) == expected
    assert [type(each) for each in results] == [type(None), ClientClosedError]
    stats = client.stats()
    assert (stats.accepted, stats.queued, stats.dropped) == (len(expected), 0, len(expected))


def test_an_interrupted_close_from_another_thread_hands_back_later() -> None:
    client = Client(broken)
    for number in range(3):
        client.send(message(number))

    def close() -> None:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
            client.close(0.5)

    NativeThread(close).get()
    eventually(lambda: client.is_closed)
    assert len(client.close()) == 3


def test_an_interrupted_send_from_another_thread_has_sent_nothing(folder: Path) -> None:
    client = Client(broken, spool=Spool(folder / "spool", max_bytes=5000), queue_size=2)

    def fill(timeout: float) -> None:
        try:
            while True:
                client.send(message(0), timeout=timeout)
        except QueueFullError:
            pass

    fill(0.3)
    NativeThread(lambda: fill(0.0)).get()
    accepted = client.stats().accepted

    def send() -> None:
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
            client.send(message(1), timeout=None)

    before = greenlets()
    NativeThread(send).get()
    eventually(lambda: greenlets() <= before, "nobody waits for room in its place")
    client.close(0.0)
    assert client.stats().accepted == accepted


EXIT = """
import sys, time
import gevent
from gevent import monkey
from helpers import message
from geventaudit import Backoff, Client, DomainSocket, NoOp

path, what = sys.argv[1:]
ready = []

def slowly():
    gevent.sleep(0.5)
    return DomainSocket(path)

def live():
    client = Client(slowly if what != "is closed" else NoOp, backoff=Backoff(0.01, 0.05))
    for number in range(3):
        client.send(message(number))
    if what != "is closed":
        ready.append(True)
    if what == "runs":
        gevent.sleep(1000)
    if what == "destroyed":
        gevent.get_hub().destroy(destroy_loop=True)
    if what == "is closed":
        client.close()
    ready.append(True)
    if what in ("waits", "is closed"):
        monkey.get_original("time", "sleep")(1000)

if what == "own hub":
    what = "destroyed"
    live()
else:
    monkey.get_original("_thread", "start_new_thread")(live, ())
while not ready:
    time.sleep(0.01)
if what == "has ended":
    time.sleep(0.1)
print("end", flush=True)
"""


@once
@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("runs", ""),
        ("has ended", "closed before 3 records"),
        pytest.param("destroyed", "closed before 3 records", marks=destroys_a_hub),
        pytest.param("own hub", "closed before 3 records", marks=destroys_a_hub),
        ("waits", "has not delivered 3 records"),
        ("is closed", ""),
    ],
    ids=["runs", "has ended", "destroyed", "own hub", "waits", "is closed"],
)
def test_clients_of_other_threads_at_the_end_of_the_interpreter(folder: Path, state: str, said: str) -> None:
    with receiving(folder) as receiver:
        receiver.start()
        done = subprocess.run(
            [sys.executable, "-c", EXIT, str(receiver.where), state],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=15,  # far from it, but for a closed client that is waited for
            check=True,
        )
        if state == "runs":
            eventually(lambda: receiver.numbers() == [0, 1, 2])
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@destroys_a_hub
def test_waiting_calls_raise_when_the_thread_ends() -> None:
    made: list[Client] = []
    may_end: list[bool] = []

    def make() -> None:
        client = Client(broken, queue_size=1)
        client.send(message(0))
        made.append(client)
        while not may_end:
            gevent.sleep(0.001)

    ending = NativeThread(make)
    eventually(lambda: made)
    before = greenlets()
    waiting = [NativeThread(made[0].flush), NativeThread(lambda: made[0].send(message(1), timeout=None))]
    eventually(lambda: greenlets() == before + len(waiting), "both wait in the other thread's hub")
    may_end.append(True)
    ending.get()
    for thread in waiting:
        with pytest.raises(ClientClosedError, match="has ended"):
            thread.get(10)
    assert made[0].stats().accepted == 1
    assert len(made[0].close()) == 1


def test_threads_that_end_leave_nothing_registered() -> None:
    """Each fork would go through all that."""
    before = len(forks.registered())

    def use() -> None:
        with Client(NoOp) as client:
            client.send(message(1))
            assert client.flush(10)

    for _ in range(20):
        NativeThread(use).get()
    eventually(lambda: gc.collect() is not None and len(forks.registered()) <= before + 1)


def test_a_thread_that_got_its_hub_late_is_answered_at_once() -> None:
    """The other thread ends its wait, not the regular check that the hub exists."""
    took: list[float] = []

    def run() -> None:
        mine = Client(NoOp)  # before this thread has a hub
        gevent.sleep(0)
        began = time.monotonic()
        assert client.flush(10)
        took.append(time.monotonic() - began)
        mine.close()
        gevent.get_hub().destroy(destroy_loop=True)

    with Client(NoOp) as client:
        client.send(message(1))
        for _ in range(3):
            native.start_new_thread(run, ())
        eventually(lambda: len(took) == 3)
    assert min(took) < 0.4, took
