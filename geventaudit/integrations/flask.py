"""A record for each request of a Flask application, named by the route that it matched.

::

    app = Flask(__name__)
    Audit(client, access_level="Contributor").init_app(app)

    @app.post("/keys/<name>/rotate")
    @audited("RotateKey", category=OperationCategory.KEY_MANAGEMENT, target={"Key": "{name}"})
    def rotate(name): ...

A record is sent when the server closes the response. Flask's test client leaves that to the test:
``app.test_client().get("/", buffered=True)``, or ``with``.

Nothing is sent while an unpatched ``flask run`` runs; :mod:`geventaudit.integrations.wsgi` says why. Patched, it is::

    python -m gevent.monkey --module flask --app myapp run

Needs the extra ``geventaudit[flask]``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

try:
    from flask import Flask, Response, got_request_exception, request, request_finished, request_started
    from werkzeug.exceptions import HTTPException
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.flask needs flask: pip install 'geventaudit[flask]'"
    raise ModuleNotFoundError(needs) from error

from geventaudit import AuditClient

from .http.facts import RequestFacts, facts_of
from .http.hooks import check_hook
from .http.paths import is_same_page, mount_of
from .http.text import name_of, printable
from .http.views import audited, note_view, unaudited
from .wsgi import AuditMiddleware

try:
    import flask_login
except ImportError:
    flask_login = None

__all__ = ["Audit", "audited", "unaudited"]


class Audit:
    """The Flask extension: an :class:`~geventaudit.integrations.wsgi.AuditMiddleware` that knows what Flask knows.

    :param client: takes the records.
    :param app: initialised at once; otherwise call :meth:`init_app`.
    :param user: called at the end of each request, while it is still Flask's ``request``; returns the name of the user
        who is signed in, or None. With Flask-Login, the default is ``current_user.get_id()``. Then it is called before
        a user is signed out, too, so that the record of that request has the name. ``lambda: None`` asks for no user.
    :param options: the keyword arguments of ``AuditMiddleware``.
    :raises ValueError, TypeError: an argument is invalid.
    """

    def __init__(
        self,
        client: AuditClient,
        app: Flask | None = None,
        *,
        user: Callable[[], str | None] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(client, AuditClient):
            hint = ": write Audit(client, app)" if isinstance(client, Flask) else ""
            raise TypeError(f"client must be a Client or a BaseClient, got {client!r}{hint}")
        if user is not None:
            if not callable(user):
                raise TypeError(f"user must be a function that returns a name or None, got {user!r}")
            check_hook("user", user)
        self._client = client
        self._user = user
        self._options = options
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Record the requests of *app*. Its middleware, with the counts, is ``app.extensions["geventaudit"]``.

        :raises ValueError, TypeError: an option is invalid.
        :raises RuntimeError: *app* has this extension already.
        """
        if not isinstance(app, Flask):
            raise TypeError(f"app must be a Flask application, got {app!r}")
        if "geventaudit" in app.extensions:
            raise RuntimeError(f"{app!r} is audited already: one request is one record")
        middleware = AuditMiddleware(app.wsgi_app, self._client, **self._options)
        request_started.connect(self._note_route, app)
        request_finished.connect(self._note_response, app)
        got_request_exception.connect(self._note_exception, app)
        if flask_login is not None:
            flask_login.user_logged_out.connect(self._note_sign_out, app)
            flask_login.user_unauthorized.connect(_note_unauthorized, app)
            flask_login.user_needs_refresh.connect(_note_stale, app)
        # Flask has no signal for exceptions that a handler answers, and a teardown function that raises keeps others
        # from being called.
        app.handle_user_exception = _before(app.handle_user_exception, _note_error)  # type: ignore[method-assign]
        app.do_teardown_request = _before(app.do_teardown_request, lambda *_: self._note_user(app))  # type: ignore[method-assign]
        app.extensions["geventaudit"] = middleware
        app.extensions["geventaudit.user"] = self._user
        app.wsgi_app = middleware  # type: ignore[method-assign]  # as Flask's documentation says

    def _note_route(self, app: Flask, **_: Any) -> None:
        # At once: what preprocessors take out of the arguments came from the path too.
        facts = facts_of(request.environ)
        if facts is not None:
            facts.method = request.method
            facts.context = copy_context()
            facts.refresh = partial(self._note_user, app)
            if request.url_rule is not None:
                facts.route = mount_of(request.environ) + request.url_rule.rule
                # The defaults of a route go before the path, so none of them came with the request.
                besides = request.url_rule.defaults or {}
                given = request.view_args or {}
                facts.arguments = {name: value for name, value in given.items() if name not in besides}
                answers_options = getattr(request.url_rule, "provide_automatic_options", False)
                is_automatic = request.method == "OPTIONS" and answers_options
                view = app.view_functions.get(request.url_rule.endpoint)
                note_view(facts, view, request.method, is_automatic=is_automatic)

    def _note_response(self, app: Flask, *, response: Response, **_: Any) -> None:
        facts = facts_of(request.environ)
        if facts is None:
            return
        # Before any teardown function closes the database. A teardown comes for each copy of the context, too.
        facts.ask(request.environ)
        if facts.denied or facts.signed_out or not response.location or response.status_code < 300:
            return
        try:
            if any(is_same_page(response.location, page, request.environ) for page in _login_pages(app)):
                facts.denied = "it leads to the login page"
        except Exception as error:  # Flask would answer 500 for it
            facts.error = error

    def _note_exception(self, app: Flask, *, exception: BaseException, **_: Any) -> None:
        facts = facts_of(request.environ)
        if facts is not None:
            facts.tell_failure(exception)
            facts.ask(request.environ)

    def _note_sign_out(self, app: Flask, **_: Any) -> None:
        # Flask-Login says so while current_user is still who it was. To ask before each view would be to call the
        # application before it has opened its database, and to read the session ("Vary: Cookie") where no view does.
        self._note_user(app)
        facts = facts_of(request.environ)
        if facts is not None:
            facts.signed_out = True
            facts.ask_levels(request.environ)

    def _note_user(self, app: Flask) -> None:
        facts = facts_of(request.environ)
        if facts is None:
            return
        try:
            # As text now: proxies and models have none when the request is over. A copied context, whose end comes here
            # too, may have no user.
            facts.user = name_of(self._user() if self._user is not None else _user_of_login(app)) or facts.user
        except Exception as failure:  # Flask would answer 500 for it
            facts.error = failure


def _before(function: Callable[..., Any], hook: Callable[..., object]) -> Callable[..., Any]:
    """Return *function*, with *hook* called before it with the same arguments."""

    def both(*args: Any, **kwargs: Any) -> Any:
        hook(*args, *kwargs.values())
        return function(*args, **kwargs)

    return both


def _note_error(*args: Any) -> None:
    """Note an exception that a view raised, or the text of an ``abort()``. It is the last argument."""
    facts, error = facts_of(request.environ), args[-1]
    if facts is None:
        return
    if not isinstance(error, HTTPException):
        facts.tell_failure(error)
    elif (error.code or 500) >= 400 and error.description != _default_description(type(error)):
        facts.failure = printable(error.description)


def _default_description(kind: type[HTTPException]) -> str | None:
    found = (vars(each).get("description") for each in kind.__mro__)
    return next((each for each in found if isinstance(each, str)), None)


def _note_unauthorized(app: Flask, **_: Any) -> None:
    _deny(facts_of(request.environ), "a sign-in is required")


def _note_stale(app: Flask, **_: Any) -> None:
    _deny(facts_of(request.environ), "a fresh sign-in is required")


def _deny(facts: RequestFacts | None, reason: str) -> None:
    if facts is not None:
        facts.denied = reason


def _login_pages(app: Flask) -> list[str]:
    """Return the URLs of Flask-Login's login views; empty without it."""
    if not _has_login(app):
        return []
    manager: Any = getattr(app, "login_manager", None)
    views = {manager.login_view, *manager.blueprint_login_views.values()}
    return [flask_login.login_url(view) for view in views if view]


def _user_of_login(app: Flask) -> Any:
    """Return the name of Flask-Login's user; None without one."""
    return flask_login.current_user.get_id() if _has_login(app) else None


def _has_login(app: Flask) -> bool:
    return flask_login is not None and isinstance(getattr(app, "login_manager", None), flask_login.LoginManager)


def has_users(app: Flask) -> bool:
    """Return True if *app*, an audited application, names the users who are signed in."""
    return app.extensions["geventaudit.user"] is not None or _has_login(app)
