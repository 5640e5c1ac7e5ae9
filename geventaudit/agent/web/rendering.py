"""The lines of JSON that the page reads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import gevent

from ...errors import ValidationError, flatten
from ...protocol.messages import HEARTBEAT_FIELDS
from ...records import Heartbeat, Msg
from ..arrivals import Received, Refused
from ..server import Agent
from ..shown import dumps, json_line, jsonable, printable
from .log import Arrival, Log

__all__ = ["lines_of", "state_of"]

# A longer message is encoded in a native thread, so that the hub is free.
_INLINE_BYTES = 1 << 15

_MAX_REASONS = 100
_MAX_REASON = 1000
_MAX_EXCERPT = 1 << 16  # values and characters
_MAX_DEPTH = 60
_LEFT_OUT = "..."


def lines_of(arrival: Arrival) -> tuple[str, str]:
    """Return two lines of JSON: the circumstances of a message, and the message.

    The message has its own line: the page shows numbers that JavaScript cannot hold from the text of that line.
    """
    if arrival.size <= _INLINE_BYTES:
        text = _text_of(arrival.message)
    else:
        text = gevent.get_hub().threadpool.apply(_text_of, (arrival.message,))
    # All values are numbers, or names without quotes.
    about = (
        f'{{"number": {arrival.number}, "kind": "{_kind_of(arrival.message)}", "arrived": {arrival.time}, '
        f'"connection": {arrival.link.number}, "frame": {arrival.frame_size}, "size": {arrival.size}}}'
    )
    return about, text


def _kind_of(message: Received | Refused) -> str:
    if isinstance(message, Refused):
        return "refused"
    return "record" if isinstance(message.message, Msg) else type(message.message).__name__.lower()


def _text_of(message: Received | Refused) -> str:
    if isinstance(message, Refused):
        return dumps(_refusal(message))
    if isinstance(message.message, Msg):
        return json_line(message)
    content = {"Time": message.time, "Type": type(message.message).__name__}
    if isinstance(message.message, Heartbeat):
        content |= {name: getattr(message.message, field) for name, field in HEARTBEAT_FIELDS.items()}
    return dumps(
        content
        | {name: jsonable(each) for name, each in (("Extra", message.extra), ("Metadata", message.metadata)) if each}
    )


def _refusal(refused: Refused) -> dict[str, Any]:
    error = refused.error
    pairs: Iterable[tuple[str, str]] = [("", getattr(error, "reason", None) or str(error))]
    if isinstance(error, ValidationError):
        pairs = flatten(error.messages, "")
    reasons = [
        [printable(path, _MAX_REASON), printable(text, _MAX_REASON)] for path, text in islice(pairs, _MAX_REASONS)
    ]
    excerpt = _Excerpt()
    record = excerpt.of(refused.body)
    return {
        "Time": refused.time,
        "Tag": printable(str(refused.tag), _MAX_REASON),
        "Reasons": reasons,
        "Record": record,
        **({"Note": "The record is too large to be shown in full."} if excerpt.is_cut else {}),
    }


class _Excerpt:
    """A part of an arbitrary value, small enough for the page."""

    def __init__(self) -> None:
        self.is_cut = False
        """True if something was left out."""
        self._left = _MAX_EXCERPT

    def of(self, value: Any, depth: int = 0) -> Any:
        """Return *value* as :func:`jsonable` does, without excess values and characters."""
        self._left -= 1
        if self._left <= 0 or depth > _MAX_DEPTH:
            self.is_cut = True
            return _LEFT_OUT
        if isinstance(value, Mapping):
            pairs = self._some(value.items())
            if all(isinstance(key, str) for key in islice(value, self._left)):
                return {self._cut(key): self.of(each, depth + 1) for key, each in pairs}
            return [[self.of(key, depth + 1), self.of(each, depth + 1)] for key, each in pairs]
        if isinstance(value, list | tuple):
            return [self.of(each, depth + 1) for each in self._some(value)]
        if isinstance(value, str | bytes):
            return self._cut(value)
        return jsonable(value)

    def _some(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield *values* while there is room for them."""
        for each in values:
            if self._left <= 0:
                self.is_cut = True
                return
            yield each

    def _cut(self, text: str | bytes) -> Any:
        kept = text[: max(self._left, 0)]
        self._left -= len(text)
        self.is_cut |= len(kept) < len(text)
        return jsonable(kept) if len(kept) == len(text) else jsonable(kept) + _LEFT_OUT


def state_of(agent: Agent, log: Log, since: int) -> str:
    """Return a line of JSON: the state of the agent, its connections, and its rates.

    :param since: the first second of the rates, since 1970.
    """
    address = agent.address
    state = {
        "address": address if isinstance(address, str) else "{}:{}".format(*address),
        "running": agent.is_running,
        "reading": agent.is_reading,
        "acknowledging": agent.is_acknowledging,
        "counts": dataclasses.asdict(agent.counts),
        "first": log.first,
        "next": log.next,
        "dropped": log.dropped,
        "now": time.time(),
        "links": [dataclasses.asdict(each) for each in log.links],
        "seconds": [dataclasses.astuple(each) for each in log.seconds if each.second >= since],
    }
    return dumps(state)
