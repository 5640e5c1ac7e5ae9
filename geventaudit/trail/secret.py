"""Secret bytes that no log, error report or pickle shows.

Error reporters print the local variables of every frame of a traceback. So raw key bytes are only ever read in an
expression, from the one attribute of a :class:`Secret`, and never bound to a name. Python cannot wipe memory: an old
key stays there until something else takes its place.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import NoReturn

__all__ = ["KEY_BYTES", "Secret", "hkdf_extract"]

KEY_BYTES = 32
"""The length of all keys, and the least of a key that a user gives."""

_LABEL = b"geventaudit seal 1 "
_NEXT = b"geventaudit seal 1 next\0"

_sha256 = hashlib.sha256
_INNER, _OUTER = bytes(byte ^ 0x36 for byte in range(256)), bytes(byte ^ 0x5C for byte in range(256))
_INNER_PAD, _OUTER_PAD = b"\x36" * 32, b"\x5c" * 32  # a block has 64 bytes


class Secret:
    """Immutable secret bytes with a fixed repr. It cannot be copied or pickled, and is equal only to itself."""

    __slots__ = ("_bytes",)

    def __init__(self, value: bytes) -> None:
        self._bytes = value

    def __len__(self) -> int:
        return len(self._bytes)

    def is_bytes(self) -> bool:
        """Return True if a user has given bytes."""
        return isinstance(self._bytes, bytes)

    def __repr__(self) -> str:
        return "<secret>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret cannot be copied or pickled")

    def derive(self, info: bytes) -> Secret:
        """Return X(self, *info*): HKDF-Expand of RFC 5869 to 32 bytes."""
        return Secret(hmac.digest(self._bytes, _LABEL + info + b"\x01", "sha256"))

    def evolve(self) -> Secret:
        """Return the key of the next record."""
        return Secret(_sha256(_NEXT + self._bytes).digest())

    def evolve_by(self, steps: int) -> Secret:
        """Return the key of the record so many numbers later."""
        later = Secret(self._bytes)
        for _ in range(steps):
            later._bytes = _sha256(_NEXT + later._bytes).digest()
        return later

    def mac(self, digest: bytes) -> bytes:
        """Return the HMAC-SHA-256 of *digest*."""
        if len(self._bytes) != KEY_BYTES:
            return hmac.digest(self._bytes, digest, "sha256")
        # Two hashes by the definition in RFC 2104 take half the time of hmac.digest.
        return _sha256(
            self._bytes.translate(_OUTER)
            + _OUTER_PAD
            + _sha256(self._bytes.translate(_INNER) + _INNER_PAD + digest).digest()
        ).digest()

    def verify(self, digest: bytes, mac: bytes) -> bool:
        """Return True if *mac* is the one of *digest*. Takes the same time for each wrong one."""
        return hmac.compare_digest(self.mac(digest), mac)

    def write_line(self, descriptor: int, before: bytes, after: bytes) -> None:
        """Write *before*, the secret as hexadecimal digits, and *after* to a file."""
        with open(descriptor, "wb", closefd=False, buffering=0) as file:
            if file.write(before + self._bytes.hex().encode() + after) != len(before) + 2 * len(self) + len(after):
                raise OSError("the disk is full")
            os.fsync(descriptor)

    def word(self, index: int) -> Secret | None:
        """Return one of the words of a text that is secret as a whole; None if there are fewer."""
        return Secret(self._bytes.split()[index]) if len(self._bytes.split()) > index else None

    def unhexed(self) -> Secret | None:
        """Return the bytes that the digits stand for; None if they are no hexadecimal digits."""
        try:
            return Secret(bytes.fromhex(self._bytes.decode("ascii")))
        except ValueError:
            return None

    def number(self) -> int | None:
        """Return the whole number, of up to 15 digits, that the bytes spell; None if they spell none."""
        is_number = self._bytes.isdigit() and len(self._bytes) <= 15
        return int(self._bytes) if is_number else None

    def spells(self, text: bytes) -> bool:
        """Return True if these are the bytes of *text*."""
        return hmac.compare_digest(self._bytes, text)


def hkdf_extract(salt: bytes, secret: Secret) -> Secret:
    """Return HKDF-Extract of RFC 5869: HMAC-SHA-256 of *secret* with the key *salt*."""
    return Secret(hmac.digest(salt, secret._bytes, "sha256"))
