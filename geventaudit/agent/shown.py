"""Received messages as a line of text and as JSON.

All text from outside is printed by :func:`printable`, or as JSON by :func:`json_line`. Neither can move the cursor,
change colours, begin a line, or reorder text at a terminal.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from ..encoder.encoding import record_body
from ..errors import show
from ..protocol.unpacking import Timestamp
from ..records import Heartbeat, Msg, OperationResult
from ..schema.fields import TYPE_NAMES
from ..schema.rules import RecordSchema
from .arrivals import Received, Refused

__all__ = ["dumps", "json_line", "json_of", "jsonable", "line_of", "line_of_refusal", "printable"]

_RECORD_NAMES = [str(field.data_key) for field in RecordSchema().fields.values()]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_REFUSAL = 1000
_MAX_WORD = 200
_MAX_REASON = 500
_MAX_WORDS = 10

# One encoder for all calls: json.dumps() with options makes one for each call.
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def line_of(received: Received) -> str:
    """Return a line with time, operation, result, caller, targets, and the names of extra keys.

    A text with blanks, quotes or commas is quoted, so that it cannot look like another part of the line. Long texts and
    lists are cut.
    """
    message = received.message
    if isinstance(message, Msg):
        about = _about_record(message)
    else:
        about = type(message).__name__
        if isinstance(message, Heartbeat):
            about += f" via {_word(message.destination)}"
    extra = f" (besides: {_listed(map(_word, received.extra), len(received.extra))})" if received.extra else ""
    return f"{_moment(received.time)} {about}{extra}"


def _about_record(message: Msg) -> str:
    record = message.record
    identities = [each.identity for group in record.caller_identities.values() for each in group]
    targets = [(kind, target.name) for kind, group in record.target_resources.items() for target in group]
    on = _listed((f"{_word(kind)}/{_word(name)}" for kind, name in targets), len(targets))
    kinds = _listed(map(_word, record.target_resources), len(record.target_resources))
    reason = ""
    if record.operation_result == OperationResult.FAILURE:
        reason = f": {_quoted(record.operation_result_description, _MAX_REASON)}"
    return (
        f"{TYPE_NAMES[message.type]} {_word(record.operation_name)} {record.operation_result}: "
        f"{_listed(map(_word, identities), len(identities))} from {_word(str(record.caller_ip_address))} "
        f"on {on or kinds}{reason}"
    )


def line_of_refusal(refused: Refused) -> str:
    """Return the type of a refused message and the reason, cut to 1,000 characters."""
    # Some reasons begin with the type. The offset of a FrameError is 0 for a message.
    reason = str(getattr(refused.error, "reason", refused.error)).removeprefix(f"{refused.tag}: ")
    return f"{show(refused.tag)}: {printable(reason, _MAX_REFUSAL)}"


def printable(text: str, most: int | None = None) -> str:
    """Return *text* on one line, with invisible and unusual characters escaped.

    :param most: characters of *text* to keep; a longer text ends with the number of the others.
    """
    left_out = 0 if most is None else max(len(text) - most, 0)
    kept = text[:most]
    if not kept.isprintable():
        kept = "".join(each if each.isprintable() else _escaped(each) for each in kept)
    return f"{kept}... ({left_out} more characters)" if left_out else kept


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _word(text: str) -> str:
    """Return *text* as a part of a line, in quotes if necessary."""
    if text.isprintable() and text and not set(text) & {" ", '"', ","}:
        return printable(text, _MAX_WORD)
    return _quoted(text, _MAX_WORD)


def _quoted(text: str, most: int) -> str:
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"'), most) + '"'


def _listed(words: Iterable[str], count: int) -> str:
    more = f" and {count - _MAX_WORDS} more" if count > _MAX_WORDS else ""
    return ", ".join(islice(words, _MAX_WORDS)) + more


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}"


def json_line(received: Received) -> str:
    """Return :func:`json_of` as one line of JSON, written by :func:`dumps`."""
    return dumps(json_of(received))


def dumps(plain: Any) -> str:
    """Return a value of :func:`jsonable` as one line of JSON.

    A line with an invisible character is all ASCII: other characters are escaped.
    """
    text = _encode(plain)
    return text if text.isprintable() else json.dumps(plain).replace("\x7f", "\\u007f")


def json_of(received: Received) -> dict[str, Any]:
    """Return a message as ``geventaudit send`` reads it, with its time, service, extra keys and metadata.

    ``send`` accepts ``Type`` and ``Record`` only, and refuses the other keys. Values that JSON cannot carry become
    text: times in ISO 8601, with nine digits of a second where a datetime has too few; bytes in base64. A map with a
    key that is not text becomes a list of pairs of key and value.
    """
    message: Any = received.message
    body = record_body(message.record, None)
    body["CustomData"] = jsonable(message.record.custom_data)
    return {
        "Time": received.time,
        **({} if received.service_tree_id is None else {"env_ikey": received.service_tree_id}),
        "Type": TYPE_NAMES[message.type],
        "Record": {name: body[name] for name in _RECORD_NAMES},
        **({"Extra": jsonable(received.extra)} if received.extra else {}),
        **({"Metadata": jsonable(received.metadata)} if received.metadata else {}),
    }


def jsonable(value: Any) -> Any:
    """Return *value* with text in place of values that JSON cannot carry; see :func:`json_of`."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: jsonable(each) for key, each in value.items()}
        return [[jsonable(key), jsonable(each)] for key, each in value.items()]
    if isinstance(value, list):
        return [jsonable(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Timestamp):
        return _iso_of(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has neither NaN nor infinities
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _iso_of(timestamp: Any) -> str:
    try:
        whole = _EPOCH + timedelta(seconds=timestamp.seconds)
    except OverflowError:  # beyond the years 1 to 9999
        return f"{timestamp.seconds} s and {timestamp.nanoseconds} ns since 1970"
    return f"{whole.isoformat()[:19]}.{timestamp.nanoseconds:09d}+00:00"
