"""A record for each HTTP request: :class:`AuditMiddleware` around any WSGI application.

The way of a request: what only the beginning knows (the peer, the path) is kept; the application runs; what it knows
better than its environment (the matched route, the user) it may put into the :class:`RequestFacts` that it finds there;
when the response has ended, all of that becomes a record, and the record is sent.

What sends it is the gevent hub of the thread that made the client, and that has to run. It does under gevent's servers
(``gunicorn -k gevent``), and under those of development when they are monkey-patched before they start::

    python -m gevent.monkey --module flask --app myapp run

Unpatched, the servers of development (``flask run``, Django's ``runserver``, wsgiref) and gunicorn's workers ``sync``
and ``gthread`` never run it: all records wait in memory until the process ends. The middleware says so in the log.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent

from geventaudit import (
    AuditClient,
    AuditError,
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    ClientClosedError,
    Msg,
    OperationResult,
    OperationType,
    QueueFullError,
    Record,
    TargetResource,
    fill_unknown,
)

from .forwarding import Address, Network, TrustedProxies, address_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["FACTS_KEY", "AuditMiddleware", "Describe", "RequestCounts", "RequestFacts", "facts_of"]

logger = logging.getLogger("geventaudit.wsgi")

_PATIENCE = 5.0  # seconds without a turn, after which a hub counts as one that does not run

MAX_TEXT = 2048
"""Characters of a text that a client sent (a path, a user agent) which a record keeps; what is cut off is counted."""

FACTS_KEY = "geventaudit.facts"
"""Where a WSGI environment has its :class:`RequestFacts`; None there when no record will be made."""

_TYPES = {
    "POST": OperationType.CREATE,
    "PUT": OperationType.UPDATE,
    "PATCH": OperationType.UPDATE,
    "DELETE": OperationType.DELETE,
}
_PRINCIPAL_HEADERS = (
    ("HTTP_X_MS_CLIENT_PRINCIPAL_NAME", CallerIdentityType.UPN, "x-ms-client-principal-name"),
    ("HTTP_X_MS_CLIENT_APP_ID", CallerIdentityType.APPLICATION_ID, "x-ms-client-app-id"),
    ("HTTP_X_MS_CLIENT_TENANT_ID", CallerIdentityType.TENANT_ID, "x-ms-client-tenant-id"),
    ("HTTP_X_MS_CLIENT_OBJECT_ID", CallerIdentityType.OBJECT_ID, "x-ms-client-object-id"),
)

Describe = Callable[[Mapping[str, Any], int, Record], Record | None]
"""What may change a record or veto it: called with the WSGI environment, the status code (500 when the application
raised before it gave one, 101 when it took the connection over) and the record; returns the record to send, or None for
none."""


@dataclass(slots=True)
class RequestFacts:
    """What the application knows about a request, and its WSGI environment does not. Frameworks fill it in."""

    route: str = ""
    """The pattern that the path matched: ``/things/<int:number>``."""
    method: str = ""
    """The method that it was handled as, where that may be another than was sent: ``DELETE`` for ``delete``."""
    user: str = ""
    """The name by which the application knows who is signed in."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the route took from the path; recorded as texts, in ``custom_data["arguments"]``."""
    failure: str = ""
    """Type and text of the exception that the framework answered for; see :meth:`tell_failure`."""
    error: Exception | None = None
    """What kept the application from saying all of that; it is counted and told of."""

    def tell_failure(self, error: BaseException) -> None:
        """A view raised *error*, and the framework made a response of it."""
        self.failure = _named(error)


def facts_of(environ: Mapping[str, Any]) -> RequestFacts | None:
    """Where the application may say what it knows about this request; None when no record will be made of it."""
    return environ.get(FACTS_KEY)


@dataclass(slots=True)
class RequestCounts:
    """What became of the requests that have ended. Each is in one of the first four."""

    recorded: int = 0
    """The client took their records."""
    excluded: int = 0
    """Their paths are in ``exclude``."""
    vetoed: int = 0
    """``describe`` returned None."""
    lost: int = 0
    """Something went wrong: the rules refused the record, the queue was full, the client was closed."""
    incomplete: int = 0
    """``describe``, or what should have told the facts, raised; the request was recorded without them. Counted beside
    the others."""


class AuditMiddleware:
    """Sends one record for each request when its response has ended.

    The operation is the method with the matched route, or with the path; its type is the method's (POST creates, PUT
    and PATCH update, DELETE deletes, all else reads), its result the status's, a failure where the application raised,
    unknown where it took the connection over (a WebSocket).
    The caller's address is the peer's, its agent ``User-Agent``; it is known by the application's user,
    ``REMOTE_USER``, and a TLS certificate that the server verified. The target is the path, and in paths of the Azure
    form subscription, resource group, provider and resource too. Nothing is taken from the query, which may have
    secrets in it.

    Whatever goes wrong with a record, the request does not notice: it is counted in :attr:`counts`, and told on the
    client's channel (``NOT_RECORDED``, ``INCOMPLETE`` or ``QUEUE_FULL``) and in its log. Inside another AuditMiddleware
    it does nothing: one request is one record.

    :param app: the WSGI application.
    :param client: takes the records; open for as long as requests come.
    :param audit_type: of all the records: ``CONTROL_PLANE`` or ``DATA_PLANE``.
    :param describe: changes records or vetoes them; see :data:`Describe`. When it raises, the record goes without it.
    :param exclude: paths of which no record is made, as patterns of ``fnmatch``: ``"/healthz"``, ``"/static/*"``.
    :param trusted_proxies: addresses and networks of peers whose word is taken: for the caller's address
        (``X-Forwarded-For``, ``Forwarded``), and for who it is (``x-ms-client-principal-name`` and the like). Peers on
        a Unix socket are 127.0.0.1. When both forwarding headers are there and say different things, one of them may be
        the client's own: then neither is believed, and ``custom_data["forwarded_for"]`` has both.
    :param access_level: the access level that the operations need. Empty is unknown.
    :param strict: leave records as they are, for the rules to refuse what is missing; otherwise they go through
        :func:`~geventaudit.fill_unknown`.
    :raises ValueError, TypeError: for parameters that cannot be.
    """

    def __init__(
        self,
        app: WSGIApplication,
        client: AuditClient,
        *,
        audit_type: AuditType = AuditType.CONTROL_PLANE,
        describe: Describe | None = None,
        exclude: Iterable[str] = (),
        trusted_proxies: Iterable[str | Address | Network] = (),
        access_level: str = "",
        strict: bool = False,
    ) -> None:
        # In a request, it would be the request that fails.
        if not isinstance(client, AuditClient):
            raise TypeError(f"client must be a Client or a BaseClient, got {client!r}")
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {app!r}")
        if describe is not None and not callable(describe):
            raise TypeError(f"describe must be a function of (environ, status, record), got {describe!r}")
        if not isinstance(access_level, str):
            raise TypeError(f"access_level must be text, got {access_level!r}")
        if audit_type not in (AuditType.CONTROL_PLANE, AuditType.DATA_PLANE):
            raise ValueError(f"audit_type must be AuditType.CONTROL_PLANE or AuditType.DATA_PLANE, got {audit_type!r}")
        for name, value in (("exclude", exclude), ("trusted_proxies", trusted_proxies)):
            if isinstance(value, str | bytes):
                raise TypeError(f"{name} must be a list, got {value!r}: write [{value!r}]")
            if not isinstance(value, Iterable):
                raise TypeError(f"{name} must be a list, got {value!r}")
        exclude = list(exclude)
        for each in exclude:
            if not isinstance(each, str):
                raise TypeError(f'exclude must be a list of patterns like "/static/*", got {each!r} in it')
        self.counts = RequestCounts()
        self._app = app
        self._client = client
        self._audit_type = AuditType(audit_type)
        self._describe = describe
        self._excluded = re.compile("|".join(fnmatch.translate(each) for each in exclude) or r"(?!)")
        self._proxies = TrustedProxies(trusted_proxies)
        self._access_level = access_level
        self._strict = strict
        self._hub: _HubWatch | None = _HubWatch(client)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if FACTS_KEY in environ:
            return self._app(environ, start_response)
        try:
            request = _Request(environ)
        except Exception as error:  # an environment that is not as WSGI says; the application may like it
            self._lose(error)
            return self._app(environ, start_response)
        if self._excluded.match(request.path):
            self.counts.excluded += 1
            environ[FACTS_KEY] = None
            return self._app(environ, start_response)

        if (hub := self._hub) is not None and hub.is_settled():  # another thread may find it out at the same time
            self._hub = None

        def start(status: str, *args: Any, **kwargs: Any) -> Callable[[bytes], object]:
            request.status = status
            return start_response(status, *args, **kwargs)  # by name is not WSGI, but servers take it

        environ[FACTS_KEY] = request.facts
        try:
            body = self._app(environ, start)
        except BaseException as error:
            request.failed(error)
            self._record(request)
            raise
        return _until_closed(body, request, self._record)

    # -- the record ----------------------------------------------------------------------------------------------------

    def _record(self, request: _Request) -> None:
        """Send the record of a request that has ended. Raises nothing but what others throw into this greenlet."""
        if request.is_over:
            return
        request.is_over = True
        try:
            record = self._described(request)
            if record is None:
                self.counts.vetoed += 1
                return
            self._client.send(Msg(self._audit_type, record if self._strict else fill_unknown(record)))
            self.counts.recorded += 1
            if (hub := self._hub) is not None:
                hub.ask()
        except QueueFullError:  # the client tells of it
            self.counts.lost += 1
        except Exception as error:
            self._lose(error)
        except BaseException:  # a Timeout, a kill: those are for whoever set them
            self.counts.lost += 1
            raise

    def _lose(self, error: Exception) -> None:
        self.counts.lost += 1
        self._client.report(error)

    def _miss(self, what: str, error: Exception) -> None:
        self.counts.incomplete += 1
        missing = AuditError(f"recorded without {what}: {_named(error)}")
        missing.__cause__ = error
        self._client.report(missing, recorded=True)

    def _described(self, request: _Request) -> Record | None:
        if request.facts.error is not None:
            self._miss("all that the application knows (the user, say)", request.facts.error)
        record = self._record_of(request)
        if self._describe is None:
            return record
        try:
            described = self._describe(request.environ, request.code, record)
            if isinstance(described, Record | None):
                return described
            raise TypeError(f"describe must return a Record, or None for none, returned a {type(described).__name__}")
        except Exception as error:
            self._miss("what describe would have said", error)
            return self._record_of(request)  # anew: it may have been changed by half

    def _record_of(self, request: _Request) -> Record:
        environ, facts = request.environ, request.facts
        trusted = self._proxies.trust(request.peer)
        caller, contradictions = request.address, None
        if trusted:
            caller, contradictions = self._proxies.caller(request.peer, environ)
        custom: dict[str, Any] = {"forwarded_for": contradictions} if contradictions else {}
        if facts.arguments:
            custom["arguments"] = {_text(key): _text(value) for key, value in facts.arguments.items()}
        result, description = request.result()
        method = facts.method or request.method
        return Record(
            operation_name=f"{_text(method)} {_text(facts.route) or request.path}",
            operation_type=_TYPES.get(method, OperationType.READ),
            operation_result=result,
            operation_result_description=description,
            operation_access_level=self._access_level,
            caller_agent=_text(_unicode(environ.get("HTTP_USER_AGENT", ""))),
            caller_ip_address=caller,
            caller_identities=_identities(request, trusted),
            target_resources={"Path": [TargetResource(request.path)], **_azure_targets(request.path)},
            custom_data=custom,
        )


class _HubWatch:
    """Whether the hub that sends a client's records runs at all. Under gevent's servers, the next request knows.

    Asked with the first record and looked at as later requests begin, until it had a turn, or it was said that it has
    none: after that, requests pay nothing for it.
    """

    def __init__(self, client: AuditClient) -> None:
        self._client = client
        self._asked: float | None = None  # when, by the monotonic clock
        self._process = 0
        self._has_run = False

    def ask(self) -> None:
        """Have it say so when it runs."""
        if self._asked is None:
            self._asked, self._process = time.clock_gettime(time.CLOCK_MONOTONIC), os.getpid()
            try:
                # A greenlet of this thread would prove nothing: the client's hub sends, often that of another thread.
                self._client.call_soon(self._run)
            except ClientClosedError:  # its thread ended just now; the next request will be told so
                self._has_run = True

    def _run(self) -> None:
        self._has_run = True

    def is_settled(self) -> bool:
        """Whether there is nothing more to find out. Warns when it should have run by now and did not."""
        if self._has_run:
            return True
        if self._asked is None or time.clock_gettime(time.CLOCK_MONOTONIC) - self._asked < _PATIENCE:
            return False
        if self._process != os.getpid():  # it was the parent's that was asked
            self._asked = None
            return False
        self._has_run = True  # for other threads: it is told once
        logger.warning(
            "records wait unsent: for %.0f seconds, the gevent hub of the client's thread has had no turn. It has none "
            "under servers that know nothing of gevent. Use gunicorn -k gevent, or patch: python -m gevent.monkey "
            "--module flask run; with Django, python -m gevent.monkey manage.py runserver --noreload",
            time.clock_gettime(time.CLOCK_MONOTONIC) - self._asked,
        )
        return True


class _Request:
    """One request from its beginning to the end of its response."""

    __slots__ = (
        *("address", "certificate", "environ", "error", "facts", "is_over", "is_whole", "method", "path", "peer"),
        "status",
    )

    def __init__(self, environ: WSGIEnvironment) -> None:
        # Read now what applications and middlewares inside may rewrite: a peer is trusted for who it really is.
        self.environ = environ
        self.facts = RequestFacts()
        self.method: str = environ["REQUEST_METHOD"].upper()  # as frameworks do: "delete" deletes
        self.path = _text(_unicode(environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""))) or "/"
        remote = environ.get("REMOTE_ADDR")
        # A Unix socket's peer is "" in gunicorn; gevent's server says nothing of it, and of the port that it is none.
        is_local = remote == "" or (remote is None and environ.get("SERVER_PORT") == "")
        self.peer = address_of("127.0.0.1" if is_local else remote or "")
        self.address = "" if self.peer is None else str(self.peer)
        self.certificate = _certificate(environ) if environ.get("wsgi.url_scheme") == "https" else None
        self.status: str | None = None
        self.error = ""
        self.is_whole = False
        self.is_over = False

    def failed(self, error: BaseException) -> None:
        """The application raised. Only the text is kept: the error itself would keep all its frames."""
        if self.was_handed_over and isinstance(error, StopIteration):
            return  # so gunicorn is told that the connection is no longer its own
        self.error = _named(error)

    @property
    def was_handed_over(self) -> bool:
        """The application spoke another protocol on the connection, by itself: WSGI has no word for that."""
        return self.status is None and "HTTP_UPGRADE" in self.environ

    @property
    def code(self) -> int:
        if self.was_handed_over and not self.error:
            return 101
        try:
            return int((self.status or "")[:3])
        except ValueError:
            return 500

    def result(self) -> tuple[OperationResult, str]:
        """How it ended, and what there is to say about it."""
        if self.was_handed_over and not self.error:
            upgrade = _text(_unicode(self.environ["HTTP_UPGRADE"]))
            return OperationResult.UNKNOWN, f"the application took the connection over ({upgrade})"
        if self.error or self.status is None:
            return OperationResult.FAILURE, self.error or "the application gave no status"
        # A cut response is no failure of the operation: what was asked for was done, and what was sent may be read.
        cut = "" if self.is_whole or self.method == "HEAD" else "the response was not taken to its end"
        if self.code < 400:
            return OperationResult.SUCCESS, cut
        said = (_text(_unicode(self.status)), self.facts.failure, cut)
        return OperationResult.FAILURE, "; ".join(filter(None, said))


# -- the end of a response ---------------------------------------------------------------------------------------------


def _until_closed(body: Iterable[bytes], request: _Request, over: Callable[[_Request], None]) -> Iterable[bytes]:
    """*body*, calling *over* when the server has closed it."""
    wrapper = request.environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type) and isinstance(body, wrapper) and _watch_file(body, request, over):
        return body
    return (_SizedBody if hasattr(body, "__len__") else _Body)(body, request, over)


def _watch_file(file: Any, request: _Request, over: Callable[[_Request], None]) -> bool:
    """A server's own file wrapper goes through as it is, for the server to use the kernel's sendfile."""
    close = getattr(file, "close", None)

    def close_and_tell() -> None:
        try:
            if close is not None:
                close()
        finally:
            over(request)

    try:
        file.close = close_and_tell
    except (AttributeError, TypeError):
        return False
    request.is_whole = True  # as far as can be known here
    return True


class _Body:
    """A response's body that notices its end. A server closes it when the response has ended, however it did."""

    __slots__ = ("_body", "_is_begun", "_over", "_request")

    def __init__(self, body: Iterable[bytes], request: _Request, over: Callable[[_Request], None]) -> None:
        self._body = body
        self._is_begun = False
        self._request = request
        self._over = over

    def __iter__(self) -> Iterator[bytes]:
        # Some servers go through a list once more while they write it, to add up its lengths.
        is_for_writing, self._is_begun = not self._is_begun, True
        try:
            for chunk in self._body:  # noqa: UP028  ("yield from" would close the application's iterator by itself)
                yield chunk
        except GeneratorExit:  # the server takes no more
            raise
        except BaseException as error:
            self._request.failed(error)
            raise
        if is_for_writing:
            self._request.is_whole = True

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            self._request.failed(error)
            raise
        finally:
            self._over(self._request)

    def __del__(self) -> None:
        # Whoever calls an application must close its response, and some middlewares forget. In a greenlet of its own:
        # garbage may be collected in the middle of a send().
        if not self._request.is_over:
            try:
                gevent.spawn(self._over, self._request)
            except RuntimeError:  # the interpreter ends, and with it greenlets; clients were closed before
                pass


class _SizedBody(_Body):
    """One with a length, from which servers conclude ``Content-Length``."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)  # type: ignore[arg-type]


# -- what a request says -----------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """*value* as a text that a record can have and that shows as what it is.

    Its length is bounded; lone surrogates, and whatever breaks lines or hides text, are escaped.
    """
    try:
        text = str(value)
    except Exception:
        return f"a {type(value).__name__} without text"
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _named(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, _text(error))))


def _unicode(text: str) -> str:
    """What was sent, from the Latin-1 that WSGI makes of its bytes; bytes that are no UTF-8 are escaped."""
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # not from a server: somebody put a text there
        return text


def _identities(request: _Request, trusted: bool) -> dict[CallerIdentityType, list[CallerIdentity]]:
    found: dict[CallerIdentityType, list[CallerIdentity]] = {}
    environ = request.environ
    names = {_text(request.facts.user): "the application's user"}
    names.setdefault(_text(_unicode(environ.get("REMOTE_USER") or "")), "REMOTE_USER")
    names.pop("", None)
    if names:
        found[CallerIdentityType.USERNAME] = [CallerIdentity(name, source) for name, source in names.items()]
    if request.certificate is not None:
        found[CallerIdentityType.CERTIFICATE] = [request.certificate]
    if trusted:
        for key, kind, header in _PRINCIPAL_HEADERS:
            if value := environ.get(key):
                found[kind] = [CallerIdentity(_text(_unicode(value)), header)]
    return found


def _certificate(environ: Mapping[str, Any]) -> CallerIdentity | None:
    """The TLS certificate with which the client proved who it is, where the server tells of one."""
    if environ.get("SSL_CLIENT_VERIFY") == "SUCCESS" and environ.get("SSL_CLIENT_S_DN"):
        return CallerIdentity(_text(_unicode(environ["SSL_CLIENT_S_DN"])), "subject of the TLS client certificate")
    sock: Any = environ.get("gunicorn.socket") or environ.get("gunicorn.sock")  # the latter: worker gevent_pywsgi
    try:
        certificate = sock.getpeercert()  # empty when it was not verified
        if not certificate:
            return None
        subject = ", ".join(f"{name}={value}" for part in certificate.get("subject", ()) for name, value in part)
        digest = hashlib.sha256(sock.getpeercert(True)).hexdigest()
    except (AttributeError, OSError, ValueError):  # another server, a proxy's TLS, or the client has gone
        return None
    return CallerIdentity(_text(subject or digest), f"subject of the TLS client certificate with SHA-256 {digest}")


def _azure_targets(path: str) -> dict[str, list[TargetResource]]:
    """Subscription, resource group, provider and resource of a path of the Azure form; empty for other paths.

    The form is ``/subscriptions/S/resourceGroups/G/providers/N/TYPE/NAME/...``, its first two pairs optional, in any
    case of letters. The resource stands under its type (``N/TYPE``), which has no entries when the path names a whole
    collection. What follows the last pair (an action, a collection in a resource) is in the path alone.
    """
    found: dict[str, list[TargetResource]] = {}
    rest = path[1:].split("/")
    for segment, kind in (("subscriptions", "SubscriptionId"), ("resourcegroups", "ResourceGroup")):
        if rest[0].lower() == segment and len(rest) > 1 and rest[1]:
            found[kind] = [TargetResource(rest[1])]
            rest = rest[2:] or [""]
    kinds: list[str] = []
    names: list[str] = []
    if rest[0].lower() == "providers":
        while len(rest) > 1 and rest[1] and rest[0]:
            if rest[0].lower() == "providers":  # one more: a resource that extends the one before
                kinds, names = [rest[1]], []
            else:
                kinds.append(rest[0])
                names.append(rest[1])
            rest = rest[2:] or [""]
    if kinds:
        found["ResourceProvider"] = [TargetResource(kinds[0])]
        if names:
            found["/".join(kinds)] = [TargetResource("/".join(names))]
        elif rest[0]:
            found[f"{kinds[0]}/{rest[0]}"] = []
    return found
