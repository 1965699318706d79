"""The sections about reduced precision and about tuning: what was tried, what it costs, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from byol_deploy.drawing import log_range, log_ticks
from byol_deploy.manifest import Artefact, Tuned
from byol_deploy.report.page import render

_WIDTH, _HEIGHT = 760.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 20.0, 34.0, 52.0
_LEAST_USED = 0.01
"""A file that uses less of the goal than this is drawn here: a logarithm of nothing is nowhere."""


def trade_section(artefacts: Sequence[Artefact]) -> str:
    """For each file of reduced precision the files that were tried, as a table and as a plot; empty where none is.

    Args:
        artefacts: Of a manifest; ``reduction`` says what was tried, see
            :meth:`byol_deploy.quantization.Trade.to_dict`.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    shown = [(artefact, draw_trade(artefact.reduction), _rows(artefact.reduction))
             for artefact in artefacts if artefact.reduction.get("trials")]  # fmt: skip
    return render("trade.html.j2", trades=shown) if shown else ""


def tuned_section(tuned: Tuned | None) -> str:
    """What tuning measured on which machine; empty where nothing was tuned.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    if tuned is None or not tuned.evidence.get("batches"):
        return ""
    return render("tuned.html.j2", tuned=tuned)


def used_of_goal(trial: Mapping[str, Any], goal: Mapping[str, Any]) -> float:
    """How much of what is allowed a trial uses; above 1 it does not reach the goal.

    Args:
        trial: As :meth:`byol_deploy.quantization.Trial.to_dict` gives it; what is not finite is None.
        goal: ``agreement`` and ``margin``.

    Returns:
        The largest share of the margin, of the neighbours that may be lost, and of what the other outputs and images
        far from the calibration may drift; infinite where the outputs are not finite.
    """
    if trial["margin"] is None or trial["outliers"] is None:
        return math.inf
    lost = 1.0 - trial["agreement"]
    allowed = 1.0 - goal["agreement"]
    neighbours = lost / allowed if allowed else (math.inf if lost else 0.0)
    return float(max(trial["margin"] / goal["margin"], neighbours, trial["outliers"]))


def draw_trade(reduction: Mapping[str, Any]) -> dict[str, Any]:
    """Time against fidelity, one mark for each file that was tried.

    Both axes are logarithmic: to the left is faster than float32, further down is nearer to the trained model.

    Returns:
        What the template ``trade.html.j2`` draws, in pixels: sizes, ``x_ticks``, ``y_ticks``, ``marks``, and where the
        two limits lie: ``goal`` (its height) and ``par`` (the time of float32).
    """
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    goal, trials = reduction["goal"], reduction["trials"]
    used = [used_of_goal(trial, goal) for trial in trials]
    finite = [max(value, _LEAST_USED) for value in used if math.isfinite(value)]
    times = [trial["latency"] for trial in trials if trial["latency"]]
    low_x, high_x = log_range([math.log10(value) for value in [*times, 1.0]])
    low_y, high_y = log_range([math.log10(value) for value in [*finite, 1.0]])

    def across(value: float) -> float:
        return left + (math.log10(value) - low_x) / (high_x - low_x) * (right - left)

    def height(value: float) -> float:
        return bottom - (math.log10(value) - low_y) / (high_y - low_y) * (bottom - top)

    marks = []
    for trial, share in zip(trials, used, strict=True):
        if not trial["latency"]:
            continue  # outputs that are not finite: their time says nothing
        chosen = trial["passed"] and (trial["method"], trial["kept"]) == (reduction["method"], reduction["kept"])
        marks.append(_Mark(
            across(trial["latency"]), height(max(share, _LEAST_USED)) if math.isfinite(share) else top,
            "chosen" if chosen else "passed" if trial["passed"] else "failed", str(len(trial["kept"])),
            f"{trial['method'] or 'no calibration'}, {len(trial['kept'])} layers kept: {trial['latency']:.2f} times "
            f"float32's time, {share:.0%} of the goal used",
        ))  # fmt: skip
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": left, "right": right, "top": top, "bottom": bottom,
        "x_ticks": [(across(value), f"{value:g}") for value in log_ticks(low_x, high_x)],
        "y_ticks": [(height(value), f"{value:.0%}" if value >= 0.01 else f"{value:.1%}")
                    for value in log_ticks(low_y, high_y)],
        "marks": marks, "goal": height(1.0), "par": across(1.0),
    }  # fmt: skip


@dataclass(frozen=True)
class _Mark:
    x: float
    y: float
    ink: str
    kept: str
    said: str


def _rows(reduction: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {**trial, "chosen": (trial["method"], trial["kept"]) == (reduction["method"], reduction["kept"])}
        for trial in reduction["trials"]
    ]
