"""Fluent Bit is restarted and killed under load, and pauses its input."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
from fluent_bit import QUICK, FluentBit, filesystem, fluent_bit, needs_fluent_bit
from helpers import eventually, message

from geventaudit import Client

pytestmark = [needs_fluent_bit, pytest.mark.slow]

RECORDS = int(os.environ.get("GEVENTAUDIT_RECORDS", "30000"))
RESTARTS = 10


def send_all(client: Client, sent: list[int]) -> None:
    for number in range(RECORDS):
        client.send(message(number), timeout=120.0)
        sent[0] = number
        if number % 50 == 0:
            gevent.sleep(0)


def gaps(lost: list[int]) -> int:
    """Return the number of runs of neighbours in *lost*."""
    return sum(number - 1 not in lost_set for number in lost) if (lost_set := set(lost)) else 0


@pytest.mark.parametrize("acks", [True, False], ids=["acks", ""])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ten_restarts(number: signal.Signals, kind: str, acks: bool, folder: Path, record_property: Any) -> None:
    with fluent_bit(folder, kind, **filesystem(folder)) as agent:
        with Client(lambda: agent.connect(require_ack=acks), backoff=QUICK) as client:
            sent = [0]
            sending = gevent.spawn(send_all, client, sent)

            def is_due(restart: int) -> bool:
                return client.stats().connected and sent[0] > restart * RECORDS // (RESTARTS + 2)

            for restart in range(1, RESTARTS + 1):
                eventually(partial(is_due, restart), timeout=120.0)
                agent.end(number)
                agent.start()
            sending.get(timeout=300)
            assert client.flush(120.0)
            stats = client.stats()
            assert stats.dropped == 0
            assert stats.delivered == RECORDS
        numbers = agent.settled_numbers()
    lost = sorted(set(range(RECORDS)) - set(numbers))
    figures = {"lost": len(lost), "gaps": gaps(lost), "duplicates": len(numbers) - len(set(numbers))}
    for name, figure in figures.items():
        record_property(name, figure)
    print(
        number.name, kind, "acks" if acks else "no acks", figures, f"resent {stats.resent}, {stats.connects} connects"
    )
    assert set(numbers) <= set(range(RECORDS))
    if acks:
        assert lost == []
    elif kind == "unix" and number is signal.SIGTERM:
        assert lost == []  # it stores everything that it has read
    else:  # one run for each restart: read and not stored (Unix), or not read (TCP)
        assert gaps(lost) <= RESTARTS


@pytest.mark.parametrize("acks", [True, False], ids=["acks", ""])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_paused_input(kind: str, acks: bool, folder: Path, record_property: Any) -> None:
    """Fluent Bit holds more than ``mem_buf_limit`` between two flushes, and closes its connections."""
    with fluent_bit(folder, kind, service={"flush": 1}, mem_buf_limit="1M") as agent:
        with Client(lambda: agent.connect(require_ack=acks), backoff=QUICK) as client:
            send_all(client, [0])
            assert client.flush(120.0)
            stats = client.stats()
        numbers = agent.settled_numbers()
        assert "paused" in agent.log()
    lost = sorted(set(range(RECORDS)) - set(numbers))
    figures = {"lost": len(lost), "duplicates": len(numbers) - len(set(numbers)), "connections": stats.connects}
    for name, figure in figures.items():
        record_property(name, figure)
    print(kind, "acks" if acks else "no acks", figures, f"resent {stats.resent}")
    if acks:
        assert lost == []
        assert figures["duplicates"] < 1000
    else:
        assert gaps(lost) <= stats.connects


def test_an_agent_that_comes_late(folder: Path) -> None:
    agent = FluentBit(folder)
    try:
        with Client(agent.connect, backoff=QUICK) as client:
            for number in range(100):
                client.send(message(number))
            assert not client.flush(0.1)
            agent.start()
            assert client.flush(30.0)
        eventually(lambda: agent.numbers() == list(range(100)))
    finally:
        agent.kill()
