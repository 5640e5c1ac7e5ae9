"""Notifications: events in the life of a client, for the application, without waiting for a reader.

``Channel.put`` waits for a reader, so no greenlet calls it here. Notifications go into a bounded backlog. A reader that
comes takes from there; readers that wait are served by a callback of the hub, where ``put`` does not wait. No greenlet
stands between, so none has to be stopped, and notifications can still be read after the client is closed.
"""

from __future__ import annotations

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
"""Notifications that wait for a reader; of more, the oldest are forgotten and counted."""

LIMIT_SECONDS = 1.0
"""Seconds between two notifications of a kind that is rate-limited."""


class NotificationKind(StrEnum):
    """What a notification is about."""

    CONNECTED = "connected"
    """A connection was made: the first, or another after one was lost."""
    CONNECT_FAILED = "connect failed"
    """An attempt to connect failed; ``error`` says why. The next follows after the backoff."""
    CONNECTION_LOST = "connection lost"
    """The connection broke; ``error`` says why. Nothing that was accepted is lost by it."""
    BEST_EFFORT = "TCP without require_ack is best effort"
    """Records count as delivered when the kernel of the agent's host has them, and are lost if the agent ends before it
    reads them. Once, with the first such connection. Give ``TCP(..., require_ack=True)`` for an agent that
    acknowledges."""
    QUEUE_FULL = "queue full"
    """``send`` refused a message for want of room. Once a second at the most."""
    NOT_RECORDED = "not recorded"
    """The record of something that happened could not be made or sent, where nothing is raised for that (an
    :class:`~geventaudit.Operation`, an integration); ``error`` says why. Once a second at the most."""
    INCOMPLETE = "incomplete"
    """A record was sent without something that should have been in it; ``error`` says without what, and its cause why.
    Once a second at the most."""
    DROPPED = "dropped"
    """Messages that were accepted were given up; they are in ``undelivered``."""
    SPOOL_FAILED = "spool failed"
    """The spool cannot be used, or files in it are damaged, removed or cut; ``error`` says so. The client goes on."""
    SPOOL_RESTORED = "spool restored"
    """The spool can be used again."""
    CLOSED = "closed"
    """The client is closed."""


class Notification(NamedTuple):
    """One event in the life of a client."""

    time: datetime
    """When it happened; aware, UTC."""
    kind: NotificationKind
    """What it is about."""
    error: BaseException | None = None
    """What went wrong, where something did."""
    undelivered: tuple[Msg, ...] = ()
    """The messages that were given up, where some were."""
    missed: int = 0
    """How many notifications were forgotten, or folded into this one, since the one before it."""


if TYPE_CHECKING:
    _Channel = Channel[Notification]
else:
    _Channel = Channel  # older gevents have no subscript for it


class NotificationChannel(_Channel):
    """The gevent Channel of a client's notifications.

    Iterating over it yields :class:`Notification` objects, and ends when the client is closed and all were read.
    """

    def __init__(self, notifier: Notifier) -> None:
        super().__init__()
        self._notifier = notifier

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next :class:`Notification`, or ``StopIteration`` (the class, as in gevent's queues) at the end.

        :param timeout: seconds to wait for one; None for no limit.
        :raises gevent.queue.Empty: there was none in that time.
        """
        item = self._notifier.next_item()
        return super().get(block, timeout) if item is None else item

    def __next__(self) -> Notification:
        item = self.get()
        if item is StopIteration:
            raise StopIteration
        return cast(Notification, item)


class Notifier:
    """Takes notifications at once, keeps the newest until they are read, and writes them to the log.

    For one hub. The thread of that hub is the only one that calls it.
    """

    def __init__(self) -> None:
        self._backlog: deque[Notification] = deque()
        self._channel: NotificationChannel | None = None
        self._has_ended = False
        self._limited: dict[NotificationKind, tuple[float, int]] = {}  # when last, and how many not since

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

        It replaces the newest one that was not read, if that is of the same kind and carries no messages.
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
        if gevent.getcurrent() is get_hub_if_exists():  # a log handler may wait, and in the hub nothing may
            gevent.spawn(_log, kind, error)
        else:
            _log(kind, error)

    def notify_rate_limited(self, kind: NotificationKind, error: BaseException) -> None:
        """Notify at most once a second of what may come with every message. The next one counts those in between."""
        now = monotonic()
        last, missed = self._limited.get(kind, (-LIMIT_SECONDS, 0))
        if now - last < LIMIT_SECONDS:
            self._limited[kind] = (last, missed + 1)
            return
        self._limited[kind] = (now, 0)
        self.notify(kind, error, missed=missed)

    def notify_once(self, kind: NotificationKind) -> None:
        """Notify of the first event of this kind only."""
        if kind not in self._limited:
            self._limited[kind] = (monotonic(), 0)
            self.notify(kind)

    def forget(self) -> None:
        """Forget all notifications, in a forked child: they are the parent's."""
        self._backlog.clear()
        self._limited.clear()

    def end(self) -> None:
        """Let readers get the rest, then the end."""
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


def _log(kind: NotificationKind, error: BaseException | None) -> None:
    if error is None:
        level = "warning" if kind is NotificationKind.BEST_EFFORT else "info"
        getattr(logger(), level)("%s", kind.value)
    else:
        logger().warning("%s: %s%s", kind.value, error, _NEXT_STEPS.get(kind, ""))


_DOCTOR = "; run `geventaudit doctor` to find out why"
_NEXT_STEPS = {
    NotificationKind.CONNECT_FAILED: _DOCTOR,
    NotificationKind.CONNECTION_LOST: _DOCTOR,
    NotificationKind.QUEUE_FULL: _DOCTOR,
    NotificationKind.SPOOL_FAILED: "; run `geventaudit spool list` to see what is in it",
}
