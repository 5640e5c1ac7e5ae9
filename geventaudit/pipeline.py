"""What both clients are: the way of a message into the queue, and the life of a client.

::

    NEW --start--> RUNNING --close--> CLOSING --drained, or out of time--> CLOSED
     |                                                                        ^
     +-------------------------------close------------------------------------+

A forked child begins at NEW again, unless the client was closing or closed.

What they differ in, where a connection comes from and what its loss means, is theirs: :mod:`geventaudit.base` and
:mod:`geventaudit.client`.
"""

from __future__ import annotations

import atexit
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from enum import Enum
from types import TracebackType
from typing import Any, Self, cast

import gevent
from gevent.event import Event
from gevent.hub import get_hub

from .encoder import encoding as wire
from .encoder.compiled import Compiled
from .errors import ClientClosedError, ConnectionFailedError, QueueFullError, SpoolError, ValidationError, logger, show
from .notifications import NotificationChannel, NotificationKind, Notifier
from .operation import Operation
from .protocol.decoding import decode
from .records import AuditType, Heartbeat, Msg, Record
from .runtime import fork, native
from .runtime.native import thread_ident
from .runtime.threads import Home, Inbox, pause
from .schema.rules import MsgSchema, RecordSchema, by_record
from .sender import Sender
from .spool import Spool
from .stats import Counters, Rejection, Stats
from .transport import Connection
from .version import __version__

__all__ = ["Pipeline", "State", "check_timeout", "live_clients"]

_EXIT_SECONDS = 2.0  # what all running clients together may take to drain at interpreter exit
_LATE = 1.0  # and how many seconds later the hubs of other threads may be done with it
_SELDOM_SECONDS = 1.0  # how often refusals of one kind are told of


class State(Enum):
    """Where a client is in its life."""

    NEW = "new"
    RUNNING = "running"
    CLOSING = "closing"
    CLOSED = "closed"


# send() asks for them twice, and a member of a class takes longer to find.
_CLOSING, _CLOSED = State.CLOSING, State.CLOSED

_TRANSITIONS = {
    State.NEW: {State.RUNNING, State.CLOSED},
    State.RUNNING: {State.CLOSING},
    State.CLOSING: {State.CLOSED},
    State.CLOSED: set[State](),
}

BeforeSend = Callable[[Msg], Msg | None]


def check_timeout(timeout: float | None) -> None:
    """Refuse what is no time to wait before anything is done, and not only when there is something to wait for.

    :raises TypeError: it is not a number.
    :raises ValueError: it is NaN, which would wait for ever.
    """
    try:
        seconds = 0.0 if timeout is None else 0.0 + timeout
    except TypeError:
        raise TypeError(f"timeout must be a number of seconds, or None, got {show(timeout)}") from None
    if seconds != seconds:
        raise ValueError("timeout must be a number of seconds, or None, got nan")


class Pipeline:
    """The common part of :class:`~geventaudit.BaseClient` and :class:`~geventaudit.Client`."""

    def __init__(
        self,
        *,
        service_tree_id: object | None,
        queue_size: int,
        heartbeat_interval: float,
        schema: RecordSchema | None,
        max_frame_bytes: int,
        datetimes: wire.Datetimes,
        before_send: BeforeSend | None,
        spool: Spool | None = None,
    ) -> None:
        if not isinstance(queue_size, int) or queue_size < 1:
            raise ValueError(f"queue_size must be a whole number of at least 1, got {show(queue_size)}")
        if not isinstance(heartbeat_interval, int | float) or not heartbeat_interval > 0:
            raise ValueError(f"heartbeat_interval must be above 0 seconds, got {show(heartbeat_interval)}")
        if not isinstance(schema, RecordSchema | None):
            raise TypeError(f"schema must be an instance of RecordSchema or of a subclass, got {show(schema)}")
        if before_send is not None and not callable(before_send):
            raise TypeError(f"before_send must be callable, got {show(before_send)}: pass a function of a message")
        if not isinstance(spool, Spool | None):
            raise TypeError(f"spool must be a Spool, got {show(spool)}")
        self._schema = MsgSchema(record=schema)
        # The rules themselves, which are to hold whatever a user's schema or its hooks make of a message.
        self._rules = None if schema is None or type(schema) is RecordSchema else MsgSchema()
        self._encoder = wire.Encoder(service_tree_id, datetimes=datetimes, max_frame_bytes=max_frame_bytes)
        self._compiled = Compiled(self._schema, self._encoder)
        self._queue_size = queue_size
        self._heartbeat_interval = heartbeat_interval
        self._before_send = before_send
        self._spool = spool
        self._home = Home.here()
        self._inbox = self._new_inbox()
        self._state = State.NEW
        self._sender: Sender | None = None
        self._counters = Counters()
        self._notifier = Notifier()
        self._undelivered: list[Msg] = []
        self._closed = Event()
        self._heirs = native.allocate_lock()  # of other threads, who close this when its own has ended: one does
        fork.track(self)
        self._told: dict[NotificationKind, tuple[float, int]] = {}  # when last, and how many untold since

    # -- messages in ---------------------------------------------------------------------------------------------------

    def send(self, msg: Msg | Mapping[str, Any], *, timeout: float | None = 0.0) -> None:
        """Validate, encode and accept *msg*; it is written and delivered in the background.

        :param msg: a message, or a mapping by wire names: ``{"Type": "ControlPlane", "Record": {...}}``.
        :param timeout: seconds to wait for room on the queue; 0 does not wait, None waits for ever.
        :raises ValidationError: it breaks the rules.
        :raises QueueFullError: there was no room (in that time); the message is still the caller's. A
            :class:`~geventaudit.SpoolError`, which is one, when the spool has to keep it and cannot.
        :raises ClientClosedError: the client is closing or closed, or the thread that made it has ended.
        :raises ConnectionFailedError: the one connection of a :class:`~geventaudit.BaseClient` broke; nothing was
            accepted. A :class:`~geventaudit.Client` does not raise it.
        :raises TypeError, ValueError: *timeout* is not a number of seconds.
        """
        if timeout != 0.0:
            check_timeout(timeout)
        if thread_ident() != self._home.ident:
            self._send_from_elsewhere(msg, timeout)
            return
        if self._state is _CLOSING or self._state is _CLOSED:  # the rest is asked when the frame is ready
            self._check_accepting()
        frame = self._frame_of(msg, self._encoder)
        if frame is None:
            self._reject(Rejection.LEFT_OUT)
            return
        self._accept(frame, timeout)

    def operation(
        self,
        template: Msg | Record | Mapping[str, Any] | None = None,
        /,
        *,
        audit_type: AuditType | None = None,
        **fields: Any,
    ) -> Operation:
        """A context manager, or decorator, that sends one record when its block ends: how, and why when it failed.

        See :class:`~geventaudit.Operation`; nothing is validated before the end, so that fields may be added inside.

        :param template: what the record begins with: a record, a message, or a mapping by wire names as for ``send``.
        :param audit_type: the type of the message: without it the template's, or else ``AuditType.CONTROL_PLANE``.
        :param fields: fields of the record, by their names in :class:`~geventaudit.Record`; they go before the
            template's.
        :raises TypeError: for a name that is not a field of a record, or a template that is none.
        :raises ValidationError: a mapping has not the form of a message.
        """
        if isinstance(template, Mapping):
            template = self._schema.shape(template)
        if isinstance(template, Msg):
            audit_type = template.type if audit_type is None else audit_type
            template = template.record
        if not isinstance(template, Record | None):
            raise TypeError(f"the template must be a Record, a Msg or a mapping, got {show(template)}")
        record = (Record() if template is None else template).replace(**fields)
        return Operation(self._send_or_tell, AuditType.CONTROL_PLANE if audit_type is None else audit_type, record)

    def _send_or_tell(self, msg: Msg) -> Exception | None:
        """``send`` for those who have other things to raise; what they would have to handle is told, and returned."""
        try:
            self.send(msg)
        except Exception as error:
            if type(error) is not QueueFullError:  # that one is told of where it was found
                self.report(error)
            return error
        return None

    def _accept(self, frame: bytes, timeout: float | None) -> None:
        # This asks once more whether to accept: a hook may have waited, and the client been closed, or broken, or the
        # process forked, meanwhile.
        sender = self._running_sender()
        try:
            sender.put(frame, timeout)
        except SpoolError:  # told of when it began
            self._reject(Rejection.SPOOL)
            raise
        except QueueFullError as error:
            self._reject(Rejection.QUEUE_FULL)
            self._tell_seldom(NotificationKind.QUEUE_FULL, error)
            raise
        except ClientClosedError:
            self._reject(Rejection.CLOSED)
            raise

    def _send_from_elsewhere(self, msg: Msg | Mapping[str, Any], timeout: float | None) -> None:
        """``send`` in a native thread that is not the client's own; see :mod:`geventaudit.runtime.threads`."""
        self._check_accepting()
        frame = self._frame_of(msg, self._encoder)
        if frame is None:
            self._reject(Rejection.LEFT_OUT)
            return
        self._check_accepting()
        if self._spool is not None:  # where the record goes is for the hub to say
            self._accept_from_elsewhere(frame, timeout)
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                self._home.check()
                if self._inbox.put(frame, self._waiting):
                    if self._state is State.NEW:  # the hub may not come to it before the interpreter exits
                        _drain_at_exit(self)
                    return
            except ClientClosedError:
                self._reject(Rejection.CLOSED)
                raise
            if deadline is not None and time.monotonic() >= deadline:
                error = QueueFullError(f"the queue is full ({self._queue_size} records)")
                self._reject(Rejection.QUEUE_FULL)
                self._home.call(gevent.spawn, self._tell_seldom, NotificationKind.QUEUE_FULL, error)
                raise error
            pause(0.002)
            self._check_accepting()

    def _accept_from_elsewhere(self, frame: bytes, timeout: float | None) -> None:
        def accepted() -> bool:
            self._accept(frame, timeout)
            return True

        if not self._home.run(accepted, timeout, otherwise=False, withdraw=True):
            self._reject(Rejection.QUEUE_FULL)
            raise QueueFullError("the client's own thread did not answer")

    def _waiting(self) -> int:
        sender = self._sender
        return 0 if sender is None else sender.waiting()

    def _something_in_the_inbox(self) -> None:
        """In the hub: put on the queue what other threads handed over."""
        if self._state is State.NEW:
            self._start()
        if self._sender is not None:
            self._sender.ensure_running()
            self._sender.empty_inbox()

    def _reject(self, reason: str) -> None:
        """Count a refusal, in whatever thread."""
        if thread_ident() == self._home.ident:
            self._counters.rejected[reason] += 1
        else:
            self._inbox.reject(reason)

    def _check_accepting(self) -> None:
        if self._state is _CLOSING or self._state is _CLOSED:
            self._reject(Rejection.CLOSED)
            raise ClientClosedError(f"the client is {self._state.value}")

    def _frame_of(self, msg: Any, encoder: wire.Encoder) -> bytes | None:
        """The frame of *msg*; None when ``before_send`` left it out.

        :raises ValidationError: whatever is wrong with it, and whatever a user's hook, schema or object raises (not a
            gevent.Timeout or a kill: those are for the caller).
        """
        now = time.time()
        try:
            try:
                if self._before_send is not None:
                    msg = self._before_send(self._schema.shape(msg))
                    if msg is None:
                        return None
                frame = self._compiled.frame_of(msg, now, encoder.pack)
                if frame is not None:
                    return frame
                loaded = self._schema.load(msg)
                if self._rules is not None:
                    loaded = self._rules.load(loaded)
                return encoder.encode(loaded, now)
            except ValidationError as error:
                raise ValidationError(by_record(cast(Any, error).normalized_messages())) from None
            except Exception as error:
                raise ValidationError({"_schema": [f"validating it raised {show(error)}"]}) from error
        except ValidationError:
            self._reject(Rejection.INVALID)
            raise

    # -- life ----------------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything accepted before this call is delivered.

        :param timeout: seconds to wait; None for as long as it takes.
        :returns: whether it was delivered, as far as this kind of connection can know. What ``recover`` handed back is
            the caller's, and not asked after; nor is, before the client closes, what had been dropped by then.
        :raises ClientClosedError: the thread that made the client has ended, or its hub was destroyed.
        :raises TypeError, ValueError: *timeout* is not a number of seconds.
        """
        check_timeout(timeout)
        if thread_ident() != self._home.ident:
            return self._home.run(lambda: self.flush(timeout), timeout, otherwise=False)
        if self._state is State.NEW and len(self._inbox):
            self._start()
        if self._sender is None:
            return True
        if self._state is State.CLOSED:
            return self._counters.dropped + self._counters.kept == 0
        if self._is_beyond_help():
            return self._counters.settled >= self._counters.taken
        self._sender.ensure_running()
        return self._sender.flush(timeout)

    def close(self, timeout: float | None = 20.0) -> list[Msg]:
        """Take no more messages, let those accepted drain, and close the connection. May be called again.

        When the thread that made the client has ended, or has destroyed its hub, nothing can be delivered any more:
        then it is kept, or handed back, at once.

        :param timeout: seconds that draining may take; None for as long as it takes. A spool may take a second more.
        :returns: the messages that were neither delivered nor kept in a spool; each is handed back once. A disk that
            does not answer in time may keep them all the same, and the next client send them. In another thread than
            the client's own, nothing when that does not answer in time: call again.
        :raises TypeError, ValueError: *timeout* is not a number of seconds; nothing is closed.
        """
        check_timeout(timeout)
        if not self._home.is_there():
            return self._close_without_hub()
        if thread_ident() != self._home.ident:
            try:
                return self._home.run(
                    lambda: self.close(timeout), timeout, otherwise=[], late=lambda left: self._undelivered.extend(left)
                )
            except ClientClosedError:
                return self._close_without_hub()
        if self._state is State.NEW:
            self._inbox.close("the client is closed")
            if len(self._inbox):
                self._start()  # another thread sent, and this one has not come to it yet
        if self._state is State.NEW:
            self._move_to(State.CLOSED)
            self._tell(NotificationKind.CLOSED)
            self._notifier.end()
        elif self._state is State.RUNNING:
            self._move_to(State.CLOSING)
            deadline = None if timeout is None else time.monotonic() + timeout
            try:
                self._drain(deadline)
            finally:  # a Timeout or a kill that ends the waiting ends the client all the same
                self._finish(0.0 if deadline is None else deadline - time.monotonic())
        elif self._state is State.CLOSING:  # another greenlet is at it
            self._closed.wait(timeout)
        undelivered, self._undelivered = self._undelivered, []
        return undelivered

    def _drain(self, deadline: float | None) -> None:
        # More than once: whoever was waiting for room when closing began may still get it.
        if self._sender is not None:
            self._sender.empty_inbox()
        while self._state is State.CLOSING and self._counters.settled < self._counters.taken:
            if self._is_beyond_help():
                break
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or self._sender is None:
                break
            self._sender.ensure_running()
            self._sender.flush(left)

    def _finish(self, seconds: float) -> None:
        if self._state is State.CLOSED:
            return  # it was ended at interpreter exit; or this is a forked child's copy of the parent's call
        sender = cast(Sender, self._sender)
        self._inbox.close("the client is closed")
        sender.stop("the client was closed")
        try:
            sender.keep(seconds)
        finally:
            if self._state is State.CLOSING:  # not in a forked child's copy of this call
                try:
                    self._end(sender.unkept)
                finally:
                    self._closed.set()
        sender.join(0.1)  # it was told; one that a factory keeps from ending is not waited for

    def _close_without_hub(self) -> list[Msg]:
        while not self._heirs.acquire(False):
            pause(0.002)
        try:
            if self._state is not State.CLOSED:
                self._inbox.close("the client is closed")
                if self._state is State.RUNNING:
                    self._move_to(State.CLOSING)
                try:
                    if self._sender is not None:
                        self._sender.keep_without_hub()
                finally:  # a Timeout or a kill that ends the waiting ends the client all the same
                    frames = self._inbox.take()
                    self._counters.accepted += len(frames)
                    self._end(frames if self._sender is None else self._sender.unkept + frames)
            undelivered, self._undelivered = self._undelivered, []
            return undelivered
        finally:
            self._heirs.release()

    def _is_to_be_drained(self) -> bool:
        if self._state is State.CLOSED:
            return False
        return bool(self._inbox) or self._counters.settled < self._counters.taken

    def _give_up_at_exit(self) -> None:
        if self._home.is_there():
            left = self._counters.taken - self._counters.settled + len(self._inbox)
            logger().warning("%r: the hub of its thread has not delivered %d records in time", self, left)
        else:
            self._close_without_hub()

    def _end(self, frames: list[bytes]) -> None:
        self._counters.dropped += len(frames)
        if self._sender is not None:
            self._sender.forget_unkept()
        self._move_to(State.CLOSED)
        _running.discard(self)
        try:
            self._undelivered = [cast(Msg, decode(frame)[0]) for frame in frames]
            if frames:
                error = ClientClosedError(f"closed before {len(frames)} records were delivered")
                self._tell(NotificationKind.DROPPED, error, tuple(self._undelivered))
            self._tell(NotificationKind.CLOSED)
        finally:
            self._notifier.end()

    def stats(self) -> Stats:
        """The numbers of this client, now."""
        sender = self._sender
        if sender is None:
            return self._counters.snapshot(self._inbox)
        if thread_ident() == self._home.ident:
            sender.look()
        records, size = sender.in_flight
        connected = sender.connected
        return self._counters.snapshot(
            self._inbox,
            queued=sender.queued,
            in_flight=records,
            in_flight_bytes=size,
            spooled=sender.spooled,
            connected=connected,
            degraded=not connected and self._state is not State.CLOSED,
        )

    @property
    def spool(self) -> Spool | None:
        """The disk behind the queue, as it was given; None without one."""
        return self._spool

    def notify(self) -> NotificationChannel:
        """The channel on which this client tells what happens to it; always the same. See :class:`NotificationKind`."""
        return self._notifier.channel()

    def report(self, error: BaseException, *, recorded: bool = False) -> None:
        """Tell, as a ``NOT_RECORDED`` notification and in the log, that something went unrecorded.

        For integrations, which must not raise into the application that they watch. Never waits; works from any thread;
        what comes more than once a second is counted in ``missed``.

        :param error: why. The client tells of a :class:`~geventaudit.QueueFullError` itself: no need to report it.
        :param recorded: it was recorded all the same, without a part of it: told as ``INCOMPLETE``.
        """
        kind = NotificationKind.INCOMPLETE if recorded else NotificationKind.NOT_RECORDED
        if thread_ident() == self._home.ident:
            self._tell_seldom(kind, error)
            return
        try:
            self._home.call(gevent.spawn, self._tell_seldom, kind, error)
        except ClientClosedError:  # nobody is left to read the channel
            logger().warning("%s: %s", kind.value, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state.value}>"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _running_sender(self) -> Sender:
        """The sender, started where it was not, or where somebody killed its greenlet.

        :raises ClientClosedError: the client is closing or closed.
        """
        self._check_accepting()
        if self._sender is None:
            self._start()
        sender: Sender = self._sender  # type: ignore[assignment]  # cast() would be a call for every record
        sender.ensure_running()
        return sender

    def _start(self) -> None:
        if self._sender is None:
            self._sender = Sender(
                queue_size=self._queue_size,
                connect=self._connect,
                lost=self._lost,
                heartbeat=self._heartbeat,
                heartbeat_interval=self._heartbeat_interval,
                set_aside=self._set_aside,
                counters=self._counters,
                inbox=self._inbox,
                spool=self._spool,
                home=self._home,
                tell=self._tell,
            )
            self._move_to(State.RUNNING)
            _drain_at_exit(self)

    def after_fork_in_child(self) -> None:
        """In a forked child: start anew. Connection, queue, window and counters are the parent's, and stay there."""
        if thread_ident() != self._home.ident:  # the only thread there is now
            self._home = Home.here()
        self._inbox = self._new_inbox()
        self._heirs = native.allocate_lock()
        sender, self._sender = self._sender, None
        self._counters = Counters()
        self._undelivered = []
        self._told = {}
        self._notifier.forget()
        if self._state is State.RUNNING:
            self._state = State.NEW
        elif self._state is State.CLOSING:
            self._state = State.CLOSED
            self._closed.set()
        if sender is not None:
            sender.stop("the process was forked")
            if sender.store is not None:
                sender.store.abandon()

    def _new_inbox(self) -> Inbox:
        return Inbox(self._queue_size, lambda: self._home.call(self._something_in_the_inbox))

    def _connect(self) -> Connection:
        raise NotImplementedError

    def _lost(self, error: ConnectionFailedError, delivered: int, lived: float) -> None:
        raise NotImplementedError

    # What is called with a frame that keeps breaking connections; None where the caller is to judge.
    _set_aside: Callable[[bytes, int], None] | None = None

    def _is_beyond_help(self) -> bool:
        """Whether waiting for deliveries makes no sense."""
        return False

    def _move_to(self, state: State) -> None:
        if state not in _TRANSITIONS[self._state]:
            raise AssertionError(f"a client cannot go from {self._state.value} to {state.value}")
        self._state = state

    def _heartbeat(self, destination: str) -> bytes:
        beat = Heartbeat(
            service_id=self._encoder.service_tree_id or "",
            audit_version=__version__,
            os_version=platform.release(),
            language=f"python{platform.python_version()}",
            destination=destination,
        )
        return self._encoder.encode(beat, time.time())

    def _tell(
        self,
        kind: NotificationKind,
        error: BaseException | None = None,
        undelivered: tuple[Msg, ...] = (),
        missed: int = 0,
    ) -> None:
        """One event, to whoever reads the channel and to the log."""
        self._notifier.tell(kind, error, undelivered, missed)
        if error is None:
            logger().info("%s", kind.value)
        else:
            logger().warning("%s: %s", kind.value, error)

    def _tell_seldom(self, kind: NotificationKind, error: BaseException) -> None:
        """Tell of what comes with every message as long as it lasts; those in between are counted in the next."""
        now = time.monotonic()
        last, untold = self._told.get(kind, (-_SELDOM_SECONDS, 0))
        if now - last < _SELDOM_SECONDS:
            self._told[kind] = (last, untold + 1)
            return
        self._told[kind] = (now, 0)
        self._tell(kind, error, missed=untold)


def live_clients() -> list[Pipeline]:
    """The clients of this process that are not closed, those included that never sent: for whoever ends a process.

    A forked child has those of its parent, which begin anew there. Starts nothing. In no particular order.
    """
    return [each for each in fork.tracked() if isinstance(each, Pipeline) and each._state is not State.CLOSED]


# -- interpreter exit --------------------------------------------------------------------------------------------------

_running: weakref.WeakSet[Pipeline] = weakref.WeakSet()
_registered = False


def _drain_at_exit(client: Pipeline) -> None:
    """Give *client* a chance to drain when the interpreter exits without closing it."""
    global _registered
    if not _registered:
        _registered = True
        atexit.register(_drain_all)
    _running.add(client)


def _drain_all() -> None:
    deadline = time.monotonic() + _EXIT_SECONDS

    def left() -> float:
        return max(deadline - time.monotonic(), 0.0)

    hub = get_hub()
    clients = [each for each in live_clients() if each in _running]
    own = [each for each in clients if each._home.hub is hub]
    others = [each for each in clients if each._home.hub is not hub]
    for client in others:  # their threads close them, meanwhile
        try:
            client._home.call(gevent.spawn, client.close, left())
        except ClientClosedError:  # that thread has ended
            pass
    for client in own:
        try:
            client.close(timeout=left())
            if client._state is State.CLOSING:  # by a greenlet that will never run again
                client._finish(0.0)
        except Exception:  # the others are to have their chance
            logger().exception("%r could not be closed", client)
    for client in others:
        while client._is_to_be_drained() and client._home.is_there() and time.monotonic() < deadline + _LATE:
            pause(0.002)
        if client._is_to_be_drained():
            try:
                client._give_up_at_exit()
            except Exception:
                logger().exception("%r could not be closed", client)
