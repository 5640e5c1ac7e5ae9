"""The encoder in use: compiled, or plain Python.

Plain Python is used without the compiled module (no compiler at installation, PyPy), and if ``PURE_PYTHON`` is set in
the environment, as in gevent.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoding import Encoder
    from .plan import Plan

__all__ = ["ENCODER", "Gate", "Walker", "send", "walker_of"]

Gate: Any = None
send: Any = None
Walker: Any
ENCODER = "compiled"
"""``"compiled"`` or ``"pure"``."""

try:
    if os.environ.get("PURE_PYTHON"):
        raise ImportError("PURE_PYTHON is set")
    from ._fast import Gate, Walker, send
except ImportError:
    from .fallback import Walker

    ENCODER = "pure"


def walker_of(plan: Plan, encoder: Encoder) -> Any:
    """Return what executes *plan*: for sealed records, which are sorted, always in plain Python."""
    if encoder.is_sealed:
        from . import fallback

        return fallback.Walker(plan, encoder)
    return Walker(plan, encoder)
