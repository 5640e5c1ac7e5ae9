"""Connections over a Unix socket, and checks of the listener."""

from __future__ import annotations

import errno
import os
import socket as _constants
import stat
import struct
from typing import Any

import gevent

from ..errors import ConnectionFailedError, show
from ..runtime.clock import monotonic
from .connection import check_seconds
from .kernel import new_socket
from .sockets import SocketConnection, acks_asked, reason_of

__all__ = ["MDSD_SOCKETS", "DomainSocket", "check_directories", "usual_path"]

MDSD_SOCKETS = ("/var/run/mdsd/asa/default_fluent.socket", "/var/run/mdsd/default_fluent.socket")

_MAX_LINKS = 40  # as the kernel's


class DomainSocket(SocketConnection):
    """A connection over a Unix stream socket.

    :param path: the agent's socket. None for the first of mdsd's two usual paths that exists, or the second.
    :param timeout: seconds for connecting; None for no limit.
    :param write_timeout: seconds without a byte taken during a write, after which the connection is broken; None for no
        limit.
    :param peer_uid: the user id of the agent's process (Linux); an agent of another user is refused.
    :param strict: True to refuse a path with a directory, also on the way of a link, that is writable by all users and
        has no sticky bit.
    :param require_ack: True to count a frame as delivered when the agent acknowledges it, as Fluent Bit does (Fluentd
        over TCP only).
    :param ack_timeout: seconds without an acknowledgement, after which the connection is broken.
    :param batch_records: the most records that share an acknowledgement, if they are written together.
    :raises ValueError, TypeError: an argument is invalid.
    :raises ConnectionFailedError: connecting failed; the error names the path and the cause.
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
        batch_records: int = 256,
        peer_uid: int | None = None,
        strict: bool = False,
    ) -> None:
        check_seconds("timeout", timeout, or_none=True)
        check_seconds("write_timeout", write_timeout, or_none=True)
        acks = acks_asked(require_ack, ack_timeout, batch_records)
        if not isinstance(path, str | os.PathLike | None):
            raise TypeError(f"path must be text or a Path, such as {MDSD_SOCKETS[0]!r}, got {show(path)}")
        if path == "":
            raise ValueError(f"path must not be empty: give the agent's socket, such as {MDSD_SOCKETS[0]!r}")
        if peer_uid is not None and (isinstance(peer_uid, bool) or not isinstance(peer_uid, int) or peer_uid < 0):
            raise TypeError(
                f"peer_uid must be the number of a user, such as pwd.getpwnam(name).pw_uid, got {show(peer_uid)}"
            )
        self.path = usual_path() if path is None else os.fspath(path)
        where = f"unix:{self.path}"
        sock: Any = None
        try:
            sock = new_socket(_constants.AF_UNIX)
            if strict:
                check_directories(self.path, where)
            _connect_unix(sock, self.path, timeout)
            if peer_uid is not None:
                _check_peer(sock, where, peer_uid)
            super().__init__(sock, where, write_timeout, acks)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, OSError | ValueError):  # ValueError: a NUL byte in the path
                reason = f"could not connect: {reason_of(error)}"
                raise ConnectionFailedError(f"{where}: {reason}", path=self.path) from error
            raise

    def peer(self) -> tuple[int, int]:
        """Return the agent's process id, 0 if it is not visible to this process, and its user id (Linux)."""
        return _peer_of(self._sock)


def usual_path() -> str:
    return next((path for path in MDSD_SOCKETS if os.path.exists(path)), MDSD_SOCKETS[-1])


def _peer_of(sock: Any) -> tuple[int, int]:
    process, user, _ = struct.unpack("iII", sock.getsockopt(_constants.SOL_SOCKET, _constants.SO_PEERCRED, 12))
    return process, user


def _check_peer(sock: Any, where: str, uid: int) -> None:
    """Refuse an agent of another user: every user with write access to the directory could listen there.

    :raises ConnectionFailedError: the agent runs as another user.
    """
    _, theirs = _peer_of(sock)
    if theirs != uid:
        raise ConnectionFailedError(f"{where}: refused: the agent runs as user {theirs}, not {uid}")


def check_directories(path: str, where: str) -> None:
    """Refuse a path of which every user can replace a part, also a link on the way.

    Follows the path part by part, as the kernel does: the resolved path does not contain the directories of links.

    :raises ConnectionFailedError: a directory is writable by all users and has no sticky bit.
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
                f"{where}: refused: all users can write to {folder}, which has no sticky bit, so that any user can "
                "replace the socket"
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


def _connect_unix(sock: Any, path: str, timeout: float | None) -> None:
    """Connect *sock*. If the agent's backlog is full, the kernel returns EAGAIN and gives no event, so poll."""
    deadline = None if timeout is None else monotonic() + timeout
    sock.settimeout(0.0)
    pause = 0.001
    while True:
        code = sock.connect_ex(path)
        if code == 0:
            return
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, os.strerror(code))
        if deadline is not None and monotonic() + pause > deadline:
            raise OSError(errno.ETIMEDOUT, f"the agent accepted no connection for {timeout} seconds")
        gevent.sleep(pause)
        pause = min(pause * 2, 0.1)
