"""The folder of segments on disk: round trips, damage, failures of the disk, changes by others, locks and forks."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from geventaudit.errors import SpoolError
from geventaudit.spool import format as format_module
from geventaudit.spool import recovery
from geventaudit.spool.directory import FolderTakenError
from geventaudit.spool.folder import Check, Folder, Read, orphans
from geventaudit.spool.format import Append, encode_runs
from geventaudit.spool.segment import HEADER_SIZE, OVERHEAD, encode, new_magic
from geventaudit.spool.sidefiles import RotatingPair

MAGIC = b"\x01MAGIC\x02\x03"
QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")


def frames_of(count: int, start: int = 1) -> list[bytes]:
    return [b"frame %d " % seq + b"x" * (seq * 7 % 50) for seq in range(start, start + count)]


class Writer:
    """The hub's side: it encodes batches, and starts a segment whenever that is asked for."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.magic = b""

    @property
    def may_append(self) -> bool:
        """True if the next frame goes to the segment of the last one."""
        return self.folder.prepare(self.folder.last_seq + 1, [b""]).magic == self.magic

    def append(self, frames: list[bytes], *, roll: bool = False, seq: int = 0) -> int:
        """Append frames, and return the sequence number of the first."""
        seq = seq or self.folder.last_seq + 1
        append = encode_runs(enumerate(frames, seq))[0] if roll else self.folder.prepare(seq, frames)
        self.magic = append.magic
        self.folder.append(append)
        return seq


@contextmanager
def opened(path: Path, synchronous: str = "OFF") -> Iterator[Folder]:
    folder = Folder(str(path), synchronous)
    folder.open()
    try:
        yield folder
    finally:
        folder.close()


def crash(folder: Folder) -> None:
    """End as a killed process does: only the descriptors close."""
    folder.leave()


def drain(folder: Folder, max_bytes: int = 1 << 20) -> tuple[list[tuple[int, bytes]], int]:
    """Read all undelivered frames; return them and the number of damaged ones."""
    frames: list[tuple[int, bytes]] = []
    damaged, last = 0, folder.cursor
    while True:
        result = folder.read(last, max_bytes)
        frames += result.frames
        damaged += result.damaged
        if result.last == last:
            assert not result.frames
            return frames, damaged
        assert result.last > last
        last = result.last


def seqs(folder: Folder) -> list[int]:
    return [seq for seq, _ in drain(folder)[0]]


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.seg"))


def write_segment(path: Path, frames: list[bytes], first: int = 1) -> Path:
    """Make a folder with one segment of an earlier run, and return the segment's path."""
    before = set(segments(path))
    with opened(path) as folder:
        Writer(folder).append(frames, seq=first)
    (made,) = set(segments(path)) - before
    return made


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    before = len(descriptors())
    yield
    # The monkey-patched os.close of rmtree closes when its loop runs.
    deadline = time.monotonic() + 5
    while len(descriptors()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(descriptors()) <= before


# Format


def test_encode_gives_header_and_frame() -> None:
    data = encode(MAGIC, 7, [b"abc", b""])
    checked = (7).to_bytes(4, "big") + (3).to_bytes(4, "big")
    assert data[:23] == MAGIC + checked + zlib.crc32(checked + b"abc").to_bytes(4, "big") + b"abc"
    assert len(data) == 2 * OVERHEAD + 3
    assert encode(MAGIC, 0, []) == b""


def test_runs_are_encoded_in_linear_time() -> None:
    """A client that closes has little time, and tens of thousands of records."""
    calls = 0

    class Counted(bytes):
        def __len__(self) -> int:
            nonlocal calls
            calls += 1
            return super().__len__()

    frames = [Counted(b"x" * 10) for _ in range(3000)]
    appends = encode_runs([*enumerate(frames[:1000], 1), *enumerate(frames[1000:], 5000)])
    assert [(each.first, len(each.frames)) for each in appends] == [(1, 1000), (5000, 2000)]
    assert calls < 10 * len(frames)


def test_magics_differ() -> None:
    assert len({new_magic() for _ in range(100)}) == 100
    assert len(new_magic()) == 8


def test_the_files_are_as_documented(path: Path) -> None:
    with opened(path) as folder:
        folder.append(Append(5, MAGIC, encode(MAGIC, 0, frames := [b"one", b"two"]), frames))
        folder.advance(5)
        (file,) = segments(path)
        assert file.name == f"{5:020d}-{MAGIC.hex()}.seg"
        data = file.read_bytes()
        header = b"gaSEGM\r\n" + (1).to_bytes(4, "big") + MAGIC + (5).to_bytes(8, "big")
        assert data[:HEADER_SIZE] == header + zlib.crc32(header).to_bytes(4, "big")
        assert data[HEADER_SIZE:] == encode(MAGIC, 0, [b"one", b"two"])
        record = b"gaCURS1\n" + (5).to_bytes(8, "big")
        assert (path / "cursor").read_bytes() == record + zlib.crc32(record).to_bytes(4, "big")


# Round trips


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL", "FULL"])
@pytest.mark.parametrize("end", [Folder.close, crash])
def test_frames_survive(path: Path, synchronous: str, end: Callable[[Folder], None]) -> None:
    folder = Folder(str(path), synchronous)
    folder.open()
    writer = Writer(folder)
    frames = frames_of(30)
    for start in range(0, 30, 5):
        writer.append(frames[start : start + 5], roll=start % 10 == 0)
    expected = list(enumerate(frames, 1))
    assert drain(folder) == (expected, 0)
    end(folder)
    assert len(segments(path)) == 3
    folder.open()
    assert (folder.count, folder.last_seq, folder.problems) == (30, 30, [])
    assert folder.undelivered_bytes == sum(file.stat().st_size - HEADER_SIZE for file in segments(path))
    assert drain(folder, 1) == (expected, 0)
    assert not writer.may_append
    Writer(folder).append([b"more"])
    assert drain(folder) == ([*expected, (31, b"more")], 0)
    folder.close()


def test_a_break_in_the_numbers_is_no_damage(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append(frames_of(3))
        writer.append(frames_of(2), seq=100, roll=True)
        assert seqs(folder) == [1, 2, 3, 100, 101]
    with opened(path) as folder:
        assert drain(folder)[1] == 0
        assert folder.count == 5


def test_read_gives_about_as_much_as_asked_for(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        for _ in range(4):
            writer.append([b"x" * 80] * 10, roll=True)
        assert [len(folder.read(0, size).frames) for size in (0, 1, 100, 101, 1000, 1001, 10**6)] == [
            1,
            1,
            1,
            2,
            10,
            11,
            40,
        ]
        assert folder.read(40, 100) == Read(last=40)
        assert folder.read(7, 250).last == 10


def test_reading_in_small_steps_of_large_segments(path: Path) -> None:
    frames = [os.urandom(random.Random(seq).randrange(3000)) for seq in range(500)]
    frames[250] = os.urandom(1 << 20)
    write_segment(path, frames)
    with opened(path) as folder:
        assert drain(folder, 20_000) == (list(enumerate(frames, 1)), 0)
        for after in (499, 3, 250, 251, 249, 0):
            assert folder.read(after, 1).frames == [(after + 1, frames[after])]
        for cursor in (10, 200, 251, 400):
            folder.advance(cursor)
            rest = sum(OVERHEAD + len(frame) for frame in frames[cursor:])
            assert abs(folder.undelivered_bytes - rest) < 70_000
            assert folder.count == 500 - cursor


def test_delivered_frames_do_not_come_again(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        for _ in range(4):
            writer.append(frames_of(5), roll=True)
        first = segments(path)[0]
        assert not folder.advance(3)
        assert folder.count == 17
        assert folder.advance(7)
        assert not first.exists()
        assert folder.read(0, 1).frames[0][0] == 8
        assert not folder.advance(2)
        assert folder.cursor == 7
    with opened(path) as folder:
        assert (folder.cursor, folder.count, seqs(folder)) == (7, 13, list(range(8, 21)))


def test_the_current_segment_goes_when_it_is_delivered(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append(frames_of(5))
        assert writer.may_append
        assert folder.advance(5)
        assert not writer.may_append
        assert segments(path) == []
        assert writer.append([b"next"]) == 6
    with opened(path) as folder:
        assert seqs(folder) == [6]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_two_segments_with_the_same_numbers_the_newer_counts(path: Path, order: tuple[int, int]) -> None:
    path.mkdir(0o700)
    for magic, age in zip((b"a" * 8, b"b" * 8), order, strict=True):
        with opened(path.parent / "other") as folder:
            folder.append(Append(1, magic, encode(magic, 0, frames := [b"age %d" % age] * 3), frames))
        (file,) = segments(path.parent / "other")
        os.utime(file, (1000 - age, 1000 - age))
        file.rename(path / file.name)
    with opened(path) as folder:
        assert drain(folder) == ([(seq, b"age 1") for seq in (1, 2, 3)], 0)
        assert len(segments(path)) == 1


def test_numbers_are_not_used_twice(path: Path) -> None:
    with opened(path) as folder:
        Writer(folder).append(frames_of(5))
        folder.advance(5)
    with opened(path) as folder:
        assert (folder.last_seq, folder.count) == (5, 0)
        writer = Writer(folder)
        assert writer.append([b"x"]) == 6
        assert seqs(folder) == [6]


def test_frames_may_contain_anything(path: Path) -> None:
    other = encode(new_magic(), 0, [b"forged"])
    frames = [b"", MAGIC, MAGIC * 40, encode(MAGIC, 0, [b"forged"]), other, encode(MAGIC, 5, [b"a"]), b"end"]
    with opened(path) as folder:
        folder.append(Append(1, MAGIC, encode(MAGIC, 0, frames), frames))
        assert drain(folder) == (list(enumerate(frames, 1)), 0)
    (file,) = segments(path)
    with opened(path) as folder:
        assert drain(folder) == (list(enumerate(frames, 1)), 0)
        assert folder.count == len(frames)
    # Nor is a magic a frame that stands where the end of the segment is.
    file.write_bytes(file.read_bytes()[:-1])
    with opened(path) as folder:
        assert drain(folder) == (list(enumerate(frames[:-1], 1)), 0)


def test_many_magics_across_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = frames_of(300)
    write_segment(path, frames)
    for piece in (9, 16, 31, 64):
        monkeypatch.setattr(format_module, "_PIECE", piece)
        with opened(path) as folder:
            assert folder.count == 300
            assert drain(folder, 500) == (list(enumerate(frames, 1)), 0)


# Damage


def spans(frames: list[bytes]) -> list[tuple[int, int]]:
    """Return the start and the end of each frame in its segment, with its header."""
    result, offset = [], HEADER_SIZE
    for frame in frames:
        result.append((offset, offset + OVERHEAD + len(frame)))
        offset += OVERHEAD + len(frame)
    return result


def touched(frames: list[bytes], start: int, end: int) -> set[int]:
    return {seq for seq, (low, high) in enumerate(spans(frames), 1) if low < end and start < high}


FRAMES = [b"a" * 30, b"", b"b" * 100, b"c", b"d" * 60, b"e" * 5, b"f" * 200, b"g" * 17]
SIZE = spans(FRAMES)[-1][1]


@pytest.fixture(scope="module")
def sample() -> tuple[str, bytes]:
    """The name and the bytes of a segment with FRAMES."""
    with TemporaryDirectory() as folder:
        file = write_segment(Path(folder) / "spool", FRAMES)
        return file.name, file.read_bytes()


def read_changed(name: str, data: bytes) -> tuple[list[tuple[int, bytes]], int, int]:
    """Return the frames, the number of damaged ones and the last number of a folder with one segment."""
    with TemporaryDirectory() as parent:
        path = Path(parent) / "spool"
        path.mkdir(mode=0o700)
        (path / name).write_bytes(data)
        with opened(path) as folder:
            count, last = folder.count, folder.last_seq
            frames, damaged = drain(folder, 150)
            assert count == len(frames) + damaged
            again, _ = drain(folder)
            assert again == frames
            (saved,) = [*(file.read_bytes() for file in path.glob("damaged.bin")), b""][:1]
            assert saved.count(b'"segment"') <= 2
            if frames or damaged:
                folder.advance(max(last, folder.read(0, 1 << 30).last))
            assert not folder.count
            assert not segments(path)
        return frames, damaged, last


def check_overwritten(sample: tuple[str, bytes], start: int, region: bytes, *, has_copies: bool = False) -> None:
    name, data = sample
    changed = data[:start] + region + data[start + len(region) :]
    assert len(changed) == len(data)
    differing = [at for at in range(len(data)) if data[at] != changed[at]]
    lost = touched(FRAMES, differing[0], differing[-1] + 1) if differing else set()
    expected = [(seq, frame) for seq, frame in enumerate(FRAMES, 1) if seq not in lost]
    frames, damaged, last = read_changed(name, changed)
    assert [frame for frame in frames if frame in expected] == expected
    if has_copies:
        # A frame that is written elsewhere as a whole may be found there.
        assert set(expected) <= set(frames) <= set(enumerate(FRAMES, 1))
        assert frames == sorted(frames)
        return
    assert frames == expected
    # The number of frames lost at the end is not known; the last one may look like a torn one.
    assert damaged == len(lost) if len(FRAMES) not in lost else damaged <= len(lost)
    assert last == frames[-1][0] if not lost else last <= len(FRAMES)


@QUICK
@given(start=st.integers(0, SIZE - 1), region=st.binary(min_size=1, max_size=300))
def test_overwritten_bytes_cost_only_the_frames_they_touch(
    sample: tuple[str, bytes], start: int, region: bytes
) -> None:
    check_overwritten(sample, start, region[: SIZE - start])


@QUICK
@given(source=st.integers(0, SIZE - 1), target=st.integers(0, SIZE - 1), length=st.integers(1, 300))
def test_bytes_written_in_a_wrong_place_cost_only_the_frames_they_touch(
    sample: tuple[str, bytes], source: int, target: int, length: int
) -> None:
    _, data = sample
    check_overwritten(sample, target, data[source : source + length][: SIZE - target], has_copies=True)


def test_each_flipped_byte_costs_one_frame(sample: tuple[str, bytes]) -> None:
    name, data = sample
    for offset in range(0, SIZE, 3):
        changed = bytearray(data)
        changed[offset] ^= 0x41
        frames, damaged, _ = read_changed(name, bytes(changed))
        lost = touched(FRAMES, offset, offset + 1)
        assert len(frames) == len(FRAMES) - len(lost)
        # With a greater length, the last frame is a torn one.
        assert damaged == len(lost) or offset in range(SIZE - 25, SIZE - 21)


def test_cut_anywhere(sample: tuple[str, bytes]) -> None:
    name, data = sample
    for size in range(0, SIZE, 2):
        frames, damaged, last = read_changed(name, data[:size])
        whole = [seq for seq, (_, end) in enumerate(spans(FRAMES), 1) if end <= size]
        assert [seq for seq, _ in frames] == whole
        assert damaged == 0
        # A number is in use if its magic is there.
        assert last == sum(start + 8 <= size for start, _ in spans(FRAMES))


@pytest.mark.parametrize("header", [b"\0" * HEADER_SIZE, b"\xff" * HEADER_SIZE, b"gaSEGM\r\n" + b"\0" * 24])
def test_a_damaged_header_costs_nothing(sample: tuple[str, bytes], header: bytes) -> None:
    name, data = sample
    assert read_changed(name, header + data[HEADER_SIZE:])[:2] == (list(enumerate(FRAMES, 1)), 0)


def test_zeroed_pages(path: Path) -> None:
    frames = [os.urandom(500) for _ in range(100)]
    file = write_segment(path, frames)
    data = file.read_bytes()
    for start in (0, 4096, 8192, 49152):
        file.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
        lost = touched(frames, start, min(start + 4096, len(data)))
        with opened(path) as folder:
            found, damaged = drain(folder, 3000)
        assert [seq for seq, _ in found] == sorted(set(range(1, 101)) - lost)
        assert damaged == len(lost) or (100 in lost and 1 <= damaged <= len(lost))
    # Zeros behind the end are damage too: the system had made the file longer, and not written it.
    file.write_bytes(data + bytes(4096))
    with opened(path) as folder:
        assert drain(folder)[1] == 1
        assert len(drain(folder)[0]) == 100
        assert folder.last_seq == 101


def test_nothing_but_garbage(path: Path) -> None:
    path.mkdir(0o700)
    name = f"{7:020d}-{MAGIC.hex()}.seg"
    (path / name).write_bytes(os.urandom(3000))
    with opened(path) as folder:
        assert folder.last_seq == 7
        result = folder.read(0, 100)
        assert (result.frames, result.damaged, result.last) == ([], 1, 7)
        assert folder.read(7, 100) == Read(last=7)
        assert (path / "damaged.bin").stat().st_size > 2900
        assert folder.advance(7)
    assert segments(path) == []


def test_damage_is_saved_once(path: Path) -> None:
    file = write_segment(path, [b"first" * 20, b"second" * 20, b"third" * 20])
    file.write_bytes(file.read_bytes().replace(b"secondsecond", b"SECONDsecond", 1))
    with opened(path) as folder:
        for _ in range(3):
            assert drain(folder)[1] == 1
        header, rest = (path / "damaged.bin").read_bytes().split(b"\n", 1)
        note = json.loads(header)
        assert (note["segment"], note["length"]) == (file.name, 140)
        assert rest[20:-1] == (b"second" * 20).replace(b"secondsecond", b"SECONDsecond", 1)
        assert rest.endswith(b"\n")
        assert rest[:-1] == file.read_bytes()[note["offset"] :][:140]
        # Damage that is passed is not looked at again.
        folder.advance(2)
        assert drain(folder) == ([(3, b"third" * 20)], 0)
    with opened(path) as folder:
        assert drain(folder) == ([(3, b"third" * 20)], 0)
        assert (path / "damaged.bin").read_bytes() == header + b"\n" + rest


def test_damage_that_cannot_be_saved_is_reported(path: Path) -> None:
    file = write_segment(path, [b"first", b"second", b"third"])
    file.write_bytes(file.read_bytes().replace(b"second", b"SECOND"))
    (path / "damaged.bin").mkdir()
    with opened(path) as folder:
        result = folder.read(0, 1000)
        assert (len(result.frames), result.damaged) == (2, 1)
        assert "damage is not saved" in result.problems[0]


def test_a_torn_frame_is_damage_only_if_others_follow(path: Path) -> None:
    file = write_segment(path, frames_of(10))
    data = file.read_bytes()
    start, end = spans(frames_of(10))[4]
    file.write_bytes(data[: start + 30] + data[end:])
    with opened(path) as folder:
        assert drain(folder)[1] == 1
        assert seqs(folder) == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    file.write_bytes(data[: start + 30])
    with opened(path) as folder:
        assert drain(folder)[1] == 0
        assert seqs(folder) == [1, 2, 3, 4]
        assert folder.last_seq == 5
        # A new run goes on behind it.
        Writer(folder).append([b"new"])
        assert drain(folder)[0][-1] == (6, b"new")
        assert drain(folder)[1] == 0


def test_a_segment_with_a_torn_frame_only_is_removed(path: Path) -> None:
    file = write_segment(path, [b"x" * 100])
    file.write_bytes(file.read_bytes()[:-10])
    with opened(path) as folder:
        assert (folder.last_seq, folder.count, segments(path)) == (1, 0, [])


def test_damage_in_the_current_segment(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append([b"first", b"second", b"third"])
        (file,) = segments(path)
        with file.open("r+b") as stream:
            stream.seek(file.read_bytes().index(b"third"))
            stream.write(b"THIRD")
        assert folder.check() == Check()
        assert drain(folder) == ([(1, b"first"), (2, b"second")], 1)
        writer.append([b"fourth"])
        assert drain(folder) == ([(1, b"first"), (2, b"second"), (4, b"fourth")], 1)


def test_frames_of_the_same_index_appended_again(sample: tuple[str, bytes]) -> None:
    name, data = sample
    frames, _, _ = read_changed(name, data + data[HEADER_SIZE:])
    assert frames == list(enumerate(FRAMES, 1))
    # If a frame is damaged, the copies behind it are as good.
    lost = spans(FRAMES)[2][0]
    frames, damaged, _ = read_changed(name, data[:lost] + b"!" + data[lost + 1 :] + data[lost:])
    assert frames == list(enumerate(FRAMES, 1))
    assert damaged == 0


def test_a_length_that_is_too_large_is_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_segment(path, [b"small", b"x" * 200, b"small too"])
    monkeypatch.setattr(format_module, "MAX_FRAME", 100)
    with opened(path) as folder:
        assert drain(folder) == ([(1, b"small"), (3, b"small too")], 1)


def test_removed_segments(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        for _ in range(3):
            writer.append(frames_of(5), roll=True)
    segments(path)[1].unlink()
    with opened(path) as folder:
        assert (folder.count, folder.last_seq) == (10, 15)
        assert seqs(folder) == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]


def test_duplicated_and_renamed_segments(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        for _ in range(3):
            writer.append(frames_of(5), roll=True)
    first, second, third = segments(path)
    (path / f"{400:020d}-{new_magic().hex()}.seg").write_bytes(first.read_bytes())
    second.rename(path / f"{0:020d}-{new_magic().hex()}.seg")
    with opened(path) as folder:
        assert seqs(folder) == list(range(1, 16))
        assert drain(folder)[1] == 0
        folder.advance(3)
    with opened(path) as folder:
        assert seqs(folder) == list(range(4, 16))
        folder.advance(15)
    assert segments(path) == []
    assert not third.exists()


def test_files_that_are_no_segments_are_left_alone(path: Path, tmp_path: Path) -> None:
    write_segment(path, frames_of(3))
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    outside.chmod(0o644)
    good = f"-{MAGIC.hex()}.seg"
    (path / f"{10:020d}{good}").symlink_to(outside)
    (path / f"{11:020d}{good}").mkdir()
    os.mkfifo(path / f"{12:020d}{good}")
    (path / "12-x.seg").write_bytes(b"?")
    (path / f"{'9' * 20}{good}").write_bytes(b"?")
    (path / f"{'٣' * 20}{good}").write_bytes(b"?")
    (path / os.fsdecode(b"\xff.seg")).write_bytes(b"?")
    (path / "notes.txt").write_bytes(b"?")
    before = sorted(os.listdir(path))
    with opened(path) as folder:
        assert len(folder.problems) == 7
        for problem in folder.problems:
            assert str(path) in problem
            problem.encode()
        assert seqs(folder) == [1, 2, 3]
        folder.advance(3)
        folder.close(remove_if_empty=True)
    assert len(os.listdir(path)) >= len(before) - 1
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644


def test_unfinished_copies_are_removed(path: Path) -> None:
    path.mkdir(0o700)
    (path / f".{'a' * 32}.tmp").write_bytes(b"?")
    (path / ".other.tmp").write_bytes(b"?")
    with opened(path):
        assert sorted(os.listdir(path)) == [".other.tmp", "lock"]


@pytest.mark.parametrize("damage", [b"", b"\0" * 20, b"garbage", os.urandom(300)])
def test_a_damaged_cursor_is_the_start(path: Path, damage: bytes) -> None:
    with opened(path) as folder:
        Writer(folder).append(frames_of(5))
        folder.advance(3)
    (path / "cursor").write_bytes(damage)
    with opened(path) as folder:
        assert seqs(folder) == [1, 2, 3, 4, 5]
        folder.advance(4)
    with opened(path) as folder:
        assert seqs(folder) == [5]


def test_an_oversized_cursor_counts(path: Path) -> None:
    with opened(path) as folder:
        Writer(folder).append(frames_of(5))
        folder.advance(3)
    with (path / "cursor").open("ab") as stream:
        stream.write(b"garbage")
    with opened(path) as folder:
        assert seqs(folder) == [4, 5]


def test_a_cursor_beyond_the_end_is_the_end(path: Path) -> None:
    with opened(path) as folder:
        Writer(folder).append(frames_of(5))
        folder.advance(4)
    record = b"gaCURS1\n" + (1000).to_bytes(8, "big")
    (path / "cursor").write_bytes(record + zlib.crc32(record).to_bytes(4, "big"))
    with opened(path) as folder:
        assert (folder.count, folder.last_seq, folder.cursor) == (0, 1000, 1000)
        assert Writer(folder).append([b"x"]) == 1001
        assert seqs(folder) == [1001]


def test_an_unreadable_segment_counts_as_damaged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        for _ in range(3):
            writer.append(frames_of(5), roll=True)
        bad = os.stat(segments(path)[1]).st_ino
        pread = os.pread

        def failing(descriptor: int, size: int, offset: int) -> bytes:
            if os.fstat(descriptor).st_ino == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return pread(descriptor, size, offset)

        monkeypatch.setattr(os, "pread", failing)
        result = folder.read(0, 1 << 20)
        assert [seq for seq, _ in result.frames] == [1, 2, 3, 4, 5, 11, 12, 13, 14, 15]
        assert (result.damaged, result.last) == (5, 15)
        assert str(segments(path)[1]) in result.problems[0]


class BadPages:
    """A disk that cannot read some pages of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path, pages: set[int], attempts: int = 1 << 30) -> None:
        self.inode = file.stat().st_ino
        self.pages = pages
        self.attempts = attempts
        self._pread: Callable[[int, int, int], bytes] = os.pread
        monkeypatch.setattr(os, "pread", self.pread)

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        asked = set(range(offset // 4096, (offset + size - 1) // 4096 + 1))
        if asked & self.pages and os.fstat(descriptor).st_ino == self.inode and self.attempts > 0:
            self.attempts -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._pread(descriptor, size, offset)


def touching(page: int, sizes: list[int]) -> set[int]:
    """Return the numbers of the frames that have a byte in that page of a segment; sizes without OVERHEAD."""
    start, found = HEADER_SIZE, set()
    for number, size in enumerate(sizes, 1):
        end = start + OVERHEAD + size
        if start < (page + 1) * 4096 and end > page * 4096:
            found.add(number)
        start = end
    return found


@pytest.mark.parametrize("is_earlier", [False, True], ids=["live", "earlier"])
@pytest.mark.parametrize("pages", [{0}, {3}, {5, 6}, {2, 9, 30}, {70}, {73}, set(range(20, 60))])
def test_unreadable_pages_cost_only_the_frames_in_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, pages: set[int], is_earlier: bool
) -> None:
    frames = [bytes([number % 256]) * (number % 700 + 1) for number in range(1, 1001)]
    lost = set[int]().union(*(touching(page, [len(frame) for frame in frames]) for page in pages))
    with opened(path) as folder:
        Writer(folder).append(frames)
        if not is_earlier:
            BadPages(monkeypatch, segments(path)[0], pages)
            check_unreadable(folder, frames, lost)
    if is_earlier:
        BadPages(monkeypatch, segments(path)[0], pages)
        with opened(path) as folder:
            assert not folder.problems
            check_unreadable(folder, frames, lost)


def check_unreadable(folder: Folder, frames: list[bytes], lost: set[int]) -> None:
    result = folder.read(0, 1 << 30)
    assert result.frames == [(number, frame) for number, frame in enumerate(frames, 1) if number not in lost]
    assert (result.damaged, result.last) == (len(lost), len(frames))
    assert "unreadable" in "".join(result.problems)
    name = segments(Path(folder.path))[0].name
    folder.advance(len(frames))
    assert [each.name for each in Path(folder.path).glob("*.seg*")] == [f"{name}.left"]


def test_without_skips_reading_stops_before_an_unreadable_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = frames_of(300)
    lost = touching(2, [len(frame) for frame in frames])
    with opened(path) as folder:
        Writer(folder).append(frames)
        bad = BadPages(monkeypatch, segments(path)[0], {2})
        result = folder.read(0, 1 << 30, skips=False)
        assert (len(result.frames), result.damaged, result.last) == (min(lost) - 1, 0, min(lost) - 1)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            folder.read(result.last, 1 << 30, skips=False)
        bad.pages = set()
        assert len(folder.read(result.last, 1 << 30).frames) == 300 - result.last
        folder.advance(300)
        assert not list(Path(folder.path).glob("*.seg*"))


def test_a_disk_that_reads_nothing_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as folder:
        Writer(folder).append([bytes(4076)] * 1000)
        bad = BadPages(monkeypatch, segments(path)[0], set(range(10, 1001)))
        result = folder.read(0, 1 << 30)
        assert result.damaged + len(result.frames) == 1000
        assert len(result.frames) >= 9
        assert (1 << 30) - bad.attempts < 500


# Failures of the disk


class Disk:
    """System calls that fail on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.space: int | None = None
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []
        self._writev: Callable[[int, list[bytes]], int] = os.writev
        monkeypatch.setattr(os, "writev", self.writev)
        for name in ("ftruncate", "fdatasync", "fsync", "unlink", "rename", "pwrite", "open"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if self.failing.get(name, 0):
                self.failing[name] -= 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **options)

        return wrapped

    def writev(self, descriptor: int, buffers: list[bytes]) -> int:
        if self.space is None:
            return self._writev(descriptor, buffers)
        data = b"".join(buffers)[: min(self.space, 50)]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.space -= len(data)
        return self._writev(descriptor, [data])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_short_writes_go_on(path: Path, disk: Disk) -> None:
    frames = frames_of(20)
    disk.space = 1 << 20
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append(frames[:10])
        writer.append(frames[10:])
        assert drain(folder) == (list(enumerate(frames, 1)), 0)


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL", "FULL"])
@pytest.mark.parametrize("space", [0, 10, HEADER_SIZE, 60, 110, 200])
def test_a_refused_batch_never_arrives(path: Path, disk: Disk, space: int, synchronous: str) -> None:
    with opened(path, synchronous) as folder:
        writer = Writer(folder)
        disk.space = space
        with pytest.raises(OSError, match="No space"):
            writer.append(frames_of(20))
        assert (segments(path), folder.last_seq, folder.count) == ([], 0, 0)
        disk.space = None
        writer.append(frames_of(3))
        size = segments(path)[0].stat().st_size
        disk.space = space
        with pytest.raises(OSError, match="No space"):
            writer.append(frames_of(20))
        assert segments(path)[0].stat().st_size == size
        assert folder.check() == Check()
        disk.space = None
        assert writer.append([b"after"]) == 4
        assert len(segments(path)) == 2, "the first takes no more: it may be the file that has no room"
        expected = [*enumerate(frames_of(3), 1), (4, b"after")]
        assert drain(folder) == (expected, 0)
        crash(folder)
    with opened(path) as folder:
        assert drain(folder) == (expected, 0)


def test_a_segment_that_cannot_be_cut_is_rewritten(path: Path, disk: Disk) -> None:
    with opened(path, "FULL") as folder:
        writer = Writer(folder)
        writer.append(frames_of(6))
        folder.advance(2)
        (old,) = segments(path)
        # Space for a part of the batch; then none is needed for the copy.
        real, disk.failing = disk._writev, {"ftruncate": 1}

        def once(descriptor: int, buffers: list[bytes]) -> int:
            disk._writev = real
            real(descriptor, [b"".join(buffers)[:90]])
            raise OSError(errno.EIO, "broken")

        disk._writev = once
        with pytest.raises(OSError, match="broken"):
            writer.append([b"refused"] * 9)
        assert not old.exists()
        assert not writer.may_append
        expected = list(enumerate(frames_of(6), 1))[2:]
        assert drain(folder) == (expected, 0)
        assert folder.check() == Check()
        assert writer.append([b"after"]) == 7
        assert len(segments(path)) == 2
        expected.append((7, b"after"))
        assert drain(folder) == (expected, 0)
        assert folder.count == 5
        crash(folder)
    with opened(path) as folder:
        assert drain(folder) == (expected, 0)
        assert folder.count == 5


@pytest.mark.parametrize("failing", [{}, {"rename": 1}, {"rename": 1, "pwrite": 1}])
@pytest.mark.parametrize("cursor", [0, 2])
def test_a_segment_that_can_be_neither_cut_nor_rewritten(
    path: Path, disk: Disk, failing: dict[str, int], cursor: int
) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append(frames_of(6))
        folder.advance(cursor)
        disk.space, disk.failing = 100, {"ftruncate": 1, **failing}
        with pytest.raises(OSError, match="No space"):
            writer.append([b"refused"] * 9)
        disk.space, disk.failing = None, {}
        assert not writer.may_append
        expected = list(enumerate(frames_of(6), 1))[cursor:]
        assert drain(folder) == (expected, 0)
        assert folder.check() == Check()
        assert writer.append([b"after"]) == 7
        expected.append((7, b"after"))
        assert drain(folder) == (expected, 0)
        crash(folder)
    with opened(path) as folder:
        assert drain(folder) == (expected, 0)
        assert folder.count == len(expected)
        assert folder.last_seq >= 7
        folder.advance(folder.last_seq)
        assert segments(path) == []


@pytest.mark.parametrize("failing", [{"unlink": 1}, {"unlink": 2}, {"unlink": 2, "rename": 1}])
def test_a_new_segment_that_cannot_be_removed(path: Path, disk: Disk, failing: dict[str, int]) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        disk.space, disk.failing = 100, dict(failing)
        with pytest.raises(OSError, match="No space"):
            writer.append([b"refused"] * 9)
        disk.space, disk.failing = None, {}
        assert drain(folder) == ([], 0)
        assert writer.append([b"after"]) == 1
        assert folder.check() == Check()
        crash(folder)
    with opened(path) as folder:
        assert drain(folder) == ([(1, b"after")], 0)


@pytest.mark.parametrize("times", [1, 2, 99])
@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_failing_sync_refuses_the_batch(path: Path, disk: Disk, call: str, times: int) -> None:
    with opened(path, "FULL") as folder:
        writer = Writer(folder)
        disk.failing = {call: times}
        with pytest.raises(OSError, match="Input/output"):
            writer.append([b"refused"])
        disk.failing = {}
        assert (segments(path), folder.count) == ([], 0)
        writer.append(frames_of(6))
        expected = list(enumerate(frames_of(6), 1))
        disk.failing = {"fdatasync": times}
        with pytest.raises(OSError, match="Input/output"):
            writer.append([b"refused"])
        disk.failing = {}
        assert drain(folder) == (expected, 0)
        assert len(segments(path)) == 1
        assert writer.append([b"after"]) == 7
        expected.append((7, b"after"))
        assert drain(folder) == (expected, 0)
        crash(folder)
    with opened(path) as folder:
        assert drain(folder) == (expected, 0)
        assert folder.count == 7


def test_syncs_as_configured(path: Path, disk: Disk) -> None:
    def counted(name: str, synchronous: str) -> tuple[int, int]:
        with opened(path / name, synchronous) as folder:
            writer = Writer(folder)
            writer.append([b"x"])
            disk.calls.clear()
            for _ in range(12):
                writer.append([b"x" * (1 << 20)])
            writer.append([b"x"])
            grown = disk.calls.count("fdatasync")
            writer.append([b"x"], roll=True)
            return grown, disk.calls.count("fdatasync") - grown

    path.mkdir()
    assert counted("off", "OFF") == (0, 0)
    assert counted("normal", "NORMAL") == (3, 1)
    assert counted("full", "FULL") == (13, 1)


def test_a_failing_sync_at_the_end_of_a_segment(path: Path, disk: Disk) -> None:
    with opened(path, "NORMAL") as folder:
        writer = Writer(folder)
        writer.append(frames_of(5))
        disk.failing = {"fdatasync": 1}
        with pytest.raises(OSError, match="Input/output"):
            writer.append([b"refused"], roll=True)
        assert drain(folder) == (list(enumerate(frames_of(5), 1)), 0)
        assert len(segments(path)) == 1
        assert writer.append([b"after"]) == 6
        assert len(drain(folder)[0]) == 6


def test_failing_removal_is_retried(path: Path, disk: Disk) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append(frames_of(5))
        writer.append(frames_of(5), roll=True)
        disk.failing = {"unlink": 1}
        with pytest.raises(OSError, match="Input/output"):
            folder.advance(7)
        assert len(segments(path)) == 2
        assert seqs(folder) == [8, 9, 10]
        assert folder.advance(7)
        assert len(segments(path)) == 1
        disk.failing = {"pwrite": 1}
        folder.advance(8)
        disk.failing = {"pwrite": 2}
        with pytest.raises(OSError, match="Input/output"):
            folder.advance(9)
        folder.advance(9)
        crash(folder)
    with opened(path) as folder:
        assert seqs(folder) == [10]


CALLS = ["ftruncate", "fdatasync", "fsync", "unlink", "rename", "open"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "roll", "advance", "reopen", "check"]),
        st.integers(0, 5),
        st.one_of(st.none(), st.integers(0, 300)),
        st.dictionaries(st.sampled_from(CALLS), st.integers(1, 3), max_size=3),
    ),
    max_size=25,
)


@QUICK
@given(synchronous=st.sampled_from(["OFF", "NORMAL", "FULL"]), steps=STEPS)
def test_no_failure_loses_an_accepted_frame_or_delivers_a_refused_one(
    synchronous: str, steps: list[tuple[str, int, int | None, dict[str, int]]]
) -> None:
    with TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        folder = Folder(f"{parent}/spool", synchronous)
        folder.open()
        writer = Writer(folder)
        expected: list[tuple[int, bytes]] = []
        try:
            for number, (step, size, space, failing) in enumerate(steps):
                disk.space, disk.failing = space, dict(failing)
                try:
                    if step == "advance" and expected:
                        done = expected[: size + 1]
                        del expected[: size + 1]
                        folder.advance(done[-1][0])
                    elif step == "reopen":
                        folder.leave()
                        folder.open()
                    elif step == "check":
                        assert folder.check() == Check()
                    elif step in ("append", "roll"):
                        frames = [b"%d %d " % (number, at) + b"x" * at * 20 for at in range(size + 1)]
                        expected += enumerate(frames, writer.append(frames, roll=step == "roll"))
                except OSError:
                    pass
                disk.space, disk.failing = None, {}
                if not folder.is_open:
                    folder.open()
                if step == "advance":
                    # Retry: without the cursor, a crash repeats frames.
                    folder.advance(folder.cursor)
                assert folder.check() == Check()
                assert drain(folder, 300) == (expected, 0)
            folder.leave()
            folder.open()
            assert drain(folder, 300) == (expected, 0)
            folder.advance(folder.last_seq)
            folder.close(remove_if_empty=True)
        finally:
            folder.leave()
        # A file that a failing disk did not let go when the folder was opened is left alone.
        left = {each.name for each in Path(parent).glob("spool/*")} - {"lock", "cursor"}
        assert all(name.endswith(".left") for name in left)
        assert left or os.listdir(parent) == []


def test_a_limit_on_the_size_of_files(path: Path) -> None:
    program = """
        import resource, sys
        from geventaudit.spool.folder import Folder
        folder = Folder(sys.argv[1])
        folder.open()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        sent = 0
        while True:
            try:
                folder.append(folder.prepare(sent + 1, [b"x" * 700] * 3))
            except OSError as error:
                print(error.errno, sent)
                break
            sent += 3
        for _ in range(2):
            folder.append(folder.prepare(sent + 1, [b"x" * 700] * 3))
            sent += 3
        print([seq for seq, _ in folder.read(0, 1 << 20).frames] == list(range(1, sent + 1)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{errno.EFBIG} 12\nTrue\n"
    with opened(path) as folder:
        assert seqs(folder) == list(range(1, 19))
    assert len(segments(path)) == 2, "a failed append ends the segment"


# Changes by others


def filled(folder: Folder) -> Writer:
    """Append 15 frames in 3 segments, of which 2 frames are delivered."""
    writer = Writer(folder)
    for start in (1, 6, 11):
        writer.append(frames_of(5, start), roll=True)
    folder.advance(2)
    return writer


EXPECTED = list(enumerate(frames_of(15), 1))[2:]


def check_restored(path: Path, folder: Folder, writer: Writer) -> None:
    """The frames are all there, now and after a crash, and the folder works."""
    assert folder.check() == Check()
    assert drain(folder) == (EXPECTED, 0)
    writer.append([b"after"])
    assert folder.check() == Check()
    for file in [*segments(path), path / "lock", path / "cursor"]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(SpoolError):
        Folder(str(path)).open()
    crash(folder)
    with opened(path) as again:
        assert drain(again) == ([*EXPECTED, (16, b"after")], 0)
        assert not list(path.glob(".*"))


@pytest.mark.parametrize("is_earlier", [False, True])
@pytest.mark.parametrize("synchronous", ["OFF", "FULL"])
def test_removed_files_are_copied_back(path: Path, is_earlier: bool, synchronous: str) -> None:
    with opened(path, synchronous) as folder:
        writer = filled(folder)
        if is_earlier:
            crash(folder)
            folder.open()
        for file in segments(path)[1:]:
            file.unlink()
        result = folder.check()
        assert (result.restored, result.missing, result.problems) == (2, [], [])
        check_restored(path, folder, writer)


def test_replaced_and_moved_files_are_copied_back(path: Path, tmp_path: Path) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        first, second, third = segments(path)
        other = tmp_path / "other"
        other.write_bytes(b"other")
        other.rename(first)
        second.rename(tmp_path / "moved")
        third.unlink()
        third.symlink_to(tmp_path / "moved")
        assert folder.check().restored == 3
        assert (tmp_path / "moved").stat().st_size
        check_restored(path, folder, writer)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_removed_folder_is_made_anew(path: Path, tmp_path: Path, is_replaced: bool) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        path.rename(tmp_path / "moved")
        if is_replaced:
            path.mkdir(0o700)
        result = folder.check()
        assert result.restored == 3
        assert any(str(path) in problem for problem in result.problems)
        check_restored(path, folder, writer)


def test_a_folder_that_is_removed_with_all_files(path: Path) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        assert folder.check().restored == 3
        check_restored(path, folder, writer)


@pytest.mark.parametrize("name", ["lock", "cursor"])
def test_a_removed_lock_or_cursor_is_made_anew(path: Path, name: str) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        (path / name).unlink()
        result = folder.check()
        assert (result.restored, len(result.problems)) == (0, 1)
        check_restored(path, folder, writer)


def test_a_folder_that_another_owner_has_taken(path: Path, tmp_path: Path) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        path.rename(tmp_path / "moved")
        with opened(path):
            for _ in range(2):
                with pytest.raises(OSError, match="in use by another"):
                    folder.check()
            assert drain(folder) == (EXPECTED, 0)
        assert folder.check().restored == 3
        check_restored(path, folder, writer)


def test_restoring_is_retried(path: Path, disk: Disk) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        first, second, third = segments(path)
        first.unlink()
        second.unlink()
        os.truncate(third, third.stat().st_size - 1)
        disk.failing = {"rename": 1}
        with pytest.raises(OSError, match="Input/output"):
            folder.check()
        assert not list(path.glob(".*"))
        assert drain(folder) == (EXPECTED[:-1], 0)
        # Nothing that the failed call has found is lost.
        result = folder.check()
        assert (result.restored, result.missing) == (2, [(15, 15)])
        assert first.exists()
        assert second.exists()
        assert writer.append([b"after"]) == 16
        assert drain(folder)[0] == [*EXPECTED[:-1], (16, b"after")]


def test_truncated_files_are_missing(path: Path) -> None:
    ends = [end for _, end in spans(frames_of(5, 11))]
    with opened(path) as folder:
        writer = filled(folder)
        first, second, third = segments(path)
        os.truncate(first, 0)
        os.truncate(second, HEADER_SIZE + 1)
        os.truncate(third, ends[2] - 1)
        result = folder.check()
        assert result.missing == [(3, 5), (6, 10), (13, 15)]
        assert len(result.problems) == 3
        assert not writer.may_append
        assert folder.check() == Check()
        assert segments(path) == [third]
        assert drain(folder) == (EXPECTED[8:10], 0)
        assert folder.count == 2
        assert writer.append([b"after"]) == 16
        assert folder.check() == Check()
    with opened(path) as folder:
        assert drain(folder) == ([*EXPECTED[8:10], (16, b"after")], 0)


def test_truncated_below_the_cursor_is_not_missing(path: Path) -> None:
    with opened(path) as folder:
        writer = Writer(folder)
        writer.append(frames_of(5))
        folder.advance(3)
        os.truncate(segments(path)[0], spans(frames_of(5))[1][1])
        assert folder.check().missing == [(4, 5)]
        assert segments(path) == []
        assert writer.append([b"x"]) == 6


def test_garbage_that_is_appended_is_no_frame(path: Path) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        for file in segments(path):
            with file.open("ab") as stream:
                stream.write(b"garbage" * 10)
        result = folder.check()
        assert (result.restored, result.missing, len(result.problems)) == (0, [], 3)
        assert not writer.may_append
        check_restored_frames(folder, writer)


def check_restored_frames(folder: Folder, writer: Writer) -> None:
    assert folder.check() == Check()
    assert drain(folder) == (EXPECTED, 0)
    writer.append([b"after"])
    assert folder.check() == Check()
    assert drain(folder) == ([*EXPECTED, (16, b"after")], 0)


def test_garbage_before_the_next_append_is_overwritten(path: Path) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        with segments(path)[2].open("ab") as stream:
            stream.write(b"garbage")
        check = writer.append([b"a frame that is longer than the garbage"])
        assert check == 16
        assert folder.check() == Check()
        assert len(drain(folder)[0]) == 14


def test_advance_leaves_the_files_of_others(path: Path) -> None:
    with opened(path) as folder:
        filled(folder)
        file = segments(path)[0]
        file.unlink()
        file.write_bytes(b"other")
        folder.advance(15)
        assert segments(path) == [file]


# Rejected frames


def test_rejected_frames_are_readable(path: Path) -> None:
    with opened(path) as folder:
        folder.reject(b"\x00\xff frame", 'not "taken"\n')
        with (path / "rejected.jsonl").open("ab") as stream:
            stream.write(b'{"torn')
        folder.reject(b"two", "x" * 10_000)
        first, torn, second = (path / "rejected.jsonl").read_text().splitlines()
        assert base64.b64decode(json.loads(first)["frame"]) == b"\x00\xff frame"
        assert json.loads(first)["reason"] == 'not "taken"\n'
        assert json.loads(first)["time"] > 1e9
        assert torn == '{"torn'
        assert base64.b64decode(json.loads(second)["frame"]) == b"two"


def test_rejected_frames_are_bounded(path: Path) -> None:
    with opened(path) as folder:
        for number in range(40):
            folder.reject(b"%d" % number + b"x" * 100_000, "too much")
        current, previous = path / "rejected.jsonl", path / "rejected.1.jsonl"
        assert current.stat().st_size <= RotatingPair.LIMIT
        assert 800_000 < previous.stat().st_size <= RotatingPair.LIMIT
        entries = [json.loads(line) for file in (previous, current) for line in file.read_text().splitlines()]
        numbers = [int(base64.b64decode(entry["frame"])[:2].rstrip(b"x")) for entry in entries]
        assert numbers == list(range(40 - len(numbers), 40))
        folder.reject(b"y" * (3 << 20), "\U0001f600" * 10_000)
        (entry,) = [json.loads(line) for line in current.read_text().splitlines()]
        assert current.stat().st_size <= RotatingPair.LIMIT
        assert entry["length"] == 3 << 20
        assert len(base64.b64decode(entry["frame"])) == entry["cut_to"] > 700_000


def test_damaged_regions_are_bounded(path: Path) -> None:
    path.mkdir(0o700)
    for seq in (1, 2, 3):
        (path / f"{seq:020d}-{new_magic().hex()}.seg").write_bytes(b"?" * (3 << 20))
    with opened(path) as folder:
        assert drain(folder) == ([], 3)
        for name in ("damaged.bin", "damaged.1.bin"):
            data = (path / name).read_bytes()
            note = json.loads(data.split(b"\n", 1)[0])
            assert (note["length"] > 3_000_000, note["cut_to"] > 1_000_000) == (True, True)
            assert len(data) <= RotatingPair.LIMIT


def test_a_rejected_frame_that_cannot_be_written(path: Path, disk: Disk) -> None:
    with opened(path) as folder:
        folder.reject(b"one", "first")
        disk.space = 60
        with pytest.raises(OSError, match="No space"):
            folder.reject(b"two", "second")
        disk.space = None
        folder.reject(b"three", "third")
        assert len([json.loads(line) for line in (path / "rejected.jsonl").read_text().splitlines()]) == 2


# The folder


def test_modes_do_not_depend_on_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        for mask in (0, 0o077, 0o777):
            os.umask(mask)
            with opened(path) as folder:
                Writer(folder).append([b"a", b"b"])
                folder.advance(folder.last_seq - 1)
                folder.reject(b"x", "y")
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            for file in path.iterdir():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600
                file.chmod(0o666)
    finally:
        os.umask(before)


def test_a_missing_folder(path: Path) -> None:
    folder = Folder(str(path))
    with pytest.raises(FileNotFoundError, match=str(path)):
        folder.open(create=False)
    assert not path.exists()
    deep = Folder(str(path / "deep"))
    with pytest.raises(SpoolError, match=f"{path}/deep cannot be made: its parent folder is missing; make it"):
        deep.open()
    folder.open()
    folder.close()
    folder.open(create=False)
    with pytest.raises(SpoolError, match="open already"):
        folder.open()
    folder.close()
    with pytest.raises(SpoolError, match="closed; open it first"):
        folder.read(0, 1)


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_links_and_files_are_refused(path: Path, tmp_path: Path, slash: str) -> None:
    path.mkdir()
    link, file, sqlite, fifo = (tmp_path / name for name in ("link", "file", "sqlite", "fifo"))
    link.symlink_to(path)
    file.write_bytes(b"text")
    sqlite.write_bytes(b"SQLite format 3\0" + bytes(100))
    os.mkfifo(fifo)
    for target, text in [
        (link, f"the spool {link} is a symbolic link; give the folder itself"),
        (file, f"the spool {file} is a file; give a folder"),
        (
            sqlite,
            rf"{sqlite} is a spool of an earlier version \(SQLite\); drain it with that version or remove it, and",
        ),
        (fifo, "no folder; give a folder"),
    ]:
        for create in (True, False):
            with pytest.raises(SpoolError, match=text):
                Folder(f"{target}{slash}").open(create=create)
    assert os.listdir(path) == []


@pytest.mark.parametrize("name", ["lock", "cursor"])
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_links_in_the_folder_are_not_followed(path: Path, tmp_path: Path, name: str, kind: str) -> None:
    path.mkdir(0o700)
    outside = tmp_path / "outside"
    if kind == "link":
        (path / name).symlink_to(outside)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        os.mkfifo(path / name)
    with pytest.raises(OSError, match=f"not a regular file; remove it: '{path / name}'"):
        Folder(str(path)).open()
    assert not outside.exists()


@needs_root
def test_a_folder_of_another_user_is_refused(path: Path) -> None:
    path.mkdir()
    os.chown(path, 12345, -1)
    with pytest.raises(SpoolError, match=f"{path} belongs to user 12345, and this process runs as user 0; run as"):
        Folder(str(path)).open()
    assert orphans(str(path.parent / "sp{pid}ol")) == []


@needs_root
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.seteuid(12345)
    try:
        with pytest.raises(SpoolError, match=r"permission denied for user 12345; grant|Permission"):
            Folder(str(tmp_path / "spool")).open()
    finally:
        os.seteuid(0)


def test_no_failure_leaves_a_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as folder:
        filled(folder)
    before = descriptors()
    failures = 0
    for name in ("open", "fstat", "stat", "listdir", "pread", "fchmod", "geteuid"):
        real = getattr(os, name)
        for fail_at in range(12):
            calls = iter(range(1000))

            def failing(
                *args: Any, real: Any = real, calls: Iterator[int] = calls, fail_at: int = fail_at, **options: Any
            ) -> Any:
                if next(calls) == fail_at:
                    raise OSError(errno.ENOMEM, "injected")
                return real(*args, **options)

            folder = Folder(str(path), "FULL")
            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    folder.open()
                except (OSError, SpoolError):
                    failures += 1
                    assert not folder.is_open
                    with pytest.raises(SpoolError, match="closed"):
                        folder.check()
                folder.close()
            assert len(descriptors()) <= len(before), (name, fail_at)
    assert failures > 15


def test_close_removes_an_empty_folder(path: Path) -> None:
    folder = Folder(str(path))
    folder.open()
    Writer(folder).append([b"x"])
    folder.close(remove_if_empty=True)
    assert path.exists()
    folder.open()
    folder.advance(1)
    folder.close(remove_if_empty=True)
    folder.close(remove_if_empty=True)
    assert not path.exists()
    folder.open()
    folder.reject(b"x", "y")
    folder.close(remove_if_empty=True)
    assert path.exists()


def test_a_relative_path_stays_the_same_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    monkeypatch.chdir(path.parent)
    with opened(Path("spool")) as folder:
        monkeypatch.chdir("/")
        Writer(folder).append([b"x"])
        assert folder.check() == Check()
        assert folder.path == str(path)


def test_the_lock_ends_with_its_owner_while_a_copy_is_open(tmp_path: Path) -> None:
    """A child that was forked just now has copies of all descriptors, until its first code runs."""
    path = str(tmp_path / "spool")
    folder = Folder(path, "OFF")
    folder.open()
    lock = os.stat(tmp_path / "spool" / "lock")
    (descriptor,) = [each for each in map(int, os.listdir("/proc/self/fd")) if is_open_as(each, lock)]
    copy = os.dup(descriptor)
    try:
        folder.close()
        folder.open()
        folder.close()
    finally:
        os.close(copy)


def is_open_as(descriptor: int, status: os.stat_result) -> bool:
    try:
        opened = os.fstat(descriptor)
    except OSError:  # the descriptor of the listing itself
        return False
    return (opened.st_dev, opened.st_ino) == (status.st_dev, status.st_ino)


def test_orphans(tmp_path: Path) -> None:
    folders = [f"spool-{each}" for each in ("12", "7", "7.2", "x", "", "12x", "7.", "7.x")]
    for name in (*folders, "other-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "spool-3").write_bytes(b"")
    (tmp_path / "spool-4").symlink_to(tmp_path / "spool-7")
    assert orphans(str(tmp_path / "spool-{pid}")) == [str(tmp_path / f"spool-{each}") for each in ("12", "7", "7.2")]
    assert orphans(str(tmp_path / "spool")) == []
    assert orphans(str(tmp_path / "none" / "spool-{pid}")) == []
    assert orphans(str(tmp_path / "{pid}" / "spool")) == []


# Locks and forks


def test_two_folders_of_one_process_exclude_each_other(path: Path) -> None:
    text = f"{path} is in use by another process or another client of this one"
    with opened(path), pytest.raises(SpoolError, match=text):
        Folder(str(path)).open()
    with opened(path):
        pass


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_removed_lock_lets_no_second_owner_in(path: Path, change: str) -> None:
    """As a program does that cleans folders of old files."""
    with opened(path) as folder:
        lock = path / "lock"
        lock.unlink()
        if change == "replaced":
            lock.touch()
        with pytest.raises(FolderTakenError, match="in use"):
            Folder(str(path)).open()
        assert folder.check(), "the owner makes it anew, though it has locked the folder"
        assert not folder.check()
        assert folder.is_in_place
        lock.unlink()
        with pytest.raises(FolderTakenError, match="in use"):
            Folder(str(path)).open()
    with opened(path):
        pass


def test_a_file_system_that_locks_no_folders(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, say: a second owner that comes when the lock was removed is noticed."""
    flock = fcntl.flock

    def lock(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    with opened(path) as folder:
        with pytest.raises(FolderTakenError, match="in use"):
            Folder(str(path)).open()
        (path / "lock").unlink()
        with opened(path), pytest.raises(OSError, match="in use"):
            folder.check()
        assert folder.check()
        assert folder.is_in_place


def run_child(path: Path, program: str) -> subprocess.Popen[str]:
    """Start a process that has the folder open, and return when it is ready."""
    source = f"""
import os, signal, sys, time
from geventaudit.spool.folder import Folder
folder = Folder({str(path)!r})
folder.open()
{textwrap.dedent(program)}
"""
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        process.kill()
    process.communicate()


def test_processes_exclude_each_other(path: Path) -> None:
    process = run_child(path, "print('ready', flush=True); sys.stdin.read()")
    try:
        with pytest.raises(SpoolError, match="in use by another process"):
            Folder(str(path)).open()
    finally:
        finish(process, kill=True)
    with opened(path):
        pass


def test_the_lock_ends_with_the_parent_though_a_child_lives(path: Path) -> None:
    process = run_child(
        path,
        """
        read, write = os.pipe()
        child = os.fork()
        if not child:
            folder.leave()
            folder.leave()
            os.write(write, b"x")
            signal.pause()
        os.read(read, 1)
        print("ready", flush=True)
        print(child, flush=True)
        sys.stdin.read()
        """,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        # The child has left; the lock is the parent's still.
        with pytest.raises(SpoolError, match="in use"):
            Folder(str(path)).open()
        process.kill()
        process.wait()
        with opened(path):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        finish(process)


def test_a_killed_process_loses_nothing(path: Path) -> None:
    process = run_child(
        path,
        """
        from geventaudit.spool.format import encode_runs
        print("ready", flush=True)
        seq = 0
        while True:
            for index in range(0, 50, 5):
                frames = [b"frame %d" % at + b"x" * 900 for at in range(seq + 1, seq + 6)]
                folder.append(folder.prepare(seq + 1, frames) if index else encode_runs(enumerate(frames, seq + 1))[0])
                seq += 5
                os.write(1, b"%d\\n" % seq)
        """,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(100)]
    process.kill()
    lines += process.communicate()[0].splitlines(keepends=True)
    appended = max(int(line) for line in lines if line.endswith("\n"))
    assert appended >= 500
    with opened(path) as folder:
        frames, damaged = drain(folder)
        assert [seq for seq, _ in frames] == list(range(1, len(frames) + 1))
        assert [frame for _, frame in frames] == [b"frame %d" % seq + b"x" * 900 for seq, _ in frames]
        assert appended <= len(frames)
        assert not damaged


def test_leave_changes_nothing(path: Path) -> None:
    with opened(path) as folder:
        writer = filled(folder)
        before = {file: file.read_bytes() for file in path.iterdir()}
        with warnings.catch_warnings():
            # A fork of a process with threads; the child does nothing that needs them.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            code = 1
            try:
                folder.leave()
                folder.close(remove_if_empty=True)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert {file: file.read_bytes() for file in path.iterdir()} == before
        with pytest.raises(SpoolError, match="in use"):
            Folder(str(path)).open()
        check_restored(path, folder, writer)


def test_too_many_open_files(path: Path) -> None:
    with opened(path) as folder:
        filled(folder)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        crash(folder)
        used = descriptors()
        limit = [number for number in range(1000) if str(number) not in used][4]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                folder.open()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        folder.open()
        assert drain(folder) == (EXPECTED, 0)


def test_segments_beyond_the_limit_of_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MAX_OPEN", 3)
    with opened(path) as folder:
        writer = Writer(folder)
        for start in range(1, 41, 2):
            writer.append(frames_of(2, start), roll=True)
    expected = list(enumerate(frames_of(40), 1))
    before = len(descriptors())
    with opened(path) as folder:
        assert len(descriptors()) == before + 2 + 3
        for max_bytes in (1, 1 << 20):
            assert drain(folder, max_bytes) == (expected, 0)
        assert folder.check() == Check()
        assert len(descriptors()) == before + 2 + 3
        files = segments(path)
        files[0].unlink()
        files[10].unlink()
        assert folder.read(0, 1 << 20).damaged == 2
        assert str(files[10]) in folder.read(0, 1 << 20).problems[0]
        result = folder.check()
        assert (result.restored, result.missing) == (1, [(21, 22)])
        expected = expected[:20] + expected[22:]
        assert drain(folder) == (expected, 0)
        Writer(folder).append([b"after"])
        assert folder.advance(39)
        assert seqs(folder) == [40, 41]
    with opened(path) as folder:
        assert seqs(folder) == [40, 41]
    assert len(descriptors()) == before


def test_segments_of_this_run_beyond_the_limit_of_descriptors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long outage and a large disk: the service needs descriptors too."""
    monkeypatch.setattr(recovery, "MAX_OPEN", 3)
    before = len(descriptors())
    with opened(path) as folder:
        writer = Writer(folder)
        for start in range(1, 41, 2):
            writer.append(frames_of(2, start), roll=True)
            assert not folder.check()
        assert len(descriptors()) <= before + 2 + 3 + 1
        expected = list(enumerate(frames_of(40), 1))
        assert drain(folder, 1) == (expected, 0)
        assert folder.advance(39)
        assert drain(folder) == (expected[39:], 0)
        assert len(segments(path)) == 1
    with opened(path) as folder:
        assert drain(folder) == (expected[39:], 0)
    assert len(descriptors()) == before


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_segment_that_cannot_be_opened_now(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Its records would count as delivered once later ones are."""
    file = write_segment(path, frames_of(3))
    open_file = os.open

    def fail(name: str, *arguments: Any, **options: Any) -> int:
        if name == file.name:
            raise OSError(code, os.strerror(code))
        return open_file(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            Folder(str(path)).open()
    with opened(path) as folder:
        assert seqs(folder) == [1, 2, 3]


# A model


class Model(RuleBasedStateMachine):
    """A folder and a list of the frames that it must hold."""

    @initialize()
    def start(self) -> None:
        self.parent = TemporaryDirectory()
        self.path = Path(self.parent.name) / "spool"
        self.folder = Folder(str(self.path), "OFF")
        self.folder.open()
        self.writer = Writer(self.folder)
        self.frames: list[tuple[int, bytes]] = []
        self.last = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.close()
            self.parent.cleanup()

    @rule(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=6), roll=st.booleans(), gap=st.integers(0, 3))
    def append(self, sizes: list[int], roll: bool, gap: int) -> None:
        if gap and not roll:
            gap = 0
        frames = [os.urandom(size) for size in sizes]
        seq = self.writer.append(frames, roll=roll, seq=self.folder.last_seq + 1 + gap)
        self.frames += enumerate(frames, seq)
        self.last = seq + len(frames) - 1

    @rule(share=st.floats(0, 1))
    def advance(self, share: float) -> None:
        if count := int(len(self.frames) * share):
            self.folder.advance(self.frames[count - 1][0])
            del self.frames[:count]

    @rule(orderly=st.booleans())
    def reopen(self, orderly: bool) -> None:
        if orderly:
            self.folder.close()
        else:
            self.folder.leave()
        self.folder.open()

    @precondition(lambda self: self.frames)
    @rule(data=st.data())
    def remove_file(self, data: st.DataObject) -> None:
        files = segments(self.path)
        data.draw(st.sampled_from(files)).unlink()
        assert self.folder.check().restored == 1

    @rule(share=st.floats(0, 1), max_bytes=st.integers(0, 2000))
    def read(self, share: float, max_bytes: int) -> None:
        at = int(len(self.frames) * share)
        after = self.frames[at - 1][0] if at else 0
        result = self.folder.read(after, max_bytes)
        assert result.frames == self.frames[at : at + len(result.frames)]
        assert bool(result.frames) == (at < len(self.frames))
        assert sum(OVERHEAD + len(frame) for _, frame in result.frames[:-1]) <= max_bytes
        assert not result.damaged

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "folder"):
            return
        assert self.folder.check() == Check()
        assert drain(self.folder, 1000) == (self.frames, 0)
        assert self.folder.count == len(self.frames)
        assert self.folder.last_seq == self.last
        size = sum(OVERHEAD + len(frame) for _, frame in self.frames)
        assert abs(self.folder.undelivered_bytes - size) < 3000
        assert bool(self.frames) == bool(segments(self.path))


Model.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=20)
TestModel = Model.TestCase
