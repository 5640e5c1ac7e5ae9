"""What is said: records, messages, and the enumerations they use. Plain typed data, no rules.

The rules (what is required, what is refused) are in :mod:`geventaudit.schema.rules`; the bytes are in
:mod:`geventaudit.encoder.encoding` and :mod:`geventaudit.protocol.decoding`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import EnumMeta, StrEnum
from functools import update_wrapper
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple, TypeAlias

__all__ = [
    "AuditType",
    "CallerIdentity",
    "CallerIdentityType",
    "Diagnostic",
    "Heartbeat",
    "Message",
    "Msg",
    "OperationCategory",
    "OperationResult",
    "OperationType",
    "Record",
    "TargetResource",
]


class _Members(EnumMeta):
    """The class of the enumerations here, whose members :mod:`geventaudit._records` makes cheap to look up."""


class AuditType(StrEnum, metaclass=_Members):
    """The kind of a message; its value is the tag of the frame on the wire."""

    DATA_PLANE = "AsmAuditDP"
    """Work on the content of a resource: reading a blob, querying a table."""
    CONTROL_PLANE = "AsmAuditCP"
    """Work on the resource itself: creating it, configuring it, granting access to it."""
    HEARTBEAT = "AsmAuditHB"
    """The client's own sign of life. Only the library sends it."""
    DIAGNOSTIC = "AsmAuditDG"
    """The client's own trouble report. Known on the receiving side; never sent by this library."""


class OperationType(StrEnum, metaclass=_Members):
    """What was done to the resource."""

    UNKNOWN = "UnknownOperationType"
    """When the kind of operation cannot be told."""
    READ = "Read"
    """When nothing was changed: get, list, query, download."""
    UPDATE = "Update"
    """When something that existed was changed."""
    CREATE = "Create"
    """When something new was made."""
    DELETE = "Delete"
    """When something was removed."""


class OperationResult(StrEnum, metaclass=_Members):
    """The result of the operation."""

    UNKNOWN = "UnknownOperationResult"
    """When the end is not known: started and not awaited."""
    SUCCESS = "Success"
    """When it did what was asked."""
    FAILURE = "Failure"
    """When it did not, refusals included. Needs an ``operation_result_description``."""


class OperationCategory(StrEnum, metaclass=_Members):
    """The fields of work that an operation belongs to, one or more. Their order here is their order on the wire."""

    UNKNOWN = "UnknownOperationCategory"
    """When no category can be told."""
    OTHER = "OCOther"
    """When none of the others fits. Needs an ``operation_category_description``."""
    USER_MANAGEMENT = "UserManagement"
    """Accounts of people: create, change, disable, delete."""
    GROUP_MANAGEMENT = "GroupManagement"
    """Groups and who is in them."""
    AUTHENTICATION = "Authentication"
    """Signing in and out, tokens issued or refused."""
    AUTHORIZATION = "Authorization"
    """Deciding whether somebody may do something."""
    ROLE_MANAGEMENT = "RoleManagement"
    """Roles, and who holds them."""
    APPLICATION_MANAGEMENT = "ApplicationManagement"
    """Applications and their registrations."""
    KEY_MANAGEMENT = "KeyManagement"
    """Keys, secrets and certificates: made, rotated, read, revoked."""
    DIRECTORY_MANAGEMENT = "DirectoryManagement"
    """The directory itself: domains, tenants, synchronisation."""
    RESOURCE_MANAGEMENT = "ResourceManagement"
    """Resources of the service: machines, databases, queues."""
    POLICY_MANAGEMENT = "PolicyManagement"
    """Policies and their assignment."""
    DEVICE_MANAGEMENT = "DeviceManagement"
    """Devices that are enrolled, changed, wiped."""
    ENTITLEMENT_MANAGEMENT = "EntitlementManagement"
    """Packages of access: requested, approved, expired."""
    PASSWORD_MANAGEMENT = "PasswordManagement"
    """Passwords set, reset, expired."""
    IDENTITY_PROTECTION = "IdentityProtection"
    """Risks to an identity: detected, confirmed, dismissed."""
    OBJECT_MANAGEMENT = "ObjectManagement"
    """Objects of the service that are no resource of their own: documents, rows, blobs."""
    PROVISIONING_MANAGEMENT = "ProvisioningManagement"
    """Setting up accounts or resources for others to use."""
    CUSTOMER_FACING = "CustomerFacing"
    """Operations that a customer sees or asked for."""
    EUII = "EUII"
    """Operations that touch information by which an end user can be identified."""


class CallerIdentityType(StrEnum, metaclass=_Members):
    """By what kind of name a caller is known."""

    UNKNOWN = "UnknownCallerIdentityType"
    """When the kind of the name cannot be told."""
    OTHER = "CIOther"
    """When none of the others fits; say which in the description."""
    UPN = "UPN"
    """A user principal name: ``user@example.com``."""
    PUID = "PUID"
    """A passport unique identifier."""
    OBJECT_ID = "ObjectID"
    """The object id of a user, group or service principal in its directory."""
    CERTIFICATE = "Certificate"
    """A client certificate: its thumbprint or subject."""
    CLAIM = "Claim"
    """A claim of a token, where no more specific type fits."""
    USERNAME = "Username"
    """A plain user name: of a host, a database, basic authentication."""
    ACCESS_KEY_NAME = "AccessKeyName"
    """The name of an access key (never the key)."""
    SUBSCRIPTION_ID = "SubscriptionID"
    """A subscription on whose behalf the call was made."""
    APPLICATION_ID = "ApplicationID"
    """The client id of an application."""
    TENANT_ID = "TenantID"
    """The tenant that the caller belongs to."""
    TOKEN_ID = "TokenID"
    """The unique id of a token (never the token)."""
    SAS_URL = "SasURL"
    """A shared access signature URL, without its signature."""
    SYSTEM = "System"
    """The service itself: a timer, a migration, a clean-up."""


@dataclass(slots=True)
class CallerIdentity:
    """One name of the caller, and what it tells."""

    identity: str
    description: str


@dataclass(slots=True)
class TargetResource:
    """One resource that the operation was aimed at."""

    name: str
    cluster: str = ""
    data_center: str = ""
    region: str = ""


@dataclass(slots=True)
class Record:
    """What happened: who did what to which resource, and how it ended.

    The fields are the snake_case of the names on the wire (``operation_name`` is ``OperationName``). Whether a record
    is complete is found out when it is sent, so that one may be filled in on the way. It may be changed after it was
    sent: what was sent is a snapshot.
    """

    operation_name: str = ""
    """The operation, as those who read the trail know it: ``CreateUser``. Required."""
    operation_categories: Collection[OperationCategory] = field(default_factory=list)
    """Fields of work, one or more; sent sorted and without duplicates. Required."""
    operation_category_description: str = ""
    """What ``OperationCategory.OTHER`` stands for; required with it."""
    operation_type: OperationType = OperationType.UNKNOWN
    operation_result: OperationResult = OperationResult.UNKNOWN
    operation_result_description: str = ""
    """Why it failed; required with ``OperationResult.FAILURE``."""
    operation_access_level: str = ""
    """The access level that the operation needs: ``Contributor``. Required."""
    caller_agent: str = ""
    """The program that the caller used: a user agent, a client name and version. Required."""
    caller_ip_address: str | IPv4Address | IPv6Address = ""
    """Where the call came from. Not loopback, unspecified or multicast. Required."""
    caller_identities: Mapping[CallerIdentityType, Sequence[CallerIdentity]] = field(default_factory=dict)
    """All the names by which the caller is known, by their kind. Required."""
    caller_access_levels: Collection[str] = field(default_factory=list)
    """The access levels that the caller has; sent sorted and without duplicates. Required."""
    target_resources: Mapping[str, Sequence[TargetResource]] = field(default_factory=dict)
    """What the operation was aimed at, by the type of resource. Required."""
    custom_data: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping. Left out on the wire when it is empty."""

    def replace(self, **changes: Any) -> Record:
        """Return a copy with *changes*: one record serves as the template of many.

        :raises TypeError: a name is not a field.
        """
        return dataclasses.replace(self, **changes)


@dataclass(slots=True)
class Msg:
    """A record with its type: what :meth:`geventaudit.Client.send` takes."""

    type: AuditType
    """``AuditType.DATA_PLANE`` or ``AuditType.CONTROL_PLANE``."""
    record: Record


class Heartbeat(NamedTuple):
    """The client's sign of life, as an agent receives it. The library sends it; users do not."""

    service_id: str = ""
    """The service tree id of the sender, empty without one."""
    audit_version: str = ""
    os_version: str = ""
    language: str = ""
    destination: str = ""
    """The name of the connection kind: ``UnixDomainSocket``, ``TCP``, ``NoOP``."""


class Diagnostic:
    """A sender's trouble report, as an agent may receive it from others. It has no fields: all are equal."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Diagnostic()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Diagnostic)

    def __hash__(self) -> int:
        return hash(Diagnostic)


Message: TypeAlias = Msg | Heartbeat | Diagnostic


if not os.environ.get("PURE_PYTHON"):
    try:
        from . import _records
    except ImportError:
        pass
    else:
        Record.replace = update_wrapper(_records.replace, Record.replace)  # type: ignore[assignment]
        _records.make_cheap(Msg, Record, CallerIdentity, TargetResource)
        if sys.version_info < (3, 12):
            _enums = [AuditType, OperationType, OperationResult, OperationCategory, CallerIdentityType]
            _records.make_lookups_cheap(_Members, _enums)
