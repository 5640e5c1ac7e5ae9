from typing import Any

from ..lifecycle import Lifecycle, State
from .encoding import Encoder
from .plan import Plan

class Walker:
    """Writes frames by a plan."""

    def __init__(self, plan: Plan, encoder: Encoder) -> None: ...
    def frame_of(self, message: Any, unix_time: float) -> bytes | None:
        """Return the frame of *message*, or None to let marshmallow decide."""

class Chain:
    """The numbers and keys of one stream."""

    def __init__(self, stream: str, key: object | None) -> None: ...

class Gate:
    """The common path of ``send()``."""

    def __init__(self, walker: Walker, life: Lifecycle, running: State, under_way: list[None]) -> None: ...

def send(self: Any, msg: Any, *, timeout: float | None = 0.0) -> None:
    """Send by the gate of a client, or else carefully."""
