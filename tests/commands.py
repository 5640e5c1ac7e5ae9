"""Commands as processes. One process imports the command line and forks the others, in a tenth of the time.

Tests of the start of a command (``python -m``, closed streams, a terminal, an encoding) begin Python anew instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket as std_socket
import sys
from collections.abc import Iterator
from typing import Any

import gevent
from gevent import socket, subprocess
from gevent.fileobject import FileObject
from helpers import HERE

PIPE = subprocess.PIPE
_servers: list[Any] = []


class Command:
    """A running command, with the methods and attributes of ``subprocess.Popen`` that tests use."""

    def __init__(self, control: Any, request: dict[str, Any], stdin: int, stdout: int) -> None:
        self.returncode: int | None = None
        self._result, result = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs, ours = [], []
        for number, given in enumerate((stdin, stdout, PIPE)):
            if given != PIPE:
                theirs.append(os.dup(given))
                ours.append(None)
                continue
            read, write = os.pipe()
            theirs.append(read if number == 0 else write)
            ours.append(FileObject(write, "wb") if number == 0 else FileObject(read, "rb"))
        self.stdin, self.stdout, self.stderr = ours
        std_socket.send_fds(control, [json.dumps(request).encode()], [*theirs, result.fileno()])
        result.close()
        for each in theirs:
            os.close(each)
        self.pid = self._number()

    def _number(self) -> int:
        message = self._result.recv(100)
        assert message, "the server of commands has ended"
        return int(message)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal. Raise an error after *timeout* seconds."""
        if self.returncode is None:
            with gevent.Timeout(timeout, subprocess.TimeoutExpired("geventaudit", timeout)):
                self.returncode = os.waitstatus_to_exitcode(self._number())
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.001)
        return self.returncode

    def communicate(self, given: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Write *given*, close the input, read both outputs to their end, and wait for the exit code."""
        reading = [gevent.spawn(each.read) for each in (self.stdout, self.stderr) if each is not None]
        try:
            with gevent.Timeout(timeout, subprocess.TimeoutExpired("geventaudit", timeout)):
                with contextlib.suppress(BrokenPipeError):
                    if given:
                        self.stdin.write(given)
                    self.stdin.close()
                outputs = [each.get() for each in reading]
                self.wait()
        finally:
            gevent.killall(reading)
        return (b"" if self.stdout is None else outputs[0]), outputs[-1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        for each in (self.stdout, self.stderr, self.stdin):
            if each is not None:
                with contextlib.suppress(BrokenPipeError):
                    each.close()
        self.wait()
        self._result.close()


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Run the process that forks commands."""
    ours, theirs = std_socket.socketpair(std_socket.AF_UNIX, std_socket.SOCK_SEQPACKET)
    program = [sys.executable, "-X", "dev", "-W", "error", str(HERE / "command_server.py"), str(theirs.fileno())]
    # Its standard streams are pipes, as those of most commands.
    options: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "pass_fds": [theirs.fileno()]}
    with ours, subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(HERE.parent)}, **options) as process:
        theirs.close()
        _servers.append(ours)
        yield
        _servers.remove(ours)
        ours.close()
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")


def command(*arguments: str, stdin: int = PIPE, stdout: int = PIPE, cwd: Any = ".", **environment: str) -> Command:
    """Begin ``geventaudit`` with these arguments, and with *environment* beside that of the tests."""
    environment = {**os.environ, **environment}
    request = {"arguments": arguments, "folder": os.path.abspath(cwd), "environment": environment}
    return Command(_servers[-1], request, stdin, stdout)


def run(*arguments: str, given: bytes = b"", **options: Any) -> tuple[int, str, str]:
    """Run ``geventaudit``. Return its exit code, its output and its errors."""
    with command(*arguments, **options) as process:
        out, err = process.communicate(given, timeout=60)
    return process.wait(), out.decode(), err.decode()
