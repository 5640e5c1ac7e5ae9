"""Sphinx: ``python -m sphinx -W -n -b html docs docs/_build``, with the extra [docs]."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import geventaudit
import geventaudit.integrations

project = "geventaudit"
author = "The geventaudit contributors"
project_copyright = author
release = version = geventaudit.__version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "diagrams",
    "references",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_extra_path = ["schema"]  # message.schema.json, at the root
html_title = f"geventaudit {release}"
html_static_path = ["_static"]
html_css_files = ["geventaudit.css"]

# The buttons copy commands, not their prompts, and no output.
copybutton_selector = "div.highlight-python pre, div.highlight-sh pre, div.highlight-yaml pre, div.highlight-ini pre"

# The documents of others. The inventories are small files here, in the readable first version of the format, so that
# the build needs no network; a link that is missing there is added by hand.
intersphinx_mapping = {
    name: (address, f"inventories/{name}.txt")
    for name, address in {
        "python": "https://docs.python.org/3/",
        "gevent": "https://www.gevent.org/",
        "marshmallow": "https://marshmallow.readthedocs.io/en/stable/",
        "flask": "https://flask.palletsprojects.com/en/stable/",
        "django": "https://docs.djangoproject.com/en/stable/",
    }.items()
}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
# The frameworks of the integrations. The page of an integration is built without its framework, too. Sphinx imports an
# installed one all the same, to look for its sources; Locust must not patch it then.
os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"
autodoc_mock_imports = [
    *("bottle", "django", "falcon", "flask", "flask_login", "gunicorn", "locust", "opentelemetry"),
    *("billiard", "celery", "prometheus_client", "pyramid", "pytest", "rest_framework", "werkzeug"),
]

REFERENCE = Path(__file__).parent / "reference"
GENERATED = REFERENCE / "generated"

_pages: dict[str, str] = {}


def _write_pages() -> None:
    GENERATED.mkdir(exist_ok=True)
    for path in GENERATED.iterdir():
        if path.stem not in _pages:
            path.unlink()
    for name, text in _pages.items():
        path = GENERATED / f"{name}.md"
        if not path.exists() or path.read_text() != text:  # Sphinx builds changed pages again
            path.write_text(text)


def _make_page_of_other_names() -> None:
    """Write a page of the public names that no other page of the reference has."""
    pages = "".join(path.read_text() for path in REFERENCE.glob("*.md"))
    taken = set(re.findall(r"^\.\. auto\w+:: (\w+)$", pages, re.MULTILINE))
    page = "# Other public names\n\n```{eval-rst}\n.. currentmodule:: geventaudit\n"
    for name in sorted(set(geventaudit.__all__) - taken):
        directive = "autoclass" if isinstance(getattr(geventaudit, name), type) else "autofunction"
        page += f"\n.. {directive}:: {name}\n" if name != "__version__" else "\n.. autodata:: __version__\n"
    _pages["other-names"] = page + "```\n"


def _make_pages_of_integrations() -> None:
    """Write a page for each integration, and one that lists them."""
    modules = [
        f"{package.__name__}.{each.name}"
        for package in (geventaudit, geventaudit.integrations)
        for each in pkgutil.iter_modules(package.__path__)
        if package is not geventaudit or each.name == "testing"
    ]
    index = "# Integrations\n\n```{eval-rst}\n.. automodule:: geventaudit.integrations\n```\n"
    index += "\n```{toctree}\n" + "".join(f"{module}\n" for module in modules) + "```\n" if modules else ""
    _pages["integrations"] = index
    for module in modules:
        _pages[module] = f"# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def _help(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "geventaudit", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "96", "NO_COLOR": "1"},
    ).stdout


def _make_page_of_the_command_line() -> None:
    """Write a page of the ``--help`` of each command."""
    text = _help()
    commands = re.findall(r"^    ([a-z-]+)(?: |$)", text, re.MULTILINE)
    page = f"# Command line\n\n```text\n{text}```\n"
    for command in commands:
        text = _help(command)
        page += f"\n## geventaudit {command}\n\n```text\n{text}```\n"
        for action in re.findall(r"^    ([a-z]+)(?: |$)", text.partition("ACTION\n")[2], re.MULTILINE):
            page += f"\n### geventaudit {command} {action}\n\n```text\n{_help(command, action)}```\n"
    _pages["command-line"] = page


_make_page_of_other_names()
_make_pages_of_integrations()
_make_page_of_the_command_line()
_write_pages()
