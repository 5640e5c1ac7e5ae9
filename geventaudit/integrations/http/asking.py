"""Questions to the application about a request: the caller's access levels, and the target of the operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from geventaudit import TargetResource

from .declarations import Target, levels_of, resources_of

__all__ = ["LEVELS", "TARGET", "Questions"]

LEVELS = "the caller's access levels"
LEVELS_OF_TASKS = "the caller's access levels in its tasks"
TARGET = "its target"


class Questions:
    """The functions of the application that are called once for each request, and their answers.

    :param levels: a function of the WSGI environment that returns access levels; None for no question.
    :param target: the target of views that declare none.
    """

    __slots__ = ("_ask_for_levels", "default_target", "errors", "levels", "resources")

    def __init__(self, levels: Callable[[Mapping[str, Any]], Any] | None = None, target: Target | None = None) -> None:
        self._ask_for_levels = levels
        self.default_target = target
        self.levels: list[str] = []
        """The access levels of the caller."""
        self.resources: dict[str, list[TargetResource]] | None = None
        """The resources of a target that is a function; None before it was called."""
        self.errors: dict[str, Exception] = {}
        """The exceptions of these functions, by :data:`LEVELS`, :data:`LEVELS_OF_TASKS` and :data:`TARGET`."""

    def ask_levels(self, environ: Mapping[str, Any]) -> None:
        """Ask for the caller's access levels, once."""
        hook, self._ask_for_levels = self._ask_for_levels, None
        if hook is not None:
            try:
                self.levels = levels_of(hook(environ))
            except Exception as error:
                self.errors[LEVELS] = error

    def levels_now(self, environ: Mapping[str, Any]) -> list[str]:
        """Return the caller's access levels at this moment. They may change until the request ends."""
        if self._ask_for_levels is None:
            return self.levels
        try:
            return levels_of(self._ask_for_levels(environ))
        except Exception as error:
            self.errors[LEVELS_OF_TASKS] = error
            return []

    def ask_target(self, target: Target | None, environ: Mapping[str, Any]) -> None:
        """Ask for the resources of *target*, once, if it is a function."""
        if callable(target) and self.resources is None:
            self.resources = {}
            try:
                self.resources = resources_of(target(environ))
            except Exception as error:
                self.errors[TARGET] = error
