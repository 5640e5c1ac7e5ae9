"""Delays between attempts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geventaudit import Backoff


def test_delays_grow_to_the_maximum() -> None:
    backoff = Backoff(initial=1, maximum=10, multiplier=2, jitter=0)
    assert [backoff.delay(failures) for failures in range(1, 7)] == [1, 2, 4, 8, 10, 10]


@given(st.integers(1, 10**9))
def test_no_number_of_failures_overflows(failures: int) -> None:
    assert 0 < Backoff().delay(failures) <= 60


def test_jitter_spreads_and_never_exceeds() -> None:
    random.seed(1)
    delays = [Backoff(initial=10, maximum=12, jitter=0.5).delay(1) for _ in range(1000)]
    assert min(delays) < 6
    assert 11 < max(delays) <= 12
    assert all(delay >= 5 for delay in delays)


@pytest.mark.parametrize(
    "parameters",
    [{"initial": 0}, {"initial": -1}, {"initial": 61}, {"maximum": float("inf")}, {"maximum": float("nan")},
     {"multiplier": 0.5}, {"multiplier": float("nan")}, {"jitter": -0.1}, {"jitter": 1.1}],
)  # fmt: skip
def test_parameters_that_make_no_sense(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Backoff(**parameters)


@pytest.mark.parametrize("name", ["initial", "maximum", "multiplier", "jitter"])
@pytest.mark.parametrize("value", ["x", None, True])
def test_parameters_that_are_no_numbers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a number, got {value!r}$"):
        Backoff(**{name: value})
