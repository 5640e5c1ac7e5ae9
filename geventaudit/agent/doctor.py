"""An examination of the way from this process to its agent, step by step, over the connections of a client.

Each step returns a finding. The first failure ends the examination, since later steps depend on earlier ones. Only
heartbeats are sent, no records.

Over TCP, the kernel acknowledges segments for a stopped process too, so a write does not prove that the agent reads.
Two things prove it: an acknowledgement of the Forward protocol, and an agent that closes its side after this side has
ended writing, because the end of the stream comes after all written bytes.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import platform
import pwd
import socket as std_socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import gevent
from gevent import socket as gsocket

from ..encoder.encoding import Encoder
from ..encoder.engine import ENCODER
from ..errors import ConnectionFailedError
from ..records import Heartbeat
from ..runtime.clock import TICK, Deadline, monotonic
from ..transport import TCP, DomainSocket, unix, usual_path
from ..version import __version__

__all__ = ["Finding", "Outcome", "examine"]

_MAX_PATH = 107  # bytes of a Unix socket's path on Linux
_HANG_UP_SECONDS = 0.2  # in which an agent hangs up if it refuses a connection or a message
_WRONG_NAME = (62, 64)  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH
_WRONG_TIME = (9, 10)  # _CERT_NOT_YET_VALID and _CERT_HAS_EXPIRED
_C = TypeVar("_C", DomainSocket, TCP)
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT)


_NO_HANDSHAKE = (
    "its process is stopped or stuck, its input is paused, or the agent uses no TLS or no shared key at that port"
)
_ADVICE_ON_HANGING_UP = (
    "it does not take Forward messages: does it speak another protocol (HTTP, syslog), or TLS (--tls)? Is its input of "
    "another kind than forward? Or is the input paused: Fluent Bit hangs up at mem_buf_limit, and logs 'paused'"
)


class Outcome(Enum):
    """The outcome of a step."""

    OK = "ok"
    NOTE = "note"
    """Records arrive, but the finding is worth knowing."""
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one step, with advice unless the outcome is OK."""

    outcome: Outcome
    text: str
    advice: str = ""


class _Failed(Exception):  # noqa: N818  # a diagnosis, not an error
    """The last finding of an examination, which ends it."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text, advice)
        self.finding = Finding(Outcome.FAILED, text, advice)


def examine(
    address: str | tuple[str, int] | None = None,
    timeout: float = 2.0,
    *,
    needs_acks: bool = False,
    **tcp_options: Any,
) -> Iterator[Finding]:
    """Yield the findings, each as soon as it is made.

    :param address: a path, or host and port; None for the path that ``DomainSocket()`` uses.
    :param timeout: seconds for each answer of the agent.
    :param needs_acks: an agent that does not acknowledge is a failure.
    :param tcp_options: further parameters of ``TCP``: ``ssl``, ``server_hostname``, ``shared_key``, ``username``,
        ``password``.
    """
    yield _encoder()
    ack_timeout = timeout + 60.0  # longer than anything here waits
    try:
        if isinstance(address, tuple):
            connect = partial(TCP, address, timeout=timeout, ack_timeout=ack_timeout, **tcp_options)
            yield from _tcp_agent(address, connect, timeout, needs_acks)
            return
        if address is None:
            yield from _default_paths()
        path = usual_path() if address is None else address
        if not path:
            raise _Failed("the path of the socket is empty", "give the address of the agent: --unix PATH")
        yield from _place(path)
        yield from _unix_agent(
            partial(DomainSocket, path, timeout=timeout, ack_timeout=ack_timeout), timeout, needs_acks
        )
    except _Failed as failed:
        yield failed.finding
    except OSError as error:  # a file that existed a moment ago has gone
        yield Finding(Outcome.FAILED, str(error), "the file changed meanwhile: run geventaudit doctor again")


def _encoder() -> Finding:
    if ENCODER == "compiled":
        return Finding(Outcome.OK, "the encoder is compiled")
    advice = "unset PURE_PYTHON, or install a wheel, or a C compiler before geventaudit"
    return Finding(Outcome.NOTE, "the encoder is plain Python, several times slower than the compiled one", advice)


# -- the place of the socket -------------------------------------------------------------------------------------------


def _default_paths() -> Iterator[Finding]:
    for path in unix.MDSD_SOCKETS:
        there = os.path.exists(path)
        yield Finding(Outcome.OK if there else Outcome.NOTE, f"{path}: {'exists' if there else 'missing'}")


def _place(path: str) -> Iterator[Finding]:
    if path.startswith("\0"):  # an abstract address has no file
        return
    if (length := len(os.fsencode(path))) > _MAX_PATH:
        raise _Failed(
            f"{path}: the path of a socket can have at most {_MAX_PATH} bytes, this path has {length}",
            "configure a shorter path for the agent",
        )
    _enter_folders(path)
    about = _about(path)
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise _Failed(
            f"{path} is not a socket: {about}",
            _advice_on_intruder(path),
        )
    yield Finding(Outcome.OK, f"{path} is a socket: {about}")
    try:
        unix.check_directories(path, path)
    except ConnectionFailedError as error:
        yield Finding(Outcome.NOTE, str(error), "remove the write permission of other users: chmod o-w, or chmod +t")
    if not os.access(path, os.W_OK, effective_ids=True):
        raise _Failed(
            f"{_me()} may not write to {path}: {about}",
            "add the service's user to the group of the socket, or let the agent make the socket with mode 0666",
        )


def _advice_on_intruder(path: str) -> str:
    """Return the advice on a file or folder in the agent's place. It may be valuable, so do not advise to delete it."""
    if os.path.isdir(path):
        return (
            "a folder is in the agent's place: a container runtime makes one if the file to be mounted is missing. If "
            "it is empty, remove it by rmdir and start the agent; otherwise find its owner"
        )
    return (
        "another file is in the agent's place, so that an agent cannot start. Do not remove it unseen: look into it, "
        "move it away (mv) if it is not needed there, and start the agent"
    )


def _enter_folders(path: str) -> None:
    """Fail with the first part of *path* that is missing or closed."""
    way = os.path.abspath(path)
    parents = [way]
    while parents[-1] != os.path.dirname(parents[-1]):
        parents.append(os.path.dirname(parents[-1]))
    for here in reversed(parents):
        if not os.path.lexists(here):
            raise _Failed(
                f"{here} does not exist",
                "start the agent, or give its address: --unix PATH or --tcp HOST:PORT; in a container, mount the "
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
            raise _Failed(f"{here} is not a folder", "give the address of the agent: --unix PATH")
        if not os.access(here, os.X_OK, effective_ids=True):
            raise _Failed(
                f"{_me()} may not enter {here}: {_about(here)}",
                "give the service's user access: add it to the folder's group, or chmod o+x",
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


def _unix_agent(connect: Callable[..., DomainSocket], timeout: float, needs_acks: bool) -> Iterator[Finding]:
    with _connected(connect) as connection:
        yield Finding(Outcome.OK, f"{_me().rstrip(',')} can connect: {_listener(connection)} listens")
        if not _wait_delivered(connection, timeout):
            raise _Failed(f"it read nothing in {timeout} s", _advice_on_silence(connection))
        yield Finding(Outcome.OK, "it reads")
    with _connected(partial(connect, require_ack=True)) as connection:
        yield _finding_on_acks(_wait_delivered(connection, timeout), timeout, needs_acks)


def _tcp_agent(address: tuple[str, int], connect: partial[TCP], timeout: float, needs_acks: bool) -> Iterator[Finding]:
    with _connected(partial(connect, require_ack=True), partial(_answers_a_connection, address, timeout)) as connection:
        yield Finding(Outcome.OK, f"{_me().rstrip(',')} can connect: a process listens{_proved_by(connect)}")
        acknowledges = _wait_delivered(connection, timeout)
        if not acknowledges and not _closes_after_the_end(connection, timeout):
            raise _Failed(
                f"it neither acknowledged nor hung up in {timeout} s after the end of the data: it does not read",
                _advice_on_silence(connection),
            )
        yield Finding(Outcome.OK, "it reads")
        yield _finding_on_acks(acknowledges, timeout, needs_acks)


def _proved_by(connect: partial[TCP]) -> str:
    proved = [
        text
        for name, text in (("ssl", "its certificate is trusted"), ("shared_key", "it knows the shared key"))
        if connect.keywords.get(name) is not None
    ]
    return "".join(f", {text}" for text in proved)


def _finding_on_acks(acknowledges: bool, timeout: float, needs_acks: bool) -> Finding:
    if acknowledges:
        return Finding(Outcome.OK, "it acknowledges: require_ack=True can be used")
    return Finding(
        Outcome.FAILED if needs_acks else Outcome.NOTE,
        f"it acknowledged nothing in {timeout} s",
        "leave require_ack off, as it is by default, or use an agent that acknowledges (Fluent Bit; Fluentd and Vector "
        "over TCP only). Without acknowledgements, nothing shows that it takes Forward messages",
    )


def _advice_on_silence(connection: DomainSocket | TCP) -> str:
    process = connection.peer()[0] if isinstance(connection, DomainSocket) else 0
    if process and _is_stopped(process):
        return f"process {process} is stopped (SIGSTOP, a debugger): continue it by kill -CONT {process}"
    return (
        "its process is stopped or stuck, or its input is paused: Fluent Bit pauses an input at mem_buf_limit, if its "
        "outputs fail or are too slow, and logs 'paused'. Look at its log; meanwhile records wait on the queue"
    )


def _is_stopped(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            # The state follows the name, which is in brackets and may hold any character.
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


@contextlib.contextmanager
def _connected(connect: Callable[[], _C], answers: Callable[[], bool] = lambda: False) -> Iterator[_C]:
    """Connect, or fail with advice.

    :param answers: called if connecting took too long. Returns True if the address itself accepts connections.
    """
    try:
        connection = connect()
    except ConnectionFailedError as error:
        advice = _advice_on(error)
        if "not within" in str(error) and answers():
            advice = f"the address accepts connections, but no TLS or Forward handshake begins: {_NO_HANDSHAKE}"
        raise _Failed(str(error), advice) from None
    try:
        yield connection
    finally:
        connection.close()


def _answers_a_connection(address: tuple[str, int], timeout: float) -> bool:
    """Return True if the address accepts a TCP connection. The kernel does so for a stopped process too."""
    try:
        gsocket.create_connection(address, timeout).close()
    except OSError:
        return False
    return True


def _advice_on(error: ConnectionFailedError) -> str:
    """Return the advice on an error of connecting."""
    code = getattr(error.__cause__, "errno", None)
    if code == errno.EACCES:
        return "the file's mode permits it and the system does not: look for SELinux or AppArmor denials in the log"
    advice = _advice_on_unix(code) if str(error).startswith("unix:") else _advice_on_tcp(error.__cause__, str(error))
    return advice or "check the address"


def _advice_on_unix(code: int | None) -> str:
    if code == errno.ECONNREFUSED:
        return (
            "no process listens: the socket is left over from a dead agent; start the agent. In a container, mount the "
            "folder and not the socket itself, or a restarted agent is not found"
        )
    if code == errno.EPROTOTYPE:
        return "this is a datagram socket; configure the agent for a stream (Fluent Bit's and Fluentd's forward input)"
    if code == errno.ETIMEDOUT:
        return (
            "it listens and accepts no connection: its process is stopped or stuck, or its input is paused (Fluent Bit "
            "logs 'paused'); look at its log"
        )
    return ""


def _advice_on_tcp(cause: BaseException | None, text: str) -> str:
    if advice := _advice_on_tls(cause, text):
        return advice
    if "HELO" in text:
        return _NO_HANDSHAKE
    if ": refused: " in text:
        return "compare the shared key, the user name and the password with those in the agent's configuration"
    if "hung up" in text or isinstance(cause, ConnectionResetError | BrokenPipeError):
        return "it hangs up during the handshake: does the agent use a shared key, and TLS, at that port?"
    if isinstance(cause, ConnectionRefusedError) or "self-connect" in text:
        return "no process listens there: start the agent, and check its configured port"
    if isinstance(cause, std_socket.gaierror):
        return "check the name, and the name service of this host or container"
    if getattr(cause, "errno", None) in _NO_ROUTE or "not within" in text:
        return "no answer from that address: check the address, firewalls and network policies"
    return ""


def _advice_on_tls(cause: BaseException | None, text: str) -> str:
    """Return the advice on an error of TLS, "" for another error."""
    if "certificate required" in text or "CERTIFICATE_REQUIRED" in text:
        return "it requires a client certificate: --cert FILE, SSLContext.load_cert_chain()"
    if type(cause).__name__ == "SSLCertVerificationError":
        code = getattr(cause, "verify_code", 0)
        if code in _WRONG_NAME:
            return (
                "connect to the name in the certificate, or name it: --server-hostname NAME, TCP(server_hostname=...)"
            )
        if code in _WRONG_TIME:
            return "renew the agent's certificate, or set the clock of this host"
        return "trust the authority that issued the agent's certificate: --ca FILE, SSLContext.load_verify_locations()"
    if getattr(cause, "reason", None) is not None and isinstance(cause, OSError):  # an SSLError
        return "does the agent use TLS at that port? If it does, it may refuse the version of TLS or the certificate"
    return ""


def _listener(connection: DomainSocket) -> str:
    process, user = connection.peer()
    name = ""
    with contextlib.suppress(OSError), open(f"/proc/{process}/comm") as file:
        name = f" ({file.read().strip()})"
    return f"process {process}{name} of {_user(user)}" if process else f"a process of {_user(user)}"


def _wait_delivered(connection: DomainSocket | TCP, timeout: float) -> bool:
    """Send a heartbeat. Return True if it is delivered in time; fail if the agent hangs up or its answer is invalid."""
    broken = gevent.spawn(_how_it_breaks, connection)
    try:
        # Wait for a refusal first: its text is a better reason than that of a failed write.
        broken.join(min(_HANG_UP_SECONDS, timeout))
        if not broken.ready():
            connection.write([_heartbeat(connection.name)])
        deadline = monotonic() + timeout
        while not connection.delivered() and not broken.ready() and monotonic() < deadline:
            gevent.sleep(0.01)
        broken.join(min(_HANG_UP_SECONDS, timeout))
        if broken.ready() and (error := broken.get()) is not None:
            raise error
        return bool(connection.delivered())
    except ConnectionFailedError as error:
        raise _Failed(str(error), _advice_on_broken(error)) from None
    finally:
        broken.kill()


def _closes_after_the_end(connection: TCP, timeout: float) -> bool:
    """End writing. Return True if the agent reads everything and closes its side in time; fail if it resets.

    With TLS too, this is the end of the TCP connection: an agent may answer the end by an alert.
    """
    deadline = Deadline(timeout)
    with gsocket.socket(fileno=os.dup(connection.fileno())) as sock:
        try:
            sock.shutdown(gsocket.SHUT_WR)
            while not deadline.has_passed():
                sock.settimeout(deadline.left() or TICK)
                if not sock.recv(4096):
                    return True
        except TimeoutError:
            pass
        except OSError as error:
            raise _Failed(f"it hung up with unread data: {error.strerror}", _ADVICE_ON_HANGING_UP) from None
    return False


def _how_it_breaks(connection: DomainSocket | TCP) -> ConnectionFailedError | None:
    """Return the error of wait_broken(). gevent would print an exception of this greenlet."""
    try:
        connection.wait_broken()
    except ConnectionFailedError as error:
        return error
    return None


def _advice_on_broken(error: ConnectionFailedError) -> str:
    """Return the advice on an error of a connection that was established."""
    text = str(error)
    if "shared_key" in text:
        return "give the client the agent's key: --shared-key-file FILE, TCP(..., shared_key=...)"
    if advice := _advice_on_tls(error.__cause__, text):
        return advice
    if "the agent's answer is invalid" in text:
        return (
            "its answer is not an acknowledgement: does it speak another protocol (HTTP, syslog), or TLS "
            "(--tls)? If it speaks the Forward protocol, leave require_ack off"
        )
    return _ADVICE_ON_HANGING_UP


def _heartbeat(destination: str) -> bytes:
    beat = Heartbeat(
        audit_version=__version__,
        os_version=platform.release(),
        language=f"python{platform.python_version()}",
        destination=destination,
    )
    return Encoder().encode(beat, time.time())
