"""What Django knows about a request, for the record that :class:`~geventaudit.integrations.wsgi.AuditMiddleware` sends.

Two places: the WSGI application is wrapped, and the middleware of this module comes first in ``MIDDLEWARE``::

    application = AuditMiddleware(get_wsgi_application(), client)              # wsgi.py

    MIDDLEWARE = ["geventaudit.integrations.django.AuditFactsMiddleware", ...]  # settings.py

Nothing is sent while an unpatched ``runserver`` runs; :mod:`geventaudit.integrations.wsgi` says why. Patched, it is,
without the reloader, which would start another process that is not::

    python -m gevent.monkey manage.py runserver --noreload

or ``from gevent import monkey; monkey.patch_all()`` are the first lines of ``manage.py``, where the reloader may stay.

Needs the extra ``geventaudit[django]``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

try:
    from django.contrib.auth.signals import user_logged_out
    from django.core.signals import got_request_exception
    from django.http import HttpRequest, HttpResponseBase
    from django.utils.functional import LazyObject, empty
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.django needs django: pip install 'geventaudit[django]'"
    raise ModuleNotFoundError(needs) from error

from .wsgi import FACTS_KEY, RequestFacts, facts_of

__all__ = ["AuditFactsMiddleware"]

logger = logging.getLogger("geventaudit.django")


class AuditFactsMiddleware:
    """Tells the record the route, the arguments of the view, and the user.

    The user is told when something asked for it on the way. To ask here would cost a query of the database, and make
    Django send ``Vary: Cookie`` with pages that are the same for all. Of who signs out, ``django.contrib.auth`` tells.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self._get_response = get_response
        user_logged_out.connect(_tell_who_leaves, dispatch_uid="geventaudit")
        got_request_exception.connect(_tell_failure, dispatch_uid="geventaudit")

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        try:
            return self._get_response(request)
        finally:
            facts = facts_of(request.META)
            if facts is not None:
                try:
                    _tell(request, facts)
                except Exception as error:  # a user model of one's own can do anything
                    facts.error = error
            elif FACTS_KEY not in request.META:
                _warn()


@cache
def _warn() -> None:
    """Once in a process: nobody should believe that there is an audit trail when there is none."""
    logger.warning("requests go unrecorded: there is no AuditMiddleware around the WSGI application")


def _tell(request: HttpRequest, facts: RequestFacts) -> None:
    facts.method = request.method or ""
    if (match := request.resolver_match) is not None:
        script = request.META.get("SCRIPT_NAME", "").rstrip("/")
        facts.route = f"{script}/{match.route.removeprefix('^')}"
        facts.arguments = {str(index): value for index, value in enumerate(match.args)}
        # What urls.py gives to a view besides did not come with the request, and may be anything.
        besides = match.extra_kwargs or {}
        facts.arguments |= {name: value for name, value in match.kwargs.items() if name not in besides}
    user = getattr(request, "user", None)
    if user is None or (isinstance(user, LazyObject) and user._wrapped is empty):
        return
    if user.is_authenticated:
        facts.user = user.get_username()


def _tell_failure(request: HttpRequest | None = None, **_: Any) -> None:
    """In the handling of what a view raised and nobody caught."""
    facts = facts_of(getattr(request, "META", {}))
    error = sys.exception()
    if facts is not None and error is not None:
        facts.tell_failure(error)


def _tell_who_leaves(request: HttpRequest, user: Any = None, **_: Any) -> None:
    """At the end of that request, it is nobody's."""
    facts = facts_of(getattr(request, "META", {}))
    if facts is None or user is None:
        return
    try:
        facts.user = user.get_username()
    except Exception as error:  # which would keep somebody from signing out
        facts.error = error
