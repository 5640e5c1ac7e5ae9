"""A connection of the agent: its handshakes, its reads, and its share of the hub's time."""

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
_LAST_ENTRIES = 1000  # one read holds fewer valid messages in frames of their own


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of all connections of one agent, as for :class:`~geventaudit.agent.Agent`."""

    ssl: SSLContext | None
    shared_key: str | None
    users: Mapping[str, str] | None
    stall_timeout: float
    idle_timeout: float | None


class Link:
    """A connection of the agent."""

    def __init__(self, sock: Any, settings: Settings) -> None:
        sock.settimeout(settings.stall_timeout)
        self.sock = sock
        """The socket; a TLS socket once the TLS handshake has begun."""
        self.received = 0
        """Bytes read."""
        self.handled = 0
        """Bytes of messages that were handed over and acknowledged."""
        self.goal = 0
        """Bytes to be handled before the connection may be closed."""
        self.unfinished = 0
        """Bytes held of an incomplete frame."""
        self.takes_acks = True
        """False once nothing can be written to the sender."""
        self.end = "the agent hung up"
        """The reason for which the connection was closed, once it is."""
        self._settings = settings

    def welcome(self) -> bytes:
        """Do the configured handshakes of TLS and of the Forward protocol. Return the bytes that were read after them.

        :raises HandshakeError: the peer breaks a protocol, does not know the key, or is too slow.
        """
        data = b""
        settings = self._settings
        if settings.ssl is None and settings.shared_key is None:
            return data
        too_slow = HandshakeError(
            f"the TLS or Forward handshake was not complete after {settings.stall_timeout} seconds"
        )
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
            raise HandshakeError(f"the TLS or Forward handshake failed: {error}") from None
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

        :param begun: the start of the current frame in monotonic seconds; None between frames.
        :raises HandshakeError: the frame is not complete within the stall timeout.
        :raises IdleError: nothing arrived within the idle timeout.
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
            if reading.is_set():  # may have been cleared during the wait
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
        """Write an acknowledgement. Return False if the sender has hung up, or if this side has ended writing.

        :raises TimeoutError: the sender does not read its acknowledgements.
        """
        try:
            self._write(ack)
        except TimeoutError:  # an OSError too
            raise
        except OSError:
            # The frames that the sender wrote before it hung up can still be read.
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

    def setsockopt(self, level: int, name: int, value: int | bytes) -> None:
        """Set an option of the socket. Tests break connections by one."""
        self.sock.setsockopt(level, name, value)

    def unread(self) -> int:
        """Return the number of bytes that the socket holds; with TLS, of encrypted data."""
        if self.sock.fileno() < 0:
            return 0
        answer = fcntl.ioctl(self.sock.fileno(), termios.FIONREAD, b"\0\0\0\0")
        return int.from_bytes(answer, sys.byteorder)

    def is_settled(self) -> bool:
        """Return True if the goal is reached, also while the sender continues to send."""
        return self.handled == self.received and (self.handled >= self.goal or not self.unread())

    def end_writing(self) -> None:
        """End writing, so that the sender hangs up. On a Unix socket, end reading too."""
        self.takes_acks = False
        if self.sock.fileno() < 0:
            return
        # shutdown() of a gevent socket would end the wait of another greenlet, and with TLS also stop decrypting.
        plain = _socket.socket(fileno=self.sock.fileno())
        try:
            # Over TCP, the kernel would acknowledge data after SHUT_RD, and lose them.
            plain.shutdown(_socket.SHUT_RDWR if plain.family == _socket.AF_UNIX else _socket.SHUT_WR)
        except OSError:
            pass  # the sender has hung up already
        finally:
            plain.detach()


class IdleError(Exception):
    """A sender sent nothing for the idle timeout."""


class Turn:
    """The time for which one connection handles messages before other greenlets run.

    A greenlet that is killed during its pause continues for a while: it has read data, which count as delivered for a
    sender that asks for no acknowledgement.

    :param connections: the number of connections that share the hub's time.
    """

    def __init__(self, connections: int) -> None:
        shortest, longest = _TURN_SECONDS
        self._seconds = min(max(_ROUND_SECONDS / connections, shortest), longest)
        self._over = monotonic() + self._seconds
        self._last = _LAST_ENTRIES
        self.killed: gevent.GreenletExit | None = None
        self.has_time = connections <= _FEW_CONNECTIONS
        """True if few connections share the time, so that short valid frames need no pause. Then all read messages are
        handed over before other greenlets run."""

    def end_when_over(self) -> None:
        """Let other greenlets run if the time is over.

        :raises GreenletExit: the greenlet was killed, and its time to continue is over.
        """
        if self.killed is not None:
            self._last -= 1
            if self._last <= 0 or monotonic() > self._over:
                raise self.killed
        elif monotonic() > self._over:
            try:
                gevent.sleep(_PAUSE_SECONDS)  # with 0, the hub may return many times before it polls the sockets
            except gevent.GreenletExit as killed:
                self.killed = killed
            self._over = monotonic() + (self._seconds if self.killed is None else _LAST_SECONDS)


def _hostname() -> str:
    """Return the agent's name in the handshake. The plain name of the host may be that of a client."""
    return f"agent@{std_socket.gethostname()}"
