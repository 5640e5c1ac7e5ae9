"""Reads the key file of a seal in a native thread, so that the hub waits for no lock and no disk.

::

    start() --> thread reads --> on_read(), in the hub
                  ^    |
                  |  fails: on_failure(), in the hub
                  +----+  after a while
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent

from ..backoff import Backoff
from ..errors import SealError, show
from ..runtime import forks
from ..runtime.clock import Deadline
from ..spool.disk import DiskThread, Job
from ..trail.seal import Seal

__all__ = ["KeyReader"]


class KeyReader:
    """The attempts to read the key of one seal. In the hub's thread.

    :param on_read: called once the key is there; a SealError that it raises is a failure.
    :param on_failure: called after each attempt that failed.
    """

    def __init__(self, seal: Seal, on_read: Callable[[], None], on_failure: Callable[[SealError], None]) -> None:
        self.error: SealError | None = None
        """The reason of the last attempt's failure; None before that, and when the key is there."""
        self._seal = seal
        self._on_read = on_read
        self._on_failure = on_failure
        self._backoff = Backoff(initial=0.5, maximum=30.0)
        self._failures = 0
        self._is_started = False
        self._thread: DiskThread | None = None
        self._timer: Any = None

    def start(self) -> None:
        """Begin to read, unless that has begun. Does not wait."""
        # As in a stamper: no signal handler comes between the question and the assignment.
        if self._is_started:
            return
        self._is_started = True
        try:
            self._thread = DiskThread()
            self._try()
        except BaseException:
            self._is_started = False
            raise

    def stop(self) -> None:
        """Read no more."""
        self._stop_timer()
        thread = self._thread
        self.end_thread()
        if thread is not None:
            thread.end_watching()

    def end_thread(self) -> None:
        """Let the native thread end, after the attempt that is under way. From any thread; does not wait."""
        self._is_started = True
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.run_last(lambda: None, Deadline(0.0))

    def abandon(self) -> None:
        """Read no more, in a forked child: the thread is the parent's."""
        self._is_started = True
        self._stop_timer()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.abandon()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()

    def _try(self) -> None:
        if self._thread is not None:
            self._thread.submit(self._seal.read, self._on_over)

    def _on_timer(self) -> None:
        forks.check()
        if self._timer is not None:
            self._stop_timer()
            self._try()

    def _on_over(self, job: Job[None]) -> None:
        """Note the outcome of an attempt, in the hub."""
        error = job.error
        if error is None:
            try:
                self._on_read()
            except SealError as problem:
                error = problem
        if error is None:
            self.error = None
            self.stop()
            return
        if not isinstance(error, SealError):
            error = SealError(f"reading the key of the seal failed: {show(error)}")
        self.error = error
        self._failures += 1
        self._timer = gevent.get_hub().loop.timer(self._backoff.delay(self._failures), ref=False)
        self._timer.start(self._on_timer)
        self._on_failure(error)
