"""The decorators of views, ``audited`` and ``unaudited``, and the declaration of the view that a request matched.

A decorator leaves a mark on the view. The integrations of frameworks read the mark as soon as the route is known, so
that a request which a check refuses before the view runs is on record as the view's operation. A function or method
without such an integration declares itself when it is called; there, the declaration of a class is not read.

Marks are looked for from the inside: the method of a class-based view, its class, ``dispatch``, then the function that
is registered. Each field is taken from the first that declares it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, TypeVar

from geventaudit import AuditType, OperationType

from .declarations import Category, Declaration, Target, declare
from .facts import RequestFacts
from .marking import has_mark, mark_of, marked
from .redaction import Redact

__all__ = ["audited", "class_of", "declaration_of", "handlers_of", "note_marks", "note_view", "unaudited"]

F = TypeVar("F", bound=Callable[..., Any])


def audited(
    operation: str,
    *,
    category: Category | None = None,
    category_description: str = "",
    type: OperationType | None = None,  # noqa: A002  (the field's name)
    audit_type: AuditType | None = None,
    access_level: str = "",
    target: Target | None = None,
    redact: Redact | None = None,
) -> Declaration:
    """Return a decorator that declares the operation of a view. The defaults are those of ``AuditMiddleware``.

    The view may be a function, a method of a class-based view, a class, or the result of ``as_view()``. In Flask, the
    decorator stands below or above ``@app.route``. The declaration of a class is for its methods, and is not inherited.
    Another route of the same function, without a decorator, has the same declaration.

    :param operation: the operation's name, as those who read the trail know it: ``RotateKey``. The method and the route
        are in ``custom_data["route"]`` then.
    :param category: one or more members of ``OperationCategory``.
    :param category_description: with ``OperationCategory.OTHER``, the category in words.
    :param type: the operation's type; the method's if it is left out.
    :param audit_type: ``CONTROL_PLANE`` or ``DATA_PLANE``.
    :param access_level: the access level that the operation needs.
    :param target: the operation's target, beside the path: ``{"Secret": "{name}"}`` with the route's arguments in
        braces, or a function of the WSGI environment that returns names, or lists of them, by types.
    :param redact: the function for this view's texts, instead of the application's.
    :raises ValueError, TypeError: an argument is invalid, or the view is asynchronous.
    """
    if not isinstance(operation, str):
        raise TypeError(f'the operation must be a name: write @audited("RotateKey"), got {operation!r}')
    if not operation.strip() or not operation.isprintable():
        raise ValueError(f"the operation must be a name of printable characters, got {operation!r}")
    return declare(
        operation=operation.strip(),
        category=category,
        category_description=category_description,
        type=type,
        audit_type=audit_type,
        access_level=access_level,
        target=target,
        redact=redact,
    )


def unaudited(view: F) -> F:
    """Make no record of the requests of *view*: a view of Flask, Django, Bottle, Falcon or Pyramid.

    All routes of the function are unaudited, but for those with a declaration of their own. Other applications, and
    Falcon's sinks, set ``facts_of(environ).is_unaudited``. ``geventaudit routes`` lists the views that are unaudited.

    :raises TypeError: *view* is no view, or asynchronous.
    """
    # Not when it is called: an audited view may call another one.
    return marked(view, None, "@unaudited")


# -- the view of a request ---------------------------------------------------------------------------------------------


def note_view(facts: RequestFacts, view: Any, method: str, *, is_automatic: bool = False) -> None:
    """Note the declaration of the view that a request matched.

    :param is_automatic: the framework answers this method by itself.
    """
    try:
        _note(facts, *declaration_of(view, method, is_automatic=is_automatic))
    except Exception as error:  # a view may be any object
        facts.error = error


def note_marks(facts: RequestFacts, places: Iterable[Any], *, is_run: bool = True) -> None:
    """Note the declaration of the view that a request matched, of a framework with views of another form.

    :param places: the functions and classes that decorators may have marked, from the inside.
    :param is_run: the request runs the view's operation.
    """
    _note(facts, *_merged(filter(has_mark, places), is_run=is_run))


def _note(facts: RequestFacts, declaration: Declaration | None, is_unaudited: bool) -> None:
    facts.is_unaudited |= is_unaudited  # a middleware may have said so before
    facts.declaration = declaration or facts.declaration


def declaration_of(view: Any, method: str, *, is_automatic: bool = False) -> tuple[Declaration | None, bool]:
    """Return the declaration of *view* for requests of *method*, or None, and True if the view is unaudited."""
    handler, is_run = _handler_of(view, method)
    return _merged(_marked_places(view, handler), is_run=is_run and not is_automatic)


def _merged(places: Iterable[Any], *, is_run: bool) -> tuple[Declaration | None, bool]:
    found = [mark_of(place) for place in places]
    if found and found[0] is None:
        return None, True
    merged: Declaration | None = None
    for mark in found:
        if mark is not None:
            merged = mark if merged is None else merged.over(mark)
    if merged is not None and not is_run:
        merged = merged.without_operation()
    return merged, False


def handlers_of(view: Any) -> list[str]:
    """Return the methods, in capital letters, that a class-based view of Django has; empty for other views."""
    kind = class_of(view)
    if kind is None or not hasattr(kind, "http_method_names"):
        return []
    actions = _actions_of(view)
    if actions is not None:
        return [method.upper() for method in actions if method != "head"]
    asked = (method for method in kind.http_method_names if method not in ("head", "options"))
    return [method.upper() for method in asked if callable(getattr(kind, method, None))]


def class_of(view: Any) -> Any:
    found = (getattr(view, name, None) for name in ("view_class", "cls"))
    return next((kind for kind in found if isinstance(kind, type)), None)


def _actions_of(view: Any) -> dict[str, str] | None:
    """Return the names of methods by HTTP methods, if *view* is made of a view set of Django REST Framework."""
    actions = getattr(view, "actions", None)
    return actions if isinstance(actions, dict) else None


def _handler_of(view: Any, method: str) -> tuple[Any, bool]:
    """Return the method of a class-based view that answers *method*, and False if that is not the operation.

    Django answers OPTIONS by a method of its own, and 405 without a method.
    """
    kind = class_of(view)
    if kind is None:
        return None, True
    actions, name = _actions_of(view), method.lower()
    if actions is not None:
        name = actions.get(name) or (actions.get("get", "") if name == "head" else "")
    elif name == "head" and not hasattr(kind, "head"):
        name = "get"
    handler = getattr(kind, name, None) if name else None
    if getattr(handler, "__module__", "") == "rest_framework.decorators":  # of @api_view, around a function
        handler = _function_inside(handler)
    if not hasattr(kind, "http_method_names"):  # of Flask, which has refused and answered before
        return handler, True
    return handler, handler is not None and (method != "OPTIONS" or has_mark(handler))


@lru_cache(maxsize=1024)
def _function_inside(handler: Any) -> Any:
    """Return the function that ``@api_view`` has put *handler* around."""
    return inspect.getclosurevars(handler).nonlocals.get("func", handler)


def _marked_places(view: Any, handler: Any) -> Iterator[Any]:
    """Yield the marked functions and classes of a view, from the inside."""
    kind = class_of(view)
    places = [handler]
    if kind is not None:
        places += [kind, getattr(kind, "dispatch", None), getattr(kind, "dispatch_request", None)]
    while isinstance(view, partial):
        view = view.func
    places += [view, getattr(view, "__call__", None)]  # noqa: B004  (a callable object may have a marked method)
    yield from filter(has_mark, places)
