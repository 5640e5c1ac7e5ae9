"""A process that queues records which no agent takes, and prints the memory of each over the length of its frame.

``python -m benchmarks.queued tracemalloc|rss RECORDS``
"""

from __future__ import annotations

import os
import sys
import tracemalloc

from gevent.event import Event

from geventaudit import Client, Connection

from .records import FIRST, frame_of, message

__all__ = ["overhead"]


def overhead(kind: str, records: int) -> float:
    """Return the bytes that a queued record takes, over the length of its frame.

    :param kind: the measure: ``tracemalloc``, or the resident memory of the kernel (``rss``).
    """
    never = Event()

    def connect() -> Connection:
        never.wait()
        raise AssertionError("nobody sets it")

    client = Client(connect, queue_size=records + 1)
    client.send(message(FIRST))
    client.stats()
    length = len(frame_of(message(FIRST)))
    if kind == "tracemalloc":
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
    else:
        before = _resident()
    for number in range(FIRST + 1, FIRST + 1 + records):
        client.send(message(number))
    after = tracemalloc.get_traced_memory()[0] if kind == "tracemalloc" else _resident()
    assert client.stats().queued == records + 1
    return (after - before) / records / length


def _resident() -> int:
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(overhead(sys.argv[1], int(sys.argv[2])), flush=True)
    os._exit(0)  # without closing: the records would be unpacked to be handed back
