"""A frame with an empty stamp, which gets its number, and its seal, when it is accepted."""

from __future__ import annotations

from typing import Any

__all__ = ["EMPTY_STAMP", "KEY", "NO_MAC", "Draft", "draft"]

KEY = "geventaudit"
"""The one reserved key of custom data."""

NO_MAC = "0" * 64
"""Stands for the MAC in the bytes that are authenticated."""

EMPTY_STAMP = bytes((0xA0 + len(KEY),)) + KEY.encode() + b"\xc0"
"""The reserved key and nil, packed."""


class Draft(bytes):
    """A frame with nil in place of its stamp: it has no number yet."""

    cut: int
    """The place of the nil, which the stamp replaces."""
    body: int
    """The place of the body."""
    unix_time: float
    """The time of the event, in seconds since 1970."""
    was = b""
    """The earlier numbers with their key, packed; empty if there are none."""
    checkpoint = b""
    """The checkpoint with its key, packed; empty in a user's record."""
    number = 0
    """The record's number; 0 before it has one."""
    stamped = b""
    """The frame with its stamp; empty before it has one."""
    pending: Any = None
    """The result of the outbox for the frame."""


def draft(frame: bytes, cut: int, body: int, unix_time: float) -> Draft:
    """Return a draft."""
    made = Draft(frame)
    made.cut, made.body, made.unix_time = cut, body, unix_time
    return made
