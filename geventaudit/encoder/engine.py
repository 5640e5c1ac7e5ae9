"""The encoder in use: compiled, or in plain Python where there is no compiled one or ``PURE_PYTHON`` is set."""

from __future__ import annotations

from .fallback import Walker

__all__ = ["ENCODER", "Walker"]

ENCODER = "pure"
