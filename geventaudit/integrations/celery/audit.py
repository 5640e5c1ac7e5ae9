"""The signals of Celery, and the records that are made of them."""

from __future__ import annotations

import fnmatch
import logging
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from billiard import current_process
from celery import Celery, signals, states
from celery.app.task import Context
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state as worker_state

from geventaudit import (
    AuditClient,
    AuditType,
    Msg,
    Record,
    TargetResource,
    fill_unknown,
)
from geventaudit.integrations.http.declarations import plane_of
from geventaudit.integrations.http.hooks import check_described, check_hook, report_missing
from geventaudit.integrations.http.redaction import REDACTED, Redact, Redaction, redact_secrets
from geventaudit.integrations.http.text import printable

from .callers import HEADER, fields_of_caller, header_of, header_of_current_caller
from .clients import ProcessClients
from .runs import Run, request_of_message

__all__ = ["Audit", "Describe", "TaskCounts"]

logger = logging.getLogger("geventaudit.celery")

UNKNOWN_TASK = "UNKNOWN"
"""The state, in a record, of a task that the worker does not have."""

_MIN_HIDDEN = 3  # characters of a number that is removed from texts, where an argument has it

Describe = Callable[[Context, str, Record], Record | None]
"""A function that changes a record or vetoes it: called with the request of the task (``id``, ``args``, ``retries`` and
all else of ``task.request``), the state of Celery and the record. Returns the record to send, or None for none."""

_MAX_ENDED = 1000  # ids of tasks that ended in this process, for signals that come later; up to twice as many


@dataclass(slots=True)
class TaskCounts:
    """The numbers of runs that this process has seen the end of. Each run is in one of the first four."""

    recorded: int = 0
    """The client accepted their records."""
    excluded: int = 0
    """Their tasks are in ``exclude``, or have the option ``audit=None``."""
    vetoed: int = 0
    """``describe`` returned None."""
    lost: int = 0
    """Something went wrong: no client could be made, the rules refused the record, the queue was full."""
    incomplete: int = 0
    """A hook raised, a task's option ``audit`` is invalid, or a caller could not be handed over. Counted beside the
    others."""


class Audit:
    """Sends one record for each run of a task of *app* when the run has ended.

    The operation is the name of the task. ``custom_data`` has ``task_id``, ``state``, ``retries``, ``queue``,
    ``worker`` and ``queued_by``: the operation of the request, or the task, that queued this one.

    ==============  ================================================================================================
    state           the result
    ==============  ================================================================================================
    ``SUCCESS``     success
    ``FAILURE``     failure, with the exception: raised, over the time limit, or the process died
    ``RETRY``       failure, with the exception; the next run has a record of its own with the same ``task_id``
    ``REVOKED``     failure: revoked or expired before the run, or terminated
    ``REJECTED``    failure: the task raised ``Reject``, or the message is malformed
    ``UNKNOWN``     failure: the worker has no such task
    ``IGNORED``     unknown: the task raised ``Ignore``
    ==============  ================================================================================================

    The caller is that of the HTTP request that queued the task, if an ``AuditMiddleware`` records that request. Without
    a request it is the process that queued the task, as ``System``. It is ``Unknown`` if that process does not have
    this integration. A program that can write to the broker can hand over any caller.

    A task's option ``audit`` has fields of its records: ``@app.task(audit={"operation_type": OperationType.DELETE})``.
    With ``audit=None``, a task has no records.

    A failure to record never fails the task. It is counted in :attr:`counts`, and is a notification of the client
    (``NOT_RECORDED``, ``INCOMPLETE`` or ``QUEUE_FULL``) and a line in its log. After construction,
    ``app.geventaudit`` is this object.

    :param make_client: returns a new client. It is called once in each process that runs tasks, and in any
        other that has a record to send.
    :param app: the Celery application.
    :param audit_type: of all the records: ``CONTROL_PLANE`` or ``DATA_PLANE``.
    :param template: fields of all the records: categories, access level.
    :param describe: changes records or vetoes them; see :data:`Describe`. If it raises, the record goes without it.
    :param redact: as of ``AuditMiddleware``: a function of a text's name and the text, which returns the text to
        record. It gets ``description`` (exceptions), and each argument by its name if *arguments* is True.
    :param exclude: names of tasks without records, as patterns of ``fnmatch``. The default leaves out Celery's own.
    :param arguments: record the arguments of tasks, in ``custom_data["arguments"]``. Otherwise they are removed from
        the texts of exceptions too: arguments are mostly personal data.
    :param close_timeout: seconds for which a process that shuts down waits for the delivery of its records.
    :raises ValueError, TypeError: an argument is invalid.
    :raises RuntimeError: *app* is audited already.
    """

    def __init__(
        self,
        make_client: Callable[[], AuditClient],
        app: Celery,
        *,
        audit_type: AuditType = AuditType.CONTROL_PLANE,
        template: Record | None = None,
        describe: Describe | None = None,
        redact: Redact = redact_secrets,
        exclude: Iterable[str] = ("celery.*",),
        arguments: bool = False,
        close_timeout: float = 5.0,
    ) -> None:
        if isinstance(make_client, AuditClient):
            raise TypeError(f"make_client must be a function, got {make_client!r}: each process needs its own client")
        check_hook("make_client", make_client)
        if not isinstance(app, Celery):
            raise TypeError(f"app must be a Celery application, got {app!r}")
        plane = plane_of(audit_type)
        if not isinstance(template, Record | None):
            raise TypeError(f"template must be a Record, got {template!r}")
        if describe is not None:
            check_hook("describe", describe, "request", "state", "record")
        check_hook("redact", redact, "name", "text")
        if isinstance(exclude, str | bytes) or not isinstance(exclude, Iterable):
            raise TypeError(f"exclude must be a list of names of tasks, got {exclude!r}")
        if not isinstance(arguments, bool):
            raise TypeError(f"arguments must be True or False, got {arguments!r}")
        if isinstance(close_timeout, bool) or not isinstance(close_timeout, int | float) or not close_timeout >= 0:
            raise ValueError(f"close_timeout must be 0 seconds or more, got {close_timeout!r}")
        if getattr(app, "geventaudit", None) is not None:
            raise RuntimeError(f"{app!r} is audited already: one run is one record")
        self.counts = TaskCounts()
        """The counts of this process. Prefork children count for themselves."""
        self._app = app
        self._clients = ProcessClients(make_client, close_timeout)
        self._audit_type = plane
        self._template = Record() if template is None else template
        self._describe = describe
        self._redact = redact
        self._exclude = tuple(exclude)
        self._records_arguments = arguments
        self._received: WeakValueDictionary[str, Any] = WeakValueDictionary()  # by id, in the process with the consumer
        self._running: set[str] = set()  # ids of tasks that run in this process
        self._ended: dict[str, None] = {}  # ids of tasks that ended lately in this process
        app.geventaudit = self
        self._connect_signals()

    def _connect_signals(self) -> None:
        for signal, receiver in (
            (signals.before_task_publish, self._on_publish),
            (signals.task_received, self._on_received),
            (signals.task_prerun, self._on_begin),
            (signals.task_postrun, self._on_end),
            (signals.task_failure, self._on_failure),
            (signals.task_retry, self._on_retry),
            (signals.task_revoked, self._on_revoked),
            (signals.task_internal_error, self._on_internal_error),
            (signals.task_rejected, self._on_rejected),
            (signals.task_unknown, self._on_unknown),
            (signals.worker_process_init, self._on_process_begin),
            (signals.worker_ready, self._on_worker_ready),
            (signals.worker_process_shutdown, self._on_shutdown),
            (signals.worker_shutdown, self._on_shutdown),
        ):
            signal.connect(receiver, weak=False)

    # -- the caller ----------------------------------------------------------------------------------------------------

    def _on_publish(self, headers: Any = None, **_: Any) -> None:
        # A message that is sent again, as by a retry, has its header.
        if isinstance(headers, dict) and HEADER not in headers:
            try:
                headers[HEADER] = header_of_current_caller()
            except Exception:  # Celery would log it without the consequence
                self.counts.incomplete += 1
                logger.warning("geventaudit: a task is queued without its caller", exc_info=True)

    # -- runs in this process ------------------------------------------------------------------------------------------

    def _on_begin(self, sender: Any, **_: Any) -> None:
        if self._is_mine(sender):
            request = sender.request
            if request.is_eager and header_of(request) is None:
                # Nothing published it. Its record is made later, when the request may be over.
                setattr(request, HEADER, header_of_current_caller())
            self._running.add(request.id)

    def _on_end(self, sender: Any, task_id: str, state: str | None, retval: Any, **_: Any) -> None:
        if not self._is_mine(sender):
            return
        self._running.discard(task_id)
        self._note_end(task_id)
        if state is not None:
            self._record(sender, sender.request, state, retval)
        elif not self._clients.is_pool_process:
            # Interrupted by a kill or a time limit. Of a process that dies of it, the worker's main process reports.
            if task_id in worker_state.revoked:
                self._record(sender, sender.request, states.REVOKED, "terminated")
            else:
                self._record(sender, sender.request, states.FAILURE, sys.exception())

    def _on_internal_error(
        self, sender: Any, task_id: str, exception: Exception, request: Any = None, **_: Any
    ) -> None:
        # After the end of a run, Celery reports errors of its own that changed nothing about the run.
        if self._is_left(sender, task_id):
            self._record(sender, Context(request or {}, id=task_id), states.FAILURE, exception)

    # -- runs in other processes, and no runs --------------------------------------------------------------------------

    def _on_received(self, request: Any, **_: Any) -> None:
        self._received[request.id] = request
        # By a retry or a second delivery, there is another run with this id.
        self._ended.pop(request.id, None)

    def _on_failure(self, sender: Any, task_id: str, exception: Any, **_: Any) -> None:
        """Record a run that lost its process, or was killed at the time limit."""
        if not self._is_left(sender, task_id) or isinstance(exception, Ignore | Reject | Retry):
            return
        self._note_end(task_id)  # Celery reports a time limit twice
        received = self._received.get(task_id)
        request = Context({} if received is None else received.request_dict, id=task_id)
        self._record(sender, request, states.FAILURE, exception)

    def _on_retry(self, sender: Any, request: Any, reason: Any = None, **_: Any) -> None:
        if self._is_left(sender, request.id):
            self._record(sender, request, states.RETRY, reason or "cancelled by the worker")

    def _on_revoked(
        self, sender: Any, request: Any, terminated: bool = False, signum: Any = None, expired: bool = False, **_: Any
    ) -> None:
        if self._is_left(sender, request.id):
            reason = "expired before the run" if expired else "revoked before the run"
            self._record(sender, request, states.REVOKED, f"terminated by signal {signum}" if terminated else reason)

    def _on_rejected(self, sender: Any, message: Any, exc: Exception | None = None, **_: Any) -> None:
        if sender.app is self._app:
            self._record(None, request_of_message(sender, message), states.REJECTED, exc or "malformed message")

    def _on_unknown(self, sender: Any, message: Any, **_: Any) -> None:
        if sender.app is self._app:
            self._record(None, request_of_message(sender, message), UNKNOWN_TASK, "the worker has no such task")

    def _is_mine(self, task: Any) -> bool:
        return task is not None and task.app is self._app

    def _is_left(self, task: Any, task_id: str) -> bool:
        """Return True if no end of a run in this process makes the record."""
        return self._is_mine(task) and task_id not in self._running and task_id not in self._ended

    def _note_end(self, task_id: str) -> None:
        self._ended[task_id] = None
        if len(self._ended) > 2 * _MAX_ENDED:
            for oldest in list(self._ended)[:_MAX_ENDED]:
                self._ended.pop(oldest, None)

    # -- the record ----------------------------------------------------------------------------------------------------

    def _record(self, task: Any, request: Context, state: str, reason: object) -> None:
        """Send the record of one run. Raise only what others throw into this greenlet.

        :param task: None if the worker has no such task.
        :param reason: an exception or a text; for a success, the result, which is not looked at.
        """
        run = Run(task, request, state, reason)
        if run.is_unaudited or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in self._exclude):
            self.counts.excluded += 1
            return
        try:
            client = self._clients.get()
        except Exception:
            self.counts.lost += 1
            logger.exception("geventaudit: not recorded, as there is no client: %s %s", run.name, state)
            return
        try:
            record = self._described(run, client)
            if record is None:
                self.counts.vetoed += 1
                return
            client.send(Msg(self._audit_type, fill_unknown(record)))
            self.counts.recorded += 1
        except Exception as error:
            self.counts.lost += 1
            client.report(error)
        except BaseException:  # a Timeout, a kill: those are for their senders
            self.counts.lost += 1
            raise

    def _described(self, run: Run, client: AuditClient) -> Record | None:
        record = self._record_of(run, client)
        if self._describe is None:
            return record
        try:
            # The hook may change its copy by half and raise.
            return check_described(self._describe(run.request, run.state, deepcopy(record)))
        except Exception as error:
            self._miss(client, "the changes that describe makes", error)
            return record

    def _record_of(self, run: Run, client: AuditClient) -> Record:
        header = header_of(run.request)
        try:
            caller = fields_of_caller(header)
        except (AttributeError, TypeError, ValueError) as error:
            self._miss(client, "the caller, as the header of the message is malformed", error)
            header, caller = None, {}
        result, description = run.result()
        redaction = self._redaction(run, description)
        custom = run.custom_data(header or {})
        if self._records_arguments and redaction.arguments:
            custom["arguments"] = redaction.arguments
        record = self._template.replace(
            operation_name=run.name,
            operation_result=result,
            operation_result_description=redaction.text("description", description),
            target_resources=self._template.target_resources or {"Task": [TargetResource(custom["task_id"])]},
            custom_data={**self._template.custom_data, **custom},
            **caller,
        )
        if redaction.error is not None:
            self._miss(client, "the texts that redact failed for", redaction.error)
        try:
            return record.replace(**getattr(run.task, "audit", {}))
        except TypeError as error:  # no mapping, or a name that is no field
            self._miss(client, "the fields of the task's option audit", error)
            return record

    def _redaction(self, run: Run, description: str) -> Redaction:
        if self._records_arguments:
            return Redaction(self._redact, dict(run.arguments()))
        # The arguments are changed, so Redaction removes them from the description. No argument has its name.
        hidden = {
            f"arguments.{name}": value
            for name, value in (run.arguments() if description else ())
            if isinstance(value, str) or len(printable(value)) >= _MIN_HIDDEN
        }
        return Redaction(lambda name, text: REDACTED if name in hidden else self._redact(name, text), hidden)

    def _miss(self, client: AuditClient, part: str, error: Exception) -> None:
        self.counts.incomplete += 1
        report_missing(client, part, error)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _on_process_begin(self, **_: Any) -> None:
        """Make the client of a process that runs tasks. Then the spool of a dead process is sent without a task."""
        self.counts = TaskCounts()
        self._clients.is_pool_process = current_process().name != "MainProcess"  # solo has none
        self._clients.get()

    def _on_worker_ready(self, sender: Any, **_: Any) -> None:
        # With prefork, the main process has next to no records, and is better forked without a thread.
        if sender.app is self._app and not isinstance(sender.pool, PreforkPool):
            self._clients.get()

    def _on_shutdown(self, **_: Any) -> None:
        self._clients.close()
