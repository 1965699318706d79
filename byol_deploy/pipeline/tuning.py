"""The fastest file on this machine: candidates are measured side by side, and the evidence goes into the manifest.

Only files that passed the fidelity gate take part, so the choice is about time alone. Measured is one image at a time,
the deployed output only: files of formats and precisions, each with one thread and with all that this process may use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from byol_deploy import formats
from byol_deploy.bench import measure_candidates
from byol_deploy.cores import usable_cores
from byol_deploy.errors import MissingExtraError, UsageError
from byol_deploy.formats import Opened, RunOptions
from byol_deploy.host import describe_host
from byol_deploy.manifest import Artefact, Tuned

LEAST_BUDGET_S = 5.0
"""With less nothing can be told apart from noise."""


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
        images: (N, H, W, 3) uint8; the first one is run.
        output: The deployed output.
        budget_s: Seconds.
        say: Called with a line for each candidate.

    Raises:
        UsageError: No file can take part, or the budget is too small to decide.
    """
    one = images[:1]
    runs: dict[str, Callable[[], object]] = {}
    settings: dict[str, tuple[Artefact, int]] = {}
    for artefact in artefacts:
        format = formats.get(artefact.format)
        if not (format.opens_in_encoder and artefact.parity.get("passed")):
            continue
        for threads in sorted({1, usable_cores()}, reverse=True):
            name = f"{artefact.file}, {threads} thread{'s' if threads > 1 else ''}"
            runs[name] = _call(format.load(folder / artefact.file, RunOptions(threads=threads)), one, output)
            settings[name] = artefact, threads
    if not runs:
        raise UsageError("there is nothing to tune: no file of this bundle runs without PyTorch; add --format onnx")
    first, threads = next(iter(settings.values()))
    again = formats.get(first.format).load(folder / first.file, RunOptions(threads=threads))
    say(f"measuring {len(runs)} candidates within {budget_s:g} s")
    found = measure_candidates(runs, budget_s=budget_s, control=_call(again, one, output))
    if not found.candidates:
        raise UsageError(f"no candidate could be measured: {'; '.join(found.failed.values())}")
    ranked = sorted(found.candidates, key=lambda candidate: candidate.p50_ms)
    for candidate in ranked:
        say(f"  {candidate.name}: {candidate.p50_ms:.2f} ms, {candidate.ratio or 1:.2f}x {found.candidates[0].name}")
    for warning in found.warnings:
        say(f"WARNING {warning}")
    chosen, threads = settings[ranked[0].name]
    say(f"tuned: {ranked[0].name}")
    return Tuned(chosen.file, threads, {"machine": describe_host(), "budget_s": budget_s, **found.to_dict()})


def _call(opened: Opened, one: np.ndarray, output: str) -> Callable[[], object]:
    return lambda: opened.compute(one, (output,))


def _missing(format: formats.Format) -> bool:
    try:
        formats.require(format)
    except MissingExtraError:
        return True
    return False
