"""The client of each process of a worker: made late, never inherited, and in a thread whose gevent hub runs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import gevent
from gevent import monkey
from gevent.event import Event

from geventaudit import AuditClient
from geventaudit.integrations.gunicorn import start_spool

__all__ = ["ProcessClients"]

logger = logging.getLogger("geventaudit.celery")

_START_SECONDS = 10.0
_END_SECONDS = 1.0


class ProcessClients:
    """The client of this process, made when it is first needed. A forked process makes its own.

    :param close_timeout: seconds.
    """

    def __init__(self, make_client: Callable[[], AuditClient], close_timeout: float) -> None:
        self.is_pool_process = False
        """True in a process of a prefork pool: its main thread waits for tasks outside of gevent."""
        self._make_client = make_client
        self._close_timeout = close_timeout
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._client: AuditClient | None = None
        self._thread: _ClientThread | None = None

    def get(self) -> AuditClient:
        """Return the client.

        :raises Exception: it cannot be made.
        """
        if self._process != os.getpid():
            # The parent's thread does not exist here, and another thread may have held the lock.
            self._process, self._lock, self._client, self._thread = os.getpid(), threading.Lock(), None, None
        if self._client is None:
            with self._lock:
                if self._client is None:
                    self._client = self._make()
        return self._client

    def _make(self) -> AuditClient:
        if monkey.is_module_patched("select") and not self.is_pool_process:
            return _started(self._make_client)  # the hub of this thread runs, as whatever waits lets it
        self._thread = _ClientThread(self._make_client)
        return self._thread.client

    def close(self) -> None:
        """Close the client, if there is one, and wait for the delivery of its records."""
        client, thread = self._client, self._thread
        if client is None or self._process != os.getpid():
            return
        self._client = self._thread = None
        left = len(client.close(self._close_timeout))
        if left:
            logger.warning("geventaudit: process %d ends with %d records undelivered", os.getpid(), left)
        if thread is not None:
            thread.end()


class _ClientThread:
    """A native thread with a gevent hub of its own, and a client that lives there.

    :raises Exception: an exception of *make_client*.
    """

    client: AuditClient

    def __init__(self, make_client: Callable[[], AuditClient]) -> None:
        self._make_client = make_client
        self._error: BaseException | None = None
        self._over: Event | None = None
        allocate_lock = monkey.get_original("_thread", "allocate_lock")
        self._started, self._ended = allocate_lock(), allocate_lock()
        self._started.acquire()
        self._ended.acquire()
        monkey.get_original("_thread", "start_new_thread")(self._run, ())
        if not self._started.acquire(True, _START_SECONDS):
            raise TimeoutError(f"make_client did not return within {_START_SECONDS} seconds")
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait for the end of the thread. The client is closed."""
        if self._over is not None:
            self.client.call_soon(self._over.set)
            self._ended.acquire(True, _END_SECONDS)

    def _run(self) -> None:
        # The client finds the hub that it will live in.
        hub = gevent.get_hub()
        try:
            self._serve()
        finally:
            hub.destroy(destroy_loop=True)
            self._ended.release()

    def _serve(self) -> None:
        try:
            self.client = _started(self._make_client)
            self._over = Event()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._started.release()
        while not self._over.wait(3600):  # with a limit: a hub in which nothing else is to come would give up
            pass


def _started(make_client: Callable[[], AuditClient]) -> AuditClient:
    """Return a new client. One with a spool begins to send the spools of dead processes."""
    client = make_client()
    if not isinstance(client, AuditClient):
        raise TypeError(f"make_client must return a Client or a BaseClient, returned {client!r}")
    start_spool(client)
    return client
