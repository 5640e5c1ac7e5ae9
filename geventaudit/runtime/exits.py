"""The hook at the exit of the process, also in the children of multiprocessing and billiard.

``atexit`` never calls a function that is registered while its handlers run. So clients register when they are
constructed. The children of ``multiprocessing`` and ``billiard`` end with ``os._exit``, which skips ``atexit``, but
they run the finalizers of their package.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["has_run", "register", "register_in_worker"]

_hook: Callable[[], None] | None = None
_ran_in = 0  # the process in which the hook has run
_worker = 0  # the child of multiprocessing or billiard in which the hook is registered


def register(hook: Callable[[], None]) -> None:
    """Call *hook* when the interpreter exits. A process has one hook: only the first call has an effect."""
    global _hook
    if _hook is None:
        _hook = hook
        atexit.register(_run)


def register_in_worker() -> None:
    """Register the hook with multiprocessing or billiard if this process is a child of one of them."""
    global _worker
    if _worker == os.getpid():
        return
    _worker = os.getpid()
    for package in ("multiprocessing", "billiard"):
        process, util = sys.modules.get(f"{package}.process"), sys.modules.get(f"{package}.util")
        if process is None or util is None:
            continue
        current = process.current_process()
        if getattr(current, "_parent_pid", None) is None:
            continue
        # Finalizers of higher priority run first; at this one, queues and managers still work.
        util.Finalize(None, _run, exitpriority=0)
        _run_before_exit_of_pool(current)


def _run_before_exit_of_pool(process: Any) -> None:
    """Run the hook when a worker of billiard's pool ends, which calls ``on_exit`` and then ``os._exit``."""
    worker: Any = getattr(process, "_target", None)
    if type(worker).__module__ != "billiard.pool" or not hasattr(worker, "on_exit"):
        return
    inner = worker.on_exit

    def on_exit(*arguments: Any) -> None:
        try:
            if inner is not None:
                inner(*arguments)
        finally:
            _run()

    worker.on_exit = on_exit


def has_run() -> bool:
    """Return True if the hook has run in this process. Records accepted now could not be delivered."""
    return _ran_in == os.getpid()


def _run() -> None:
    global _ran_in
    if _hook is not None and not has_run():
        try:
            _hook()
        finally:
            _ran_in = os.getpid()
