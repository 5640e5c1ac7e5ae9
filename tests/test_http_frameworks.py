"""Flask, Django and its REST framework, Falcon, Bottle, Pyramid: routes, users, and the reasons of failures."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess
from helpers import import_old, once
from test_http_records import keeping, path_of
from test_wsgi import call

from geventaudit import CallerIdentityType, Client, NoOp, OperationResult, Record
from geventaudit.integrations.wsgi import AuditMiddleware, RequestCounts, facts_of

flask = pytest.importorskip("flask", reason="needs flask, which the extra [test] brings")

from werkzeug.local import LocalProxy  # noqa: E402
from werkzeug.middleware.dispatcher import DispatcherMiddleware  # noqa: E402
from werkzeug.middleware.proxy_fix import ProxyFix  # noqa: E402
from werkzeug.test import Client as Browser  # noqa: E402

from geventaudit.integrations.flask import Audit  # noqa: E402

FAILURE, SUCCESS = OperationResult.FAILURE, OperationResult.SUCCESS


class Flasked(list[Record]):
    """A Flask application and the records of its requests."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.client = Client(NoOp, before_send=lambda msg: self.append(msg.record) or msg)  # type: ignore[func-returns-value]
        self.app = flask.Flask("app")
        self.app.secret_key = "x"
        Audit(self.client, self.app, **options)
        self.browser = self.app.test_client()

    def get(self, path: str, **options: Any) -> Record:
        self.clear()
        self.browser.get(path, buffered=True, **options)
        (record,) = self
        return record

    @property
    def counts(self) -> RequestCounts:
        counts: RequestCounts = self.app.extensions["geventaudit"].counts
        return counts


@pytest.fixture
def flasked() -> Iterator[Flasked]:
    flasked = Flasked()
    with flasked.client:
        yield flasked


def names_of(record: Record) -> list[str]:
    return [each.identity for each in record.caller_identities.get(CallerIdentityType.USERNAME, ())]


def said_of(record: Record) -> tuple[OperationResult, str]:
    assert isinstance(record.operation_result, OperationResult)
    return record.operation_result, record.operation_result_description


# -- Flask -------------------------------------------------------------------------------------------------------------


def test_flask_keeps_the_text_of_an_abort(flasked: Flasked) -> None:
    app = flasked.app
    app.add_url_rule("/conflict", "/conflict", view_func=lambda: flask.abort(409, "version 3 is newer"))
    app.add_url_rule("/forbidden", "/forbidden", view_func=lambda: flask.abort(403, description="only the owner"))
    app.add_url_rule("/plain", "/plain", view_func=lambda: flask.abort(401))
    app.add_url_rule("/response", "/response", view_func=lambda: flask.abort(flask.Response("no", 418)))
    app.add_url_rule("/form", "/form", view_func=lambda: flask.request.form["missing"])
    app.add_url_rule("/slash/", "/slash/", view_func=lambda: "x")
    assert said_of(flasked.get("/conflict")) == (FAILURE, "409 CONFLICT; version 3 is newer")
    assert said_of(flasked.get("/forbidden")) == (FAILURE, "403 FORBIDDEN; only the owner")
    assert said_of(flasked.get("/plain")) == (FAILURE, "401 UNAUTHORIZED")
    assert said_of(flasked.get("/response")) == (FAILURE, "418 I'M A TEAPOT")
    assert said_of(flasked.get("/form")) == (FAILURE, "400 BAD REQUEST")
    assert said_of(flasked.get("/slash")) == (SUCCESS, "")
    assert said_of(flasked.get("/nowhere")) == (FAILURE, "404 NOT FOUND")


def test_flask_names_an_exception_that_a_handler_answered(flasked: Flasked) -> None:
    class OutOfTeaError(Exception):
        pass

    app = flasked.app
    things = flask.Blueprint("things", "things")

    @things.errorhandler(OutOfTeaError)
    def answer_it(error: OutOfTeaError) -> tuple[str, int]:
        return "sorry", 409

    @app.errorhandler(404)
    def page(error: Exception) -> tuple[str, int]:
        return "a page", 404

    @app.errorhandler(ZeroDivisionError)
    def fallback(error: Exception) -> str:
        return "infinity"

    @things.get("/tea")
    def tea() -> str:
        raise OutOfTeaError("no more tea")

    app.register_blueprint(things)
    app.add_url_rule("/divide", "/divide", view_func=lambda: str(1 // 0))
    app.add_url_rule("/gone", "/gone", view_func=lambda: flask.abort(404, "it is gone"))
    assert said_of(flasked.get("/tea")) == (FAILURE, "409 CONFLICT; OutOfTeaError: no more tea")
    assert said_of(flasked.get("/gone")) == (FAILURE, "404 NOT FOUND; it is gone")
    assert said_of(flasked.get("/divide")) == (SUCCESS, "ZeroDivisionError: integer division or modulo by zero")


def test_flask_users_when_another_teardown_raises() -> None:
    flasked = Flasked(user=lambda: flask.g.get("user"))
    app = flasked.app
    things = flask.Blueprint("things", "things")

    def fail(error: BaseException | None) -> None:
        raise RuntimeError("teardown")

    app.teardown_request(fail)
    things.teardown_request(fail)

    @app.before_request
    def sign_in() -> None:
        flask.g.user = "ann"

    things.add_url_rule("/things", "/things", view_func=lambda: "x")
    app.register_blueprint(things)
    app.add_url_rule("/", "/", view_func=lambda: "x")
    for path in ("/", "/things", "/nowhere"):
        with pytest.raises(RuntimeError, match="teardown"):
            flasked.browser.get(path, buffered=True)
    assert [names_of(record) for record in flasked] == [["ann"]] * 3
    flasked.client.close()


@pytest.mark.parametrize(
    "user",
    [None, "", " ", LocalProxy(lambda: None), LocalProxy(lambda: ""), type("No", (), {"is_authenticated": False})()],
)
def test_a_flask_user_without_a_name_is_unknown(user: Any) -> None:
    flasked = Flasked(user=lambda: user)
    flasked.app.add_url_rule("/", "/", view_func=lambda: "x")
    assert names_of(flasked.get("/")) == []
    assert flasked.counts == RequestCounts(recorded=1)
    flasked.client.close()


def test_describe_runs_where_flasks_context_is() -> None:
    torn_down: list[Any] = []

    def describe(environ: Any, status: int, record: Record) -> Record:
        assert flask.request.path == flask.request.environ["PATH_INFO"] == "/things/7"
        return record.replace(
            custom_data={
                **record.custom_data,
                "tenant": flask.g.tenant,
                "app": flask.current_app.name,
                "visits": flask.session["visits"],
                "endpoint": flask.request.endpoint,
            }
        )

    flasked = Flasked(describe=describe)
    flasked.app.teardown_appcontext(torn_down.append)

    @flasked.app.get("/things/<int:number>")
    def thing(number: int) -> str:
        flask.g.tenant, flask.session["visits"] = "t1", 3
        if "fail" in flask.request.args:
            raise KeyError("thing")
        return "x"

    for path in ("/things/7", "/things/7?fail=1"):
        record = flasked.get(path)
        assert record.custom_data.items() >= {"tenant": "t1", "app": "app", "visits": 3, "endpoint": "thing"}.items()
    assert len(torn_down) == 2, "no context is torn down twice"
    assert flasked.counts == RequestCounts(recorded=2)
    flasked.client.close()


def test_a_flask_request_is_free_when_its_record_is_sent() -> None:
    """Without the garbage collector, though describe needs its context."""
    flasked = Flasked(describe=lambda environ, status, record: record.replace(custom_data={"who": flask.g.thing.who}))
    alive: list[Any] = []

    class Thing:
        who = "ann"

    @flasked.app.get("/")
    def view() -> str:
        flask.g.thing = Thing()
        alive.append(weakref.ref(flask.g.thing))
        return "x"

    call(flasked.app, "/")
    gc.disable()
    try:
        call(flasked.app, "/")
        assert alive[-1]() is None
    finally:
        gc.enable()
    assert [record.custom_data["who"] for record in flasked] == ["ann", "ann"]
    flasked.client.close()


def test_flask_mounts_and_prefixes() -> None:
    flasked = Flasked(exclude=["/static/*", "/healthz"])
    app = flasked.app
    app.add_url_rule("/users/<name>", "/users/<name>", view_func=lambda name: name, methods=["DELETE"])
    app.add_url_rule("/healthz", "/healthz", view_func=lambda: "well")
    mounted = Browser(DispatcherMiddleware(app, {"/v1": app}))
    mounted.delete("/v1/users/ada", buffered=True)
    mounted.get("/v1/healthz", buffered=True)
    fixed = Browser(ProxyFix(app, x_prefix=1))  # type: ignore[arg-type]
    fixed.delete("/users/ada", headers={"X-Forwarded-Prefix": "/static"}, buffered=True)
    environ = {"SCRIPT_NAME": "/static", "HTTP_SCRIPT_NAME": "/static"}
    app.test_client().delete("/users/ada", environ_overrides=environ, buffered=True)
    assert [record.operation_name for record in flasked] == [
        "DELETE /v1/users/<name>",
        "DELETE /static/users/<name>",
        "DELETE /users/<name>",
    ]
    assert path_of(flasked[2]) == "/users/ada"
    assert flasked.counts == RequestCounts(recorded=3, excluded=1)
    flasked.client.close()


def test_flask_secrets_of_a_route(flasked: Flasked) -> None:
    @flasked.app.get("/reset/<token>/<who>")
    def reset(token: str, who: str) -> str:
        raise LookupError(f"{token} is of nobody")

    record = flasked.get("/reset/abc%C3%A9def/ann")
    assert record.custom_data["arguments"] == {"token": "[redacted]", "who": "ann"}
    assert path_of(record) == "/reset/[redacted]/ann"
    assert said_of(record) == (FAILURE, "500 INTERNAL SERVER ERROR; LookupError: [redacted] is of nobody")


# -- Flask-Login -------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_login() -> Iterator[Flasked]:
    login = pytest.importorskip("flask_login", reason="needs flask-login, which the extra [test] brings")
    flasked = Flasked()
    app, manager = flasked.app, login.LoginManager(flasked.app)

    class User(login.UserMixin):  # type: ignore[misc,name-defined]
        id = "ann"

    manager.user_loader(lambda name: User())
    manager.login_view = "sign_in"
    members = flask.Blueprint("members", "members", url_prefix="/members")
    manager.blueprint_login_views = {"members": "/members/enter"}

    @app.get("/login", endpoint="sign_in")
    def sign_in() -> str:
        if "ok" in flask.request.args:
            login.login_user(User())
        return "in"

    @app.get("/logout")
    def sign_out() -> Any:
        login.logout_user()
        return flask.redirect("/login")

    app.add_url_rule("/private", "private", login.login_required(lambda: "private"))
    app.add_url_rule("/fresh", "fresh", login.fresh_login_required(lambda: "fresh"))
    app.add_url_rule("/by-hand", "by_hand", lambda: flask.redirect(flask.url_for("sign_in", next="/by-hand")))
    app.add_url_rule("/absolute", "absolute", lambda: flask.redirect("http://localhost/login?next=x"))
    app.add_url_rule("/elsewhere", "elsewhere", lambda: flask.redirect("http://example.com/login"))
    app.add_url_rule("/created", "created", lambda: ("", 201, {"Location": "/login"}))
    app.add_url_rule("/plain", "plain", lambda: "for all")
    members.add_url_rule("/private", "private", login.login_required(lambda: "private"))
    members.add_url_rule("/by-hand", "by_hand", lambda: flask.redirect("/members/enter"))
    app.register_blueprint(members)
    with flasked.client:
        yield flasked


def test_a_redirect_to_flask_logins_view_is_a_failure(with_login: Flasked) -> None:
    get = with_login.get
    for path, reason in {
        "/private": "a sign-in is required",
        "/fresh": "a sign-in is required",
        "/members/private": "a sign-in is required",
        "/by-hand": "it leads to the login page",
        "/absolute": "it leads to the login page",
        "/members/by-hand": "it leads to the login page",
    }.items():
        record = get(path)
        assert said_of(record) == (FAILURE, f"302 FOUND; {reason}"), path
        assert record.custom_data["status"] == 302
        assert record.custom_data["location"]
    assert said_of(get("/elsewhere")) == (SUCCESS, "")
    assert said_of(get("/created")) == (SUCCESS, "")
    with_login.app.login_manager.login_view = None  # type: ignore[attr-defined]
    assert said_of(get("/private")) == (FAILURE, "401 UNAUTHORIZED; a sign-in is required")
    with_login.app.login_manager.unauthorized_handler(lambda: ("sorry", 200))  # type: ignore[attr-defined]
    assert said_of(get("/private")) == (FAILURE, "200 OK; a sign-in is required")


@pytest.mark.parametrize("host", ["[", "evil.example", "a b", "", "localhost:99999", "\xff"])
@pytest.mark.parametrize("path", ["/by-hand", "/private", "/absolute"])
def test_no_host_makes_a_success_of_a_redirect_to_the_login(with_login: Flasked, path: str, host: str) -> None:
    if path == "/absolute":
        with_login.app.view_functions["absolute"] = lambda: flask.redirect(f"http://{host}/login")
    with contextlib.suppress(ValueError):  # werkzeug may refuse to redirect there
        call(with_login.app, path, HTTP_HOST=host)
    (record,) = with_login
    assert record.operation_result is FAILURE, record
    assert with_login.counts.incomplete == 0


def test_flask_logins_user_is_known_and_a_sign_out_is_a_success(with_login: Flasked) -> None:
    get = with_login.get
    assert names_of(get("/login?ok=1")) == ["ann"]
    for path in ("/plain", "/private", "/nowhere"):
        assert names_of(get(path)) == ["ann"], path
    out = get("/logout")
    assert (names_of(out), said_of(out)) == (["ann"], (SUCCESS, ""))
    assert names_of(get("/plain")) == []


# -- Falcon ------------------------------------------------------------------------------------------------------------


def falcon_app() -> Any:
    falcon = pytest.importorskip("falcon", reason="needs falcon, which the extra [test] brings")

    class OutOfTeaError(Exception):
        pass

    class User:
        def on_get(self, req: Any, resp: Any, pk: str) -> None:
            (facts := facts_of(req.env)) and setattr(facts, "user", "ann")

        def on_delete(self, req: Any, resp: Any, pk: str) -> None:
            raise falcon.HTTPForbidden(title="No", description="only the owner")

        def on_put(self, req: Any, resp: Any, pk: str) -> None:
            raise OutOfTeaError("no more tea")

        def on_post(self, req: Any, resp: Any, pk: str) -> None:
            raise falcon.HTTPFound("/login")

        def on_patch(self, req: Any, resp: Any, pk: str) -> None:
            raise KeyError("pk")

    def answer_it(req: Any, resp: Any, error: Exception, params: Any) -> None:
        resp.status = falcon.HTTP_409

    app = falcon.App()
    app.add_error_handler(OutOfTeaError, answer_it)
    app.add_route("/users/{pk:int}", User())
    return app


def test_falcon() -> None:
    app = falcon_app()
    with keeping(app, exclude=["/static/*"]) as kept:
        AuditMiddleware(app, kept.client)  # attached once
        for method in ("GET", "DELETE", "PUT", "POST", "PATCH"):
            call(kept.app, "/users/7", method, SCRIPT_NAME="/v1")
        call(kept.app, "/nowhere")
        call(kept.app, "/users/7", "OPTIONS")
    assert [record.operation_name for record in kept] == [
        *(f"{method} /v1/users/{{pk:int}}" for method in ("GET", "DELETE", "PUT", "POST", "PATCH")),
        "GET /nowhere",
        "OPTIONS /users/{pk:int}",
    ]
    assert kept[0].custom_data["arguments"] == {"pk": "7"}
    assert names_of(kept[0]) == ["ann"]
    assert [said_of(record) for record in kept[:6]] == [
        (SUCCESS, ""),
        (FAILURE, "403 Forbidden; only the owner"),
        (FAILURE, "409 Conflict; OutOfTeaError: no more tea"),
        (SUCCESS, ""),
        (FAILURE, "500 Internal Server Error; KeyError: 'pk'"),
        (FAILURE, "404 Not Found"),
    ]
    assert kept[3].custom_data["location"] == "/login"


def test_falcon_inside_another_middleware() -> None:
    app = falcon_app()
    from geventaudit.integrations.falcon import attach

    attach(app)
    with keeping(lambda environ, start_response: app(environ, start_response)) as kept:
        call(kept.app, "/users/7")
    assert kept[0].operation_name == "GET /users/{pk:int}"


# -- Bottle ------------------------------------------------------------------------------------------------------------


def test_bottle() -> None:
    bottle = import_old("bottle")
    app, child = bottle.Bottle(), bottle.Bottle()

    @app.get("/users/<pk:int>")
    def get(pk: int) -> str:
        facts = facts_of(bottle.request.environ)
        assert facts is not None
        facts.user = "ann"
        return "x"

    @app.delete("/users/<pk:int>")
    def delete(pk: int) -> None:
        bottle.abort(409, "version 3 is newer")

    @app.put("/users/<pk:int>")
    def put(pk: int) -> None:
        raise KeyError("pk")

    @app.post("/users/<pk:int>")
    def post(pk: int) -> None:
        bottle.redirect("/login")

    child.get("/items/<name>", callback=lambda name: name)
    app.mount("/shop/", child)
    app.error(409)(lambda error: "a page")
    with keeping(app, exclude=["/static/*"]) as kept:
        AuditMiddleware(app, kept.client)  # attached once
        for method in ("GET", "DELETE", "PUT", "POST"):
            call(kept.app, "/users/7", method, SCRIPT_NAME="/v1")
        call(kept.app, "/nowhere")
        call(kept.app, "/shop/items/tea")
        call(kept.app, "/static/Gr\xc3\xb6\xc3\x9fe")
        assert kept.app.counts.excluded == 1, "Bottle writes the path anew"
    assert [record.operation_name for record in kept] == [
        *(f"{method} /v1/users/<pk:int>" for method in ("GET", "DELETE", "PUT", "POST")),
        "GET /nowhere",
        "GET /shop/items/<name>",
    ]
    assert kept[0].custom_data["arguments"] == {"pk": "7"}
    assert names_of(kept[0]) == ["ann"]
    assert [said_of(record) for record in kept[:5]] == [
        (SUCCESS, ""),
        (FAILURE, "409 Conflict; version 3 is newer"),
        (FAILURE, "500 Internal Server Error; KeyError: 'pk'"),
        (SUCCESS, ""),
        (FAILURE, "404 Not Found"),
    ]


# -- Pyramid -----------------------------------------------------------------------------------------------------------


def test_pyramid() -> None:
    config_of = import_old("pyramid.config")
    exceptions = import_old("pyramid.httpexceptions")

    class OutOfTeaError(Exception):
        pass

    class Policy:
        def authenticated_userid(self, request: Any) -> Any:
            if "broken" in request.params:
                raise RuntimeError("no database")
            return request.headers.get("X-User")

        identity = authenticated_userid

        def permits(self, request: Any, context: Any, permission: str) -> Any:
            return import_old("pyramid.security").Denied("only the owner")

    def view(request: Any) -> Any:
        if "abort" in request.params:
            raise exceptions.HTTPConflict("version 3 is newer")
        if "returned" in request.params:
            return exceptions.HTTPConflict("version 4 is newer")
        if "tea" in request.params:
            raise OutOfTeaError("no more tea")
        if "error" in request.params:
            raise KeyError("pk")
        if "redirect" in request.params:
            raise exceptions.HTTPFound("/elsewhere")
        return request.response

    with config_of.Configurator() as config:
        config.set_security_policy(Policy())
        config.add_route("user", "/users/{pk}")
        config.add_view(view, route_name="user")
        config.add_route("private", "private")
        config.add_view(view, route_name="private", permission="view")
        config.add_exception_view(lambda error, request: exceptions.HTTPServiceUnavailable(), context=OutOfTeaError)
        config.add_forbidden_view(lambda request: exceptions.HTTPFound("/login"))
        app = config.make_wsgi_app()
    with keeping(app) as kept:
        AuditMiddleware(app, kept.client)  # attached once
        for query in ("", "abort=1", "returned=1", "tea=1", "redirect=1", "broken=1"):
            call(kept.app, "/users/7", SCRIPT_NAME="/v1", QUERY_STRING=query, HTTP_X_USER="ann")
        call(kept.app, "/private")
        call(kept.app, "/nowhere")
        with pytest.raises(KeyError):
            call(kept.app, "/users/7", QUERY_STRING="error=1")
        assert kept.app.counts == RequestCounts(recorded=9, incomplete=1)
    assert [record.operation_name for record in kept] == [
        *["GET /v1/users/{pk}"] * 6,
        "GET /private",
        "GET /nowhere",
        "GET /users/{pk}",
    ]
    assert kept[0].custom_data["arguments"] == {"pk": "7"}
    assert [names_of(record) for record in kept[:6]] == [["ann"]] * 5 + [[]]
    assert [said_of(record) for record in kept] == [
        (SUCCESS, ""),
        (FAILURE, "409 Conflict; version 3 is newer"),
        (FAILURE, "409 Conflict; version 4 is newer"),
        (FAILURE, "503 Service Unavailable; OutOfTeaError: no more tea"),
        (SUCCESS, ""),
        (SUCCESS, ""),
        (FAILURE, kept[6].operation_result_description),
        (FAILURE, "404 Not Found; /nowhere"),
        (FAILURE, "KeyError: 'pk'"),
    ]
    assert kept[6].operation_result_description.startswith("302 Found; HTTPForbidden: Unauthorized: ")


# -- Django and Django REST Framework ----------------------------------------------------------------------------------


@functools.cache
def django_says(*arguments: str) -> dict[str, Any]:
    """Run the program; the records of its requests."""
    for needed in ("django", "rest_framework"):
        pytest.importorskip(needed, reason=f"needs {needed}, which the extra [test] brings")
    program = Path(__file__).parent / "django_rest_program.py"
    done = subprocess.run([sys.executable, "-X", "dev", str(program), *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    said: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        name, found = json.loads(line)
        said[f"{name} again" if name in said else name] = found
    return said


@once
def test_django_sign_ins_and_reasons() -> None:
    said = django_says()
    expected = {
        "GET /silent ann": ("Success", "", 200, ["ann"]),
        "GET /private ann": ("Success", "", 200, ["ann"]),
        "GET /special ann": ("Failure", "302 Found; it leads to the login page", 302, ["ann"]),
        "GET /nobody ann": ("Success", "", 200, []),
        "GET /private": ("Failure", "302 Found; it leads to the login page", 302, []),
        "GET /special": ("Failure", "302 Found; it leads to the login page", 302, []),
        "GET /elsewhere": ("Success", "", 302, []),
        "GET /absolute": ("Failure", "302 Found; it leads to the login page", 302, []),
        "GET /admin/auth/user/": ("Failure", "302 Found; it leads to the login page", 302, []),
        "GET /accounts/enter/": ("Success", "", 200, []),
        "POST /accounts/enter/": ("Failure", "200 OK; the sign-in as eve failed", 200, ["eve"]),
        "POST /accounts/enter/ again": ("Success", "", 302, ["ann"]),
        "POST /accounts/leave/ ann": ("Success", "", 302, ["ann"]),
        "GET /raises/denied": ("Failure", "403 Forbidden; PermissionDenied: only the owner", 403, []),
        "GET /raises/missing": ("Failure", "404 Not Found; Http404: no such thing", 404, []),
        "GET /raises/odd": ("Failure", "400 Bad Request; SuspiciousOperation: odd", 400, []),
        "GET /api/crash": ("Failure", "500 Internal Server Error; KeyError: 'thing'", 500, []),
    }
    for name, (result, description, status, users) in expected.items():
        found = said[name]
        assert (found["result"], found["description"], found["status"]) == (result, description, status), name
        assert [user for user, _ in found["users"]] == users, name
    assert said["GET /silent ann"]["vary"] is None, "the user is asked for when the session was saved"
    assert said["GET /private"]["location"] == "/accounts/enter/?next=/private"
    assert said["POST /accounts/enter/"]["users"] == [["eve", "tried to sign in, and failed"]]
    reset = said["GET /reset/MQ/abc123-def/ ann"]
    assert reset["arguments"] == {"uidb64": "MQ", "token": "[redacted]"}
    assert (reset["path"], reset["location"]) == ("/reset/MQ/[redacted]/", "/reset/MQ/[redacted]/done")
    assert said["counts"] == {"recorded": len(said) - 1, "incomplete": 0}


@once
def test_django_rest_framework() -> None:
    said = django_says()
    assert {key: (found["name"], found["description"]) for key, found in said.items() if "/api/" in key} == {
        "GET /api/users/7/": (
            "GET /api/users/{pk}/",
            "401 Unauthorized; Authentication credentials were not provided. (not_authenticated)",
        ),
        "GET /api/users/1/": (
            "GET /api/users/{pk}/",
            "401 Unauthorized; the sign-in as eve failed; Invalid username/password. (authentication_failed)",
        ),
        "DELETE /api/users/1/": ("DELETE /api/users/{pk}/", "409 Conflict; version 3 is newer (conflict)"),
        "GET /api/reports/2026/": (
            "GET /api/reports/{year}/",
            "403 Forbidden; You do not have permission to perform this action. (permission_denied)",
        ),
        "POST /api/check": (
            "POST /api/check",
            "400 Bad Request; age: must be a number (invalid); too many (invalid)",
        ),
        "GET /api/crash": ("GET /api/crash", "500 Internal Server Error; KeyError: 'thing'"),
        "GET /api/late": ("GET /api/late", "409 Conflict; TimeoutError: no more tea"),
        "GET /api/users/1.json": ("GET /api/users/{pk}.{format}/", ""),
    }
    assert said["DELETE /api/users/1/"]["users"] == [["ann", "the application's user"]], "by the API's authentication"
    assert said["GET /api/users/1/"]["users"] == [["eve", "tried to sign in, and failed"]]


@once
@pytest.mark.parametrize("login", ["/accounts/enter/", "https://testserver/accounts/enter/", "no-such-name"])
def test_django_without_asking_for_the_user(login: str) -> None:
    """With the option: only the users that the project asked for. And LOGIN_URL in other spellings."""
    said = django_says(login, "off")
    assert said["GET /silent ann"]["users"] == []
    assert said["GET /special ann"]["users"][0][0] == "ann"
    leads = "302 Found; it leads to the login page"
    if login == "/accounts/enter/":
        assert said["GET /private"]["description"] == said["GET /absolute"]["description"] == leads
    assert said["GET /admin/auth/user/"]["description"] == leads
    assert said["GET /elsewhere"]["result"] == "Success"
