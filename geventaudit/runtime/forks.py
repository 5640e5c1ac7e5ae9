"""Forks: objects of the parent process reset themselves in a forked child.

gevent's greenlets continue in a forked child, with the parent's sockets and files. Clients and connections register
here. In the child each of them is called once, before any greenlet of the library continues: a client starts anew
(nothing queued, counters at zero), and connections and spools close their copies of the parent's descriptors. The child
only closes a descriptor: ``shutdown`` would reach the agent, and ``LOCK_UN`` would release the parent's lock.

An at-fork hook of another library may run before the hook of this module and may switch to other greenlets. So all code
that uses an inherited object calls :func:`check` first, which costs one comparison unless a fork is under way.

The hooks run before gevent initializes its hub anew: they must not switch.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from gevent._hub_local import get_hub_if_exists

from ..errors import logger

__all__ = ["Forkable", "KeyHolder", "check", "register", "register_keys", "registered", "under_way"]


class Forkable(Protocol):
    """An object that must be reset in a forked child."""

    def after_fork_in_child(self) -> None:
        """Drop all state of the parent process. Must not wait."""


class KeyHolder(Protocol):
    """An object with keys that parent and child must not share. Called in the thread that forks; must not wait."""

    def before_fork(self) -> None:
        """Take the keys of the child, so that the parent cannot use them."""

    def after_fork_in_parent(self) -> None:
        """Drop the keys of the child."""

    def after_fork_in_child(self) -> None:
        """Drop the keys of the parent."""


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()
_holders: list[weakref.ref[KeyHolder]] = []
_pid = 0  # of the process that the registered objects belong to
under_way: list[None] = []
"""One entry for each fork with running hooks."""


def register(thing: Forkable) -> None:
    """Call ``thing.after_fork_in_child()`` in every child that is forked while *thing* exists."""
    _register_hooks()
    _registered.add(thing)


def _register_hooks() -> None:
    global _pid
    if not _pid:
        _pid = os.getpid()
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def register_keys(holder: KeyHolder) -> None:
    """Call the methods of *holder* at every fork while *holder* exists; in the child, before all other objects."""
    _register_hooks()
    _holders.append(weakref.ref(holder, _holders.remove))


def _key_holders() -> list[KeyHolder]:
    return [holder for each in list(_holders) if (holder := each()) is not None]


def registered() -> list[Forkable]:
    """Return the registered objects that still exist, in no particular order."""
    while True:
        try:
            return list(_registered)
        except RuntimeError:  # another thread registered an object at this moment
            continue


def check() -> None:
    """Reset all registered objects now if this is a forked child and its hooks have not run yet."""
    if under_way and os.getpid() != _pid:
        _in_child()


def _before() -> None:
    under_way.append(None)
    for holder in _key_holders():
        holder.before_fork()


def _in_parent() -> None:
    under_way.pop()
    for holder in _key_holders():
        holder.after_fork_in_parent()
    # A child may run its copy of the loop before it initializes the loop anew. With libev, the child may then consume
    # the wakeups from other threads, and the parent's loop would never wake. So the parent stops sharing with the copy.
    # libuv does not need this, and cannot do it in a parent.
    hub = get_hub_if_exists()
    if hub is not None and hub.loop is not None and ".libev." in type(hub.loop).__module__:
        hub.loop.reinit()


def _in_child() -> None:
    global _pid
    if _pid == os.getpid():
        return  # check() has called this
    _pid = os.getpid()
    under_way.clear()
    for holder in _key_holders():
        holder.after_fork_in_child()
    # With libuv, a child that closes a socket removes it from the parent's epoll set too, until the child's loop has
    # its own epoll set. libev detects the fork by itself.
    hub = get_hub_if_exists()
    if hub is not None and hub.loop is not None and ".libuv." in type(hub.loop).__module__:
        hub.loop.reinit()
    for thing in registered():  # in any order: a connection may be closed before or after its client is reset
        try:
            thing.after_fork_in_child()
        except Exception:  # the other objects must be reset too
            logger().exception("%r could not be reset in a forked child", thing)
