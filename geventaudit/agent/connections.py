"""One connection of the agent: its handshakes, its reads, and its share of the hub's time."""

from __future__ import annotations

import _socket
import fcntl
import socket as std_socket
import struct
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gevent
from gevent import socket as gsocket
from gevent.event import Event

from ..protocol.decoding import unpack_first
from ..protocol.handshake import AgentSide, HandshakeError
from ..runtime.clock import monotonic

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Link", "Settings", "Turn"]

_READ_BYTES = 1 << 14
_ROUND_SECONDS = 0.02  # for one turn of each connection
_TURN_SECONDS = (0.001, 0.01)  # the shortest and the longest turn
_PAUSE_SECONDS = 0.001
_FEW_CONNECTIONS = 4
_MAX_PING_BYTES = 4096
_LINGER_SECONDS = 2.0
_LAST_SECONDS = 2.0
_LAST_ENTRIES = 1000  # more than one read can hold of valid messages in frames of their own


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of all connections of one agent, as for :class:`~geventaudit.agent.Agent`."""

    ssl: SSLContext | None
    shared_key: str | None
    users: Mapping[str, str] | None
    stall_timeout: float
    idle_timeout: float | None


class Link:
    """One connection of the agent."""

    def __init__(self, sock: Any, settings: Settings) -> None:
        sock.settimeout(settings.stall_timeout)
        self.sock = sock
        """The socket; a TLS socket once the TLS handshake has begun."""
        self.received = 0
        """Bytes that were read."""
        self.handled = 0
        """The bytes of them whose messages were handed over and acknowledged."""
        self.goal = 0
        """Bytes to be handled before the connection may be closed."""
        self.unfinished = 0
        """Bytes that are held of a frame that is not complete."""
        self.takes_acks = True
        """False once nothing can be written to the sender."""
        self.end = "the agent hung up"
        """Why the connection was closed, once it is."""
        self._settings = settings

    def welcome(self) -> bytes:
        """Do the TLS and Forward handshakes that are configured. Return the bytes that were read behind them.

        :raises HandshakeError: the peer does not keep to them, or does not know the key, or is too slow.
        """
        data = b""
        settings = self._settings
        if settings.ssl is None and settings.shared_key is None:
            return data
        too_slow = HandshakeError(f"no TLS or handshake in {settings.stall_timeout} seconds")
        try:
            with gevent.Timeout(settings.stall_timeout, too_slow):
                if settings.ssl is not None:
                    # Imported here: patching warns when ssl was imported before. gevent's socket takes any context.
                    from gevent.ssl import SSLSocket

                    self.sock = SSLSocket(
                        sock=self.sock, server_side=True, do_handshake_on_connect=False, _context=settings.ssl
                    )
                    self.sock.settimeout(settings.stall_timeout)
                    self.sock.do_handshake()
                if settings.shared_key is not None:
                    data = self._shake_hands(AgentSide(_hostname(), settings.shared_key, settings.users))
        except OSError as error:
            raise HandshakeError(f"no TLS or handshake: {error}") from None
        return data

    def _shake_hands(self, side: AgentSide) -> bytes:
        self._write(side.helo())
        data = b""
        while (first := unpack_first(data, _MAX_PING_BYTES)) is None:
            more = self.sock.recv(4096)
            if not more:
                raise HandshakeError("hung up during the handshake")
            data += more
        pong, refused = side.pong(first[0])
        self._write(pong)
        if refused:
            raise HandshakeError(refused)
        return data[first[1] :]

    def read(self, reading: Event, begun: float | None) -> bytes:
        """Return the next bytes, b"" at the end of the stream.

        Nothing is read while *reading* is not set.

        :param begun: since when a frame is being read (monotonic seconds); None between frames.
        :raises HandshakeError: the frame is not complete within the stall timeout.
        :raises IdleError: nothing came for the idle timeout.
        """
        while True:
            reading.wait()
            left = self._settings.idle_timeout
            error: Exception = IdleError()
            if begun is not None:
                left = begun + self._settings.stall_timeout - monotonic()
                error = HandshakeError(f"a frame is not complete after {self._settings.stall_timeout} seconds")
                if left <= 0:
                    raise error
            if not (self._settings.ssl is not None and self.sock.pending()):
                gsocket.wait_read(self.sock.fileno(), left, error)
            if reading.is_set():  # it may have been cleared while this waited
                data: bytes = self.sock.recv(_READ_BYTES)
                return data

    def read_rest(self) -> bytes:
        """Return the next bytes after :meth:`end_writing`, b"" at the end or after two seconds without any."""
        try:
            if not (self._settings.ssl is not None and self.sock.pending()):
                gsocket.wait_read(self.sock.fileno(), _LINGER_SECONDS)
            data: bytes = self.sock.recv(_READ_BYTES)
        except OSError:
            return b""
        return data

    def acknowledge(self, ack: bytes) -> bool:
        """Write an acknowledgement. Return False if the sender takes none any more.

        :raises TimeoutError: the sender does not read them.
        """
        try:
            self._write(ack)
        except TimeoutError:  # an OSError too
            raise
        except OSError:
            # The sender is gone, or this side ended writing. What was sent before is still there to be read.
            self.takes_acks = False
        return self.takes_acks

    def _write(self, data: bytes) -> None:
        if self._settings.ssl is not None:  # takes no flags: with TLS, SIGPIPE at its default ends the process
            self.sock.sendall(data)
        else:
            self.sock.sendall(data, std_socket.MSG_NOSIGNAL)

    def peer(self) -> str:
        """Return the process at the other end of a Unix socket, or the address at the other end of TCP."""
        if self.sock.family == _socket.AF_UNIX:
            process, _, _ = struct.unpack("3i", self.sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
            return f"process {process}"
        try:
            host, port, *_ = self.sock.getpeername()
        except OSError:
            return "a sender that has hung up"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def unread(self) -> int:
        """Return how many bytes the socket holds; with TLS, of encrypted data."""
        if self.sock.fileno() < 0:
            return 0
        answer = fcntl.ioctl(self.sock.fileno(), termios.FIONREAD, b"\0\0\0\0")
        return int.from_bytes(answer, sys.byteorder)

    def is_settled(self) -> bool:
        """Return True if the goal is reached: by a sender that goes on sending too."""
        return self.handled == self.received and (self.handled >= self.goal or not self.unread())

    def end_writing(self) -> None:
        """Send nothing more, so that the sender hangs up. Receive nothing more where the system can refuse it."""
        self.takes_acks = False
        if self.sock.fileno() < 0:
            return
        # The methods of gevent's sockets would end the wait of another greenlet, and that of TLS also stops decrypting.
        plain = _socket.socket(fileno=self.sock.fileno())
        try:
            # Over TCP, received data would still be acknowledged by the kernel after SHUT_RD, and then lost.
            plain.shutdown(_socket.SHUT_RDWR if plain.family == _socket.AF_UNIX else _socket.SHUT_WR)
        except OSError:
            pass  # the sender has hung up already
        finally:
            plain.detach()


class IdleError(Exception):
    """A sender sent nothing for the idle timeout."""


class Turn:
    """The time for which one connection handles messages without letting others run.

    A greenlet that is killed while others run goes on for a while all the same: it has read its data, so that a sender
    that asks for no acknowledgement takes them for delivered.

    :param connections: how many share the hub's time.
    """

    def __init__(self, connections: int) -> None:
        shortest, longest = _TURN_SECONDS
        self._seconds = min(max(_ROUND_SECONDS / connections, shortest), longest)
        self._over = monotonic() + self._seconds
        self._last = _LAST_ENTRIES
        self.killed: gevent.GreenletExit | None = None
        self.has_time = connections <= _FEW_CONNECTIONS
        """True if so few connections share the time that short good frames need no pause. Then what was read has been
        handed over before anything else runs."""

    def end_when_over(self) -> None:
        """Let others run if the time is over.

        :raises GreenletExit: the greenlet was killed, and has gone on for long enough.
        """
        if self.killed is not None:
            self._last -= 1
            if self._last <= 0 or monotonic() > self._over:
                raise self.killed
        elif monotonic() > self._over:
            try:
                gevent.sleep(_PAUSE_SECONDS)  # with 0 the hub may come back many times before it looks at any socket
            except gevent.GreenletExit as killed:
                self.killed = killed
            self._over = monotonic() + (self._seconds if self.killed is None else _LAST_SECONDS)


def _hostname() -> str:
    """Return the agent's name: not just the host's, which a client may have taken for its own."""
    return f"agent@{std_socket.gethostname()}"
