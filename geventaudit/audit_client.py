"""The base class of both clients, from ``send()`` to the outbox; and the list of all clients."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import gevent

from .delivery.connector import Connector
from .delivery.heartbeats import Heartbeats
from .encoder import engine
from .encoder.encoding import Datetimes, Encoder
from .encoder.plan import plan_of, stock_schema
from .errors import (
    AuditError,
    ClientClosedError,
    ConnectionFailedError,
    QueueFullError,
    SealError,
    SpoolError,
    ValidationError,
    logger,
    show,
)
from .lifecycle import Lifecycle, State, keep_alive
from .notifications import NotificationChannel, NotificationKind, Notifier
from .operation import Operation
from .records import AuditType, Msg, Record
from .runtime import forks
from .runtime.clock import check_timeout
from .runtime.hub_thread import NoAnswerError
from .runtime.native import thread_ident
from .runtime.signatures import check_takes
from .schema.rules import MsgSchema, RecordSchema, by_record
from .spool import Spool
from .stats import Counters, Rejection, Stats
from .trail.seal import Seal
from .trail.stamp import MAX_STAMP_BYTES

if TYPE_CHECKING:
    from .encoder._fast import Gate
    from .trail.stamping import Trail

__all__ = ["AuditClient", "BeforeSend", "live_clients"]

BeforeSend = Callable[[Msg], Msg | None]

_REASONS = (
    (SpoolError, Rejection.SPOOL),
    (SealError, Rejection.SEAL),
    (QueueFullError, Rejection.QUEUE_FULL),
    (ClientClosedError, Rejection.CLOSED),
    (ConnectionFailedError, Rejection.BROKEN),
)

# send() needs them, and a member of a class takes longer to find.
_RUNNING, _CLOSING, _CLOSED = State.RUNNING, State.CLOSING, State.CLOSED

_MANY_CLIENTS = 16  # live clients from one line of code that are taken for a mistake


class AuditClient:
    """The common part of :class:`~geventaudit.Client` and :class:`~geventaudit.BaseClient`.

    For type checks: ``isinstance(client, AuditClient)``. Do not construct it.
    """

    def __init__(
        self,
        connector: Connector,
        counters: Counters,
        notifier: Notifier,
        *,
        service_tree_id: object | None,
        queue_size: int,
        heartbeat_interval: float,
        schema: RecordSchema | None,
        max_frame_bytes: int,
        datetimes: Datetimes,
        json_safe: bool,
        before_send: BeforeSend | None,
        stamp: bool,
        seal: Seal | None,
        spool: Spool | None = None,
    ) -> None:
        if not isinstance(queue_size, int) or queue_size < 1:
            raise ValueError(f"queue_size must be a whole number of at least 1, got {show(queue_size)}")
        if not isinstance(heartbeat_interval, int | float) or not heartbeat_interval > 0:
            raise ValueError(f"heartbeat_interval must be above 0 seconds, got {show(heartbeat_interval)}")
        if not isinstance(schema, RecordSchema | None):
            raise TypeError(f"schema must be an instance of RecordSchema or of a subclass, got {show(schema)}")
        if before_send is not None:
            _check_before_send(before_send)
        if not isinstance(spool, Spool | None):
            raise TypeError(f"spool must be a Spool, got {show(spool)}")
        is_stamped = _is_stamped(stamp, seal)
        self._schema = None if schema is None else MsgSchema(record=schema)
        self._encoder = Encoder(
            service_tree_id,
            datetimes=datetimes,
            json_safe=json_safe,
            is_stamped=is_stamped,
            is_sealed=seal is not None,
            max_frame_bytes=_without_stamp(max_frame_bytes, is_stamped),
        )
        # Loaded here, since the first send() may find no descriptor left to read a module, and a signal handler that
        # sends may interrupt it there.
        logger()
        if spool is not None:
            _load_store(max_frame_bytes)
        self._trail = self._make_trail(seal) if is_stamped else None
        self._walker = engine.Walker(plan_of(self._encoder), self._encoder)
        self._queue_size = queue_size
        self._before_send = before_send
        self._spool = spool
        self._counters = counters
        self._notifier = notifier
        self._has_warned = False  # of records of other threads that wait for the client's own thread
        self._life = Lifecycle(
            queue_size=queue_size,
            spool=spool,
            trail=self._trail,
            connector=connector,
            heartbeats=Heartbeats(self._encoder, heartbeat_interval),
            counters=counters,
            notifier=notifier,
        )
        self._gate: Gate | None = None
        if engine.Gate is not None and schema is None and before_send is None:
            self._gate = engine.Gate(self._walker, self._life, _RUNNING, forks.under_way)
        _warn_of_many(self)

    def _make_trail(self, seal: Seal | None) -> Trail:
        from .delivery import stamped_outbox  # noqa: F401
        from .trail.stamping import Trail

        if seal is not None:
            from .delivery import key_reader  # noqa: F401

        return Trail(seal, self._encoder)

    # -- messages in ---------------------------------------------------------------------------------------------------

    def send(self, msg: Msg | Mapping[str, Any], *, timeout: float | None = 0.0) -> None:
        """Validate, encode and accept *msg*. It is written and delivered in the background.

        :param msg: a message, or a mapping by wire names: ``{"Type": "ControlPlane", "Record": {...}}``.
        :param timeout: seconds to wait for room on the queue; 0 does not wait, None has no limit. In the hub, as in a
            signal handler of an idle process, nothing waits.
        :raises ValidationError: the message breaks the rules.
        :raises QueueFullError: there was no room (in that time), or no memory; the message is still the caller's. Its
            subclass :class:`~geventaudit.SpoolError` if the spool has to store the message and cannot.
        :raises ClientClosedError: the client is closing or closed, or the thread that constructed it has ended.
        :raises ConnectionFailedError: the one connection of a :class:`~geventaudit.BaseClient` broke; nothing was
            accepted. A :class:`~geventaudit.Client` does not raise it.
        :raises TypeError, ValueError: *timeout* is not a number of seconds.
        """
        self._send_carefully(msg, timeout, None)

    def _send_carefully(self, msg: Msg | Mapping[str, Any], timeout: float | None, frame: bytes | None) -> None:
        """Send a message that the gate did not accept. *frame* is its frame if the gate has made one."""
        if timeout != 0.0:
            check_timeout(timeout)
        try:
            if forks.under_way:
                forks.check()
            life = self._life
            if life.state is _CLOSING or life.state is _CLOSED:  # all other states are checked when the frame is ready
                life.check_accepting()
            if frame is None:
                frame = self._frame_of(msg)
            if frame is None:
                self._counters.reject(Rejection.LEFT_OUT)
            elif thread_ident() == life.thread.ident:
                self._accept(frame, timeout)
            else:
                self._accept_from_other_thread(frame, timeout)
        except AuditError as error:
            self._note_refusal(error)
            raise
        except (OSError, MemoryError, RecursionError) as error:
            refusal = QueueFullError(f"there are not enough resources to accept the message: {show(error)}")
            try:
                self._note_refusal(refusal)
            except (OSError, MemoryError, RecursionError):  # the refusal is raised below
                pass
            raise refusal from error

    def _note_refusal(self, error: AuditError) -> None:
        """Count a refusal, and notify if the queue is full. Spools and seals notify of their failures by themselves."""
        reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), Rejection.INVALID)
        self._counters.reject(reason)
        if reason is Rejection.QUEUE_FULL:
            self._notify(NotificationKind.QUEUE_FULL, error)

    def operation(
        self,
        template: Msg | Record | Mapping[str, Any] | None = None,
        /,
        *,
        audit_type: AuditType | None = None,
        **fields: Any,
    ) -> Operation:
        """Return a context manager, or decorator, that sends one record when its block ends.

        See :class:`~geventaudit.Operation`. The record is validated at the end, so that the block can add fields.

        :param template: the first values of the record: a record, a message, or a mapping by wire names as for
            ``send``.
        :param audit_type: the type of the message; by default that of the template, or ``AuditType.CONTROL_PLANE``.
        :param fields: fields of the record, by their names in :class:`~geventaudit.Record`. They replace those of the
            template.
        :raises TypeError: a name is not a field of a record, or the template has another type.
        :raises ValidationError: a mapping has not the form of a message.
        """
        if isinstance(template, Mapping):
            template = self._shape(template)
        if isinstance(template, Msg):
            audit_type = template.type if audit_type is None else audit_type
            template = template.record
        if not isinstance(template, Record | None):
            raise TypeError(f"the template must be a Record, a Msg or a mapping, got {show(template)}")
        record = (Record() if template is None else template).replace(**fields)
        return Operation(self._send_or_report, AuditType.CONTROL_PLANE if audit_type is None else audit_type, record)

    def _send_or_report(self, msg: Msg) -> Exception | None:
        """Send *msg*. Report and return a refusal instead of raising it."""
        try:
            self.send(msg)
        except Exception as error:
            self.report(error)
            return error
        return None

    def _accept(self, frame: bytes, timeout: float | None) -> None:
        """Accept *frame*, in the client's own thread."""
        life = self._life
        # Check the state again: a hook may have waited, while the client was closed or the process forked.
        sender = life.sender
        if life.state is not _RUNNING or sender is None or not sender.worker.greenlet:
            self._check_accepting()
            life.start()
        elif life.thread.hub.loop is None:
            life.check_thread()
        life.outbox.accept(frame, timeout)  # type: ignore[union-attr]  # start() has made it

    def _accept_from_other_thread(self, frame: bytes, timeout: float | None) -> None:
        """Hand *frame* to the hub of the client's own thread; see :mod:`geventaudit.delivery.inbox`."""
        self._check_accepting()
        life = self._life
        life.check_thread()
        if (self._spool is not None and self._spool.mode == "always") or (timeout != 0.0 and not self._has_room()):
            try:  # in a greenlet of the client's own hub, which may wait there
                life.thread.call(partial(self._accept, frame, timeout), timeout)
            except NoAnswerError:
                raise QueueFullError("the client's own thread did not answer") from None
            return
        if not self._has_room():
            outbox = life.outbox
            raise QueueFullError(f"the queue is full ({self._queue_size} records)") if outbox is None else outbox.full()
        if life.state is State.NEW:
            keep_alive(life)
            self._warn_if_unused()
        inbox = life.inbox
        entry = inbox.put(frame)
        try:
            life.thread.post(life.wake)
        except BaseException:  # the thread has ended, or there is no memory: nothing would take the record
            if inbox.withdraw(entry):
                raise

    def _has_room(self) -> bool:
        """Return True if another thread may hand over a record. The bound may be exceeded by the number of threads."""
        life = self._life
        queued = 0 if life.outbox is None or self._spool is not None else life.outbox.queue.qsize()
        return queued + len(life.inbox) < self._queue_size

    def _warn_if_unused(self) -> None:
        if self._life.thread.hub is None and not self._has_warned:
            self._has_warned = True
            logger().warning(
                "%r: the thread that constructed the client has not used it yet; records of other threads wait until "
                "then: call send() or connect() in that thread",
                self,
            )

    def _check_accepting(self) -> None:
        """Raise if nothing is accepted now."""
        self._life.check_accepting()

    def _frame_of(self, msg: Any) -> bytes | None:
        """Return the frame of *msg*; None if ``before_send`` left it out.

        :raises ValidationError: *msg* is invalid, or a user's hook, schema or object raised an ``Exception``.
        """
        now = time.time()
        try:
            if self._before_send is not None:
                msg = self._before_send(self._shape(msg))
                if msg is None:
                    return None
            was = None
            if self._trail is not None:
                msg, was = self._trail.without_old_stamp(msg, self._shape)
            if self._schema is not None:
                msg = self._schema.load(msg)
            # The rules of the protocol also apply to the result of a user's schema and its hooks.
            frame = self._walker.frame_of(msg, now) or self._encoder.encode(stock_schema().load(msg), now)
            return frame if self._trail is None else self._trail.draft_of(frame, now, was)
        except ValidationError as error:
            raise ValidationError(by_record(cast(Any, error).normalized_messages())) from None
        except Exception as error:
            raise ValidationError({"_schema": [f"validating it raised {show(error)}"]}) from error

    def _shape(self, msg: Any) -> Msg:
        return (self._schema or stock_schema()).shape(msg)

    # -- life ----------------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything accepted before this call is delivered.

        :param timeout: seconds to wait; None for no limit.
        :returns: True if everything is delivered, as far as this kind of connection can know. Records of dead processes
            in a spool do not count, nor records that ``recover`` handed back, nor, while the client is open, records
            that were dropped before this call.
        :raises WouldBlockError: in the hub, unless everything is delivered.
        :raises ClientClosedError: the thread that constructed the client has ended, or its hub was destroyed.
        :raises TypeError, ValueError: *timeout* is not a number of seconds.
        """
        check_timeout(timeout)
        forks.check()
        return self._life.flush(timeout)

    def close(self, timeout: float | None = 20.0) -> list[Msg]:
        """Refuse new messages, drain the accepted ones, and close the connection. Idempotent.

        If the thread that constructed the client has ended, or has destroyed its hub, delivery is impossible. Then all
        messages are kept in the spool, or handed back, at once.

        :param timeout: seconds that draining may take; None for no limit. A spool may take a second more.
        :returns: the messages that were neither delivered nor kept in a spool; each is handed back once. A disk that
            does not answer in time may have kept them too; then the next client sends them. In another thread than the
            client's own, an empty list if the client's thread does not answer in time: call ``close`` again.
        :raises WouldBlockError: in the hub, unless nothing has to wait; nothing is closed. Spawn a greenlet for the
            call.
        :raises TypeError, ValueError: *timeout* is not a number of seconds; nothing is closed.
        """
        check_timeout(timeout)
        forks.check()
        return self._life.close(timeout)

    def stats(self) -> Stats:
        """Return a snapshot of the counters of this client."""
        forks.check()
        return self._life.stats()

    @property
    def spool(self) -> Spool | None:
        """The settings of the disk behind the queue; None without one."""
        return self._spool

    @property
    def is_closed(self) -> bool:
        """True once the client is closed."""
        return self._life.state is State.CLOSED

    def notify(self) -> NotificationChannel:
        """Return the channel of this client's notifications; always the same. See :class:`NotificationKind`."""
        return self._notifier.channel()

    def report(self, error: BaseException, *, recorded: bool = False) -> None:
        """Notify, as ``NOT_RECORDED``, and log that an event was not recorded.

        For integrations, which must not raise into the application. Never waits. Thread-safe. Rate-limited: at most one
        notification a second, which counts the suppressed ones in ``missed``.

        :param error: the reason. A full queue is not notified of again: ``send()`` has done that. Failures of spools
            and seals are, since their own notifications do not name refused records.
        :param recorded: True if the event was recorded without one of its parts: notified as ``INCOMPLETE``.
        """
        if type(error) is not QueueFullError:
            self._notify(NotificationKind.INCOMPLETE if recorded else NotificationKind.NOT_RECORDED, error)

    def _notify(self, kind: NotificationKind, error: BaseException) -> None:
        """Notify, rate-limited. Thread-safe."""
        if self._life.thread.is_current():
            self._notifier.notify_rate_limited(kind, error)
            return
        try:
            self.call_soon(partial(self._notifier.notify_rate_limited, kind, error))
        except ClientClosedError:  # the thread of the channel's readers has ended
            logger().warning("%s: %s", kind.value, error)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call *function* in a greenlet of the client's own hub. Thread-safe; never waits.

        For integrations that serve a client in its own thread.

        :raises ClientClosedError: the thread that constructed the client has ended, or its hub was destroyed.
        """
        self._life.thread.post(gevent.spawn, function)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._life.state.value}>"


if engine.send is not None:
    AuditClient.send = update_wrapper(engine.send, AuditClient.send)  # type: ignore[method-assign]


def _check_before_send(hook: object) -> None:
    if not callable(hook):
        raise TypeError(f"before_send must be callable, got {show(hook)}: pass a function of a message")
    check_takes("before_send", hook, "the message")


def _is_stamped(stamp: object, seal: object) -> bool:
    if not isinstance(stamp, bool):
        raise TypeError(f"stamp must be True or False, got {show(stamp)}")
    if not isinstance(seal, Seal | None):
        raise TypeError(f"seal must be a Seal, such as Seal(key_file=...), got {show(seal)}")
    return stamp or seal is not None


def _without_stamp(max_frame_bytes: Any, is_stamped: bool) -> int:
    if not is_stamped:
        return max_frame_bytes  # type: ignore[no-any-return]
    least = 2 * MAX_STAMP_BYTES
    if not isinstance(max_frame_bytes, int) or max_frame_bytes <= least:
        raise ValueError(f"max_frame_bytes must be above {least} with a stamp, got {show(max_frame_bytes)}")
    return max_frame_bytes - MAX_STAMP_BYTES


def _load_store(max_frame_bytes: int) -> None:
    from .spool.store import MAX_FRAME

    if max_frame_bytes > MAX_FRAME:
        raise ValueError(f"max_frame_bytes must be at most {MAX_FRAME} with a spool, got {max_frame_bytes}")


# -- all clients -------------------------------------------------------------------------------------------------------

_by_line: dict[tuple[str, int], weakref.WeakSet[AuditClient]] = {}
_warned: set[tuple[str, int]] = set()


def live_clients() -> list[AuditClient]:
    """Return the clients of this process that are not closed, also those that never sent, in no particular order.

    For code that ends a process. Starts nothing. A forked child has the clients of its parent, which start anew there.
    """
    while True:
        try:
            return [each for clients in _by_line.values() for each in clients if not each.is_closed]
        except RuntimeError:  # another thread constructed a client at this moment
            continue


def _warn_of_many(client: AuditClient) -> None:
    """Warn once of a line of code that constructs many clients, such as one for each request, and closes none."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame = frame.f_back
    line = frame.f_code.co_filename, frame.f_lineno
    clients = _by_line.setdefault(line, weakref.WeakSet())
    clients.add(client)
    if len(clients) > _MANY_CLIENTS and line not in _warned:
        live = sum(not each.is_closed for each in list(clients))
        if live > _MANY_CLIENTS:
            _warned.add(line)
            logger().warning(
                "%d live clients were constructed at %s:%d: make one for the process, or close each", live, *line
            )
