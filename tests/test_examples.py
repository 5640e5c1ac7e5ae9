"""Every example runs, as its first lines say."""

from __future__ import annotations

import os
import re
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import eventually, free_port

from geventaudit import Msg
from geventaudit.agent import Agent

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLES / name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return str(out.decode())


def test_every_example_is_tested() -> None:
    """In this module, and locustfile.py in test_locust."""
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {
        "quickstart.py", "notifications.py", "gunicorn_app.py", "gunicorn.conf.py", "audit_logging.py", "metrics.py",
        "locustfile.py", "flask_app.py", "django_app.py", "test_audit_trail.py",
    }  # fmt: skip


def test_quickstart() -> None:
    out = run("quickstart.py")
    assert "arrived: Msg(type=<AuditType.CONTROL_PLANE: 'AsmAuditCP'>" in out
    assert "delivered: True" in out


def test_notifications() -> None:
    out = run("notifications.py")
    words = ("connect failed", "connected", "connection lost", "connected", "closed")
    positions = [out.index(words[0])]
    for word in words[1:]:
        positions.append(out.index(f"\n{word} -", positions[-1]))


def test_audit_logging() -> None:
    out = run("audit_logging.py")
    assert out.count("arrived: Msg(") == 1
    assert "operation_name='ReadSecret'" in out


def test_metrics() -> None:
    out = run("metrics.py")
    assert re.search(r"arrived: Msg.*'trace_id': '[0-9a-f]{32}', 'span_id': '[0-9a-f]{16}'", out)
    assert "OpenTelemetry: messages_sent 1\n" in out
    assert "\ngeventaudit_messages_sent_total 1.0\n" in out


def test_audit_trail() -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "pytest", "-p", "no:cacheprovider"]
    process = subprocess.Popen([*command, "test_audit_trail.py"], cwd=EXAMPLES, stdout=subprocess.PIPE)
    with process:
        out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, out
    assert "2 passed" in out


def test_gunicorn(socket_path: str) -> None:
    pytest.importorskip("gunicorn", reason="needs gunicorn, which the extra [test] brings")
    got: list[Any] = []
    port = free_port()
    with Agent(socket_path, got.append):
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "--config", str(EXAMPLES / "gunicorn.conf.py")),
                *("--chdir", str(EXAMPLES), "--bind", f"127.0.0.1:{port}", "gunicorn_app:application"),
            ],
            env={**os.environ, "AUDIT_SOCKET": socket_path},
            stderr=subprocess.PIPE,
        )
        with server:

            def fetch(number: int) -> Any:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{number}", timeout=30) as response:
                    return response.read()

            pool = gevent.get_hub().threadpool

            def answers() -> bool:
                try:
                    return bool(pool.apply(fetch, (0,)) == b"done\n")
                except OSError:
                    return False

            eventually(answers, "gunicorn answers")
            assert all(each == b"done\n" for each in pool.map(fetch, range(1, 101)))
            server.send_signal(signal.SIGTERM)
            log = server.communicate(timeout=60)[1].decode()
        assert server.returncode == 0, log
        assert "no audit record" not in log
        records = [each.message.record for each in got if isinstance(each.message, Msg)]
        names = [each.target_resources["Thing"][0].name for each in records]
        assert {f"/{number}" for number in range(101)} <= set(names)
    pool.kill()
