"""The errors of a Bottle application, for the record that ``AuditMiddleware`` sends. Its routes are in the environment.

Views declare their operations by ``@audited``, below or above ``@app.route``.

::

    app = bottle.Bottle()
    application = AuditMiddleware(app, client)  # attaches by itself, if app is the Bottle application
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

try:
    import bottle
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.bottle needs bottle: pip install 'geventaudit[bottle]'"
    raise ModuleNotFoundError(needs) from error

from .http.facts import RequestFacts, facts_of
from .http.frameworks import read_environ
from .http.text import printable

__all__ = ["attach"]


def attach(app: Any) -> None:
    """Make the errors of *app*, a ``Bottle``, known. Idempotent."""
    if not any(isinstance(each, _Facts) for each in app.plugins):
        app.install(_Facts())


class _Facts:
    """A Bottle plugin that notes exceptions, and the texts of ``abort()``."""

    name = "geventaudit"
    api = 2

    def apply(self, callback: Callable[..., Any], route: Any) -> Callable[..., Any]:
        @functools.wraps(callback)
        def noting(*args: Any, **kwargs: Any) -> Any:
            environ = bottle.request.environ
            facts = facts_of(environ)
            if facts is not None:
                read_environ(environ, facts)
            try:
                return callback(*args, **kwargs)
            except Exception as error:
                if facts is not None:
                    _note(facts, error)
                raise
            finally:
                if facts is not None:
                    facts.ask(environ)

        return noting


def _note(facts: RequestFacts, error: Exception) -> None:
    if isinstance(error, bottle.HTTPError):
        facts.failure = printable(error.body or "")
    elif not isinstance(error, bottle.HTTPResponse):
        facts.tell_failure(error)
