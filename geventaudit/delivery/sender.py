"""The sender: the greenlet that takes frames from the outbox and writes them to a connection.

A frame is in flight before it is written, and leaves the outbox only when the connection reports its delivery. When a
connection breaks, all frames in flight are written first over the next one, in their order. So no frame is lost between
outbox and agent, as far as the connection can know (see :mod:`geventaudit.transport.connection`), the order of first
arrivals is kept, and a few frames may arrive twice.
"""

from __future__ import annotations

import gevent
from gevent.event import Event

from ..errors import ConnectionFailedError, as_connection_error, logger, show
from ..notifications import NotificationKind, Notifier
from ..runtime import forks, workers
from ..runtime.clock import Deadline, monotonic
from ..stats import Counters
from ..trail.stamp import handed_back
from ..transport import Connection, release
from .connector import Connector
from .heartbeats import Heartbeats
from .outbox import MAX_BATCH_BYTES, MAX_WINDOW_BYTES, Outbox
from .quarantine import STRIKES, Disconnect, Phase, Quarantine, Step

__all__ = ["Sender"]

# Seconds between two checks that the agent has taken the frames in flight; the kernel gives no event.
_FIRST_LOOK = 0.001
_LAST_LOOK = 0.05


class Sender:
    """The sender greenlet of one client in one process. Constructed and used in the hub's thread.

    :param connector: makes connections, and is notified when one is lost.
    :param heartbeats: makes heartbeats, and decides when one is due.
    """

    def __init__(
        self, outbox: Outbox, connector: Connector, heartbeats: Heartbeats, counters: Counters, notifier: Notifier
    ) -> None:
        self.connected_or_over = Event()
        """Set while there is a connection, and for good once the sender is stopped."""
        self._outbox = outbox
        self._connector = connector
        self._heartbeats = heartbeats
        self._counters = counters
        self._notifier = notifier
        self.quarantine = Quarantine()
        self.worker = workers.OneWorker(self._run)
        self._is_stopped = False
        self._connection: Connection | None = None
        self._watcher: workers.Worker | None = None
        self._error: BaseException | None = None  # the end of the connection, from the watcher
        self._delivered = 0  # frames delivered over this connection
        self._is_settling = False

    # -- the client's side ---------------------------------------------------------------------------------------------

    def ensure_running(self) -> None:
        """Start the greenlets if they do not run."""
        if not self._is_stopped:
            self.worker.ensure_running()
        if self._outbox.store is not None:
            self._outbox.store.ensure_running()

    @property
    def is_connected(self) -> bool:
        """True while there is a connection."""
        return self._connection is not None

    def flush(self, timeout: float | None) -> bool:
        """Wait until all records accepted so far are delivered. Return False if some are not."""
        target, given_up = self._outbox.last_accepted, self._given_up()
        deadline = Deadline(timeout)
        flush = (target, Event())
        try:
            self._outbox.add_flush(flush)
            while self._outbox.stream.settled < target and not flush[1].is_set() and not deadline.has_passed():
                left = deadline.left()
                flush[1].wait(_LAST_LOOK if left is None else min(left, _LAST_LOOK))
                self.ensure_running()
                self.look()
        finally:
            self._outbox.remove_flush(flush)
        return self._outbox.stream.settled >= target and self._given_up() == given_up

    def _given_up(self) -> int:
        """Return the number of records of this run that will never be delivered."""
        return self._outbox.stream.dropped + self._counters.recovered + self._counters.kept

    def look(self) -> None:
        """Note deliveries. The sender greenlet cannot do so during a write."""
        # A signal handler in a worker may have interrupted the sender at any point.
        if not isinstance(gevent.getcurrent(), workers.Worker):
            self._look()

    def _look(self) -> None:
        if self._connection is not None:
            try:
                self._settle(self._connection)
            except Exception as error:  # a user-defined connection that fails counts as broken
                self._error = error
                self._outbox.wake.set()

    def renew(self) -> None:
        """Close the current connection, if there is one, and request the next."""
        if self._connection is not None:
            self._error = ConnectionFailedError("the connection was replaced")
            self._connection.close()  # ends a waiting write
            self._outbox.wake.set()

    def stop(self, reason: Exception) -> None:
        """End the greenlet and the connection. Records that wait for room are refused with *reason*."""
        self._is_stopped = True
        self._connector.is_over = True
        self._outbox.refuse(reason)
        self.worker.kill()
        self._drop_connection()
        self.connected_or_over.set()
        self._outbox.end_flushes()

    def stop_without_hub(self) -> None:
        """Stop after the hub was destroyed, when no greenlet runs and none has to be woken."""
        self._is_stopped = True
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                release(connection)
                self._is_settling = False
                self._settle(connection)
            except Exception:
                logger().exception("a connection could not be closed")

    # -- the greenlet --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopped:
            # A kill at this line needs no cleanup: stop() has done it.
            self._connection = self._connector.connect()
            since = monotonic()
            lost: BaseException | None = None
            try:
                forks.check()
                if not self._is_stopped:  # a factory may have swallowed the kill
                    self._start(self._connection)
                    self._serve(self._connection)
            except (Exception, gevent.Timeout) as error:
                # A Timeout is a BaseException: one that a factory did not cancel may be raised here.
                lost, connection = self._error or error, self._connection
                self._close()
                self._judge(connection, lost)
            except BaseException as error:
                lost = error  # the greenlet was killed; the next use of the client starts it again
                raise
            finally:
                self._drop_connection()
                if lost is not None and not self._is_stopped:
                    problem = as_connection_error(lost, "the connection broke")
                    if not self._connector.lost(problem, self._delivered, monotonic() - since):
                        self._outbox.refuse(problem)
                        self._outbox.end_flushes()

    def _start(self, connection: Connection) -> None:
        self._error = None
        self._delivered = 0
        self._watcher = workers.Worker.spawn(self._watch, connection)
        self.quarantine.on_connect(monotonic(), self._counters.connect_failures)
        self._heartbeats.on_connect()
        self._counters.connects += 1
        self.connected_or_over.set()

    def _watch(self, connection: Connection) -> None:
        """Wait for the end of the connection, also while there is nothing to send. Runs in its own greenlet."""
        try:
            connection.wait_broken()
            error: BaseException = ConnectionFailedError(f"{show(connection)}: broke without a reason")
        except (Exception, gevent.Timeout) as problem:
            error = problem
        if connection is self._connection:
            self._error = error
            self._outbox.wake.set()

    def _serve(self, connection: Connection) -> None:
        outbox = self._outbox
        look = _FIRST_LOOK
        while True:
            outbox.wake.arm()
            forks.check()
            if self._is_stopped:
                return
            if self._error is not None:
                raise self._error
            outbox.move_inbox()
            if self._settle(connection):
                look = _FIRST_LOOK
            if self._seconds_to_heartbeat() == 0.0:
                outbox.add_heartbeat()
                connection.write([self._heartbeats.make(connection.name)])
                self._counters.heartbeats += 1
            elif batch := self._next_batch():
                connection.write(batch)
                self._counters.written += len(batch)
                look = _FIRST_LOOK
                gevent.sleep(0)
            else:
                outbox.wake.wait(self._seconds_to_wait(look))
                look = min(look * 2, _LAST_LOOK)

    def _seconds_to_heartbeat(self) -> float | None:
        return self._heartbeats.seconds_left() if self.quarantine.allows_heartbeats else None

    def _seconds_to_wait(self, look: float) -> float | None:
        waits = [self._seconds_to_heartbeat(), self.quarantine.seconds_to_wait(monotonic())]
        waits.append(look if self._outbox.cursor else None)
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _next_batch(self) -> list[bytes]:
        """Return the next frames to write, which are then in flight."""
        outbox, quarantine = self._outbox, self.quarantine
        if outbox.in_flight_bytes >= MAX_WINDOW_BYTES:
            return []
        if quarantine.is_quiet:
            batch = outbox.next_batch(MAX_BATCH_BYTES)
            if batch:
                self._heartbeats.on_written()
            return batch
        waiting = outbox.waiting(quarantine.probe + 1)
        step = quarantine.next_step(outbox.in_flight, waiting, monotonic())
        if step is Step.NOTHING or not waiting:
            return []
        if quarantine.phase is Phase.TRIAL:  # a hang-up before the write is not one on the suspect
            gevent.sleep(_FIRST_LOOK)
            forks.check()
            if self._error is not None or self._is_stopped:
                return []
        if step is Step.PROBE:
            outbox.bring_forward(quarantine.probe)
        batch = outbox.next_batch(MAX_BATCH_BYTES, {Step.BATCH: None, Step.SOME: quarantine.some}.get(step, 1))
        quarantine.on_written(step, len(batch))
        self._heartbeats.on_written()
        return batch

    def _settle(self, connection: Connection, frames_read: int = 0) -> bool:
        """Note the deliveries that the connection, or its end, reports. Return True if there are new ones."""
        if self._is_settling:  # a signal handler that looks, in the middle of this
            return False
        try:
            self._is_settling = True
            fresh = min(max(connection.delivered(), frames_read) - self._delivered, self._outbox.cursor)
            if fresh <= 0:
                return False
            self._delivered += fresh
            records = self._outbox.settle(fresh)
            if records:
                self.quarantine.on_delivered(monotonic(), records)
            return True
        finally:
            self._is_settling = False

    def _judge(self, connection: Connection | None, error: BaseException) -> None:
        """Report the end of the connection to the quarantine. Give up the record that it rejects, if any."""
        if self._is_stopped or connection is None:
            return
        outbox, quarantine = self._outbox, self.quarantine
        agent_had_read, read = getattr(error, "agent_had_read", False), getattr(error, "frames_read", 0)
        event = Disconnect(outbox.first_in_flight, outbox.in_flight, self._delivered, agent_had_read, read)
        if quarantine.on_disconnect(event) and self._connector.rejects:
            problem = ConnectionFailedError(
                f"the agent hung up on a record {STRIKES} times in a row, and again after it took another"
            )
            frame = outbox.reject_first(str(problem))
            self._notifier.notify(NotificationKind.DROPPED, problem, tuple(handed_back([frame])))
        elif quarantine.trusts_ends:
            self._settle(connection, read)

    def _close(self) -> None:
        """Close the connection, which may read acknowledgements from its socket, and note the deliveries."""
        self._look()
        if self._connection is not None:
            try:
                self._connection.close()
            except Exception:
                logger().exception("a connection could not be closed")
            self._look()
            self._connection = None

    def _drop_connection(self) -> None:
        """Close the connection, and rewind the outbox. May be called at any time."""
        self._close()
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.kill(block=False)
        if not self._is_stopped:
            self.connected_or_over.clear()
        heartbeats = self._outbox.rewind()
        if not self._is_stopped:  # the last heartbeat of a closed client does not count as dropped
            self._counters.heartbeats_dropped += heartbeats
