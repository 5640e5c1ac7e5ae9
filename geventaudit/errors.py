"""What can go wrong, as exceptions; and the log that tells of it.

::

    Exception
     +-- AuditError                     everything this library raises on purpose
          +-- ValidationError           a message breaks the rules (a marshmallow.ValidationError too)
          +-- QueueFullError            no room on the queue; the message is still the caller's
          |    +-- SpoolError           the spool cannot keep it: the disk fails, or another process has it
          |    +-- SealError            the key of the seal cannot be used, so that no record can be sealed
          +-- ClientClosedError         the client is closing or closed
          +-- WouldBlockError           the call would have to wait where nothing may wait: in the hub
          +-- ConnectionFailedError     no connection to the agent, or it broke
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
    """*value* for an error message: its repr, short, whatever its ``__repr__`` does."""
    try:
        return _repr.repr(value)
    except Exception:  # reprlib guards objects, but not their keys, nor integers too long to print
        return f"an unprintable {type(value).__name__}"


def logger(part: str = "") -> LoggerAdapter[Logger]:
    """Return the logger ``geventaudit``, or a *part* of it. Its lines begin with the name of the library.

    logging is loaded with the first call.
    """
    import logging

    class Named(logging.LoggerAdapter[logging.Logger]):
        def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
            return f"geventaudit: {msg}", kwargs

    return Named(logging.getLogger(f"geventaudit.{part}" if part else "geventaudit"))


class AuditError(Exception):
    """The root of everything that geventaudit raises on purpose."""


class ValidationError(AuditError, marshmallow.ValidationError):
    """A message breaks the rules; nothing was accepted.

    It is a :class:`marshmallow.ValidationError`, so whoever catches that one catches this one.

    ``messages`` is a dict of lists of texts, nested by wire path, as marshmallow makes it:
    ``{"TargetResources": {"SubscriptionId": {0: {"Name": ["must not be empty"]}}}}``. ``str(error)`` is the same on one
    line: ``TargetResources.SubscriptionId[0].Name: must not be empty``. What concerns no single field stands under
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
    """Return how many texts nested *messages* of a ValidationError hold."""
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
    """The queue had no room (within the timeout, where one was given). The message is still the caller's."""


class SpoolError(QueueFullError):
    """The spool cannot keep a message: the disk fails, the path is no folder of this user, or another process has it.

    ``send`` raises it with ``Spool(..., mode="always")`` only; the message is still the caller's. Code that handles
    :class:`QueueFullError` handles it.
    """


class SealError(QueueFullError):
    """The key of a :class:`~geventaudit.Seal` cannot be read or replaced, so that no record can be sealed.

    ``send`` raises it; the message is still the caller's. Code that handles :class:`QueueFullError` handles it.
    """


class ClientClosedError(AuditError):
    """The client is closing or closed and takes no more messages."""


class WouldBlockError(AuditError):
    """A call would have to wait where nothing may wait, and has changed nothing.

    ``flush()``, ``connect()`` and ``close()`` raise it in the hub, where the signal handlers of an idle process run,
    and in a greenlet of the library's own. Spawn a greenlet for the call: ``gevent.spawn(client.close, 5.0)``.
    """


class ConnectionFailedError(AuditError):
    """No connection could be made, or it broke. The text names the address and the cause.

    :param path: the agent's Unix socket, if connecting to it failed. The client watches that path until it is connected
        again.
    :param agent_had_read: True if the agent is known to have read from the connection before it hung up. Only then may
        a record be suspected to be the cause.
    :param frames_read: how many frames, counted from the first of the connection, the agent had read when it ended the
        connection in order, without a word; 0 if that is not known. They count as delivered if the agent ends every
        connection so.
    """

    def __init__(
        self, *arguments: object, path: str | None = None, agent_had_read: bool = False, frames_read: int = 0
    ) -> None:
        super().__init__(*arguments)
        self.path = path
        self.agent_had_read = agent_had_read
        self.frames_read = frames_read


def as_connection_error(error: BaseException, what: str) -> ConnectionFailedError:
    """*error*, whatever it is, as one of a connection: *what* says what happened."""
    if isinstance(error, ConnectionFailedError):
        return error
    failed = ConnectionFailedError(f"{what}: {error!r}")
    failed.__cause__ = error
    return failed


class FrameError(AuditError):
    """Bytes that are not a frame of this protocol.

    ``offset`` counts the bytes from the start of the stream to the frame that is wrong.
    """

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason, offset)
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        return f"{self.reason} (at byte {self.offset})"
