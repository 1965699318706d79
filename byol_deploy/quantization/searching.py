"""Which calibration, and which layers must stay in float32, so that a smaller file is still the same encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from byol_deploy.errors import UsageError
from byol_deploy.parity.measures import FEWEST_FOR_NEIGHBOURS
from byol_deploy.quantization.reducer import Calibration, Reducer
from byol_deploy.quantization.trade import Goal, Trade, Trial
from byol_deploy.quantization.trials import Bench, Outliers, Outputs, Run

_NEARLY_ALL = 0.98
"""Share of the squared drift that is caused by the layers whose cost is measured."""
_LEAST_COST = 0.003
"""Of a layer, in the time of the file with all layers reduced: what is less cannot be told from noise."""
_DEAR = 0.01
"""Of a layer, likewise: what is worth a trial of its own to save."""


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
    reach the goal, each layer is reduced alone, which says what drift it causes, and each of those that cause nearly
    all of the drift is kept alone, which says what time it costs. The layers are ordered by what they spare for their
    time, as drifts add up in their squares, and the fewest of them that must go back to float32 are found by bisection.
    Drifts of layers that follow each other do not add up so: what one of them spares the next may lose again. Those of
    the kept layers that cost most are therefore reduced once more, one after the other, where that is still enough.

    A file that is the first of several to keep just enough neighbours of these images keeps fewer of others. The
    bisection therefore aims halfway between the goal and what is left when every layer is kept (all neighbours, or
    fewer where the format computes kept layers in something narrower than float32). Where that is out of reach, or
    not faster, the file that keeps the most neighbours is taken among those that reach the goal itself.

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
    most = 1.0

    def safe(trial: Trial) -> bool:
        return trial.passed and trial.agreement >= (most + goal.agreement) / 2

    best = min(trials, key=lambda trial: (not safe(trial), not trial.passed, trial.drift))
    sensitivity: dict[str, float] = {}
    if not safe(best) and reducer.layers:
        say(f"{precision}: measuring what each of {len(reducer.layers)} layers does alone")
        sensitivity = {layer: bench.alone(best.method, layer) for layer in reducer.layers}
        order = sorted(reducer.layers, key=lambda layer: -sensitivity[layer])
        costs: dict[str, float] = {}
        if must_be_faster:
            matter = _most(order, sensitivity)
            say(f"{precision}: measuring what each of {len(matter)} layers costs in float32")
            costs = bench.costs(best.method, matter)
            worth = {layer: sensitivity[layer] ** 2 / max(costs[layer], _LEAST_COST) for layer in matter}
            order = [*sorted(matter, key=lambda layer: -worth[layer]), *order[len(matter) :]]

        def measured(kept: tuple[str, ...]) -> Trial:
            for known in trials:
                if known.method == best.method and set(known.kept) == set(kept):
                    return known
            trials.append(bench.trial(best.method, kept))
            say(_line(precision, trials[-1]))
            return trials[-1]

        ends = measured(tuple(order))
        most = ends.agreement
        if ends.passed:
            kept = order[: _bisect(order, measured, safe)]
            dear = [layer for layer in kept if _DEAR < costs.get(layer, 0.0) < math.inf]
            if len(kept) < len(order):
                _give_up(kept, sorted(dear, key=lambda layer: -costs[layer]), measured, safe)
    chosen, reason = _choose(trials, safe, goal, precision, must_be_faster, len(reducer.layers))
    return Trade(precision, goal, tuple(trials), chosen, reason, sensitivity, len(images), len(calibration.images),
                 calibration.target)  # fmt: skip


def _most(order: Sequence[str], sensitivity: Mapping[str, float]) -> list[str]:
    """The first layers of ``order``, the fewest that cause nearly all of the drift."""
    squares = [sensitivity[layer] ** 2 for layer in order]
    if not math.isfinite(sum(squares)):
        # Some cannot be reduced at all; the others have to be told apart all the same.
        squares = [min(square, 1.0) for square in squares]
    reached = np.cumsum(squares)
    return list(order[: int(np.searchsorted(reached, _NEARLY_ALL * reached[-1])) + 1])


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


def _bisect(order: Sequence[str], measured: Callable[[tuple[str, ...]], Trial], enough: Callable[[Trial], bool]) -> int:
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
    return high


def _give_up(
    kept: Sequence[str],
    dear: Sequence[str],
    measured: Callable[[tuple[str, ...]], Trial],
    enough: Callable[[Trial], bool],
) -> None:
    """Measure without one after the other of the layers ``dear``, which stays away where that is enough."""
    for layer in dear:
        without = tuple(one for one in kept if one != layer)
        if without and enough(measured(without)):
            kept = without


def _line(precision: str, trial: Trial) -> str:
    kept = f", {len(trial.kept)} layers in float32" if trial.kept else ""
    method = f" {trial.method}" if trial.method else ""
    return (
        f"{precision}{method}{kept}: {trial.agreement:.1%} of the nearest neighbours kept, margin {trial.margin:.3f}, "
        f"the rest {trial.outliers:.0%} of its limit, "
        f"{trial.latency:.2f}x the time of float32"
    )
