"""The HTTP server of the page."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self, cast

import gevent
from gevent.pool import Pool

from ...errors import logger, show
from ...runtime.clock import monotonic
from ...transport.connection import checked_address
from ..listening import listen
from ..server import Agent
from ..shown import printable
from .guard import Guard
from .log import CHART_SECONDS, Log
from .rendering import lines_of, state_of

__all__ = ["DEFAULT_ADDRESS", "Page"]

DEFAULT_ADDRESS = ("127.0.0.1", 8025)

_StartResponse = Callable[[str, list[tuple[str, str]]], object]

_log = logger("agent.web")

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "store", "list", "detail", "chart", "text")
    },
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = [
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]

_MAX_REQUESTS = 64
_IDLE_SECONDS = 30.0
_POLL_SECONDS = 0.1
_STATE_SECONDS = 0.5
_PAUSE_SECONDS = 0.001
_BATCH = 100


class Page:
    """A page that shows the messages of an agent as they arrive. Construct it before the agent starts.

    Each open page reads the kept messages at its own speed. A page that is too slow misses messages, and shows how
    many; it affects neither the speed nor the memory of the agent.

    :param agent: the agent.
    :param address: host and port; port 0 picks a free one, see :attr:`url`.
    :raises TypeError, ValueError: the address is invalid.
    """

    def __init__(self, agent: Agent, address: tuple[str, int] = DEFAULT_ADDRESS) -> None:
        self.url = ""
        """The address to open in a browser, with its token, after :meth:`start`."""
        self._address = checked_address(address, lowest_port=0)
        if not self._address[0]:
            raise ValueError("the host of the page's address is empty")
        self._agent = agent
        self._log = Log()
        self._run = secrets.token_hex(4)
        self._guard: Guard | None = None
        self._server: Any = None
        self._actions: Mapping[str, Callable[[], object]] = {
            "stop-reading": agent.stop_reading,
            "resume-reading": agent.resume_reading,
            "stop-acknowledging": agent.stop_acknowledging,
            "resume-acknowledging": agent.resume_acknowledging,
            "hang-up": agent.hang_up,
            "restart": partial(agent.restart, 0.0),
            "stop": partial(agent.stop, 0.0),
            "start": agent.start,
            "clear": self._log.clear,
        }
        agent.observe(self._log)

    def start(self) -> Self:
        """Serve the page. On a host that is not a loopback address, every request needs a token.

        :raises OSError: the address cannot be used.
        """
        # Imported here: pywsgi imports ssl, and patching warns when ssl was imported before.
        from gevent.pywsgi import WSGIServer

        listener, complaints = listen(self._address), cast(Any, _ErrorLog())
        host, port = listener.getsockname()[:2]
        token = None if ip_address(host).is_loopback else secrets.token_urlsafe(16)
        self._guard = Guard(self._address[0], port, token)
        shown = socket.gethostname() if ip_address(host).is_unspecified else self._address[0]
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/{f'?token={token}' if token else ''}"
        self._server = WSGIServer(
            listener,
            cast(Any, self._respond),
            log=None,
            error_log=complaints,
            spawn=Pool(_MAX_REQUESTS),
            handler_class=_handler_class(),
        )
        self._server.start()
        return self

    def close(self) -> None:
        """Stop serving the page, and close its connections."""
        if self._server is not None:
            self._server.stop(timeout=0)
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- one request ---------------------------------------------------------------------------------------------------

    def _respond(self, environ: dict[str, str], start: _StartResponse) -> Iterable[bytes]:
        assert self._guard is not None
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        problem = self._guard.problem_of(environ)
        if problem is not None and problem[0].startswith("401") and path == "/" and method == "GET":
            cookie = self._guard.cookie_of(environ)
            if cookie is not None:  # the redirection removes the token from the address bar
                return _answer(start, "303 See Other", "", headers=[("Location", "/"), ("Set-Cookie", cookie)])
        if problem is not None:
            return _answer(start, *problem)
        if path.startswith("/actions/"):
            if method != "POST":
                return _answer(start, "405 Method Not Allowed", "Use POST.", headers=[("Allow", "POST")])
            return self._act(path.removeprefix("/actions/"), start)
        if method != "GET":
            return _answer(start, "405 Method Not Allowed", "Use GET.", headers=[("Allow", "GET")])
        if path == "/events":
            start("200 OK", [("Content-Type", "text/event-stream"), *_HEADERS])
            return self._events(environ.get("HTTP_LAST_EVENT_ID", ""))
        if path not in _FILES:
            return _answer(start, "404 Not Found", "There is no such page.")
        name, kind = _FILES[path]
        return _answer(start, "200 OK", (_FOLDER / name).read_bytes(), kind)

    def _act(self, name: str, start: _StartResponse) -> Iterable[bytes]:
        action = self._actions.get(name)
        if action is None:
            return _answer(start, "404 Not Found", f"There is no such action: {show(name)}.")
        try:
            action()
        except (OSError, RuntimeError) as error:
            return _answer(start, "409 Conflict", printable(str(error)))
        return _answer(start, "204 No Content", "")

    def _events(self, last_id: str) -> Iterator[bytes]:
        """Yield server-sent events while the page is open: all kept messages, then each new one.

        :param last_id: the identifier of the last event that the page received before it lost its connection.
        """
        run, _, number = last_id.partition("-")
        seen = int(number) if run == self._run and number.isascii() and number.isdigit() else self._log.first - 1
        yield _event("run", [self._run])
        since, due = int(time.time()) - CHART_SECONDS, 0.0
        while True:
            if monotonic() >= due:
                state = state_of(self._agent, self._log, since)
                # Before the write to the page, which may take long.
                since, due = int(time.time()) - 1, monotonic() + _STATE_SECONDS
                yield _event("state", [state])
            batch = self._log.after(seen, _BATCH)
            if batch:
                missed = batch[0].number - max(seen + 1, self._log.cleared)
                lines = [line for each in batch for line in lines_of(each)]
                seen = batch[-1].number
                yield _event("messages", [f"{missed} {self._log.first}", *lines], f"{self._run}-{seen}")
            # Poll: waking each page would cost the agent time for each message.
            gevent.sleep(_PAUSE_SECONDS if len(batch) == _BATCH else _POLL_SECONDS)


def _answer(
    start: _StartResponse,
    status: str,
    body: str | bytes,
    kind: str = "text/plain",
    headers: Iterable[tuple[str, str]] = (),
) -> list[bytes]:
    content = body.encode() if isinstance(body, str) else body
    # A response without content must not have a Content-Length.
    length = [] if status.startswith("204") else [("Content-Length", str(len(content)))]
    start(status, [("Content-Type", f"{kind}; charset=utf-8"), *length, *_HEADERS, *headers])
    return [content] if content else []


def _event(kind: str, lines: Iterable[str], identifier: str = "") -> bytes:
    """Return a server-sent event. No line has a line break: JSON escapes them."""
    head = f"id: {identifier}\n" if identifier else ""
    return (head + f"event: {kind}\n" + "".join(f"data: {line}\n" for line in lines) + "\n").encode()


def _handler_class() -> Any:
    from gevent.pywsgi import WSGIHandler

    class Handler(WSGIHandler):
        """A handler that closes connections without traffic for 30 seconds."""

        # The handler compares the first argument of an OSError, which for a timeout is a text.
        ignored_socket_errors: Any = (*WSGIHandler.ignored_socket_errors, "timed out")

        def __init__(self, sock: Any, address: Any, server: Any) -> None:
            sock.settimeout(_IDLE_SECONDS)
            super().__init__(sock, address, server)

        def handle(self) -> None:
            rfile = self.rfile
            try:
                super().handle()
            finally:
                # Garbage collection may come after the end of the hub.
                rfile.close()

        def read_request(self, raw_requestline: str) -> Any:
            try:
                return super().read_request(raw_requestline)
            except IndexError:  # gevent raises it for a version without a dot, and would print a traceback
                raise ValueError("the HTTP version is invalid") from None

    return Handler


class _ErrorLog:
    """Writes the server's error messages to the log."""

    def write(self, text: str) -> None:
        _log.info("%s", printable(text.rstrip()))
