"""The common part of Unix sockets and TCP: writing, answers of the agent, and deliveries.

The end of a connection shows how much the agent has read:

=============================  =========================================================================================
the end                        known
=============================  =========================================================================================
in order, nothing held by the  the agent read everything, and closed (over TCP it may have shut down only its writing
kernel                         direction, and still read)
reset                          there were unread data: nothing beyond earlier deliveries
``write_timeout``, a kill      nothing beyond earlier deliveries
a refusal                      the agent discarded the frames (see :mod:`geventaudit.protocol.refusals`)
=============================  =========================================================================================

In all cases, the answers in the socket are read before it is closed.
"""

from __future__ import annotations

import os
import socket as _constants
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import gevent

from ..errors import ConnectionFailedError, FrameError, show
from ..protocol.acks import AckWindow
from ..protocol.refusals import MAX_WORDS, refusal_of
from ..runtime import forks
from ..runtime.clock import TICK, Deadline, monotonic
from .connection import Closing, Connection, check_seconds
from .kernel import HangUp, held_by_kernel, send_flags

__all__ = ["Acks", "SocketConnection", "acks_asked", "reason_of", "release"]

_READ_BYTES = 1 << 14  # of one read, before other greenlets run
_MAX_REST_BYTES = 4 << 20  # of answers that are read before closing
_END_SECONDS = 0.25  # for the last acknowledgement or reset after the agent has closed


class Acks(NamedTuple):
    """The settings of acknowledgements."""

    timeout: float
    batch_records: int


def acks_asked(require_ack: bool, ack_timeout: float, batch_records: int) -> Acks | None:
    """Return the settings of acknowledgements; None if they are not required.

    :raises TypeError, ValueError: an argument is invalid.
    """
    check_seconds("ack_timeout", ack_timeout)
    if isinstance(batch_records, bool) or not isinstance(batch_records, int) or batch_records < 1:
        raise ValueError(f"batch_records must be a whole number of at least 1, got {show(batch_records)}")
    return Acks(ack_timeout, batch_records) if require_ack else None


class SocketConnection(Closing):
    """The common part of connected Unix sockets and TCP.

    :param blind_seconds: the time from now in which nothing counts as delivered without an acknowledgement.
    """

    name: str

    def __init__(
        self, sock: Any, where: str, write_timeout: float | None, acks: Acks | None, blind_seconds: float = 0.0
    ) -> None:
        self._where = where
        self._ack_timeout = acks.timeout if acks else 0.0
        self._acks = AckWindow(acks.batch_records) if acks else None
        self._read_some = False  # the agent is known to have read from the frames in flight
        self._in_flight_from = 0  # the start of the frames in flight, in bytes
        self._write_timeout = write_timeout
        self._sock = sock
        self._sock.settimeout(write_timeout)
        self._is_unix = sock.family == _constants.AF_UNIX
        self._flags = send_flags(sock)
        self._hang_up = HangUp(sock.fileno(), self._is_unix)
        self._is_reset = False  # the socket had an error, which the kernel reports once
        self._written = 0  # bytes
        self._ends: deque[int] = deque()  # the end of each frame that is not known to be delivered
        self._delivered = 0  # frames
        self._words = b""  # the first bytes that the agent sent
        self._closed = False
        self._believed_from = monotonic() + blind_seconds  # nothing counts as delivered before this time
        self._pid = os.getpid()
        forks.register(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._where}{' closed' if self._closed else ''}>"

    def fileno(self) -> int:
        """Return the descriptor of the socket, -1 if it is closed."""
        return int(self._sock.fileno())

    def write(self, frames: Sequence[bytes]) -> None:
        """See :meth:`Connection.write`.

        :raises ConnectionFailedError: the agent hung up, or took no byte for ``write_timeout`` seconds.
        """
        self._check_open()
        if not self._is_in_flight():
            self._read_some, self._in_flight_from = False, self._written
        if self._acks is not None:
            left = memoryview(self._acks.written(frames, monotonic()))
        else:
            end = self._written
            add = self._ends.append
            for frame in frames:
                end += len(frame)
                add(end)
            left = memoryview(frames[0] if len(frames) == 1 else b"".join(frames))
        try:
            while left:
                sent = self._sock.send(left, self._flags)
                self._written += sent
                left = left[sent:]
                if left and not self._read_some:
                    self._read_some = self._taken() > self._in_flight_from
        except OSError as error:
            if _is_ours(error):
                self.close()
                raise ConnectionFailedError(
                    f"{self._where}: the agent took nothing for {self._write_timeout} seconds"
                ) from error
            # On a Unix socket, EPIPE means that the agent has closed; reading shows if it closed in order.
            self._is_reset |= not (self._is_unix and isinstance(error, BrokenPipeError))
            failure = self._read_rest() or self._failure("could not write", error)
            self.close()
            raise failure from error
        except BaseException:
            # After a Timeout or a kill too, part of a frame may be written: nothing can follow it.
            self.close()
            raise

    def delivered(self) -> int:
        """See :meth:`Connection.delivered`."""
        if self._acks is not None:
            return self._acks.delivered
        if not self._closed:
            taken = self._taken()
            ends = self._ends
            if ends and ends[-1] <= taken:  # all frames, the common case
                self._delivered += len(ends)
                ends.clear()
            while ends and ends[0] <= taken:
                ends.popleft()
                self._delivered += 1
        return self._delivered

    def _taken(self) -> int:
        """Return the bytes that the far side has certainly taken.

        On a Unix socket, the bytes that the kernel holds (TIOCOUTQ) include the overhead of its buffers, so written
        minus held is a safe lower bound. When the far side closes, the kernel discards unread bytes and holds 0. Such a
        figure is meaningless, so this method checks for a hang-up after it has read the figure.
        """
        if monotonic() < self._believed_from:
            return 0
        held = self._held()
        if held is None:
            return self._written
        return 0 if self._hang_up.seen() else self._written - held

    def _is_in_flight(self) -> bool:
        return bool(self._ends) if self._acks is None else self._acks.waiting_since() is not None

    def _held(self) -> int | None:
        return held_by_kernel(self._sock.fileno())

    # -- the agent's answers -------------------------------------------------------------------------------------------

    def wait_broken(self) -> None:
        """See :meth:`Connection.wait_broken`. Reads acknowledgements; without these, only refusals have a meaning.

        :raises ConnectionFailedError: the agent hung up or refused, it acknowledged nothing for ``ack_timeout``
            seconds, or the connection was closed.
        """
        while True:
            self._check_open()
            data = None
            try:
                with gevent.Timeout(self._patience(), False):  # type: ignore[arg-type]
                    self._sock.wait_readable()
                    in_order = self._ends_in_order()
                    data = self._sock.recv_now(_READ_BYTES)
            except OSError as error:
                if _is_ours(error):
                    continue  # the timeout of the socket is for writing
                self._is_reset = True
                raise self._failure("broke", error) from error
            if data == b"":
                raise self._end_of_stream(in_order or self._ends_in_order(has_ended=True))
            if data:
                self._hear(data)
            if data is None or len(data) == _READ_BYTES:  # an incomplete TLS record, or a flood of data
                gevent.sleep(TICK)

    def _hear(self, data: bytes) -> None:
        """Take bytes that the agent sent.

        :raises ConnectionFailedError: they are a refusal, or acknowledgements are required and they are invalid.
        """
        if len(self._words) < MAX_WORDS:
            self._words += data[: MAX_WORDS - len(self._words)]
            if (refusal := refusal_of(self._words)) is not None:
                self._believed_from = float("inf")
                event = "refused" if self._acks is None else "the agent's answer is invalid"
                raise ConnectionFailedError(f"{self._where}: {event}: {refusal}")
        if self._acks is not None:
            try:
                self._acks.feed(data)
            except FrameError as error:
                raise ConnectionFailedError(f"{self._where}: the agent's answer is invalid: {error}") from error

    def _read_rest(self) -> ConnectionFailedError | None:
        """Read the answers in the socket before it is closed, without waiting.

        :returns: the error for an end in order or for a refusal; None if there is neither.
        """
        in_order = self._hang_up.seen() and self._has_read_all()
        read = 0
        try:
            while read < _MAX_REST_BYTES and (data := self._sock.recv_now(_READ_BYTES)) is not None:
                if not data:
                    return self._end_of_stream(True) if in_order else None
                self._hear(data)
                read += len(data)
        except ConnectionFailedError as refusal:
            return refusal
        except OSError as error:
            if getattr(error, "reason", None) in _TLS_REASONS:
                return self._failure("refused", error)
            self._is_reset |= isinstance(error, ConnectionError)
        return None

    def _has_read_all(self) -> bool:
        """Return True if the kernel holds nothing for the agent, and the connection is not reset."""
        return not (self._closed or self._is_reset or self._held() or self._hang_up.is_reset())

    def _ends_in_order(self, *, has_ended: bool = False) -> bool:
        """Return True if the agent has closed the connection, and had read everything.

        This waits a moment, since a closed socket answers bytes on their way by a reset. Call it before the end of the
        stream is read: OpenSSL answers an end of TCP by an alert, which is reset too.

        :param has_ended: the end of the stream was read. With TLS, the end of TCP follows.
        """
        deadline = Deadline(_END_SECONDS)
        while not (self._closed or self._is_reset or self._hang_up.is_reset() or deadline.has_passed()):
            if self._hang_up.seen():
                if self._has_read_all():
                    return True
            elif not has_ended:
                break
            gevent.sleep(TICK)
            self._check_open()
        return False

    def _end_of_stream(self, in_order: bool) -> ConnectionFailedError:
        """Return the error for an agent that hung up; if it did so in order, with the number of frames it had read."""
        if not in_order:
            return ConnectionFailedError(f"{self._where}: the agent hung up")
        read = 0
        if self._acks is None and not self._words:
            read = sum(end <= self._written for end in self._ends)
            if not (self._flags or self._is_unix):  # TLS reads whole records, and so may have read more than the agent
                read = min(read, 1)
            read += self._delivered
        return ConnectionFailedError(
            f"{self._where}: the agent hung up",
            agent_had_read=self._written > (self._in_flight_from if self._is_in_flight() else 0),
            frames_read=read,
        )

    def _patience(self) -> float | None:
        """Return the seconds until the next acknowledgement is overdue; None without acknowledgements.

        :raises ConnectionFailedError: an acknowledgement is overdue.
        """
        if self._acks is None:
            return None
        since = self._acks.waiting_since()
        if since is None:
            return self._ack_timeout
        left = since + self._ack_timeout - monotonic()
        if left > 0:
            return max(left, TICK)
        if self._acks.acknowledged:
            raise ConnectionFailedError(
                f"{self._where}: the agent acknowledged nothing for {self._ack_timeout} seconds"
            )
        raise ConnectionFailedError(
            f"{self._where}: the agent has never acknowledged anything, in {self._ack_timeout} seconds: "
            "does it answer Forward messages that have a chunk?"
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See :meth:`Connection.close`. Acknowledgements in the socket count."""
        if self._finish():
            self._sock.close()

    def _finish(self) -> bool:
        """Read the last deliveries. Return False if the connection is closed already."""
        if self._closed:
            return False
        # A forked child must not read from the parent's connection.
        if self._acks is not None and os.getpid() == self._pid:
            self._read_rest()
        self.delivered()  # after close, the kernel gives no figure
        self._closed = True
        return True

    def after_fork_in_child(self) -> None:
        """Close this process's copy of the socket. The parent's connection stays open."""
        self.close()

    def _check_open(self) -> None:
        forks.check()
        if self._closed:
            raise ConnectionFailedError(f"{self._where}: the connection is closed")

    def _failure(self, event: str, error: OSError) -> ConnectionFailedError:
        """Return the error for a connection that broke by *error*, with a likely cause if the agent took nothing."""
        is_silent = not (self._words or self.delivered())
        hint = ""
        if is_silent and self._flags and not self._is_unix and isinstance(error, ConnectionError):
            hint = " (an agent that speaks TLS does that, TCP(..., ssl=...), and one that is full)"
        return ConnectionFailedError(
            f"{self._where}: {event}: {reason_of(error)}{hint}", agent_had_read=self._read_some
        )


# Hints by OpenSSL's names of its reasons.
_TLS_REASONS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the agent wants a client certificate: load_cert_chain() of the context",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the agent may want a client certificate: load_cert_chain() of the context",
    "WRONG_VERSION_NUMBER": "the agent speaks no TLS: leave ssl out",
    "UNEXPECTED_EOF_WHILE_READING": "it looks like an agent that speaks no TLS: leave ssl out",
}


def reason_of(error: BaseException) -> str:
    """Return the text of an error of a socket, with a hint if TLS is the cause."""
    text = getattr(error, "verify_message", None) or getattr(error, "strerror", None) or str(error)
    hint = _TLS_REASONS.get(getattr(error, "reason", None) or "")
    return f"{text} ({hint})" if hint else str(text)


def _is_ours(error: OSError) -> bool:
    """Return True for the timeout that was set on the socket, False for ETIMEDOUT of the kernel."""
    return isinstance(error, TimeoutError) and error.errno is None


def release(connection: Connection) -> None:
    """Close *connection* after the end of its hub.

    gevent's ``close()`` would first ask that hub to stop its watchers. A loop that never runs again does not need that.
    A user-defined connection is left alone: its ``close()`` may need the hub.
    """
    if isinstance(connection, SocketConnection) and connection._finish():
        connection._sock._sock.close()
