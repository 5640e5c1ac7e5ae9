"""A locked directory.

All files are opened relative to the directory's descriptor, never through a link, with mode 0600 and close-on-exec.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence

from ..errors import SpoolError
from ..runtime.native import original

__all__ = [
    "Directory",
    "FolderTakenError",
    "close_all",
    "close_descriptor",
    "close_inherited_locks",
    "foreign",
    "is_temporary",
    "orphans",
    "temporary_name",
    "with_path",
    "write_all",
]

# gevent replaces os.close by a function that needs a hub.
close_descriptor: Callable[[int], None] = original("os", "close")

# O_NONBLOCK: a FIFO in place of a file must not block the open.
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MODE = 0o600
_LOCK = "lock"
_ATTEMPTS = 10
_PIECE = 1 << 20
_SQLITE = b"SQLite format 3\0"
_LEFT = ".left"
_TEMPORARY = (".", ".tmp")


def close_all(*descriptors: int) -> None:
    """Close descriptors; -1 stands for none. Never raises an OSError."""
    for descriptor in descriptors:
        if descriptor >= 0:
            try:
                close_descriptor(descriptor)
            except OSError:
                pass


class FolderTakenError(SpoolError):
    """Another process, another client of this process, or another user has the folder, or removes it all the time."""


def write_all(descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
    """Write *buffers* at *offset*, in as many calls as needed, and return the number of bytes written."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    rest: list[bytes | memoryview] = [buffer for buffer in buffers if buffer]
    total = sum(map(len, rest))
    while rest:
        written = os.writev(descriptor, rest)
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        if written:
            rest[0] = memoryview(rest[0])[written:]
    return total


def with_path(error: BaseException, path: str) -> BaseException:
    """Return the same error, with the full path of the file if it is one of the system."""
    if not isinstance(error, OSError):
        return error
    return OSError(error.errno, error.strerror or str(error), path)


def temporary_name() -> str:
    """Return an unpredictable name for an unfinished copy."""
    start, end = _TEMPORARY
    return f"{start}{secrets.token_hex(16)}{end}"


def is_temporary(name: str) -> bool:
    """Return True for the name of an unfinished copy of a dead process."""
    start, end = _TEMPORARY
    return name.startswith(start) and name.endswith(end) and len(name) == 32 + len(start) + len(end)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class Directory:
    """A directory that this process has locked.

    The lock is the ``flock`` of the directory itself and of the file ``lock`` in it. It ends with :meth:`close`, or
    with the last descriptors if the process is killed, so a forked child must close its copies. Programs that clean
    folders of old files remove the file, and network file systems lock no directories. ``systemd-tmpfiles`` cleans no
    locked directory.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self.is_new = False
        self._fd = descriptor
        self._lock = -1
        self._process = os.getpid()

    @classmethod
    def claim(cls, path: str, *, create: bool) -> Directory:
        """Open and lock the directory at *path*.

        :param create: make the directory if it is missing. The parent must exist.
        :raises FileNotFoundError: it is missing, and *create* is False.
        :raises FolderTakenError: another process or user has the directory.
        :raises SpoolError: it is a link or a file, or has no parent.
        """
        # A trailing slash would make the system follow a link.
        path = path.rstrip("/") or "/"
        for _ in range(_ATTEMPTS):
            directory = cls._open(path, create)
            try:
                if directory._fd >= 0 and directory.take_lock():
                    return directory
            except BaseException:
                directory.close()
                raise
            directory.close()
        raise FolderTakenError(
            f"the spool {path} is removed again and again while it is opened; stop that, and try again"
        )

    @classmethod
    def _open(cls, path: str, create: bool) -> Directory:
        is_new = False
        if create:
            try:
                os.mkdir(path, 0o700)
                is_new = True
            except FileExistsError:
                pass
            except FileNotFoundError:
                raise SpoolError(f"the spool {path} cannot be made: its parent folder is missing; make it") from None
            except PermissionError:
                raise _no_permission(path) from None
        try:
            directory = cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except FileNotFoundError:
            if create:
                # Another process removed it after mkdir.
                return cls(path, -1)
            raise
        except PermissionError:
            raise _no_permission(path) from None
        except OSError:
            _explain(path)
            raise
        try:
            directory.is_new = is_new
            if is_new:
                os.fchmod(directory._fd, 0o700)
            owner = os.fstat(directory._fd).st_uid
            if owner != os.geteuid():
                raise FolderTakenError(
                    f"the spool {path} belongs to user {owner}, and this process runs as user {os.geteuid()}; "
                    "run as its owner, or give another folder"
                )
        except BaseException:
            directory.close()
            raise
        return directory

    def take_lock(self) -> bool:
        """Lock the directory and the file ``lock``. Return False if either was removed or replaced meanwhile.

        :raises FolderTakenError: another process or another client has a lock.
        """
        lock = -1
        try:
            _lock_folder(self._fd)
            lock = self.open(_LOCK, os.O_CREAT)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            # The directory itself was removed after it was opened.
            return False
        except BlockingIOError:
            was_removed = not self.is_at_path() or (lock >= 0 and not self.holds(_LOCK, lock))
            close_all(lock)
            if was_removed:
                return False
            raise FolderTakenError(
                f"the spool {self.path} is in use by another process or another client of this one; "
                "close that one, or give each a folder of its own ({pid} in the path)"
            ) from None
        except BaseException:
            close_all(lock)
            raise
        previous, self._lock = self._lock, lock
        close_all(previous)
        return self.is_in_place()

    def is_in_place(self) -> bool:
        """Return True if the path still leads to this directory, and its lock file is the locked file."""
        return self.is_at_path() and self.holds(_LOCK, self._lock)

    def is_at_path(self) -> bool:
        """Return True if the path still leads to this directory."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return _identity(there) == _identity(os.fstat(self._fd))

    def stat(self, name: str) -> os.stat_result | None:
        """Return the status of the entry *name*, without following a link; None if there is none."""
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return None

    def identity(self, name: str) -> tuple[int, int] | None:
        """Return device and inode of the entry *name*, or None if there is none."""
        status = self.stat(name)
        return None if status is None else _identity(status)

    def holds(self, name: str, descriptor: int) -> bool:
        """Return True if the file *name* is the open file *descriptor*."""
        return self.identity(name) == _identity(os.fstat(descriptor))

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        return sorted(os.listdir(self._fd))

    def full_path(self, name: str) -> str:
        """Return the path of the entry *name*, for messages."""
        return os.path.join(self.path, name)

    def open(self, name: str, flags: int = 0) -> int:
        """Open a regular file for reading and writing, and return its descriptor.

        :raises OSError: the file cannot be opened; the error names the full path.
        """
        try:
            descriptor = os.open(name, _FLAGS | flags, _MODE, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._irregular(name) from None
            raise with_path(error, self.full_path(name)) from None
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise self._irregular(name)
            if stat.S_IMODE(mode) != _MODE:
                os.fchmod(descriptor, _MODE)
        except BaseException:
            close_descriptor(descriptor)
            raise
        return descriptor

    def _irregular(self, name: str) -> OSError:
        return OSError(errno.EINVAL, "not a regular file; remove it", self.full_path(name))

    def unlink(self, name: str) -> None:
        """Remove the file *name*; a missing one is no error."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise with_path(error, self.full_path(name)) from None

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file. An existing file of the new name is replaced."""
        os.rename(name, new_name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def set_aside(self, name: str) -> str:
        """Give a file that the disk cannot read a name that no reader looks for, and return that name."""
        self.rename(name, f"{name}{_LEFT}")
        return f"{name}{_LEFT}"

    def sync(self) -> None:
        """Make created, renamed and removed names durable."""
        os.fsync(self._fd)

    def sync_parent(self) -> None:
        """Make the name of a new directory durable."""
        if self.is_new:
            parent = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(parent)
            finally:
                close_descriptor(parent)

    def copy(self, source: int, size: int, name: str, *, durable: bool) -> int:
        """Copy the first *size* bytes of an open file to the file *name*, and return the descriptor of the copy.

        The copy is complete before it gets its name.
        """
        temporary = temporary_name()
        target = self.open(temporary, os.O_CREAT | os.O_EXCL)
        try:
            offset = 0
            while offset < size and (piece := os.pread(source, min(_PIECE, size - offset), offset)):
                offset += write_all(target, [piece], offset)
            if durable:
                os.fdatasync(target)
            self.rename(temporary, name)
            if durable:
                self.sync()
        except BaseException as error:
            close_descriptor(target)
            self.unlink(temporary)
            if isinstance(error, OSError):
                raise with_path(error, self.full_path(name)) from None
            raise
        return target

    def remove(self) -> None:
        """Remove the lock file and the directory, while the lock is held. Other entries are no error; they stay."""
        try:
            self.unlink(_LOCK)
            os.rmdir(self.path)
        except OSError:
            pass

    def close(self) -> None:
        """Close both descriptors. Idempotent.

        In the process that has locked the folder, the lock ends at once: a child may have been forked just now, and not
        have closed its copies. In a child, the lock stays with the parent.
        """
        lock, self._lock = self._lock, -1
        directory, self._fd = self._fd, -1
        if lock >= 0 and os.getpid() == self._process:
            for descriptor in (lock, directory):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                except OSError:
                    pass
        close_all(lock, directory)


def _lock_folder(descriptor: int) -> None:
    """Lock a directory, unless its file system locks none.

    :raises BlockingIOError: another process has the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def close_inherited_locks(paths: Sequence[str]) -> None:
    """Close all descriptors of the folders *paths* and of their lock files, in a forked child.

    For locks that another thread of the parent was taking, which no object of the child knows. Best effort.
    """
    locks = set()
    for path in (name for folder in paths for name in (folder, os.path.join(folder, _LOCK))):
        if (status := _status(path)) is not None:
            locks.add(_identity(status))
    try:
        descriptors = os.listdir("/proc/self/fd") if locks else []
    except OSError:
        return
    for descriptor in map(int, descriptors):
        try:
            if _identity(os.fstat(descriptor)) in locks:
                close_descriptor(descriptor)
        except OSError:
            pass


def _no_permission(path: str) -> SpoolError:
    status = _status(path)
    kind = SpoolError if status is None or status.st_uid == os.geteuid() else FolderTakenError
    return kind(
        f"the spool {path} cannot be opened: permission denied for user {os.geteuid()}; "
        "grant that user access to the folder and its parent, or give another folder"
    )


def _explain(path: str) -> None:
    """Raise a SpoolError with the reason if *path* is not a directory."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            return
        if stat.S_ISLNK(mode):
            raise SpoolError(f"the spool {path} is a symbolic link; give the folder itself")
        if not stat.S_ISREG(mode):
            raise SpoolError(f"the spool {path} is no folder; give a folder")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return
    try:
        head = os.read(descriptor, len(_SQLITE))
    finally:
        close_descriptor(descriptor)
    if head == _SQLITE:
        raise SpoolError(
            f"{path} is a spool of an earlier version (SQLite); drain it with that version or remove it, "
            "and give a folder"
        )
    raise SpoolError(f"the spool {path} is a file; give a folder")


def orphans(template: str) -> list[str]:
    """Return the folders that match *template*, sorted: any identifier takes the place of ``{pid}``.

    Links, files and the folders of other users are left out. A folder in use is included.
    """
    return [path for path, owner in _matching(template) if owner == os.geteuid()]


def foreign(template: str) -> list[tuple[str, int]]:
    """Return the folders of other users that match *template*, sorted, and the user of each."""
    return [(path, owner) for path, owner in _matching(template) if owner != os.geteuid()]


def _matching(template: str) -> Iterator[tuple[str, int]]:
    """Yield the folders that match *template*, sorted, and the user of each."""
    parent, name = os.path.split(template.rstrip("/"))
    if "{pid}" not in name:
        return
    pattern = re.compile(r"[0-9]+(\.[0-9]+)?".join(map(re.escape, name.split("{pid}"))), re.DOTALL)
    try:
        names = os.listdir(parent or ".")
    except OSError:
        return
    for each in sorted(names):
        path = os.path.join(parent, each)
        if pattern.fullmatch(each) and (status := _status(path)) is not None and stat.S_ISDIR(status.st_mode):
            yield path, status.st_uid


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None
