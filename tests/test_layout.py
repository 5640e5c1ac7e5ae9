"""The shape of the package: what imports what, what is public, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geventaudit

PACKAGE = Path(geventaudit.__file__).parent
ORDER = [
    "version", "errors", "native", "records", "values", "schemas", "json_schema", "filling", "encoder/encoding",
    "compiled", "acks", "handshake", "fork", "transport/sockets", "backoff", "notifications", "threads", "stats",
    "spoolfile", "spool", "store", "sender", "operation", "pipeline", "base", "client", "agent", "testing", "__init__",
    "terminal", "lines", "doctor", "shown", "demo", "cli", "__main__",
]  # fmt: skip


def imports_of(module: str) -> set[str]:
    """The modules of the package that *module* imports, and the names of others."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level and node.module:
                found.add("." + node.module.replace(".", "/"))
                found.update(f".{node.module}/{alias.name}" for alias in node.names)
            elif node.level:
                found.update("." + alias.name for alias in node.names)
            else:
                found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
    return found


def test_every_module_has_its_place() -> None:
    there = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")}
    assert {name for name in there if "integrations" not in name} == {*ORDER, "encoder/__init__", "transport/__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_upward(module: str) -> None:
    inside = {name[1:] for name in imports_of(module) if name.startswith(".")}
    below = inside & set(ORDER[ORDER.index(module) :])
    assert not below, f"{module} imports what comes after it: {below}"


def test_only_the_wire_and_its_values_know_messagepack() -> None:
    assert {module for module in ORDER if "msgpack" in imports_of(module)} == {"encoder/encoding", "values"}
    assert "import ExtType, Timestamp" in (PACKAGE / "values.py").read_text(), "its value types, not its packing"


def test_only_the_rules_and_their_errors_know_marshmallow() -> None:
    """And what translates the rules, by the kinds of their fields."""
    assert {module for module in ORDER if "marshmallow" in imports_of(module)} == {"schemas", "errors", "json_schema"}


def test_dependencies_are_the_three() -> None:
    """But for what makes the command line nicer, where it is there."""
    allowed = {*sys.stdlib_module_names, "gevent", "msgpack", "marshmallow"}
    nicer = {"terminal": {"tqdm"}, "cli": {"shtab"}}
    for module in ORDER:
        outside = {name for name in imports_of(module) if not name.startswith(".")}
        assert outside <= allowed | nicer.get(module, set()), module


@pytest.mark.parametrize("path", sorted((PACKAGE / "integrations").glob("[!_]*.py")), ids=lambda path: str(path.stem))
def test_integrations_use_what_is_public(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2, "it reaches out of the folder"
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("geventaudit"):
            assert node.module == "geventaudit" or str(node.module).startswith("geventaudit.integrations."), path
            assert node.module != "geventaudit" or {name.name for name in node.names} <= set(geventaudit.__all__), path
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("geventaudit") for name in node.names), path


def test_nobody_pays_for_integrations_that_are_not_used() -> None:
    program = (
        "import sys, geventaudit.cli, geventaudit.agent\n"
        "assert not [name for name in sys.modules if name.startswith('geventaudit.integrations')]\n"
        "import geventaudit.integrations.wsgi\n"
        "assert not {'flask', 'django', 'werkzeug', 'gunicorn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], check=True, timeout=60)


def test_all_is_the_sorted_public_names() -> None:
    public = {
        name
        for name, value in vars(geventaudit).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    } | {"__version__"}
    assert set(geventaudit.__all__) == public
    ruff_order = sorted(geventaudit.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert geventaudit.__all__ == ruff_order


@pytest.mark.parametrize(
    "module",
    [
        *("geventaudit", "geventaudit.agent", "geventaudit.cli"),
        *(f"geventaudit.integrations.{name}" for name in ("gunicorn", "logging", "metrics", "opentelemetry", "wsgi")),
    ],
)
def test_importing_starts_nothing(module: str) -> None:
    program = (
        "import gc, os, threading, sys\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        f"import {module}\n"
        "import gevent._hub_local, gevent.monkey, greenlet, logging, atexit\n"
        "assert gevent._hub_local.get_hub_if_exists() is None, 'a hub'\n"
        "assert threading.active_count() == 1, 'a thread'\n"
        "assert len(os.listdir('/proc/self/fd')) == before, 'a descriptor'\n"
        "assert not [o for o in gc.get_objects() if isinstance(o, gevent.Greenlet)], 'a greenlet'\n"
        "assert not gevent.monkey.saved, 'a patch'\n"
        "assert 'ssl' not in sys.modules, 'patching warns when ssl was imported before'\n"
        "assert not logging.getLogger('geventaudit').handlers, 'a log handler'\n"
    )
    subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], check=True, timeout=60)


def test_what_is_not_used_is_not_loaded() -> None:
    """A service that is patched, connects and logs has most of them anyway."""
    program = (
        "import sys, geventaudit\n"
        "for name in ('gevent.monkey', 'gevent.socket', 'logging', 'sqlite3', 'ssl', 'geventaudit.store'):\n"
        "    assert name not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_public_thing_has_a_docstring() -> None:
    for name in geventaudit.__all__:
        value = getattr(geventaudit, name)
        assert name == "__version__" or value.__doc__, name
        if isinstance(value, type):
            for attribute, member in vars(value).items():
                if callable(member) and not attribute.startswith("_"):
                    assert member.__doc__ or getattr(super(value, value), attribute, None).__doc__, (name, attribute)
