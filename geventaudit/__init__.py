"""An audit trail for gevent services: :meth:`Client.send` never blocks, never lies, and what it accepted arrives.

Read the modules bottom up: ``records``, ``schema``, ``encoder``, ``protocol``, ``trail``, ``transport``, ``backoff``,
``notifications``, ``stats``, ``spool``, ``delivery``, ``lifecycle``, ``audit_client``, ``client``. The docstring of a
package gives the order of its modules. ``runtime`` handles gevent, threads and forks for all of them. ``agent`` is the
receiving end, ``testing`` helps to test an audit trail, ``verify`` proves one, and ``cli`` is the command line.
"""

from .audit_client import AuditClient, live_clients
from .backoff import Backoff
from .client import BaseClient, Client
from .errors import (
    AuditError,
    ClientClosedError,
    ConnectionFailedError,
    FrameError,
    QueueFullError,
    SealError,
    SpoolError,
    ValidationError,
    WouldBlockError,
)
from .filling import fill_unknown
from .notifications import Notification, NotificationChannel, NotificationKind
from .operation import Operation
from .records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Diagnostic,
    Heartbeat,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from .schema.rules import MsgSchema, RecordSchema
from .spool import Spool
from .stats import Rejection, Stats
from .trail.seal import Seal
from .transport import TCP, Connection, DomainSocket, NoOp
from .version import __version__

__all__ = [
    "TCP",
    "AuditClient",
    "AuditError",
    "AuditType",
    "Backoff",
    "BaseClient",
    "CallerIdentity",
    "CallerIdentityType",
    "Client",
    "ClientClosedError",
    "Connection",
    "ConnectionFailedError",
    "Diagnostic",
    "DomainSocket",
    "FrameError",
    "Heartbeat",
    "Msg",
    "MsgSchema",
    "NoOp",
    "Notification",
    "NotificationChannel",
    "NotificationKind",
    "Operation",
    "OperationCategory",
    "OperationResult",
    "OperationType",
    "QueueFullError",
    "Record",
    "RecordSchema",
    "Rejection",
    "Seal",
    "SealError",
    "Spool",
    "SpoolError",
    "Stats",
    "TargetResource",
    "ValidationError",
    "WouldBlockError",
    "__version__",
    "fill_unknown",
    "live_clients",
]
