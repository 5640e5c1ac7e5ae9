"""The low-level client: one connection, whose failures are the caller's to handle."""

from __future__ import annotations

from typing import cast

from gevent.event import Event

from .encoder import encoding as wire
from .errors import ClientClosedError, ConnectionFailedError
from .notifications import NotificationKind
from .pipeline import BeforeSend, Pipeline, State
from .protocol.decoding import decode
from .records import Msg
from .schema.rules import RecordSchema
from .stats import Rejection
from .transport import Connection, check_connection, let_go

__all__ = ["BaseClient"]


class BaseClient(Pipeline):
    """Sends over one open connection. When it breaks, the client says so and accepts nothing until it is given another.

    :param connection: open; the client closes it.
    :param service_tree_id: a UUID; written into every record as ``env_ikey``. None leaves it out.
    :param queue_size: records that may wait to be written; at least 1.
    :param heartbeat_interval: seconds from one heartbeat to the next.
    :param schema: stricter rules: an instance of a subclass of :class:`~geventaudit.RecordSchema`.
    :param max_frame_bytes: a record that needs more is refused.
    :param datetimes: how times in custom data are written: ``"extension"`` or ``"text"``.
    :param before_send: sees each message before it is validated and returns the one to send, or None to leave it out.
    :raises ValueError, TypeError, ValidationError: for parameters that cannot be.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        service_tree_id: object | None = None,
        queue_size: int = 2048,
        heartbeat_interval: float = 1800.0,
        schema: RecordSchema | None = None,
        max_frame_bytes: int = wire.DEFAULT_MAX_FRAME_BYTES,
        datetimes: wire.Datetimes = "extension",
        before_send: BeforeSend | None = None,
    ) -> None:
        _check(connection)
        super().__init__(
            service_tree_id=service_tree_id,
            queue_size=queue_size,
            heartbeat_interval=heartbeat_interval,
            schema=schema,
            max_frame_bytes=max_frame_bytes,
            datetimes=datetimes,
            before_send=before_send,
        )
        self._next: Connection | None = connection
        self._given = Event()
        self._error: ConnectionFailedError | None = None

    @property
    def error(self) -> ConnectionFailedError | None:
        """Why the connection broke; None while it is in order."""
        return self._error

    def _check_accepting(self) -> None:
        super()._check_accepting()
        if self._error is not None:
            self._reject(Rejection.BROKEN)
            raise ConnectionFailedError(str(self._error)) from self._error

    def recover(self) -> list[Msg]:
        """Hand back what was accepted and not delivered, in its order. Each message is handed back once.

        Nothing while the connection is in order: it is still being delivered then.
        """
        if self._error is None or self._sender is None or self._state is not State.RUNNING:
            return []
        frames = self._sender.take_undelivered()
        self._counters.recovered += len(frames)
        return [cast(Msg, decode(frame)[0]) for frame in frames]

    def reset(self, connection: Connection) -> None:
        """Go on with another open connection: what is undelivered (and was not recovered) goes first.

        :raises ClientClosedError: the client is closing or closed; *connection* is closed too.
        :raises TypeError: *connection* is none.
        """
        _check(connection)
        if self._state not in (State.NEW, State.RUNNING):
            connection.close()
            raise ClientClosedError(f"the client is {self._state.value}")
        replaced, self._next = self._next, connection
        self._error = None
        if replaced is not None:
            replaced.close()
        if self._sender is not None:
            self._sender.refuse(None)
            self._sender.renew()
            self._sender.ensure_running()
        self._given.set()

    def close(self, timeout: float | None = 20.0) -> list[Msg]:
        undelivered = super().close(timeout)
        unused, self._next = self._next, None
        if unused is not None:
            if self._home.is_there():
                unused.close()
            else:
                let_go(unused)
        return undelivered

    close.__doc__ = Pipeline.close.__doc__

    def after_fork_in_child(self) -> None:
        """In a forked child: the connection is the parent's; :meth:`reset` gives the child one of its own."""
        super().after_fork_in_child()
        self._next = None
        self._given = Event()
        self._error = ConnectionFailedError("the connection is the parent process's; reset() gives this one its own")

    def _connect(self) -> Connection:
        while self._next is None:
            self._given.clear()
            self._given.wait()
        connection, self._next = self._next, None
        self._tell(NotificationKind.CONNECTED)
        return connection

    def _lost(self, error: ConnectionFailedError, delivered: int, lived: float) -> None:
        if self._next is None:  # otherwise reset() has replaced it
            self._error = error
            self._tell(NotificationKind.CONNECTION_LOST, error)
            if self._sender is not None:
                self._sender.give_up_flushes()
                self._sender.refuse(error)

    def _is_beyond_help(self) -> bool:
        return self._error is not None


def _check(connection: Connection) -> None:
    check_connection(connection, "connection must be", "; a factory is for Client")
