"""Notifications: events in the life of a client, for the application, without waiting for a reader.

``Channel.put`` waits for a reader, so no greenlet calls it here. Notifications go into a bounded backlog. A new reader
takes from the backlog. Waiting readers are served by a callback of the hub, where ``put`` does not wait. There is no
greenlet to stop, and notifications can be read after the client is closed.
"""

from __future__ import annotations

import sys
from collections import deque
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.queue import Channel

from .errors import logger
from .records import Msg
from .runtime.clock import monotonic

__all__ = ["BACKLOG", "Notification", "NotificationChannel", "NotificationKind", "Notifier"]

BACKLOG = 64
"""The most unread notifications. Beyond that, the oldest are dropped and counted."""

LIMIT_SECONDS = 1.0
"""Seconds between two notifications of a rate-limited kind."""


class NotificationKind(StrEnum):
    """The kind of event that a notification reports."""

    CONNECTED = "connected"
    """A connection was made: the first, or another after one was lost."""
    CONNECT_FAILED = "connect failed"
    """An attempt to connect failed; ``error`` is the reason. The next attempt follows after the backoff."""
    CONNECTION_LOST = "connection lost"
    """The connection broke; ``error`` is the reason. No accepted record is lost."""
    BEST_EFFORT = "TCP without require_ack is best effort"
    """Records count as delivered when the kernel of the agent's host has them. They are lost if the agent ends before
    it reads them. Use ``TCP(..., require_ack=True)`` if the agent acknowledges. Notified once, for the first such
    connection."""
    QUEUE_FULL = "queue full"
    """``send`` refused a message because there was no room. At most once a second."""
    NOT_RECORDED = "not recorded"
    """A record could not be made or sent, and no exception says so (an :class:`~geventaudit.Operation`, an
    integration); ``error`` is the reason. At most once a second."""
    INCOMPLETE = "incomplete"
    """A record was sent without one of its parts; ``error`` names the part, and its cause is the reason. At most once a
    second."""
    DROPPED = "dropped"
    """Accepted messages were given up; they are in ``undelivered``."""
    SPOOL_FAILED = "spool failed"
    """The spool cannot be used, or files in it are damaged, removed or truncated; ``error`` is the reason. The client
    continues to run."""
    SPOOL_RESTORED = "spool restored"
    """The spool can be used again."""
    SEAL_FAILED = "the key of the seal cannot be read"
    """``error`` says why, and the remedy. The client tries again, after 0.5 s at first, later after up to 30 s.
    Accepted records wait for the key, as many as the queue holds."""
    SEAL_RESTORED = "the key of the seal was read"
    """After :attr:`SEAL_FAILED`. The records that have waited are sealed, in their order."""
    CLOSED = "closed"
    """The client is closed."""


class Notification(NamedTuple):
    """An event in the life of a client."""

    time: datetime
    """The time of the event; aware, UTC."""
    kind: NotificationKind
    """The kind of the event."""
    error: BaseException | None = None
    """The reason of a failure; None for other events."""
    undelivered: tuple[Msg, ...] = ()
    """The messages that were given up."""
    missed: int = 0
    """The number of notifications before this one that were dropped or merged into it."""


if TYPE_CHECKING:
    _Channel = Channel[Notification]
else:
    _Channel = Channel  # older gevents have no subscript for it


class NotificationChannel(_Channel):
    """The gevent Channel of a client's notifications.

    Iteration yields :class:`Notification` objects, and ends when the client is closed and all of them were read.
    """

    def __init__(self, notifier: Notifier) -> None:
        super().__init__()
        self._notifier = notifier

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next :class:`Notification`, or ``StopIteration`` (the class, as in gevent's queues) at the end.

        :param timeout: seconds to wait for a notification; None for no limit.
        :raises gevent.queue.Empty: there was no notification in that time.
        """
        item = self._notifier.next_item()
        return super().get(block, timeout) if item is None else item

    def __next__(self) -> Notification:
        item = self.get()
        if item is StopIteration:
            raise StopIteration
        return cast(Notification, item)


class Notifier:
    """Keeps the newest notifications until they are read, and writes all of them to the log.

    Not thread-safe: only the thread of the hub calls it.
    """

    def __init__(self) -> None:
        self._backlog: deque[Notification] = deque()
        self._channel: NotificationChannel | None = None
        self._has_ended = False
        self._limited: dict[NotificationKind, tuple[float, int]] = {}  # when last, and how many not since
        self._is_away = False  # the log has the failure of the connection, and not its end

    def channel(self) -> NotificationChannel:
        """Return the channel; always the same."""
        if self._channel is None:
            self._channel = NotificationChannel(self)
        return self._channel

    def notify(
        self,
        kind: NotificationKind,
        error: BaseException | None = None,
        undelivered: tuple[Msg, ...] = (),
        missed: int = 0,
    ) -> None:
        """Keep one notification for the readers, and log it. Never waits, never switches to another greenlet.

        The newest unread notification is replaced if it has the same kind and carries no messages.
        """
        newest = self._backlog[-1] if self._backlog else None
        if newest is not None and newest.kind is kind and not newest.undelivered:
            self._backlog.pop()
            missed += newest.missed + 1
        elif len(self._backlog) >= BACKLOG:
            oldest = self._backlog.popleft()
            self._backlog[0] = self._backlog[0]._replace(missed=self._backlog[0].missed + oldest.missed + 1)
        self._backlog.append(Notification(datetime.now(UTC), kind, error, undelivered, missed))
        self._serve_waiting_readers()
        # The end of a failure has the level of the failure: a log without one of them misleads.
        level = "warning" if error is not None or kind in _WARNINGS else "info"
        if kind in (NotificationKind.CONNECT_FAILED, NotificationKind.CONNECTION_LOST):
            self._is_away = True
        elif kind is NotificationKind.CONNECTED and self._is_away:
            self._is_away, level = False, "warning"
        if gevent.getcurrent() is get_hub_if_exists():  # a log handler may wait, and in the hub nothing may
            gevent.spawn(_log, level, kind, error)
            return
        try:
            _log(level, kind, error)
        except Exception:  # a log handler's: it must not end the caller, whose state has changed
            sys.excepthook(*sys.exc_info())

    def notify_rate_limited(self, kind: NotificationKind, error: BaseException) -> None:
        """Notify at most once a second. The next notification counts the suppressed ones."""
        now = monotonic()
        last, missed = self._limited.get(kind, (-LIMIT_SECONDS, 0))
        if now - last < LIMIT_SECONDS:
            self._limited[kind] = (last, missed + 1)
            return
        self._limited[kind] = (now, 0)
        self.notify(kind, error, missed=missed)

    def notify_once(self, kind: NotificationKind) -> None:
        """Notify if this is the first event of this kind."""
        if kind not in self._limited:
            self._limited[kind] = (monotonic(), 0)
            self.notify(kind)

    def forget(self) -> None:
        """Drop all notifications in a forked child: they are the parent's."""
        self._backlog.clear()
        self._limited.clear()

    def end(self) -> None:
        """End the channel once the readers have read the unread notifications."""
        self._has_ended = True
        self._serve_waiting_readers()

    def next_item(self) -> Any:
        """Return the next item for a reader; None if the reader has to wait."""
        if self._backlog:
            return self._backlog.popleft()
        return StopIteration if self._has_ended else None

    def _serve_waiting_readers(self) -> None:
        if self._channel is not None and self._channel.getters and self._channel.hub.loop is not None:
            self._channel.hub.loop.run_callback(self._hand_out, self._channel)

    def _hand_out(self, channel: NotificationChannel) -> None:
        """Give waiting readers the next items, in the hub."""
        while channel.getters and (item := self.next_item()) is not None:
            channel.put(item)


def _log(level: str, kind: NotificationKind, error: BaseException | None) -> None:
    log = getattr(logger(), level)
    if error is None:
        log("%s", kind.value)
    else:
        log("%s: %s%s", kind.value, error, _NEXT_STEPS.get(kind, ""))


_WARNINGS = (NotificationKind.BEST_EFFORT, NotificationKind.SPOOL_RESTORED, NotificationKind.SEAL_RESTORED)
_DOCTOR = "; run `geventaudit doctor` to find out why"
_NEXT_STEPS = {
    NotificationKind.CONNECT_FAILED: _DOCTOR,
    NotificationKind.CONNECTION_LOST: _DOCTOR,
    NotificationKind.QUEUE_FULL: _DOCTOR,
    NotificationKind.SEAL_FAILED: "; records wait for it, as many as the queue holds",
    NotificationKind.SPOOL_FAILED: "; run `geventaudit spool list` to see what is in it",
}
