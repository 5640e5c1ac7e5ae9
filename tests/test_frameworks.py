"""The facts of Flask and Django about a request are in its record, and cost the request nothing."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import once

from geventaudit import CallerIdentityType, Client, Msg, NoOp, NotificationKind, OperationType, Record

flask = pytest.importorskip("flask", reason="needs flask, which the extra [test] brings")
pytest.importorskip("django", reason="needs django, which the extra [test] brings")

from werkzeug.local import LocalProxy  # noqa: E402
from werkzeug.middleware.dispatcher import DispatcherMiddleware  # noqa: E402
from werkzeug.test import Client as Browser  # noqa: E402

from geventaudit.integrations.flask import Audit  # noqa: E402  (it needs flask)

USERNAME = CallerIdentityType.USERNAME


class Kept(list[Record]):
    """The records that a client was given."""

    def __call__(self, msg: Msg) -> Msg:
        self.append(msg.record)
        return msg


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def client(kept: Kept) -> Iterator[Client]:
    with Client(NoOp, before_send=kept) as client:
        yield client


def test_a_flask_factory_with_blueprint_and_user(client: Client, kept: Kept) -> None:
    audit = Audit(client, user=lambda: flask.g.get("user"), exclude=["/healthz"])

    def create_app() -> Any:
        app = flask.Flask(__name__)
        things = flask.Blueprint("things", __name__, url_prefix="/v1")

        @things.before_request
        def sign_in() -> None:
            flask.g.user = "ann"

        @things.put("/things/<path:name>")
        def put(name: str) -> str:
            return name

        app.register_blueprint(things)
        audit.init_app(app)
        return app

    app = create_app()
    assert app.test_client().put("/v1/things/a/b", buffered=True).data == b"a/b"
    (record,) = kept
    assert record.operation_name == "PUT /v1/things/<path:name>"
    assert record.custom_data["arguments"] == {"name": "a/b"}
    assert record.caller_identities[CallerIdentityType.USERNAME][0].identity == "ann"
    with pytest.raises(RuntimeError, match="audited already"):
        audit.init_app(app)
    create_app().test_client().get("/healthz", buffered=True)
    assert len(kept) == 1


def test_flask_streams_files_and_failures(client: Client, kept: Kept) -> None:
    app = flask.Flask(__name__)
    Audit(client, app, user=lambda: flask.request.args.get("user"))

    @app.get("/stream")
    def stream() -> Any:
        return flask.Response(flask.stream_with_context(flask.request.path for _ in range(2)))

    @app.get("/file")
    def file() -> Any:
        return flask.send_file(io.BytesIO(b"file"), mimetype="text/plain")

    @app.get("/broken")
    def broken() -> str:
        raise KeyError("thing")

    browser = app.test_client()
    assert browser.get("/stream?user=ann", buffered=True).data == b"/stream/stream"
    with browser.get("/file?user=ann") as response:
        assert response.data == b"file"
    assert browser.get("/broken?user=ann", buffered=True).status_code == 500
    assert kept.pop().operation_result_description == "500 INTERNAL SERVER ERROR; KeyError: 'thing'"
    assert browser.get("/missing?user=ann", buffered=True).status_code == 404
    assert kept.pop().operation_result_description == "404 NOT FOUND"
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(KeyError):
        browser.get("/broken?user=ann")
    assert [each.operation_name for each in kept] == ["GET /stream", "GET /file", "GET /broken"]
    assert [each.operation_result_description for each in kept] == ["", "", "KeyError: 'thing'"]
    assert {each.caller_identities[CallerIdentityType.USERNAME][0].identity for each in kept} == {"ann"}


def test_a_user_function_that_raises_costs_its_own_part_only(client: Client, kept: Kept) -> None:
    app = flask.Flask(__name__)
    Audit(client, app, user=lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    app.add_url_rule("/", view_func=lambda: "well")
    assert app.test_client().get("/", buffered=True).data == b"well"
    assert (app.extensions["geventaudit"].counts.recorded, app.extensions["geventaudit"].counts.incomplete) == (1, 1)
    assert kept[0].operation_name == "GET /"
    told = client.notify().get(timeout=0)
    assert (told.kind, type(told.error.__cause__)) == (NotificationKind.INCOMPLETE, ZeroDivisionError)
    assert str(told.error) == (
        "recorded without all that the application knows (the user, say): ZeroDivisionError: division by zero"
    )


def test_flask_login_names_the_user_that_signs_out(client: Client, kept: Kept) -> None:
    login = pytest.importorskip("flask_login", reason="needs flask-login, which the extra [test] brings")
    app = flask.Flask(__name__)
    app.secret_key = "secret"
    manager = login.LoginManager(app)

    class User(login.UserMixin):  # type: ignore[misc,name-defined]
        id = "ann"

    manager.user_loader(lambda name: User())
    Audit(client, app, user=lambda: login.current_user.get_id())

    @app.get("/in")
    def sign_in() -> str:
        login.login_user(User())
        return "in"

    @app.get("/out")
    def sign_out() -> str:
        login.logout_user()
        return "out"

    browser = app.test_client()
    for path in ("/in", "/out", "/out"):
        assert browser.get(path, buffered=True).status_code == 200
    users = [[each.identity for each in record.caller_identities.get(USERNAME, ())] for record in kept]
    assert users == [["ann"], ["ann"], []]


def test_flask_facts_outlive_the_request_context(client: Client, kept: Kept) -> None:
    """Arguments that a preprocessor takes out, users that are proxies, a context that ends twice or with an error."""
    app = flask.Flask(__name__)
    Audit(client, app, user=lambda: flask.g.get("user") and LocalProxy(lambda: flask.g.user))

    @app.url_value_preprocessor
    def take_out(endpoint: str | None, values: dict[str, Any] | None) -> None:
        flask.g.user = "ann"
        (values or {}).pop("language", None)

    @app.delete("/<language>/things/<int:number>")
    def delete(number: int) -> Any:
        @flask.copy_current_request_context
        def on_the_side() -> None:
            assert "user" not in flask.g

        def body() -> Iterator[str]:
            gevent.spawn(on_the_side).join()
            yield "done"

        return flask.Response(body())

    @app.teardown_request
    def fail(error: BaseException | None) -> None:
        if "fail" in flask.request.args:
            raise RuntimeError("teardown")

    mounted = Browser(DispatcherMiddleware(app, {"/v1": app}))
    assert mounted.open("/v1/en/things/7", method="delete", buffered=True).data == b"done"
    with pytest.raises(RuntimeError, match="teardown"):
        mounted.delete("/en/things/7?fail=1", buffered=True)
    assert [each.operation_name for each in kept] == [
        "DELETE /v1/<language>/things/<int:number>",
        "DELETE /<language>/things/<int:number>",
    ]
    assert [each.custom_data["arguments"] for each in kept] == [{"language": "en", "number": "7"}] * 2
    assert kept[0].caller_identities[CallerIdentityType.USERNAME][0].identity == "ann"
    assert kept[1].operation_result_description == "RuntimeError: teardown"


def test_flask_defaults_did_not_come_with_the_request(client: Client, kept: Kept) -> None:
    app = flask.Flask(__name__)
    Audit(client, app)

    @app.get("/pages/", defaults={"page": 1, "secret": "of the route"})
    @app.get("/pages/<int:page>", defaults={"secret": "of the route"})
    def pages(page: int, secret: str) -> str:
        return f"{page} {secret}"

    browser = app.test_client()
    assert browser.get("/pages/", buffered=True).text == "1 of the route"
    assert browser.get("/pages/7", buffered=True).text == "7 of the route"
    assert [each.custom_data.get("arguments") for each in kept] == [None, {"page": "7"}]


def test_flask_methods_that_are_overridden_inside(client: Client, kept: Kept) -> None:
    """As in Flask's documentation; the record has the method that was run, not the one of the request."""
    app = flask.Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "deleted", methods=["DELETE"])
    inner = app.wsgi_app

    def override(environ: Any, start_response: Any) -> Any:
        environ["REQUEST_METHOD"] = environ["HTTP_X_HTTP_METHOD_OVERRIDE"]
        return inner(environ, start_response)

    app.wsgi_app = override  # type: ignore[method-assign]
    Audit(client, app)
    app.test_client().post("/", headers={"X-HTTP-Method-Override": "DELETE"}, buffered=True)
    assert (kept[0].operation_name, kept[0].operation_type) == ("DELETE /", OperationType.DELETE)


def test_flask_parameters_that_cannot_be(client: Any) -> None:
    app: Any = flask.Flask("mine")
    wrong: list[tuple[Any, str]] = [
        (
            lambda: Audit(app, client),
            "client must be a Client or a BaseClient, got <Flask 'mine'>: write Audit(client, app)",
        ),
        (lambda: Audit(NoOp), "client must be a Client or a BaseClient, got <class"),  # type: ignore[arg-type]
        (lambda: Audit(client, app.wsgi_app), "app must be a Flask application, got <bound method"),
        (lambda: Audit(client, user="ada"), "user must be a function that returns a name or None, got 'ada'"),  # type: ignore[arg-type]
        (lambda: Audit(client, app, describe=5), "describe must be a function"),
    ]
    for make, problem in wrong:
        with pytest.raises(TypeError, match=re.escape(problem)):
            make()
    assert "geventaudit" not in app.extensions


def test_flask_contexts_without_a_request(client: Client, kept: Kept) -> None:
    app = flask.Flask(__name__)
    Audit(client, app)
    with app.test_request_context("/"):
        assert flask.request.path == "/"
    assert not kept


@once
@pytest.mark.parametrize(
    ("extra", "package"),
    [
        ("bottle", "bottle"),
        ("django", "django"),
        ("falcon", "falcon"),
        ("flask", "flask"),
        ("locust", "locust"),
        ("opentelemetry", "opentelemetry"),
        ("prometheus", "prometheus_client"),
        ("pyramid", "pyramid"),
    ],
)
def test_an_integration_without_its_package_names_the_extra(extra: str, package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; import geventaudit.integrations.{extra}"
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"ModuleNotFoundError: geventaudit.integrations.{extra} needs {package}: pip install 'geventaudit[{extra}]'\n"
    )


@once
def test_django_users_and_sessions() -> None:
    """The user is asked for when the session was saved: no page gets another ``Vary: Cookie``."""
    program = Path(__file__).parent / "django_program.py"
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error::Warning:geventaudit", str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    asked, silent, anonymous, another, visits, mounted, leaves, left, broken, missing, counts = map(
        json.loads, out.splitlines()
    )
    assert asked == {
        "name": "GET /asks/<int:number>",
        "arguments": {"number": "7"},
        "users": ["ann"],
        "vary": "Cookie",
        "body": "ann\n",
        "description": "",
    }
    assert silent == {
        "name": "GET /silent",
        "arguments": None,
        "users": ["ann"],
        "vary": None,
        "body": "the same for all\n",
        "description": "",
    }
    assert (anonymous["users"], anonymous["body"]) == ([], "AnonymousUser\n")
    assert (another["name"], another["users"]) == ("GET /another", [])
    assert (visits["name"], visits["users"]) == ("GET /visits", ["ann"]), (
        "its session was touched, its user not asked for"
    )
    assert mounted == {
        "name": r"DELETE /mounted/orgs/<int:org>/things/(?P<name>\w+)$",
        "arguments": {"org": "5", "name": "x"},
        "users": [],
        "vary": None,
        "body": "org\nname\nsecret\n",
        "description": "",
    }
    assert (leaves["name"], leaves["users"]) == ("GET /leave", ["ann"]), "who signed out"
    assert (left["name"], left["users"]) == ("GET /leave", []), "nobody was signed in any more"
    assert broken["description"] == "500 Internal Server Error; KeyError: 'thing'"
    assert missing["description"] == "404 Not Found"
    assert counts == {"recorded": 10, "incomplete": 1}
    assert err.decode().count("requests go unrecorded") == 1
