"""Secrets in the parts of a request that a record carries: arguments of routes, texts of exceptions, targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from .text import printable

__all__ = ["REDACTED", "SECRET_NAMES", "Redact", "Redaction", "redact_secrets"]

REDACTED = "[redacted]"
"""The text in the place of a secret."""

SECRET_NAMES = ("token", "password", "secret", "key", "code")
"""Parts of the names of secrets, in any case of letters: ``resetToken`` and ``api_key`` are names of secrets too."""

Redact = Callable[[str, str], str]
"""A function of a text's name and the text; returns the text to record. The name is that of an argument, or ``path``,
``location`` (the target of a redirect), ``description`` (reasons and exceptions) or ``target`` (the name, the cluster,
the data center or the region of a resource that a function of the application returned)."""

# A name with its value, as in URLs, in the repr of a dict and in prose: code=7, 'token': 'x', password: "y z".
_PAIR = re.compile(
    rf"""((?:{"|".join(SECRET_NAMES)})s?(?:["'\]]|%5D)?\s?(?:=>|[=:]|%3D|%3A)\s?)"""
    r"""("[^"]*"|'[^']*'|(?:(?:bearer|basic)\s)?[^\s&;,#<>"')\]}]+)""",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(://)[^/\s@?#]+@")
_LONG = 6  # characters of a secret that is replaced inside of words too


def redact_secrets(name: str, text: str) -> str:
    """Return *text* without secrets; the default of ``AuditMiddleware(redact=...)``.

    The whole text is a secret if its name has one of :data:`SECRET_NAMES` in it. In ``location`` and ``description``,
    the values behind such a name are (``token=...``), and user and password in a URL. Not in paths and in arguments:
    a client could hide a target by its name there.
    """
    if _has_secret_name(name):
        return REDACTED
    if name not in ("location", "description"):
        return text
    # Most texts have neither, and to look for that is much faster than the patterns.
    if _has_secret_name(text):
        text = _PAIR.sub(rf"\1{REDACTED}", text)
    return _USER_INFO.sub(rf"\1{REDACTED}@", text) if "://" in text else text


def _has_secret_name(text: str) -> bool:
    lowered = text.lower()
    for name in SECRET_NAMES:  # noqa: SIM110  (any() takes three times as long)
        if name in lowered:
            return True
    return False


class Redaction:
    """The texts of one record, without secrets. An argument that the hook changed is removed from the others too.

    :param hook: the application's function. A text for which it fails is left out.
    :param arguments: the arguments of the route.
    """

    def __init__(self, hook: Redact, arguments: Mapping[str, Any]) -> None:
        self._hook = hook
        self.error: Exception | None = None
        """The first exception of the hook."""
        self.arguments: dict[str, str] = {}
        """The arguments as texts."""
        self._secrets: dict[str, str] = {}
        self._originals: list[str] = []
        for key, value in arguments.items():
            name, text = printable(key), printable(value, keep_end=True)
            shown = self.arguments[name] = self._call(name, text)
            if shown != text and text:
                self._originals.append(text)
                self._secrets |= {text: shown, quote(text): shown, quote(text, safe=""): shown}

    def text(self, name: str, text: str) -> str:
        """Return *text* without secrets."""
        if not text:
            return text
        for secret, shown in self._secrets.items():
            text = _replaced(text, secret, shown)
        return self._call(name, text)

    def path(self, path: str, route: str) -> str:
        """Return *path* without secrets.

        It is *route* if a secret is not found in the path as the application read it: converters may have changed it.
        """
        if all(_replaced(path, secret, "") != path for secret in self._originals):
            return self.text("path", path)
        return route or REDACTED

    def _call(self, name: str, text: str) -> str:
        try:
            shown = self._hook(name, text)
            if isinstance(shown, str):
                return shown if shown is text else printable(shown)
            raise TypeError(f"redact must return text, returned a {type(shown).__name__}")
        except Exception as error:
            self.error = self.error or error
            return REDACTED


def _replaced(text: str, secret: str, shown: str) -> str:
    """Return *text* with *shown* for *secret*, in any case of ASCII letters; a short secret for whole words only."""
    is_ascii = text.isascii() and secret.isascii()
    hay, needle = (text.lower(), secret.lower()) if is_ascii else (text, secret)
    parts: list[str] = []
    begin = end = 0
    while (begin := hay.find(needle, begin)) >= 0:
        after = begin + len(needle)
        if len(needle) >= _LONG or not (hay[begin - 1 : begin].isalnum() or hay[after : after + 1].isalnum()):
            parts += text[end:begin], shown
            end = after
        begin = after
    return "".join([*parts, text[end:]])
