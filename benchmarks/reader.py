"""The reading process: reads far faster than any contender can write, and counts the bytes.

``python -m benchmarks.reader FOLDER [--acks] [--tls]`` serves one connection after the other, and says on standard
output how many bytes each had brought when it ended.
"""

from __future__ import annotations

import argparse
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import msgpack

from .processes import ROOT, module, move_elsewhere

__all__ = ["Reader"]

_CHUNK = b"\xa5chunk"  # the last key of a message that is to be acknowledged


class Reader:
    """The process, started; for one connection at a time.

    :param acks: acknowledge, and find the chunk to acknowledge without unpacking.
    :param tcp: listen on a TCP port of this host; otherwise on a Unix socket.
    :param tls: speak TLS, over TCP.
    """

    def __init__(self, *, acks: bool = False, tcp: bool = False, tls: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ga-")  # short: a Unix socket's path ends at 107 bytes
        folder = Path(self._folder.name)
        self.path = str(folder / "socket")
        self.port = 0
        command = module("reader", self._folder.name)
        if acks:
            command.append("--acks")
        if tcp or tls:
            command.append("--tcp")
        if tls:
            self.client_context = _certify(folder)
            command.append("--tls")
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = self._answer()

    def total(self) -> int:
        """Bytes that the connection had brought that ended next; waits for its end."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the reading process ended")
        return int(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _certify(folder: Path) -> ssl.SSLContext:
    """Leave a certificate for localhost in *folder*; the context of clients that trust it."""
    import trustme

    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(folder / "certificate")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def _serve(folder: Path, *, acks: bool, tcp: bool, tls: bool) -> None:
    move_elsewhere()
    listener: socket.socket
    if tcp:
        listener = socket.create_server(("127.0.0.1", 0))
        where = listener.getsockname()[1]
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(folder / "socket"))
        listener.listen()
        where = 0
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "certificate")
        listener = context.wrap_socket(listener, server_side=True)
    print(where, flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            print(_acknowledge(connection) if acks else _count(connection), flush=True)


def _count(connection: socket.socket) -> int:
    buffer = bytearray(1 << 20)
    total = 0
    while received := connection.recv_into(buffer):
        total += received
    return total


def _acknowledge(connection: socket.socket) -> int:
    total = 0
    rest = b""
    while data := connection.recv(1 << 20):
        total += len(data)
        data = rest + data
        answers = []
        end = 0
        while (key := data.find(_CHUNK, end)) >= 0:
            unpacker = msgpack.Unpacker()
            unpacker.feed(data[key + len(_CHUNK) : key + len(_CHUNK) + 256])
            try:
                answers.append(msgpack.packb({"ack": unpacker.unpack()}))
            except msgpack.OutOfData:
                break
            end = key + len(_CHUNK) + unpacker.tell()
        rest = data[max(end, len(data) - 256) :]  # a key, or the chunk behind it, may be cut in two
        if answers:
            connection.sendall(b"".join(answers))
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reader")
    parser.add_argument("folder", type=Path)
    for option in ("--acks", "--tcp", "--tls"):
        parser.add_argument(option, action="store_true")
    _serve(**vars(parser.parse_args()))
