"""A Django project in one file, with an audit trail of its requests.

pip install 'geventaudit[django]' 'gunicorn[gevent]'
gunicorn -k gevent -w 4 --chdir examples django_app:application

AUDIT_SOCKET names the agent's socket; without it, the usual one of mdsd is used. The hooks in gunicorn.conf.py let a
worker deliver its records before it ends. List the routes and their records, and check that no field is Unknown:

geventaudit routes --fail-on-unknown django_app
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.urls import path, re_path
from django.utils.decorators import method_decorator
from django.views import View

import geventaudit
from geventaudit import AuditType, OperationCategory
from geventaudit.integrations.django import audited, unaudited
from geventaudit.integrations.wsgi import AuditMiddleware, facts_of

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="an example has no secrets",
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    MIDDLEWARE=[
        "geventaudit.integrations.django.AuditFactsMiddleware",  # first: it sees the work of all others
        f"{__name__}.ExampleAuthenticationMiddleware",
    ],
)
django.setup()

from django.contrib.auth.models import AnonymousUser, User

ROLES = {"ann": ["Administrator", "Contributor"], "bob": ["Reader"]}


class ExampleAuthenticationMiddleware:
    """Take the user from the query. A real service authenticates the user."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        name = request.GET.get("user")
        request.user = User(username=name) if name else AnonymousUser()
        return self.get_response(request)


def roles(environ: Mapping[str, Any]) -> list[str]:
    """Return the roles of the caller."""
    request = facts_of(environ).request
    return ROLES.get(request.user.get_username(), ["Anonymous"])


@audited("ReadThing", audit_type=AuditType.DATA_PLANE, access_level="Reader", target={"Thing": "{number}"})
def get_thing(request: HttpRequest, number: int) -> HttpResponse:
    return JsonResponse({"number": number})


@method_decorator(audited("ManageOwner", target={"Thing": "{number}"}), name="dispatch")
class Owner(View):
    def get(self, request: HttpRequest, number: int) -> HttpResponse:
        return JsonResponse({"owner": "ann"})

    @audited("ChangeOwner", category=OperationCategory.AUTHORIZATION, access_level="Administrator")
    def put(self, request: HttpRequest, number: int) -> HttpResponse:
        return HttpResponse(status=204)


def search(request: HttpRequest, word: str) -> HttpResponse:
    return HttpResponse(f"nothing about {word}\n", status=404)


def export(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"thing {number}\n" for number in range(1000))


def broken(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("this view does not work")


@unaudited
def healthz(request: HttpRequest) -> HttpResponse:
    return HttpResponse("well")


urlpatterns = [
    path("things/<int:number>", get_thing),
    path("things/<int:number>/owner", Owner.as_view()),
    re_path(r"^search/(\w+)$", search),
    path("export", export),
    path("broken", broken),
    path("healthz", healthz),
]

client = geventaudit.Client(lambda: geventaudit.DomainSocket(os.environ.get("AUDIT_SOCKET") or None), stamp=True)
application = AuditMiddleware(
    get_wsgi_application(),
    client,
    # Defaults for views that declare nothing else:
    category=OperationCategory.RESOURCE_MANAGEMENT,
    access_level="Contributor",
    caller_access_levels=roles,
    trusted_proxies=["127.0.0.1"],
)
