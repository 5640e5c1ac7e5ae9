"""The layout of a stamp, and its place in a frame. Pure.

A stamp is a map under the key ``geventaudit`` of custom data. Its keys are sorted by code point.

==============  ====================================================================================================
key             value
==============  ====================================================================================================
``checkpoint``  in records that the client itself writes about its stream; see :meth:`.Stamper.stamp_checkpoint`
``mac``         with a seal: 64 hexadecimal digits
``seq``         1, 2, 3, ... in the order of acceptance
``stream``      names the client in its process
``tag``         the tag of the frame, which agents drop
``time``        RFC 3339 in UTC with microseconds, 27 characters; its floor is the time of the entry
``was``         of a record that was handed back and sent again: ``[[stream, seq], ...]``, the last one last
==============  ====================================================================================================
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ..encoder.draft import EMPTY_STAMP, KEY, NO_MAC, Draft, draft
from ..encoder.encoding import TAG_AT, TAG_END, map_header, pack, reserved
from ..protocol.decoding import decoded
from ..records import Msg

__all__ = [
    "MAX_STAMP_BYTES",
    "HandedBackStamp",
    "StampLayout",
    "draft_of",
    "handed_back",
    "number_of",
    "time_text",
    "with_checkpoint",
    "with_earlier",
    "without_handed_back_stamp",
]

MAX_STAMP_BYTES = 2048
"""The most bytes that the stamp of a user's record adds to its frame."""

MAX_WAS = 16
"""The most earlier numbers of one record; older ones are left out."""

_KEY = pack(KEY)
_CUSTOM_DATA = pack("CustomData")
_CATEGORIES = pack("OperationCategories")
_CATEGORIES_TEXT = b"OperationCategories"
_TIME = TAG_END + 2  # behind the headers of one entry and its two parts
_ZEROS = NO_MAC.encode()


class HandedBackStamp(dict[str, Any]):
    """The stamp of a record that the client has handed back, which may be sent again.

    A user's own value under the reserved key is refused. This type, which only the client makes, is not.
    """

    __slots__ = ()


def draft_of(frame: bytes, unix_time: float, *, is_sorted: bool) -> Draft:
    """Return *frame* with an empty stamp.

    :param frame: made by an :class:`~geventaudit.encoder.encoding.Encoder`.
    :param unix_time: the time of the frame.
    :param is_sorted: True if custom data is sorted; the stamp goes to its place there. Otherwise it goes first.
    :raises ValidationError: custom data has the reserved key.
    """
    body, custom = _place_of(frame)
    if not frame.startswith(_CUSTOM_DATA, custom):
        fuller = bytes((frame[body] + 1,))
        head = b"".join((frame[:body], fuller, frame[body + 1 : custom], _CUSTOM_DATA, b"\x81"))
        at = custom
    else:
        header = custom + len(_CUSTOM_DATA)
        size, first = _map_size(frame, header)
        at = _place_in(frame, first, size) if is_sorted else first
        if _KEY in frame and _has_key(frame, first, size):
            raise reserved(KEY)
        head = b"".join((frame[:header], map_header(size + 1), frame[first:at]))
    return draft(b"".join((head, EMPTY_STAMP, frame[at:])), len(head) + len(EMPTY_STAMP) - 1, body, unix_time)


def with_earlier(made: Draft, was: list[Any]) -> Draft:
    """Return a draft with the earlier numbers of its record."""
    made.was = b"\xa3was" + pack(was[-MAX_WAS:])
    return made


def with_checkpoint(made: Draft, checkpoint: dict[str, Any]) -> Draft:
    """Return a draft with a checkpoint."""
    made.checkpoint = b"\xaacheckpoint" + pack(checkpoint)
    return made


def _place_of(frame: bytes) -> tuple[int, int]:
    """Return the places of the body, and of the key ``CustomData``, or where that would be."""
    body = _TIME + 5 if frame[_TIME] == 0xCE else _skipped(frame, _TIME)
    if frame.count(_CATEGORIES_TEXT) == 1:
        at = frame.index(_CATEGORIES, body)
    else:  # in a text too
        at = body + 1
        while not frame.startswith(_CATEGORIES, at):
            at = _skipped(frame, _skipped(frame, at))
    return body, _skipped(frame, at + len(_CATEGORIES))


def _place_in(frame: bytes, at: int, size: int) -> int:
    """Return the place of the reserved key in a sorted map of *size* keys that begins at *at*."""
    name = KEY.encode()
    for _ in range(size):
        end = _skipped(frame, at)
        if _text_in(frame, at, end) > name:
            break
        at = _skipped(frame, end)
    return at


def _has_key(frame: bytes, at: int, size: int) -> bool:
    for _ in range(size):
        if frame.startswith(_KEY, at):
            return True
        at = _skipped(frame, _skipped(frame, at))
    return False


def _text_in(frame: bytes, at: int, end: int) -> bytes:
    """Return the UTF-8 of the packed text from *at* to *end*. Its order is the one of code points."""
    first = frame[at]
    return frame[at + (1 if first < 0xC0 else {0xD9: 2, 0xDA: 3, 0xDB: 5}[first]) : end]


def _map_size(frame: bytes, at: int) -> tuple[int, int]:
    """Return the number of keys of the map at *at*, and the place of the first."""
    first = frame[at]
    if first < 0x90:
        return first & 0x0F, at + 1
    width = 2 if first == 0xDE else 4
    return int.from_bytes(frame[at + 1 : at + 1 + width], "big"), at + 1 + width


_LONG = dict(zip(range(0xC4, 0xCA), [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 4)], strict=True))
_LONG |= {0xD9: (0, 1), 0xDA: (0, 2), 0xDB: (0, 4)}
"""Bytes, extensions and text: how many bytes come beside the data, and how many say its length."""
_FIXED = dict(zip(range(0xCA, 0xD9), [5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18], strict=True))
"""Numbers and short extensions: the bytes that they take."""


def _skipped(frame: bytes, at: int) -> int:
    """Return the place behind the value at *at*."""
    left = 1
    while left:
        left -= 1
        first = frame[at]
        if 0xA0 <= first < 0xC0:
            at += 1 + (first & 0x1F)
        elif first < 0x80 or first >= 0xE0 or 0xC0 <= first <= 0xC3:
            at += 1
        elif first < 0x90:
            left += 2 * (first & 0x0F)
            at += 1
        elif first < 0xA0:
            left += first & 0x0F
            at += 1
        elif first in _FIXED:
            at += _FIXED[first]
        elif first in _LONG:
            more, width = _LONG[first]
            at += 1 + width + more + int.from_bytes(frame[at + 1 : at + 1 + width], "big")
        else:  # array and map of 16 and 32 bits
            width = 2 if first in (0xDC, 0xDE) else 4
            left += (1 if first < 0xDE else 2) * int.from_bytes(frame[at + 1 : at + 1 + width], "big")
            at += 1 + width
    return at


_second = (-1, b"")  # a second, and its text


def time_text(unix_time: float) -> bytes:
    """Return a time as RFC 3339 in UTC with microseconds, 27 characters."""
    global _second
    seconds = math.floor(unix_time)
    known, text = _second
    if known != seconds:
        moment = time.gmtime(seconds)
        text = b"%04d-%02d-%02dT%02d:%02d:%02d." % moment[:6]
        _second = seconds, text
    return text + b"%06dZ" % int((unix_time - seconds) * 1e6)


class StampLayout:
    """The bytes of the stamps of one stream: all but number, time and what few records have.

    :param stream: its name.
    :param is_sealed: True if there is a place for a MAC.
    """

    __slots__ = ("_before", "_between", "_size")

    def __init__(self, stream: str, *, is_sealed: bool) -> None:
        self._before = (b"\xa3mac\xd9\x40" + _ZEROS if is_sealed else b"") + b"\xa3seq"
        self._between = b"\xa6stream" + pack(stream) + b"\xa3tag"
        self._size = 5 if is_sealed else 4

    def frame_of(self, draft: Draft, number: int) -> bytes:
        """Return the frame with that number, and zeros in place of a MAC."""
        size = self._size
        if draft.was or draft.checkpoint:
            size += bool(draft.was) + bool(draft.checkpoint)
        return b"".join(
            (
                *(draft[: draft.cut], map_header(size), draft.checkpoint, self._before, _packed(number), self._between),
                *(draft[TAG_AT:TAG_END], b"\xa4time\xbb", time_text(draft.unix_time), draft.was),
                draft[draft.cut + 1 :],
            )
        )

    def place_of_mac(self, draft: Draft) -> int:
        """Return the place of the 64 digits in the frame of *draft*."""
        return draft.cut + 1 + len(draft.checkpoint) + 6


_pack_32 = struct.Struct(">BI").pack


def _packed(number: int) -> bytes:
    return _pack_32(0xCE, number) if 0x10000 <= number <= 0xFFFFFFFF else pack(number)


def number_of(frame: bytes) -> tuple[str, int] | None:
    """Return the stream and the number of a frame; None if it has no stamp."""
    if _KEY not in frame:
        return None
    for message in decoded([frame]):
        stamp = message.record.custom_data.get(KEY)
        if isinstance(stamp, Mapping) and isinstance(stamp.get("stream"), str) and isinstance(stamp.get("seq"), int):
            return stamp["stream"], stamp["seq"]
    return None


def handed_back(frames: Iterable[bytes]) -> list[Msg]:
    """Return the messages in *frames*, for the application, which may send them again. Checkpoints are left out.

    A :class:`Draft` has no number yet.
    """
    messages = []
    for frame in frames:
        for message in decoded([frame]):
            data = message.record.custom_data
            stamp = data.get(KEY)
            if isinstance(frame, Draft):
                message.record.custom_data = {key: value for key, value in data.items() if key != KEY}
            elif isinstance(stamp, dict):
                if "checkpoint" in stamp:
                    continue
                message.record.custom_data = {**data, KEY: HandedBackStamp(stamp)}
            messages.append(message)
    return messages


def without_handed_back_stamp(msg: Msg) -> tuple[Msg, list[Any]] | None:
    """Return *msg* without the stamp of an earlier send, and its earlier numbers; None if it has none.

    :raises ValidationError: custom data has the reserved key, and no stamp under it that a client has handed back.
    """
    data = msg.record.custom_data
    if not isinstance(data, Mapping) or KEY not in data:
        return None
    stamp = data[KEY]
    if type(stamp) is not HandedBackStamp:
        raise reserved(KEY)
    plain = {key: value for key, value in data.items() if key != KEY}
    earlier = [*stamp.get("was", ()), [stamp["stream"], stamp["seq"]]]
    return Msg(msg.type, msg.record.replace(custom_data=plain)), earlier
