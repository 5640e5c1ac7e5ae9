"""Frameworks that need no set-up of their own: known by the application that is wrapped, or by the environment."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .facts import RequestFacts
from .paths import mount_of
from .views import note_view

__all__ = ["attach", "read_environ"]

_MODULES = ("bottle", "falcon", "pyramid")


def attach(app: object) -> None:
    """Give *app* the hook of its framework, if it is an application of Bottle, Falcon or Pyramid."""
    for kind in type(app).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _MODULES:
            import_module(f"geventaudit.integrations.{root}").attach(app)
            return


def read_environ(environ: Mapping[str, Any], facts: RequestFacts) -> None:
    """Add to *facts* what frameworks leave in the environment: Bottle its route."""
    route = environ.get("bottle.route")
    if route is not None and not facts.route:
        facts.route = mount_of(environ) + str(getattr(route, "rule", ""))
        facts.arguments = facts.arguments or environ.get("route.url_args") or {}
        note_view(facts, getattr(route, "callback", None), str(environ.get("REQUEST_METHOD")))
