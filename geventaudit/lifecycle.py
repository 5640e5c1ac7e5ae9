"""The life of a client, from its first use to ``close()`` or interpreter exit.

::

    NEW --first use--> RUNNING --close--> CLOSING --drained, or out of time--> CLOSED
     |                                                                            ^
     +-----------------------------------close------------------------------------+

A forked child starts at NEW again, unless the client was closing or closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import gevent
from gevent.event import Event

from .delivery.connector import Connector
from .delivery.heartbeats import Heartbeats
from .delivery.inbox import Inbox
from .delivery.outbox import Outbox
from .delivery.sender import Sender
from .errors import ClientClosedError, WouldBlockError, logger
from .notifications import NotificationKind, Notifier
from .records import Msg
from .runtime import exits, forks, workers
from .runtime.clock import Deadline
from .runtime.hub_thread import GONE, HubThread, NoAnswerError, Waiter
from .spool import Spool
from .stats import Counters, Stats
from .trail.stamp import handed_back

if TYPE_CHECKING:
    from .trail.stamping import Trail

__all__ = ["Lifecycle", "State", "check_may_wait", "close_all", "keep_alive"]

_T = TypeVar("_T")

_EXIT_SECONDS = 2.0  # that all clients together may take to drain at interpreter exit
_LOOK_SECONDS = 1.0  # after which a greenlet that waits for another's close() looks whether that goes on
_LATE_SECONDS = 1.0  # by which the hubs of other threads may exceed that


class State(Enum):
    """The state of a client."""

    NEW = "new"
    RUNNING = "running"
    CLOSING = "closing"
    CLOSED = "closed"


class Lifecycle:
    """The state of one client, and the parts that deliver its records while it runs.

    :param connector: makes the connections.
    :param trail: numbers and seals the records; None for neither.
    """

    def __init__(
        self,
        *,
        queue_size: int,
        spool: Spool | None,
        trail: Trail | None,
        connector: Connector,
        heartbeats: Heartbeats,
        counters: Counters,
        notifier: Notifier,
    ) -> None:
        self.state = State.NEW
        self.thread = HubThread.current()
        """The thread that constructed the client, and owns it."""
        self.inbox = Inbox()
        """The frames that other threads hand over."""
        self.outbox: Outbox | None = None
        self.sender: Sender | None = None
        self._queue_size = queue_size
        self._spool = spool
        self._trail = trail
        self._connector = connector
        self._heartbeats = heartbeats
        self._counters = counters
        self._notifier = notifier
        self._parts: dict[str, tuple[Outbox, Sender]] = {}
        self._undelivered: deque[Msg] = deque()  # not handed back yet
        self._closed = Event()
        self._orphan_closer: dict[str, Waiter] = {}  # one thread closes a client whose own thread has ended
        self._closer: object = None  # the greenlet that closes
        forks.register(self)
        exits.register(close_all)

    # -- running -------------------------------------------------------------------------------------------------------

    def check_accepting(self) -> None:
        """Check that the client is neither closing nor closed.

        :raises ClientClosedError: the client is closing or closed.
        """
        if self.state is State.CLOSING or self.state is State.CLOSED:
            raise ClientClosedError(f"the client is {self.state.value}")

    def check_thread(self) -> None:
        """Check that the client's own thread can deliver records.

        :raises ClientClosedError: the thread has ended, or its hub was destroyed.
        """
        if not self.thread.is_alive():
            raise ClientClosedError(GONE)

    def start(self) -> Sender:
        """Return the sender; start it if it does not run. In the client's own thread.

        Call :meth:`check_accepting` first.

        :raises ClientClosedError: the hub was destroyed, or the interpreter exits.
        :raises OSError: the process has no descriptor left for a hub.
        """
        hub = self.thread.hub
        if hub is not None and hub.loop is None:
            raise ClientClosedError(GONE)
        if self.sender is None:
            if exits.has_run():
                raise ClientClosedError("the interpreter exits, and has closed its clients")
            self._make_parts()
            self.check_accepting()  # a signal handler may have closed the client meanwhile
        sender: Sender = self.sender  # type: ignore[assignment]  # _make_parts() has set it
        sender.ensure_running()
        return sender

    def _make_parts(self) -> None:
        self.thread.start()
        exits.register_in_worker()
        if "parts" not in self._parts:
            outbox = self._make_outbox()
            sender = Sender(outbox, self._connector, self._heartbeats, self._counters, self._notifier)
            # A signal handler that sends may have been faster: setdefault is atomic.
            if self._parts.setdefault("parts", (outbox, sender))[0] is not outbox and outbox.store is not None:
                outbox.store.close_watcher()
        if self.state is State.NEW:
            self.state = State.RUNNING
        if self.state is not State.CLOSED:
            _running.add(self)
        self.outbox, self.sender = self._parts["parts"]  # last: start() skips all of this once they are set

    def _make_outbox(self) -> Outbox:
        settings = self.inbox, self._queue_size, self._spool, self._counters, self._notifier
        if self._trail is None:
            return Outbox(*settings)
        from .delivery.stamped_outbox import StampedOutbox  # loaded when the client was constructed

        return StampedOutbox(self._trail, *settings)

    def wake(self) -> None:
        """Take the frames that other threads handed over. In the hub."""
        if self.state is State.NEW:
            self._make_parts()
        if self.sender is not None and self.outbox is not None:
            self.sender.ensure_running()
            if self.outbox.store is not None:
                self.outbox.move_inbox()  # the disk takes records while there is no agent
            self.outbox.wake.set()

    def flush(self, timeout: float | None) -> bool:
        """Wait until all accepted records are delivered; see :meth:`geventaudit.Client.flush`."""
        if not self.thread.is_current():
            try:
                return self.thread.call(partial(self.flush, timeout), timeout, lambda result: None)
            except NoAnswerError:
                return False
        self.check_thread()
        if self.state is State.NEW and self.inbox:
            self._make_parts()
        if self.sender is None or self.outbox is None:
            return True
        if self.state is State.CLOSED:
            return self._counters.dropped + self._counters.kept == 0
        if self._is_settled() or self._connector.is_broken:
            return self._is_settled()
        check_may_wait("flush()")
        self.sender.ensure_running()
        return self.sender.flush(timeout)

    def _is_settled(self) -> bool:
        return self.outbox is None or self.outbox.stream.settled >= self.outbox.last_accepted

    def stats(self) -> Stats:
        """Return a snapshot of the counters of the client."""
        outbox, sender = self.outbox, self.sender
        if outbox is None or sender is None:
            return self._counters.snapshot(queued=len(self.inbox))
        if self.thread.is_current():
            sender.look()
        return self._counters.snapshot(
            queued=outbox.queued,
            in_flight=outbox.in_flight,
            in_flight_bytes=outbox.in_flight_bytes,
            spooled=outbox.spooled,
            connected=sender.is_connected,
            degraded=not sender.is_connected and self.state is not State.CLOSED,
        )

    # -- closing -------------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None) -> list[Msg]:
        """Close, and return the messages that were neither delivered nor kept; each is returned once.

        =========  =========================  ==========================================================================
        state      caller                     close()
        =========  =========================  ==========================================================================
        NEW        the own thread             closes; drains first the records that other threads handed over
        RUNNING    a greenlet                 drains until *timeout*, then keeps the rest in the spool or returns it
        RUNNING    the hub, or a worker       closes if all is delivered and there is no spool to wait for; else
                                              ``WouldBlockError``, nothing changed
        CLOSING    a greenlet                 waits until the other greenlet has closed, or *timeout*
        CLOSING    the hub, or a worker       ``WouldBlockError``
        CLOSING    a signal handler, in the   returns []: the greenlet continues to close afterwards
                   greenlet that closes
        CLOSED     the own thread             returns the messages that were not returned yet
        any        another thread             runs in the hub as above; returns [] if the hub does not answer in time
        any        any, after the thread has  keeps in the spool or returns everything at once
                   ended or destroyed its
                   hub
        any        interpreter exit           closes all clients, 2 s for all of them; see :func:`close_all`
        CLOSING    a forked child             is CLOSED there; the parent continues to close
        =========  =========================  ==========================================================================

        After an exception in the middle of it, as at Ctrl-C, call it again.
        """
        if not self.thread.is_alive():
            return self._close_without_hub()
        if not self.thread.is_current():
            try:
                return self.thread.call(partial(self.close, timeout), timeout, self._undelivered.extend)
            except NoAnswerError:
                return []
            except ClientClosedError:  # the client's own thread has ended meanwhile
                return self._close_without_hub()
        self._close_in_own_thread(timeout)
        return self._hand_back()

    def _close_in_own_thread(self, timeout: float | None) -> None:
        if self.state is State.NEW and not self.inbox:
            self.inbox.is_closed = True
            if not self.inbox:
                self._end([])
        if self.state is State.NEW or self.state is State.RUNNING:
            if self._spool is not None or self.inbox or not (self._is_settled() or self._connector.is_broken):
                check_may_wait("close()")
            self.inbox.is_closed = True
            self._make_parts()
            if self.state is not State.RUNNING:  # a signal handler has closed it meanwhile
                return
            deadline = Deadline(timeout)
            try:
                self._closer = gevent.getcurrent()
                self.state = State.CLOSING
                self._drain(deadline)
            finally:  # a Timeout or a kill that ends the wait ends the client all the same
                try:
                    self._finish(deadline.left())
                finally:  # Ctrl-C may have interrupted that; the next close() finishes then
                    self._closer = None
        elif self.state is State.CLOSING and self._closer is not gevent.getcurrent():
            check_may_wait("close()")
            self._wait_for_closer(Deadline(timeout))

    def _wait_for_closer(self, deadline: Deadline) -> None:
        """Wait until another greenlet has closed the client; finish if something has interrupted it."""
        while self.state is State.CLOSING and self._closer is not None and not deadline.has_passed():
            self._closed.wait(min(deadline.left() or _LOOK_SECONDS, _LOOK_SECONDS))
        if self._closer is None:
            self._finish(deadline.left())

    def _hand_back(self) -> list[Msg]:
        """Return the messages that were not handed back yet, each once. Thread-safe."""
        messages = []
        while self._undelivered:
            try:
                messages.append(self._undelivered.popleft())
            except IndexError:  # another thread took the last one
                break
        return messages

    def _drain(self, deadline: Deadline) -> None:
        self._drain_accepted(deadline)
        if self.state is State.CLOSING and self.outbox is not None and self.outbox.end(deadline):
            self._drain_accepted(deadline)

    def _drain_accepted(self, deadline: Deadline) -> None:
        # In a loop: a send() that waited for room when closing began may still be accepted.
        while self.state is State.CLOSING and not self._is_settled() and not self._connector.is_broken:
            if deadline.has_passed() or self.sender is None:
                break
            self.sender.ensure_running()
            self.sender.flush(deadline.left())

    def _finish(self, seconds: float | None) -> None:
        """Stop the parts, and keep or hand back the undelivered records within *seconds*; None for no limit."""
        if self.state is not State.CLOSING or self.sender is None or self.outbox is None:
            return  # closed at interpreter exit, or this is a forked child's copy of the parent's call
        self.outbox.end(Deadline(0.0))
        self.sender.stop(ClientClosedError("the client was closed while send() waited for room"))
        store = self.outbox.store
        if store is not None:
            store.stop()
        left, interruption = self.outbox.give_up(seconds)
        if self.state is not State.CLOSING:  # a forked child's copy of the parent's call
            return
        try:
            self._end(left)
        finally:
            self._closed.set()
            if store is not None:
                store.close_watcher()
        if interruption is not None:
            raise interruption
        if workers.may_wait():
            self.sender.worker.join(0.1)  # not for long: a factory can keep the greenlet from ending

    def _close_without_hub(self) -> list[Msg]:
        waiter = Waiter()
        try:
            # setdefault is atomic: no exception comes between the question and the turn.
            while self._orphan_closer.setdefault("closer", waiter) is not waiter:
                waiter.wait(0.002)
            if self.state is not State.CLOSED:
                self.inbox.is_closed = True
                if self.sender is None or self.outbox is None:
                    self._end(self.inbox.take_all())
                else:
                    self.state = State.CLOSING
                    self.sender.stop_without_hub()
                    left, interruption = self.outbox.give_up(0.0)
                    self._end(left)
                    if interruption is not None:
                        raise interruption
            return self._hand_back()
        finally:
            if self._orphan_closer.get("closer") is waiter:
                self._orphan_closer.clear()

    def _end(self, frames: list[bytes]) -> None:
        messages = handed_back(frames)
        count, outbox = len(frames), self.outbox
        # No signal handler comes between these lines: the messages are counted and handed back, or nothing has changed.
        self._counters.dropped += count
        self.state = State.CLOSED
        if outbox is not None:
            outbox.given_up = []
        self._undelivered.extend(messages)
        _running.discard(self)
        try:
            if messages:
                error = ClientClosedError(f"closed before {len(messages)} records were delivered")
                self._notifier.notify(NotificationKind.DROPPED, error, tuple(messages))
            self._notifier.notify(NotificationKind.CLOSED)
        finally:
            self._notifier.end()

    def is_drained_elsewhere(self) -> bool:
        """Return True, at interpreter exit, if the hub of another thread has to close this client."""
        if self.thread.is_alive() and self.thread.hub is None:
            self.thread = HubThread.current()  # its own thread has never used the client, so this thread drains it
        return not self.thread.is_current()

    def start_closing(self, deadline: Deadline) -> None:
        """Let the hub of another thread close this client, at interpreter exit. Does not wait."""
        try:
            self.thread.post(gevent.spawn, self.close, deadline.left())
        except ClientClosedError:  # that thread has ended: give_up_at_exit() closes the client
            pass

    def close_now(self, deadline: Deadline) -> None:
        """Close at interpreter exit, in the own thread."""
        self.close(deadline.left())
        if self.state is State.CLOSING:  # in a greenlet that never runs again
            self._finish(0.0)

    def give_up_at_exit(self, deadline: Deadline) -> None:
        """Close at interpreter exit, when the time of the hub of another thread is over."""
        if self.state is State.CLOSED:
            return
        if not self.thread.is_alive():
            self._close_without_hub()
            return
        stats = self.stats()
        left = stats.queued + stats.in_flight + stats.spooled
        if left:
            logger().warning(
                "the hub of another thread has not delivered %d records in time: call close() in the client's thread",
                left,
            )

    def after_fork_in_child(self) -> None:
        """Start anew in a forked child: connection, queue, window and counters are the parent's."""
        if not self.thread.is_current():  # the forking thread is the only one in the child
            self.thread = HubThread.current()
        outbox, sender = self.outbox, self.sender
        self.outbox = self.sender = None
        self.inbox = Inbox()
        self._parts = {}
        self._orphan_closer = {}
        self._undelivered.clear()
        if self.state is State.RUNNING:
            self.state = State.NEW
        elif self.state is State.CLOSING:
            self.state = State.CLOSED
            self._closed.set()
        if sender is not None:
            sender.stop(ClientClosedError("the process was forked while send() waited for room"))
        if outbox is not None:
            outbox.forget()
        self._connector.reset()  # after stop(), which ends the connector
        # Last: sender.stop() counts the deliveries of the parent's connection.
        self._counters.reset()
        self._notifier.forget()


def check_may_wait(call: str) -> None:
    """Check that the caller may wait.

    :raises WouldBlockError: the caller runs in the hub, or in a greenlet of the library.
    """
    if not workers.may_wait():
        raise WouldBlockError(
            f"{call} would have to wait, which is forbidden in the hub (also in a signal handler of an idle process): "
            "spawn a greenlet for the call"
        )


# -- interpreter exit --------------------------------------------------------------------------------------------------

_running: set[Lifecycle] = set()  # may hold records: must not be garbage-collected


def keep_alive(life: Lifecycle) -> None:
    """Hold a reference to *life* until it is closed: another thread has handed over a record."""
    _running.add(life)


def close_all() -> None:
    """Close all clients of this process, within 2 s for all of them. This is the hook at interpreter exit.

    The hubs of other threads close their clients meanwhile, which may take a second more.
    """
    deadline = Deadline(_EXIT_SECONDS)
    lives = [each for each in forks.registered() if isinstance(each, Lifecycle) and each.state is not State.CLOSED]
    others = [each for each in lives if each.is_drained_elsewhere()]
    for life in others:
        life.start_closing(deadline)
    for life in lives:
        if life not in others:
            _at_exit(life.close_now, deadline)
    late = Deadline((deadline.left() or 0.0) + _LATE_SECONDS)
    waiter = Waiter()
    for life in others:
        while life.state is not State.CLOSED and life.thread.is_alive() and not late.has_passed():
            waiter.wait(0.002)
        _at_exit(life.give_up_at_exit, deadline)


def _at_exit(close: Callable[[Deadline], None], deadline: Deadline) -> None:
    try:
        close(deadline)
    except Exception:  # the other clients must be closed too
        logger().exception("a client could not be closed at interpreter exit: call close() before")
