"""Fixtures for all tests. They run unpatched, and once more under ``python -m gevent.monkey``."""

from __future__ import annotations

import fcntl
import gc
import shlex
import subprocess as std_subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import gevent
import helpers
import pytest
from gevent import monkey, subprocess
from hypothesis import HealthCheck, settings

from geventaudit.agent import Agent, Received, Refused

# The same examples in each run: new ones are looked for by hand, and found ones become tests.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
# By hand, with --hypothesis-profile=long -o faulthandler_timeout=0: an hour of fuzzing instead of seconds.
settings.register_profile("long", settings.get_profile("suite"), max_examples=100_000, derandomize=False)
settings.load_profile("suite")


def pytest_report_header() -> str:
    return f"gevent {gevent.__version__}, {'monkey-patched' if helpers.PATCHED else 'not patched'}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Start the worker processes of pytest-xdist with this interpreter's options, such as ``-X dev``."""
    python = [sys.executable, *std_subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
    for spec in specs:
        spec.python = shlex.join(python)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: the path of a Unix socket ends at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ga-") as name:
        threads = helpers.threads()
        yield Path(name)
        # A close() that was interrupted leaves its last job to the disk's thread, which makes files in here.
        helpers.eventually(lambda: helpers.threads() <= threads, "a thread is left over")


@pytest.fixture(autouse=True)
def _a_busy_disk_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a closing client enough time for the disk: tests check the kept records, not the speed of the machine."""
    monkeypatch.setattr("geventaudit.spool.store.CLOSE_SECONDS", 30.0)


@pytest.fixture
def socket_path(folder: Path) -> str:
    return str(folder / "agent.sock")


@pytest.fixture(scope="module")
def command_server() -> Iterator[None]:
    """The process that the commands of commands.py are forked from."""
    with commands.serving():
        yield


NODE_LOGGER = "1.0.10"


@pytest.fixture
def node_modules(pytestconfig: pytest.Config) -> Callable[[], Path]:
    """Return a function that returns the folder with the npm package @fluent-org/logger, installed once and kept in
    pytest's cache."""

    def installed() -> Path:
        folder = pytestconfig.cache.mkdir(f"fluent-org-logger-{NODE_LOGGER}")  # type: ignore[union-attr]
        # Test runs side by side install it once.
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "node_modules" / "@fluent-org" / "logger").is_dir():
                command = ["npm", "install", "--silent", "--no-fund", "--no-audit"]
                subprocess.check_call([*command, f"@fluent-org/logger@{NODE_LOGGER}"], cwd=folder, timeout=300)
        return folder / "node_modules"

    return installed


@pytest.fixture
def got() -> list[Received]:
    return []


@pytest.fixture
def refused() -> list[Refused]:
    return []


@pytest.fixture
def agent(socket_path: str, got: list[Received], refused: list[Refused]) -> Iterator[Agent]:
    with Agent(socket_path, got.append, on_refused=refused.append) as agent:
        yield agent


# Modules that start processes, break disks, or wait.
SLOW = {
    "test_acks", "test_agent", "test_agent_hostile", "test_agents", "test_celery", "test_chaos", "test_cli",
    "test_cli_options", "test_cli_routes", "test_cli_spool", "test_client", "test_connections", "test_delivery",
    "test_docs", "test_doctor", "test_ends", "test_examples", "test_fluent_logger_js", "test_fork", "test_frameworks",
    "test_fuzz", "test_gunicorn", "test_http_frameworks", "test_http_services", "test_interruptions", "test_layout",
    "test_lifecycle", "test_locust", "test_monitoring", "test_performance", "test_poison", "test_pure_python",
    "test_reconnect", "test_reentrancy", "test_report_browser", "test_segments", "test_senders", "test_shown",
    "test_spool", "test_spool_faults", "test_tcp", "test_testing", "test_threads", "test_trail", "test_trail_review",
    "test_typing", "test_verify", "test_web", "test_web_browser", "test_who_may_listen",
}  # fmt: skip


# Modules that test commands, other processes, a browser or the source: patching the tests' own process changes none of
# these.
OUTSIDE = {
    "test_agents", "test_cli", "test_cli_options", "test_cli_routes", "test_cli_spool", "test_cli_trail", "test_docs",
    "test_docs_build", "test_docs_language", "test_editor", "test_examples", "test_language",
    "test_layout", "test_locust", "test_monitoring", "test_pure_python", "test_readme", "test_report_browser",
    "test_trail_review", "test_typing", "test_web_browser",
}  # fmt: skip
# Modules of functions and state machines without threads, sockets, locks and clocks that could be patched. Files are
# read and written by system calls that gevent does not patch.
FUNCTIONS = {
    "test_backoff", "test_encoder", "test_filling", "test_golden", "test_json_safe",
    "test_json_schema", "test_properties", "test_quarantine", "test_records", "test_report", "test_rules",
    "test_segments", "test_trail_keys", "test_trail_stamp", "test_verify", "test_wire",
}  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
        if item.path.stem in OUTSIDE | FUNCTIONS:
            item.add_marker(helpers.once)
    if helpers.PATCHED:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("once")])
        items[:] = [item for item in items if not item.get_closest_marker("once")]


# These open nothing; they have nothing to leave over.
PURE = {
    "test_golden", "test_rules", "test_values", "test_filling", "test_wire", "test_backoff", "test_layout",
    "test_typing", "test_json_schema", "test_editor", "test_quarantine",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _objects_of_earlier_modules_can_be_collected() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test, and so no part of the library, leaves a greenlet, a thread or a descriptor behind."""
    if request.module.__name__.rpartition(".")[2] in PURE:
        yield
        return
    gevent.get_hub()
    gevent.sleep(0)
    # Among hundreds of thousands of older objects, looking for greenlets would take longer than most tests.
    gc.collect()
    gc.freeze()
    threads, descriptors = helpers.threads(), helpers.descriptors()
    yield
    assert monkey.is_module_patched("threading") is helpers.PATCHED, "a test has patched, for all that come after it"
    try:
        helpers.eventually(lambda: helpers.greenlets() == 0, "a greenlet is left over", timeout=5)
    except AssertionError:
        left = [f"{each!r}, started: {each.started}, at {each.gr_frame}" for each in helpers.living()]
        raise AssertionError(f"left over: {left}") from None
    helpers.eventually(lambda: helpers.threads() <= threads, "a thread is left over", timeout=5)
    helpers.eventually(lambda: helpers.descriptors() <= descriptors, "a descriptor is left over", timeout=5)
