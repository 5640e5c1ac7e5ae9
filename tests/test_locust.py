"""Real Locust, in a process of its own (importing it patches), loads an agent and reports the result."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import eventually, free_port, once

from geventaudit import Msg
from geventaudit.agent import Agent, Received

pytestmark = once  # Locust patches the process that it has to itself
EXAMPLE = Path(__file__).parent.parent / "examples" / "locustfile.py"


def command(locustfile: Path, host: str, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "locust", "-f", str(locustfile), "--users", "5", "--spawn-rate", "50"),
        *("--host", host, *options),
    ]


def run(locustfile: Path, host: str, *options: str) -> tuple[int, dict[str, Any], str]:
    """Without a page: the exit status, the rows of the statistics by type and name, and the log."""
    process = subprocess.Popen(
        command(locustfile, host, "--headless", "--json", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        out, err = process.communicate(timeout=120)
    return process.returncode, {f"{row['method']} {row['name']}": row for row in json.loads(out)}, err.decode()


def records(got: list[Received]) -> list[Received]:
    return [each for each in got if isinstance(each.message, Msg)]


def test_the_example_headless(socket_path: str) -> None:
    got: list[Received] = []
    with Agent(socket_path, got.append):
        status, rows, log = run(EXAMPLE, f"unix://{socket_path}", "--run-time", "2s")
        assert status == 0, log
        assert "Traceback" not in log
        count = rows["send ReadSecret"]["num_requests"]
        assert count >= 5
        assert rows["deliver ReadSecret"]["num_requests"] == count == len(records(got))
        assert all(row["num_failures"] == 0 for row in rows.values())
        assert set(rows) == {"send ReadSecret", "deliver ReadSecret"}
        # A delivery begins with its send.
        assert rows["deliver ReadSecret"]["total_response_time"] >= rows["send ReadSecret"]["total_response_time"]


LOCUSTFILE = """
import gevent
from locust import constant, task

from geventaudit import AuditType, Msg
from geventaudit.integrations.locust import AuditUser
from locustfile import RECORD


class User(AuditUser):
    wait_time = constant(0.05)
    client_options = {"queue_size": 3}
    close_timeout = 0.1
    rounds = 0
    done = set()

    @task
    def all_of_them(self):
        self.client.send(Msg(AuditType.DATA_PLANE, RECORD.replace(operation_name="Good")))
        self.client.send(Msg(AuditType.DATA_PLANE, RECORD.replace(operation_name="Bad", caller_agent="")))
        self.client.send({"no": "message"})
        self.rounds += 1
        if self.rounds == 5:
            self.done.add(self)
            if len(self.done) == 5:
                gevent.spawn(self.environment.runner.quit)
"""


def test_refused_and_undelivered_records_are_failed_requests(socket_path: str, folder: Path) -> None:
    """The statistics have them as failures; there is no agent."""
    (folder / "refused.py").write_text(f"import sys\nsys.path.append({str(EXAMPLE.parent)!r})\n{LOCUSTFILE}")
    status, rows, log = run(folder / "refused.py", f"unix://{socket_path}", "--run-time", "60s")
    assert status == 1, log
    assert "Traceback" not in log, "a refusal is no accident"
    counts = {name: (row["num_requests"], row["num_failures"]) for name, row in rows.items()}
    sent, refused = counts["send Good"]
    assert refused == sent - 5 * 3 > 0, "each of five users has a queue for three"
    assert counts["deliver Good"] == (15, 15)
    assert counts["send Bad"][0] == counts["send Bad"][1] == counts["send (no operation name)"][1] == sent
    assert set(counts) == {"send Good", "deliver Good", "send Bad", "send (no operation name)"}


@pytest.mark.parametrize("host", ["/run/agent.sock", "tcp://127.0.0.1:many"])
def test_an_invalid_host_ends_the_load_test(host: str) -> None:
    status, rows, log = run(EXAMPLE, host, "--run-time", "60s")
    assert f"host must be unix:///path or tcp://host:port, got '{host}'" in log
    assert (status, rows) == (2, {}), log


@contextmanager
def page(locustfile: Path, host: str) -> Iterator[int]:
    """Locust with its page; the page's port."""
    port = free_port()
    process = subprocess.Popen(
        command(locustfile, host, "--web-host", "127.0.0.1", "--web-port", str(port), "--autostart"),
        stderr=subprocess.PIPE,
        env={**os.environ, "LOCUST_SKIP_NEWS": "1"},
    )
    try:
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_page_shows_sends_and_deliveries(tmp_path: Path) -> None:
    """Over TCP; the agent restarts in the middle."""
    got: list[Received] = []
    pool = gevent.get_hub().threadpool
    with Agent(("127.0.0.1", free_port()), got.append) as agent:
        host, port = agent.address
        with page(EXAMPLE, f"tcp://{host}:{port}") as web:

            def fetch(path: str) -> Any:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{web}{path}", timeout=30) as response:
                        return json.load(response)
                except OSError:
                    return {"stats": []}

            def rows(path: str = "/stats/requests") -> dict[str, Any]:
                return {f"{row['method']} {row['name']}": row for row in pool.apply(fetch, (path,))["stats"]}

            eventually(lambda: rows().get("deliver ReadSecret", {}).get("num_requests", 0) > 10, "deliveries are shown")
            agent.restart()
            seen = rows()["deliver ReadSecret"]["num_requests"]
            eventually(lambda: rows()["deliver ReadSecret"]["num_requests"] > seen + 10, "they go on")
            pool.apply(fetch, ("/stop",))
            final = rows()
            assert final["send ReadSecret"]["num_requests"] == final["deliver ReadSecret"]["num_requests"]
            assert all(row["num_failures"] == 0 for row in final.values())
    assert len(records(got)) >= final["deliver ReadSecret"]["num_requests"]
    pool.kill()
