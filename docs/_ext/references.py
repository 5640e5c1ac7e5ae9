"""References: public names in guides, short names in docstrings, names of others; and a check of each role.

In a guide, a literal that is a public name (``Client``, ``client.send()``, ``AuditType.DATA_PLANE``) is a link to the
reference, once in each section.

A nitpicky build (``-n``) warns of each reference without a page. Here, a reference is right in two more cases: it is
part of a type annotation or of a class's bases, or its role names an object that can be imported and has no page.
"""

from __future__ import annotations

import pkgutil
import re
from inspect import getmodule
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref

import geventaudit

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


METHODS = {name for name in vars(geventaudit.AuditClient) if not name.startswith("_")}


def public_name(literal: str) -> str | None:
    """Return the full name of the public thing that a literal in a guide is; None for all other literals."""
    name = re.sub(r"\(.*\)$", "", literal, flags=re.DOTALL)
    if name.removeprefix("client.") in METHODS and (name.startswith("client.") or literal.endswith(")")):
        return f"geventaudit.Client.{name.removeprefix('client.')}"
    owner, _, member = name.removeprefix("geventaudit.").partition(".")
    if owner not in geventaudit.__all__ or not (owner[0].isupper() or literal.endswith(")")):
        return None
    if member and not hasattr(getattr(geventaudit, owner), member):
        return None
    return f"geventaudit.{owner}.{member}" if member else f"geventaudit.{owner}"


def link_names(app: Any, doctree: nodes.document) -> None:
    """Make links of public names in all pages but the reference."""
    page = app.env.docname
    if page.startswith("reference/"):
        return
    linked: set[tuple[int, str]] = set()
    for literal in list(doctree.findall(nodes.literal)):
        name = public_name(literal.astext())
        section, parent = literal.parent, literal.parent
        while not isinstance(section, nodes.section | nodes.document):
            section = section.parent
        if name is None or isinstance(parent, nodes.title | nodes.reference | pending_xref):
            continue
        if (id(section), name) in linked:
            continue
        linked.add((id(section), name))
        link = pending_xref("", refdomain="py", reftype="obj", reftarget=name, refdoc=page, refexplicit=False)
        parent.replace(literal, link)
        link += literal


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
    """Look for the target where its docstring stands, in the page's module, and beside both."""
    target = node["reftarget"].lstrip(".")
    owners = [node.get("py:module"), f"{node.get('py:module')}.{node.get('py:class')}"]
    owners += re.findall(r"docstring of ([\w.]+)", _source_of(node))
    places = {target}
    for owner in filter(None, owners):
        while owner:
            places.add(f"{owner}.{target}")
            owner = owner.rpartition(".")[0]
    return any(map(_can_be_found, places))


def _source_of(node: Any) -> str:
    while node is not None and not getattr(node, "source", None):
        node = node.parent
    return "" if node is None else str(node.source)


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
    app.connect("doctree-read", link_names)
    app.connect("missing-reference", resolve, priority=400)  # before intersphinx
    app.connect("warn-missing-reference", is_right)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
