"""Load tests of an agent with Locust. Extra: ``locust``.

::

    class Service(AuditUser):
        wait_time = constant_throughput(100)

        @task
        def create_user(self):
            self.client.send(MESSAGE)

    locust -f locustfile.py --host unix:///run/agent.sock

Each user is a client with one connection, and simulates one process of the service. Locust's statistics and web page
have two rows for each operation name: ``send`` is the duration of :meth:`LocustClient.send`, and ``deliver`` is the
time from its call to the delivery (to within 20 ms under load). This module imports Locust, which monkey-patches the
process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent

try:
    from locust import User
    from locust.env import Environment
    from locust.exception import StopTest
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.locust needs locust: pip install 'geventaudit[locust]'"
    raise ModuleNotFoundError(needs) from error

from geventaudit import TCP, AuditError, Client, Connection, ConnectionFailedError, DomainSocket, Msg

__all__ = ["AuditUser", "LocustClient"]

_LOOK_SECONDS = 0.02  # between two looks at the deliveries under load


class LocustClient(Client):
    """A client that reports sends and deliveries as requests to Locust's statistics.

    :param user: the user of the requests.
    :param options: the options of :class:`geventaudit.Client`. Records from a spool distort ``deliver``.
    """

    def __init__(self, user: AuditUser, **options: Any) -> None:
        super().__init__(user.connection, **options)
        self._user = user
        self._pending: deque[tuple[str, float]] = deque()  # (name, start of send), in the order of acceptance
        self._counted = 0  # records put into _pending
        self._delivered = 0  # records reported as delivered
        self._dropped = 0
        self._watcher: gevent.Greenlet[..., None] | None = None

    def send(self, msg: Msg | Mapping[str, Any], *, timeout: float | None = 0.0) -> None:
        """Send *msg* as :meth:`geventaudit.Client.send` does, and report a refusal as a failed request.

        An :class:`~geventaudit.AuditError` is not raised, so that the task continues, as with other clients of Locust.
        """
        name = _operation_name(msg)
        start = time.perf_counter()
        try:
            super().send(msg, timeout=timeout)
        except AuditError as error:
            self._report("send", name, start, error)
            return
        self._report("send", name, start)
        if self.stats().accepted > self._counted:  # False if before_send left the message out
            self._counted += 1
            self._pending.append((name, start))
            if not self._watcher:
                self._watcher = gevent.spawn(self._watch)

    def close(self, timeout: float | None = 20.0) -> list[Msg]:
        """Close as :meth:`geventaudit.Client.close` does, and report undelivered records as failed ``deliver``."""
        try:
            return super().close(timeout)
        finally:
            self._look()
            self._pending.clear()  # the other records are kept in a spool

    def _watch(self) -> None:
        while self._pending:
            self.flush(_LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        """Report the records settled since the last look. Records are settled in the order of their acceptance."""
        stats = self.stats()
        while self._pending and self._delivered < stats.delivered:
            self._delivered += 1
            self._report("deliver", *self._pending.popleft())
        while self._pending and self._dropped < stats.dropped:
            self._dropped += 1
            error = ConnectionFailedError("accepted, and given up before it was delivered")
            self._report("deliver", *self._pending.popleft(), error)

    def _report(self, kind: str, name: str, start: float, error: Exception | None = None) -> None:
        self._user.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=(time.perf_counter() - start) * 1000,
            response_length=0,
            exception=error,
            context=self._user.context(),
        )


class AuditUser(User):
    """A user with a :class:`LocustClient` for the agent at ``host`` as ``self.client``.

    ``host``, or Locust's ``--host`` and the field on its page, is ``unix:///path`` or ``tcp://host:port``; None is the
    usual socket of mdsd. Locust ends the test if ``host`` is invalid. An overriding ``on_stop`` must call
    ``super().on_stop()``.
    """

    abstract = True

    client_options: ClassVar[Mapping[str, Any]] = {}
    """Options of :class:`geventaudit.Client`: ``{"queue_size": 100_000}``."""

    close_timeout: ClassVar[float] = 5.0
    """Seconds that ``on_stop`` waits for deliveries; records not delivered by then have failed."""

    client: LocustClient

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._where = self._parse_host()
        self.client = LocustClient(self, **self.client_options)

    def _parse_host(self) -> str | tuple[str, int] | None:
        if not self.host:
            return None
        where = _parse(self.host)
        if where is None:
            self.environment.process_exit_code = 2  # Locust would end with 0
            raise StopTest(f"host must be unix:///path or tcp://host:port, got {self.host!r}")
        return where

    def connection(self) -> Connection:
        """Return an open connection to ``host``, as the client's factory. Override it for acknowledgements or TLS."""
        return TCP(self._where) if isinstance(self._where, tuple) else DomainSocket(self._where)

    def on_stop(self) -> None:
        """Close the client."""
        self.client.close(self.close_timeout)


def _parse(host: str) -> str | tuple[str, int] | None:
    """Return a path, or a host and port; None if *host* is neither."""
    try:
        url = urlsplit(host)
        if url.scheme == "unix" and url.path and not url.netloc:
            return url.path
        if url.scheme == "tcp" and url.hostname and url.port and not url.path.strip("/"):
            return url.hostname, url.port
    except ValueError:  # the port is not a number
        pass
    return None


def _operation_name(msg: Any) -> str:
    """Return the operation name of a message or a mapping, valid or not."""
    try:
        name = msg.record.operation_name if isinstance(msg, Msg) else msg["Record"]["OperationName"]
    except (AttributeError, KeyError, TypeError):
        name = None
    return name if name and isinstance(name, str) else "(no operation name)"
