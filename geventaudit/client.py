"""The clients: :class:`Client` asks a factory for connections, :class:`BaseClient` has one from the caller."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .audit_client import AuditClient, BeforeSend
from .backoff import Backoff
from .delivery.connector import FactoryConnector, GivenConnector
from .encoder.encoding import DEFAULT_MAX_FRAME_BYTES, Datetimes
from .errors import ClientClosedError, ConnectionFailedError, show
from .lifecycle import State, check_may_wait
from .notifications import Notifier
from .records import Msg
from .runtime import forks
from .runtime.clock import check_timeout
from .runtime.hub_thread import NoAnswerError
from .runtime.signatures import check_takes
from .schema.rules import RecordSchema
from .spool import Spool
from .stats import Counters
from .trail.seal import Seal
from .trail.stamp import handed_back
from .transport import Connection, check_connection, release

__all__ = ["BaseClient", "Client"]


class Client(AuditClient):
    """A client that connects to its agent again and again. Construct it anywhere: nothing starts before its first use.

    :param factory: called without arguments for each connection, in a greenlet of the client. Returns an open
        connection, or raises.
    :param backoff: the delays between attempts to connect. They start anew after a connection that delivered a frame or
        lived longer than the initial delay. A connection that the agent closes at once counts as a failed attempt. The
        client connects at once when the agent's Unix socket appears.
    :param service_tree_id: a UUID; written into every record as ``env_ikey``. None leaves it out.
    :param queue_size: records that may wait to be written; at least 1.
    :param heartbeat_interval: seconds from one heartbeat to the next.
    :param schema: stricter rules: an instance of a subclass of :class:`~geventaudit.RecordSchema`.
    :param max_frame_bytes: the longest frame; a record that needs more bytes is refused. At most 64 MiB with a *spool*.
    :param datetimes: the form of times in custom data: ``"extension"`` or ``"text"``.
    :param json_safe: True for an agent that writes JSON. Custom data that JSON cannot carry is converted (times to ISO
        8601, NaN, infinities, integers beyond 2**53 - 1 and keys to text, bytes to base64url) or refused
        (extensions, keys that are equal as text).
    :param before_send: called with each message before validation, in the caller's greenlet. Returns the message to
        send, or None to leave it out. A mapping is converted to a Msg first; its invalid values stay unchanged. An
        exception of the hook becomes a ValidationError.
    :param stamp: True to number the records: each has its stream, number and time in its custom data, under the key
        ``geventaudit``. 2,048 bytes of *max_frame_bytes* are reserved for the stamp.
    :param seal: authenticates each record by a key of its own; implies *stamp*. Custom data is written as text where
        JSON would change it. The client adds its own records, the checkpoints, which count as records.
    :param spool: the disk behind the queue; None for no disk.
    :raises ValueError, TypeError, ValidationError: an argument is invalid.
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
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        datetimes: Datetimes = "extension",
        json_safe: bool = False,
        before_send: BeforeSend | None = None,
        stamp: bool = False,
        seal: Seal | None = None,
        spool: Spool | None = None,
    ) -> None:
        if not callable(factory):
            raise TypeError(f"factory must be callable, got {show(factory)}: pass a function that makes connections")
        check_takes("factory", factory)
        if not isinstance(backoff, Backoff | None):
            raise TypeError(f"backoff must be a Backoff, such as Backoff(initial=2.0), got {show(backoff)}")
        counters, notifier = Counters(), Notifier()
        self._connector = FactoryConnector(factory, Backoff() if backoff is None else backoff, counters, notifier)
        super().__init__(
            self._connector,
            counters,
            notifier,
            service_tree_id=service_tree_id,
            queue_size=queue_size,
            heartbeat_interval=heartbeat_interval,
            schema=schema,
            max_frame_bytes=max_frame_bytes,
            datetimes=datetimes,
            json_safe=json_safe,
            before_send=before_send,
            stamp=stamp,
            seal=seal,
            spool=spool,
        )

    def connect(self, timeout: float = 10.0) -> None:
        """Wait until there is a connection. For services that must fail at start-up if the agent is away.

        The client continues to try after a failure.

        :param timeout: seconds; attempts are made according to the backoff meanwhile.
        :raises ConnectionFailedError: there is no connection after that time; the error names the last failure.
        :raises WouldBlockError: in the hub, unless there is a connection.
        :raises ClientClosedError: the client is closing or closed.
        :raises TypeError, ValueError: *timeout* is not a number of seconds.
        """
        check_timeout(timeout)
        forks.check()
        life = self._life
        if not life.thread.is_current():
            try:
                life.thread.call(partial(self.connect, timeout), timeout, lambda result: None)
                return
            except NoAnswerError:
                raise ConnectionFailedError(f"the client's own thread did not answer within {timeout} s") from None
        life.check_accepting()
        if life.sender is None or not life.sender.is_connected:
            check_may_wait("connect()")
        connected = life.start().connected_or_over.wait(timeout)
        life.check_accepting()
        if not connected:
            cause = self._connector.last_error
            raise ConnectionFailedError(
                f"no connection within {timeout} s" + (f"; the last attempt: {cause}" if cause else "")
            ) from cause


class BaseClient(AuditClient):
    """A client with one open connection. When the connection breaks, ``send`` raises until :meth:`reset` gives another.

    Parameters that are not listed here are those of :class:`Client`.

    :param connection: open; the client closes it.
    :raises ValueError, TypeError, ValidationError: an argument is invalid.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        service_tree_id: object | None = None,
        queue_size: int = 2048,
        heartbeat_interval: float = 1800.0,
        schema: RecordSchema | None = None,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
        datetimes: Datetimes = "extension",
        json_safe: bool = False,
        before_send: BeforeSend | None = None,
        stamp: bool = False,
        seal: Seal | None = None,
    ) -> None:
        _check(connection)
        notifier = Notifier()
        self._connector = GivenConnector(connection, notifier)
        super().__init__(
            self._connector,
            Counters(),
            notifier,
            service_tree_id=service_tree_id,
            queue_size=queue_size,
            heartbeat_interval=heartbeat_interval,
            schema=schema,
            max_frame_bytes=max_frame_bytes,
            datetimes=datetimes,
            json_safe=json_safe,
            before_send=before_send,
            stamp=stamp,
            seal=seal,
        )

    @property
    def error(self) -> ConnectionFailedError | None:
        """The reason for which the connection broke; None while the connection is open."""
        return self._connector.error

    def _check_accepting(self) -> None:
        super()._check_accepting()
        error = self._connector.error
        if error is not None:
            raise ConnectionFailedError(str(error)) from error

    def recover(self) -> list[Msg]:
        """Hand back the accepted messages that were not delivered, in their order. Each is handed back once.

        Returns an empty list while the connection is open, since their delivery continues.
        """
        forks.check()
        life = self._life
        if self._connector.error is None or life.outbox is None or life.state is not State.RUNNING:
            return []
        entries = life.outbox.take_all()
        self._counters.recovered += len(entries)
        life.outbox.settle_all()
        if life.sender is not None:
            life.sender.quarantine.forget_records()
        return handed_back(frame for _, _, frame in entries)

    def reset(self, connection: Connection) -> None:
        """Continue with another open connection. Undelivered messages that were not recovered are written first.

        :raises ClientClosedError: the client is closing or closed; *connection* is closed too.
        :raises TypeError: *connection* is not a connection.
        """
        _check(connection)
        forks.check()
        life = self._life
        try:
            life.check_accepting()
        except ClientClosedError:
            connection.close()
            raise
        replaced = self._connector.give(connection)
        if replaced is not None:
            replaced.close()
        if life.sender is not None and life.outbox is not None:
            life.outbox.refuse(None)
            life.sender.renew()
            life.sender.ensure_running()

    def close(self, timeout: float | None = 20.0) -> list[Msg]:
        undelivered = super().close(timeout)
        if self.is_closed:
            unused, self._connector.given = self._connector.given, None
            if unused is not None:
                release(unused)
        return undelivered

    close.__doc__ = AuditClient.close.__doc__


def _check(connection: Connection) -> None:
    check_connection(connection, "connection must be", "; a factory is for Client")
