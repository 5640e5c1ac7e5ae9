"""The parts that several tests share: the example message, waiting with a deadline, the receiver process."""

from __future__ import annotations

import gc
import os
import signal
import socket as std_socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey, subprocess

from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)

SERVICE_TREE_ID = "e6c9fcb1-7f08-4c1d-9e7a-123456789abc"
PATCHED = monkey.is_module_patched("socket")
HERE = Path(__file__).parent

# For tests of other processes, which are patched or not by their own arguments.
once = pytest.mark.once
destroys_a_hub = pytest.mark.skipif(
    "libuv" in gevent.config.loop.__module__,
    reason="on libuv, gevent's Hub.destroy() does not return while a greenlet waits in the hub",
)
DESTROYED = [pytest.param(True, id="destroyed", marks=destroys_a_hub), pytest.param(False, id="left")]


def record(**changes: Any) -> Record:
    return Record(
        operation_name="CreateUser",
        operation_categories=[OperationCategory.USER_MANAGEMENT],
        operation_type=OperationType.CREATE,
        operation_result=OperationResult.SUCCESS,
        operation_access_level="Contributor",
        caller_agent="agent/1.0",
        caller_ip_address="192.0.2.7",
        caller_identities={CallerIdentityType.UPN: [CallerIdentity("user@example.com", "the caller")]},
        caller_access_levels=["Reader"],
        target_resources={"SubscriptionId": [TargetResource("res1", region="westeurope")]},
        custom_data={"ticket": 4711},
    ).replace(**changes)


def message(number: int | None = None, **changes: Any) -> Msg:
    if number is not None:
        changes["custom_data"] = {"n": number}
    return Msg(AuditType.CONTROL_PLANE, record(**changes))


def mapping(**changes: Any) -> dict[str, Any]:
    """The example record by wire names; a change to None leaves the name out."""
    plain: dict[str, Any] = {
        "OperationName": "CreateUser",
        "OperationCategories": ["UserManagement"],
        "OperationType": "Create",
        "OperationResult": "Success",
        "OperationAccessLevel": "Contributor",
        "CallerAgent": "agent/1.0",
        "CallerIpAddress": "192.0.2.7",
        "CallerIdentities": {"UPN": [{"Identity": "user@example.com", "Description": "the caller"}]},
        "CallerAccessLevels": ["Reader"],
        "TargetResources": {"SubscriptionId": [{"Name": "res1", "Region": "westeurope"}]},
        "CustomData": {"ticket": 4711},
    }
    plain.update(changes)
    return {key: value for key, value in plain.items() if value is not None}


def eventually(condition: Callable[[], Any], expectation: str = "", timeout: float = 30.0) -> Any:
    """Wait until *condition* is true; fail with *expectation* after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {expectation or condition}"
        gevent.sleep(0.005)
    return result


def import_old(name: str) -> Any:
    """Import a module that warns of its own dependencies, as WebOb does of ``cgi``; skip the test without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        return pytest.importorskip(name, reason=f"needs {name}, which the extra [test] brings")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def living() -> list[gevent.Greenlet[Any, Any]]:
    """Return the greenlets that are alive."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet) and not each.dead]


@contextmanager
def on_signal(act: Callable[[], object], number: int = signal.SIGALRM) -> Iterator[None]:
    """Call *act* at the signal *number*, and stop the timer at the end."""
    old = signal.signal(number, lambda *_: act())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(number, old)


def greenlets() -> int:
    """Return the number of greenlets that are alive."""
    return len(living())


def threads() -> int:
    """Return the number of native threads for the disk of a spool; the library begins no others in a service."""
    began = []
    for frame in sys._current_frames().values():
        while frame.f_back is not None:
            frame = frame.f_back
        began.append(frame.f_globals.get("__name__"))
    return began.count("geventaudit.spool.disk")


def free_port() -> int:
    with std_socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Receiver:
    """The process of ``receiver.py``, to be started, stopped and killed."""

    def __init__(self, folder: Path, kind: str = "unix") -> None:
        self.kind = kind
        self.where = str(folder / "agent.sock") if kind == "unix" else str(free_port())
        self.out = folder / "numbers"
        self.out.touch()
        self.process: Any = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "receiver.py"), self.kind, self.where, str(self.out)],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout.readline() == b"ready\n"

    def pause(self) -> None:
        """Let it read nothing more; when this returns, all that it read is stored."""
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout.readline() == b"paused\n"

    def resume(self) -> None:
        self.process.send_signal(signal.SIGUSR2)
        assert self.process.stdout.readline() == b"reading\n"

    def end(self, number: int) -> None:
        """Signal it and wait for its end."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(timeout=30)
            self.process.stdout.close()
            self.process = None

    def numbers(self) -> list[int]:
        return [int(line) for line in self.out.read_text().split()]


@contextmanager
def receiving(folder: Path, kind: str = "unix") -> Iterator[Receiver]:
    receiver = Receiver(folder, kind)
    try:
        yield receiver
    finally:
        receiver.end(9)


def first_arrivals(numbers: list[int]) -> list[int]:
    return list(dict.fromkeys(numbers))
