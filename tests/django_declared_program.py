"""A Django project with views that declare their operations in all possible ways, called as by a server.

Prints the records of the requests that it is given as arguments, as JSON lines: ``METHOD /path``.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from typing import Any

import django
from django.conf import settings
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import Client as Browser
from django.urls import include, path, re_path

from geventaudit import AuditType, Client, Msg, NoOp, OperationCategory
from geventaudit.integrations.django import audited, unaudited
from geventaudit.integrations.wsgi import AuditMiddleware, facts_of

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="secret",
    ROOT_URLCONF=__name__,
    WSGI_APPLICATION=f"{__name__}.application",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=[
        *("django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions", "rest_framework"),
    ],
    MIDDLEWARE=[
        "geventaudit.integrations.django.AuditFactsMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    REST_FRAMEWORK={"DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.SessionAuthentication"]},
)
django.setup()

from django.contrib.auth import logout
from django.contrib.auth.models import Group, User
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.http import require_POST
from rest_framework.decorators import action, api_view, permission_classes
from rest_framework.permissions import IsAuthenticated
from rest_framework.response import Response
from rest_framework.routers import DefaultRouter
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

KEYS = OperationCategory.KEY_MANAGEMENT


def done(request: HttpRequest, **arguments: Any) -> HttpResponse:
    return HttpResponse("done")


@audited("LeaveSession", category=OperationCategory.AUTHENTICATION)
def leave(request: HttpRequest) -> HttpResponse:
    logout(request)
    return HttpResponse("gone")


@audited("Break")
def breaks(request: HttpRequest) -> HttpResponse:
    raise KeyError("thing")


@audited("Stream")
def streams(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"{number}\n" for number in range(3))


class Mixed(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")

    @audited("RotateKey", category=KEYS)
    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")


@audited("ManageKeys", category=KEYS, access_level="Reader")
class Whole(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")

    @audited("DeleteKey")
    def delete(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")

    @unaudited
    def patch(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")


@method_decorator(audited("Dispatched", category=KEYS), name="dispatch")
class Dispatched(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")

    @method_decorator(audited("Posted"))
    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("x")


@api_view(["GET", "POST"])
@permission_classes([IsAuthenticated])
@audited("Below", category=KEYS)
def below(request: Any) -> Response:
    return Response({})


@audited("Above", category=KEYS)
@api_view(["GET"])
def above(request: Any) -> Response:
    return Response({})


class Rest(APIView):
    permission_classes = (IsAuthenticated,)

    @audited("ReadRest")
    def get(self, request: Any) -> Response:
        return Response({})


class Things(ViewSet):
    permission_classes = (IsAuthenticated,)

    @audited("ListThings")
    def list(self, request: Any) -> Response:
        return Response([])

    @action(detail=True, methods=["post"])
    @audited("RotateThing", category=KEYS, target={"Thing": "{pk}"})
    def rotate(self, request: Any, pk: str) -> Response:
        return Response({})

    @audited("MoveThing", target={"Thing": "{pk}"})
    @action(detail=True, methods=["post"])
    def move(self, request: Any, pk: str) -> Response:
        return Response({})


router = DefaultRouter()
router.register("things", Things, basename="thing")

urlpatterns = [
    path("keys/<name>", audited("ReadKey", audit_type=AuditType.DATA_PLANE, target={"Key": "{name}"})(done)),
    path("orgs/<int:org>/", include([re_path(r"^(?P<name>\w+)$", audited("Nested", target={"Org": "{org}"})(done))])),
    re_path(r"^search/(\w+)$", audited("Search", target={"Word": "{0}"})(lambda request, word: HttpResponse(word))),
    path("partial", functools.partial(audited("Partial")(done), x=1)),
    path("post", require_POST(audited("Post")(done))),
    path("well", unaudited(done)),
    path("leave", leave),
    path("broken", breaks),
    path("stream", streams),
    path("mixed", Mixed.as_view()),
    path("whole", Whole.as_view()),
    path("function", audited("Function")(Mixed.as_view())),
    path("dispatched", Dispatched.as_view()),
    path("below", below),
    path("above", above),
    path("rest", Rest.as_view()),
    path("api/", include(router.urls)),
]


def roles(environ: Any) -> Any:
    """Return the names of the caller's groups; a query, which the database has to answer."""
    user = facts_of(environ).request.user  # type: ignore[union-attr]
    return user.groups.values_list("name", flat=True) if user.is_authenticated else "Anonymous"


kept: list[Msg] = []
client = Client(NoOp, before_send=lambda msg: kept.append(msg) or msg)  # type: ignore[func-returns-value]
application = AuditMiddleware(
    WSGIHandler(),
    client,
    category=OperationCategory.RESOURCE_MANAGEMENT,
    access_level="Contributor",
    caller_access_levels=roles,
)


def main() -> None:
    logging.disable(logging.ERROR)
    call_command("migrate", verbosity=0)
    user = User.objects.create_user("ann")
    user.groups.add(Group.objects.create(name="Administrators"))
    browser = Browser()
    browser.force_login(user)
    cookie = browser.cookies.output(header="", sep=";").strip()
    for request in sys.argv[1:]:
        method, target, *anonymous = request.split()
        del kept[:]
        environ = browser._base_environ(
            PATH_INFO=target, REQUEST_METHOD=method, HTTP_COOKIE="" if anonymous else cookie, HTTP_X_REQUEST_ID="r1"
        )
        environ["wsgi.errors"] = sys.stderr
        response = application(environ, lambda status, headers, exc_info=None: None)
        for _ in response:
            pass
        response.close()  # type: ignore[attr-defined]
        for msg in kept:
            record = msg.record
            said = {
                "type": msg.type,
                "name": record.operation_name,
                "kind": record.operation_type,
                "status": record.custom_data["status"],
                "categories": list(record.operation_categories),
                "level": record.operation_access_level,
                "levels": list(record.caller_access_levels),
                "targets": {kind: [each.name for each in group] for kind, group in record.target_resources.items()},
                "custom": dict(record.custom_data),
            }
            print(json.dumps(said))
        if not kept:
            print("null")
    print(json.dumps({"recorded": application.counts.recorded, "incomplete": application.counts.incomplete}))
    client.close()


if __name__ == "__main__":
    main()
