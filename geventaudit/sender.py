"""From the queue to the wire: the queue, the in-flight window, and the sender greenlet between them.

A frame is in exactly one place: on the queue, in the window (written, not known to be taken by the agent), or among
those to be resent. It leaves the queue into the window *before* it is written, and the window only when the connection
says that it was delivered. When a connection breaks, the window goes first over the next one, in the old order. So
nothing is lost between queue and agent, the order of first arrivals is kept, and a few frames may arrive twice.

Only the sender greenlet reads the queue and writes to the connection. What it needs from its owner are two callables:
one gives the next open connection (and may take its time), one is told that a connection was lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event
from gevent.queue import Empty, Full, Queue

from .errors import ClientClosedError, ConnectionFailedError, QueueFullError, as_connection_error, logger, show
from .runtime.threads import Home, Inbox
from .spool import Spool
from .stats import Counters
from .transport import Connection, let_go

if TYPE_CHECKING:
    from gevent.lock import BoundedSemaphore

    from .store import Batch, Store, Tell

__all__ = ["MAX_BATCH_BYTES", "MAX_WINDOW_BYTES", "STRIKES", "Sender"]

MAX_BATCH_BYTES = 1 << 16
"""Frames are joined up to this many bytes (one frame more may begin below it) and written at once; between two batches
the sender lets other greenlets run."""

MAX_WINDOW_BYTES = 8 << 20
"""No more is written while this many bytes are in flight; bounds the memory where only acknowledgements deliver."""

STRIKES = 3
"""Connections in a row that a frame must have broken before it is suspected enough to be set aside."""

# How long one frame that goes alone is waited for before the others follow it all the same. Seconds.
_PATIENCE = 5.0

# How soon to ask again whether the agent has taken what is in flight; the kernel gives no event for it. Seconds.
_FIRST_LOOK = 0.001
_LAST_LOOK = 0.05


class _Flush:
    """Somebody who waits until so many records are settled."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.over = Event()


class Sender:
    """The queue, the window and the greenlet of one client. Bound to the hub it was made in.

    :param queue_size: records that may wait to be written.
    :param connect: gives the next open connection; called in the sender greenlet, may wait there.
    :param lost: told why a connection was lost, how many frames it had delivered, and how many seconds it had lived;
        called in the sender greenlet.
    :param heartbeat: makes the heartbeat's frame for a connection of that name.
    :param heartbeat_interval: seconds from one heartbeat to the next on a connection.
    :param set_aside: told of a frame that makes the agent hang up, which is given up; None where nobody is to judge.
    :param counters: counted up here.
    :param inbox: what other native threads hand over; put on the queue here.
    :param spool: what is behind the queue; None for nothing.
    :param home: the thread and the hub of the client.
    :param tell: tells the application what the spool has to say.
    """

    def __init__(
        self,
        *,
        queue_size: int,
        connect: Callable[[], Connection],
        lost: Callable[[ConnectionFailedError, int, float], None],
        heartbeat: Callable[[str], bytes],
        heartbeat_interval: float,
        set_aside: Callable[[bytes, int], None] | None,
        counters: Counters,
        inbox: Inbox,
        spool: Spool | None,
        home: Home,
        tell: Tell,
    ) -> None:
        self._connect = connect
        self._lost = lost
        self._heartbeat = heartbeat
        self._heartbeat_interval = heartbeat_interval
        self._set_aside = set_aside
        self._counters = counters
        self._inbox = inbox

        self._queue: Queue[bytes] = Queue(queue_size)
        self._resend: deque[bytes] = deque()
        self._window: deque[bytes | None] = deque()  # None stands for a heartbeat: never resent
        self._window_records = 0
        self._window_bytes = 0

        self.hub = gevent.get_hub()
        self._greenlet: gevent.Greenlet[[], None] | None = None
        self._stopped = ""  # why, once it is
        self._turn: BoundedSemaphore | None = None  # whose turn it is to wait for room; where anybody ever waited
        self._room = Event()
        self._refusal: Exception | None = None
        self._wake = Event()
        self._asleep = False
        self._flushes: list[_Flush] = []

        self._connection: Connection | None = None
        self._watcher: gevent.Greenlet[..., None] | None = None
        self._error: BaseException | None = None  # what the watcher saw happen to the connection
        self._popped = 0  # frames of this connection that have left the window
        self._careful = 0  # frames that are to go one by one; see _judge
        self._suspect: bytes | None = None  # the frame that was first in flight when the agent hung up
        self._probing = False  # whether the next connection is to find out if the agent takes anything at all
        self._on_trial = False  # whether it did, and the suspect is the next to go
        self._fruitless = 0  # connections in a row on which nothing was delivered
        self._strikes = 0  # on how many connections in a row
        self.connected_or_over = Event()
        """Set while there is a connection, and for good when the sender is stopped: what ``connect`` waits for."""

        self._unkept: list[bytes] = []
        self.store: Store | None = None
        if spool is not None:
            from .store import Store

            self.store = Store(
                spool,
                home=home,
                queue=self._queue,
                counters=counters,
                tell=tell,
                undelivered=self._in_memory,
                found=self._found,
                arrived=self._arrived,
                room=self._room,
            )
            self.store.start()

    # -- the client's side ---------------------------------------------------------------------------------------------

    def put(self, frame: bytes, timeout: float | None) -> None:
        """Accept *frame*, or say that there is no room (within *timeout* seconds; None waits for ever).

        :raises QueueFullError: when there is none; nothing was accepted.
        :raises ClientClosedError: when the sender was stopped while this waited; nothing was accepted.
        :raises Exception: what :meth:`refuse` was given while this waited; nothing was accepted.
        """
        try:
            if self.store is None and not self._inbox.used:
                # What _put_now does, without a call: the way of every record of a client of one thread without a spool.
                self._queue.put(frame, False)
                self._counters.accepted += 1
                batch = None
            else:
                batch = self._put_now(frame)
        except Full:
            if timeout is not None and timeout <= 0:
                raise self._full() from None
            batch = self._put_when_there_is_room(frame, timeout)
        if batch is not None:
            batch.wait()
        if self._asleep:  # as _arrived does, without a call
            self._wake.set()

    def _put_now(self, frame: bytes) -> Batch | None:
        if self.store is not None:
            return self.store.put(frame)
        if self._inbox.used:
            with self._inbox.lock:
                self._take_inbox()
                self._queue.put(frame, False)
        else:
            self._queue.put(frame, False)
        self._counters.accepted += 1
        return None

    def _full(self, wait: str = "") -> QueueFullError:
        why = f" {self.store.why_full()}" if self.store is not None else ""
        return QueueFullError(f"the queue is full ({self._queue.maxsize} records){why}{wait}")

    def _arrived(self) -> None:
        if self._asleep:
            self._wake.set()

    def _take_inbox(self) -> None:
        """Put what other threads handed over on the queue; holding the inbox's lock, which keeps room for it."""
        self._counters.accepted += self._inbox.empty_into(self._queue)

    def empty_inbox(self) -> None:
        """Put what other threads handed over on the queue. In this thread, the hub itself included."""
        if self._inbox.used:
            with self._inbox.lock:
                self._take_inbox()
            if self._asleep:
                self._wake.set()

    def _put_when_there_is_room(self, frame: bytes, timeout: float | None) -> Batch | None:
        """One at a time, in the order of their coming, so that nobody waits for ever.

        Not with ``Queue.put(timeout=...)``: what waits there could get onto the queue after the sender was stopped.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._turn is None:
            from gevent.lock import BoundedSemaphore  # brings gevent.monkey with it, a tenth of what importing takes

            self._turn = BoundedSemaphore(1)
        turn = self._turn
        if turn.acquire(timeout=timeout):
            try:
                while not self._stopped and self._refusal is None:
                    try:
                        return self._put_now(frame)
                    except Full:
                        self._room.clear()
                        if not self._room.wait(None if deadline is None else deadline - time.monotonic()):
                            break
            finally:
                turn.release()
        if self._stopped:
            raise ClientClosedError(f"{self._stopped} while send() waited for room")
        if self._refusal is not None:
            raise self._refusal
        raise self._full(f" after {timeout} s")

    def refuse(self, error: Exception | None) -> None:
        """Let everybody go who waits in :meth:`put`, with *error*; None accepts again."""
        self._refusal = error
        self._room.set()

    def ensure_running(self) -> None:
        """Start the greenlet, or start it again after somebody killed it.

        :raises ClientClosedError: the hub was destroyed, and nothing would run there.
        """
        if self._asleep and self.hub.loop is None:
            raise ClientClosedError("the hub of the client was destroyed")
        if not self._greenlet and not self._stopped:
            self._greenlet = gevent.spawn(self._run)

    def flush(self, timeout: float | None) -> bool:
        """Wait until all that was accepted so far is delivered; False when it was not, for whatever reason."""
        self.empty_inbox()
        given_up = self._counters.unsent
        if self._reached(self._counters.taken):
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        entry = _Flush(self._counters.taken)
        self._flushes.append(entry)
        try:
            while not entry.over.is_set():
                left = _LAST_LOOK if deadline is None else min(deadline - time.monotonic(), _LAST_LOOK)
                if left <= 0:
                    break
                entry.over.wait(left)
                self.ensure_running()
                self.look()
        finally:
            self._flushes.remove(entry)
        return self._reached(entry.target) and self._counters.unsent == given_up

    def _reached(self, target: int) -> bool:
        if self.store is not None and self.store.overtaken:  # what was delivered may be later than what is asked after
            return self._counters.settled >= self._counters.taken
        return self._counters.settled >= target

    def _found(self, count: int) -> None:
        """Older records came to light, and go before all others."""
        for flush in self._flushes:
            flush.target += count

    def give_up_flushes(self) -> None:
        """Let everybody go who waits in :meth:`flush`."""
        for flush in self._flushes:
            flush.over.set()

    def look(self) -> None:
        """Take note of what was delivered by now; the sender greenlet cannot while it waits in a write."""
        if self._connection is not None:
            try:
                self._settle(self._connection)
            except Exception as error:  # a connection of somebody's own that fails is a broken one
                self._error = error
                self._wake.set()

    def renew(self) -> None:
        """Part with the present connection, if there is one, and ask for the next."""
        if self._connection is not None:
            self._error = ConnectionFailedError("the connection was replaced")
            self._connection.close()  # lets a write that waits end
            self._wake.set()

    def take_undelivered(self) -> list[bytes]:
        """Take away all frames that are not delivered, in their order; they are the caller's then."""
        self.empty_inbox()
        self._window_to_resend()
        frames = list(self._resend)
        self._resend.clear()
        while True:
            try:
                frames.append(self._queue.get_nowait())
            except Empty:
                return frames

    def keep(self, timeout: float) -> None:
        """After :meth:`stop`: leave what is undelivered in the spool. What cannot be left there is ``unkept`` then.

        :param timeout: seconds that the spool may take.
        """
        frames = self.take_undelivered()
        if self.store is None:
            self._unkept = frames
        else:
            self.store.keep(frames, timeout)

    def keep_without_hub(self) -> None:
        """:meth:`stop` and :meth:`keep` when the hub is gone, in any thread.

        Greenlets of a hub that is gone do not run: nobody else uses any of this, nobody waits, nobody is to be woken.
        """
        self._stopped = "the client was closed"
        self._asleep = False
        connection, self._connection = self._connection, None
        if self.store is not None:
            self.store.closing = True
        if connection is not None:
            try:
                self._count_delivered(connection)
                let_go(connection)
            except Exception:
                logger().exception("a connection could not be closed")
        frames = self.unkept or self.take_undelivered()  # it may have been closing when its hub went
        if self.store is None:
            self._unkept = frames
        else:
            self.store.keep_without_hub(frames)

    @property
    def unkept(self) -> list[bytes]:
        """After :meth:`keep`, and meanwhile: what is undelivered, and nowhere else."""
        return self._unkept if self.store is None else self.store.unkept

    def forget_unkept(self) -> None:
        """Somebody else has them now."""
        self._unkept = []
        if self.store is not None:
            self.store.unkept = []

    def _in_memory(self) -> list[bytes]:
        """All frames that were put on the queue and are not delivered, in their order."""
        window = [frame for frame in self._window if frame is not None]
        return [*window, *self._resend, *self._queue.queue]

    def stop(self, why: str) -> None:
        """End the greenlet and the connection, for good. Does not wait; what is undelivered can be taken afterwards."""
        self._stopped = why
        self._room.set()
        if self._greenlet:
            self._greenlet.kill(block=False)
        self._drop_connection()
        self.connected_or_over.set()
        self.give_up_flushes()

    def join(self, timeout: float) -> None:
        """Wait for the greenlet to be gone after :meth:`stop`."""
        if self._greenlet is not None:
            self._greenlet.join(timeout)

    @property
    def queued(self) -> int:
        """Records that wait to be written, or to be written once more."""
        return self._queue.qsize() + len(self._resend) + len(self.unkept)

    def waiting(self) -> int:
        """Records on the queue: what its size bounds. From any thread."""
        return int(self._queue.qsize())

    @property
    def spooled(self) -> int:
        """Records in the spool, or on the way there, and not on the queue."""
        return 0 if self.store is None else self.store.waiting

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    @property
    def in_flight(self) -> tuple[int, int]:
        """Records that are written and not known to be delivered, and the bytes of their frames."""
        return self._window_records, self._window_bytes

    # -- the greenlet --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped:
            self._connection = self._connect()
            since = time.monotonic()
            lost: BaseException | None = None
            try:
                if not self._stopped:  # a factory may have swallowed the kill
                    self._adopt(self._connection)
                    self._serve(self._connection)
            except (Exception, gevent.Timeout) as error:
                # A Timeout is a BaseException: one that a factory started and forgot may go off here.
                lost = error
                self.look()
                self._judge(self._connection)
            except BaseException as error:
                lost = error  # somebody killed the greenlet; the next use of the client starts it again
                raise
            finally:
                self._drop_connection()
                if lost is not None and not self._stopped:
                    self._lost(
                        as_connection_error(lost, "the connection broke"), self._popped, time.monotonic() - since
                    )

    def _adopt(self, connection: Connection) -> None:
        self._error = None
        self._popped = 0
        self._watcher = gevent.spawn(self._watch, connection)
        self._counters.connects += 1
        self.connected_or_over.set()

    def _watch(self, connection: Connection) -> None:
        """In a greenlet of its own: notice that the agent hung up, also while there is nothing to send."""
        try:
            connection.wait_broken()
            error: BaseException = ConnectionFailedError(f"{show(connection)}: broke without saying why")
        except (Exception, gevent.Timeout) as problem:
            error = problem
        if connection is self._connection:
            self._error = error
            self._wake.set()

    def _serve(self, connection: Connection) -> None:
        heartbeat_due: float | None = None  # none before a record has gone out
        written = False
        if self._probing:
            heartbeat_due = self._send_heartbeat(connection)
        look = _FIRST_LOOK
        progress = time.monotonic()
        while True:
            if self._error is not None:
                raise self._error
            if self._settle(connection):
                look = _FIRST_LOOK
                progress = time.monotonic()
            if self._probing and self._popped:  # whoever looked first: flush() and stats() look too
                self._probing = False
                self._on_trial = True
            if self._on_trial and self._popped > 1:
                self._acquit()
            if batch := self._next_batch():
                connection.write(batch)
                self._counters.written += len(batch)
                look = _FIRST_LOOK
                written = True
                gevent.sleep(0)
                if heartbeat_due is None and not self._careful and self._suspect is None:
                    heartbeat_due = self._send_heartbeat(connection)
                continue
            late = heartbeat_due is not None and time.monotonic() >= heartbeat_due
            if late or (heartbeat_due is None and written and not self._window_records):
                heartbeat_due = self._send_heartbeat(connection)
                continue  # writing may have waited
            timeout = None if heartbeat_due is None else max(heartbeat_due - time.monotonic(), 0.0)
            if self._window:
                timeout = look if timeout is None else min(look, timeout)
                look = min(look * 2, _LAST_LOOK)
                if (self._careful or self._probing or self._on_trial) and time.monotonic() - progress > _PATIENCE:
                    self._careful = 0  # it is stuck; only a write that does not end can tell
                    self._acquit()
            self._sleep(timeout)

    def _sleep(self, timeout: float | None) -> None:
        """Until there is something to do, or *timeout*. No greenlet ran since this one looked, so nothing is missed."""
        self._wake.clear()
        self._asleep = True
        try:
            self._wake.wait(timeout)
        finally:
            self._asleep = False

    def _next_batch(self) -> list[bytes]:
        """The next frames to write, now in the window."""
        batch: list[bytes] = []
        size = 0
        limit = MAX_BATCH_BYTES
        if self._probing or self._window_bytes >= MAX_WINDOW_BYTES or (self._careful and self._window_records):
            return batch
        if self._on_trial and self._window_records:
            return batch
        if self._on_trial:
            limit = 1
        elif self._careful:
            self._careful -= 1
            limit = 1
        while self._resend and size < limit:
            batch.append(self._resend.popleft())
            size += len(batch[-1])
        self._counters.resent += len(batch)
        get = self._queue.get_nowait
        try:
            while size < limit:
                frame = get()
                batch.append(frame)
                size += len(frame)
        except Empty:
            pass
        except BaseException:  # a signal's handler may raise anywhere; these are nowhere else
            self._resend.extendleft(reversed(batch))
            raise
        if self.store is not None:
            self.store.refill()
        self._room.set()
        self._window.extend(batch)
        self._window_records += len(batch)
        self._window_bytes += size
        return batch

    def _send_heartbeat(self, connection: Connection) -> float:
        """Write one; when the next is due."""
        self._window.append(None)
        connection.write([self._heartbeat(connection.name)])
        self._counters.heartbeats += 1
        return time.monotonic() + self._heartbeat_interval

    def _settle(self, connection: Connection) -> bool:
        """Take note of what the connection says was delivered, and tell who waits for it; whether it was anything."""
        fresh = self._count_delivered(connection)
        if fresh:
            self._tell_flushes()
        return fresh

    def _count_delivered(self, connection: Connection) -> bool:
        """Take out of the window what the connection says was delivered; whether that was anything."""
        fresh = min(connection.delivered() - self._popped, len(self._window))
        if fresh <= 0:
            return False
        self._popped += fresh
        records = size = 0
        pop = self._window.popleft
        for _ in range(fresh):
            frame = pop()
            if frame is not None:
                records += 1
                size += len(frame)
        self._window_records -= records
        self._window_bytes -= size
        self._counters.delivered += records
        if self.store is not None:
            self.store.settled(records)
        return True

    def _tell_flushes(self) -> None:
        for flush in self._flushes:
            if self._reached(flush.target):
                flush.over.set()

    def _judge(self, connection: Connection | None) -> None:
        """After a connection broke: was it a frame that made the agent hang up? Such a frame would come back for ever.

        Suspected is the frame that was first in flight when an agent had read and then hung up, with nothing delivered
        on that connection. What was in flight goes frame by frame from then on, so that the right one is found. When it
        has happened on STRIKES connections in a row, alone on the last of them, it is put on trial: the next connection
        begins with a heartbeat, and when the agent took that, the frame follows alone. Only when it breaks that
        connection too is it set aside. An agent that restarts, or can take nothing at the time, is no evidence.

        After STRIKES connections in a row on which nothing was delivered, frames go one by one too: the kernel does not
        tell what an agent took of a larger write, and one that takes a little each time would never get further.
        """
        if self._set_aside is None or self._stopped:
            return
        records = [frame for frame in self._window if frame is not None]
        if self._on_trial and records[:1] == [self._suspect] and getattr(connection, "read_before_hang_up", False):
            self._convict(records[0])
            return
        if self._probing or self._on_trial:
            self._acquit()
            return
        if self._popped:
            self._fruitless = 0
            self._acquit()
            self._careful += bool(self._careful) * len(records)
            return
        self._fruitless += 1
        suspicious = bool(records) and getattr(connection, "read_before_hang_up", False)
        if suspicious or self._careful or self._fruitless >= STRIKES:
            self._careful += len(records)
        if not suspicious:
            return
        self._strikes = self._strikes + 1 if records[0] is self._suspect else 1
        self._suspect = records[0]
        self._probing = self._strikes >= STRIKES and list(self._window) == records[:1]

    def _acquit(self) -> None:
        self._suspect, self._strikes, self._probing, self._on_trial = None, 0, False, False

    def _convict(self, frame: bytes) -> None:
        """The agent took a heartbeat, and hung up on *frame*, which is alone in flight."""
        self._window.clear()
        self._window_records = self._window_bytes = 0
        self._careful = max(self._careful - 1, 0)
        self._acquit()
        self._counters.dropped += 1
        if self.store is not None:
            self.store.reject(frame, f"the agent hung up on it {STRIKES} times in a row")
        self._tell_flushes()
        if self._set_aside is not None:
            self._set_aside(frame, STRIKES)

    def _drop_connection(self) -> None:
        """Let go of the connection; what was in flight over it is to be resent. Safe to call at any time."""
        self.look()
        connection, self._connection = self._connection, None
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.kill(block=False)
        if not self._stopped:
            self.connected_or_over.clear()
        self._window_to_resend()
        if connection is not None:
            try:
                connection.close()
            except Exception:
                logger().exception("a connection could not be closed")

    def _window_to_resend(self) -> None:
        self._resend.extendleft(frame for frame in reversed(self._window) if frame is not None)
        if not self._stopped:  # nobody waits for the last heartbeat of a client that is closed
            self._counters.heartbeats_dropped += self._window.count(None)
        self._window.clear()
        self._window_records = self._window_bytes = 0
