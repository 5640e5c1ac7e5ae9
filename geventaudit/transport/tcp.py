"""Connections over TCP, with optional TLS and the optional handshake of the Forward protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import show
from ..protocol.handshake import check_secret
from .connecting import Target, connect
from .connection import check_context, check_seconds, checked_address
from .sockets import SocketConnection, acks_asked

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["BLIND_SECONDS", "TCP"]

BLIND_SECONDS = 1.0
"""Seconds of a connection in which nothing counts as delivered without acknowledgements. The kernel of the agent's host
also acknowledges bytes that the agent refuses, because TLS, a client certificate or a shared key is missing, or because
its input is paused. The agent's refusal or hang-up follows soon after."""


class TCP(SocketConnection):
    """A connection over TCP, with ``TCP_NODELAY``.

    Without *require_ack* it is best effort: the kernel of the agent's host acknowledges bytes that the agent never
    reads. Nothing counts as delivered in the first second, since a refusal of the agent arrives within it.

    The kernel ends a connection, also an idle one, if the far side acknowledges nothing for *write_timeout* (at most 60
    seconds).

    :param address: host name or address, and port. Names are resolved without blocking other greenlets. If a name has
        several addresses, the next is tried after 250 ms, and the first that is ready for records is used.
    :param timeout: seconds for resolving, connecting, TLS and the handshake together; None for no limit.
    :param write_timeout: seconds without a byte taken during a write, after which the connection is broken; None for no
        limit.
    :param ssl: the ``ssl.SSLContext`` for TLS; None for no TLS. The context sets the checks
        (``ssl.create_default_context()``: certificate and host name) and may hold a client certificate. Each connection
        is verified anew.
    :param server_hostname: the name in the agent's certificate, if it is not the host of *address*.
    :param shared_key: do the Forward protocol's handshake, and refuse an agent that does not know this key.
    :param username: the user name, for an agent that has users.
    :param password: the password of that user.
    :param require_ack: True to count a frame as delivered when the agent acknowledges it, as Fluent Bit and Fluentd do.
    :param ack_timeout: seconds without an acknowledgement, after which the connection is broken.
    :param batch_records: the most records that share an acknowledgement, if they are written together.
    :raises ValueError, TypeError: an argument is invalid.
    :raises ConnectionFailedError: connecting failed; the error names the address and the cause.
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
        batch_records: int = 256,
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
        target = Target(host, port, where, write_timeout, ssl, server_hostname, shared_key, username, password)
        sock = connect(target, timeout)
        super().__init__(sock, where, write_timeout, acks, 0.0 if acks else BLIND_SECONDS)

    @property
    def is_best_effort(self) -> bool:
        """True without acknowledgements: records count as delivered that the agent may never read."""
        return self._acks is None
