"""Which calibration, and which layers must stay in float32, so that a smaller file is still the same encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from byol_deploy.errors import UsageError
from byol_deploy.parity.measures import FEWEST_FOR_NEIGHBOURS
from byol_deploy.quantization.reducer import Calibration, Reducer
from byol_deploy.quantization.trade import Goal, Trade, Trial
from byol_deploy.quantization.trials import Bench, Outliers, Outputs, Run

_AT_THE_FLOOR = 1.1
"""A drift within this factor of the one with all layers kept gets no better by keeping more."""


def search(
    reducer: Reducer,
    open_file: Callable[[Path], Run],
    full: Run,
    images: np.ndarray,
    expected: Outputs,
    *,
    precision: str,
    calibration: Calibration,
    goal: Goal,
    scratch: Path,
    outliers: Outliers | None = None,
    must_be_faster: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Trade:
    """Find the file that reaches the goal with the fewest layers kept in float32.

    Every calibration method is tried with all layers reduced. The one with the least drift goes on: when it does not
    reach the goal, each layer is reduced alone, the layers are ordered by the drift that they cause, and the fewest of
    them that must go back to float32 are found by bisection.

    A file that is the first of several to keep just enough neighbours of these images keeps fewer of others. The
    bisection therefore aims at half of the loss that the goal allows, or at what is left when every layer is kept,
    where the format computes kept layers in something narrower than float32. Where that is out of reach, or not
    faster, the file that keeps the most neighbours is taken among those that reach the goal itself.

    Args:
        reducer: Writes the files.
        open_file: Opens a written file.
        full: The float32 file, for latency.
        images: (N, H, W, 3) uint8, none of which calibrates; at least 8.
        expected: What the trained model gives for them. The first output is the deployed one, which the goal is
            about; the others, heads that serve training, may drift :data:`byol_deploy.parity.LESS_STRICT` times as far.
        precision: Of the reducer.
        calibration: What the reducer was made with.
        goal: What must be reached.
        scratch: Where trial files are written, one over the other, with the format's own suffix.
        outliers: Images far from those that calibrate, with a limit of their own; None where there are none.
        must_be_faster: Whether a file that is not faster than float32 is no choice: on another processor than the one
            it is for that says nothing.
        say: Called with a line of progress now and then.

    Raises:
        ExportError: The quantiser failed.
        UsageError: Fewer than 8 images.
    """
    if len(images) < FEWEST_FOR_NEIGHBOURS:
        raise UsageError(f"{len(images)} images say nothing about neighbours; give {FEWEST_FOR_NEIGHBOURS} or more")
    bench = Bench(reducer, open_file, full, images, expected, goal, scratch, outliers)
    trials = []
    for method in reducer.methods:
        trials.append(bench.trial(method, ()))
        say(_line(precision, trials[-1]))
    aim = (1.0 + goal.agreement) / 2
    floor = 0.0

    def safe(trial: Trial) -> bool:
        return trial.passed and (trial.agreement >= aim or trial.drift <= _AT_THE_FLOOR * floor)

    best = min(trials, key=lambda trial: (not safe(trial), not trial.passed, trial.drift))
    sensitivity: dict[str, float] = {}
    if not safe(best) and reducer.layers:
        say(f"{precision}: measuring what each of {len(reducer.layers)} layers does alone")
        sensitivity = {layer: bench.alone(best.method, layer) for layer in reducer.layers}
        order = sorted(reducer.layers, key=lambda layer: -sensitivity[layer])

        def measured(kept: tuple[str, ...]) -> Trial:
            trials.append(bench.trial(best.method, kept))
            say(_line(precision, trials[-1]))
            return trials[-1]

        ends = measured(tuple(order))
        floor = ends.drift
        if ends.passed:
            _bisect(order, measured, safe)
    chosen, reason = _choose(trials, safe, goal, precision, must_be_faster, len(reducer.layers))
    return Trade(precision, goal, tuple(trials), chosen, reason, sensitivity, len(images), len(calibration.images),
                 calibration.target)  # fmt: skip


def _choose(
    trials: Sequence[Trial],
    safe: Callable[[Trial], bool],
    goal: Goal,
    precision: str,
    must_be_faster: bool,
    layers: int,
) -> tuple[Trial | None, str]:
    passed = [trial for trial in trials if trial.passed]
    if not passed:
        near = min(trials, key=lambda trial: trial.drift)
        return None, (
            f"{precision} cannot reach the goal: the best of {len(trials)} tried files keeps {near.agreement:.1%} of "
            f"the nearest neighbours at a margin of {near.margin:.3f} (the rest: {near.outliers:.0%} of its limit), "
            f"and {goal.agreement:.1%} and {goal.margin:g} "
            f"are asked for; calibrate with more images like those of production, or ask for less (--agreement "
            f"{max(near.agreement - 0.005, 0.01):.2f})"
        )
    reduced = [trial for trial in passed if not layers or len(trial.kept) < layers]
    if not reduced:
        return None, (
            f"{precision} reaches the goal only with all {layers} layers in float32, which is no {precision}; "
            "calibrate with more images like those of production, or ask for less (--agreement)"
        )
    faster = [trial for trial in reduced if trial.latency < 1.0 or not must_be_faster]
    if not faster:
        near = min(reduced, key=lambda trial: trial.latency)
        return None, (
            f"{precision} is not faster here: {near.latency:.2f} times the float32 file's time with {len(near.kept)} "
            "layers kept in float32; leave this precision out, or name the processor it is for with --target"
        )
    sure = [trial for trial in faster if safe(trial)]
    if sure:
        return min(sure, key=lambda trial: (len(trial.kept), trial.drift)), ""
    return max(faster, key=lambda trial: (trial.agreement, -len(trial.kept))), ""


def _bisect(
    order: Sequence[str], measured: Callable[[tuple[str, ...]], Trial], enough: Callable[[Trial], bool]
) -> None:
    """Measure with ever more of ``order`` kept, doubled until that is enough or all, then bisected to the fewest."""
    low, high = 0, min(max(1, len(order) // 16), len(order))
    while high < len(order) and not enough(measured(tuple(order[:high]))):
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        if enough(measured(tuple(order[:middle]))):
            high = middle
        else:
            low = middle


def _line(precision: str, trial: Trial) -> str:
    kept = f", {len(trial.kept)} layers in float32" if trial.kept else ""
    method = f" {trial.method}" if trial.method else ""
    return (
        f"{precision}{method}{kept}: {trial.agreement:.1%} of the nearest neighbours kept, margin {trial.margin:.3f}, "
        f"the rest {trial.outliers:.0%} of its limit, "
        f"{trial.latency:.2f}x the time of float32"
    )
