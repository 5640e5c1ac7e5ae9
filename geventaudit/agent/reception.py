"""From packed entries to messages that are handed over: unpacking, the rules, and the counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore

from ..errors import FrameError, ValidationError, logger
from ..protocol.decoding import Entry, EntryReader, Frame
from ..protocol.messages import HEARTBEAT_FIELDS, message_of
from ..records import AuditType, Heartbeat, Message
from ..schema.addresses import service_tree_uuid
from ..schema.fields import TYPE_NAMES
from ..schema.rules import MsgSchema, RecordSchema, by_record
from ..schema.values import normal_form
from .arrivals import AgentCounts, Observer, Received, Refused
from .connections import Turn
from .shown import line_of_refusal

__all__ = ["Inspector", "Reception"]

_log = logger("agent")

_MAX_TOLD = 100
_MAX_FIELDS = 1000

# Other entries are unpacked and validated in native threads, so that the hub is free: one entry at a time for each
# range of sizes, so that a large one does not wait for huge ones.
_SMALL_BYTES = 2048
_INLINE_BYTES = 1 << 15
_INLINE_VALUES = 500
_LANE_BYTES = (1 << 14, 1 << 17)

# Good messages in shorter frames are handed over as soon as they are read.
_SHORT_FRAME_BYTES = 1 << 16

_RECORD_TAGS = (AuditType.DATA_PLANE, AuditType.CONTROL_PLANE)


class Inspector:
    """The rules for one entry. Has no state, so that several native threads can use it.

    :param schema: the rules for records.
    """

    def __init__(self, schema: RecordSchema | None) -> None:
        self._schema = MsgSchema(record=schema)
        record: Any = self._schema.fields["record"]
        self._names = {field.data_key for field in record.schema.load_fields.values()}

    def examine(self, tag: str, reader: EntryReader, piece: bytes) -> Received | Refused:
        """Return the message in a packed entry, or its refusal.

        :raises FrameError: *piece* is not an entry.
        """
        entry = reader.read(piece)
        try:
            return self._received(tag, entry)
        except (ValidationError, FrameError) as error:
            return Refused(error, tag, entry.time, entry.body)

    def _received(self, tag: str, entry: Entry) -> Received:
        if entry.problem:
            raise ValidationError(entry.problem)
        if len(entry.body) > _MAX_FIELDS:  # the schema would report each unknown field
            raise ValidationError(f"must have the fields of a record, has {len(entry.body)} fields")
        service_tree_id = None
        if tag in _RECORD_TAGS:
            message, extra = self._message(AuditType(tag), entry.body)
            if (given := extra.pop("env_ikey", None)) is not None:
                service_tree_id = service_tree_uuid(given)
        else:
            message = message_of(tag, entry.body)
            known = HEARTBEAT_FIELDS if isinstance(message, Heartbeat) else ()
            extra = {key: value for key, value in entry.body.items() if key not in known}
        extra = normal_form(extra) if extra else extra
        metadata = _plain(entry.metadata, "(metadata)") if entry.metadata else {}
        return Received(message, entry.time, service_tree_id, extra, metadata)

    def _message(self, kind: AuditType, body: dict[Any, Any]) -> tuple[Message, dict[Any, Any]]:
        """Return the record in a body, and the other keys of the body."""
        record: dict[Any, Any] = {}
        extra: dict[Any, Any] = {}
        for key, value in body.items():
            (record if key in self._names else extra)[key] = value
        try:
            return self._schema.load({"Type": TYPE_NAMES[kind], "Record": record}), extra
        except ValidationError as error:
            raise ValidationError(by_record(error.messages)) from None


def _plain(values: dict[Any, Any], name: str) -> dict[str, Any]:
    try:
        return normal_form(values)
    except ValidationError as error:
        raise ValidationError({name: error.messages}) from None


class Reception:
    """Validates the entries of frames, counts them, and hands them over.

    :param on_message, on_refused, schema: as for :class:`~geventaudit.agent.Agent`.
    """

    def __init__(
        self,
        on_message: Callable[[Received], object],
        on_refused: Callable[[Refused], object] | None,
        schema: RecordSchema | None,
    ) -> None:
        self.counts = AgentCounts()
        self.observer: Observer | None = None
        self._on_message = on_message
        self._on_refused = on_refused
        self._inspector = Inspector(schema)
        self._lanes = [BoundedSemaphore(1) for _ in range(len(_LANE_BYTES) + 1)]

    def take(self, frame: Frame, turn: Turn) -> None:
        """Hand over all messages of a frame.

        :raises FrameError: an entry is invalid. The entries before it have been handed over.
        """
        self.counts.frames += 1
        if frame.other_signal:
            refused_frame = Refused(ValidationError(f"must be logs, got {frame.other_signal}"), frame.tag, 0.0, {})
            self._refuse(refused_frame, len(frame.packed))
            turn.end_when_over()
            return
        reader = EntryReader(frame)
        is_at_once = turn.has_time and len(frame.packed) <= _SHORT_FRAME_BYTES and not frame.is_compressed
        good = refused = 0
        for piece in frame.pieces():
            if piece:
                if self._hand_over(frame.tag, reader, piece, tells=refused < _MAX_TOLD):
                    good += 1
                else:
                    refused += 1
            if refused or not is_at_once:
                turn.end_when_over()
        if not good:
            turn.end_when_over()
        if refused > _MAX_TOLD:
            _log.warning("refused %d more messages of one frame", refused - _MAX_TOLD)

    def _hand_over(self, tag: str, reader: EntryReader, piece: bytes, *, tells: bool) -> bool:
        """Hand over one message. Return False if it breaks the rules."""
        result = self._examine(tag, reader, piece)
        if isinstance(result, Refused):
            self._refuse(result, len(piece), tells=tells)
            return False
        self.counts.messages += 1
        self.counts.heartbeats += isinstance(result.message, Heartbeat)
        self._on_message(result)
        if self.observer is not None:
            self.observer.handed_over(result, len(piece))
        return True

    def _examine(self, tag: str, reader: EntryReader, piece: bytes) -> Received | Refused:
        if _is_little_work(piece, reader):
            return self._inspector.examine(tag, reader, piece)
        with self._lanes[bisect_left(_LANE_BYTES, len(piece))]:
            result = gevent.get_hub().threadpool.apply(_caught, (self._inspector.examine, tag, reader, piece))
        if isinstance(result, Exception):
            raise result
        examined: Received | Refused = result
        return examined

    def _refuse(self, refused: Refused, size: int, *, tells: bool = True) -> None:
        self.counts.refused += 1
        if self.observer is not None:
            self.observer.handed_over(refused, size)
        if not tells:
            return
        if self._on_refused is not None:
            self._on_refused(refused)
        else:
            _log.warning("refused a message: %s", line_of_refusal(refused))


def _is_little_work(piece: bytes, reader: EntryReader) -> bool:
    """Return True if an entry can be unpacked and validated in about 3 ms."""
    if len(piece) <= _SMALL_BYTES:
        return True
    return len(piece) <= _INLINE_BYTES and reader.count_values(piece) <= _INLINE_VALUES


def _caught(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result or the exception of *function*. gevent would print an exception of a thread."""
    try:
        return function(*arguments)
    except Exception as error:
        return error
