"""The route, the user and the errors of a Pyramid application, for the record that ``AuditMiddleware`` sends.

::

    app = config.make_wsgi_app()
    application = AuditMiddleware(app, client)  # attaches by itself, if app is Pyramid's

Views declare their operations by ``@audited``, below ``@view_config``: above it, as any decorator, it would hide the
view from ``config.scan()``. A view declares itself when it is called, so a request that Pyramid refuses before that (a
permission) has the defaults of the middleware.
"""

from __future__ import annotations

from functools import partial
from typing import Any

try:
    from pyramid.httpexceptions import HTTPException
    from pyramid.interfaces import IBeforeTraversal, INewResponse
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.pyramid needs pyramid: pip install 'geventaudit[pyramid]'"
    raise ModuleNotFoundError(needs) from error

from .http.facts import RequestFacts, facts_of
from .http.paths import mount_of
from .http.text import name_of, named, printable

__all__ = ["attach"]


def attach(app: Any) -> None:
    """Make routes, users and errors of *app*, the result of ``make_wsgi_app()``, known. Idempotent.

    The user is ``request.authenticated_userid``, asked for when the response is made.
    """
    registry = app.registry
    if _note_route not in [each.handler for each in registry.registeredHandlers()]:
        registry.registerHandler(_note_route, (IBeforeTraversal,))
        registry.registerHandler(_note_response, (INewResponse,))


def _note_route(event: Any) -> None:
    request = event.request
    facts = facts_of(request.environ)
    if facts is not None:
        facts.method = request.method
        facts.request = request
        facts.refresh = partial(_note_user, request, facts)
        if request.matched_route is not None:
            facts.route = f"{mount_of(request.environ)}/{request.matched_route.pattern.lstrip('/')}"
            facts.arguments = dict(request.matchdict or {})


def _note_response(event: Any) -> None:
    request, response = event.request, event.response
    facts = facts_of(request.environ)
    if facts is None:
        return
    _note_error(facts, getattr(request, "exception", None) or response, response)
    facts.ask(request.environ)
    _note_user(request, facts)


def _note_user(request: Any, facts: RequestFacts) -> None:
    try:
        facts.user = name_of(request.authenticated_userid) or facts.user
    except Exception as error:  # a security policy can do anything
        facts.error = error


def _note_error(facts: RequestFacts, error: Any, response: Any) -> None:
    """Note *error*, an exception that a view answered, or the response that is one."""
    if not isinstance(error, BaseException):
        return
    if not isinstance(error, HTTPException):
        facts.tell_failure(error)
    elif error.status_code >= 400:
        facts.failure = printable(error.detail or "")
        if error.status_code in (401, 403) and response.status_code < 400:
            facts.denied = named(error)  # a forbidden view that leads to the login page, mostly
