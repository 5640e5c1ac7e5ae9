"""Paths: the part that the application routes on, its mount, exclusion, and the targets in paths of the Azure form.

WSGI splits a path into ``SCRIPT_NAME``, where the application is mounted, and ``PATH_INFO``, which the application
routes on. gunicorn lets a client choose where to split, by a header ``SCRIPT_NAME``. So only ``PATH_INFO`` excludes a
request, and the part that such a header names is no part of a record's path.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from geventaudit import TargetResource

from .text import sent_text, server_text

__all__ = ["Exclusion", "azure_targets", "is_same_page", "mount_of", "named_prefix", "whole_path"]


_URL = re.compile(r"(?:([a-zA-Z][\w+.-]*):)?(?://([^/?#]*))?([^?#]*)")  # of RFC 3986; urlsplit() refuses some


def named_prefix(environ: Mapping[str, Any]) -> str:
    """Return the leading part of ``SCRIPT_NAME`` that a request header named; empty if none did."""
    header, script = environ.get("HTTP_SCRIPT_NAME"), environ.get("SCRIPT_NAME")
    if not header or not script:
        return ""
    # gunicorn joins repeated headers with commas, and uses the last. Values that are too long are not looked at: there
    # may be many.
    header = header.strip()
    first = max(len(header) - len(script), 0)
    starts = [0, *(comma.end() for comma in re.finditer(r",\s*", header))]
    return next((header[each:] for each in starts if each >= first and script.startswith(header[each:])), "")


def mount_of(environ: Mapping[str, Any]) -> str:
    """Return the path at which the application is mounted, without a slash at its end: ``/v1``. Empty for none."""
    script = environ.get("SCRIPT_NAME") or ""
    return _rooted(sent_text(script[len(named_prefix(environ)) :]).rstrip("/"))


def whole_path(environ: Mapping[str, Any]) -> str:
    """Return the path of a request, with the mount of its application: ``/v1/things/7``."""
    return mount_of(environ) + _rooted(sent_text(environ.get("PATH_INFO") or "")) or "/"


def _rooted(path: str) -> str:
    """Return *path* with a slash before it, as frameworks read it; an empty path as it is."""
    return path if not path or path.startswith("/") else f"/{path}"


class Exclusion:
    """The requests of which no record is made.

    :param patterns: patterns of ``fnmatch`` for ``PATH_INFO``.
    :raises TypeError: a pattern is no text.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = list(patterns)
        for each in patterns:
            if not isinstance(each, str):
                raise TypeError(f'exclude must be a list of patterns like "/static/*", got {each!r} in it')
        self._match = re.compile("|".join(fnmatch.translate(each) for each in patterns) or r"(?!)").match

    def matches(self, path_info: str) -> bool:
        """Return True if a request with this ``PATH_INFO`` is excluded.

        A path that some application reads as another path is not: dot segments, ``//``, a backslash, a percent sign
        that is left after decoding, or text that does not print.
        """
        path = sent_text(path_info)
        return self._match(path) is not None and not _is_ambiguous(path)

    def still_holds(self, path_info: str, script: str, environ: Mapping[str, Any]) -> bool:
        """Return True if an excluded request was routed as it came.

        A middleware inside may have rewritten the path. Mounts do: they move its beginning to ``SCRIPT_NAME``.

        :param path_info: ``PATH_INFO`` before the application was called.
        :param script: ``SCRIPT_NAME`` before the application was called.
        :param environ: the environment after that.
        """
        # Bottle writes the decoded text there, and others the bytes of WSGI.
        before, after = sent_text(path_info), server_text(environ.get("PATH_INFO"))
        if after == before or self.matches(environ.get("PATH_INFO") or ""):
            return True
        moved = before[: len(before) - len(after)]
        if moved + after != before or server_text(environ.get("SCRIPT_NAME")) != server_text(script) + moved:
            return False
        return not any(_names(value, moved) for key, value in environ.items() if key.startswith("HTTP_"))


def _is_ambiguous(path: str) -> bool:
    if not path.isascii():
        path = unicodedata.normalize("NFKC", path)
    if "//" in path or "\\" in path or "%" in path or not path.isprintable():
        return True
    return any(segment.partition(";")[0].strip() in (".", "..") for segment in path.split("/"))


def _names(header: object, prefix: str) -> bool:
    return any(part.strip().strip("/") == prefix.strip("/") for part in sent_text(header).split(","))


def azure_targets(path: str) -> dict[str, list[TargetResource]]:
    """Return subscription, resource group, provider and resource of a path of the Azure form; empty for other paths.

    The form is ``/subscriptions/S/resourceGroups/G/providers/N/TYPE/NAME/...``, its first two pairs optional, in any
    case of letters. The resource stands under its type (``N/TYPE``), which has no entries if the path names a whole
    collection. The rest behind the last pair (an action, a collection in a resource) is in the path alone.
    """
    found: dict[str, list[TargetResource]] = {}
    rest = path[1:].split("/")
    for segment, kind in (("subscriptions", "SubscriptionId"), ("resourcegroups", "ResourceGroup")):
        if rest[0].lower() == segment and len(rest) > 1 and rest[1]:
            found[kind] = [TargetResource(rest[1])]
            rest = rest[2:] or [""]
    return found | _resource(rest)


def _resource(rest: list[str]) -> dict[str, list[TargetResource]]:
    """Return provider and resource of the segments *rest*."""
    kinds: list[str] = []
    names: list[str] = []
    if rest[0].lower() == "providers":
        while len(rest) > 1 and rest[1] and rest[0]:
            if rest[0].lower() == "providers":  # one more: a resource that extends the one before
                kinds, names = [rest[1]], []
            else:
                kinds.append(rest[0])
                names.append(rest[1])
            rest = rest[2:] or [""]
    if not kinds:
        return {}
    found = {"ResourceProvider": [TargetResource(kinds[0])]}
    if names:
        found["/".join(kinds)] = [TargetResource("/".join(names))]
    elif rest[0]:
        found[f"{kinds[0]}/{rest[0]}"] = []
    return found


def is_same_page(location: str, page: str, environ: Mapping[str, Any]) -> bool:
    """Return True if both URLs, in an answer to the request of *environ*, name the same page; queries do not count.

    Clients choose the host and the path of their requests. So neither can keep the URLs from being compared.
    """
    host = str(environ.get("HTTP_HOST") or "").lower()
    folder = posixpath.dirname(whole_path(environ))
    return _place(location, host, folder) == _place(page, host, folder)


def _place(url: str, host: str, folder: str) -> tuple[str, str]:
    """Return host and path of *url*. The host is empty if it is that of the request."""
    _, netloc, path = _URL.match(url).groups("")  # type: ignore[union-attr]  # it matches any text
    return "" if netloc.lower() == host else netloc.lower(), posixpath.normpath(posixpath.join(folder, path))
