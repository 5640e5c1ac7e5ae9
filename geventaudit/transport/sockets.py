"""Open ways to the agent, and what each can know about what it delivered.

========================  ==========================================================================================
connection                a frame counts as delivered when
========================  ==========================================================================================
with ``require_ack``      the agent said that it has it, by the Forward protocol's acknowledgement
:class:`DomainSocket`     the agent's process has read it from the socket (Linux; elsewhere: when it was written)
:class:`TCP`              the kernel of the agent's host has acknowledged it (Linux; elsewhere: when it was written)
:class:`NoOp`             at once; it goes nowhere
========================  ==========================================================================================

Anything with the methods of :class:`Connection` can stand in for these.
"""

from __future__ import annotations

import errno
import os
import select
import socket as _constants
import stat
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, runtime_checkable

import gevent
from gevent.event import Event

from .. import fork, native
from ..acks import AckWindow
from ..encoder.encoding import pack, unpack_first
from ..errors import ConnectionFailedError, FrameError, logger, show
from ..handshake import ClientSide, HandshakeError, check_secret

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["TCP", "Connection", "DomainSocket", "NoOp", "usual_path"]

_MDSD_SOCKETS = ("/var/run/mdsd/asa/default_fluent.socket", "/var/run/mdsd/default_fluent.socket")


_HELO_SECONDS = 0.05  # at the least; three times what connecting took, where that is more
_MAX_LINKS = 40  # as the kernel's
_MAX_PORT = 65535
_MEMBERS = ("name", "write", "delivered", "wait_broken", "close")  # of a Connection
_HELO = pack(["HELO", 0])[:-1]


@runtime_checkable
class Connection(Protocol):
    """One open way to an agent. Make one of your own by having these; no base class is needed.

    A connection is open when its constructor returns, is used by one client, and is never used again after anything has
    failed on it: the client closes it and asks its factory for another.
    """

    name: str
    """What kind it is, for the heartbeat: ``UnixDomainSocket``, ``TCP``, ..."""

    # A connection may also have ``read_before_hang_up``, a bool: whether the far side is known to have read from it
    # before it hung up. Only then can a record be suspected to be what made it hang up.

    def write(self, frames: Sequence[bytes]) -> None:
        """Write whole frames, one after the other, waiting as a greenlet does where it must.

        :raises Exception: anything; the connection counts as broken then, with an unknown part of *frames* written.
        """

    def delivered(self) -> int:
        """How many frames, counted from the first that was written, the far side has taken for certain.

        Never falls, never waits, never raises. Where nothing is known, the number of frames written.
        """

    def wait_broken(self) -> None:
        """Wait until the far side hangs up, and say why by raising; runs in a greenlet of its own.

        :raises Exception: what happened. A connection that cannot break waits for ever.
        """

    def close(self) -> None:
        """Let go of everything, at once. May be called more than once, and while another greenlet is writing.

        It is called in forked children too, for a connection that is the parent's: close, and neither write nor shut
        down anything.
        """


class _Closing:
    """``with`` support, for those who use a connection by hand."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _SocketConnection(_Closing):
    """What Unix sockets and TCP have in common once they are connected."""

    name: str

    read_before_hang_up = False
    """Whether the agent has read something and then hung up, rather than hung up without reading."""

    def __init__(self, sock: Any, where: str, write_timeout: float | None, acks: Acks | None) -> None:
        self._where = where
        self._ack_timeout = acks.timeout if acks else 0.0
        self._acks = AckWindow(acks.batch_records) if acks else None
        self._read_some = False
        self._write_timeout = write_timeout
        self._sock = sock
        self._sock.settimeout(write_timeout)
        self._hang_up = _HangUp(sock.fileno())
        self._written = 0  # bytes
        self._ends: deque[int] = deque()  # the position behind each frame that is not known to be delivered
        self._delivered = 0  # frames
        self._closed = False
        self._believed_from = 0.0  # monotonic; nothing counts as delivered before
        fork.track(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._where}{' closed' if self._closed else ''}>"

    def write(self, frames: Sequence[bytes]) -> None:
        """See :meth:`Connection.write`.

        :raises ConnectionFailedError: when the agent hung up, or took no byte for ``write_timeout`` seconds.
        """
        self._check_open()
        if self._acks is not None:
            left = memoryview(self._acks.written(frames, time.monotonic()))
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
                    self._read_some = self._taken() > 0
        except OSError as error:
            self.close()
            if _is_ours(error):
                raise ConnectionFailedError(
                    f"{self._where}: the agent took nothing for {self._write_timeout} seconds"
                ) from error
            self.read_before_hang_up = self._read_some
            raise self._failure("could not write", error) from error
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
        if time.monotonic() < self._believed_from:
            return 0
        held = self._held()
        if held is None:
            return self._written
        return 0 if self._hang_up.seen() else self._written - held

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
                self.read_before_hang_up = self._read_some
                raise self._failure("broke", error) from error
            if data and data.startswith(_HELO):
                raise ConnectionFailedError(
                    f"{self._where}: the agent asks for a shared key (TCP(..., shared_key=...))"
                )
            if data == b"":
                # An agent that closes with something unread resets the connection, or leaves it untaken here.
                self.read_before_hang_up = self._written > 0 and not self._closed and not self._held()
                raise ConnectionFailedError(f"{self._where}: the agent hung up")
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
        left = since + self._ack_timeout - time.monotonic()
        if left > 0:
            return left
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
        if self._closed:
            raise ConnectionFailedError(f"{self._where}: the connection is closed")

    def _failure(self, what: str, error: OSError) -> ConnectionFailedError:
        return ConnectionFailedError(f"{self._where}: {what}: {error.strerror or error}")


def _is_ours(error: OSError) -> bool:
    """Whether it is the timeout that was set on the socket, and not the kernel's ETIMEDOUT."""
    return isinstance(error, TimeoutError) and error.errno is None


def check_connection(candidate: object, must: str, hint: str = "") -> None:
    """Refuse what is no connection; *must* says who had to give one.

    A class has all that its instances have, so it would do by its attributes alone.

    :raises TypeError: it is none; it names what is missing.
    """
    if isinstance(candidate, type):
        raise TypeError(f"{must} a Connection, got the class {candidate.__name__}, not an instance: call it")
    missing = [name for name in _MEMBERS if not hasattr(candidate, name)]
    if missing:
        raise TypeError(f"{must} a Connection, got {show(candidate)}, which has no {', '.join(missing)}{hint}")


def check_seconds(name: str, seconds: object, *, or_none: bool = False) -> None:
    """Refuse what is no time to wait.

    :raises TypeError, ValueError: it is no number, or not above 0.
    """
    if or_none and seconds is None:
        return
    right = f"{name} must be a number of seconds above 0{', or None for ever' if or_none else ''}"
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{right}, got {show(seconds)}")
    if not seconds > 0 or (or_none and seconds == float("inf")):  # NaN is not above anything
        raise ValueError(f"{right}, got {show(seconds)}")


def check_context(ssl: object) -> None:
    """Refuse what cannot speak TLS. A context that was made before patching can, too.

    :raises TypeError: it is neither an SSLContext nor None.
    """
    if ssl is not None and not isinstance(ssl, native.original("ssl", "SSLContext")):
        raise TypeError(f"ssl must be an ssl.SSLContext, got {show(ssl)}")


def checked_address(address: object, lowest_port: int = 1) -> tuple[str, int]:
    """Host and port.

    :raises TypeError, ValueError: they are none.
    """
    match address:
        case (str() as host, int() as port):
            if isinstance(port, bool) or not lowest_port <= port <= _MAX_PORT:
                raise ValueError(
                    f"the port in address must be a whole number from {lowest_port} to {_MAX_PORT}, got {show(port)}"
                )
            return host, port
        case str():
            example = "('agent.example.com', 24224) and not 'agent.example.com:24224'"
        case _:
            example = "('agent.example.com', 24224)"
    raise TypeError(f"address must be a host name and a port number, such as {example}, got {show(address)}")


def _peer_of(sock: Any) -> tuple[int, int]:
    process, user, _ = struct.unpack("iII", sock.getsockopt(_constants.SOL_SOCKET, _constants.SO_PEERCRED, 12))
    return process, user


def _check_peer(sock: Any, where: str, uid: int) -> None:
    """Refuse an agent of another user: whoever may make a file in that place may listen there."""
    _, theirs = _peer_of(sock)
    if theirs != uid:
        raise ConnectionFailedError(f"{where}: refused: the agent runs as user {theirs}, not {uid}")


def _check_directories(path: str, where: str) -> None:
    """Refuse a path where anybody can put something else in the place of one of its parts: a link on the way, too.

    So it is gone as the kernel goes it, and not from where it ends, as the directories of a link are not on that way.
    """
    folder = "/"
    ahead = os.path.join(os.getcwd(), path).split("/")[::-1]
    links = 0
    while ahead:
        part = ahead.pop()
        if part in ("", ".", ".."):
            folder = os.path.dirname(folder) if part == ".." else folder
            continue
        mode = os.stat(folder).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ConnectionFailedError(
                f"{where}: refused: anybody can write to {folder} and it has no sticky bit, "
                "so anybody can put a socket of their own there"
            )
        inner = os.path.join(folder, part)
        if not stat.S_ISLNK(os.lstat(inner).st_mode):
            folder = inner
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink(inner)
        ahead += target.split("/")[::-1]
        folder = "/" if target.startswith("/") else folder


def _own_name() -> str:
    """What this side calls itself in the handshake: one of a kind, and never the agent's name, which agents refuse."""
    return f"geventaudit-{os.getpid()}@{_constants.gethostname()}"


def _shake_hands(sock: Any, side: ClientSide, where: str) -> None:
    """The Forward protocol's handshake, within whatever time limit the caller has set."""

    def read() -> Any:
        data = b""
        while (first := unpack_first(data)) is None:
            more = sock.recv(4096)
            if not more:
                raise ConnectionFailedError(f"{where}: the agent hung up during the handshake")
            data += more
        return first[0]

    try:
        sock.sendall(side.ping(read()))
        side.check(read())
    except (HandshakeError, FrameError) as error:
        raise ConnectionFailedError(f"{where}: refused: {error}") from None


class Acks(NamedTuple):
    """How acknowledgements are asked for."""

    timeout: float
    batch_records: int


def _acks(require_ack: bool, ack_timeout: float, batch_records: int) -> Acks | None:
    check_seconds("ack_timeout", ack_timeout)
    if isinstance(batch_records, bool) or not isinstance(batch_records, int) or batch_records < 1:
        raise ValueError(f"batch_records must be a whole number of at least 1, got {show(batch_records)}")
    return Acks(ack_timeout, batch_records) if require_ack else None


class DomainSocket(_SocketConnection):
    """A connection over a Unix stream socket.

    :param path: the agent's socket. Without one, the first of mdsd's two usual paths that exists, or the second.
    :param timeout: seconds that connecting may take.
    :param write_timeout: seconds that the agent may take no byte of a write before the connection is given up; None for
        ever.
    :param peer_uid: refuse an agent whose process runs as another user than the one with this number (Linux).
    :param strict: refuse a path where a directory on the way, that of a link too, is writable for everybody and has no
        sticky bit.
    :param require_ack: a frame is delivered when the agent acknowledges it, as Fluent Bit does (Fluentd over TCP only).
    :param ack_timeout: seconds that an acknowledgement may take before the connection is given up.
    :param batch_records: records that may share an acknowledgement, when they are there anyway.
    :raises ValueError, TypeError: for parameters that cannot be.
    :raises ConnectionFailedError: when there is no connection to be had; it names the path and the cause.
    """

    name = "UnixDomainSocket"

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = 10.0,
        write_timeout: float | None = 15.0,
        require_ack: bool = False,
        ack_timeout: float = 60.0,
        batch_records: int = 64,
        peer_uid: int | None = None,
        strict: bool = False,
    ) -> None:
        check_seconds("timeout", timeout, or_none=True)
        check_seconds("write_timeout", write_timeout, or_none=True)
        acks = _acks(require_ack, ack_timeout, batch_records)
        if not isinstance(path, str | os.PathLike | None):
            raise TypeError(f"path must be text or a Path, such as {_MDSD_SOCKETS[0]!r}, got {show(path)}")
        if path == "":
            raise ValueError(f"path must not be empty: give the agent's socket, such as {_MDSD_SOCKETS[0]!r}")
        if peer_uid is not None and (isinstance(peer_uid, bool) or not isinstance(peer_uid, int) or peer_uid < 0):
            raise TypeError(
                f"peer_uid must be the number of a user, such as pwd.getpwnam(name).pw_uid, got {show(peer_uid)}"
            )
        self.path = usual_path() if path is None else os.fspath(path)
        sock = _new_socket(_constants.AF_UNIX)
        try:
            where = f"unix:{self.path}"
            if strict:
                _check_directories(self.path, where)
            _connect_unix(sock, self.path, timeout)
            if peer_uid is not None:
                _check_peer(sock, where, peer_uid)
            super().__init__(sock, where, write_timeout, acks)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            sock.close()
            reason = getattr(error, "strerror", None) or error
            raise ConnectionFailedError(f"unix:{self.path}: could not connect: {reason}") from error
        except BaseException:
            sock.close()
            raise

    def peer(self) -> tuple[int, int]:
        """The agent's process number, 0 where this process cannot see it, and the number of its user (Linux)."""
        return _peer_of(self._sock)


class TCP(_SocketConnection):
    """A connection over TCP, with keep-alive and without delay.

    :param address: host name or address, and port. Names are resolved without blocking other greenlets.
    :param timeout: seconds that resolving, connecting, TLS and the handshake may take.
    :param write_timeout: seconds that the agent may take no byte of a write before the connection is given up; None for
        ever.
    :param ssl: speak TLS by this ``ssl.SSLContext``; it decides what is verified (``ssl.create_default_context()``:
        certificate and host name) and may hold a client certificate.
    :param server_hostname: the name that the agent's certificate must have, where it is not the host of *address*.
    :param shared_key: do the Forward protocol's handshake, and refuse an agent that does not know this key.
    :param username: for an agent that asks for users as well.
    :param password: theirs.
    :param require_ack: a frame is delivered when the agent acknowledges it, as Fluent Bit and Fluentd do.
    :param ack_timeout: seconds that an acknowledgement may take before the connection is given up.
    :param batch_records: records that may share an acknowledgement, when they are there anyway.
    :raises ValueError, TypeError: for parameters that cannot be.
    :raises ConnectionFailedError: when there is no connection to be had; it names the address and the cause.
    """

    name = "TCP"

    def __init__(
        self,
        address: tuple[str, int],
        *,
        timeout: float | None = 10.0,
        write_timeout: float | None = 15.0,
        require_ack: bool = False,
        ack_timeout: float = 60.0,
        batch_records: int = 64,
        ssl: SSLContext | None = None,
        server_hostname: str | None = None,
        shared_key: str | None = None,
        username: str = "",
        password: str = "",
    ) -> None:
        check_seconds("timeout", timeout, or_none=True)
        check_seconds("write_timeout", write_timeout, or_none=True)
        acks = _acks(require_ack, ack_timeout, batch_records)
        check_context(ssl)
        if server_hostname and ssl is None:
            raise ValueError(f"server_hostname is the name in a certificate, got {show(server_hostname)}: give ssl too")
        if username and shared_key is None:
            raise ValueError("username and password are part of the handshake: give shared_key too")
        if shared_key is not None:
            for name, secret in (("shared_key", shared_key), ("username", username), ("password", password)):
                check_secret(name, secret)
        host, port = checked_address(address)
        where = f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
        sock: Any = None
        began = time.monotonic()
        limit = gevent.Timeout(timeout)
        try:
            with limit:
                host.encode("idna")  # here, and not in a thread of the resolver, which would print the error as well
                sock = _connect_tcp(host, port, timeout)
                if sock.getsockname() == sock.getpeername():
                    # Connecting to a local port that nobody listens on can pick that very port for this side.
                    raise ConnectionFailedError(f"{where}: could not connect: nobody listens (it met itself)")
                sock.setsockopt(_constants.IPPROTO_TCP, _constants.TCP_NODELAY, 1)
                sock.setsockopt(_constants.SOL_SOCKET, _constants.SO_KEEPALIVE, 1)
                if ssl is not None:
                    # Imported here: an application may import this module before it patches, and patching warns when
                    # ssl was imported before. gevent's socket takes any context, also that of an unpatched ssl.
                    from gevent.ssl import SSLSocket

                    sock = SSLSocket(
                        sock=sock,
                        server_hostname=(server_hostname or host) if ssl.check_hostname or server_hostname else None,
                        do_handshake_on_connect=False,
                        _context=ssl,
                    )
                    sock.settimeout(timeout)
                super().__init__(sock, where, write_timeout, acks)
                if ssl is not None:
                    sock.do_handshake()
                if shared_key is not None:
                    side = ClientSide(_own_name(), shared_key, username, password)
                    _shake_hands(sock, side, where)
                elif acks is None:
                    # The kernel acknowledges for an agent that wants a handshake too, and throws away all else. Such an
                    # agent says so at once, so what was written is not believed to have arrived before it could.
                    now = time.monotonic()
                    self._believed_from = now + max(_HELO_SECONDS, 3 * (now - began))
        except BaseException as error:
            if sock is not None:
                sock.close()
            if error is limit:
                raise ConnectionFailedError(f"{where}: could not connect: not within {timeout} seconds") from None
            if isinstance(error, OSError | ValueError):  # ValueError: names that cannot be
                reason = getattr(error, "verify_message", None) or getattr(error, "strerror", None) or error
                raise ConnectionFailedError(f"{where}: could not connect: {reason}") from error
            raise


class NoOp(_Closing):
    """Goes nowhere: what is written counts as delivered and is gone. For tests, and for switching auditing off.

    It says so in the log whenever one is made, so that auditing is never off without anybody noticing.
    """

    name = "NoOP"

    def __init__(self) -> None:
        self._written = 0
        self._closed = Event()
        logger().warning("audit records go nowhere: the connection is a NoOp")

    def write(self, frames: Sequence[bytes]) -> None:
        """See :meth:`Connection.write`."""
        if self._closed.is_set():
            raise ConnectionFailedError("noop: the connection is closed")
        self._written += len(frames)

    def delivered(self) -> int:
        """See :meth:`Connection.delivered`."""
        return self._written

    def wait_broken(self) -> None:
        """See :meth:`Connection.wait_broken`: when it is closed."""
        self._closed.wait()
        raise ConnectionFailedError("noop: the connection is closed")

    def close(self) -> None:
        """See :meth:`Connection.close`."""
        self._closed.set()


def let_go(connection: Connection) -> None:
    """Close *connection* when the hub that watched it is gone.

    gevent's own way would ask that hub to stop watching first. A loop that never runs again does not mind. A
    connection of a user's own is left alone: how that closes is not known.
    """
    if isinstance(connection, _SocketConnection):
        connection._closed = True
        connection._sock._sock.close()


# -- the kernel's knowledge --------------------------------------------------------------------------------------------


def usual_path() -> str:
    return next((path for path in _MDSD_SOCKETS if os.path.exists(path)), _MDSD_SOCKETS[-1])


def _new_socket(family: int) -> Any:
    from gevent.socket import socket  # by who connects; a service that is patched has it loaded

    return socket(family, _constants.SOCK_STREAM)


def _connect_tcp(host: str, port: int, timeout: float | None) -> Any:
    """A connected socket. A literal address needs no resolver, and so no thread of gevent's pool."""
    try:
        family = _constants.AF_INET if ip_address(host).version == 4 else _constants.AF_INET6
    except ValueError:
        from gevent.socket import create_connection

        return create_connection((host, port), timeout)
    sock = _new_socket(family)
    try:
        sock.settimeout(timeout)
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_unix(sock: Any, path: str, timeout: float | None) -> None:
    """Connect *sock*, also to an agent whose backlog is full: the kernel says "try again" then and gives no event."""
    deadline = None if timeout is None else time.monotonic() + timeout
    sock.settimeout(0.0)
    pause = 0.001
    while True:
        code = sock.connect_ex(path)
        if code == 0:
            return
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, os.strerror(code))
        if deadline is not None and time.monotonic() + pause > deadline:
            raise OSError(errno.ETIMEDOUT, f"the agent accepted nobody for {timeout} seconds")
        gevent.sleep(pause)
        pause = min(pause * 2, 0.1)


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
