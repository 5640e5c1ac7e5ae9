"""The command line: ``geventaudit COMMAND``.

Exit status: 0 when all went well; 1 when messages were refused, damaged or not delivered, when the doctor found a
fault, when a trail is not whole, or when records of a route are not complete; 2 for bad arguments, for addresses that
cannot be reached or listened on, and for spools and applications that cannot be opened.

Read ``terminal``, ``arguments``, ``signals``, ``lines``, ``listen``, ``send``, ``demo``, ``spool``,
``trail`` and ``report`` first.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import gevent

from ..agent.doctor import Outcome, examine
from ..agent.shown import printable
from ..encoder.engine import ENCODER
from ..errors import AuditError
from ..schema.json_schema import json_schema
from ..schema.rules import MsgSchema
from ..version import __version__
from . import demo, listen, report, send, spool, trail  # as modules: their functions would hide them here
from .arguments import (
    Parser,
    add_address,
    add_agent_options,
    add_client_options,
    host_and_port,
    print_help_of,
    seconds,
    service_tree_id,
    tcp_options,
)
from .routes import add_routes
from .signals import run_until_signal
from .terminal import Colour, CommandError, LogHandler, coloured, complain
from .web import add_web_option

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status."""
    # A stream is None if the parent process had closed it.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[LogHandler()])
    try:
        arguments = _parser().parse_args(argv)
        # Without this, the hub prints a traceback of Ctrl-C.
        gevent.get_hub().NOT_ERROR += (KeyboardInterrupt,)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (CommandError, AuditError) as error:
        complain(error)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of the output has gone. Prevent a second error at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"cannot write the output: {error.strerror or error}")
        return 1


def _nowhere() -> TextIO:
    # Open until the process ends.
    return open(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)


_FILE_HELP = 'one message a line, by wire names; "-" for standard input'


def _parser(files: Any = None, folders: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    :param files, folders: shtab's names for arguments that are files or folders, for a completion script.
    """
    parser = Parser(
        prog="geventaudit",
        description="Audit trails for gevent services.",
        examples="""\
  geventaudit demo                                 watch records survive an agent that restarts
  geventaudit listen                               run a development agent that prints records
  geventaudit send FILE --tcp 127.0.0.1:24224      send records to it
  geventaudit doctor --tcp 127.0.0.1:24224         find out why records do not arrive
  geventaudit COMMAND --help                       more examples""",
    )
    parser.set_defaults(run=print_help_of(parser))
    parser.add_argument("--version", action="version", version=f"geventaudit {__version__} ({ENCODER} encoder)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int] | None, about: str, examples: str) -> Parser:
        made = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", examples=examples)
        made.set_defaults(run=run or print_help_of(made))
        return made

    def file(to: argparse.Action) -> None:
        to.complete = files  # type: ignore[attr-defined]

    listener = command(
        "listen",
        listen.listen,
        "receive records and print them: an agent for development",
        """\
  geventaudit listen
  geventaudit listen --web                         and see it in the browser
  geventaudit listen --stats                       print a rate each second, and no records
  geventaudit listen --unix /tmp/audit.sock --output received.jsonl
  geventaudit listen --output - | jq .Record.OperationName
  geventaudit listen --tcp 0.0.0.0:24224 --cert agent.pem --shared-key-file key.txt""",
    )
    file(add_address(listener, "listen on", default=listen.DEFAULT_ADDRESS, address=host_and_port))
    file(
        listener.add_argument(
            "--output",
            metavar="FILE.jsonl",
            help='append each record to this file, as a line of JSON; "-" for standard output, without other output. '
            "For reading: send and check refuse the Time in it",
        )
    )
    listener.add_argument(
        "--stats", action="store_true", help="print the rate of each second and the totals, instead of each record"
    )
    add_web_option(listener)
    add_agent_options(listener, file)

    sender = command(
        "send",
        send.send,
        "validate records and send them to an agent",
        """\
  geventaudit send records.jsonl --unix /tmp/audit.sock
  geventaudit send records.jsonl --tcp agent.example.com:24224 --tls --require-ack
  geventaudit send --follow /var/log/app/audit.jsonl --tcp agent.example.com:24224
  my-service | geventaudit send -""",
    )
    file(sender.add_argument("file", metavar="FILE", help=_FILE_HELP))
    file(add_address(sender, "send to"))
    sender.add_argument(
        "--follow",
        action="store_true",
        help="continue at the end of FILE: send appended lines, and those of a file that replaces it; wait while the "
        "agent is away; SIGINT or SIGTERM ends the command",
    )
    sender.add_argument("--service-tree-id", metavar="UUID", type=service_tree_id, help="the service of the records")
    sender.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=20.0,
        help="limit for connecting, for room on the queue, and for the last deliveries (default: 20)",
    )
    add_client_options(sender, file)

    checker = command(
        "check",
        send.check,
        "validate records, and send nothing",
        """\
  geventaudit check records.jsonl
  geventaudit check - < records.jsonl""",
    )
    file(checker.add_argument("file", metavar="FILE", help=_FILE_HELP))

    spool.add_actions(
        command(
            "spool",
            None,
            "look into a spool on disk, or deliver it",
            """\
  geventaudit spool list /var/lib/app/audit
  geventaudit spool show '/var/lib/app/audit-{pid}'
  geventaudit spool drain /var/lib/app/audit --unix /run/audit/agent.sock""",
        ),
        file,
        folders,
    )

    trail.add_commands(command, file)
    report.add_command(command, file)

    command(
        "schema",
        _print_schema,
        "print the JSON Schema of a message, for other languages and editors",
        """\
  geventaudit schema > message.schema.json""",
    )

    add_routes(command)

    doctor = command(
        "doctor",
        _doctor,
        "find out why records do not reach the agent",
        """\
  geventaudit doctor                               the socket that DomainSocket() uses
  geventaudit doctor --unix /tmp/audit.sock
  geventaudit doctor --tcp agent.example.com:24224 --ca ca.pem --shared-key-file key.txt
  sudo -u www-data geventaudit doctor              as the user of the service""",
    )
    file(add_address(doctor, "examine", path=str))  # an empty path is a finding
    doctor.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=2.0,
        help="limit for each answer of the agent (default: 2)",
    )
    add_client_options(doctor, file)

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
    demo_command.add_argument(
        "--records", metavar="NUMBER", type=_count, default=15_000, help="records to send in all (default: 15000)"
    )
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


# -- schema, doctor, completion, demo ----------------------------------------------------------------------------------


def _print_schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(json_schema(MsgSchema()), indent=2))
    return 0


_COLOURS: dict[Outcome, Colour] = {Outcome.OK: "green", Outcome.NOTE: "yellow", Outcome.FAILED: "red"}


def _doctor(arguments: argparse.Namespace) -> int:
    status = 0
    findings = examine(
        arguments.tcp or arguments.unix,
        max(arguments.timeout, 0.001),
        needs_acks=arguments.require_ack,
        **tcp_options(arguments),
    )
    for finding in findings:
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
    done = run_until_signal(lambda: demo.demo(arguments.records), signal.SIGINT)
    if done is None:
        raise KeyboardInterrupt
    return 0 if done else 1
