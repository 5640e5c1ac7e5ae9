"""Notifications never wait for a reader, and readers get the backlog and an end."""

from __future__ import annotations

import logging
from typing import Any

import gevent
import pytest
from gevent.queue import Channel, Empty
from helpers import message

from geventaudit import NotificationKind as Kind
from geventaudit.errors import logger
from geventaudit.notifications import BACKLOG, Notifier


def read_all(notifier: Notifier) -> list[Any]:
    notifier.end()
    return list(notifier.channel())


def test_read_later() -> None:
    notifier = Notifier()
    error = RuntimeError("x")
    notifier.notify(Kind.CONNECT_FAILED, error)
    notifier.notify(Kind.CONNECTED)
    first, second = read_all(notifier)
    assert (first.kind, first.error, first.missed) == (Kind.CONNECT_FAILED, error, 0)
    assert first.time.tzinfo is not None
    assert second.kind is Kind.CONNECTED


def test_lines_of_the_log_begin_with_the_library_and_end_with_the_next_step(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier()
    with caplog.at_level(logging.INFO, "geventaudit"):
        for kind in Kind:
            notifier.notify(kind, None if kind in (Kind.CONNECTED, Kind.CLOSED) else RuntimeError("why"))
        logger("agent").info("%d%%", 5)
    assert len(caplog.messages) == len(Kind) + 1
    assert all(line.startswith("geventaudit: ") for line in caplog.messages)
    assert caplog.messages[-1] == "geventaudit: 5%"
    for kind in (Kind.CONNECT_FAILED, Kind.CONNECTION_LOST, Kind.QUEUE_FULL):
        assert f"geventaudit: {kind.value}: why; run `geventaudit doctor` to find out why" in caplog.messages
    assert f"geventaudit: {Kind.DROPPED.value}: why" in caplog.messages


def test_the_log_has_the_end_of_a_failure_at_the_level_of_the_failure(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier()
    error = RuntimeError("why")
    with caplog.at_level(logging.INFO, "geventaudit"):
        notifier.notify(Kind.CONNECTED)
        notifier.notify(Kind.CONNECTION_LOST, error)
        notifier.notify(Kind.CONNECTED)
        notifier.notify(Kind.CONNECTED)
        notifier.notify(Kind.SPOOL_RESTORED)
        notifier.notify(Kind.SEAL_RESTORED)
        notifier.notify(Kind.CLOSED)
    levels = [(record.args[0], record.levelname) for record in caplog.records]  # type: ignore[index]
    assert levels == [
        ("connected", "INFO"),
        ("connection lost", "WARNING"),
        ("connected", "WARNING"),
        ("connected", "INFO"),
        ("spool restored", "WARNING"),
        ("the key of the seal was read", "WARNING"),
        ("closed", "INFO"),
    ]


def test_waiting_readers_are_served_and_ended() -> None:
    notifier = Notifier()
    channel = notifier.channel()
    assert isinstance(channel, Channel)
    assert notifier.channel() is channel
    got: list[Any] = []
    readers = [gevent.spawn(lambda: got.extend(channel)) for _ in range(3)]
    gevent.sleep(0)
    for kind in (Kind.CONNECTED, Kind.CONNECTION_LOST, Kind.CONNECTED):
        notifier.notify(kind)
        gevent.sleep(0)
    notifier.notify(Kind.CLOSED)
    notifier.end()
    gevent.joinall(readers, timeout=5, raise_error=True)
    assert all(reader.ready() for reader in readers)
    assert sorted(each.kind for each in got) == sorted([Kind.CONNECTED] * 2 + [Kind.CONNECTION_LOST, Kind.CLOSED])
    assert list(channel) == []


def test_the_backlog_forgets_the_oldest_and_counts() -> None:
    notifier = Notifier()
    kinds = [Kind.CONNECTED, Kind.CONNECTION_LOST]
    for number in range(BACKLOG + 10):
        notifier.notify(kinds[number % 2])
    got = read_all(notifier)
    assert len(got) == BACKLOG
    assert got[0].missed == 10
    assert sum(each.missed for each in got) + len(got) == BACKLOG + 10


def test_a_flood_of_one_kind_is_folded_into_the_newest() -> None:
    notifier = Notifier()
    notifier.notify(Kind.CONNECTED)
    for number in range(1000):
        notifier.notify(Kind.QUEUE_FULL, RuntimeError(number))
    connected, full = read_all(notifier)
    assert connected.missed == 0
    assert (str(full.error), full.missed) == ("999", 999)


def test_messages_are_never_folded_away() -> None:
    notifier = Notifier()
    for number in range(3):
        notifier.notify(Kind.DROPPED, None, (message(number),))
    assert [each.undelivered for each in read_all(notifier)] == [(message(n),) for n in range(3)]


def test_get_keeps_its_timeout() -> None:
    notifier = Notifier()
    with pytest.raises(Empty):
        notifier.channel().get(timeout=0.01)
    with pytest.raises(Empty):
        notifier.channel().get(block=False)
    notifier.notify(Kind.CONNECTED)
    assert notifier.channel().get(block=False).kind is Kind.CONNECTED
