"""Operations: one record for one block of code, as returned by ``client.operation()``.

The audit of a block must not change its outcome. Its return value or exception reaches the caller unchanged. A record
that the client refuses is counted and notified, not raised.
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
    """A block of code and its record; made by :meth:`geventaudit.Client.operation`.

    As a context manager, it sends one record when the block ends. The result is ``OperationResult.SUCCESS``, unless the
    block has set another one. After an exception, the result is ``OperationResult.FAILURE`` with the type and message
    of the exception; ``gevent.Timeout``, a kill and ``sys.exit()`` included. The exception propagates unchanged::

        with client.operation(template, operation_name="RotateKey") as operation:
            version = rotate(vault)
            operation.add(custom_data={"version": version})

    As a decorator, it sends one record for each call. A function with a keyword-only parameter ``operation`` gets the
    operation of the call, unless the caller passes one. The operation of a generator lasts from the first ``next()`` to
    the end. A generator that is closed early ends with ``GeneratorExit``, which is a failure.

    A record that the client refuses (it breaks the rules, the queue is full, the client is closed) raises nothing. The
    refusal is counted in ``stats().rejected``, notified as ``QUEUE_FULL`` or ``NOT_RECORDED``, and stored in
    :attr:`error`. Code that must not act without a record calls :meth:`~geventaudit.Client.send` before it acts.
    """

    record: Record
    """The record so far. Changes to it do not reach the template."""
    error: Exception | None
    """The error with which the client refused the record; None before the end, and for an accepted record."""

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

        A mapping (``custom_data``, ``target_resources``, ``caller_identities``) is merged into the mapping of the
        record. Any other value replaces the value of the record. Set ``operation_result`` if the block ends without an
        exception and without success; an exception is always a failure.

        :raises TypeError: a name is not a field of a record.
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
        """Return *function* with an operation around each call.

        :raises TypeError: *function* is asynchronous, a class, a static or class method, or not callable.
        """
        if isinstance(function, staticmethod | classmethod):
            raise TypeError(f"put the decorator of an operation below @{type(function).__name__}, not above it")
        if any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in _called(function)):
            raise TypeError(f"{show(function)} is asynchronous: asyncio is out of scope")
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"an operation decorates functions, got {show(function)}")
        try:
            parameter = inspect.signature(function).parameters.get("operation")
        except ValueError:  # some functions written in C have no signature
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
    """Return *function* and the ``__call__`` of its type. Either may be a coroutine or generator function."""
    return function, type(function).__call__


def _own(record: Record) -> Record:
    """Return a copy that can be changed in place without a change to *record*."""
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
    if depth > MAX_DEPTH:  # the rules refuse the record when the block ends
        return value
    if id(value) in seen:  # the value contains itself, or another value twice
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
    """Return the type and message of *error*, of limited length and without surrogates."""
    try:
        message = str(error)
    except Exception as second:  # __str__ may be user code
        message = f"(its __str__ raised {type(second).__name__})"
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "..."
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()
