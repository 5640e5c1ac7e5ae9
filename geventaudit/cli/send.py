"""``geventaudit send`` and ``geventaudit check``: messages in files of JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..agent.shown import printable
from ..backoff import Backoff
from ..client import Client
from ..encoder.encoding import Encoder
from ..errors import ConnectionFailedError, QueueFullError, ValidationError
from ..schema.rules import MsgSchema, by_record
from . import lines
from .arguments import factory_of, unreachable
from .signals import run_until_signal
from .terminal import Progress, cannot, complain

__all__ = ["check", "send"]

_MAX_COMPLAINT = 4000  # characters about one line of a file


def check(arguments: argparse.Namespace) -> int:
    """Validate each message of a file. Return the exit status."""
    encoder, schema = Encoder(), MsgSchema()

    def load(message: Any) -> None:
        try:
            # Encode too, to find a message that is too long.
            encoder.encode(schema.load(message), 0)
        except ValidationError as error:
            # The same paths as in the errors of send().
            raise ValidationError(by_record(error.messages)) from None

    tally = _Tally()
    with _bytes_read(arguments.file) as progress:
        if run_until_signal(lambda: tally.each(_numbered(arguments.file), load, progress), signal.SIGINT) is None:
            raise KeyboardInterrupt
    print(f"{tally.good} valid, {tally.bad} refused")
    return 1 if tally.bad else 0


def send(arguments: argparse.Namespace) -> int:
    """Send each message of a file. Return the exit status."""
    factory = factory_of(arguments)

    def send_one(message: Any) -> None:
        client.send(message, timeout=None if arguments.follow else arguments.timeout)

    _check_readable(arguments.file)
    client = Client(factory, service_tree_id=arguments.service_tree_id, backoff=Backoff(initial=0.1, maximum=5.0))
    tally = _Tally()
    try:
        try:
            # Try once before reading, to fail at once instead of retrying as a service does.
            factory().close()
        except ConnectionFailedError as error:
            if not arguments.follow:
                raise unreachable(error, arguments) from None
            complain(f"{error}: waiting for the agent")
        with Progress() if arguments.follow else _bytes_read(arguments.file) as progress:
            numbered = _numbered(arguments.file, arguments.follow)
            ends = (signal.SIGTERM, signal.SIGINT)
            whole = run_until_signal(lambda: tally.each(numbered, send_one, progress), *ends) or arguments.follow
    finally:
        undelivered = len(client.close(arguments.timeout))
    # Includes the line that waited for room when the signal arrived.
    left = undelivered + tally.begun - tally.good - tally.bad
    if not whole:
        Progress.say(f"stopped at line {tally.line} of {arguments.file}: the following lines were not sent", sys.stderr)
    print(f"{tally.good - undelivered} delivered, {left} not delivered, {tally.bad} refused")
    return 1 if tally.bad or left or not whole else 0


@dataclass
class _Tally:
    """Counts of the lines of a file."""

    line: int = 0
    """Number of the last line that was read."""
    begun: int = 0
    """Messages in the lines that were read."""
    good: int = 0
    bad: int = 0

    def each(self, numbered: Iterable[tuple[int, bytes]], use: Callable[[Any], object], progress: Progress) -> bool:
        """Call *use* with each message, and print each refused line on standard error.

        :returns: False if the queue was full. Then reading stops: the following lines would wait as long, and sending
            some of them would leave a gap.
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
        raise cannot("read", path, error) from None


def _check_readable(path: str) -> None:
    try:
        # Do not open a pipe: its writer would see the close.
        if path != "-" and not stat.S_ISFIFO(os.stat(path).st_mode):
            open(path, "rb").close()
    except OSError as error:
        raise cannot("read", path, error) from None


def _bytes_read(path: str) -> Progress:
    """Return the progress of reading a file; without a bar if the lines are typed at a terminal."""
    if path == "-" and sys.stdin is not None and sys.stdin.isatty():
        return Progress()
    try:
        status = os.stat(path)
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
    except OSError:
        # Standard input, or an unreadable file.
        size = None
    return Progress(size, "B")
