"""A record for each HTTP request: :class:`AuditMiddleware` around any WSGI application.

The middleware keeps what only the beginning of a request has (the peer, the path), and runs the application. The
application and its framework put their knowledge (the matched route, the user) into the :class:`RequestFacts` in the
environment. When the response has ended, all of that becomes one record, and the record is sent.

The gevent hub of the thread that constructed the client sends the records, so that hub has to run. It does under
gevent's servers (``gunicorn -k gevent``), and under development servers that are monkey-patched before they start::

    python -m gevent.monkey --module flask --app myapp run

Unpatched, development servers (``flask run``, Django's ``runserver``, wsgiref) and gunicorn's workers ``sync`` and
``gthread`` never run it: all records wait in memory until the process ends. The middleware says so in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from geventaudit import (
    AuditClient,
    AuditError,
    AuditType,
    Msg,
    OperationType,
    QueueFullError,
    Record,
    TargetResource,
    fill_unknown,
)

from .http.current import set_current
from .http.facts import FACTS_KEY, RequestFacts, facts_of
from .http.forwarding import Address, Network, TrustedProxies
from .http.frameworks import attach, read_environ
from .http.hooks import check_hook
from .http.hub_watch import HubWatch
from .http.paths import Exclusion, azure_targets
from .http.redaction import SECRET_NAMES, Redact, Redaction, redact_secrets
from .http.request import Request, identities_of
from .http.response import until_closed
from .http.text import MAX_TEXT, named, printable, sent_text

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "FACTS_KEY",
    "MAX_TEXT",
    "SECRET_NAMES",
    "AuditMiddleware",
    "Describe",
    "Redact",
    "RequestCounts",
    "RequestFacts",
    "facts_of",
    "redact_secrets",
]

_TYPES = {
    "POST": OperationType.CREATE,
    "PUT": OperationType.UPDATE,
    "PATCH": OperationType.UPDATE,
    "DELETE": OperationType.DELETE,
}

Describe = Callable[[Mapping[str, Any], int, Record], Record | None]
"""A function that changes a record or vetoes it: called with the WSGI environment, the status code (500 if the
application raised before it gave one, 101 if it took the connection over) and the record. Returns the record to send,
or None for none. In a Flask application, ``g``, ``request`` and ``session`` are those of the request."""


@dataclass(slots=True)
class RequestCounts:
    """The numbers of requests that have ended. Each request is in one of the first four."""

    recorded: int = 0
    """The client accepted their records."""
    excluded: int = 0
    """Their paths are in ``exclude``."""
    vetoed: int = 0
    """``describe`` returned None."""
    lost: int = 0
    """Something went wrong: the rules refused the record, the queue was full, the client was closed."""
    incomplete: int = 0
    """``describe``, ``redact`` or a source of facts raised; the request was recorded without them. Counted beside the
    others."""


class AuditMiddleware:
    """Sends one record for each request when its response has ended.

    The operation is the method with the matched route, or with the path. Its type is the method's: POST creates, PUT
    and PATCH update, DELETE deletes, all else reads. Its result is the status's: a failure from 400 on, for an answer
    that leads to the login page, and for a sign-in that failed; a failure if the application raised; unknown if it took
    the connection over (a WebSocket). ``custom_data["status"]`` has the status code, ``custom_data["location"]`` the
    target of a redirect.
    The caller's address is the peer's, its agent ``User-Agent``. Its identities are the application's user,
    ``REMOTE_USER``, and a TLS certificate that the server verified. The target is the path, and in paths of the Azure
    form subscription, resource group, provider and resource too. Nothing is taken from the query.

    A failure to record never fails the request. It is counted in :attr:`counts`, and is a notification of the client
    (``NOT_RECORDED``, ``INCOMPLETE`` or ``QUEUE_FULL``) and a line in its log. Inside another AuditMiddleware it does
    nothing: one request is one record.

    :param app: the WSGI application. A Falcon, Bottle or Pyramid application is given a hook that makes its routes and
        errors known. Inside another middleware, ``geventaudit.integrations.falcon.attach(app)`` and the like do that.
    :param client: takes the records; open for as long as requests come.
    :param audit_type: of all the records: ``CONTROL_PLANE`` or ``DATA_PLANE``.
    :param describe: changes records or vetoes them; see :data:`Describe`. If it raises, the record goes without it.
    :param redact: a function of a text's name and the text, which returns the text to record. It gets each argument of
        the route by its name, and ``path``, ``location`` and ``description`` (reasons and exceptions). The default,
        :func:`redact_secrets`, removes values whose names have one of :data:`SECRET_NAMES` in them.
    :param exclude: paths of which no record is made, as patterns of ``fnmatch``: ``"/healthz"``, ``"/static/*"``. They
        match ``PATH_INFO``, the path that *app* routes on: without the prefix at which it is mounted. Paths with dot
        segments, ``//``, backslashes or a second percent-encoding are always recorded.
    :param trusted_proxies: addresses and networks of peers whose headers are believed: the caller's address
        (``X-Forwarded-For``, ``Forwarded``), and its identity (``x-ms-client-principal-name`` and the like). Peers on a
        Unix socket are 127.0.0.1. If both forwarding headers are there and contradict each other, one of them may be
        the client's own: then neither is believed, and ``custom_data["forwarded_for"]`` has both.
    :param access_level: the access level that the operations need. Empty is unknown.
    :param strict: leave records as they are, for the rules to refuse if something is missing; otherwise they go through
        :func:`~geventaudit.fill_unknown`.
    :param record: ``"after"`` sends the record when the response has ended. ``"before"`` sends it before the last chunk
        of the response, so that no answer is complete without a record; each chunk then waits for the next one.
    :raises ValueError, TypeError: an argument is invalid.
    """

    def __init__(
        self,
        app: WSGIApplication,
        client: AuditClient,
        *,
        audit_type: AuditType = AuditType.CONTROL_PLANE,
        describe: Describe | None = None,
        redact: Redact = redact_secrets,
        exclude: Iterable[str] = (),
        trusted_proxies: Iterable[str | Address | Network] = (),
        access_level: str = "",
        strict: bool = False,
        record: Literal["after", "before"] = "after",
    ) -> None:
        # In a request, it would be the request that fails.
        if not isinstance(client, AuditClient):
            raise TypeError(f"client must be a Client or a BaseClient, got {client!r}")
        if not callable(app):
            raise TypeError(f"app must be a WSGI application, got {app!r}")
        if describe is not None:
            check_hook("describe", describe, "environ", "status", "record")
        check_hook("redact", redact, "name", "text")
        if not isinstance(access_level, str):
            raise TypeError(f"access_level must be text, got {access_level!r}")
        if audit_type not in (AuditType.CONTROL_PLANE, AuditType.DATA_PLANE):
            raise ValueError(f"audit_type must be AuditType.CONTROL_PLANE or AuditType.DATA_PLANE, got {audit_type!r}")
        if record not in ("after", "before"):
            raise ValueError(f"record must be 'after' or 'before', got {record!r}")
        for name, value in (("exclude", exclude), ("trusted_proxies", trusted_proxies)):
            if isinstance(value, str | bytes):
                raise TypeError(f"{name} must be a list, got {value!r}: write [{value!r}]")
            if not isinstance(value, Iterable):
                raise TypeError(f"{name} must be a list, got {value!r}")
        self.counts = RequestCounts()
        self._app = app
        self._client = client
        self._audit_type = AuditType(audit_type)
        self._describe = describe
        self._redact = redact
        self._exclusion = Exclusion(exclude)
        self._proxies = TrustedProxies(trusted_proxies)
        self._access_level = access_level
        self._strict = strict
        self._records_before = record == "before"
        self._hub: HubWatch | None = HubWatch(client)
        attach(app)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if FACTS_KEY in environ:
            return self._app(environ, start_response)
        try:
            request = Request(environ)
            is_excluded = self._exclusion.matches(request.path_info)
        except Exception as error:  # an environment that is not as WSGI says; the application may like it
            self._lose(error)
            return self._app(environ, start_response)
        if not is_excluded and (hub := self._hub) is not None and hub.is_settled():
            self._hub = None  # another thread may find it out at the same time
        environ[FACTS_KEY] = None if is_excluded else request.facts
        set_current(None if is_excluded else partial(self._record_so_far, request))
        # write() hands chunks to the server, and any of them may be the last.
        on_write = partial(self._record, request) if self._records_before and not is_excluded else None
        try:
            body = self._app(environ, request.watch(start_response, on_write))
        except BaseException as error:
            request.failed(error)
            if not (is_excluded and self._is_excluded_still(request)):
                self._record(request)
            raise
        if is_excluded and self._is_excluded_still(request):
            return body
        return until_closed(body, request, self._record, before=self._records_before)

    def _is_excluded_still(self, request: Request) -> bool:
        """Count a request that is excluded, unless the application routed it by another path."""
        still_holds = self._exclusion.still_holds(request.path_info, request.script, request.environ)
        self.counts.excluded += still_holds
        return still_holds

    # -- the record ----------------------------------------------------------------------------------------------------

    def _record(self, request: Request) -> None:
        """Send the record of a request that has ended. Raises only what others throw into this greenlet."""
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
        except QueueFullError:  # the client notifies of it
            self.counts.lost += 1
        except Exception as error:
            self._lose(error)
        except BaseException:  # a Timeout, a kill: those are for their senders
            self.counts.lost += 1
            raise
        finally:
            # Both have the environment, which has the facts: a cycle.
            request.facts.context = request.facts.refresh = None
            set_current(None)

    def _record_so_far(self, request: Request) -> Record | None:
        """Return the record of a request that is being served, as far as it is known; None if the request is over."""
        if request.is_over:
            return None
        facts = request.facts
        try:
            if facts.refresh is not None:
                facts.refresh()
        except Exception as error:  # the caller is handed on without what the framework knows
            facts.error = error
        return self._record_of(request, Redaction(self._redact, facts.arguments or {}))

    def _lose(self, error: Exception) -> None:
        self.counts.lost += 1
        self._client.report(error)

    def _miss(self, part: str, error: Exception) -> None:
        self.counts.incomplete += 1
        missing = AuditError(f"recorded without {part}: {named(error)}")
        missing.__cause__ = error
        self._client.report(missing, recorded=True)

    def _described(self, request: Request) -> Record | None:
        facts = request.facts
        read_environ(request.environ, facts)
        if facts.error is not None:
            self._miss("all that the application knows (the user, say)", facts.error)
        redaction = Redaction(self._redact, facts.arguments or {})
        record = self._record_of(request, redaction)
        if redaction.error is not None:
            self._miss("the texts that redact failed for", redaction.error)
        if self._describe is None:
            return record
        try:
            context = facts.context or copy_context()
            described = context.run(self._describe, request.environ, request.code, record)
            if isinstance(described, Record | None):
                return described
            raise TypeError(f"describe must return a Record, or None for none, returned a {type(described).__name__}")
        except Exception as error:
            self._miss("what describe would have said", error)
            return self._record_of(request, redaction)  # anew: it may have been changed by half

    def _record_of(self, request: Request, redaction: Redaction) -> Record:
        environ, facts = request.environ, request.facts
        trusted = self._proxies.trust(request.peer)
        caller, contradictions = request.address, None
        if trusted:
            caller, contradictions = self._proxies.caller(request.peer, environ)
        custom: dict[str, Any] = {
            "location": redaction.text("location", request.location),
            "script_name": request.prefix,
            "forwarded_for": contradictions,
            "arguments": {**redaction.arguments},
        }
        result, description = request.result()
        # A middleware inside may have overridden it, by a client's header.
        method = facts.method or str(environ.get("REQUEST_METHOD") or request.method).upper()
        route = printable(facts.route)
        path = redaction.path(request.path, route)
        return Record(
            operation_name=f"{printable(method)} {route or path}",
            operation_type=_TYPES.get(method, OperationType.READ),
            operation_result=result,
            operation_result_description=redaction.text("description", description),
            operation_access_level=self._access_level,
            caller_agent=printable(sent_text(environ.get("HTTP_USER_AGENT", ""))),
            caller_ip_address=caller,
            caller_identities=identities_of(request, trusted=trusted),
            target_resources={"Path": [TargetResource(path)], **azure_targets(path)},
            custom_data={"status": request.code, **{key: value for key, value in custom.items() if value}},
        )
