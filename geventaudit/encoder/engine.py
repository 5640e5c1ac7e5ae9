"""The encoder in use: the compiled one, or the one in plain Python.

The latter where there is no compiled one (no compiler at installation, PyPy), and if ``PURE_PYTHON`` is set in the
environment, as for gevent.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from . import fallback

if TYPE_CHECKING:
    from ._fast import Gate, Walker

__all__ = ["ENCODER", "Gate", "Walker"]

Gate: Any = None  # type: ignore[no-redef]
Walker: Any = fallback.Walker  # type: ignore[no-redef]
ENCODER = "pure"
"""``"compiled"`` or ``"pure"``."""

if not os.environ.get("PURE_PYTHON"):
    try:
        from ._fast import Gate, Walker  # type: ignore[assignment]

        ENCODER = "compiled"
    except ImportError:
        pass
