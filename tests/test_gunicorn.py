"""Real gunicorn, gevent workers, preloaded: the record of every request that was answered arrives.

The configuration is the example's, with the hooks of :mod:`geventaudit.integrations.gunicorn`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent import socket, subprocess
from helpers import eventually, free_port, message, once

from geventaudit import Client, Msg, NoOp, Spool
from geventaudit.agent import Agent
from geventaudit.integrations.gunicorn import child_exit, worker_exit

pytest.importorskip("gunicorn", reason="needs gunicorn, which the extra [test] brings")
EXAMPLES = Path(__file__).parent.parent / "examples"
REQUESTS = int(os.environ.get("GEVENTAUDIT_REQUESTS", "2000"))


def fetch(port: int, path: str) -> bool:
    """Return True if the request was answered. A worker that ends may reset a connection that it has not accepted."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while more := sock.recv(4096):
                answer += more
        return answer.startswith(b"HTTP/1.1 200") and b"done\n" in answer
    except OSError:
        return False


@contextmanager
def killed_in_the_end(process: Any) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()


def workers_of(master: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]


@contextmanager
def gunicorn(folder: Path, socket_path: str, app: str, *options: str) -> Iterator[tuple[Any, int]]:
    """Run the application and configuration of the example with the module *app*. Yield the process and its port."""
    (folder / "app.py").write_text(app)
    port = free_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "gunicorn", "--config", str(EXAMPLES / "gunicorn.conf.py"), "--preload"),
            *("-k", "gevent", *options, "--chdir", str(folder), "--pythonpath", str(EXAMPLES)),
            *("--bind", f"127.0.0.1:{port}", "--log-level", "warning", "app:application"),
        ],
        env={**os.environ, "AUDIT_SOCKET": socket_path},
        stderr=subprocess.PIPE,
    )
    with server, killed_in_the_end(server):
        eventually(lambda: fetch(port, "/ready"), "gunicorn answers")
        yield server, port


def names_into(arrived: Counter[str]) -> Any:
    def take(received: Any) -> None:
        if isinstance(received.message, Msg):
            arrived[received.message.record.target_resources["Thing"][0].name] += 1

    return take


@once
def test_every_answered_request_is_on_record(socket_path: str, folder: Path) -> None:
    arrived: Counter[str] = Counter()
    # The application of the example; the client has already been used in the master when it forks.
    app = (
        "from gunicorn_app import application\n"
        "application({'PATH_INFO': '/master', 'wsgi.errors': __import__('sys').stderr}, lambda *args: None)\n"
    )
    with Agent(socket_path, names_into(arrived)) as agent:
        options = ("-w", "4", "--max-requests", "150", "--max-requests-jitter", "50")
        with gunicorn(folder, socket_path, app, *options) as (server, port):
            answered: set[str] = set()

            def load(first: int) -> None:
                for number in range(first, REQUESTS, 20):
                    path = f"/{number}"
                    if fetch(port, path):
                        answered.add(path)

            loading = [gevent.spawn(load, first) for first in range(20)]
            while not all(each.ready() for each in loading):
                gevent.sleep(0.3)
                if workers := workers_of(server.pid):
                    os.kill(random.choice(workers), signal.SIGTERM)
                agent.restart()
            server.send_signal(signal.SIGTERM)
            log = server.communicate(timeout=60)[1].decode()
        assert server.returncode == 0, log
        assert "no audit record" not in log
        assert len(answered) > 0.9 * REQUESTS
        eventually(lambda: answered <= set(arrived), f"missing: {len(answered - set(arrived))}", timeout=10)
        twice = sum(arrived.values()) - len(arrived)
        print(f"{len(answered)} answered, {len(arrived)} on record, {twice} twice")
        assert arrived["/master"] <= 1, "the master's record is not the workers'"


@once
def test_workers_drain_within_their_graceful_timeout(socket_path: str, folder: Path) -> None:
    """The agent is away when the workers get the signal to end, and comes a moment later."""
    arrived: Counter[str] = Counter()
    with gunicorn(folder, socket_path, "from gunicorn_app import application\n", "-w", "2") as (server, port):
        answered = {path for number in range(50) if fetch(port, path := f"/{number}")}
        server.send_signal(signal.SIGTERM)
        gevent.sleep(0.5)
        assert server.poll() is None, "they wait for the agent"
        with Agent(socket_path, names_into(arrived)):
            log = server.communicate(timeout=60)[1].decode()
            assert server.returncode == 0, log
            eventually(lambda: answered <= set(arrived), f"missing: {len(answered - set(arrived))}", timeout=10)
    assert len(answered) == 50


@once
def test_records_in_the_spools_of_workers_are_sent_by_the_next(socket_path: str, folder: Path) -> None:
    """The agent stays away; one worker is killed, the others have to end. The next start finds its agent."""
    app = (
        "import gunicorn_app\n"
        "from geventaudit import Client, DomainSocket, Spool\n"
        "from gunicorn_app import application\n"
        f"spool = Spool({str(folder / 'audit-{pid}')!r}, mode='always')\n"
        f"gunicorn_app.client = Client(lambda: DomainSocket({socket_path!r}), spool=spool)\n"
    )
    with gunicorn(folder, socket_path, app, "-w", "3", "--graceful-timeout", "2") as (server, port):
        answered = {path for number in range(60) if fetch(port, path := f"/{number}")}
        os.kill(workers_of(server.pid)[0], signal.SIGKILL)
        answered |= {path for number in range(60, 100) if fetch(port, path := f"/{number}")}
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=60)[1].decode()
        assert server.returncode == 0, log
    assert len(answered) > 90
    arrived: Counter[str] = Counter()
    with (
        Agent(socket_path, names_into(arrived)),
        gunicorn(folder, socket_path, app, "-w", "3") as (server, port),
    ):
        eventually(lambda: fetch(port, "/again") and answered <= set(arrived), "what was left arrives")
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        assert server.returncode == 0


def spooling(folder: Path, socket_path: str, mode: str) -> str:
    return (
        "import gevent, gunicorn_app\n"
        "from geventaudit import Backoff, Client, DomainSocket, Spool\n"
        f"spool = Spool({str(folder / 'audit-{pid}')!r}, mode={mode!r})\n"
        "gunicorn_app.client = Client(\n"
        f"    lambda: DomainSocket({socket_path!r}), backoff=Backoff(initial=0.1, maximum=0.2), spool=spool\n"
        ")\n"
        "def app(environ, start_response):\n"
        "    answer = gunicorn_app.application(environ, start_response)\n"
        "    gevent.sleep(3.0 if environ['PATH_INFO'] == '/slow' else 0.0)\n"
        "    return answer\n"
        "application = app\n"
    )


@once
def test_the_spool_of_a_killed_worker_is_sent_without_another_request(socket_path: str, folder: Path) -> None:
    """By the worker in its place, when it starts; gunicorn's log says which spool that is."""
    arrived: Counter[str] = Counter()
    with gunicorn(folder, socket_path, spooling(folder, socket_path, "always"), "-w", "1") as (server, port):
        answered = {path for number in range(50) if fetch(port, path := f"/{number}")}
        (killed,) = workers_of(server.pid)
        os.kill(killed, signal.SIGKILL)
        with Agent(socket_path, names_into(arrived)):
            eventually(lambda: answered <= set(arrived), "its replacement sends them", timeout=20)
            server.send_signal(signal.SIGTERM)
            log = server.communicate(timeout=60)[1].decode()
    assert len(answered) == 50
    assert f"Worker (pid:{killed}) left the spool {folder}/audit-{killed}" in log
    assert not list(folder.glob("audit-*")), "what is delivered is no file"


def test_the_log_names_each_spool_of_a_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, though two clients may have left it; a worker has a folder with a number if another one was taken."""
    lines: list[str] = []
    server = SimpleNamespace(log=SimpleNamespace(warning=lambda text, *values: lines.append(text % values)))
    clients = [
        Client(NoOp, spool=spool) for spool in (Spool(folder / "a[1]-{pid}"), Spool(folder / "a[1]-{pid}"), None)
    ]
    monkeypatch.setattr("geventaudit.integrations.gunicorn.live_clients", lambda: clients)
    for name in ("47", "47.2", "471", "4"):
        (folder / f"a[1]-{name}").mkdir()
    child_exit(server, SimpleNamespace(pid=47))
    assert [line.split(";")[0] for line in lines] == [
        f"Worker (pid:47) left the spool {folder}/a[1]-{name}" for name in ("47", "47.2")
    ]


@once
def test_a_slow_request_leaves_time_to_keep_undelivered_records(socket_path: str, folder: Path) -> None:
    """The request uses most of the graceful timeout, and there is no agent."""
    options = ("-w", "1", "--graceful-timeout", "6")
    with gunicorn(folder, socket_path, spooling(folder, socket_path, "overflow"), *options) as (server, port):
        answered = {path for number in range(50) if fetch(port, path := f"/{number}")}
        slow = gevent.spawn(fetch, port, "/slow")
        gevent.sleep(0.5)  # until it has begun
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=60)[1].decode()
        assert slow.get(), "it was answered"
    assert len(answered) == 50
    assert "SIGKILL" not in log
    assert "undelivered" not in log, "it is in the spool"
    arrived: Counter[str] = Counter()
    with (
        Agent(socket_path, names_into(arrived)),
        gunicorn(folder, socket_path, spooling(folder, socket_path, "overflow"), "-w", "1") as (server, port),
    ):
        eventually(lambda: answered | {"/slow"} <= set(arrived), "what was left arrives")
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


@once
def test_a_quick_shutdown_keeps_undelivered_records(socket_path: str, folder: Path) -> None:
    """Ctrl+C reaches the master and the worker. The worker gets two signals, and ends in the middle of draining."""
    app = spooling(folder, socket_path, "overflow")
    # One worker, which is ready then: gunicorn loses a signal to a worker that boots.
    with gunicorn(folder, socket_path, app, "-w", "1", "--graceful-timeout", "8") as (server, port):
        answered = {path for number in range(50) if fetch(port, path := f"/{number}")}
        for pid in [server.pid, *workers_of(server.pid)]:
            os.kill(pid, signal.SIGINT)
        log = server.communicate(timeout=60)[1].decode()
    assert len(answered) == 50
    assert "SIGKILL" not in log
    arrived: Counter[str] = Counter()
    with Agent(socket_path, names_into(arrived)), gunicorn(folder, socket_path, app, "-w", "1") as (server, port):
        eventually(lambda: answered <= set(arrived), f"what was left arrives: {log}")
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)


@once
def test_an_aborted_worker_keeps_undelivered_records(socket_path: str, folder: Path) -> None:
    """The worker blocks its hub for longer than ``timeout``, without an agent; gunicorn kills it a second later."""
    app = spooling(folder, socket_path, "overflow") + (
        "def application(environ, start_response):\n"
        "    answer = app(environ, start_response)\n"
        "    gevent.monkey.get_original('time', 'sleep')(30 if environ['PATH_INFO'] == '/stuck' else 0)\n"
        "    return answer\n"
    )
    arrived: Counter[str] = Counter()
    with gunicorn(folder, socket_path, app, "-w", "1", "--timeout", "3") as (server, port):
        answered = {path for number in range(50) if fetch(port, path := f"/{number}")}
        (aborted,) = workers_of(server.pid)
        assert not fetch(port, "/stuck")
        eventually(lambda: aborted not in workers_of(server.pid), "gunicorn puts another in its place")
        with Agent(socket_path, names_into(arrived)):
            eventually(lambda: answered <= set(arrived), "which sends what the other has kept", timeout=20)
            server.send_signal(signal.SIGTERM)
            log = server.communicate(timeout=60)[1].decode()
    assert len(answered) == 50
    assert "WORKER TIMEOUT" in log


@once
def test_without_a_spool_lost_records_are_logged(socket_path: str, folder: Path) -> None:
    options = ("-w", "1", "--graceful-timeout", "2")
    with gunicorn(folder, socket_path, "from gunicorn_app import application\n", *options) as (server, port):
        assert all(fetch(port, f"/{number}") for number in range(9))
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=60)[1].decode()
    assert "ends with 10 audit records undelivered" in log  # the tenth is the one by which gunicorn was found ready


def test_the_master_closes_no_client() -> None:
    """gunicorn calls worker_exit in the master too, for a worker with a process that has ended."""
    with Client(NoOp) as client:
        worker_exit(None, SimpleNamespace(pid=os.getpid() + 1))
        client.send(message(1))
