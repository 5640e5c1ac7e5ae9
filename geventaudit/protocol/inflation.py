"""gzip to bytes, in small steps and within a limit. Pure: no I/O, no clock."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from ..errors import FrameError

__all__ = ["inflate"]

_STEP_BYTES = 1 << 14
_GZIP = 16 + 15  # the largest window


def inflate(data: bytes, max_bytes: int, offset: int) -> Iterator[bytes]:
    """Yield the decompressed *data*, at most 16 KiB a step; some steps are empty.

    *data* is one or more gzip members, one after the other, as Fluentd makes them by appending to a chunk. The checksum
    of a member is checked at its end, so only the end of this iterator proves that all of *data* is intact.

    :param max_bytes: the most bytes of all steps together.
    :param offset: the offset of the frame in its stream, for the errors.
    :raises FrameError: *data* is not gzip, cut short, or too long.
    """
    total = position = 0
    member = zlib.decompressobj(_GZIP)
    is_begun = False
    while position < len(data) or member.unconsumed_tail:
        # In slices: zlib copies its unused input.
        given = member.unconsumed_tail or data[position : position + _STEP_BYTES]
        if not member.unconsumed_tail:
            position += len(given)
        try:
            step = member.decompress(given, _STEP_BYTES)
        except zlib.error as error:
            raise FrameError(f"the entries are not gzip: {error}", offset) from None
        is_begun = True
        total += len(step)
        if total > max_bytes:
            raise FrameError(f"the entries unpack to more than {max_bytes} bytes", offset)
        if member.eof:
            position -= len(member.unused_data)
            member = zlib.decompressobj(_GZIP)
            is_begun = False
        yield step
    if is_begun or not data:
        raise FrameError("the entries are gzip that was cut short", offset)
