"""Time limits while a tool such as freezegun has stopped the clocks of the time module."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket
from helpers import message

from geventaudit import TCP, ConnectionFailedError, DomainSocket
from geventaudit.agent import Agent
from geventaudit.agent.doctor import _wait_delivered
from geventaudit.encoder.encoding import encode
from geventaudit.testing import AuditAgent

FRAME = encode(message(), 0)


@pytest.fixture(autouse=True)
def _frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop the clocks. gevent's timers go on, and end a test that waits for ever."""
    with monkeypatch.context() as patch, gevent.Timeout(20):
        for name in ("time", "monotonic", "perf_counter"):
            now = getattr(time, name)()
            patch.setattr(time, name, lambda now=now: now)
        yield


def test_waiting_for_records_ends() -> None:
    with AuditAgent() as agent, pytest.raises(AssertionError, match="0 of 1 records"):
        agent.wait_for(1, timeout=0.05)


def test_a_full_backlog_is_not_waited_for_for_ever(socket_path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path)
        listener.listen(0)
        first = DomainSocket(socket_path)  # fills the backlog
        with pytest.raises(ConnectionFailedError, match="accepted no connection"):
            DomainSocket(socket_path, timeout=0.2)
        first.close()


def test_acknowledgements_are_not_waited_for_for_ever(socket_path: str) -> None:
    with Agent(socket_path, lambda received: None) as agent:
        agent.stop_acknowledging()
        connection = DomainSocket(socket_path, require_ack=True, ack_timeout=0.05)
        connection.write([FRAME])
        with pytest.raises(ConnectionFailedError, match="never acknowledged"):
            connection.wait_broken()
        connection.close()


def test_tcp_believes_the_kernel_in_the_end() -> None:
    with Agent(("127.0.0.1", 0), lambda received: None) as agent:
        assert isinstance(agent.address, tuple)
        connection = TCP(agent.address)
        connection.write([FRAME])
        while not connection.delivered():
            gevent.sleep(0.01)
        connection.close()


def test_a_frame_that_comes_a_byte_at_a_time_is_too_slow(socket_path: str) -> None:
    with Agent(socket_path, print, stall_timeout=0.2) as agent, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(socket_path)
        while not agent.counts.turned_away:
            try:
                sock.send(FRAME[:1])  # the head of an array of arrays of ...
            except BrokenPipeError:
                break
            gevent.sleep(0.02)
        with contextlib.suppress(ConnectionResetError):  # a byte came after the agent's last look
            assert sock.recv(1) == b""


def test_the_doctor_does_not_wait_for_ever(socket_path: str) -> None:
    with Agent(socket_path, print) as agent:
        agent.stop_reading()
        connection = DomainSocket(socket_path)
        assert not _wait_delivered(connection, 0.1)
        connection.close()
