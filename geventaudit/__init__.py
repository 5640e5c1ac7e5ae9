"""An audit trail for gevent services: :meth:`Client.send` never blocks, never lies, and what it accepted arrives.

The life of a record is told in this order: ``records``, ``schema``, ``encoder``, ``protocol``, ``transport``,
``backoff``, ``notifications``, ``stats``, ``spool``, ``store``, ``sender``, ``operation``, ``pipeline``, ``base``,
``client``; those that are packages say in which order to read them. What gevent, threads and forks do to all of it is
in ``runtime``. The receiving end is ``agent``; ``testing`` is for the tests of an audit trail; ``cli`` is the command
line.
"""

from .backoff import Backoff
from .base import BaseClient
from .client import Client
from .errors import (
    AuditError,
    ClientClosedError,
    ConnectionFailedError,
    FrameError,
    QueueFullError,
    SpoolError,
    ValidationError,
)
from .filling import fill_unknown
from .notifications import Notification, NotificationChannel, NotificationKind
from .operation import Operation
from .pipeline import live_clients
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
from .stats import Stats
from .transport import TCP, Connection, DomainSocket, NoOp
from .version import __version__

__all__ = [
    "TCP",
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
    "Spool",
    "SpoolError",
    "Stats",
    "TargetResource",
    "ValidationError",
    "__version__",
    "fill_unknown",
    "live_clients",
]
