"""The fastest file on this machine: candidates are measured side by side, and the evidence goes into the manifest.

Only files that passed the fidelity gate take part, so the choice is about time alone. Measured are one image at a time
and a small batch, the deployed output only: files of formats and precisions, each with one thread and with all that
this process may use, and there with threads that wait busily or idly, and with shapes fixed to these numbers of images
and parts of the batch side by side, where the runtime knows the choice. Chosen is the
smallest geometric mean of both times: one image alone hides what threads are good for, a batch alone hides what a call
costs, and an :class:`~byol_deploy.Encoder` is given both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy import formats
from byol_deploy.bench import BudgetTooSmall, measure_candidates
from byol_deploy.cores import usable_cores
from byol_deploy.errors import MissingExtraError, UsageError
from byol_deploy.formats import Opened, RunOptions
from byol_deploy.host import describe_host
from byol_deploy.manifest import Artefact, Tuned
from byol_deploy.pipeline.proof import TUNED_BATCHES, prepared

LEAST_BUDGET_S = 5.0
"""With less nothing can be told apart from noise."""
_CONTENDS = 2.0
"""A candidate slower than the fastest by more than this, one image at a time, is not measured on the batch: the budget
is better spent on those that can win."""


def candidates() -> tuple[str, ...]:
    """The formats that take part where none are named: installed, and opened by the encoder. ONNX comes first."""
    names = [
        name
        for name in formats.available()
        for format in [formats.get(name)]
        if format.opens_in_encoder and not format.runs_here() and not _missing(format)
    ]
    return tuple(sorted(names, key=lambda name: name != "onnx"))


def tune(
    folder: Path,
    artefacts: Sequence[Artefact],
    images: np.ndarray,
    output: str,
    *,
    budget_s: float,
    say: Callable[[str], None],
) -> Tuned:
    """Measure files of a bundle and choose the fastest.

    Args:
        folder: Where they lie.
        artefacts: Those that passed the gate; the others, and formats that the encoder does not open, take no part.
        images: (N, H, W, 3) uint8, the first ones are run.
        output: The deployed output.
        budget_s: Seconds.
        say: Called with a line for each candidate.

    Raises:
        UsageError: No file can take part, or the budget is too small to decide.
    """
    runs: dict[str, tuple[Opened, Artefact, RunOptions]] = {}
    for artefact in artefacts:
        format = formats.get(artefact.format)
        if not (format.opens_in_encoder and artefact.parity.get("passed")):
            continue
        for options in _options(format):
            runs[f"{artefact.file}, {_words(options)}"] = (
                format.load(folder / artefact.file, options),
                artefact,
                options,
            )
    if not runs:
        raise UsageError("there is nothing to tune: no file of this bundle runs without PyTorch; add --format onnx")
    first = next(iter(runs))
    _, artefact, options = runs[first]
    again = formats.get(artefact.format).load(folder / artefact.file, options)
    say(f"measuring {len(runs)} candidates within {budget_s:g} s")
    began, left = time.perf_counter(), budget_s
    scores: dict[str, list[float]] = {name: [] for name in runs}
    measured: dict[str, dict[str, Any]] = {}
    for place, batch in enumerate(TUNED_BATCHES):
        given = images[np.arange(batch) % len(images)]
        alike = {name: next(other for other in scores if _alike(runs[name], runs[other], batch)) for name in scores}
        try:
            found = measure_candidates(
                {name: partial(_run, runs[name][0], given, output) for name in dict.fromkeys(alike.values())},
                budget_s=left / (len(TUNED_BATCHES) - place),
                control=partial(_run, again, given, output),
            )
        except BudgetTooSmall as error:
            needed_s = math.ceil(budget_s - left + error.needed_s * (len(TUNED_BATCHES) - place))
            raise UsageError(
                f"a time budget of {budget_s:g} s is too small to decide between {len(scores)} candidates at batch "
                f"{batch}; give --budget {needed_s} or more, or fewer formats and precisions"
            ) from error
        if not found.candidates:
            raise UsageError(f"no candidate could be measured: {'; '.join(found.failed.values())}")
        base = found.candidates[0]
        fastest = min(candidate.p50_ms for candidate in found.candidates)
        for candidate in sorted(found.candidates, key=lambda candidate: candidate.p50_ms):
            ratio = candidate.ratio or 1.0
            say(f"  {candidate.name}, batch {batch}: {candidate.p50_ms:.2f} ms, {ratio:.2f}x {base.name}")
        for warning in found.warnings:
            say(f"WARNING {warning}")
        measured[str(batch)] = told = found.to_dict()
        told["candidates"] += [row | {"name": name} for name, same in alike.items() if name != same
                               for row in told["candidates"] if row["name"] == same]  # fmt: skip
        contending = {
            candidate.name: candidate.p50_ms / fastest
            for candidate in found.candidates
            # The first one is what all are compared with, and what the control opens again.
            if candidate.p50_ms <= _CONTENDS * fastest or candidate is base
        }
        scores = {name: [*scores[name], contending[same]] for name, same in alike.items() if same in contending}
        left = budget_s - (time.perf_counter() - began)
    best = min(scores, key=lambda name: math.prod(scores[name]))
    say(f"tuned: {best}")
    _, artefact, options = runs[best]
    evidence = {"machine": describe_host(), "budget_s": budget_s, "chosen": best, "batches": measured}
    return Tuned(artefact.file, options.threads or usable_cores(), options.allow_spinning, options.batches,
                 options.streams, evidence)  # fmt: skip


def _options(format: formats.Format) -> list[RunOptions]:
    """With all threads and with one; what threads wait like matters where there are several."""
    cores = usable_cores()
    every = RunOptions(threads=cores)
    found = [every]
    if format.can_wait_idly and cores > 1:
        found.append(replace(every, allow_spinning=False))
    if format.can_fix_batches:
        found += [replace(prepared(every), streams=1), prepared(every)]
    return list(dict.fromkeys([*found, RunOptions(threads=1)]))


def _alike(one: tuple[Opened, Artefact, RunOptions], other: tuple[Opened, Artefact, RunOptions], batch: int) -> bool:
    """Whether two candidates do the same with so many images: measured twice, noise would decide between them."""

    def as_run(options: RunOptions) -> RunOptions:
        return replace(options, streams=1) if batch % options.streams else options

    return one[1].file == other[1].file and as_run(one[2]) == as_run(other[2])


def _words(options: RunOptions) -> str:
    words = f"{options.threads} thread{'s' if options.threads != 1 else ''}"
    words += "" if options.allow_spinning else " waiting idly"
    words += " with fixed shapes" if options.batches else ""
    return words + (f" in {options.streams} streams" if options.streams > 1 else "")


def _run(opened: Opened, images: np.ndarray, output: str) -> object:
    return opened.compute(images, (output,))


def _missing(format: formats.Format) -> bool:
    try:
        formats.require(format)
    except MissingExtraError:
        return True
    return False
