"""What the library tells the application about itself, without ever waiting for it to listen.

``Channel.put`` waits for a reader, so nothing here calls it from a greenlet. Notifications go into a bounded backlog;
a reader who comes takes from there, and readers who already wait are handed theirs by a callback of the hub, where
``put`` does not wait. No greenlet has to stand between, so none has to be stopped, and what was unread when the client
closed can still be read.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from gevent.queue import Channel

from .records import Msg

__all__ = ["BACKLOG", "Notification", "NotificationChannel", "NotificationKind", "Notifier"]

BACKLOG = 64
"""Notifications that wait for a reader; of more, the oldest are forgotten and counted."""


class NotificationKind(StrEnum):
    """What a notification is about."""

    CONNECTED = "connected"
    """A connection was made: the first, or another after one was lost."""
    CONNECT_FAILED = "connect failed"
    """An attempt to connect failed; ``error`` says why. The next follows after the backoff."""
    CONNECTION_LOST = "connection lost"
    """The connection broke; ``error`` says why. Nothing that was accepted is lost by it."""
    QUEUE_FULL = "queue full"
    """``send`` refused a message for want of room. Told once a second at the most."""
    NOT_RECORDED = "not recorded"
    """The record of something that happened could not be made or sent, where nothing is raised for that (an
    :class:`~geventaudit.Operation`, an integration); ``error`` says why. Told once a second at the most."""
    INCOMPLETE = "incomplete"
    """A record was sent without something that should have been in it; ``error`` says without what, and its cause why.
    Told once a second at the most."""
    DROPPED = "dropped"
    """Messages that were accepted were given up; they are in ``undelivered``."""
    SPOOL_FAILED = "spool failed"
    """The spool cannot be used, or a damaged file was put aside; ``error`` says which. The client goes on."""
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
    _Channel = Channel[Any]
else:
    _Channel = Channel  # older gevents have no subscript for it


class NotificationChannel(_Channel):
    """The gevent Channel of a client's notifications.

    Iterating it yields :class:`Notification` objects and ends when the client is closed and all were read.
    """

    def __init__(self, notifier: Notifier) -> None:
        super().__init__()
        self._notifier = notifier

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next notification, or ``StopIteration`` (the class, as gevent's queues have it) at the end.

        :param timeout: seconds to wait for one; None for ever.
        :raises gevent.queue.Empty: when there was none in that time.
        """
        item = self._notifier.next_item()
        return super().get(block, timeout) if item is None else item


class Notifier:
    """Takes notifications at once and keeps the newest until somebody reads them. For one hub."""

    def __init__(self) -> None:
        self._backlog: deque[Notification] = deque()
        self._channel: NotificationChannel | None = None
        self._ended = False

    def channel(self) -> NotificationChannel:
        """The channel; always the same."""
        if self._channel is None:
            self._channel = NotificationChannel(self)
        return self._channel

    def tell(
        self,
        kind: NotificationKind,
        error: BaseException | None = None,
        undelivered: tuple[Msg, ...] = (),
        missed: int = 0,
    ) -> None:
        """Keep one notification for whoever reads. Never waits, never switches to another greenlet.

        It takes the place of the newest one that nobody has read when that is of the same kind and carries no messages.
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

    def forget(self) -> None:
        """In a forked child: what was told, was told to the parent."""
        self._backlog.clear()

    def end(self) -> None:
        """Nothing more comes: readers get what is left, then the end."""
        self._ended = True
        self._serve_waiting_readers()

    def next_item(self) -> Any:
        """What a reader gets now; None when it has to wait."""
        if self._backlog:
            return self._backlog.popleft()
        return StopIteration if self._ended else None

    def _serve_waiting_readers(self) -> None:
        if self._channel is not None and self._channel.getters and self._channel.hub.loop is not None:
            self._channel.hub.loop.run_callback(self._hand_out, self._channel)

    def _hand_out(self, channel: NotificationChannel) -> None:
        """In the hub: give waiting readers what there is."""
        while channel.getters and (item := self.next_item()) is not None:
            channel.put(item)
