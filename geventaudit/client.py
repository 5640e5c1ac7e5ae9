"""The smart client: a factory for connections, whose failures are handled here."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import gevent

from .backoff import Backoff
from .encoder import encoding as wire
from .errors import ClientClosedError, ConnectionFailedError, as_connection_error, show
from .notifications import NotificationKind
from .pipeline import BeforeSend, Pipeline, State, check_timeout
from .protocol.decoding import decode
from .records import Msg
from .runtime.native import thread_ident
from .schema.rules import RecordSchema
from .spool import Spool
from .transport import Connection, check_connection

__all__ = ["Client"]


class Client(Pipeline):
    """Sends to an agent that comes and goes. Construct it anywhere, at any time: nothing starts before it is needed.

    :param factory: called without arguments for each connection, in a greenlet of the client's; returns an open one, or
        raises.
    :param backoff: the delays between attempts. They begin anew after a connection that delivered something or lived
        longer than the initial delay; an agent that accepts and hangs up at once is one that fails.
    :param service_tree_id: a UUID; written into every record as ``env_ikey``. None leaves it out.
    :param queue_size: records that may wait to be written; at least 1.
    :param heartbeat_interval: seconds from one heartbeat to the next.
    :param schema: stricter rules: an instance of a subclass of :class:`~geventaudit.RecordSchema`.
    :param max_frame_bytes: a record that needs more is refused.
    :param datetimes: how times in custom data are written: ``"extension"`` or ``"text"``.
    :param before_send: sees each message before it is validated, in the caller's greenlet, and returns the one to send,
        or None to leave it out. A message given as a mapping comes as a Msg too; values that are not what they should
        be are in it as they are. What the hook raises becomes a ValidationError.
    :param spool: a disk behind the queue; None for none.
    :raises ValueError, TypeError, ValidationError: for parameters that cannot be.
    """

    def __init__(
        self,
        factory: Callable[[], Connection],
        *,
        backoff: Backoff | None = None,
        service_tree_id: object | None = None,
        queue_size: int = 2048,
        heartbeat_interval: float = 1800.0,
        schema: RecordSchema | None = None,
        max_frame_bytes: int = wire.DEFAULT_MAX_FRAME_BYTES,
        datetimes: wire.Datetimes = "extension",
        before_send: BeforeSend | None = None,
        spool: Spool | None = None,
    ) -> None:
        if not callable(factory):
            raise TypeError(f"factory must be callable, got {show(factory)}: pass a function that makes connections")
        if not isinstance(backoff, Backoff | None):
            raise TypeError(f"backoff must be a Backoff, such as Backoff(initial=2.0), got {show(backoff)}")
        super().__init__(
            service_tree_id=service_tree_id,
            queue_size=queue_size,
            heartbeat_interval=heartbeat_interval,
            schema=schema,
            max_frame_bytes=max_frame_bytes,
            datetimes=datetimes,
            before_send=before_send,
            spool=spool,
        )
        self._factory = factory
        self._backoff = Backoff() if backoff is None else backoff
        self._failures = 0  # in a row
        self._last_error: ConnectionFailedError | None = None

    def connect(self, timeout: float = 10.0) -> None:
        """Wait until there is a connection; for those who want to fail at start-up rather than wait for the agent.

        The client goes on trying afterwards, whatever this says.

        :param timeout: seconds; attempts are made according to the backoff meanwhile.
        :raises ConnectionFailedError: there is none after that time; it says why the last attempt failed.
        :raises ClientClosedError: the client is closing or closed.
        :raises TypeError, ValueError: *timeout* is not a number of seconds.
        """
        check_timeout(timeout)
        if thread_ident() != self._home.ident:

            def connected() -> bool:
                self.connect(timeout)
                return True

            if not self._home.run(connected, timeout, otherwise=False):
                raise ConnectionFailedError(f"the client's own thread did not answer within {timeout} s")
            return
        if self._state in (State.NEW, State.RUNNING):
            happened = self._running_sender().connected_or_over.wait(timeout)
            if self._state is State.RUNNING:
                if happened:
                    return
                cause = self._last_error
                raise ConnectionFailedError(
                    f"no connection within {timeout} s" + (f"; the last attempt: {cause}" if cause else "")
                ) from cause
        raise ClientClosedError(f"the client is {self._state.value}")

    def after_fork_in_child(self) -> None:
        """In a forked child: start anew, with a connection of its own at the first ``send``."""
        super().after_fork_in_child()
        self._failures = 0
        self._last_error = None

    def _connect(self) -> Connection:
        while True:
            if self._failures:
                gevent.sleep(self._backoff.delay(self._failures))
            made = self._attempt()
            if self._state is State.CLOSED:  # just now: the kill of this greenlet is on its way
                if not isinstance(made, BaseException):
                    made.close()
                raise gevent.GreenletExit
            if isinstance(made, KeyboardInterrupt | SystemExit):
                raise made
            if isinstance(made, BaseException):
                self._failures += 1
                self._counters.connect_failures += 1
                self._last_error = as_connection_error(made, "the factory failed")
                self._tell(NotificationKind.CONNECT_FAILED, self._last_error)
            else:
                self._tell(NotificationKind.CONNECTED)
                return made

    def _attempt(self) -> Connection | BaseException:
        """Call the factory, in a greenlet of its own.

        What is raised there is a failed attempt, even a GreenletExit, and what is raised here is meant for the sender.
        """
        wanted = True

        def call() -> Connection | BaseException:
            try:
                connection = self._factory()
                check_connection(connection, "the factory must return")
            except BaseException as error:
                return error
            if not wanted:  # the factory has swallowed the kill
                connection.close()
            return connection

        attempt = gevent.spawn(call)
        try:
            return attempt.get()
        except BaseException:
            wanted = False
            if attempt.ready() and not isinstance(attempt.value, BaseException | None):
                attempt.value.close()
            attempt.kill()
            raise

    def _lost(self, error: ConnectionFailedError, delivered: int, lived: float) -> None:
        self._failures = 0 if delivered or lived > self._backoff.initial else self._failures + 1
        self._last_error = error
        self._tell(NotificationKind.CONNECTION_LOST, error)

    def _set_aside(self, frame: bytes, strikes: int) -> None:
        msg = cast(Msg, decode(frame)[0])
        error = ConnectionFailedError(f"the agent hung up on one record {strikes} times in a row; it is given up")
        self._tell(NotificationKind.DROPPED, error, (msg,))
