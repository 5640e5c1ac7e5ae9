"""The run of a task: its name, its result, and the facts for its record."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import Reject, Retry, TimeLimitExceeded
from gevent import Timeout

from geventaudit import OperationResult
from geventaudit.integrations.http.text import named, printable

__all__ = ["Run", "request_of_message"]

_MAX_ARGUMENTS = 100
_MAX_DEPTH = 5  # of lists and mappings in arguments


@dataclass(frozen=True, slots=True)
class Run:
    """The end of one run of a task."""

    task: Any
    request: Context
    state: str
    reason: object

    @property
    def name(self) -> str:
        return str(self.task.name) if self.task is not None else printable(self.request.get("task") or "")

    @property
    def is_unaudited(self) -> bool:
        return getattr(self.task, "audit", {}) is None

    def result(self) -> tuple[OperationResult, str]:
        """Return the result of the operation and its description."""
        if self.state == states.SUCCESS:
            return OperationResult.SUCCESS, ""
        reason = self.reason
        if self.state == states.IGNORED:
            return OperationResult.UNKNOWN, "the task raised Ignore"
        if isinstance(reason, Retry):
            reason = reason.exc or reason.message or "no reason given"
        elif isinstance(reason, Reject):
            reason = f"Reject: {printable(reason.reason)}"
        elif isinstance(reason, TimeLimitExceeded | Timeout):
            seconds = reason.seconds if isinstance(reason, Timeout) else reason.args[0]
            reason = f"the time limit of {seconds} s was exceeded"
        text = named(reason) if isinstance(reason, BaseException) else printable(reason)
        return OperationResult.FAILURE, f"to be run again: {text}" if self.state == states.RETRY else text

    def custom_data(self, header: Mapping[str, Any]) -> dict[str, Any]:
        request = self.request
        delivery = request.delivery_info if isinstance(request.delivery_info, dict) else {}
        texts = {
            "task_id": request.id,
            "state": self.state,
            "queue": delivery.get("routing_key"),
            "worker": request.hostname,
            "parent_id": request.parent_id if request.parent_id != request.id else "",
            "queued_by": header.get("queued_by"),
            "request_id": header.get("request_id"),
        }
        custom: dict[str, Any] = {key: printable(value) for key, value in texts.items() if value}
        custom.setdefault("task_id", "")
        custom["retries"] = request.retries if isinstance(request.retries, int) else 0
        if delivery.get("redelivered") is True:
            custom["redelivered"] = True
        return custom

    def arguments(self) -> Iterator[tuple[str, Any]]:
        """Yield the arguments with their names, up to ``_MAX_ARGUMENTS``. Those in lists and mappings one by one."""
        args, kwargs = self.request.args, self.request.kwargs
        args = args if isinstance(args, list | tuple) else ()
        kwargs = kwargs if isinstance(kwargs, dict) else {}
        try:
            bound = inspect.signature(self.task.run).bind(*args, **kwargs).arguments
        except (AttributeError, TypeError, ValueError):  # no task, or arguments that it does not take
            bound = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
        return islice(_leaves(bound, ""), _MAX_ARGUMENTS)


def _leaves(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth < _MAX_DEPTH and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from _leaves(each, f"{name}.{printable(key)}" if name else printable(key), depth + 1)
    elif value is not None and not isinstance(value, bool):
        yield name, value


def request_of_message(consumer: Any, message: Any) -> Context:
    """Return the request of a message that is no task of the worker."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    return Context(headers, delivery_info=message.delivery_info, hostname=consumer.hostname)
