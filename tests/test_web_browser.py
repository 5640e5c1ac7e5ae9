"""The page of the agent in a real browser: Debian's ``chromium`` and ``chromium-driver``, by selenium."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import msgpack
import pytest
from helpers import eventually, mapping, message

from geventaudit import (
    CallerIdentity,
    CallerIdentityType,
    OperationCategory,
    TargetResource,
)
from geventaudit.agent import Agent
from geventaudit.agent.shown import json_of
from geventaudit.agent.web import Page
from geventaudit.encoder.encoding import Encoder
from geventaudit.testing import AuditAgent

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which the extra [test] brings")
axe_core = pytest.importorskip("axe_core_python", reason="needs axe-core-python, which the extra [test] brings")

ActionChains, Keys = webdriver.ActionChains, webdriver.Keys
By = pytest.importorskip("selenium.webdriver.common.by").By
Select = pytest.importorskip("selenium.webdriver.support.ui").Select

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver: apt-get install them"
)

RECORDS = int(os.environ.get("GEVENTAUDIT_WEB_RECORDS", "20000"))
WIDE, NARROW = (1280, 900), (360, 740)
INJECTIONS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload=window.hacked=1>',
    "</pre></td><iframe srcdoc='<script>parent.hacked = 1</script>'>",
    "javascript:window.hacked=1//",
    "{{constructor.constructor('window.hacked=1')()}}${window.hacked=1}",
    "data: x\n\nevent: run\ndata: hacked\n\n",
    "\u202ereversed \u2066 \u200b \x00 \x1b[31m \u2028",
    "&lt;b&gt; %3Cb%3E \\u003cb\\u003e",
]


class Browser:
    """A browser with one window."""

    def __init__(self, downloads: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        # Root, as in a container, can have no sandbox of Chromium; only this page is opened.
        for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"):
            options.add_argument(each)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_page_load_timeout(120)
        self.driver.set_script_timeout(120)
        self.downloads = downloads

    def open(self, url: str, size: tuple[int, int] = WIDE, *, dark: bool = False) -> None:
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.logs()
        self.requests()
        self.driver.get(url)
        self.until(lambda: self.text("connection") == "Live")

    def until(self, condition: Callable[[], Any], expectation: str = "") -> Any:
        return eventually(condition, expectation, timeout=60)

    def find(self, identifier: str) -> Any:
        return self.driver.find_element(By.ID, identifier)

    def text(self, identifier: str) -> str:
        return str(self.find(identifier).text)

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def rows(self) -> list[list[str]]:
        """Return the texts of the rows that are drawn, from top to bottom."""
        rows: list[list[str]] = self.script(
            "return [...document.querySelectorAll('[role=option]:not([hidden])')]"
            ".sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)"
            ".map((row) => [...row.children].map((cell) => cell.textContent))"
        )
        return rows

    def operations(self) -> list[str]:
        return [row[3] for row in self.rows() if row[1] != "Heartbeat"]

    def until_operations(self, expected: list[str]) -> None:
        """Wait until these operations are shown, from top to bottom."""
        try:
            self.until(lambda: self.operations() == expected)
        except AssertionError:
            assert self.operations() == expected, self.text("summary")

    def choose(self, operation: str, result: str = "") -> None:
        """Click the row of an operation, one with that result if it is given."""
        row = next(
            each
            for each in self.driver.find_elements(By.CSS_SELECTOR, "[role=option]:not([hidden])")
            if each.find_element(By.CLASS_NAME, "operation").get_property("textContent") == operation
            and result in each.find_element(By.CLASS_NAME, "result").get_property("textContent")
        )
        row.click()

    def fields(self) -> dict[str, str]:
        return self.table(".fields:not(.reasons)")

    def table(self, selector: str) -> dict[str, str]:
        pairs: list[tuple[str, str]] = self.script(
            "return [...document.querySelectorAll(`#detail ${arguments[0]} tr`)]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))",
            selector,
        )
        return dict(pairs)

    def circumstances(self) -> dict[str, str]:
        names = self.driver.find_elements(By.CSS_SELECTOR, "#detail dt")
        values = self.driver.find_elements(By.CSS_SELECTOR, "#detail dd")
        return {name.text: value.text for name, value in zip(names, values, strict=True)}

    def json(self) -> str:
        return str(self.script("return document.querySelector('#detail pre').textContent"))

    def set(self, identifier: str, value: str) -> None:
        field = self.find(identifier)
        if field.tag_name == "select":
            Select(field).select_by_visible_text(value)
        else:
            field.clear()
            field.send_keys(value)

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def logs(self) -> list[str]:
        """Return the lines of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("downloads"))
    browser.driver.get("about:blank")
    yield browser
    browser.driver.quit()


@pytest.fixture
def agent() -> Iterator[AuditAgent]:
    with AuditAgent(web=True) as agent:
        yield agent


@pytest.fixture
def browser(chromium: Browser, agent: AuditAgent) -> Iterator[Browser]:
    """The browser, which has opened the page. After each test: no errors in the console, and no foreign requests."""
    chromium.open(agent.url)
    yield chromium
    assert chromium.logs() == []
    foreign = [url for url in chromium.requests() if not url.startswith((agent.url, f"blob:{agent.url}", "about:"))]
    assert foreign == []
    chromium.driver.get("about:blank")


class Sender:
    """A connection to the agent."""

    def __init__(self, agent: AuditAgent) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(agent.address)

    def record(self, number: int | None = None, **changes: Any) -> bytes:
        frame = Encoder().encode(message(number, **changes), 1_700_000_000)
        self.socket.sendall(frame)
        return frame

    def bad(self, body: Any, tag: str = "AsmAuditCP") -> None:
        self.socket.sendall(msgpack.packb([tag, [[1_700_000_000, body]], {}]))


@pytest.fixture
def sender(agent: AuditAgent) -> Iterator[Sender]:
    sender = Sender(agent)
    yield sender
    sender.socket.close()


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_record_in_full(browser: Browser, agent: AuditAgent, sender: Sender) -> None:
    assert "No records yet" in browser.text("empty")
    assert browser.find("empty").location["y"] < browser.find("list").location["y"], "the hint is below an empty list"
    frame = sender.record(2**60 + 1, operation_name="RotateKey")
    browser.until_operations(["RotateKey"])
    (row,) = browser.rows()
    assert row[1:] == ["ControlPlane", "Success", "RotateKey", "user@example.com, 192.0.2.7", "SubscriptionId res1"]
    assert "1 of 1 kept" in browser.text("summary")

    browser.choose("RotateKey")
    assert browser.text("detail-title") == "RotateKey"
    about = browser.circumstances()
    assert about["Number"] == "1"
    assert about["Stamp"] == "2023-11-14 22:13:20.000 UTC"
    assert about["Connection"] == "1"
    assert about["Frame"].startswith(f"{len(frame)} bytes, of which this message ")
    assert about["Duplicates"] == "none among those kept"
    fields = browser.fields()
    assert fields["CallerIdentities.UPN[0].Identity"] == "user@example.com"
    assert fields["CustomData.n"] == str(2**60 + 1), "and not rounded"
    assert fields["OperationResultDescription"] == "empty"
    assert json.loads(browser.json()) == json_of(agent.received[0])
    assert browser.json().startswith('{\n  "Time": 1700000000,\n  "Type": "ControlPlane",\n  "Record": {\n')

    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": agent.url},
    )
    browser.find("copy").click()
    browser.until(lambda: browser.find("detail").find_element(By.CSS_SELECTOR, "[role=status]").text == "Copied")
    copied = browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0], arguments[0])")
    assert json.loads(copied) == json_of(agent.received[0])


def test_a_record_that_comes_again(browser: Browser, agent: AuditAgent, sender: Sender) -> None:
    sender.record(operation_name="Once")
    sender.record(operation_name="Twice")
    browser.until(lambda: "Twice" in browser.operations())
    browser.choose("Twice")
    second = Sender(agent)
    second.record(operation_name="Twice")
    browser.until(lambda: browser.circumstances()["Duplicates"] != "none among those kept")
    assert browser.circumstances()["Duplicates"] == "1 with the same content and stamp: number 3 (connection 2)"
    assert [row[2] for row in browser.rows()] == ["Success \u00d72", "Success \u00d72", "Success"]
    browser.driver.find_element(By.CSS_SELECTOR, ".duplicates button").click()
    assert browser.circumstances()["Number"] == "3"
    second.socket.close()


def test_refused_in_red_with_the_reasons_by_field(browser: Browser, sender: Sender) -> None:
    sender.bad({**mapping(OperationName="", OperationResult="Maybe"), "CallerIpAddress": "nowhere"})
    browser.until(lambda: browser.rows())
    (row,) = browser.rows()
    assert row[2] == "Refused"
    assert "OperationName: must not be empty" in row[5]
    browser.driver.find_element(By.CSS_SELECTOR, "[role=option]").click()
    assert set(browser.table(".reasons")) == {"OperationName", "OperationResult", "CallerIpAddress"}
    colour = browser.script("return getComputedStyle(document.querySelector('.reasons td')).color")
    red, _, blue = map(int, re.findall(r"\d+", colour)[:3])
    assert red > 2 * blue
    assert browser.fields()["OperationResult"] == "Maybe"
    browser.until(lambda: "Refused 1" in browser.text("legend"))


def test_a_long_record_is_shown_in_part_and_copied_whole(browser: Browser, agent: AuditAgent, sender: Sender) -> None:
    sender.record(custom_data={"list": list(range(50_000)), "last": "the end"})
    browser.until_operations(["CreateUser"])
    browser.choose("CreateUser")
    assert "more characters" in browser.json()
    assert len(browser.json()) < 110_000
    assert len(browser.fields()) <= 501
    browser.find("download").click()
    (line,) = browser.until(lambda: downloaded(browser)).splitlines()
    assert json.loads(line) == json_of(agent.received[0])


def downloaded(browser: Browser) -> str:
    """Return the content of the file that was downloaded, empty as long as there is none, and remove it."""
    for path in browser.downloads.glob("*.jsonl"):
        text = path.read_text()
        path.unlink()
        return text
    return ""


@pytest.mark.parametrize("payload", INJECTIONS)
def test_text_from_outside_stays_text(browser: Browser, sender: Sender, payload: str) -> None:
    """In every field, key, tag and error message; and it looks as it is."""
    elements = (
        "return ['script', 'img', 'svg', 'iframe', 'object', 'b', 'link', 'a', 'style']"
        ".map((name) => document.getElementsByTagName(name).length)"
    )
    before = browser.script(elements)
    sender.record(
        operation_name=payload,
        operation_categories=[OperationCategory.OTHER],
        operation_category_description=payload,
        operation_result="Failure",
        operation_result_description=payload,
        operation_access_level=payload,
        caller_agent=payload,
        caller_identities={CallerIdentityType.UPN: [CallerIdentity(payload, payload)]},
        caller_access_levels=[payload],
        target_resources={payload: [TargetResource(payload, payload, payload, payload)]},
        custom_data={
            payload: {payload: [payload, {"__proto__": payload}]},
            "__proto__": payload,
            "constructor": payload,
        },
    )
    sender.bad(
        {payload: payload, "OperationName": payload, "OperationResult": payload, "CallerIdentities": {payload: payload}}
    )
    sender.bad({"a": payload}, tag=payload)
    beat = {
        "AuditVersion": payload,
        "OsVersion": payload,
        "Language": payload,
        "Destination": payload,
        payload: payload,
    }
    sender.bad(beat, tag="AsmAuditHB")
    browser.until(lambda: len(browser.rows()) == 4)

    shown = "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in payload)
    browser.choose(shown, "Failure")
    fields = browser.fields()
    assert fields[f"CustomData.{shown}.{shown}[0]"] == shown
    assert fields["OperationName"] == shown
    assert fields["CustomData.constructor"] == shown
    assert browser.text("detail-title").split() == shown.split()
    browser.set("text", "Record")
    browser.set("text", "")
    browser.find("list").click()
    for _ in range(5):
        browser.keys(Keys.ARROW_DOWN)
        gevent.sleep(0)
    after = browser.script(elements)
    assert after == before
    assert browser.script("return [window.hacked, document.title, Object.prototype.hacked]") == [
        None, "geventaudit: a live agent", None,
    ]  # fmt: skip


# -- filters, order, pause ---------------------------------------------------------------------------------------------


@pytest.fixture
def records(browser: Browser, agent: AuditAgent, sender: Sender) -> None:
    """Records that differ in all that can be filtered."""
    ada = {CallerIdentityType.UPN: [CallerIdentity("ada@example.com", "Ada")]}
    sender.record(0, operation_name="ReadSecret", caller_identities=ada)
    sender.record(1, operation_name="DeleteUser", operation_result="Failure", operation_result_description="denied")
    sender.record(2, operation_name="DeleteKey", target_resources={"Vault": [TargetResource("vault-7")]})
    sender.record(3, operation_name="UpdateRole", operation_result="UnknownOperationResult")
    sender.bad(mapping(OperationName="Bad", OperationResult="Maybe", CallerIpAddress="x"))
    sender.socket.sendall(
        msgpack.packb(["AsmAuditDP", [[1, mapping(OperationName="ReadRow", CustomData={"n": 'say "x"'})]], {}])
    )
    browser.until(lambda: len(browser.rows()) == 6)


ALL = ["ReadRow", "Bad", "UpdateRole", "DeleteKey", "DeleteUser", "ReadSecret"]


@pytest.mark.usefixtures("records")
def test_filters(browser: Browser) -> None:
    assert browser.operations() == ALL
    for field, value, expected in [
        ("type", "DataPlane", ["ReadRow"]),
        ("result", "Failure", ["DeleteUser"]),
        ("result", "Unknown", ["UpdateRole"]),
        ("result", "Refused", ["Bad"]),
        ("operation", "delete", ["DeleteKey", "DeleteUser"]),
        ("caller", "ADA@", ["ReadSecret"]),
        ("caller", "192.0.2.7", ["ReadRow", "UpdateRole", "DeleteKey", "DeleteUser", "ReadSecret"]),
        ("target", "vault-7", ["DeleteKey"]),
        ("target", "OperationResult", ["Bad"]),
        ("text", 'say "x"', ["ReadRow"]),
        ("text", "DENIED", ["DeleteUser"]),
        ("text", "nowhere to be found", []),
    ]:
        browser.set(field, value)
        browser.until_operations(expected)
        assert f"{len(expected)} of 6 kept messages shown" in browser.text("summary")
        browser.find("reset").click()
        browser.until_operations(ALL)
    browser.set("operation", "delete")
    browser.set("result", "Failure")
    browser.until_operations(["DeleteUser"])
    browser.find("download").click()
    text = browser.until(lambda: downloaded(browser))
    assert [json.loads(line)["Record"]["OperationName"] for line in text.splitlines()] == ["DeleteUser"]


@pytest.mark.usefixtures("records")
def test_order_pause_clear_and_reload(browser: Browser, sender: Sender) -> None:
    browser.set("order", "Oldest first, following")
    browser.until_operations(ALL[::-1])
    browser.find("pause").click()
    sender.record(9, operation_name="Later")
    browser.until(lambda: "paused, 1 more since" in browser.text("summary"))
    assert "Later" not in browser.operations()
    browser.find("pause").click()
    browser.until_operations([*ALL[::-1], "Later"])
    browser.driver.refresh()
    browser.until_operations(["Later", *ALL])
    browser.find("clear").click()
    browser.until(lambda: browser.rows() == [])
    assert "0 of 0 kept" in browser.text("summary")
    assert "dropped" not in browser.text("summary")
    sender.record(10, operation_name="After")
    browser.until_operations(["After"])


def test_following_and_staying(browser: Browser, sender: Sender) -> None:
    """A list that is scrolled stays where it is, one at its newest end follows."""
    for number in range(200):
        sender.record(number, operation_name=f"Operation{number}")
    browser.until(lambda: "Operation199" in browser.operations())
    browser.script("document.getElementById('list').scrollTop = 28 * 50")
    browser.until(lambda: "Operation149" in browser.operations())
    before = first_visible(browser)
    for number in range(200, 230):
        sender.record(number, operation_name=f"Operation{number}")
    browser.until(lambda: "230 of 230" in browser.text("summary"))
    assert first_visible(browser) == before
    browser.set("order", "Oldest first, following")
    browser.until(lambda: browser.operations()[-1] == "Operation229")
    sender.record(230, operation_name="Operation230")
    browser.until(lambda: browser.operations()[-1] == "Operation230")
    assert (
        browser.script(
            "const l = document.getElementById('list'); return l.scrollHeight - l.clientHeight - l.scrollTop"
        )
        < 2
    )
    browser.script("document.getElementById('list').scrollTop = 28 * 20")
    browser.until(lambda: first_visible(browser) == "Operation20")
    sender.record(231, operation_name="Operation231")
    browser.until(lambda: "232 of 232" in browser.text("summary"))
    assert first_visible(browser) == "Operation20"


def first_visible(browser: Browser) -> str:
    """Return the operation of the row at the top edge of the list."""
    return str(
        browser.script(
            "const box = document.getElementById('list').getBoundingClientRect();"
            "const row = document.elementFromPoint(box.left + 50, box.top + 15)?.closest('[role=option]');"
            "return row?.children[3].textContent"
        )
    )


def test_the_oldest_are_dropped_and_it_says_so(
    browser: Browser, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geventaudit.agent.web.log.KEPT_MESSAGES", 20)
    sender.record(0, operation_name="Oldest")
    browser.until_operations(["Oldest"])
    browser.choose("Oldest")
    for number in range(1, 26):
        sender.record(number)
    browser.until(lambda: "the oldest 6 were dropped" in browser.text("summary"))
    assert "20 of 20 kept" in browser.text("summary")
    assert "Oldest" not in browser.operations()
    assert browser.text("detail-title") == "Oldest", "the record that is open stays"


# -- the agent ---------------------------------------------------------------------------------------------------------


def test_buttons_connections_and_heartbeats(browser: Browser, agent: AuditAgent) -> None:
    client = agent.make_client(require_ack=True)
    client.send(message(1))
    assert client.flush(timeout=30)
    row = browser.until(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#links-rows tr.open"))[0].text
    assert f"process {os.getpid()} open since" in row
    browser.until(lambda: "none" not in browser.text("links-rows"), "the heartbeat")
    assert "1 of them heartbeats" in browser.text("counts")

    for identifier, off, on, happens in [
        ("reading", "Read again", "Stop reading", "reads nothing"),
        ("acknowledging", "Acknowledge again", "Refuse acks", "acknowledges nothing"),
        ("running", "Listen again", "Stop listening", "does not listen"),
    ]:
        assert browser.text(identifier) == on
        browser.find(identifier).click()
        browser.until(lambda i=identifier, t=off: browser.text(i) == t)  # type: ignore[misc]
        browser.until(lambda h=happens: h in browser.text("trouble"))  # type: ignore[misc]
        client.send(message(2))
        assert not client.flush(timeout=0.1)
        assert browser.find("restart").is_enabled() is (identifier != "running")
        browser.find(identifier).click()
        browser.until(lambda i=identifier, t=on: browser.text(i) == t)  # type: ignore[misc]
        if identifier == "acknowledging":
            browser.find("hang-up").click()
            browser.until(lambda: "closed all connections" in browser.text("trouble"))
        assert client.flush(timeout=60)
    browser.until(lambda: "the agent hung up" in browser.text("links-rows"))
    browser.find("restart").click()
    browser.until(lambda: "has restarted" in browser.text("trouble"))
    client.send(message(3))
    assert client.flush(timeout=60)
    browser.until(lambda: "Success 5" in browser.text("legend") or "Success 6" in browser.text("legend"))


def test_the_agent_goes_and_comes_back(chromium: Browser, folder: Path) -> None:
    """The page says that it has lost the agent, finds the next one by itself, and shows nothing of the last."""
    browser = chromium
    path = str(folder / "agent.sock")
    port = 0
    for operation in ("First", "Second"):
        with AuditAgent() as outer:
            agent = Agent(path, lambda received: None)
            page = Page(agent, ("127.0.0.1", port))
            home = outer._thread
            assert home is not None
            home.do(lambda _, page=page, agent=agent: (page.start(), agent.start()))  # type: ignore[misc]
            if port == 0:
                port = int(page.url.split(":")[2].rstrip("/"))
                browser.open(page.url)
            browser.until(lambda: browser.text("connection") == "Live")
            with socket.socket(socket.AF_UNIX) as sender:
                sender.connect(path)
                sender.sendall(Encoder().encode(message(operation_name=operation), 1))
            browser.until_operations([operation])
            home.do(lambda _, page=page, agent=agent: (page.close(), agent.stop()))  # type: ignore[misc]
        browser.until(lambda: "trying again" in browser.text("connection"))
    browser.driver.get("about:blank")


def test_with_a_token(chromium: Browser, folder: Path) -> None:
    browser = chromium
    with AuditAgent() as outer:
        agent = Agent(str(folder / "agent.sock"), lambda received: None)
        page = Page(agent, ("0.0.0.0", 0))
        home = outer._thread
        assert home is not None
        home.do(lambda _: (page.start(), agent.start()))
        url = re.sub("//[^:]+:", "//127.0.0.1:", page.url)
        browser.driver.get(url.partition("?")[0])
        assert "token" in browser.driver.find_element(By.TAG_NAME, "body").text
        browser.open(url)
        assert browser.driver.current_url == url.partition("?")[0]
        browser.find("reading").click()
        browser.until(lambda: not agent.is_reading)
        browser.driver.refresh()
        browser.until(lambda: browser.text("reading") == "Read again")
        home.do(lambda _: (page.close(), agent.stop()))
    browser.driver.get("about:blank")
    browser.logs()


# -- accessibility -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("records")
def test_everything_by_the_keyboard(browser: Browser) -> None:
    browser.script("document.getElementById('list').focus()")
    browser.keys(Keys.ARROW_DOWN)
    assert browser.text("detail-title") == "ReadRow"
    active = browser.find("list").get_attribute("aria-activedescendant")
    assert browser.find(active).get_attribute("aria-selected") == "true"
    for keys, title in [
        ("j", "Bad"), (Keys.ARROW_DOWN, "UpdateRole"), ("k", "Bad"), (Keys.ARROW_UP, "ReadRow"),
        (Keys.ARROW_UP, "ReadRow"), (Keys.END, "ReadSecret"), (Keys.ARROW_DOWN, "ReadSecret"), (Keys.HOME, "ReadRow"),
    ]:  # fmt: skip
        browser.keys(keys)
        assert browser.text("detail-title") == title
    browser.keys("p")
    assert browser.find("pause").get_attribute("aria-pressed") == "true"
    browser.keys("p")
    assert browser.find("pause").get_attribute("aria-pressed") == "false"
    browser.keys(Keys.ENTER)
    assert browser.driver.switch_to.active_element.get_attribute("id") == "detail"
    browser.keys(Keys.ESCAPE)
    assert browser.driver.switch_to.active_element.get_attribute("id") == "list"
    assert browser.text("detail-title") == "No record chosen"
    browser.keys("/")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "text"
    browser.keys("p/jk")
    assert browser.find("text").get_attribute("value") == "p/jk", "letters are letters there"
    browser.find("reset").click()

    browser.script("document.querySelector('.skip').focus()")
    reached: list[str] = []
    for _ in range(60):
        browser.keys(Keys.TAB)
        element = browser.driver.switch_to.active_element
        reached.append(element.get_attribute("id"))
        if element.tag_name == "body":
            break
        visible = browser.script("return getComputedStyle(arguments[0]).outlineStyle", element)
        assert visible != "none", f"the focus of {reached[-1]} cannot be seen"
    assert {"text", "type", "order", "pause", "clear", "download", "list", "reading", "hang-up", "restart"} <= set(
        reached
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("operation", ["ReadSecret", "Bad"])
@pytest.mark.usefixtures("records")
def test_wcag(browser: Browser, agent: AuditAgent, size: tuple[int, int], dark: bool, operation: str) -> None:
    """Contrast, labels, roles and names, by axe-core: WCAG 2.1 A and AA, and its best practices."""
    browser.open(agent.url, size, dark=dark)
    browser.until(lambda: len(browser.rows()) == 6)
    browser.until(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#links-rows tr"))
    browser.choose(operation)
    browser.find("reading").click()
    browser.until(lambda: browser.text("reading") == "Read again")
    browser.until(lambda: "reads nothing" in browser.text("trouble"))
    browser.script((Path(axe_core.__file__).parent / "axe.min.js").read_text())
    found = browser.driver.execute_async_script(
        "axe.run(document).then(arguments[0], (error) => arguments[0](String(error)))"
    )
    problems = [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]
    ]
    assert problems == []
    checked = {each["id"] for each in found["passes"]}
    assert {"color-contrast", "label", "button-name", "aria-required-children", "html-has-lang"} <= checked
    background = browser.script("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 64) is dark
    browser.find("reading").click()


@pytest.mark.parametrize("width", [320, 600, 900])
@pytest.mark.usefixtures("records")
def test_nothing_is_cut_on_narrow_screens(browser: Browser, agent: AuditAgent, width: int) -> None:
    """No scrolling in two directions at 320 pixels, which is 1280 at a zoom of 400 % (WCAG 1.4.10)."""
    browser.open(agent.url, (width, 700))
    browser.until(lambda: len(browser.rows()) == 6)
    browser.choose("Bad")
    assert browser.script("return document.documentElement.scrollWidth") <= width
    cut = browser.script(
        "return [...document.querySelectorAll('button, input, select, h2, dd, .fields td')]"
        ".filter((each) => each.getBoundingClientRect().right > innerWidth || each.getBoundingClientRect().left < 0)"
        ".map((each) => each.outerHTML)"
    )
    assert cut == []
    broken = browser.script(
        "return [...document.querySelectorAll('.fields th bdi')].flatMap((name) => [...name.childNodes])"
        ".filter((part) => {"
        "const range = new Range(); range.selectNode(part); return range.getClientRects().length > 1; })"
        ".map((part) => part.textContent)"
    )
    assert broken == [], "lines of a name end between its words"
    box = browser.script(
        "const box = arguments[0].getBoundingClientRect(); return [box.top, innerHeight]", browser.find("detail")
    )
    assert box[0] < box[1], "the record that was chosen is in view"


# -- speed -------------------------------------------------------------------------------------------------------------


def test_many_records_with_the_page_open(browser: Browser, agent: AuditAgent) -> None:
    """The agent keeps its speed, and the page answers clicks. The margins are for a busy machine."""
    frames = [Encoder().encode(message(number), 1_700_000_000) for number in range(RECORDS)]
    browser.driver.get("about:blank")
    without = send_all(agent, frames)
    browser.open(agent.url)
    browser.script(
        "window.clicks = []; new PerformanceObserver((list) => window.clicks.push(...list.getEntries()"
        ".filter((each) => each.name === 'click').map((each) => each.duration)))"
        ".observe({type: 'event', durationThreshold: 16})"
    )
    sending = Sending(agent, frames)
    titles = set()
    while not sending.is_over():
        box = browser.find("list")
        ActionChains(browser.driver).move_to_element_with_offset(box, 0, -100).click().perform()
        titles.add(browser.circumstances()["Number"])
    with_page = sending.seconds()
    browser.until(lambda: f"{2 * RECORDS:,}" in browser.text("legend"), "all are counted")
    assert min(10_000, 2 * RECORDS) == browser.script(
        "return Number(document.getElementById('summary').textContent.split(' ')[0].replaceAll(',', ''))"
    )
    clicks = browser.script("return window.clicks")
    print(
        f"\n{RECORDS / without:.0f}/s without the page, {RECORDS / with_page:.0f}/s with: {without / with_page:.2f}; "
        f"{len(titles)} records clicked, the slowest click answered after {max(clicks, default=16):.0f} ms"
    )
    assert len(titles) > 1
    assert with_page < 3 * without + 2
    assert max(clicks, default=0) < 2000


def send_all(agent: AuditAgent, frames: list[bytes]) -> float:
    return Sending(agent, frames).seconds()


class Sending:
    """Sends frames as fast as the agent takes them, in a native thread of its own."""

    def __init__(self, agent: AuditAgent, frames: list[bytes]) -> None:
        self._agent = agent
        self._expected = len(agent.received) + len(frames)
        self._began = time.monotonic()
        self._end = 0.0
        self._frames = frames
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        sender = Sender(self._agent)
        for start in range(0, len(self._frames), 100):
            sender.socket.sendall(b"".join(self._frames[start : start + 100]))
        sender.socket.close()

    def is_over(self) -> bool:
        if not self._end and len(self._agent.received) >= self._expected:
            self._end = time.monotonic()
        return bool(self._end)

    def seconds(self) -> float:
        eventually(self.is_over, timeout=300)
        self._thread.join()
        return self._end - self._began
