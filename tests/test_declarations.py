"""Declarations of views: ``audited`` and ``unaudited`` wherever they stand, and the defaults of an application."""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gevent
import pytest
from gevent import subprocess
from helpers import import_old, once
from test_wsgi import call

from geventaudit import (
    AuditType,
    Client,
    Msg,
    NoOp,
    NotificationKind,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from geventaudit.integrations.http.current import current_record
from geventaudit.integrations.http.tracing import identifiers_of
from geventaudit.integrations.wsgi import AuditMiddleware, RequestCounts, audited, facts_of, unaudited

flask = pytest.importorskip("flask", reason="needs flask, which the extra [test] brings")

from flask.views import MethodView, View  # noqa: E402
from werkzeug.middleware.dispatcher import DispatcherMiddleware  # noqa: E402
from werkzeug.test import Client as Browser  # noqa: E402
from werkzeug.test import run_wsgi_app  # noqa: E402

from geventaudit.integrations.flask import Audit  # noqa: E402

KEYS, RESOURCES = OperationCategory.KEY_MANAGEMENT, OperationCategory.RESOURCE_MANAGEMENT
FAILURE, SUCCESS = OperationResult.FAILURE, OperationResult.SUCCESS


class Trail(list[Msg]):
    """A Flask application and the messages of its requests."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.client = Client(NoOp, before_send=self.keep)
        self.app = flask.Flask("app")
        Audit(self.client, self.app, **options)

    def keep(self, msg: Msg) -> Msg:
        self.append(msg)
        return msg

    def ask(self, path: str, method: str = "GET", **options: Any) -> Record:
        self.clear()
        self.app.test_client().open(path, method=method, buffered=True, **options)
        (msg,) = self
        return msg.record

    def name(self, path: str, method: str = "GET") -> str:
        return self.ask(path, method).operation_name

    @property
    def counts(self) -> RequestCounts:
        counts: RequestCounts = self.app.extensions["geventaudit"].counts
        return counts


@contextmanager
def flasked(**options: Any) -> Iterator[Trail]:
    trail = Trail(**options)
    with trail.client:
        yield trail


@contextmanager
def around(app: Any, **options: Any) -> Iterator[tuple[Any, list[Msg]]]:
    kept: list[Msg] = []
    with Client(NoOp, before_send=lambda msg: kept.append(msg) or msg) as client:  # type: ignore[func-returns-value]
        yield AuditMiddleware(app, client, **options), kept


def done(**_: Any) -> str:
    return "done"


# -- Flask -------------------------------------------------------------------------------------------------------------


def test_a_declared_view_and_its_defaults() -> None:
    with flasked(
        category=RESOURCES,
        access_level="Contributor",
        caller_access_levels=lambda environ: flask.g.roles,
        target={"Service": "vault"},
        audit_type=AuditType.DATA_PLANE,
    ) as trail:

        @trail.app.before_request
        def sign_in() -> None:
            flask.g.roles = {"Writer", "Administrator"}

        @trail.app.post("/keys/<name>/rotate/<int:version>")
        @audited(
            "RotateKey",
            category=[KEYS, OperationCategory.OTHER],
            category_description="billing",
            type=OperationType.UPDATE,
            audit_type=AuditType.CONTROL_PLANE,
            access_level="Administrator",
            target={"Key": "{name}", "Version": ["{name}@{version}"]},
        )
        def rotate(name: str, version: int) -> str:
            """Rotate."""
            return f"{name} {version}"

        trail.app.get("/plain")(lambda: "x")
        trail.app.get("/part")(audited("Part")(done))
        headers = {
            "X-Request-Id": "r-1",
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        }
        record = trail.ask("/keys/a/rotate/7", "POST", headers=headers)
        assert trail[0].type == AuditType.CONTROL_PLANE
        assert record.operation_name == "RotateKey"
        assert record.operation_categories == (KEYS, OperationCategory.OTHER)
        assert record.operation_category_description == "billing"
        assert record.operation_type == OperationType.UPDATE
        assert record.operation_access_level == "Administrator"
        assert set(record.caller_access_levels) == {"Administrator", "Writer"}
        assert record.target_resources == {
            "Key": [TargetResource("a")],
            "Version": [TargetResource("a@7")],
            "Path": [TargetResource("/keys/a/rotate/7")],
        }
        assert record.custom_data["route"] == "POST /keys/<name>/rotate/<int:version>"
        assert record.custom_data["request_id"] == "r-1"
        assert record.custom_data["traceparent"] == headers["traceparent"]
        assert record.custom_data["status"] == 200
        assert record.custom_data["filled_unknown"] == ["CallerIpAddress", "CallerIdentities"]
        assert (rotate.__name__, rotate.__doc__) == ("rotate", "Rotate.")

        plain = trail.ask("/plain")
        assert trail[0].type == AuditType.DATA_PLANE
        assert (plain.operation_name, plain.operation_categories) == ("GET /plain", (RESOURCES,))
        assert plain.target_resources == {"Service": [TargetResource("vault")], "Path": [TargetResource("/plain")]}
        assert "route" not in plain.custom_data
        part = trail.ask("/part")
        assert (part.operation_name, part.operation_categories) == ("Part", (RESOURCES,))
        assert (part.operation_type, part.operation_access_level) == (OperationType.READ, "Contributor")
        for path, method, status in (("/nowhere", "GET", 404), ("/plain", "DELETE", 405)):
            refused = trail.ask(path, method)
            assert (refused.operation_name, refused.operation_result) == (f"{method} {path}", FAILURE)
            assert (refused.operation_categories, refused.custom_data["status"]) == ((RESOURCES,), status)
            assert refused.custom_data["filled_unknown"] == ["CallerIpAddress", "CallerIdentities"]
        assert trail.counts == RequestCounts(recorded=5)


def wrapped(view: Any) -> Any:
    @functools.wraps(view)
    def around_it(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return around_it


def hidden(view: Any) -> Any:
    def around_it(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return around_it


def test_wherever_the_decorator_stands() -> None:
    with flasked() as trail:
        app = trail.app

        @app.get("/below")
        @audited("Below")
        def below() -> str:
            return "x"

        @audited("Above")
        @app.get("/above")
        def above() -> str:
            return "x"

        @app.get("/nested")
        @wrapped
        @wrapped
        @audited("Nested")
        @wrapped
        def nested() -> str:
            return "x"

        @app.get("/hidden")
        @hidden
        @audited("Hidden")
        def without_wraps() -> str:
            return "x"

        @app.get("/twice")
        @audited("Outer")
        @audited("Inner", access_level="Inner")
        def twice() -> str:
            return "x"

        app.add_url_rule("/partial", "partial", functools.partial(audited("Partial")(done), x=1))
        for name in ("below", "above", "nested", "hidden", "partial"):
            assert trail.name(f"/{name}") == name.capitalize()
        assert trail.name("/twice") == "Outer"
        assert above() == "x"


def test_parameters_are_those_of_the_view() -> None:
    """Pyramid calls a view with one argument or with two, by its parameters; others read annotations."""

    def one(request: int) -> str:
        return "x"

    def two(context: Any, request: Any, *, key: int = 5) -> str:
        return "x"

    assert inspect.getfullargspec(audited("A")(one)).args == ["request"]
    assert inspect.getfullargspec(audited("B")(audited("A")(two))).args == ["context", "request"]
    assert inspect.signature(audited("A")(one)) == inspect.signature(one)
    assert inspect.signature(unaudited(wrapped(two))) == inspect.signature(two)
    assert inspect.getfullargspec(audited("A")(wrapped(one))).varargs == "args", "as without the decorator"
    two.__signature__ = 5  # type: ignore[attr-defined]  # such as annotations that Python 3.14 cannot evaluate
    assert str(inspect.signature(audited("A")(two))) == "(context, request, *, key=5)"


def test_a_request_that_is_refused_before_the_view_is_the_views_operation() -> None:
    with flasked() as trail:
        trail.app.before_request(lambda: flask.abort(401, "who are you?"))
        trail.app.post("/keys")(audited("MakeKey", category=KEYS)(done))
        record = trail.ask("/keys", "POST")
        assert (record.operation_name, record.operation_result) == ("MakeKey", FAILURE)
        assert record.operation_result_description == "401 UNAUTHORIZED; who are you?"


def test_views_that_raise_and_stream() -> None:
    with flasked(category=RESOURCES) as trail:

        @trail.app.get("/broken")
        @audited("Break", category=KEYS)
        def broken() -> str:
            raise KeyError("x")

        @trail.app.get("/stream")
        @audited("Stream", category=KEYS)
        def stream() -> Iterator[str]:
            yield "a"
            assert not len(trail), "the record comes at the end"
            yield "b"

        record = trail.ask("/broken")
        assert (record.operation_name, record.operation_result) == ("Break", FAILURE)
        assert "KeyError" in record.operation_result_description
        assert trail.ask("/stream").operation_name == "Stream"


def test_class_based_views_of_flask() -> None:
    with flasked() as trail:
        app = trail.app

        class Mixed(MethodView):
            def get(self) -> str:
                return "x"

            @audited("RotateKey", category=KEYS)
            def post(self) -> str:
                return "x"

        @audited("ManageKeys", category=KEYS, access_level="Reader")
        class Whole(MethodView):
            def get(self) -> str:
                return "x"

            @audited("DeleteKey", access_level="Administrator")
            def delete(self) -> str:
                return "x"

            @unaudited
            def patch(self) -> str:
                return "x"

        class Inherits(Whole):
            pass

        class Listed(View):
            methods = ("GET", "POST")
            decorators = (wrapped, audited("ListKeys"), wrapped)

            def dispatch_request(self) -> str:
                return "x"

        class Dispatch(View):
            @audited("Dispatch")
            def dispatch_request(self) -> str:
                return "x"

        for kind in (Mixed, Whole, Inherits, Listed, Dispatch):
            app.add_url_rule(f"/{kind.__name__}", view_func=kind.as_view(kind.__name__))
        app.add_url_rule("/function", view_func=audited("Function")(Mixed.as_view("function")))
        assert trail.name("/Mixed") == "GET /Mixed"
        assert trail.name("/Mixed", "HEAD") == "HEAD /Mixed"
        assert trail.ask("/Mixed", "POST").operation_name == "RotateKey"
        assert trail.name("/Mixed", "OPTIONS") == "OPTIONS /Mixed"
        assert trail.name("/Mixed", "DELETE") == "DELETE /Mixed", "405 has no view"
        assert trail.name("/Whole") == trail.name("/Whole", "HEAD") == "ManageKeys"
        delete = trail.ask("/Whole", "DELETE")
        assert (delete.operation_name, delete.operation_access_level) == ("DeleteKey", "Administrator")
        assert delete.operation_categories == (KEYS,), "the class's"
        options = trail.ask("/Whole", "OPTIONS")
        assert (options.operation_name, options.operation_type) == ("OPTIONS /Whole", OperationType.READ)
        assert options.operation_categories == (KEYS,)
        trail.app.test_client().patch("/Whole", buffered=True)
        assert trail.counts.excluded == 1
        assert trail.name("/Inherits") == "GET /Inherits", "a subclass declares its own operation"
        assert trail.name("/Inherits", "DELETE") == "DeleteKey", "the method is the same"
        assert trail.name("/Listed", "POST") == "ListKeys"
        assert trail.name("/Dispatch") == "Dispatch"
        assert trail.name("/function") == "Function"
        assert trail.name("/function", "POST") == "RotateKey"


def test_one_view_in_several_blueprints() -> None:
    with flasked() as trail:

        def view(number: int = 0) -> str:
            return "x"

        for name, decorated in (("a", audited("A")(view)), ("b", audited("B")(view)), ("c", unaudited(view))):
            blueprint = flask.Blueprint(name, name, url_prefix=f"/{name}")
            blueprint.add_url_rule("/<int:number>", "view", decorated)
            trail.app.register_blueprint(blueprint)
        trail.app.add_url_rule("/plain", "plain", view)
        assert trail.name("/a/1") == "A"
        assert trail.name("/b/1") == "B"
        trail.app.test_client().get("/c/1", buffered=True)
        assert trail.counts.excluded == 1
        assert trail.name("/plain") == "GET /plain", "ambiguous, so on record without a declaration"


def test_an_unaudited_view_is_not_recorded_however_it_ends() -> None:
    with flasked() as trail:
        app = trail.app

        @app.get("/well")
        @unaudited
        def well() -> str:
            return "well"

        @unaudited
        @app.get("/above")
        def above() -> str:
            raise RuntimeError

        app.get("/calls")(lambda: well())
        browser = app.test_client()
        assert browser.get("/well", buffered=True).data == b"well"
        browser.get("/above", buffered=True)
        assert not trail
        assert trail.counts == RequestCounts(excluded=2)
        assert trail.name("/calls") == "GET /calls", "the view that was asked for is on record"
        assert trail.name("/well", "DELETE") == "DELETE /well"


def test_a_view_that_calls_another_is_the_first() -> None:
    with flasked() as trail:
        inner = audited("Inner")(done)
        trail.app.get("/outer")(audited("Outer")(lambda: inner()))
        assert trail.name("/outer") == "Outer"


def test_mounted_applications() -> None:
    """The record is that of the middleware outside, with the declarations and routes of the application inside."""
    inner = Trail()
    inner.app.get("/keys/<name>")(audited("ReadKey", target={"Key": "{name}"})(done))
    mounts = DispatcherMiddleware(lambda environ, start: [], {"/v1": inner.app})
    with inner.client, around(mounts, category=KEYS) as (app, kept):
        Browser(app).get("/v1/keys/a", buffered=True)
        (msg,) = kept
        assert msg.record.operation_name == "ReadKey"
        assert msg.record.custom_data["route"] == "GET /v1/keys/<name>"
        assert msg.record.target_resources["Key"] == [TargetResource("a")]
        assert not inner


def test_records_agree_with_the_list_of_routes() -> None:
    from geventaudit.integrations.http.routes import NO_ROUTE, applications_in, routes_in

    with flasked(category=RESOURCES, access_level="Reader", target={"Service": "vault"}) as trail:

        @audited("ManageKeys", category=KEYS)
        class Keys(MethodView):
            def get(self, name: str) -> str:
                return name

            @audited("RotateKey", access_level="Owner", audit_type=AuditType.DATA_PLANE, target={"Key": "{name}"})
            def post(self, name: str) -> str:
                return name

        app = trail.app
        app.add_url_rule("/keys/<name>", view_func=Keys.as_view("keys"))
        app.add_url_rule("/plain/<name>", view_func=lambda name: name, endpoint="plain", methods=["GET", "DELETE"])
        app.add_url_rule(
            "/above", view_func=wrapped(audited("Above", type=OperationType.UPDATE)(done)), endpoint="above"
        )
        listed = [route for route in routes_in(applications_in(app)) if not route.path.startswith("/static")]
        assert len(listed) == 6
        for route in listed:
            method = "GET" if route.method == "*" else route.method
            record = trail.ask("/nowhere" if route.path == NO_ROUTE else route.path.replace("<name>", "db"), method)
            operation = route.operation.replace("<method> <path>", "GET /nowhere")
            assert record.operation_name == operation
            assert list(record.operation_categories) == route.categories
            assert record.operation_access_level == route.access_level
            assert record.operation_type == ("Read" if route.method == "*" else route.type)
            assert trail[0].type == {"ControlPlane": "AsmAuditCP", "DataPlane": "AsmAuditDP"}[route.audit_type]
            targets = {f"{kind}/{each.name}" for kind, group in record.target_resources.items() for each in group}
            assert {each.replace("{name}", "db") for each in route.target} < targets
            unknown = set(record.custom_data["filled_unknown"]) - {"CallerIpAddress"}
            assert unknown == set(route.unknown) == {"CallerAccessLevels", "CallerIdentities"}


# -- the caller's access levels ----------------------------------------------------------------------------------------


class Role(enum.StrEnum):
    READER = "Reader"


@pytest.mark.parametrize(
    ("given", "levels"),
    [
        ("Reader", ["Reader"]),
        (["b", "a"], ["b", "a"]),
        (("a", ""), ["a"]),
        (iter(["a"]), ["a"]),
        (Role, ["Reader"]),
        ([Role.READER, 5, None], ["Reader", "5"]),
        ({"a": 1}, ["a"]),
        (["a\r\nb"], [r"a\r\nb"]),
        (None, ["Unknown"]),
        ([], ["Unknown"]),
    ],
)
def test_levels_that_an_application_gives(given: Any, levels: list[str]) -> None:
    with flasked(caller_access_levels=lambda environ: given) as trail:
        trail.app.get("/")(lambda: "x")
        assert list(trail.ask("/").caller_access_levels) == levels
        assert trail.counts == RequestCounts(recorded=1)


def divide(environ: Any) -> Any:
    return 1 // 0


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        (divide, "ZeroDivisionError"),
        (lambda environ: 5, "TypeError: caller_access_levels must be texts, got 5"),
        (lambda environ: b"Reader", "TypeError: caller_access_levels must be texts"),
        (lambda environ: itertools.count(), "ValueError: a caller has at most 100"),
        (lambda environ: (divide(environ) for _ in range(2)), "ZeroDivisionError"),
    ],
)
def test_a_levels_hook_that_fails_costs_its_own_part_only(hook: Any, problem: str) -> None:
    with flasked(caller_access_levels=hook, user=lambda: "ann") as trail:
        trail.app.get("/")(lambda: "x")
        channel = trail.client.notify()
        reading = gevent.spawn(lambda: [trail.client.flush(5), [channel.get(timeout=5) for _ in range(1)]][1])
        assert trail.ask("/").operation_result == SUCCESS
        assert list(trail[0].record.caller_access_levels) == ["Unknown"]
        assert trail.counts == RequestCounts(recorded=1, incomplete=1)
        (notification,) = reading.get()
        assert notification.kind == NotificationKind.INCOMPLETE
        assert "recorded without the caller's access levels" in str(notification)
        assert problem in str(notification)


def test_an_application_is_asked_once_while_the_request_is_open() -> None:
    """For levels and for a target: after that, a question to a database would open another connection."""
    asked: list[str] = []
    is_open: list[bool] = []

    def target(environ: Any) -> dict[str, str]:
        is_open.append(bool(flask.g.get("database")))
        return {"Path of Flask": flask.request.path}

    def levels(environ: Any) -> str:
        asked.append(flask.request.path)
        is_open.append(bool(flask.g.get("database")))
        return str(flask.g.get("role", "Anonymous"))

    with flasked(caller_access_levels=levels, target=target) as trail:
        app = trail.app

        @app.before_request
        def begin() -> None:
            flask.g.database, flask.g.role = True, "Reader"

        @app.teardown_request
        def end(error: BaseException | None) -> None:
            flask.g.pop("database", None)

        @app.get("/copies")
        def copies() -> str:
            gevent.spawn(flask.copy_current_request_context(lambda: None)).join()
            return "x"

        @app.get("/broken")
        def broken() -> str:
            raise RuntimeError

        app.get("/timeout")(lambda: (_ for _ in ()).throw(gevent.Timeout(1)))
        for path in ("/copies", "/broken", "/nowhere"):
            record = trail.ask(path)
            assert list(record.caller_access_levels) == ["Reader"]
            assert record.target_resources["Path of Flask"] == [TargetResource(path)]
            assert (asked, is_open) == ([path], [True, True])
            del asked[:], is_open[:]
        with pytest.raises(gevent.Timeout):
            trail.ask("/timeout")
        assert asked == ["/timeout"]
        assert trail.counts == RequestCounts(recorded=4)


def test_a_request_that_queues_a_task_hands_its_levels_on() -> None:
    """The task gets the levels of that moment; the record has those of the end."""
    fails = False

    def levels(environ: Any) -> str:
        return str(flask.g.role if not fails else 1 // 0)

    with flasked(caller_access_levels=levels, category=KEYS) as trail:

        @trail.app.get("/")
        @audited("Queue")
        def queue() -> str:
            nonlocal fails
            flask.g.role = "Anonymous"
            handed_on = [current_record()]
            flask.g.role = "Reader"
            handed_on.append(current_record())
            fails = flask.request.args.get("fails") == "1"
            handed_on.append(current_record())
            fails = False
            return " ".join(each.caller_access_levels[0] for each in handed_on if each.caller_access_levels)  # type: ignore[index, union-attr]

        answered = trail.app.test_client().get("/", buffered=True)
        assert answered.text == "Anonymous Reader Reader"
        assert list(trail[0].record.caller_access_levels) == ["Reader"]
        assert trail.counts == RequestCounts(recorded=1)
        assert trail.app.test_client().get("/?fails=1", buffered=True).text == "Anonymous Reader"
        assert trail.counts == RequestCounts(recorded=2, incomplete=1)


@pytest.mark.parametrize("is_mounted", [True, False])
@pytest.mark.parametrize("copies", [True, False])
def test_parts_of_a_batch_are_on_record_as_themselves(copies: bool, is_mounted: bool) -> None:
    """A view that answers several requests in one calls its own application, mostly with a copy of the environment."""
    parts = (("DELETE", "/users/ada"), ("GET", "/health"), ("GET", "/things/7"), ("GET", "/nowhere"))
    with flasked() as trail:

        @trail.app.post("/batch")
        @audited("Batch")
        def batch() -> str:
            environ, texts = dict(flask.request.environ), []
            for method, path in parts:
                part = {**environ, "REQUEST_METHOD": method, "PATH_INFO": path}
                if not copies:
                    part = flask.request.environ
                    part.update(REQUEST_METHOD=method, PATH_INFO=path)
                    part.pop("werkzeug.request", None)
                texts.append(b"".join(run_wsgi_app(trail.app.wsgi_app, part, buffered=True)[0]))
            flask.request.environ.update(environ)
            return b" ".join(texts).decode()

        trail.app.delete("/users/<name>")(audited("DeleteUser", target={"User": "{name}"})(lambda name: "deleted"))
        trail.app.get("/health", endpoint="health")(unaudited(lambda: "well"))
        trail.app.get("/things/<number>", endpoint="thing")(lambda number: "thing")
        served = AuditMiddleware(trail.app.wsgi_app, trail.client) if is_mounted else trail.app.wsgi_app
        answer = Browser(served).post("/batch", buffered=True)
        assert answer.data.startswith(b"deleted well thing ")
        found = [(msg.record.operation_name, msg.record.target_resources["Path"][0].name) for msg in trail]
        assert found == [
            ("DeleteUser", "/users/ada"),
            ("GET /things/<number>", "/things/7"),
            ("GET /nowhere", "/nowhere"),
            ("Batch", "/batch"),
        ]
        assert trail[3].record.operation_result is OperationResult.SUCCESS
        assert trail.counts == RequestCounts(recorded=3 if is_mounted else 4, excluded=1)


# -- targets and redaction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"Key": "{name}"}, {"Key": [TargetResource("db")]}),
        ({"Key": "vault/{name}/{version}"}, {"Key": [TargetResource("vault/db/7")]}),
        (lambda environ: {"Key": flask.request.args["q"]}, {"Key": [TargetResource("asked")]}),
        (lambda environ: {"Key": ("a", TargetResource("b", region="eu"))}, {
            "Key": [TargetResource("a"), TargetResource("b", region="eu")]
        }),
        (lambda environ: {"Number": 7}, {"Number": [TargetResource("7")]}),
        (lambda environ: {"Key": facts_of(environ).arguments["name"]}, {"Key": [TargetResource("db")]}),  # type: ignore[union-attr]
        (lambda environ: {}, {}),
    ],
)  # fmt: skip
def test_targets(target: Any, expected: Any) -> None:
    with flasked() as trail:
        trail.app.get("/keys/<name>/<int:version>")(audited("ReadKey", target=target)(done))
        resources = dict(trail.ask("/keys/db/7?q=asked").target_resources)
        assert resources.pop("Path") == [TargetResource("/keys/db/7")]
        assert resources == expected
        assert trail.counts == RequestCounts(recorded=1)


def test_all_texts_of_a_target_are_redacted() -> None:
    def target(environ: Any) -> Any:
        return {"Key": [TargetResource("ada", "ada's", "at ada", "near ada")]}

    with flasked() as trail:
        view = audited("ReadKey", target=target, redact=lambda name, text: text if name == "path" else text[:2])
        trail.app.get("/keys/<person>")(view(done))
        assert trail.ask("/keys/ada").target_resources["Key"] == [TargetResource("ad", "ad", "at", "ne")]


@pytest.mark.parametrize(
    "target",
    [
        *(divide, lambda environ: 5, lambda environ: None, {"Key": "{nam}"}),
        *(lambda environ: {"Key": iter([1, divide])}, lambda environ: {"Key": itertools.count()}),
        *(lambda environ: {" ": "x"}, lambda environ: {f"Key{number}": [] for number in range(20_000)}),
        lambda environ: {"Key": TargetResource(1, 2, 3, "\ud800")},  # type: ignore[arg-type]
    ],
)
def test_a_target_that_fails_costs_its_own_part_only(target: Any) -> None:
    with flasked() as trail:
        trail.app.get("/keys/<name>")(audited("ReadKey", category=KEYS, target=target)(done))
        record = trail.ask("/keys/db")
        assert (record.operation_name, record.operation_result) == ("ReadKey", SUCCESS)
        assert record.target_resources["Path"] == [TargetResource("/keys/db")]
        assert trail.counts.recorded == 1


def test_secrets_and_the_redaction_of_a_view() -> None:
    with flasked(redact=lambda name, text: text) as trail:
        trail.app.get("/reset/<token>/<who>")(
            audited("Reset", target={"Reset": "{token}"}, redact=lambda name, text: "-" if name == "token" else text)(
                done
            )
        )
        trail.app.get("/open/<token>", endpoint="open")(audited("Open", target=lambda environ: {"T": "x"})(done))
        record = trail.ask("/reset/abcdef/ann")
        assert record.target_resources == {"Reset": [TargetResource("-")], "Path": [TargetResource("/reset/-/ann")]}
        assert record.custom_data["arguments"] == {"token": "-", "who": "ann"}
        assert trail.ask("/open/abcdef").custom_data["arguments"] == {"token": "abcdef"}
    with flasked() as trail:
        trail.app.get("/open/<token>")(audited("Open", target=lambda environ: {"T": "x/abcdef"})(done))
        assert trail.ask("/open/abcdef").target_resources["T"] == [TargetResource("x/[redacted]")]


# -- arguments that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: audited(done), r'write @audited\("RotateKey"\), got <function done'),  # type: ignore[arg-type]
        (lambda: audited(" "), "operation must be a name"),
        (lambda: audited("a\nb"), "operation must be a name of printable characters"),
        (lambda: audited("A", category=5), "category must be an OperationCategory or several, got 5"),  # type: ignore[arg-type]
        (lambda: audited("A", category="Keys"), "category must be one of OperationCategory.UNKNOWN, .*, got 'Keys'"),  # type: ignore[arg-type]
        (lambda: audited("A", category=[]), "at least one"),
        (lambda: audited("A", category=OperationCategory.OTHER), "category_description must say"),
        (lambda: audited("A", category_description="x"), "category_description goes with"),
        (lambda: audited("A", type="Make"), "type must be one of OperationType.UNKNOWN"),  # type: ignore[arg-type]
        (lambda: audited("A", audit_type=AuditType.HEARTBEAT), "audit_type must be AuditType.CONTROL_PLANE or"),
        (lambda: audited("A", access_level=None), "access_level must be text, got None"),  # type: ignore[arg-type]
        (lambda: audited("A", redact=lambda text: text), r"redact must be a function of \(name, text\)"),  # type: ignore[arg-type, misc]
        (lambda: audited("A", target=lambda: None), r"target must be a function of \(environ\)"),  # type: ignore[arg-type, misc]
        (lambda: audited("A", target="Key"), "target must be a mapping like"),  # type: ignore[arg-type]
        (lambda: audited("A", target={}), "target must be a mapping like"),
        (lambda: audited("A", access_level="\ud800"), "access_level must be text that UTF-8 can write"),
        (lambda: audited("A", target={"Key": "\ud800"}), "target must be text that UTF-8 can write"),
        (lambda: audited("A", target={"\ud800": "x"}), "target must be text that UTF-8 can write"),
        (lambda: audited("A", target={"Key": 5}), "target must have texts"),  # type: ignore[dict-item]
        (lambda: audited("A", target={"Key": " "}), "target must have texts"),
        (lambda: audited("A", target={"Key": "{name.x}"}), "target must name the route's arguments as in {name}"),
        (lambda: audited("A", target={"Key": "{}"}), "target must name the route's arguments"),
        (lambda: audited("A")(5), "@audited decorates views, got 5"),  # type: ignore[type-var]
        (lambda: unaudited(staticmethod(done)), "@unaudited decorates views"),
        (lambda: unaudited("x"), "@unaudited decorates views, got 'x'"),  # type: ignore[type-var]
    ],
)
def test_declarations_that_cannot_be(make: Callable[[], Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        make()


async def asynchronous() -> str:
    return "x"


async def asynchronous_stream() -> Any:
    yield "x"


class Callable1:
    async def __call__(self) -> str:
        return "x"


class AsyncView(MethodView):
    async def get(self) -> str:
        return "x"


@pytest.mark.parametrize("decorate", [audited("A"), unaudited])
@pytest.mark.parametrize(
    "view",
    [asynchronous, asynchronous_stream, functools.partial(asynchronous), Callable1(), AsyncView, AsyncView().get],
)
def test_asynchronous_views_are_refused(decorate: Any, view: Any) -> None:
    with pytest.raises(TypeError, match="is asynchronous: asyncio is out of scope"):
        decorate(view)


def test_a_function_that_django_marks_as_asynchronous_is_refused() -> None:
    sync = pytest.importorskip("asgiref.sync", reason="needs django, which the extra [test] brings")
    with pytest.raises(TypeError, match="is asynchronous"):
        audited("A")(sync.markcoroutinefunction(lambda request: None))
    assert audited("A")(mock.Mock(return_value="x"))() == "x"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"category": "Keys"}, "category must be one of"),
        ({"category": OperationCategory.OTHER}, "category_description must say"),
        (
            {"caller_access_levels": ["Reader"]},
            r"caller_access_levels must be a function of \(environ\), got \['Reader'\]",
        ),
        ({"caller_access_levels": lambda: None}, r"caller_access_levels must be a function of \(environ\)"),
        ({"target": 5}, "target must be a mapping"),
    ],
)
def test_defaults_that_cannot_be(options: dict[str, Any], problem: str) -> None:
    with Client(NoOp) as client, pytest.raises((TypeError, ValueError), match=problem):
        AuditMiddleware(done, client, **options)  # type: ignore[arg-type]


# -- WSGI, Falcon, Bottle, Pyramid -------------------------------------------------------------------------------------

ROTATE = audited("RotateKey", category=KEYS, target={"Key": "{name}"})


def saying(set_facts: Callable[[Any], object]) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        set_facts(facts_of(environ))
        start_response("200 OK", [])
        return [b"x"]

    return app


def test_an_application_without_a_framework_declares_by_its_facts() -> None:
    def rotate(facts: Any) -> None:
        facts.declaration = ROTATE
        facts.route, facts.arguments = "/keys/{name}", {"name": "db"}
        facts.caller_access_levels = ["Administrator"]

    with around(saying(rotate), caller_access_levels=divide) as (app, kept):
        call(app, "/keys/db", "POST")
        record = kept[0].record
        assert (record.operation_name, record.operation_categories) == ("RotateKey", (KEYS,))
        assert record.target_resources["Key"] == [TargetResource("db")]
        assert record.custom_data["route"] == "POST /keys/{name}"
        assert list(record.caller_access_levels) == ["Administrator"]
        assert app.counts == RequestCounts(recorded=1)


@pytest.mark.parametrize(("name", "value"), [("declaration", "RotateKey"), ("caller_access_levels", 5)])
def test_facts_that_are_none_cost_their_own_part_only(name: str, value: Any) -> None:
    with around(saying(lambda facts: setattr(facts, name, value))) as (app, kept):
        call(app)
        assert kept[0].record.operation_name == "GET /things/7"
        assert app.counts == RequestCounts(recorded=1, incomplete=1)


def test_an_application_that_wants_no_record() -> None:
    with around(saying(lambda facts: setattr(facts, "is_unaudited", True))) as (app, kept):
        assert call(app) == ("200 OK", b"x")
        assert not kept
        assert app.counts == RequestCounts(excluded=1)


def test_a_wsgi_application_is_decorated() -> None:
    """By the request of its own greenlet, and of none when it is over."""
    plain = saying(lambda facts: gevent.sleep(0))
    mounts = DispatcherMiddleware(plain, {"/a": audited("A")(plain), "/b": audited("B")(plain)})
    with around(mounts) as (app, kept):
        gevent.joinall([gevent.spawn(call, app, path) for path in ("/a/1", "/b/1", "/c/1") * 5], raise_error=True)
        names = sorted(msg.record.operation_name for msg in kept)
        assert names == ["A"] * 5 + ["B"] * 5 + ["GET /c/1"] * 5
        audited("Outside")(lambda: None)()


def test_falcon_bottle_and_pyramid() -> None:
    bottle = pytest.importorskip("bottle", reason="needs bottle, which the extra [test] brings")
    bottled = bottle.Bottle()
    bottled.get("/keys/<name>")(audited("ReadKey", target={"Key": "{name}"})(done))
    bottled.get("/asked/<name>")(audited("Asked", target=lambda environ: facts_of(environ).arguments)(done))  # type: ignore[union-attr]
    bottled.get("/well")(unaudited(done))
    bottled.get("/refused")(audited("Refused")(hidden(lambda: bottle.abort(401, "no"))))
    with around(bottled, caller_access_levels=lambda environ: "Reader") as (app, kept):
        for path in ("/keys/db", "/asked/db", "/well", "/refused", "/nowhere"):
            call(app, path)
        assert [msg.record.operation_name for msg in kept] == ["ReadKey", "Asked", "Refused", "GET /nowhere"]
        assert kept[0].record.target_resources["Key"] == [TargetResource("db")]
        assert kept[1].record.target_resources["name"] == [TargetResource("db")]
        assert app.counts == RequestCounts(recorded=4, excluded=1)

    falcon = pytest.importorskip("falcon", reason="needs falcon, which the extra [test] brings")

    class Keys:
        @audited("ReadKey", target={"Key": "{name}"})
        def on_get(self, req: Any, resp: Any, name: str) -> None:
            req.context.role = "Reader"

    served = falcon.App()
    served.add_route("/keys/{name}", Keys())
    with around(served, caller_access_levels=lambda environ: facts_of(environ).request.context.role) as (app, kept):  # type: ignore[union-attr]
        call(app, "/keys/db")
        call(app, "/keys/db", "OPTIONS")
        record = kept[0].record
        assert (record.operation_name, list(record.caller_access_levels)) == ("ReadKey", ["Reader"])
        assert record.target_resources["Key"] == [TargetResource("db")]
        assert kept[1].record.operation_name == "OPTIONS /keys/{name}"
        assert app.counts == RequestCounts(recorded=2, incomplete=1)

    import_old("pyramid.config")
    from pyramid.config import Configurator
    from pyramid.response import Response

    with Configurator() as config:
        config.add_route("key", "/keys/{name}")
        view = audited("ReadKey", target={"Key": "{name}"})(lambda request: Response("x"))
        config.add_view(view, route_name="key")
        made = config.make_wsgi_app()
    with around(made, caller_access_levels=lambda environ: facts_of(environ).request.method) as (app, kept):  # type: ignore[union-attr]
        call(app, "/keys/db")
        record = kept[0].record
        assert (record.operation_name, list(record.caller_access_levels)) == ("ReadKey", ["GET"])
        assert record.target_resources["Key"] == [TargetResource("db")]


def test_marks_of_falcon() -> None:
    falcon = pytest.importorskip("falcon", reason="needs falcon, which the extra [test] brings")

    def refuse(req: Any, resp: Any, resource: Any, params: Any) -> None:
        raise falcon.HTTPForbidden

    @audited("Keys", access_level="Owner")
    class Keys:
        @audited("ReadKey", target={"Key": "{name}"})
        def on_get(self, req: Any, resp: Any, name: str) -> None: ...

        @unaudited
        def on_head(self, req: Any, resp: Any, name: str) -> None: ...

        def on_put(self, req: Any, resp: Any, name: str) -> None: ...

        @falcon.before(refuse)
        @audited("DeleteKey")
        def on_delete(self, req: Any, resp: Any, name: str) -> None: ...

        @unaudited
        @falcon.before(refuse)
        def on_get_old(self, req: Any, resp: Any, name: str) -> None: ...

    class Inherits(Keys):
        def on_put(self, req: Any, resp: Any, name: str) -> None:
            Keys().on_head(req, resp, name)

    @unaudited
    class Health:
        def on_get(self, req: Any, resp: Any) -> None: ...

    class Middleware:
        def process_request(self, req: Any, resp: Any) -> None:
            if req.get_param_as_bool("quiet"):
                facts_of(req.env).is_unaudited = True  # type: ignore[union-attr]

    served = falcon.App(middleware=[Middleware()])
    with around(served) as (app, kept):
        # Attached before the routes are added.
        served.add_route("/keys/{name}", Keys())
        served.add_route("/old/{name}", Keys(), suffix="old")
        served.add_route("/inherits/{name}", Inherits())
        served.add_route("/well", Health())
        for method, path, query in (
            ("GET", "/keys/db", ""), ("HEAD", "/keys/db", ""), ("PUT", "/keys/db", ""), ("DELETE", "/keys/db", ""),
            ("PATCH", "/keys/db", ""), ("OPTIONS", "/keys/db", ""), ("GET", "/old/db", ""), ("PUT", "/inherits/db", ""),
            ("GET", "/well", ""), ("POST", "/well", ""), ("GET", "/nowhere", ""), ("GET", "/keys/db", "quiet=true"),
        ):  # fmt: skip
            call(app, path, method, QUERY_STRING=query)
        found = [(msg.record.operation_name, msg.record.operation_access_level) for msg in kept]
        assert found == [
            ("ReadKey", "Owner"),
            ("Keys", "Owner"),
            ("DeleteKey", "Owner"),
            ("PATCH /keys/{name}", "Owner"),
            ("OPTIONS /keys/{name}", "Owner"),
            ("PUT /inherits/{name}", "Unknown"),
            ("GET /nowhere", "Unknown"),
        ]
        assert app.counts == RequestCounts(recorded=7, excluded=5)


def test_marks_of_pyramid() -> None:
    config_of = import_old("pyramid.config")
    from pyramid.response import Response
    from pyramid.security import Denied

    class Policy:
        def authenticated_userid(self, request: Any) -> None: ...

        def permits(self, request: Any, context: Any, permission: str) -> Any:
            return Denied("no")

    @audited("Keys", access_level="Owner")
    class Keys:
        def __init__(self, request: Any) -> None: ...

        @audited("ReadKey", target={"Key": "{name}"})
        def read(self) -> Any:
            return Response("x")

        @unaudited
        def peek(self) -> Any:
            return Response("x")

        def __call__(self) -> Any:
            return Response("x")

    def plain(request: Any) -> Any:
        unaudited(lambda: None)()
        return Response("x")

    asked: list[str] = []

    class Asked:
        def __init__(self, value: int, info: Any) -> None:
            self._value = value

        def phash(self) -> str:
            return f"asked {self._value}"

        text = phash

        def __call__(self, context: Any, request: Any) -> bool:
            asked.append(request.path)
            return 1 // self._value > 0

    with config_of.Configurator() as config:
        config.set_security_policy(Policy())
        config.add_route("key", "/keys/{name}")
        config.add_view(Keys, attr="read", route_name="key", request_method="GET")
        config.add_view(Keys, attr="peek", route_name="key", request_method="POST")
        config.add_view(Keys, route_name="key", request_method="PUT")
        config.add_view(plain, route_name="key")
        config.add_route("secret", "/secret/{name}")
        config.add_view(audited("ReadSecret")(lambda request: 0), route_name="secret", permission="read")
        config.add_view(unaudited(plain), name="well")
        config.add_view_predicate("asked", Asked)
        config.add_route("plain", "/plain/{name}")
        config.add_view(plain, route_name="plain", asked=1)
        config.add_route("broken", "/broken")
        config.add_view(audited("Broken")(plain), route_name="broken", asked=0)
        made = config.make_wsgi_app()
    with around(made) as (app, kept):
        for method, path in (
            ("GET", "/keys/db"), ("POST", "/keys/db"), ("PUT", "/keys/db"), ("DELETE", "/keys/db"),
            ("GET", "/secret/db"), ("GET", "/well"), ("GET", "/plain/db"), ("GET", "/nowhere"),
        ):  # fmt: skip
            call(app, path, method)
        found = [(msg.record.operation_name, msg.record.operation_access_level) for msg in kept]
        assert found == [
            ("ReadKey", "Owner"),
            ("Keys", "Owner"),
            ("DELETE /keys/{name}", "Unknown"),
            ("ReadSecret", "Unknown"),
            ("GET /plain/{name}", "Unknown"),
            ("GET /nowhere", "Unknown"),
        ]
        assert kept[3].record.operation_result_description.startswith("403 Forbidden")
        assert asked == ["/plain/db"], "without a declared view, nothing is asked twice"
        with pytest.raises(ZeroDivisionError):
            call(app, "/broken")
        assert kept[6].record.operation_result_description.startswith("ZeroDivisionError")
        assert app.counts == RequestCounts(recorded=7, excluded=2, incomplete=1)


# -- identifiers -------------------------------------------------------------------------------------------------------

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("request_id", "kept"),
    [
        ("7f3c", "7f3c"),
        (" a-b.c_d~e+f/g=h:i@j ", "a-b.c_d~e+f/g=h:i@j"),
        ("x" * 128, "x" * 128),
        *((text, None) for text in ("", " ", "x" * 129, "a b", "a,b", "a\nb", "a\x00", "<script>", "\xff", "é", "٣")),
    ],
)
def test_request_ids(request_id: str, kept: str | None) -> None:
    assert identifiers_of({"HTTP_X_REQUEST_ID": request_id}).get("request_id") == kept


@pytest.mark.parametrize(
    ("parent", "kept"),
    [
        (f"00-{TRACE}-01", f"00-{TRACE}-01"),
        (f" 00-{TRACE}-00\t", f"00-{TRACE}-00"),
        (f"01-{TRACE}-01", f"01-{TRACE}-01"),
        (f"cc-{TRACE}-01-{'x' * 9999}", f"cc-{TRACE}-01"),
        *(
            (text, None)
            for text in (
                f"ff-{TRACE}-01", f"00-{TRACE}-01-more", f"00-{TRACE}", f"00-{TRACE}-1", f"00-{TRACE.upper()}-01",
                f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
                f"00-{TRACE}-01\n", f"00-{TRACE}-01,00-{TRACE}-01", "", "x" * 9999,
            )
        ),
    ],
)  # fmt: skip
def test_trace_parents(parent: str, kept: str | None) -> None:
    assert identifiers_of({"HTTP_TRACEPARENT": parent}).get("traceparent") == kept


def test_environments_that_are_none() -> None:
    assert identifiers_of({"HTTP_TRACEPARENT": 5, "HTTP_X_REQUEST_ID": None}) == {}


# -- Django and Django REST Framework ----------------------------------------------------------------------------------

# The request; name, type, category and status of its record. Nothing for requests that are not recorded.
DJANGO: dict[str, tuple[str, str, str, int] | None] = {
    "GET /keys/db": ("ReadKey", "Read", "ResourceManagement", 200),
    "GET /orgs/5/x": ("Nested", "Read", "ResourceManagement", 200),
    "GET /search/w": ("Search", "Read", "ResourceManagement", 200),
    "GET /partial": ("Partial", "Read", "ResourceManagement", 200),
    "GET /post": ("Post", "Read", "ResourceManagement", 405),
    "GET /well": None,
    "GET /broken": ("Break", "Read", "ResourceManagement", 500),
    "GET /stream": ("Stream", "Read", "ResourceManagement", 200),
    "GET /mixed": ("GET /mixed", "Read", "ResourceManagement", 200),
    "POST /mixed": ("RotateKey", "Create", "KeyManagement", 200),
    "OPTIONS /mixed": ("OPTIONS /mixed", "Read", "ResourceManagement", 200),
    "HEAD /whole": ("ManageKeys", "Read", "KeyManagement", 200),
    "DELETE /whole": ("DeleteKey", "Delete", "KeyManagement", 200),
    "PATCH /whole": None,
    "OPTIONS /whole": ("OPTIONS /whole", "Read", "KeyManagement", 200),
    "PUT /whole": ("PUT /whole", "Update", "KeyManagement", 405),
    "GET /function": ("Function", "Read", "ResourceManagement", 200),
    "POST /function": ("RotateKey", "Create", "KeyManagement", 200),
    "GET /dispatched": ("Dispatched", "Read", "KeyManagement", 200),
    "POST /dispatched": ("Posted", "Create", "KeyManagement", 200),
    "GET /below": ("Below", "Read", "KeyManagement", 200),
    "GET /below anonymous": ("Below", "Read", "KeyManagement", 403),
    "GET /above": ("Above", "Read", "KeyManagement", 200),
    "GET /rest anonymous": ("ReadRest", "Read", "ResourceManagement", 403),
    "GET /api/things/": ("ListThings", "Read", "ResourceManagement", 200),
    "POST /api/things/7/rotate/ anonymous": ("RotateThing", "Create", "KeyManagement", 403),
    "POST /api/things/7/move/ anonymous": ("MoveThing", "Create", "ResourceManagement", 403),
    "GET /api/things/7/move/": ("GET /api/things/{pk}/move/", "Read", "ResourceManagement", 405),
    "GET /nowhere anonymous": ("GET /nowhere", "Read", "ResourceManagement", 404),
    "GET /leave": ("LeaveSession", "Read", "Authentication", 200),
}


@once
@pytest.mark.slow
def test_django_and_its_rest_framework() -> None:
    for needed in ("django", "rest_framework"):
        pytest.importorskip(needed, reason=f"needs {needed}, which the extra [test] brings")
    program = Path(__file__).parent / "django_declared_program.py"
    done = subprocess.run([sys.executable, "-X", "dev", str(program), *DJANGO], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    *records, counts = map(json.loads, done.stdout.splitlines())
    assert counts == {"recorded": len(list(filter(None, DJANGO.values()))), "incomplete": 0}
    for (request, expected), record in zip(DJANGO.items(), records, strict=True):
        if expected is None:
            assert record is None, request
            continue
        said = (record["name"], record["kind"], *record["categories"], record["status"])
        assert said == expected, request
        is_anonymous = request.endswith("anonymous")
        assert record["levels"] == (["Anonymous"] if is_anonymous else ["Administrators"]), request
        # The program sends no User-Agent, and is the host itself.
        unknown = ["CallerAgent", "CallerIpAddress", *(["CallerIdentities"] if is_anonymous else [])]
        assert record["custom"]["filled_unknown"] == unknown, request
        assert record["custom"]["request_id"] == "r1"
    by_name = {record["name"]: record for record in records if record is not None}
    assert by_name["ReadKey"]["type"] == AuditType.DATA_PLANE
    assert by_name["ReadKey"]["targets"]["Key"] == ["db"]
    assert by_name["Nested"]["targets"]["Org"] == ["5"]
    assert by_name["Search"]["targets"]["Word"] == ["w"]
    assert by_name["RotateThing"]["targets"]["Thing"] == ["7"]
    assert by_name["DeleteKey"]["level"] == "Reader", "the class's"
