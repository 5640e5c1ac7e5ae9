"""The encoder in use: compiled, or plain Python.

Plain Python is used without the compiled module (no compiler at installation, PyPy), and if ``PURE_PYTHON`` is set in
the environment, as in gevent.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["ENCODER", "Chain", "Gate", "Walker", "send"]

Chain: Any = None
Gate: Any = None
send: Any = None
Walker: Any
ENCODER = "compiled"
"""``"compiled"`` or ``"pure"``."""

try:
    if os.environ.get("PURE_PYTHON"):
        raise ImportError("PURE_PYTHON is set")
    from ._fast import Chain, Gate, Walker, send
except ImportError:
    from .fallback import Walker

    ENCODER = "pure"
