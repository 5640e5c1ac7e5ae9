"""A Django project in one file, with an audit trail of its requests.

pip install 'geventaudit[django]' 'gunicorn[gevent]'
gunicorn -k gevent -w 4 --chdir examples django_app:application

The agent's socket is named by AUDIT_SOCKET; without it, mdsd's usual one is used. See gunicorn.conf.py for how a worker
lets its records drain before it goes.
"""

import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path, re_path

import geventaudit
from geventaudit.integrations.wsgi import AuditMiddleware

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="an example has no secrets",
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["geventaudit.integrations.django.AuditFactsMiddleware"],  # first: it sees what all others did
)


def get_thing(request: HttpRequest, number: int) -> HttpResponse:
    return JsonResponse({"number": number})


def search(request: HttpRequest, word: str) -> HttpResponse:
    return HttpResponse(f"nothing about {word}\n", status=404)


def export(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(f"thing {number}\n" for number in range(1000))


def broken(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("this view does not work")


urlpatterns = [
    path("things/<int:number>", get_thing),
    re_path(r"^search/(\w+)$", search),
    path("export", export),
    path("broken", broken),
]

client = geventaudit.Client(lambda: geventaudit.DomainSocket(os.environ.get("AUDIT_SOCKET") or None))
application = AuditMiddleware(get_wsgi_application(), client, trusted_proxies=["127.0.0.1"])
