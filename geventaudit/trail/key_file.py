"""The key file: the master key of the next start, which each start replaces by a later one.

One line: ``geventaudit-seal-key 1 KEY COUNTER``, with the key as 64 hexadecimal digits and the number of the start that
will use it. A process that has read it replaces it before it seals anything, so that the file never holds a key that
was used. The lock is on the file itself: after locking, the file must still be the one at the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress

from ..errors import SealError, show
from ..runtime import native
from ..runtime.clock import Deadline
from .keys import next_start
from .secret import KEY_BYTES, Secret

__all__ = ["close_inherited", "create", "read_copy", "read_static", "take"]

# gevent's would look for a hub, and these functions run in other threads too.
_close: Callable[[int], None] = native.original("os", "close")

_NAME, _VERSION = b"geventaudit-seal-key", b"1"
_MAX_BYTES = 256
_LOCK_SECONDS = 10.0  # starting processes wait for each other, each for a sync of the disk


def create(path: str) -> None:
    """Write a new key file, for start 1.

    :raises FileExistsError: there is one already; a second one would make the auditor's copy worthless.
    :raises OSError: it cannot be written.
    """
    try:
        _write(path, Secret(secrets.token_bytes(KEY_BYTES)), 1)
    except FileExistsError:
        raise
    except OSError:
        with suppress(OSError):
            os.unlink(path)
        raise
    _sync_folder(path)


def take(path: str) -> tuple[Secret, int]:
    """Return the master key in the file and its start, after the file was replaced by the next one's.

    Blocks, up to 10 s while other processes do the same: for a native thread. Does not switch.

    :raises SealError: it cannot be done.
    """
    deadline = Deadline(_LOCK_SECONDS)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            if _is_locked(descriptor, path):
                return _replace(descriptor, path)
        except OSError as error:
            raise _unusable(path, error) from error
        finally:
            _close(descriptor)  # and with it the lock
        if deadline.has_passed():
            raise SealError(
                f"the key file {path} is locked by another process for more than {_LOCK_SECONDS} s: "
                f"run `fuser {path}` to find it"
            )
        native.sleep(0.001)


def close_inherited(path: str) -> None:
    """Close the descriptors that :func:`take` has opened, in a child that was forked meanwhile. Best effort.

    A copy of the locked descriptor would keep the lock for as long as the child lives.
    """
    opened = set()
    for each in (path, f"{path}.next"):
        with suppress(OSError):
            opened.add(_identity(os.lstat(each)))
    with suppress(OSError):
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if _identity(os.fstat(descriptor)) in opened:
                    _close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def read_copy(path: str) -> tuple[Secret, int]:
    """Return the master key in an auditor's copy of a key file, and its start. Changes nothing.

    A file with nothing but the hexadecimal digits of a ``Seal(key=...)`` is one too, with the start 0.

    :raises SealError: it is none.
    :raises OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = Secret(os.read(descriptor, 4096))
        digits = content.word(0) if content.word(1) is None else None
        key = None if digits is None else digits.unhexed()
        return (key, 0) if key is not None and len(key) >= KEY_BYTES else _parsed(content, path)
    finally:
        _close(descriptor)


def read_static(path: str) -> Secret:
    """Return the master key in a file that this process cannot or must not replace.

    :raises SealError: it is no key file, cannot be read, or other users can read it.
    """
    try:
        status = os.stat(path)
        if status.st_mode & 0o077:
            raise SealError(
                f"the key file {path} must be for its owner alone (chmod 600), has the mode {_mode(status)}"
            )
        return read_copy(path)[0]
    except OSError as error:
        raise _unusable(path, error) from error


def _is_locked(descriptor: int, path: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOENT):
            return False
        raise


def _replace(descriptor: int, path: str) -> tuple[Secret, int]:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SealError(f"the key file {path} must be a regular file")
    if status.st_mode & 0o077:
        raise SealError(f"the key file {path} must be for its owner alone (chmod 600), has the mode {_mode(status)}")
    if status.st_uid != os.geteuid():
        raise SealError(f"the key file {path} must belong to the user {os.geteuid()}, belongs to {status.st_uid}")
    master, start = _parsed(Secret(os.read(descriptor, _MAX_BYTES)), path)
    later = f"{path}.next"
    with suppress(FileNotFoundError):  # of a process that was killed here; the lock is ours
        os.unlink(later)
    _write(later, next_start(master), start + 1)
    os.rename(later, path)
    _sync_folder(path)
    return master, start


def _parsed(content: Secret, path: str) -> tuple[Secret, int]:
    name, version, digits, counter = (content.word(index) for index in range(4))
    key = None if digits is None else digits.unhexed()
    start = None if counter is None else counter.number()
    if name is None or not name.spells(_NAME) or version is None or not version.spells(_VERSION) or key is None:
        raise SealError(f"{path} is no key file: make one with geventaudit seal-key")
    if len(key) != KEY_BYTES:
        raise SealError(f"the key in {path} must have {KEY_BYTES} bytes, has {len(key)}")
    if start is None or content.word(4) is not None:
        raise SealError(f"the counter in {path} must be a whole number, and the last word: copy the file as a whole")
    return key, start


def _write(path: str, secret: Secret, start: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        secret.write_line(descriptor, b"%b %b " % (_NAME, _VERSION), b" %d\n" % start)
    finally:
        _close(descriptor)


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        _close(descriptor)


def _unusable(path: str, error: OSError) -> SealError:
    return SealError(
        f"the key file {path} cannot be used: {error.strerror or show(error)}{_ADVICE.get(error.errno, '')}"
    )


_ADVICE: dict[int | None, str] = {
    errno.ENOENT: "; make one with geventaudit seal-key",
    errno.EACCES: "; it and its folder must be writable for this user, or give static=True",
    errno.EPERM: "; it and its folder must be writable for this user, or give static=True",
    errno.EROFS: "; for a secret that cannot be replaced, give static=True",
    errno.ELOOP: "; it must not be a symbolic link, or give static=True",
}


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"
