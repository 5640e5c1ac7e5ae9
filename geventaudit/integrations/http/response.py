"""The end of a response: bodies that call a function when the server has closed them, or before their last chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent

from .request import Request

__all__ = ["until_closed"]

OnEnd = Callable[[Request], None]


def until_closed(body: Iterable[bytes], request: Request, on_end: OnEnd, *, before: bool) -> Iterable[bytes]:
    """Return *body*, calling *on_end* when the server has closed it.

    :param before: call it before the last chunk is handed to the server, or when the server closes it before that.
    """
    wrapper = request.environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type) and isinstance(body, wrapper) and _watch_file(body, request, on_end):
        if before:  # the server may send the file without another look at it
            on_end(request)
        return body
    if hasattr(body, "__len__"):
        return (_SizedBodyBefore if before else _SizedBody)(body, request, on_end)
    return (_BodyBefore if before else _Body)(body, request, on_end)


def _watch_file(file: Any, request: Request, on_end: OnEnd) -> bool:
    """Let a server's own file wrapper through as it is, for the server to use the kernel's sendfile."""
    close = getattr(file, "close", None)

    def close_and_end() -> None:
        try:
            if close is not None:
                close()
        except BaseException as error:
            request.failed(error)
            raise
        finally:
            on_end(request)

    try:
        file.close = close_and_end
    except (AttributeError, TypeError):
        return False
    request.is_begun = request.is_whole = True  # as far as can be known here
    return True


class _Body:
    """A response's body that notices its end. A server closes it when the response has ended, however it did."""

    __slots__ = ("_body", "_is_begun", "_on_end", "_request")

    def __init__(self, body: Iterable[bytes], request: Request, on_end: OnEnd) -> None:
        self._body = body
        self._is_begun = False
        self._request = request
        self._on_end = on_end

    def __iter__(self) -> Iterator[bytes]:
        # Some servers go through a list once more while they write it, to add up its lengths.
        is_for_writing, self._is_begun = not self._is_begun, True
        try:
            for chunk in self._chunks():
                if chunk:
                    self._request.is_begun = True
                yield chunk
        except GeneratorExit:  # the server takes no more
            raise
        except BaseException as error:
            self._request.failed(error)
            raise
        self._request.is_begun = True
        if is_for_writing:
            self._request.is_whole = True

    def _chunks(self) -> Iterable[bytes]:
        return self._body

    def close(self) -> None:
        """Close the application's body, and end the request."""
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            self._request.failed(error)
            raise
        finally:
            self._on_end(self._request)

    def __del__(self) -> None:
        # The caller of an application must close its response, and some middlewares forget. In a greenlet of its own:
        # garbage may be collected in the middle of a send().
        if not self._request.is_over:
            try:
                gevent.spawn(self._on_end, self._request)
            except RuntimeError:  # the interpreter ends, and with it greenlets; clients were closed before
                pass


class _BodyBefore(_Body):
    """A body that ends its request before its last chunk: each chunk waits until there is another one, or the end."""

    __slots__ = ()

    def _chunks(self) -> Iterator[bytes]:
        held: bytes | None = None
        for chunk in self._body:
            if held is None:
                held = chunk
            elif chunk:  # an empty one sends nothing: the held one may be the last for the client
                yield held
                held = chunk
        self._request.is_whole = True
        self._on_end(self._request)
        if held is not None:
            yield held


class _SizedBody(_Body):
    """A body with a length, from which servers conclude ``Content-Length``."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


class _SizedBodyBefore(_BodyBefore, _SizedBody):
    """A body with a length that ends its request before its last chunk."""

    __slots__ = ()
