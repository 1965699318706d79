"""The timer: order, rounds, ratios. No test looks at an absolute time."""

from __future__ import annotations

import time

import pytest

from byol_deploy.bench import measure
from byol_deploy.errors import UsageError


def test_functions_are_interleaved_and_the_order_turns_around() -> None:
    calls: list[str] = []
    measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert "".join(calls) == "abbaabba"


def test_ratio_is_to_the_first() -> None:
    found = measure({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=5, warmup=0)
    assert found["short"].ratio == 1.0
    assert found["long"].ratio > 2  # ten, were sleeping exact
    assert found["long"].p50_ms >= 20
    assert found["long"].p90_ms >= found["long"].p50_ms


def test_unknown_name_and_bad_arguments() -> None:
    with pytest.raises(KeyError):
        measure({"a": lambda: None}, repeats=3)["b"]
    with pytest.raises(UsageError):
        measure({}, repeats=3)
    with pytest.raises(UsageError):
        measure({"a": lambda: None}, repeats=2)
