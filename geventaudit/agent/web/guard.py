"""The rules for requests to the page: from this page, to this address, with the token."""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import parse_qs

__all__ = ["Guard"]

# Any port: the page may be reached through a tunnel.
_HOST = re.compile(r"(?:(?P<name>[a-z0-9._-]+)|\[(?P<address>[0-9a-f:.]+)\])(?::[0-9]{1,5})?")


class Guard:
    """Accepts or refuses requests.

    An unknown name in the ``Host`` header means that a foreign site had its own name resolved to the page's address
    (DNS rebinding). A POST with a foreign or missing ``Origin`` does not come from the page.

    :param host: the host of the page's address, as the user gave it.
    :param port: the port of the page's address.
    :param token: the secret of each request; None on a loopback address.
    """

    def __init__(self, host: str, port: int, token: str | None) -> None:
        self._token = token
        self._cookie = f"geventaudit-{port}"  # cookies belong to a host, whatever the port
        self._names = {host.lower(), "localhost"}
        if token is not None:
            self._names.add(socket.gethostname().lower())

    def problem_of(self, environ: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the status and the text that refuse a request, or None."""
        host = environ.get("HTTP_HOST", "")
        if not self._is_own(host):
            return (
                "421 Misdirected Request",
                "The Host header does not name this page. Open the address that was printed.",
            )
        if environ["REQUEST_METHOD"] == "POST" and environ.get("HTTP_ORIGIN") != f"http://{host}":
            return "403 Forbidden", "Only the page itself may do this: the Origin header is not that of the page."
        if not self._knows_token(environ):
            return (
                "401 Unauthorized",
                "The token is missing or wrong. Open the address that was printed, with its token.",
            )
        return None

    def cookie_of(self, environ: Mapping[str, str]) -> str | None:
        """Return the ``Set-Cookie`` header for a request that has the right token in its query, else None."""
        given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0]
        if self._token is None or not _equal(given, self._token):
            return None
        return f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Lax"

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found["name"] or found["address"]
        if name in self._names:
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        # A foreign site cannot use an address for DNS rebinding.
        return address.is_loopback or self._token is not None

    def _knows_token(self, environ: Mapping[str, str]) -> bool:
        if self._token is None:
            return True
        try:
            cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._token)


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
