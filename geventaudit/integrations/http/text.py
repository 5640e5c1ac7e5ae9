"""Texts of clients and applications, in a form that a record can carry."""

from __future__ import annotations

__all__ = ["MAX_TEXT", "name_of", "named", "printable", "sent_text", "server_text"]

MAX_TEXT = 2048
"""Characters of a client's text (a path, a user agent) that a record keeps. The number of all stands behind."""


def printable(value: object, *, keep_end: bool = False) -> str:
    """Return *value* as printable text of bounded length.

    Lone surrogates, line breaks and characters that hide text are escaped.

    :param keep_end: of a text that is too long, keep the beginning and the end: clients pad texts.
    """
    if type(value) is str and len(value) <= MAX_TEXT and value.isprintable():  # as most are
        return value
    try:
        text = str.__str__(str(value))
    except Exception:
        return f"a {type(value).__name__} without text"
    if len(text) > MAX_TEXT:
        half = MAX_TEXT // 2
        kept = (text[:half], f"... {text[-half:]}") if keep_end else (text[:MAX_TEXT], "")
        text = f"{kept[0]}... ({len(text)} characters){kept[1]}"
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def named(error: BaseException) -> str:
    """Return the type and the text of *error*."""
    return ": ".join(filter(None, (type(error).__name__, printable(error))))


def sent_text(value: object) -> str:
    """Return the text of bytes that a client sent, of which WSGI makes Latin-1. Bytes that are no UTF-8 are escaped."""
    return _decoded(value, "backslashreplace")


def server_text(value: object) -> str:
    """Return a text that the server or a middleware wrote: UTF-8 bytes as Latin-1, by WSGI, or the text itself.

    Middlewares in Python write ``Jörg`` as it is. Its Latin-1 bytes are no UTF-8.
    """
    return _decoded(value, "strict")


def name_of(user: object) -> str:
    """Return the name of a signed-in user: a text, an object with a text, or a proxy of either. Empty for none."""
    if type(user) is str:
        return printable(user.strip())
    if user is None or isinstance(user, type(None)) or not getattr(user, "is_authenticated", True):
        return ""
    try:
        text = str(user).strip()
    except Exception:
        return printable(user)
    return printable(text)


def _decoded(value: object, errors: str) -> str:
    if type(value) is not str:
        return "" if value is None else printable(value)
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode("utf-8", errors)
    except UnicodeError:
        return value
