"""The receiving end, for development and tests: an audit agent over a Unix socket or TCP.

It is strict, and says what it refuses: a stream that is no Forward stream is closed, with the offset and the reason in
the log; a message that breaks the rules is counted and told, and its stream goes on. A frame whose option has a
``chunk`` is acknowledged once all of its messages were handed over.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import socket as std_socket
import stat
import sys
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import gevent
from gevent import socket as gsocket
from gevent.event import Event
from gevent.server import StreamServer

from ..errors import FrameError, ValidationError, logger, show
from ..protocol.acks import ack_of
from ..protocol.decoding import Decoder, Entry, Frame, message_of, unpack_first
from ..protocol.handshake import AgentSide, HandshakeError, check_secret
from ..records import AuditType, Diagnostic, Heartbeat, Msg
from ..runtime.clock import Deadline, monotonic
from ..schema.rules import TYPE_NAMES, MsgSchema, RecordSchema, by_record, service_tree_uuid
from ..transport.connection import check_context, check_seconds, checked_address

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Agent", "AgentCounts", "Received", "Refused"]

_log = logger("agent")

_BACKLOG = 1024
_READ_BYTES = 1 << 16
_MAX_PING_BYTES = 4096

# Good messages in small frames are handed over as soon as they are read; there is no end to what else a read can hold.
_FEW_ENTRIES = 64
_TURN_SECONDS = 0.01
_PAUSE_SECONDS = 0.001
_LAST_SECONDS = 2.0
_KILL_SECONDS = 5.0
_LAST_ENTRIES = 1000  # more than one read can hold of valid messages in frames of their own
_MAX_TOLD = 100
_MAX_FIELDS = 1000

MAX_UNFINISHED_BYTES = 64 << 20
"""What all connections together may hold in frames that are not complete, or not all handed over; who goes beyond it is
closed."""


class Received(NamedTuple):
    """One message as it arrived."""

    message: Msg | Heartbeat | Diagnostic
    """What it says, after the rules found nothing wrong with it."""
    time: float
    """When it happened, in seconds since 1970."""
    service_tree_id: str | None
    """The service it is of (``env_ikey``), where it says so."""


class Refused(NamedTuple):
    """One message that broke the rules."""

    error: Exception
    """What is wrong with it."""
    tag: str
    """Its type, as the frame has it."""
    time: float
    """When it happened, in seconds since 1970."""
    body: dict[Any, Any]
    """The rest of it, as it came."""


@dataclass(slots=True)
class AgentCounts:
    """What an agent has seen since it was made, restarts included."""

    connections: int = 0
    """Connections that came, those that were turned away included."""
    open_connections: int = 0
    """Those that are open now."""
    bytes: int = 0
    """Bytes that were read, without those of handshakes."""
    frames: int = 0
    """Whole frames."""
    messages: int = 0
    """Valid messages, heartbeats included."""
    heartbeats: int = 0
    """Heartbeats among them."""
    refused: int = 0
    """Messages that broke the rules."""
    broken_streams: int = 0
    """Connections closed because what came was no frame, or because the callback raised."""
    half_frames: int = 0
    """Connections that ended in the middle of a frame."""
    acks: int = 0
    """Acknowledgements that were sent."""
    turned_away: int = 0
    """Those that were refused: too many, no TLS, a wrong key, or too slow."""


class Agent:
    """Listens, decodes, validates, and hands messages on.

    :param address: the path of a Unix socket, or host and port (port 0 picks a free one, see :attr:`address`).
    :param on_message: called with each valid message, one at a time for each connection. Raising closes that
        connection without an acknowledgement.
    :param on_refused: called with each message that broke the rules; without one they are logged. Of one frame, the
        first 100 are told; the others are counted, and how many they were is logged.
    :param schema: stricter rules: an instance of a subclass of :class:`~geventaudit.RecordSchema`.
    :param max_frame_bytes: a longer frame closes its connection.
    :param ssl: speak TLS by this ``ssl.SSLContext``.
    :param shared_key: let nobody in who does not know this key, by the Forward protocol's handshake.
    :param users: passwords by user name, asked for in the handshake.
    :param max_connections: more are closed at once.
    :param stall_timeout: seconds that a connection may take for TLS and handshake, and to complete a frame that it has
        begun; one that sends nothing between frames may take for ever.
    :raises ValueError, TypeError: for parameters that cannot be.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | tuple[str, int],
        on_message: Callable[[Received], object],
        *,
        on_refused: Callable[[Refused], object] | None = None,
        schema: RecordSchema | None = None,
        max_frame_bytes: int = 8 << 20,
        ssl: SSLContext | None = None,
        shared_key: str | None = None,
        users: Mapping[str, str] | None = None,
        max_connections: int = 10_000,
        stall_timeout: float = 30.0,
    ) -> None:
        self.address: str | tuple[str, int] = _checked(address)
        if not callable(on_message):
            raise TypeError(f"on_message must be callable, got {show(on_message)}: pass a function of a message")
        if on_refused is not None and not callable(on_refused):
            raise TypeError(f"on_refused must be callable, got {show(on_refused)}: pass a function of what is refused")
        check_context(ssl)
        check_seconds("stall_timeout", stall_timeout)
        if users is not None and shared_key is None:
            raise ValueError("users are part of the handshake: give shared_key too")
        if shared_key is not None:
            check_secret("shared_key", shared_key)
        for name, password in (users or {}).items():
            check_secret("a name in users", name)
            check_secret("a password in users", password)
        self._ssl = ssl
        self._shared_key = shared_key
        self._users = users
        self._max_connections = max_connections
        self._stall_timeout = stall_timeout
        self._unfinished = 0  # bytes of frames that are not complete, over all connections
        self._on_message = on_message
        self._on_refused = on_refused
        self._schema = MsgSchema(record=schema)
        self._max_frame_bytes = max_frame_bytes
        self._counts = AgentCounts()
        self._server: StreamServer | None = None
        self._inode: int | None = None
        self._connections: dict[Any, _Link] = {}  # by greenlet
        self._run = _Run()
        self._reading = Event()
        self._reading.set()
        self._acknowledging = True

    # -- control -------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen. A socket file that a dead agent left behind is replaced.

        :raises OSError: the address cannot be had, or another agent listens there.
        """
        if self._server is not None:
            raise RuntimeError("the agent runs already")
        listener = _listen_tcp(self.address) if isinstance(self.address, tuple) else _listen_unix(self.address)
        if isinstance(self.address, tuple):
            self.address = (self.address[0], listener.getsockname()[1])
        elif not self.address.startswith("\0"):  # an abstract address has no file
            self._inode = os.stat(self.address).st_ino
        self._run = _Run()
        self._server = StreamServer(listener, partial(self._serve, self._run))
        self._server.start()
        return self

    def stop(self, timeout: float = 1.0) -> None:
        """Stop listening, read and acknowledge what has been received, tell all senders to hang up, and close.

        Connections that are established and not accepted yet are read too. On a Unix socket nothing can be sent after
        that, so this method does not wait for the senders. Over TCP, what a sender writes until it hangs up is read
        too, and not acknowledged.

        :param timeout: the most seconds that all of this takes. With 0, or while reading is stopped, what has been
            received stays unread, as when an agent dies.
        """
        if self._server is None:
            return
        server, run = self._server, self._run
        self._server = None
        deadline = Deadline(timeout)
        drains = timeout > 0 and self._reading.is_set()
        self._remove_file()  # nobody can connect to a Unix socket from here on
        if drains:
            # Without a switch between the last accept() and the close, since closing resets who connected in between.
            _accept_all(server)
        else:
            run.is_over = True
        server.close()
        if drains:
            gevent.sleep(0)  # the greenlets of the connections accepted above begin
            run.is_over = True
            self._read_received(Deadline(timeout / 2))
            others = self._others()
            for link in others.values():
                link.end_writing()
            gevent.joinall(list(others), timeout=deadline.left())
        self.hang_up()

    def _read_received(self, deadline: Deadline) -> None:
        """Wait until every byte that the sockets hold now has been read, and its messages handed over."""
        links = self._others()
        for link in links.values():
            link.goal = link.received + link.unread()
        while not deadline.has_passed():
            links = {each: link for each, link in links.items() if not (each.ready() or link.is_settled())}
            if not links:
                break
            gevent.sleep(_PAUSE_SECONDS)

    def _others(self) -> dict[Any, _Link]:
        """Return the connections, without the one whose callback is running."""
        return {each: link for each, link in self._connections.items() if each is not gevent.getcurrent()}

    def restart(self, timeout: float = 1.0) -> None:
        """Stop, and listen again on the same address."""
        self.stop(timeout)
        self.start()

    def hang_up(self) -> None:
        """Close all connections at once, whatever is unread. From the callback of one of them, all others."""
        others = list(self._others())
        try:
            gevent.killall(others, timeout=_KILL_SECONDS)
        except gevent.Timeout:  # raised where a callback of the user's does not end; they were told
            _log.warning("%d connections are still busy with a message", sum(not each.ready() for each in others))

    def stop_reading(self) -> None:
        """Accept, and read nothing any more: what a stuck agent does."""
        self._reading.clear()

    def resume_reading(self) -> None:
        """Read again."""
        self._reading.set()

    def stop_acknowledging(self) -> None:
        """Take what comes and acknowledge nothing; what is taken meanwhile is never acknowledged."""
        self._acknowledging = False

    def resume_acknowledging(self) -> None:
        """Acknowledge again what comes from now on."""
        self._acknowledging = True

    @property
    def counts(self) -> AgentCounts:
        """A snapshot of the counts."""
        return replace(self._counts, open_connections=len(self._connections))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Agent {self.address} {'running' if self._server else 'stopped'}>"

    def _remove_file(self) -> None:
        """Take the socket file away, if it is still this agent's."""
        if isinstance(self.address, str) and self._inode is not None:
            try:
                if os.stat(self.address).st_ino == self._inode:
                    os.unlink(self.address)
            except FileNotFoundError:
                pass

    # -- one connection ------------------------------------------------------------------------------------------------

    def _serve(self, run: _Run, sock: Any, peer: Any) -> None:
        if run.is_over:  # accepted, and stopped before this began
            sock.close()
            return
        me = gevent.getcurrent()
        self._counts.connections += 1
        if len(self._connections) >= self._max_connections:
            self._turn_away("too many connections")
            sock.close()
            return
        link = self._connections[me] = _Link(sock)
        sock.settimeout(self._stall_timeout)
        decoder = Decoder(max_frame_bytes=self._max_frame_bytes)
        held = 0
        try:
            data = self._welcome(link)
            begun = monotonic()
            while data or (data := self._read(link.sock, begun if decoder.unfinished else None)):
                link.received += len(data)
                self._counts.bytes += len(data)
                finished = 0
                turn = _Turn()
                for frame in decoder.feed(data):
                    finished += 1
                    self._take(frame, link, turn)
                if turn.killed is not None:
                    raise turn.killed
                link.handled = link.received
                data = b""
                if finished or not held:
                    begun = monotonic()
                self._unfinished += decoder.unfinished - held
                held = decoder.unfinished
                if self._unfinished > MAX_UNFINISHED_BYTES:
                    raise FrameError(
                        f"unfinished frames of more than {MAX_UNFINISHED_BYTES} bytes in all", decoder.received
                    )
            if decoder.unfinished:
                self._counts.half_frames += 1
                _log.info("a sender hung up in the middle of a frame, %d bytes of it came", decoder.unfinished)
        except FrameError as error:
            self._counts.broken_streams += 1
            _log.warning("closed a connection: %s", error)
        except (HandshakeError, gevent.Timeout) as error:
            self._turn_away(str(error))
        except OSError as error:
            _log.info("a connection broke: %s", error)
        except Exception:
            self._counts.broken_streams += 1
            _log.exception("closed a connection: the callback raised")
        finally:
            self._unfinished -= held
            del self._connections[me]
            link.sock.close()

    def _turn_away(self, why: str) -> None:
        self._counts.turned_away += 1
        _log.warning("turned a connection away: %s", why)

    def _welcome(self, link: _Link) -> bytes:
        """Do the TLS and Forward handshakes that are configured. Return the bytes that were read behind them."""
        data = b""
        if self._ssl is None and self._shared_key is None:
            return data
        too_slow = HandshakeError(f"no TLS or handshake in {self._stall_timeout} seconds")
        try:
            with gevent.Timeout(self._stall_timeout, too_slow):
                if self._ssl is not None:
                    # Imported here: patching warns when ssl was imported before. gevent's socket takes any context.
                    from gevent.ssl import SSLSocket

                    link.sock = SSLSocket(
                        sock=link.sock, server_side=True, do_handshake_on_connect=False, _context=self._ssl
                    )
                    link.sock.settimeout(self._stall_timeout)
                    link.sock.do_handshake()
                if self._shared_key is not None:
                    data = self._shake_hands(link.sock, AgentSide(_hostname(), self._shared_key, self._users))
        except OSError as error:
            raise HandshakeError(f"no TLS or handshake: {error}") from None
        return data

    def _shake_hands(self, sock: Any, side: AgentSide) -> bytes:
        sock.sendall(side.helo())
        data = b""
        while (first := unpack_first(data, _MAX_PING_BYTES)) is None:
            more = sock.recv(4096)
            if not more:
                raise HandshakeError("hung up during the handshake")
            data += more
        pong, refused = side.pong(first[0])
        sock.sendall(pong)
        if refused:
            raise HandshakeError(refused)
        return data[first[1] :]

    def _read(self, sock: Any, begun: float | None) -> bytes:
        """What comes next. A frame that was *begun* has to be complete within the stall timeout."""
        while True:
            self._reading.wait()
            left = None if begun is None else begun + self._stall_timeout - monotonic()
            stalled = HandshakeError(f"a frame is not complete after {self._stall_timeout} seconds")
            if left is not None and left <= 0:
                raise stalled
            if not (self._ssl is not None and sock.pending()):
                gsocket.wait_read(sock.fileno(), left, stalled)
            if self._reading.is_set():  # it may have been told to stop while it waited
                data: bytes = sock.recv(_READ_BYTES)
                return data

    def _take(self, frame: Frame, link: _Link, turn: _Turn) -> None:
        self._counts.frames += 1
        refused = 0
        for entry in frame.unpack():
            refused += not self._hand_over(frame.tag, entry, tells=refused < _MAX_TOLD)
            if refused or frame.size > _FEW_ENTRIES:
                del entry  # unpacked, it may take a hundred times its size, and many connections may pause
                turn.end_when_over()
        if refused > _MAX_TOLD:
            _log.warning("refused %d more messages of one frame", refused - _MAX_TOLD)
        if frame.chunk is not None and self._acknowledging and link.takes_acks:
            try:
                link.sock.sendall(ack_of(frame.chunk))
            except TimeoutError:  # an OSError too: a sender that reads no acknowledgements is stuck
                raise
            except OSError:
                # The sender is gone, or this side ended writing. What was sent before is still there to be read.
                link.takes_acks = False
            else:
                self._counts.acks += 1

    def _hand_over(self, tag: str, entry: Entry, *, tells: bool) -> bool:
        """One event to the user's function; False when it broke the rules, of which the other function is told."""
        try:
            received = self._validated(tag, entry)
        except (ValidationError, FrameError) as error:
            self._counts.refused += 1
            if tells:
                self._tell(Refused(error, tag, entry.time, entry.body))
            return False
        self._counts.messages += 1
        self._counts.heartbeats += isinstance(received.message, Heartbeat)
        self._on_message(received)
        return True

    def _validated(self, tag: str, entry: Entry) -> Received:
        if tag not in (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE):
            return Received(message_of(tag, entry.body), entry.time, None)
        if len(entry.body) > _MAX_FIELDS:  # a rule would be named for each of them
            raise ValidationError(f"must have the fields of a record, has {len(entry.body)} fields")
        record = dict(entry.body)
        service_tree_id = record.pop("env_ikey", None)
        try:
            msg = self._schema.load({"Type": TYPE_NAMES[AuditType(tag)], "Record": record})
        except ValidationError as error:
            raise ValidationError(by_record(error.messages)) from None
        return Received(msg, entry.time, None if service_tree_id is None else service_tree_uuid(service_tree_id))

    def _tell(self, refused: Refused) -> None:
        if self._on_refused is not None:
            self._on_refused(refused)
        else:
            _log.warning("refused a message (%s): %.2000s", show(refused.tag), refused.error)


class _Run:
    """The time from one start of an agent to its stop."""

    is_over = False


class _Link:
    """A connection as :meth:`Agent.stop` sees it."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        """The socket; a TLS socket once the TLS handshake has begun."""
        self.received = 0
        """Bytes that were read."""
        self.handled = 0
        """The bytes of them whose messages were handed over and acknowledged."""
        self.goal = 0
        """Bytes to be handled before the connection may be closed."""
        self.takes_acks = True
        """False once nothing can be written to the sender."""

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


class _Turn:
    """How long one connection has handled messages without letting anybody else run.

    Who is killed while it lets others run goes on for a while all the same: it has read what there is, so that a sender
    who asks for no acknowledgement takes it for delivered.
    """

    def __init__(self) -> None:
        self._over = monotonic() + _TURN_SECONDS
        self._last = _LAST_ENTRIES
        self.killed: gevent.GreenletExit | None = None

    def end_when_over(self) -> None:
        if self.killed is not None:
            self._last -= 1
            if self._last <= 0 or monotonic() > self._over:
                raise self.killed
        elif monotonic() > self._over:
            try:
                gevent.sleep(_PAUSE_SECONDS)  # with 0 the hub may come back many times before it looks at any socket
            except gevent.GreenletExit as killed:
                self.killed = killed
            self._over = monotonic() + (_TURN_SECONDS if self.killed is None else _LAST_SECONDS)


def _accept_all(server: StreamServer) -> None:
    """Accept the connections that are established, without waiting."""
    for _ in range(_BACKLOG + 1):  # more than that have not been there when this began
        try:
            waiting = server.do_read()
        except OSError as error:  # too many open files, for one
            _log.warning("connections that were not accepted yet are lost: %s", error)
            return
        if waiting is None:
            return
        server.do_handle(*waiting)


def _checked(address: object) -> str | tuple[str, int]:
    if isinstance(address, tuple):
        return checked_address(address, lowest_port=0)
    if isinstance(address, str | os.PathLike):
        return os.fspath(address)
    raise TypeError(f"address must be the path of a socket, or a tuple of host and port, got {show(address)}")


def _hostname() -> str:
    """What the agent calls itself: not just the host, whose name a client may have taken for its own."""
    return f"agent@{std_socket.gethostname()}"


def _listen_tcp(address: tuple[str, int]) -> Any:
    family, kind, _, _, resolved = gsocket.getaddrinfo(*address, type=gsocket.SOCK_STREAM)[0]
    listener = gsocket.socket(family, kind)
    try:
        listener.setsockopt(gsocket.SOL_SOCKET, gsocket.SO_REUSEADDR, 1)
        listener.bind(resolved)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_unix(path: str) -> Any:
    if not path:  # to the system, this is an address that it makes up
        raise OSError(errno.ENOENT, "the path of the socket is empty")
    listener = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not (os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode)):
                link = os.path.islink(path) and not os.path.exists(path)
                what = "link that leads nowhere" if link else "folder" if os.path.isdir(path) else "file"
                raise OSError(error.errno, f"a {what} is there, and no socket: {path}") from None
            if error.errno != errno.EADDRINUSE or not _is_left_behind(path):
                # Python's own complaint, about the length of the path, has neither number nor text.
                number = error.errno or errno.ENAMETOOLONG
                raise OSError(number, f"{error.strerror or error}: {path}") from None
            os.unlink(path)
            listener.bind(path)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_left_behind(path: str) -> bool:
    """Whether *path* is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    probe = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM)
    probe.settimeout(0.0)
    try:
        return bool(probe.connect_ex(path) == errno.ECONNREFUSED)
    finally:
        probe.close()
