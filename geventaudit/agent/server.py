"""The receiving end, for development and tests: an audit agent over a Unix socket or TCP.

The agent reads all modes of the Forward protocol. It closes a stream that breaks the protocol, and logs the offset and
the reason. It refuses a message that breaks the rules: the message is counted and handed to ``on_refused``, and the
stream stays open. Unknown keys beside those of a message, which agents on the way add (``AuditType``), are kept in
:attr:`Received.extra`.

A frame whose option has a ``chunk`` is acknowledged once all of its messages were handed over, to ``on_message`` or to
``on_refused``. Without ``on_refused``, refusals are logged as warnings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import gevent
from gevent.event import Event
from gevent.server import StreamServer

from ..errors import FrameError, logger, show
from ..protocol.acks import ack_of
from ..protocol.decoding import Decoder
from ..protocol.handshake import HandshakeError, check_secret
from ..runtime.clock import Deadline, monotonic
from ..schema.rules import RecordSchema
from ..transport.connection import check_context, check_seconds
from .arrivals import AgentCounts, Observer, Received, Refused
from .connections import IdleError, Link, Settings, Turn
from .listening import accept_all, checked_listener, listen
from .reception import Reception
from .shown import printable

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Agent"]

_log = logger("agent")

_PAUSE_SECONDS = 0.001
_KILL_SECONDS = 5.0

MAX_UNFINISHED_BYTES = 64 << 20
"""The most bytes of incomplete frames over all connections. Beyond that, the connection with the most is closed."""


class Agent:
    """An agent that listens, decodes, validates, and hands over messages.

    :param address: the path of a Unix socket, or host and port (port 0 picks a free one, see :attr:`address`).
    :param on_message: called with each valid message, one at a time for each connection. An exception closes that
        connection without an acknowledgement.
    :param on_refused: called with each message that breaks the rules; None logs them. Of one frame, the first 100
        refusals are handed over; the others are counted, and their number is logged.
    :param schema: stricter rules: an instance of a subclass of :class:`~geventaudit.RecordSchema`. Records of more than
        500 values or 32 KiB are validated in native threads, so that the hub is free.
    :param max_frame_bytes: the longest frame, also after decompression; a longer one closes its connection, and so does
        a compressed entry of more than a quarter of it.
    :param ssl: the ``ssl.SSLContext`` for TLS; None for no TLS.
    :param shared_key: require the Forward protocol's handshake with this key.
    :param users: passwords by user name, required in the handshake.
    :param max_connections: the most open connections; further ones are closed at once.
    :param stall_timeout: seconds that a connection may take for TLS and handshake, and to complete a frame.
    :param idle_timeout: seconds without data between frames before a connection is closed; None for no limit.
    :raises ValueError, TypeError: an argument is invalid.
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
        idle_timeout: float | None = 600.0,
    ) -> None:
        self.address: str | tuple[str, int] = checked_listener(address)
        if not callable(on_message):
            raise TypeError(f"on_message must be callable, got {show(on_message)}: pass a function of a message")
        if on_refused is not None and not callable(on_refused):
            raise TypeError(
                f"on_refused must be callable, got {show(on_refused)}: pass a function of a refused message"
            )
        check_context(ssl)
        check_seconds("stall_timeout", stall_timeout)
        check_seconds("idle_timeout", idle_timeout, or_none=True)
        if users is not None and shared_key is None:
            raise ValueError("users are part of the handshake: give shared_key too")
        if shared_key is not None:
            check_secret("shared_key", shared_key)
        for name, password in (users or {}).items():
            check_secret("a name in users", name)
            check_secret("a password in users", password)
        self._settings = Settings(ssl, shared_key, users, stall_timeout, idle_timeout)
        self._max_connections = max_connections
        self._max_frame_bytes = max_frame_bytes
        self._reception = Reception(on_message, on_refused, schema)
        self._unfinished = 0  # bytes of frames that are not complete, over all connections
        self._server: StreamServer | None = None
        self._inode: int | None = None
        self._connections: dict[Any, Link] = {}  # by greenlet
        self._run = _Run()
        self._reading = Event()
        self._reading.set()
        self._acknowledging = True

    # -- control -------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen. A socket file that a dead agent left behind is replaced.

        :raises OSError: the address cannot be used, or another agent listens there.
        """
        if self._server is not None:
            raise RuntimeError("the agent is already running")
        listener = listen(self.address)
        if isinstance(self.address, tuple):
            self.address = (self.address[0], listener.getsockname()[1])
        elif not self.address.startswith("\0"):  # an abstract address has no file
            self._inode = os.stat(self.address).st_ino
        self._run = _Run()
        self._server = StreamServer(listener, partial(self._serve, self._run))
        self._server.start()
        return self

    def stop(self, timeout: float = 1.0) -> None:
        """Stop listening, read and acknowledge the received messages, end writing so that senders hang up, and close.

        Connections that are established and not accepted yet are read too. On a Unix socket nothing can be sent after
        the end, so this method does not wait for the senders. Over TCP, messages that a sender writes until it hangs
        up are read too, and not acknowledged.

        :param timeout: the longest duration in seconds. With 0, or while reading is stopped, received messages stay
            unread, as when an agent dies.
        """
        if self._server is None:
            return
        server, run = self._server, self._run
        self._server = None
        deadline = Deadline(timeout)
        drains = timeout > 0 and self._reading.is_set()
        self._remove_file()  # a Unix socket accepts no connections after this
        if drains:
            # No switch between the last accept() and the close, which would reset connections made in between.
            accept_all(server)
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
        """Wait until all bytes that the sockets hold now are read, and their messages handed over."""
        links = self._others()
        for link in links.values():
            link.goal = link.received + link.unread()
        while not deadline.has_passed():
            links = {each: link for each, link in links.items() if not (each.ready() or link.is_settled())}
            if not links:
                break
            gevent.sleep(_PAUSE_SECONDS)

    def _others(self) -> dict[Any, Link]:
        """Return all connections except the one whose callback is running."""
        return {each: link for each, link in self._connections.items() if each is not gevent.getcurrent()}

    def restart(self, timeout: float = 1.0) -> None:
        """Stop, and listen again on the same address."""
        self.stop(timeout)
        self.start()

    def hang_up(self) -> None:
        """Close all connections at once, also with unread messages. A callback does not close its own connection.

        Connections that are established and not accepted yet are closed too.
        """
        if self._server is not None:
            accept_all(self._server)
            gevent.sleep(0)  # the greenlets of the connections accepted above begin
        others = list(self._others())
        try:
            gevent.killall(others, timeout=_KILL_SECONDS)
        except gevent.Timeout:  # a callback does not end; its greenlet was killed
            _log.warning("%d connections are still busy with a message", sum(not each.ready() for each in others))

    def stop_reading(self) -> None:
        """Stop reading, but accept connections, as a stuck agent does."""
        self._reading.clear()

    def resume_reading(self) -> None:
        """Read again."""
        self._reading.set()

    def stop_acknowledging(self) -> None:
        """Stop acknowledging. Messages that arrive meanwhile are handed over, and never acknowledged."""
        self._acknowledging = False

    def resume_acknowledging(self) -> None:
        """Acknowledge again, from the next frame on."""
        self._acknowledging = True

    def observe(self, observer: Observer) -> None:
        """Call *observer* from now on, beside ``on_message`` and ``on_refused``. Use this before :meth:`start`."""
        self._reception.observer = observer

    @property
    def is_running(self) -> bool:
        """True while the agent listens."""
        return self._server is not None

    @property
    def is_reading(self) -> bool:
        """False after :meth:`stop_reading`."""
        return self._reading.is_set()

    @property
    def is_acknowledging(self) -> bool:
        """False after :meth:`stop_acknowledging`."""
        return self._acknowledging

    @property
    def counts(self) -> AgentCounts:
        """A snapshot of the counts."""
        return replace(self._reception.counts, open_connections=len(self._connections))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Agent {self.address} {'running' if self._server else 'stopped'}>"

    def _remove_file(self) -> None:
        """Remove the socket file if it is still this agent's."""
        if isinstance(self.address, str) and self._inode is not None:
            try:
                if os.stat(self.address).st_ino == self._inode:
                    os.unlink(self.address)
            except FileNotFoundError:
                pass

    # -- one connection ------------------------------------------------------------------------------------------------

    def _serve(self, run: _Run, sock: Any, peer: Any) -> None:
        if run.is_over:  # the agent stopped between accept() and this
            sock.close()
            return
        me = gevent.getcurrent()
        counts = self._reception.counts
        counts.connections += 1
        if len(self._connections) >= self._max_connections:
            self._turn_away("too many connections")
            sock.close()
            return
        link = self._connections[me] = Link(sock, self._settings)
        observer = self._reception.observer
        try:
            if observer is not None:
                observer.connected(link.peer())
            self._receive(link)
        except FrameError as error:
            counts.broken_streams += 1
            link.end = printable(str(error))
            _log.warning("closed a connection: %s", link.end)
        except (HandshakeError, gevent.Timeout) as error:
            link.end = printable(str(error))
            self._turn_away(link.end)
        except OSError as error:
            link.end = str(error)
            _log.info("a connection broke: %s", error)
        except Exception:
            counts.broken_streams += 1
            link.end = "the callback raised an exception"
            _log.exception("closed a connection: the callback raised")
        finally:
            if observer is not None:
                observer.disconnected(link.end)
            self._unfinished -= link.unfinished
            del self._connections[me]
            link.sock.close()

    def _turn_away(self, why: str) -> None:
        self._reception.counts.turned_away += 1
        _log.warning("turned a connection away: %s", why)

    def _receive(self, link: Link) -> None:
        """Hand over the messages of one connection until its end."""
        decoder = Decoder(max_frame_bytes=self._max_frame_bytes)
        data = link.welcome()
        begun = monotonic()
        try:
            while data or (data := link.read(self._reading, begun if decoder.unfinished else None)):
                if self._take(data, decoder, link) or not link.unfinished:
                    begun = monotonic()
                data = b""
                self._hold(link, decoder.unfinished)
        except IdleError:
            self._reception.counts.idle += 1
            link.end = f"no data for {self._settings.idle_timeout} seconds"
            _log.info("closed a connection: %s", link.end)
            # Read until the sender hangs up: over TCP, the kernel has acknowledged its data.
            link.end_writing()
            while data := link.read_rest():
                self._take(data, decoder, link)
        else:
            link.end = "the sender hung up"
        if decoder.unfinished:
            self._reception.counts.half_frames += 1
            link.end = f"the sender hung up in the middle of a frame, after {decoder.unfinished} bytes of it"
            _log.info("closed a connection: %s", link.end)

    def _take(self, data: bytes, decoder: Decoder, link: Link) -> int:
        """Hand over and acknowledge the frames that *data* completes. Return their number."""
        link.received += len(data)
        self._reception.counts.bytes += len(data)
        finished = 0
        turn = Turn(len(self._connections))
        observer = self._reception.observer
        for frame in decoder.feed(data):
            finished += 1
            if observer is not None:
                observer.frame_began(decoder.received - decoder.unfinished - frame.offset)
            self._reception.take(frame, turn)
            if frame.chunk is not None and self._acknowledging and link.takes_acks:
                self._reception.counts.acks += link.acknowledge(ack_of(frame.chunk))
        if turn.killed is not None:
            raise turn.killed
        link.handled = link.received
        return finished

    def _hold(self, link: Link, unfinished: int) -> None:
        """Note the bytes that *link* holds. If all connections hold too many, close the one that holds the most."""
        self._unfinished += unfinished - link.unfinished
        link.unfinished = unfinished
        while self._unfinished > MAX_UNFINISHED_BYTES:
            error = FrameError(f"unfinished frames of more than {MAX_UNFINISHED_BYTES} bytes in all", link.received)
            greenlet, largest = max(self._connections.items(), key=lambda item: item[1].unfinished)
            if largest is link:
                raise error
            self._unfinished -= largest.unfinished
            largest.unfinished = 0
            greenlet.kill(error, block=False)


class _Run:
    """The time from a start of the agent to its stop."""

    is_over = False
