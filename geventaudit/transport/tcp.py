"""Connections over TCP, with TLS and the Forward protocol's handshake where they are asked for."""

from __future__ import annotations

import os
import socket as _constants
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import gevent

from ..errors import ConnectionFailedError, FrameError, show
from ..protocol.decoding import unpack_first
from ..protocol.handshake import ClientSide, HandshakeError, check_secret
from ..runtime.clock import monotonic
from .connection import check_context, check_seconds, checked_address
from .sockets import SocketConnection, acks_asked, fork_safe, new_socket

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["TCP"]

_HELO_SECONDS = 0.05  # at the least; three times what connecting took, where that is more


class TCP(SocketConnection):
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
        acks = acks_asked(require_ack, ack_timeout, batch_records)
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
        began = monotonic()
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

                    sock = fork_safe(SSLSocket)(
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
                    now = monotonic()
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


def _connect_tcp(host: str, port: int, timeout: float | None) -> Any:
    """A connected socket. A literal address needs no resolver, and so no thread of gevent's pool."""
    try:
        family = _constants.AF_INET if ip_address(host).version == 4 else _constants.AF_INET6
    except ValueError:
        from gevent.socket import create_connection, socket

        made = create_connection((host, port), timeout)
        return fork_safe(socket)(made.family, made.type, made.proto, fileno=made.detach())
    sock = new_socket(family)
    try:
        sock.settimeout(timeout)
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
