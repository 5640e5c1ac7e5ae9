"""Every example of the documentation and of the README runs.

A page is one session: its Python blocks are one program, in their order, run in an empty folder that has an agent at
``/run/audit/agent.sock`` and at ``127.0.0.1:24224``, one with TLS and a shared key at ``audit.example:24224``, and a
``myapp.py`` with a client. A comment in the page is about the block that follows:

- ``<!-- file: NAME -->``: the block is that file. It is written before anything runs, and runs when it is imported.
- ``<!-- prints -->``: the program of the page prints the block, among other things.
- ``<!-- heard -->``: the agent of the tutorial prints the block, but for times and the address of this host.
- ``<!-- needs: NAME, ... -->``: the block is left out while one of the names cannot be imported. So is a block that
  imports a missing module, and a block that builds on one that is left out. The test is skipped then, with the reasons.
- ``<!-- not run: REASON -->``: the block is not run.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gevent import subprocess
from helpers import eventually, free_port

import geventaudit
from geventaudit.agent import Agent, Received

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & set(path.parts))
TUTORIAL = DOCS / "tutorial.md"
KEY = "not a secret"
MYAPP = """
import geventaudit
from geventaudit import (
    AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, OperationResult, OperationType, Record,
    TargetResource,
)

record = Record(
    operation_name="CreateUser",
    operation_categories=[OperationCategory.USER_MANAGEMENT],
    operation_type=OperationType.CREATE,
    operation_result=OperationResult.SUCCESS,
    operation_access_level="Contributor",
    caller_agent="agent/1.0",
    caller_ip_address="192.0.2.7",
    caller_identities={CallerIdentityType.UPN: [CallerIdentity("user@example.com", "the caller")]},
    caller_access_levels=["Reader"],
    target_resources={"SubscriptionId": [TargetResource("res1")]},
)
message = Msg(AuditType.CONTROL_PLANE, record)


def factory():
    return geventaudit.DomainSocket("/run/audit/agent.sock")


client = geventaudit.Client(factory)
"""


class Block(NamedTuple):
    """One fenced block."""

    language: str
    notes: dict[str, str]
    line: int
    text: str


def blocks_of(path: Path) -> list[Block]:
    blocks: list[Block] = []
    notes: dict[str, str] = {}
    lines = iter(enumerate(path.read_text().splitlines(), 1))
    for number, line in lines:
        if note := re.fullmatch(r"<!-- (file|prints|heard|needs|not run)(?:: (.+?))? -->", line.strip()):
            notes[note[1]] = note[2] or ""
        elif fence := re.fullmatch(r"( *)(```+)(.*)", line):
            indent, ticks, language = fence.groups()
            inside = []
            for _, each in lines:
                if each.strip() == ticks:
                    break
                inside.append(each.removeprefix(indent))
            else:
                raise AssertionError(f"{path.name}:{number}: not closed")
            blocks.append(Block(language.strip(), notes, number + 1, "".join(f"{each}\n" for each in inside)))
            notes = {}
        elif line.strip():
            assert not notes, f"{path.name}:{number}: {notes} says something about a block that is not there"
    return blocks


def missing(block: Block, own: Collection[str] = ("myapp",)) -> str | None:
    """Return the first name that *block* needs and that is missing; *own* are the page's modules."""
    for name in filter(None, block.notes.get("needs", "").split(", ")):
        if not is_there(name):
            return name
    if block.language != "python":
        return None
    for node in ast.walk(ast.parse(block.text)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "geventaudit":
                for each in node.names:
                    if not hasattr(geventaudit, each.name):
                        return f"geventaudit.{each.name}"
        for name in names:
            if name.split(".")[0] not in own and not is_there(name):
                return name
    return None


@cache
def is_there(name: str) -> bool:
    """Return True if a module, or a name in one, can be imported.

    It is imported in a process of its own, since Locust patches the process that imports it.
    """
    ask = "import pkgutil, sys; pkgutil.resolve_name(sys.argv[1])"
    return (
        name in sys.stdlib_module_names
        or subprocess.run([sys.executable, "-c", ask, name], stderr=subprocess.DEVNULL).returncode == 0
    )


class Place:
    """The place where a page is run: a folder and its agents, by the names that the pages use."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        trustme = pytest.importorskip("trustme", reason="needs trustme, which the extra [test] brings")
        import ssl

        self.folder = folder
        self.arrived: list[Received] = []
        authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        stack.enter_context(Agent(folder / "agent.sock", self.arrived.append))
        tcp = stack.enter_context(Agent(("127.0.0.1", 0), self.arrived.append))
        tls = stack.enter_context(Agent(("127.0.0.1", 0), self.arrived.append, ssl=context, shared_key=KEY))
        self.names = {
            '"audit.example", 24224': f'"localhost", {tls.address[1]}',
            "127.0.0.1:24224": f"127.0.0.1:{tcp.address[1]}",
            '"127.0.0.1", 24224': f'"127.0.0.1", {tcp.address[1]}',
            "/etc/audit/tls": str(folder),
            "/run/audit": str(folder),
            "/var/lib/app": str(folder),
            "/tmp/audit.sock": f"{folder}/agent.sock",
        }
        self.write("myapp.py", MYAPP)

    def here(self, text: str) -> str:
        for name, real in self.names.items():
            text = text.replace(name, real)
        return text

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(self.here(text))

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        modules = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Locust's plugin takes a second of each pytest, and is no part of any page's tests.
        return {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": modules,
            "AUDIT_SHARED_KEY": KEY,
            "PYTEST_ADDOPTS": "-p no:locust",
        }

    def run(self, *command: str) -> str:
        """Run *command*, and return its output. It must succeed, without a traceback."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            out, err = (each.decode() for each in process.communicate(timeout=120))
        assert process.returncode == 0, out + err
        assert "Traceback" not in err, err
        assert "Exception ignored" not in err, err
        return str(out)


@pytest.fixture
def place(folder: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(folder, stack)


def program_of(path: Path, blocks: list[Block]) -> str:
    """The page's Python, each line where it is in the page, so that a traceback names that line."""
    lines = [""] * len(path.read_text().splitlines())
    for block in blocks:
        if block.language == "python" and not {"file", "not run"} & set(block.notes):
            lines[block.line - 1 : block.line - 1 + block.text.count("\n")] = block.text.splitlines()
    return "\n".join(lines) + "\n"


def names_in(code: str) -> tuple[set[str], set[str]]:
    """The names that *code* binds, and those that it asks for."""
    bound: set[str] = set()
    asked: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (asked if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(each.asname or each.name).split(".")[0] for each in node.names}
    return bound, asked


def session_of(path: Path) -> tuple[list[Block], list[str]]:
    """The blocks of *path* that can be run here, and why others cannot: those that build on them neither."""
    blocks, left_out = [], []
    everything = blocks_of(path)
    own = {"myapp"} | {Path(block.notes["file"]).stem for block in everything if "file" in block.notes}
    unbound: set[str] = set()
    prints = True
    for block in everything:
        why = None
        if block.language == "python":
            compile(block.text, f"{path.name}:{block.line}", "exec")
        if (name := missing(block, own)) is not None:
            why = f"needs {name}, which is not here"
        if block.language == "python":
            bound, asked = names_in(block.text)
            if why is None and asked & unbound:
                why = f"builds on {', '.join(sorted(asked & unbound))}"
            if "file" not in block.notes:
                unbound = unbound - bound if why is None else unbound | bound
                prints = why is None
            elif why is not None:
                own -= {Path(block.notes["file"]).stem}
        elif "prints" in block.notes and not prints:
            why = "shows what a block prints that is left out"
        if why is None:
            blocks.append(block)
        else:
            left_out.append(f"{path.name}:{block.line} {why}")
    return blocks, left_out


@pytest.mark.parametrize(
    "path", [each for each in [*PAGES, ROOT / "README.md"] if each != TUTORIAL], ids=lambda path: path.stem
)
def test_a_page_runs(path: Path, place: Place) -> None:
    blocks, left_out = session_of(path)
    for block in blocks:
        if "file" in block.notes:
            place.write(block.notes["file"], block.text)
    if (program := program_of(path, blocks)).strip():
        place.write(path.name, program)
        out = place.run(sys.executable, "-X", "dev", "-W", "error", path.name)
        for block in blocks:
            if "prints" in block.notes:
                assert block.text in out, out
    for block in blocks:
        if block.language == "sh" and "not run" not in block.notes and path.name != "README.md":  # those are CI's
            place.run("bash", "-euo", "pipefail", "-c", place.here(block.text))
    if left_out:
        pytest.skip("; ".join(left_out))


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {"python", "sh", "text", "json", "yaml", "ini", "js"}
    for path in PAGES:
        for block in blocks_of(path):
            if not block.language.startswith("{"):
                assert block.language in kinds, f"{path.name}:{block.line}"
            if block.language == "json":
                json.loads(block.text)
            if block.language == "js" and shutil.which("node"):
                check = ["node", "--input-type=module", "--check", "-"]
                done = subprocess.run(check, input=block.text.encode(), stderr=subprocess.PIPE)
                assert done.returncode == 0, f"{path.name}:{block.line}: {done.stderr.decode()}"
            if block.language == "yaml":
                pytest.importorskip("yaml", reason="needs pyyaml, which the extra [test] brings").safe_load(block.text)


def test_every_link_leads_somewhere() -> None:
    """Between pages and to files, in a checkout; Sphinx makes more of them, looks at those between pages only, and at
    none of the README's."""
    for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "agents" / "README.md"]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_a_missing_need_of_a_block_is_named() -> None:
    assert missing(Block("python", {}, 1, "import geventaudit.nowhere")) == "geventaudit.nowhere"
    assert missing(Block("python", {}, 1, "from geventaudit import Nothing")) == "geventaudit.Nothing"
    assert missing(Block("sh", {"needs": "geventaudit.Client.nothing"}, 1, "")) == "geventaudit.Client.nothing"
    assert missing(Block("python", {"needs": "geventaudit.Client.send"}, 1, "from myapp import client")) is None


def test_the_tutorial(folder: Path) -> None:
    """As its reader does it: the agent in one terminal, the service in another, requests in a third."""
    blocks, left_out = session_of(TUTORIAL)
    if left_out:
        pytest.skip("; ".join(left_out))
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    listen, first, serve, *requests, stop = [
        block.text for block in blocks if block.language == "sh" and "not run" not in block.notes
    ]
    (shown,) = [block.text for block in blocks if "prints" in block.notes]
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def here(text: str) -> str:
        return text.replace("/tmp/audit.sock", f"{folder}/audit.sock").replace("127.0.0.1:8000", f"127.0.0.1:{port}")

    for block in blocks:
        if "file" in block.notes:
            (folder / block.notes["file"]).write_text(here(block.text))
    with ExitStack() as stack:

        def start(command: str, output: str) -> Any:
            with (folder / output).open("ab") as file:
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {here(command)}"],
                    cwd=folder,
                    env={**os.environ, "PATH": path},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            stack.callback(process.wait)
            stack.callback(lambda: process.poll() is None and process.kill())
            return process

        def printed(output: str) -> str:
            return (folder / output).read_text()

        start(listen, "heard")
        eventually(lambda: "listening" in printed("heard"), "the agent listens")
        assert start(first, "first").wait(60) == 0, printed("first")
        assert printed("first") == shown
        server = start(serve, "served")
        probe = f"curl --silent --fail --output /dev/null http://127.0.0.1:{port}/"
        eventually(lambda: start(probe, "probed").wait(60) == 0, "gunicorn answers")
        for command in requests:
            assert start(command, "answered").wait(60) == 0, printed("served")
        assert start(stop, "answered").wait(60) == 0, printed("answered")
        assert server.wait(60) == 0, printed("served")

        def heard() -> set[str]:
            return set(without_what_differs(printed("heard")))

        for block in blocks:
            if "heard" in block.notes:
                expected = without_what_differs(block.text)
                assert expected
                eventually(lambda lines=expected: set(lines) <= heard(), f"not all of {expected} in {heard()}", 10)


def without_what_differs(text: str) -> list[str]:
    """The lines of ``geventaudit listen`` without times, and without addresses of hosts."""
    return [re.sub(r" from \S+ on", "", line) for line in re.findall(r"^\S+Z (.+)$", text, re.MULTILINE)]
