"""What a forked child must not touch.

gevent's greenlets go on in a forked child by design, with the parent's sockets. So at the fork, in the child, every
client starts anew (nothing queued, counters at zero, no connection), and every connection lets go of its socket before
any greenlet runs: a copy of the parent's sender that was in the middle of a write finds its socket closed, and writes
nothing. Closing is all that is done to a socket: the parent's side of it stays open, and ``shutdown`` would reach the
agent.

One hook for the process, made when the first thing is tracked; weak references, so that what is closed is collected.
The hook in the child runs before gevent's hub is initialised anew: nothing in it may switch to another greenlet.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol, runtime_checkable

from gevent._hub_local import get_hub_if_exists

from ..errors import logger

__all__ = ["Forkable", "Holding", "track", "tracked"]


class Forkable(Protocol):
    """Something that has to know when it finds itself in a forked child."""

    def after_fork_in_child(self) -> None:
        """Forget what is the parent's. Must not wait."""


@runtime_checkable
class Holding(Protocol):
    """Something that a fork must not find in the middle of its work."""

    def before_fork(self) -> None:
        """Come to a rest. May wait, natively."""

    def after_fork_in_parent(self) -> None:
        """Go on."""


_tracked: weakref.WeakSet[Forkable] = weakref.WeakSet()
_hooked = False
_held: list[Holding] = []


def track(thing: Forkable) -> None:
    """Call ``thing.after_fork_in_child()`` in every child forked from now on, for as long as *thing* exists."""
    global _hooked
    if not _hooked:
        _hooked = True
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
    _tracked.add(thing)


def tracked() -> list[Forkable]:
    """What is tracked and still exists, in no particular order."""
    while True:
        try:
            return list(_tracked)
        except RuntimeError:  # another thread tracked something at that instant
            continue


def _before() -> None:
    for thing in tracked():
        if isinstance(thing, Holding):
            thing.before_fork()
            _held.append(thing)


def _in_parent() -> None:
    held = _held[:]
    _held.clear()  # before any of them is let go: another thread that waits to fork holds it then
    for thing in reversed(held):
        thing.after_fork_in_parent()
    # A child that goes on with its copy of the loop before that is initialised anew may read away what wakes this one
    # from other threads, such as the disk's; libev would never be woken by any of them again. So the two part here.
    hub = get_hub_if_exists()
    if hub is not None and hub.loop is not None:
        hub.loop.reinit()


def _in_child() -> None:
    _held.clear()
    for thing in tracked():
        try:
            thing.after_fork_in_child()
        except Exception:  # one that fails must not keep the others from letting go
            logger().exception("%r could not start anew in a forked child", thing)
