"""What an agent hands over, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..records import Message

__all__ = ["AgentCounts", "Received", "Refused"]


class Received(NamedTuple):
    """One message as it arrived."""

    message: Message
    """What it says, after the rules found nothing wrong with it."""
    time: float
    """When it happened, in seconds since 1970."""
    service_tree_id: str | None
    """The service it is of (``env_ikey``), where it says so."""
    extra: Mapping[str, Any] = {}
    """The keys beside those of the message, which agents on the way add: ``{"AuditType": "ControlPlane"}``."""
    metadata: Mapping[str, Any] = {}
    """What the sender said of the entry, beside its time (Fluent Bit's metadata)."""


class Refused(NamedTuple):
    """One message that broke the rules."""

    error: Exception
    """What is wrong with it."""
    tag: str
    """Its type, as the frame has it."""
    time: float
    """When it happened, in seconds since 1970."""
    body: dict[Any, Any]
    """The rest of it, as it came. A map with keys that no map may have is empty."""


@dataclass(slots=True)
class AgentCounts:
    """What an agent has seen since it was made, restarts included."""

    connections: int = 0
    """Connections that came, those that were turned away included."""
    open_connections: int = 0
    """Those that are open now."""
    bytes: int = 0
    """Bytes that were read, without those of handshakes."""
    frames: int = 0
    """Whole frames."""
    messages: int = 0
    """Valid messages, heartbeats included."""
    heartbeats: int = 0
    """Heartbeats among them."""
    refused: int = 0
    """Messages that broke the rules."""
    broken_streams: int = 0
    """Connections closed because what came was no frame, or because the callback raised."""
    half_frames: int = 0
    """Connections that ended in the middle of a frame."""
    acks: int = 0
    """Acknowledgements that were sent."""
    turned_away: int = 0
    """Those that were refused: too many, no TLS, a wrong key, or too slow."""
    idle: int = 0
    """Connections closed because nothing came for the idle timeout."""
