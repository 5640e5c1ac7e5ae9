"""The page of ``geventaudit report`` in a real browser, with a page that may run no script: Debian's ``chromium``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import BODIES, hostile_trail, needs_report_extra
from trails import as_fluent_bit_lines

from geventaudit.cli import main

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which the extra [test] brings")
axe_core = pytest.importorskip("axe_core_python", reason="needs axe-core-python, which the extra [test] brings")

WIDE, NARROW = 1280, 360
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    needs_report_extra,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver: apt-get install them"
    ),
]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Root, as in a container, can have no sandbox of Chromium; only this page is opened.
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    made.set_page_load_timeout(120)
    made.set_script_timeout(120)
    yield made
    made.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    path, out = folder / "trail", folder / "out.html"
    hostile_trail(path)
    lines = [as_fluent_bit_lines(body) for body in BODIES if body is not BODIES[5]]
    path.write_text(path.read_text() + "\n" + "\n".join(lines))
    assert main(["report", str(path), "--html", str(out)]) == 1
    return out.as_uri()


def opened(driver: Any, page: str, width: int = WIDE, *, dark: bool = False, media: str = "screen") -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get(page)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_page_is_accessible(driver: Any, page: str, width: int, dark: bool) -> None:
    """Contrast, names, structure, by axe-core; no text of a record has acted, and nothing was fetched."""
    opened(driver, page, width, dark=dark)
    assert driver.execute_script("return window.hacked") is None
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert driver.get_log("browser") == []
    driver.execute_script((Path(axe_core.__file__).parent / "axe.min.js").read_text())
    found = driver.execute_async_script("axe.run(document).then(arguments[0], (error) => arguments[0](String(error)))")
    problems = [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"]]) for each in found["violations"]
    ]
    assert problems == []
    checked = {each["id"] for each in found["passes"]}
    assert {"color-contrast", "svg-img-alt", "empty-table-header"} <= checked
    assert ("scrollable-region-focusable" in checked) is (width == NARROW), "charts and tables scroll there"
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 64) is dark
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_it_is_readable_without_javascript(driver: Any, page: str) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(driver, page)
        root = driver.execute_cdp_cmd("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
        bars = driver.execute_cdp_cmd("DOM.querySelectorAll", {"nodeId": root, "selector": "svg .series rect"})[
            "nodeIds"
        ]
        sizes = [driver.execute_cdp_cmd("DOM.getBoxModel", {"nodeId": each})["model"] for each in bars]
        assert sum(each["width"] > 2 and each["height"] > 2 for each in sizes) > 20, "the bars are drawn"
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_it_prints_in_light_colours_with_all_of_it(driver: Any, page: str) -> None:
    opened(driver, page, 700, dark=True, media="print")
    style = driver.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    assert style == ["rgb(27, 31, 36)", "rgb(255, 255, 255)"]
    cut = driver.execute_script(
        "return [...document.querySelectorAll('.wide')]"
        ".filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.ariaLabel)"
    )
    assert cut == []
