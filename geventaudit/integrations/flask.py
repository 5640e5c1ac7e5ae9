"""A record for each request of a Flask application, named by the route that it matched.

::

    app = Flask(__name__)
    Audit(client, access_level="Contributor").init_app(app)

A record is sent when the server closes the response. Flask's test client leaves that to the test:
``app.test_client().get("/", buffered=True)``, or ``with``.

Nothing is sent while an unpatched ``flask run`` runs; :mod:`geventaudit.integrations.wsgi` says why. Patched, it is::

    python -m gevent.monkey --module flask --app myapp run

Needs the extra ``geventaudit[flask]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from flask import Flask, got_request_exception, request, request_started
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.flask needs flask: pip install 'geventaudit[flask]'"
    raise ModuleNotFoundError(needs) from error

from geventaudit import AuditClient

from .wsgi import AuditMiddleware, facts_of

try:
    from flask_login import user_logged_out
except ImportError:
    user_logged_out = None

__all__ = ["Audit"]


class Audit:
    """The Flask extension: an :class:`~geventaudit.integrations.wsgi.AuditMiddleware` that knows what Flask knows.

    :param client: takes the records.
    :param app: initialised at once; otherwise call :meth:`init_app`.
    :param user: called at the end of each request, while it is still Flask's ``request``; returns the name of whoever
        is signed in, or None. With Flask-Login: ``lambda: current_user.get_id()``; there, it is called just before
        somebody is signed out, too, so that the record of that request says who it was.
    :param options: the keyword arguments of ``AuditMiddleware``.
    :raises ValueError, TypeError: for parameters that cannot be.
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
        if user is not None and not callable(user):
            raise TypeError(f"user must be a function that returns a name or None, got {user!r}")
        self._client = client
        self._user = user
        self._options = options
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Record the requests of *app*. Its middleware, with the counts, is ``app.extensions["geventaudit"]``.

        :raises ValueError, TypeError: for options that cannot be.
        :raises RuntimeError: *app* has this extension already.
        """
        if not isinstance(app, Flask):
            raise TypeError(f"app must be a Flask application, got {app!r}")
        if "geventaudit" in app.extensions:
            raise RuntimeError(f"{app!r} is audited already: one request is one record")
        middleware = AuditMiddleware(app.wsgi_app, self._client, **self._options)
        request_started.connect(self._tell_route, app)
        got_request_exception.connect(self._tell_failure, app)
        app.teardown_request(self._tell_user)
        if user_logged_out is not None:
            user_logged_out.connect(self._tell_who_leaves, app)
        app.extensions["geventaudit"] = middleware
        app.wsgi_app = middleware  # type: ignore[method-assign]  # as Flask's documentation says

    def _tell_route(self, app: Flask, **_: Any) -> None:
        # At once: what preprocessors take out of the arguments came from the path too, and a teardown that raises keeps
        # those that are called after it from being called.
        facts = facts_of(request.environ)
        if facts is not None:
            facts.method = request.method
            if request.url_rule is not None:
                facts.route = request.root_path + request.url_rule.rule
                # The defaults of a route go before what the path says, so none of them came with the request.
                besides = request.url_rule.defaults or {}
                given = request.view_args or {}
                facts.arguments = {name: value for name, value in given.items() if name not in besides}

    def _tell_failure(self, app: Flask, *, exception: BaseException, **_: Any) -> None:
        facts = facts_of(request.environ)
        if facts is not None:
            facts.tell_failure(exception)

    def _tell_who_leaves(self, app: Flask, **_: Any) -> None:
        # Flask-Login says so while current_user is still who it was. To ask before each view would be to call the
        # application before it has opened its database, and to read the session ("Vary: Cookie") where no view does.
        self._tell_user(None)

    def _tell_user(self, error: BaseException | None) -> None:
        facts = facts_of(request.environ)
        if facts is None or self._user is None:
            return
        try:
            user = self._user()
            # As text now: proxies and models have none when the request is over. A copied context, whose end comes here
            # too, may know of nobody.
            facts.user = facts.user if user is None else str(user)
        except Exception as failure:  # Flask would answer 500 for it
            facts.error = failure
