"""One record for one block of code, for each end of the block."""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import eventually, mapping, message, once, record

from geventaudit import (
    AuditType,
    Backoff,
    BaseClient,
    CallerIdentity,
    CallerIdentityType,
    Client,
    ClientClosedError,
    DomainSocket,
    Msg,
    NoOp,
    NotificationKind,
    Operation,
    OperationResult,
    QueueFullError,
    Record,
    Spool,
    TargetResource,
    ValidationError,
)
from geventaudit.agent import Agent


class DeniedError(Exception):
    pass


@pytest.fixture
def got() -> list[Any]:
    """The records that arrived, as type and record, in their order."""
    return []


@pytest.fixture
def client(socket_path: str, got: list[Any]) -> Iterator[Client]:
    def keep(received: Any) -> None:
        if isinstance(received.message, Msg):
            got.append(received.message)

    quick = Backoff(initial=0.01, maximum=0.05)
    with Agent(socket_path, keep), Client(lambda: DomainSocket(socket_path), backoff=quick) as client:
        yield client


def ends(client: Client, got: list[Any]) -> list[tuple[str, str, str]]:
    """Name, result and description of all that was sent."""
    assert client.flush(10)
    eventually(lambda: len(got) == client.stats().accepted)
    return [
        (each.record.operation_name, str(each.record.operation_result), each.record.operation_result_description)
        for each in got
    ]


def test_a_block_that_ends_well(client: Client, got: list[Any]) -> None:
    with client.operation(record(), operation_name="RotateKey") as operation:
        operation.add(custom_data={"version": 3}, caller_agent="cli/2")
        assert client.stats().accepted == 0, "nothing is sent before the end"
    assert operation.error is None
    assert ends(client, got) == [("RotateKey", "Success", "")]
    assert got[0].type is AuditType.CONTROL_PLANE
    assert got[0].record.custom_data == {"ticket": 4711, "version": 3}
    assert got[0].record.caller_agent == "cli/2"


@pytest.mark.parametrize(
    ("error", "description"),
    [
        (DeniedError("not yours"), "DeniedError: not yours"),
        (ValueError(), "ValueError"),
        (gevent.Timeout(5), "Timeout: 5 seconds"),
        (gevent.GreenletExit("killed"), "GreenletExit: killed"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError("a\ud800b"), "OSError: a\\ud800b"),
        (DeniedError("x" * 5000), "DeniedError: " + "x" * 1000 + "..."),
        (ExceptionGroup("two", [ValueError(1), ValueError(2)]), "ExceptionGroup: two (2 sub-exceptions)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_block_that_raises(client: Client, got: list[Any], error: BaseException, description: str) -> None:
    with pytest.raises(type(error)) as caught, client.operation(record()):
        raise error
    assert caught.value is error
    assert error.__context__ is None
    assert ends(client, got) == [("CreateUser", "Failure", description)]


def test_an_exception_that_cannot_be_shown(client: Client, got: list[Any]) -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(BrokenError), client.operation(record()):
        raise BrokenError
    assert ends(client, got) == [("CreateUser", "Failure", "BrokenError: (its __str__ raised RuntimeError)")]


def test_timeouts_and_kills_of_others_pass_through(client: Client, got: list[Any]) -> None:
    def work() -> None:
        with client.operation(record(operation_name="Killed")):
            gevent.sleep(60)

    greenlet = gevent.spawn(work)
    gevent.sleep(0)
    greenlet.kill()
    assert isinstance(greenlet.value, gevent.GreenletExit)
    with gevent.Timeout(0.01, False), client.operation(record(operation_name="Late")):
        gevent.sleep(60)
    assert ends(client, got) == [
        ("Killed", "Failure", "GreenletExit"),
        ("Late", "Failure", "Timeout: 0.01 seconds (silent)"),
    ]


def test_a_block_says_itself_how_it_ended(client: Client, got: list[Any]) -> None:
    with client.operation(record()) as operation:
        operation.add(operation_result=OperationResult.FAILURE, operation_result_description="quota")
    with client.operation(record()) as operation:
        operation.add(operation_result=OperationResult.UNKNOWN)
    with client.operation(record()) as operation:
        operation.record.operation_result = OperationResult.FAILURE
        operation.record.operation_result_description = "set on the record"

    @client.operation(record())
    def raises(*, operation: Any) -> None:
        operation.add(operation_result=OperationResult.SUCCESS)
        raise DeniedError

    with pytest.raises(DeniedError):
        raises()
    assert [each[1:] for each in ends(client, got)] == [
        ("Failure", "quota"),
        ("UnknownOperationResult", ""),
        ("Failure", "set on the record"),
        ("Failure", "DeniedError"),
    ]


def test_a_template_is_never_changed(client: Client, got: list[Any]) -> None:
    template = message()
    before = message()
    with client.operation(template) as operation:
        operation.add(target_resources={"Vault": [TargetResource("v")]})
        operation.record.custom_data["n"] = 1  # type: ignore[index]
        operation.record.target_resources["SubscriptionId"].append(TargetResource("res2"))  # type: ignore[attr-defined]
        operation.record.caller_access_levels.append("Writer")  # type: ignore[attr-defined]
    assert template == before
    ends(client, got)
    assert set(got[0].record.target_resources) == {"SubscriptionId", "Vault"}
    assert len(got[0].record.target_resources["SubscriptionId"]) == 2
    assert got[0].record.caller_access_levels == ["Reader", "Writer"]


def test_the_inside_of_a_template_is_never_changed(client: Client, got: list[Any]) -> None:
    template = record(custom_data={"steps": {"done": [1]}, "counts": defaultdict(int)})

    @client.operation(template)
    def work(*, operation: Any) -> None:
        operation.record.target_resources["SubscriptionId"][0].name += "!"
        operation.record.caller_identities[CallerIdentityType.UPN][0].identity = "other"
        operation.record.custom_data["steps"]["done"].append(2)
        operation.record.custom_data["counts"]["x"] += 1

    work()
    work()
    assert template == record(custom_data={"steps": {"done": [1]}, "counts": {}})
    ends(client, got)
    for each in got:
        assert each.record.target_resources["SubscriptionId"][0].name == "res1!"
        assert each.record.custom_data == {"steps": {"done": [1, 2]}, "counts": {"x": 1}}


def test_a_template_that_contains_itself_is_for_the_rules_to_refuse(client: Client) -> None:
    circle: list[Any] = []
    circle += [circle, circle]
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (circle, deep):
        with client.operation(record(custom_data={"value": value})) as operation:
            pass
        assert isinstance(operation.error, ValidationError)


def test_the_kinds_of_templates(client: Client, got: list[Any]) -> None:
    fields: dict[str, Any] = {
        "operation_name": "FromFields",
        "operation_categories": ["KeyManagement"],
        "operation_access_level": "Contributor",
        "caller_agent": "a",
        "caller_ip_address": "192.0.2.7",
        "caller_identities": {CallerIdentityType.UPN: [CallerIdentity("u", "d")]},
        "caller_access_levels": ["Reader"],
        "target_resources": {"T": [TargetResource("t")]},
    }
    with client.operation(**fields):
        pass
    with client.operation(
        {"Type": "DataPlane", "Record": mapping(OperationName="FromMapping", CallerAgent=None)}
    ) as it:
        it.add(caller_agent="added")
    with client.operation(Msg(AuditType.DATA_PLANE, record()), audit_type=AuditType.CONTROL_PLANE):
        pass
    assert [each[0] for each in ends(client, got)] == ["FromFields", "FromMapping", "CreateUser"]
    assert [each.type for each in got] == ["AsmAuditCP", "AsmAuditDP", "AsmAuditCP"]


def test_mistakes_are_raised_before_the_block_begins(client: Client) -> None:
    with pytest.raises(TypeError, match="operation_nam"):
        client.operation(record(), operation_nam="typo")
    with pytest.raises(TypeError, match="must be a Record, a Msg or a mapping, got 'x'"):
        client.operation("x")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="Nonsense"):
        client.operation({"Type": "ControlPlane", "Record": {"Nonsense": 1}})
    with pytest.raises(TypeError, match="operation_nam"), client.operation(record()) as operation:
        operation.add(operation_nam="typo")
    with pytest.raises(RuntimeError, match="for one block"), operation:
        pass


def test_nested(client: Client, got: list[Any]) -> None:
    def inside(outer: Operation) -> None:
        with client.operation(record(operation_name="Inner")) as inner:
            inner.add(custom_data={"is": "inner"})
            outer.add(custom_data={"is": "outer"})
            raise DeniedError("inside")

    with client.operation(record(operation_name="Outer")) as outer, pytest.raises(DeniedError):
        inside(outer)
    a, b = (client.operation(record(operation_name=name)) for name in "AB")
    with pytest.raises(DeniedError), a, b:
        raise DeniedError("both")
    assert ends(client, got) == [
        ("Inner", "Failure", "DeniedError: inside"),
        ("Outer", "Success", ""),
        ("B", "Failure", "DeniedError: both"),
        ("A", "Failure", "DeniedError: both"),
    ]
    assert [each.record.custom_data["is"] for each in got[:2]] == ["inner", "outer"]


# -- as a decorator ----------------------------------------------------------------------------------------------------


def test_a_decorated_function(client: Client, got: list[Any]) -> None:
    @client.operation(record(operation_name="Rotate"))
    def rotate(vault: str, depth: int = 0, *, operation: Any = None) -> str:
        """Rotate a vault."""
        operation.add(custom_data={"vault": vault})
        if depth:
            rotate(vault + "'", depth - 1)
        if vault == "bad":
            raise DeniedError("no")
        return vault.upper()

    assert (rotate.__name__, rotate.__doc__) == ("rotate", "Rotate a vault.")
    assert rotate("a") == "A"
    with pytest.raises(DeniedError):
        rotate("bad")
    rotate("r", 1)
    assert [each[1:] for each in ends(client, got)] == [
        ("Success", ""),
        ("Failure", "DeniedError: no"),
        ("Success", ""),
        ("Success", ""),
    ]
    assert [each.record.custom_data["vault"] for each in got] == ["a", "bad", "r'", "r"]


def test_calls_at_the_same_time_do_not_mix(client: Client, got: list[Any]) -> None:
    @client.operation(record())
    def work(number: int, *, operation: Any) -> None:
        operation.add(custom_data={"before": number})
        gevent.sleep(0.001 * (number % 3))
        operation.add(custom_data={"after": number})

    gevent.joinall([gevent.spawn(work, number) for number in range(50)], raise_error=True)
    ends(client, got)
    assert sorted(each.record.custom_data["before"] for each in got) == list(range(50))
    assert all(each.record.custom_data["before"] == each.record.custom_data["after"] for each in got)


def test_methods_and_parameters_of_that_name(client: Client, got: list[Any]) -> None:
    class Vault:
        @client.operation(record(operation_name="Method"))
        def rotate(self, operation: str) -> str:
            return operation

        @staticmethod
        @client.operation(record(operation_name="Static"))
        def static(*, operation: Any = "its own") -> Any:
            return operation

    assert Vault().rotate("a parameter that is not keyword-only") == "a parameter that is not keyword-only"
    assert Vault.static(operation="the caller's") == "the caller's"
    assert repr(Vault.static()) == "<Operation 'Static'>"
    assert [each[0] for each in ends(client, got)] == ["Method", "Static", "Static"]


def test_other_callables_cannot_be_decorated(client: Client) -> None:
    decorate: Any = client.operation(record())

    async def coroutine() -> None: ...

    async def generator() -> Any:
        yield 1

    class Job:
        async def __call__(self) -> None: ...

    for function in (coroutine, generator, Job()):
        with pytest.raises(TypeError, match="asyncio is out of scope"):
            decorate(function)
    for method in (staticmethod(len), classmethod(len)):
        with pytest.raises(TypeError, match=f"below @{type(method).__name__}"):
            decorate(method)
    for thing in (5, DeniedError):
        with pytest.raises(TypeError, match="decorates functions"):
            decorate(thing)


def test_decorated_generators(client: Client, got: list[Any]) -> None:
    @client.operation(record())
    def export(name: str, *, operation: Any) -> Iterator[Any]:
        operation.add(operation_name=name)
        received = yield 1
        operation.add(custom_data={"received": received})
        try:
            yield 2
        except KeyError:
            yield 3
        if name == "Raises":
            raise DeniedError("late")
        return "result"

    def outer() -> Iterator[Any]:
        assert (yield from export("Whole")) == "result"

    assert list(outer()) == [1, 2]
    generator: Any = export("Sent")
    assert [next(generator), generator.send("hello"), generator.throw(KeyError())] == [1, 2, 3]
    assert client.stats().accepted == 1, "it has not ended yet"
    with pytest.raises(StopIteration):
        next(generator)
    with pytest.raises(DeniedError):
        list(export("Raises"))
    left = export("Left")
    next(left)
    left.close()  # type: ignore[attr-defined]
    export("Never begun").close()  # type: ignore[attr-defined]
    assert ends(client, got) == [
        ("Whole", "Success", ""),
        ("Sent", "Success", ""),
        ("Raises", "Failure", "DeniedError: late"),
        ("Left", "Failure", "GeneratorExit"),
    ]
    assert got[1].record.custom_data["received"] == "hello"


def test_generators_side_by_side_do_not_mix(client: Client, got: list[Any]) -> None:
    @client.operation(record())
    def walk(name: str, *, operation: Any) -> Iterator[int]:
        for number in range(3):
            operation.add(custom_data={name: number})
            yield number
        operation.add(operation_name=name)

    assert list(zip(walk("A"), walk("B"), walk("C"), strict=True)) == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    ends(client, got)
    assert {each.record.operation_name: each.record.custom_data for each in got} == {
        name: {"ticket": 4711, name: 2} for name in "ABC"
    }


def test_functions_without_a_signature(client: Client, got: list[Any]) -> None:
    smallest: Any = client.operation(record())(min)
    assert smallest(2, 1) == 1
    assert len(ends(client, got)) == 1


def test_callable_objects_that_return_generators(client: Client, got: list[Any]) -> None:
    class Export:
        def __call__(self) -> Iterator[int]:
            yield 1
            raise DeniedError("late")

    decorated: Any = client.operation(record())(Export())
    with pytest.raises(DeniedError):
        list(decorated())
    assert ends(client, got) == [("CreateUser", "Failure", "DeniedError: late")]


def test_partial_functions_and_generators_of_them(client: Client, got: list[Any]) -> None:
    def count(stop: int) -> Iterator[int]:
        yield from range(stop)

    decorated: Any = client.operation(record())(functools.partial(count, 3))
    assert list(decorated()) == [0, 1, 2]
    assert len(ends(client, got)) == 1


# -- records that are refused ------------------------------------------------------------------------------------------


def told(client: Client, kind: NotificationKind) -> list[Any]:
    channel, found = client.notify(), []
    while (each := channel._notifier.next_item()) not in (None, StopIteration):
        if each.kind is kind:
            found.append(each)
    return found


def test_an_unacceptable_record_does_not_hide_the_outcome() -> None:
    with Client(NoOp) as client:

        @client.operation(Record(operation_name="Incomplete"))
        def work(fail: bool) -> str:
            if fail:
                raise DeniedError("mine")
            return "result"

        assert work(False) == "result"
        with pytest.raises(DeniedError) as caught:
            work(True)
        assert caught.value.__context__ is None
        with client.operation() as operation:
            pass
        assert isinstance(operation.error, ValidationError)
        assert client.stats().rejected == {"invalid": 3}
        (refused,) = told(client, NotificationKind.NOT_RECORDED)
        assert "CallerAgent: is required" in str(refused.error) or "CallerAgent: must not be empty" in str(
            refused.error
        )


def test_a_full_queue_does_not_hide_the_outcome(socket_path: str) -> None:
    client = Client(lambda: DomainSocket(socket_path), queue_size=1)
    with client.operation(record()) as first:
        pass
    with pytest.raises(DeniedError), client.operation(record()) as second:
        raise DeniedError
    assert (first.error, type(second.error)) == (None, QueueFullError)
    assert client.stats().rejected == {"queue_full": 1}
    assert len(told(client, NotificationKind.QUEUE_FULL)) == 1
    assert len(client.close(0)) == 1


def test_a_closed_client_and_a_broken_connection() -> None:
    client = Client(NoOp)
    client.close()
    with client.operation(record()) as operation:
        pass
    assert isinstance(operation.error, ClientClosedError)
    assert client.stats().rejected == {"closed": 1}
    with BaseClient(NoOp()) as base:
        with base.operation(record()) as operation:
            pass
        assert (operation.error, base.stats().accepted) == (None, 1)


def test_a_hook_that_raises_or_leaves_out() -> None:
    def hook(msg: Msg) -> Msg | None:
        if msg.record.operation_name == "Leave":
            return None
        raise RuntimeError("hook")

    with Client(NoOp, before_send=hook) as client:
        with client.operation(record(operation_name="Leave")) as left, client.operation(record()) as raised:
            pass
        assert left.error is None
        assert "RuntimeError" in str(raised.error)
        assert client.stats().rejected == {"invalid": 1, "left_out": 1}


def test_refusals_are_notified_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    with Client(NoOp) as client:
        monkeypatch.setattr("geventaudit.notifications.monotonic", lambda: now[0])
        for _ in range(100):
            with client.operation():
                pass
        now[0] += 1.5
        with client.operation():
            pass
        monkeypatch.undo()
        (refused,) = told(client, NotificationKind.NOT_RECORDED)
        assert refused.missed == 100, "99 untold, and the first that nobody read"
        assert client.stats().rejected == {"invalid": 101}


def test_in_another_thread(client: Client, got: list[Any]) -> None:
    def work() -> str:
        with client.operation(), client.operation(record(operation_name="Elsewhere")):
            return "result"

    pool = gevent.get_hub().threadpool
    assert pool.apply(work) == "result"
    pool.kill()
    assert [each[0] for each in ends(client, got)] == ["Elsewhere"]
    assert client.stats().rejected == {"invalid": 1}
    eventually(lambda: told(client, NotificationKind.NOT_RECORDED), "it is told of in the hub")


def test_a_kill_while_the_record_goes_to_disk_is_obeyed(folder: Path, socket_path: str) -> None:
    """Only a spool that keeps everything waits, and the exception that ends the wait is passed on."""
    spool = Spool(folder / "spool.db", mode="always")
    with Client(lambda: DomainSocket(socket_path), spool=spool) as client:

        def work() -> str:
            with client.operation(record()):
                pass
            return "not reached"

        greenlet = gevent.spawn(work)
        gevent.sleep(0)
        assert not greenlet.ready(), "it waits for the disk"
        greenlet.kill()
        assert isinstance(greenlet.value, gevent.GreenletExit)
        eventually(lambda: client.stats().accepted == 1, "the record was on its way to the disk, and is kept")
        client.close(0.5)


@once
def test_a_program_that_exits_inside(client: Client, got: list[Any], socket_path: str) -> None:
    """The client of that program is never closed, and drains all the same."""
    program = (
        "import sys, geventaudit\n"
        "from helpers import record\n"
        f"client = geventaudit.Client(lambda: geventaudit.DomainSocket({socket_path!r}))\n"
        "with client.operation(record()):\n"
        "    sys.exit(4)\n"
    )
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, timeout=60, check=False)
    assert done.returncode == 4, done.stderr
    eventually(lambda: got)
    assert got[0].record.operation_result_description == "SystemExit: 4"
