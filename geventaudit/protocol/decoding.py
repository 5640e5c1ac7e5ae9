"""Frames to messages. Pure: no I/O, no clock; the one place that unpacks MessagePack.

A receiver may meet more than one entry in a frame, options of any kind, and frames in pieces: :class:`Decoder` takes
a stream as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import msgpack

from ..errors import FrameError, logger, show
from ..records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Diagnostic,
    Heartbeat,
    Message,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from ..schema.values import MAX_VALUES, exact_datetime

__all__ = ["AckDecoder", "Decoder", "Entry", "Frame", "decode", "decoded", "message_of", "unpack_first"]

_MAX_ITEMS = 3 * MAX_VALUES  # in one entry from outside, nested ones too; no record of 1 MiB comes to so many
_ROOM = 1 << 20  # bytes of a buffer beyond the longest frame: for one read more
_MAX_ENTRIES = 1 << 16  # of one frame


class Entry(NamedTuple):
    """One event of a frame."""

    time: float
    """When it happened, in seconds since 1970."""
    body: dict[Any, Any]
    """What it says, as it came."""


class Frame(NamedTuple):
    """One whole frame of the Forward mode. Its entries stay packed until they are asked for."""

    tag: str
    """The type of its messages."""
    packed: bytes
    """Its events, one behind the other."""
    size: int
    """How many those are."""
    option: dict[Any, Any]
    """What the sender says of the frame; empty where it says nothing."""
    offset: int
    """Where it began in its stream, in bytes."""

    @property
    def chunk(self) -> str | None:
        """The token that the sender wants back as ``{"ack": chunk}``, or None."""
        chunk = self.option.get("chunk")
        return chunk if isinstance(chunk, str) else None

    @property
    def entries(self) -> list[Entry]:
        """All its events, in their order.

        :raises FrameError: one of them is none.
        """
        return list(self.unpack())

    def unpack(self, most: int = _MAX_ITEMS) -> Iterator[Entry]:
        """Its events one by one, since unpacked a small frame may take a hundred times its size.

        :param most: values that one of them may hold.
        :raises FrameError: at the first that is none. Agents keep those before it, send no acknowledgement, and close
            the connection.
        """
        reader = _Reader(len(self.packed), self.offset, most)
        reader.feed(self.packed)
        for index in range(self.size):
            yield _entry_of(reader.value(), index, self.offset)


class Decoder:
    """Takes the bytes of a stream as they come and gives the frames that are complete.

    :param max_frame_bytes: the most that one unfinished frame may hold.
    """

    def __init__(self, *, max_frame_bytes: int = 8 << 20) -> None:
        # It only finds where frames end: half a frame is kept as the bytes that it is.
        self._scanner = msgpack.Unpacker(max_buffer_size=max_frame_bytes + _ROOM, read_size=4096)
        self._pending = bytearray()
        self._start = 0
        self.max_frame_bytes = max_frame_bytes
        self.received = 0
        """Bytes fed so far."""

    @property
    def unfinished(self) -> int:
        """Bytes of the frame that is not complete yet; 0 between frames."""
        return self.received - self._start

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that *data* completes; iterate to the end before feeding more.

        :raises FrameError: at the first thing that is not a frame. The stream is lost then: where the next frame would
            begin cannot be known.
        """
        self.received += len(data)
        self._pending += data
        try:
            self._scanner.feed(data)
        except msgpack.BufferFull:
            raise self._too_long() from None
        while True:
            offset = self._start
            try:
                self._scanner.skip()
            except msgpack.OutOfData:
                if self.unfinished > self.max_frame_bytes:
                    raise self._too_long() from None
                return
            except Exception as error:  # msgpack's errors have no common base
                raise _no_msgpack(error, offset) from error
            self._start = self._scanner.tell()
            whole = bytes(self._pending[: self._start - offset])
            del self._pending[: len(whole)]
            yield _frame_of(whole, offset)

    def _too_long(self) -> FrameError:
        return FrameError(f"a frame of more than {self.max_frame_bytes} bytes", self._start)


class AckDecoder:
    """Takes the bytes that an agent answers and gives the chunks that it acknowledges."""

    def __init__(self) -> None:
        self._unpacker = _unpacker(4096, 64)
        self._received = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """The chunks acknowledged in *data*.

        :raises FrameError: it is anything else than acknowledgements.
        """
        try:
            self._unpacker.feed(data)
            for value in self._unpacker:
                chunk = value.get("ack") if isinstance(value, dict) else None
                if not isinstance(chunk, str):
                    raise FrameError(f"must be an acknowledgement, got {show(value)}", self._received)
                yield chunk
        except FrameError:
            raise
        except Exception as error:  # msgpack's errors have no common base
            raise _no_msgpack(error, self._received) from error
        self._received += len(data)


def unpack_first(data: bytes, max_bytes: int = 65536) -> tuple[Any, int] | None:
    """The first value in *data* and how many bytes it takes; None while it is not complete.

    For what is said before the first frame, where text may hold what is not UTF-8.

    :raises FrameError: it is not MessagePack, or longer than *max_bytes*.
    """
    unpacker = msgpack.Unpacker(
        raw=False, unicode_errors="surrogateescape", max_buffer_size=max_bytes, max_array_len=64, max_map_len=64
    )
    try:
        unpacker.feed(data)
        return unpacker.unpack(), unpacker.tell()
    except msgpack.OutOfData:
        return None
    except Exception as error:  # msgpack's errors have no common base
        raise _no_msgpack(error, 0) from error


def _unpacker(max_bytes: int, max_items: int, count: _Count | None = None) -> Any:
    # Text must be UTF-8. Nothing may be longer than the frame that holds it; the buffer has room for one read more.
    return msgpack.Unpacker(
        raw=False,
        strict_map_key=False,
        timestamp=0,
        read_size=min(max_bytes, 4096),
        max_buffer_size=max_bytes + _ROOM,
        max_str_len=max_bytes,
        max_bin_len=max_bytes,
        max_ext_len=max_bytes,
        max_array_len=min(max_bytes, max_items),  # room is made for what a header announces
        max_map_len=min(max_bytes, max_items // 2),
        list_hook=count and count.array,
        object_hook=count and count.map,
    )


def _no_msgpack(error: Exception, offset: int) -> FrameError:
    return FrameError(f"not MessagePack: {str(error) or type(error).__name__}", offset)


class _Count:
    """Refuses what unfolds into too much: a value may take one byte in a frame, and a hundred in memory."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def array(self, items: list[Any]) -> list[Any]:
        self._took(len(items))
        return items

    def map(self, items: dict[Any, Any]) -> dict[Any, Any]:
        self._took(2 * len(items))
        return items

    def _took(self, values: int) -> None:
        self.left -= values
        if self.left < 0:
            raise ValueError(f"more than {self.most} values in one")


class _Reader:
    """The values of one frame, one by one. All errors are a :class:`FrameError`.

    :param max_bytes: the most bytes that are fed.
    :param offset: of the frame in its stream, for the errors.
    :param most: values that one of them may hold.
    """

    def __init__(self, max_bytes: int, offset: int, most: int = _MAX_ITEMS) -> None:
        self._offset = offset
        self._count = _Count(most)  # an object of its own: hooks that belong to the reader would be a cycle
        self._unpacker = _unpacker(max(max_bytes, 1), most, self._count)

    def feed(self, data: bytes) -> None:
        self._unpacker.feed(data)

    def value(self) -> Any:
        self._count.left = self._count.most
        try:
            return self._unpacker.unpack()
        except Exception as error:  # msgpack's errors have no common base
            raise _no_msgpack(error, self._offset) from error

    def only_value(self, data: bytes) -> Any:
        """Return the value that *data* is."""
        self._unpacker.feed(data)
        return self.value()


class _Scanner:
    """The positions of the parts of one complete frame. Unpacks no values.

    The pure-Python msgpack applies the limits for values when it skips them too, the C extension does not. So this
    unpacker has no limits; a complete frame cannot announce more than it holds. All errors are a :class:`FrameError`.
    """

    def __init__(self, frame: bytes, offset: int) -> None:
        self._frame = frame
        self._offset = offset
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=len(frame) + _ROOM, max_ext_len=len(frame), read_size=min(len(frame), 4096)
        )
        self._unpacker.feed(frame)

    @property
    def position(self) -> int:
        return int(self._unpacker.tell())

    def at_array(self) -> bool:
        first = self._frame[self.position]
        return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)

    def array_header(self) -> int:
        try:
            return int(self._unpacker.read_array_header())
        except Exception as error:  # msgpack's errors have no common base
            raise _no_msgpack(error, self._offset) from error

    def skip(self, count: int = 1) -> bytes:
        """Return the bytes of *count* values, and go on behind them."""
        start = self.position
        try:
            for _ in range(count):
                self._unpacker.skip()
        except Exception as error:  # msgpack's errors have no common base
            raise _no_msgpack(error, self._offset) from error
        return self._frame[start : self.position]


def _frame_of(whole: bytes, offset: int) -> Frame:
    scanner, reader = _Scanner(whole, offset), _Reader(len(whole), offset)
    if not scanner.at_array():
        raise FrameError(f"a frame must be an array, got {show(reader.only_value(whole))}", offset)
    size = scanner.array_header()
    if not 2 <= size <= 3:
        raise FrameError(f"a frame must have 2 or 3 elements, has {size}", offset)
    tag = reader.only_value(scanner.skip())
    if not isinstance(tag, str):
        raise FrameError(f"the tag must be text, got {show(tag)}", offset)
    if not scanner.at_array():
        entries = reader.only_value(scanner.skip())
        raise FrameError(
            f"the entries must be an array (only the Forward mode is spoken here), got {show(entries)}", offset
        )
    count = scanner.array_header()
    if count > _MAX_ENTRIES:
        raise FrameError(f"a frame must have at most {_MAX_ENTRIES} entries, has {count}", offset)
    packed = scanner.skip(count)
    option = reader.only_value(scanner.skip()) if size == 3 else None
    if not isinstance(option, dict | None):
        raise FrameError(f"the option must be a map, got {show(option)}", offset)
    return Frame(tag, packed, count, option or {}, offset)


def _entry_of(entry: Any, index: int, offset: int) -> Entry:
    if not isinstance(entry, list) or len(entry) != 2:
        raise FrameError(f"entry {index} must be an array of a time and a map, got {show(entry)}", offset)
    time, body = entry
    seconds = _seconds_of(time)
    if seconds is None:
        raise FrameError(f"the time of entry {index} must be a finite number or an EventTime, got {show(time)}", offset)
    if not isinstance(body, dict):
        raise FrameError(f"the record of entry {index} must be a map, got {show(body)}", offset)
    return Entry(seconds, body)


def _seconds_of(time: Any) -> float | None:
    if isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time):
        return time
    if isinstance(time, msgpack.ExtType) and time.code == 0 and len(time.data) == 8:
        # Fluent's EventTime: two big-endian 32-bit numbers, seconds and nanoseconds.
        return int.from_bytes(time.data[:4], "big") + int.from_bytes(time.data[4:], "big") / 1e9
    return None


def decode(frame: bytes) -> tuple[Message, int]:
    """The one message in *frame*, and its time in seconds since 1970: what
    :func:`~geventaudit.encoder.encoding.encode` was given.

    The message is not validated; :class:`~geventaudit.MsgSchema` does that.

    :raises FrameError: when it is anything else than one whole frame with one message.
    """
    decoder = Decoder(max_frame_bytes=max(len(frame), 1))
    frames = list(decoder.feed(frame))
    if len(frames) != 1 or decoder.unfinished:
        raise FrameError(f"must be one whole frame, got {len(frames)} and {decoder.unfinished} bytes of another")
    if frames[0].size != 1:
        raise FrameError(f"must have one entry, has {frames[0].size}")
    (entry,) = frames[0].unpack(len(frame))  # whatever was once accepted comes back
    return message_of(frames[0].tag, entry.body), math.floor(entry.time)


def decoded(frames: Iterable[bytes]) -> list[Msg]:
    """Return the messages in *frames*, which were accepted once. A frame that cannot be decoded is logged."""
    messages = []
    for frame in frames:
        try:
            messages.append(cast(Msg, decode(frame)[0]))
        except Exception as error:  # it must not cost the others
            logger().error("a frame of %d bytes cannot be decoded, and is not handed back: %s", len(frame), error)
    return messages


def message_of(tag: str, body: Mapping[Any, Any]) -> Message:
    """The message that a tag and a body stand for, not validated.

    :raises FrameError: for a tag of no audit type, and for a body that does not have the shape of its message.
    """
    try:
        kind = AuditType(tag)
        if kind is AuditType.HEARTBEAT:
            return Heartbeat(
                service_id=body["AsmAuditServiceId"],
                audit_version=body["AuditVersion"],
                os_version=body["OsVersion"],
                language=body["Language"],
                destination=body["Destination"],
            )
        if kind is AuditType.DIAGNOSTIC:
            return Diagnostic()
        return Msg(kind, _record_of(body))
    except KeyError as error:
        raise FrameError(f"{tag}: the body has no {error}") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FrameError(f"{show(tag)}: {error}") from None


def _record_of(body: Mapping[Any, Any]) -> Record:
    return Record(
        operation_name=body["OperationName"],
        operation_categories=[OperationCategory(each) for each in body["OperationCategories"]],
        operation_category_description=body["OperationCategoryDescription"],
        operation_type=OperationType(body["OperationType"]),
        operation_result=OperationResult(body["OperationResult"]),
        operation_result_description=body["OperationResultDescription"],
        operation_access_level=body["OperationAccessLevel"],
        caller_agent=body["CallerAgent"],
        caller_ip_address=body["CallerIpAddress"],
        caller_identities={
            CallerIdentityType(kind): [CallerIdentity(one["Identity"], one["Description"]) for one in identities]
            for kind, identities in body["CallerIdentities"].items()
        },
        caller_access_levels=list(body["CallerAccessLevels"]),
        target_resources={
            kind: [TargetResource(one["Name"], one["Cluster"], one["DataCenter"], one["Region"]) for one in targets]
            for kind, targets in body["TargetResources"].items()
        },
        custom_data=_with_datetimes(body.get("CustomData", {})),
    )


def _with_datetimes(value: Any) -> Any:
    """Unpacked custom data with its timestamps as datetimes, where a datetime can say the same."""
    if isinstance(value, dict):
        return {key: _with_datetimes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_datetimes(each) for each in value]
    return exact_datetime(value) if isinstance(value, msgpack.Timestamp) else value
