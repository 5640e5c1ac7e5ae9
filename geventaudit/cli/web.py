"""The option ``--web`` of ``geventaudit listen``."""

from __future__ import annotations

import argparse
import contextlib
import sys

from ..agent import Agent
from ..agent.web import DEFAULT_ADDRESS, Page
from .arguments import host_and_port, name_of
from .terminal import CommandError

__all__ = ["add_web_option", "page_of"]


def add_web_option(parser: argparse.ArgumentParser) -> None:
    """Add the option to *parser*; :func:`page_of` reads it."""
    parser.add_argument(
        "--web",
        metavar="HOST:PORT",
        nargs="?",
        type=host_and_port,
        const=DEFAULT_ADDRESS,
        help="show records on a page in the browser, by default at "
        f"http://{name_of(DEFAULT_ADDRESS)}/; an address that is not loopback gets a token",
    )


def page_of(arguments: argparse.Namespace, agent: Agent) -> contextlib.AbstractContextManager[object]:
    """Serve the page of an agent that has not started yet, and print its address. Without the option, do nothing.

    :raises CommandError: the address cannot be used.
    """
    if arguments.web is None:
        return contextlib.nullcontext()
    page = Page(agent, arguments.web)
    try:
        page.start()
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(
            f"cannot show the page on {name_of(arguments.web)}: {reason}; port 0 takes a free one"
        ) from None
    print(f"the page is at {page.url}", file=sys.stderr, flush=True)
    return contextlib.closing(page)
