"""Who runs on which core: what is measured has one for itself, what it writes to has the others.

Without that, a peer with threads is moved to and fro, and pays for handing the interpreter lock from core to core; it
would look slower than it can be.
"""

from __future__ import annotations

import os

__all__ = ["move_elsewhere", "stay_on_one"]


def stay_on_one() -> None:
    """Keep this process, and those that it starts, on the first core that it may use."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def move_elsewhere() -> None:
    """Keep this process on the cores that the one that started it does not use; called in a child before it runs."""
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, others)
    except (OSError, ValueError):  # there is only one, or a container holds the others back
        pass
