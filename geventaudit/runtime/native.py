"""What monkey-patching replaces, as it was before: for native threads, and for what must not switch to a greenlet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["allocate_lock", "original", "sleep", "start_new_thread", "thread_ident"]


def original(module: str, name: str) -> Any:
    """The one of the standard library, patched or not.

    ``gevent.monkey`` is asked only where somebody has loaded it: nothing is patched otherwise, and loading it takes
    longer than all modules of this package up to the clients.
    """
    monkey = sys.modules.get("gevent.monkey")
    return getattr(import_module(module), name) if monkey is None else monkey.get_original(module, name)


thread_ident: Callable[[], int] = original("_thread", "get_ident")
allocate_lock: Callable[[], Any] = original("_thread", "allocate_lock")
start_new_thread: Callable[..., int] = original("_thread", "start_new_thread")
sleep: Callable[[float], None] = original("time", "sleep")
