"""Unpatched functions of the standard library, for native threads and for code that must not switch greenlets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["allocate_lock", "original", "sleep", "start_new_thread", "thread_ident"]


def original(module: str, name: str) -> Any:
    """Return the unpatched object *name* of a module of the standard library.

    Without ``gevent.monkey`` in ``sys.modules``, nothing is patched. It is not imported here: the import takes longer
    than that of all modules of this package up to the clients.
    """
    monkey = sys.modules.get("gevent.monkey")
    return getattr(import_module(module), name) if monkey is None else monkey.get_original(module, name)


thread_ident: Callable[[], int] = original("_thread", "get_ident")
allocate_lock: Callable[[], Any] = original("_thread", "allocate_lock")
start_new_thread: Callable[..., int] = original("_thread", "start_new_thread")
sleep: Callable[[float], None] = original("time", "sleep")
