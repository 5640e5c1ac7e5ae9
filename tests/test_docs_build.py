"""The parts of the documentation's build: diagrams, references, width of code, links between pages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_docs import DOCS, PAGES, ROOT, blocks_of

pytest.importorskip("sphinx", reason="needs Sphinx, which the extra [docs] brings")
sys.path.extend([str(DOCS), str(DOCS / "_ext")])
import check_pages
import diagrams
import references

NAMES = sorted(path.stem for path in diagrams.FOLDER.glob("*.dot"))
MAX_WIDTH = 120
"""Characters of a line of code. A page has room for about 100; its style wraps longer lines."""


def test_each_diagram_is_on_a_page_with_a_description() -> None:
    text = "".join(path.read_text() for path in PAGES)
    shown = re.findall(r"^```\{diagram\} (\S+)\n(.+?)^```", text, re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in shown) == NAMES
    assert all(len(description.split()) > 20 for _, description in shown)


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_takes_its_colours_from_the_page(name: str) -> None:
    svg = diagrams.draw(name, 'A "description"')
    if svg is None:
        pytest.skip("needs dot (Debian's package graphviz)")
    root = ElementTree.fromstring(svg.replace(" xlink:href", " href"))
    assert root.get("aria-label") == 'A "description"'
    assert root.get("role") == "img"
    assert not [each for each in root.iter() if each.get("fill") or each.get("stroke")]
    assert float(str(root.get("width")).removesuffix("pt")) < 640, "wider than a page"
    assert [each for each in root.iter() if each.tag.endswith("text")]


PROJECT = {
    "conf.py": """
import sys
sys.path.insert(0, {ext!r})
extensions = ["sphinx.ext.autodoc", "diagrams", "references"]
""",
    "index.rst": """
Page
====

.. py:module:: geventaudit

.. autoclass:: geventaudit.Backoff

Documented: :class:`Backoff`. Without a page: :func:`~geventaudit.schema.values.normal_form`. Broken: :class:`Nowhere`.

.. diagram:: quarantine

   In words.
""",
}


def test_a_broken_reference_is_an_error_and_a_missing_dot_is_none(tmp_path: Path) -> None:
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text.replace("{ext!r}", repr(str(DOCS / "_ext"))))
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-b", "html", ".", "out"]
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert len(warnings) == 1, done.stderr
    assert "Nowhere" in warnings[0]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "In words." in page
    assert 'href="#geventaudit.Backoff"' in page


@pytest.mark.parametrize(
    ("literal", "name"),
    [
        ("Client", "geventaudit.Client"),
        ("Client(factory, stamp=True)", "geventaudit.Client"),
        ("geventaudit.Spool", "geventaudit.Spool"),
        ("client.send(msg)", "geventaudit.Client.send"),
        ("flush()", "geventaudit.Client.flush"),
        ("client.notify", "geventaudit.Client.notify"),
        ("AuditType.DATA_PLANE", "geventaudit.AuditType.DATA_PLANE"),
        ("flush", None),
        ("AuditType.SIDE_PLANE", None),
        ("client.stats().rejected", None),
        ("queue_size", None),
        ("myapp", None),
        ("live_clients", None),
        ("geventaudit.live_clients()", "geventaudit.live_clients"),
    ],
)
def test_public_names_in_guides_are_links(literal: str, name: str | None) -> None:
    assert references.public_name(literal) == name


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_no_line_of_code_is_cut_off(path: Path) -> None:
    style = (DOCS / "_static" / "geventaudit.css").read_text()
    assert "white-space: pre-wrap" in style
    for block in blocks_of(path):
        if block.language in ("python", "yaml", "ini"):
            for number, line in enumerate(block.text.splitlines(), block.line):
                assert len(line) <= MAX_WIDTH, f"{path.name}:{number}: {len(line)} characters"


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.stem)
def test_links_to_headings_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", path.read_text()):
        page = path.parent / target if target else path
        headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{target}#{anchor}"


def test_the_links_to_other_documents_need_no_network() -> None:
    for path in (DOCS / "inventories").glob("*.txt"):
        version, project, _, *rows = path.read_text().splitlines()
        assert version == "# Sphinx inventory version 1"
        assert project.startswith("# Project: ")
        assert all(len(row.split(" ")) == 3 for row in rows)


@pytest.mark.skipif(not shutil.which("dot"), reason="needs dot (Debian's package graphviz)")
def test_a_wrong_diagram_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.dot").write_text("digraph {")
    monkeypatch.setattr(diagrams, "FOLDER", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        diagrams.draw("wrong", "wrong")


def test_dead_links_and_loaded_resources_are_found(tmp_path: Path) -> None:
    texts = {
        "one.html": '<a href="two.html#here"></a><a href="#own"></a><h1 id="own"></h1><a href="https://x.test/"></a>',
        "two.html": '<h1 id="here"></h1><a href="three.html"></a><a href="one.html#gone"></a><img src="//x.test/1">',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    pages = {path: check_pages.Links(path.read_text()) for path in tmp_path.iterdir()}
    faults = [fault.removeprefix(f"{tmp_path}/") for fault in check_pages.faults_of_links(pages)]
    assert sorted(faults) == [
        "two.html: loads //x.test/1",
        "two.html: one.html#gone: no such heading",
        "two.html: three.html: no such file",
    ]
