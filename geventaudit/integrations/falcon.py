"""The route and the errors of a Falcon application, for the record that ``AuditMiddleware`` sends.

::

    app = falcon.App()
    application = AuditMiddleware(app, client)  # attaches by itself, if app is the falcon.App

Responders and resource classes declare their operations by ``@audited``. A request that a hook of a responder refuses
has the declaration. A sink declares itself when it is called.

Falcon does not know the user. A middleware that signs users in sets the name::

    if (facts := facts_of(req.env)) is not None:
        facts.user = name
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

try:
    import falcon
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.falcon needs falcon: pip install 'geventaudit[falcon]'"
    raise ModuleNotFoundError(needs) from error

from .http.facts import facts_of
from .http.paths import mount_of
from .http.text import printable
from .http.views import note_marks

__all__ = ["attach"]

Handler = Callable[..., None]


def attach(app: falcon.App[Any, Any]) -> None:
    """Make routes and errors of *app* known. Idempotent.

    Falcon has no hook for the exceptions that error handlers answer, nor for the responder that a request matched. So
    its table of handlers, and its search for routes, are replaced by others that note them.
    """
    if not isinstance(app._error_handlers, _NotingHandlers):
        app._error_handlers = _NotingHandlers(app._error_handlers)
        app._router_search = _noting(app._router_search)
        app.add_middleware(_Facts())


def _noting(search: Callable[..., Any]) -> Callable[..., Any]:
    """Return the *search* of a router, noting the declaration of the responder."""

    def search_and_note(path: str, req: falcon.Request) -> Any:
        route, facts = search(path, req=req), facts_of(req.env)
        if route is not None and facts is not None:
            resource, responders, *_ = route
            responder = responders.get(req.method)
            # Falcon answers OPTIONS and 405 by functions of its own.
            is_run = getattr(responder, "__module__", "falcon.responders") != "falcon.responders"
            note_marks(facts, [responder, type(resource)], is_run=is_run)
        return route

    return search_and_note


class _Facts:
    """A Falcon middleware that notes the route and its arguments."""

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: Any, params: Mapping[str, Any]
    ) -> None:
        facts = facts_of(req.env)
        if facts is not None:
            facts.arguments = dict(params)
            facts.request = req

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, req_succeeded: bool) -> None:
        facts = facts_of(req.env)
        if facts is not None:
            facts.method = req.method
            if req.uri_template is not None:
                facts.route = mount_of(req.env) + req.uri_template
            facts.ask(req.env)


class _NotingHandlers(dict[type[Exception], Handler]):
    """The error handlers of an application. Each notes its exception before it answers."""

    def get(self, kind: type[Exception], default: Any = None) -> Any:
        handler = super().get(kind, default)
        if handler is None:
            return None

        def note_and_handle(
            req: falcon.Request, resp: falcon.Response, error: Exception, *args: Any, **kwargs: Any
        ) -> None:
            _note(req, error)
            handler(req, resp, error, *args, **kwargs)

        return note_and_handle


def _note(req: falcon.Request, error: Exception) -> None:
    facts = facts_of(req.env)
    if facts is None or isinstance(error, falcon.HTTPStatus):  # such as a redirect, which is no error
        return
    if isinstance(error, falcon.HTTPError):
        facts.failure = printable(error.description or "")
    else:
        facts.tell_failure(error)
