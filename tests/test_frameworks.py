"""What Flask and Django know about a request is in its record, and nothing of that costs the request anything."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess

from geventaudit import CallerIdentityType, Client, Msg, NoOp, NotificationKind, Record

flask = pytest.importorskip("flask", reason="needs flask, which the extra [test] brings")
pytest.importorskip("django", reason="needs django, which the extra [test] brings")

from geventaudit.integrations.flask import Audit  # noqa: E402  (it needs flask)


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
    assert (told.kind, type(told.error)) == (NotificationKind.NOT_RECORDED, ZeroDivisionError)


def test_flask_contexts_without_a_request(client: Client, kept: Kept) -> None:
    app = flask.Flask(__name__)
    Audit(client, app)
    with app.test_request_context("/"):
        assert flask.request.path == "/"
    assert not kept


def test_django_users_and_sessions() -> None:
    """Who is signed in is told where the view asked for it; elsewhere neither a query nor ``Vary: Cookie`` is made."""
    program = Path(__file__).parent / "django_program.py"
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error::Warning:geventaudit", str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    asked, silent, anonymous, another, counts = map(json.loads, out.splitlines())
    assert asked == {
        "name": "GET /asks/<int:number>",
        "arguments": {"number": "7"},
        "users": ["ann"],
        "vary": "Cookie",
        "body": "ann\n",
    }
    assert silent == {
        "name": "GET /silent",
        "arguments": None,
        "users": [],
        "vary": None,
        "body": "the same for all\n",
    }
    assert (anonymous["users"], anonymous["body"]) == ([], "AnonymousUser\n")
    assert (another["name"], another["users"]) == ("GET /another", [])
    assert counts == {"recorded": 4, "incomplete": 1}
    assert err.decode().count("requests go unrecorded") == 1
