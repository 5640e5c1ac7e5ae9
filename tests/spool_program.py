"""A service with a spool, as a process of its own; see test_spool.py.

    python spool_program.py SOCKET SPOOL MODE FIRST COUNT [UID]

Sends records numbered from FIRST on, and writes each number to standard output when its send() has returned. COUNT
records, or until it is killed where COUNT is 0; then waits until all is delivered, says "delivered", and exits.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from gevent import monkey

monkey.patch_all()

import gevent
from helpers import message

from geventaudit import Backoff, Client, DomainSocket, Spool

path, spool, mode, first, count = sys.argv[1:6]
logging.disable(logging.CRITICAL)
client = Client(
    lambda: DomainSocket(path),
    backoff=Backoff(initial=0.01, maximum=0.1),
    queue_size=100,
    spool=Spool(spool, mode=mode),  # type: ignore[arg-type]
)
if len(sys.argv) > 6:
    # Loaded now, modules need no permission later.
    import geventaudit.spool.store  # noqa: F401

    gevent.get_hub()

    os.setuid(int(sys.argv[6]))
number = int(first)
end = number + int(count) if int(count) else sys.maxsize


def sender(*_: Any) -> None:
    """Send records. Several greenlets run it, so that records share a write."""
    global number
    while number < end:
        mine = number
        number += 1
        client.send(message(mine))
        os.write(1, b"%d\n" % mine)
        gevent.sleep(0)


gevent.joinall([gevent.spawn(sender) for _ in range(4)], raise_error=True)
assert client.flush(60.0), client.stats()
os.write(1, b"delivered\n")
client.close()
