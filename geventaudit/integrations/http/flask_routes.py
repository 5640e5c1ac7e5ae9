"""The routes of a Flask application, for ``geventaudit routes``."""

from __future__ import annotations

from collections.abc import Iterator

from geventaudit.integrations.flask import has_users

from .routes import ANY, NO_ROUTE, Application, Route, route_of

__all__ = ["routes_of"]


def routes_of(application: Application) -> Iterator[Route]:
    """Yield the routes of a Flask application. HEAD and OPTIONS are left out: Flask answers them by itself, mostly."""
    app = application.app
    is_noted = "geventaudit" in app.extensions
    identities = is_noted and has_users(app)
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: str(rule.rule)):
        view = app.view_functions.get(rule.endpoint)
        arguments = rule.arguments - (rule.defaults or {}).keys()
        methods = rule.methods or {ANY}
        for method in sorted(methods - {"HEAD", "OPTIONS"} or methods):
            found = route_of(application, method, rule.rule, view, arguments=arguments, identities=identities)
            if found.state == "audited" and not is_noted:
                found.problems.append(f"{app!r} has no Audit(client, app): routes and declarations are not read")
            yield found
    yield route_of(application, ANY, NO_ROUTE, None, identities=identities)
