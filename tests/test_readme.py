"""What the README shows is true."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess
from helpers import SERVICE_TREE_ID, eventually, message

import geventaudit
from geventaudit import TCP, Backoff, Client, DomainSocket, Msg, Spool, Stats
from geventaudit.agent import Agent

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_quick_start_sends_exactly_its_record(socket_path: str) -> None:
    """As printed, but for the path: the usual one belongs to mdsd."""
    (quick_start,) = (block for block in BLOCKS if "CreateUser" in block)
    got: list[Any] = []
    with Agent(socket_path, got.append):
        redirect = f"import geventaudit.connections as c; c._MDSD_SOCKETS = ({socket_path!r},)\n"
        program = quick_start.replace("import geventaudit\n", "import geventaudit\n" + redirect)
        process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            output = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, (b"", b""))
        eventually(lambda: len(got) == 2)
    assert got[0].message == message()
    assert got[0].service_tree_id == SERVICE_TREE_ID


def test_every_python_block_compiles() -> None:
    assert len(BLOCKS) == 7
    for block in BLOCKS:
        compile(block, "README.md", "exec")


def test_the_spool_that_is_shown_can_be_made() -> None:
    (block,) = (block for block in BLOCKS if "Spool(" in block)
    names: dict[str, Any] = {"geventaudit": geventaudit, "factory": geventaudit.NoOp}
    exec(block, names)
    assert isinstance(names["client"], Client)


def test_every_test_that_is_named_exists() -> None:
    here = Path(__file__).parent
    rows = [line for line in README.splitlines() if line.startswith("|") and "`test_" in line]
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`((?:test_|\.\.\.)[^`]*)`", row)
        modules = [name for name in names if (here / f"{name}.py").exists()]
        assert modules, row
        text = "".join((here / f"{module}.py").read_text() for module in modules)
        for name in set(names) - set(modules):
            pattern = r"\w*".join(re.escape(part) for part in name.split("..."))
            assert re.search(rf"def (test_)?{pattern}\(", text), name


@pytest.mark.parametrize("owner", [Client, DomainSocket, TCP, Backoff, Spool])
def test_the_options_and_their_defaults(owner: type[Any]) -> None:
    for name, parameter in inspect.signature(owner).parameters.items():
        if name in ("factory", "address"):
            continue
        assert name in README, name
        if isinstance(parameter.default, float):
            assert f"{name}={parameter.default}" in README or f"| `{name}` | {parameter.default} |" in README, name
        elif type(parameter.default) is int and owner is Client:
            assert f"| `{name}` | {parameter.default} |" in README, name


def test_every_number_of_stats_is_named() -> None:
    for name in Stats._fields:
        assert re.search(rf"\b{name}\b", README), name


def test_the_example_message_is_the_readmes() -> None:
    assert isinstance(message(), Msg)
    assert len(README.splitlines()[0]) < 40
