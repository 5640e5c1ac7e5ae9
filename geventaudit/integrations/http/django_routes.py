"""The routes of a Django project, for ``geventaudit routes``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils.module_loading import import_string

from geventaudit.integrations.django import AuditFactsMiddleware, is_rest_framework, recorded_route

from .routes import ANY, NO_ROUTE, Application, Route, route_of
from .views import handlers_of

__all__ = ["routes_of"]


def routes_of(application: Application) -> Iterator[Route]:
    """Yield the routes of a Django project: the methods of class-based views; of functions, any method at once."""
    middlewares = [import_string(each) for each in settings.MIDDLEWARE]
    is_noted = any(isinstance(each, type) and issubclass(each, AuditFactsMiddleware) for each in middlewares)
    has_users = any("Authentication" in each for each in settings.MIDDLEWARE)
    for route, pattern, arguments in _patterns(get_resolver().url_patterns, "", frozenset()):
        view: Any = pattern.callback
        path = recorded_route(route, view)
        identities = is_noted and (has_users or is_rest_framework(view))
        for method in handlers_of(view) or [ANY]:
            found = route_of(application, method, path, view, arguments=arguments, identities=identities)
            if found.state == "audited" and not is_noted:
                found.problems.append("AuditFactsMiddleware is not in MIDDLEWARE: routes and declarations are not read")
            yield found
    yield route_of(application, ANY, NO_ROUTE, None, identities=is_noted and has_users)


def _patterns(
    patterns: list[Any], prefix: str, arguments: frozenset[str]
) -> Iterator[tuple[str, URLPattern, frozenset[str]]]:
    """Yield each pattern with its whole route, joined as Django does, and the arguments that it takes from the path."""
    for each in patterns:
        text = str(each.pattern)
        route = prefix + (text.removeprefix("^") if prefix else text)
        regex = each.pattern.regex
        taken = arguments | (regex.groupindex.keys() or {str(index) for index in range(regex.groups)})
        if isinstance(each, URLResolver):
            yield from _patterns(each.url_patterns, route, taken - each.default_kwargs.keys())
        else:
            yield route, each, taken - each.default_args.keys()
