"""The exceptions and the logger of the library.

::

    Exception
     +-- AuditError                     base class of the errors that this library defines
          +-- ValidationError           a message breaks the rules (a marshmallow.ValidationError too)
          +-- QueueFullError            no room on the queue; the message is still the caller's
          |    +-- SpoolError           the spool cannot keep it: the disk fails, or another process has it
          |    +-- SealError            no room while the key of the seal cannot be read, so that records wait for it
          +-- ClientClosedError         the client is closing or closed
          +-- WouldBlockError           the call would have to wait in the hub, where waiting is forbidden
          +-- ConnectionFailedError     a connection to the agent could not be made, or it broke
          +-- FrameError                bytes that are not a frame of this protocol
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import marshmallow
from marshmallow.exceptions import SCHEMA

if TYPE_CHECKING:
    from logging import Logger, LoggerAdapter

__all__ = [
    "AuditError",
    "ClientClosedError",
    "ConnectionFailedError",
    "FrameError",
    "QueueFullError",
    "SealError",
    "SpoolError",
    "ValidationError",
    "WouldBlockError",
    "as_connection_error",
    "count_errors",
    "flatten",
    "logger",
    "show",
]


class _Repr(reprlib.Repr):
    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        # reprlib would sort the keys, however many there are.
        if not value or level <= 0:
            return "{...}" if value else "{}"
        items = islice(value.items(), self.maxdict)
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(each, level - 1)}" for key, each in items]
        return f"{{{', '.join(shown)}{', ...' if len(value) > self.maxdict else ''}}}"


_repr = _Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlong = 30
_MAX_NAME = 60  # characters of a field's name in a path


def show(value: object) -> str:
    """Return a short repr of *value* for an error message. Exceptions of ``__repr__`` are caught."""
    try:
        return _repr.repr(value)
    except Exception:  # reprlib catches those of objects, but not of keys, nor of integers too long to print
        return f"an unprintable {type(value).__name__}"


def logger(part: str = "") -> LoggerAdapter[Logger]:
    """Return the logger ``geventaudit``, or its child *part*. Each line begins with the name of the library.

    The first call imports logging.
    """
    import logging

    class Named(logging.LoggerAdapter[logging.Logger]):
        def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
            return f"geventaudit: {msg}", kwargs

    return Named(logging.getLogger(f"geventaudit.{part}" if part else "geventaudit"))


class AuditError(Exception):
    """The base class of all errors that this library defines."""


class ValidationError(AuditError, marshmallow.ValidationError):
    """A message breaks the rules; nothing was accepted.

    A subclass of :class:`marshmallow.ValidationError`: code that handles that error handles this one.

    ``messages`` is a dict of lists of texts, nested by wire path, as in marshmallow:
    ``{"TargetResources": {"SubscriptionId": {0: {"Name": ["must not be empty"]}}}}``. ``str(error)`` is the same on one
    line: ``TargetResources.SubscriptionId[0].Name: must not be empty``. An error that concerns no single field is under
    ``_schema``.
    """

    messages: Any

    def __str__(self) -> str:
        return "; ".join(f"{path}: {text}" if path else text for path, text in flatten(self.messages, ""))


def flatten(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield the (path, text) pairs of the nested messages of a ValidationError, in their order."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from flatten(child, _join(path, key))
    elif isinstance(node, list | tuple):
        for child in node:
            yield from flatten(child, path)
    else:
        yield path, str(node)


def count_errors(messages: Any) -> int:
    """Return the number of texts in the nested *messages* of a ValidationError."""
    if isinstance(messages, Mapping):
        return sum(count_errors(each) for each in messages.values())
    return len(messages) if isinstance(messages, list) else 1


def _join(path: str, key: object) -> str:
    if isinstance(key, str):
        if key == SCHEMA:
            return path
        if key.isidentifier() and len(key) <= _MAX_NAME:
            return f"{path}.{key}" if path else key
    return f"{path}[{show(key)}]"


class QueueFullError(AuditError):
    """The queue had no room (within the timeout, if one was given). The message is still the caller's."""


class SpoolError(QueueFullError):
    """The spool cannot store a message: the disk fails, the path is no folder of this user, or another process has it.

    ``send`` raises it with ``Spool(..., mode="always")`` only; the message is still the caller's. Code that handles
    :class:`QueueFullError` handles it.
    """


class SealError(QueueFullError):
    """The key of a :class:`~geventaudit.Seal` cannot be read or replaced, so that no record can be sealed.

    ``send`` raises it once the queue is full of records that wait for the key, and at once with
    ``Spool(..., mode="always")``; the message is still the caller's. The text says what is wrong with the key file.
    Code that handles :class:`QueueFullError` handles it.
    """


class ClientClosedError(AuditError):
    """The client is closing or closed and takes no more messages."""


class WouldBlockError(AuditError):
    """A call would have to wait where waiting is forbidden. The call has changed nothing.

    ``flush()``, ``connect()`` and ``close()`` raise it in the hub, where the signal handlers of an idle process run,
    and in a greenlet of the library's own. Spawn a greenlet for the call: ``gevent.spawn(client.close, 5.0)``.
    """


class ConnectionFailedError(AuditError):
    """A connection could not be made, or it broke. The text names the address and the cause.

    :param path: the agent's Unix socket, if connecting to it failed. The client watches that path until it is connected
        again.
    :param agent_had_read: True if the agent is known to have read from the connection before it hung up. Only then may
        a record be suspected to be the cause.
    :param frames_read: the number of frames, from the first of the connection, that the agent had read when it closed
        the connection in order and had sent nothing; 0 if unknown. They count as delivered if the agent closes every
        connection like this.
    """

    def __init__(
        self, *arguments: object, path: str | None = None, agent_had_read: bool = False, frames_read: int = 0
    ) -> None:
        super().__init__(*arguments)
        self.path = path
        self.agent_had_read = agent_had_read
        self.frames_read = frames_read


def as_connection_error(error: BaseException, what: str) -> ConnectionFailedError:
    """Return *error* if it is a ConnectionFailedError, else a new one with *error* as its cause."""
    if isinstance(error, ConnectionFailedError):
        return error
    failed = ConnectionFailedError(f"{what}: {error!r}")
    failed.__cause__ = error
    return failed


class FrameError(AuditError):
    """Bytes that are not a frame of this protocol.

    ``offset`` is the position of the invalid frame, in bytes from the start of the stream.
    """

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason, offset)
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.reason} (at byte {self.offset})"
