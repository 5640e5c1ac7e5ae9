"""The WSGI middleware: one record for each request, through all faults of application, client and agent."""

from __future__ import annotations

import io
import itertools
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import gevent
import pytest
from gevent import socket, subprocess
from gevent.event import Event
from gevent.pywsgi import WSGIServer
from helpers import eventually, once
from hypothesis import given
from hypothesis import strategies as st

from geventaudit import (
    TCP,
    AuditType,
    Backoff,
    CallerIdentity,
    CallerIdentityType,
    Client,
    DomainSocket,
    Msg,
    NoOp,
    NotificationKind,
    OperationResult,
    OperationType,
    QueueFullError,
    Record,
    SealError,
    SpoolError,
    TargetResource,
)
from geventaudit.agent import Agent
from geventaudit.integrations.http import hub_watch
from geventaudit.integrations.wsgi import AuditMiddleware, RequestCounts, facts_of

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Trail:
    """A client, and the records that arrived at its agent."""

    def __init__(self, client: Client, got: list[Any]) -> None:
        self.client = client
        self._got = got

    def records(self) -> list[Record]:
        """All so far, when all that was accepted has arrived."""
        assert self.client.flush(timeout=10)
        accepted = self.client.stats().accepted
        return eventually(lambda: len(found := self._messages()) == accepted and found) if accepted else []

    def _messages(self) -> list[Record]:
        return [each.message.record for each in self._got if isinstance(each.message, Msg)]

    def record(self) -> Record:
        (record,) = self.records()
        return record


@pytest.fixture
def trail(socket_path: str) -> Iterator[Trail]:
    got: list[Any] = []
    with Agent(socket_path, got.append) as agent, Client(lambda: DomainSocket(socket_path)) as client:
        yield Trail(client, got)
        assert not agent.counts.refused


def answer(status: str = "200 OK", body: Iterable[bytes] = (b"done\n",)) -> App:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response(status, [("Content-Type", "text/plain")])
        return body

    return app


def call(app: Any, path: str = "/things/7", method: str = "GET", **environ: Any) -> tuple[str, bytes]:
    """Call *app* as a server does. Return the status and the body."""
    told = {
        "PATH_INFO": path,
        "REQUEST_METHOD": method,
        "QUERY_STRING": "",
        "SCRIPT_NAME": "",
        "REMOTE_ADDR": "198.51.100.7",
    }
    environ = {**told, **environ}
    setup_testing_defaults(environ)
    environ = {key: value for key, value in environ.items() if value is not None}
    started: list[str] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        started.append(status)
        return lambda written: None

    result = app(environ, start_response)
    try:
        body = b"".join(result)
    finally:
        if hasattr(result, "close"):
            result.close()
    return started[-1], body


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """A real server with *app*; its port."""
    server = WSGIServer(("127.0.0.1", 0), app, log=None, error_log=None)
    server.start()
    try:
        yield server.server_port
    finally:
        server.stop(timeout=1)


def fetch(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(request)
        reply = b""
        while more := sock.recv(65536):
            reply += more
    return reply


def get(path: str, *headers: bytes) -> bytes:
    lines = [f"GET {path} HTTP/1.1".encode(), b"Host: localhost", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


# -- the content of a record -------------------------------------------------------------------------------------------


def test_the_defaults_over_a_real_socket(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client)
    with serving(audited) as port:
        reply = fetch(port, get("/things/7?secret=1", b"User-Agent: curl/8"))
    assert reply.startswith(b"HTTP/1.1 200 OK")
    assert reply.endswith(b"done\n")
    record = trail.record()
    assert record.operation_name == "GET /things/7"
    assert record.operation_type is OperationType.READ
    assert record.operation_result is OperationResult.SUCCESS
    assert record.caller_agent == "curl/8"
    assert record.target_resources == {"Path": [TargetResource("/things/7")]}
    assert record.caller_identities == {CallerIdentityType.UNKNOWN: [CallerIdentity("Unknown", "Unknown")]}
    assert record.custom_data == {
        "status": 200,
        "filled_unknown": [
            *("OperationAccessLevel", "CallerIpAddress", "OperationCategories", "CallerAccessLevels"),
            "CallerIdentities",
        ],
    }
    assert audited.counts == RequestCounts(recorded=1)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("POST", OperationType.CREATE),
        ("PUT", OperationType.UPDATE),
        ("PATCH", OperationType.UPDATE),
        ("DELETE", OperationType.DELETE),
        ("GET", OperationType.READ),
        ("HEAD", OperationType.READ),
        ("PROPFIND", OperationType.READ),
        ("delete", OperationType.DELETE),
    ],
)
def test_the_type_is_the_methods(trail: Trail, method: str, kind: OperationType) -> None:
    call(AuditMiddleware(answer(), trail.client), method=method)
    assert (trail.record().operation_type, trail.record().operation_name) == (kind, f"{method.upper()} /things/7")


@pytest.mark.parametrize(
    ("status", "result", "description"),
    [
        ("204 No Content", OperationResult.SUCCESS, ""),
        ("302 Found", OperationResult.SUCCESS, ""),
        ("404 Not Found", OperationResult.FAILURE, "404 Not Found"),
        ("503 Out of tea", OperationResult.FAILURE, "503 Out of tea"),
        ("what?", OperationResult.FAILURE, "what?"),
    ],
)
def test_the_result_is_the_statuss(trail: Trail, status: str, result: OperationResult, description: str) -> None:
    call(AuditMiddleware(answer(status), trail.client))
    record = trail.record()
    assert (record.operation_result, record.operation_result_description) == (result, description)


def test_type_level_and_facts_of_the_application(trail: Trail) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise ValueError

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        facts = facts_of(environ)
        assert facts is not None
        facts.route, facts.user = "/things/<n>", "ann"
        facts.arguments = {"n": 10**30, "what": Unprintable()}
        return answer()(environ, start_response)

    audited = AuditMiddleware(app, trail.client, audit_type=AuditType.DATA_PLANE, access_level="Contributor")
    call(audited, REMOTE_USER="ann@EXAMPLE")
    record = trail.record()
    assert record.operation_name == "GET /things/<n>"
    assert record.operation_access_level == "Contributor"
    assert record.caller_identities == {
        CallerIdentityType.USERNAME: [
            CallerIdentity("ann", "the application's user"),
            CallerIdentity("ann@EXAMPLE", "REMOTE_USER"),
        ]
    }
    assert record.custom_data["arguments"] == {"n": str(10**30), "what": "a Unprintable without text"}


@pytest.mark.parametrize(
    ("path", "targets"),
    [
        ("/things/7", {}),
        ("/", {}),
        ("//", {}),
        ("/subscriptions", {}),
        ("/subscriptions/s1", {"SubscriptionId": "s1"}),
        ("/SUBSCRIPTIONS/s1/resourcegroups/g1", {"SubscriptionId": "s1", "ResourceGroup": "g1"}),
        (
            "/subscriptions/s1/resourceGroups/g1/providers/Microsoft.Compute/virtualMachines/vm1",
            {
                "SubscriptionId": "s1",
                "ResourceGroup": "g1",
                "ResourceProvider": "Microsoft.Compute",
                "Microsoft.Compute/virtualMachines": "vm1",
            },
        ),
        (
            "/subscriptions/s1/providers/Microsoft.Sql/servers/a/databases/b/pause",
            {"SubscriptionId": "s1", "ResourceProvider": "Microsoft.Sql", "Microsoft.Sql/servers/databases": "a/b"},
        ),
        (
            "/subscriptions/s1/providers/Microsoft.Compute/virtualMachines",
            {
                "SubscriptionId": "s1",
                "ResourceProvider": "Microsoft.Compute",
                "Microsoft.Compute/virtualMachines": None,
            },
        ),
        (
            "/providers/Microsoft.Sql/servers/a/providers/Microsoft.Insights/alerts/x",
            {"ResourceProvider": "Microsoft.Insights", "Microsoft.Insights/alerts": "x"},
        ),
        ("/subscriptions/s1/resourceGroups//providers//x/", {"SubscriptionId": "s1"}),
    ],
)
def test_the_targets_of_a_path(trail: Trail, path: str, targets: dict[str, str | None]) -> None:
    call(AuditMiddleware(answer(), trail.client), path)
    expected = {kind: [] if name is None else [TargetResource(name)] for kind, name in targets.items()}
    assert trail.record().target_resources == {"Path": [TargetResource(path)], **expected}


# -- the caller --------------------------------------------------------------------------------------------------------

TRUSTED = ["127.0.0.1", "10.0.0.0/8", "2001:db8:ffff::/48", "::ffff:192.0.2.8"]


@pytest.mark.parametrize(
    ("peer", "headers", "caller"),
    [
        ("198.51.100.7", {}, "198.51.100.7"),
        ("fe80::1%eth0", {}, "fe80::1%eth0"),
        ("198.51.100.7", {"X_FORWARDED_FOR": "203.0.113.9"}, "198.51.100.7"),
        ("10.0.0.1", {}, "10.0.0.1"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9"}, "203.0.113.9"),
        ("::ffff:10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9"}, "203.0.113.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "6.6.6.6, 203.0.113.9"}, "203.0.113.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "6.6.6.6,203.0.113.9 , 10.1.1.1,127.0.0.1"}, "203.0.113.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9:4711"}, "203.0.113.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "2001:db8::9"}, "2001:db8::9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "[2001:db8::9]:4711"}, "2001:db8::9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9, unknown"}, "10.0.0.1"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9, 0.0.0.0"}, "10.0.0.1"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9, 224.0.0.1"}, "10.0.0.1"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "127.0.0.2, 10.0.0.9"}, "10.0.0.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "::ffff:203.0.113.9"}, "203.0.113.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9, fe80::1%\x1b[31m"}, "10.0.0.1"),
        ("::ffff:192.0.2.8", {"X_FORWARDED_FOR": "203.0.113.9"}, "203.0.113.9"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "203.0.113.9, ::ffff:224.0.0.1"}, "10.0.0.1"),
        ("10.0.0.1", {"X_FORWARDED_FOR": ",".join(["6.6.6.6"] + ["10.0.0.2"] * 40)}, "10.0.0.2"),
        ("10.0.0.1", {"X_FORWARDED_FOR": "1" * 65536}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": "for=6.6.6.6, For=203.0.113.9;proto=https"}, "203.0.113.9"),
        ("10.0.0.1", {"FORWARDED": 'by=x;for="[2001:db8::9]:4711"'}, "2001:db8::9"),
        ("10.0.0.1", {"FORWARDED": 'for="6.6.6.6, for=203.0.113.9'}, "203.0.113.9"),
        ("10.0.0.1", {"FORWARDED": 'for=203.0.113.9;host="a,for=6.6.6.6"'}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": 'host="a;for=6.6.6.6";for=203.0.113.9'}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": r'for=203.0.113.9;host="a\",for=6.6.6.6;x=\""'}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": r'host="a\";for=6.6.6.6;x=\"";for=203.0.113.9'}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": 'proto=https;host="a.example:80";for=203.0.113.9;'}, "203.0.113.9"),
        ("10.0.0.1", {"FORWARDED": "for=203.0.113.9, for"}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": "x=;" * 9000 + "for=6.6.6.6"}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": "for=203.0.113.9, for=_hidden"}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": "for=unknown"}, "10.0.0.1"),
        ("10.0.0.1", {"FORWARDED": "proto=https", "X_FORWARDED_FOR": "203.0.113.9"}, "203.0.113.9"),
        ("10.0.0.1", {"FORWARDED": "for=203.0.113.9", "X_FORWARDED_FOR": "203.0.113.9"}, "203.0.113.9"),
        ("", {"X_FORWARDED_FOR": "203.0.113.9"}, "203.0.113.9"),
        (None, {"X_FORWARDED_FOR": "203.0.113.9"}, "192.0.0.8"),
        ("<local>", {"X_FORWARDED_FOR": "203.0.113.9"}, "192.0.0.8"),
    ],
)
def test_the_callers_address(trail: Trail, peer: str | None, headers: dict[str, str], caller: str) -> None:
    audited = AuditMiddleware(answer(), trail.client, trusted_proxies=TRUSTED)
    call(audited, REMOTE_ADDR=peer, **{f"HTTP_{name}": value for name, value in headers.items()})
    assert trail.record().caller_ip_address == caller


def test_a_peer_on_a_unix_socket_of_gevents_server(trail: Trail, folder: Path) -> None:
    """gevent's server gives such a peer no address at all, not even an empty one."""
    path = str(folder / "web.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    audited = AuditMiddleware(answer(), trail.client, trusted_proxies=["127.0.0.1"])
    server = WSGIServer(listener, audited, log=None, error_log=None)
    server.start()
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(get("/", b"X-Forwarded-For: 203.0.113.9"))
            while sock.recv(4096):
                pass
    finally:
        server.stop(timeout=1)
    assert trail.record().caller_ip_address == "203.0.113.9"


def test_headers_that_contradict_each_other_are_not_believed(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client, trusted_proxies=TRUSTED)
    call(audited, REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR="203.0.113.9", HTTP_FORWARDED="for=6.6.6.6")
    record = trail.record()
    assert record.caller_ip_address == "10.0.0.1"
    assert record.custom_data["forwarded_for"] == {"X-Forwarded-For": "203.0.113.9", "Forwarded": "6.6.6.6"}


PRINCIPAL = {
    "HTTP_X_MS_CLIENT_PRINCIPAL_NAME": "ann@example.com",
    "HTTP_X_MS_CLIENT_APP_ID": "app1",
    "HTTP_X_MS_CLIENT_TENANT_ID": "tenant1",
    "HTTP_X_MS_CLIENT_OBJECT_ID": "object1",
}


def test_principal_headers_of_a_trusted_peer(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client, trusted_proxies=TRUSTED)
    call(audited, REMOTE_ADDR="10.0.0.1", **PRINCIPAL)
    assert {kind: each[0].identity for kind, each in trail.record().caller_identities.items()} == {
        CallerIdentityType.UPN: "ann@example.com",
        CallerIdentityType.OBJECT_ID: "object1",
        CallerIdentityType.APPLICATION_ID: "app1",
        CallerIdentityType.TENANT_ID: "tenant1",
    }


def test_principal_headers_of_a_stranger_say_nothing(trail: Trail) -> None:
    """They are ignored even if a middleware inside makes the stranger look like a proxy."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["REMOTE_ADDR"] = "10.0.0.1"
        return answer()(environ, start_response)

    call(AuditMiddleware(app, trail.client, trusted_proxies=TRUSTED), HTTP_X_FORWARDED_FOR="6.6.6.6", **PRINCIPAL)
    assert set(trail.record().caller_identities) == {CallerIdentityType.UNKNOWN}
    assert trail.record().caller_ip_address == "198.51.100.7"


def test_a_certificate_that_the_server_verified(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client)
    tls = {"wsgi.url_scheme": "https", "SSL_CLIENT_S_DN": "CN=ann"}
    call(audited, **tls, SSL_CLIENT_VERIFY="SUCCESS")
    call(audited, **tls, SSL_CLIENT_VERIFY="NONE")
    call(audited, HTTP_SSL_CLIENT_VERIFY="SUCCESS", HTTP_SSL_CLIENT_S_DN="CN=ann")
    identities = [record.caller_identities for record in trail.records()]
    assert identities[0] == {
        CallerIdentityType.CERTIFICATE: [CallerIdentity("CN=ann", "subject of the TLS client certificate")]
    }
    assert set(identities[1]) == set(identities[2]) == {CallerIdentityType.UNKNOWN}


# -- when it is sent ---------------------------------------------------------------------------------------------------


def test_a_streamed_response_is_recorded_at_its_end(trail: Trail) -> None:
    go_on = Event()

    def body() -> Iterator[bytes]:
        yield b"first\n"
        go_on.wait(30)
        yield b"last\n"

    audited = AuditMiddleware(answer(body=body()), trail.client)
    with serving(audited) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(get("/"))
        reply = b""
        while b"first" not in reply:
            reply += sock.recv(4096)
        assert audited.counts == RequestCounts(), "it has not ended yet"
        go_on.set()
        while sock.recv(4096):
            pass
        assert trail.record().operation_result is OperationResult.SUCCESS


def test_a_client_that_goes_away_in_the_middle(trail: Trail) -> None:
    closed = Event()

    def body() -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * 65536
        finally:
            closed.set()

    audited = AuditMiddleware(answer(body=body()), trail.client)
    with serving(audited) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(get("/"))
            sock.recv(4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        assert closed.wait(30), "the application's body is closed"
        eventually(lambda: audited.counts.recorded)
    record = trail.record()
    assert record.operation_result is OperationResult.SUCCESS
    assert record.operation_result_description == "the response was not taken to its end"


def test_an_application_that_raises(trail: Trail) -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise KeyError("thing")

    with pytest.raises(KeyError):
        call(AuditMiddleware(app, trail.client))
    record = trail.record()
    assert record.operation_result is OperationResult.FAILURE
    assert record.operation_result_description == "KeyError: 'thing'"


def test_an_application_that_raises_in_its_stream_or_its_close(trail: Trail) -> None:
    def body() -> Iterator[bytes]:
        yield b"x"
        raise OSError("disk")

    class Closing(list[bytes]):
        def close(self) -> None:
            raise RuntimeError("close")

    for failing, expected in ((body(), "OSError: disk"), (Closing([b"x"]), "RuntimeError: close")):
        with pytest.raises((OSError, RuntimeError)):
            call(AuditMiddleware(answer(body=failing), trail.client))
        record = trail.records()[-1]
        assert (record.operation_result, record.operation_result_description) == (OperationResult.FAILURE, expected)


@pytest.mark.parametrize("thrown", [gevent.GreenletExit, gevent.Timeout, SystemExit])
def test_a_kill_goes_through_and_is_recorded(trail: Trail, thrown: type[BaseException]) -> None:
    started = Event()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started.set()
        gevent.sleep(60)
        return []

    seen: list[BaseException] = []

    def serve() -> None:
        try:
            call(AuditMiddleware(app, trail.client))
        except BaseException as error:
            seen.append(error)

    request = gevent.spawn(serve)
    started.wait()
    request.kill(thrown)
    assert type(seen[0]) is thrown
    assert trail.record().operation_result_description.startswith(thrown.__name__)


def test_an_application_that_gives_no_status(trail: Trail) -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return [b"x"]

    with pytest.raises(IndexError):
        call(AuditMiddleware(app, trail.client))
    assert trail.record().operation_result_description == "the application gave no status"


@pytest.mark.parametrize("end", [StopIteration, None, KeyError])
def test_a_connection_that_the_application_takes_over(trail: Trail, end: type[Exception] | None) -> None:
    """A WebSocket: no status is given, and a StopIteration ends the request for gunicorn."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if end is not None:
            raise end
        return []

    codes: list[int] = []

    def describe(environ: Any, status: int, record: Record) -> Record:
        codes.append(status)
        return record

    audited = AuditMiddleware(app, trail.client, describe=describe)
    with pytest.raises(end or IndexError):
        call(audited, HTTP_CONNECTION="Upgrade", HTTP_UPGRADE="websocket")
    record = trail.record()
    told = (codes, record.operation_result, record.operation_result_description)
    if end is KeyError:
        assert told == ([500], OperationResult.FAILURE, "KeyError")
    else:
        assert told == ([101], OperationResult.UNKNOWN, "the application took the connection over (websocket)")


def test_an_application_that_names_its_arguments(trail: Trail) -> None:
    """WSGI forbids it, and servers take it all the same, so the middleware must take it, too."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("201 Created", headers=[], exc_info=None)
        return [b"done\n"]

    seen: dict[str, Any] = {}
    body = AuditMiddleware(app, trail.client)({"REQUEST_METHOD": "GET"}, lambda status, **named: seen.update(named))  # type: ignore[arg-type,misc]
    body.close()  # type: ignore[attr-defined]
    assert seen == {"headers": [], "exc_info": None}
    assert trail.record().operation_result is OperationResult.SUCCESS


def test_a_caller_that_never_closes_the_response(trail: Trail) -> None:
    """Many middlewares that rewrite bodies do so."""
    audited = AuditMiddleware(answer(), trail.client)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/things/7"}
    assert b"".join(audited(environ, lambda *args: None)) == b"done\n"  # type: ignore[arg-type,misc]
    eventually(lambda: audited.counts.recorded)
    assert trail.record().operation_result_description == ""


@once
def test_a_response_that_is_not_closed_before_the_interpreter_ends() -> None:
    """No greenlet can send its record any more, and no exception is shown."""
    program = (
        "from geventaudit import Client, NoOp\n"
        "from geventaudit.integrations.wsgi import AuditMiddleware\n"
        "audited = AuditMiddleware(lambda environ, start: [b'done'], Client(NoOp))\n"
        "body = audited({'REQUEST_METHOD': 'GET'}, lambda *args: None)\n"
    )
    process = subprocess.Popen([sys.executable, "-X", "dev", "-c", program], stderr=subprocess.PIPE)
    with process:
        assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


def test_it_keeps_to_the_protocol_on_both_sides(trail: Trail) -> None:
    def written(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])(b"written")
        return []

    def corrected(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            raise ValueError
        except ValueError as error:
            start_response("500 Oh", [("Content-Type", "text/plain")], (ValueError, error, None))
        return [b"x"]

    for app in (answer(), answer(body=iter([b"x"])), written, corrected):
        call(validator(AuditMiddleware(validator(app), trail.client)))
    assert [record.operation_result_description for record in trail.records()] == ["", "", "", "500 Oh"]


@pytest.mark.parametrize("body", [(b"done\n",), [b"one ", b"two"], [], iter([b"one ", b"two"])])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_responses_are_unchanged(trail: Trail, body: Any, version: str) -> None:
    """Byte for byte: lengths, chunks, everything but the time."""

    def ask(app: Any) -> bytes:
        with serving(app) as port:
            reply = fetch(port, f"GET / HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return b"\r\n".join(line for line in reply.split(b"\r\n") if not line.startswith(b"Date:"))

    bare, audited = itertools.tee(body) if isinstance(body, Iterator) else (body, body)
    assert ask(answer(body=bare)) == ask(AuditMiddleware(answer(body=audited), trail.client))
    assert trail.record().operation_result_description == ""


def test_servers_still_see_lengths_and_files(trail: Trail) -> None:
    """Servers use them for Content-Length without chunks, and for sendfile."""
    environ: dict[str, Any] = {"wsgi.file_wrapper": FileWrapper}
    setup_testing_defaults(environ)
    file = io.BytesIO(b"x")

    def start(*args: Any) -> Any:
        return None

    one = AuditMiddleware(answer(body=[b"x"]), trail.client)({**environ}, start)
    assert len(one) == 1  # type: ignore[arg-type]
    stream = AuditMiddleware(answer(body=iter([b"x"])), trail.client)({**environ}, start)
    assert not hasattr(stream, "__len__")
    wrapped = AuditMiddleware(answer(body=FileWrapper(file)), trail.client)({**environ}, start)
    assert type(wrapped) is FileWrapper
    assert trail.records() == []
    for each in (one, stream, wrapped, wrapped):
        each.close()  # type: ignore[attr-defined]
    assert file.closed
    assert len(trail.records()) == 3, "one for each, however often it is closed"


# -- hooks and options -------------------------------------------------------------------------------------------------


def test_describe_changes_and_vetoes(trail: Trail) -> None:
    def describe(environ: Any, status: int, record: Record) -> Record | None:
        if environ["PATH_INFO"] == "/boring":
            return None
        record.custom_data = {"status": status, "tenant": environ["HTTP_TENANT"]}
        return record.replace(operation_name="Renamed")

    audited = AuditMiddleware(answer("201 Created"), trail.client, describe=describe)
    call(audited, HTTP_TENANT="t1")
    call(audited, "/boring")
    record = trail.record()
    assert record.operation_name == "Renamed"
    assert record.custom_data.items() >= {"status": 201, "tenant": "t1"}.items()
    assert audited.counts == RequestCounts(recorded=1, vetoed=1)


@pytest.mark.parametrize("how", ["raises", "returns nonsense"])
def test_a_describe_that_fails_costs_its_own_part_only(
    trail: Trail, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    def describe(environ: Any, status: int, record: Record) -> Any:
        record.operation_name = "changed by half"
        return "nonsense" if how == "returns nonsense" else 1 / 0

    audited = AuditMiddleware(answer(), trail.client, describe=describe)
    assert call(audited) == ("200 OK", b"done\n")
    assert trail.record().operation_name == "GET /things/7"
    assert audited.counts == RequestCounts(recorded=1, incomplete=1)
    (told,) = [each for each in notifications(trail.client) if each.kind is NotificationKind.INCOMPLETE]
    expected = {
        "raises": "ZeroDivisionError: division by zero",
        "returns nonsense": "TypeError: describe must return a Record, or None for none, returned a str",
    }[how]
    assert str(told.error) == f"recorded without what describe would have said: {expected}"
    assert type(told.error.__cause__).__name__ == expected.partition(":")[0]
    assert f"geventaudit: incomplete: {told.error}" in caplog.messages
    assert not any("not recorded" in each for each in caplog.messages)


def notifications(client: Client) -> list[Any]:
    client.close()
    return list(client.notify())


def test_excluded_paths(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client, exclude=["/healthz", "/static/*"])
    for path in ("/healthz", "/static/a/b.css", "/healthz/x", "/static"):
        call(audited, path)
    names = [record.operation_name for record in trail.records()]
    assert names == ["GET /healthz/x", "GET /static"]
    assert audited.counts == RequestCounts(recorded=2, excluded=2)


def test_strict_fills_no_missing_fields(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client, strict=True)
    assert call(audited, HTTP_USER_AGENT="x") == ("200 OK", b"done\n")
    assert audited.counts == RequestCounts(lost=1)
    assert trail.client.stats().rejected == {"invalid": 1}
    (told,) = [each for each in notifications(trail.client) if each.kind is NotificationKind.NOT_RECORDED]
    assert "OperationAccessLevel: must not be empty" in str(told.error)


def test_one_request_is_one_record(trail: Trail) -> None:
    inner = AuditMiddleware(answer(), trail.client)
    outer = AuditMiddleware(inner, trail.client, exclude=["/healthz"])
    call(outer)
    call(outer, "/healthz")
    assert len(trail.records()) == 1
    assert (inner.counts, outer.counts) == (RequestCounts(), RequestCounts(recorded=1, excluded=1))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"trusted_proxies": "10.0.0.1"}, r"trusted_proxies must be a list, got '10.0.0.1': write \['10.0.0.1'\]"),
        ({"trusted_proxies": ["proxy.example"]}, "addresses and networks like .* got 'proxy.example'"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "has host bits set"),
        ({"trusted_proxies": [1]}, "addresses and networks like .* got 1"),
        ({"exclude": "/healthz"}, "exclude must be a list"),
        ({"trusted_proxies": None}, "trusted_proxies must be a list, got None"),
        ({"exclude": None}, "exclude must be a list, got None"),
        ({"exclude": ["/healthz", 5]}, "exclude must be a list of patterns like .*, got 5 in it"),
        ({"describe": 5}, r"describe must be a function of \(environ, status, record\), got 5"),
        ({"access_level": 5}, "access_level must be text, got 5"),
        ({"access_level": None}, "access_level must be text, got None"),
        ({"audit_type": AuditType.HEARTBEAT}, "audit_type must be"),
    ],
)
def test_parameters_that_cannot_be(options: dict[str, Any], problem: str) -> None:
    with Client(NoOp) as client, pytest.raises((ValueError, TypeError), match=problem):
        AuditMiddleware(answer(), client, **options)


@pytest.mark.parametrize("client", [None, NoOp, answer()])
def test_a_client_that_is_none(client: Any) -> None:
    with pytest.raises(TypeError, match="client must be a Client or a BaseClient, got"):
        AuditMiddleware(answer(), client)


def test_an_application_that_is_none() -> None:
    with Client(NoOp) as client, pytest.raises(TypeError, match="app must be a WSGI application, got None"):
        AuditMiddleware(None, client)  # type: ignore[arg-type]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_the_application_answers_after_the_client_closed(trail: Trail) -> None:
    audited = AuditMiddleware(answer(), trail.client)
    trail.client.close()
    assert [call(audited) for _ in range(3)] == [("200 OK", b"done\n")] * 3
    assert audited.counts == RequestCounts(lost=3)
    assert trail.client.stats().rejected == {"closed": 3}


@pytest.mark.parametrize("kind", [SpoolError, SealError])
def test_a_refusal_of_a_spool_or_a_seal_is_notified(
    trail: Trail, monkeypatch: pytest.MonkeyPatch, kind: type[QueueFullError]
) -> None:
    """The notifications of spools and seals do not name refused records."""

    def refuse(msg: Any) -> None:
        raise kind("no room on the disk")

    audited = AuditMiddleware(answer(), trail.client)
    monkeypatch.setattr(trail.client, "send", refuse)
    notifications = trail.client.notify()
    assert call(audited) == ("200 OK", b"done\n")
    assert audited.counts == RequestCounts(lost=1)
    told = next(each for each in notifications if each.kind is NotificationKind.NOT_RECORDED)
    assert isinstance(told.error, kind)


def test_unrecorded_requests_are_notified_once_a_second() -> None:
    with Client(NoOp) as client:
        audited = AuditMiddleware(answer(), client, strict=True)
        channel = client.notify()
        for _ in range(50):
            call(audited)
        told = channel.get(timeout=0)
        assert (told.kind, told.missed) == (NotificationKind.NOT_RECORDED, 0)
        assert client._notifier._limited[NotificationKind.NOT_RECORDED][1] == 49
        assert audited.counts.lost == 50


def test_reports_from_other_threads() -> None:
    with Client(NoOp) as client:
        pool = gevent.get_hub().threadpool
        pool.apply(client.report, (RuntimeError("elsewhere"),))
        told = client.notify().get(timeout=10)
        assert (told.kind, str(told.error)) == (NotificationKind.NOT_RECORDED, "elsewhere")
    pool.kill()


def test_an_environment_that_is_none(trail: Trail) -> None:
    """The application may like it all the same."""
    audited = AuditMiddleware(answer(), trail.client)
    assert b"".join(audited({}, lambda *args: None)) == b"done\n"  # type: ignore[arg-type,misc]
    assert audited.counts == RequestCounts(lost=1)


@pytest.mark.parametrize("agent_is", ["away", "stuck", "refusing"])
def test_the_application_answers_in_each_state_of_the_agent(socket_path: str, agent_is: str) -> None:
    """More requests than the queue and the socket hold."""
    with socket.socket() as bound_only:
        bound_only.bind(("127.0.0.1", 0))
        refused = bound_only.getsockname()
        agent = Agent(socket_path, lambda received: None)
        factories = {"refusing": lambda: TCP(refused)}
        factory: Callable[[], Any] = factories.get(agent_is, lambda: DomainSocket(socket_path))
        if agent_is == "stuck":
            agent.start()
            agent.stop_reading()
        client = Client(factory, queue_size=10, backoff=Backoff(initial=0.01))
        audited = AuditMiddleware(answer(), client)
        with serving(audited) as port:
            request = get("/" + "x" * 2000, b"User-Agent: " + b"x" * 2000)
            replies = [fetch(port, request) for _ in range(150)]
        assert all(reply.startswith(b"HTTP/1.1 200") for reply in replies)
        counts = audited.counts
        assert counts.recorded + counts.lost == 150
        assert counts.lost > 0
        assert client.stats().rejected == {"queue_full": counts.lost}
        client.close(timeout=0)
        assert NotificationKind.QUEUE_FULL in [told.kind for told in client.notify()]
        agent.stop(timeout=0)


def test_a_hub_that_never_runs_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing here lets the hub run, as under servers without gevent."""
    client = Client(NoOp)
    audited = AuditMiddleware(answer(), client, exclude=["/healthz"])
    for _ in range(3):
        call(audited)
    assert not caplog.records, "it may still have its turn"
    monkeypatch.setattr(hub_watch, "MAX_WAIT", 0.0)
    call(audited, "/healthz")
    assert not caplog.records, "a request that is not recorded is none to look at"
    for _ in range(3):
        assert call(audited) == ("200 OK", b"done\n")
    (told,) = caplog.records
    assert told.name == "geventaudit.wsgi"
    assert "the gevent hub of the client's thread has had no turn" in told.getMessage()
    assert client.stats().written == 0
    client.close()


def test_a_running_hub_is_not_logged(
    trail: Trail, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub_watch, "MAX_WAIT", 0.0)
    audited = AuditMiddleware(answer(), trail.client)
    with serving(audited) as port:
        for _ in range(5):
            fetch(port, get("/"))
    assert not caplog.records
    assert audited._hub is None, "and from then on, requests pay nothing"


def test_a_hub_that_was_asked_before_a_fork_is_asked_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(NoOp) as client:
        audited = AuditMiddleware(answer(), client)
        call(audited)
        monkeypatch.setattr(hub_watch, "MAX_WAIT", 0.0)
        with monkeypatch.context() as forked:
            forked.setattr(hub_watch.os, "getpid", lambda: 1)
            call(audited)
            assert not caplog.records, "what was asked is the parent's"
            call(audited)
        assert len(caplog.records) == 1


# -- hostile clients ---------------------------------------------------------------------------------------------------

HOSTILE = [
    get("/%0d%0aSet-Cookie:%20x=1"),
    get("/%00%01%7f%1b[31m"),
    get("/%ff%fe%c0%80"),
    get("/%ed%a0%80%ed%b0%80"),
    get("/%F0%9F%90%8D/%u0041/%"),
    get("/" + "a" * 7000),
    get("/" + "/.." * 500),
    get("/subscriptions/%20/resourceGroups/%0a/providers/%00/%ff/%ed%a0%80"),
    get("/", b"User-Agent: " + b"A" * 65536),
    get("/", b"User-Agent: \xff\xfe\xed\xa0\x80 \xf0\x9f\x90\x8d"),
    get("/", b"User-Agent: a\r\n b: c"),
    get("/", b"User-Agent: a\rX-Forwarded-For: 6.6.6.6"),
    get("/", b"User-Agent;: x", b"\xff: y"),
    get("/", b"X-Forwarded-For: 127.0.0.1, ::1, \xff, 999.1.1.1, 6.6.6.6" + b"," * 5000),
    get("/", *[b"X-Forwarded-For: 6.6.6.%d" % number for number in range(90)]),
    get("/", b'Forwarded: for="' + b'\\"' * 3000, b"Forwarded: for=_hidden;for=;=;\xff"),
    get("/", b"X-Ms-Client-Principal-Name: \xed\xa0\x80" + b"x" * 6000, b"X-MS-CLIENT-APP-ID:  "),
    get("/", b"X_Forwarded_For: 6.6.6.6", b"X_Ms_Client_Principal_Name: root"),
    b"G\xcbT / HTTP/1.0\r\nHost: x\r\n\r\n",
    b"DELETE / HTTP/1.0\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
]


@pytest.mark.parametrize(
    ("agent", "recorded"),
    [
        ("A" * 65536, "A" * 2048 + "... (65536 characters)"),
        ("two\r\nlines\x1b[31m", r"two\r\nlines\x1b[31m"),
        ("\xff\xfe", r"\xff\xfe"),
        ("\xf0\x9f\x90\x8d", "\N{SNAKE}"),
        ("\xe2\x80\xaetxt.exe", r"\u202etxt.exe"),
        ("\ud800", r"\ud800"),
        ("\N{SNAKE}", "\N{SNAKE}"),
        ("", "Unknown"),
    ],
)
def test_the_user_agent_of_a_client(trail: Trail, agent: str, recorded: str) -> None:
    """WSGI hands bytes over as Latin-1. Bytes that are no text, or no line, are escaped."""
    call(AuditMiddleware(answer(), trail.client), HTTP_USER_AGENT=agent)
    assert trail.record().caller_agent == recorded


def test_hostile_requests_make_valid_records_or_none(trail: Trail) -> None:
    """Each is answered as without the middleware. The record has exactly the facts that the application saw."""
    seen: list[str] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        seen.append(environ["REQUEST_METHOD"])
        return answer()(environ, start_response)

    audited = AuditMiddleware(app, trail.client, trusted_proxies=["127.0.0.1"])
    with serving(app) as bare:
        expected = [fetch(bare, request).partition(b"\r\n")[0] for request in HOSTILE]
    seen.clear()
    with serving(audited) as port:
        for request, reply in zip(HOSTILE, expected, strict=True):
            assert fetch(port, request).partition(b"\r\n")[0] == reply, request
    assert len(seen) > 10
    assert audited.counts == RequestCounts(recorded=len(seen))
    records = trail.records()
    assert len(records) == len(seen)
    for record in records:
        assert len(record.caller_agent) < 10_000
        assert len(record.operation_name) < 10_000
        assert f"{record.operation_name}{record.caller_agent}{record.target_resources}".isprintable()
        assert CallerIdentityType.UPN not in record.caller_identities or "\\xed" in str(record.caller_identities)


anything = st.text(st.characters(), max_size=40) | st.sampled_from(["", "10.0.0.1", "/", "for=x", "1" * 5000, "\udc80"])


@given(
    st.fixed_dictionaries(
        {"REQUEST_METHOD": anything, "PATH_INFO": anything, "SCRIPT_NAME": anything},
        optional={
            "REMOTE_ADDR": anything,
            "REMOTE_USER": anything,
            "HTTP_USER_AGENT": anything,
            "HTTP_X_FORWARDED_FOR": anything,
            "HTTP_FORWARDED": anything,
            "SSL_CLIENT_S_DN": anything,
            "SSL_CLIENT_VERIFY": st.just("SUCCESS"),
            "wsgi.url_scheme": st.just("https"),
            **dict.fromkeys(PRINCIPAL, anything),
        },
    ),
    st.sampled_from(["200 OK", "404 \udcff", "999", ""]),
)
def test_any_environment_makes_an_acceptable_record(environ: dict[str, Any], status: str) -> None:
    with Client(NoOp) as client:
        audited = AuditMiddleware(answer(status), client, trusted_proxies=["10.0.0.0/8"])
        body = audited(environ, lambda *args: lambda written: None)  # type: ignore[arg-type]
        assert b"".join(body) == b"done\n"
        body.close()  # type: ignore[attr-defined]
        assert audited.counts == RequestCounts(recorded=1)
