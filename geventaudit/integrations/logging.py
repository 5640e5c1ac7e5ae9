"""Audit records by way of the standard library's logging.

::

    handler = AuditHandler(client)
    logging.getLogger("app").addHandler(handler)
    logger.info("user created", extra={"audit": Msg(AuditType.CONTROL_PLANE, record)})

The log record goes on to the other handlers as always.
"""

from __future__ import annotations

import logging

from geventaudit import AuditClient

__all__ = ["AuditHandler"]


class AuditHandler(logging.Handler):
    """Sends what a log record has as ``audit``: a :class:`~geventaudit.Msg`, or a mapping by wire names.

    Log records below the level of their logger never come here: they are not sent, and nothing says so. So set the
    level of a logger that is audited.

    Log records without it (or with None) pass by. One that the client refuses, for whatever reason, goes to
    :meth:`~logging.Handler.handleError` (a traceback on stderr, unless ``logging.raiseExceptions`` is off or a subclass
    does otherwise); ``client.stats().rejected`` counts it too.

    :param client: stays the caller's to close.
    :param level: log records below it pass by.
    :raises TypeError: *client* is none. A name in a configuration has to be written ``ext://package.module.client``.
    """

    def __init__(self, client: AuditClient, level: int | str = logging.NOTSET) -> None:
        if not isinstance(client, AuditClient):
            hint = f": ext://{client} in a configuration" if isinstance(client, str) else ""
            raise TypeError(f"client must be a geventaudit client, got {client!r}{hint}")
        super().__init__(level)
        self._client = client

    def handle(self, record: logging.LogRecord) -> bool:
        """Do the same as :meth:`logging.Handler.handle`, without its lock: ``send`` needs none.

        Two threads could wait for each other with it: one that has it and waits for the client's thread, and the
        client's thread, which logs.
        """
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Send ``record.audit``, where there is one."""
        message = getattr(record, "audit", None)
        if message is None:
            return
        try:
            self._client.send(message)
        except Exception:
            self.handleError(record)
