"""The route, the user and the errors of a Pyramid application, for the record that ``AuditMiddleware`` sends.

::

    app = config.make_wsgi_app()
    application = AuditMiddleware(app, client)  # attaches by itself, if app is Pyramid's

Views, methods and classes declare their operations by ``@audited``, below ``@view_config``: above it, as any decorator,
it would hide the view from ``config.scan()``. A request that Pyramid refuses before the view runs (a permission) has
the declaration. If one of the views of a route is declared, Pyramid's predicates are called once more, to find the one
that matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

try:
    from pyramid.httpexceptions import HTTPException
    from pyramid.interfaces import IBeforeTraversal, IContextFound, IMultiView, INewResponse
    from pyramid.view import _find_views
    from zope.interface import providedBy
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.pyramid needs pyramid: pip install 'geventaudit[pyramid]'"
    raise ModuleNotFoundError(needs) from error

from .http.facts import RequestFacts, facts_of
from .http.marking import has_mark
from .http.paths import mount_of
from .http.text import name_of, named, printable
from .http.views import note_marks

__all__ = ["attach"]


def attach(app: Any) -> None:
    """Make routes, users and errors of *app*, the result of ``make_wsgi_app()``, known. Idempotent.

    The user is ``request.authenticated_userid``, asked for when the response is made.
    """
    registry = app.registry
    if _note_route not in [each.handler for each in registry.registeredHandlers()]:
        registry.registerHandler(_note_route, (IBeforeTraversal,))
        registry.registerHandler(_note_view, (IContextFound,))
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


def _note_view(event: Any) -> None:
    request = event.request
    facts = facts_of(request.environ)
    if facts is None:
        return
    try:
        views = list(_views_of(request))
        if any(has_mark(place) for view in views for place in _places_of(view)):
            view = next((each for each in views if _is_matched(each, request)), None)
            note_marks(facts, _places_of(view))
    except Exception as error:  # a predicate can do anything
        facts.error = error


def _views_of(request: Any) -> Iterator[Any]:
    """Yield the views that Pyramid tries for *request*, in its order."""
    context = providedBy(request.context)
    for view in _find_views(request.registry, request.request_iface, context, request.view_name):
        if IMultiView.providedBy(view):
            yield from (each for _, each, _ in view.get_views(request))
        else:
            yield view


def _is_matched(view: Any, request: Any) -> bool:
    return not hasattr(view, "__predicated__") or view.__predicated__(request.context, request)


def _places_of(view: Any) -> list[Any]:
    """Return the functions and classes of *view* that may be marked, from the inside."""
    original, name = getattr(view, "__original_view__", None), getattr(view, "__view_attr__", None)
    return [getattr(original, name or "__call__", None), original]


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
