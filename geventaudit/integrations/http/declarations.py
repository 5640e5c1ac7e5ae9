"""Declarations: the facts about an operation that its developer knows, and no request carries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from geventaudit import AuditType, OperationCategory, OperationType, TargetResource

from .current import current_facts
from .hooks import check_hook
from .marking import marked
from .redaction import Redact, Redaction
from .text import printable

__all__ = [
    "Category",
    "Declaration",
    "Resources",
    "Target",
    "declare",
    "fields_of",
    "filled",
    "levels_of",
    "redacted",
    "resources_of",
]

F = TypeVar("F", bound=Callable[..., Any])

Category: TypeAlias = OperationCategory | Iterable[OperationCategory]
"""One category of an operation, or several."""

Resources: TypeAlias = Mapping[str, str | TargetResource | Iterable[str | TargetResource]]
"""Names of resources, or resources, by the type of resource: ``{"Secret": "db-password"}``."""

Target: TypeAlias = Mapping[str, str | Iterable[str]] | Callable[[Mapping[str, Any]], Resources]
"""The target of an operation: ``{"Secret": "{name}"}``, with the route's arguments in braces, or a function of the WSGI
environment that returns the resources."""

MAX_LEVELS = 100
"""Access levels of a caller that a record keeps."""

MAX_RESOURCES = 10_000
"""Resources, and types of resources, that a function may return. More do not fit into a frame."""

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Declaration:
    """The declared parts of a record. An empty field is not declared.

    A declaration is a decorator of views. An application without views sets ``facts_of(environ).declaration``.
    """

    operation: str = ""
    categories: tuple[OperationCategory, ...] = ()
    category_description: str = ""
    type: OperationType | None = None
    audit_type: AuditType | None = None
    access_level: str = ""
    target: Target | None = None
    redact: Redact | None = None

    def __call__(self, view: F) -> F:
        """Return *view* with this declaration.

        :raises TypeError: *view* is no view, or asynchronous.
        """

        def note() -> None:
            facts = current_facts()
            if facts is not None and facts.declaration is None:
                facts.declaration = self

        return marked(view, self, "@audited", note)

    def over(self, base: Declaration) -> Declaration:
        """Return this declaration, with the fields of *base* in the places of those that are not declared."""
        named = self if self.categories else base
        return Declaration(
            self.operation or base.operation,
            named.categories,
            named.category_description,
            self.type or base.type,
            self.audit_type or base.audit_type,
            self.access_level or base.access_level,
            self.target or base.target,
            self.redact or base.redact,
        )

    def without_operation(self) -> Declaration:
        """Return this declaration for requests that do not run the operation, such as an automatic OPTIONS."""
        return replace(self, operation="", type=None)


def declare(
    *,
    category: Category | None = None,
    category_description: str = "",
    type: OperationType | None = None,  # noqa: A002  (the field's name)
    audit_type: AuditType | None = None,
    access_level: str = "",
    target: Target | None = None,
    redact: Redact | None = None,
    operation: str = "",
) -> Declaration:
    """Return the declaration of these arguments.

    :raises ValueError, TypeError: an argument is invalid.
    """
    for name, text in (("access_level", access_level), ("category_description", category_description)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be text, got {text!r}")
        _check_utf8(name, text)
    plane = None if audit_type is None else plane_of(audit_type)
    if redact is not None:
        check_hook("redact", redact, "name", "text")
    categories = _categories(category)
    if OperationCategory.OTHER in categories and not category_description.strip():
        raise ValueError("category_description must say what OperationCategory.OTHER stands for")
    if category_description and OperationCategory.OTHER not in categories:
        raise ValueError("category_description goes with category=OperationCategory.OTHER only")
    return Declaration(
        operation,
        categories,
        category_description.strip(),
        None if type is None else _member("type", OperationType, type),
        plane,
        access_level.strip(),
        None if target is None else _target(target),
        redact,
    )


def _categories(category: Any) -> tuple[OperationCategory, ...]:
    if category is None:
        return ()
    each: Any = [category] if isinstance(category, str) else category
    if not isinstance(each, Iterable):
        raise TypeError(f"category must be an OperationCategory or several, got {category!r}")
    found = tuple(dict.fromkeys(_member("category", OperationCategory, one) for one in each))
    if not found:
        raise ValueError(f"category must have at least one OperationCategory, got {category!r}")
    return found


def _member(name: str, kind: Any, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
        raise ValueError(f"{name} must be one of {names}, got {value!r}") from None


def _target(target: Any) -> Target:
    if callable(target):
        check_hook("target", target, "environ")
        return target  # type: ignore[no-any-return]
    if not isinstance(target, Mapping) or not target:
        raise TypeError(
            f'target must be a mapping like {{"Secret": "{{name}}"}}, or a function of (environ), got {target!r}'
        )
    found: dict[str, tuple[str, ...]] = {}
    for kind, given in target.items():
        names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
        for text in (kind, *names):
            if not isinstance(text, str) or not text.strip():
                raise TypeError(f"target must have texts as types and names of resources, got {text!r} in {target!r}")
            _check_utf8("target", text)
        for name in names:
            if set("{}") & set(_FIELD.sub("", name)):
                raise ValueError(f"target must name the route's arguments as in {{name}}, got {name!r}")
        found[kind] = names
    return found


def _check_utf8(name: str, text: str) -> None:
    """Refuse here what each record would be refused for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text that UTF-8 can write, got {text!r}") from None


def fields_of(target: Target | None) -> set[str]:
    """Return the arguments of the route that *target* names."""
    if not isinstance(target, Mapping):
        return set()
    return {field for names in target.values() for name in names for field in _FIELD.findall(name)}


def resources_of(given: Any) -> dict[str, list[TargetResource]]:
    """Return the resources that the application's function has returned.

    :raises TypeError: *given* is no mapping.
    :raises ValueError: a type is blank, or there are more than :data:`MAX_RESOURCES` resources.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"target must return a mapping of names by types, returned a {type(given).__name__}")
    found: dict[str, list[TargetResource]] = {}
    left = MAX_RESOURCES
    for kind, names in given.items():
        text = printable(kind)
        if not text.strip():
            raise ValueError(f"target must return types of resources that are not blank, returned {text!r}")
        found[text] = list(islice(_resources(names), left + 1))
        left -= max(len(found[text]), 1)
        if left < 0:
            raise ValueError(f"a record has at most {MAX_RESOURCES} resources: name what holds them")
    return found


def _resources(names: Any) -> Iterable[TargetResource]:
    for each in [names] if isinstance(names, str | TargetResource) or not isinstance(names, Iterable) else names:
        if isinstance(each, TargetResource):
            yield TargetResource(*map(printable, (each.name, each.cluster, each.data_center, each.region)))
        else:
            yield TargetResource(printable(each, keep_end=True))


def filled(target: Mapping[str, Iterable[str]], arguments: Mapping[str, str]) -> dict[str, list[TargetResource]]:
    """Return the resources of *target*, with the arguments of the route in their names.

    :raises LookupError: the route has no such argument.
    """
    missing = ", ".join(sorted(fields_of(target) - arguments.keys()))
    if missing:
        raise LookupError(f"the route took no argument {missing} from the path")

    def fill(name: str) -> str:
        return _FIELD.sub(lambda field: arguments[field[1]], name)

    return {kind: [TargetResource(fill(name)) for name in names] for kind, names in target.items()}


def redacted(resources: Mapping[str, list[TargetResource]], redaction: Redaction) -> dict[str, list[TargetResource]]:
    """Return *resources* without secrets."""

    def shown(each: TargetResource) -> TargetResource:
        texts = (each.name, each.cluster, each.data_center, each.region)
        return TargetResource(*(redaction.text("target", text) for text in texts))

    return {kind: list(map(shown, group)) for kind, group in resources.items()}


def plane_of(audit_type: AuditType) -> AuditType:
    """Return *audit_type* as a member.

    :raises ValueError: it is neither the control plane nor the data plane.
    """
    if audit_type not in (AuditType.CONTROL_PLANE, AuditType.DATA_PLANE):
        raise ValueError(f"audit_type must be AuditType.CONTROL_PLANE or AuditType.DATA_PLANE, got {audit_type!r}")
    return AuditType(audit_type)


def levels_of(given: Iterable[Any] | None) -> list[str]:
    """Return the access levels that an application gave, as texts; a text is one level.

    :raises TypeError: *given* cannot be iterated over.
    :raises ValueError: *given* has more than :data:`MAX_LEVELS` levels.
    """
    if given is None:
        return []
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise TypeError(f"caller_access_levels must be texts, got {given!r}")
    levels = [given] if isinstance(given, str) else given
    found = [printable(each).strip() for each in islice(levels, MAX_LEVELS + 1) if each is not None]
    if len(found) > MAX_LEVELS:
        raise ValueError(f"a caller has at most {MAX_LEVELS} access levels on record; name its roles")
    return [level for level in found if level]
