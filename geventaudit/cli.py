"""The command line: ``geventaudit listen | send | check | demo``.

Exit status: 0 when all went well, 1 when messages were refused or not delivered, 2 for bad arguments and for addresses
that cannot be reached or listened on.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn, TextIO

import gevent
from gevent.event import Event
from gevent.fileobject import FileObjectThread

from .agent import Agent, Received, Refused
from .backoff import Backoff
from .client import Client
from .connections import TCP, Connection, DomainSocket, usual_path
from .errors import AuditError, ConnectionFailedError, QueueFullError, ValidationError
from .records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Heartbeat,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from .schemas import MsgSchema, by_record
from .version import __version__

__all__ = ["main"]


class _CommandError(Exception):
    """Ends the program with one line and a status."""

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="geventaudit: %(message)s", level=logging.WARNING)
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (_CommandError, AuditError) as error:
        print(f"geventaudit: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; keep the interpreter from complaining about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"geventaudit: cannot write the output: {error.strerror or error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="geventaudit", description="Audit trails for gevent services.")
    parser.add_argument("--version", action="version", version=f"geventaudit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    listen = commands.add_parser("listen", help="receive records and print them")
    _add_address(listen, "listen on")
    listen.add_argument("--output", metavar="FILE.jsonl", help="append each record to this file, as a JSON line")
    listen.set_defaults(run=_listen)

    send = commands.add_parser("send", help="validate and send JSON lines")
    send.add_argument("file", metavar="FILE", help='one message a line, by wire names; "-" for standard input')
    _add_address(send, "send to")
    send.add_argument("--service-tree-id", metavar="UUID", help="the service that the records are of")
    send.add_argument(
        "--timeout",
        type=_seconds,
        default=20.0,
        help="seconds for connecting, for room on the queue, and for the last deliveries (20)",
    )
    send.set_defaults(run=_send)

    check = commands.add_parser("check", help="validate JSON lines, send nothing")
    check.add_argument("file", metavar="FILE", help='one message a line, by wire names; "-" for standard input')
    check.set_defaults(run=_check)

    demo = commands.add_parser("demo", help="watch records survive an agent that restarts")
    demo.add_argument("--records", type=int, default=15_000, help="records to send in all (15000)")
    demo.set_defaults(run=_demo)
    return parser


def _add_address(parser: argparse.ArgumentParser, what: str) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--unix", metavar="PATH", help=f"{what} this Unix socket (without --tcp: mdsd's usual one)")
    either.add_argument("--tcp", metavar="HOST:PORT", type=_host_and_port, help=f"{what} this TCP address")


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    host = host.removeprefix("[").removesuffix("]")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text[:60]!r}: {error}") from None
    return host, int(port)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


# -- listen ------------------------------------------------------------------------------------------------------------


def _listen(arguments: argparse.Namespace) -> int:
    address = arguments.tcp or (usual_path() if arguments.unix is None else arguments.unix)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the terminal can show
    with contextlib.ExitStack() as stack:
        output: TextIO | None = None
        if arguments.output:
            try:
                output = stack.enter_context(open(arguments.output, "a", encoding="utf-8"))
            except OSError as error:
                raise _CommandError(f"cannot write {arguments.output}: {error.strerror}") from None
        done = Event()
        trouble: list[Exception] = []

        def show(received: Received) -> None:
            try:
                print(_line_of(received), flush=True)
                if output is not None and isinstance(received.message, Msg):
                    print(json.dumps(_json_of(received), ensure_ascii=False), file=output, flush=True)
            except (OSError, ValueError) as error:  # a closed pipe, a full disk: nothing was stored, so do not go on
                trouble.append(error)
                done.set()
                raise

        def complain(refused: Refused) -> None:
            print(f"refused {refused.tag!r}: {refused.error}", file=sys.stderr, flush=True)

        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(gevent.signal_handler(number, done.set).cancel)
        try:
            agent = stack.enter_context(Agent(address, show, on_refused=complain))
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _CommandError(f"cannot listen on {_name_of(address)}: {reason}") from None
        print(f"listening on {_name_of(agent.address)}", file=sys.stderr, flush=True)
        done.wait()
        agent.stop(0.0 if trouble else 1.0)
        counts = agent.counts
        print(f"{counts.messages} messages received, {counts.refused} refused", file=sys.stderr)
        if trouble:
            if output is not None:
                with contextlib.suppress(OSError):
                    output.close()  # tries to write what it could not, once more
            raise (
                trouble[0]
                if isinstance(trouble[0], BrokenPipeError)
                else _CommandError(f"cannot store: {trouble[0]}", 1)
            )
    return 0


def _name_of(address: str | tuple[str, int]) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _line_of(received: Received) -> str:
    message = received.message
    moment = _moment(received.time)
    if not isinstance(message, Msg):
        destination = f" via {message.destination}" if isinstance(message, Heartbeat) else ""
        return f"{moment} {type(message).__name__}{destination}"
    record = message.record
    who = ", ".join(one.identity for each in record.caller_identities.values() for one in each)
    what = ", ".join(
        f"{kind}/{one.name}" for kind, targets in record.target_resources.items() for one in targets
    ) or ", ".join(record.target_resources)
    line = (
        f"{moment} {_schema.dump(message)['Type']} {record.operation_name} {record.operation_result}: "
        f"{who} from {record.caller_ip_address} on {what}"
    )
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in line)


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}"


_schema = MsgSchema()


def _json_of(received: Received) -> Any:
    plain = _schema.dump(received.message)
    return {
        "Time": received.time,
        **({} if received.service_tree_id is None else {"env_ikey": received.service_tree_id}),
        "Type": plain["Type"],
        "Record": _jsonable(plain["Record"]),
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_jsonable(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value if value is None or isinstance(value, str | int | float) else repr(value)


# -- send and check ----------------------------------------------------------------------------------------------------


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers. Waiting for standard input blocks nobody else."""
    try:
        if path == "-" and sys.stdin is None:
            raise OSError(errno.EBADF, "standard input is closed")
        descriptor = sys.stdin.fileno() if path == "-" else os.open(path, os.O_RDONLY)
        file: Any = FileObjectThread(descriptor, "rb", closefd=path != "-")
    except OSError as error:
        raise _CommandError(f"cannot read {path}: {error.strerror}") from None
    with contextlib.closing(file):
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
        except OSError as error:  # a directory, say
            raise _CommandError(f"cannot read {path}: {error.strerror}") from None


def _each_message(path: str, use: Callable[[Any], object]) -> tuple[int, int]:
    """Give every line to *use*; how many it took, and how many it refused (and which, on standard error)."""
    good = bad = 0
    for number, line in _lines(path):
        try:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValidationError({"_schema": [f"not JSON: {error}"]}) from None
            use(message)
            good += 1
        except (ValidationError, QueueFullError) as error:
            bad += 1
            print(f"line {number}: {error}", file=sys.stderr)
    return good, bad


def _check(arguments: argparse.Namespace) -> int:
    def load(message: Any) -> None:
        try:
            _schema.load(message)
        except ValidationError as error:
            raise ValidationError(by_record(error.messages)) from None  # the paths that send would show

    good, bad = _each_message(arguments.file, load)
    print(f"{good} valid, {bad} refused")
    return 1 if bad else 0


def _send(arguments: argparse.Namespace) -> int:
    def factory() -> Connection:
        timeout = max(arguments.timeout, 0.001)
        return TCP(arguments.tcp, timeout=timeout) if arguments.tcp else DomainSocket(arguments.unix, timeout=timeout)

    def send(message: Any) -> None:
        client.send(message, timeout=arguments.timeout)

    client = Client(factory, service_tree_id=arguments.service_tree_id, backoff=Backoff(initial=0.1, maximum=5.0))
    try:
        try:
            connection = factory()  # before anything is read, and without the patience of a service
        except ConnectionFailedError as error:
            raise _CommandError(str(error)) from None
        connection.close()
        good, bad = _each_message(arguments.file, send)
    finally:
        undelivered = client.close(arguments.timeout)
    print(f"{good - len(undelivered)} delivered, {len(undelivered)} not delivered, {bad} refused")
    return 1 if bad or undelivered else 0


# -- demo --------------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    """The main job in one process: greenlets send, the agent is restarted under them, nothing is lost."""
    if arguments.records < 1:
        raise _CommandError(f"argument --records: must be at least 1, got {arguments.records}")
    arrived: Counter[int] = Counter()
    samples: list[str] = []

    def receive(received: Received) -> None:
        if isinstance(received.message, Msg):
            arrived[received.message.record.custom_data["number"]] += 1
            if len(samples) < 3:
                samples.append(_line_of(received))

    with tempfile.TemporaryDirectory(prefix="geventaudit-") as folder:
        path = os.path.join(folder, "agent.sock")
        agent = Agent(path, receive).start()
        client = Client(lambda: DomainSocket(path), backoff=Backoff(initial=0.05, maximum=0.5), queue_size=4096)
        began = time.monotonic()
        greenlets = min(300, arguments.records)
        print(f"{greenlets} greenlets send {arguments.records} records to an agent that is restarted twice ...")
        senders = [
            gevent.spawn(_demo_sender, client, range(first, arguments.records, greenlets)) for first in range(greenlets)
        ]
        restarts = 0
        while restarts < 2 or not _all_done(senders):
            gevent.sleep(0.02)
            if restarts < 2 and len(arrived) >= arguments.records * (restarts + 1) // 3:
                agent.restart(timeout=0)  # what it had not read is gone, as when an agent crashes
                restarts += 1
                print(f"  {len(arrived)} arrived; the agent was restarted")
        delivered = client.flush(timeout=30)
        seconds = time.monotonic() - began
        client.close()
        agent.stop()
        stats = client.stats()
    lost = arguments.records - len(arrived)
    print("  all delivered\n" if delivered else "  not all was delivered in time\n")
    for name, value in (
        ("accepted", stats.accepted),
        ("delivered", stats.delivered),
        ("resent", stats.resent),
        ("lost", lost),
        ("duplicates", sum(arrived.values()) - len(arrived)),
        ("records/s, validated on both sides", round(stats.delivered / seconds)),
    ):
        print(f"  {name:<36}{value:>8}")
    print("\nSome of them, as they arrived:")
    for line in samples:
        print(f"  {line}")
    return 0 if delivered and not lost else 1


def _all_done(greenlets: Sequence[Any]) -> bool:
    """Whether all have ended; an error in one of them is raised here."""
    for greenlet in greenlets:
        if greenlet.exception is not None:
            raise greenlet.exception
    return all(greenlet.ready() for greenlet in greenlets)


def _demo_sender(client: Client, numbers: range) -> None:
    template = Record(
        operation_name="RotateKey",
        operation_categories=[OperationCategory.KEY_MANAGEMENT],
        operation_type=OperationType.UPDATE,
        operation_result=OperationResult.SUCCESS,
        operation_access_level="Contributor",
        caller_agent=f"geventaudit-demo/{__version__}",
        caller_ip_address="192.0.2.7",
        caller_identities={CallerIdentityType.UPN: [CallerIdentity("user@example.com", "the caller")]},
        caller_access_levels=["Contributor"],
        target_resources={"Vault": [TargetResource("demo-vault", region="westeurope")]},
    )
    for number in numbers:
        client.send(Msg(AuditType.CONTROL_PLANE, template.replace(custom_data={"number": number})), timeout=30.0)
