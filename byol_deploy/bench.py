"""Timing functions side by side, so that a ratio means something on a machine that others use too.

:func:`measure` is the short form, for a few functions and a fixed number of rounds. :func:`measure_candidates` is for
choosing: it works within a time budget, gives an interval with every ratio, and knows by an A/A control (one candidate
opened twice and measured as two) how far its own numbers can be trusted.

**Why blocks.** Engines keep threads that wait busily for the next call, ONNX Runtime's for some tens of milliseconds,
and a call that follows at once on another engine's call would share the cores with them: the candidates would measure
each other. One candidate therefore does a few calls in a row, which is what it does in production too, the first of
them does not count (it wakes threads and fills caches), and the next candidate begins when the threads have come to
rest, which is seen in the processor time of the process (:func:`wait_until_quiet`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from byol_deploy.errors import UsageError

LEAST_ROUNDS = 6
"""With fewer there is no 95 % interval of a median: it would have to reach beyond the smallest and the largest."""
ROUNDS = 12
"""Rounds that :func:`measure_candidates` takes at least, where the budget allows."""
TOLERANCE = 0.03
"""How far a candidate may seem to differ from itself."""
FEWEST_FOR_P99 = 100
"""With fewer calls the 99th percentile is the largest of them by another name."""

_BLOCK_MS = 25.0
_MOST_CALLS = 200
_CONFIDENCE = 0.95

Block: TypeAlias = Callable[[int], Sequence[float]]
"""Does this many calls in a row and gives the wall time of each, in milliseconds."""


@dataclass(frozen=True)
class Timing:
    """Wall times of one function, in milliseconds.

    Attributes:
        name: Of the function.
        p50_ms: Median.
        p90_ms: 90th percentile.
        ratio: Median over the rounds of (this function's time / the first function's time in the same round).
    """

    name: str
    p50_ms: float
    p90_ms: float
    ratio: float


@dataclass(frozen=True)
class BenchReport:
    """What :func:`measure` found: one timing per function, in the order they were given."""

    timings: tuple[Timing, ...]
    repeats: int

    def __getitem__(self, name: str) -> Timing:
        """The timing of the function ``name``."""
        for timing in self.timings:
            if timing.name == name:
                return timing
        raise KeyError(name)


def measure(run: Mapping[str, Callable[[], Any]], *, repeats: int = 30, warmup: int = 3) -> BenchReport:
    """Time functions in turn, A B C, C B A, ..., and compare them round by round.

    Interleaved, a slow second of the machine hits all of them; the order turns around each round, so that none always
    runs in another's warm caches. The ratio is formed within a round and only then the median is taken.

    Args:
        run: Name to a function without arguments. The first one is what the others are compared with.
        repeats: Rounds that count, at least 3.
        warmup: Rounds that do not.

    Raises:
        UsageError: Nothing to time, or too few rounds.
    """
    if not run or repeats < 3 or warmup < 0:
        raise UsageError(
            f"measure needs a function, 3 rounds and no negative warm-up; got {len(run)}, {repeats}, {warmup}"
        )
    names = list(run)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        for name in names if number % 2 == 0 else reversed(names):
            began = time.perf_counter()
            run[name]()
            took_ms = 1000 * (time.perf_counter() - began)
            if number >= warmup:
                times[name].append(took_ms)
    first = np.array(times[names[0]])
    return BenchReport(
        tuple(
            Timing(
                name=name,
                p50_ms=float(np.median(taken)),
                p90_ms=float(np.percentile(taken, 90)),
                ratio=float(np.median(np.array(taken) / first)),
            )
            for name, taken in times.items()
        ),
        repeats,
    )


class CandidateFailed(Exception):
    """A candidate cannot go on: its message says why. It is left out, the others go on."""


@dataclass(frozen=True)
class Candidate:
    """What one candidate took.

    Attributes:
        name: Its name.
        calls: Calls that count.
        p50_ms: Median of all of them.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile; None for fewer than 100 calls.
        ratio: Median over the rounds of (its time / its base's time in the same round), of the medians of the blocks.
            None where the base could not be measured, as for the two ends.
        low: Lower end of the 95 % interval of the ratio.
        high: Upper end.
    """

    name: str
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Control:
    """The A/A control: one candidate, opened twice, compared with itself like any other two.

    Attributes:
        name: Of the candidate.
        ratio: Of the second opening to the first; 1 where nothing but the candidates matters.
        low: Lower end of its 95 % interval.
        high: Upper end.
        tolerance: How far the ratio may be from 1.
    """

    name: str
    ratio: float
    low: float
    high: float
    tolerance: float = TOLERANCE

    @property
    def within(self) -> bool:
        """Whether the ratio is within the tolerance."""
        return abs(self.ratio - 1) <= self.tolerance

    @property
    def resolution(self) -> float:
        """Differences smaller than this may be noise: how far the interval reaches from 1."""
        return max(abs(self.low - 1), abs(self.high - 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "within": self.within, "resolution": self.resolution}


@dataclass(frozen=True)
class Comparison:
    """What :func:`measure_candidates` found.

    Attributes:
        candidates: Those that were measured, in the order they were given.
        control: The control; None where it could not be measured.
        rounds: Rounds that count.
        asked: Rounds that were asked for.
        seconds: What all of it took.
        failed: For each candidate that was left out the reason.
    """

    candidates: tuple[Candidate, ...]
    control: Control | None
    rounds: int
    asked: int
    seconds: float
    failed: Mapping[str, str]

    def __getitem__(self, name: str) -> Candidate:
        """The candidate ``name``; KeyError where it was not measured."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    @property
    def reliable(self) -> bool:
        """Whether the control is within its tolerance; without a control nothing is known, which is no yes."""
        return self.control is not None and self.control.within

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before the numbers."""
        said = []
        control = self.control
        if control is None:
            said.append("the A/A control could not be measured: nothing is known about how far these times are right")
        elif not control.within:
            said.append(
                f"these times are not reliable: {control.name}, opened twice, seems to differ from itself by "
                f"{abs(control.ratio - 1):.1%}, and {control.tolerance:.0%} is allowed; measure again with nothing "
                "else running, or with more time (--budget)"
            )
        elif control.resolution > control.tolerance:
            said.append(
                f"differences below {control.resolution:.0%} may be noise: that is how far the interval of the A/A "
                "control reaches"
            )
        if self.rounds < self.asked:
            said.append(f"{self.rounds} of {self.asked} rounds fitted into the time budget")
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "reliable": self.reliable,
            "control": None if self.control is None else self.control.to_dict(),
            "rounds": self.rounds,
            "asked": self.asked,
            "seconds": self.seconds,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "failed": dict(self.failed),
            "warnings": list(self.warnings),
        }


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
        UsageError: Nothing to time, or a budget that does not suffice for 6 rounds.
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
        UsageError: Too few rounds, or a budget that does not suffice for 6 of them.
    """
    if not (math.isfinite(budget_s) and budget_s > 0):
        raise UsageError(f"the time budget is {budget_s:g} s; use a number of seconds above 0, e.g. 60")
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"{rounds} rounds decide nothing; use {LEAST_ROUNDS} or more")
    began = time.perf_counter()
    failed: dict[str, str] = {}
    calls: dict[str, int] = {}

    def too_little(needed_s: float) -> UsageError:
        return UsageError(
            f"a time budget of {budget_s:g} s is too small to decide between {len(blocks)} rows: the {LEAST_ROUNDS} "
            f"rounds that it takes at least need about {math.ceil(needed_s)} s; give --budget {math.ceil(needed_s)} or "
            "more, or measure fewer rows"
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
    draw = np.random.default_rng(0)
    while True:
        alive = [name for name in blocks if name not in failed]
        if not alive:
            break
        before = time.perf_counter()
        done.append(one_round([alive[at] for at in draw.permutation(len(alive))]))
        round_s = max(0.5 * round_s, time.perf_counter() - before)
        settled = _control(done, control, failed, tolerance)
        if len(done) >= rounds and (settled is None or settled.resolution <= tolerance):
            break
        if len(done) >= LEAST_ROUNDS and time.perf_counter() - began + round_s > budget_s:
            break
    measured = [name for name in blocks if name not in failed and name != control[1]]
    return Comparison(
        tuple(_candidate(name, measured[0] if bases is None else bases[name], measured, done) for name in measured),
        _control(done, control, failed, tolerance),
        len(done),
        rounds,
        time.perf_counter() - began,
        failed,
    )


def time_block(run: Callable[[], Any], calls: int) -> list[float]:
    """Do ``calls`` calls in a row after one that does not count, wait for the threads to rest, and give the times.

    Returns:
        The wall time of each call, in milliseconds.
    """
    run()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    wait_until_quiet()
    return times


def wait_until_quiet(most_s: float = 0.3) -> None:
    """Wait until the threads of this process rest, or ``most_s`` have passed.

    Threads that wait busily use processor time though nobody called them; when the process uses none, they sleep.
    """
    end = time.perf_counter() + most_s
    while time.perf_counter() < end:
        began, used = time.perf_counter(), time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.1 * (time.perf_counter() - began):
            return


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
    done: Sequence[Mapping[str, Sequence[float]]], names: tuple[str, str], failed: Mapping[str, str], tolerance: float
) -> Control | None:
    if any(name in failed for name in names) or not done:
        return None
    ratio, low, high = _ratio(names[1], names[0], done)
    return Control(names[0], ratio, low, high, tolerance)


def _candidate(
    name: str, base: str, measured: Sequence[str], done: Sequence[Mapping[str, Sequence[float]]]
) -> Candidate:
    times = np.concatenate([found[name] for found in done])
    p50, p90, p99 = (float(value) for value in np.percentile(times, [50, 90, 99]))
    ratio = _ratio(name, base, done) if base in measured else (None, None, None)
    return Candidate(name, len(times), p50, p90, p99 if len(times) >= FEWEST_FOR_P99 else None, *ratio)


def _ratio(name: str, base: str, done: Sequence[Mapping[str, Sequence[float]]]) -> tuple[float, float, float]:
    ratios = [float(np.median(found[name]) / np.median(found[base])) for found in done]
    return float(np.median(ratios)), *median_interval(ratios)
