"""gzip to bytes, in small steps and within a limit. Pure: no I/O, no clock."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from ..errors import FrameError

__all__ = ["inflate"]

_STEP_BYTES = 1 << 14
_GZIP = 16 + zlib.MAX_WBITS


def inflate(data: bytes, max_bytes: int, offset: int) -> Iterator[bytes]:
    """Yield what *data* unpacks to, at most 16 KiB a step; some steps are empty.

    *data* are one or more members of gzip, one behind the other, as Fluentd makes them by appending to a chunk. The sum
    of a member is checked at its end: only who comes to the end of this iterator knows that all of it is right.

    :param max_bytes: the most bytes of all steps together.
    :param offset: of the frame in its stream, for the errors.
    :raises FrameError: the data are not gzip, cut short, or too long.
    """
    total = position = 0
    member = zlib.decompressobj(_GZIP)
    is_begun = False
    while position < len(data) or member.unconsumed_tail:
        # In slices: zlib copies all that it was given and did not use.
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
