"""The page of the agent, as HTTP: which requests are answered, and the events. ``test_web_browser.py`` looks at it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
from gevent import subprocess
from gevent.threadpool import ThreadPool
from helpers import SERVICE_TREE_ID, eventually, free_port, mapping, message

from geventaudit.agent import Agent, Received
from geventaudit.agent.shown import json_of
from geventaudit.agent.web import Page, page
from geventaudit.cli import main
from geventaudit.encoder.encoding import Encoder
from geventaudit.testing import AuditAgent

ACTIONS = [
    "stop-reading", "resume-reading", "stop-acknowledging", "resume-acknowledging", "hang-up", "restart", "stop",
    "start", "clear",
]  # fmt: skip
PATHS = ["/", "/page.css", "/page.js", "/icon.svg", "/events", "/nothing"]


class Site:
    """The page of an agent, as a client sees it."""

    def __init__(self, url: str) -> None:
        self.port = int(url.split(":")[2].split("/")[0])
        self.origin = f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return the status, the headers and the content of an answer; of events, nothing."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if method == "POST":
                connection.putheader("Content-Length", "0")
            connection.endheaders()
            answer = connection.getresponse()
            content = b"" if answer.headers["Content-Type"].startswith("text/event-stream") else answer.read()
            return answer.status, answer.headers, content
        finally:
            connection.close()

    def act(self, name: str) -> int:
        return self.ask("POST", f"/actions/{name}", Origin=self.origin)[0]

    @contextmanager
    def events(self, **headers: str) -> Iterator[Iterator[tuple[str, str, list[str]]]]:
        """Give the events as they come: their kind, identifier, and lines."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", "/events", headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()

        def read() -> Iterator[tuple[str, str, list[str]]]:
            kind, identifier, lines = "", "", []
            while line := answer.readline().decode():
                name, _, value = line.rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "id":
                    identifier = value
                elif name == "data":
                    lines.append(value)
                else:
                    yield kind, identifier, lines
                    kind, identifier, lines = "", "", []

        try:
            yield read()
        finally:
            connection.close()

    def state(self) -> dict[str, Any]:
        with self.events() as events:
            return next(json.loads(lines[0]) for kind, _, lines in events if kind == "state")

    def messages(self, count: int, **headers: str) -> tuple[int, list[tuple[dict[str, Any], str]]]:
        """Return how many messages were missed, and the first *count* messages: their circumstances and contents."""
        found: list[tuple[dict[str, Any], str]] = []
        missed = 0
        deadline = time.monotonic() + 30
        with self.events(**headers) as events:
            for kind, _, lines in events:
                assert time.monotonic() < deadline, f"{len(found)} of {count} messages"
                if kind == "messages":
                    missed += int(lines[0].split()[0])
                    found += [
                        (json.loads(about), content) for about, content in zip(lines[1::2], lines[2::2], strict=True)
                    ]
                if len(found) >= count:
                    return missed, found[:count]
        raise AssertionError("the events ended")


@pytest.fixture
def agent() -> Iterator[AuditAgent]:
    with AuditAgent(web=True) as agent:
        yield agent


@pytest.fixture
def site(agent: AuditAgent) -> Site:
    return Site(agent.url)


@contextmanager
def connected(agent: AuditAgent) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(agent.address)
        yield sender


def send(agent: AuditAgent, *frames: bytes) -> None:
    """Send frames over one connection, and wait until their messages have arrived."""
    before = len(agent.received) + len(agent.refused)
    with connected(agent) as sender:
        sender.sendall(b"".join(frames))
        eventually(lambda: len(agent.received) + len(agent.refused) >= before + len(frames))


def frame(msg: Any = None, at: float = 1_700_000_000) -> bytes:
    return Encoder().encode(msg or message(), at)


def bad_frame(body: Any, tag: str = "AsmAuditCP") -> bytes:
    return bytes(msgpack.packb([tag, [[1_700_000_000, body]], {}]))


# -- which requests are answered ---------------------------------------------------------------------------------------


def test_the_page_and_its_parts_come_from_here_alone(site: Site) -> None:
    for path in sorted(page._FILES):
        status, headers, content = site.ask("GET", path)
        assert status == 200
        assert content
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, f"{path} names something outside"
        assert "innerHTML" not in text
        assert "eval(" not in text


def test_every_file_of_the_folder_is_served() -> None:
    files = {path.name for path in Path(page.__file__).parent.iterdir() if path.suffix not in (".py", "")}
    assert files == {name for name, _ in page._FILES.values()}


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:{port}",
        "localhost:{port}",
        "LOCALHOST:{port}",
        "[::1]:{port}",
        "127.0.0.2",
        "localhost",
        "localhost:9",
    ],
)
def test_loopback_hosts_are_answered(site: Site, host: str) -> None:
    """With any port: the page may be reached through a tunnel."""
    host = host.format(port=site.port)
    assert site.ask("GET", "/", Host=host)[0] == 200
    assert site.ask("POST", "/actions/clear", Host=host, Origin=f"http://{host}")[0] == 204


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:{port}", "", " ", "127.0.0.1.evil.example", "localhost.evil.example:{port}",
        "evil.example@127.0.0.1:{port}", "127.0.0.1:{port}/evil.example", "[::1", "192.0.2.1:{port}", "[2001:db8::1]",
        "127.0.0.1:{port}, evil.example", "127.0.0.1#evil.example", "evil.example#127.0.0.1", "0.0.0.0", "2130706433",
        "127.1", "localhost.", "\u00e9vil.example", "127.0.0.1:x",
    ],
)  # fmt: skip
def test_foreign_hosts_are_not(site: Site, agent: AuditAgent, host: str) -> None:
    """A foreign site may have its name resolved to 127.0.0.1."""
    host = host.format(port=site.port)
    for path in PATHS:
        status, _, content = site.ask("GET", path, Host=host)
        assert status == 421, path
        assert b"<" not in content
    assert site.ask("POST", "/actions/stop", Host=host, Origin=f"http://{host}")[0] == 421
    assert site.state()["running"]


def test_a_request_without_a_host_is_not_answered(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=30) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://127.0.0.1:1",
     "http://localhost:{port}", "http://127.0.0.1:{port}.evil.example", "http://127.0.0.1:{port}/", ""],
)  # fmt: skip
def test_foreign_origins_may_not_press_buttons(site: Site, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": origin.format(port=site.port)}
    for name in ACTIONS:
        assert site.ask("POST", f"/actions/{name}", **headers)[0] == 403
    state = site.state()
    assert state["running"]
    assert state["reading"]
    assert state["acknowledging"]


def test_methods_and_names(site: Site) -> None:
    for name in ACTIONS:
        assert site.ask("GET", f"/actions/{name}")[0] == 405
    assert site.act("destroy") == site.act("") == site.act("__class__") == 404
    assert site.ask("POST", "/", Origin=site.origin)[0] == 405
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert site.ask(method, "/")[0] == 405
    for path in ("/nothing", "/page.py", "/../page.py", "/%2e%2e/log.py", "//page.css", "/log.py"):
        assert site.ask("GET", path)[0] == 404


def test_invalid_requests_are_refused_quietly(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"\x1b[31m / HTTP/1.1\r\nConnection: close\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", site.port), timeout=30) as client:
            client.sendall(nonsense)
            assert not client.makefile("rb").read().startswith(b"HTTP/1.1 200")
    assert site.ask("GET", "/")[0] == 200
    assert capfd.readouterr().err.count("Traceback") == 0


# -- the token ---------------------------------------------------------------------------------------------------------


@contextmanager
def public(folder: Path) -> Iterator[tuple[Site, str, Agent]]:
    """A page that is not on loopback alone, and its token. The agent and the page live in the hub of this thread."""
    agent = Agent(str(folder / "agent.sock"), print)
    with Page(agent, ("0.0.0.0", 0)) as shown, agent:
        yield Site(shown.url), shown.url.partition("?token=")[2], agent


def in_thread(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that waits for the hub of this thread, in a thread that ends, and its own hub with it."""
    pool = ThreadPool(1)
    try:
        return pool.apply(function, arguments, options)
    finally:
        pool.kill()


def test_a_page_that_others_can_reach_wants_a_token(folder: Path) -> None:
    with public(folder) as (site, token, agent):
        assert len(token) >= 20

        def refused(**headers: str) -> None:
            for path in [*PATHS, "/?token=", "/?token=wrong", f"/?token={token}x", f"/events?token={token}"]:
                status, answer, content = site.ask("GET", path, **headers)
                assert status == 401, path
                assert "Set-Cookie" not in answer
                assert token not in content.decode()
            assert site.ask("POST", "/actions/stop", Origin=site.origin, **headers)[0] == 401

        def flow() -> None:
            refused()
            refused(Cookie=f"geventaudit-{site.port}=wrong")
            refused(Cookie=f"geventaudit-{site.port}=")
            refused(Cookie=f"geventaudit-1={token}")
            refused(Cookie="=;;\x01")
            assert site.ask("POST", f"/?token={token}", Origin=site.origin)[0] == 401
            assert site.ask("GET", f"/?token={token}", Host="evil.example")[0] == 421

            status, headers, _ = site.ask("GET", f"/?token={token}")
            assert status == 303
            assert headers["Location"] == "/", "so that the token leaves the address bar"
            cookie, *attributes = headers["Set-Cookie"].split("; ")
            assert cookie == f"geventaudit-{site.port}={token}"
            assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Lax"}

            assert site.ask("GET", "/", Cookie=f"other=1; {cookie}")[0] == 200
            for host in ("192.0.2.1", "[2001:db8::1]:80", socket.gethostname()):
                assert site.ask("GET", "/", Cookie=cookie, Host=host)[0] == 200
            assert site.ask("GET", "/", Cookie=cookie, Host="evil.example")[0] == 421
            assert site.ask("POST", "/actions/stop", Cookie=cookie, Origin="http://evil.example")[0] == 403
            assert site.ask("POST", "/actions/stop-reading", Cookie=cookie, Origin=site.origin)[0] == 204

        in_thread(flow)
        assert agent.is_running
        assert not agent.is_reading


def test_each_page_has_another_token(folder: Path) -> None:
    with public(folder) as (_, first, _):
        pass
    with public(folder) as (_, second, _):
        assert first != second


# -- events ------------------------------------------------------------------------------------------------------------


def test_a_record_arrives_in_full(agent: AuditAgent, site: Site) -> None:
    data = frame(message(2**63, operation_name="J\u00f6rg \u202e\x1b[31m"))
    send(agent, data)
    missed, [(about, content)] = site.messages(1)
    (received,) = agent.received
    assert missed == 0
    assert json.loads(content) == json_of(received)
    assert content.isprintable()
    assert '"n": 9223372036854775808' in content
    assert about == {
        "number": 1, "kind": "record", "arrived": pytest.approx(time.time(), abs=60), "connection": 1,
        "frame": len(data), "size": about["size"],
    }  # fmt: skip
    assert 0 < about["size"] < len(data)


def test_refusals_heartbeats_and_messages_of_other_libraries(agent: AuditAgent, site: Site) -> None:
    body = {**mapping(OperationName="", CallerIpAddress="nowhere", OperationResult="Maybe"), "Note": b"\xff", "X": 1.5}
    two = msgpack.packb(["AsmAuditDP", [[1, mapping()], [2, {**mapping(), "pod": "web-1"}]], {}])
    beat = {
        "AsmAuditServiceId": SERVICE_TREE_ID,
        "AuditVersion": "1",
        "OsVersion": "2",
        "Language": "go",
        "Destination": "D",
    }
    send(agent, bad_frame(body), bad_frame({}, tag="<b>"), bad_frame(beat, "AsmAuditHB"), bad_frame({}, "AsmAuditDG"))
    send(agent, two)
    _, messages = site.messages(6)
    assert [about["kind"] for about, _ in messages] == [
        "refused",
        "refused",
        "heartbeat",
        "diagnostic",
        "record",
        "record",
    ]
    contents = [json.loads(content) for _, content in messages]
    reasons = dict(contents[0]["Reasons"])
    assert {"OperationName", "CallerIpAddress", "OperationResult"} <= set(reasons)
    assert reasons["OperationName"] == "must not be empty"
    assert contents[0]["Record"]["Note"] == "/w=="
    assert contents[0]["Record"]["OperationResult"] == "Maybe"
    assert contents[1]["Tag"] == "<b>"
    assert contents[2]["Destination"] == "D"
    assert contents[5]["Extra"] == {"pod": "web-1"}
    (first, _), (second, _) = messages[4:]
    assert first["frame"] == second["frame"] == len(two)
    assert first["size"] + second["size"] < len(two)
    state = site.state()
    assert [(link["messages"], link["refused"]) for link in state["links"]] == [(2, 2), (2, 0)]
    assert state["links"][0]["heartbeat"]
    assert state["links"][0]["peer"] == f"process {os.getpid()}"
    assert eventually(lambda: site.state()["links"][0]["reason"]) == "the sender hung up"
    assert [sum(each) for each in zip(*state["seconds"], strict=True)][1:] == [2, 0, 0, 2]


def test_a_page_says_why_a_connection_was_closed(agent: AuditAgent, site: Site) -> None:
    with connected(agent) as sender:
        sender.sendall(b"GET / HTTP/1.1\r\n")
        assert sender.recv(1) == b""
    with connected(agent) as sender:
        sender.sendall(frame()[:-5])
    with connected(agent) as sender:
        eventually(lambda: site.state()["counts"]["open_connections"] == 1)
        assert site.act("hang-up") == 204
        assert sender.recv(1) == b""
    reasons = eventually(
        lambda: [link["reason"] for link in site.state()["links"] if link["closed"]][2:] and site.state()
    )
    found = {link["number"]: link["reason"] for link in reasons["links"]}
    assert "frame must be an array" in found[1]
    assert "in the middle of a frame" in found[2]
    assert found[3] == "the agent hung up"


def test_a_page_that_comes_back_goes_on_where_it_was(agent: AuditAgent, site: Site) -> None:
    send(agent, *[frame(message(number)) for number in range(5)])
    with site.events() as events:
        identifier = next(identifier for kind, identifier, _ in events if kind == "messages")
    send(agent, frame(message(5)))
    number = int(identifier.partition("-")[2])
    _, [(about, _), *_] = site.messages(6 - number, Last_Event_ID=identifier)
    assert about["number"] == number + 1
    for strange in ("other-3", "3", "-", "\u00e9", f"{identifier.partition('-')[0]}-x", ""):
        assert site.messages(6, Last_Event_ID=strange)[1][0][0]["number"] == 1


def test_ten_thousand_are_kept() -> None:
    from geventaudit.agent.web import log

    kept = log.Log()
    kept.connected("a test")
    received = Received(message(), 0.0, None)
    for _ in range(10_010):
        kept.handed_over(received, 100)
    assert len(kept.after(0, 20_000)) == 10_000
    assert (kept.first, kept.next, kept.dropped) == (11, 10_011, 10)
    assert [each.number for each in kept.after(10_008, 10)] == [10_009, 10_010]
    assert kept.after(10_010, 10) == kept.after(99_999, 10) == []
    kept.handed_over(received, log.KEPT_BYTES - 100 * 10)
    assert (kept.first, kept.next) == (10_001, 10_012), "many bytes too"
    kept.handed_over(received, log.KEPT_BYTES * 2)
    assert [each.number for each in kept.after(0, 10)] == [10_012], "one of any size"
    kept.clear()
    assert kept.after(0, 10) == []
    assert kept.first == kept.next == kept.cleared == 10_013


def test_a_page_that_is_too_slow_costs_the_agent_nothing(
    agent: AuditAgent, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sockets fill up, the agent goes on, and the page learns how much it missed."""
    monkeypatch.setattr("geventaudit.agent.web.log.KEPT_MESSAGES", 50)
    with site.events() as events:
        next(events)
        large = [frame(message(custom_data={"n": number, "text": "x" * 60_000})) for number in range(300)]
        for start in range(0, 300, 50):
            send(agent, *large[start : start + 50])
        missed, numbers = 0, []
        for kind, _, lines in events:
            if kind == "messages":
                missed += int(lines[0].split()[0])
                numbers += [json.loads(about)["number"] for about in lines[1::2]]
                if numbers[-1] == 300:
                    break
    assert missed > 0
    assert missed + len(numbers) == 300
    state = site.state()
    assert (state["first"], state["next"], state["dropped"]) == (251, 301, 250)


def test_cleared_is_not_missed(agent: AuditAgent, site: Site) -> None:
    send(agent, *[frame()] * 5)
    with site.events() as events:
        identifier = next(identifier for kind, identifier, _ in events if kind == "messages")
    assert site.act("clear") == 204
    send(agent, frame())
    missed, [(about, _)] = site.messages(1, Last_Event_ID=f"{identifier.partition('-')[0]}-2")
    assert (missed, about["number"]) == (0, 6)
    assert site.state()["dropped"] == 0
    assert len(agent.received) == 6, "for the test, all are there"


def test_a_large_body_that_is_refused_is_cut(agent: AuditAgent, site: Site) -> None:
    deep: Any = 1
    for _ in range(50):
        deep = {"d": deep}
    for body in (
        {"OperationName": "x" * 3_000_000},
        {"OperationName": [[0] * 10] * 20_000},
        {"OperationName": {f"{number}": "y" * 50 for number in range(30_000)}},
        {"OperationName": deep, "Note": b"z" * 1_000_000},
        {f"k{number}": 1 for number in range(70_000)},
    ):
        send(agent, bad_frame(body))
    _, messages = site.messages(5)
    for about, content in messages:
        assert about["kind"] == "refused"
        assert len(content) < 500_000
        assert json.loads(content)["Reasons"]
        assert "too large" in json.loads(content)["Note"]


def test_a_large_record_is_shown_in_full(agent: AuditAgent, site: Site) -> None:
    send(agent, frame(message(custom_data={"list": list(range(100_000)), "text": "x" * 500_000})))
    _, [(_, content)] = site.messages(1)
    assert json.loads(content) == json_of(agent.received[0])


# -- actions -----------------------------------------------------------------------------------------------------------


def test_buttons_make_the_agent_misbehave(agent: AuditAgent, site: Site) -> None:
    client = agent.make_client(require_ack=True)
    client.send(message(1))
    assert client.flush(timeout=30)

    assert site.act("stop-acknowledging") == 204
    assert not site.state()["acknowledging"]
    client.send(message(2))
    agent.wait_for(2, timeout=30)
    assert not client.flush(timeout=0.2)
    assert site.act("resume-acknowledging") == 204

    assert site.act("hang-up") == 204, "what was not acknowledged comes again"
    assert client.flush(timeout=30)

    assert site.act("stop-reading") == 204
    assert not site.state()["reading"]
    count = len(agent.messages)
    client.send(message(3))
    assert not client.flush(timeout=0.2)
    assert len(agent.messages) == count
    assert site.act("resume-reading") == 204
    assert client.flush(timeout=30)

    assert site.act("stop") == 204
    assert not site.state()["running"]
    assert not os.path.exists(agent.address)
    client.send(message(4))
    assert not client.flush(timeout=0.2)
    assert site.act("start") == 204
    assert site.act("start") == 409, "it says that it runs"
    assert client.flush(timeout=30)
    assert site.act("restart") == 204
    client.send(message(5))
    assert client.flush(timeout=30)


def test_a_start_that_fails_says_why(agent: AuditAgent, site: Site) -> None:
    assert site.act("stop") == 204
    Path(agent.address).write_text("in the way")
    status, _, content = site.ask("POST", "/actions/start", Origin=site.origin)
    assert status == 409
    assert b"no socket" in content
    os.unlink(agent.address)
    assert site.act("start") == 204


# -- where it is used --------------------------------------------------------------------------------------------------


def test_its_address_is_printed_in_tests(capfd: pytest.CaptureFixture[str]) -> None:
    with AuditAgent(web=True) as agent:
        assert agent.url.startswith("http://127.0.0.1:")
        assert agent.url in capfd.readouterr().err
        with socket.create_connection(("127.0.0.1", Site(agent.url).port)):
            pass
    with AuditAgent() as agent:
        assert agent.url == ""
    assert capfd.readouterr().err == ""


def test_a_block_ends_while_pages_are_open() -> None:
    with AuditAgent(web=True) as agent:
        site = Site(agent.url)
        with site.events() as first, site.events() as second, socket.create_connection(("127.0.0.1", site.port)):
            next(first)
            next(second)
            agent.__exit__(None, None, None)
            assert not [kind for kind, _, _ in first if kind == "messages"]
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", site.port))
        agent.__enter__()


def test_many_idle_connections_do_not_stop_the_agent(agent: AuditAgent, site: Site) -> None:
    idle = [socket.create_connection(("127.0.0.1", site.port), timeout=30) for _ in range(100)]
    try:
        send(agent, frame())
    finally:
        for each in idle:
            each.close()
    assert site.messages(1)[1]


def test_a_page_that_cannot_be_served_leaves_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Page) -> Page:
        raise OSError("no")

    monkeypatch.setattr(Page, "start", fail)
    with pytest.raises(OSError, match="no"), AuditAgent(web=True):
        pass


@pytest.mark.parametrize(
    "address", [("127.0.0.1", -1), ("127.0.0.1", 70_000), ("", 0), "127.0.0.1:8025", ("h", "8025")]
)
def test_an_address_that_is_none(address: Any, folder: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=r"address|port|host"):
        Page(Agent(str(folder / "agent.sock"), print), address)


@contextmanager
def listening(folder: Path, *arguments: str) -> Iterator[tuple[Any, list[str]]]:
    """``geventaudit listen``, and its first two lines on standard error."""
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-m", "geventaudit", "listen", "--unix", str(folder / "a.sock"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process, [process.stderr.readline().decode() for _ in range(2)]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_listen_serves_the_page(folder: Path) -> None:
    with listening(folder, "--web", f"127.0.0.1:{free_port()}") as (process, lines):
        assert lines[0].startswith("the page is at http://127.0.0.1:")
        assert "token" not in lines[0]
        assert lines[1] == f"listening on {folder / 'a.sock'}\n"
        site = Site(lines[0].split()[-1])
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(str(folder / "a.sock"))
            sender.sendall(frame())
            assert len(site.messages(1)[1]) == 1
        assert site.act("stop-reading") == 204
        assert site.act("stop") == 204
    assert process.returncode == 0


def test_listen_on_other_addresses_prints_a_token(folder: Path) -> None:
    with listening(folder, "--web", "0.0.0.0:0") as (_, lines):
        url = lines[0].split()[-1]
        assert url.startswith(f"http://{socket.gethostname()}:")
        token = url.partition("/?token=")[2]
        site = Site(url)
        assert site.ask("GET", "/")[0] == 401
        assert site.ask("GET", f"/?token={token}")[0] == 303


def test_listen_names_the_problem_of_the_address(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["listen", "--unix", str(folder / "a.sock"), "--web", f"127.0.0.1:{port}"]) == 2
    assert f"cannot show the page on 127.0.0.1:{port}: Address already in use; port 0 takes" in capsys.readouterr().err
    assert main(["listen", "--unix", str(folder / "a.sock"), "--web", "8025"]) == 2
    assert "--web: must be HOST:PORT, got '8025'" in capsys.readouterr().err


def test_an_agent_without_pages_is_as_it_was() -> None:
    """pywsgi and ssl are imported for the page alone."""
    program = (
        "import sys, geventaudit.testing\n"
        "with geventaudit.testing.AuditAgent(): assert not {'gevent.pywsgi', 'ssl'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
