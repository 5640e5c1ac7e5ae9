"""The state file: the last number and digest of each stream that a verification has seen."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

__all__ = ["Remembered", "read_state", "write_state"]


class Remembered(NamedTuple):
    """The end of a stream, as an earlier verification saw it."""

    seq: int
    digest: str | None
    """SHA-256 over all h up to *seq*; None if not all records were there, or no key."""


def read_state(path: str) -> dict[str, Remembered]:
    """Return the streams in a state file; none if there is no such file.

    :raises ValueError: it is no state file.
    :raises OSError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no state file: {error}") from None
    try:
        if content["geventaudit_state"] != 1:
            raise ValueError("it has another version")
        return {name: Remembered(int(seq), digest) for name, (seq, digest) in content["streams"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no state file: {error!r}") from None


def write_state(path: str, streams: dict[str, Remembered]) -> None:
    """Write a state file, in the place of an older one.

    :raises OSError: it cannot be written.
    """
    fresh = f"{path}.new"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump({"geventaudit_state": 1, "streams": streams}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
