"""Lines of JSON to records, their stamps, and the keys that an agent has added.

Agents write a record in one of these forms, and add keys of their own at the top level:

- the body, as Fluent Bit (``json_lines``), Fluentd (``json``) and Vector do
- ``{"Time": ..., "Type": ..., "Record": {...}}``, as ``geventaudit listen --output`` does
- ``TAG: [TIME, {...}]``, as Fluent Bit's file output does, and ``TIME<tab>TAG<tab>{...}``, as Fluentd's does
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import show
from ..trail.canonical import BODY_KEYS, KEY

__all__ = ["Parsed", "Unreadable", "parse"]

loads: Callable[[bytes], Any] | None = None
dumps: Callable[[Any], bytes] | None = None
try:
    import orjson  # of the extra ``verify``
except ImportError:
    pass
else:
    loads, dumps = orjson.loads, orjson.dumps


class Parsed(NamedTuple):
    """A record, and its place in the line."""

    body: dict[str, Any]
    """The record's own keys. In a line without an envelope, with the agent's keys beside them."""
    envelope: dict[str, Any]
    """The keys that an agent has added."""
    stamp: dict[str, Any] | None
    problem: str
    """The reason for which no client has written the line so; empty if there is none."""
    prefix: dict[str, Any]
    """The tag and the time that an agent has put before the JSON object, as if they were keys of it."""


class Unreadable(NamedTuple):
    """A line that is no stamped record."""

    reason: str
    is_record: bool
    """True if it is a record without a stamp."""


_BODY = frozenset(BODY_KEYS)
_RECORD = _BODY - {"env_ikey"}
"""The keys of a record that ``geventaudit listen`` writes under ``Record``."""
_NO_RECORD = "no record of an audit trail"
_PREFIX = re.compile(rb"(?:(AsmAudit[A-Z]{2}): \[([0-9.]+), (?=\{))|(?:([^\t{]*)\t(AsmAudit[A-Z]{2})\t(?=\{))")
_OTHER_KINDS = frozenset({"AsmAuditHB", "AsmAuditDG", "Heartbeat", "Diagnostic"})


def parse(line: bytes) -> Parsed | Unreadable | None:
    """Return the record in *line*; None for a line that holds no record of the audit trail."""
    line = line.strip()
    if not line:
        return None
    before: dict[str, Any] = {}
    if line[:1] != b"{":
        line = line.removeprefix(BOM_UTF8)  # some programs for Windows begin a file with it
        prefix = _PREFIX.match(line)
        if prefix is not None:
            line = line[prefix.end() :]
            if prefix[1] is not None and line.endswith(b"]"):
                line = line[:-1]
            kind, moment = prefix[1] or prefix[4], prefix[2] or prefix[3]
            before = {"AuditTag": kind.decode(), "time": moment.decode("utf-8", "replace")}
    try:
        value, has_repeated_key = _strictly(line) if loads is None else _quickly(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON: {show(str(error))}", False)
    except TypeError:  # the base of orjson's error for a value that it cannot write again
        return Unreadable("nested too deeply", False)
    if not isinstance(value, dict):
        return Unreadable("no JSON object", False)
    return _record_in(value, before, "a key stands twice in one JSON object" if has_repeated_key else "")


def _record_in(value: dict[str, Any], before: dict[str, Any], problem: str) -> Parsed | Unreadable | None:
    record = value.get("Record")
    if isinstance(record, dict) and "OperationName" not in value:
        if not problem and not record.keys() <= _RECORD:
            problem = f"Record has keys of another's: {show(sorted(record.keys() - _RECORD))}"
        body = {"env_ikey": value["env_ikey"], **record} if "env_ikey" in value else record
        envelope = {key: value[key] for key in value if key not in ("Record", "env_ikey")}
    else:
        body = value
        envelope = {key: each for key, each in value.items() if key not in _BODY}
    data = body.get("CustomData")
    stamp = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(stamp, dict):
        if "OperationName" not in body:
            return None if _is_other_message(body, envelope | before) else Unreadable(_NO_RECORD, False)
        stamp = None
    return Parsed(body, envelope, stamp, problem, before)


def _is_other_message(body: dict[str, Any], envelope: dict[str, Any]) -> bool:
    """Return True for a heartbeat or a diagnostic message."""
    kind = envelope.get("AuditTag", envelope.get("AuditType", envelope.get("Type")))
    return "AuditVersion" in body or (type(kind) is str and kind in _OTHER_KINDS)


# -- keys that stand twice ---------------------------------------------------------------------------------------------
#
# Some parsers take the first of two equal keys, others the last one.


class _RepeatedKeys:
    """Builds the objects of one JSON parser, and counts those with a key that stands twice."""

    def __init__(self) -> None:
        self.count = 0

    def build(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            self.count += 1
        return made


_repeated_keys = _RepeatedKeys()
_decode = json.JSONDecoder(object_pairs_hook=_repeated_keys.build).decode


def _strictly(line: bytes) -> tuple[Any, bool]:
    """Return the value in *line*, and True if a key stands twice.

    :raises ValueError, RecursionError: it is no JSON, or is nested too deeply.
    """
    before = _repeated_keys.count
    value = _decode(line.decode())
    return value, _repeated_keys.count != before


def _quickly(line: bytes) -> tuple[Any, bool]:
    """Do the same with orjson.

    A repeated key is a colon more than in the same value written again. A colon that is spelled ``\\u003a`` could make
    up for one: a line with such a spelling is parsed strictly.
    """
    assert loads is not None
    assert dumps is not None
    value = loads(line)
    again = dumps(value)
    if again == line or (line.count(b":") == again.count(b":") and (b"\\" not in line or b"u003" not in line)):
        return value, False
    return value, _strictly(line)[1]
