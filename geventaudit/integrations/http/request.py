"""A request, from its beginning to the end of its response."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from geventaudit import CallerIdentity, CallerIdentityType, OperationResult

from .current import current_facts, set_current
from .facts import FACTS_KEY, RequestFacts
from .forwarding import address_of
from .paths import named_prefix, whole_path
from .text import name_of, named, printable, sent_text, server_text

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["Request", "identities_of"]

_PRINCIPAL_HEADERS = (
    ("HTTP_X_MS_CLIENT_PRINCIPAL_NAME", CallerIdentityType.UPN, "x-ms-client-principal-name"),
    ("HTTP_X_MS_CLIENT_APP_ID", CallerIdentityType.APPLICATION_ID, "x-ms-client-app-id"),
    ("HTTP_X_MS_CLIENT_TENANT_ID", CallerIdentityType.TENANT_ID, "x-ms-client-tenant-id"),
    ("HTTP_X_MS_CLIENT_OBJECT_ID", CallerIdentityType.OBJECT_ID, "x-ms-client-object-id"),
)


class Request:
    """A request: its environment at the beginning, the facts, and the end of its response."""

    __slots__ = (
        *("address", "certificate", "environ", "error", "facts", "headers", "is_begun", "is_over", "is_whole"),
        *("method", "path", "path_info", "peer", "prefix", "script", "status"),
    )

    def __init__(self, environ: WSGIEnvironment) -> None:
        # Read these now: applications and middlewares inside may rewrite them, such as the address of a trusted peer.
        self.environ = environ
        self.facts = RequestFacts()
        self.method: str = environ["REQUEST_METHOD"].upper()  # as frameworks do: "delete" deletes
        self.path_info: str = environ.get("PATH_INFO") or ""
        self.script: str = environ.get("SCRIPT_NAME") or ""
        self.prefix = printable(sent_text(named_prefix(environ)))
        self.path = printable(whole_path(environ), keep_end=True)
        remote = environ.get("REMOTE_ADDR")
        # A Unix socket's peer is "" in gunicorn; gevent's server gives no address, and an empty port.
        is_local = remote == "" or (remote is None and environ.get("SERVER_PORT") == "")
        self.peer = address_of("127.0.0.1" if is_local else str(remote or ""), zone=True)
        self.address = "" if self.peer is None else str(self.peer)
        self.certificate = _certificate(environ) if environ.get("wsgi.url_scheme") == "https" else None
        self.status: str | None = None
        self.headers: Any = ()
        self.error = ""
        self.is_begun = False
        """True once the server has got a part of the response, and with it the status."""
        self.is_whole = False
        self.is_over = False

    def watch(self, start_response: StartResponse, on_write: Callable[[], object] | None) -> Any:
        """Return *start_response*, noting status and headers; *on_write* is called before each ``write``."""

        def start(status: str, *args: Any, **kwargs: Any) -> Callable[[bytes], object]:
            self.status = status if isinstance(status, str) else printable(status)
            self.headers = args[0] if args else kwargs.get("headers", kwargs.get("response_headers", ()))
            write = start_response(status, *args, **kwargs)  # by name is not WSGI, but servers take it

            def noted_write(data: bytes) -> object:
                self.is_begun = True
                if on_write is not None:
                    self.is_whole = True  # as far as can be known here
                    on_write()
                return write(data)

            return noted_write

        return start

    def failed(self, error: BaseException) -> None:
        """Note that the application raised *error*. Only its text is kept: the error itself would keep its frames."""
        if self.was_handed_over and isinstance(error, StopIteration):
            return  # the way to say that to gunicorn
        self.error = named(error)
        if not self.is_begun:
            self.status, self.headers = None, ()  # the server answers 500 in their place

    def end(self) -> None:
        """Note that the record is sent. The request around this one, if there is one, is the current one again."""
        facts = self.facts
        if current_facts() is facts:
            set_current(facts.outer)
        if facts.outer is not None and self.environ.get(FACTS_KEY) is facts:
            self.environ[FACTS_KEY] = facts.outer  # whose environment this may be
        # They have the environment, which has the facts: a cycle.
        facts.context = facts.request = facts.refresh = facts.record_so_far = None

    @property
    def was_handed_over(self) -> bool:
        """True if the application spoke another protocol on the connection by itself: WSGI has no word for that."""
        return self.status is None and "HTTP_UPGRADE" in self.environ

    @property
    def code(self) -> int:
        """The status code: 500 without one, 101 if the connection was handed over."""
        if self.was_handed_over and not self.error:
            return 101
        try:
            return int((self.status or "")[:3])
        except ValueError:
            return 500

    @property
    def location(self) -> str:
        """The header ``Location`` of the response; empty without one."""
        try:
            return next((printable(sent_text(value)) for name, value in self.headers if name.lower() == "location"), "")
        except (
            AttributeError,
            TypeError,
            ValueError,
        ):  # headers that are none: for the server to refuse
            return ""

    def result(self) -> tuple[OperationResult, str]:
        """Return the result of the operation and its description."""
        if self.was_handed_over and not self.error:
            upgrade = printable(sent_text(self.environ["HTTP_UPGRADE"]))
            return OperationResult.UNKNOWN, f"the application took the connection over ({upgrade})"
        if self.error or self.status is None:
            return OperationResult.FAILURE, self.error or "the application gave no status"
        # A cut response is no failure of the operation: it was done, and what was sent may be read.
        cut = "" if self.is_whole or self.method == "HEAD" else "the response was not taken to its end"
        login = f"the sign-in as {self.facts.account} failed" if self.facts.account else ""
        reasons = [self.facts.denied, login, self.facts.failure, cut]
        if self.code < 400 and not self.facts.denied and not login:
            return OperationResult.SUCCESS, "; ".join(filter(None, reasons))
        return OperationResult.FAILURE, "; ".join(filter(None, (printable(sent_text(self.status)), *reasons)))


def identities_of(request: Request, *, trusted: bool) -> dict[CallerIdentityType, list[CallerIdentity]]:
    """Return the identities of a request's caller, by the application, the server, TLS, and *trusted* proxies."""
    found: dict[CallerIdentityType, list[CallerIdentity]] = {}
    environ = request.environ
    names = {name_of(request.facts.user): "the application's user"}
    names.setdefault(name_of(server_text(environ.get("REMOTE_USER"))), "REMOTE_USER")
    names.setdefault(name_of(request.facts.account), "tried to sign in, and failed")
    names.pop("", None)
    if names:
        found[CallerIdentityType.USERNAME] = [CallerIdentity(name, source) for name, source in names.items()]
    if request.certificate is not None:
        found[CallerIdentityType.CERTIFICATE] = [request.certificate]
    if trusted:
        for key, kind, header in _PRINCIPAL_HEADERS:
            if value := name_of(sent_text(environ.get(key))):
                found[kind] = [CallerIdentity(value, header)]
    return found


def _certificate(environ: Mapping[str, Any]) -> CallerIdentity | None:
    """Return the TLS certificate that the server verified, if it makes one known."""
    if environ.get("SSL_CLIENT_VERIFY") == "SUCCESS" and environ.get("SSL_CLIENT_S_DN"):
        subject = printable(server_text(environ["SSL_CLIENT_S_DN"]))
        return CallerIdentity(subject, "subject of the TLS client certificate")
    sock: Any = environ.get("gunicorn.socket") or environ.get("gunicorn.sock")  # the latter: worker gevent_pywsgi
    try:
        certificate = sock.getpeercert()  # empty if it was not verified
        if not certificate:
            return None
        subject = ", ".join(f"{name}={value}" for part in certificate.get("subject", ()) for name, value in part)
        digest = hashlib.sha256(sock.getpeercert(True)).hexdigest()
    except (AttributeError, OSError, ValueError):  # another server, a proxy's TLS, or the client has gone
        return None
    return CallerIdentity(printable(subject or digest), f"subject of the TLS client certificate with SHA-256 {digest}")
