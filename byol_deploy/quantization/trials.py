"""Writes one file of reduced precision after another, opens it, and measures what it costs and gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from byol_deploy.bench import time_block
from byol_deploy.errors import DataError
from byol_deploy.parity import as_rows, neighbour_agreement, separation_margin
from byol_deploy.parity.limits import LESS_STRICT
from byol_deploy.parity.measures import centred_units, distance_apart
from byol_deploy.quantization.reducer import Reducer
from byol_deploy.quantization.trade import Goal, Trial

_FEW = 32
"""Images for what a layer does alone: its drift is a mean, which needs fewer images than the neighbours do, and layers
differ by factors."""
_AMONG = 384
"""Images among which nearest neighbours are sought."""
_BATCH = 32
_ROUNDS, _CALLS = 5, 3
"""Of the times, a round of both files in turn."""
_SIZES = (1, 8)
"""Images at a time for what a layer costs."""


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


class Bench:
    """Measures the files of one reducer on the same images; the arguments are those of the search."""

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
        """What a file with these layers kept costs and gains."""
        run, size = self._open(method, kept)
        outputs = self._outputs(run, self.images)
        if outputs is None:
            return Trial(method, kept, 0.0, math.inf, math.inf, math.inf, math.inf, size, passed=False)
        found = outputs[self.name]
        margin = separation_margin(found, self.expected)
        agreement = _agreement(self.expected, found)
        if margin is None or agreement is None:
            # It gives one embedding for all images: the reference does not, see below.
            margin, agreement = math.inf, 0.0
        one = self.images[:1]
        latency = _ratio(run, self.full, one)
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

    def costs(self, method: str, layers: Sequence[str]) -> dict[str, float]:
        """The time that each of these layers costs when it alone is kept, in that of the file with none kept."""
        first, *rest = self.path.name.split(".")
        base = self.path.with_name(".".join([first, "none", *rest]))
        further = self.reducer.write(base, {}, method, ())
        plain = self.open_file(base)
        found = {}
        for layer in layers:
            run, _ = self._open(method, [layer])
            try:
                # Half of the weight for single images, half for batches: an encoder is given both.
                found[layer] = float(np.mean([_ratio(run, plain, self.images[:size]) for size in _SIZES])) - 1.0
            except Exception:
                found[layer] = math.inf
        for item in (base, *further):
            item.unlink(missing_ok=True)
        return found

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


def _agreement(expected: np.ndarray, found: np.ndarray) -> float | None:
    """The mean share of kept neighbours among groups of images: more images at once lie closer together."""
    count = max(1, round(len(expected) / _AMONG))
    shares = [
        neighbour_agreement(wanted, given)
        for wanted, given in zip(np.array_split(expected, count), np.array_split(found, count), strict=True)
    ]
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if len(known) == count else None


def _ratio(run: Run, base: Run, images: np.ndarray) -> float:
    """The time of ``run`` in that of ``base``, measured in turn."""
    return float(np.median([
        np.median(time_block(lambda: run(images), _CALLS)) / np.median(time_block(lambda: base(images), _CALLS))
        for _ in range(_ROUNDS)
    ]))  # fmt: skip


def _raises(error: Exception) -> Run:
    def run(images: np.ndarray) -> Outputs:
        raise error

    return run
