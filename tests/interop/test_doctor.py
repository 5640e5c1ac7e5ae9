"""``geventaudit doctor`` and ``send`` against the real Fluent Bit: healthy, stopped, paused, with TLS and a key."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess
from helpers import eventually, free_port
from test_cli import GOOD, lines, run
from test_cli_options import Files

FLUENT_BIT = os.environ.get("FLUENT_BIT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("command_server"),
    pytest.mark.skipif(not FLUENT_BIT, reason="needs the path of Fluent Bit in the variable FLUENT_BIT"),
]

TLS = """
      tls: on
      tls.verify: off
      tls.crt_file: {0}/agent.crt
      tls.key_file: {0}/agent.key"""
KEY = """
      self_hostname: fluent-bit
      shared_key: the shared key ü
      security.users: ada the-password"""
# Options of the input, and those of the command line.
KINDS = {
    "unix": ("", ""),
    "tcp": ("", ""),
    "tls": (TLS, "--ca @ca.pem"),
    "user": (KEY, "--shared-key-file @key.txt --username ada --password-file @fluent-password.txt"),
}


@pytest.fixture
def files(folder: Path) -> Files:
    (folder / "fluent-password.txt").write_text("the-password\n")
    return Files(folder)


@contextlib.contextmanager
def fluent_bit(files: Files, kind: str, options: str = "", output: str = "name: 'null'") -> Iterator[tuple[Any, Any]]:
    """Run Fluent Bit with a forward input, and yield its process and the options of its address."""
    folder, port = files.folder, free_port()
    place = f"unix_path: {folder}/agent.sock" if kind == "unix" else f"listen: 127.0.0.1\n      port: {port}"
    (folder / "fluent-bit.yaml").write_text(
        f"""
service:
  flush: 1
  log_level: info
pipeline:
  inputs:
    - name: forward
      {place}{options.format(folder)}
  outputs:
    - {output}
      match: '*'
"""
    )
    address = ["--unix", f"{folder}/agent.sock"] if kind == "unix" else ["--tcp", f"127.0.0.1:{port}"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [FLUENT_BIT, "-c", str(folder / "fluent-bit.yaml")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: "listening on" in log_of(files))
        yield process, address
    finally:
        process.kill()
        process.wait(timeout=30)


def log_of(files: Files) -> str:
    return (files.folder / "log").read_text(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_examines_fluent_bit(kind: str, files: Files) -> None:
    theirs, ours = KINDS[kind]
    with fluent_bit(files, kind, theirs) as (process, address):
        options = [*address, *files.options(ours), "--require-ack"]
        status, out, err = run("doctor", *options)
        assert (status, err) == (0, ""), out
        assert out.splitlines()[-1] == "ok      it acknowledges: require_ack=True can be used"
        status, out, err = run("send", str(files.folder / "records.jsonl"), *options)
        assert (status, out) == (0, "1 delivered, 0 not delivered, 0 refused\n"), err
        process.send_signal(signal.SIGSTOP)
        status, out, err = run("doctor", *options)
        assert (status, err) == (1, "")
        assert "stopped" in out.splitlines()[-1]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_the_doctor_names_a_paused_input_of_fluent_bit(kind: str, files: Files) -> None:
    output = "name: http\n      host: 127.0.0.1\n      port: 1\n      retry_limit: no_limits"
    with fluent_bit(files, kind, "\n      mem_buf_limit: 100K", output) as (_, address):
        (files.folder / "many.jsonl").write_bytes(lines(GOOD) * 3000)
        status, out, _ = run("send", str(files.folder / "many.jsonl"), *address, "--require-ack", "--timeout", "3")
        assert status == 1, "not all has room"
        eventually(lambda: "forward.0 paused (mem buf overlimit" in log_of(files))
        status, out, err = run("doctor", *address)
        assert (status, err) == (1, "")
        assert "its input is paused: Fluent Bit pauses an input at mem_buf_limit" in out.splitlines()[-1]
