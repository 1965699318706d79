"""Smaller files that are still the same encoder: which calibration, and which layers must stay in float32.

Nothing here knows a format. A :class:`Reducer` writes files; :func:`search` decides between them by what an embedding
is used for: do images keep their nearest neighbours, and by what part of the distance between two images do they drift?
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from byol_deploy.bench import time_block
from byol_deploy.environment import cpu
from byol_deploy.errors import DataError, UsageError
from byol_deploy.parity import MOST_MARGIN, as_rows, neighbour_agreement, separation_margin
from byol_deploy.parity.limits import LESS_STRICT
from byol_deploy.parity.measures import FEWEST_FOR_NEIGHBOURS, centred_units, distance_apart

TARGETS = ("x86-vnni", "x86", "arm64")
"""Processors, by what their int8 instructions want: x86-64 with VNNI multiplies unsigned activations by signed weights;
without VNNI the same product saturates in 16 bits, so that weights get 7 bits; ARM multiplies signed by signed."""

_FEW = 32
"""Images for what a layer does alone: its drift is a mean, which needs fewer images than the neighbours do, and layers
differ by factors."""
_BATCH = 32
_ROUNDS, _CALLS = 5, 3
"""Of the times, a round of both files in turn."""
_AT_THE_FLOOR = 1.1
"""A drift within this factor of the one with all layers kept gets no better by keeping more."""


def this_target() -> str | None:
    """The one of :data:`TARGETS` that this machine is; None for another processor."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        features = cpu()["features"] or {}
        return "x86-vnni" if any(there and "vnni" in name.lower() for name, there in features.items()) else "x86"
    return "arm64" if machine in ("arm64", "aarch64") else None


def resolve_target(target: str) -> tuple[str, bool]:
    """A target by name, "this" for this machine, and whether files for it are timed rightly here.

    Raises:
        UsageError: There is no such target, or this machine is none of them.
    """
    here = this_target()
    if target == "this":
        if here is None:
            raise UsageError(f"this machine ({platform.machine()}) is none of the targets; use {', '.join(TARGETS)}")
        return here, True
    if target not in TARGETS:
        raise UsageError(f"target {target!r} does not exist; use this, {', '.join(TARGETS)}")
    # A file for a processor without VNNI runs on one with it too, but its time there says nothing about the former.
    return target, target == here


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a quantiser is told.

    Attributes:
        images: (N, H, W, 3) uint8 as the graph takes them: on these the ranges of activations are measured.
        target: One of :data:`TARGETS`, the processor that the file is for.
    """

    images: np.ndarray
    target: str


class Reducer(Protocol):
    """Writes files of one reduced precision from one float32 encoder, as often as :func:`search` asks."""

    methods: tuple[str, ...]
    """Calibration methods, each worth a try; one empty name where nothing is calibrated."""
    layers: tuple[str, ...]
    """Names of the layers that can be kept in float32, in the order of the graph; empty where none can."""

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        """Write a file.

        Args:
            path: Its main file; one that is there is replaced.
            carried: Texts that it must carry, see :meth:`byol_deploy.formats.Format.export`.
            method: One of :attr:`methods`.
            kept: Those of :attr:`layers` that stay in float32.

        Returns:
            Further files beside ``path`` that belong to it.

        Raises:
            ExportError: The quantiser failed.
        """


@dataclass(frozen=True)
class Goal:
    """What a file of reduced precision must reach on the trial images.

    Attributes:
        agreement: Smallest share of images that keep their nearest neighbour.
        margin: Largest drift in distances between different images, see :func:`byol_deploy.parity.separation_margin`.
    """

    agreement: float = 0.98
    margin: float = MOST_MARGIN

    def __post_init__(self) -> None:
        """Refuse what is no share and no distance."""
        if not 0 < self.agreement <= 1 or not 0 < self.margin <= 1:
            raise UsageError(
                f"the goal is an agreement of {self.agreement} and a margin of {self.margin}; both lie above 0 and up "
                "to 1, e.g. 0.98 and 0.25"
            )


@dataclass(frozen=True)
class Trial:
    """One file that was written and measured.

    Attributes:
        method: Calibration method; empty where there is none.
        kept: The layers that stay in float32 (or in what the format computes instead).
        agreement: Share of images that keep their nearest neighbour.
        margin: Drift in distances between different images.
        outliers: Margin of the images far from those that calibrate, and of the heads, in units of what is allowed.
        drift: Root mean square of the images' drift on the unit sphere: what trials are ordered by.
        latency: Time of one image, in those of the float32 file; measured side by side.
        bytes: Size of the file and what belongs to it.
        passed: Whether the goal is reached.
    """

    method: str
    kept: tuple[str, ...]
    agreement: float
    margin: float
    outliers: float
    drift: float
    latency: float
    bytes: int
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite becomes None."""
        values = {**asdict(self), "kept": list(self.kept)}
        return {key: None if isinstance(item, float) and not math.isfinite(item) else item
                for key, item in values.items()}  # fmt: skip


@dataclass(frozen=True)
class Trade:
    """What :func:`search` tried and chose.

    Attributes:
        precision: The precision.
        goal: What had to be reached.
        trials: All files that were measured, in their order.
        chosen: The one to publish; None when none reached the goal and was faster.
        reason: Why none was chosen; empty otherwise.
        sensitivity: For each layer the drift that it alone causes when it is reduced; empty where that was not needed.
        images: Number of trial images.
        calibration: Number of calibration images.
        target: Processor that the file is for.
    """

    precision: str
    goal: Goal
    trials: tuple[Trial, ...]
    chosen: Trial | None
    reason: str
    sensitivity: Mapping[str, float]
    images: int
    calibration: int
    target: str

    def to_dict(self) -> dict[str, Any]:
        """As in a manifest."""
        return {
            "method": self.chosen.method if self.chosen else None,
            "kept": list(self.chosen.kept) if self.chosen else [],
            "target": self.target,
            "goal": asdict(self.goal),
            "images": self.images,
            "calibration": self.calibration,
            "trials": [trial.to_dict() for trial in self.trials],
            "sensitivity": {name: value for name, value in self.sensitivity.items() if math.isfinite(value)},
        }

    def table(self) -> str:
        """The trade as text: one line a trial."""
        head = ("calibration", "kept", "neighbours", "margin", "the rest", "latency", "size", "")
        full = [("", *head)]
        for trial in self.trials:
            mark = "chosen" if trial is self.chosen else "" if trial.passed else "below the goal"
            full.append(
                (
                    "",
                    trial.method or "none",
                    str(len(trial.kept)),
                    f"{trial.agreement:.1%}",
                    f"{trial.margin:.3f}",
                    f"{trial.outliers:.0%} of limit",
                    f"{trial.latency:.2f}x",
                    f"{trial.bytes / 1e6:.1f} MB",
                    mark,
                )
            )
        widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in full
        )


@dataclass(frozen=True, eq=False)
class Outliers:
    """Images far from those that calibrate, such as noise and odd files: the gate asks about them too.

    Attributes:
        images: (M, H, W, 3) uint8.
        expected: Output name to (M, D) float32, what the trained model gives for them.
        margins: Output name to the largest drift, in distances between different trial images.
    """

    images: np.ndarray
    expected: Mapping[str, np.ndarray]
    margins: Mapping[str, float]


Outputs = Mapping[str, np.ndarray]
"""Output name to (N, D) float32."""
Run = Callable[[np.ndarray], Outputs]
"""Images (N, H, W, 3) uint8 to their outputs."""


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
    bench = _Bench(reducer, open_file, full, images, expected, goal, scratch, outliers)
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


class _Bench:
    """Writes, opens and measures one file after another."""

    def __init__(
        self,
        reducer: Reducer,
        open_file: Callable[[Path], Run],
        full: Run,
        images: np.ndarray,
        expected: Outputs,
        goal: Goal,
        scratch: Path,
        outliers: Outliers | None,
    ) -> None:
        self.reducer, self.open_file, self.full, self.goal = reducer, open_file, full, goal
        self.images = images
        self.name = next(iter(expected))
        self.every = {name: as_rows(values) for name, values in expected.items()}
        self.expected = self.every[self.name]
        margins = {name: goal.margin * (1 if name == self.name else LESS_STRICT) for name in expected}
        self.real = Outliers(images, self.every, margins)
        self.path = scratch
        self.outliers = outliers
        self.apart = {name: distance_apart(values) for name, values in self.every.items()}
        if not self.apart[self.name]:
            raise DataError(
                "the trained model gives the same embedding for different images, so that nothing can be chosen by "
                "them; give other images, or see whether the encoder has collapsed"
            )

    def trial(self, method: str, kept: tuple[str, ...]) -> Trial:
        run, size = self._open(method, kept)
        outputs = self._outputs(run, self.images)
        if outputs is None:
            return Trial(method, kept, 0.0, math.inf, math.inf, math.inf, math.inf, size, passed=False)
        found = outputs[self.name]
        margin = separation_margin(found, self.expected)
        agreement = neighbour_agreement(self.expected, found)
        if margin is None or agreement is None:
            # It gives one embedding for all images: the reference does not, see below.
            margin, agreement = math.inf, 0.0
        one = self.images[:1]
        latency = float(np.median([
            np.median(time_block(lambda: run(one), _CALLS)) / np.median(time_block(lambda: self.full(one), _CALLS))
            for _ in range(_ROUNDS)
        ]))  # fmt: skip
        heads = self._used(outputs, self.real, outputs)
        outliers = max([heads[name] for name in heads if name != self.name] + [self._beyond(run, outputs)])
        passed = margin <= self.goal.margin and agreement >= self.goal.agreement and outliers <= 1.0
        drift = self._drift(found, self.expected)
        return Trial(method, kept, agreement, margin, outliers, drift, latency, size, passed)

    def alone(self, method: str, layer: str) -> float:
        """The drift when this layer alone is reduced; infinite where the outputs are not finite."""
        run, _ = self._open(method, [name for name in self.reducer.layers if name != layer])
        outputs = self._outputs(run, self.images[:_FEW])
        odd = {} if self.outliers is None else self._outputs(run, self.outliers.images)
        if outputs is None or odd is None:
            return math.inf
        found = [self._share(outputs, self.real, outputs)]
        if self.outliers is not None:
            found.append(self._share(odd, self.outliers, outputs))
        return max(found)

    def _share(self, outputs: Outputs, images: Outliers, real: Outputs) -> float:
        """The largest root mean square drift of any output, where it may be twice as large weighing half."""
        shares = []
        for name, expected in images.expected.items():
            mine, theirs = self.every[name][: len(real[name])], real[name]
            wanted = centred_units(as_rows(expected)[: len(outputs[name])], mine)
            drift = np.linalg.norm(centred_units(outputs[name], theirs) - wanted, axis=1)
            shares.append(float(np.sqrt((drift**2).mean())) * self.goal.margin / images.margins[name])
        return max(shares)

    @staticmethod
    def _drift(found: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(((centred_units(found) - centred_units(expected)) ** 2).sum(axis=1).mean()))

    def _beyond(self, run: Run, real: Outputs) -> float:
        """The largest of the outliers' margins in units of what is allowed; ``real`` are the trial images' outputs."""
        outliers = self.outliers
        if outliers is None:
            return 0.0
        outputs = self._outputs(run, outliers.images)
        if outputs is None:
            return math.inf
        return max(self._used(outputs, outliers, real).values())

    def _used(self, outputs: Outputs, images: Outliers, real: Outputs) -> dict[str, float]:
        """For each output its margin in units of what is allowed."""
        used = {}
        for name, expected in images.expected.items():
            among = self.every[name][: len(real[name])], real[name]
            margin = separation_margin(outputs[name], as_rows(expected), self.apart[name] or None, among=among)
            used[name] = (margin or 0.0) / images.margins[name]
        return used

    def _open(self, method: str, kept: Sequence[str]) -> tuple[Run, int]:
        further = self.reducer.write(self.path, {}, method, kept)
        size = sum(item.stat().st_size for item in (self.path, *further))
        try:
            return self.open_file(self.path), size
        except Exception as error:
            return _raises(error), size

    @staticmethod
    def _outputs(run: Run, images: np.ndarray) -> dict[str, np.ndarray] | None:
        """What a file gives; None where that is not finite, or where the engine cannot run it.

        Engines have bugs: a mixture of precisions that one of them cannot run is no choice, and no reason to stop.
        """
        try:
            parts = [run(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        except Exception:
            return None
        found = {name: as_rows(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        return found if all(np.isfinite(values).all() for values in found.values()) else None


def _raises(error: Exception) -> Run:
    def run(images: np.ndarray) -> Outputs:
        raise error

    return run


def _line(precision: str, trial: Trial) -> str:
    kept = f", {len(trial.kept)} layers in float32" if trial.kept else ""
    method = f" {trial.method}" if trial.method else ""
    return (
        f"{precision}{method}{kept}: {trial.agreement:.1%} of the nearest neighbours kept, margin {trial.margin:.3f}, "
        f"the rest {trial.outliers:.0%} of its limit, "
        f"{trial.latency:.2f}x the time of float32"
    )
