"""The outbox of a client with a stamp or a seal.

A record gets its number, its seal and its place on the queue in one call that does not switch: see
:meth:`StampedOutbox._put_in_order`. Until then it is a :class:`~geventaudit.trail.stamp.Draft`: with its sender, or in
the inbox. A signal handler that sends in the middle of that call leaves its record in the inbox, which is emptied
right after.

The first use reads the key of the seal, and puts the checkpoint ``open`` before all records.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from gevent._hub_local import get_hub_if_exists
from gevent.queue import Full

from ..errors import AuditError, SealError, SpoolError, logger
from ..notifications import NotificationKind, Notifier
from ..runtime import forks
from ..runtime.clock import Deadline
from ..runtime.copying import copied
from ..runtime.workers import may_wait
from ..spool import Spool
from ..spool.stream import Entry
from ..stats import Counters, Rejection
from ..trail.seal import SealBusyError
from ..trail.stamp import Draft, number_of
from ..trail.stamping import CheckpointKind, Facts, Stamper, StamperBusyError, Trail
from .inbox import Inbox
from .outbox import Outbox

if TYPE_CHECKING:
    from ..spool.pending import Pending

__all__ = ["StampedOutbox"]

_END_SECONDS = 1.0  # that the disk has for the last checkpoint, at least


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
        self._trail = trail
        self._notifier = notifier
        self._stamper: Stamper | None = None
        self._is_opening = False
        self._put_now = partial(self.queue.put, block=False)
        self._timer: Any = None  # for checkpoints
        self.is_plain = False

    # -- in ------------------------------------------------------------------------------------------------------------

    def accept(self, frame: bytes, timeout: float | None) -> None:
        stamper = self._stamper
        if stamper is not None and self.store is None and self._refusal is None and not self.inbox.entries:
            # The common case, with few calls. The sender is woken first, as in accept() of all clients.
            if self.wake.is_armed:
                self.wake.set()
            try:
                frame.stamped, frame.number, _ = stamper.stamp(frame, self._put_now)  # type: ignore[attr-defined,arg-type]
            except (Full, StamperBusyError):
                pass
            else:
                if self._refusal is not None:
                    self._withdraw(frame, None)
                return
        try:
            super().accept(frame, timeout)
        except BaseException as error:
            self._void_if_refused(frame, error)
            raise
        if self.inbox.entries:  # a signal handler's, which has interrupted this
            self.move_inbox()

    def _void_if_refused(self, frame: bytes, error: BaseException) -> None:
        """Note that a record with a number was refused after all, by the disk or for lack of memory."""
        if not isinstance(frame, Draft) or not frame.number or self._stamper is None:
            return
        pending: Pending | None = frame.pending
        if (pending is not None and pending.error is not None) or isinstance(error, MemoryError | RecursionError):
            self._stamper.void(frame.number)

    def refuse(self, error: Exception | None) -> None:
        super().refuse(error)
        self.is_plain = False

    def _put_in_order(self, frame: bytes) -> Pending | None:
        if not isinstance(frame, Draft):
            return super()._put_in_order(frame)
        try:
            stamper = self._stamper or self._open()
            frame.stamped, frame.number, frame.pending = stamper.stamp(frame, super()._put_in_order)
        except (StamperBusyError, SealBusyError):
            if self._is_moving:
                raise Full from None
            self.inbox.put(frame)
            return None
        except SealError as error:
            if self._is_moving:  # no caller of send() learns of it
                self._notifier.notify_rate_limited(NotificationKind.NOT_RECORDED, error)
            raise
        pending: Pending | None = frame.pending
        return pending

    def _withdraw(self, frame: bytes, pending: Pending | None) -> None:
        if not isinstance(frame, Draft):
            super()._withdraw(frame, pending)
        elif self._stamper is not None and frame.number:
            try:
                super()._withdraw(frame.stamped, pending)
            except BaseException:
                self._stamper.void(frame.number)
                raise

    # -- the stream ----------------------------------------------------------------------------------------------------

    def _open(self) -> Stamper:
        """Return the stamper, after the first checkpoint was put.

        :raises SealError: the key of the seal cannot be used.
        """
        # As in a stamper: no signal handler comes between the question and the assignment.
        if self._is_opening:
            raise StamperBusyError
        try:
            self._is_opening = True
            if self._stamper is not None:
                return self._stamper
            stamper = self._stamper = self._trail.stamper()
            if stamper.seal is not None:
                self._checkpoint("open", self._put_first)
                hub = get_hub_if_exists()  # None if another thread closes a client whose own thread has ended
                if hub is not None and hub.loop is not None:
                    interval = stamper.seal.checkpoint_interval
                    self._timer = hub.loop.timer(interval, interval, ref=False)
                    self._timer.start(self._on_timer)
            return stamper
        finally:
            self._is_opening = False

    def _on_timer(self) -> None:
        forks.check()
        if self._timer is not None:
            self._checkpoint("mark", self._put_checkpoint)

    def _checkpoint(self, kind: CheckpointKind, put: Callable[[bytes], Pending | None]) -> Pending | bool:
        """Put a checkpoint.

        :returns: the record if it goes to the spool, or True; False if it cannot be put now.
        """
        stamper = self._stamper
        if stamper is None or stamper.seal is None or stamper.has_ended:
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
        self.stop_checkpoints()
        pending = self._checkpoint("end", self._put_last)
        if self.store is not None and self.store.is_always and not isinstance(pending, bool) and may_wait():
            self.store.ensure_running()
            deadline = Deadline(max(deadline.left() or 0.0, _END_SECONDS))
            while not pending.is_over and not deadline.has_passed():
                self.store.pending.written.event.wait(deadline.left())
        return pending is not False

    def stop_checkpoints(self) -> None:
        """Stop the timer. In the hub's thread."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()

    def forget(self) -> None:
        super().forget()
        if self._stamper is not None:
            self._stamper.forget()
        self.stop_checkpoints()

    # -- out -----------------------------------------------------------------------------------------------------------

    def _fill(self, max_bytes: int) -> None:
        before = len(self.window)
        super()._fill(max_bytes)
        stamper = self._stamper
        if self.store is not None and (stamper is None or stamper.seal is not None):
            fresh = [frame for stream, _, frame in list(self.window)[before:] if stream is not self.stream]
            if fresh:
                self._adopted(fresh)

    def _adopted(self, frames: list[bytes]) -> None:
        """Note the records of other streams, for the next checkpoint."""
        try:
            (self._stamper or self._open()).adopt(frames)
        except StamperBusyError:  # the records that follow name their stream too
            pass
        except SealError as error:  # they are sent on all the same
            self._notifier.notify_rate_limited(NotificationKind.NOT_RECORDED, error)

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
        return entries

    def _give_up(self, frames: list[bytes]) -> None:
        stamper = self._stamper
        if stamper is None or stamper.seal is None:
            return
        for frame in frames:
            found = number_of(frame)
            if found is not None:
                stamper.give_up(found[1])

    def _copy_all(self) -> list[Entry]:
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
                stamper = self._stamper or self._open()
                frame.stamped, frame.number, _ = stamper.stamp(frame, lambda stamped: None)
                return frame.stamped
            except (StamperBusyError, AuditError):
                pass
        return frame
