from typing import Any

def canonical_or_none(body: Any) -> bytes | None:
    """Return the canonical form of a body, or None to let the code in Python decide."""
