"""Requests that a client wants to hide or to forge, secrets in them, and the moment of their records."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote
from wsgiref.util import FileWrapper

import pytest
from helpers import eventually
from hypothesis import given
from hypothesis import strategies as st
from test_wsgi import answer, call, fetch, get, serving

from geventaudit import CallerIdentityType, Client, NoOp, OperationResult, OperationType, Record
from geventaudit.integrations.http.forwarding import TrustedProxies, address_of
from geventaudit.integrations.http.text import MAX_TEXT
from geventaudit.integrations.wsgi import (
    AuditMiddleware,
    RequestCounts,
    RequestFacts,
    facts_of,
    redact_secrets,
)

Environ = dict[str, Any]


class Kept(list[Record]):
    """The records that a middleware sent."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__()
        self.client = Client(NoOp, before_send=lambda msg: self.append(msg.record) or msg)  # type: ignore[func-returns-value]
        self.app = AuditMiddleware(app, self.client, **options)


@contextmanager
def keeping(app: Any, **options: Any) -> Iterator[Kept]:
    kept = Kept(app, **options)
    with kept.client:
        yield kept


def path_of(record: Record) -> str:
    return record.target_resources["Path"][0].name


# -- exclusion, mounts, and the path of a record -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../users/ada",
        "/static/./x",
        "/static/..",
        "/static/.",
        "/static//users/ada",
        "//static/x",
        "/static/%2e%2e/users/ada",
        "/static/%2E./x",
        "/static/%252e%252e/x",
        "/static/..%2fusers/ada",
        "/static/..\\users\\ada",
        "/static/..;/users/ada",
        "/static/.. /users/ada",
        "/static/\x00",
        "/static/x\r\n",
        "/static/\xef\xbc\x8e\xef\xbc\x8e/users/ada",
        "/static/\xff",
        "static/x",
        "",
    ],
)
def test_ambiguous_paths_are_never_excluded(path: str) -> None:
    with keeping(answer(), exclude=["/static/*"]) as kept:
        call(kept.app, path, "DELETE")
        assert kept.app.counts == RequestCounts(recorded=1)


@pytest.mark.parametrize(
    "path", ["/static/a.css", "/static/a..b/c.d", "/static/.well-known/x", "/static/Gr\xc3\xb6\xc3\x9fe"]
)
def test_plain_paths_are_excluded(path: str) -> None:
    with keeping(answer(), exclude=["/static/*"]) as kept:
        call(kept.app, path)
        assert kept.app.counts == RequestCounts(excluded=1)


@given(
    st.lists(st.sampled_from(["static", "users", "ada", "..", ".", "", "%2e%2e", "%2f", ";", "\\", "%"]), max_size=7)
)
def test_an_excluded_path_has_one_meaning_only(segments: list[str]) -> None:
    """Each normal form by which an application may route is the excluded one."""
    path = "/" + "/".join(segments)
    with keeping(answer(), exclude=["/static/*"]) as kept:
        call(kept.app, path)
        if kept.app.counts.excluded:
            assert posixpath.normpath(path).startswith("/static")
            assert posixpath.normpath(path.replace("\\", "/").replace("%2e", ".").replace("%2f", "/")).startswith(
                "/static"
            )


def test_exclusion_is_by_the_path_that_the_application_routes_on() -> None:
    with keeping(answer(), exclude=["/static/*", "/healthz"]) as kept:
        call(kept.app, "/users/ada", "DELETE", SCRIPT_NAME="/static", HTTP_SCRIPT_NAME="/static")
        call(kept.app, "/users/ada", "DELETE", SCRIPT_NAME="/static")
        call(kept.app, "z", "DELETE", SCRIPT_NAME="/health")
        call(kept.app, "/x", SCRIPT_NAME="/static/..")
        assert kept.app.counts == RequestCounts(recorded=4)
        call(kept.app, "/static/a.css", SCRIPT_NAME="/mounted")
        call(kept.app, "/healthz", SCRIPT_NAME="/mounted")
        assert kept.app.counts == RequestCounts(recorded=4, excluded=2)


@pytest.mark.parametrize(
    ("header", "script", "info", "path", "named"),
    [
        (None, "/v1", "/users/ada", "/v1/users/ada", None),
        (None, "/v1/", "/users/ada", "/v1/users/ada", None),
        ("/static", "/static", "/users/ada", "/users/ada", "/static"),
        ("/subscriptions/s1", "/subscriptions/s1", "/users/ada", "/users/ada", "/subscriptions/s1"),
        ("/static", "/static/v1", "/users/ada", "/v1/users/ada", "/static"),
        ("/x,/static", "/static", "/users/ada", "/users/ada", "/static"),
        ("/x, /static", "/static", "/users/ada", "/users/ada", "/static"),
        ("/a,/b", "/a,/b", "/users/ada", "/users/ada", "/a,/b"),
        ("/", "/v1", "/users/ada", "/v1/users/ada", "/"),
        ("", "/v1", "/users/ada", "/v1/users/ada", None),
        ("/other", "/v1", "/users/ada", "/v1/users/ada", None),
        ("/", "/", "users/ada", "/users/ada", "/"),
        ("/static", "/static", "", "/", "/static"),
        (None, "/v1", "", "/v1", None),
        (None, "", "//users/ada", "//users/ada", None),
    ],
)
def test_a_prefix_that_a_header_names_is_no_part_of_the_path(
    header: str | None, script: str, info: str, path: str, named: str | None
) -> None:
    with keeping(answer()) as kept:
        call(kept.app, info, "DELETE", SCRIPT_NAME=script, HTTP_SCRIPT_NAME=header)
    (record,) = kept
    assert (record.operation_name, path_of(record)) == (f"DELETE {path}", path)
    assert set(record.target_resources) == {"Path"}
    assert record.custom_data.get("script_name") == named


def moving(app: Any, prefix: str) -> Any:
    """A middleware inside that mounts *app*, as werkzeug's DispatcherMiddleware does."""

    def mounted(environ: Environ, start_response: Any) -> Any:
        if environ["PATH_INFO"].startswith(prefix):
            environ["SCRIPT_NAME"] += prefix
            environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix(prefix)
        return app(environ, start_response)

    return mounted


def test_mounts_inside_are_excluded_by_the_whole_path() -> None:
    with keeping(moving(answer(), "/v1"), exclude=["/v1/static/*", "/healthz"]) as kept:
        call(kept.app, "/v1/static/a.css")
        call(kept.app, "/v1/static/a.css", SCRIPT_NAME="/outer")
        assert kept.app.counts == RequestCounts(excluded=2)
        call(kept.app, "/v1/healthz")
        assert kept[0].operation_name == "GET /v1/healthz"


@pytest.mark.parametrize("value", ["/static", "/static/", "static", "/x, /static"])
@pytest.mark.parametrize("header", ["HTTP_X_SCRIPT_NAME", "HTTP_X_FORWARDED_PREFIX", "HTTP_X_FORWARDED_PATH"])
def test_a_mount_inside_that_a_header_names_hides_nothing(header: str, value: str) -> None:
    """A recipe for reverse proxies, which applications have inside: the client then says where they are mounted."""

    def recipe(environ: Environ, start_response: Any) -> Any:
        return moving(answer(), "/" + environ[header].split(",")[-1].strip(" /"))(environ, start_response)

    with keeping(recipe, exclude=["/static/*"]) as kept:
        call(kept.app, "/static/users/ada", "DELETE", **{header: value})
    assert [record.operation_name for record in kept] == ["DELETE /static/users/ada"]


@pytest.mark.parametrize("raises", [False, True])
def test_an_excluded_path_that_is_rewritten_inside_is_recorded(raises: bool) -> None:
    def rewrite(environ: Environ, start_response: Any) -> Any:
        environ["PATH_INFO"] = environ["HTTP_X_ORIGINAL_URL"]
        if raises:
            raise KeyError("user")
        return answer()(environ, start_response)

    with keeping(rewrite, exclude=["/static/*"]) as kept:
        if raises:
            with pytest.raises(KeyError):
                call(kept.app, "/static/x", "DELETE", HTTP_X_ORIGINAL_URL="/users/ada")
        else:
            call(kept.app, "/static/x", "DELETE", HTTP_X_ORIGINAL_URL="/users/ada")
            call(kept.app, "/static/x", "DELETE", HTTP_X_ORIGINAL_URL="/static/y")
            assert kept.app.counts.excluded == 1
        assert kept.app.counts.recorded == 1


@pytest.mark.parametrize("method", ["DELETE", "delete"])
def test_a_method_that_is_overridden_inside(method: str) -> None:
    def override(environ: Environ, start_response: Any) -> Any:
        environ["REQUEST_METHOD"] = environ["HTTP_X_HTTP_METHOD_OVERRIDE"]
        return answer()(environ, start_response)

    with keeping(override) as kept:
        call(kept.app, "/users/ada", "POST", HTTP_X_HTTP_METHOD_OVERRIDE=method)
    assert (kept[0].operation_name, kept[0].operation_type) == ("DELETE /users/ada", OperationType.DELETE)


# -- status, redirects, sign-ins ---------------------------------------------------------------------------------------


def app_with(facts: Callable[[RequestFacts], object], status: str = "200 OK", *headers: tuple[str, str]) -> Any:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        found = facts_of(environ)
        assert found is not None
        facts(found)
        start_response(status, [*headers])
        return [b"done\n"]

    return app


def nothing(facts: RequestFacts) -> None:
    pass


@pytest.mark.parametrize(
    ("status", "code"), [("200 OK", 200), ("302 Found", 302), ("404 Not Found", 404), ("500 Oh", 500), ("what?", 500)]
)
def test_the_status_is_in_every_record(status: str, code: int) -> None:
    with keeping(answer(status)) as kept:
        call(kept.app)
    assert kept[0].custom_data["status"] == code


def _breaks(parts: list[str]) -> Any:
    """Return an application that does these parts one after the other, and then raises."""

    def stream() -> Iterator[bytes]:
        for part in parts:
            if part in ("empty", "chunk"):
                yield b"x" if part == "chunk" else b""
        raise OSError("disk")

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("302 Found", [("Location", "/next")]) if "start" in parts else None
        if "write" in parts:
            write(b"x")
        if "body" in parts:
            return stream()
        raise OSError("disk")

    return app


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ("", 500),
        ("start", 500),
        ("start write", 302),
        ("start body", 500),
        ("start body empty", 500),
        ("start body chunk chunk", 302),
    ],
)
def test_the_status_is_the_one_that_the_client_got(parts: str, code: int, moment: Any) -> None:
    """A server sends the status with the first bytes. If the application raises before that, it sends 500."""
    with keeping(_breaks(parts.split()), record=moment) as kept, serving(kept.app) as port:
        assert fetch(port, get("/")).startswith(b"HTTP/1.1 %d " % code)
        (record,) = eventually(lambda: kept[:])
    assert record.custom_data["status"] == code
    assert ("location" in record.custom_data) is (code == 302)
    if "write" not in parts or moment == "after":
        assert record.operation_result is OperationResult.FAILURE
        assert record.operation_result_description == "OSError: disk"
    assert kept.app.counts == RequestCounts(recorded=1)


@pytest.mark.parametrize("kind", ["body", "file"])
def test_a_close_that_fails_is_a_failure(kind: str) -> None:
    class File:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"x"])

        def close(self) -> None:
            raise OSError("disk")

    with keeping(answer(body=File())) as kept, pytest.raises(OSError, match="disk"):
        call(kept.app, **({"wsgi.file_wrapper": File} if kind == "file" else {}))
    assert kept[0].operation_result_description == "OSError: disk"
    assert kept[0].operation_result is OperationResult.FAILURE
    assert kept[0].custom_data["status"] == 200


def test_a_redirect_carries_its_target() -> None:
    with keeping(app_with(nothing, "302 Found", ("LOCATION", "/users/ada?tab=1"))) as kept:
        call(kept.app)
    assert kept[0].custom_data["location"] == "/users/ada?tab=1"
    assert kept[0].operation_result is OperationResult.SUCCESS


@pytest.mark.parametrize("headers", [None, [("Location",)], [(1, 2)], 5])
def test_headers_that_are_none_cost_no_record(headers: Any) -> None:
    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("302 Found", headers)
        return [b"done\n"]

    with keeping(app) as kept:
        call(kept.app)
    assert "location" not in kept[0].custom_data


def test_a_denied_request_is_a_failure_below_400() -> None:
    def deny(facts: RequestFacts) -> None:
        facts.denied = "it leads to the login page"

    with keeping(app_with(deny, "302 Found", ("Location", "/login"))) as kept:
        call(kept.app)
    assert kept[0].operation_result is OperationResult.FAILURE
    assert kept[0].operation_result_description == "302 Found; it leads to the login page"


@pytest.mark.parametrize("account", ["", "  ", None])
def test_a_failed_login_is_a_failure_without_a_name_too(account: Any) -> None:
    with keeping(app_with(lambda facts: facts.login_failed(account))) as kept:
        call(kept.app)
    assert kept[0].operation_result is OperationResult.FAILURE
    assert kept[0].operation_result_description == "200 OK; the sign-in as an account without name failed"


def test_a_failed_login_names_the_account() -> None:
    with keeping(app_with(lambda facts: facts.login_failed("ann"))) as kept:
        call(kept.app)
    assert kept[0].operation_result is OperationResult.FAILURE
    assert kept[0].operation_result_description == "200 OK; the sign-in as ann failed"
    (identity,) = kept[0].caller_identities[CallerIdentityType.USERNAME]
    assert (identity.identity, identity.description) == ("ann", "tried to sign in, and failed")

    def second_try(facts: RequestFacts) -> None:
        facts.login_failed("ann")
        facts.login_succeeded()
        facts.user = "ann"

    with keeping(app_with(second_try)) as kept:
        call(kept.app)
    assert kept[0].operation_result is OperationResult.SUCCESS


@pytest.mark.parametrize("user", [None, "", " ", "\t\n"])
def test_a_user_without_a_name_is_unknown(user: Any) -> None:
    def sign_in(facts: RequestFacts) -> None:
        facts.user = user

    with keeping(app_with(sign_in)) as kept:
        call(kept.app, REMOTE_USER=user)
    assert set(kept[0].caller_identities) == {CallerIdentityType.UNKNOWN}


@pytest.mark.parametrize(
    ("there", "name"),
    [
        ("ann", "ann"),
        ("J\xf6rg", "J\xf6rg"),
        ("\u0141ukasz", "\u0141ukasz"),
        ("J\xf6rg".encode().decode("latin-1"), "J\xf6rg"),
        ("\u0141ukasz".encode().decode("latin-1"), "\u0141ukasz"),
        ("\xff\xfe", "\xff\xfe"),
        ("a\nb", r"a\nb"),
        ("\x9b31m", r"\x9b31m"),
        (5, "5"),
    ],
)
@pytest.mark.parametrize("key", ["REMOTE_USER", "SSL_CLIENT_S_DN"])
def test_names_that_servers_write(key: str, there: Any, name: str) -> None:
    with keeping(answer()) as kept:
        call(kept.app, **{key: there, "wsgi.url_scheme": "https", "SSL_CLIENT_VERIFY": "SUCCESS"})
    ((identity,),) = kept[0].caller_identities.values()
    assert identity.identity == name


# -- addresses ---------------------------------------------------------------------------------------------------------

NODES = [
    ("203.0.113.9", "203.0.113.9"),
    (" 203.0.113.9 ", "203.0.113.9"),
    ("203.0.113.9:51234", "203.0.113.9"),
    ('"203.0.113.9"', "203.0.113.9"),
    ('"203.0.113.9:51234"', "203.0.113.9"),
    ('" 203.0.113.9 "', "203.0.113.9"),
    ("203.0.113.9:_hidden", "203.0.113.9"),
    ("[203.0.113.9]:80", "203.0.113.9"),
    ("2001:db8::1", "2001:db8::1"),
    ("[2001:db8::1]", "2001:db8::1"),
    (" [2001:db8::1]:443", "2001:db8::1"),
    ('"[2001:db8::1]:443"', "2001:db8::1"),
    ("::ffff:203.0.113.9", "203.0.113.9"),
    ("[::ffff:203.0.113.9]:1", "203.0.113.9"),
    ("[2001:db8::1", None),
    ("2001:db8::1]", None),
    ('"203.0.113.9', None),
    ('203.0.113.9"', None),
    ("203.0.113.9:http", None),
    ("203.0.113.9:1:2", None),
    ("203.0.113.9:999999", None),
    ("203.0.113.9 6.6.6.6", None),
    ("203.0.113.9, 6.6.6.6", None),
    ("[203.0.113.9]6.6.6.6", None),
    ("[]", None),
    ("01.2.3.4", None),
    ("unknown", None),
    ("_hidden", None),
    ("", None),
    ("\u0661.1.1.1", None),
]


@pytest.mark.parametrize(("text", "address"), NODES)
def test_one_parser_for_peers_and_headers(text: str, address: str | None) -> None:
    found = address_of(text)
    assert (found and str(found)) == address
    if address is None:
        return
    with keeping(answer(), trusted_proxies=["10.0.0.0/8"]) as kept:
        call(kept.app, REMOTE_ADDR=text)
        call(kept.app, REMOTE_ADDR=" 10.0.0.1:5123", HTTP_X_FORWARDED_FOR=text)
        call(kept.app, REMOTE_ADDR="[::ffff:10.0.0.1]:80", HTTP_FORWARDED=f"for={text}")
    assert [record.caller_ip_address for record in kept[:2]] == [address] * 2
    # Unquoted brackets, ports and space are not as RFC 7239 says, and are read all the same.
    assert kept[2].caller_ip_address == address


@pytest.mark.parametrize("peer", ["10.0.0.1", "10.0.0.1:80", "[10.0.0.1]", " 10.0.0.1", "::ffff:10.0.0.1"])
def test_a_peer_is_trusted_however_it_is_written(peer: str) -> None:
    with keeping(answer(), trusted_proxies=[peer]) as kept:
        for each in ("10.0.0.1", "10.0.0.1:4711", " [::ffff:10.0.0.1]:80 "):
            call(kept.app, REMOTE_ADDR=each, HTTP_X_MS_CLIENT_PRINCIPAL_NAME="ann@example.com")
        call(kept.app, REMOTE_ADDR="10.0.0.2:4711", HTTP_X_MS_CLIENT_PRINCIPAL_NAME="ann@example.com")
    assert [CallerIdentityType.UPN in record.caller_identities for record in kept] == [True] * 3 + [False]


def test_a_zone_is_the_servers_to_say() -> None:
    with keeping(answer(), trusted_proxies=["10.0.0.1"]) as kept:
        call(kept.app, REMOTE_ADDR="[fe80::1%eth0]:80")
        call(kept.app, REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR="[fe80::1%eth0]:80")
        call(kept.app, REMOTE_ADDR="fe80::1%\x1b[31m")
    assert [record.caller_ip_address for record in kept] == ["fe80::1%eth0", "10.0.0.1", "192.0.0.8"]


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token", "resetToken", "PASSWORD", "api_key", "client-secret", "code", "apikey"])
def test_arguments_with_the_name_of_a_secret_are_redacted_everywhere(name: str) -> None:
    secret = "s3cr\xe9t/7"

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        facts = facts_of(environ)
        assert facts is not None
        facts.route, facts.arguments = f"/reset/<{name}>/x", {name: secret, "who": "ann"}
        facts.failure = f"LookupError: no {secret} here"
        start_response("404 Not Found", [("Location", f"/again/{quote(secret, safe='')}?next={quote(secret)}")])
        return [b"done\n"]

    with keeping(app) as kept:
        call(kept.app, f"/reset/{secret}/x".encode().decode("latin-1"))
    (record,) = kept
    assert record.custom_data["arguments"] == {name: "[redacted]", "who": "ann"}
    assert record.custom_data["location"] == "/again/[redacted]?next=[redacted]"
    assert record.operation_result_description == "404 Not Found; LookupError: no [redacted] here"
    assert path_of(record) == "/reset/[redacted]/x"
    assert secret not in str(record)


@pytest.mark.parametrize(
    ("path", "argument", "shown"),
    [
        ("/reset/7/x", "7", "/reset/[redacted]/x"),
        ("/reset/71/7", "7", "/reset/71/[redacted]"),
        ("/reset/007/x", 7, "/reset/<code>"),
        ("/reset/ABCDEF/x", "abcdef", "/reset/[redacted]/x"),
        ("/reset/x" + "y" * MAX_TEXT, "x" + "y" * MAX_TEXT, "/reset/<code>"),
        ("/reset/\u0130bcdefg/\u0130BCDEFG", "\u0130bcdefg", "/reset/[redacted]/\u0130BCDEFG"),
        ("/reset/pre-s3cret.html", "s3cret", "/reset/pre-[redacted].html"),
        ("/reset/a\nb", "a\nb", r"/reset/[redacted]"),
    ],
)
def test_a_secret_in_the_path(path: str, argument: Any, shown: str) -> None:
    """If a converter changed it so that it is not found, the path is the route."""

    def fill(facts: RequestFacts) -> None:
        facts.route, facts.arguments = "/reset/<code>", {"code": argument}

    with keeping(app_with(fill)) as kept:
        call(kept.app, path.encode().decode("latin-1"))
    assert path_of(kept[0]) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/cb?code=abc&state=1", "/cb?code=[redacted]&state=1"),
        ("/cb?access_token=abc#x", "/cb?access_token=[redacted]#x"),
        ("/login?next=/x%3Ftoken%3Dabc", "/login?next=/x%3Ftoken%3D[redacted]"),
        ("{'password': 'hunter 2', 'user': 'ann'}", "{'password': [redacted], 'user': 'ann'}"),
        ('{"apiKey": "abc", "n": 1}', '{"apiKey": [redacted], "n": 1}'),
        ("token: Bearer abc.def is wrong", "token: [redacted] is wrong"),
        ("https://ann:hunter2@example.com/x", "https://[redacted]@example.com/x"),
        ("form[password]=abc", "form[password]=[redacted]"),
        ("passwords => abc", "passwords => [redacted]"),
        ("KeyError: 'thing'", "KeyError: 'thing'"),
        ("UnicodeDecodeError: 'utf-8' codec", "UnicodeDecodeError: 'utf-8' codec"),
        ("404 Not Found", "404 Not Found"),
        ("no such key", "no such key"),
    ],
)
def test_values_behind_the_name_of_a_secret_are_redacted(text: str, shown: str) -> None:
    assert redact_secrets("description", text) == shown


@pytest.mark.parametrize("name", ["name", "path"])
def test_a_client_cannot_hide_a_target_by_its_name(name: str) -> None:
    assert redact_secrets(name, "/files/key=plan/code:7") == "/files/key=plan/code:7"


def test_long_paths_and_arguments_keep_their_end() -> None:
    """Else a client could pad them: an application may drop the padding."""
    path = "/." * MAX_TEXT + "/users/ada"

    def fill(facts: RequestFacts) -> None:
        facts.arguments = {"name": path}

    with keeping(app_with(fill)) as kept:
        call(kept.app, path, "DELETE")
    for text in (path_of(kept[0]), kept[0].operation_name, kept[0].custom_data["arguments"]["name"]):
        assert text.endswith("/users/ada")
        assert f"({len(path)} characters)" in text
        assert len(text) < MAX_TEXT + 100


def test_hostile_lengths_take_no_time() -> None:
    """Each is as long as gunicorn takes it."""
    long = 8000
    hostile: list[Environ] = [
        {"SCRIPT_NAME": ",/" * (long // 2), "HTTP_SCRIPT_NAME": ",".join([",/" * (long // 2)] * 50)},
        {"SCRIPT_NAME": "/v1", "HTTP_SCRIPT_NAME": "," * long * 100},
        {"HTTP_X_FORWARDED_FOR": '"' * long * 100, "HTTP_FORWARDED": "for=" * long * 100, "REMOTE_ADDR": "10.0.0.1"},
        {"PATH_INFO": "/static/" + "\ufdfa" * long},
        {"PATH_INFO": "/static" + "/." * long},
        {"PATH_INFO": "/subscriptions/" + "providers/" * long},
    ]

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        if (facts := facts_of(environ)) is not None:
            facts.route, facts.arguments = "/<token>", {"token": "aB" * long, "code": "\xdf" * long, "n": "%" * long}
        start_response("404 Oh", [("Location", "token=" * long)])
        return [b"done\n"]

    with keeping(app, exclude=["/static/*"]) as kept:
        for environ in hostile:
            begin = time.process_time()
            call(kept.app, environ.get("PATH_INFO", "/").encode().decode("latin-1"), **environ)
            assert time.process_time() - begin < 3.0, list(environ)
        assert kept.app.counts == RequestCounts(recorded=len(hostile) - 1, excluded=1)


def test_a_hook_of_ones_own() -> None:
    seen: list[str] = []

    def redact(name: str, text: str) -> str:
        seen.append(name)
        return {"who": "somebody", "path": "/p", "location": "/l", "description": "d"}.get(name, text)

    def fill(facts: RequestFacts) -> None:
        facts.route, facts.arguments, facts.failure = "/u/<who>", {"who": "ann", "n": 1, "token": "t"}, "x"

    with keeping(app_with(fill, "302 Found", ("Location", "/ann")), redact=redact) as kept:
        call(kept.app, "/u/ann")
    (record,) = kept
    assert record.custom_data["arguments"] == {"who": "somebody", "n": "1", "token": "t"}
    assert (path_of(record), record.custom_data["location"], record.operation_result_description) == ("/p", "/l", "d")
    assert set(seen) == {"who", "n", "token", "path", "location", "description"}


@pytest.mark.parametrize("wrong", [lambda name, text: 1 / 0, lambda name, text: None])
def test_a_hook_that_fails_hides_everything(wrong: Any) -> None:
    def fill(facts: RequestFacts) -> None:
        facts.route, facts.arguments = "/u/<who>", {"who": "ann"}

    with keeping(app_with(fill), redact=wrong) as kept:
        call(kept.app, "/u/ann")
        assert kept.app.counts == RequestCounts(recorded=1, incomplete=1)
    assert "ann" not in str(kept[0])


@given(st.text(max_size=200), st.sampled_from(["token=", "'key': '", "https://a:", "code%3D", "password "]))
def test_redacting_takes_any_text(text: str, between: str) -> None:
    redact_secrets("description", text + between + text)


def test_redacting_hostile_texts_takes_no_time() -> None:
    for part in ("key", "token=", "://", "code'", "key   ", 'password: "', "secret=(", "://a:b"):
        begin = time.process_time()
        redact_secrets("path", (part * MAX_TEXT)[:MAX_TEXT])
        assert time.process_time() - begin < 0.2, part


# -- hooks that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"describe": lambda environ, status: None},
            r"describe must be a function of \(environ, status, record\), got",
        ),
        ({"describe": lambda: None}, "describe must be a function"),
        ({"redact": lambda text: text}, r"redact must be a function of \(name, text\), got .*: too many positional"),
        ({"redact": None}, r"redact must be a function of \(name, text\), got None"),
        ({"record": "later"}, "record must be 'after' or 'before', got 'later'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], problem: str) -> None:
    with Client(NoOp) as client, pytest.raises((TypeError, ValueError), match=problem):
        AuditMiddleware(answer(), client, **options)


# -- before the last chunk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "trailing", "empty list", "empty generator"])
def test_before_the_last_chunk(kind: str) -> None:
    bodies = {
        "list": [b"one", b"two"],
        "tuple": (b"one", b"two"),
        "generator": iter([b"one", b"two"]),
        "trailing": iter([b"one", b"", b"two", b"", b""]),
        "empty list": [],
        "empty generator": iter([]),
    }
    with keeping(answer(body=bodies[kind]), record="before") as kept:
        body = kept.app({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, lambda *args: lambda data: None)  # type: ignore[arg-type,misc]
        seen = [(chunk, len(kept)) for chunk in body]
        assert seen == ([] if "empty" in kind else [(b"one", 0), (b"two", 1)])
        assert len(kept) == 1
        body.close()  # type: ignore[attr-defined]
        assert len(kept) == 1
    assert kept[0].operation_result_description == ""


def test_before_the_last_chunk_over_a_real_server() -> None:
    """The record is with the client before the answer is complete; lengths and chunks are as they were."""
    sent: list[bool] = []

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        return answer(body=[b"done\n"] if environ["PATH_INFO"] == "/sized" else iter([b"a", b"b"]))(
            environ, start_response
        )

    with keeping(app, record="before") as kept:

        def watched(environ: Environ, start_response: Any) -> Iterator[bytes]:
            body = kept.app(environ, start_response)
            for chunk in body:
                sent.append(bool(kept))
                yield chunk
            body.close()  # type: ignore[attr-defined]

        with serving(kept.app) as port, serving(watched) as other:
            assert b"Content-Length: 5" in fetch(port, get("/sized"))
            assert fetch(port, get("/streamed")).endswith(b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n")
            assert len(kept) == 2
            kept.clear()
            fetch(other, get("/streamed"))
    assert sent == [False, True]


def test_before_the_last_chunk_of_files_writes_and_failures(tmp_path: Any) -> None:
    def writes(environ: Environ, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        assert not kept
        write(b"x")
        assert len(kept) == 1
        return []

    with keeping(writes, record="before") as kept:
        call(kept.app)
    assert len(kept) == 1
    assert kept[0].operation_result_description == "", "nothing is known of a cut"

    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("rb") as file, keeping(answer(body=FileWrapper(file)), record="before") as kept:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "wsgi.file_wrapper": FileWrapper}
        body = kept.app(environ, lambda *args: lambda data: None)  # type: ignore[misc]
        assert isinstance(body, FileWrapper)
        assert len(kept) == 1

    def breaks() -> Iterator[bytes]:
        yield b"x"
        raise OSError("disk")

    with keeping(answer(body=breaks()), record="before") as kept:
        with pytest.raises(OSError, match="disk"):
            call(kept.app)
        assert [record.operation_result_description for record in kept] == ["OSError: disk"]


# -- anything in an environment ----------------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=40)
nodes = st.sampled_from([text for text, _ in NODES]) | texts
elements = st.lists(
    st.tuples(st.sampled_from(["for=", "For=", "proto=", 'host="', "", ";", "by="]), nodes).map("".join), max_size=6
)
odd = texts | st.sampled_from(["", "10.0.0.1", "/static", "/static/..", "%2e", "1" * 5000, "\udc80", None, 5, b"x"])


@given(elements.map(",".join) | elements.map(";".join), elements.map(", ".join) | texts, nodes)
def test_any_forwarding_header_gives_an_address_that_was_in_it(forwarded: str, x_forwarded: str, peer: str) -> None:
    """The result is the address of the peer or one in the headers; no header makes a trusted proxy."""
    address = address_of(peer, zone=True)
    proxies = TrustedProxies(["10.0.0.0/8", "203.0.113.9"])
    environ = {"HTTP_FORWARDED": forwarded, "HTTP_X_FORWARDED_FOR": x_forwarded}
    caller, contradictions = proxies.caller(address, environ)
    known = {str(address)} | {right for _, right in NODES if right} | {"1.1.1.1"}
    for text in (caller, *(contradictions or {}).values()):
        assert text in known or text in forwarded + x_forwarded or address_of(text) is not None
    assert proxies.caller(address, {}) == (str(address), None)


@given(
    st.fixed_dictionaries(
        {"REQUEST_METHOD": texts},
        optional={
            **dict.fromkeys(("PATH_INFO", "SCRIPT_NAME", "HTTP_SCRIPT_NAME", "HTTP_USER_AGENT", "REMOTE_USER"), odd),
            **dict.fromkeys(("HTTP_X_MS_CLIENT_PRINCIPAL_NAME", "HTTP_UPGRADE", "SSL_CLIENT_S_DN"), odd),
            "REMOTE_ADDR": nodes | odd,
            "HTTP_X_FORWARDED_FOR": elements.map(",".join) | odd,
            "HTTP_FORWARDED": elements.map(",".join) | odd,
            "SSL_CLIENT_VERIFY": st.just("SUCCESS"),
            "wsgi.url_scheme": st.just("https"),
        },
    ),
    st.dictionaries(texts | st.sampled_from(["token", "code"]), odd, max_size=3),
    st.sampled_from(["200 OK", "302 Found", "401 \udcff", "", "9"]),
    odd,
)
def test_any_environment_ends_in_one_count(environ: Environ, arguments: Any, status: str, location: Any) -> None:
    """The application answers, and the request is recorded, excluded, or lost for an environment that WSGI forbids."""

    def app(environ: Environ, start_response: Any) -> Iterable[bytes]:
        if (facts := facts_of(environ)) is not None:
            facts.route, facts.arguments = "/<code>", arguments
        start_response(status, [("Location", location)])
        return [b"done\n"]

    is_wsgi = all(isinstance(environ.get(key, ""), str) for key in ("PATH_INFO", "SCRIPT_NAME", "HTTP_SCRIPT_NAME"))
    with keeping(app, trusted_proxies=["10.0.0.0/8"], exclude=["/static*"]) as kept:
        body = kept.app(environ, lambda *args: lambda data: None)  # type: ignore[arg-type]
        assert b"".join(body) == b"done\n"
        if hasattr(body, "close"):
            body.close()
        counts = kept.app.counts
        assert counts.recorded + counts.excluded + counts.lost == 1
        if is_wsgi:
            assert counts.lost == 0, kept.client.notify().get(timeout=0)
    for record in kept:
        assert f"{record.operation_name}{record.caller_agent}{record.target_resources}".isprintable()
