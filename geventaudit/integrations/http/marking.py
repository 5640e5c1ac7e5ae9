"""Marks on views: attributes that survive ``functools.wraps``, and the functions that carry them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any, TypeVar

__all__ = ["METHODS", "has_mark", "mark_of", "marked"]

F = TypeVar("F", bound=Callable[..., Any])

METHODS = ("get", "post", "put", "patch", "delete", "head", "options", "trace")
"""The names of the methods of class-based views."""

_MARK = "__geventaudit__"
# The mark of the function inside. A decorator above @app.route comes too late: Flask calls the function inside.
_INNER_MARK = "__geventaudit_inner__"
_AMBIGUOUS = object()


def has_mark(place: Any) -> bool:
    """Return True if *place*, a function or a class, is marked itself: a class does not inherit a mark."""
    marks = getattr(place, "__dict__", {})
    return _MARK in marks or marks.get(_INNER_MARK, _AMBIGUOUS) is not _AMBIGUOUS


def mark_of(place: Any) -> Any:
    """Return the mark of *place*."""
    marks = vars(place)
    return marks[_MARK] if _MARK in marks else marks[_INNER_MARK]


def marked(view: F, mark: object, name: str, note: Callable[[], None] | None = None) -> F:
    """Return *view* with a mark: a class itself, or a function around another view.

    The function inside gets the mark too, unless it gets two that differ.

    :param name: of the decorator, for errors.
    :param note: called before each call of the function.
    :raises TypeError: *view* is no view, or asynchronous.
    """
    if isinstance(view, staticmethod | classmethod) or not callable(view):
        raise TypeError(f"{name} decorates views, got {view!r}")
    if isinstance(view, type):
        each = [getattr(view, method, None) for method in (*METHODS, "dispatch", "dispatch_request")]
    else:
        each = [view, view.func if isinstance(view, partial) else getattr(view, "__call__", None)]  # noqa: B004
    if any(map(_is_async, each)):
        raise TypeError(f"{view!r} is asynchronous: asyncio is out of scope")
    if isinstance(view, type):
        setattr(view, _MARK, mark)
        return view

    @wraps(view)
    def marked_view(*args: Any, **kwargs: Any) -> Any:
        if note is not None:
            note()
        return view(*args, **kwargs)

    if inspect.isfunction(view) and not hasattr(view, "__wrapped__"):
        # Pyramid counts the parameters of a view, and looks at no function inside.
        marked_view.__signature__ = _signature_of(view)  # type: ignore[attr-defined]
    setattr(marked_view, _MARK, mark)
    known = getattr(view, "__dict__", {}).get(_INNER_MARK, mark)
    try:
        setattr(view, _INNER_MARK, mark if known == mark else _AMBIGUOUS)
    except AttributeError:  # a bound method, or written in C
        pass
    return marked_view  # type: ignore[return-value]


def _signature_of(view: FunctionType) -> inspect.Signature:
    try:
        return inspect.signature(view)
    except Exception:  # from Python 3.14 on, of annotations with names that are not there
        bare = FunctionType(view.__code__, {}, view.__name__, view.__defaults__, view.__closure__)
        bare.__kwdefaults__ = view.__kwdefaults__
        return inspect.signature(bare)


def _is_async(view: Any) -> bool:
    # Before Python 3.12, asgiref and Django mark functions as asyncio does.
    mark = getattr(sys.modules.get("asyncio.coroutines"), "_is_coroutine", None)
    is_marked = mark is not None and getattr(view, "_is_coroutine", None) is mark
    return is_marked or inspect.iscoroutinefunction(view) or inspect.isasyncgenfunction(view)
