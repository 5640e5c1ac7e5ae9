"""Received messages, refused messages, and the counts of an agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..records import Message

__all__ = ["AgentCounts", "Observer", "Received", "Refused"]


class Received(NamedTuple):
    """A valid message as it arrived."""

    message: Message
    """The valid message."""
    time: float
    """The time of the event, in seconds since 1970."""
    service_tree_id: str | None
    """The service of the record (``env_ikey``); None without one."""
    extra: Mapping[str, Any] = {}
    """The keys beside those of the message. Agents on the way add some: ``{"AuditType": "ControlPlane"}``."""
    metadata: Mapping[str, Any] = {}
    """The metadata of the entry (Fluent Bit's ``[[time, metadata], record]``)."""


class Refused(NamedTuple):
    """A message that breaks the rules."""

    error: Exception
    """The reason: a ``ValidationError`` or a ``FrameError``."""
    tag: str
    """The tag of the frame."""
    time: float
    """The time of the event, in seconds since 1970."""
    body: dict[Any, Any]
    """The body as it arrived. A map with invalid keys is empty in it."""


@dataclass(slots=True)
class AgentCounts:
    """The counts of an agent since its construction, over all restarts."""

    connections: int = 0
    """Connections accepted, including those that were turned away."""
    open_connections: int = 0
    """Connections that are open now."""
    bytes: int = 0
    """Bytes read, without handshakes."""
    frames: int = 0
    """Whole frames."""
    messages: int = 0
    """Valid messages, heartbeats included."""
    heartbeats: int = 0
    """Heartbeats among them."""
    refused: int = 0
    """Messages that break the rules."""
    broken_streams: int = 0
    """Connections closed because the bytes are no frame, or because a callback raised."""
    half_frames: int = 0
    """Connections that ended in the middle of a frame."""
    acks: int = 0
    """Acknowledgements sent."""
    turned_away: int = 0
    """Connections refused: too many, no TLS, a wrong key, or too slow."""
    idle: int = 0
    """Connections closed because they sent nothing for the idle timeout."""


class Observer(Protocol):
    """Observes the connections, frames and messages of an agent; see :meth:`geventaudit.agent.Agent.observe`.

    All methods of one connection are called in the greenlet of that connection. They must not wait.
    """

    def connected(self, peer: str) -> None:
        """Observe a new connection."""

    def frame_began(self, size: int) -> None:
        """Observe a frame of *size* bytes, before its messages."""

    def handed_over(self, message: Received | Refused, size: int) -> None:
        """Observe a message after the callback of the agent. It takes *size* bytes of its frame, unpacked."""

    def disconnected(self, reason: str) -> None:
        """Observe the end of the connection."""
