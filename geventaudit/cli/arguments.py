"""Arguments that several commands take: addresses, TLS, keys, acknowledgements."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConnectionFailedError, ValidationError
from ..protocol.handshake import check_secret
from ..schema.addresses import service_tree_uuid
from ..transport import TCP, Connection, DomainSocket
from .terminal import CommandError

if TYPE_CHECKING:
    from ssl import Purpose, SSLContext

__all__ = [
    "Parser",
    "add_address",
    "add_agent_options",
    "add_client_options",
    "agent_options",
    "factory_of",
    "host_and_port",
    "name_of",
    "print_help_of",
    "seconds",
    "service_tree_id",
    "socket_path",
    "tcp_options",
    "unreachable",
]

_GROUP = "TLS, keys and acknowledgements"


class Parser(argparse.ArgumentParser):
    def __init__(self, *, examples: str = "", **options: Any) -> None:
        super().__init__(
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
            epilog=f"examples:\n{examples}" if examples else None,
            **options,
        )

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Refuse unknown arguments here: the parser of all commands would name its own help."""
        known, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def print_help_of(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Return a command that prints the help of *parser*."""

    def command(arguments: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    return command


# -- types -------------------------------------------------------------------------------------------------------------


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
    if not port:  # port 0 is for listening: the system picks a port
        raise argparse.ArgumentTypeError(f"must be HOST:PORT with a port above 0, got {text!r}")
    return host, port


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


# -- options -----------------------------------------------------------------------------------------------------------


def add_address(
    parser: argparse.ArgumentParser,
    verb: str,
    *,
    default: tuple[str, int] | None = None,
    path: Callable[[str], str] = socket_path,
    address: Callable[[str], tuple[str, int]] = _peer,
) -> argparse.Action:
    """Add ``--tcp`` and ``--unix``. Return the action of ``--unix``, for the completion of file names.

    :param verb: the use of the address, as in "send to".
    :param default: the address without these options, for the help; None for the usual Unix socket.
    """
    either = parser.add_mutually_exclusive_group()
    tcp, unix = (
        ("", " (default: mdsd's, as DomainSocket())") if default is None else (f" (default: {name_of(default)})", "")
    )
    either.add_argument("--tcp", metavar="HOST:PORT", type=address, help=f"{verb} this TCP address{tcp}")
    return either.add_argument("--unix", metavar="PATH", type=path, help=f"{verb} this Unix socket{unix}")


def name_of(address: str | tuple[str, int]) -> str:
    """Return the address as the options take it."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def add_client_options(parser: argparse.ArgumentParser, file: Callable[[argparse.Action], None]) -> None:
    """Add the options of a connection to an agent; :func:`tcp_options` and :func:`factory_of` read them.

    :param file: called with each action that takes a file name.
    """
    group = parser.add_argument_group(_GROUP)
    group.add_argument(
        "--tls", action="store_true", help="use TLS over TCP, and trust the system's certificate authorities"
    )
    file(
        group.add_argument(
            "--ca", metavar="FILE", help="trust the certificate authorities in this PEM file instead; implies --tls"
        )
    )
    file(
        group.add_argument(
            "--cert",
            metavar="FILE",
            help="present this certificate (PEM, may hold the private key too); implies --tls",
        )
    )
    file(group.add_argument("--key", metavar="FILE", help="private key of --cert (PEM)"))
    group.add_argument(
        "--server-hostname",
        metavar="NAME",
        help="name in the agent's certificate, if it is not HOST; implies --tls",
    )
    file(
        group.add_argument(
            "--shared-key-file",
            metavar="FILE",
            help="do the Forward protocol's handshake over TCP, with the shared key in this file",
        )
    )
    group.add_argument("--username", metavar="NAME", help="user name, for an agent that has users")
    file(group.add_argument("--password-file", metavar="FILE", help="file with the password of --username"))
    group.add_argument(
        "--require-ack",
        action="store_true",
        help="count a record as delivered when the agent acknowledges it",
    )


def add_agent_options(parser: argparse.ArgumentParser, file: Callable[[argparse.Action], None]) -> None:
    """Add the options of an agent; :func:`agent_options` reads them.

    :param file: called with each action that takes a file name.
    """
    group = parser.add_argument_group(_GROUP)
    file(
        group.add_argument(
            "--cert", metavar="FILE", help="use TLS over TCP, with this certificate (PEM, may hold the private key too)"
        )
    )
    file(group.add_argument("--key", metavar="FILE", help="private key of --cert (PEM)"))
    file(
        group.add_argument(
            "--ca", metavar="FILE", help="require client certificates from the authorities in this PEM file"
        )
    )
    file(
        group.add_argument(
            "--shared-key-file",
            metavar="FILE",
            help="refuse clients that do not know the shared key in this file",
        )
    )
    group.add_argument("--username", metavar="NAME", help="refuse other users; needs a shared key and a password")
    file(group.add_argument("--password-file", metavar="FILE", help="file with the password of --username"))
    group.add_argument("--no-ack", action="store_true", help="acknowledge nothing")


# -- values of the options ---------------------------------------------------------------------------------------------


def factory_of(arguments: argparse.Namespace) -> Callable[[], Connection]:
    """Return the factory of connections to the agent.

    Each connection loads the certificates anew, so that a renewed file is used without a restart.

    :raises CommandError: the options contradict each other, or a file cannot be used.
    """
    timeout = max(arguments.timeout, 0.001)
    options = tcp_options(arguments)

    def factory() -> Connection:
        if not arguments.tcp:
            return DomainSocket(arguments.unix, timeout=timeout, require_ack=arguments.require_ack)
        if options["ssl"] is not None:
            options["ssl"] = _client_context(arguments)
        return TCP(arguments.tcp, timeout=timeout, require_ack=arguments.require_ack, **options)

    return factory


def unreachable(error: ConnectionFailedError, arguments: argparse.Namespace) -> CommandError:
    """Return the error that ends a command if the agent is unreachable. Its text names the next step."""
    if arguments.tcp:
        where = f" --tcp {name_of(arguments.tcp)}"
    elif arguments.unix:
        where = f" --unix {shlex.quote(arguments.unix)}"
    else:
        return CommandError(f"{error}; give the address of the agent: --unix PATH or --tcp HOST:PORT")
    return CommandError(f"{error}; to find the reason: geventaudit doctor{where}")


def tcp_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of ``TCP`` for TLS and the handshake; an empty dict for a Unix socket.

    :raises CommandError: the options contradict each other, or a file cannot be used.
    """
    for option in ("--tls", "--ca", "--cert", "--key", "--server-hostname", "--shared-key-file"):
        if not arguments.tcp and getattr(arguments, option[2:].replace("-", "_")):
            raise CommandError(f"argument {option}: not supported on a Unix socket: add --tcp HOST:PORT")
    if arguments.key and not arguments.cert:
        raise CommandError("argument --key: needs its certificate: add --cert FILE")
    shared_key, password = _secrets(arguments)
    if not arguments.tcp:
        return {}
    uses_tls = arguments.tls or arguments.ca or arguments.cert or arguments.server_hostname
    return {
        "ssl": _client_context(arguments) if uses_tls else None,
        "server_hostname": arguments.server_hostname,
        "shared_key": shared_key,
        "username": arguments.username or "",
        "password": password,
    }


def agent_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of ``Agent`` for TLS and the handshake.

    :raises CommandError: the options contradict each other, or a file cannot be used.
    """
    for option in ("--key", "--ca"):
        if getattr(arguments, option[2:]) and not arguments.cert:
            raise CommandError(f"argument {option}: needs the agent's certificate: add --cert FILE")
    if arguments.cert and arguments.unix is not None:
        raise CommandError("argument --cert: not supported on a Unix socket: use --tcp HOST:PORT")
    if arguments.username and not arguments.password_file:
        raise CommandError("argument --username: needs a password: add --password-file FILE")
    shared_key, password = _secrets(arguments)
    return {
        "ssl": _agent_context(arguments) if arguments.cert else None,
        "shared_key": shared_key,
        "users": {arguments.username: password} if arguments.username else None,
    }


def _secrets(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """Return the shared key, None if there is none, and the password."""
    if arguments.username and not arguments.shared_key_file:
        raise CommandError("argument --username: needs a shared key: add --shared-key-file FILE")
    if arguments.password_file and not arguments.username:
        raise CommandError("argument --password-file: needs a user: add --username NAME")
    shared_key = _secret("--shared-key-file", arguments.shared_key_file) if arguments.shared_key_file else None
    password = _secret("--password-file", arguments.password_file) if arguments.password_file else ""
    return shared_key, password


def _secret(option: str, path: str) -> str:
    """Return the text of a file without its final newline. No error contains a part of the text."""
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.read().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise CommandError(f"argument {option}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CommandError(f"argument {option}: {path} must be UTF-8 text") from None
    if not secret:
        raise CommandError(f"argument {option}: {path} is empty")
    check_secret(option, secret)
    return secret


def _client_context(arguments: argparse.Namespace) -> SSLContext:
    import ssl

    context = _context(ssl.Purpose.SERVER_AUTH, arguments.ca)
    if arguments.cert:
        _load_certificate(context, arguments.cert, arguments.key)
    return context


def _agent_context(arguments: argparse.Namespace) -> SSLContext:
    import ssl

    context = _context(ssl.Purpose.CLIENT_AUTH, arguments.ca)
    _load_certificate(context, arguments.cert, arguments.key)
    if arguments.ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _context(purpose: Purpose, authorities: str | None) -> SSLContext:
    """Return a context that trusts the authorities in a file, or those of the system."""
    import ssl

    if authorities:
        _check_readable("--ca", authorities)
    try:
        return ssl.create_default_context(purpose, cafile=authorities)
    except OSError:
        raise CommandError(f"argument --ca: {authorities} has no certificate in PEM form") from None


def _load_certificate(context: SSLContext, certificate: str, key: str | None) -> None:
    import ssl

    def passphrase() -> str:
        # Without this function, OpenSSL would prompt for the passphrase at the terminal, for each connection.
        raise CommandError(f"argument --key: the private key in {key or certificate} is encrypted: decrypt it first")

    _check_readable("--cert", certificate)
    if key:
        _check_readable("--key", key)
    try:
        context.load_cert_chain(certificate, key, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CommandError(f"argument --key: {key or certificate} is not the key of {certificate}") from None
        reason = "" if key else ", or has no private key: add --key FILE"
        raise CommandError(
            f"argument --cert: {certificate}{f' or {key}' if key else ''} is no certificate and key in PEM form{reason}"
        ) from None


def _check_readable(option: str, path: str) -> None:
    try:
        open(path, "rb").close()
    except OSError as error:
        raise CommandError(f"argument {option}: cannot read {path}: {error.strerror or error}") from None
