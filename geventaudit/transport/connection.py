"""Open connections to the agent, and the meaning of *delivered* for each kind.

========================  ==========================================================================================
connection                a frame counts as delivered when
========================  ==========================================================================================
with ``require_ack``      the agent acknowledged it by the Forward protocol
:class:`DomainSocket`     the agent's process has read it from the socket (Linux; elsewhere: when it was written)
:class:`TCP`              the kernel of the agent's host has acknowledged it (Linux; elsewhere: when it was written),
                          and the connection is a second old: best effort
:class:`NoOp`             at once; the frame is discarded
========================  ==========================================================================================

Any object with the methods of :class:`Connection` can replace these.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from ..errors import show
from ..runtime import native

__all__ = ["Closing", "Connection", "check_connection", "check_context", "check_seconds", "checked_address"]

_MAX_PORT = 65535
_MEMBERS = ("name", "write", "delivered", "wait_broken", "close")  # of a Connection


@runtime_checkable
class Connection(Protocol):
    """An open connection to an agent. An object of your own needs these members, and no base class.

    A connection is open when its constructor returns. One client uses it. After any failure the client closes it, never
    uses it again, and asks its factory for another.
    """

    name: str
    """The kind of the connection, for the heartbeat: ``UnixDomainSocket``, ``TCP``, ..."""

    def write(self, frames: Sequence[bytes]) -> None:
        """Write whole frames in order. May wait, as a greenlet.

        :raises Exception: the connection is broken, and an unknown part of *frames* was written. If the agent hung up
            and is known to have read from the frames in flight, raise ``ConnectionFailedError(...,
            agent_had_read=True)``: only then may a record be suspected to be the cause. If the agent hung up in order
            and had read all frames, ``frames_read=`` is their number.
        """

    def delivered(self) -> int:
        """Return the number of frames, from the first written one, that the far side has certainly taken.

        Never falls, never waits, never raises. If nothing is known, return the number of frames written.
        """

    def wait_broken(self) -> None:
        """Wait until the far side hangs up, and raise the reason. Runs in its own greenlet.

        :raises Exception: the reason, as from :meth:`write`. A connection that cannot break waits for ever.
        """

    def close(self) -> None:
        """Close all descriptors at once. Idempotent. Another greenlet may be in :meth:`write`.

        Also called in a forked child, for the parent's connection: close the descriptors, and neither write to them nor
        shut them down.
        """


class Closing:
    """A mixin with ``with`` support, for use without a client."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_connection(candidate: object, must: str, hint: str = "") -> None:
    """Check that *candidate* is a connection.

    A class has the attributes of its instances, so it is refused separately.

    :param must: the start of the error text.
    :raises TypeError: *candidate* is not a connection; the error names the missing members.
    """
    if isinstance(candidate, type):
        raise TypeError(f"{must} a Connection, got the class {candidate.__name__}, not an instance: call it")
    missing = [name for name in _MEMBERS if not hasattr(candidate, name)]
    if missing:
        raise TypeError(f"{must} a Connection, got {show(candidate)}, which has no {', '.join(missing)}{hint}")


def check_seconds(name: str, seconds: object, *, or_none: bool = False) -> None:
    """Check that *seconds* is a time to wait.

    :raises TypeError, ValueError: *seconds* is not a number, or not above 0.
    """
    if or_none and seconds is None:
        return
    right = f"{name} must be a number of seconds above 0{', or None for no limit' if or_none else ''}"
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{right}, got {show(seconds)}")
    if not seconds > 0 or (or_none and seconds == float("inf")):  # NaN is not above anything
        raise ValueError(f"{right}, got {show(seconds)}")


def check_context(ssl: object) -> None:
    """Check that *ssl* is a context for TLS or None. A context made before patching is valid too.

    :raises TypeError: *ssl* is neither an SSLContext nor None.
    """
    if ssl is not None and not isinstance(ssl, native.original("ssl", "SSLContext")):
        raise TypeError(f"ssl must be an ssl.SSLContext, got {show(ssl)}")


def checked_address(address: object, lowest_port: int = 1) -> tuple[str, int]:
    """Return *address* as host and port.

    :raises TypeError, ValueError: *address* is not a host name and a port number.
    """
    match address:
        case (str() as host, int() as port):
            if isinstance(port, bool) or not lowest_port <= port <= _MAX_PORT:
                raise ValueError(
                    f"the port in address must be a whole number from {lowest_port} to {_MAX_PORT}, got {show(port)}"
                )
            return host, port
        case str():
            example = "('agent.example.com', 24224) and not 'agent.example.com:24224'"
        case _:
            example = "('agent.example.com', 24224)"
    raise TypeError(f"address must be a host name and a port number, such as {example}, got {show(address)}")
