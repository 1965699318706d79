"""The timer: order, rounds, ratios, the control, the budget. No test looks at an absolute time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from byol_deploy.bench import (
    LEAST_ROUNDS,
    Block,
    CandidateFailed,
    measure,
    measure_blocks,
    measure_candidates,
    median_interval,
    time_block,
    wait_until_quiet,
)
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


@pytest.mark.parametrize(
    ("n", "rank", "coverage"), [(6, 1, 0.969), (8, 1, 0.992), (9, 2, 0.961), (15, 4, 0.965), (20, 6, 0.959)]
)
def test_interval_of_a_median_is_that_of_the_tables(n: int, rank: int, coverage: float) -> None:
    """Conover, Practical Nonparametric Statistics, and any table of the binomial distribution with p = 1/2."""
    values = np.random.default_rng(0).permutation(n).astype(float)
    assert median_interval(values) == (rank - 1, n - rank)
    inside = 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n
    assert inside == pytest.approx(coverage, abs=1e-3)
    assert inside >= 0.95


def test_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).exponential(size=(2000, 12))
    hits = [low <= math.log(2) <= high for low, high in map(median_interval, draws)]
    assert 0.95 <= np.mean(hits) <= 0.98  # the exact one is 0.961
    assert median_interval([3.0]) == (3.0, 3.0)


class Script:
    """A candidate whose times are written down: each block gives what ``times`` says of its number."""

    def __init__(self, times: Callable[[int], float], log: list[Any] | None = None) -> None:
        self.times, self.done, self.log = times, 0, log

    def __call__(self, calls: int) -> list[float]:
        self.done += 1
        if self.log is not None:
            self.log.append(self)
        return [self.times(self.done)] * calls


def steady(value: float) -> Script:
    return Script(lambda number: value)


def test_ratios_are_formed_within_a_round() -> None:
    """The machine becomes ten times slower in the middle: times change, ratios do not."""

    def slow(base: float) -> Script:
        return Script(lambda number: base * (10 if number > 9 else 1))

    found = measure_blocks({"a": slow(1.0), "b": slow(2.0), "again": slow(1.0)}, budget_s=5, control=("a", "again"))
    assert (found["b"].ratio, found["b"].low, found["b"].high) == (2.0, 2.0, 2.0)
    assert found.control is not None
    assert found.control.ratio == 1.0
    assert found.reliable
    assert found.warnings == ()
    assert [candidate.name for candidate in found.candidates] == ["a", "b"]


def test_each_round_has_every_candidate_once_in_another_order() -> None:
    log: list[Script] = []
    blocks: dict[str, Block] = {name: Script(lambda number: 1.0, log) for name in "abcd"}
    measure_blocks(blocks, budget_s=5, control=("a", "d"), rounds=12)
    rounds = [tuple(log[-4 * place - 4 :][:4]) for place in range(12)]
    assert all(len(set(one)) == 4 for one in rounds)
    assert len(set(rounds)) > 4


def test_rounds_go_on_until_the_control_is_settled() -> None:
    def unrest(number: int) -> float:
        return 1.0 if number > 20 else 1.0 + 0.2 * (number % 2)

    found = measure_blocks(
        {"a": steady(1.0), "again": Script(unrest)}, budget_s=20, control=("a", "again"), rounds=LEAST_ROUNDS
    )
    assert found.control is not None
    assert found.control.resolution <= 0.03
    assert 20 < found.rounds < 200


def test_a_control_that_stays_away_is_told_when_the_budget_is_used_up() -> None:
    began = time.perf_counter()
    found = measure_blocks(
        {"a": steady(1.0), "b": steady(2.0), "again": Script(lambda number: time.sleep(0.01) or 1.05)},
        budget_s=0.5,
        control=("a", "again"),
    )
    assert time.perf_counter() - began < 5
    assert not found.reliable
    assert found.control is not None
    assert found.control.ratio == pytest.approx(1.05)
    assert "not reliable" in found.warnings[0]
    assert "5.0%" in found.warnings[0]
    document = found.to_dict()
    assert document["reliable"] is False
    assert document["control"]["within"] is False
    assert document["warnings"] == list(found.warnings)


def test_a_control_within_but_not_sharp_says_what_cannot_be_told_apart() -> None:
    spread = np.linspace(-0.5, 0.5, 41)[np.random.default_rng(0).permutation(41)]
    found = measure_blocks(
        {"a": steady(1.0), "again": Script(lambda number: time.sleep(0.01) or 1.0 + float(spread[number % 41]))},
        budget_s=0.6,
        control=("a", "again"),
        tolerance=0.25,
    )
    control = found.control
    assert control is not None
    assert (control.within, found.reliable) == (True, True)
    narrow = replace(found, control=replace(control, ratio=1.0, low=0.9, high=1.02, tolerance=0.03))
    assert narrow.warnings[0].startswith("differences below 10% may be noise")


def test_bases_and_percentiles() -> None:
    blocks: dict[str, Block] = {"a1": steady(2.0), "b1": steady(1.0), "a8": steady(40.0), "b8": steady(10.0),
                                "again": steady(2.0)}  # fmt: skip
    bases = {"a1": "a1", "b1": "a1", "a8": "a8", "b8": "a8"}
    found = measure_blocks(blocks, budget_s=5, control=("a1", "again"), bases=bases)
    assert found["b1"].ratio == 0.5
    assert found["b8"].ratio == 0.25
    assert found["b1"].calls == 25 * found.rounds  # blocks of about 25 ms
    assert found["b1"].p99_ms == 1.0
    assert found["a8"].calls == found.rounds
    assert found["a8"].p99_ms is None


def test_a_candidate_that_fails_is_left_out_and_the_others_go_on() -> None:
    def dies(number: int) -> float:
        if number > 5:
            raise CandidateFailed("its process was ended by signal 9")
        return 1.0

    blocks: dict[str, Block] = {"a": steady(1.0), "b": Script(dies), "c": steady(3.0), "again": steady(1.0)}
    bases = {"a": "b", "b": "b", "c": "a"}
    found = measure_blocks(blocks, budget_s=5, control=("a", "again"), bases=bases)
    assert found.failed == {"b": "its process was ended by signal 9"}
    assert [candidate.name for candidate in found.candidates] == ["a", "c"]
    assert found["a"].ratio is None  # its base is gone
    assert found["c"].ratio == 3.0
    with pytest.raises(KeyError):
        found["b"]


def test_without_a_control_nothing_is_reliable() -> None:
    def dies(number: int) -> float:
        raise CandidateFailed("gone")

    found = measure_blocks({"a": steady(1.0), "again": Script(dies)}, budget_s=5, control=("a", "again"))
    assert found.control is None
    assert not found.reliable
    assert "could not be measured" in found.warnings[0]
    nothing = measure_blocks({"a": Script(dies), "again": Script(dies)}, budget_s=5, control=("a", "again"))
    assert nothing.candidates == ()


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    slow = Script(lambda number: time.sleep(0.05) or 50.0)
    with pytest.raises(UsageError, match=r"a time budget of 0.3 s is too small .* give --budget \d+ or more"):
        measure_blocks({"a": slow, "again": slow}, budget_s=0.3, control=("a", "again"))
    for budget in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="above 0"):
            measure_blocks({"a": slow, "again": slow}, budget_s=budget, control=("a", "again"))
    with pytest.raises(UsageError, match="6 or more"):
        measure_blocks({"a": slow, "again": slow}, budget_s=1, control=("a", "again"), rounds=5)
    with pytest.raises(UsageError, match="nothing to measure"):
        measure_candidates({}, budget_s=1)


def test_fewer_rounds_than_asked_are_told() -> None:
    slow = Script(lambda number: time.sleep(0.005) or 1.0)
    found = measure_blocks({"a": slow, "again": slow}, budget_s=1.0, control=("a", "again"), rounds=5000)
    assert found.rounds < 5000
    assert f"{found.rounds} of 5000 rounds fitted" in found.warnings[-1]


def test_functions_of_this_process() -> None:
    def raises() -> None:
        raise RuntimeError("no such operator")

    found = measure_candidates(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02), "broken": raises},
        budget_s=30,
        rounds=LEAST_ROUNDS,
        tolerance=1.0,  # sleeping is not exact on a busy machine
    )
    assert found["long"].ratio is not None
    assert found["long"].ratio > 2
    assert found.failed == {"broken": "RuntimeError: no such operator"}
    assert found.control is not None
    assert found.control.name == "short"


def test_a_second_opening_that_is_slower_shows() -> None:
    found = measure_candidates(
        {"a": lambda: time.sleep(0.002)}, budget_s=3, rounds=LEAST_ROUNDS, control=lambda: time.sleep(0.02)
    )
    assert not found.reliable
    assert found.control is not None
    assert found.control.ratio > 2


def test_the_first_call_of_a_block_does_not_count() -> None:
    calls: list[float] = []

    def run() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.2 if len(calls) == 1 else 0.001)

    times = time_block(run, 3)
    assert len(calls) == 4
    assert len(times) == 3
    assert max(times) < 150


def test_waiting_ends_when_busy_threads_rest() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        began = time.perf_counter()
        wait_until_quiet(0.15)
        assert time.perf_counter() - began >= 0.1  # it used all its patience
    finally:
        stop.set()
        thread.join()
    began = time.perf_counter()
    wait_until_quiet(30)
    assert time.perf_counter() - began < 15
