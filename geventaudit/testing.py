"""For the tests of an audit trail: an agent that keeps the received messages, and misbehaves on request.

geventaudit installs the fixtures ``audit_agent`` and ``audit_client`` of pytest. Their module is not in this package:
pytest imports it before any ``conftest.py`` can monkey-patch, and importing a part of this package imports gevent.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, get_args

import gevent
from gevent.event import Event

from .agent import Agent, Received, Refused
from .agent.shown import line_of_refusal
from .agent.web import Page
from .backoff import Backoff
from .client import Client
from .errors import show
from .records import Msg, Record
from .runtime.clock import monotonic
from .runtime.hub_thread import HubThread, Waiter
from .runtime.native import start_new_thread
from .schema.rules import RecordSchema
from .transport import DomainSocket

__all__ = ["AuditAgent", "Mode", "ReceivedList"]

Mode = Literal["reads", "acks", "no_acks", "stalled", "away"]
"""The state in which an :class:`AuditAgent` begins.

===========  ===================================================  ============================
mode         the agent                                            its clients ask for acks
===========  ===================================================  ============================
``reads``    reads, and acknowledges where it is asked to         no
``acks``     the same                                             yes
``no_acks``  reads and never acknowledges                         yes
``stalled``  accepts connections and reads nothing                no
``away``     does not listen                                      no
===========  ===================================================  ============================
"""

_T = TypeVar("_T")

_START_SECONDS = 10.0
_DELIVERY_SECONDS = 5.0  # the most that the own clients may take to deliver before a record counts as not received
_END_SECONDS = 5.0  # the most that reading what has been received may take when the block ends
_NAMES = tuple(field.name for field in dataclasses.fields(Record))
_FIELDS = RecordSchema().fields
_MISSING = object()


class ReceivedList(list[Received]):
    """The received messages, in their order."""

    def filter(self, **fields: Any) -> ReceivedList:
        """Return the records with these *fields*, compared as by :meth:`AuditAgent.assert_received`.

        Without fields, return all records: everything but heartbeats.

        :raises TypeError: a name is not a field of a record.
        """
        expected = _expected(fields)
        return ReceivedList(
            each for each in self if isinstance(each.message, Msg) and not _differences(expected, each.message)
        )

    @property
    def messages(self) -> list[Msg]:
        """The messages with records."""
        return [each.message for each in self if isinstance(each.message, Msg)]

    @property
    def records(self) -> list[Record]:
        """The records."""
        return [each.record for each in self.messages]


class AuditAgent:
    """A real agent on a Unix socket in a folder of its own. A context manager; it runs from entering to leaving.

    When the block ends, the agent reads, records and acknowledges all data that its sockets have received, and closes
    them. This takes at most 5 seconds. A stalled agent reads nothing then either.

    The agent runs in a native thread of its own, so that it always answers: a test that is not monkey-patched may wait
    for a subprocess that sends to it. All methods that wait let other greenlets run.

    :param mode: the state in which the agent begins; see :data:`Mode`. The methods change it later: :meth:`resume`,
        :meth:`acknowledge`, :meth:`start`.
    :param web: also serve a page with the received messages, at :attr:`url`, which is printed on standard error.
    :raises ValueError: *mode* is not one of these.
    """

    address: str
    """The path of the socket, for the service under test; set when the block begins."""
    url: str
    """The address of the page, set when the block begins; empty without *web*."""
    received: ReceivedList
    """The valid messages that arrived, heartbeats included, in their order. May be cleared, and filtered:
    ``agent.received.filter(operation_name="RotateKey")``."""
    refused: list[Refused]
    """The messages that arrived and break the rules. May be cleared."""

    def __init__(self, *, mode: Mode = "reads", web: bool = False) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {show(mode)}")
        self.address = self.url = ""
        self._mode = mode
        self._web = web
        self.received = ReceivedList()
        self.refused = []
        self._clients: list[Client] = []
        self._thread: _Thread | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="audit-")  # a short path: that of a socket ends at 107 bytes
        self.address = os.path.join(self._folder.name, "agent.sock")
        try:
            agent = Agent(self.address, self.received.append, on_refused=self.refused.append, idle_timeout=None)
            page = Page(agent, ("127.0.0.1", 0)) if self._web else None
            self._thread = _Thread(agent, page)
            self._begin()
        except BaseException:
            self._folder.cleanup()
            raise
        if page is not None:
            self.url = page.url
            print(f"geventaudit: the page of the audit agent is {self.url}", file=sys.stderr, flush=True)
        return self

    def _begin(self) -> None:
        if self._mode == "no_acks":
            self.acknowledge(False)
        elif self._mode == "stalled":
            self.stall()
        elif self._mode == "away":
            self.stop()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            try:
                for client in self._clients:
                    client.close(timeout=0.0)
            finally:
                if self._thread is not None:
                    self._thread.end()
        finally:
            self._folder.cleanup()

    def __repr__(self) -> str:
        return f"<AuditAgent {self.address}, {len(self.messages)} records, {len(self.refused)} refused>"

    # -- what arrived --------------------------------------------------------------------------------------------------

    @property
    def messages(self) -> list[Msg]:
        """The received messages with records, in their order."""
        return self.received.messages

    @property
    def records(self) -> list[Record]:
        """The received records, in their order."""
        return self.received.records

    def wait_for(self, count: int, timeout: float = 10.0) -> list[Msg]:
        """Wait until at least *count* records have arrived. Return all of them.

        :param timeout: seconds.
        :raises AssertionError: fewer arrived in that time; the error lists them, and the refused messages.
        :raises TypeError, ValueError: the count or the time is invalid.
        """
        __tracebackhide__ = True
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count must be a whole number of records, got {show(count)}")
        if self._wait(lambda: len(self.messages) >= count, timeout):
            return self.messages
        raise AssertionError(f"{len(self.messages)} of {count} records arrived within {timeout} s{self._hints()}")

    def assert_received(self, *, timeout: float = 5.0, **fields: Any) -> Msg:
        """Wait until a record with these *fields* has arrived. Return the first such message.

        :param timeout: seconds.
        :param fields: fields of the record by their names in :class:`~geventaudit.Record`, and ``audit_type``. Of a
            mapping (``custom_data={"ticket": 4711}``), only the given keys are compared. All other values must be
            equal, with categories and access levels in any order.
        :raises AssertionError: there is none in that time; the error shows the differences of the nearest record.
        :raises TypeError, ValueError: a name is not a field of a record, or the time is not a number of seconds.
        """
        __tracebackhide__ = True
        expected = _expected(fields)
        self._wait(lambda: self._first(expected) is not None, timeout)
        if (found := self._first(expected)) is not None:
            return found
        raise AssertionError(
            f"no record{_with(fields)} arrived within {timeout} s{self._nearest(expected)}{self._hints()}"
        )

    def assert_not_received(self, *, timeout: float = 0.1, **fields: Any) -> None:
        """Check that no record with these *fields* has arrived, and that none arrives for some time.

        First wait up to 5 seconds until the clients of :meth:`make_client` have delivered their records, unless the
        agent is stalled or away.

        :param timeout: seconds to wait for a record of another client, such as one of a service.
        :param fields: as of :meth:`assert_received`. Without fields, no record at all may arrive.
        :raises AssertionError: there is such a record; the first one is shown in full.
        :raises TypeError, ValueError: a name is not a field of a record, or the time is not a number of seconds.
        """
        __tracebackhide__ = True
        expected = _expected(fields)
        if self._thread is not None and self._thread.agent.is_running and self._thread.agent.is_reading:
            self._wait(lambda: self._first(expected) is not None or not self._undelivered(), _DELIVERY_SECONDS)
        self._wait(lambda: self._first(expected) is not None, timeout)
        if (found := self._first(expected)) is not None:
            lines = [f"a record{_with(fields)} arrived:", *_lines_of(found)]
            raise AssertionError("\n".join(lines))

    def _first(self, expected: Mapping[str, Any]) -> Msg | None:
        return next((each for each in self.messages if not _differences(expected, each)), None)

    def _undelivered(self) -> int:
        """Return the number of records of the own clients that may still arrive."""
        stats = [each.stats() for each in self._clients]
        # Without acknowledgements, what has arrived stays in flight.
        counts_in_flight = self._thread is not None and self._thread.agent.is_acknowledging
        return sum(each.queued + (each.in_flight if counts_in_flight else 0) for each in stats)

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        __tracebackhide__ = True
        if isinstance(timeout, bool) or not isinstance(timeout, int | float):
            raise TypeError(f"timeout must be a number of seconds, got {show(timeout)}")
        if math.isnan(timeout):  # nothing would ever be beyond it
            raise ValueError("timeout must be a number of seconds, got nan")
        deadline = monotonic() + timeout
        while not condition():
            if monotonic() > deadline:
                return condition()
            gevent.sleep(0.005)  # and the client's greenlets run, also where nothing is monkey-patched
        return True

    def _nearest(self, expected: Mapping[str, Any]) -> str:
        if not (messages := self.messages):
            return ""

        def distance(msg: Msg) -> tuple[int, float]:
            different = _differences(expected, msg)
            alike = sum(
                difflib.SequenceMatcher(None, repr(each.expected), repr(each.got)).ratio() for each in different
            )
            return len({each.field for each in different}), len(different) - alike

        nearest = min(messages, key=distance)
        lines = [f"\nthe nearest of {len(messages)}, {nearest.record.operation_name!r}, differs:"]
        for each in _differences(expected, nearest):
            got = "nothing" if each.got is _MISSING else repr(each.got)
            lines.append(f"  {each.path}:\n    expected {each.expected!r}\n    got      {got}")
        lines.append("in full, but for what is empty:")
        return "\n".join([*lines, *_lines_of(nearest)])

    def _hints(self) -> str:
        """Return further hints: names, and refusals on both sides."""
        lines = []
        names = [each.operation_name for each in self.records]
        if names:
            lines.append(f"arrived: {', '.join(names[-20:])}" + (" (the last 20)" if len(names) > 20 else ""))
        lines += [f"refused by the agent: {line_of_refusal(each)}" for each in self.refused[-5:]]
        for client in self._clients:
            stats = client.stats()
            if stats.rejected:
                lines.append(
                    f"refused by the client: { {str(reason): count for reason, count in stats.rejected.items()} }"
                )
            if waiting := stats.queued + stats.in_flight:
                lines.append(f"accepted by the client and not delivered: {waiting}")
        return "".join(f"\n{line}" for line in lines)

    # -- what it does --------------------------------------------------------------------------------------------------

    def make_client(self, *, require_ack: bool | None = None, **options: Any) -> Client:
        """Return a client of this agent, with *options* as for :class:`~geventaudit.Client`. It closes with the agent.

        :param require_ack: ask for acknowledgements; None for the choice of the mode.
        """
        if require_ack is None:
            require_ack = self._mode in ("acks", "no_acks")
        options.setdefault("backoff", Backoff(initial=0.01, maximum=0.1))
        address = self.address
        client = Client(lambda: DomainSocket(address, require_ack=require_ack), **options)
        self._clients.append(client)
        return client

    def stall(self) -> None:
        """Stop reading, as a stuck agent does."""
        self._do(lambda agent: agent.stop_reading())

    def resume(self) -> None:
        """Read again."""
        self._do(lambda agent: agent.resume_reading())

    def acknowledge(self, yes: bool) -> None:
        """Acknowledge messages from now on, or stop acknowledging them."""
        self._do(lambda agent: agent.resume_acknowledging() if yes else agent.stop_acknowledging())

    def hang_up(self) -> None:
        """Close all connections, and continue to listen."""
        self._do(lambda agent: agent.hang_up())

    def stop(self, timeout: float = 0.0) -> None:
        """Close all connections, and stop listening until :meth:`start`.

        :param timeout: seconds for reading the received messages; with 0 they stay unread, as when an agent dies.
        """
        self._do(lambda agent: agent.stop(timeout))

    def start(self) -> None:
        """Listen again after :meth:`stop`, on the same address."""
        self._do(lambda agent: agent.start())

    def restart(self, timeout: float = 0.0) -> None:
        """:meth:`stop` and :meth:`start`."""
        self._do(lambda agent: agent.restart(timeout))

    def _do(self, act: Callable[[Agent], object]) -> None:
        if self._thread is None:
            raise RuntimeError("the agent does not run: use it in a with statement, or as the fixture audit_agent")
        self._thread.do(act)


class _Thread:
    """The native thread that an agent lives in, with a hub of its own."""

    def __init__(self, agent: Agent, page: Page | None = None) -> None:
        self.agent = agent
        """For reading its state; :meth:`do` changes it."""
        self._page = page
        self._hub_thread: HubThread | None = None
        self._over: Event | None = None
        self._error: BaseException | None = None
        self._ended = False
        waiter = Waiter()
        start_new_thread(self._run, ())
        deadline = monotonic() + _START_SECONDS
        while self._hub_thread is None and not self._ended:
            if monotonic() > deadline:
                raise TimeoutError(f"the agent did not start within {_START_SECONDS} seconds")
            waiter.wait(0.001)
        if self._error is not None:
            raise self._error

    def do(self, act: Callable[[Agent], object]) -> None:
        """Call *act* with the agent, in its thread, and wait for the result.

        :raises Exception: *act* raised it.
        """
        home = self._hub_thread
        if home is None or self._ended:
            raise RuntimeError("the agent does not run any more")
        home.call(lambda: act(self.agent), None)

    def end(self) -> None:
        """Stop the agent and wait for the end of the thread."""
        over = self._over
        if self._hub_thread is not None and over is not None:
            self._hub_thread.post(over.set)
        waiter = Waiter()
        while not self._ended:
            waiter.wait(0.001)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._over = Event()
            if self._page is not None:
                self._page.start()
            self.agent.start()
            self._hub_thread = HubThread.current()
            while not self._over.wait(3600):  # with a limit: a hub in which nothing else is to come would give up
                pass
            self.agent.stop(_END_SECONDS)
        except BaseException as error:
            self._error = error
        finally:
            if self._page is not None:
                self._page.close()
            if self._hub_thread is not None:
                self._hub_thread.stop()
            gevent.get_hub().destroy(destroy_loop=True)
            self._ended = True


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Difference:
    field: str
    path: str
    expected: Any
    got: Any


def _expected(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return *fields* as records that arrived would have them.

    :raises TypeError: a name is not a field of a record.
    """
    if strange := set(fields) - {*_NAMES, "audit_type"}:
        raise TypeError(f"{', '.join(sorted(strange))}: must be audit_type or one of {', '.join(_NAMES)}")
    return {name: _normal(name, value) for name, value in fields.items()}


def _with(fields: Mapping[str, Any]) -> str:
    return f" with {', '.join(f'{name}={value!r}' for name, value in fields.items())}" if fields else ""


def _lines_of(msg: Msg) -> list[str]:
    """Return a line for each field that is not empty."""
    return [f"  {name}={value!r}" for name in ("audit_type", *_NAMES) if (value := _value(msg, name))]


def _normal(name: str, value: Any) -> Any:
    """Return *value* as a record that arrived would have it."""
    try:
        return _FIELDS[name].deserialize(value)
    except Exception:  # audit_type; a value that no record can have, and so is not found; one that is equal to anything
        return value


def _value(msg: Msg, name: str) -> Any:
    return msg.type if name == "audit_type" else getattr(msg.record, name)


def _differences(expected: Mapping[str, Any], msg: Msg) -> list[_Difference]:
    return [
        _Difference(name, path, wanted, got)
        for name, value in expected.items()
        for path, wanted, got in _compare(name, value, _value(msg, name))
    ]


def _compare(path: str, expected: Any, got: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key, value in expected.items():
            yield from _compare(f"{path}[{show(key)}]", value, got.get(key, _MISSING))
    elif got is _MISSING or expected != got:  # mock.ANY is equal to both
        yield path, expected, got
