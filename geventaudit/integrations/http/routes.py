"""The routes of an application, and the content of the records of their requests.

``applications_in`` finds the Flask and Django applications in a stack of WSGI middlewares and mounts. ``routes_in``
lists their routes. ``route_of`` gives the content of a record, by the same declarations as ``AuditMiddleware``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from geventaudit import AuditType, OperationCategory, OperationType
from geventaudit.integrations.wsgi import AuditMiddleware, type_of

from .declarations import Declaration, fields_of
from .views import class_of, declaration_of

__all__ = ["ANY", "NO_ROUTE", "Application", "Route", "applications_in", "name_of_view", "route_of", "routes_in"]

ANY = "*"
"""The method of a route whose view takes any."""

NO_ROUTE = "(no route)"
"""The path of requests that match no route: they are answered by 404, 405 or a redirect."""

State = Literal["audited", "unaudited", "excluded", "outside"]

_MAX_DEPTH = 20  # middlewares around an application
_MODULES = {"flask": "flask_routes", "django": "django_routes"}


@dataclass(frozen=True)
class Application:
    """An application in a stack of middlewares."""

    app: Any
    framework: str
    """``flask`` or ``django``."""
    mount: str
    """The path at which the application is mounted, without a slash at its end."""
    inner_mount: str
    """The part of *mount* that stands behind the middleware."""
    middleware: AuditMiddleware | None
    """The middleware that records its requests; None if there is none."""


@dataclass(frozen=True)
class Route:
    """A method of a route, and the content of its records, by the names on the wire."""

    method: str
    path: str
    view: str
    """The module and name of the view: ``app.read_secret``."""
    state: State
    """``audited``; ``unaudited`` by its decorator; ``excluded`` by its path; ``outside`` of any ``AuditMiddleware``."""
    operation: str = ""
    type: str = ""
    audit_type: str = ""
    categories: list[str] = field(default_factory=list)
    access_level: str = ""
    target: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """The fields that are ``Unknown`` in each record."""
    problems: list[str] = field(default_factory=list)
    """Other reasons why records are not complete."""


def applications_in(app: Any) -> list[Application]:
    """Return the Flask and Django applications in *app*, a stack of WSGI middlewares and mounts."""
    return list(_applications(app, "", None, "", set(), 0))


def _applications(
    app: Any, mount: str, middleware: AuditMiddleware | None, outer_mount: str, seen: set[tuple[int, str]], depth: int
) -> Iterator[Application]:
    app = getattr(app, "__self__", app)  # of a bound method, such as Flask.wsgi_app
    if app is None or depth > _MAX_DEPTH or (id(app), mount) in seen:
        return
    seen.add((id(app), mount))
    if isinstance(app, AuditMiddleware) and middleware is None:
        middleware, outer_mount = app, mount
    framework = _framework_of(app)
    if framework:
        own = getattr(app, "extensions", {}).get("geventaudit") if middleware is None else None
        inner_mount = mount[len(outer_mount) :] if own is None else ""
        yield Application(app, framework, mount, inner_mount, middleware or own)
    mounts = getattr(app, "mounts", None)  # of werkzeug's DispatcherMiddleware
    for path, mounted in mounts.items() if isinstance(mounts, Mapping) else ():
        yield from _applications(mounted, f"{mount}{str(path).rstrip('/')}", middleware, outer_mount, seen, depth + 1)
    for name in ("app", "application", "wsgi_app"):
        yield from _applications(getattr(app, name, None), mount, middleware, outer_mount, seen, depth + 1)


def _framework_of(app: object) -> str:
    for kind in type(app).__mro__:
        if (kind.__module__, kind.__name__) in (("flask.app", "Flask"), ("django.core.handlers.wsgi", "WSGIHandler")):
            return kind.__module__.partition(".")[0]
    return ""


def routes_in(applications: Iterable[Application]) -> list[Route]:
    """Return the routes of *applications*, and of each application the requests without a route."""
    found: list[Route] = []
    for each in applications:
        module: Any = import_module(f"geventaudit.integrations.http.{_MODULES[each.framework]}")
        found += module.routes_of(each)
    return found


def route_of(
    application: Application,
    method: str,
    path: str,
    view: Any,
    *,
    arguments: Iterable[str] = (),
    identities: bool = True,
) -> Route:
    """Return the route *path* of *application* for requests of *method*.

    :param path: the route; :data:`NO_ROUTE` for requests without one.
    :param view: the view; None for requests without a route.
    :param arguments: the names of the arguments that the route takes from the path.
    :param identities: False if nothing names the caller.
    """
    has_route = path != NO_ROUTE
    whole = application.mount + path if has_route else path
    name, middleware = name_of_view(view), application.middleware
    if middleware is None:
        return Route(method, whole, name, "outside", problems=["no record is made: it is outside of AuditMiddleware"])
    # By the text of the route. An argument in it may be any text, so that a pattern that matches all of them is found.
    if has_route and middleware.exclusion.matches(application.inner_mount + path):
        return Route(method, whole, name, "excluded")
    declaration, is_unaudited = declaration_of(view, method)
    if is_unaudited:
        return Route(method, whole, name, "unaudited")
    declared = middleware.defaults if declaration is None else declaration.over(middleware.defaults)
    missing = sorted(fields_of(declared.target) - set(arguments))
    return Route(
        method,
        whole,
        name,
        "audited",
        operation=declared.operation or f"{'<method>' if method == ANY else method} {whole if has_route else '<path>'}",
        type=str(declared.type or ("by method" if method == ANY else type_of(method))),
        audit_type=_AUDIT_TYPES[declared.audit_type or AuditType.CONTROL_PLANE],
        categories=[str(category) for category in declared.categories],
        access_level=declared.access_level,
        target=_targets(declared.target),
        unknown=list(_unknown(declared, middleware, identities)),
        problems=[f"target names the argument {each}, which the route does not have" for each in missing],
    )


_AUDIT_TYPES = {AuditType.CONTROL_PLANE: "ControlPlane", AuditType.DATA_PLANE: "DataPlane"}


def _targets(target: Any) -> list[str]:
    if isinstance(target, Mapping):
        return [f"{kind}/{name}" for kind, names in target.items() for name in names]
    return [] if target is None else [f"by {name_of_view(target)}"]


def _unknown(declared: Declaration, middleware: AuditMiddleware, identities: bool) -> Iterator[str]:
    if not set(declared.categories) - {OperationCategory.UNKNOWN}:
        yield "OperationCategories"
    if declared.type is OperationType.UNKNOWN:
        yield "OperationType"
    if not declared.access_level:
        yield "OperationAccessLevel"
    if middleware.caller_access_levels is None:
        yield "CallerAccessLevels"
    if not identities:
        yield "CallerIdentities"


def name_of_view(view: Callable[..., Any] | None) -> str:
    """Return module and name of *view*: ``app.read_secret``."""
    if view is None:
        return ""
    named: Any = class_of(view) or getattr(view, "func", view)
    name = getattr(named, "__qualname__", None) or type(named).__qualname__
    return f"{getattr(named, '__module__', '')}.{name}".lstrip(".")
