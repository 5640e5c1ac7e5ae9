"""The application's knowledge about a request: frameworks and applications write, the middleware reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from geventaudit import Record

from .asking import Questions
from .declarations import Declaration, Target
from .text import name_of, named

__all__ = ["FACTS_KEY", "RequestFacts", "facts_of"]

FACTS_KEY = "geventaudit.facts"
"""The key of a WSGI environment's :class:`RequestFacts`. Its value is None if no record will be made."""


@dataclass(slots=True)
class RequestFacts:
    """Facts about a request that its WSGI environment does not have. Frameworks fill them in."""

    route: str = ""
    """The pattern that the path matched: ``/things/<int:number>``."""
    method: str = ""
    """The method by which the request was handled, if another than it came with: ``DELETE`` for ``delete``."""
    user: str = ""
    """The name of the user who is signed in."""
    account: str = ""
    """The name with which a sign-in was tried and failed; see :meth:`login_failed`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The arguments that the route took from the path; recorded as texts, in ``custom_data["arguments"]``."""
    failure: str = ""
    """The reason of an answer: type and text of an exception that the framework answered, or the text of an
    ``abort()``."""
    denied: str = ""
    """The reason why an answer below 400 is a failure: it leads to the login page, say."""
    signed_out: bool = False
    """True if the request signed the user out: an answer that leads to the login page is a success then."""
    error: Exception | None = None
    """An exception that kept the facts from being complete. It is counted and notified of."""
    context: Context | None = None
    """The context in which ``describe`` runs."""
    refresh: Callable[[], object] | None = None
    """Adds what the framework knows by now (the user) while the request is served. None without such a source."""
    declaration: Declaration | None = None
    """The declaration of the matched view: the result of ``audited(...)``."""
    is_unaudited: bool = False
    """True if no record is to be made of this request."""
    caller_access_levels: Collection[str] = ()
    """The access levels that the caller has. Empty: ``caller_access_levels`` of the middleware is asked for them."""
    request: Any = None
    """The request object of Django, Falcon or Pyramid, until the record is sent."""
    record_so_far: Callable[[], Record] | None = None
    """Returns the record as far as it is known. None before the request begins, and when it is over."""
    outer: RequestFacts | None = None
    """The facts of the request in which the application made this one; None for a request of a client."""
    questions: Questions = field(default_factory=Questions)
    """The questions that the application is asked about the request."""

    @property
    def target(self) -> Target | None:
        """The declared target, or the application's default."""
        declared = self.declaration.target if isinstance(self.declaration, Declaration) else None
        return declared or self.questions.default_target

    def ask(self, environ: Mapping[str, Any]) -> None:
        """Ask the application for the caller's access levels and for the target, once.

        The integration of a framework does so when the view has ended and the request is open: its database, say.
        """
        self.ask_levels(environ)
        self.questions.ask_target(self.target, environ)

    def ask_levels(self, environ: Mapping[str, Any]) -> None:
        """Ask the application for the caller's access levels, once: before the user is signed out, say."""
        if not self.caller_access_levels:
            self.questions.ask_levels(environ)

    def tell_failure(self, error: BaseException) -> None:
        """Note that a view raised *error*, and the framework made a response of it."""
        self.failure = named(error)

    def login_failed(self, account: object) -> None:
        """Note that a sign-in as *account*, a name or None, was tried and failed. The request is a failure then."""
        self.account = name_of(account) or "an account without name"

    def login_succeeded(self) -> None:
        """Note that a sign-in succeeded, after those that failed in the same request."""
        self.account = ""


def facts_of(environ: Mapping[str, Any]) -> RequestFacts | None:
    """Return the facts of this request, to be filled in; None if no record will be made of it."""
    return environ.get(FACTS_KEY)
