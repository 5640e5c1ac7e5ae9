"""A record for each run of a task: in real workers with a real broker, and in this process."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gevent
import pytest
from gevent import subprocess
from helpers import HERE, eventually, once

from geventaudit import (
    AuditClient,
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Client,
    Msg,
    NoOp,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from geventaudit.testing import AuditAgent

celery = pytest.importorskip("celery", reason="needs celery, which the extra [test] brings")
pytest.importorskip("redis", reason="needs redis, which the extra [test] brings")

import celery_program  # noqa: E402  (it needs celery)
import kombu.pools  # noqa: E402
from celery.exceptions import Ignore, Reject  # noqa: E402

from geventaudit.integrations.celery import HEADER, Audit  # noqa: E402

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="needs redis-server: apt-get install redis-server"
)
SYSTEM = CallerIdentityType.SYSTEM
USERNAME = CallerIdentityType.USERNAME


# -- real workers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Redis on a Unix socket; the tasks of celery_program are queued there."""
    path = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        eventually(path.exists, "Redis listens")
        url = f"redis+socket://{path}"
        monkeypatch.setattr(celery_program.app.conf, "broker_url", url)
        monkeypatch.setattr(celery_program.app.conf, "broker_write_url", url)
        monkeypatch.setattr(celery_program.app.conf, "broker_read_url", url)
        yield url
        # Everything that keeps a connection, or the address.
        kombu.pools.reset()
        celery_program.app.close()
        celery_program.app.amqp._producer_pool = None
        del celery_program.app.amqp
    finally:
        server.terminate()
        server.wait()


@contextmanager
def worker(broker: str, agent: AuditAgent, log: Path, pool: str, **environment: str) -> Iterator[Any]:
    """A worker with two processes or greenlets. Its log is shown if the test fails."""
    command = [sys.executable, "-m", "celery", "-A", "celery_program", "worker", "-P", pool, "-c", "2", "-l", "info"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    settings = {"TEST_BROKER": broker, "TEST_AGENT": agent.address, "PYTHONPATH": paths, **environment}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=HERE, stdout=output, stderr=output, env={**os.environ, **settings})
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace"))
        raise
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()


def table(records: list[Record]) -> list[tuple[str, str, int, str]]:
    """Task, state, number of retries and description of each record, sorted."""
    return sorted(
        (
            each.operation_name.removeprefix("celery_program."),
            each.custom_data["state"],
            each.custom_data["retries"],
            each.operation_result_description,
        )
        for each in records
    )


@once
@needs_redis
@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_each_run_in_a_worker_is_one_record(pool: str, broker: str, folder: Path) -> None:
    tasks, path = celery_program, folder / "running"
    expected = [
        ("fail", "FAILURE", 0, "ValueError: no such customer: [redacted]"),
        ("ignore", "IGNORED", 0, "the task raised Ignore"),
        ("no.such", "UNKNOWN", 0, "the worker has no such task"),
        ("order", "REVOKED", 0, "expired before the run"),
        ("order", "SUCCESS", 0, ""),
        ("reject", "REJECTED", 0, "Reject: not mine"),
        ("unsteady", "RETRY", 0, "to be run again: ConnectionError: try later"),
        ("unsteady", "SUCCESS", 1, ""),
        ("wait", "FAILURE", 0, "the time limit of 1 s was exceeded"),
    ]
    with AuditAgent() as agent, worker(broker, agent, folder / "log", pool):
        tasks.order.delay(1)
        tasks.fail.delay("ann@example.com")
        tasks.unsteady.delay()
        tasks.reject.delay()
        tasks.ignore.delay()
        tasks.unaudited.delay()
        tasks.app.send_task("no.such")
        tasks.order.apply_async((2,), expires=-5)
        tasks.wait.apply_async((str(path),), time_limit=1)
        eventually(lambda: len(agent.records) >= len(expected), "all are recorded", timeout=90)
        if pool == "prefork":
            tasks.leave.delay(70)
            tasks.die.delay()
            eventually(lambda: len(agent.records) >= len(expected) + 2, "two processes died", timeout=90)
            expected += [
                ("leave", "FAILURE", 0, "WorkerLostError: Worker exited prematurely: exitcode 70."),
                ("die", "FAILURE", 0, mock.ANY),
            ]
        path.unlink()
        running = tasks.wait.delay(str(path))
        eventually(path.exists, "the task runs", timeout=90)
        tasks.app.control.revoke(running.id, terminate=True)
        eventually(lambda: len(agent.records) > len(expected), "the task is terminated", timeout=90)
        expected.append(("wait", "REVOKED", 0, "terminated" if pool == "gevent" else "terminated by signal 15"))
    assert table(agent.records) == sorted(expected, key=lambda row: row[:3])
    for record in agent.records:
        assert record.caller_identities[SYSTEM][0].identity.startswith(f"gen{os.getpid()}@"), "the process that queued"
        assert record.caller_access_levels == ["Buyer"]
        assert "@example.com" not in str(record)
    if pool == "prefork":
        (died,) = [each for each in agent.records if each.operation_name.endswith("die")]
        assert "signal 9 (SIGKILL)" in died.operation_result_description


@needs_redis
def test_the_caller_of_a_request_goes_with_all_tasks_that_it_causes(broker: str, folder: Path) -> None:
    flask = pytest.importorskip("flask", reason="needs flask, which the extra [test] brings")
    from geventaudit.integrations.flask import Audit as AuditFlask

    web = flask.Flask(__name__)

    @web.post("/orders/<int:number>")
    def queue(number: int) -> str:
        flask.g.user = "ann"
        celery_program.outer.delay(number)
        return "queued"

    with AuditAgent() as agent, worker(broker, agent, folder / "log", "gevent"):
        AuditFlask(agent.make_client(), web, user=lambda: flask.g.get("user"))
        with web.test_client().post(
            "/orders/5", headers={"User-Agent": "curl/8"}, environ_overrides={"REMOTE_ADDR": "192.0.2.9"}
        ):
            pass
        celery_program.order.delay(7)
        eventually(lambda: len(agent.records) >= 5, "the request and four tasks", timeout=90)
    later = agent.assert_received(caller_identities={"System": mock.ANY}).record
    assert later.custom_data.get("queued_by") is None, "the request is over"
    caused = [each for each in agent.records if each is not later]
    assert len(caused) == 4
    for record in caused:
        assert record.caller_identities == {USERNAME: [CallerIdentity("ann", "the application's user")]}
        assert str(record.caller_ip_address) == "192.0.2.9"
        assert record.caller_agent == "curl/8"
    assert Counter(each.custom_data.get("queued_by") for each in caused) == {
        None: 1,  # the request itself
        "POST /orders/<int:number>": 1,
        "celery_program.outer": 1,
        "celery_program.order": 1,
    }


@once
@needs_redis
def test_the_records_of_a_killed_process_come_from_its_spool(broker: str, folder: Path) -> None:
    (folder / "spools").mkdir()
    with AuditAgent() as agent:
        with worker(broker, agent, folder / "log", "prefork", TEST_SPOOL=str(folder / "spools")):
            celery_program.order.delay(1)
            agent.assert_received(operation_name="celery_program.order", timeout=90)
            agent.stop()
            celery_program.order.delay(2)
            celery_program.order.delay(3)
            celery_program.die.delay()
            celery_program.die.delay()  # both processes, and so the one that had the orders
            eventually(lambda: "Process 'ForkPoolWorker-" in (folder / "log").read_text(), "one has died", timeout=90)
            agent.start()
            eventually(lambda: len(agent.records) >= 5, "all are recorded", timeout=90)
        counts = Counter((each.operation_name, each.custom_data["state"]) for each in agent.records)
    ids = {each.custom_data["task_id"] for each in agent.records}
    assert len(ids) == 5
    assert counts["celery_program.order", "SUCCESS"] >= 3
    assert counts["celery_program.die", "FAILURE"] >= 2


@once
@needs_redis
@pytest.mark.parametrize("pool", ["prefork", "gevent", "threads"])
def test_a_worker_that_shuts_down_delivers_first(pool: str, broker: str, folder: Path) -> None:
    with AuditAgent() as agent, worker(broker, agent, folder / "log", pool) as process:
        celery_program.order.delay(0)
        agent.assert_received(operation_name="celery_program.order", timeout=90)
        agent.stall()
        for number in range(1, 21):
            celery_program.order.delay(number)
        log = folder / "log"
        eventually(lambda: log.read_text().count("succeeded in") == 21, "the tasks have run", timeout=90)
        process.terminate()
        gevent.sleep(0.2)
        assert process.poll() is None, "it waits for the agent"
        agent.resume()
        assert process.wait(60) == 0
    assert len(agent.records) == 21


# -- in this process ---------------------------------------------------------------------------------------------------


def nothing() -> None:
    pass


def one_more() -> int:
    return 1


class Kept(list[Record]):
    """The records that a client was given, and the client."""

    client: AuditClient

    def __call__(self, msg: Msg) -> Msg:
        self.append(msg.record)
        return msg

    def make_client(self) -> AuditClient:
        self.client = Client(NoOp, before_send=self)
        return self.client

    def only(self) -> Record:
        (record,) = self
        self.clear()
        return record


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def app(kept: Kept) -> Iterator[Any]:
    """Return an application that runs its tasks at once, in the caller."""
    app = celery.Celery("eager", set_as_current=False)
    app.conf.task_always_eager = True
    yield app
    audit = app.geventaudit
    audit._on_shutdown()
    for each in vars(celery.signals).values():
        if isinstance(each, celery.utils.dispatch.Signal):
            each.receivers = [
                (key, found) for key, found in each.receivers if getattr(found, "__self__", None) is not audit
            ]


def test_a_run_without_a_worker(app: Any, kept: Kept) -> None:
    audit = Audit(kept.make_client, app)

    @app.task(name="add")
    def add(a: str, b: str) -> str:
        return a + b

    assert add.delay("forty-", "two").get() == "forty-two"
    record = kept.only()
    assert record.operation_name == "add"
    assert record.operation_result is OperationResult.SUCCESS
    assert record.target_resources == {"Task": [TargetResource(record.custom_data["task_id"])]}
    assert record.caller_identities.keys() == {SYSTEM}
    assert record.custom_data["filled_unknown"] == ["OperationAccessLevel", "OperationCategories", "CallerAccessLevels"]
    assert "forty" not in str(record.custom_data.values())
    assert "arguments" not in record.custom_data
    assert audit is app.geventaudit
    assert audit.counts.recorded == 1
    assert audit.counts.lost == audit.counts.incomplete == 0


@pytest.mark.parametrize("propagates", [False, True])
def test_a_failure_does_not_repeat_the_arguments(propagates: bool, app: Any, kept: Kept) -> None:
    Audit(kept.make_client, app)
    app.conf.task_eager_propagates = propagates

    @app.task(name="find")
    def find(customer: dict[str, Any], number: int, *, token: str) -> None:
        raise LookupError(f"{customer['mail']} of {customer['names'][0]} is not {number}, 7 or {token=}")

    call: Callable[[], Any] = lambda: find.delay({"mail": "a@b.example", "names": ["Ann"]}, 4711, token="t0")  # noqa: E731
    if propagates:
        with pytest.raises(LookupError):
            call()
    else:
        call()
    record = kept.only()
    assert record.operation_result_description == (
        "LookupError: [redacted] of [redacted] is not [redacted], 7 or token=[redacted]"
    )


def test_arguments_are_recorded_if_asked_for(app: Any, kept: Kept) -> None:
    Audit(kept.make_client, app, arguments=True)

    @app.task(name="sign_in", bind=True)
    def sign_in(self: Any, user: str, password: str, **more: Any) -> None:
        raise ValueError(f"{user} must not use {password}")

    sign_in.delay("ann", "hunter22", ip={"v4": ["192.0.2.1"]}, none=None)
    record = kept.only()
    assert record.custom_data["arguments"] == {"user": "ann", "password": "[redacted]", "more.ip.v4.0": "192.0.2.1"}
    assert record.operation_result_description == "ValueError: ann must not use [redacted]"
    sign_in.apply(("ann",))  # which it does not take
    assert kept.only().custom_data["arguments"] == {"0": "ann"}


def test_templates_options_and_describe(app: Any, kept: Kept) -> None:
    def describe(request: Any, state: str, record: Record) -> Record | None:
        if "veto" in request.args:
            return None
        return record.replace(operation_name=f"{record.operation_name} {state} {request.id}")

    template = Record(operation_access_level="Owner", custom_data={"service": "shop"})
    audit = Audit(kept.make_client, app, audit_type=AuditType.DATA_PLANE, template=template, describe=describe)

    @app.task(name="drop", audit={"operation_type": OperationType.DELETE, "operation_categories": ["UserManagement"]})
    def drop(word: str = "") -> None:
        pass

    task_id = drop.delay().id
    record = kept.only()
    assert record.operation_name == f"drop SUCCESS {task_id}"
    assert record.operation_type is OperationType.DELETE
    assert record.operation_categories == [OperationCategory.USER_MANAGEMENT]
    assert record.operation_access_level == "Owner"
    assert record.custom_data["service"] == "shop"
    drop.delay("veto")
    assert kept == []
    assert audit.counts.vetoed == 1


def test_a_part_that_cannot_be_added_is_reported_and_the_rest_recorded(app: Any, kept: Kept) -> None:
    def describe(request: Any, state: str, record: Record) -> Any:
        record.custom_data["half"] = True  # type: ignore[index]
        return 1 // request.args[0]

    audit = Audit(kept.make_client, app, describe=describe)

    @app.task(name="one", audit={"operation_tpye": OperationType.DELETE})
    def one(number: int) -> None:
        pass

    one.apply_async((0,))
    assert "half" not in kept.only().custom_data
    assert audit.counts.recorded == 1
    assert audit.counts.incomplete == 2
    one.apply_async((1,), headers={HEADER: {"identities": {"Username": "ann"}}})
    assert kept.only().caller_identities.keys() == {CallerIdentityType.UNKNOWN}
    assert audit.counts.incomplete == 5


@pytest.mark.parametrize(
    "header",
    [
        "text",
        ["list"],
        7,
        {"identities": {"NoSuchType": [["a", "b"]]}},
        {"identities": [["a", "b"]]},
        {"identities": {"Username": [["a"]]}},
        {"access_levels": 7},
    ],
    ids=str,
)
def test_a_malformed_header_is_reported(header: Any, app: Any, kept: Kept) -> None:
    audit = Audit(kept.make_client, app)
    app.task(name="one")(nothing).apply_async(headers={HEADER: header})
    assert kept.only().caller_identities.keys() == {CallerIdentityType.UNKNOWN}
    assert audit.counts.incomplete == 1


def test_a_header_is_bounded_and_its_address_checked(app: Any, kept: Kept) -> None:
    audit = Audit(kept.make_client, app)
    header = {
        "address": "not an address",
        "agent": "x" * 5000,
        "identities": {"Username": [["ann\n", "x" * 5000]] * 100},
        "access_levels": ["a"] * 100,
        "queued_by": 7,
    }
    app.task(name="one")(nothing).apply_async(headers={HEADER: header})
    record = kept.only()
    assert str(record.caller_ip_address) == "192.0.0.8"
    assert record.caller_identities[USERNAME][0].identity == r"ann\n"
    assert len(record.caller_identities[USERNAME]) == 20
    assert len(record.caller_agent) < 2100
    assert record.custom_data["queued_by"] == "7"
    assert audit.counts.recorded == 1
    assert audit.counts.incomplete == 0


def test_excluded_tasks_have_no_record(app: Any, kept: Kept) -> None:
    audit = Audit(kept.make_client, app, exclude=["celery.*", "health.*"])
    app.task(name="health.check")(nothing).delay()
    app.task(name="quiet", audit=None)(nothing).delay()
    assert kept == []
    assert audit.counts.excluded == 2


def test_a_record_that_is_lost_fails_no_task(app: Any, kept: Kept, caplog: Any) -> None:
    def describe(request: Any, state: str, record: Record) -> Record:
        return record.replace(operation_result="no such result")

    audit = Audit(kept.make_client, app, describe=describe)
    assert app.task(name="one")(one_more).delay().get() == 1
    assert audit.counts.lost == 1
    eventually(lambda: "not recorded: OperationResult: must be one of" in caplog.text)


def test_without_a_client_tasks_run_and_records_are_counted_as_lost(app: Any, caplog: Any) -> None:
    clients: list[Any] = ["no client"]
    audit = Audit(clients.pop, app)
    one = app.task(name="one")(one_more)
    for _ in range(2):
        assert one.delay().get() == 1
    assert audit.counts.lost == 2
    assert "make_client must return a Client or a BaseClient, returned 'no client'" in caplog.text
    assert "pop from empty list" in caplog.text


def test_tasks_of_another_application_are_not_recorded(app: Any, kept: Kept) -> None:
    Audit(kept.make_client, app)
    other = celery.Celery("other", set_as_current=False)
    other.conf.task_always_eager = True
    other.task(name="other")(nothing).delay()
    assert kept == []


def test_a_nested_task_has_the_caller_of_the_outer_one(app: Any, kept: Kept) -> None:
    Audit(kept.make_client, app)
    inner = app.task(name="inner")(nothing)

    @app.task(name="outer")
    def outer() -> None:
        inner.delay()

    outer.apply_async(headers={HEADER: {"identities": {"UPN": [["ann@example.com", "of a token"]]}}})
    assert [each.operation_name for each in kept] == ["inner", "outer"]
    for record in kept:
        assert record.caller_identities == {CallerIdentityType.UPN: [CallerIdentity("ann@example.com", "of a token")]}
    assert kept[0].custom_data["queued_by"] == "outer"


def test_a_task_that_a_request_runs_at_once_has_its_caller(app: Any, kept: Kept) -> None:
    from geventaudit.integrations.wsgi import AuditMiddleware, facts_of

    Audit(kept.make_client, app)
    task = app.task(name="one")(nothing)

    def view(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        facts = facts_of(environ)
        assert facts is not None
        facts.user = "ann"
        task.delay()
        start_response("200 OK", [])
        return []

    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/orders", "REMOTE_ADDR": "192.0.2.9"}
    with Client(NoOp) as client:
        AuditMiddleware(view, client)(environ, lambda *_: None).close()  # type: ignore
    record = kept.only()
    assert record.caller_identities == {USERNAME: [CallerIdentity("ann", "the application's user")]}
    assert record.caller_ip_address == "192.0.2.9"
    assert record.custom_data["queued_by"] == "POST /orders"
    task.delay()
    assert kept.only().caller_identities.keys() == {SYSTEM}, "the request is over"


def test_ends_by_exceptions_of_celery(app: Any, kept: Kept) -> None:
    Audit(kept.make_client, app)

    @app.task(name="end")
    def end(error: Exception) -> None:
        raise error

    for error, state, text in (
        (Reject(), "REJECTED", "Reject: None"),
        (Reject("why\n"), "REJECTED", r"Reject: why\n"),
        (Ignore(), "IGNORED", "the task raised Ignore"),
        (ValueError(), "FAILURE", "ValueError"),
    ):
        end.apply((error,))
        record = kept.only()
        assert (record.custom_data["state"], record.operation_result_description) == (state, text)


def test_invalid_arguments_are_refused_at_once(kept: Kept) -> None:
    app = celery.Celery("refused", set_as_current=False)
    for error, pattern, arguments, options in (
        (TypeError, "each process needs its own client", (Client(NoOp), app), {}),
        (TypeError, "make_client must be a function", (7, app), {}),
        (TypeError, "app must be a Celery application, got 'app'", (kept.make_client, "app"), {}),
        (TypeError, "template must be a Record", (kept.make_client, app), {"template": {}}),
        (TypeError, "describe must be a function of", (kept.make_client, app), {"describe": lambda: None}),
        (TypeError, "redact must be a function of", (kept.make_client, app), {"redact": lambda: None}),
        (TypeError, "exclude must be a list", (kept.make_client, app), {"exclude": "celery.*"}),
        (TypeError, "arguments must be True or False", (kept.make_client, app), {"arguments": 1}),
        (ValueError, "audit_type must be", (kept.make_client, app), {"audit_type": AuditType.HEARTBEAT}),
        (ValueError, "close_timeout must be 0 seconds or more", (kept.make_client, app), {"close_timeout": -1}),
        (ValueError, "close_timeout must be 0 seconds or more", (kept.make_client, app), {"close_timeout": None}),
    ):
        with pytest.raises(error, match=pattern):
            Audit(*arguments, **options)
    with pytest.raises(RuntimeError, match="is audited already"):
        Audit(kept.make_client, celery_program.app)
