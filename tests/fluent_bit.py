"""Fluent Bit as a process of its own: the binary that the environment variable ``FLUENT_BIT`` names.

Without the variable all tests that need it are skipped. Use :func:`fluent_bit`, which ends the process in any case.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from gevent import subprocess
from helpers import eventually, free_port

from geventaudit import TCP, Backoff, DomainSocket

BINARY = os.environ.get("FLUENT_BIT", "")
QUICK = Backoff(initial=0.05, maximum=0.2)
KEY = "a key that both sides know"

_NUMBER = re.compile(rb'\{"n":(\d+)\}')

needs_fluent_bit = pytest.mark.skipif(not BINARY, reason="needs Fluent Bit: FLUENT_BIT names no binary")


class Certificates:
    """A certificate authority, with files for an agent and contexts for its clients."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        own = self._authority.issue_cert("localhost", "127.0.0.1")
        self.authority_file, self.certificate_file, self.key_file = (
            str(folder / name) for name in ("ca.crt", "agent.crt", "agent.key")
        )
        self._authority.cert_pem.write_to_path(self.authority_file)
        own.cert_chain_pems[0].write_to_path(self.certificate_file)
        own.private_key_pem.write_to_path(self.key_file)

    def client(self, *, with_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        if with_certificate:
            self._authority.issue_cert("service@example.com").configure_cert(context)
        return context

    def agent(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context

    @property
    def options(self) -> dict[str, str]:
        """The options of an input of Fluent Bit that speaks TLS."""
        return {"tls": "on", "tls.verify": "off", "tls.crt_file": self.certificate_file, "tls.key_file": self.key_file}


class FluentBit:
    """One Fluent Bit with one Forward input, to be started, stopped and killed.

    Without *outputs* it writes all records to a file, each with its tag as a line of text.

    :param kind: ``unix`` or ``tcp``.
    :param input_options: of its Forward input.
    :param service: options of its service section.
    :param outputs: instead of the file.
    :param configuration: a whole configuration instead, with an input at ``path`` or ``port``.
    """

    def __init__(
        self,
        folder: Path,
        kind: str = "unix",
        *,
        service: dict[str, Any] | None = None,
        outputs: list[dict[str, Any]] | None = None,
        configuration: Callable[[FluentBit], dict[str, Any]] | None = None,
        environment: dict[str, str] | None = None,
        **input_options: Any,
    ) -> None:
        self.kind = kind
        self.path = str(folder / "agent.sock")
        self.port = free_port()
        self.out = folder / "records"
        self._log = folder / "log"
        self._config = folder / "fluent-bit.yaml"
        self._process: Any = None
        self._environment = {**os.environ, **(environment or {})}
        self.file_output = {"name": "file", "match": "*", "path": str(folder), "file": self.out.name}
        if configuration is None:
            where = {"unix_path": self.path} if kind == "unix" else {"listen": "127.0.0.1", "port": self.port}
            options = {key.replace("__", "."): value for key, value in input_options.items()}
            inputs = [{"name": "forward", **where, **options}]
            config = {
                "service": {"flush": 0.2, "grace": 2, **(service or {})},
                "pipeline": {"inputs": inputs, "outputs": outputs or [self.file_output]},
            }
        else:
            config = configuration(self)
        self._config.write_text(json.dumps(config))  # which is YAML too
        self.out.touch()

    def start(self) -> None:
        known = len(self.log())
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [BINARY, "--config", str(self._config)], stdout=log, stderr=log, env=self._environment
            )
        eventually(lambda: self._is_listening(self.log()[known:]), f"Fluent Bit does not listen: {self._log}")

    def _is_listening(self, log: str) -> bool:
        assert self._process.poll() is None, log
        return "listening on" in log and ("[sp]" in log or "[output:" in log)

    def end(self, number: int) -> None:
        """Signal the process and wait for its end."""
        self._process.send_signal(number)
        self._process.wait(timeout=60)
        self._process = None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the process if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            self._process = None

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def connect(self, **options: Any) -> DomainSocket | TCP:
        """Return a new connection to its input."""
        if self.kind == "unix":
            return DomainSocket(self.path, **options)
        return TCP(("127.0.0.1", self.port), **options)

    def lines(self) -> list[tuple[str, str]]:
        """The tag and the JSON text of each record in its file."""
        result = []
        for line in self.out.read_text(errors="surrogateescape").split("\n")[:-1]:
            tag, _, rest = line.partition(": [")
            result.append((tag, rest.partition(", ")[2][:-1]))
        return result

    def records(self) -> list[dict[str, Any]]:
        """The bodies of all records that are no heartbeats, as strict JSON."""
        return [parsed(body) for tag, body in self.lines() if tag != "AsmAuditHB"]

    def numbers(self) -> list[int]:
        """``CustomData.n`` of each record, in the order of its file.

        A kill may cut a line; the next process goes on behind it, in the same line.
        """
        found = []
        for line in self.out.read_bytes().split(b"\n")[:-1]:
            if line.endswith(b"}]") and (number := _NUMBER.match(line.rpartition(b'"CustomData":')[2])):
                found.append(int(number[1]))
        return found

    def settled_numbers(self, seconds: float = 4.0) -> list[int]:
        """:meth:`numbers` after its file has not grown for so many seconds."""
        last, since = -1, time.monotonic()

        def is_settled() -> bool:
            nonlocal last, since
            if (size := self.out.stat().st_size) != last:
                last, since = size, time.monotonic()
            return time.monotonic() - since > seconds

        eventually(is_settled, "Fluent Bit still writes", timeout=120.0)
        return self.numbers()


def parsed(text: str) -> Any:
    """*text* as strict JSON: without NaN and infinities."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@contextmanager
def fluent_bit(folder: Path, kind: str = "unix", **options: Any) -> Iterator[FluentBit]:
    """A running Fluent Bit; see :class:`FluentBit`."""
    agent = FluentBit(folder, kind, **options)
    try:
        agent.start()
        yield agent
    finally:
        agent.kill()


def filesystem(folder: Path) -> dict[str, Any]:
    """Options for an agent that has its acknowledged records on disk."""
    service = {"storage.path": str(folder / "storage"), "storage.sync": "full", "storage.checksum": "off"}
    return {"service": service, "storage__type": "filesystem"}
