"""The limits of a spool, in bytes and seconds."""

from __future__ import annotations

__all__ = [
    "ADOPT_SECONDS",
    "BATCH_BYTES",
    "CLOSE_SECONDS",
    "HANG_SECONDS",
    "MAX_NAMES",
    "MAX_OPEN",
    "MAX_ORPHANS",
    "MAX_READS",
    "PENDING_BYTES",
    "READ_AGAIN_SECONDS",
    "SEGMENT_BYTES",
]

PENDING_BYTES = 8 << 20
"""Bytes of the frames that wait in memory to be written, in mode ``overflow``."""

BATCH_BYTES = 1 << 19
"""Bytes of the frames that one job writes. Limits the time for which their checksums hold the hub."""

SEGMENT_BYTES = 8 << 20
"""A segment takes no more frames once it has this size, or an eighth of ``max_bytes``."""

CLOSE_SECONDS = 1.0
"""The least time in seconds to keep the undelivered records, also if the timeout of ``close()`` has passed."""

HANG_SECONDS = 10.0
"""Seconds of one job after which the disk is taken for one that fails. A synced write may take some."""

READ_AGAIN_SECONDS = 1.0
"""Seconds until records that could not be read are tried again."""

MAX_READS = 5
"""Failed attempts after which unreadable records are skipped and count as lost: they hold up all later ones."""

ADOPT_SECONDS = 30.0
"""Seconds between two searches for orphans."""

MAX_NAMES = 100
"""The names that a process tries for its folder, with ``{pid}`` in the path."""

MAX_OPEN = 64
"""The segments of a folder that are kept open."""

MAX_ORPHANS = 4
"""The folders of dead processes that one client locks at a time. Limits its descriptors and what it reads ahead."""
