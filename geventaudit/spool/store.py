"""The part of a spool that runs in the hub.

::

    send() -> queue -> window -> agent            if no record waits on disk and the queue has room
    send() -> pending -> disk -> window -> ...    otherwise, or always

In mode ``always``, ``send()`` returns when the record is on disk. In mode ``overflow``, it returns at once, and the
records in the queue and the window are in memory only, until the client closes.

One rule keeps the order of the records: a new record follows all records that wait to be written, or on disk. One
greenlet, the writer, decides about the disk. It gives one job at a time to the disk thread: open, read, write, look for
orphans. All records that arrive during a write share the next one.

================  ==================================================================================================
the disk          new records
================  ==================================================================================================
is being opened   wait: on the queue (``overflow``), in ``send`` (``always``)
works             are written
fails, or hangs   ``overflow``: stay in memory, in their order, as many as the queue holds; then ``QueueFullError``
                  ``always``: ``SpoolError``
================  ==================================================================================================

Records of an earlier run or of a dead process are sent before those of this run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import TypeVar

from gevent.queue import Full

from ..errors import ClientClosedError, SpoolError, show
from ..notifications import NotificationKind, Notifier
from ..runtime import forks, workers
from ..runtime.clock import Deadline, monotonic
from ..runtime.signal import Change, Signal
from ..stats import Counters
from . import jobs
from .adoption import Adoption
from .backlog import AHEAD_BYTES, Backlog
from .backlogs import Backlogs
from .directory import close_inherited_locks, orphans
from .disk import DiskThread, Job
from .folder import SEGMENT_BYTES, Check, Folder, Read
from .format import MAX_FRAME, OVERHEAD, Append, encode_runs
from .pending import Pending, PendingRecords
from .settings import Spool
from .stream import Entry, Memory
from .trouble import DiskHangsError, Trouble

__all__ = ["MAX_FRAME", "Store"]

_T = TypeVar("_T")

PENDING_BYTES = 8 << 20  # of the frames that wait in memory to be written, in mode ``overflow``
BATCH_BYTES = 1 << 19  # of the frames that one job writes; limits the time for which their checksums hold the hub
CLOSE_SECONDS = 1.0  # that the disk has, at least, to keep the records of a client that closes
HANG_SECONDS = 10.0  # of one job, after which a disk is taken for one that fails; a synced write may take some
READ_AGAIN_SECONDS = 1.0  # until records that could not be read are tried again
MAX_READS = 5  # that fail, before unreadable records are skipped and count as lost: they hold up all later ones


class Store:
    """The spool of one client in one process. Constructed and used in the hub's thread.

    :param memory: the frames in the outbox.
    :param wake: set when there are records to send.
    :param room: set when there may be room.
    """

    def __init__(
        self, spool: Spool, memory: Memory, counters: Counters, notifier: Notifier, wake: Signal, room: Change
    ) -> None:
        self.is_closing = False
        """True once only the last job accepts, reads or writes records."""
        self.is_always = spool.mode == "always"
        """True if every record is written before ``send`` returns."""
        self._spool = spool
        self._memory = memory
        self._counters = counters
        self._notifier = notifier
        self._wake = wake
        self._room = room
        self._disk = DiskThread()
        segment_bytes = min(SEGMENT_BYTES, max(spool.max_bytes // 8, 1))
        self._backlogs = Backlogs(Folder(spool.folder_of_process(), spool.synchronous, segment_bytes), counters)
        self.pending = PendingRecords()
        """The records that wait to be written."""
        self._disk_bytes = 0  # of undelivered frames in this run's folder
        self._trouble = Trouble()
        self._signal = Signal()  # wakes the writer
        self._writer = workers.OneWorker(self._run, lambda: bool(self.pending) and not self.is_closing)
        self._adoption = Adoption(spool, self._backlogs.orphans)
        self._left: list[bytes] | None = None  # the frames that persist() could not keep

    @property
    def _own(self) -> Backlog | None:
        return self._backlogs.own

    @property
    def _path(self) -> str:
        return self._backlogs.folder.path

    # -- the outbox's side ---------------------------------------------------------------------------------------------

    def ensure_running(self) -> None:
        """Start the writer if it does not run."""
        if not self._writer.greenlet and not self.is_closing:
            self._writer.ensure_running()

    @property
    def is_passed(self) -> bool:
        """True if a new record may go to the queue: no other record waits to be written, or on disk."""
        return not self.is_always and not self.pending and (self._own is None or not self._own.count)

    def add(self, frame: bytes) -> Pending:
        """Take *frame*, to be written after all others.

        :raises gevent.queue.Full: there is no room.
        :raises SpoolError: the disk fails, and mode ``always`` needs it.
        """
        if self._trouble.blocks:
            if self.is_always:
                raise SpoolError(str(self._trouble.error)) from self._trouble.error
            raise Full
        size = len(frame) + OVERHEAD
        if self.pending.records:
            size += self.pending.size
        if self._disk_bytes + size > self._spool.max_bytes or (size > PENDING_BYTES and not self.is_always):
            raise Full
        pending = self.pending.add(frame)
        self.ensure_running()
        self._signal.set()
        return pending

    def take_earlier(self, max_bytes: int) -> bool:
        """Move the next records of earlier runs and of dead processes to the window.

        :returns: True if there are any. They may have to be read first.
        """
        if self._own is None:
            return self._trouble.error is None and not self.is_closing
        for backlog in self._backlogs.earlier:
            if backlog.count:
                backlog.take(self._memory.window, max_bytes)
                self._signal.set()
                return True
        return False

    def take(self, max_bytes: int) -> None:
        """Move the next records of this run to the window. The queue before them is empty."""
        if self._own is not None and self._own.count:
            self._own.take(self._memory.window, max_bytes)
            self._signal.set()
        elif self._trouble.error is not None and not self.is_always and not self.pending.writing:
            # The disk fails: records that wait to be written are sent without that.
            self.pending.take(self._memory, max_bytes)

    def settled(self) -> None:
        """Note that records are settled. The writer notes it in the folders."""
        if self._backlogs.advances():
            self._signal.set()

    def reject(self, frame: bytes, reason: str) -> None:
        """Write a copy of a dropped record to the rejected ones."""
        own = self._own
        if own is not None and not self.is_closing:
            self._submit(lambda: own.folder.reject(frame, reason), self._report_failure)

    @property
    def waiting(self) -> int:
        """Accepted records that are in the spool, or on the way there, and not in the window."""
        on_disk = sum(each.count for each in self._backlogs.all())
        return on_disk + (0 if self.is_always else len(self.pending))

    @property
    def waiting_of_this_run(self) -> int:
        """Like :attr:`waiting`, without the records of earlier runs and dead processes."""
        return self.waiting - sum(each.count for each in self._backlogs.earlier)

    def add_last(self, frames: Sequence[bytes]) -> None:
        """Take the last frames when the client closes, also without room."""
        for frame in frames:
            self.pending.add(frame)

    def why_full(self) -> str:
        """Return the reason for a refusal, for the error text."""
        if self._trouble.error is not None:
            return f"and its spool cannot be used: {self._trouble.error}"
        if self._own is None:
            return "and its spool is still being opened, and has no room for more until then"
        if self._disk_bytes + self.pending.size >= self._spool.max_bytes:
            return f"and so is its spool ({self._spool.max_bytes} bytes)"
        return "and its spool has no room for this record now"

    # -- the writer ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.is_closing:
            self._signal.arm()
            forks.check()
            try:
                self._note_hang()
                has_work = self._disk.is_busy or self._start_job()
            except Exception as error:  # there is no memory, say: it is a disk that fails
                self.pending.writing = 0
                self._fail_and_refuse(error)
                has_work = False
            if self._disk.is_busy or not has_work:
                self._signal.wait(HANG_SECONDS if self._disk.is_busy else self._idle_seconds())

    def _note_hang(self) -> None:
        """Take a disk that does not answer for one that fails, until it answers, unless records may be half written."""
        own, seconds = self._own, self._disk.seconds_busy
        if seconds < HANG_SECONDS:
            if isinstance(self._trouble.error, DiskHangsError):
                self._recovered()
        elif not self._trouble.blocks and (self.is_always or not (self.pending.writing or (own and own.count))):
            self._fail_and_refuse(DiskHangsError(f"{self._path}: the disk has not answered for {seconds:.0f} s"))
            self._wake.set()

    def _start_job(self) -> bool:
        """Give the most urgent job to the disk thread. Return False if there is none."""
        own, is_blocked = self._own, self._trouble.blocks
        if own is None:
            if not is_blocked:
                self._submit(partial(jobs.open_own, self._backlogs.folder, self._spool), self._opened)
            return not is_blocked
        for backlog in self._backlogs.all():
            if backlog.is_loading_due and monotonic() >= backlog.read_at:
                skips = backlog.failed_reads >= MAX_READS
                read = partial(jobs.read, backlog.folder, backlog.read_up_to, AHEAD_BYTES, skips)
                self._submit(read, partial(self._loaded, backlog))
                return True
        if self._backlogs.unsaved and not is_blocked:
            rewrites = encode_runs(self._backlogs.take_unsaved())
            self._submit(partial(jobs.rewrite, own.folder, rewrites), self._rewritten)
            return True
        advances = self._backlogs.advances()
        if (advances or (self.pending and not is_blocked)) and not self._adoption.is_late:
            self._write(own, advances, [] if is_blocked else self.pending.start_writing(BATCH_BYTES))
            return True
        if self._adoption.seconds_left() > 0:
            return False
        self._submit(self._adoption.next_job(self._path), self._adopted)
        return True

    def _idle_seconds(self) -> float | None:
        if due := [each.read_at for each in self._backlogs.all() if each.is_loading_due]:
            return max(min(due) - monotonic(), 0.0)
        if self._trouble.error is not None and (self.pending or self._backlogs.unsaved or self._own is None):
            return self._trouble.seconds_left
        seconds = self._adoption.seconds_left()
        return None if seconds == inf else max(seconds, 0.0)

    # -- the outcomes of jobs ------------------------------------------------------------------------------------------
    #
    # An exception may end each of these methods anywhere: Ctrl-C, or for lack of memory. Then it is called again. The
    # state changes in consecutive lines that call nothing, or one function in C at their end: no signal handler runs
    # in them. All other calls are harmless if repeated.

    def _submit(self, work: Callable[[], _T], note: Callable[[Job[_T]], None]) -> None:
        self._disk.submit(work, partial(self._note, note))

    def _note(self, note: Callable[[Job[_T]], None], job: Job[_T]) -> None:
        """Take note of the outcome of a job, and wake all that may wait for it."""
        try:
            if not job.is_noted:
                note(job)
                job.is_noted = True
        except Exception:
            self._counters.spool_failures += 1
            raise
        self.pending.call_senders()
        self._room.set()
        self._wake.set()
        self._signal.set()

    def _opened(self, job: Job[None]) -> None:
        if job.error is not None:
            self._fail_and_refuse(job.error)
            return
        backlogs, size = self._backlogs, self._backlogs.folder.undelivered_bytes
        earlier, count = backlogs.with_earlier([backlogs.folder])
        own = backlogs.own_of(self._memory.stream)
        self._counters.adopted += count
        self._disk_bytes = size
        backlogs.earlier, backlogs.own = earlier, own
        job.is_noted = True
        self._report(*backlogs.folder.problems)
        self._recovered()

    def _adopted(self, job: Job[jobs.Adopted]) -> None:
        if job.error is not None:
            self._report_failure(job)
            return
        backlogs = self._backlogs
        folder = job.result.folder
        earlier, count = backlogs.with_earlier([] if folder is None else [folder])
        if folder is not None:
            self._adoption.look_soon()
        self._counters.adopted += count
        backlogs.earlier = earlier
        job.is_noted = True
        self._report(*job.result.problems)

    def _loaded(self, backlog: Backlog, job: Job[Read]) -> None:
        if job.error is not None:
            backlog.failed_reads += 1
            backlog.read_at = monotonic() + READ_AGAIN_SECONDS
            self._report_failure(job)
            return
        read: Read = job.result
        lost = backlog.loaded(read, job)
        # After pages were skipped, the next unreadable ones are tried once more only.
        backlog.failed_reads = MAX_READS - 1 if backlog.failed_reads >= MAX_READS else 0
        self._report(*read.problems)
        if lost:
            self._report(f"{backlog.folder.path}: {lost} records in it are damaged or gone")

    def _write(self, own: Backlog, advances: list[tuple[Backlog, int]], frames: list[bytes]) -> None:
        append = own.folder.prepare(self._next_number(own), frames) if frames else None
        folders = [(each.folder, number) for each, number in advances]
        finished = self._backlogs.finished(advances)
        closing = [each.folder for each in finished if each.folder is not own.folder]
        self._submit(
            partial(jobs.write, own.folder, append, folders, closing),
            partial(self._written, own, append, finished),
        )
        for each, number in advances:
            each.advanced = number

    def _next_number(self, own: Backlog | None) -> int:
        """Return the number on disk of the oldest pending record. It is constant while that record is pending."""
        if own is None:
            return 0
        if own.count:
            return own.last + 1
        return own.base + self._memory.stream.taken + self._memory.queue.qsize() + 1

    def _written(self, own: Backlog, append: Append | None, finished: list[Backlog], job: Job[jobs.Written]) -> None:
        if job.error is not None:
            self._not_written(append, job.error)
            return
        written: jobs.Written = job.result
        self._disk_bytes = written.size
        if finished:
            self._adoption.look_soon()
        self._backlogs.earlier = [each for each in self._backlogs.earlier if each not in finished]
        if written.has_removed:
            self._trouble.retry_now()
        if written.check:
            self.pending.writing = 0
            job.is_noted = True
            self._take_note(written.check)
        elif append is not None and written.error is None:
            self._note_written(own, append, job)
        else:
            self._not_written(append, written.error)
        self._report(*written.problems)

    def _note_written(self, own: Backlog, append: Append, job: Job[jobs.Written]) -> None:
        pending = self.pending
        noted = own.with_written(append.first, len(append.frames))
        removal, size = pending.end_writing(None)
        own.last, own.count, own.read_up_to = noted
        pending.size -= size
        pending.writing = 0
        pending.has_news = job.is_noted = True
        deque(removal, maxlen=0)
        own.keep_in_memory(append.first, append.frames)
        self._recovered()

    def _not_written(self, append: Append | None, error: Exception | None) -> None:
        if append is not None and error is not None:
            self._fail(error)
            if self.is_always:
                self.pending.refuse_writing(self._trouble.error)
            self.pending.writing = 0

    # -- trouble -------------------------------------------------------------------------------------------------------

    def _take_note(self, check: Check) -> None:
        """Note changes of other programs to the files."""
        if check.restored:
            self._report(f"{self._path}: {check.restored} files in it were removed, and are restored")
        self._report(*check.problems)
        lost = self._backlogs.take_damage(check, self._memory.window)
        if lost:
            self._report(f"{self._path}: a file in it was cut off; {lost} records are lost")

    def _rewritten(self, job: Job[None]) -> None:
        if job.error is not None:
            self._fail_and_refuse(job.error)
        else:
            self._backlogs.unsaved.clear()
            self._recovered()

    def _fail_and_refuse(self, error: Exception) -> None:
        """Note that the disk fails; in mode ``always``, refuse the pending records."""
        self._fail(error)
        if self.is_always and self._trouble.error is not None:
            self.pending.refuse(self._trouble.error, self.pending.writing)

    def _fail(self, error: Exception) -> None:
        """Note that the disk fails; the writer tries again after a while."""
        problem = error if isinstance(error, SpoolError) else SpoolError(f"{self._path}: {str(error) or show(error)}")
        self._trouble.begin(problem)
        self._report(problem)

    def _recovered(self) -> None:
        if self._trouble.end():
            self._notifier.notify(NotificationKind.SPOOL_RESTORED)

    def _report_failure(self, job: Job[_T]) -> None:
        if job.error is not None:
            self._report(f"{self._path}: {job.error}")

    def _report(self, *problems: SpoolError | str) -> None:
        for each in problems:
            self._counters.spool_failures += 1
            error = SpoolError(each) if isinstance(each, str) else each
            self._notifier.notify(NotificationKind.SPOOL_FAILED, error)

    # -- closing -------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the writer, before :meth:`persist`. In the hub's thread; does not wait."""
        self.is_closing = True
        self._signal.set()

    def persist(self, entries: Sequence[Entry], seconds: float | None) -> tuple[list[bytes], BaseException | None]:
        """Close, and leave all undelivered records on disk. Thread-safe; needs no hub.

        :param entries: the records that the outbox has given up.
        :param seconds: the time limit, at least CLOSE_SECONDS. A disk that does not answer in time may have kept the
            records too.
        :returns: the frames that are not on disk, and an exception that has interrupted the wait.
        """
        self.is_closing = True
        if self._left is not None:  # an exception has interrupted the caller since
            return self._left, None
        deadline = Deadline(None if seconds is None else max(seconds, CLOSE_SECONDS))
        # Also if this is interrupted: a record that is being written must not be refused.
        interruption, job = self._disk.settle(deadline, CLOSE_SECONDS), None
        pending = [] if self.is_always else self.pending.frames()
        next_number = self._next_number(self._own)
        total = len(entries) + len(pending) + sum(each.count for each in self._backlogs.all())
        try:
            job = self._disk.run_last(jobs.last(self._backlogs, self._spool, entries, pending, next_number), deadline)
        except BaseException as error:
            interruption = error
        self.pending.refuse(ClientClosedError("the client was closed before the disk had kept the record"))
        if self._disk.is_abandoned:  # a forked child's copy of the parent's call
            return [], interruption
        if job is not None and job.is_over and job.error is None:
            kept: jobs.Kept = job.result
            left, lost, problem = kept.left, min(kept.lost, total - len(kept.left)), kept.error
        else:
            left, lost = self._backlogs.unsaved_frames(entries) + pending, 0
            problem = (job and job.error) or TimeoutError("the disk did not answer")
        kept_count = total - len(left) - lost
        # No signal handler comes between these lines.
        self._counters.dropped += lost
        self._counters.kept += kept_count
        self._backlogs.own, self._backlogs.earlier = None, []
        self._left = left
        if problem is not None and total:
            self._report(f"{self._path}: not all undelivered records could be kept: {problem}")
        return left, interruption

    def close_watcher(self) -> None:
        """Close the disk thread's watcher, after :meth:`persist`. In the hub's thread."""
        self._disk.end_watching()

    def abandon(self) -> None:
        """Close all descriptors in a forked child: the spool is the parent's. Must not wait."""
        self.is_closing = True
        self._disk.abandon()
        for folder in (self._backlogs.folder, *self._backlogs.orphans):
            folder.leave()
        if self._disk.is_busy:
            close_inherited_locks([self._path, *orphans(self._spool.absolute_path)])
        self.pending.refuse(ClientClosedError("the process was forked"))
