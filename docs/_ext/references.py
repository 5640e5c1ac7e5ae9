"""References in docstrings: short names, names of others, and a check that each role names an existing thing.

A nitpicky build (``-n``) warns of each reference without a page. Here, a reference is right in two more cases: it is
part of a type annotation or of a class's bases, or its role names an object that can be imported and has no page.
"""

from __future__ import annotations

import pkgutil
from inspect import getmodule
from typing import Any

from docutils import nodes

ALIASES = {
    "Field": "marshmallow.fields.Field",
    "Flask": "flask.Flask",
    "HttpRequest": "django.http.HttpRequest",
    "HttpResponseBase": "django.http.HttpResponseBase",
    "SSLContext": "ssl.SSLContext",
    "StrEnum": "enum.StrEnum",
    "fields.Field": "marshmallow.fields.Field",
    "gevent._gevent_cqueue.Channel": "gevent.queue.Channel",
}
"""Names in annotations that are imported for type checkers only, and names of internal modules of others."""


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Find an alias, or the one documented object whose name ends so. intersphinx looks for all others."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"] = ALIASES.get(node["reftarget"], node["reftarget"]).lstrip(".")
    python = env.domains.python_domain
    found = {each.node_id: name for name, each in python.objects.items() if name.endswith(f".{target}")}
    if len(found) != 1:
        return None
    (full,) = found.values()
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], full, node, contnode)


def is_right(app: Any, domain: Any, node: Any) -> bool | None:
    """Return True, which prevents the warning, for a reference without a page that is right."""
    if node.get("refdomain") != "py":
        return None
    is_role = isinstance(node.children[0], nodes.literal)
    is_base = isinstance(node.parent, nodes.paragraph) and node.parent.astext().startswith("Bases: ")
    return True if not is_role or is_base or _exists(node) else None


def _exists(node: Any) -> bool:
    target, module, owner = node["reftarget"].lstrip("."), node.get("py:module"), node.get("py:class")
    places = [target]
    if module:
        places += [f"{module}.{target}", f"{module.rpartition('.')[0]}.{target}"]
        if owner:
            places.append(f"{module}.{owner}.{target}")
    return any(map(_can_be_found, places))


def _can_be_found(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        pass
    else:
        return True
    owner, _, attribute = name.rpartition(".")
    try:  # an attribute of instances is only declared, or set in a method
        found = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and getmodule(found) is not None and attribute in _instance_attributes(found)


def _instance_attributes(owner: type[Any]) -> set[str]:
    names: set[str] = set()
    for each in owner.__mro__:
        names |= set(getattr(each, "__annotations__", ()))
        code = getattr(each.__init__, "__code__", None)
        names |= set(code.co_names) if code else set()
    return names


def setup(app: Any) -> dict[str, Any]:
    app.connect("missing-reference", resolve, priority=400)  # before intersphinx
    app.connect("warn-missing-reference", is_right)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
