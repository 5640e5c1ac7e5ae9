"""What Unix sockets and TCP have in common: writing, what is delivered, and what the kernel knows of that."""

from __future__ import annotations

import select
import socket as _constants
import sys
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import gevent

from ..encoder.encoding import pack
from ..errors import ConnectionFailedError, FrameError, show
from ..protocol.acks import AckWindow
from ..runtime import forks, native
from ..runtime.clock import TICK, monotonic
from .connection import Closing, Connection, check_seconds

__all__ = ["Acks", "SocketConnection", "acks_asked", "fork_safe", "new_socket", "release"]

_HELO = pack(["HELO", 0])[:-1]


class Acks(NamedTuple):
    """How acknowledgements are asked for."""

    timeout: float
    batch_records: int


def acks_asked(require_ack: bool, ack_timeout: float, batch_records: int) -> Acks | None:
    check_seconds("ack_timeout", ack_timeout)
    if isinstance(batch_records, bool) or not isinstance(batch_records, int) or batch_records < 1:
        raise ValueError(f"batch_records must be a whole number of at least 1, got {show(batch_records)}")
    return Acks(ack_timeout, batch_records) if require_ack else None


class SocketConnection(Closing):
    """What Unix sockets and TCP have in common once they are connected."""

    name: str

    def __init__(self, sock: Any, where: str, write_timeout: float | None, acks: Acks | None) -> None:
        self._where = where
        self._ack_timeout = acks.timeout if acks else 0.0
        self._acks = AckWindow(acks.batch_records) if acks else None
        self._read_some = False  # the agent is known to have read of the frames in flight
        self._in_flight_from = 0  # where those begin, in bytes
        self._write_timeout = write_timeout
        self._sock = sock
        self._sock.settimeout(write_timeout)
        self._hang_up = _HangUp(sock.fileno())
        self._written = 0  # bytes
        self._ends: deque[int] = deque()  # the position behind each frame that is not known to be delivered
        self._delivered = 0  # frames
        self._closed = False
        self._believed_from = 0.0  # monotonic; nothing counts as delivered before
        forks.register(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._where}{' closed' if self._closed else ''}>"

    def write(self, frames: Sequence[bytes]) -> None:
        """See :meth:`Connection.write`.

        :raises ConnectionFailedError: when the agent hung up, or took no byte for ``write_timeout`` seconds.
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
                sent = self._sock.send(left)
                self._written += sent
                left = left[sent:]
                if left and not self._read_some:
                    self._read_some = self._taken() > self._in_flight_from
        except OSError as error:
            self.close()
            if _is_ours(error):
                raise ConnectionFailedError(
                    f"{self._where}: the agent took nothing for {self._write_timeout} seconds"
                ) from error
            raise self._failure("could not write", error, self._read_some) from error
        except BaseException:
            # Whatever it was (a Timeout, a kill), part of a frame may be on the way: nothing can follow it.
            self.close()
            raise

    def delivered(self) -> int:
        """See :meth:`Connection.delivered`."""
        if self._acks is not None:
            return self._acks.delivered
        if not self._closed:
            taken = self._taken()
            ends = self._ends
            if ends and ends[-1] <= taken:  # all, as mostly: not one by one
                self._delivered += len(ends)
                ends.clear()
            while ends and ends[0] <= taken:
                ends.popleft()
                self._delivered += 1
        return self._delivered

    def _taken(self) -> int:
        """Bytes that the far side has certainly taken.

        What the kernel still holds for the far side (TIOCOUTQ) includes the overhead of its buffers on a Unix socket,
        so written minus held is a safe lower bound. When the far side closes, the kernel throws away what was not read,
        and holds 0: the figure means nothing then, so the hang-up is looked for after the figure was taken.
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
        return _held_by_kernel(self._sock.fileno())

    def wait_broken(self) -> None:
        """See :meth:`Connection.wait_broken`. Acknowledgements are read here; without them, what an agent says is
        read and means nothing.

        :raises ConnectionFailedError: when the agent hung up, when it acknowledged nothing for ``ack_timeout`` seconds,
            or when the connection was closed.
        """
        self._check_open()
        while True:
            data = None
            try:
                with gevent.Timeout(self._patience(), False):  # type: ignore[arg-type]
                    data = self._sock.recv(4096)
            except OSError as error:
                if _is_ours(error):
                    continue  # the socket's timeout is meant for writing
                raise self._failure("broke", error, self._read_some) from error
            if data and data.startswith(_HELO):
                raise ConnectionFailedError(
                    f"{self._where}: the agent asks for a shared key (TCP(..., shared_key=...))"
                )
            if data == b"":
                # An agent that closes with something unread resets the connection, or leaves it untaken here.
                had_read = self._written > 0 and not self._closed and not self._held()
                raise ConnectionFailedError(f"{self._where}: the agent hung up", agent_had_read=had_read)
            if self._acks is not None and data:
                try:
                    self._acks.feed(data)
                except FrameError as error:
                    raise ConnectionFailedError(f"{self._where}: what the agent answers is wrong: {error}") from error

    def _patience(self) -> float | None:
        """Seconds until the oldest message waits for too long to be acknowledged; None where none are asked for.

        :raises ConnectionFailedError: it has waited too long already.
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

    def close(self) -> None:
        """See :meth:`Connection.close`."""
        if not self._closed:
            self.delivered()  # what was taken by now, before the kernel's answer is out of reach
            self._closed = True
            self._sock.close()

    def after_fork_in_child(self) -> None:
        """Let go of the socket, which is the parent's; the parent's connection is not touched by that."""
        self.close()

    def _check_open(self) -> None:
        forks.check()
        if self._closed:
            raise ConnectionFailedError(f"{self._where}: the connection is closed")

    def _failure(self, what: str, error: OSError, agent_had_read: bool) -> ConnectionFailedError:
        return ConnectionFailedError(f"{self._where}: {what}: {error.strerror or error}", agent_had_read=agent_had_read)


def _is_ours(error: OSError) -> bool:
    """Whether it is the timeout that was set on the socket, and not the kernel's ETIMEDOUT."""
    return isinstance(error, TimeoutError) and error.errno is None


def release(connection: Connection) -> None:
    """Close *connection* when the hub that watched it is gone.

    gevent's own way would ask that hub to stop watching first. A loop that never runs again does not mind. A
    connection of a user's own is left alone: how that closes is not known.
    """
    if isinstance(connection, SocketConnection):
        connection._closed = True
        connection._sock._sock.close()


def new_socket(family: int) -> Any:
    """Return a stream socket that a forked child does not use."""
    from gevent.socket import socket  # loaded by the first connection; a service that is patched has it loaded

    return fork_safe(socket)(family, _constants.SOCK_STREAM)


@cache
def fork_safe(kind: type) -> Any:
    """Return gevent's class of sockets *kind*, made safe for greenlets that go on in a forked child.

    A greenlet that waits for the parent's socket may wake in the child, by an at-fork hook that switches. It must not
    read, or write, for the parent.
    """

    class ForkSafe(kind):  # type: ignore[misc]
        def _wait(self, *arguments: Any, **options: Any) -> Any:
            result = super()._wait(*arguments, **options)
            forks.check()
            return result

    return ForkSafe


# -- the kernel's knowledge --------------------------------------------------------------------------------------------


if sys.platform == "linux":
    import fcntl
    import termios

    def _held_by_kernel(descriptor: int) -> int | None:
        """Bytes written to the socket that the far side has not taken; None where the kernel does not tell."""
        answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0")
        return int.from_bytes(answer, sys.byteorder)

else:

    def _held_by_kernel(descriptor: int) -> int | None:
        return None


class _HangUp:
    """Whether the far side of a socket has closed, or shut down its writing. Does not wait."""

    def __init__(self, descriptor: int) -> None:
        # The unpatched poll(2): gevent's would switch to the hub, and this is asked between two statements.
        self._poll = native.original("select", "poll")()
        self._poll.register(descriptor, getattr(select, "POLLRDHUP", 0))

    def seen(self) -> bool:
        return bool(self._poll.poll(0))
