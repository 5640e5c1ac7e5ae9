"""Fluent Bit's ``out_forward`` sends to this project's agent and to ``geventaudit listen``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fluent_bit import KEY, QUICK, Certificates, FluentBit, fluent_bit, needs_fluent_bit
from gevent import subprocess
from helpers import SERVICE_TREE_ID, eventually, free_port, message

from geventaudit import Client, Msg
from geventaudit.agent import Agent, Received

pytestmark = [needs_fluent_bit, pytest.mark.slow]

RECORDS = 2000
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "acks": {"require_ack_response": "on"},
    "gzip": {"compress": "gzip"},
    "gzip, acks": {"compress": "gzip", "require_ack_response": "on"},
    "options": {"send_options": "on"},
    "integer times": {"time_as_integer": "on"},
    "no metadata": {"retain_metadata_in_forward_mode": "off"},
    "fluentd": {"fluentd_compat": "on"},
}


def forwarding(folder: Path, address: Any, **options: Any) -> Any:
    """Fluent Bit that passes everything on to *address*."""
    where = {"unix_path": address} if isinstance(address, str) else {"host": "localhost", "port": address[1]}
    return fluent_bit(
        folder, outputs=[{"name": "forward", "match": "*", "retry_limit": "no_limits", **where, **options}]
    )


def send(agent: FluentBit) -> None:
    with Client(agent.connect, service_tree_id=SERVICE_TREE_ID, backoff=QUICK, json_safe=True) as client:
        for number in range(RECORDS):
            client.send(message(number), timeout=30.0)
        assert client.flush(30.0)


@contextmanager
def listening(folder: Path, *arguments: str) -> Iterator[Path]:
    """``geventaudit listen`` as a process, and the file of its JSON lines."""
    out = folder / "listened"
    process = subprocess.Popen(
        [sys.executable, "-m", "geventaudit", "listen", "--output", str(out), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stderr is not None
            assert b"listening on" in process.stderr.readline()
            yield out
            process.send_signal(signal.SIGTERM)
            errors = process.stderr.read()
            assert b", 0 refused" in errors, errors[-2000:]
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("name", OPTIONS)
def test_listen(name: str, kind: str, folder: Path) -> None:
    path, port = str(folder / "listen.sock"), free_port()
    arguments = ("--unix", path) if kind == "unix" else ("--tcp", f"127.0.0.1:{port}")
    with (
        listening(folder, *arguments) as out,
        forwarding(folder, path if kind == "unix" else ("127.0.0.1", port), **OPTIONS[name]) as agent,
    ):
        send(agent)
        eventually(lambda: out.read_text().count("\n") >= RECORDS, f"{agent.log()[-2000:]}")
        numbers = [json.loads(line)["Record"]["CustomData"]["n"] for line in out.read_text().splitlines()]
    assert sorted(numbers) == list(range(RECORDS))  # two workers have a connection each


@pytest.mark.parametrize("name", ["default", "acks", "gzip", "gzip, acks"])
@pytest.mark.parametrize("keyed", [False, True], ids=["", "key"])
def test_listen_over_tls(name: str, keyed: bool, folder: Path) -> None:
    certificates, port = Certificates(folder), free_port()
    arguments = ["--tcp", f"127.0.0.1:{port}", "--cert", certificates.certificate_file, "--key", certificates.key_file]
    options = {"tls": "on", "tls.verify": "on", "tls.ca_file": certificates.authority_file, **OPTIONS[name]}
    if keyed:
        key_file = folder / "shared key"
        key_file.write_text(KEY)
        key_file.chmod(0o600)
        arguments += ["--shared-key-file", str(key_file)]
        options |= {"shared_key": KEY, "self_hostname": "fluent-bit"}
    with listening(folder, *arguments) as out, forwarding(folder, ("127.0.0.1", port), **options) as agent:
        send(agent)
        eventually(lambda: out.read_text().count("\n") >= RECORDS, f"{agent.log()[-2000:]}")
        numbers = [json.loads(line)["Record"]["CustomData"]["n"] for line in out.read_text().splitlines()]
    assert sorted(numbers) == list(range(RECORDS))


@pytest.mark.parametrize("kind", ["tls", "key", "users", "tls, key", "tls, users"])
@pytest.mark.parametrize("acks", [False, True], ids=["", "acks"])
def test_the_agent_with_tls_and_keys(kind: str, acks: bool, folder: Path) -> None:
    certificates = Certificates(folder)
    options: dict[str, Any] = {"require_ack_response": "on"} if acks else {}
    agent_options: dict[str, Any] = {}
    if "tls" in kind:
        options |= {"tls": "on", "tls.verify": "on", "tls.ca_file": certificates.authority_file}
        agent_options["ssl"] = certificates.agent()
    if "key" in kind or "users" in kind:
        options |= {"shared_key": KEY, "self_hostname": "fluent-bit"}
        agent_options["shared_key"] = KEY
    if "users" in kind:
        options |= {"username": "ada", "password": "secret"}
        agent_options["users"] = {"ada": "secret"}
    got: list[Received] = []
    with (
        Agent(("127.0.0.1", 0), got.append, **agent_options) as receiver,
        forwarding(folder, receiver.address, **options) as agent,
    ):
        send(agent)
        eventually(lambda: len(numbers(got)) >= RECORDS, f"{agent.log()[-2000:]} {receiver.counts}")
        assert receiver.counts.refused == receiver.counts.broken_streams == 0
    assert sorted(numbers(got)) == list(range(RECORDS))  # two workers have a connection each


@pytest.mark.parametrize("compress", [None, "gzip"])
def test_the_agent_restarts(compress: str | None, folder: Path) -> None:
    """With acknowledgements, Fluent Bit sends records again that it does not know to be delivered."""
    options = {"require_ack_response": "on", **({"compress": compress} if compress else {})}
    got: list[Received] = []
    service = {"scheduler.base": 1, "scheduler.cap": 1}
    with Agent(("127.0.0.1", 0), got.append) as receiver:
        assert isinstance(receiver.address, tuple)
        output = {"name": "forward", "match": "*", "retry_limit": "no_limits", "host": "127.0.0.1", **options}
        with fluent_bit(folder, service=service, outputs=[{**output, "port": receiver.address[1]}]) as agent:
            with Client(agent.connect) as client:
                for number in range(RECORDS):
                    client.send(message(number), timeout=30.0)
                    if number % 500 == 250:
                        assert client.flush(30.0)
                        receiver.restart(timeout=0)
                assert client.flush(30.0)
            eventually(
                lambda: len(set(numbers(got))) == RECORDS, f"{agent.log()[-2000:]} {receiver.counts}", timeout=60
            )


def numbers(got: list[Received]) -> list[int]:
    return [each.message.record.custom_data["n"] for each in got if isinstance(each.message, Msg)]
