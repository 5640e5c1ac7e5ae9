"""The short form of ``python -m benchmarks.chaos``: everything that breaks, mixed by chance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import chaos

ROUNDS = int(os.environ.get("GEVENTAUDIT_ROUNDS", "20"))


@pytest.mark.parametrize(
    ("kind", "require_ack"), [("unix", True), ("unix", False), ("tcp", True)], ids=["unix acks", "unix", "tcp acks"]
)
def test_an_agent_to_which_everything_happens(folder: Path, kind: str, require_ack: bool) -> None:
    outcome = chaos.agent_chaos(folder, kind=kind, require_ack=require_ack, rounds=ROUNDS, seed=len(kind) + require_ack)
    assert outcome.accepted > 20 * ROUNDS
    if require_ack:
        assert outcome.lost == 0, outcome
        assert outcome.stats.delivered == outcome.accepted, outcome
    assert outcome.is_as_promised, outcome
    assert outcome.stats.dropped == 0, outcome


def test_how_a_run_is_judged() -> None:
    """A run with a loss is never judged to be good."""

    def judge(stored: list[int], last_words: frozenset[int] = frozenset()) -> tuple[int, int, int, int, bool]:
        outcome = chaos.judge("", 0, "", list(range(10)), stored, set(last_words))
        return outcome.lost, outcome.excused, outcome.duplicates, outcome.reordered, outcome.is_as_promised

    assert judge([*range(10)]) == (0, 0, 0, 0, True)
    assert judge([*range(5), *range(3, 10)]) == (0, 0, 2, 0, True)
    assert judge([0, 1, 2, 4, 3, 5, 6, 7, 8, 9]) == (0, 0, 0, 1, False)
    assert judge([0, 1, 2, 3, 6, 7, 8, 9]) == (2, 0, 0, 0, False)
    assert judge([0, 1, 2, 3, 6, 7, 8, 9], frozenset({3})) == (2, 2, 0, 0, True)
    assert judge([0, 1, 2, 3, 6, 8, 9], frozenset({3})) == (3, 2, 0, 0, False)
