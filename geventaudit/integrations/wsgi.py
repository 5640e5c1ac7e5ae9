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

from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from geventaudit import (
    AuditClient,
    AuditType,
    Msg,
    OperationType,
    Record,
    TargetResource,
    fill_unknown,
)

from .http.asking import LEVELS, TARGET, Questions
from .http.current import current_facts, set_current
from .http.declarations import Category, Declaration, Target, declare, filled, levels_of, plane_of, redacted
from .http.facts import FACTS_KEY, RequestFacts, facts_of
from .http.forwarding import Address, Network, TrustedProxies
from .http.frameworks import attach, read_environ
from .http.hooks import check_described, check_hook, report_missing
from .http.hub_watch import HubWatch
from .http.paths import Exclusion, azure_targets
from .http.redaction import SECRET_NAMES, Redact, Redaction, redact_secrets
from .http.request import Request, identities_of
from .http.response import until_closed
from .http.text import MAX_TEXT, printable, sent_text
from .http.tracing import identifiers_of
from .http.views import audited, unaudited

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "FACTS_KEY",
    "MAX_TEXT",
    "SECRET_NAMES",
    "AuditMiddleware",
    "Category",
    "Declaration",
    "Describe",
    "Levels",
    "Redact",
    "RequestCounts",
    "RequestFacts",
    "Target",
    "audited",
    "facts_of",
    "redact_secrets",
    "unaudited",
]

_ENTERED_KEY = "geventaudit.entered"  # of the WSGI environment: the middlewares that the request has entered

_TYPES = {
    "POST": OperationType.CREATE,
    "PUT": OperationType.UPDATE,
    "PATCH": OperationType.UPDATE,
    "DELETE": OperationType.DELETE,
}


def type_of(method: str) -> OperationType:
    """Return the type of an operation that declares none."""
    return _TYPES.get(method, OperationType.READ)


Describe = Callable[[Mapping[str, Any], int, Record], Record | None]
"""A function that changes a record or vetoes it: called with the WSGI environment, the status code (500 if the
application raised before its first bytes, 101 if it took the connection over) and the record. Returns the record to
send, or None for none. In a Flask application, ``g``, ``request`` and ``session`` are those of the request."""

Levels = Callable[[Mapping[str, Any]], Iterable[str] | str | None]
"""A function of the WSGI environment that returns the access levels of the caller: texts, or one text."""


@dataclass(slots=True)
class RequestCounts:
    """The numbers of requests that have ended. Each request is in one of the first four."""

    recorded: int = 0
    """The client accepted their records."""
    excluded: int = 0
    """Their paths are in ``exclude``, or their views are ``unaudited``."""
    vetoed: int = 0
    """``describe`` returned None."""
    lost: int = 0
    """Something went wrong: the rules refused the record, the queue was full, the client was closed."""
    incomplete: int = 0
    """``describe``, ``redact``, ``target``, ``caller_access_levels`` or a source of facts raised; the request was
    recorded without them. Counted beside the others."""


class AuditMiddleware:
    """Sends one record for each request when its response has ended.

    The operation is declared by the view (:func:`audited`); otherwise it is the method with the matched route, or with
    the path. Its type is the method's: POST creates, PUT and PATCH update, DELETE deletes, all else reads.
    Its result is the status's: a failure from 400 on, for an answer that leads to the login page, and for a sign-in
    that failed; a failure if the application raised; unknown if it took the connection over (a WebSocket).
    ``custom_data["status"]`` has the status code, ``custom_data["location"]`` the target of a redirect. ``custom_data``
    has ``request_id`` and ``traceparent`` too, if the headers ``X-Request-Id`` and ``traceparent`` are valid.
    The caller's address is the peer's, its agent ``User-Agent``. Its identities are the application's user,
    ``REMOTE_USER``, and a TLS certificate that the server verified. The target is the declared one, and the path; in
    paths of the Azure form subscription, resource group, provider and resource too. Nothing is taken from the query.

    A failure to record never fails the request. It is counted in :attr:`counts`, and is a notification of the client
    (``NOT_RECORDED``, ``INCOMPLETE`` or ``QUEUE_FULL``) and a line in its log. Inside another AuditMiddleware it does
    nothing: one request is one record. A request that the application makes of itself, by calling its own WSGI
    application, has a record of its own.

    :param app: the WSGI application. A Falcon, Bottle or Pyramid application is given a hook that makes its routes and
        errors known. Inside another middleware, ``geventaudit.integrations.falcon.attach(app)`` and the like do that.
    :param client: takes the records; open for as long as requests come.
    :param audit_type: of the records: ``CONTROL_PLANE`` or ``DATA_PLANE``. This and ``category``, ``access_level``,
        ``target`` and ``redact`` are the defaults of views that do not declare their own.
    :param describe: changes records or vetoes them; see :data:`Describe`. If it raises, the record goes without it.
    :param redact: a function of a text's name and the text, which returns the text to record. It gets each argument of
        the route by its name, and ``path``, ``location``, ``description`` (reasons and exceptions) and ``target``
        (texts of resources that a function returned). The default, :func:`redact_secrets`, removes values whose names
        have one of :data:`SECRET_NAMES` in them.
    :param exclude: paths of which no record is made, as patterns of ``fnmatch``: ``"/healthz"``, ``"/static/*"``. They
        match ``PATH_INFO``, the path that *app* routes on: without the prefix at which it is mounted. Paths with dot
        segments, ``//``, backslashes or a second percent-encoding are always recorded. ``*`` matches slashes too, so
        name folders and not endings: ``"*.css"`` would hide ``DELETE /users/ada/x.css`` in an application that routes
        by the beginning of a path.
    :param trusted_proxies: addresses and networks of peers whose headers are believed: the caller's address
        (``X-Forwarded-For``, ``Forwarded``), and its identity (``x-ms-client-principal-name`` and the like). Peers on a
        Unix socket are 127.0.0.1. If both forwarding headers are there and contradict each other, one of them may be
        the client's own: then neither is believed, and ``custom_data["forwarded_for"]`` has both.
    :param category: of the operations: one or more members of ``OperationCategory``. None is unknown.
    :param category_description: with ``OperationCategory.OTHER``, the category in words.
    :param access_level: the access level that the operations need. Empty is unknown.
    :param caller_access_levels: a function of the WSGI environment that returns the caller's roles. It is called once
        for each request, and for each task that the request queues, while the request is open: in Flask, with ``g`` and
        ``request``; in Django, Falcon and Pyramid, ``facts_of(environ).request`` is the framework's. If it raises, the
        levels are unknown.
    :param target: the target of the operations, beside the path: see :func:`audited`.
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
        category: Category | None = None,
        category_description: str = "",
        access_level: str = "",
        caller_access_levels: Levels | None = None,
        target: Target | None = None,
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
        if caller_access_levels is not None:
            check_hook("caller_access_levels", caller_access_levels, "environ")
        if record not in ("after", "before"):
            raise ValueError(f"record must be 'after' or 'before', got {record!r}")
        for name, value in (("exclude", exclude), ("trusted_proxies", trusted_proxies)):
            if isinstance(value, str | bytes):
                raise TypeError(f"{name} must be a list, got {value!r}: write [{value!r}]")
            if not isinstance(value, Iterable):
                raise TypeError(f"{name} must be a list, got {value!r}")
        self.counts = RequestCounts()
        self.app = app
        self.exclusion = Exclusion(exclude)
        self.defaults = declare(
            category=category,
            category_description=category_description,
            audit_type=plane_of(audit_type),
            access_level=access_level,
            target=target,
            redact=redact,
        )
        self.caller_access_levels = caller_access_levels
        self._client = client
        self.describe = describe
        self._proxies = TrustedProxies(trusted_proxies)
        self._strict = strict
        self._records_before = record == "before"
        self._hub: HubWatch | None = HubWatch(client)
        attach(app)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        entered = environ.get(_ENTERED_KEY, ())
        environ[_ENTERED_KEY] = entered if self in entered else (*entered, self)
        # A middleware that is entered again serves a request that the application makes of this one: a part of a batch,
        # say, whose environment is a copy.
        if FACTS_KEY in environ and self not in entered:
            return self.app(environ, start_response)
        try:
            request = Request(environ)
            is_excluded = self.exclusion.matches(request.path_info)
        except Exception as error:  # an environment that is not as WSGI says; the application may like it
            self._lose(error)
            return self.app(environ, start_response)
        request.facts.questions = Questions(self.caller_access_levels, self.defaults.target)
        request.facts.outer = current_facts()
        return (self._serve_excluded if is_excluded else self._serve)(request, start_response)

    def _serve(self, request: Request, start_response: StartResponse) -> Iterable[bytes]:
        if (hub := self._hub) is not None and hub.is_settled():
            self._hub = None  # another thread may find it out at the same time
        request.environ[FACTS_KEY] = request.facts
        request.facts.record_so_far = partial(self._record_so_far, request)
        set_current(request.facts)
        # write() hands chunks to the server, and any of them may be the last.
        on_write = partial(self._record, request) if self._records_before else None
        try:
            body = self.app(request.environ, request.watch(start_response, on_write))
        except BaseException as error:
            request.failed(error)
            self._record(request)
            raise
        return until_closed(body, request, self._record, before=self._records_before)

    def _serve_excluded(self, request: Request, start_response: StartResponse) -> Iterable[bytes]:
        """Serve a request with an excluded path. It is recorded if the application routed it by another path."""
        outer = request.facts.outer
        request.environ[FACTS_KEY] = None
        set_current(None)
        try:
            body = self.app(request.environ, request.watch(start_response, None))
        except BaseException as error:
            request.failed(error)
            if not self._is_excluded_still(request):
                self._record(request)
            raise
        finally:
            set_current(outer)
            request.environ[FACTS_KEY] = outer
        if self._is_excluded_still(request):
            return body
        return until_closed(body, request, self._record, before=self._records_before)

    def _is_excluded_still(self, request: Request) -> bool:
        """Count a request that is excluded, unless the application routed it by another path."""
        still_holds = self.exclusion.still_holds(request.path_info, request.script, request.environ)
        self.counts.excluded += still_holds
        return still_holds

    # -- the record ----------------------------------------------------------------------------------------------------

    def _record(self, request: Request) -> None:
        """Send the record of a request that has ended. Raises only what others throw into this greenlet."""
        if request.is_over:
            return
        request.is_over = True
        try:
            read_environ(request.environ, request.facts)
            if request.facts.is_unaudited:
                self.counts.excluded += 1
                return
            declared = self._declared(request.facts)
            record = self._described(request, declared)
            if record is None:
                self.counts.vetoed += 1
                return
            audit_type = declared.audit_type or AuditType.CONTROL_PLANE
            self._client.send(Msg(audit_type, record if self._strict else fill_unknown(record)))
            self.counts.recorded += 1
            if (hub := self._hub) is not None:
                hub.ask()
        except Exception as error:
            self._lose(error)
        except BaseException:  # a Timeout, a kill: those are for their senders
            self.counts.lost += 1
            raise
        finally:
            request.end()

    def _record_so_far(self, request: Request) -> Record:
        """Return the record of a request that is being served, as far as it is known."""
        facts = request.facts
        try:
            if facts.refresh is not None:
                facts.refresh()
        except Exception as error:  # the caller is handed on without what the framework knows
            facts.error = error
        declared = self._declared(facts)
        redaction = Redaction(declared.redact or redact_secrets, facts.arguments or {})
        levels = _levels(facts) or facts.questions.levels_now(request.environ)
        return self._record_of(request, declared, redaction, levels)

    def _lose(self, error: Exception) -> None:
        self.counts.lost += 1
        self._client.report(error)

    def _miss(self, part: str, error: Exception) -> None:
        self.counts.incomplete += 1
        report_missing(self._client, part, error)

    def _declared(self, facts: RequestFacts) -> Declaration:
        """Return the declaration of the request, over the defaults of the application."""
        if facts.declaration is None:
            return self.defaults
        if not isinstance(facts.declaration, Declaration):
            kind = type(facts.declaration).__name__
            self._miss("its declaration", TypeError(f"must be the result of audited(...), got a {kind}"))
            return self.defaults
        return facts.declaration.over(self.defaults)

    def _described(self, request: Request, declared: Declaration) -> Record | None:
        environ, facts = request.environ, request.facts
        if facts.error is not None:
            self._miss("all that the application knows (the user, say)", facts.error)
        context = facts.context or copy_context()
        context.run(facts.ask, environ)  # if no framework has asked
        redaction = Redaction(declared.redact or redact_secrets, facts.arguments or {})
        levels, targets = _levels(facts), _targets(facts, redaction)
        for part, error in facts.questions.errors.items():
            self._miss(part, error)
        record = self._record_of(request, declared, redaction, levels, targets)
        if redaction.error is not None:
            self._miss("the texts that redact failed for", redaction.error)
        if self.describe is None:
            return record
        try:
            return check_described(context.run(self.describe, environ, request.code, record))
        except Exception as failure:
            self._miss("what describe would have said", failure)
            # Anew: the record may have been changed by half.
            return self._record_of(request, declared, redaction, levels, targets)

    def _record_of(
        self,
        request: Request,
        declared: Declaration,
        redaction: Redaction,
        levels: Collection[str] = (),
        targets: Mapping[str, list[TargetResource]] | None = None,
    ) -> Record:
        environ, facts = request.environ, request.facts
        trusted = self._proxies.trust(request.peer)
        caller, contradictions = request.address, None
        if trusted:
            caller, contradictions = self._proxies.caller(request.peer, environ)
        # A middleware inside may have overridden it, by a client's header.
        method = facts.method or str(environ.get("REQUEST_METHOD") or request.method).upper()
        route = printable(facts.route)
        path = redaction.path(request.path, route)
        name = f"{printable(method)} {route or path}"
        custom: dict[str, Any] = {
            "route": declared.operation and name,
            "location": redaction.text("location", request.location),
            "script_name": request.prefix,
            "forwarded_for": contradictions,
            "arguments": {**redaction.arguments},
        }
        result, description = request.result()
        return Record(
            operation_name=declared.operation or name,
            operation_categories=declared.categories,
            operation_category_description=declared.category_description,
            operation_type=declared.type or type_of(method),
            operation_result=result,
            operation_result_description=redaction.text("description", description),
            operation_access_level=declared.access_level,
            caller_agent=printable(sent_text(environ.get("HTTP_USER_AGENT", ""))),
            caller_ip_address=caller,
            caller_identities=identities_of(request, trusted=trusted),
            caller_access_levels=levels,
            target_resources={**(targets or {}), "Path": [TargetResource(path)], **azure_targets(path)},
            custom_data={
                "status": request.code,
                **identifiers_of(environ),
                **{key: value for key, value in custom.items() if value},
            },
        )


def _levels(facts: RequestFacts) -> list[str]:
    """Return the caller's access levels, by the facts or by the answer of the application."""
    try:
        return levels_of(facts.caller_access_levels) or facts.questions.levels
    except Exception as error:  # an application may write anything there
        facts.questions.errors[LEVELS] = error
        return []


def _targets(facts: RequestFacts, redaction: Redaction) -> dict[str, list[TargetResource]]:
    """Return the declared resources, without secrets."""
    if not isinstance(facts.target, Mapping):
        return redacted(facts.questions.resources or {}, redaction)
    try:
        return filled(facts.target, redaction.arguments)
    except LookupError as error:
        facts.questions.errors[TARGET] = error
        return {}
