"""The outbox of a client with a stamp or a seal.

A record gets its number, its seal and its place on the queue in one call that does not switch: in the compiled gate, or
in :meth:`Stamper.stamp <geventaudit.trail.stamping.Stamper.stamp>`. Until then it is a
:class:`~geventaudit.encoder.draft.Draft`: with its sender, or in the inbox. A signal handler that sends in the middle
of that call leaves its record in the inbox, which is emptied right after.

The first use opens the stream: the checkpoint ``open`` goes before all records. If the key of the seal has to be read
from a file first, a native thread reads it, and the records wait in the inbox, encoded and without numbers.

======================  ================================================================================================
the key                 records that come meanwhile
======================  ================================================================================================
is being read           wait in the inbox, as many as the queue holds; in mode ``always``, in ``send``
cannot be read          the same, then :class:`~geventaudit.SealError`; in mode ``always``, that at once
is there                get their numbers, in the order in which they came
======================  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.queue import Full

from ..encoder.draft import Draft
from ..errors import AuditError, QueueFullError, SealError, SpoolError, logger
from ..notifications import NotificationKind, Notifier
from ..runtime import forks
from ..runtime.clock import Deadline
from ..runtime.copying import copied
from ..runtime.signal import Change
from ..runtime.workers import OneWorker, may_wait
from ..spool import Spool
from ..spool.stream import Entry
from ..stats import Counters, Rejection
from ..trail.seal import SealBusyError
from ..trail.stamp import number_of
from ..trail.stamping import CheckpointKind, Facts, StamperBusyError, Trail
from .inbox import Inbox
from .outbox import Outbox

if TYPE_CHECKING:
    from ..spool.pending import Pending
    from .key_reader import KeyReader

__all__ = ["StampedOutbox"]

_END_SECONDS = 1.0  # that the disk has for the last checkpoint, at least

_MOST_MOVED = 256  # records of the inbox that get their numbers without a pause

_LOOK_SECONDS = 0.5  # how often a send() that waits for the key checks that the client is still open


class StampedOutbox(Outbox):
    """The undelivered frames of one client in one process, with numbers.

    :param trail: makes the stamper.
    """

    def __init__(
        self,
        trail: Trail,
        inbox: Inbox,
        queue_size: int,
        spool: Spool | None,
        counters: Counters,
        notifier: Notifier,
    ) -> None:
        super().__init__(inbox, queue_size, spool, counters, notifier)
        self._notifier = notifier
        self._stamper = trail.stamper()
        self._is_opening = False
        self._put_now = partial(self.queue.put, block=False)
        self._timer: Any = None  # for checkpoints
        self._is_ending = False  # no timer is made any more
        self._reader: KeyReader | None = None
        if self._stamper.seal is not None:
            from .key_reader import KeyReader

            self._reader = KeyReader(self._stamper.seal, self._key_is_read, self._key_failed)
        self._key_change = Change()  # the key is there, or cannot be read
        self._mover = OneWorker(self._move)
        self.is_plain = False

    # -- in ------------------------------------------------------------------------------------------------------------

    def accept(self, frame: bytes, timeout: float | None) -> None:
        if self.wake.is_armed:  # first, as in accept() of all clients
            self.wake.set()
        if not self._accept_at_once(frame):
            if self.store is not None and self.store.is_always:
                self._wait_for_key()
            try:
                self._accept_behind(frame, timeout)
            except BaseException as error:
                self._void_if_refused(frame, error)
                raise
        if self.inbox.entries and self._stamper.is_open:  # a signal handler's, which has interrupted this
            self.move_inbox()

    def _accept_at_once(self, frame: bytes) -> bool:
        """Accept *frame* if there is nothing to wait for: the common case, with few calls."""
        if not self.is_plain or self.inbox.entries:
            return False
        try:
            frame.stamped, frame.number, _ = self._stamper.stamp(frame, self._put_now)  # type: ignore[attr-defined,arg-type]
        except (Full, StamperBusyError):
            return False
        if self._refusal is not None:
            self._withdraw(frame, None)
        return True

    def _wait_for_key(self) -> None:
        """Wait until the stream can be opened: in mode ``always``, no record is accepted before that.

        :raises SealError: the key cannot be read, or here nothing may wait.
        """
        seal, reader = self._stamper.seal, self._reader
        while seal is not None and reader is not None and seal.needs_reading and self._refusal is None:
            change = self._key_change.event
            reader.start()
            if reader.error is not None:
                raise SealError(str(reader.error)) from reader.error
            if not may_wait():
                raise SealError("the key of the seal has to be read before send() returns, and here nothing may wait")
            change.wait(_LOOK_SECONDS)

    def full(self, wait: str = "") -> QueueFullError:
        reader = self._reader
        if reader is None or reader.error is None or self._stamper.is_open:
            return super().full(wait)
        return SealError(f"{reader.error}; the queue is full of records that wait for it ({self.queue.maxsize}){wait}")

    def _void_if_refused(self, frame: bytes, error: BaseException) -> None:
        """Note that a record with a number was refused after all, by the disk or for lack of memory."""
        if not isinstance(frame, Draft) or not frame.number:
            return
        pending: Pending | None = frame.pending
        if (pending is not None and pending.error is not None) or isinstance(error, MemoryError | RecursionError):
            self._stamper.void(frame.number)

    def _set_plain(self) -> None:
        # While the stream is being opened, its first record is not put yet.
        is_open = self._stamper.is_open and not self._is_opening
        self.is_plain = self.store is None and self._refusal is None and is_open

    @property
    def chain(self) -> Any:
        """The numbers and keys of the stream; None before it is open. The compiled gate uses them if it is plain."""
        return self._stamper.chain

    def _put_in_order(self, frame: bytes) -> Pending | None:
        if not isinstance(frame, Draft):
            return super()._put_in_order(frame)
        try:
            self._open()
            frame.stamped, frame.number, frame.pending = self._stamper.stamp(frame, super()._put_in_order)
        except (StamperBusyError, SealBusyError):
            if self._is_moving:
                raise Full from None
            self.inbox.put(frame)
            return None
        except SealError as error:  # this process has no keys: it was forked too deep
            self._key_failed(error)
            raise
        pending: Pending | None = frame.pending
        return pending

    def _withdraw(self, frame: bytes, pending: Pending | None) -> None:
        if not isinstance(frame, Draft):
            super()._withdraw(frame, pending)
        elif frame.number:
            try:
                super()._withdraw(frame.stamped, pending)
            except BaseException:
                self._stamper.void(frame.number)
                raise

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the stream, unless it is open, and put its first checkpoint.

        :raises StamperBusyError: the key has to be read first, or the caller has interrupted this.
        :raises SealError: this process has no keys.
        """
        stamper = self._stamper
        if stamper.is_open and not self._is_opening:
            return
        if stamper.seal is not None and self._reader is not None and stamper.seal.needs_reading:
            self._reader.start()
            raise StamperBusyError
        # As in a stamper: no signal handler comes between the question and the assignment.
        if self._is_opening:
            raise StamperBusyError
        try:
            self._is_opening = True
            if stamper.is_open:
                return
            stamper.open()
            if stamper.seal is not None:
                self._checkpoint("open", self._put_first)
                hub = get_hub_if_exists()  # None if another thread closes a client whose own thread has ended
                if hub is not None and hub.loop is not None and not self._is_ending:
                    interval = stamper.seal.checkpoint_interval
                    self._timer = hub.loop.timer(interval, interval, ref=False)
                    self._timer.start(self._on_timer)
        finally:
            self._is_opening = False
            self._set_plain()

    def _key_is_read(self) -> None:
        """Give the records that have waited their numbers. In the hub."""
        forks.check()
        try:
            self._open()
        except StamperBusyError:  # by a signal handler in the hub; the next record opens the stream
            pass
        if self._reader is not None and self._reader.error is not None:
            self._notifier.notify(NotificationKind.SEAL_RESTORED)
        self._key_change.set()
        self.move_inbox()
        self.wake.set()
        self._room.set()

    def _key_failed(self, error: SealError) -> None:
        self._notifier.notify_rate_limited(NotificationKind.SEAL_FAILED, error)
        self._key_change.set()

    def move_inbox(self, most: int | None = _MOST_MOVED) -> None:
        before = len(self.inbox)
        super().move_inbox(most)
        if 0 < len(self.inbox) < before:
            self._mover.ensure_running()

    def _move(self) -> None:
        """Move the rest of the inbox, as far as there is room, and let other greenlets run in between."""
        while left := len(self.inbox):
            gevent.sleep(0)
            forks.check()
            super().move_inbox(_MOST_MOVED)
            if len(self.inbox) >= left:
                return

    def _on_timer(self) -> None:
        forks.check()
        if self._timer is not None:
            self._checkpoint("mark", self._put_checkpoint)

    def _checkpoint(self, kind: CheckpointKind, put: Callable[[bytes], Pending | None]) -> Pending | bool:
        """Put a checkpoint.

        :returns: the record if it goes to the spool, or True; False if it cannot be put now.
        """
        stamper = self._stamper
        if stamper.seal is None or stamper.has_ended or not stamper.is_open:
            return False
        rejected = self._counters.snapshot().rejected
        left_out = rejected.get(Rejection.LEFT_OUT, 0)
        facts = Facts(stamper.delivered(self.stream.settled), sum(rejected.values()) - left_out, left_out)
        try:
            pending = stamper.stamp_checkpoint(kind, facts, put)
        except (StamperBusyError, Full):
            return False
        except AuditError as error:
            logger().warning("a checkpoint of the audit trail was not written: %s", error)
            return False
        if self.wake.is_armed:
            self.wake.set()
        return True if pending is None else pending

    def _put_first(self, frame: bytes) -> Pending | None:
        """Put the first record, which takes no room on the queue."""
        if self.store is not None and self.store.is_always:
            return self.store.add(frame)
        self.stream.taken += 1
        self.window.append((self.stream, self.stream.taken, frame))
        return None

    def _put_checkpoint(self, frame: bytes) -> Pending | None:
        if self.store is not None and self.store.is_always:  # nobody waits until it is on disk
            return self.store.add(frame)
        return super()._put_in_order(frame)

    def _put_last(self, frame: bytes) -> Pending | None:
        """Put the last record, whether there is room or not."""
        try:
            return self._put_checkpoint(frame)
        except (Full, SpoolError):
            if self.store is None:
                self.queue.queue.append(frame)
            else:
                self.store.add_last([frame])
            return None

    def end(self, deadline: Deadline) -> bool:
        """Put the last record of the stream, and wait until it is on disk if all have to be.

        Nothing is accepted afterwards.

        :returns: False if there is nothing to be put, or was before.
        """
        self.stop()
        pending = self._checkpoint("end", self._put_last)
        if self.store is not None and self.store.is_always and not isinstance(pending, bool) and may_wait():
            self.store.ensure_running()
            deadline = Deadline(max(deadline.left() or 0.0, _END_SECONDS))
            while not pending.is_over and not deadline.has_passed():
                self.store.pending.written.event.wait(deadline.left())
        return pending is not False

    def stop(self) -> None:
        """Put no more checkpoints, and read no key. In the hub's thread."""
        self._is_ending = True
        self._stop_timer()
        if self._reader is not None:
            self._reader.stop()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()

    def forget(self) -> None:
        super().forget()
        self._stamper.forget()
        self._stop_timer()
        if self._reader is not None:
            self._reader.abandon()

    # -- out -----------------------------------------------------------------------------------------------------------

    def _fill(self, max_bytes: int) -> None:
        before = len(self.window)
        super()._fill(max_bytes)
        if self.store is not None and self._stamper.seal is not None:
            fresh = [frame for stream, _, frame in list(self.window)[before:] if stream is not self.stream]
            if fresh:
                self._adopted(fresh)

    def _adopted(self, frames: list[bytes]) -> None:
        """Note the records of other streams, for the next checkpoint."""
        self._stamper.adopt(frames)
        try:
            self._open()
        except StamperBusyError:  # the checkpoint follows
            pass
        except SealError as error:  # they are sent on all the same
            self._key_failed(error)

    def reject_first(self, reason: str) -> bytes:
        stream = self.window[0][0]
        frame = super().reject_first(reason)
        if stream is self.stream:
            self._give_up([frame])
            self._checkpoint("mark", self._put_checkpoint)
        return frame

    def take_all(self) -> list[Entry]:
        entries = super().take_all()
        self._give_up([frame for stream, _, frame in entries if stream is self.stream])
        if any(isinstance(frame, Draft) for _, _, frame in entries):  # flush() waits for numbers that they do not have
            self.end_flushes()
        return entries

    def give_up(self, seconds: float | None) -> tuple[list[bytes], BaseException | None]:
        if self._reader is not None:
            self._reader.end_thread()
        return super().give_up(seconds)

    def _give_up(self, frames: list[bytes]) -> None:
        stamper = self._stamper
        if stamper.seal is None:
            return
        for frame in frames:
            found = number_of(frame)
            if found is not None:
                stamper.give_up(found[1])

    def _copy_all(self) -> list[Entry]:
        self._is_ending = True  # without a hub, nothing has called stop()
        for entry in copied(self.inbox.entries):
            if entry.claim("hub"):
                entry.frame = self._numbered(entry.frame)
        return super()._copy_all()

    def _numbered(self, frame: bytes) -> bytes:
        """Give a record a number at the end. Without one, it is handed back as it is."""
        if isinstance(frame, Draft):
            if frame.number:
                return frame.stamped
            try:
                self._open()
                frame.stamped, frame.number, _ = self._stamper.stamp(frame, lambda stamped: None)
                return frame.stamped
            except (StamperBusyError, AuditError):
                pass
        return frame

    @property
    def last_accepted(self) -> int:
        # The first checkpoint has a number too, before those of the records that wait.
        is_first_due = self._stamper.seal is not None and not self._stamper.is_open and len(self.inbox) > 0
        return super().last_accepted + is_first_due
