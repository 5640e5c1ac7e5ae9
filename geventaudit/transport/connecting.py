"""Connecting over TCP: name resolution, all addresses of a name, TLS, and the Forward protocol's handshake.

A name may have several addresses, and the first may be unreachable: a broken IPv6 route drops every segment. So the
addresses are tried in turn, 250 ms apart or as soon as an attempt fails, and the first that is ready for frames wins
(RFC 8305, "Happy Eyeballs"). An attempt that hangs in TLS or in the handshake does not delay the others.
"""

from __future__ import annotations

import errno
import os
import socket as _constants
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

import gevent
from gevent.queue import Empty, Queue

from ..errors import ConnectionFailedError, FrameError
from ..protocol.decoding import unpack_first
from ..protocol.handshake import ClientSide, HandshakeError
from ..protocol.refusals import TLS_PROBE, answers_in_tls, refusal_of
from ..runtime import forks, workers
from ..runtime.clock import Deadline
from .kernel import fork_safe, new_socket, notice_dead_peers, send_all
from .sockets import reason_of

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["Target", "connect"]

_STAGGER_SECONDS = 0.25  # RFC 8305, section 5
_MAX_WORDS_BYTES = 8192  # of HELO and of PONG
_PROBE_SECONDS = 1.0

_NO_TLS = "it looks like an agent that speaks no TLS (leave ssl out)"
_NO_KEY = "it looks like an agent that asks for no shared key (leave shared_key out)"


class Target(NamedTuple):
    """An address to connect to, and the options of a connection that is ready for frames."""

    host: str
    port: int
    where: str
    """The address, for errors."""
    write_timeout: float | None
    ssl: SSLContext | None
    server_hostname: str | None
    shared_key: str | None
    username: str
    password: str


def connect(target: Target, timeout: float | None) -> Any:
    """Return a socket that is ready for frames.

    :param timeout: seconds for resolving, connecting, TLS and the handshake; None for no limit.
    :raises ConnectionFailedError: all attempts failed; the error names each address and the cause.
    """
    attempts: list[_Attempt] = []
    deadline = Deadline(timeout)
    limit = gevent.Timeout(timeout)
    try:
        with limit:
            target.host.encode("idna")  # a thread of the resolver would print the error too
            attempts += [_Attempt(target, *address, deadline) for address in _addresses(target.host, target.port)]
            return _first_of(attempts)
    except gevent.Timeout as error:
        if error is not limit:
            raise
        states = _joined(attempts, [each.state for each in attempts])
        text = f"could not connect: not within {timeout} seconds{': ' if states else ''}{states}"
        raise ConnectionFailedError(f"{target.where}: {text}") from None
    except _AllFailedError:
        problems = _joined(attempts, [each.problem for each in attempts])
        raise ConnectionFailedError(f"{target.where}: {problems}") from attempts[-1].error
    except (OSError, ValueError) as error:  # of the resolver; ValueError for an invalid name
        raise ConnectionFailedError(f"{target.where}: could not connect: {reason_of(error)}") from error


class _AllFailedError(Exception):
    """No attempt succeeded."""


def _joined(attempts: Sequence[_Attempt], texts: Sequence[str]) -> str:
    """Return the texts of all attempts, with their addresses if they differ."""
    if len(set(texts)) <= 1:
        return texts[0] if texts else ""
    return "; ".join(f"{each.host}: {text}" for each, text in zip(attempts, texts, strict=True))


def _addresses(host: str, port: int) -> Iterator[tuple[int, Any]]:
    """Yield the family and address of all addresses of *host*: IPv6 and IPv4 in turn, else in the resolver's order.

    A literal address needs no resolver, and so no thread of gevent's pool.
    """
    try:
        yield _constants.AF_INET if ip_address(host).version == 4 else _constants.AF_INET6, (host, port)
        return
    except ValueError:
        pass
    found = [(family, address) for family, *_, address in _lookup(host, port)]
    if not found:
        raise OSError(f"{host} has no address")
    found = list(dict.fromkeys(found))
    first = [each for each in found if each[0] == found[0][0]]
    others = [each for each in found if each[0] != found[0][0]]
    while first or others:
        if first:
            yield first.pop(0)
        if others:
            yield others.pop(0)


_lookups: dict[tuple[Any, ...], Any] = {}  # the greenlets that look a name up


def _lookup(host: str, port: int) -> Any:
    """Return the result of ``getaddrinfo``, of a lookup that is in progress if there is one.

    A name service that does not answer holds a native thread of gevent's pool for longer than a connection may take,
    and the application needs these threads too. So attempts that follow wait for the same lookup.
    """
    key = (os.getpid(), gevent.get_hub(), host, port)
    lookup = _lookups.get(key)
    if lookup is None or lookup.ready():
        lookup = _lookups[key] = workers.Worker.spawn(_resolve, host, port)
        lookup.rawlink(lambda _: _lookups.pop(key, None))
    found = lookup.get()
    if isinstance(found, gevent.GreenletExit):
        raise OSError(errno.ECANCELED, "the lookup of the name was interrupted")
    if isinstance(found, Exception):
        raise found
    return found


def _resolve(host: str, port: int) -> Any:
    """Return the addresses, or the error: gevent would print one that is raised."""
    from gevent.socket import getaddrinfo

    try:
        return getaddrinfo(host, port, 0, _constants.SOCK_STREAM)
    except Exception as error:
        return error


def _first_of(attempts: Sequence[_Attempt]) -> Any:
    """Run the attempts, and return the socket of the first that succeeds. All others are closed.

    :raises _AllFailedError: all attempts failed.
    """
    waiting = list(attempts)
    outcomes: Queue[_Attempt] = Queue()
    winner: _Attempt | None = None
    running = 0
    try:
        while winner is None and (waiting or running):
            if waiting:
                attempt = waiting.pop(0)
                if len(attempts) == 1:
                    attempt.run(outcomes)
                else:
                    attempt.greenlet = workers.Worker.spawn(attempt.run, outcomes)
                running += 1
            try:
                ended = outcomes.get(timeout=_STAGGER_SECONDS if waiting else None)
            except Empty:
                continue
            running -= 1
            if ended.error is None:
                winner = ended
            elif not isinstance(ended.error, Exception | gevent.Timeout | gevent.GreenletExit):
                raise ended.error  # KeyboardInterrupt, SystemExit
        if winner is None:
            raise _AllFailedError
        return winner.sock
    finally:
        for each in attempts:
            if each is not winner:
                each.abandon()


class _Attempt:
    """An attempt to get a connection to one address of a target."""

    def __init__(self, target: Target, family: int, address: Any, deadline: Deadline) -> None:
        self.host: str = address[0]
        self.sock: Any = None
        self.state = "it does not answer"
        """The state of the attempt, for errors."""
        self.error: BaseException | None = None
        self.greenlet: workers.Worker | None = None
        self._target = target
        self._family = family
        self._address = address
        self._deadline = deadline

    def run(self, outcomes: Queue[_Attempt]) -> None:
        """Connect, and put this attempt into *outcomes*. On failure, set ``error`` and close the socket."""
        try:
            self._connect()
        except BaseException as error:
            self._close()
            self.error = error
            # An interruption of the caller's greenlet is for the caller.
            if self.greenlet is None and not isinstance(error, Exception):
                raise
        outcomes.put_nowait(self)

    @property
    def problem(self) -> str:
        """The reason for which the attempt failed."""
        if isinstance(self.error, HandshakeError | FrameError):
            return f"refused: {self.error}"
        hint = f" ({_NO_TLS})" if self.state.endswith(_NO_TLS) and isinstance(self.error, ConnectionError) else ""
        return f"could not connect: {self.state if self.error is None else reason_of(self.error)}{hint}"

    def abandon(self) -> None:
        """End the attempt in any state. Does not wait."""
        if self.greenlet is not None:
            self.greenlet.kill(block=False)
        self._close()

    def after_fork_in_child(self) -> None:
        """Close the parent's socket: a greenlet that continues in the child must not use it."""
        self._close()

    def _close(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def _connect(self) -> None:
        target = self._target
        sock = self.sock = new_socket(self._family)
        forks.register(self)
        sock.settimeout(None)
        sock.connect(self._address)
        if sock.getsockname() == sock.getpeername():
            # The kernel can choose the port of the far side for this side if that port is local and has no listener.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused (TCP self-connect)")
        sock.setsockopt(_constants.IPPROTO_TCP, _constants.TCP_NODELAY, 1)
        notice_dead_peers(sock, target.write_timeout)
        if target.ssl is not None:
            self.state = f"it does not answer the TLS handshake: {_NO_TLS}"
            self._start_tls(target.ssl)
        if target.shared_key is not None:
            self.state = f"it sends no HELO: {_NO_KEY}"
            self._shake_hands(ClientSide(_own_name(), target.shared_key, target.username, target.password))

    def _start_tls(self, context: SSLContext) -> None:
        # Imported here: an application may import this module before it patches, and patching warns if ssl is imported.
        # gevent's socket takes any context, also that of an unpatched ssl.
        from gevent.ssl import SSLSocket

        target = self._target
        wants_name = context.check_hostname or target.server_hostname
        self.sock = fork_safe(SSLSocket)(
            sock=self.sock,
            server_hostname=(target.server_hostname or target.host) if wants_name else None,
            do_handshake_on_connect=False,
            _context=context,
        )
        self.sock.settimeout(None)
        self.sock.do_handshake()

    def _shake_hands(self, side: ClientSide) -> None:
        """Do the handshake of the Forward protocol.

        :raises HandshakeError, FrameError: the agent refuses, or breaks the protocol.
        """
        helo = self._read_words("the agent hung up before its HELO", waits=self._helo_seconds())
        if helo is None:
            raise HandshakeError(self._silence())
        send_all(self.sock, side.ping(helo))
        self.state = "it does not answer the PING"
        side.check(self._read_words("the agent hung up on the PING: the shared key, user or password may be wrong"))

    def _helo_seconds(self) -> float | None:
        """Return the seconds to wait for HELO: the time left, without that for the TLS probe; None for no limit."""
        left = self._deadline.left()
        return None if left is None else left - min(_PROBE_SECONDS, left / 4)

    def _read_words(self, hung_up: str, waits: float | None = None) -> Any:
        """Return the next MessagePack value; None if nothing arrives within *waits* seconds."""
        data = b""
        while (first := unpack_first(data, _MAX_WORDS_BYTES)) is None:
            more = None
            with gevent.Timeout(None if data else waits, False):  # type: ignore[arg-type]
                more = self.sock.recv(4096)
            if more is None:
                return None
            if not more:
                raise HandshakeError(hung_up)
            data += more
            if (refusal := refusal_of(data)) is not None and b"HELO" not in data[:16]:
                raise HandshakeError(refusal)
            gevent.sleep(0)  # an agent that sends single bytes must not hold the hub
        return first[0]

    def _silence(self) -> str:
        """Return the likely reason for a missing HELO. A TLS server, too, waits for the client."""
        if self._target.ssl is None:
            try:
                send_all(self.sock, TLS_PROBE)
                if answers_in_tls(self.sock.recv(16)):
                    return "it sends no HELO, and speaks TLS (TCP(..., ssl=...))"
            except OSError:  # an agent without TLS hangs up: the probe is not a frame
                pass
        return f"it sends no HELO: {_NO_KEY}"


def _own_name() -> str:
    """Return this side's name in the handshake. It is unique: agents refuse a client with their own name."""
    return f"geventaudit-{os.getpid()}@{_constants.gethostname()}"
