"""A few functions side by side, in a fixed number of rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from byol_deploy.errors import UsageError


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
