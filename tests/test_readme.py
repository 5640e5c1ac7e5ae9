"""The README is true, and the documentation has the facts that the README leaves to it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess
from helpers import eventually

import geventaudit
from geventaudit import (
    TCP,
    AuditError,
    AuditType,
    Backoff,
    CallerIdentity,
    CallerIdentityType,
    Client,
    DomainSocket,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    Seal,
    Spool,
    Stats,
    TargetResource,
)
from geventaudit.agent import Agent

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
FAULTS = (DOCS / "explanation" / "what-was-tried.md").read_text()
ERRORS = (DOCS / "howto" / "errors.md").read_text()
OPTIONS = (DOCS / "reference" / "options.md").read_text()


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_first_record_arrives(socket_path: str) -> None:
    """The program runs as printed, but for the path."""
    (program_shown,) = blocks_of(README)
    assert program_shown.count("/tmp/audit.sock") == 1
    program = program_shown.replace("/tmp/audit.sock", socket_path)
    got: list[Any] = []
    with Agent(socket_path, got.append):
        process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            output = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, (b"", b""))
        eventually(lambda: any(isinstance(each.message, Msg) for each in got))
    (record,) = [each.message.record for each in got if isinstance(each.message, Msg)]
    assert record.operation_name == "CreateUser"
    assert record.caller_identities == {"Username": [CallerIdentity("ada", "signed in")]}
    assert record.target_resources == {"User": [TargetResource("grace")]}


def test_every_test_that_is_named_exists() -> None:
    here = Path(__file__).parent
    rows = [line for line in FAULTS.splitlines() if line.startswith("|") and "`test_" in line]
    assert len(rows) > 50, "the README says so"
    for row in rows:
        names = re.findall(r"`((?:test_|\.\.\.)[^`]*)`", row)
        modules = [name for name in names if (here / f"{name}.py").exists()]
        assert modules, row
        text = "".join((here / f"{module}.py").read_text() for module in modules)
        for name in set(names) - set(modules):
            pattern = r"\w*".join(re.escape(part) for part in name.split("..."))
            assert re.search(rf"def (test_)?{pattern}\(", text), name


@pytest.mark.parametrize("owner", [Client, DomainSocket, TCP, Backoff, Seal, Spool])
def test_the_options_and_their_defaults(owner: type[Any]) -> None:
    for name, parameter in inspect.signature(owner).parameters.items():
        if name in ("factory", "address"):
            continue
        assert f"`{name}`" in OPTIONS or f"`{owner.__name__}({name}" in OPTIONS or f"{name}=" in OPTIONS, name
        if type(parameter.default) in (float, int):
            row = f"| `{name}` | {parameter.default} |"
            assert f"{name}={parameter.default}" in OPTIONS or row in OPTIONS, name
        elif isinstance(parameter.default, str) and parameter.default:
            assert f'| `{name}` | `"{parameter.default}"` |' in OPTIONS, name


def test_every_number_of_stats_is_named() -> None:
    for name in Stats._fields:
        assert f"`{name}`" in ERRORS, name


def test_every_exception_is_named() -> None:
    for name in geventaudit.__all__:
        value = getattr(geventaudit, name)
        if isinstance(value, type) and issubclass(value, AuditError):
            assert f"`{name}`" in ERRORS, name


def test_each_field_and_member_of_a_record_is_documented() -> None:
    """By a text below it, from which the reference is made; the page on categories has the choice of each member."""
    tree = ast.parse((ROOT / "geventaudit" / "records.py").read_text())
    documented = {
        f"{owner.name}.{target.id}"
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for field, text in itertools.pairwise(owner.body)
        for target in (field.targets if isinstance(field, ast.Assign) else [getattr(field, "target", None)])
        if isinstance(target, ast.Name) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    enumerations = (AuditType, OperationType, OperationResult, OperationCategory, CallerIdentityType)
    expected = {f"{each.__name__}.{member.name}" for each in enumerations for member in each}
    for owner in (Record, Msg, TargetResource, CallerIdentity):
        expected |= {f"{owner.__name__}.{field.name}" for field in dataclasses.fields(owner)}
    assert expected - documented == set()
    page = (DOCS / "howto" / "categories.md").read_text()
    for member in [*OperationCategory, *OperationResult, *OperationType]:
        assert f"`{member.name}`" in page, member


def test_the_figures_are_those_of_one_run() -> None:
    """The README, the documentation and the output of ``python -m benchmarks --json`` agree."""
    page = (DOCS / "explanation" / "how-fast.md").read_text()
    run = json.loads((DOCS / "explanation" / "how-fast.json").read_text())
    assert not run["quick"]
    rows = [row for figure in run["figures"].values() for row in figure if row["value"] is not None]
    assert len(rows) > 20
    for row in rows:
        shown = [re.split(r" *\| *", line) for line in page.splitlines() if line.startswith(f"| {row['name']} ")]
        assert [float(cells[2].split()[0]) for cells in shown] == [
            pytest.approx(row["value"]["median"], rel=0.03, abs=0.006)
        ]
        assert shown[0][6] == {None: "", True: "yes", False: "**no**"}[row["met"]], row["name"]
    table = [line for line in README.splitlines() if re.search(r"\| at (least|most) ", line)]
    assert len(table) == 3, "the rest is in the documentation"
    for line in table:
        name, measured, *bounds = line.removeprefix("| ").removesuffix(" |").split(" | ")
        (cells,) = [re.split(r" *\| *", each) for each in page.splitlines() if each.startswith(f"| {name} ")]
        assert [measured, *bounds] == [cells[2], cells[4], cells[5]]


def test_it_is_one_screen() -> None:
    lines = README.splitlines()
    assert lines[0] == "# geventaudit"
    assert len(lines) < 90
    assert max(len(line) for line in lines if not line.startswith(("|", "!"))) <= 120
