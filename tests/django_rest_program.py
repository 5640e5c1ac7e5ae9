"""A Django project with sign-ins, an admin and a REST API, asked as a server would; prints its records as JSON."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore", DeprecationWarning)  # Django REST Framework's own

import django
from django.conf import settings
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.test import Client as Browser
from django.urls import include, path, re_path

from geventaudit import Client, NoOp
from geventaudit.integrations.wsgi import AuditMiddleware


class WithoutTokens:
    """A middleware behind Django's own."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> Any:
        request._dont_enforce_csrf_checks = True  # type: ignore[attr-defined]  # as Django's own test client
        return self.get_response(request)


settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="secret",
    ROOT_URLCONF=__name__,
    LOGIN_URL=sys.argv[1] if len(sys.argv) > 1 else "accounts-login",
    GEVENTAUDIT_RESOLVE_USER="off" not in sys.argv,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=[
        *("django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.messages"),
        *("django.contrib.sessions", "rest_framework"),
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ],
                "loaders": [("django.template.loaders.locmem.Loader", {"registration/login.html": "{{ form.as_p }}"})],
            },
        }
    ],
    MIDDLEWARE=[
        "geventaudit.integrations.django.AuditFactsMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        f"{__name__}.WithoutTokens",
    ],
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": [
            "rest_framework.authentication.BasicAuthentication",
            "rest_framework.authentication.SessionAuthentication",
        ],
        "EXCEPTION_HANDLER": f"{__name__}.answer_it",
    },
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
)
django.setup()

from django.contrib import admin
from django.contrib.auth.decorators import login_required, permission_required
from django.contrib.auth.models import User
from django.contrib.auth.views import LoginView, LogoutView
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from rest_framework import permissions, routers, serializers, viewsets
from rest_framework.decorators import api_view, permission_classes
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.response import Response
from rest_framework.views import exception_handler


class Conflict(APIException):
    status_code = 409
    default_code = "conflict"


class UserSerializer(serializers.ModelSerializer[User]):
    class Meta:
        model = User
        fields = ("username",)


class Users(viewsets.ModelViewSet[User]):
    queryset = User.objects.order_by("pk")
    serializer_class = UserSerializer
    permission_classes = (permissions.IsAuthenticated,)

    def destroy(self, request: Any, *args: Any, **kwargs: Any) -> Response:
        raise Conflict("version 3 is newer")


@api_view(["GET"])
@permission_classes([permissions.IsAdminUser])
def report(request: Any, year: int) -> Response:
    return Response({"year": year})


@api_view(["POST"])
def check(request: Any) -> Response:
    raise ValidationError({"age": ["must be a number"], "non_field_errors": ["too many"]})


def answer_it(error: Exception, context: Any) -> Response | None:
    return Response({"sorry": True}, 409) if isinstance(error, TimeoutError) else exception_handler(error, context)


@api_view(["GET"])
def late(request: Any) -> Response:
    raise TimeoutError("no more tea")


@api_view(["GET"])
def crash(request: Any) -> Response:
    raise KeyError("thing")


def raises(request: HttpRequest, name: str) -> HttpResponse:
    raise {
        "denied": PermissionDenied("only the owner"),
        "missing": Http404("no such thing"),
        "odd": SuspiciousOperation("odd"),
    }[name]


router = routers.DefaultRouter()
router.register("users", Users)
plain = HttpResponse("x")
urlpatterns = [
    path("admin/", admin.site.urls),
    path("accounts/enter/", LoginView.as_view(), name="accounts-login"),
    path("accounts/leave/", LogoutView.as_view(next_page="accounts-login")),
    path("silent", lambda request: HttpResponse("x")),
    path("private", login_required(lambda request: HttpResponse("x"))),
    path("special", permission_required("auth.add_user")(lambda request: HttpResponse("x"))),
    path("elsewhere", lambda request: redirect("https://example.com/accounts/enter/")),
    path("absolute", lambda request: redirect("http://testserver/accounts/enter/?next=/x")),
    path("nobody", lambda request: setattr(request, "user", None) or HttpResponse("x")),
    path("raises/<name>", raises),
    path("reset/<uidb64>/<token>/", lambda request, **_: redirect(f"{request.path}done")),
    path("api/", include(router.urls)),
    path("api/reports/<int:year>/", report),
    re_path(r"^api/check$", check),
    path("api/crash", crash),
    path("api/late", late),
]

BASIC = base64.b64encode(b"eve:wrong").decode()


def main() -> None:
    logging.disable(logging.CRITICAL)
    call_command("migrate", verbosity=0)
    browser = Browser()
    browser.force_login(User.objects.create_user("ann", password="right"))
    User.objects.create_user("nameless", password="right")
    cookie = browser.cookies.output(header="", sep=";").strip()
    records: list[Any] = []
    with Client(NoOp, before_send=lambda msg: records.append(msg.record) or msg) as client:  # type: ignore[func-returns-value]
        application = AuditMiddleware(WSGIHandler(), client)

        def ask(target: str, method: str = "GET", cookies: str = "", body: str = "", **more: Any) -> None:
            target, _, query = target.partition("?")
            browser.cookies.clear()
            environ = browser._base_environ(
                PATH_INFO=target,
                QUERY_STRING=query,
                REQUEST_METHOD=method,
                HTTP_COOKIE=cookies,
                CONTENT_TYPE="application/x-www-form-urlencoded",
                CONTENT_LENGTH=str(len(body)),
                HTTP_HOST="testserver",
                **{"wsgi.input": io.BytesIO(body.encode()), **more},
            )
            headers: list[Any] = []
            response = application(environ, lambda status, given, exc_info=None: headers.extend(given))
            b"".join(response)
            response.close()  # type: ignore[attr-defined]
            record = records[-1]
            said = {
                "name": record.operation_name,
                "result": record.operation_result,
                "description": record.operation_result_description,
                "status": record.custom_data["status"],
                "location": record.custom_data.get("location"),
                "arguments": record.custom_data.get("arguments"),
                "path": record.target_resources["Path"][0].name,
                "users": [[each.identity, each.description] for each in record.caller_identities.get("Username", ())],
                "vary": dict(headers).get("Vary"),
            }
            print(json.dumps([f"{method} {target}" + (" ann" if cookies else ""), said]))

        for target in ("/silent", "/private", "/special", "/nobody"):
            ask(target, cookies=cookie)
        for target in ("/private", "/special", "/elsewhere", "/absolute", "/admin/auth/user/", "/accounts/enter/"):
            ask(target)
        ask("/accounts/enter/", "POST", body="username=eve&password=wrong")
        ask("/accounts/enter/", "POST", body="username=ann&password=right")
        ask("/accounts/leave/", "POST", cookies=cookie)
        for target in ("denied", "missing", "odd"):
            ask(f"/raises/{target}")
        ask("/reset/MQ/abc123-def/", cookies=cookie)
        ask("/api/users/7/")
        ask("/api/users/1/", HTTP_AUTHORIZATION=f"Basic {BASIC}")
        ask("/api/users/1/", "DELETE", HTTP_AUTHORIZATION="Basic " + base64.b64encode(b"ann:right").decode())
        ask("/api/reports/2026/", HTTP_AUTHORIZATION="Basic " + base64.b64encode(b"ann:right").decode())
        ask("/api/check", "POST")
        ask("/api/crash")
        ask("/api/late")
        ask("/api/users/1.json", HTTP_AUTHORIZATION="Basic " + base64.b64encode(b"ann:right").decode())
        print(
            json.dumps(
                ["counts", {"recorded": application.counts.recorded, "incomplete": application.counts.incomplete}]
            )
        )


if __name__ == "__main__":
    main()
