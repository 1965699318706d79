"""Candidates to choose from: within a time budget, with intervals, and with a control."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from byol_deploy.bench.blocks import Block, CandidateFailed, time_block
from byol_deploy.bench.results import TOLERANCE, Candidate, Comparison, Control
from byol_deploy.errors import UsageError

LEAST_ROUNDS = 6
"""With fewer there is no 95 % interval of a median: it would have to reach beyond the smallest and the largest."""
ROUNDS = 12
"""Rounds that are taken at least, where the budget allows."""
FEWEST_FOR_P99 = 100
"""With fewer calls the 99th percentile is the largest of them by another name."""

_BLOCK_MS = 25.0
_MOST_CALLS = 200
_CONFIDENCE = 0.95


class BudgetTooSmall(UsageError):
    """The time budget does not suffice to decide.

    Attributes:
        needed_s: Seconds that would, about.
    """

    def __init__(self, message: str, needed_s: float) -> None:
        super().__init__(message)
        self.needed_s = needed_s


def measure_candidates(
    run: Mapping[str, Callable[[], Any]],
    *,
    budget_s: float,
    control: Callable[[], Any] | None = None,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Compare functions in this process within a time budget.

    Args:
        run: Name to a function without arguments. The first one is what the others are compared with.
        budget_s: Seconds for all of it.
        control: The first candidate, opened a second time. None measures its function as two, which does not see what
            two sessions of the same file may differ by.
        rounds: Least number of rounds, where the budget allows; more are taken until the control is settled.
        tolerance: How far the control's ratio may be from 1.

    Returns:
        The times. A candidate that raises is in ``failed``.

    Raises:
        BudgetTooSmall: It does not suffice for 6 rounds.
        UsageError: Nothing to time.
    """
    blocks: dict[str, Block] = {name: partial(_guarded, function) for name, function in run.items()}
    if not blocks:
        raise UsageError("there is nothing to measure; give at least one candidate")
    first = next(iter(blocks))
    again = f"{first}, opened again"
    blocks[again] = partial(_guarded, control or run[first])
    return measure_blocks(blocks, budget_s=budget_s, control=(first, again), rounds=rounds, tolerance=tolerance)


def measure_blocks(
    blocks: Mapping[str, Block],
    *,
    budget_s: float,
    control: tuple[str, str],
    bases: Mapping[str, str] | None = None,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Compare candidates that do their calls themselves, such as those in processes of their own.

    In each round every candidate does one block, in an order that is drawn anew. A ratio is formed within a round and
    only then the median over the rounds is taken, so a slow minute of the machine hits both of its sides. Rounds are
    taken until ``rounds`` are done and the whole interval of the control lies within the tolerance, or the budget is
    used up. It is the interval and not the ratio, because a ratio passes through 1 by chance, too.

    Args:
        blocks: Name to a candidate.
        budget_s: Seconds for all of it, the first trials included.
        control: The names of a candidate and of its second opening. The latter is no candidate in the result.
        bases: For each candidate the one that its ratio is to; None takes the first one for all.
        rounds: Least number of rounds, where the budget allows.
        tolerance: How far the control's ratio may be from 1.

    Returns:
        The times. A candidate that raises :class:`CandidateFailed` is in ``failed``.

    Raises:
        BudgetTooSmall: It does not suffice for 6 rounds.
        UsageError: Too few rounds.
    """
    check_budget(budget_s, rounds)
    began = time.perf_counter()
    failed: dict[str, str] = {}
    calls: dict[str, int] = {}

    def too_little(needed_s: float) -> BudgetTooSmall:
        return BudgetTooSmall(
            f"a time budget of {budget_s:.3g} s is too small to decide between {len(blocks)} rows: the {LEAST_ROUNDS} "
            f"rounds that it takes at least need about {math.ceil(needed_s)} s; give --budget {math.ceil(needed_s)} or "
            "more, or measure fewer rows",
            needed_s,
        )

    def one_round(names: Sequence[str]) -> dict[str, list[float]]:
        found = {}
        for name in names:
            try:
                found[name] = list(blocks[name](calls[name]))
            except CandidateFailed as error:
                failed[name] = str(error)
        return found

    for place, (name, block) in enumerate(blocks.items(), 1):
        try:
            block(1)  # the first call of a shape may plan memory, or compile
            calls[name] = min(max(int(_BLOCK_MS / max(min(block(5)), 1e-6)), 1), _MOST_CALLS)
        except CandidateFailed as error:
            failed[name] = str(error)
        spent = time.perf_counter() - began
        if spent > budget_s:
            raise too_little(spent / place * len(blocks) * LEAST_ROUNDS)
    before = time.perf_counter()
    one_round([name for name in blocks if name not in failed])
    round_s = time.perf_counter() - before
    needed_s = time.perf_counter() - began + LEAST_ROUNDS * round_s
    if needed_s > budget_s:
        raise too_little(1.25 * needed_s)

    done: list[dict[str, list[float]]] = []
    medians: list[dict[str, float]] = []
    draw = np.random.default_rng(0)
    while True:
        alive = [name for name in blocks if name not in failed]
        if not alive:
            break
        before = time.perf_counter()
        done.append(one_round([alive[at] for at in draw.permutation(len(alive))]))
        medians.append({name: float(np.median(times)) for name, times in done[-1].items()})
        round_s = max(0.5 * round_s, time.perf_counter() - before)
        settled = _control(medians, control, failed, tolerance)
        if len(done) >= rounds and (settled is None or settled.resolution <= tolerance):
            break
        if len(done) >= LEAST_ROUNDS and time.perf_counter() - began + round_s > budget_s:
            break
    measured = [name for name in blocks if name not in failed and name != control[1]]
    return Comparison(
        tuple(
            _candidate(
                name,
                [found[name] for found in done],
                _ratio(name, base, medians) if (base := bases[name] if bases else measured[0]) in measured else None,
            )
            for name in measured
        ),
        _control(medians, control, failed, tolerance),
        len(done),
        rounds,
        time.perf_counter() - began,
        failed,
    )


def check_budget(budget_s: float, rounds: int) -> None:
    """Refuse early what :func:`measure_blocks` would refuse at once.

    Raises:
        UsageError: No budget, or too few rounds.
    """
    if not (math.isfinite(budget_s) and budget_s > 0):
        raise UsageError(f"the time budget is {budget_s:g} s; use a number of seconds above 0, e.g. 60")
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"{rounds} rounds decide nothing; use {LEAST_ROUNDS} or more")


def median_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a median, whatever the distribution: two of the sorted values themselves.

    Source: H. A. David and H. N. Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1: with n values the median
    lies between the r-th smallest and the r-th largest with probability 1 - 2 P(B <= r - 1), B binomial (n, 1/2).

    Args:
        values: At least one. With fewer than 6 the smallest and the largest are given, which hold less than 95 %.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    tail, r = 0.0, 0
    while r < n // 2:
        tail += math.comb(n, r) / 2**n
        if tail > (1 - _CONFIDENCE) / 2:
            break
        r += 1
    r = max(r, 1)
    return float(ordered[r - 1]), float(ordered[n - r])


def _guarded(run: Callable[[], Any], calls: int) -> list[float]:
    try:
        return time_block(run, calls)
    except Exception as error:
        # Whatever an engine raises is a reason not to choose it, and no reason to stop.
        raise CandidateFailed(f"{type(error).__name__}: {error}") from error


def _control(
    medians: Sequence[Mapping[str, float]], names: tuple[str, str], failed: Mapping[str, str], tolerance: float
) -> Control | None:
    if any(name in failed for name in names) or not medians:
        return None
    return Control(names[0], *_ratio(names[1], names[0], medians), tolerance)


def _candidate(name: str, blocks: Sequence[Sequence[float]], ratio: tuple[float, float, float] | None) -> Candidate:
    times = np.concatenate(blocks)
    p50, p90, p99 = (float(value) for value in np.percentile(times, [50, 90, 99]))
    known = ratio or (None, None, None)
    return Candidate(name, len(times), p50, p90, p99 if len(times) >= FEWEST_FOR_P99 else None, *known)


def _ratio(name: str, base: str, medians: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """Median over the rounds and its interval."""
    ratios = [found[name] / found[base] for found in medians]
    return float(np.median(ratios)), *median_interval(ratios)
