"""The shape of the package: its imports, its public names, and an import without effects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest

import geventaudit

PACKAGE = Path(geventaudit.__file__).parent
# Dotted, as below geventaudit; a package stands where its __init__.py does, and "" is geventaudit's own.
ORDER = [
    "version", "errors",
    "runtime", "runtime.native", "runtime.clock", "runtime.copying", "runtime.forks", "runtime.exits", "runtime.signal",
    "runtime.workers", "runtime.hub_thread", "runtime.signatures",
    "_records", "records",
    "schema", "schema.values", "schema.json_safe", "schema.sealed", "schema.addresses", "schema.fields", "schema.rules",
    "schema.json_schema", "filling",
    "encoder", "encoder.draft", "encoder.encoding", "encoder.plan", "encoder.fallback", "encoder._fast",
    "encoder.engine",
    "protocol", "protocol.unpacking", "protocol.inflation", "protocol.messages", "protocol.decoding",
    "protocol.acks", "protocol.refusals", "protocol.handshake",
    "trail", "trail.secret", "trail.keys", "trail.key_file", "trail.canonical", "trail.stamp", "trail.chain",
    "trail.seal", "trail.stamping",
    "transport.connection", "transport.kernel", "transport.sockets", "transport.unix", "transport.connecting",
    "transport.tcp", "transport.noop", "transport",
    "backoff", "notifications", "stats",
    "spool.settings", "spool", "spool.format", "spool.directory", "spool.segment", "spool.sidefiles",
    "spool.recovery", "spool.folder", "spool.inspection", "spool.stream",
    "spool.pending", "spool.backlog",
    "spool.backlogs", "spool.disk",
    "spool.jobs", "spool.adoption", "spool.trouble", "spool.store",
    "delivery", "delivery.inbox", "delivery.key_reader", "delivery.outbox", "delivery.stamped_outbox",
    "delivery.quarantine", "delivery.connector", "delivery.heartbeats",
    "delivery.sender",
    "operation", "lifecycle", "audit_client", "client",
    "agent.arrivals", "agent.shown", "agent.connections", "agent.listening", "agent.reception", "agent.server", "agent",
    "agent.web.log", "agent.web.rendering", "agent.web.guard", "agent.web.page", "agent.web",
    "agent.doctor", "testing", "",
    "verify", "verify.lines", "verify.parsing", "verify._packing", "verify.packing", "verify.records", "verify.rows",
    "verify.keyring", "verify.state", "verify.findings", "verify.streams", "verify.trail",
    "report", "report.counting", "report.fields", "report.summary", "report.reading", "report.controls", "report.text",
    "report.charts", "report.page",
    "cli.terminal", "cli.arguments", "cli.signals", "cli.lines", "cli.web", "cli.listen", "cli.send", "cli.demo",
    "cli.spool", "cli.trail", "cli.report", "cli.routes", "cli", "__main__",
]  # fmt: skip
PACKAGES = [
    "agent", "agent.web", "cli", "delivery", "encoder", "protocol", "report", "runtime", "schema", "spool", "trail",
    "transport", "verify",
]  # fmt: skip


def path_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    compiled = path.with_suffix(".pyx")
    return path / "__init__.py" if path.is_dir() else compiled if compiled.exists() else path.with_suffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports_of(module: str) -> set[str]:
    """The modules of the package that *module* imports, each with a dot before it, and the names of others."""
    path = path_of(module)
    found: set[str] = set()
    text = path.read_text()
    if path.suffix == ".pyx":
        lines = [
            line for line in text.splitlines() if line.startswith(("from ", "import ")) and " cimport " not in line
        ]
        text = "\n".join(lines)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].relative_to(PACKAGE).parts  # raises where it reaches out
            source = ".".join([*folder, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix(".")
                found.add("." + (inner if path_of(inner).exists() else source))
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
    return found


def test_every_module_has_its_place() -> None:
    there = {
        name_of(path)
        for path in PACKAGE.rglob("*.py*")
        if path.suffix in (".py", ".pyx") and "integrations" not in path.parts
    }
    assert there == set(ORDER)
    assert len(ORDER) == len(there)


@pytest.mark.parametrize("module", ORDER, ids=lambda module: module or "geventaudit")
def test_imports_point_upward(module: str) -> None:
    """The packages as well as their modules: none imports from one that comes after it."""
    inside = {name[1:] for name in imports_of(module) if name.startswith(".")}
    assert inside <= set(ORDER), "of the package, and not by its name"
    below = inside & set(ORDER[ORDER.index(module) :])
    assert not below, f"{module} imports what comes after it: {below}"
    assert "geventaudit" not in imports_of(module), "inside the package, imports are relative"


def test_a_package_is_one_stretch_of_the_order() -> None:
    """This excludes cycles of packages, too."""
    stretches = [name for name, _ in groupby(ORDER, key=lambda module: module.partition(".")[0])]
    assert len(stretches) == len(set(stretches)), stretches


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_describes_itself_in_a_few_lines(package: str) -> None:
    text = ast.get_docstring(ast.parse(path_of(package).read_text()))
    assert text is not None
    assert len(text.splitlines()) <= 10
    assert "Read ``" in text, "in which order"


def test_each_module_can_be_the_first_that_is_imported() -> None:
    needs_extra = {"report.charts", "report.page"} if find_spec("pygal") is None else set()
    left_out = {"__main__", *needs_extra}
    names = [
        f"geventaudit.{name}".rstrip(".") for name in ORDER if name not in left_out and path_of(name).suffix == ".py"
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    for loaded in [each for each in sys.modules if each.partition('.')[0] == 'geventaudit']:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], check=True, timeout=300)


BRANCHES = (
    ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.Assert, ast.match_case,
)  # fmt: skip


def complexity_of(function: ast.AST) -> int:
    """One, and one for each branch, ``and`` and ``or``, those of inner functions included."""
    nodes = [*ast.walk(function)]
    operators = sum(len(each.values) - 1 for each in nodes if isinstance(each, ast.BoolOp))
    return 1 + operators + sum(isinstance(each, BRANCHES) for each in nodes)


def attributes_of(kind: ast.ClassDef) -> set[str]:
    """The names that are set on ``self``."""
    stored = [each for each in ast.walk(kind) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)]
    return {each.attr for each in stored if isinstance(each.value, ast.Name) and each.value.id == "self"}


def test_modules_classes_and_functions_stay_small() -> None:
    """At most 500 lines, 18 attributes, and a complexity of 15."""
    large = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        sizes = [(text.count("\n"), 500, "the module")]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                sizes.append((complexity_of(node), 15, node.name))
            elif isinstance(node, ast.ClassDef):
                sizes.append((len(attributes_of(node)), 18, node.name))
        large += [f"{path}: {name}: {size}, at most {limit}" for size, limit, name in sizes if size > limit]
    assert not large


def test_only_the_wire_and_its_values_know_messagepack() -> None:
    assert {module for module in ORDER if "msgpack" in imports_of(module)} == {
        *("encoder.encoding", "protocol.unpacking", "schema.json_safe", "schema.values")
    }
    for module in "schema.json_safe", "schema.values":
        assert "import ExtType, Timestamp" in path_of(module).read_text(), "its value types, not its packing"


def test_only_the_rules_and_their_errors_know_marshmallow() -> None:
    """The module that translates the rules knows it, too, by the kinds of their fields."""
    assert {module for module in ORDER if "marshmallow" in imports_of(module)} == {
        *("errors", "schema.fields", "schema.json_schema", "schema.rules")
    }


def test_time_limits_are_measured_by_a_clock_that_runs() -> None:
    """By one module; integrations, which use public names only, read the same clock."""
    paths = {path_of(module) for module in ORDER}
    for path in paths | set((PACKAGE / "integrations").rglob("*.py")):
        text = path.read_text()
        assert "time.monotonic" not in text, path
        assert not re.search("from time import .*monotonic", text), path


def test_dependencies_are_the_three() -> None:
    """Apart from optional packages that make the command line nicer or faster."""
    allowed = {*sys.stdlib_module_names, "gevent", "msgpack", "marshmallow"}
    nicer = {"cli.terminal": {"tqdm"}, "cli": {"shtab"}, "verify.parsing": {"orjson"}}
    nicer |= {"report.charts": {"pygal"}, "report.page": {"jinja2", "markupsafe"}}
    for module in ORDER:
        outside = {name for name in imports_of(module) if not name.startswith(".")}
        assert outside <= allowed | nicer.get(module, set()), module


@pytest.mark.parametrize("path", sorted((PACKAGE / "integrations").rglob("[!_]*.py")), ids=lambda path: str(path.stem))
def test_integrations_use_public_names_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2, "it reaches out of the folder"
        if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("geventaudit"):
            assert node.module == "geventaudit" or str(node.module).startswith("geventaudit.integrations."), path
            assert node.module != "geventaudit" or {name.name for name in node.names} <= set(geventaudit.__all__), path
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("geventaudit") for name in node.names), path


def test_unused_integrations_are_not_imported() -> None:
    program = (
        "import sys, geventaudit.cli, geventaudit.agent\n"
        "assert not [name for name in sys.modules if name.startswith('geventaudit.integrations')]\n"
        "import geventaudit.integrations.wsgi\n"
        "assert not {'flask', 'django', 'werkzeug', 'gunicorn'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], check=True, timeout=300)


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
    subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", program], check=True, timeout=300)


def test_unused_modules_are_not_imported() -> None:
    """A service that is patched, connects and logs has most of them anyway."""
    program = (
        "import sys, geventaudit\n"
        "for name in ('gevent.monkey', 'gevent.socket', 'logging', 'sqlite3', 'ssl'):\n"
        "    assert name not in sys.modules, name\n"
        "spool = {name for name in sys.modules if name.startswith('geventaudit.spool')}\n"
        "assert spool == {f'geventaudit.spool{name}' for name in ('', '.settings', '.stream')}, spool\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_every_public_thing_has_a_docstring() -> None:
    for name in geventaudit.__all__:
        value = getattr(geventaudit, name)
        assert name == "__version__" or value.__doc__, name
        if isinstance(value, type):
            for attribute, member in vars(value).items():
                if callable(member) and not attribute.startswith("_"):
                    assert member.__doc__ or getattr(super(value, value), attribute, None).__doc__, (name, attribute)
