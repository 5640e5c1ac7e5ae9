"""Real gunicorn with the Flask and Django examples: each answered request is on record, with its facts."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket, subprocess
from helpers import eventually, free_port, once

from geventaudit import CallerIdentityType, Msg, OperationResult, OperationType, Record, TargetResource
from geventaudit.agent import Agent

for needed in ("gunicorn", "flask", "django"):
    pytest.importorskip(needed, reason=f"needs {needed}, which the extra [test] brings")
EXAMPLES = Path(__file__).parent.parent / "examples"
REQUESTS = int(os.environ.get("GEVENTAUDIT_REQUESTS", "2000"))

# Lets the worker's records drain, and says how many of them may have arrived twice.
CONFIG = """
def worker_exit(server, worker):
    from {module} import client
    left = client.close(timeout=10)
    with open("resent", "a") as file:
        file.write(f"{{client.stats().resent}} {{len(left)}}\\n")
"""


class Answer:
    """The answer to a request."""

    def __init__(self, raw: bytes) -> None:
        self.code = int(raw[9:12]) if raw[:5] == b"HTTP/" else 0
        self.body = raw.partition(b"\r\n\r\n")[2]


def fetch(port: int, method: str, path: str, *headers: bytes) -> Answer:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close", *headers]
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
            raw = b""
            while more := sock.recv(65536):
                raw += more
        return Answer(raw)
    except OSError:
        return Answer(b"")


def listens(port: int) -> bool:
    """Return True if gunicorn listens: it answers requests once a worker has started."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=30).close()
        return True
    except OSError:
        return False


@contextmanager
def gunicorn(folder: Path, socket_path: str, module: str, name: str, *options: str) -> Iterator[tuple[Any, int]]:
    """The application *name* of the example *module*; the process and its port."""
    (folder / "conf.py").write_text(CONFIG.format(module=module))
    port = free_port()
    log = (folder / "log").open("w")  # a pipe without a reader would fill up
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "--config", str(folder / "conf.py"), "-k", "gevent", *options),
            *("--chdir", str(folder), "--pythonpath", str(EXAMPLES), "--bind", f"127.0.0.1:{port}"),
            *("--log-level", "warning", f"{module}:{name}"),
        ],
        env={**os.environ, "AUDIT_SOCKET": socket_path},
        stderr=log,
    )
    with log, server:
        try:
            eventually(lambda: server.poll() is not None or listens(port), "gunicorn listens")
            yield server, port
        finally:
            if server.poll() is None:
                server.kill()


def end(server: Any, folder: Path) -> str:
    """End gunicorn, and let its workers drain. Return the log."""
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=60)
    log = (folder / "log").read_text()
    assert server.returncode == 0, log
    # Some Pythons print this at their end if threading is patched. It is about no request.
    return re.sub(r"Exception ignored in:.*?RuntimeError: greenlet is being finalized\n", "", log, flags=re.DOTALL)


def into(got: list[Record]) -> Any:
    return lambda received: got.append(received.message.record) if isinstance(received.message, Msg) else None


def told(folder: Path) -> tuple[int, int]:
    """Return the numbers of records that the workers sent again, and that they could not deliver."""
    rows = [line.split() for line in (folder / "resent").read_text().splitlines()]
    return sum(int(row[0]) for row in rows), sum(int(row[1]) for row in rows)


# method, path (a number goes into it), code; operation name, type, result
FLASK = [
    ("GET", "/things/{}?user=ann", 200, "ReadThing", OperationType.READ, OperationResult.SUCCESS),
    ("GET", "/things/0?n={}", 404, "ReadThing", OperationType.READ, OperationResult.FAILURE),
    ("POST", "/things?n={}", 201, "CreateThing", OperationType.CREATE, OperationResult.SUCCESS),
    ("DELETE", "/things/{}", 204, "DeleteThing", OperationType.DELETE, OperationResult.SUCCESS),
    ("GET", "/export?n={}", 200, "GET /export", OperationType.READ, OperationResult.SUCCESS),
    ("GET", "/nowhere?n={}", 404, "GET /nowhere", OperationType.READ, OperationResult.FAILURE),
    ("GET", "/broken?n={}", 500, "GET /broken", OperationType.READ, OperationResult.FAILURE),
]


@once
def test_flask_under_load_while_the_agent_restarts(socket_path: str, folder: Path) -> None:
    """Flask answers before the agent exists, and each request is on record once, with its operation and caller."""
    arrived: dict[str, list[Record]] = {}

    def take(received: Any) -> None:
        if isinstance(received.message, Msg):
            record = received.message.record
            arrived.setdefault(record.caller_agent, []).append(record)

    answered: set[int] = set()

    def caller(number: int) -> str:
        return f"198.18.{number >> 8}.{number & 255}"

    def load(first: int) -> None:
        for number in range(first, REQUESTS, 16):
            method, path, code, *_ = FLASK[number % len(FLASK)]
            headers = (b"User-Agent: load/%d" % number, f"X-Forwarded-For: 6.6.6.6, {caller(number)}".encode())
            got = fetch(port, method, path.format(number + 1), *headers)
            assert got.code == code
            answered.add(number)

    with gunicorn(folder, socket_path, "flask_app", "app", "-w", "4") as (server, port):
        loading = [gevent.spawn(load, first) for first in range(16)]
        eventually(lambda: len(answered) > REQUESTS / 10)
        with Agent(socket_path, take) as agent:
            for part in (0.4, 0.7):
                eventually(lambda part=part: len(answered) > REQUESTS * part)
                agent.restart()
            gevent.joinall(loading, raise_error=True)
            log = end(server, folder)
        assert log.count("Traceback") == log.count("RuntimeError: this view does not work"), log
    assert len(answered) == REQUESTS
    assert set(arrived) == {f"load/{number}" for number in range(REQUESTS)}
    resent, left = told(folder)
    twice = sum(map(len, arrived.values())) - REQUESTS
    print(f"{REQUESTS} answered, {len(arrived)} on record, {twice} twice, {resent} sent again")
    assert left == 0
    assert twice <= resent
    for number in range(REQUESTS):
        _, path, code, name, kind, result = FLASK[number % len(FLASK)]
        record = arrived[f"load/{number}"][0]
        assert (record.operation_name, record.operation_type, record.operation_result) == (name, kind, result)
        assert record.caller_ip_address == caller(number)
        assert record.target_resources["Path"][0].name == path.partition("?")[0].format(number + 1)
        assert (code >= 400) == (str(code) in record.operation_result_description)
        if "user=ann" in path:
            assert record.caller_identities[CallerIdentityType.USERNAME][0].identity == "ann"
            assert record.custom_data["arguments"] == {"number": str(number + 1)}
            assert record.target_resources["Thing"][0].name == str(number + 1)
            assert record.caller_access_levels == ["Administrator", "Contributor"]
            assert "filled_unknown" not in record.custom_data
        else:
            assert record.custom_data["filled_unknown"] == ["CallerIdentities"], "nobody signed in"
        assert record.custom_data["geventaudit"]["seq"] > 0


@once
def test_django(socket_path: str, folder: Path) -> None:
    requests = [
        ("/things/7", 200, "ReadThing", {"number": "7"}),
        ("/things/7/owner", 200, "ManageOwner", {"number": "7"}),
        ("/search/word", 404, r"GET /search/(\w+)$", {"0": "word"}),
        ("/export", 200, "GET /export", None),
        ("/broken", 500, "GET /broken", None),
        ("/nowhere", 404, "GET /nowhere", None),
    ]
    got: list[Record] = []
    with (
        Agent(socket_path, into(got)),
        gunicorn(folder, socket_path, "django_app", "application", "-w", "1") as (server, port),
    ):
        for path, code, _, _ in requests:
            headers = (b"User-Agent: me", b"X-Forwarded-For: 198.18.0.1", b"X-Request-Id: r-1")
            assert fetch(port, "GET", f"{path}?user=ann", *headers).code == code
        assert fetch(port, "GET", "/healthz").code == 200
        assert fetch(port, "GET", "/static/things/7", b"User-Agent: mounted", b"SCRIPT_NAME: /static").code == 200
        log = end(server, folder)
    assert "requests go unrecorded" not in log
    (mounted,) = (record for record in got if record.caller_agent == "mounted")
    assert mounted.operation_name == "ReadThing"
    assert mounted.target_resources == {"Thing": [TargetResource("7")], "Path": [TargetResource("/things/7")]}
    assert mounted.caller_access_levels == ["Anonymous"]
    assert len(got) == len(requests) + 1, "healthz is unaudited"
    records = [record for record in got if record.caller_agent == "me"]
    assert [each.operation_name for each in records] == [name for _, _, name, _ in requests]
    assert [each.custom_data.get("arguments") for each in records] == [arguments for *_, arguments in requests]
    assert Counter(each.operation_result for each in records) == {"Success": 3, "Failure": 3}
    for each in records:
        assert each.caller_identities[CallerIdentityType.USERNAME][0].identity == "ann"
        assert each.caller_access_levels == ["Administrator", "Contributor"]
        assert each.custom_data["request_id"] == "r-1"
        assert "filled_unknown" not in each.custom_data
    assert {each.caller_ip_address for each in records} == {"198.18.0.1"}


@once
def test_the_agent_is_away_and_clients_are_hostile(socket_path: str, folder: Path) -> None:
    """gunicorn answers as it does without a middleware; every request that reached the application is on record."""
    hostile = [
        (b"User-Agent: " + b"A" * 65536,),
        (b"User-Agent: \xff\xed\xa0\x80",),
        (b"X-Forwarded-For: " + b"6.6.6.6," * 9000 + b"\xff",),
        (b'Forwarded: for="' + b"[" * 60000,),
        (b"X-Ms-Client-Principal-Name: \xed\xa0\x80" + b"x" * 60000, b"X-Forwarded-For: 127.0.0.1"),
    ]
    got: list[Record] = []
    options = ("-w", "1", "--limit-request-field_size", "100000")
    with gunicorn(folder, socket_path, "flask_app", "app", *options) as (server, port):
        for headers in hostile:
            assert fetch(port, "GET", "/things/7/%ff%0d%0a%ed%a0%80", *headers).code == 404
            assert fetch(port, "GET", "/healthz", *headers).body == b"well"
        with Agent(socket_path, into(got)):
            log = end(server, folder)
    assert "Traceback" not in log
    assert [each.operation_name for each in got] == [r"GET /things/7/\xff\r\n\xed\xa0\x80"] * len(hostile)
    assert got[0].caller_agent.endswith("... (65536 characters)")
    assert not {each.caller_ip_address for each in got} & {"6.6.6.6", "127.0.0.1"}


@once
@pytest.mark.parametrize("worker", ["gevent", "gevent_pywsgi"])
def test_a_client_certificate(socket_path: str, folder: Path, worker: str) -> None:
    trustme = pytest.importorskip("trustme", reason="needs trustme, which the extra [test] brings")
    import ssl

    authority = trustme.CA()
    served, mine = authority.issue_cert("localhost"), authority.issue_cert("ann@example.com", common_name="ann")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    served.private_key_and_cert_chain_pem.write_to_path(folder / "served.pem")
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    mine.configure_cert(context)
    tls = ("--certfile", str(folder / "served.pem"), "--ca-certs", str(folder / "ca.pem"), "--cert-reqs", "1")
    got: list[Record] = []

    def ask() -> bytes:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(b"GET /things/7 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            reply: bytes = sock.recv(4096)
            return reply

    with (
        Agent(socket_path, into(got)),
        gunicorn(folder, socket_path, "flask_app", "app", "-w", "1", "-k", worker, *tls) as (server, port),
    ):
        assert b"200 OK" in ask()
        end(server, folder)
    (certificate,) = got[-1].caller_identities[CallerIdentityType.CERTIFICATE]
    assert "commonName=ann" in certificate.identity
    assert "SHA-256" in certificate.description


@once
def test_a_client_that_names_the_mount(socket_path: str, folder: Path) -> None:
    """gunicorn lets its peers on this host say where the application is mounted, in any case of letters."""
    got: list[Record] = []
    service = """
import os
import flask
import geventaudit
from geventaudit.integrations.flask import Audit

client = geventaudit.Client(lambda: geventaudit.DomainSocket(os.environ["AUDIT_SOCKET"]))
app = flask.Flask("service")
Audit(client, app, exclude=["/static/*", "/healthz"])
app.add_url_rule("/users/<name>", view_func=lambda name: "deleted", methods=["DELETE"])
app.add_url_rule("/healthz", "healthz", lambda: "well", methods=["DELETE"])
"""
    (folder / "service.py").write_text(service)
    requests = [
        ("/users/ada", ()),
        ("/static/users/ada", (b"SCRIPT_NAME: /static",)),
        ("/static/users/ada", (b"script_name: /static",)),
        ("/static/users/ada", (b"Script_Name:   /static  ",)),
        ("/static/users/ada", (b"SCRIPT_NAME: /x", b"SCRIPT_NAME: /static")),
        ("/healthz/users/ada", (b"SCRIPT_NAME: /healthz",)),
        ("/static/users/ada/..%2f/users/ada", (b"SCRIPT_NAME: /static/users/ada/..%2f",)),
        ("/subscriptions/victim/users/ada", (b"SCRIPT_NAME: /subscriptions/victim",)),
        ("/users/ada", (b"Script-Name: /static",)),
        ("/users/ada", (b"X-Script-Name: /static", b"X-Forwarded-Prefix: /static")),
        ("/users/ada", (b"PATH_INFO: /static/x",)),
        ("http://localhost/users/ada", ()),
        ("/users/ada?x=/static/", ()),
        ("/users/ada#/static/", ()),
        ("/%75sers/%61da", ()),
        ("/users/ada", (b"X-HTTP-Method-Override: GET",)),
    ]
    with (
        Agent(socket_path, into(got)),
        gunicorn(folder, socket_path, "service", "app", "-w", "1") as (server, port),
    ):
        for path, headers in requests:
            answer = fetch(port, "DELETE", path, *headers)
            assert (answer.code, answer.body) == (200, b"deleted"), (path, headers)
        assert fetch(port, "DELETE", "/healthz").body == b"well"
        assert fetch(port, "DELETE", "/v1/healthz", b"SCRIPT_NAME: /v1").body == b"well"
        end(server, folder)
    assert len(got) == len(requests)
    for (path, headers), record in zip(requests, got, strict=True):
        assert record.operation_name == "DELETE /users/<name>", (path, headers)
        assert record.target_resources == {"Path": [TargetResource("/users/ada")]}, (path, headers)
        assert record.custom_data["arguments"] == {"name": "ada"}
    assert got[1].custom_data["script_name"] == "/static"
