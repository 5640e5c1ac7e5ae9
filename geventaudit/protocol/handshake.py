"""The handshake of the Forward protocol: both sides prove that they know a shared key. Pure: no I/O.

::

    agent   ["HELO", {"nonce": ..., "auth": ..., "keepalive": true}]
    client  ["PING", host name, salt, sha512(salt + host name + nonce + key), user, sha512(auth + user + password)]
    agent   ["PONG", true or false, reason, host name, sha512(salt + host name + nonce + key)]

Without a user name, the user is an empty text with its digest: an agent that has users refuses it.

The digests are in hexadecimal and compared in constant time. No error and no repr contains a key, a password or a
digest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..encoder.encoding import pack
from ..schema.values import surrogate_problem

__all__ = ["AgentSide", "ClientSide", "HandshakeError", "check_secret"]


class HandshakeError(Exception):
    """The other side breaks the protocol, or does not know the key. The text never contains a secret."""


def check_secret(name: str, value: object) -> None:
    """Check that *value* can be a key, user name or password. No error contains the value.

    :raises TypeError, ValueError: *value* is not text, or UTF-8 cannot write it.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got a value of type {type(value).__name__}")
    if surrogate_problem(value):
        raise ValueError(f"{name} must be text that UTF-8 can write, and has a lone surrogate")


def _digest(*parts: bytes) -> str:
    from hashlib import sha512  # loads OpenSSL, a tenth of the import time of this library

    return sha512(b"".join(parts)).hexdigest()


def _same(one: object, other: str) -> bool:
    import hmac  # see _digest

    return isinstance(one, str) and hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def _bytes(value: object, name: str) -> bytes:
    """Return text or bytes as bytes. Implementations pack nonces and salts as either."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    raise HandshakeError(f"the {name} must be text or bytes")


class ClientSide:
    """The client's side of the handshake."""

    def __init__(self, hostname: str, shared_key: str, username: str, password: str) -> None:
        self._hostname = hostname
        self._key = shared_key.encode()
        self._username = username
        self._password = password.encode()
        self._salt = os.urandom(16).hex()
        self._nonce = b""

    def ping(self, helo: Any) -> bytes:
        """Return the PING that answers the agent's HELO.

        :raises HandshakeError: *helo* is not a HELO.
        """
        if not (isinstance(helo, list) and len(helo) == 2 and helo[0] == "HELO" and isinstance(helo[1], dict)):
            raise HandshakeError("the agent's first message is not a HELO")
        self._nonce = _bytes(helo[1].get("nonce", b""), "nonce")
        auth = _bytes(helo[1].get("auth") or b"", "salt for users")
        # A salt does not mean that the agent has users: Fluent Bit always sends one.
        return pack(
            [
                "PING",
                self._hostname,
                self._salt,
                _digest(self._salt.encode(), self._hostname.encode(), self._nonce, self._key),
                self._username if auth else "",
                _digest(auth, self._username.encode(), self._password) if auth else "",
            ]
        )

    def check(self, pong: Any) -> None:
        """Check the agent's PONG.

        :raises HandshakeError: the agent refuses this side, or does not know the key.
        """
        if not (isinstance(pong, list) and len(pong) == 5 and pong[0] == "PONG"):
            raise HandshakeError("the agent's answer to the PING is not a PONG")
        _, accepted, reason, hostname, digest = pong
        if accepted is not True:
            words = reason if isinstance(reason, str) and reason.isprintable() else "without a reason"
            hint = "" if self._username else " (if it has users, give username and password)"
            raise HandshakeError(f"the agent refuses: {words[:200]}{hint if 'password' in words else ''}")
        name = _bytes(hostname, "host name")
        if name == self._hostname.encode():
            raise HandshakeError("the agent has the name of this client; it may only send back the received bytes")
        expected = _digest(self._salt.encode(), name, self._nonce, self._key)
        if not _same(digest, expected):
            raise HandshakeError("the agent does not know the shared key")


class AgentSide:
    """The agent's side of the handshake.

    :param users: passwords by user name; None requires no user.
    """

    def __init__(self, hostname: str, shared_key: str, users: Mapping[str, str] | None) -> None:
        self._hostname = hostname
        self._key = shared_key.encode()
        self._users = None if users is None else dict(users)
        self._nonce = os.urandom(16)
        self._auth = b"" if users is None else os.urandom(16)

    def helo(self) -> bytes:
        """Return the HELO, which begins the handshake."""
        return pack(["HELO", {"nonce": self._nonce, "auth": self._auth, "keepalive": True}])

    def pong(self, ping: Any) -> tuple[bytes, str]:
        """Return the PONG for a client's PING, and the reason of a refusal, "" if the client is accepted.

        :raises HandshakeError: *ping* is not a PING.
        """
        if not (isinstance(ping, list) and len(ping) == 6 and ping[0] == "PING" and isinstance(ping[1], str)):
            raise HandshakeError("the answer to the HELO is not a PING")
        _, hostname, salt, digest, username, password = ping
        salted = _bytes(salt, "salt")
        reason = ""
        if not _same(digest, _digest(salted, hostname.encode("utf-8", "surrogateescape"), self._nonce, self._key)):
            reason = "shared_key mismatch"
        elif self._users is not None:
            known = self._users.get(username) if isinstance(username, str) else None
            expected = _digest(self._auth, str(username).encode("utf-8", "surrogateescape"), (known or "").encode())
            if not _same(password, expected) or known is None:
                reason = "username/password mismatch"
        proof = "" if reason else _digest(salted, self._hostname.encode(), self._nonce, self._key)
        return pack(["PONG", not reason, reason, self._hostname, proof]), reason
