"""The caller of the current request, as far as it is known, for integrations that hand it on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import gevent
import pytest
from helpers import import_old, once

from geventaudit import CallerIdentityType, Client, NoOp, Record
from geventaudit.integrations.http.current import current_record
from geventaudit.integrations.wsgi import AuditMiddleware, facts_of

USERNAME = CallerIdentityType.USERNAME


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(NoOp) as client:
        yield client


def environ_of(path: str = "/things/7", **more: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": path,
        "REMOTE_ADDR": "192.0.2.9",
        "HTTP_USER_AGENT": "curl/8",
        **more,
    }


def serve(app: Any, environ: dict[str, Any]) -> bytes:
    body: Iterable[bytes] = app(environ, lambda status, headers, exc_info=None: lambda data: None)
    try:
        return b"".join(body)
    finally:
        if hasattr(body, "close"):
            body.close()


def users_of(record: Record | None) -> list[str]:
    assert record is not None
    assert str(record.caller_ip_address) == "192.0.2.9"
    assert record.caller_agent == "curl/8"
    return [each.identity for each in record.caller_identities.get(USERNAME, ())]


def test_it_is_known_while_the_request_is_served(client: Client) -> None:
    seen: list[Record | None] = []

    def app(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        facts = facts_of(environ)
        assert facts is not None
        facts.user = "ann"
        start_response("200 OK", [])
        seen.append(current_record())
        yield b"streamed"
        seen.append(current_record())

    assert current_record() is None
    serve(AuditMiddleware(app, client), environ_of())
    assert [users_of(each) for each in seen] == [["ann"], ["ann"]]
    assert current_record() is None, "the request is over"


@pytest.mark.parametrize("record", ["before", "after"])
def test_it_is_forgotten_however_the_request_ends(record: Any, client: Client) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        assert current_record() is not None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        serve(AuditMiddleware(app, client, record=record), environ_of())
    assert current_record() is None


def test_a_request_without_a_record_has_no_caller(client: Client) -> None:
    seen: list[Record | None] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        seen.append(current_record())
        return []

    middleware = AuditMiddleware(app, client, exclude=["/healthz"])
    middleware(environ_of(), lambda *_: None)  # type: ignore[arg-type]  # the body is never closed
    serve(middleware, environ_of("/healthz"))
    assert [each is None for each in seen] == [False, True]


def test_a_source_that_fails_keeps_nothing_else_back(client: Client) -> None:
    seen: list[Record | None] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        facts = facts_of(environ)
        assert facts is not None
        facts.refresh = lambda: 1 // 0
        start_response("200 OK", [])
        seen.append(current_record())
        return []

    middleware = AuditMiddleware(app, client)
    serve(middleware, environ_of())
    assert users_of(seen[0]) == []
    assert middleware.counts.incomplete == 1


@pytest.mark.parametrize("inner", ["recorded", "excluded", "fails", "excluded and fails", "unclosed"])
def test_a_request_that_the_application_makes_of_itself(inner: str, client: Client) -> None:
    """As a batch of requests in one does. The inner ones have records of their own."""
    seen: list[Record | None] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] != "/batch":
            seen.append(current_record())
            if "fails" in inner:
                raise ZeroDivisionError
            return []
        for _ in range(2):
            part = environ_of("/healthz" if "excluded" in inner else "/part")
            try:
                if inner == "unclosed":
                    middleware(part, lambda status, headers, exc_info=None: lambda data: None)
                    gevent.sleep(0)  # it ends when its body is collected, in a greenlet of its own
                else:
                    serve(middleware, part)
            except ZeroDivisionError:
                pass
            seen.append(current_record())
        return []

    middleware = AuditMiddleware(app, client, exclude=["/healthz"])
    serve(middleware, environ_of("/batch"))
    names = [None if each is None else each.operation_name for each in seen]
    part = None if "excluded" in inner else "POST /part"
    assert names == [part, "POST /batch"] * 2
    assert current_record() is None
    assert middleware.counts.recorded == (1 if "excluded" in inner else 3)


def test_a_request_after_one_that_was_never_closed_keeps_nothing_of_it(client: Client) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        return []

    middleware = AuditMiddleware(app, client)
    bodies = [middleware(environ_of(), lambda *args: lambda data: None) for _ in range(3)]
    assert current_record() is not None
    for body in bodies:
        body.close()  # type: ignore[attr-defined]
    assert current_record() is None


def test_the_user_of_flask(client: Client) -> None:
    flask = pytest.importorskip("flask", reason="needs flask, which the extra [test] brings")
    from geventaudit.integrations.flask import Audit

    app, seen = flask.Flask(__name__), []

    @app.post("/things/<number>")
    def view(number: str) -> str:
        flask.g.user = "ann"
        seen.append(current_record())
        return ""

    Audit(client, app, user=lambda: flask.g.user)
    with app.test_client().post(
        "/things/7", headers={"User-Agent": "curl/8"}, environ_overrides={"REMOTE_ADDR": "192.0.2.9"}
    ):
        pass
    assert users_of(seen[0]) == ["ann"]
    assert seen[0].operation_name == "POST /things/<number>"


def test_the_user_of_pyramid(client: Client) -> None:
    config_of = import_old("pyramid.config")

    class Policy:
        def authenticated_userid(self, request: Any) -> str:
            return "ann"

        def permits(self, request: Any, context: Any, permission: str) -> bool:
            return True

    seen: list[Record | None] = []

    def view(request: Any) -> Any:
        seen.append(current_record())
        return request.response

    with config_of.Configurator() as config:
        config.set_security_policy(Policy())
        config.add_route("thing", "/things/{number}")
        config.add_view(view, route_name="thing")
        app = AuditMiddleware(config.make_wsgi_app(), client)
    more = {"SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http"}
    serve(app, environ_of(**more))
    assert users_of(seen[0]) == ["ann"]


DJANGO = """
import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, MIDDLEWARE=["geventaudit.integrations.django.AuditFactsMiddleware"]
)
django.setup()

from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import RequestFactory
from django.urls import path

from geventaudit import Client, NoOp
from geventaudit.integrations.http.current import current_record
from geventaudit.integrations.wsgi import AuditMiddleware


class User:
    is_authenticated = True

    def get_username(self):
        return "ann"


def view(request, number):
    request.user = User()
    record = current_record()
    print(record.operation_name, [each.identity for each in record.caller_identities["Username"]])
    return HttpResponse()


urlpatterns = [path("things/<int:number>", view)]
with Client(NoOp) as client:
    app = AuditMiddleware(WSGIHandler(), client)
    environ = RequestFactory()._base_environ(PATH_INFO="/things/7")
    app(environ, lambda status, headers, exc_info=None: None).close()
    print(current_record())
"""


@once
def test_the_user_of_django() -> None:
    pytest.importorskip("django", reason="needs django, which the extra [test] brings")
    done = subprocess.run([sys.executable, "-W", "error", "-c", DJANGO], capture_output=True, timeout=120, text=True)
    assert done.stdout.splitlines() == ["GET /things/<int:number> ['ann']", "None"], done.stderr
