"""Events without lost wakeups, also when signal handlers run in the middle of a wait."""

from __future__ import annotations

import weakref
from collections import deque

import gevent
from gevent.event import Event

from .clock import TICK

__all__ = ["Change", "Line", "Place", "Signal"]

_LOOK_SECONDS = 1.0  # after which a greenlet in a line looks for itself whether it is the first


class Signal:
    """Wakes a worker greenlet when there is work.

    ::

        signal.arm()
        if not (work := look_for_work()):
            signal.wait(timeout)

    A :meth:`set` after :meth:`arm` ends the wait, also if a signal handler calls it in the waiting greenlet between the
    look for work and the wait.
    """

    __slots__ = ("event", "is_armed")

    def __init__(self) -> None:
        self.event = Event()
        """Ends the wait when set. In the hub's thread only."""
        self.is_armed = False
        """True while :meth:`set` has an effect."""

    def set(self) -> None:
        """Wake the greenlet if it waits or is about to wait. In the hub's thread only."""
        if self.is_armed:
            self.event.set()

    def arm(self) -> None:
        """Announce a wait, before the last look for work."""
        self.event.clear()
        self.is_armed = True

    def wait(self, timeout: float | None) -> None:
        """Wait for a :meth:`set` since :meth:`arm`, at most *timeout* seconds."""
        try:
            self.event.wait(timeout and max(timeout, TICK))
        finally:
            self.is_armed = False


class Change:
    """Wakes all greenlets that wait for a change.

    ::

        while True:
            event = change.event
            if try_it():
                break
            event.wait(timeout)

    A greenlet takes the event before it tries. So a change between the attempt and the wait ends the wait, also if a
    signal handler has waited for the same change in between.
    """

    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = Event()
        """The event that the next :meth:`set` sets."""

    def set(self) -> None:
        """Wake all waiting greenlets. In the hub's thread only."""
        event, self.event = self.event, Event()
        try:
            event.set()
        except AttributeError:  # gevent's, if the hub was destroyed: its loop is None, and nothing runs there
            pass


class Place:
    """The place of a greenlet in a :class:`Line`. It ends with the last reference to it, at the latest."""

    __slots__ = ("__weakref__", "event", "greenlet", "is_over")

    def __init__(self) -> None:
        self.greenlet = gevent.getcurrent()
        self.event = Event()
        self.is_over = False
        """Set to True to end the place: a traceback may keep references."""


class Line:
    """Greenlets that wait for their turn, in the order in which they came.

    ::

        place = Place()
        try:
            line.join(place)
            while True:
                event = change.event if line.is_first(place) else None
                if event and try_it():
                    break
                line.wait(place, event, timeout)
        finally:
            place.is_over = True
            line.call_first()

    There is nothing to give back: an exception at any bytecode, as at Ctrl-C, leaves no place behind. It may leave the
    next greenlet without its call, so each looks again after a second.
    """

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: deque[weakref.ref[Place]] = deque()

    def join(self, place: Place) -> None:
        """Go behind all others."""
        self._places.append(weakref.ref(place))

    def is_first(self, place: Place) -> bool:
        """Return True if it is the greenlet's turn. A signal handler that waits in a greenlet shares its turn."""
        first = self._first()
        return first is not None and first.greenlet is place.greenlet

    def wait(self, place: Place, event: Event | None, timeout: float | None) -> None:
        """Wait for *event*, or without one for the turn; *timeout* seconds at most."""
        (event or place.event).wait(_LOOK_SECONDS if timeout is None else min(timeout, _LOOK_SECONDS))

    def call_first(self) -> None:
        """Wake the first greenlet if it waits for its turn."""
        first = self._first()
        if first is not None:
            first.event.set()

    def _first(self) -> Place | None:
        while self._places:
            reference = self._places[0]
            place = reference()
            if place is not None and not place.is_over:
                return place
            try:
                self._places.remove(reference)
            except ValueError:  # a signal handler was faster
                pass
        return None
