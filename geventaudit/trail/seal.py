"""The settings of a seal, and the keys of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import SealError, show
from ..runtime import forks, native

if TYPE_CHECKING:
    from .keys import KeyNode, StreamName
    from .secret import Secret

__all__ = ["Seal", "SealBusyError"]


class SealBusyError(SealError):
    """The caller has interrupted the code that takes a key."""


class Seal:
    """The keys by which the clients of a process authenticate their records. Constructing one opens nothing.

    Several clients may share a seal. The first record of a process has the key file read and replaced, in a native
    thread. Meanwhile, records wait in memory, as many as the queue holds; with a spool in mode ``always``, they wait in
    ``send()``.

    :param key_file: made by ``geventaudit seal-key``; readable and writable for this user only, as is its folder. Each
        start reads a key from it and replaces that by a later one.
    :param key: at least 32 random bytes, in place of a file. Weaker: whoever reads them can forge all records.
    :param static: True if *key_file* cannot be written, as a mounted secret. As weak as *key*.
    :param checkpoint_interval: seconds between two checkpoints.
    :raises TypeError, ValueError: an argument is invalid.
    """

    def __init__(
        self,
        *,
        key_file: str | os.PathLike[str] | None = None,
        key: bytes | None = None,
        static: bool = False,
        checkpoint_interval: float = 300.0,
    ) -> None:
        # A client without a seal does without these modules and the standard library's cryptography.
        from . import key_file as _files  # noqa: F401
        from .secret import KEY_BYTES, Secret

        secret = None if key is None else Secret(key)
        del key  # error reporters show local variables
        if (secret is None) == (key_file is None):
            raise TypeError("a Seal must have either a key_file or a key")
        if secret is not None and not secret.is_bytes():
            raise TypeError("key must be bytes: read a text with bytes.fromhex(...)")
        if secret is not None and len(secret) < KEY_BYTES:
            raise ValueError(f"key must have at least {KEY_BYTES} bytes, has {len(secret)}: use secrets.token_bytes()")
        if key_file is not None and not isinstance(key_file, str | os.PathLike):
            raise TypeError(f"key_file must be a path, got {show(key_file)}")
        if not isinstance(static, bool) or (static and key_file is None):
            raise TypeError(f"static must be True or False, and goes with key_file, got {show(static)}")
        self.checkpoint_interval = _checked_interval(checkpoint_interval)
        self._path = None if key_file is None else os.path.abspath(os.fspath(key_file))
        self._is_static = static
        self._key = secret
        self._node: KeyNode | None = None
        self._error: str | None = None
        # The child's node and master key, by the thread that forks.
        self._forking: dict[int, tuple[KeyNode | str | None, Secret | None]] = {}
        self._lock = native.allocate_lock()
        self._holder = 0
        self._reading = native.allocate_lock()  # held by a native thread that reads the key file
        forks.register_keys(self)

    def __repr__(self) -> str:
        return "Seal(key=<secret>)" if self._path is None else f"Seal(key_file={self._path!r})"

    @property
    def needs_reading(self) -> bool:
        """True if :meth:`read` has to be called before :meth:`take_stream`."""
        return self._path is not None and self._node is None and self._error is None

    def read(self) -> None:
        """Read and replace the key file, unless that was done. Blocks, up to seconds: for a native thread.

        :raises SealError: the key file cannot be used.
        """
        with self._reading:
            if self.needs_reading:
                node = self._read()
                with self._locked():
                    self._node = node

    def take_stream(self) -> tuple[StreamName, Secret]:
        """Return the name and the first record key of a new stream. Does not wait.

        :raises SealError: this process has no keys; :class:`SealBusyError` in a signal handler.
        """
        forks.check()
        with self._locked():
            if self._error is not None:
                raise SealError(self._error)
            if self._node is None:
                if self._key is None:
                    raise SealError("the key file was not read yet")
                self._node, self._key = self._root_of(self._key, 0), None
            return self._node.take_stream()

    @property
    def children(self) -> int:
        """The number of children of this process: clients and forked processes."""
        return 0 if self._node is None else self._node.children

    def _read(self) -> KeyNode:
        from . import key_file as files

        path = str(self._path)
        return self._root_of(*((files.read_static(path), 0) if self._is_static else files.take(path)))

    def _root_of(self, master: Secret, start: int) -> KeyNode:
        import secrets

        from .keys import SALT_BYTES, root_of

        return root_of(master, secrets.token_bytes(SALT_BYTES), start)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other threads. A signal handler cannot wait for the code that it has interrupted.

        :raises SealBusyError: that code is about to take a key.
        """
        if self._holder == native.thread_ident():
            raise SealBusyError("a key is being taken by the code that this one has interrupted: send again")
        with self._lock:
            try:
                self._holder = native.thread_ident()
                yield
            finally:
                self._holder = 0

    # -- forks ---------------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Take the keys of the child, so that the parent cannot use them.

        In a signal handler that has interrupted the code that takes a key, there are none to take. The child reads the
        key file by itself then, as another start.
        """
        node: KeyNode | str | None = None
        key: Secret | None = None
        try:
            with self._locked():
                # The first client of the parent may take the master key before the fork: the child has its own copy.
                key = self._key
                node = None if self._node is None else self._node.take_process()
        except SealBusyError:
            key = self._key
            if key is None and self._path is None:
                node = "a signal handler has forked this process while a key was taken: make a Seal of its own for it"
        except SealError as error:
            node = str(error)
        self._forking[native.thread_ident()] = node, key

    def after_fork_in_parent(self) -> None:
        """Drop the keys of the child."""
        self._forking.pop(native.thread_ident(), None)

    def after_fork_in_child(self) -> None:
        """Drop the keys of the parent."""
        node, key = self._forking.get(native.thread_ident(), (None, self._key))
        self._forking = {}
        self._lock, self._holder = native.allocate_lock(), 0
        if self._path is not None and self._reading.locked():
            from . import key_file as files

            files.close_inherited(self._path)
        self._reading = native.allocate_lock()
        if isinstance(node, str):
            self._node, self._error = None, node
        else:
            self._node, self._key = node, key


def _checked_interval(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"checkpoint_interval must be a number of seconds, got {show(seconds)}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"checkpoint_interval must be above 0 seconds, got {show(seconds)}")
    return seconds
