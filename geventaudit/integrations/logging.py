"""Audit records through the standard library's logging.

::

    handler = AuditHandler(client)
    logging.getLogger("app").addHandler(handler)
    logger.info("user created", extra={"audit": Msg(AuditType.CONTROL_PLANE, record)})

Other handlers get the log record as usual.
"""

from __future__ import annotations

import logging

from geventaudit import AuditClient

__all__ = ["AuditHandler"]


class AuditHandler(logging.Handler):
    """A handler that sends the ``audit`` of log records: a :class:`~geventaudit.Msg`, or a mapping by wire names.

    A logger drops log records below its level before any handler, without a trace. So set the level of each logger that
    is used for auditing.

    Log records without ``audit`` (or with None) are ignored. If the client refuses a message, the log record goes to
    :meth:`~logging.Handler.handleError`: a traceback on stderr, unless ``logging.raiseExceptions`` is off or a subclass
    overrides it. ``client.stats().rejected`` counts it too.

    :param client: the client. The caller closes it.
    :param level: log records below this level are ignored.
    :raises TypeError: *client* is not a client. In a configuration, write a name as ``ext://package.module.client``.
    """

    def __init__(self, client: AuditClient, level: int | str = logging.NOTSET) -> None:
        if not isinstance(client, AuditClient):
            hint = f": ext://{client} in a configuration" if isinstance(client, str) else ""
            raise TypeError(f"client must be a geventaudit client, got {client!r}{hint}")
        super().__init__(level)
        self._client = client

    def handle(self, record: logging.LogRecord) -> bool:
        """Do the same as :meth:`logging.Handler.handle`, without its lock: ``send`` needs none.

        The lock could cause a deadlock: one thread has the lock and waits for the client's thread, which logs and waits
        for the lock.
        """
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Send ``record.audit`` if it exists."""
        message = getattr(record, "audit", None)
        if message is None:
            return
        try:
            self._client.send(message)
        except Exception:
            self.handleError(record)
