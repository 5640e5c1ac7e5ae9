"""A WSGI application that leaves a record for each request.

gunicorn --config examples/gunicorn.conf.py --chdir examples gunicorn_app:application

The agent's socket is named by AUDIT_SOCKET; without it, mdsd's usual one is used.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import geventaudit
from geventaudit import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)

# Made when the module is imported, also in gunicorn's master with preload_app: nothing starts before the first send.
client = geventaudit.Client(lambda: geventaudit.DomainSocket(os.environ.get("AUDIT_SOCKET") or None), stamp=True)

TEMPLATE = Record(
    operation_name="GetThing",
    operation_categories=[OperationCategory.RESOURCE_MANAGEMENT],
    operation_type=OperationType.READ,
    operation_result=OperationResult.SUCCESS,
    operation_access_level="Reader",
    caller_identities={CallerIdentityType.USERNAME: [CallerIdentity("anonymous", "nobody signs in here")]},
    caller_access_levels=["Reader"],
)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    record = TEMPLATE.replace(
        caller_agent=environ.get("HTTP_USER_AGENT") or "unknown",
        caller_ip_address="192.0.2.7",  # the rules refuse loopback; a real service has its caller's address here
        target_resources={"Thing": [TargetResource(environ.get("PATH_INFO") or "/")]},
    )
    try:
        client.send(Msg(AuditType.DATA_PLANE, record))
    except (geventaudit.ValidationError, geventaudit.QueueFullError) as error:
        environ["wsgi.errors"].write(f"no audit record: {error}\n")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done\n"]
