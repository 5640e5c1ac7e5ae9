from typing import Any

def canonical_or_none(body: Any) -> bytes | None:
    """Return the canonical form of a body, or None to let the code in Python decide."""

def plain_stamp(stamp: Any) -> tuple[str, int, bytes, bytes] | None:
    """Return stream, number, time and MAC of the stamp of a sealed record with nothing special about it.

    Return None for other stamps, to let the code in Python decide.
    """
