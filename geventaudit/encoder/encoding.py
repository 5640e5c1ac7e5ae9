"""Encoding of messages to frames. Pure: no I/O, no clock. Only stamps are packed elsewhere.

A frame is one message in the *Forward* mode of the Fluent protocol::

    [tag, [[unix seconds, body]], {"TimeFormat": "DateTime"}]

The tag is the value of the :class:`~geventaudit.AuditType`. The body is a map; its keys are in the order of the
reference implementation of the audit protocol. ``tests/golden`` records that order and every spelling in a body.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeAlias

import msgpack

from ..errors import ValidationError, show
from ..records import AuditType, Diagnostic, Heartbeat, Message, Msg, Record
from ..schema.addresses import canonical_address, service_tree_uuid
from ..schema.json_safe import json_safe as json_safe_form
from ..schema.rules import sorted_categories, sorted_identities, sorted_levels
from ..schema.sealed import sealed_form
from .draft import EMPTY_STAMP, KEY

__all__ = [
    "DEFAULT_MAX_FRAME_BYTES",
    "OPTION_BYTES",
    "TAG_AT",
    "TAG_END",
    "Datetimes",
    "Encoder",
    "Packed",
    "array_header",
    "bundle",
    "encode",
    "envelope",
    "map_header",
    "pack",
    "record_body",
    "reserved",
    "tag_bytes",
    "text_packer",
]

DEFAULT_MAX_FRAME_BYTES = 1 << 20
"""1 MiB. Fluent Bit closes the connection on a frame above 6,144,000 bytes."""

Datetimes: TypeAlias = Literal["extension", "text"]
"""The form of times in custom data: MessagePack's timestamp extension (as in the reference), or ISO 8601 text."""

# The errors of records that were not validated. msgpack's errors have no common base; the last three come from its
# pure-Python version.
_INVALID = (
    TypeError,
    ValueError,
    OverflowError,
    KeyError,
    AttributeError,
    AssertionError,
    RecursionError,
    struct.error,
)

_Packer = msgpack.Packer
# The buffer grows if necessary. msgpack's default of 256 KiB costs a system call with some allocators.
_BUFFER_BYTES = 4096

_OPTION = {"TimeFormat": "DateTime"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Encoder:
    """An encoder of messages to frames. Immutable, so threads and nested calls may share one.

    :param service_tree_id: written as ``env_ikey`` into every record; None leaves it out.
    :param datetimes: see :data:`Datetimes`.
    :param json_safe: replace or refuse custom data that JSON cannot carry; see :mod:`geventaudit.schema.json_safe`.
    :param is_stamped: True to leave place for a stamp, by the plan; :meth:`encode` leaves none.
    :param is_sealed: True to write the canonical form that a seal covers; see :mod:`geventaudit.schema.sealed`.
    :param max_frame_bytes: the longest frame; a longer one is refused.
    :raises ValidationError: the service tree id is not a UUID, or is the nil UUID.
    :raises ValueError, TypeError: another argument is invalid.
    """

    def __init__(
        self,
        service_tree_id: object | None = None,
        *,
        datetimes: Datetimes = "extension",
        json_safe: bool = False,
        is_stamped: bool = False,
        is_sealed: bool = False,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    ) -> None:
        if datetimes not in ("extension", "text"):
            raise ValueError(f"datetimes must be 'extension' or 'text', got {show(datetimes)}")
        if not isinstance(json_safe, bool):
            raise TypeError(f"json_safe must be True or False, got {show(json_safe)}")
        if not isinstance(max_frame_bytes, int) or max_frame_bytes < 1:
            raise ValueError(f"max_frame_bytes must be a whole number of at least 1, got {show(max_frame_bytes)}")
        self.service_tree_id = None if service_tree_id is None else service_tree_uuid(service_tree_id)
        self.max_frame_bytes = max_frame_bytes
        self.native: frozenset[type] = frozenset({datetime}) if datetimes == "extension" else frozenset()
        """Types in custom data that MessagePack packs natively, without a hook."""
        self.json_safe = json_safe
        self.is_stamped = is_stamped
        self.is_sealed = is_sealed
        self._default = _as_extension if datetimes == "extension" else _as_text

    def pack(self, value: Any) -> bytes:
        """Return *value* as MessagePack. Thread-safe and re-entrant.

        A signal handler, a ``__del__`` method or a ``tzinfo`` may call this method again while the ``default`` hook
        runs. So no Packer is shared between calls: a Packer that is entered twice, or used again after an exception,
        writes garbled frames. A new Packer costs about 0.15 microseconds.

        :raises Exception: msgpack or the hook raised.
        """
        packed: bytes = _Packer(default=self._default, buf_size=_BUFFER_BYTES).pack(value)
        return packed

    def pack_custom_data(self, data: dict[str, Any]) -> bytes:
        """Return custom data in normal form as MessagePack. Thread-safe and re-entrant.

        :raises Exception: see :meth:`pack`.
        :raises ValidationError: JSON (with ``json_safe``) or a sealed record cannot carry a value.
        """
        return self.pack(self._form_of(data))

    def pack_with_stamp(self, data: dict[str, Any]) -> tuple[bytes, int]:
        """Return custom data in normal form as MessagePack with an empty stamp, and the place of its nil.

        :raises Exception: see :meth:`pack_custom_data`; a ``ValidationError`` for the reserved key.
        """
        data = self._form_of(data)
        if KEY in data:
            raise reserved(KEY)
        head, after = map_header(len(data) + 1), data
        if self.is_sealed and data and min(data) < KEY:
            before = {key: value for key, value in data.items() if key < KEY}
            after = {key: value for key, value in data.items() if key > KEY}
            head += self.pack(before)[len(map_header(len(before))) :]
        tail = self.pack(after)[len(map_header(len(after))) :]
        return head + EMPTY_STAMP + tail, len(head) + len(EMPTY_STAMP) - 1

    def _form_of(self, data: dict[str, Any]) -> dict[str, Any]:
        if self.is_sealed:
            return sealed_form(data)
        return json_safe_form(data) if self.json_safe else data

    def encode(self, message: Message, unix_time: float) -> bytes:
        """Return the frame of *message*. Its record must be in the normal form that its schema loads.

        :param unix_time: the time of the event in seconds since 1970; the frame holds whole seconds.
        :raises ValidationError: *message* cannot be packed, or the frame is longer than ``max_frame_bytes``. Validated
            messages fail only for their length.
        """
        try:
            tag, body = self._parts(message)
            frame = self.pack((tag, ((math.floor(unix_time), body),), _OPTION))
        except _INVALID as error:
            raise ValidationError({"_schema": [f"must be a valid message: {error}"]}) from error
        if len(frame) > self.max_frame_bytes:
            raise ValidationError(
                {"_schema": [f"must fit into a frame of {self.max_frame_bytes} bytes, takes {len(frame)}"]}
            )
        return frame

    def _parts(self, message: Message) -> tuple[str, dict[str, Any]]:
        if isinstance(message, Msg):
            body = record_body(message.record, self.service_tree_id, is_sealed=self.is_sealed)
            if "CustomData" in body:
                body["CustomData"] = self._form_of(body["CustomData"])
            return AuditType(message.type).value, body
        if isinstance(message, Heartbeat):
            return AuditType.HEARTBEAT.value, {
                "AsmAuditServiceId": message.service_id,
                "AuditVersion": message.audit_version,
                "OsVersion": message.os_version,
                "Language": message.language,
                "Destination": message.destination,
            }
        if isinstance(message, Diagnostic):
            return AuditType.DIAGNOSTIC.value, {}
        raise TypeError(f"got {show(message)} ({type(message).__name__})")


def reserved(key: str) -> ValidationError:
    """Return the error of custom data with the reserved key."""
    return ValidationError({"CustomData": {key: ["is reserved for the stamp (stamp=True): use another key"]}})


def record_body(record: Record, service_tree_id: str | None, *, is_sealed: bool = False) -> dict[str, Any]:
    """Return the body of a record, its keys in the order of the wire. *is_sealed* sorts the targets too."""
    body: dict[str, Any] = {} if service_tree_id is None else {"env_ikey": service_tree_id}
    body["CallerIpAddress"] = canonical_address(str(record.caller_ip_address))[0]
    body["CallerIdentities"] = {
        kind: [{"Identity": one.identity, "Description": one.description} for one in identities]
        for kind, identities in sorted_identities(record.caller_identities)
    }
    body["OperationCategories"] = sorted_categories(record.operation_categories)
    if record.custom_data:
        body["CustomData"] = record.custom_data
    body["TargetResources"] = {
        kind: [
            {"Name": one.name, "Cluster": one.cluster, "DataCenter": one.data_center, "Region": one.region}
            for one in targets
        ]
        for kind, targets in record.target_resources.items()
    }
    if is_sealed:
        targets = body["TargetResources"]
        body["TargetResources"] = {
            kind: [dict(sorted(one.items())) for one in targets[kind]] for kind in sorted(targets)
        }
    body["CallerAccessLevels"] = sorted_levels(record.caller_access_levels)
    body["OperationAccessLevel"] = record.operation_access_level
    body["OperationName"] = record.operation_name
    body["OperationResultDescription"] = record.operation_result_description
    body["CallerAgent"] = record.caller_agent
    body["OperationCategoryDescription"] = record.operation_category_description
    body["OperationType"] = record.operation_type
    body["OperationResult"] = record.operation_result
    return body


def _as_extension(value: Any) -> Any:
    """Return an aware datetime as a MessagePack timestamp, exactly (a float would round it).

    :raises TypeError: *value* is something else.
    """
    if isinstance(value, datetime) and value.utcoffset() is not None:
        seconds, microseconds = divmod((value - _EPOCH) // _MICROSECOND, 1_000_000)
        return msgpack.Timestamp(seconds, microseconds * 1000)
    raise TypeError(f"MessagePack cannot carry {show(value)} ({type(value).__name__})")


def _as_text(value: Any) -> Any:
    if isinstance(value, datetime) and value.utcoffset() is not None:
        return value.isoformat()
    return _as_extension(value)


def encode(
    message: Message,
    unix_time: float,
    service_tree_id: object | None = None,
    *,
    datetimes: Datetimes = "extension",
    json_safe: bool = False,
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
) -> bytes:
    """Return the frame of *message*. For many messages, use one :class:`Encoder`.

    :raises ValidationError: see :meth:`Encoder.encode`.
    """
    encoder = Encoder(service_tree_id, datetimes=datetimes, json_safe=json_safe, max_frame_bytes=max_frame_bytes)
    return encoder.encode(message, unix_time)


def pack(value: Any) -> bytes:
    """Return any value as MessagePack, for messages of the protocol that are not frames."""
    packed: bytes = msgpack.packb(value)
    return packed


_TEXT_HEADERS = [msgpack.packb("x" * size)[: -size or None] for size in range(64)]


def text_packer(before: bytes, *, empty: bool, blank: bool) -> Callable[[str], bytes]:
    """Return a function that returns *before* and a packed ``str``. Short texts take a third of a Packer's time.

    The function raises ``UnicodeEncodeError`` for lone surrogates, and ``ValueError`` for a forbidden text.

    :param empty: True to allow an empty text.
    :param blank: True to allow a text that is empty or all white space.
    """
    headers = [before + header for header in _TEXT_HEADERS]

    def pack_text(text: str) -> bytes:
        if not (text or empty) or not (blank or (text and not text.isspace())):
            raise ValueError("empty, or perhaps blank")
        data = text.encode()
        return headers[len(data)] + data if len(data) < len(headers) else before + pack(text)

    return pack_text


def array_header(size: int) -> bytes:
    """Return the header of an array of *size* values."""
    header: bytes = msgpack.Packer().pack_array_header(size)
    return header


_MAP_HEADERS = [bytes((0x80 + size,)) for size in range(16)]


def map_header(size: int) -> bytes:
    """Return the header of a map of *size* keys, each with its value."""
    if size < len(_MAP_HEADERS):
        return _MAP_HEADERS[size]
    header: bytes = msgpack.Packer().pack_map_header(size)
    return header


class Packed(dict[Any, bytes]):
    """A bounded cache of packed values. Thread-safe and re-entrant.

    Most texts of an audit trail repeat. A full cache keeps its entries until many lookups missed, and is then cleared:
    replacing an entry at each miss would cost as much as packing. Threads that miss the same value at the same time
    each pack the value.

    :param pack: packs a missing value. Its exceptions propagate from the lookup.
    """

    MAX_ENTRIES = 1024
    """The most entries."""
    MAX_BYTES = 256
    """The most bytes of an entry."""
    RESET_AFTER_MISSES = 8 * MAX_ENTRIES
    """The misses of a full cache after which the cache is cleared."""

    def __init__(self, pack: Callable[[Any], bytes]) -> None:
        self._pack = pack
        # Misses before a full cache is cleared. A race between threads may lose a step, which is harmless.
        self._left = self.RESET_AFTER_MISSES

    def __missing__(self, value: Any) -> bytes:
        packed = self._pack(value)
        # By the size, without a separate counter: a nested call or another thread may run between any two steps.
        if len(self) < self.MAX_ENTRIES:
            if len(packed) <= self.MAX_BYTES:
                self[value] = packed
            return packed
        left = self._left = self._left - 1
        if left <= 0:
            self.clear()
            self._left = self.RESET_AFTER_MISSES
        return packed


TAG_AT = len(msgpack.packb([]))
"""The place of the tag in every frame."""
TAG_END = TAG_AT + len(msgpack.packb(AuditType.DATA_PLANE.value))
"""The place behind the tag; all four tags have the same length."""
_ENTRY_START = TAG_END + 1  # behind the header of the array of one entry
OPTION_BYTES = len(msgpack.packb(_OPTION))
"""The length of the options at the end of every frame."""
_ENTRY_END = -OPTION_BYTES


def tag_bytes(frame: bytes) -> bytes:
    """The part of a frame, made here, that is the same in all frames of its tag."""
    return frame[:TAG_END]


def envelope(kind: AuditType) -> tuple[bytes, bytes]:
    """Return the bytes before the time, and those after the body, in every frame of *kind*."""
    frame = pack((kind.value, ((0, None),), _OPTION))
    return frame[: _ENTRY_START + len(array_header(2))], frame[_ENTRY_END:]


def bundle(frames: Sequence[bytes], chunk: str) -> bytes:
    """Return one frame with the entries of *frames* and a ``chunk``, which the agent must acknowledge.

    :param frames: frames of this module, all of one tag.
    """
    packer = msgpack.Packer(autoreset=False)
    packer.pack_array_header(len(frames))
    return b"".join(
        (
            frames[0][:TAG_END],
            packer.bytes(),
            *(frame[_ENTRY_START:_ENTRY_END] for frame in frames),
            msgpack.packb({**_OPTION, "size": len(frames), "chunk": chunk}),
        )
    )
