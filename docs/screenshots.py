"""Make the screenshots of the agent's page for ``howto/live-page.md``. Needs the extra [test] and Debian's chromium.

Run ``python docs/screenshots.py``. It takes about a minute, since the page shows rates over time. Pillow, if it is
there, makes the files smaller.
"""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
from selenium import webdriver

import geventaudit
from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from geventaudit.agent import Agent
from geventaudit.agent.web import Page
from geventaudit.testing import AuditAgent

HERE = Path(__file__).parent / "howto"
SECONDS = 50
USERS = {"ada": "Ada Lovelace", "grace": "Grace Hopper", "barbara": "Barbara Liskov", "radia": "Radia Perlman"}
OPERATIONS = [
    ("CreateUser", OperationType.CREATE, OperationCategory.USER_MANAGEMENT, "SubscriptionId", "contoso-production"),
    ("DeleteUser", OperationType.DELETE, OperationCategory.USER_MANAGEMENT, "SubscriptionId", "contoso-production"),
    ("RotateKey", OperationType.UPDATE, OperationCategory.KEY_MANAGEMENT, "Vault", "payments"),
    ("ReadSecret", OperationType.READ, OperationCategory.KEY_MANAGEMENT, "Vault", "payments"),
    ("GrantRole", OperationType.UPDATE, OperationCategory.ROLE_MANAGEMENT, "ResourceGroup", "billing"),
]


def message(dice: random.Random) -> Msg:
    name, kind, category, target_kind, target = dice.choice(OPERATIONS)
    user = dice.choice(list(USERS))
    fails = dice.random() < 0.12
    return Msg(
        AuditType.DATA_PLANE if name == "ReadSecret" else AuditType.CONTROL_PLANE,
        Record(
            operation_name=name,
            operation_categories=[category],
            operation_type=kind,
            operation_result=OperationResult.FAILURE if fails else OperationResult.SUCCESS,
            operation_result_description="denied by the policy of the resource" if fails else "",
            operation_access_level="Contributor",
            caller_agent="billing-api/4.2",
            caller_ip_address=f"192.0.2.{dice.randrange(10, 40)}",
            caller_identities={CallerIdentityType.UPN: [CallerIdentity(f"{user}@example.com", USERS[user])]},
            caller_access_levels=["Contributor"],
            target_resources={target_kind: [TargetResource(target, region="westeurope")]},
            custom_data={"ticket": dice.randrange(4000, 5000), "request": f"{dice.getrandbits(64):016x}"},
        ),
    )


def send_some(path: str) -> None:
    """Send records at a changing rate, some of them refused, some twice."""
    dice = random.Random(7)
    with geventaudit.Client(lambda: geventaudit.DomainSocket(path)) as client, socket.socket(socket.AF_UNIX) as other:
        other.connect(path)
        rate = 20.0
        end = time.monotonic() + SECONDS
        for number in count():
            if time.monotonic() > end and number % 12 == 4:
                return
            client.send(message(dice))
            rate = min(max(rate + dice.uniform(-3, 3), 8), 45)
            if number % 12 == 0:
                bad = {"OperationName": "", "OperationResult": "Denied", "CallerIpAddress": "10.0.0.7:443"}
                other.sendall(msgpack.packb(["AsmAuditCP", [[int(time.time()), bad]], {}]))
            client.flush(timeout=5)
            time.sleep(1 / rate)


def chromium(size: tuple[int, int], dark: bool) -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(each)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return driver


def shoot(url: str, name: str, size: tuple[int, int], *, dark: bool, result: str) -> None:
    """Take a picture with the first record of that result chosen."""
    driver = chromium(size, dark)
    try:
        driver.get(url)
        time.sleep(2)
        driver.execute_script("document.querySelector(`[data-result=${arguments[0]}]:not([hidden])`).click()", result)
        if size[0] > 600:
            driver.execute_script("scrollTo(0, 0)")
        time.sleep(1)
        path = HERE / f"{name}.png"
        driver.save_screenshot(str(path))
        try:
            from PIL import Image
        except ImportError:
            return
        with Image.open(path) as image:
            image.convert("RGB").quantize(255).save(path, optimize=True)
    finally:
        driver.quit()


def main() -> None:
    path = str(Path(tempfile.mkdtemp(prefix="audit-")) / "agent.sock")
    # The agent of a test has a thread of its own; the one of the screenshots lives there too.
    with AuditAgent() as outer:
        agent = Agent(path, lambda received: None, on_refused=lambda refused: None)
        page = Page(agent, ("127.0.0.1", 0))
        outer._do(lambda _: (page.start(), agent.start()))
        send_some(path)
        for dark in (False, True):
            theme = "dark" if dark else "light"
            shoot(page.url, f"live-page-{theme}", (1280, 860), dark=dark, result="Success")
            shoot(page.url, f"live-page-refused-{theme}", (390, 760), dark=dark, result="Refused")
        outer._do(lambda _: (page.close(), agent.stop(0.0)))


if __name__ == "__main__":
    main()
