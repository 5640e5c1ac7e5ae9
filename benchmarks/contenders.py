"""geventaudit, in several ways, and its peers: each sends the same records, built anew, as fast as one thread can.

Every function sends so many records and returns records per second, from before it connects until the reading process
has read the last byte and the end; every one checks that all arrived. Each sample has a process of its own::

    python -m [gevent.monkey --module] benchmarks.contenders NAME RECORDS
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gevent
import msgpack

import geventaudit
from geventaudit import TCP, Client, Connection, DomainSocket, Msg

from .processes import ROOT, module
from .reader import Reader
from .records import CALLERS, FIRST, TAG, body, frame_of, from_many, from_many_body, message

__all__ = ["CONTENDERS", "Contender", "rate", "why_not"]

_WARM_UP = 1000  # records sent before those that count

_QUEUE = 2048  # geventaudit's default, given to fluent-logger too: its own, 100, makes it slower


# -- geventaudit -------------------------------------------------------------------------------------------------------


def _send_all(
    reader: Reader,
    records: int,
    connect: Callable[[], Connection],
    build: Callable[[int], Msg] = message,
    greenlets: int = 0,
    **options: Any,
) -> tuple[float, int]:
    """Records per second, and the bytes that the reading process read.

    :param greenlets: how many share the records; 0 sends them all from the main greenlet.
    """
    start = time.perf_counter()
    client = Client(connect, queue_size=_QUEUE, **options)

    def send(first: int, step: int) -> None:
        for number in range(FIRST + first, FIRST + records, step):
            client.send(build(number), timeout=None)

    if greenlets:
        gevent.joinall([gevent.spawn(send, first, greenlets) for first in range(greenlets)], raise_error=True)
    else:
        send(0, 1)
    undelivered = client.close(timeout=None)
    total = reader.total()
    seconds = time.perf_counter() - start
    if undelivered:
        raise RuntimeError(f"geventaudit: {len(undelivered)} of {records} were not delivered")
    return records / seconds, total


def _unix(build: Callable[[int], Msg]) -> Callable[[int], float]:
    def run(records: int) -> float:
        def send_all(number: int) -> tuple[float, int]:
            return _send_all(reader, number, lambda: DomainSocket(reader.path), build)

        with Reader() as reader:
            return _checked(records, *_repeat(records, send_all), len(frame_of(build(FIRST))))

    return run


def _tcp(records: int) -> float:
    with Reader(tcp=True) as reader:
        address = ("localhost", reader.port)
        return _checked(records, *_repeat(records, lambda n: _send_all(reader, n, lambda: TCP(address))))


def _tls(records: int) -> float:
    with Reader(tls=True) as reader:
        address, context = ("localhost", reader.port), reader.client_context
        return _checked(records, *_repeat(records, lambda n: _send_all(reader, n, lambda: TCP(address, ssl=context))))


def _acks(records: int) -> float:
    with Reader(acks=True) as reader:  # every one acknowledged: close() handed none back
        return _repeat(records, lambda n: _send_all(reader, n, lambda: DomainSocket(reader.path, require_ack=True)))[0]


def _spool(mode: str | None, greenlets: int = 0) -> Callable[[int], float]:
    def run(records: int) -> float:
        def send_all(number: int) -> tuple[float, int]:
            with tempfile.TemporaryDirectory(prefix="ga-") as folder:
                options = {"spool": vars(geventaudit)["Spool"](f"{folder}/spool", mode=mode)} if mode else {}
                return _send_all(reader, number, lambda: DomainSocket(reader.path), greenlets=greenlets, **options)

        with Reader() as reader:
            return _checked(records, *_repeat(records, send_all))

    return run


def _repeat(records: int, send_all: Callable[[int], tuple[float, int]]) -> tuple[float, int]:
    send_all(_WARM_UP)
    return send_all(records)


def _checked(records: int, rate: float, total: int, length: int = len(frame_of(message(FIRST)))) -> float:
    if total // length != records:  # there is one heartbeat more, which is shorter than a record
        raise RuntimeError(f"geventaudit: {total} bytes are not {records} records")
    return rate


# -- peers -------------------------------------------------------------------------------------------------------------


def _fluent_sender(records: int) -> float:
    from fluent.sender import FluentSender

    return _fluent(records, lambda path: FluentSender(TAG, host=f"unix://{path}"))


def _fluent_async_sender(build: Callable[[int], dict[str, Any]]) -> Callable[[int], float]:
    def run(records: int) -> float:
        from fluent.asyncsender import FluentSender

        return _fluent(records, lambda path: FluentSender(TAG, host=f"unix://{path}", queue_maxsize=_QUEUE), build)

    return run


def _fluent(records: int, sender_to: Callable[[str], Any], build: Callable[[int], dict[str, Any]] = body) -> float:
    def send_all(reader: Reader, records: int) -> float:
        start = time.perf_counter()
        sender = sender_to(reader.path)
        for number in range(FIRST, FIRST + records):
            if not sender.emit(None, build(number)):
                raise RuntimeError(f"fluent-logger refused a record: {sender.last_error}")
        sender.close()
        total = reader.total()
        seconds = time.perf_counter() - start
        _check("fluent-logger", total, records * len(msgpack.packb((TAG, int(time.time()), build(FIRST)))))
        return records / seconds

    with Reader() as reader:
        send_all(reader, _WARM_UP)
        return send_all(reader, records)


def _opentelemetry(part: str) -> Callable[[int], float]:
    """The record as the body, which is taken as it is, or as attributes, which are looked through."""
    return lambda records: _emit_twice(records, part)


def _emit_twice(records: int, part: str) -> float:
    from opentelemetry._logs import LogRecord, SeverityNumber
    from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, InMemoryLogRecordExporter, LogRecordExportResult

    class Forgetful(InMemoryLogRecordExporter):
        """Counts, and forgets from time to time: keeping everything makes the garbage collector slow."""

        exported = 0

        def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
            result = super().export(batch)
            self.exported += len(batch)
            if self.exported % (1 << 12) < len(batch):
                self.clear()
            return result

    def emit_all(records: int) -> float:
        start = time.perf_counter()
        exporter = Forgetful()  # type: ignore[no-untyped-call]
        provider = LoggerProvider(shutdown_on_exit=False)
        # A processor with a shorter queue drops records, and would count as faster for it.
        provider.add_log_record_processor(BatchLogRecordProcessor(exporter, max_queue_size=records))
        logger = provider.get_logger("benchmarks")
        for number in range(FIRST, FIRST + records):
            logger.emit(
                LogRecord(
                    timestamp=time.time_ns(),
                    severity_number=SeverityNumber.INFO,
                    event_name=TAG,
                    body=body(number) if part == "body" else None,
                    attributes=body(number) if part == "attributes" else None,
                )
            )
        provider.shutdown()
        seconds = time.perf_counter() - start
        _check("OpenTelemetry, in records", exporter.exported, records)
        return records / seconds

    emit_all(_WARM_UP)
    return emit_all(records)


def _standard_library(records: int) -> float:
    class Counting(logging.handlers.SocketHandler):
        """A handler that counts the bytes to write: the length of a pickle is not known beforehand."""

        written = 0

        def makePickle(self, record: logging.LogRecord) -> bytes:  # noqa: N802
            pickled = super().makePickle(record)
            self.written += len(pickled)
            return pickled

    def log_all(reader: Reader, records: int) -> float:
        start = time.perf_counter()
        handler = Counting(reader.path, None)
        waiting: queue.Queue[Any] = queue.Queue()
        listener = logging.handlers.QueueListener(waiting, handler)
        logger = logging.Logger("benchmarks", logging.INFO)
        logger.addHandler(logging.handlers.QueueHandler(waiting))
        listener.start()
        for number in range(FIRST, FIRST + records):
            logger.info(TAG, extra={"audit": body(number)})
        listener.stop()
        handler.close()
        total = reader.total()
        seconds = time.perf_counter() - start
        _check("logging", total, handler.written)
        return records / seconds

    with Reader() as reader:
        log_all(reader, _WARM_UP)
        return log_all(reader, records)


def _bare_writes(records: int) -> float:
    frame = frame_of(message(FIRST))
    block = 120
    with Reader() as reader:
        start = time.perf_counter()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(reader.path)
            for _ in range(records // block):
                sock.sendall(frame * block)
        total = reader.total()
        seconds = time.perf_counter() - start
    _check("bare writes", total, records // block * block * len(frame))
    return total / len(frame) / seconds


def _check(peer: str, arrived: int, expected: int) -> None:
    if arrived != expected:
        raise RuntimeError(f"{peer}: {arrived} arrived, not {expected}")


# -- all of them -------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """One way to send records.

    geventaudit is measured as it is used, monkey-patched; its peers in the way that is faster for them.
    """

    run: Callable[[int], float]
    patched: bool
    label: str


CONTENDERS = {
    "geventaudit": Contender(_unix(message), True, "geventaudit"),
    "pure": Contender(_unix(message), True, "geventaudit in plain Python"),
    "many-callers": Contender(_unix(from_many), True, f"geventaudit, {CALLERS:,} callers"),
    "tcp": Contender(_tcp, True, "geventaudit over TCP"),
    "tls": Contender(_tls, True, "geventaudit over TCP with TLS"),
    "acks": Contender(_acks, True, "geventaudit with acknowledgements"),
    "spool-overflow": Contender(_spool("overflow"), True, "geventaudit with a spool for what overflows"),
    "spool-always": Contender(_spool("always"), True, "geventaudit with everything spooled"),
    "greenlets": Contender(_spool(None, 200), True, "geventaudit, 200 greenlets"),
    "spool-always-greenlets": Contender(
        _spool("always", 200), True, "geventaudit with everything spooled, 200 greenlets"
    ),
    "fluent-async": Contender(_fluent_async_sender(body), True, "fluent-logger asyncsender"),
    "fluent-async-threads": Contender(_fluent_async_sender(body), False, "fluent-logger asyncsender, not patched"),
    "fluent-async-many": Contender(
        _fluent_async_sender(from_many_body), True, f"fluent-logger asyncsender, {CALLERS:,} callers"
    ),
    "fluent": Contender(_fluent_sender, False, "fluent-logger sender"),
    "opentelemetry-body": Contender(_opentelemetry("body"), False, "OpenTelemetry, as body"),
    "opentelemetry": Contender(_opentelemetry("attributes"), False, "OpenTelemetry, as attributes"),
    "logging": Contender(_standard_library, False, "logging, QueueHandler and SocketHandler"),
    "bare": Contender(_bare_writes, False, "bare writes of ready bytes"),
}


def why_not(name: str) -> str:
    """Return the reason why this contender cannot run here; empty if it can."""
    if name.startswith("spool") and not hasattr(geventaudit, "Spool"):
        return "this geventaudit has no Spool"
    return ""


def rate(name: str, records: int) -> float:
    """Records per second of one contender, in a process of its own."""
    command = module("contenders", name, str(records), patched=CONTENDERS[name].patched)
    environ = {**os.environ, "PURE_PYTHON": "1"} if name == "pure" else None
    return float(subprocess.check_output(command, cwd=ROOT, text=True, env=environ))


if __name__ == "__main__":
    print(CONTENDERS[sys.argv[1]].run(int(sys.argv[2])))
