"""The native thread that works on a spool's files, so that the hub never waits for a disk.

The thread does the jobs of the hub one after the other, in their order. A callback in the hub gets the outcome of each.
While a job is under way, the thread's watcher keeps the hub alive: greenlets that wait for the disk need no timers.

A fork does not wait for the thread. The child has no such thread, and closes its copies of the files.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, Generic, TypeVar

import gevent

from ..runtime import native
from ..runtime.clock import Deadline, monotonic
from ..runtime.hub_thread import Waiter

__all__ = ["DiskThread", "Job"]

_T = TypeVar("_T")

_ATTEMPTS = 3  # to take note of an outcome


class Job(Generic[_T]):
    """A function that the disk thread calls, and its outcome."""

    __slots__ = ("_work", "attempts", "done", "error", "is_finished", "is_noted", "is_over", "result", "started")

    def __init__(self, work: Callable[[], _T], done: Callable[[Job[_T]], None]) -> None:
        self._work = work
        self.done = done
        """Called when the job is over: in the hub, except for the last job of a thread. Called again if it raises."""
        self.attempts = 0
        """The number of times that ``done`` has raised."""
        self.is_noted = False
        """Set by ``done`` in the moment in which it changes the state, so that it does not change it twice."""
        self.is_finished = False
        """True once ``done`` has returned."""
        self.is_over = False
        self.started = inf
        """The monotonic time of the call."""
        self.result: Any = None
        """The function's result; None if it raised."""
        self.error: Exception | None = None
        """The exception that the function raised, or None."""

    def run(self) -> None:
        """Call the function, in the disk thread."""
        self.started = monotonic()
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error
        self.is_over = True


class DiskThread:
    """A native thread and its jobs. Constructed in the hub's thread. The native thread starts with the first job."""

    def __init__(self) -> None:
        self._jobs: deque[Job[Any]] = deque()
        self._over: deque[Job[Any]] = deque()
        self._running: Job[Any] | None = None  # the job that the thread took last
        self._idle = native.allocate_lock()  # locked while the thread waits for a job
        self._idle.acquire()
        self._is_started = False
        self._is_ended = False
        self.is_abandoned = False
        """True in a forked child: the thread is the parent's."""
        self._last: Job[Any] | None = None
        self._watcher: Any = gevent.get_hub().loop.async_(ref=False)
        self._watcher.start(self._call_back)
        self._is_watched = True

    def submit(self, work: Callable[[], _T], done: Callable[[Job[_T]], None]) -> None:
        """Call *work* in the disk thread, then *done* in the hub. In the hub's thread.

        If the thread cannot be started, or has ended, the job fails.
        """
        job = Job(work, done)
        self._watcher.ref = True
        self._start(job, RuntimeError("the spool is closed") if self._is_ended else None)

    @property
    def is_busy(self) -> bool:
        """True while a job is under way, or the hub has not taken note of its outcome."""
        if self._jobs or self._over:  # in this order: the thread takes a job before it removes it
            return True
        running = self._running
        return running is not None and not running.is_finished

    @property
    def seconds_busy(self) -> float:
        """The seconds that the job under way has taken so far; 0 for none."""
        running = self._running
        return 0.0 if running is None or running.is_over else max(monotonic() - running.started, 0.0)

    def wait_idle(self, deadline: Deadline) -> None:
        """Wait until no job is under way and all callbacks were called. From any thread, also without a hub."""
        while self.is_busy and not deadline.has_passed() and not self._is_ended:
            waiter = Waiter()
            barrier = Job(waiter.wake, lambda job: None)
            self._start(barrier, None)
            while not barrier.is_over and not deadline.has_passed():
                waiter.wait(min(1.0, deadline.left() or 1.0))
            self._call_back()

    def settle(self, deadline: Deadline, grace: float) -> BaseException | None:
        """Wait as :meth:`wait_idle` does, *grace* seconds more after an exception, and return the exception."""
        try:
            self.wait_idle(deadline)
        except BaseException as error:
            try:
                self.wait_idle(Deadline(grace))
            except BaseException as later:
                return later
            return error
        return None

    def run_last(self, work: Callable[[], _T], deadline: Deadline) -> Job[_T]:
        """Do *work* after all other jobs, wait for it, and end the thread. Thread-safe; needs no hub.

        A second call waits for the same job: the thread of the first caller may have ended during its wait.

        :returns: the job; its ``is_over`` is False if it takes longer than *deadline* allows.
        """
        waiter = Waiter()
        job = self._last
        if job is None:
            job = self._last = Job(work, lambda job: waiter.wake())
            self._is_ended = True
            self._start(job, None)
        else:
            job.done = lambda job: waiter.wake()
        while not job.is_over and (left := deadline.left()) != 0.0:
            waiter.wait(1.0 if left is None else min(left, 1.0))
        return job

    def abandon(self) -> None:
        """Take no more jobs, in a forked child: the thread is the parent's."""
        self._is_ended = self.is_abandoned = True
        self._jobs.clear()
        self._over.clear()

    def end_watching(self) -> None:
        """Close the watcher, after the last job. In the hub's thread."""
        self._is_watched = False
        self._watcher.stop()
        self._watcher.close()

    def _start(self, job: Job[Any], error: Exception | None) -> None:
        if error is None:
            # A signal handler may raise after each call: it must leave neither a second thread nor a job that waits.
            try:
                if not self._is_started:
                    self._is_started = True
                    native.start_new_thread(self._run, ())
            except RuntimeError as problem:  # the process has too many threads
                self._is_started, error = False, problem
            else:
                try:
                    self._jobs.append(job)
                finally:
                    try:
                        self._idle.release()
                    except RuntimeError:  # the lock was not locked: the thread is awake
                        pass
                return
        job.error, job.is_over = error, True
        self._over.append(job)
        self._wake_hub()

    def _wake_hub(self) -> None:
        try:
            if self._is_watched:
                self._watcher.send()
        except (ValueError, TypeError):  # the hub was destroyed, or the watcher closed, just now
            pass

    def _call_back(self) -> None:
        """Call the callback of each job that is over. In the hub."""
        while self._over:
            job = self._over[0]
            if not self._is_ended:  # else the last job has the state of before, and does its work again
                try:
                    job.done(job)
                except BaseException:
                    # Ctrl-C, too, for which handle_error() switches to the main greenlet. That may close the client.
                    job.attempts += 1
                    if job.attempts >= _ATTEMPTS:
                        self._finish(job)
                    self._wake_hub()
                    gevent.get_hub().handle_error(job.done, *sys.exc_info())
                    return
            self._finish(job)
        if not self.is_busy:
            try:
                self._watcher.ref = False
            except ValueError:  # the hub was destroyed
                pass

    def _finish(self, job: Job[Any]) -> None:
        job.is_finished = True
        try:
            self._over.remove(job)
        except ValueError:  # finished by a signal handler, or by a greenlet that closes
            pass

    def _run(self) -> None:
        while True:
            self._idle.acquire()
            while self._jobs:
                is_last = self._is_ended and len(self._jobs) == 1
                job = self._running = self._jobs[0]
                self._jobs.popleft()
                job.run()
                if is_last:
                    job.done(job)
                    return
                self._over.append(job)
                self._wake_hub()
