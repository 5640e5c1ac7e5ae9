"""Lines of JSON to the facts about stamped records.

Without a key, only the stamp is needed: a strict pattern finds it, and whatever is unusual is parsed whole. With a key,
each line is parsed, and its canonical form built again.
"""

from __future__ import annotations

import math
import re
from binascii import unhexlify
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import show
from ..schema.fields import SENDABLE
from ..schema.json_safe import MAX_SAFE_INTEGER
from ..trail.canonical import NO_MAC, NotCanonicalError, canonical_digest
from .packing import canonical_form, plain_stamp
from .parsing import Unreadable, parse

__all__ = ["TIME_KEYS", "Reading", "RecordReader", "Stamped", "is_stamp", "kind_of", "plain_stamps", "seconds_of"]


class Stamped(NamedTuple):
    """The facts about one stamped record."""

    stream: str
    seq: int
    time: bytes
    """27 characters."""
    digest: bytes
    """h, 32 bytes; zeros if there is none."""
    mac: bytes
    """32 bytes; zeros without a seal."""
    is_sealed: bool
    problem: str
    """The reason for which no client has written the record so; empty if there is none."""
    note: Any
    """The parts of the stamp that few records have: a map with ``checkpoint`` and ``was``; None without any."""


Reading = Stamped | Unreadable | None

_STAMP = (
    rb'"geventaudit":%s\{(?:"mac":%s"([0-9a-f]{64})",%s)?"seq":%s([1-9][0-9]{0,15}),%s'
    rb'"stream":%s"([0-9a-f]{32}(?:/[0-9]{1,16}){0,16})",%s"tag":%s"AsmAudit[CD]P",%s'
    rb'"time":%s"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z)"\}[^\n]*[}\]]\r?(?:\n|\Z)'
)
# One pattern that takes both would be slower.
_COMPACT = re.compile(_STAMP.replace(b"%s", b""))
_SPACED = re.compile(_STAMP.replace(b"%s", b" "))
_STREAM = re.compile(r"[0-9a-f]{32}(?:/[0-9]{1,16}){0,16}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME = b'"geventaudit"'
_NOTHING = bytes(32)
_STAMP_KEYS = frozenset({"mac", "seq", "stream", "tag", "time", "was", "checkpoint"})

_KINDS = {text: kind.value for name, kind in SENDABLE.items() for text in (name, kind.value)}
_KIND_KEYS = ("AuditTag", "AuditType", "Type")  # the first one counts
TIME_KEYS = ("Time", "AuditTime", "date", "time", "timestamp", "@timestamp")
"""The keys under which agents put the time of a record; the first one counts."""
_MAX_UNCOVERED = 1000


def plain_stamps(lines: bytes, count: int) -> list[tuple[bytes, bytes, bytes, bytes]] | None:
    """Return MAC (empty for none), number, stream and time of the stamp in each line; None if one has to be parsed.

    :param lines: so many of them, each with its newline. The last one may have none.
    """
    if lines.count(_NAME) != count:
        return None
    # Each match takes its line to the end. So many matches, lines and names mean: each line has one.
    found = (_COMPACT if lines.find(b'"geventaudit":{') >= 0 else _SPACED).findall(lines)
    return found if len(found) == count else None


class RecordReader:
    """Reads lines.

    :param with_digest: True to parse each line and compute h; False to look at stamps only.
    """

    def __init__(self, *, with_digest: bool) -> None:
        self._with_digest = with_digest
        self.uncovered: dict[str, int] = {}
        """The occurrences of each key that agents added, which no seal covers."""

    @property
    def is_plain(self) -> bool:
        """True if the stamp of a record is enough."""
        return not self._with_digest

    def read(self, line: bytes) -> Reading:
        """Return the facts about the record in *line*; None for a line that holds no record of the audit trail."""
        if self.is_plain and (found := plain_stamps(line, 1)) is not None:
            ((digits, number, stream, moment),) = found
            authenticator = unhexlify(digits) if digits else _NOTHING
            return Stamped(stream.decode(), int(number), moment, _NOTHING, authenticator, bool(digits), "", None)
        parsed = parse(line)
        if parsed is None or isinstance(parsed, Unreadable):
            return parsed
        body, envelope, stamp, problem, before = parsed
        if stamp is None:
            return Unreadable("no stamp", True)
        facts, is_sealed, note = plain_stamp(stamp), True, None
        if facts is None:
            if not is_stamp(stamp):
                return Unreadable("no valid stamp", True)
            facts, is_sealed, note = _facts_of(stamp), "mac" in stamp, _note_of(stamp)
        problem = problem or self._envelope_problem(envelope, stamp)
        if before:
            problem = problem or self._envelope_problem(before, stamp)
        name, seq, time, mac = facts
        digest, unwritten = self._digest_of(body, stamp)
        return Stamped(name, seq, time, digest, mac, is_sealed, problem or unwritten, note)

    def _digest_of(self, body: dict[str, Any], stamp: dict[str, Any]) -> tuple[bytes, str]:
        """Return h, and the reason for which no sealing client has written the body."""
        if not self._with_digest:
            return _NOTHING, ""
        is_sealed = "mac" in stamp
        if is_sealed:
            stamp["mac"] = NO_MAC
        try:
            return canonical_digest(canonical_form(body)), ""
        except NotCanonicalError as error:
            return _NOTHING, f"no sealing client writes this: {error}" if is_sealed else ""

    def _envelope_problem(self, envelope: dict[str, Any], stamp: dict[str, Any]) -> str:
        """Return the disagreement between the agent's keys and the stamp; empty if there is none.

        Other keys, and times of an unknown form, are counted as not covered.
        """
        problem, second = "", _second_of(stamp["time"][:19])
        for key, value in envelope.items():
            if key in _KIND_KEYS:
                if not isinstance(value, str) or _KINDS.get(value, value) != stamp["tag"]:
                    problem = f"{key} is {show(value)}, and its stamp says {stamp['tag']}"
            elif key in TIME_KEYS and (moment := second if value == second else seconds_of(value)) is not None:
                if math.floor(moment) != second:
                    problem = f"{key} is {show(value)}, and its stamp says {stamp['time']}"
            elif key in self.uncovered or len(self.uncovered) < _MAX_UNCOVERED:
                self.uncovered[key] = self.uncovered.get(key, 0) + 1
        return problem


def is_stamp(stamp: dict[str, Any]) -> bool:
    """Return True if a client may have written the stamp."""
    seq, stream, time, mac = stamp.get("seq"), stamp.get("stream"), stamp.get("time"), stamp.get("mac", NO_MAC)
    return (
        type(seq) is int
        and 1 <= seq <= MAX_SAFE_INTEGER
        and type(stream) is str
        and _is_stream(stream)
        and type(time) is str
        and _TIME.fullmatch(time) is not None
        and type(stamp.get("tag")) is str
        and type(mac) is str
        and _MAC.fullmatch(mac) is not None
        and _STAMP_KEYS.issuperset(stamp)
    )


@lru_cache(1024)
def _is_stream(text: str) -> bool:
    return _STREAM.fullmatch(text) is not None


def _facts_of(stamp: dict[str, Any]) -> tuple[str, int, bytes, bytes]:
    """Return stream, number, time and MAC of a valid stamp."""
    mac = stamp.get("mac")
    return stamp["stream"], stamp["seq"], stamp["time"].encode(), _NOTHING if mac is None else unhexlify(mac)


def _note_of(stamp: dict[str, Any]) -> dict[str, Any] | None:
    if "checkpoint" in stamp or "was" in stamp:
        return {key: stamp[key] for key in ("checkpoint", "was") if key in stamp}
    return None


def kind_of(envelope: dict[str, Any]) -> str | None:
    """Return the tag that an agent gives the record; None without one."""
    for key in _KIND_KEYS:
        if isinstance(kind := envelope.get(key), str):
            return _KINDS.get(kind)
    return None


@lru_cache(1024)
def _second_of(text: str) -> float | None:
    """Return the time of a stamp without its fraction, in seconds since 1970; None if no calendar has it."""
    return seconds_of(text + "Z")


_UNITS = (1.0, 1e3, 1e6, 1e9)
"""Seconds, milliseconds, microseconds and nanoseconds: agents can be set to each."""
_END = 253_402_300_800
"""Seconds since 1970 to the year 10000. Milliseconds are more since 1978."""


def seconds_of(value: Any) -> float | None:
    """Return the seconds since 1970 that an agent's time means, a text or a number; None if it has another form."""
    if isinstance(value, bool):
        return None
    try:
        if type(value) is not str or "T" not in value:  # float() is slow to refuse a text
            seconds = float(value)
            for unit in _UNITS:
                if abs(seconds) < _END * unit:
                    return seconds / unit
            return None
    except OverflowError:  # an integer of more than 308 digits
        return None
    except (TypeError, ValueError):
        pass
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
