"""Events without lost wakeups, also when signal handlers run in the middle of a wait."""

from __future__ import annotations

from gevent.event import Event

from .clock import TICK

__all__ = ["Change", "Signal"]


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
