"""Facts of Django about a request, for the record that :class:`~geventaudit.integrations.wsgi.AuditMiddleware` sends.

Two places: the WSGI application is wrapped, and the middleware of this module comes first in ``MIDDLEWARE``::

    application = AuditMiddleware(get_wsgi_application(), client)              # wsgi.py

    MIDDLEWARE = ["geventaudit.integrations.django.AuditFactsMiddleware", ...]  # settings.py

Views declare their operations by ``@audited``: functions, methods and classes of class-based views, by
``method_decorator`` too, and actions of Django REST Framework. The order of ``@audited`` and ``@api_view`` is free.

Nothing is sent while an unpatched ``runserver`` runs; :mod:`geventaudit.integrations.wsgi` says why. Patched, it is,
without the reloader, which would start another process that is not::

    python -m gevent.monkey manage.py runserver --noreload

or ``from gevent import monkey; monkey.patch_all()`` are the first lines of ``manage.py``, where the reloader may stay.

Needs the extra ``geventaudit[django]``.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache, partial
from typing import Any

try:
    from django.apps import apps
    from django.conf import settings
    from django.contrib.auth.signals import user_logged_in, user_logged_out, user_login_failed
    from django.core.signals import got_request_exception
    from django.http import HttpRequest, HttpResponseBase
    from django.shortcuts import resolve_url
    from django.urls import NoReverseMatch, Resolver404, get_script_prefix, resolve
    from django.utils.functional import LazyObject, empty
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.django needs django: pip install 'geventaudit[django]'"
    raise ModuleNotFoundError(needs) from error

from .http.facts import FACTS_KEY, RequestFacts, facts_of
from .http.paths import is_same_page, mount_of
from .http.text import name_of, printable
from .http.views import audited, note_view, unaudited

__all__ = ["AuditFactsMiddleware", "audited", "unaudited"]

logger = logging.getLogger("geventaudit.django")

_MAX_DETAILS = 10  # errors of Django REST Framework that a record names
_PARAMETER = re.compile(r"<(?:[^>:]+:)?(\w+)>")


class AuditFactsMiddleware:
    """Notes the route, the arguments of the view, the user, and the reason of a failure.

    ``request.user`` is asked for when the response is made. As the first of ``MIDDLEWARE``, this one does so after the
    session was saved, so that pages which are the same for all get no ``Vary: Cookie``. It may cost a query of the
    database: with ``GEVENTAUDIT_RESOLVE_USER = False`` in the settings, the user is known only if something else asked
    for it on the way.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self._get_response = get_response
        self._resolves_user = bool(getattr(settings, "GEVENTAUDIT_RESOLVE_USER", True))
        user_logged_in.connect(_note_sign_in, dispatch_uid="geventaudit")
        user_logged_out.connect(_note_sign_out, dispatch_uid="geventaudit")
        user_login_failed.connect(_note_failed_login, dispatch_uid="geventaudit")
        got_request_exception.connect(_note_exception, dispatch_uid="geventaudit")
        if apps.apps_ready and apps.is_installed("rest_framework"):
            _watch_rest_framework()

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase | None = None
        facts = facts_of(request.META)
        if facts is not None:
            facts.request = request
            facts.refresh = partial(self._refresh, request, facts)
        try:
            response = self._get_response(request)
            return response
        finally:
            if facts is not None:
                try:
                    _note_route(request, facts)
                    if response is not None:
                        _note_response(request, response, facts)
                    self._note_user(request, facts)
                except Exception as error:  # a user model of one's own can do anything
                    facts.error = error
                facts.ask(request.META)
            elif FACTS_KEY not in request.META:
                _warn()

    def process_view(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> None:
        """Note the declaration of the view, before other middlewares and decorators may refuse the request."""
        facts = facts_of(request.META)
        if facts is not None:
            note_view(facts, view, request.method or "")

    def process_exception(self, request: HttpRequest, exception: Exception) -> None:
        """Note what a view raised, whether Django or a handler of the project answers it."""
        facts = facts_of(request.META)
        if facts is not None:
            facts.tell_failure(exception)

    def _refresh(self, request: HttpRequest, facts: RequestFacts) -> None:
        _note_route(request, facts)
        self._note_user(request, facts)

    def _note_user(self, request: HttpRequest, facts: RequestFacts) -> None:
        if user := self._user(request):
            facts.user = user

    def _user(self, request: HttpRequest) -> str:
        user = getattr(request, "user", None)
        if isinstance(user, LazyObject) and user._wrapped is empty and not self._resolves_user:
            return ""
        # By its class: a lazy object that is None is not None.
        return "" if isinstance(user, type(None)) or not user.is_authenticated else name_of(user.get_username())


@cache
def _warn() -> None:
    """Warn once in a process: without the wrapping there is no audit trail."""
    logger.warning(
        "geventaudit: requests go unrecorded: there is no AuditMiddleware around the WSGI application; in wsgi.py, "
        "write application = AuditMiddleware(get_wsgi_application(), client)"
    )


@cache
def _watch_rest_framework() -> None:
    """Note the exceptions that a handler of Django REST Framework answers, once in a process. It has no signal."""
    from rest_framework.exceptions import APIException
    from rest_framework.views import APIView

    handle_exception = APIView.handle_exception

    def note_and_handle(view: Any, error: Exception) -> Any:
        facts = facts_of(getattr(getattr(view, "request", None), "META", {}))
        if facts is not None and not isinstance(error, APIException):  # whose details are in the response
            facts.tell_failure(error)
        return handle_exception(view, error)

    APIView.handle_exception = note_and_handle


def _note_route(request: HttpRequest, facts: RequestFacts) -> None:
    facts.method = request.method or ""
    if (match := request.resolver_match) is not None:
        facts.route = mount_of(request.META) + recorded_route(match.route, match.func)
        facts.arguments = {str(index): value for index, value in enumerate(match.args)}
        # What urls.py gives to a view besides did not come with the request, and may be anything.
        besides = match.extra_kwargs or {}
        facts.arguments |= {name: value for name, value in match.kwargs.items() if name not in besides}


def _note_response(request: HttpRequest, response: HttpResponseBase, facts: RequestFacts) -> None:
    if getattr(response, "exception", False) is True and not facts.failure:  # Django REST Framework answered one
        facts.failure = printable("; ".join(_details(getattr(response, "data", None))[:_MAX_DETAILS]))
    if 300 <= response.status_code < 400 and not facts.signed_out:
        location = response.headers.get("Location", "")
        if any(is_same_page(location, page, request.META) for page in _login_pages(location)):
            facts.denied = "it leads to the login page"


def _login_pages(location: str) -> Iterator[str]:
    """Yield LOGIN_URL, and *location* if it is another view with the name ``login``: that of the admin, say."""
    try:
        yield resolve_url(settings.LOGIN_URL)
    except NoReverseMatch:  # the project has no login page
        pass
    path = location.partition("?")[0].partition("#")[0]
    try:
        if resolve(f"/{path.removeprefix(get_script_prefix())}").url_name == "login":
            yield location
    except Resolver404:  # another site, or a file
        pass


def recorded_route(route: str, view: Any) -> str:
    """Return *route*, the route that Django matched, as records have it."""
    return _template(route) if is_rest_framework(view) else "/" + route.removeprefix("^")


def is_rest_framework(view: Any) -> bool:
    """Return True if *view* is made of an ``APIView`` of Django REST Framework."""
    kind = getattr(view, "cls", None)
    return isinstance(kind, type) and any(each.__module__ == "rest_framework.views" for each in kind.__mro__)


@lru_cache(maxsize=1024)
def _template(route: str) -> str:
    """Return *route* as Django REST Framework writes it in its schemas: ``/api/users/{pk}/``."""
    from django.contrib.admindocs.views import simplify_regex

    return _PARAMETER.sub(r"{\1}", simplify_regex(route)).replace("\\.", ".")


def _details(data: Any, path: str = "") -> list[str]:
    """Return the texts in the body of an error, each with its field and its code."""
    if isinstance(data, Mapping):
        names = {key: "" if key in ("detail", "non_field_errors") else f"{path}{key}: " for key in data}
        return [text for key, value in data.items() for text in _details(value, names[key])]
    if isinstance(data, list):
        return [text for each in data for text in _details(each, path)]
    code = getattr(data, "code", None)
    return [f"{path}{data} ({code})" if code else f"{path}{data}"]


def _note_exception(request: HttpRequest | None = None, **_: Any) -> None:
    """Note the exception that Django is handling: a view raised it, and nothing caught it."""
    facts = facts_of(getattr(request, "META", {}))
    error = sys.exception()
    if facts is not None and error is not None:
        facts.tell_failure(error)


def _note_sign_in(request: HttpRequest | None = None, **_: Any) -> None:
    facts = facts_of(getattr(request, "META", {}))
    if facts is not None:
        facts.login_succeeded()


def _note_sign_out(request: HttpRequest | None = None, user: Any = None, **_: Any) -> None:
    """Note the user who signs out: at the end of the request, it is no user's."""
    facts = facts_of(getattr(request, "META", {}))
    if facts is None:
        return
    facts.signed_out = True
    facts.ask_levels(request.META)  # type: ignore[union-attr]  # it has facts
    try:
        facts.user = "" if user is None else name_of(user.get_username())
    except Exception as error:  # which would keep the user from signing out
        facts.error = error


def _note_failed_login(credentials: Mapping[str, Any], request: HttpRequest | None = None, **_: Any) -> None:
    facts = facts_of(getattr(request, "META", {}))
    if facts is None:
        return
    try:
        from django.contrib.auth import get_user_model

        fields = (get_user_model().USERNAME_FIELD, "username", "email")
        facts.login_failed(next((credentials[each] for each in fields if credentials.get(each)), None))
    except Exception as error:  # a project with a user model that is none
        facts.error = error
