"""Messages that arrived, as a line for people and as JSON."""

from __future__ import annotations

import base64
import math
from datetime import UTC, datetime
from typing import Any

from ..records import Heartbeat, Msg
from ..schema.rules import MsgSchema
from .server import Received

__all__ = ["json_of", "line_of", "printable"]

_schema = MsgSchema()


def line_of(received: Received) -> str:
    """When, what, how it ended, who, on what; safe for a terminal."""
    message = received.message
    moment = _moment(received.time)
    if not isinstance(message, Msg):
        destination = f" via {message.destination}" if isinstance(message, Heartbeat) else ""
        return f"{moment} {type(message).__name__}{destination}"
    record = message.record
    who = ", ".join(one.identity for each in record.caller_identities.values() for one in each)
    what = ", ".join(
        f"{kind}/{one.name}" for kind, targets in record.target_resources.items() for one in targets
    ) or ", ".join(record.target_resources)
    line = (
        f"{moment} {_schema.dump(message)['Type']} {record.operation_name} {record.operation_result}: "
        f"{who} from {record.caller_ip_address} on {what}"
    )
    return printable(line)


def printable(text: str) -> str:
    """*text* with what would move or colour things at a terminal escaped."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}"


def json_of(received: Received) -> Any:
    """What ``geventaudit send`` takes, with when it happened and whose it is; what JSON cannot carry is text.

    ``send`` refuses these two beside ``Type`` and ``Record``: what it sends happens now.
    """
    plain = _schema.dump(received.message)
    return {
        "Time": received.time,
        **({} if received.service_tree_id is None else {"env_ikey": received.service_tree_id}),
        "Type": plain["Type"],
        "Record": _jsonable(plain["Record"]),
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_jsonable(each) for each in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value if value is None or isinstance(value, str | int | float) else repr(value)
