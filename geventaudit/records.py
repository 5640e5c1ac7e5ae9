"""Records, messages, and the enumerations that they use. Plain typed data, no rules.

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
from reprlib import recursive_repr
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
    """The class of the enumerations here. :mod:`geventaudit._records` makes their members cheap to look up."""


class AuditType(StrEnum, metaclass=_Members):
    """The kind of a message. Its value is the tag of the frame on the wire.

    An operation on a resource itself is control plane; an operation on the content of a resource is data plane.
    """

    DATA_PLANE = "AsmAuditDP"
    """An operation on the content of a resource: download a blob, query a table, read a secret."""
    CONTROL_PLANE = "AsmAuditCP"
    """An operation on the resource itself: create it, configure it, grant access to it."""
    HEARTBEAT = "AsmAuditHB"
    """The sign of life of a client. Only the library sends it; ``send()`` refuses it."""
    DIAGNOSTIC = "AsmAuditDG"
    """The trouble report of another library's client. An agent knows it; this library never sends it."""


class OperationType(StrEnum, metaclass=_Members):
    """The effect of the operation on the resource.

    Choose by the intended effect, also for an operation that failed: a refused deletion is ``DELETE``.
    """

    UNKNOWN = "UnknownOperationType"
    """The effect is not known, or differs from call to call. The default; replace it wherever possible."""
    READ = "Read"
    """The operation changes nothing: get, list, query, download, sign in."""
    UPDATE = "Update"
    """The operation changes an existing thing: edit, rotate, enable, assign, reset."""
    CREATE = "Create"
    """The operation makes a new thing: create, upload, register, invite, issue."""
    DELETE = "Delete"
    """The operation removes a thing: delete, purge, revoke, unregister."""


class OperationResult(StrEnum, metaclass=_Members):
    """The result of the operation."""

    UNKNOWN = "UnknownOperationResult"
    """The result is not known: the operation was started and not awaited. The default; replace it wherever possible."""
    SUCCESS = "Success"
    """The operation did all that was asked."""
    FAILURE = "Failure"
    """The operation failed, in part or as a whole, or was refused. Requires an ``operation_result_description``."""


class OperationCategory(StrEnum, metaclass=_Members):
    """The security-relevant subjects of an operation, one or more.

    Choose by the changed or protected thing, not by the component that did the work. Take every category that fits. The
    order of the members is their order on the wire.
    """

    UNKNOWN = "UnknownOperationCategory"
    """The category is not known, as in a record made from an HTTP request alone. Replace it wherever possible."""
    OTHER = "OCOther"
    """No other category fits. Requires an ``operation_category_description``."""
    USER_MANAGEMENT = "UserManagement"
    """Accounts of people: create, invite, change, disable, delete."""
    GROUP_MANAGEMENT = "GroupManagement"
    """Groups and their members: create a group, add or remove a member."""
    AUTHENTICATION = "Authentication"
    """Proof of identity: sign in, sign out, a second factor, a token issued, renewed or refused."""
    AUTHORIZATION = "Authorization"
    """Decisions on access: a permission checked and denied, consent given, access elevated."""
    ROLE_MANAGEMENT = "RoleManagement"
    """Roles and their holders: define a role, assign it, withdraw it."""
    APPLICATION_MANAGEMENT = "ApplicationManagement"
    """Applications as clients: register, change a redirect or a permission, delete the registration."""
    KEY_MANAGEMENT = "KeyManagement"
    """Keys, secrets and certificates: create, import, rotate, read, use, revoke."""
    DIRECTORY_MANAGEMENT = "DirectoryManagement"
    """The directory as a whole: domains, tenants, trust between them, synchronisation."""
    RESOURCE_MANAGEMENT = "ResourceManagement"
    """Resources that the service runs or rents out: machines, databases, queues, buckets, and their settings."""
    POLICY_MANAGEMENT = "PolicyManagement"
    """Policies and their assignment: access rules, firewall rules, retention, quotas."""
    DEVICE_MANAGEMENT = "DeviceManagement"
    """Devices of people: enrol, change, lock, wipe."""
    ENTITLEMENT_MANAGEMENT = "EntitlementManagement"
    """Bundles of access with a life cycle: request, approve, review, expire."""
    PASSWORD_MANAGEMENT = "PasswordManagement"
    """Passwords and other credentials that people know: set, reset, expire, recover."""
    IDENTITY_PROTECTION = "IdentityProtection"
    """Risk to an identity: a suspicious sign-in detected, confirmed or dismissed, an account locked."""
    OBJECT_MANAGEMENT = "ObjectManagement"
    """Objects inside a resource: documents, rows, blobs, messages. The usual category of the data plane."""
    PROVISIONING_MANAGEMENT = "ProvisioningManagement"
    """Set-up of accounts or resources for others, mostly by a machine: synchronise users, prepare a tenant."""
    CUSTOMER_FACING = "CustomerFacing"
    """An operation that a customer requested or sees. Add it to the category of the subject."""
    EUII = "EUII"
    """An operation on end user identifiable information, such as names or addresses. Add it to the category of the
    subject."""


class CallerIdentityType(StrEnum, metaclass=_Members):
    """The kind of a name by which a caller is known.

    A caller may have several names, of one kind or of more. Give all that the service has verified. The order of the
    members is their order on the wire.
    """

    UNKNOWN = "UnknownCallerIdentityType"
    """The kind of the name is not known, or the caller is anonymous."""
    OTHER = "CIOther"
    """No other kind fits. Name the kind in the description of the identity."""
    UPN = "UPN"
    """A user principal name, in the form of a mail address: ``ada@example.com``."""
    PUID = "PUID"
    """A passport unique identifier, the number of an account at Microsoft."""
    OBJECT_ID = "ObjectID"
    """The object id of a user, group or service principal in its directory."""
    CERTIFICATE = "Certificate"
    """A client certificate, by its thumbprint or subject."""
    CLAIM = "Claim"
    """A claim of a token, where no more specific kind fits. Name the claim in the description."""
    USERNAME = "Username"
    """A plain user name: of the service, a host, a database, basic authentication."""
    ACCESS_KEY_NAME = "AccessKeyName"
    """The name of an access key. Never the key."""
    SUBSCRIPTION_ID = "SubscriptionID"
    """The subscription that the call is made for."""
    APPLICATION_ID = "ApplicationID"
    """The client id of an application."""
    TENANT_ID = "TenantID"
    """The tenant of the caller."""
    TOKEN_ID = "TokenID"
    """The unique id of a token (``jti``). Never the token."""
    SAS_URL = "SasURL"
    """A URL with a shared access signature. Remove the signature."""
    SYSTEM = "System"
    """The service itself: a timer, a migration, a clean-up."""


class _Fields:
    """Equality and repr by the fields. A dataclass compiles its own at import, which takes a third of its time."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _values(self) == _values(other)

    @recursive_repr()
    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in _values(self))})"


def _values(record: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(record, field.name)) for field in dataclasses.fields(record)]


@dataclass(slots=True, eq=False, repr=False)
class CallerIdentity(_Fields):
    """One name of the caller."""

    identity: str
    """The name itself: ``ada@example.com``. Required, not empty."""
    description: str
    """The source or role of the name, for a reader of the trail: ``signed in``, ``on behalf of``. Required, not
    empty."""


@dataclass(slots=True, eq=False, repr=False)
class TargetResource(_Fields):
    """One resource that the operation was aimed at."""

    name: str
    """The name or id of the resource, as its owner knows it. Required, not empty."""
    cluster: str = ""
    """The cluster that holds the resource, if names are unique only within it."""
    data_center: str = ""
    """The data centre of the resource, if the service has several."""
    region: str = ""
    """The region of the resource, such as ``westeurope``, if the service has several."""


@dataclass(slots=True, eq=False, repr=False)
class Record(_Fields):
    """One event: the caller, the operation, the target resources and the result.

    The fields are the snake_case of the names on the wire (``operation_name`` is ``OperationName``). ``send()`` checks
    that a record is complete, so its fields may be set one by one before. ``send()`` takes a snapshot, so the record
    may be changed and sent again afterwards.
    """

    operation_name: str = ""
    """The operation, by one constant name for all its calls: ``CreateUser``, never ``CreateUser ada``. Required."""
    operation_categories: Collection[OperationCategory] = field(default_factory=list)
    """The subjects of the operation, one or more. Sent sorted and without duplicates. Required."""
    operation_category_description: str = ""
    """The meaning of ``OperationCategory.OTHER``. Required with it, else optional."""
    operation_type: OperationType = OperationType.UNKNOWN
    """The intended effect on the resource."""
    operation_result: OperationResult = OperationResult.UNKNOWN
    """The result. Send the record after the operation, when the result is known."""
    operation_result_description: str = ""
    """The reason for a failure, for a reader of the trail: ``no permission on vault 7``. Required with
    ``OperationResult.FAILURE``, else optional."""
    operation_access_level: str = ""
    """The role or permission that the operation requires: ``Contributor``. Required."""
    caller_agent: str = ""
    """The program of the caller: a user agent, or a client's name and version. Required."""
    caller_ip_address: str | IPv4Address | IPv6Address = ""
    """The address of the caller, without port. Not a load balancer's, and not loopback, unspecified or multicast.
    Required."""
    caller_identities: Mapping[CallerIdentityType, Sequence[CallerIdentity]] = field(default_factory=dict)
    """All verified names of the caller, by their kind; at least one. Required."""
    caller_access_levels: Collection[str] = field(default_factory=list)
    """The roles or permissions that the caller holds, one or more: ``["Reader", "Contributor"]``. Sent sorted and
    without duplicates. Required."""
    target_resources: Mapping[str, Sequence[TargetResource]] = field(default_factory=dict)
    """The resources that the operation was aimed at, by their type; at least one type, whose list may be empty:
    ``{"Secret": [TargetResource("db-password")]}``. Required."""
    custom_data: Mapping[str, Any] = field(default_factory=dict)
    """Further facts, such as a ticket, a request id or the changed fields. Left out on the wire if empty."""

    def replace(self, **changes: Any) -> Record:
        """Return a copy with *changes*: one record serves as the template of many.

        :raises TypeError: a name is not a field.
        """
        return dataclasses.replace(self, **changes)


@dataclass(slots=True, eq=False, repr=False)
class Msg(_Fields):
    """A record with its type, for :meth:`geventaudit.Client.send`."""

    type: AuditType
    """``AuditType.DATA_PLANE`` or ``AuditType.CONTROL_PLANE``."""
    record: Record
    """The record. ``send()`` encodes it at once, and keeps no reference to it."""


class Heartbeat(NamedTuple):
    """The sign of life of a client, as an agent receives it. Only the library sends it."""

    service_id: str = ""
    """The service tree id of the sender, empty without one."""
    audit_version: str = ""
    """The version of the sender's library."""
    os_version: str = ""
    """The release of the sender's kernel, by this library."""
    language: str = ""
    """The programming language of the sender, with its version where the sender gives it."""
    destination: str = ""
    """The name of the connection kind: ``UnixDomainSocket``, ``TCP``, ``NoOP``."""


class Diagnostic:
    """The trouble report of another library's client, as an agent receives it. It has no fields: all are equal."""

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
