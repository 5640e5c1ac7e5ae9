"""Check the built pages: ``python docs/check_pages.py FOLDER``.

Each link between pages leads to an existing page and heading, and no page loads anything from elsewhere. In Chromium,
if it is there with selenium, no page, line of code or diagram is cut off, wide and light or narrow and dark, and no
page writes an error to the console. Prints each fault; the exit status is 1 if there is one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

SIZES = {"wide": (1440, 900), "narrow": (400, 800)}
OVERFLOWS = """
const wider = (each) => each.scrollWidth > each.clientWidth + 1;
return [
  ...(wider(document.documentElement) ? ["the page"] : []),
  ...[...document.querySelectorAll("pre")].filter(wider).map((each) => "code: " + each.innerText.slice(0, 60)),
  ...[...document.querySelectorAll(".diagram")].filter(wider).map(() => "a diagram"),
  ...[...document.images].filter((each) => each.loading !== "lazy" && !each.naturalWidth).map((each) => each.src),
];
"""


class Links(HTMLParser):
    """The links, the loaded resources and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe") and "src" in values:
            self.resources.append(values["src"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon"):
            self.resources.append(values["href"])


def faults_of_links(pages: dict[Path, Links]) -> Iterator[str]:
    for path, page in pages.items():
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.exists():
                yield f"{path}: {target}: no such file"
            elif there in pages and unquote(parts.fragment) not in pages[there].anchors:
                yield f"{path}: {target}: no such heading"
        for target in page.resources:
            if urlsplit(target).netloc:
                yield f"{path}: loads {target}"


def faults_in_a_browser(pages: list[Path]) -> Iterator[str]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for name, (width, height) in SIZES.items():
            scheme = {"name": "prefers-color-scheme", "value": "dark" if name == "narrow" else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            for path in pages:
                driver.get(path.as_uri())
                yield from (f"{path}: {name}: {fault} is cut off" for fault in driver.execute_script(OVERFLOWS))
                yield from (f"{path}: {entry['message']}" for entry in driver.get_log("browser"))
    finally:
        driver.quit()


def main(folder: Path) -> int:
    paths = sorted(folder.resolve().rglob("*.html"))
    pages = {path: Links(path.read_text()) for path in paths}
    faults = list(faults_of_links(pages))
    if find_spec("selenium") and shutil.which("chromium") and shutil.which("chromedriver"):
        faults += faults_in_a_browser(paths)
    else:
        print("selenium, chromium or chromedriver is not here: links only")
    print(*faults, f"{len(pages)} pages, {len(faults)} faults", sep="\n")
    return 1 if faults or not pages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
