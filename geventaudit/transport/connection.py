"""Open connections to the agent, and the meaning of *delivered* for each kind.

========================  ==========================================================================================
connection                a frame counts as delivered when
========================  ==========================================================================================
with ``require_ack``      the agent said that it has it, by the Forward protocol's acknowledgement
:class:`DomainSocket`     the agent's process has read it from the socket (Linux; elsewhere: when it was written)
:class:`TCP`              the kernel of the agent's host has acknowledged it (Linux; elsewhere: when it was written),
                          and the connection is a second old: best effort
:class:`NoOp`             at once; it goes nowhere
========================  ==========================================================================================

Anything with the methods of :class:`Connection` can stand in for these.
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
    """One open way to an agent. Make one of your own by having these; no base class is needed.

    A connection is open when its constructor returns, is used by one client, and is never used again after anything has
    failed on it: the client closes it and asks its factory for another.
    """

    name: str
    """The kind of the connection, for the heartbeat: ``UnixDomainSocket``, ``TCP``, ..."""

    def write(self, frames: Sequence[bytes]) -> None:
        """Write whole frames, one after the other, waiting as a greenlet does if need be.

        :raises Exception: the connection counts as broken then, with an unknown part of *frames* written. If the agent
            hung up, and is known to have read of the frames in flight, ``ConnectionFailedError(...,
            agent_had_read=True)``: only then may a record be suspected to be the cause. If it hung up in order, and
            had read them all, ``frames_read=`` says how many.
        """

    def delivered(self) -> int:
        """How many frames, counted from the first that was written, the far side has taken for certain.

        Never falls, never waits, never raises. Where nothing is known, the number of frames written.
        """

    def wait_broken(self) -> None:
        """Wait until the far side hangs up, and raise the reason; runs in a greenlet of its own.

        :raises Exception: the reason, as from :meth:`write`. A connection that cannot break waits for ever.
        """

    def close(self) -> None:
        """Let go of everything, at once. May be called more than once, and while another greenlet is writing.

        It is called in forked children too, for a connection that is the parent's: close, and neither write nor shut
        down anything.
        """


class Closing:
    """``with`` support, for use by hand."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_connection(candidate: object, must: str, hint: str = "") -> None:
    """Raise if *candidate* is not a connection; *must* begins the sentence of the error.

    A class has all that its instances have, so it would do by its attributes alone.

    :raises TypeError: *candidate* is not a connection; the error names the missing members.
    """
    if isinstance(candidate, type):
        raise TypeError(f"{must} a Connection, got the class {candidate.__name__}, not an instance: call it")
    missing = [name for name in _MEMBERS if not hasattr(candidate, name)]
    if missing:
        raise TypeError(f"{must} a Connection, got {show(candidate)}, which has no {', '.join(missing)}{hint}")


def check_seconds(name: str, seconds: object, *, or_none: bool = False) -> None:
    """Raise if *seconds* is not a time to wait.

    :raises TypeError, ValueError: *seconds* is not a number, or not above 0.
    """
    if or_none and seconds is None:
        return
    right = f"{name} must be a number of seconds above 0{', or None for ever' if or_none else ''}"
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{right}, got {show(seconds)}")
    if not seconds > 0 or (or_none and seconds == float("inf")):  # NaN is not above anything
        raise ValueError(f"{right}, got {show(seconds)}")


def check_context(ssl: object) -> None:
    """Raise if *ssl* is not a context for TLS. A context that was made before patching can, too.

    :raises TypeError: it is neither an SSLContext nor None.
    """
    if ssl is not None and not isinstance(ssl, native.original("ssl", "SSLContext")):
        raise TypeError(f"ssl must be an ssl.SSLContext, got {show(ssl)}")


def checked_address(address: object, lowest_port: int = 1) -> tuple[str, int]:
    """Host and port.

    :raises TypeError, ValueError: they are none.
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
