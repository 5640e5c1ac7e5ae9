"""The processes of a run and their cores: the measured process has one core to itself, its receivers have the others.

Without that, a peer with threads is moved to and fro, and pays for handing the interpreter lock from core to core; it
would look slower than it can be.

``python -m benchmarks.processes COMMAND...`` becomes that command, on the other cores.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Scheduling", "elsewhere", "module", "move_elsewhere", "scheduling", "stay_on_one"]

ROOT = Path(__file__).parent.parent
"""The working directory of processes that run a module of this package."""


def module(name: str, *arguments: str, patched: bool = False) -> list[str]:
    """The command that runs a module of this package, monkey-patched or not."""
    return [sys.executable, "-m", *(["gevent.monkey", "--module"] if patched else []), f"benchmarks.{name}", *arguments]


def elsewhere(command: list[str]) -> list[str]:
    """The command that runs *command* on the other cores."""
    return module("processes", *command)


def stay_on_one() -> None:
    """Keep this process, and those that it starts, on the first core that it may use."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


class Scheduling(NamedTuple):
    """The share of its core that a thread has had so far, in seconds."""

    running: float
    kept_waiting: float
    """The time in which the thread could have run, and another one did."""


def scheduling(schedstat: int) -> Scheduling:
    """Return the figures of a ``schedstat`` of ``/proc``, read anew from that open descriptor."""
    running, kept_waiting, _ = os.pread(schedstat, 100, 0).split()
    return Scheduling(int(running) / 1e9, int(kept_waiting) / 1e9)


def move_elsewhere() -> None:
    """Move this process to the cores that the one that started it does not use."""
    others = set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, others)
    except OSError:  # there is only one, or the one that started it uses all, or a container holds them back
        pass


if __name__ == "__main__":
    move_elsewhere()
    os.execvp(sys.argv[1], sys.argv[1:])
