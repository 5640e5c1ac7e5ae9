"""The checks of one stream, record by record in the order of the numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from ..trail.keys import parse_stream
from .findings import Gaps, StreamReport
from .keyring import Candidate, KeyCopy, KeyRing
from .rows import PLAIN_SEALED, Row, has_note, plain_parts, sealed_parts, unpack_row
from .state import Remembered

__all__ = ["StreamCheck"]


class StreamCheck:
    """Checks the records of one stream. Feed all rows of one number at once, ascending.

    :param ring: the auditor's keys; None to check numbers only.
    :param remembered: of an earlier verification.
    :param note_of: returns the rare parts of a row.
    :param place_of: names the place of a row for people.
    :param reject: takes each row that no key authenticates.
    """

    def __init__(
        self,
        stream: str,
        ring: KeyRing | None,
        remembered: Remembered | None,
        note_of: Callable[[Row], dict[str, Any]],
        place_of: Callable[[Row], str],
        reject: Callable[[Row], None],
    ) -> None:
        self.report = StreamReport(stream)
        self.explained: list[tuple[int, int]] = []
        """Ranges of numbers that checkpoints account for."""
        self.adopted: dict[str, int] = {}
        """The last numbers of other streams that this one has sent on."""
        self.was: list[tuple[str, int]] = []
        """Numbers of records that were sent again."""
        self.children = 0
        """The highest number of children in a checkpoint."""
        self._ring = ring
        self._remembered = remembered
        self._note_of = note_of
        self._place_of = place_of
        self._reject = reject
        self._gaps = Gaps(self.report.missing)
        self._candidates: list[Candidate] = []
        self._at = 1  # the number whose key the candidates have
        self._owed = 0  # steps that nothing authentic has paid for
        self._digest = hashlib.sha256()
        self._is_whole = True  # all authentic records from 1 on are there
        self._delivered = 0
        self._last_time = b""
        if ring is not None:
            name = parse_stream(stream)
            if name is None:
                self.report.is_unsealed = True
            else:
                self._candidates, self._owed = ring.candidates(name)

    @property
    def key(self) -> KeyCopy | None:
        """The copy that has authenticated a record."""
        if self.report.key is None:
            return None
        return self._candidates[0].copy

    def add(self, copies: list[bytes]) -> None:
        """Check all copies of one number, packed rows."""
        if len(copies) == 1 and (self._follows if self._ring is None else self._follows_sealed)(copies[0]):
            return
        rows = [unpack_row(data) for data in copies]
        seq = rows[0].seq
        if self._ring is None or self.report.is_unsealed:
            self._accept(self._distinct(rows))
            return
        if not self._evolve_to(seq):
            self.report.too_far.add(self._where(rows[0]))
            for row in rows:
                self._reject(row)
            return
        valid = self._authentic(rows)
        if valid is not None:
            self._accept(valid)
        else:
            self.report.altered_only.add(seq, seq)
            self._gaps.skip(seq, self._before())

    def _follows(self, data: bytes) -> bool:
        """Accept the common record without a key: the next number, with nothing special; return False for others."""
        report = self.report
        seq, time, flags = plain_parts(data)
        if seq != report.last + 1 or not report.records or has_note(flags) or report.has_end:
            return False
        last, self._last_time = self._last_time, time
        if time < last:
            self._step_back(time, last)
        report.records += 1
        report.last = seq
        return True

    def _follows_sealed(self, data: bytes) -> bool:
        """Accept the common record with a key: the next number, authentic; return False for others."""
        report, remembered = self.report, self._remembered
        seq, digest, mac, time, flags = sealed_parts(data)
        if (
            seq != report.last + 1
            or seq != self._at + 1
            or flags != PLAIN_SEALED
            or report.key is None
            or report.has_end
            or (remembered is not None and remembered.seq == seq)
        ):
            return False
        (candidate,) = self._candidates
        key = candidate.key.evolve()
        if not key.verify(digest, mac):
            return False
        candidate.key, self._at = key, seq
        self._digest.update(digest)
        last, self._last_time = self._last_time, time
        if time < last:
            self._step_back(time, last)
        report.records += 1
        report.last = seq
        return True

    def _distinct(self, rows: list[Row]) -> Row:
        """Compare the copies of one number without a key."""
        contents = {(row.digest, row.mac, row.time) for row in rows}
        if len(contents) > 1:
            self.report.two_contents.add(self._where(rows[0]))
        self.report.add_duplicates(len(rows) - len(contents), rows[0].seq, map(self._place_of, rows))
        for row in rows:
            if row.has_problem:
                self.report.altered.add(f"{self._where(row)}: {self._note_of(row)['problem']}")
        return rows[0]

    def _evolve_to(self, seq: int) -> bool:
        steps = seq - self._at
        assert self._ring is not None
        if steps > 1:
            if not self._ring.allowance.take(steps - 1):
                return False
            self._owed += steps - 1
        if steps:
            for each in self._candidates:
                each.key = each.key.evolve_by(steps)
            self._at = seq
        return True

    def _authentic(self, rows: list[Row]) -> Row | None:
        """Return an authentic copy of one number; None if there is none."""
        valid: dict[bytes, Row] = {}
        bad, good = [], []
        for row in rows:
            if row.is_sealed and not row.has_problem and self._is_authentic(row):
                good.append(row)
                valid.setdefault(row.digest, row)
            else:
                bad.append(row)
        self.report.add_duplicates(len(good) - len(valid), rows[0].seq, map(self._place_of, good))
        for row in bad:
            self._reject(row)
            reason = self._note_of(row).get("problem") or ("" if row.is_sealed else "no seal")
            examples = self.report.beside_valid if valid else self.report.altered
            examples.add(f"{self._where(row)}{': ' if reason else ''}{reason}")
        if len(valid) > 1:
            self.report.two_contents.add(self._where(rows[0]))
        return next(iter(valid.values()), None)

    def _is_authentic(self, row: Row) -> bool:
        matching = [each for each in self._candidates if each.key.verify(row.digest, row.mac)]
        if not matching:
            return False
        assert self._ring is not None
        self._ring.allowance.give_back(self._owed)
        self._owed = 0
        if self.report.key is None:
            self._candidates = matching[:1]
            self.report.key = matching[0].copy.name
        return True

    def _accept(self, row: Row) -> None:
        report, seq = self.report, row.seq
        time = row.time
        self._gaps.close(seq, min(self._before(), seq - 1))
        if not report.records:
            report.first, report.start_time = seq, time.decode()
        elif time < self._last_time:
            self._step_back(time, self._last_time)
        self._is_whole = self._is_whole and seq == report.last + 1
        report.records += 1
        report.last, self._last_time = seq, time
        if report.has_end:
            report.after_end += 1
        if row.has_note:
            self._take_note(row, self._note_of(row))
        if self._ring is not None:
            self._digest.update(row.digest)
            remembered = self._remembered
            if self._is_whole and remembered is not None and remembered.seq == seq and remembered.digest is not None:
                report.state_mismatch = remembered.digest != self._digest.hexdigest()

    def _before(self) -> int:
        """Return the last number that is known to have been authentic."""
        if self.report.records or self._remembered is None:
            return self.report.last
        return self._remembered.seq

    def _step_back(self, time: bytes, last: bytes) -> None:
        """Note that a record has an earlier time than the one before it."""
        report = self.report
        report.clock_steps += _is_before(time.decode(), last.decode())
        report.start_time = min(report.start_time, time.decode())
        report.end_time = max(report.end_time, last.decode())

    def _take_note(self, row: Row, note: dict[str, Any]) -> None:
        for each in _list(note.get("was")):
            if _is_pair(each, str, int):
                self.was.append((each[0], each[1]))
        checkpoint = note.get("checkpoint")
        if not isinstance(checkpoint, dict):
            return
        report = self.report
        report.checkpoints += 1
        self._compare_digest(row, checkpoint)
        for each in _list(checkpoint.get("void")) + _list(checkpoint.get("given_up")):
            if _is_pair(each, int, int) and each[1] < row.seq and len(self.explained) < 100_000:
                self.explained.append((each[0], each[1]))
        adopted = checkpoint.get("adopted")
        if isinstance(adopted, dict):
            self.adopted.update({name: last for name, last in adopted.items() if type(last) is int})
        numbers = {key: checkpoint.get(key) for key in ("delivered", "children", "refused", "left_out")}
        plain = {key: value if type(value) is int else 0 for key, value in numbers.items()}
        self._delivered = max(self._delivered, min(plain["delivered"], row.seq))
        self.children = max(self.children, plain["children"])
        report.refused, report.left_out = plain["refused"], plain["left_out"]
        if checkpoint.get("kind") == "end":
            report.has_end = True

    def _compare_digest(self, row: Row, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("void"):
            self._is_whole = False  # an interrupted record may be there, and is not in the digest
        if not isinstance(checkpoint.get("digest"), str) or self._ring is None:
            return
        if not self._is_whole:
            self.report.unchecked_digests += 1
            self.report.first_unchecked = self.report.first_unchecked or row.seq
        elif checkpoint["digest"] != self._digest.hexdigest():
            self.report.digest_mismatch.add(self._where(row))

    def finish(self, last_known: int, evidence: str, sent_again: list[tuple[int, int]]) -> None:
        """Compare the end with what others know of it, and explain what is missing.

        :param last_known: the last number by other evidence; 0 for none.
        :param evidence: names it.
        :param sent_again: ranges of numbers that other records name as their earlier ones.
        """
        report = self.report
        report.last_time = self._last_time.decode()
        report.end_time = max(report.end_time, report.last_time)
        if self._remembered is not None and self._remembered.seq > last_known:
            last_known, evidence = self._remembered.seq, "--state remembers"
        if last_known > report.last:
            report.cut = f"the last record is {report.last}, and {evidence} {last_known}"
            self._gaps.close(last_known + 1, report.last)
        explained, settled = self.explained + sent_again, self._delivered
        report.explained = report.missing.covered_by(explained)
        # A record that the client gave up is settled, too, and the agent never had it.
        not_taken = [(first, min(last, settled)) for first, last in explained if first <= settled]
        report.delivered_missing = report.missing.covered_by([(1, settled)]) - report.missing.covered_by(not_taken)

    def to_remember(self) -> Remembered | None:
        """Return the end of the stream for a later verification; None if nothing is known of it."""
        report, before = self.report, self._remembered
        if not report.records:
            return before
        whole = self._ring is not None and self._is_whole and report.key is not None
        now = Remembered(report.last, self._digest.hexdigest() if whole else None)
        return before if before is not None and before.seq > now.seq else now

    def _where(self, row: Row) -> str:
        return f"{row.seq} ({self._place_of(row)})"


def _is_before(time: str, other: str) -> bool:
    """Return True if *time* is more than a second before *other*. Records that waited may be a little older."""
    if time[:19] >= other[:19]:
        return False
    try:
        return datetime.fromisoformat(other) - datetime.fromisoformat(time) > timedelta(seconds=1)
    except ValueError:
        return True


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_pair(value: Any, first: type, second: type) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is first and type(value[1]) is second
