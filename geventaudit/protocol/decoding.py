"""Frames to messages. Pure: no I/O, no clock.

:class:`Decoder` takes a stream in pieces of any size, in each mode of the Forward protocol, with any options.

=============  ========================================================================================================
mode           frame
=============  ========================================================================================================
Message        ``[tag, time, record]`` or ``[tag, time, record, option]``
Forward        ``[tag, [entry, ...]]`` or ``[tag, [entry, ...], option]``
PackedForward  ``[tag, packed]`` or ``[tag, packed, option]``: text or bytes that hold entries, one after the other;
               compressed with gzip if the option has ``{"compressed": "gzip"}``
=============  ========================================================================================================

An entry is ``[time, record]`` or, from Fluent Bit, ``[[time, metadata], record]``. A time is an integer, a float, or
Fluent's EventTime.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from ..errors import FrameError, logger, show
from ..records import Message, Msg
from .messages import message_of
from .unpacking import EventTime, OutOfData, Scanner, ValueReader, is_array, kind_of, unpack_error, unpacker

__all__ = [
    "AckDecoder",
    "Decoder",
    "Entry",
    "EntryReader",
    "Frame",
    "decode",
    "decoded",
    "unpack_first",
]

_MAX_ENTRIES = 1 << 16  # of one frame
_MAX_PART_BYTES = 1 << 14  # of a tag, and of an option: both are unpacked with the frame
_MODES = "an array (Forward), packed entries as bytes or text (PackedForward), or a time (Message)"


class Entry(NamedTuple):
    """An entry of a frame."""

    time: float
    """The time of the event, in seconds since 1970."""
    body: dict[Any, Any]
    """The record as it arrived."""
    metadata: dict[Any, Any] = {}  # noqa: RUF012  # never changed
    """The metadata of ``[[time, metadata], record]``."""
    problem: str = ""
    """The reason for which the record cannot be used, or "". The stream is not affected."""


class Frame(NamedTuple):
    """A whole frame. Its entries stay packed until they are read."""

    tag: str
    """The type of its messages."""
    packed: bytes
    """Its entries, one after the other; compressed if the option says so."""
    option: dict[Any, Any]
    """The option of the sender; empty without one."""
    offset: int
    """The start of the frame in its stream, in bytes."""
    max_bytes: int
    """The most bytes of its entries after decompression."""

    @property
    def chunk(self) -> str | None:
        """The token for the acknowledgement ``{"ack": chunk}``, or None."""
        return self.option.get("chunk")

    @property
    def is_compressed(self) -> bool:
        """True if the entries are compressed with gzip."""
        return self.option.get("compressed") == "gzip"

    @property
    def other_signal(self) -> str:
        """The kind of the entries, "" for logs. Fluent Bit sends metrics and traces in such frames too."""
        signal = self.option.get("fluent_signal", 0)
        return "" if signal == 0 else {1: "metrics", 2: "traces"}.get(signal, "no logs")

    @property
    def entries(self) -> list[Entry]:
        """All entries, in their order.

        :raises FrameError: an entry is invalid.
        """
        return list(self.unpack())

    def unpack(self, reader: EntryReader | None = None) -> Iterator[Entry]:
        """Yield the entries.

        :param reader: a reader with other limits than those for frames of others.
        :raises FrameError: an entry is invalid. Agents keep the entries before it, send no acknowledgement, and close
            the connection.
        """
        reader = reader or EntryReader(self)
        return (reader.read(piece) for piece in self.pieces() if piece)

    def pieces(self) -> Iterator[bytes]:
        """Yield the packed entries, and ``b""`` between steps of the work, where the caller may let others run.

        :raises FrameError: the bytes are not MessagePack, not gzip, or too many. A frame with damaged gzip yields no
            entry.
        """
        if not self.is_compressed:
            return self._split([self.packed], self.max_bytes)
        return self._inflated()

    def _inflated(self) -> Iterator[bytes]:
        from .inflation import inflate  # agents need it, and clients never

        # Twice: the checksum at the end must be right before any entry is used.
        for _ in inflate(self.packed, self.max_bytes, self.offset):
            yield b""
        yield from self._split(inflate(self.packed, self.max_bytes, self.offset), self.max_bytes // 4)

    def _split(self, blocks: Iterable[bytes], most: int) -> Iterator[bytes]:
        scanner, pending = Scanner(self.max_bytes, self.offset), bytearray()
        start = count = 0
        for block in blocks:
            scanner.feed(block)
            pending += block
            try:
                while True:
                    end = scanner.skip()
                    count += 1
                    if count > _MAX_ENTRIES:
                        raise _too_many_entries(self.offset)
                    piece = bytes(memoryview(pending)[: end - start])
                    del pending[: end - start]  # before the yield, after which the piece may wait for its turn
                    start = end
                    yield piece
            except OutOfData:
                if len(pending) > most:
                    raise FrameError(f"a compressed entry of more than {most} bytes", self.offset) from None
                yield b""
        if pending:
            raise FrameError("the packed entries end in the middle of one", self.offset)


class EntryReader:
    """Unpacks the entries of one frame.

    :param is_own: True for a frame of this library, to which the limits of ``send`` apply.
    """

    def __init__(self, frame: Frame, *, is_own: bool = False) -> None:
        self._offset = frame.offset
        self._index = -1
        # In Message mode, Fluent Bit puts the metadata into the option.
        metadata = frame.option.get("metadata")
        self._metadata = metadata if isinstance(metadata, dict) else {}
        length = len(frame.packed)
        if is_own:
            self._reader = ValueReader(length, frame.offset, length, length)
        else:
            self._reader = ValueReader(frame.max_bytes, frame.offset)

    def read(self, piece: bytes) -> Entry:
        """Return the entry that :meth:`Frame.pieces` yielded as *piece*.

        :raises FrameError: *piece* is not an entry.
        """
        self._index += 1
        value = self._reader.read(piece)
        if not isinstance(value, list) or len(value) != 2:
            raise self._wrong("must be an array of a time and a map", value, "")
        time, body = value
        metadata: Any = self._metadata
        if isinstance(time, list) and len(time) == 2:
            time, metadata = time
        seconds = _seconds_of(time)
        if seconds is None:
            raise self._wrong("must be a finite number or an EventTime", time, "the time of ")
        if not isinstance(metadata, dict | None):
            raise self._wrong("must be a map", metadata, "the metadata of ")
        if not isinstance(body, dict):
            raise self._wrong("must be a map", body, "the record of ")
        return Entry(seconds, body, metadata or {}, self._reader.problem)

    def count_values(self, piece: bytes) -> int:
        """Return the number of values in the arrays and maps of a packed entry, nested ones included.

        :raises FrameError: there are too many.
        """
        self._reader.read(piece)
        return self._reader.values

    def _wrong(self, right: str, got: object, part: str) -> FrameError:
        return FrameError(f"{part}entry {self._index} {right}, got {show(got)}", self._offset)


class Decoder:
    """Splits a stream of bytes into frames.

    :param max_frame_bytes: the most bytes of one incomplete frame, and of compressed entries after decompression. One
        compressed entry has at most a quarter of it: a few bytes of gzip make a long one.
    """

    def __init__(self, *, max_frame_bytes: int = 8 << 20) -> None:
        # An incomplete frame is kept as bytes, with the ends of its parts.
        self._scanner = Scanner(max_frame_bytes)
        self._pending = bytearray()
        self._start = 0
        self._parts = _Parts()
        self.max_frame_bytes = max_frame_bytes
        self.received = 0
        """Bytes fed so far."""

    @property
    def unfinished(self) -> int:
        """Bytes of the incomplete frame; 0 between frames."""
        return self.received - self._start

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that *data* completes. Iterate to the end before the next call.

        :raises FrameError: the stream is not valid. It cannot be continued: the start of the next frame is unknown.
        """
        self.received += len(data)
        self._pending += data
        if not self._scanner.feed(data):
            raise self._too_long()
        while True:
            self._scanner.offset = self._start
            try:
                self._scan()
            except OutOfData:
                if self.unfinished > self.max_frame_bytes:
                    raise self._too_long() from None
                return
            parts, self._parts = self._parts, _Parts()
            end = parts.ends[-1]
            whole = bytes(self._pending[: end - self._start])
            del self._pending[: len(whole)]
            offset, self._start = self._start, end
            yield _frame_of(whole, parts, offset, self.max_frame_bytes)

    def _scan(self) -> None:
        """Find the ends of the parts of the next frame.

        :raises OutOfData: the frame is incomplete. The next call continues.
        """
        scanner, parts = self._scanner, self._parts
        if not parts.size:
            self._scan_header()
        while len(parts.ends) <= parts.size:
            if len(parts.ends) == 2 and parts.count is None:
                # Both calls raise OutOfData before anything is changed.
                is_forward = is_array(self._byte_at(scanner.position))
                parts.count = self._scan_entries_header() if is_forward else -1
                parts.left = parts.count if is_forward else 1
            while parts.left:
                scanner.skip()
                parts.left -= 1
            parts.ends.append(scanner.position)
            parts.left = 1

    def _scan_header(self) -> None:
        first = self._byte_at(self._start)
        if not is_array(first):
            raise FrameError(f"a frame must be an array, got {kind_of(first)}", self._start)
        size = self._scanner.array_header()
        if not 2 <= size <= 4:
            raise FrameError(f"a frame must have 2 to 4 elements, has {size}", self._start)
        self._parts.size = size
        self._parts.ends.append(self._scanner.position)

    def _scan_entries_header(self) -> int:
        count = self._scanner.array_header()
        if count > _MAX_ENTRIES:
            raise _too_many_entries(self._start, count)
        self._parts.entries = self._scanner.position
        return count

    def _byte_at(self, position: int) -> int:
        if position >= self.received:
            raise OutOfData
        return self._pending[position - self._start]

    def _too_long(self) -> FrameError:
        return FrameError(f"a frame of more than {self.max_frame_bytes} bytes", self._start)


class _Parts:
    """The scanned parts of a frame. Positions are bytes of the stream."""

    def __init__(self) -> None:
        self.size = 0
        """The number of elements; 0 before the header."""
        self.ends: list[int] = []
        """The ends of the header and of the elements."""
        self.count: int | None = None
        """The number of entries; -1 if the second element is not an array; None before that element."""
        self.entries = 0
        """The start of the first entry; 0 if the second element is not an array."""
        self.left = 1
        """Values up to the end of the next element."""


class AckDecoder:
    """Splits the bytes that an agent sends into acknowledgements."""

    def __init__(self) -> None:
        self._unpacker = unpacker(4096, 64)
        self._received = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the chunks that *data* acknowledges.

        :raises FrameError: *data* holds something other than acknowledgements.
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
            raise unpack_error(error, self._received) from error
        self._received += len(data)


def unpack_first(data: bytes, max_bytes: int = 65536) -> tuple[Any, int] | None:
    """Return the first value in *data* and its number of bytes; None if the value is incomplete.

    For the handshake, before the first frame.

    :raises FrameError: *data* is not MessagePack, or longer than *max_bytes*.
    """
    first = unpacker(max_bytes, 64, text_errors="surrogateescape")
    try:
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        first.feed(data)
        return first.unpack(), first.tell()
    except OutOfData:
        return None
    except Exception as error:
        raise unpack_error(error, 0) from error


def _frame_of(whole: bytes, parts: _Parts, offset: int, max_bytes: int) -> Frame:
    def part(index: int) -> bytes:
        return whole[parts.ends[index] - offset : parts.ends[index + 1] - offset]

    tag = _tag_of(part(0), offset)
    second = part(1)
    last = 2
    if parts.entries:
        packed = whole[parts.entries - offset : parts.ends[2] - offset]
    elif (payload := _payload_of(second)) is not None:
        packed = payload
    elif parts.size >= 3:
        packed = b"\x92" + second + part(2)
        last = 3
    else:
        raise FrameError(f"the second element must be {_MODES}, got {kind_of(second[0])}", offset)
    if parts.size > last + 1:
        raise FrameError(f"a frame of this mode must have at most {last + 1} elements, has {parts.size}", offset)
    return Frame(tag, packed, _option_of(part(last) if parts.size > last else b"\xc0", offset), offset, max_bytes)


def _payload_of(packed: bytes) -> bytes | None:
    """Return the bytes of a packed text or of packed bytes; None for other values."""
    first = packed[0]
    if 0xA0 <= first <= 0xBF:
        return packed[1:]
    header = {0xD9: 2, 0xC4: 2, 0xDA: 3, 0xC5: 3, 0xDB: 5, 0xC6: 5}.get(first)
    return None if header is None else packed[header:]


def _tag_of(packed: bytes, offset: int) -> str:
    payload = _payload_of(packed)
    if payload is None or packed[0] in (0xC4, 0xC5, 0xC6):
        raise FrameError(f"the tag must be text, got {kind_of(packed[0])}", offset)
    if len(packed) > _MAX_PART_BYTES:
        raise FrameError(f"the tag must have at most {_MAX_PART_BYTES} bytes, has {len(packed)}", offset)
    return payload.decode("utf-8", "surrogateescape")


def _option_of(packed: bytes, offset: int) -> dict[Any, Any]:
    if packed in (b"\xc0", b"\x80"):
        return {}
    if len(packed) > _MAX_PART_BYTES:
        raise FrameError(f"the option must have at most {_MAX_PART_BYTES} bytes, has {len(packed)}", offset)
    reader = ValueReader(len(packed), offset)
    option = reader.read(packed)
    if reader.problem:
        raise FrameError(f"the option is invalid: {reader.problem}", offset)
    if not isinstance(option, dict | None):
        raise FrameError(f"the option must be a map, got {show(option)}", offset)
    if option is None:
        return {}
    if not isinstance(option.get("chunk"), str | None):
        raise FrameError(f"the chunk must be text, got {show(option['chunk'])}", offset)
    if option.get("compressed") not in (None, "text", "gzip"):
        raise FrameError(f"the entries may be compressed with gzip only, got {show(option['compressed'])}", offset)
    if type(option.get("fluent_signal", 0)) is not int:
        raise FrameError(f"fluent_signal must be a number, got {show(option['fluent_signal'])}", offset)
    return option


def _too_many_entries(offset: int, count: int | None = None) -> FrameError:
    has = "more" if count is None else str(count)
    return FrameError(f"a frame must have at most {_MAX_ENTRIES} entries, has {has}", offset)


def _seconds_of(time: Any) -> float | None:
    if isinstance(time, int | float) and not isinstance(time, bool) and math.isfinite(time):
        return time
    if isinstance(time, EventTime) and time.code == 0 and len(time.data) == 8:
        # Fluent's EventTime: two big-endian 32-bit numbers, seconds and nanoseconds.
        return int.from_bytes(time.data[:4], "big") + int.from_bytes(time.data[4:], "big") / 1e9
    return None


def decode(frame: bytes) -> tuple[Message, int]:
    """Return the message in *frame* and its time in seconds since 1970.

    This is the inverse of :func:`~geventaudit.encoder.encoding.encode`. The message is not validated;
    :class:`~geventaudit.MsgSchema` does that.

    :raises FrameError: *frame* is not one whole frame with one message.
    """
    decoder = Decoder(max_frame_bytes=max(len(frame), 1))
    frames = list(decoder.feed(frame))
    if len(frames) != 1 or decoder.unfinished:
        raise FrameError(f"must be one whole frame, got {len(frames)} and {decoder.unfinished} bytes of another")
    entries = list(frames[0].unpack(EntryReader(frames[0], is_own=True)))
    if len(entries) != 1:
        raise FrameError(f"must have one entry, has {len(entries)}")
    return message_of(frames[0].tag, entries[0].body), math.floor(entries[0].time)


def decoded(frames: Iterable[bytes]) -> list[Msg]:
    """Return the messages in *frames*, which ``send`` accepted. A frame that cannot be decoded is logged."""
    messages = []
    for frame in frames:
        try:
            messages.append(cast(Msg, decode(frame)[0]))
        except Exception as error:  # the other frames must be returned
            logger().error("a frame of %d bytes cannot be decoded, and is not handed back: %s", len(frame), error)
    return messages
