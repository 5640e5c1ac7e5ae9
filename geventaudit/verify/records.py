"""One line of JSON to the facts about one record.

Without a key, only the stamp is needed: a strict pattern finds it, and whatever is unusual is parsed whole. With a key,
each line is parsed, and its canonical form built again.

Agents write a record in one of these forms, and add keys of their own at the top level:

- the body, as Fluent Bit (``json_lines``), Fluentd (``json``) and Vector do
- ``{"Time": ..., "Type": ..., "Record": {...}}``, as ``geventaudit listen --output`` does
- ``TAG: [TIME, {...}]``, as Fluent Bit's file output does, and ``TIME<tab>TAG<tab>{...}``, as Fluentd's does
"""

from __future__ import annotations

import json
import math
import re
from binascii import unhexlify
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import show
from ..trail.canonical import BODY_KEYS, KEY, NO_MAC, NotCanonicalError, canonical_bytes, canonical_digest

__all__ = ["PARSER", "Reading", "RecordReader", "Stamped", "Unreadable"]

loads: Callable[[bytes], Any] = json.loads
dumps: Callable[[Any], bytes] | None = None
PARSER = "json"
"""The JSON parser in use: ``orjson`` if it is installed (the extra ``verify``)."""
try:
    import orjson
except ImportError:
    pass
else:
    loads, dumps, PARSER = orjson.loads, orjson.dumps, "orjson"


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


class Unreadable(NamedTuple):
    """A line that is no stamped record."""

    reason: str
    is_record: bool
    """True if it is a record without a stamp."""


Reading = Stamped | Unreadable | None

_STAMP = re.compile(
    rb'"geventaudit": ?\{(?:"mac": ?"([0-9a-f]{64})", ?)?"seq": ?([1-9][0-9]{0,15}), ?'
    rb'"stream": ?"([0-9a-f]{32}(?:/[0-9]{1,16}){0,16})", ?"tag": ?"AsmAudit[CD]P", ?'
    rb'"time": ?"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z)"\}',
    re.ASCII,
)
_STREAM = re.compile(r"[0-9a-f]{32}(?:/[0-9]{1,16}){0,16}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME = b'"geventaudit"'
_NOTHING = bytes(32)
_MAX_SEQ = (1 << 53) - 1
_STAMP_KEYS = {"mac", "seq", "stream", "tag", "time", "was", "checkpoint"}

_BODY = frozenset(BODY_KEYS)
_KINDS = {
    "ControlPlane": "AsmAuditCP",
    "DataPlane": "AsmAuditDP",
    "AsmAuditCP": "AsmAuditCP",
    "AsmAuditDP": "AsmAuditDP",
}
_KIND_KEYS = frozenset({"Type", "AuditType", "AuditTag"})
_TIME_KEYS = frozenset({"Time", "AuditTime", "date", "time", "timestamp", "@timestamp"})
_PREFIX = re.compile(rb"(?:(AsmAudit[A-Z]{2}): \[([0-9.]+), (?=\{))|(?:([^\t{]*)\t(AsmAudit[A-Z]{2})\t(?=\{))")
_OTHER_KINDS = ("AsmAuditHB", "AsmAuditDG", "Heartbeat", "Diagnostic")


class RecordReader:
    """Reads lines.

    :param with_digest: True to parse each line and compute h; False to look at stamps only.
    """

    def __init__(self, *, with_digest: bool) -> None:
        self._with_digest = with_digest
        self.uncovered: dict[str, int] = {}
        """How often each key of an agent's own was seen, which no seal covers."""

    @staticmethod
    def plain_stamp(line: bytes) -> tuple[bytes | None, bytes, bytes, bytes] | None:
        """Return MAC, number, stream and time of the stamp in *line*; None if the line has to be parsed."""
        if line.count(_NAME) != 1:
            return None
        match = _STAMP.match(line, line.find(_NAME))
        return None if match is None else match.groups()  # type: ignore[return-value]

    def read(self, line: bytes) -> Reading:
        """Return the facts about the record in *line*; None for a line that holds no record of the audit trail."""
        stamp = None if self._with_digest else self.plain_stamp(line)
        if stamp is not None:
            mac, seq, stream, time = stamp
            digits = _NOTHING if mac is None else unhexlify(mac)
            return Stamped(stream.decode(), int(seq), time, _NOTHING, digits, mac is not None, "", None)
        return self._read_whole(line)

    def _read_whole(self, line: bytes) -> Reading:
        line = line.strip()
        if not line:
            return None
        envelope: dict[str, Any] = {}
        if line[:1] != b"{":
            prefix = _PREFIX.match(line)
            if prefix is not None:
                line = line[prefix.end() :]
                if prefix[1] is not None and line.endswith(b"]"):
                    line = line[:-1]
                kind, moment = prefix[1] or prefix[4], prefix[2] or prefix[3]
                envelope = {"AuditTag": kind.decode(), "time": moment.decode("utf-8", "replace")}
        try:
            value = loads(line)
        except (ValueError, RecursionError) as error:
            return Unreadable(f"not JSON: {show(str(error))}", False)
        if not isinstance(value, dict):
            return Unreadable("no JSON object", False)
        try:
            repeated = _has_repeated_key(line, value)
        except (RecursionError, TypeError):  # TypeError is the base of orjson's
            return Unreadable("nested too deeply", False)
        return self._stamped(value, envelope, "a key stands twice in one JSON object" if repeated else "")

    def _stamped(self, value: dict[str, Any], envelope: dict[str, Any], problem: str) -> Reading:
        body = self._body_of(value, envelope)
        kind = envelope.get("AuditTag", envelope.get("AuditType", envelope.get("Type")))
        if kind in _OTHER_KINDS or "AuditVersion" in body:
            return None
        data = body.get("CustomData")
        stamp = data.get(KEY) if isinstance(data, dict) else None
        if not isinstance(stamp, dict):
            is_record = "OperationName" in body
            return Unreadable("no stamp" if is_record else "no record of an audit trail", is_record)
        if not _is_stamp(stamp):
            return Unreadable("no valid stamp", True)
        mac = stamp.get("mac")
        problem = problem or _envelope_problem(envelope, stamp)
        if body is not value and not body.keys() <= _BODY:
            problem = problem or f"Record has keys of another's: {show(sorted(body.keys() - _BODY))}"
        digest, unwritten = self._digest_of(body, stamp)
        return Stamped(
            stamp["stream"],
            stamp["seq"],
            stamp["time"].encode(),
            digest,
            _NOTHING if mac is None else bytes.fromhex(mac),
            mac is not None,
            problem or unwritten,
            _note_of(stamp),
        )

    def _digest_of(self, body: dict[str, Any], stamp: dict[str, Any]) -> tuple[bytes, str]:
        """Return h, and the reason for which no sealing client has written the body."""
        if not self._with_digest:
            return _NOTHING, ""
        is_sealed = "mac" in stamp
        if is_sealed:
            stamp["mac"] = NO_MAC
        try:
            return canonical_digest(canonical_bytes(body)), ""
        except NotCanonicalError as error:
            return _NOTHING, f"no sealing client writes this: {error}" if is_sealed else ""

    def _body_of(self, value: dict[str, Any], envelope: dict[str, Any]) -> dict[str, Any]:
        """Return the body, and add the agent's own keys to *envelope*."""
        record = value.get("Record")
        if isinstance(record, dict) and "OperationName" not in value:
            body = dict(record)
            extra = value.keys() - {"Record", "env_ikey"}
            if "env_ikey" in value and "env_ikey" not in body:
                body["env_ikey"] = value["env_ikey"]
        else:
            body = value
            extra = value.keys() - _BODY
        for key in extra:
            envelope[key] = value[key]
            if key not in _KIND_KEYS and key not in _TIME_KEYS:
                self._note_uncovered(key)
        return body

    def _note_uncovered(self, key: str) -> None:
        if key in self.uncovered or len(self.uncovered) < 1000:
            self.uncovered[key] = self.uncovered.get(key, 0) + 1


def _is_stamp(stamp: dict[str, Any]) -> bool:
    seq, stream, time, mac = (stamp.get(key) for key in ("seq", "stream", "time", "mac"))
    return (
        type(seq) is int
        and 1 <= seq <= _MAX_SEQ
        and isinstance(stream, str)
        and _is_stream(stream)
        and isinstance(time, str)
        and _TIME.fullmatch(time) is not None
        and isinstance(stamp.get("tag"), str)
        and ("mac" not in stamp or (isinstance(mac, str) and _MAC.fullmatch(mac) is not None))
        and _STAMP_KEYS.issuperset(stamp)
    )


def _note_of(stamp: dict[str, Any]) -> dict[str, Any] | None:
    return {key: stamp[key] for key in ("checkpoint", "was") if key in stamp} or None


def _envelope_problem(envelope: dict[str, Any], stamp: dict[str, Any]) -> str:
    """Return the disagreement between the agent's keys and the stamp; empty if there is none."""
    for key, value in envelope.items():
        if key in _KIND_KEYS:
            if not isinstance(value, str) or _KINDS.get(value, value) != stamp["tag"]:
                return f"{key} is {show(value)}, and its stamp says {stamp['tag']}"
        elif key in _TIME_KEYS:
            moment = _seconds_of(value)
            if moment is not None and math.floor(moment) != _second_of_stamp(stamp["time"][:19]):
                return f"{key} is {show(value)}, and its stamp says {stamp['time']}"
    return ""


@lru_cache(4096)
def _second_of_stamp(text: str) -> float | None:
    return _seconds_of(text + "Z")


@lru_cache(4096)
def _is_stream(text: str) -> bool:
    return _STREAM.fullmatch(text) is not None


def _seconds_of(value: Any) -> float | None:
    """Return the seconds since 1970 that an agent's time means; None if it has another form."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _has_repeated_key(line: bytes, value: dict[str, Any]) -> bool:
    """Return True if a key stands twice in one object of *line*.

    Parsers take the last one, and others the first. A count of quotes before colons is enough for most lines; the
    others are parsed once more.
    """
    if b" :" not in line and b"\t:" not in line and b"\r:" not in line:
        # A quote in a text is escaped in both, or else the counts differ.
        keys = _keys_in(value) if dumps is None else dumps(value).count(b'":')
        if line.count(b'":') == keys:
            return False
    repeated = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        made = dict(items)
        repeated = repeated or len(made) != len(items)
        return made

    try:
        json.loads(line, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return True
    return repeated


def _keys_in(value: Any) -> int:
    total = 0
    if type(value) is dict:
        total = len(value)
        for each in value.values():
            if type(each) is dict or type(each) is list:
                total += _keys_in(each)
    else:
        for each in value:
            if type(each) is dict or type(each) is list:
                total += _keys_in(each)
    return total
