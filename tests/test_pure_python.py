"""The pure-Python form of msgpack, which some systems have instead of its C extension."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PURE = {**os.environ, "MSGPACK_PUREPYTHON": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
IS_PURE = "MSGPACK_PUREPYTHON" in os.environ

# A few of each kind: frames, streams, limits, values, acknowledgements, and the recorded facts of the reference.
CHOSEN = {
    "test_wire.py": (
        "frame_of_the_example or times_are or no_schema_has_seen or options_that or times_that or streams_that or "
        "good_entries or too_many or too_long or larger_frame or above_the or decode or heartbeat"
    ),
    "test_golden.py": "",
    "test_values.py": "",
    "test_acks.py": "not killed and not throughput and not memory",
}

HANDED_BACK = """
import datetime, msgpack
from geventaudit import Client, DomainSocket
from helpers import message

assert msgpack.Packer.__module__ == "msgpack.fallback"
sent = [
    message(1),
    message(custom_data={"t": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "deep": [[{"b": b"x", "f": 1.5}]]}),
    message(caller_access_levels=[f"{n:06x}" for n in range(400_000)]),
    message(custom_data={"l": list(range(100_000))}),
    message(custom_data={str(n): n for n in range(60_000)}),
]
client = Client(lambda: DomainSocket("/nowhere/agent.sock"), max_frame_bytes=8 << 20)
for each in sent:
    client.send(each)
assert client.close(0.1) == sent
"""


@pytest.mark.skipif(IS_PURE, reason="all tests run with it already")
def test_the_suite_passes() -> None:
    chosen = " or ".join(f"({name} and ({words}))" if words else name for name, words in CHOSEN.items())
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:locust"]
    command += ["-v", "-k", chosen, *(str(HERE / name) for name in CHOSEN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=PURE, cwd=HERE.parent, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in CHOSEN:
        assert f"{name}::" in done.stdout, "some of each were chosen"


def test_close_hands_back_accepted_messages() -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", HANDED_BACK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=PURE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
