"""One record for one block of code, however it ends: what ``client.operation()`` returns.

The code inside is what matters; its audit must not change what becomes of it. So whatever the block returns or raises
is what its caller gets, and a record that the client refuses is counted and told of, not raised.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from copy import copy
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from .errors import show
from .records import AuditType, CallerIdentity, Msg, OperationResult, Record, TargetResource
from .schema.values import MAX_DEPTH, items_of

__all__ = ["Operation"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MAX_MESSAGE = 1000  # characters of an exception's message; some carry whole responses


class Operation:
    """One block of code and its record; made by :meth:`geventaudit.Client.operation`.

    As a context manager, one record is sent when the block ends: ``OperationResult.SUCCESS``, unless the block said
    otherwise, or ``OperationResult.FAILURE`` with the exception's type and message, whichever it was: a
    ``gevent.Timeout``, a kill and ``sys.exit()`` too. The exception goes on unchanged::

        with client.operation(template, operation_name="RotateKey") as operation:
            version = rotate(vault)
            operation.add(custom_data={"version": version})

    As a decorator, it does so for each call. A function that has a keyword-only parameter ``operation``, and is called
    without it, is given the operation of that call. A decorated generator's operation lasts from its first ``next()``
    to its end; one that its reader leaves early ends with ``GeneratorExit``, which is a failure.

    A record that the client refuses (it breaks the rules, the queue is full, the client is closed) raises nothing: it
    is counted in ``stats().rejected``, told of on ``notify()`` as ``QUEUE_FULL`` or ``NOT_RECORDED``, and
    stands in :attr:`error`. Who must not act without a record uses :meth:`~geventaudit.Client.send` before acting.
    """

    record: Record
    """The record so far; this block's own, whatever it began from."""
    error: Exception | None
    """Why the client refused the record; None before the end, and when it was accepted."""

    def __init__(self, send: Callable[[Msg], Exception | None], kind: AuditType, template: Record) -> None:
        self._send = send
        self._kind = kind
        self._template = _own(template)
        self._entered = False
        self._result_is_set = False
        self.record = _own(self._template).replace(operation_result=OperationResult.UNKNOWN)
        self.error = None

    def add(self, **fields: Any) -> None:
        """Set fields of the record, by their names in :class:`~geventaudit.Record`.

        A mapping is added to the mapping that is there (``custom_data``, ``target_resources``, ``caller_identities``);
        all else takes the place of what was there. With ``operation_result`` a block says how it ended where that is
        not success; an exception is a failure all the same.

        :raises TypeError: for a name that is not a field of a record.
        """
        for name, value in fields.items():
            before = getattr(self.record, name, None)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                fields[name] = {**dict(items_of(before)), **dict(items_of(value))}
        self.record = self.record.replace(**fields)
        self._result_is_set |= "operation_result" in fields

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("an operation is for one block: call client.operation() for each")
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if value is not None:
            self.add(operation_result=OperationResult.FAILURE, operation_result_description=_text_of(value))
        elif not self._result_is_set and self.record.operation_result is OperationResult.UNKNOWN:
            self.add(operation_result=OperationResult.SUCCESS)
        self.error = self._send(Msg(self._kind, self.record))

    def __call__(self, function: Callable[_P, _T]) -> Callable[_P, _T]:
        """*function*, with an operation around each call.

        :raises TypeError: for what ends later than its call returns and cannot be waited for here.
        """
        if isinstance(function, staticmethod | classmethod):
            raise TypeError(f"the decorator of an operation stands below @{type(function).__name__}, not above it")
        if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in _called(function)):
            raise TypeError(f"{show(function)} is asynchronous: asyncio is out of scope")
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"an operation decorates functions, got {show(function)}")
        try:
            parameter = inspect.signature(function).parameters.get("operation")
        except ValueError:  # some functions written in C do not tell
            parameter = None
        takes_it = parameter is not None and parameter.kind is parameter.KEYWORD_ONLY

        def one_call(arguments: dict[str, Any]) -> Operation:
            operation = Operation(self._send, self._kind, self._template)
            if takes_it:
                arguments.setdefault("operation", operation)
            return operation

        if any(map(inspect.isgeneratorfunction, _called(function))):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with one_call(kwargs):
                    return (yield from cast(Any, function(*args, **kwargs)))

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with one_call(kwargs):
                    return function(*args, **kwargs)

        return cast(Callable[_P, _T], wrapper)

    def __repr__(self) -> str:
        return f"<Operation {show(self.record.operation_name)}>"


def _called(function: Any) -> tuple[Any, Any]:
    """What may tell of which kind *function* is: itself, or the method of an object that can be called."""
    return function, type(function).__call__


def _own(record: Record) -> Record:
    """A copy that may be changed in place without changing what it was made from."""
    return record.replace(
        operation_categories=_own_part(record.operation_categories, {}),
        caller_access_levels=_own_part(record.caller_access_levels, {}),
        **{
            name: _own_part(dict(items_of(part)) if isinstance(part, Mapping) else part, {})
            for name in ("caller_identities", "target_resources", "custom_data")
            for part in [getattr(record, name)]
        },
    )


def _own_part(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    if depth > MAX_DEPTH:  # the rules refuse it at the end
        return value
    if id(value) in seen:  # it contains itself, or something twice
        return seen[id(value)]
    own: Any
    if isinstance(value, dict):
        own = seen[id(value)] = copy(value)
        own.update({key: _own_part(each, seen, depth + 1) for key, each in value.items()})
        return own
    if isinstance(value, list):
        own = seen[id(value)] = copy(value)
        own[:] = [_own_part(each, seen, depth + 1) for each in value]
        return own
    return copy(value) if isinstance(value, set | CallerIdentity | TargetResource) else value


def _text_of(error: BaseException) -> str:
    """The type and message of *error*, as a record may carry them."""
    try:
        message = str(error)
    except Exception as second:  # an exception's own __str__ is anybody's code
        message = f"(its message cannot be had: {type(second).__name__})"
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "..."
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()
