"""A watch on the gevent hub that sends a client's records: under some servers, that hub never runs."""

from __future__ import annotations

import logging
import os
import time

from geventaudit import AuditClient, ClientClosedError

__all__ = ["HubWatch"]

logger = logging.getLogger("geventaudit.wsgi")

MAX_WAIT = 5.0
"""Seconds without a turn after which a hub is taken for one that does not run."""


class HubWatch:
    """A question to the hub of a client's thread: does it run? Under gevent's servers, the next request knows.

    The question is put with the first record, and looked at as later requests begin, until the hub had a turn or the
    log has said that it has none. After that, requests pay nothing for it.
    """

    def __init__(self, client: AuditClient) -> None:
        self._client = client
        self._asked: float | None = None  # when, by the monotonic clock
        self._process = 0
        self._has_run = False

    def ask(self) -> None:
        """Schedule a callback in the hub, once."""
        if self._asked is None:
            self._asked, self._process = time.clock_gettime(time.CLOCK_MONOTONIC), os.getpid()
            try:
                # A greenlet of this thread would prove nothing: the client's hub sends, often that of another thread.
                self._client.call_soon(self._run)
            except ClientClosedError:  # its thread ended just now; the next request gets the error
                self._has_run = True

    def _run(self) -> None:
        self._has_run = True

    def is_settled(self) -> bool:
        """Return True if there is nothing more to find out. Warn if the hub should have run by now and did not."""
        if self._has_run:
            return True
        if self._asked is None or time.clock_gettime(time.CLOCK_MONOTONIC) - self._asked < MAX_WAIT:
            return False
        if self._process != os.getpid():  # the question was the parent's
            self._asked = None
            return False
        self._has_run = True  # for other threads: one warning is enough
        logger.warning(
            "geventaudit: records wait unsent: for %.0f s, the gevent hub of the client's thread has had no turn. "
            "It has none under servers without gevent. Use gunicorn -k gevent, or patch: python -m gevent.monkey "
            "--module flask run; with Django, python -m gevent.monkey manage.py runserver --noreload",
            time.clock_gettime(time.CLOCK_MONOTONIC) - self._asked,
        )
        return True
