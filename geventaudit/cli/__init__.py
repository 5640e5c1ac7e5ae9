"""The command line: ``geventaudit listen | send | check | spool | schema | doctor | completion | demo``.

Exit status: 0 when all went well; 1 when messages were refused, damaged or not delivered, or when the doctor found a
fault; 2 for bad arguments, for addresses that cannot be reached or listened on, and for spools that cannot be opened.

Read ``terminal``, ``arguments``, ``signals``, ``lines``, ``demo`` and ``spool`` first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import gevent
from gevent.event import Event

from ..agent import Agent, Received, Refused
from ..agent.doctor import Outcome, examine
from ..agent.shown import json_line, line_of, line_of_refusal, printable
from ..backoff import Backoff
from ..client import Client
from ..encoder.encoding import Encoder
from ..encoder.engine import ENCODER
from ..errors import AuditError, ConnectionFailedError, QueueFullError, ValidationError
from ..records import Msg, OperationResult
from ..schema.json_schema import json_schema
from ..schema.rules import MsgSchema, by_record
from ..transport import usual_path
from ..version import __version__
from . import demo, lines, spool  # as modules: their functions would hide them here
from .arguments import Parser, add_address, factory_of, host_and_port, seconds, service_tree_id
from .signals import until_told
from .terminal import Colour, CommandError, Progress, coloured

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    sys.stdout = sys.stdout or _nowhere()  # None where whoever started this had closed it
    sys.stderr = sys.stderr or _nowhere()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        arguments = _parser().parse_args(argv)
        gevent.get_hub().NOT_ERROR += (KeyboardInterrupt,)  # Ctrl-C is nothing to print a traceback of
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (CommandError, AuditError) as error:
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


def _nowhere() -> TextIO:
    return open(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)  # open for as long as the process lives


_FILE_HELP = 'one message a line, by wire names; "-" for standard input'


def _parser(files: Any = None, folders: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    :param files, folders: shtab's words for arguments that are files or folders, to make completions of the parser.
    """
    parser = Parser(
        prog="geventaudit",
        description="Audit trails for gevent services.",
        examples="""\
  geventaudit demo                                 watch records survive an agent that restarts
  geventaudit listen --unix /tmp/audit.sock        be an agent, and print what arrives
  geventaudit doctor                               find out why nothing arrives
  geventaudit COMMAND --help                       more examples""",
    )
    parser.add_argument("--version", action="version", version=f"geventaudit {__version__} ({ENCODER} encoder)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str) -> Parser:
        made = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", examples=examples)
        made.set_defaults(run=run)
        return made

    def file(to: argparse.Action) -> None:
        to.complete = files  # type: ignore[attr-defined]

    listen = command(
        "listen",
        _listen,
        "receive records and print them",
        """\
  geventaudit listen --unix /tmp/audit.sock
  geventaudit listen --tcp 127.0.0.1:24224 --output received.jsonl""",
    )
    file(add_address(listen, "listen on", address=host_and_port))
    file(
        listen.add_argument(
            "--output",
            metavar="FILE.jsonl",
            help="append each record to this file, as a JSON line for reading: send and check refuse its Time",
        )
    )

    send = command(
        "send",
        _send,
        "validate and send JSON lines",
        """\
  geventaudit send records.jsonl --unix /tmp/audit.sock
  geventaudit send --follow /var/log/app/audit.jsonl --tcp agent.example.com:24224
  my-service | geventaudit send -""",
    )
    file(send.add_argument("file", metavar="FILE", help=_FILE_HELP))
    file(add_address(send, "send to"))
    send.add_argument(
        "--follow",
        action="store_true",
        help="go on with what is appended to FILE, which must exist, from its beginning on, also when another takes "
        "its place; waits for as long as the agent is away; ends by SIGINT or SIGTERM",
    )
    send.add_argument(
        "--service-tree-id", metavar="UUID", type=service_tree_id, help="the service that the records are of"
    )
    send.add_argument(
        "--timeout",
        type=seconds,
        default=20.0,
        help="seconds for connecting, for room on the queue, and for the last deliveries (20)",
    )

    check = command(
        "check",
        _check,
        "validate JSON lines, send nothing",
        """\
  geventaudit check records.jsonl
  geventaudit check - < records.jsonl""",
    )
    file(check.add_argument("file", metavar="FILE", help=_FILE_HELP))

    spool.add_actions(
        command(
            "spool",
            spool.no_action,
            "look into a spool, or deliver it",
            """\
  geventaudit spool list /var/lib/app/audit
  geventaudit spool show '/var/lib/app/audit-{pid}'
  geventaudit spool drain /var/lib/app/audit --unix /run/audit/agent.sock""",
        ),
        file,
        folders,
    )

    command(
        "schema",
        _print_schema,
        "print the JSON Schema of a message, for other languages and editors",
        """\
  geventaudit schema > message.schema.json""",
    )

    doctor = command(
        "doctor",
        _doctor,
        "find out what is wrong between this user and the agent",
        """\
  geventaudit doctor                               the socket that a client without a path takes
  geventaudit doctor --unix /tmp/audit.sock
  sudo -u www-data geventaudit doctor              as the user that the service runs as""",
    )
    file(add_address(doctor, "look at", path=str))  # one that is empty is a finding
    doctor.add_argument(
        "--timeout", type=seconds, default=2.0, help="seconds for each thing that the agent is asked to do (2)"
    )

    completion = command(
        "completion",
        _completion,
        "print the completion script of a shell (needs geventaudit[cli])",
        """\
  geventaudit completion bash > ~/.local/share/bash-completion/completions/geventaudit
  geventaudit completion zsh > ~/.zfunc/_geventaudit""",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))

    demo_command = command(
        "demo",
        _demo,
        "watch records survive an agent that restarts",
        """\
  geventaudit demo
  geventaudit demo --records 100000""",
    )
    demo_command.add_argument("--records", type=int, default=15_000, help="records to send in all (15000)")
    return parser


# -- listen ------------------------------------------------------------------------------------------------------------


def _listen(arguments: argparse.Namespace) -> int:
    address = arguments.tcp or (usual_path() if arguments.unix is None else arguments.unix)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # whatever the terminal can show
    with contextlib.ExitStack() as stack:
        output: TextIO | None = None
        if arguments.output:
            try:
                output = stack.enter_context(open(arguments.output, "a", encoding="utf-8", opener=_open_private))
            except OSError as error:
                raise CommandError(f"cannot write {arguments.output}: {error.strerror}") from None
        done = Event()
        trouble: list[Exception] = []

        def show(received: Received) -> None:
            try:
                print(_coloured_line_of(received), flush=True)
                if output is not None and isinstance(received.message, Msg):
                    print(json_line(received), file=output, flush=True)
            except (OSError, ValueError) as error:  # a closed pipe, a full disk: nothing was stored, so do not go on
                trouble.append(error)
                done.set()
                raise

        def complain(refused: Refused) -> None:
            word = coloured("refused", "red", sys.stderr)
            print(f"{word} {line_of_refusal(refused)}", file=sys.stderr, flush=True)

        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(gevent.signal_handler(number, done.set).cancel)
        try:
            agent = stack.enter_context(Agent(address, show, on_refused=complain))
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CommandError(f"cannot listen on {_name_of(address)}: {reason}") from None
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
                else CommandError(f"cannot store: {trouble[0]}", 1)
            )
    return 0


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _name_of(address: str | tuple[str, int]) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _coloured_line_of(received: Received) -> str:
    line = line_of(received)
    if isinstance(received.message, Msg) and received.message.record.operation_result == OperationResult.FAILURE:
        return coloured(line, "red", sys.stdout)
    return line


_schema = MsgSchema()
_MAX_COMPLAINT = 4000  # characters about one line of a file


# -- send and check ----------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What became of the lines of a file."""

    line: int = 0
    begun: int = 0
    good: int = 0
    bad: int = 0

    def each(self, numbered: Iterable[tuple[int, bytes]], use: Callable[[Any], object], progress: Progress) -> bool:
        """Give every message to *use*, and say on standard error which it refused; whether it came to the end.

        It ends where there is no room: each line that follows would wait as long, and leave a gap.
        """
        for self.line, line in numbered:
            if line.strip() or len(line) > lines.MAX_LINE_BYTES:
                self.begun += 1
                try:
                    use(_parsed(line))
                    self.good += 1
                except ValidationError as error:
                    self.bad += 1
                    progress.say(f"line {self.line}: {printable(str(error), _MAX_COMPLAINT)}", sys.stderr)
                except QueueFullError as error:
                    progress.say(f"line {self.line}: {error}", sys.stderr)
                    return False
            progress.advance(len(line))
        return True


def _parsed(line: bytes) -> Any:
    if len(line) > lines.MAX_LINE_BYTES:
        raise ValidationError({"_schema": [f"longer than {lines.MAX_LINE_BYTES} bytes"]})
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValidationError({"_schema": [f"not JSON: {error}"]}) from None


def _numbered(path: str, follow: bool = False) -> Iterator[tuple[int, bytes]]:
    try:
        yield from lines.followed(path) if follow else lines.lines(path)
    except OSError as error:
        raise _cannot_read(path, error) from None


def _check_readable(path: str) -> None:
    try:
        if path != "-" and not stat.S_ISFIFO(os.stat(path).st_mode):  # whose writer would see it opened, and closed
            open(path, "rb").close()
    except OSError as error:
        raise _cannot_read(path, error) from None


def _cannot_read(path: str, error: OSError) -> CommandError:
    return CommandError(f"cannot read {path}: {error.strerror or error}")


def _bytes_read(path: str) -> Progress:
    """The progress of reading *path* once; none of what somebody types."""
    if path == "-" and sys.stdin is not None and sys.stdin.isatty():
        return Progress()
    try:
        status = os.stat(path)
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError:  # standard input; or what cannot be read, which reading will say
        size = None
    return Progress(size, "B")


def _check(arguments: argparse.Namespace) -> int:
    def load(message: Any) -> None:
        try:
            encoder.encode(_schema.load(message), 0)  # which finds what is too long to be sent
        except ValidationError as error:
            raise ValidationError(by_record(error.messages)) from None  # the paths that send would show

    encoder = Encoder()
    tally = _Tally()
    with _bytes_read(arguments.file) as progress:
        if until_told(lambda: tally.each(_numbered(arguments.file), load, progress), signal.SIGINT) is None:
            raise KeyboardInterrupt
    print(f"{tally.good} valid, {tally.bad} refused")
    return 1 if tally.bad else 0


def _send(arguments: argparse.Namespace) -> int:
    factory = factory_of(arguments)

    def send(message: Any) -> None:
        client.send(message, timeout=None if arguments.follow else arguments.timeout)

    _check_readable(arguments.file)  # before anybody waits for the agent
    client = Client(factory, service_tree_id=arguments.service_tree_id, backoff=Backoff(initial=0.1, maximum=5.0))
    tally = _Tally()
    try:
        try:
            factory().close()  # before anything is read, and without the patience of a service
        except ConnectionFailedError as error:
            if not arguments.follow:
                raise CommandError(str(error)) from None
            print(f"geventaudit: {error}: waiting for the agent", file=sys.stderr, flush=True)
        with Progress() if arguments.follow else _bytes_read(arguments.file) as progress:
            numbered = _numbered(arguments.file, arguments.follow)
            ends = (signal.SIGTERM, signal.SIGINT)
            whole = until_told(lambda: tally.each(numbered, send, progress), *ends) or arguments.follow
    finally:
        undelivered = len(client.close(arguments.timeout))
    left = undelivered + tally.begun - tally.good - tally.bad  # and the one that waited for room when it was told
    if not whole:
        print(f"stopped at line {tally.line} of {arguments.file}: what follows was not sent", file=sys.stderr)
    print(f"{tally.good - undelivered} delivered, {left} not delivered, {tally.bad} refused")
    return 1 if tally.bad or left or not whole else 0


# -- schema, doctor, completion, demo ----------------------------------------------------------------------------------


def _print_schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(json_schema(_schema), indent=2))
    return 0


_COLOURS: dict[Outcome, Colour] = {Outcome.OK: "green", Outcome.NOTE: "yellow", Outcome.FAILED: "red"}


def _doctor(arguments: argparse.Namespace) -> int:
    status = 0
    for finding in examine(arguments.tcp or arguments.unix, max(arguments.timeout, 0.001)):
        word = coloured(f"{finding.outcome.value:<7}", _COLOURS[finding.outcome], sys.stdout)
        print(f"{word} {printable(finding.text)}")
        if finding.advice:
            print(f"        -> {finding.advice}")
        sys.stdout.flush()
        if finding.outcome is Outcome.FAILED:
            status = 1
    return status


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise CommandError("completion is made by shtab: pip install 'geventaudit[cli]'") from None
    print(shtab.complete(_parser(files=shtab.FILE, folders=shtab.DIRECTORY), arguments.shell))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.records < 1:
        raise CommandError(f"argument --records: must be at least 1, got {arguments.records}")
    done = until_told(lambda: demo.demo(arguments.records), signal.SIGINT)
    if done is None:
        raise KeyboardInterrupt
    return 0 if done else 1
