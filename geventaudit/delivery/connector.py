"""The source of connections: a factory that is called for each, or the one connection of a base client.

After a failed attempt, the next follows after the delay of the backoff. If the agent's Unix socket could not be
reached, the client polls its path meanwhile: an agent that returns makes the file anew, and the client connects at
once. A watcher of the loop is not reliable: libev's misses a file that is replaced within a second.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import gevent
from gevent.event import Event

from ..backoff import Backoff
from ..errors import ConnectionFailedError, as_connection_error
from ..notifications import NotificationKind, Notifier
from ..runtime.clock import TICK, monotonic
from ..stats import Counters
from ..transport import Connection, check_connection

__all__ = ["Connector", "FactoryConnector", "GivenConnector"]

_WATCH_SECONDS = 0.05
# Seconds before each attempt after a change of the path: at 0, 5, 10, 20, 40, 80 ms. The file appears at bind(), a
# moment before listen().
_QUICK = (0.0, 0.005, 0.005, 0.01, 0.02, 0.04)

_Fingerprint: TypeAlias = tuple[int, int, int] | None


class FactoryConnector:
    """The connections of a :class:`~geventaudit.Client`.

    :param factory: returns an open connection, or raises.
    """

    rejects = True
    """True if a record that makes the agent hang up may be given up."""
    is_broken = False
    """True if the next connection has to come from the caller."""

    def __init__(
        self, factory: Callable[[], Connection], backoff: Backoff, counters: Counters, notifier: Notifier
    ) -> None:
        self._factory = factory
        self._backoff = backoff
        self._counters = counters
        self._notifier = notifier
        self.reset()

    def reset(self) -> None:
        """Start anew, also in a forked child."""
        self.is_over = False
        """Set to True when no more connections are wanted."""
        self.last_error: ConnectionFailedError | None = None
        """The reason for which the last attempt failed, or the last connection broke."""
        self._failures = 0  # in a row
        self._path: str | None = None
        self._seen: _Fingerprint = None
        self._quick: deque[float] = deque()

    def connect(self) -> Connection:
        """Return the next open connection. Wait until there is one."""
        while True:
            self._wait()
            made = self._attempt()
            if self.is_over:  # a kill of this greenlet is pending
                if not isinstance(made, BaseException):
                    made.close()
                raise gevent.GreenletExit
            if isinstance(made, KeyboardInterrupt | SystemExit):
                raise made
            if not isinstance(made, BaseException):
                self._path = None
                self._quick.clear()
                _notify_connected(self._notifier, made)
                return made
            self._failures += 1
            self._counters.connect_failures += 1
            self.last_error = as_connection_error(made, "the factory failed")
            self._watch(self.last_error)
            self._notifier.notify(NotificationKind.CONNECT_FAILED, self.last_error)

    def lost(self, error: ConnectionFailedError, delivered: int, lived: float) -> bool:
        """Note that the connection broke, after *delivered* frames and *lived* seconds.

        A connection that delivered nothing and was short counts as a failed attempt.

        :returns: False if the next connection has to come from the caller.
        """
        self._failures = 0 if delivered or lived > self._backoff.initial else self._failures + 1
        self.last_error = error
        self._notifier.notify(NotificationKind.CONNECTION_LOST, error)
        return True

    def _watch(self, error: ConnectionFailedError) -> None:
        if error.path != self._path:
            self._path = error.path
            was_absent = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOENT
            self._seen = None if was_absent else _fingerprint(self._path)

    def _wait(self) -> None:
        """Wait until the next attempt is due."""
        if self._quick:
            gevent.sleep(self._quick.popleft())
            return
        due = monotonic() + (self._backoff.delay(self._failures) if self._failures else 0.0)
        while (left := due - monotonic()) > 0:
            gevent.sleep(max(left if self._path is None else min(left, _WATCH_SECONDS), TICK))
            if self._path is None:
                continue
            seen, self._seen = self._seen, _fingerprint(self._path)
            if self._seen is not None and self._seen != seen:
                self._failures = 0
                self._quick.extend(_QUICK[1:])
                return

    def _attempt(self) -> Connection | BaseException:
        """Call the factory in its own greenlet.

        All exceptions there, also a GreenletExit, are failed attempts. An exception here is for the sender.
        """
        is_wanted = True

        def call() -> Connection | BaseException:
            try:
                connection = self._factory()
                check_connection(connection, "the factory must return")
            except BaseException as error:
                return error
            if not is_wanted:  # the factory has swallowed the kill
                connection.close()
            return connection

        attempt = gevent.spawn(call)
        try:
            return attempt.get()
        except BaseException:
            is_wanted = False
            if attempt.ready() and not isinstance(attempt.value, BaseException | None):
                attempt.value.close()
            attempt.kill()
            raise


class GivenConnector:
    """The one connection of a :class:`~geventaudit.BaseClient`. The caller handles its failures."""

    rejects = False

    def __init__(self, connection: Connection, notifier: Notifier) -> None:
        self.is_over = False
        self.error: ConnectionFailedError | None = None
        """The reason for which the connection broke; None while it is open."""
        self.given: Connection | None = connection
        """The connection that the sender has not taken yet."""
        self._notifier = notifier
        self._is_given = Event()

    @property
    def is_broken(self) -> bool:
        """See :class:`FactoryConnector`, as for all that is not described here."""
        return self.error is not None

    def reset(self) -> None:
        """Drop the connection in a forked child: it is the parent's."""
        self.is_over = False
        self.given = None
        self.error = ConnectionFailedError(
            "the connection belongs to the parent process; give this process its own by reset()"
        )
        self._is_given = Event()

    def give(self, connection: Connection) -> Connection | None:
        """Make *connection* the next one, and return the unused connection that it replaces, or None."""
        replaced, self.given = self.given, connection
        self.error = None
        self._is_given.set()
        return replaced

    def connect(self) -> Connection:
        while True:
            self._is_given.clear()
            if self.given is not None:
                break
            self._is_given.wait()
        connection, self.given = self.given, None
        _notify_connected(self._notifier, connection)
        return connection

    def lost(self, error: ConnectionFailedError, delivered: int, lived: float) -> bool:
        if self.given is not None:  # reset() has replaced it
            return True
        self.error = error
        self._notifier.notify(NotificationKind.CONNECTION_LOST, error)
        return False


Connector: TypeAlias = FactoryConnector | GivenConnector
"""The source of the sender's connections."""


def _notify_connected(notifier: Notifier, connection: Connection) -> None:
    notifier.notify(NotificationKind.CONNECTED)
    if getattr(connection, "is_best_effort", False) is True:
        notifier.notify_once(NotificationKind.BEST_EFFORT)


def _fingerprint(path: str | None) -> _Fingerprint:
    """Return device, inode and change time of the file, which change with a new socket; None if there is no file."""
    try:
        status = os.stat(path or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
