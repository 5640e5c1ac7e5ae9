"""Measure the cost of a record for an HTTP request: ``python -m benchmarks.http [--rounds N]``.

Each figure is a ratio to the same application without the middleware, taken in the same run, in turns. Two views:

=============  =========================================================================================================
over HTTP      two gunicorn workers (gevent) with the same Flask application, one of them audited, a process that reads
               the records, one client on an open connection. *With pauses*, it lets 2 ms pass between its requests:
               the time until the answer that a record adds. *In a row*, it asks again at once, so that a request
               waits for the rest of the work for the one before
in process     a WSGI application called as a server calls it: with the whole middleware, and with a client that does
               nothing, which leaves the middleware's own part; the rest is ``send()``
=============  =========================================================================================================
"""

from __future__ import annotations

import argparse
import http.client
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from geventaudit import Client, DomainSocket, Msg
from geventaudit.agent import Agent
from geventaudit.integrations.wsgi import AuditMiddleware

from .reader import Reader

__all__ = ["in_process", "make_app", "over_http"]

BAR = 100.0  # microseconds that a record may add to a request, at the median
_BLOCK = 100  # requests in a row to one application, before it is the other's turn
_ENVIRON = {
    "PATH_INFO": "/things/4711",
    "REMOTE_ADDR": "10.0.0.1",
    "HTTP_X_FORWARDED_FOR": "203.0.113.9",
    "HTTP_USER_AGENT": "benchmark/1.0",
    "REMOTE_USER": "ann@example.com",
}
_OPTIONS: dict[str, Any] = {"trusted_proxies": ["10.0.0.0/8", "127.0.0.1"], "access_level": "Reader"}


class _Idle(Client):
    """A client that takes everything and does nothing."""

    def __init__(self) -> None:
        super().__init__(DomainSocket)

    def send(self, msg: Any, *, timeout: float | None = 0.0) -> None:
        assert isinstance(msg, Msg)


def _answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
    return [b"done\n"]


def _block(app: Any) -> float:
    """Seconds for one request, the median of a block."""
    environs = []
    for _ in range(_BLOCK):
        environ: dict[str, Any] = dict(_ENVIRON)
        setup_testing_defaults(environ)
        environs.append(environ)

    def start_response(status: str, headers: list[Any], exc_info: Any = None) -> Callable[[bytes], object]:
        return lambda written: None

    took = []
    for environ in environs:
        start = time.perf_counter()
        body = app(environ, start_response)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def in_process(rounds: int) -> dict[str, list[float]]:
    """Seconds for one request, a sample for each block: ``bare``, ``own part`` and ``whole``."""
    samples: dict[str, list[float]] = {"bare": [], "own part": [], "whole": []}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "agent.sock")
        with Agent(path, lambda received: None), Client(lambda: DomainSocket(path)) as client, _Idle() as idle:
            apps = {
                "bare": _answer,
                "own part": AuditMiddleware(_answer, idle, **_OPTIONS),
                "whole": AuditMiddleware(_answer, client, **_OPTIONS),
            }
            for _ in range(rounds):
                for name, app in apps.items():
                    samples[name].append(_block(app))
                assert client.flush(timeout=60)
            assert client.stats().delivered == rounds * _BLOCK
    return samples


def make_app() -> Any:
    """The Flask application, audited when AUDIT_SOCKET names an agent."""
    from flask import Flask

    from geventaudit.integrations.flask import Audit

    app = Flask(__name__)

    @app.get("/things/<int:number>")
    def get_thing(number: int) -> str:
        return "done\n"

    if path := os.environ.get("AUDIT_SOCKET"):
        Audit(Client(lambda: DomainSocket(path)), app, **_OPTIONS)
    return app


@contextmanager
def _process(*arguments: str, **environ: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environ},
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _connect(port: int) -> http.client.HTTPConnection:
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.connect()
            return connection
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _ask(connection: http.client.HTTPConnection, pause: float) -> float:
    time.sleep(pause)
    start = time.perf_counter()
    connection.request("GET", "/things/4711", headers={"User-Agent": "benchmark/1.0"})
    with connection.getresponse() as response:
        assert response.read() == b"done\n"
    return time.perf_counter() - start


def over_http(rounds: int, pause: float) -> dict[str, list[float]]:
    """Seconds for one request, the median of each block: ``bare`` and ``audited``.

    :param pause: seconds before each request.
    """
    root = str(Path(__file__).resolve().parent.parent)
    with Reader() as reader, ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, cores[1:] or cores)  # the servers; the client would wake up on a server's core
        connections: dict[str, http.client.HTTPConnection] = {}
        for name, environ in (("bare", {}), ("audited", {"AUDIT_SOCKET": reader.path})):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            options = ("-k", "gevent", "--keep-alive", "60", "--chdir", root, "--bind", f"127.0.0.1:{port}")
            server = ("gunicorn", *options, "--log-level", "error", "benchmarks.http:make_app()")
            stack.enter_context(_process(*server, **environ))
            connections[name] = stack.enter_context(_closing(_connect(port)))
        os.sched_setaffinity(0, cores[:1])
        for connection in connections.values():
            for _ in range(_BLOCK):
                _ask(connection, 0.0)
        samples: dict[str, list[float]] = {name: [] for name in connections}
        for _ in range(rounds):
            for name, connection in connections.items():
                samples[name].append(statistics.median(_ask(connection, pause) for _ in range(_BLOCK)))
        stack.close()  # ends the servers, and so the connection to the reader
        if reader.total() < 400 * _BLOCK * (rounds + 1):  # bytes; a record takes more
            raise RuntimeError("not every request was on record")
        return samples


@contextmanager
def _closing(connection: http.client.HTTPConnection) -> Iterator[http.client.HTTPConnection]:
    try:
        yield connection
    finally:
        connection.close()


def _show(title: str, samples: dict[str, list[float]]) -> float:
    """Print the rows; the microseconds that the last one adds to the first."""
    print(f"{title:24}{'us':>8}{'added us':>10}{'ratio':>8}")
    bare, added = samples["bare"], 0.0
    for name, row in samples.items():
        added = statistics.median(each - base for each, base in zip(row, bare, strict=True)) * 1e6
        ratio = statistics.median(each / base for each, base in zip(row, bare, strict=True))
        print(f"  {name:22}{statistics.median(row) * 1e6:8.1f}{added:10.1f}{ratio:8.2f}")
    return added


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http", description="What a record costs an HTTP request, against one without."
    )
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="blocks of 100 requests (%(default)s)")
    rounds: int = parser.parse_args().rounds
    logging.getLogger("geventaudit").setLevel(logging.ERROR)
    _show("in process", in_process(rounds))
    _show("over HTTP, in a row", over_http(rounds, 0.0))
    added = _show("over HTTP, with pauses", over_http(rounds, 0.002))
    print(f"a request is answered {added:.0f} us later at the median; the bar is {BAR:.0f} us")
    return 0 if added <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
