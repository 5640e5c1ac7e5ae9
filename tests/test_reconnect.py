"""A client is connected soon after its agent returns, for each delay of the backoff."""

from __future__ import annotations

import os
import shutil
import signal
import socket as std_socket
import time
from pathlib import Path

import gevent
import pytest
from gevent import socket
from helpers import eventually, message, receiving

from geventaudit import Backoff, Client, ConnectionFailedError, DomainSocket, QueueFullError
from geventaudit.agent import Agent, Received

SOON = 0.25  # the promise, in seconds
# A busy machine may stand still for a while: a test fails when all of its attempts are late.
ATTEMPTS = 3
NEVER = Backoff(initial=1000.0, maximum=1000.0)


def seconds_until_connected(client: Client) -> float:
    began = time.monotonic()
    eventually(lambda: client.stats().connected)
    return time.monotonic() - began


@pytest.mark.parametrize("outage", [0.05, 0.3, 1.0, 4.0])
def test_back_soon_after_an_outage(socket_path: str, outage: float) -> None:
    with Client(lambda: DomainSocket(socket_path)) as client:
        agent = Agent(socket_path, lambda received: None).start()
        client.connect()
        took = []
        for _ in range(ATTEMPTS):
            agent.stop(0.0)
            eventually(lambda: not client.stats().connected)
            gevent.sleep(outage)
            agent = Agent(socket_path, lambda received: None).start()
            took.append(seconds_until_connected(client))
            if took[-1] < SOON:
                break
        agent.stop()
    assert min(took) < SOON, took


def test_restarts_under_load_refuse_nothing(folder: Path) -> None:
    """With the defaults, at 5,000 records/s: the agent, a process of its own, is restarted again and again."""
    refused, sent, over, outages = [0], [0], [], []

    def load() -> None:
        due = time.monotonic()
        while not over:
            for _ in range(25):
                try:
                    client.send(message(sent[0]))
                    sent[0] += 1
                except QueueFullError:
                    refused[0] += 1
            due += 0.005
            late = time.monotonic() - due
            if late > 0.1:  # the machine stood still: the records of that time are not made up for
                due += late
            gevent.sleep(max(0.001, -late))

    with receiving(folder) as receiver, Client(lambda: DomainSocket(receiver.where)) as client:
        receiver.start()
        client.connect()
        loading = gevent.spawn(load)
        for _ in range(10):
            gevent.sleep(0.15)
            began = time.monotonic()
            receiver.end(signal.SIGTERM)
            receiver.start()
            outages.append(time.monotonic() - began)
        over.append(True)
        loading.get()
        assert client.flush(30)
        eventually(lambda: len(set(receiver.numbers())) == sent[0])
        if max(outages) > 0.2:
            pytest.skip(
                f"the machine took up to {max(outages):.2f} s for a restart: more than the queue lasts is no fault"
            )
        assert refused == [0]


@pytest.mark.parametrize("how", ["folder removed", "file replaced at once", "listens late", "renamed into place"])
def test_the_path_is_looked_at(folder: Path, how: str) -> None:
    """An attempt by the backoff would come after a quarter of an hour."""
    run = folder / "run"
    run.mkdir()
    path = str(run / "agent.sock")
    if how == "file replaced at once":
        with std_socket.socket(std_socket.AF_UNIX) as stale:
            stale.bind(path)  # nothing listens
    got: list[Received] = []
    with Client(lambda: DomainSocket(path), backoff=NEVER) as client:
        client.send(message(1))
        eventually(lambda: client.stats().connect_failures)
        if how == "folder removed":
            shutil.rmtree(run)
            gevent.sleep(0.12)
            run.mkdir()
            gevent.sleep(0.12)
        if how == "listens late":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            gevent.sleep(0.1)
            listener.listen(5)
            eventually(lambda: client.stats().connected)
            listener.close()
        elif how == "renamed into place":
            agent = Agent(path + ".new", lambda received: None).start()
            os.rename(path + ".new", path)
            eventually(lambda: client.stats().connected)
            os.rename(path, path + ".new")
            agent.stop()
        else:
            if how == "file replaced at once":
                os.unlink(path)
            with Agent(path, got.append):
                eventually(lambda: client.stats().delivered == 1)
        client.close(0.0)


def test_without_a_path_the_backoff_decides(socket_path: str) -> None:
    """A factory may do anything; only an error that names a path has one looked at."""
    calls = []

    def factory() -> DomainSocket:
        calls.append(1)
        try:
            return DomainSocket(socket_path)
        except ConnectionFailedError as error:
            raise ConnectionFailedError(str(error)) from error

    with Client(factory, backoff=NEVER) as client:
        client.send(message(1))
        eventually(lambda: client.stats().connect_failures)
        with Agent(socket_path, lambda received: None):
            gevent.sleep(0.3)
            assert len(calls) == 1
        client.close(0.0)


def test_a_file_that_does_not_change_is_left_to_the_backoff(socket_path: str) -> None:
    with std_socket.socket(std_socket.AF_UNIX) as stale:
        stale.bind(socket_path)
        with Client(lambda: DomainSocket(socket_path), backoff=NEVER) as client:
            client.send(message(1))
            eventually(lambda: client.stats().connect_failures)
            gevent.sleep(0.3)
            assert client.stats().connect_failures == 1
            client.close(0.0)
