"""The kernel's part of a connection: the bytes that the kernel holds, hang-ups, and time limits."""

from __future__ import annotations

import select
import socket as _constants
import sys
from functools import cache
from typing import Any

from ..runtime import forks, native

__all__ = ["HangUp", "fork_safe", "held_by_kernel", "new_socket", "notice_dead_peers", "send_all", "send_flags"]

MAX_SILENCE = 60.0
"""The longest time in seconds after which the kernel ends a TCP connection without acknowledgements."""

_MIN_SILENCE = 1.0  # a single lost segment is sent again after 0.2 to 0.4 s


def new_socket(family: int) -> Any:
    """Return a stream socket that a forked child does not use."""
    from gevent.socket import socket  # imported with the first connection; a patched service has imported it

    return fork_safe(socket)(family, _constants.SOCK_STREAM)


@cache
def fork_safe(kind: type) -> Any:
    """Return a subclass of gevent's socket class *kind* that is safe for greenlets in a forked child.

    A greenlet that waits for the parent's socket may wake in the child, if an at-fork hook switches. The greenlet must
    not read from, or write to, the parent's connection.
    """

    class ForkSafe(kind):  # type: ignore[misc]
        def _wait(self, *arguments: Any, **options: Any) -> Any:
            result = super()._wait(*arguments, **options)
            forks.check()
            return result

        def wait_readable(self) -> None:
            """Wait until the socket is readable. Always switches to the hub, unless TLS holds decrypted data."""
            if not (hasattr(self, "pending") and self.pending()):
                self._wait(self._read_event)

        def recv_now(self, size: int) -> bytes | None:
            """Return up to *size* bytes, b"" at the end, None if there is nothing to read now. Does not wait."""
            timeout = self.gettimeout()
            self.settimeout(0.0)
            try:
                data: bytes = self.recv(size)
                return data
            except OSError as error:
                # The errors of TLS are in a module that is imported only if TLS is used.
                if isinstance(error, BlockingIOError) or type(error).__name__.startswith("SSLWant"):
                    return None
                raise
            finally:
                self.settimeout(timeout)

    return ForkSafe


def send_flags(sock: Any) -> int:
    """Return the flags for sending: ``MSG_NOSIGNAL``, so that a closed connection raises no ``SIGPIPE``.

    With TLS, OpenSSL writes without this flag. There, ``SIGPIPE`` can kill a process that has reset it to its default
    (Python ignores it).
    """
    return 0 if hasattr(sock, "do_handshake") else getattr(_constants, "MSG_NOSIGNAL", 0)


def send_all(sock: Any, data: bytes) -> None:
    """Send all of *data* over a gevent socket, with or without TLS; see :func:`send_flags`."""
    sock.sendall(data, send_flags(sock))


def notice_dead_peers(sock: Any, write_timeout: float | None) -> None:
    """Let the kernel end the TCP connection if the far side acknowledges nothing for *write_timeout* seconds.

    A load balancer or a firewall that has forgotten the connection, and a host that was switched off, send neither FIN
    nor RST. Without these options, the kernel retries for 15 minutes, and waits for ever if nothing is sent.

    :param write_timeout: seconds, limited to 1 to 60; None means 60.
    """
    seconds = max(_MIN_SILENCE, min(MAX_SILENCE, MAX_SILENCE if write_timeout is None else write_timeout))
    sock.setsockopt(_constants.SOL_SOCKET, _constants.SO_KEEPALIVE, 1)
    # With TCP_USER_TIMEOUT, the connection ends at the first probe after that time, so probes must be frequent.
    for name, value in (
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
        ("TCP_KEEPIDLE", max(round(seconds / 3), 1)),
        ("TCP_KEEPINTVL", max(round(seconds / 6), 1)),
        ("TCP_KEEPCNT", 4),
    ):
        if (option := getattr(_constants, name, None)) is not None:
            sock.setsockopt(_constants.IPPROTO_TCP, option, value)


if sys.platform == "linux":
    import fcntl
    import termios

    def held_by_kernel(descriptor: int) -> int | None:
        """Return the bytes written to the socket that the far side has not taken; None if the system has no figure."""
        answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0")
        return int.from_bytes(answer, sys.byteorder)

else:

    def held_by_kernel(descriptor: int) -> int | None:
        return None


class HangUp:
    """The state of the far side of a socket. Does not wait.

    :param is_unix: True for a Unix socket, where POLLHUP is a close in order; over TCP, it is a reset.
    """

    def __init__(self, descriptor: int, is_unix: bool) -> None:
        # The unpatched poll(2): gevent's would switch to the hub, and callers of this class must not switch.
        self._poll = native.original("select", "poll")()
        self._poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
        self._reset_events = select.POLLERR | (0 if is_unix else select.POLLHUP)

    def seen(self) -> bool:
        """Return True if the far side has closed, or shut down its writing direction."""
        return bool(self._poll.poll(0))

    def is_reset(self) -> bool:
        """Return True if the far side has closed with unread data, or the connection broke."""
        return any(events & self._reset_events for _, events in self._poll.poll(0))
