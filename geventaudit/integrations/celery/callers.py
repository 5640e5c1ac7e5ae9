"""The caller that a task's message carries in a header: written where the task is queued, read where it runs."""

from __future__ import annotations

from typing import Any

import celery
from celery._state import _task_stack
from celery.app.task import Context
from celery.utils.nodenames import anon_nodename

from geventaudit import CallerIdentity, CallerIdentityType, Record, fill_unknown
from geventaudit.integrations.http.current import current_record
from geventaudit.integrations.http.forwarding import address_of
from geventaudit.integrations.http.text import printable

__all__ = ["HEADER", "fields_of_caller", "header_of", "header_of_current_caller"]

HEADER = "geventaudit"
"""The header of a task's message with the caller: a map of ``address``, ``agent``, ``identities``, ``access_levels``,
``queued_by`` and ``request_id``."""

_MAX_ITEMS = 20  # identities of one kind, and access levels, that a message may hand over


def header_of_current_caller() -> dict[str, Any]:
    """Return the header for a message that is queued now: the caller of the task, or of the request, that queues it."""
    for task in reversed(_task_stack.stack):
        request = task.request
        header = header_of(request)
        if header is not None or not (request.called_directly or request.is_eager):
            return {**(header or {}), "queued_by": task.name}
    record = current_record()
    if record is not None:
        return {
            "address": str(record.caller_ip_address),
            "agent": record.caller_agent,
            "identities": {
                str(kind): [[each.identity, each.description] for each in group]
                for kind, group in record.caller_identities.items()
            },
            "access_levels": list(record.caller_access_levels),
            "queued_by": record.operation_name,
            "request_id": record.custom_data.get("request_id", ""),
        }
    origin = "the process that queued the task, outside of a recorded request"
    return {
        # Of this host, whichever host runs the task.
        "address": str(fill_unknown(Record(caller_ip_address="127.0.0.1")).caller_ip_address),
        "agent": f"celery/{celery.__version__}",
        "identities": {str(CallerIdentityType.SYSTEM): [[anon_nodename(), origin]]},
    }


def header_of(request: Context) -> Any:
    """Return the header of a task's message, or None. Nothing is known of its form."""
    headers = request.headers if isinstance(request.headers, dict) else {}
    return request.get(HEADER) or headers.get(HEADER)


def fields_of_caller(header: Any) -> dict[str, Any]:
    """Return fields of a record.

    :raises AttributeError, TypeError, ValueError: the header is malformed.
    """
    if header is None:
        return {}
    fields: dict[str, Any] = {
        "caller_ip_address": str(address_of(str(header.get("address") or "")) or ""),
        "caller_agent": printable(header.get("agent") or ""),
        "caller_identities": {
            CallerIdentityType(kind): [
                CallerIdentity(printable(name), printable(description)) for name, description in group[:_MAX_ITEMS]
            ]
            for kind, group in (header.get("identities") or {}).items()
        },
        "caller_access_levels": [printable(each) for each in (header.get("access_levels") or [])[:_MAX_ITEMS]],
    }
    return {name: value for name, value in fields.items() if value}
