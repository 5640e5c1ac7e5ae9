"""The command ``geventaudit routes``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

from ..agent.shown import printable
from .terminal import CommandError, coloured, table

__all__ = ["add_routes"]

_FIELDS = ("OperationCategories", "OperationType", "OperationAccessLevel", "CallerAccessLevels", "CallerIdentities")
_NAMES = ("application", "app")


def add_routes(command: Callable[..., Any]) -> None:
    """Add the command to the parser.

    :param command: adds one, by name, function, description and examples.
    """
    routes = command(
        "routes",
        _routes,
        "list the routes of a Flask or Django application, and what is Unknown in their records",
        """\
  geventaudit routes app:app                       a Flask application
  geventaudit routes 'app:create_app()'            and its factory
  geventaudit routes project.wsgi                  a Django project, by its WSGI application
  geventaudit routes project.settings              or by its settings
  geventaudit routes app:app --fail-on-unknown     in CI""",
    )
    routes.add_argument(
        "app",
        metavar="APP",
        help="module:attribute or module:function(); the attribute of a module alone is application or app. The module "
        "is imported from the current folder or the Python path",
    )
    routes.add_argument(
        "--fail-on-unknown", action="store_true", help="exit with status 1 if a record of some route is not complete"
    )
    routes.add_argument(
        "--accept",
        metavar="FIELD",
        action="append",
        default=[],
        choices=_FIELDS,
        help=f"a field that may be Unknown: {', '.join(_FIELDS)}; may be given several times",
    )
    routes.add_argument("--json", action="store_true", help="print the routes as JSON")


def _routes(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, os.getcwd())
    with contextlib.redirect_stdout(sys.stderr):  # the application's own output
        applications, routes = _listed(arguments.app)
    unknown = [bool(set(each.unknown) - set(arguments.accept) or each.problems) for each in routes]
    if arguments.json:
        print(json.dumps([asdict(each) for each in routes], indent=2))
    else:
        has_describe = any(each.middleware is not None and each.middleware.describe for each in applications)
        _print(routes, arguments.accept, sum(unknown), has_describe=has_describe)
    return int(arguments.fail_on_unknown and any(unknown))


def _listed(name: str) -> tuple[list[Any], list[Any]]:
    """Return the applications that are in *name*, and their routes."""
    app = _load(name)
    # By name: integrations stand above the command line, and need the packages of their frameworks.
    listing = importlib.import_module("geventaudit.integrations.http.routes")
    applications = listing.applications_in(app)
    if not applications:
        inner = type(getattr(app, "app", app))
        raise CommandError(f"{name} is no Flask or Django application: it is a {inner.__module__}.{inner.__qualname__}")
    if all(each.middleware is None for each in applications):
        advice = {"flask": "Audit(client, app)", "django": "AuditMiddleware(get_wsgi_application(), client)"}
        raise CommandError(f"{name} is not audited: write {advice[applications[0].framework]}")
    try:
        return applications, listing.routes_in(applications)
    except Exception as error:  # Django imports the modules of URLs and views
        raise CommandError(f"cannot list the routes of {name}: {_described(error)}") from error


# -- loading -----------------------------------------------------------------------------------------------------------


def _load(text: str) -> Any:
    """Return the application that *text* names."""
    name, colon, attribute = text.partition(":")
    if not name or (colon and not attribute):
        raise CommandError(f"APP must be module:attribute or a module, got {text!r}")
    if name.endswith(".py") or "/" in name:
        raise CommandError(f"APP must name a module as Python imports it, got the file {name!r}: write app for app.py")
    module = _import(name)
    if colon:
        return _attribute(module, attribute)
    if hasattr(module, "ROOT_URLCONF"):
        return _of_settings(name, module)
    for each in _NAMES:
        if hasattr(module, each):
            return getattr(module, each)
    raise CommandError(
        f"the module {name} has neither {' nor '.join(_NAMES)} nor settings of Django: name module:attribute or "
        "module:function()"
    )


def _of_settings(name: str, settings: ModuleType) -> Any:
    application = getattr(settings, "WSGI_APPLICATION", None)
    if not isinstance(application, str) or "." not in application:
        raise CommandError(f"{name} has no WSGI_APPLICATION: name it as module:attribute")
    os.environ["DJANGO_SETTINGS_MODULE"] = name
    module, _, attribute = application.rpartition(".")
    return _attribute(_import(module), attribute)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise CommandError(f"cannot import {name}: {_described(error)}") from error


def _attribute(module: ModuleType, text: str) -> Any:
    """Return the attribute *text* of *module*, called if it ends with ``()``."""
    is_called, found = text.endswith("()"), module
    for name in text.removesuffix("()").split("."):
        if not hasattr(found, name):
            raise CommandError(
                f"{module.__name__} has no attribute {text.removesuffix('()')}; for a factory, name module:function()"
            )
        found = getattr(found, name)
    if not is_called:
        if type(found).__name__ == "function":
            raise CommandError(
                f"{text} is a function, not an application: for a factory, name {module.__name__}:{text}()"
            )
        return found
    try:
        return found()  # type: ignore[operator]
    except (Exception, SystemExit) as error:
        raise CommandError(f"{module.__name__}:{text} failed: {_described(error)}") from error


def _described(error: BaseException) -> str:
    """Return type and first line of *error*, and the line of the application that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    frames_of_others = [each for each in frames if each.filename != __file__ and "importlib" not in each.filename]
    own = [each for each in frames_of_others if "site-packages" not in each.filename] or frames_of_others
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{where}"


# -- printing ----------------------------------------------------------------------------------------------------------


def _print(routes: Sequence[Any], accepted: list[str], incomplete: int, *, has_describe: bool) -> None:
    for route, line in zip(routes, table([_columns(each) for each in routes], widest=40), strict=True):
        print(line)
        for name in route.unknown:
            suffix = " (accepted)" if name in accepted else ""
            print(f"        {coloured('Unknown', 'yellow' if suffix else 'red', sys.stdout)}: {name}{suffix}")
        for problem in route.problems:
            print(f"        {coloured(printable(problem), 'red', sys.stdout)}")
    states = [route.state for route in routes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("audited", "unaudited", "excluded", "outside"))
    print(f"{len(routes)} routes: {counts}; {incomplete} not complete")
    if has_describe:
        print("describe may change records and veto them: not shown here")


def _columns(route: Any) -> list[str]:
    if route.state != "audited":
        said = {"unaudited": "unaudited", "excluded": "excluded by its path", "outside": "outside of AuditMiddleware"}
        return [route.method, route.path, route.view, said[route.state], "", "", ""]
    category = ",".join(route.categories) or "-"
    targets = [*route.target, "Path"]
    kind = f"{route.audit_type} {route.type}"
    return [
        *(route.method, route.path, route.view, route.operation, kind),
        *(f"{category}, {route.access_level or '-'}", " ".join(targets)),
    ]
