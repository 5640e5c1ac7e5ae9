"""Listening sockets of the agent."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from gevent import socket as gsocket
from gevent.server import StreamServer

from ..errors import logger, show
from ..transport.connection import checked_address

__all__ = ["accept_all", "checked_listener", "listen"]

_log = logger("agent")

_BACKLOG = 1024


def checked_listener(address: object) -> str | tuple[str, int]:
    """Return the path of a socket, or host and port.

    :raises TypeError, ValueError: *address* is neither.
    """
    if isinstance(address, tuple):
        return checked_address(address, lowest_port=0)
    if isinstance(address, str | os.PathLike):
        return os.fspath(address)
    raise TypeError(f"address must be the path of a socket, or a tuple of host and port, got {show(address)}")


def listen(address: str | tuple[str, int]) -> Any:
    """Return a socket that listens on *address*. A socket file that a dead agent left behind is replaced.

    :raises OSError: the address cannot be used.
    """
    return _listen_tcp(address) if isinstance(address, tuple) else _listen_unix(address)


def accept_all(server: StreamServer) -> None:
    """Accept the connections that are established, without waiting."""
    for _ in range(_BACKLOG + 1):  # the backlog holds no more
        try:
            waiting = server.do_read()
        except OSError as error:  # too many open files, for one
            _log.warning("connections that were not accepted yet are lost: %s", error)
            return
        if waiting is None:
            return
        server.do_handle(*waiting)


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
    if not path:  # the system would choose an address
        raise OSError(errno.ENOENT, "the path of the socket is empty")
    listener = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not (os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode)):
                link = os.path.islink(path) and not os.path.exists(path)
                what = "dangling link" if link else "folder" if os.path.isdir(path) else "file"
                raise OSError(error.errno, f"a {what} is there, and no socket: {path}") from None
            if error.errno != errno.EADDRINUSE or not _is_left_behind(path):
                # Python's own error for a path that is too long has neither errno nor strerror.
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
    """Return True if *path* is a socket without a listener."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    probe = gsocket.socket(gsocket.AF_UNIX, gsocket.SOCK_STREAM)
    probe.settimeout(0.0)
    try:
        return bool(probe.connect_ex(path) == errno.ECONNREFUSED)
    finally:
        probe.close()
