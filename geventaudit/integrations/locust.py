"""Load tests of an agent with Locust. Extra: ``locust``.

::

    class Service(AuditUser):
        wait_time = constant_throughput(100)

        @task
        def create_user(self):
            self.client.send(MESSAGE)

    locust -f locustfile.py --host unix:///run/agent.sock

Each user is one client with one connection: one process of the service that is simulated. Locust's statistics and web
page have two rows for each operation name: ``send``, the time that :meth:`LocustClient.send` took, and ``deliver``, the
time from its call until the agent had taken the record (to within 20 ms under load). Importing this imports Locust,
which monkey-patches the process.
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

_LOOK_SECONDS = 0.02  # how often to see what was delivered while more is sent


class LocustClient(Client):
    """A client whose sends and deliveries are requests in Locust's statistics.

    :param user: whose requests they are.
    :param options: those of :class:`geventaudit.Client`. Records that are found in a spool blur ``deliver``.
    """

    def __init__(self, user: AuditUser, **options: Any) -> None:
        super().__init__(user.connection, **options)
        self._user = user
        self._pending: deque[tuple[str, float]] = deque()  # (name, when it was accepted), in the order of acceptance
        self._counted = 0  # records that were put there
        self._delivered = 0  # records that were reported so
        self._dropped = 0
        self._watcher: gevent.Greenlet[..., None] | None = None

    def send(self, msg: Msg | Mapping[str, Any], *, timeout: float | None = 0.0) -> None:
        """As :meth:`geventaudit.Client.send`, but what it refuses is a failed request, as with other clients of Locust.

        None of geventaudit's errors is raised, so a task goes on.
        """
        name = _operation_name(msg)
        start = time.perf_counter()
        try:
            super().send(msg, timeout=timeout)
        except AuditError as error:
            self._report("send", name, start, error)
            return
        self._report("send", name, start)
        if self.stats().accepted > self._counted:  # not so when before_send left it out
            self._counted += 1
            self._pending.append((name, start))
            if not self._watcher:
                self._watcher = gevent.spawn(self._watch)

    def close(self, timeout: float | None = 20.0) -> list[Msg]:
        """As :meth:`geventaudit.Client.close`; what was not delivered is a failed ``deliver``."""
        try:
            return super().close(timeout)
        finally:
            self._look()
            self._pending.clear()  # what is left there is kept in a spool

    def _watch(self) -> None:
        while self._pending:
            self.flush(_LOOK_SECONDS)
            self._look()

    def _look(self) -> None:
        """Report what was settled since the last look: records are, in the order of their acceptance."""
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
    """A user whose ``self.client`` is a :class:`LocustClient` to the agent at ``host``.

    ``host``, or Locust's ``--host`` and the field on its page, is ``unix:///path`` or ``tcp://host:port``; None is the
    usual socket of mdsd. An ``on_stop`` of your own must call this one's.

    Locust ends the test when ``host`` is neither.
    """

    abstract = True

    client_options: ClassVar[Mapping[str, Any]] = {}
    """Options of :class:`geventaudit.Client`: ``{"queue_size": 100_000}``."""

    close_timeout: ClassVar[float] = 5.0
    """Seconds that a user who stops waits for the deliveries; what is not delivered by then has failed."""

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
        """The client's factory: an open connection to ``host``. Override it for acknowledgements, TLS or a key."""
        return TCP(self._where) if isinstance(self._where, tuple) else DomainSocket(self._where)

    def on_stop(self) -> None:
        """Close the client."""
        self.client.close(self.close_timeout)


def _parse(host: str) -> str | tuple[str, int] | None:
    """A path, or a host and port; None where it is neither."""
    try:
        url = urlsplit(host)
        if url.scheme == "unix" and url.path and not url.netloc:
            return url.path
        if url.scheme == "tcp" and url.hostname and url.port and not url.path.strip("/"):
            return url.hostname, url.port
    except ValueError:  # a port that is no number
        pass
    return None


def _operation_name(msg: Any) -> str:
    """Of a message or a mapping, whatever it is."""
    try:
        name = msg.record.operation_name if isinstance(msg, Msg) else msg["Record"]["OperationName"]
    except (AttributeError, KeyError, TypeError):
        name = None
    return name if name and isinstance(name, str) else "(no operation name)"
