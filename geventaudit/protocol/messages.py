"""Bodies of frames to messages, not validated. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FrameError, show
from ..records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Diagnostic,
    Heartbeat,
    Message,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from ..schema.values import exact_datetime, surrogate_problem
from .unpacking import Timestamp

__all__ = ["HEARTBEAT_FIELDS", "message_of"]

_TAGS = frozenset(AuditType)

HEARTBEAT_FIELDS = {
    "AsmAuditServiceId": "service_id",
    "AuditVersion": "audit_version",
    "OsVersion": "os_version",
    "Language": "language",
    "Destination": "destination",
}
"""The fields of a heartbeat by their names on the wire."""


def message_of(tag: str, body: Mapping[Any, Any]) -> Message:
    """Return the message with that tag and body, not validated.

    :raises FrameError: *tag* is not an audit type, or *body* does not have the shape of its message.
    """
    if tag not in _TAGS:
        raise FrameError(f"the type must be one of {', '.join(AuditType)}")
    try:
        kind = AuditType(tag)
        if kind is AuditType.HEARTBEAT:
            return _heartbeat_of(body)
        if kind is AuditType.DIAGNOSTIC:
            return Diagnostic()
        return Msg(kind, _record_of(body))
    except KeyError as error:
        raise FrameError(f"{tag}: the body has no {error}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FrameError(f"{show(tag)}: {error}") from None


def _heartbeat_of(body: Mapping[Any, Any]) -> Heartbeat:
    # Go's reference v0.2.2 sends no AsmAuditServiceId.
    values = {field: body[name] for name, field in HEARTBEAT_FIELDS.items() if name in body or field != "service_id"}
    for name, field in HEARTBEAT_FIELDS.items():
        value = values.get(field, "")
        if not isinstance(value, str):
            raise FrameError(f"{name} must be text, got {show(value)}")
        if problem := surrogate_problem(value):
            raise FrameError(f"{name} {problem}")
    return Heartbeat(**values)


def _record_of(body: Mapping[Any, Any]) -> Record:
    return Record(
        operation_name=body["OperationName"],
        operation_categories=[OperationCategory(each) for each in body["OperationCategories"]],
        operation_category_description=body["OperationCategoryDescription"],
        operation_type=OperationType(body["OperationType"]),
        operation_result=OperationResult(body["OperationResult"]),
        operation_result_description=body["OperationResultDescription"],
        operation_access_level=body["OperationAccessLevel"],
        caller_agent=body["CallerAgent"],
        caller_ip_address=body["CallerIpAddress"],
        caller_identities={
            CallerIdentityType(kind): [CallerIdentity(one["Identity"], one["Description"]) for one in identities]
            for kind, identities in body["CallerIdentities"].items()
        },
        caller_access_levels=list(body["CallerAccessLevels"]),
        target_resources={
            kind: [TargetResource(one["Name"], one["Cluster"], one["DataCenter"], one["Region"]) for one in targets]
            for kind, targets in body["TargetResources"].items()
        },
        custom_data=_with_datetimes(body.get("CustomData", {})),
    )


def _with_datetimes(value: Any) -> Any:
    """Return unpacked custom data with its timestamps as datetimes, if a datetime can hold them exactly."""
    if isinstance(value, dict):
        return {key: _with_datetimes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_datetimes(each) for each in value]
    return exact_datetime(value) if isinstance(value, Timestamp) else value
