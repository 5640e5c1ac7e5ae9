"""The first bytes by which an agent refuses a sender of frames. Pure: no I/O, no clock.

An agent of the Forward protocol answers frames with acknowledgements, or with nothing. A server of another protocol
answers too: with a TLS alert, with HTTP, or, if it wants a shared key, with HELO.
"""

from __future__ import annotations

import re

__all__ = ["MAX_WORDS", "TLS_PROBE", "answers_in_tls", "refusal_of"]

MAX_WORDS = 16
"""Bytes that :func:`refusal_of` looks at."""

TLS_PROBE = b"\x16\x03\x01\x00\x04\x01\x00\x00\x00"
"""An empty ClientHello. A TLS server answers with an alert. An agent without TLS hangs up, since it is not a frame."""

_HELO = re.compile(rb"[\x90-\x9f\xdc\xdd].{0,6}HELO", re.DOTALL)
_TLS = re.compile(rb"\x15\x03[\x00-\x04]\x00\x02|\x16\x03[\x00-\x04]")
_HTTP = b"HTTP/"


def refusal_of(words: bytes) -> str | None:
    """Return the agent's reason to refuse this side, by its first bytes; None if they are not a refusal."""
    if _HELO.match(words):
        return "the agent asks for a shared key (TCP(..., shared_key=...))"
    if answers_in_tls(words):
        return "the agent speaks TLS (TCP(..., ssl=...))"
    if words.startswith(_HTTP):
        return "it answers in HTTP: the address is that of a web server"
    return None


def answers_in_tls(words: bytes) -> bool:
    """Return True if the bytes begin a TLS alert or handshake."""
    return _TLS.match(words) is not None
