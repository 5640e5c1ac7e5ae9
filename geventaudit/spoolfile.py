"""The file of a spool: frames on disk, in SQLite. Plain and blocking; :mod:`geventaudit.store` keeps it off the hub.

===========  ==========================================================================================================
table        holds
===========  ==========================================================================================================
frames       what is accepted and not known to be delivered, by ``seq``, the order of its acceptance (nanoseconds since
             the epoch, made unique); ``crc`` is the CRC-32 of the frame
rejected     frames that the agent never took, or that were damaged on disk: when, why, the frame; the newest 1,000
===========  ==========================================================================================================

One process has a file at a time: whoever holds the ``flock`` of the file beside it (``.lock``), which ends with the
process however it ends. A descriptor that a forked child inherits would keep the lock, so the child closes it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote

from .errors import SpoolError, show
from .runtime import fork, native

__all__ = ["Loaded", "Row", "SpoolFile", "TakenOver"]

Row = tuple[int, bytes]
"""A frame by its ``seq``."""

_APPLICATION_ID = 0x67615370
_BUSY_SECONDS = 1.0  # how long SQLite waits for somebody who looks into the file with a tool of their own
_ROWS = 200  # in one statement: sqlite3 lets go of the interpreter's lock for each statement, not for each row
_TRIM_ROWS = 10_000  # of another file that are taken away there at once, when they are here
_SHRINK_BYTES = 4 << 20
_MAX_REJECTED = 1000
_PROBE_BYTES = 1 << 16  # that a disk must have free before it is tried again
_SIDES = ("", "-wal", "-shm")
_COLUMNS = "seq, CAST(crc AS INTEGER), coalesce(CAST(frame AS BLOB), x'')"  # bytes, whatever damage made of them

_SCHEMA = f"""
    BEGIN;
    CREATE TABLE frames (seq INTEGER PRIMARY KEY, crc INTEGER NOT NULL, frame BLOB NOT NULL);
    CREATE TABLE rejected (id INTEGER PRIMARY KEY, at REAL NOT NULL, reason TEXT NOT NULL, frame BLOB NOT NULL);
    PRAGMA application_id = {_APPLICATION_ID};
    COMMIT;
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read from the file; and how many rows were damaged, and their bytes (they are in ``rejected`` now)."""

    rows: Sequence[Row]
    damaged: int = 0
    damaged_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Rows that came from other files, and what was wrong with those."""

    records: int
    size: int = 0
    """Bytes of their frames."""
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class _Copy:
    """How far another file is copied into this one; copying goes on there when something came between."""

    last: int
    """Where the rows end that are copied."""
    moved: int = 0
    """The last ``seq`` here, once one was taken and its row had to go behind all others: those after it follow."""
    records: int = 0
    size: int = 0
    damage: str = ""
    """What was found to be wrong with the other file."""


class _DamagedError(sqlite3.DatabaseError):
    """The file is ours, and not in order."""


def is_damage(error: BaseException) -> bool:
    """Whether *error* says that the file itself is not in order, rather than the disk or whoever has it locked."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, _DamagedError) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


_inherited: set[tuple[int, int]] = set()  # files (device, inode) that the parent process had open at a fork


class SpoolFile:
    """One file. Every method blocks, and raises ``sqlite3.Error``, ``OSError`` or :class:`SpoolError`.

    :param path: of the file; its folder must exist.
    :param synchronous: SQLite's: ``OFF``, ``NORMAL`` or ``FULL``.
    :param breathe: called now and then in what may take long.
    """

    def __init__(self, path: str, synchronous: str, breathe: Callable[[], None]) -> None:
        self.path = path
        self._synchronous = synchronous
        self._breathe = breathe
        self._db: sqlite3.Connection | None = None
        self._status: os.stat_result | None = None  # of the file, when it was opened
        self._locks: dict[str, int] = {}  # descriptors, by the path of what they lock
        self._aside: str | None = None  # where a damaged file is from which not all is taken yet
        self._copies: dict[str, _Copy] = {}  # by path, of files that are not done with
        fork.track(self)

    @property
    def is_open(self) -> bool:
        """Whether it is."""
        return self._db is not None

    @property
    def is_put_aside(self) -> bool:
        """Whether a damaged file is under another name, and not all of it is here yet: :meth:`set_aside` goes on."""
        return self._aside is not None

    def open(self) -> None:
        """Claim the file, and make it where there is none.

        :raises SpoolError: another process, or another client of this one, has it; or it is no spool.
        """
        self.close()
        for _ in range(5):  # somebody who adopts may look whether it is an orphan just now
            try:
                self._claim(self.path)
                break
            except SpoolError:
                native.sleep(0.02)  # never the other: it would give this thread a hub
        else:
            self._claim(self.path)
        try:
            _leave_inherited(self.path)
            self._connect()
        except BaseException as error:
            if not is_damage(error):  # a damaged one is still ours, to be set aside
                self.close()
            raise

    def measure(self, after: int) -> tuple[int, int, int]:
        """Of the rows behind *after*: how many, their bytes; and the last ``seq`` of all (0 where there is none)."""
        count, size = self._one("SELECT count(*), coalesce(sum(length(frame)), 0) FROM frames WHERE seq > ?", after)
        (last,) = self._one("SELECT coalesce(max(seq), 0) FROM frames")
        return count, size, last

    def write(self, rows: Sequence[Row], forget: int, *, known: bool = False) -> bool:
        """Add *rows* and take away all up to *forget*: both or neither.

        :param known: whether some of the rows may be there already.
        :returns: whether the file had to be made anew before, since somebody had removed it.
        """
        remade = self._remake_if_removed()
        db = self._open()
        db.execute("BEGIN IMMEDIATE")
        try:
            for start in range(0, len(rows), _ROWS):
                _insert(db, rows[start : start + _ROWS], "OR IGNORE" if known else "")
            if forget:
                db.execute("DELETE FROM frames WHERE seq <= ?", (forget,))
            db.execute("COMMIT")
        except BaseException:
            _roll_back(db)
            raise
        return remade

    def load(self, after: int, count: int, size: int) -> Loaded:
        """The next rows behind *after*: at most *count*, and no more once they have *size* bytes."""
        db = self._open()
        rows: list[Row] = []
        damaged: list[Row] = []
        for seq, crc, frame in db.execute(
            f"SELECT {_COLUMNS} FROM frames WHERE seq > ? ORDER BY seq LIMIT ?", (after, count)
        ):
            (rows if zlib.crc32(frame) == crc else damaged).append((seq, frame))
            size -= len(frame)
            if size <= 0:
                break
        for seq, frame in damaged:
            self.reject(seq, frame, "it was damaged on disk")
        return Loaded(rows, len(damaged), sum(len(frame) for _, frame in damaged))

    def reject(self, seq: int, frame: bytes, reason: str) -> None:
        """Move one frame into the table of rejected ones."""
        db = self._open()
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute("INSERT INTO rejected (at, reason, frame) VALUES (?, ?, ?)", (time.time(), reason, frame))
            db.execute("DELETE FROM rejected WHERE id <= (SELECT max(id) FROM rejected) - ?", (_MAX_REJECTED,))
            db.execute("DELETE FROM frames WHERE seq = ?", (seq,))
            db.execute("COMMIT")
        except BaseException:
            _roll_back(db)
            raise

    def shrink(self) -> Exception | None:
        """Give the space of an empty file back, where it is much; why it could not be done, where it could not."""
        db = self._open()
        try:
            (pages,), (size,) = self._one("PRAGMA page_count"), self._one("PRAGMA page_size")
            if pages * size > _SHRINK_BYTES and not self._one("SELECT EXISTS (SELECT 1 FROM frames)")[0]:
                db.execute("VACUUM")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            return error
        return None

    def probe(self, forget: int) -> None:
        """Find out whether the file can be written to and the disk has room, and take away all rows up to *forget*."""
        probe = self.path + ".probe"
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _PROBE_BYTES)
        finally:
            os.close(descriptor)
            os.unlink(probe)
        self.write((), forget)

    def renew(self, forget: int) -> None:
        """Begin a new file, where there is nothing behind *forget*: on a full disk, taking rows away may need room."""
        if self._one("SELECT EXISTS (SELECT 1 FROM frames WHERE seq > ?)", forget)[0]:
            self.probe(forget)
            return
        rejected = self._open().execute("SELECT at, reason, frame FROM rejected ORDER BY id").fetchall()
        self._close_database()
        for side in _SIDES:
            if os.path.exists(self.path + side):
                os.unlink(self.path + side)
        self._connect()
        self._add_rejected(rejected)

    def set_aside(self, after: int) -> tuple[str, TakenOver]:
        """Put the damaged file aside under another name and begin a new one with what can be read behind *after*.

        :returns: the other name, and what was saved.
        """
        self._close_database()
        if self._aside is None:  # otherwise it did not come to its end the last time
            self._aside = _move_aside(self.path)
        aside = self._aside
        self._connect()
        copy = self._take_from(aside, after, None, trims=False)
        self._aside = None
        del self._copies[aside]
        return aside, TakenOver(copy.records, copy.size)

    def adopt(self, template: str, first: int | None) -> TakenOver:
        """Take over what processes that are no more left in files of the same *template* (with ``{pid}`` in it).

        What could not be taken over completely is a problem of the result; the numbers are of the part that is here,
        and the next call goes on behind it.

        :param first: where the ``seq`` of what comes begins; None leaves it as it is.
        """
        folder, _, name = template.rpartition("/")
        pattern = re.compile(r"\d+".join(re.escape(part) for part in name.split("{pid}")))
        records = size = 0
        problems = []
        try:
            entries = sorted(os.listdir(folder or "."))
        except OSError as error:
            entries = []
            problems.append(f"{folder} cannot be looked through for what other processes left: {error}")
        for entry in entries:
            path = os.path.join(folder, entry)
            if not pattern.fullmatch(entry) or path == self.path:
                continue
            try:
                if path not in self._copies:
                    self._claim(path)
            except SpoolError:
                continue  # it is somebody's who is alive
            except OSError as error:
                problems.append(f"{path} cannot be taken over now: {error}")
                continue
            taken = self._adopt_one(path, None if first is None else first + records)
            records += taken.records
            size += taken.size
            problems += taken.problems
        return TakenOver(records, size, tuple(problems))

    def close(self, *, remove_if_empty: bool = False) -> None:
        """Let go of the file. May be called again."""
        empty = False
        if self._db is not None and remove_if_empty:
            try:
                empty = not any(
                    self._one(f"SELECT EXISTS (SELECT 1 FROM {name})")[0] for name in ("frames", "rejected")
                )
            except sqlite3.Error:
                pass  # whoever opens it next will see what is wrong with it
        self._close_database()
        if empty and self._is_claimed():
            _remove(self.path)
        for path in (self.path, *self._copies):
            self._release(path)
        self._copies.clear()

    # -- forks ---------------------------------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """The file stays the parent's."""
        for path in list(self._locks):
            self._release(path)
        database, self._db = self._db, None
        for path in [*self._copies] if database is None else [*self._copies, self.path]:
            try:
                status = os.stat(path)
                _inherited.add((status.st_dev, status.st_ino))
            except OSError:
                pass  # it is not there any more
        self._copies.clear()
        if database is not None:
            # Neither used nor closed in a child, as SQLite asks: closing could end the parent's log. So it is kept from
            # ever being collected, with its descriptors.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(database))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise SpoolError(f"{self.path} is not open")
        return self._db

    def _one(self, statement: str, *values: object) -> tuple[int, ...]:
        row: tuple[int, ...] = self._open().execute(statement, values).fetchone()
        return row

    def _connect(self) -> None:
        self._db = _connect(self.path, self._synchronous)
        self._status = os.stat(self.path)

    def _remake_if_removed(self) -> bool:
        """Make the file anew where somebody removed it, with all that was in it; whether that had to be done.

        SQLite would go on with a file without a name, in which nobody could find anything once this process is no more.
        """
        db = self._open()
        if not self._is_claimed():
            self._release(self.path)
            self._claim(self.path)
        if self._status is not None and _is_at(self.path, self._status):
            return False
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise SpoolError(f"{self.path} was replaced by another file") from None
        try:
            db.execute("VACUUM INTO ?", (self.path,))
            os.fsync(descriptor)  # which SQLite leaves to others here
        except BaseException:
            os.unlink(self.path)
            raise
        finally:
            os.close(descriptor)
        self._close_database()
        for side in _SIDES[1:]:  # what was not removed with the file does not belong to the new one
            if os.path.exists(self.path + side):
                os.unlink(self.path + side)
        self._connect()
        return True

    def _close_database(self) -> None:
        database, self._db = self._db, None
        if database is not None:
            database.close()

    def _claim(self, path: str) -> None:
        self._locks[path] = _locked(path)

    def _is_claimed(self) -> bool:
        """Whether the lock is still where others look for it."""
        lock = self._locks.get(self.path)
        return lock is not None and _is_at(self.path + ".lock", os.fstat(lock))

    def _release(self, path: str) -> None:
        lock = self._locks.pop(path, None)
        if lock is not None:
            os.close(lock)

    def _adopt_one(self, path: str, first: int | None) -> TakenOver:
        """Take over one file that is claimed. It stays claimed while a part of it is both there and here."""
        before = self._copies.get(path, _Copy(-1))
        records, size = before.records, before.size
        problem = ""
        copy: _Copy | None = None
        try:
            if os.path.exists(path):  # otherwise another took it over a moment ago
                _leave_inherited(path)
                copy = self._take_from(path, -1, first, trims=True)
                if copy.records:  # what is removed now has to be as safe here
                    self._open().execute("PRAGMA wal_checkpoint").fetchall()
                if copy.damage:
                    problem = f"{path} was damaged and is {_move_aside(path)} now ({copy.damage})"
            _remove(path)
            self._copies.pop(path, None)
        except (sqlite3.Error, OSError, SpoolError) as error:
            copy = self._copies.get(path)
            if copy is not None and (not copy.records or self._trim(path, copy)):
                del self._copies[path]
            problem = f"{path} cannot be taken over now: {error}"
        finally:
            if path not in self._copies:
                self._release(path)
        taken = (copy.records - records, copy.size - size) if copy is not None else (0, 0)
        return TakenOver(*taken, (problem,) if problem else ())

    def _trim(self, path: str, copy: _Copy) -> bool:
        """Take away from another file what is copied, so that nobody takes it over once more; whether that was done."""
        if copy.damage:
            return False  # it is to be put aside as it is
        try:
            self._open().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # makes room on a full disk, too
            with closing(_connect(path, "OFF")) as db:
                db.execute("DELETE FROM frames WHERE seq <= ?", (copy.last,))
        except (sqlite3.Error, OSError, SpoolError):
            return False
        return True

    def _take_from(self, path: str, after: int, first: int | None, *, trims: bool) -> _Copy:
        """Copy what can be read of another file behind *after*, or behind what was copied before.

        Raises what is wrong with *this* file, or keeps the other from being read now.

        :param trims: whether to take away there, from time to time, what is here: whoever is killed in the middle
            leaves no more than that in both.
        """
        copy = self._copies.setdefault(path, _Copy(after))
        begun = copy.records
        untrimmed = 0
        with closing(_Remains(path)) as remains:
            try:
                for batch in remains.rows(copy.last):
                    rows = batch
                    if first is not None:
                        start = first + copy.records - begun
                        rows = [(start + place, frame) for place, (_, frame) in enumerate(batch)]
                    added = self._add(rows, copy)
                    copy.last = batch[-1][0]
                    copy.records += len(added)
                    copy.size += sum(len(frame) for _, frame in added)
                    untrimmed += len(batch)
                    if trims and untrimmed >= _TRIM_ROWS:
                        copy.damage = copy.damage or remains.damage
                        self._trim(path, copy)
                        untrimmed = 0
                    self._breathe()
                self._add_rejected(remains.rejected())
            finally:
                copy.damage = copy.damage or remains.damage
        return copy

    def _add_rejected(self, rows: list[tuple[float, str, bytes]]) -> None:
        db = self._open()
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("INSERT INTO rejected (at, reason, frame) VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")
        except BaseException:
            _roll_back(db)
            raise

    def _add(self, rows: list[Row], copy: _Copy) -> list[Row]:
        """Add rows that come from elsewhere, whose ``seq`` may be taken here: all or none; those that were not here.

        A row that is here already, with the same ``seq``, is what somebody who was killed had copied from there.
        """
        if not copy.moved:
            try:
                self.write(rows, 0)
                return rows
            except sqlite3.IntegrityError:
                pass
        between = (rows[0][0], rows[-1][0])
        here = dict(
            self._open().execute("SELECT seq, CAST(frame AS BLOB) FROM frames WHERE seq BETWEEN ? AND ?", between)
        )
        (top,) = self._one("SELECT coalesce(max(seq), 0) FROM frames")
        added = []
        for seq, frame in rows:
            if here.get(seq) == frame:
                continue
            if copy.moved or seq in here:
                seq = copy.moved = max(copy.moved or top, seq - 1) + 1
            added.append((seq, frame))
        self.write(added, 0)
        return added


class _Remains:
    """A file of somebody who is no more, which may be damaged."""

    def __init__(self, path: str) -> None:
        self.damage = ""
        """What was found to be wrong with it."""
        try:
            self._db = _connect(path, "OFF")
        except sqlite3.Error as error:
            self._note(error)
            self._db = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, check_same_thread=False)

    def rows(self, after: int) -> Iterator[list[Row]]:
        """All rows behind *after* that are in order, in theirs, some at a time."""
        try:
            yield from self._ascending(after)
        except sqlite3.Error as error:
            self._note(error)
        else:
            return
        # Damage may be in the middle: the end of the file is read up to it, too.
        behind = None
        try:
            for (seq,) in self._db.execute("SELECT seq FROM frames WHERE seq > ? ORDER BY seq DESC", (self._seen,)):
                behind = seq
        except sqlite3.Error as error:
            self._note(error)
        if behind is not None:
            try:
                yield from self._ascending(behind - 1)
            except sqlite3.Error as error:
                self._note(error)

    def rejected(self) -> list[tuple[float, str, bytes]]:
        """What is in its table of rejected frames."""
        try:
            return self._db.execute("SELECT at, reason, frame FROM rejected ORDER BY id").fetchall()
        except sqlite3.Error as error:
            self._note(error)
            return []

    def close(self) -> None:
        """Let go of it."""
        self._db.close()

    def _ascending(self, after: int) -> Iterator[list[Row]]:
        self._seen = after
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM frames WHERE seq > ? ORDER BY seq", (after,))
        problem: sqlite3.Error | None = None
        count = _ROWS
        while count == _ROWS and problem is None:
            batch: list[Row] = []
            count = 0
            try:
                for seq, crc, frame in islice(rows, _ROWS):
                    count += 1
                    self._seen = seq
                    if zlib.crc32(frame) == crc:
                        batch.append((seq, frame))
                    else:
                        self.damage = self.damage or "damaged records"
            except sqlite3.Error as error:
                problem = error  # after what was read before it
            if batch:
                yield batch
        if problem is not None:
            raise problem

    def _note(self, error: sqlite3.Error) -> None:
        """Damage is noted; that the file cannot be read *now* is for the caller."""
        if not is_damage(error) and getattr(error, "sqlite_errorcode", 0) not in (0, sqlite3.SQLITE_ERROR):
            raise error
        self.damage = self.damage or str(error)


def _is_at(path: str, status: os.stat_result) -> bool:
    """Whether *path* leads to the file of that *status*."""
    try:
        return os.path.samestat(os.stat(path), status)
    except FileNotFoundError:
        return False


def _locked(path: str) -> int:
    """The descriptor of the lock beside *path*, locked.

    :raises SpoolError: somebody else has it, or its folder is not there.
    """
    while True:
        try:
            lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise SpoolError(f"{path} cannot be made: there is no folder {os.path.dirname(path)}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path + ".lock")):
                return lock
        except FileNotFoundError:
            pass  # whoever had it removed it meanwhile: another time
        except BlockingIOError:
            os.close(lock)
            raise SpoolError(f"{path} is in use by another process or client") from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _connect(path: str, synchronous: str, timeout: float = _BUSY_SECONDS) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # nobody else is to read an audit trail
    db = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    try:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and not tables >= {"frames", "rejected"}:
            if db.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
                raise SpoolError(f"{path} is the database of something else, with the tables {show(sorted(tables))}")
            raise _DamagedError("its tables are not there")
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute(f"PRAGMA journal_size_limit = {_SHRINK_BYTES}").fetchall()
        if not tables:
            db.executescript(_SCHEMA)
        for (verdict,) in db.execute("PRAGMA quick_check(1)"):
            if verdict != "ok":
                raise _DamagedError(verdict)
        try:
            db.execute("SELECT seq, crc, frame FROM frames LIMIT 0")
            db.execute("SELECT id, at, reason, frame FROM rejected LIMIT 0")
        except sqlite3.OperationalError as error:
            raise _DamagedError(str(error)) from error
    except BaseException:
        db.close()
        raise
    return db


def _leave_inherited(path: str) -> None:
    """In a child whose parent had this file open: go on with a copy of it.

    SQLite remembers by device and inode which locks its process holds on a file, and what it remembers here are the
    parent's. Whoever calls holds the lock, so the parent is no more.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    if (status.st_dev, status.st_ino) in _inherited:
        shutil.copy2(path, path + ".copy")
        os.replace(path + ".copy", path)
        try:
            os.unlink(path + "-shm")
        except FileNotFoundError:
            pass


def _insert(db: sqlite3.Connection, rows: Sequence[Row], on_conflict: str) -> None:
    values: list[object] = []
    for seq, frame in rows:
        values += (seq, zlib.crc32(frame), frame)
    places = ",".join(["(?,?,?)"] * len(rows))
    db.execute(f"INSERT {on_conflict} INTO frames (seq, crc, frame) VALUES {places}", values)


def _roll_back(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        try:
            db.execute("ROLLBACK")
        except sqlite3.Error:
            pass  # SQLite has done it by itself


def _move_aside(path: str) -> str:
    """Rename the file and what belongs to it; the new name."""
    stem = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside, number = stem, 1
    while os.path.exists(aside):
        number += 1
        aside = f"{stem}-{number}"
    for side in _SIDES:
        try:
            os.rename(path + side, aside + side)
        except FileNotFoundError:
            pass
    return aside


def _remove(path: str) -> None:
    """Remove the file and what belongs to it, the lock last."""
    for side in (*_SIDES, ".lock"):
        try:
            os.unlink(path + side)
        except FileNotFoundError:
            pass
