"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import ValidationError
from ..schema.addresses import service_tree_uuid
from ..transport import TCP, Connection, DomainSocket
from .terminal import CommandError

__all__ = ["Parser", "add_address", "factory_of", "host_and_port", "seconds", "service_tree_id", "socket_path"]


class Parser(argparse.ArgumentParser):
    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{examples}" if examples else None,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def socket_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be the path of a socket, got an empty text")
    return text


def service_tree_id(text: str) -> str:
    try:
        return service_tree_uuid(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"must be a UUID and not the nil UUID, got {text!r}") from None


def host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    host = host.removeprefix("[").removesuffix("]")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text[:60]!r}: {error}") from None
    return host, int(port)


def _peer(text: str) -> tuple[str, int]:
    host, port = host_and_port(text)
    if not port:  # which asks for a free one, where somebody listens
        raise argparse.ArgumentTypeError(f"must be HOST:PORT with a port above 0, got {text!r}")
    return host, port


def add_address(
    parser: argparse.ArgumentParser,
    what: str,
    path: Callable[[str], str] = socket_path,
    address: Callable[[str], tuple[str, int]] = _peer,
) -> argparse.Action:
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--tcp", metavar="HOST:PORT", type=address, help=f"{what} this TCP address")
    return either.add_argument(
        "--unix", metavar="PATH", type=path, help=f"{what} this Unix socket (without --tcp: mdsd's usual one)"
    )


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def factory_of(arguments: argparse.Namespace) -> Callable[[], Connection]:
    def factory() -> Connection:
        timeout = max(arguments.timeout, 0.001)
        return TCP(arguments.tcp, timeout=timeout) if arguments.tcp else DomainSocket(arguments.unix, timeout=timeout)

    return factory
