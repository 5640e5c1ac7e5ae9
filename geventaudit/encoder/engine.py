"""The encoder in use: the compiled one, or the one in plain Python.

The latter where there is no compiled one (no compiler at installation, PyPy), and if ``PURE_PYTHON`` is set in the
environment, as for gevent.
"""

from __future__ import annotations

import os
from typing import Any

from . import fallback

__all__ = ["ENCODER", "Gate", "Walker", "send"]

Gate: Any = None
send: Any = None
Walker: Any = fallback.Walker
ENCODER = "pure"
"""``"compiled"`` or ``"pure"``."""

if not os.environ.get("PURE_PYTHON"):
    try:
        from ._fast import Gate, Walker, send

        ENCODER = "compiled"
    except ImportError:
        pass
