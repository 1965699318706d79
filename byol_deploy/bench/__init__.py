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

from byol_deploy.bench.blocks import Block, CandidateFailed, time_block, wait_until_quiet
from byol_deploy.bench.candidates import (
    FEWEST_FOR_P99,
    LEAST_ROUNDS,
    ROUNDS,
    BudgetTooSmall,
    check_budget,
    measure_blocks,
    measure_candidates,
    median_interval,
)
from byol_deploy.bench.functions import BenchReport, Timing, measure
from byol_deploy.bench.results import TOLERANCE, Candidate, Comparison, Control

__all__ = [
    "FEWEST_FOR_P99",
    "LEAST_ROUNDS",
    "ROUNDS",
    "TOLERANCE",
    "BenchReport",
    "Block",
    "BudgetTooSmall",
    "Candidate",
    "CandidateFailed",
    "Comparison",
    "Control",
    "Timing",
    "check_budget",
    "measure",
    "measure_blocks",
    "measure_candidates",
    "median_interval",
    "time_block",
    "wait_until_quiet",
]
