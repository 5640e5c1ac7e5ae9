"""What is wrong between this process and its agent, found out step by step, by the ways that a client takes.

Each step is a finding; the first failure ends the examination, since what comes after it cannot be told. Heartbeats are
sent, and no records.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import platform
import pwd
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import gevent

from ..encoder.encoding import Encoder
from ..encoder.engine import ENCODER
from ..errors import ConnectionFailedError
from ..records import Heartbeat
from ..runtime.clock import monotonic
from ..transport import TCP, DomainSocket, unix, usual_path
from ..version import __version__

__all__ = ["Finding", "Outcome", "examine"]

_MAX_PATH = 107  # bytes of a Unix socket's path on Linux
_HANG_UP_SECONDS = 0.2  # how soon an agent that does not like what it read is expected to hang up
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT)


class Outcome(Enum):
    """How a step went."""

    OK = "ok"
    NOTE = "note"
    """Nothing that keeps records from arriving, but worth knowing."""
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Finding:
    """One step: what was found, and what to do about it where something is wrong."""

    outcome: Outcome
    text: str
    advice: str = ""


class _Failed(Exception):  # noqa: N818  # not an error: a diagnosis
    """Ends the examination with its last finding."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text, advice)
        self.finding = Finding(Outcome.FAILED, text, advice)


def examine(address: str | tuple[str, int] | None = None, timeout: float = 2.0) -> Iterator[Finding]:
    """Findings, one after the other as they are made.

    :param address: a path, or host and port; None for the path that a ``DomainSocket()`` takes.
    :param timeout: seconds for each thing that the agent is asked to do.
    """
    yield _encoder()
    try:
        if isinstance(address, tuple):
            host_and_port = address
            yield from _connection(lambda acks: TCP(host_and_port, timeout=timeout, require_ack=acks), timeout)
            return
        if address is None:
            yield from _default_paths()
        path = usual_path() if address is None else address
        if not path:
            raise _Failed("the path of the socket is empty", "say where the agent listens: --unix PATH")
        yield from _place(path)
        yield from _connection(lambda acks: DomainSocket(path, timeout=timeout, require_ack=acks), timeout)
    except _Failed as failed:
        yield failed.finding
    except OSError as error:  # it was there a moment ago
        yield Finding(Outcome.FAILED, str(error), "something changed meanwhile: look once more")


def _encoder() -> Finding:
    if ENCODER == "compiled":
        return Finding(Outcome.OK, "the encoder is compiled")
    advice = "unset PURE_PYTHON, or install a wheel, or a C compiler before geventaudit"
    return Finding(Outcome.NOTE, "the encoder is plain Python, several times slower than the compiled one", advice)


# -- the place of the socket -------------------------------------------------------------------------------------------


def _default_paths() -> Iterator[Finding]:
    for path in unix.MDSD_SOCKETS:
        there = os.path.exists(path)
        yield Finding(Outcome.OK if there else Outcome.NOTE, f"{path}: {'exists' if there else 'not to be found'}")


def _place(path: str) -> Iterator[Finding]:
    if path.startswith("\0"):  # an abstract address has no file
        return
    if (length := len(os.fsencode(path))) > _MAX_PATH:
        raise _Failed(
            f"{path}: the path of a socket can have {_MAX_PATH} bytes, this one has {length}",
            "let the agent listen at a shorter path",
        )
    _enter_folders(path)
    about = _about(path)
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise _Failed(
            f"{path} is no socket: {about}",
            "something else stands in the agent's place: remove it, and start the agent; a container runtime makes a "
            "folder where the file to be mounted was missing",
        )
    yield Finding(Outcome.OK, f"{path} is a socket: {about}")
    try:
        unix.check_directories(path, path)
    except ConnectionFailedError as error:
        yield Finding(Outcome.NOTE, str(error), "take the others' right to write away: chmod o-w, or chmod +t")
    if not os.access(path, os.W_OK, effective_ids=True):
        raise _Failed(
            f"{_me()} may not write to {path}: {about}",
            "put the service's user into the group of the socket, or let the agent make it for others (mode 0666)",
        )


def _enter_folders(path: str) -> None:
    """Fail with the first thing on the way to *path* that is missing or closed."""
    way = os.path.abspath(path)
    parents = [way]
    while parents[-1] != os.path.dirname(parents[-1]):
        parents.append(os.path.dirname(parents[-1]))
    for here in reversed(parents):
        if not os.path.lexists(here):
            raise _Failed(
                f"{here} does not exist",
                "start the agent, or say where it listens: --unix PATH or --tcp HOST:PORT; in a container, mount the "
                "folder of the agent's socket",
            )
        if not os.path.exists(here) and os.path.islink(here):
            raise _Failed(
                f"{here} is a link to {os.readlink(here)}, which does not exist",
                "start the agent, or make the link point to where it listens",
            )
        if here == way:
            return
        if not os.path.isdir(here):
            raise _Failed(f"{here} is no folder", "say where the agent listens: --unix PATH")
        if not os.access(here, os.X_OK, effective_ids=True):
            raise _Failed(
                f"{_me()} may not enter {here}: {_about(here)}",
                "let the service's user in: put it into the folder's group, or chmod o+x",
            )


def _about(path: str) -> str:
    status = os.stat(path)
    return f"{stat.filemode(status.st_mode)} of {_user(status.st_uid)} and group {_group(status.st_gid)}"


def _user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return f"{grp.getgrgid(number).gr_name} ({number})"
    except KeyError:
        return str(number)


def _me() -> str:
    return f"this user, {_user(os.geteuid())},"


# -- the agent ---------------------------------------------------------------------------------------------------------


def _connection(connect: Callable[[bool], DomainSocket | TCP], timeout: float) -> Iterator[Finding]:
    with _connected(connect, False) as connection:
        yield Finding(Outcome.OK, f"{_me().rstrip(',')} can connect: {_listener(connection)} listens")
        _take_heartbeat(connection, timeout)
        if isinstance(connection, TCP):
            yield Finding(Outcome.OK, "what is written arrives at its host; whether it is read, only acks can tell")
        else:
            yield Finding(Outcome.OK, "it reads")
    with _connected(connect, True) as connection:
        if _wait_delivered(connection, timeout):
            yield Finding(Outcome.OK, "it acknowledges: require_ack=True can be used")
        else:
            yield Finding(
                Outcome.NOTE,
                f"it acknowledged nothing in {timeout} s",
                "leave require_ack off, as it is by default, or use an agent that acknowledges (Fluent Bit; Fluentd "
                "and Vector over TCP only)",
            )


@contextlib.contextmanager
def _connected(connect: Callable[[bool], DomainSocket | TCP], acks: bool) -> Iterator[DomainSocket | TCP]:
    try:
        connection = connect(acks)
    except ConnectionFailedError as error:
        raise _Failed(str(error), _advice_on(error)) from None
    try:
        yield connection
    finally:
        connection.close()


def _advice_on(error: ConnectionFailedError) -> str:
    code = getattr(error.__cause__, "errno", None)
    if code == errno.ECONNREFUSED and str(error).startswith("unix:"):
        return (
            "nobody listens: an agent that is gone left its socket behind; start it. In a container, mount the folder "
            "and not the socket itself, or a restarted agent is not seen"
        )
    if code == errno.ECONNREFUSED or "nobody listens" in str(error):
        return "nobody listens there: start the agent, and look at the port it is configured for"
    if code == errno.EPROTOTYPE:
        return "this is a datagram socket; configure the agent for a stream (Fluent Bit's and Fluentd's forward input)"
    if code == errno.ETIMEDOUT and str(error).startswith("unix:"):
        return "it listens and accepts nobody: it is stuck, or stopped; restart it and look at its log"
    if code in _NO_ROUTE or "not within" in str(error):
        return "nothing answers from there: look at the address, at firewalls and network policies"
    if code == errno.EACCES:
        return "the file's mode permits it and the system does not: look for SELinux or AppArmor denials in the log"
    return "look at the address"


def _listener(connection: DomainSocket | TCP) -> str:
    if isinstance(connection, TCP):
        return "somebody"
    process, user = connection.peer()
    name = ""
    with contextlib.suppress(OSError), open(f"/proc/{process}/comm") as file:
        name = f" ({file.read().strip()})"
    return f"process {process}{name} of {_user(user)}" if process else f"a process of {_user(user)}"


def _take_heartbeat(connection: DomainSocket | TCP, timeout: float) -> None:
    if not _wait_delivered(connection, timeout):
        raise _Failed(
            f"it read nothing in {timeout} s",
            "it accepts and is stuck, or too busy: restart it and look at its log; meanwhile records wait on the queue",
        )


def _wait_delivered(connection: DomainSocket | TCP, timeout: float) -> bool:
    """Whether a heartbeat is delivered; an agent that hangs up, or answers what it should not, is a failure."""
    broken = gevent.spawn(_how_it_breaks, connection)
    try:
        connection.write([_heartbeat(connection.name)])
        deadline = monotonic() + timeout
        while not connection.delivered() and not broken.ready() and monotonic() < deadline:
            gevent.sleep(0.01)
        broken.join(min(_HANG_UP_SECONDS, timeout))
        if broken.ready() and (error := broken.get()) is not None:
            raise error
        return bool(connection.delivered())
    except ConnectionFailedError as error:
        raise _Failed(str(error), _advice_on_broken(str(error))) from None
    finally:
        broken.kill()


def _how_it_breaks(connection: DomainSocket | TCP) -> ConnectionFailedError | None:
    """What wait_broken raises, returned: a traceback is nothing for who asks the doctor, and gevent would print it."""
    try:
        connection.wait_broken()
    except ConnectionFailedError as error:
        return error
    return None


def _advice_on_broken(text: str) -> str:
    if "shared_key" in text:
        return "give the client the agent's key: TCP(..., shared_key=...)"
    if "what the agent answers is wrong" in text:
        return "it answers what is no acknowledgement: does it speak the Forward protocol? Leave require_ack off"
    return (
        "it does not take Forward messages: does it speak another protocol (HTTP, syslog, TLS), or is its input of "
        "another kind? Fluent Bit and Fluentd call theirs forward"
    )


def _heartbeat(destination: str) -> bytes:
    beat = Heartbeat(
        audit_version=__version__,
        os_version=platform.release(),
        language=f"python{platform.python_version()}",
        destination=destination,
    )
    return Encoder().encode(beat, time.time())
