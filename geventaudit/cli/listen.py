"""``geventaudit listen``: an agent for development."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
from typing import TextIO

import gevent
from gevent.event import Event

from ..agent import Agent, Received, Refused
from ..agent.shown import json_line, line_of, line_of_refusal, printable
from ..records import Msg, OperationResult
from ..runtime.clock import monotonic
from .arguments import agent_options, name_of
from .terminal import CommandError, coloured
from .web import page_of

__all__ = ["DEFAULT_ADDRESS", "listen"]

DEFAULT_ADDRESS = ("127.0.0.1", 24224)
"""The port of the Forward protocol, for this host only."""

_STANDARD_OUTPUT = "-"


def listen(arguments: argparse.Namespace) -> int:
    """Receive and print records until a signal comes. Return the exit status."""
    address = arguments.tcp or arguments.unix or DEFAULT_ADDRESS
    options = agent_options(arguments)
    # A terminal that cannot show a character shows its escape.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with contextlib.ExitStack() as stack:
        printer = stack.enter_context(_Printer(arguments.output, prints_records=not arguments.stats))
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(gevent.signal_handler(number, printer.done.set).cancel)
        try:
            agent = Agent(address, printer.show, on_refused=_show_refused, **options)
            stack.enter_context(page_of(arguments, agent))
            stack.enter_context(agent)
        except (OSError, ValueError, OverflowError) as error:
            raise CommandError(f"cannot listen on {name_of(address)}: {_reason(error, address)}") from None
        if arguments.no_ack:
            agent.stop_acknowledging()
        _say(f"listening on {name_of(agent.address)}")
        if arguments.tcp is None and arguments.unix is None:
            _say(f"to send a record here: geventaudit send FILE --tcp {name_of(agent.address)}")
        if arguments.stats:
            _print_rates(agent, printer)
        printer.done.wait()
        agent.stop(0.0 if printer.error else 1.0)
        counts = agent.counts
        _say(f"{counts.messages} messages received, {counts.refused} refused")
        printer.check()
    return 0


def _reason(error: Exception, address: str | tuple[str, int]) -> str:
    reason = str(getattr(error, "strerror", None) or error).removesuffix(f": {address}")
    if getattr(error, "errno", None) == errno.EADDRINUSE and "no socket" not in reason:
        return f"{reason}: an agent is there already; choose another address: --tcp HOST:PORT or --unix PATH"
    return reason


_INTERVAL = 1.0


def _print_rates(agent: Agent, printer: _Printer) -> None:
    """Print a line each second until nothing more is to be printed."""
    began, before = monotonic(), 0
    due = began + _INTERVAL
    while not printer.done.wait(max(due - monotonic(), 0.0)):
        now, counts = monotonic(), agent.counts
        records = counts.messages - counts.heartbeats
        rate = round((records - before) / (now - began))
        printer.print_line(
            f"{time.strftime('%H:%M:%S')} {rate:>9,} records/s {records:>13,} received "
            f"{counts.refused:>9,} refused {counts.open_connections:>6,} connections"
        )
        began, before = now, records
        # A second that was missed is not made up for.
        due = max(due + _INTERVAL, now)


class _Printer:
    """Prints each message as a line for people, and writes each record to the output as a JSON line.

    :param output: the path of the output, "-" for standard output, which then has JSON lines only; None for no output.
    :param prints_records: False for the JSON lines only.
    :raises CommandError: the output cannot be written.
    """

    def __init__(self, output: str | None, *, prints_records: bool) -> None:
        self.done = Event()
        """Set when nothing more can be written, or by a signal."""
        self.error: OSError | ValueError | None = None
        """The reason why nothing more can be written."""
        self._is_for_people = output != _STANDARD_OUTPUT
        self._prints_records = prints_records and self._is_for_people
        self._json: TextIO | None = None if self._is_for_people else sys.stdout
        if output is not None and self._is_for_people:
            try:
                self._json = open(output, "a", encoding="utf-8", opener=_open_private)  # noqa: SIM115  # see __exit__
            except OSError as error:
                raise CommandError(f"cannot write {output}: {error.strerror}") from None

    def show(self, received: Received) -> None:
        """Print and write one message.

        :raises OSError, ValueError: a write failed. The agent does not acknowledge the message then.
        """
        try:
            if self._prints_records:
                print(_line_of(received), flush=True)
            if self._json is not None and isinstance(received.message, Msg):
                print(json_line(received), file=self._json, flush=True)
        except (OSError, ValueError) as error:
            self.error = error
            self.done.set()
            raise

    def print_line(self, line: str) -> None:
        """Print a line for people: on standard error if standard output has JSON lines."""
        try:
            print(line, file=sys.stdout if self._is_for_people else sys.stderr, flush=True)
        except (OSError, ValueError) as error:
            self.error = error
            self.done.set()

    def check(self) -> None:
        """Raise if a write failed.

        :raises BrokenPipeError: the reader of standard output has gone.
        :raises CommandError: another reason.
        """
        if isinstance(self.error, BrokenPipeError):
            raise self.error
        if self.error is not None:
            raise CommandError(f"cannot store: {self.error}", 1)

    def __enter__(self) -> _Printer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._json is not None and self._json is not sys.stdout:
            with contextlib.suppress(OSError):
                # Tries to write what a full disk refused.
                self._json.close()


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _line_of(received: Received) -> str:
    line = line_of(received)
    if isinstance(received.message, Msg) and received.message.record.operation_result == OperationResult.FAILURE:
        return coloured(line, "red", sys.stdout)
    return line


def _show_refused(refused: Refused) -> None:
    _say(line_of_refusal(refused), coloured("refused", "red", sys.stderr) + " ")


def _say(text: str, word: str = "") -> None:
    """Print a line on standard error. Control characters of *text* are escaped."""
    print(f"{word}{printable(text)}", file=sys.stderr, flush=True)
