"""A Django project with users and sessions, called as by a server; prints the records as JSON lines."""

from __future__ import annotations

import json
import logging
from typing import Any

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import Client as Browser
from django.urls import include, path, re_path

from geventaudit import Client, Msg, NoOp
from geventaudit.integrations.wsgi import AuditMiddleware

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="secret",
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
    MIDDLEWARE=[
        "geventaudit.integrations.django.AuditFactsMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
)
django.setup()

from django.contrib.auth import logout
from django.contrib.auth.models import User
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command


def asks(request: HttpRequest, number: int) -> HttpResponse:
    return HttpResponse(f"{request.user}\n")  # type: ignore[attr-defined]


def does_not_ask(request: HttpRequest) -> HttpResponse:
    return HttpResponse("the same for all\n")


def has_another_user(request: HttpRequest) -> HttpResponse:
    request.user = object()  # type: ignore[attr-defined]
    return HttpResponse("what is_authenticated?\n")


def counts_visits(request: HttpRequest) -> HttpResponse:
    request.session["visits"] = 1
    return HttpResponse("a session, and nobody asked whose\n")


def leave(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse("gone\n")


def breaks(request: HttpRequest) -> HttpResponse:
    raise KeyError("thing")


def streams(request: HttpRequest, **arguments: Any) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"{name}\n" for name in arguments)


urlpatterns = [
    path("asks/<int:number>", asks),
    path("silent", does_not_ask),
    path("another", has_another_user),
    path("visits", counts_visits),
    path("leave", leave),
    path("broken", breaks),
    path("orgs/<int:org>/", include([re_path(r"^things/(?P<name>\w+)$", streams, {"secret": "of urls.py"})])),
]


def main() -> None:
    logging.disable(logging.INFO)
    call_command("migrate", verbosity=0)
    browser = Browser()
    browser.force_login(User.objects.create_user("ann"))
    cookie = browser.cookies.output(header="", sep=";").strip()
    records: list[Any] = []

    def keep(msg: Msg) -> Msg:
        records.append(msg.record)
        return msg

    with Client(NoOp, before_send=keep) as client:
        application = AuditMiddleware(WSGIHandler(), client)
        for target, cookies, more in (
            ("/asks/7", cookie, {}),
            ("/silent", cookie, {}),
            ("/asks/8", "", {}),
            ("/another", cookie, {}),
            ("/visits", cookie, {}),
            ("/orgs/5/things/x", "", {"SCRIPT_NAME": "/mounted", "REQUEST_METHOD": "delete"}),
            ("/leave", cookie, {}),
            ("/leave", cookie, {}),
            ("/broken", "", {}),
            ("/missing", "", {}),
        ):
            environ = browser._base_environ(PATH_INFO=target, HTTP_COOKIE=cookies, **more)
            headers: list[Any] = []
            response = application(environ, lambda status, given, exc_info=None, into=headers: into.extend(given))
            body = b"".join(response).decode()
            response.close()  # type: ignore[attr-defined]
            record = records[-1]
            said = {
                "name": record.operation_name,
                "arguments": record.custom_data.get("arguments"),
                "users": [each.identity for each in record.caller_identities.get("Username", ())],
                "vary": dict(headers).get("Vary"),
                "body": body,
                "description": record.operation_result_description,
            }
            print(json.dumps(said))
        print(json.dumps({"recorded": application.counts.recorded, "incomplete": application.counts.incomplete}))
    for _ in range(2):
        browser.get("/silent")  # around the middleware


if __name__ == "__main__":
    main()
