"""Where a written file begins to differ from the trained model: the drift along the graph, layer by layer.

The trained model is recorded in float32 and in float64 (:mod:`byol_deploy.pipeline.explain.recording`), the file is
read at the same places (:meth:`byol_deploy.formats.Format.layers`). Each place is measured twice: the *drift* as it
has added up from the images on, and the layer's *own*, when everything that it reads is the reference's. The first
says where a file leaves its budget, the second which layer is to blame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_deploy import formats
from byol_deploy.errors import UsageError
from byol_deploy.formats import RunOptions
from byol_deploy.formats._layers import LayeredFile
from byol_deploy.parity import NOISE_MULTIPLE

if TYPE_CHECKING:
    from torch import nn

    from byol_deploy.pipeline.explain.recording import Recording

LEAST_NOISE = 2e-7
"""The noise floor where the measured one is smaller: about two float32 roundings (2**-23). Layers that only move or
compare numbers measure none at all, and no float32 runtime can be held to that."""

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 2.0**-7}
"""Relative error of one rounding. int8 has 7 bits and a sign for the largest value of a whole tensor."""

ROUNDOFF_MULTIPLE = 10.0
"""The budget of a layer at reduced precision, in unit roundoffs. Rounding errors of single values are independent and
add up as their root of squares: a hundred layers of one rounding each reach ten of them."""


@dataclass(frozen=True)
class Layer:
    """One row: what a file makes of one layer.

    Attributes:
        path: Path of the PyTorch module; empty for the whole model.
        class_name: Its class.
        number: Which call of the module, from 0; -1 where it is called once.
        kind: ``module``, ``operation`` (functional, between modules) or ``output``.
        nodes: Nodes of the file that compute it, in order.
        name: The value's name in the file.
        source: ``package/file.py:line`` in Python; empty where unknown.
        drift: Relative L2 distance from float64, added up from the images on, the largest over the images; infinite
            for values that are not finite.
        own: The same when all that the layer reads is the reference's; None where the file cannot be fed.
        noise: Relative L2 distance of the model's own float32 from its float64 there.
        budget: What ``drift`` and ``own`` may be.
        recovers: All that is computed from it is within its budget, or recovers too: the file orders the work another
            way, or nothing depends on the difference. Never at reduced precision.
    """

    path: str
    class_name: str
    number: int
    kind: str
    nodes: tuple[str, ...]
    name: str
    source: str
    drift: float
    own: float | None
    noise: float
    budget: float
    recovers: bool = False

    @property
    def title(self) -> str:
        """For a reader: ``backbone.layer1.0.relu (call 2)``, ``backbone.layer1.0 Add``."""
        path = self.path or "the whole model"
        if self.kind == "operation":
            return f"{path} · {self.operation}"
        if self.kind == "output":
            return f"{path} · output {self.name}" if self.name else f"{path} · output"
        return f"{path} (call {self.number + 1})" if self.number >= 0 else path

    @property
    def operation(self) -> str:
        """The last operation in the file, such as ``Add``."""
        moves = ("QuantizeLinear", "DequantizeLinear", "Cast", "/dropout")
        kept = [name for name in self.nodes if not name.endswith(moves)] or list(self.nodes) or [self.name]
        return kept[-1].rpartition("/")[2]

    @property
    def past(self) -> bool:
        """Whether the drift is past the budget."""
        return not self.drift <= self.budget

    @property
    def own_past(self) -> bool:
        """Whether the layer alone, fed the reference's values, is past the budget."""
        return self.own is not None and not self.own <= self.budget


@dataclass(frozen=True)
class Explanation:
    """The drift of one file along the graph.

    Attributes:
        file: The file's name.
        format: Its format.
        precision: What the budget is made for.
        images: How many images were run.
        adds_up: Whether drift is that of the whole file up to a layer. A TorchScript file with control flow is called
            module by module: then drift is the layer's own.
        layers: In the order of execution in the file.
        unmatched: Modules without a place of their own in the file, each with the reason.
        notes: What a reader should know beside.
    """

    file: str
    format: str
    precision: str
    images: int
    adds_up: bool
    layers: tuple[Layer, ...]
    unmatched: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def first(self) -> Layer | None:
        """The first layer past its budget; None where there is none."""
        past = [layer for layer in self.layers if layer.past]
        return next((layer for layer in past if not layer.recovers), None)

    @property
    def largest_step(self) -> Layer | None:
        """The layer that adds most, measured on the reference's values where that was possible."""
        steps = [layer for layer in self.layers if layer.own is not None and not layer.recovers]
        if steps:
            return max(steps, key=lambda layer: layer.own or 0.0)
        before, best, most = 0.0, None, 0.0
        for layer in self.layers:
            if layer.drift - before > most:
                best, most = layer, layer.drift - before
            before = layer.drift
        return best

    @property
    def culprits(self) -> tuple[Layer, ...]:
        """Every layer that is past its budget even on the reference's values: several faults show at once."""
        return tuple(layer for layer in self.layers if layer.own_past and not layer.recovers)

    @property
    def culprit(self) -> Layer | None:
        """The layer to look at; None where all is well.

        In fp32 the first that is past its budget by itself, else the first past its budget. At reduced precision every
        layer adds something, and some layer that did nothing wrong is the first past its budget: there it is the one
        that adds most.
        """
        if self.first is None:
            return None
        if self.precision != "fp32":
            return self.largest_step
        return self.culprits[0] if self.culprits else self.first

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing is past its budget."""
        return bool(self.layers) and self.first is None

    def verdict(self) -> str:
        """One or two sentences that name the layer."""
        first, culprit = self.first, self.culprit
        if not self.layers:
            return f"{self.file}: nothing to match: no value of the file could be told to be a layer's"
        if first is None or culprit is None:
            return f"{self.file}: all {len(self.layers)} places within their budgets on {self.images} images"
        said = (
            f"{self.file}: the drift first shows at {_described(first)}: {first.drift:.2g} against {first.budget:.2g}"
        )
        if culprit is not first:
            alone = culprit.own_past or culprit.own is None
            said += "; the layer at fault is " if alone else "; no layer is at fault by itself, most is added by "
            said += _described(culprit) + ("" if culprit.own is None else f": {culprit.own:.2g} by itself")
        if first.own is not None and not first.own_past:
            said += (
                f". On the reference's values {first.title} is within its budget ({first.own:.2g}): what it reads is "
                "off already"
            )
        if len(self.culprits) > 1:
            also = [layer.title for layer in self.culprits if layer is not culprit]
            said += f". At fault by themselves too: {', '.join(also[:6])}{' ...' if len(also) > 6 else ''}"
        return said

    def text(self, all_layers: bool = False) -> str:
        """A table: the first culprit, its neighbours and the worst few, or every layer."""
        from byol_deploy.pipeline.explain.view import table

        return table(self, all_layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not finite is None."""

        def plain(layer: Layer) -> dict[str, Any]:
            values = asdict(layer) | {"title": layer.title, "past": layer.past, "nodes": list(layer.nodes)}
            return {key: None if isinstance(value, float) and not math.isfinite(value) else value
                    for key, value in values.items()}  # fmt: skip

        place_of = {id(layer): place for place, layer in enumerate(self.layers)}

        def place(layer: Layer | None) -> int | None:
            return None if layer is None else place_of[id(layer)]

        return {
            "file": self.file,
            "format": self.format,
            "precision": self.precision,
            "images": self.images,
            "adds_up": self.adds_up,
            "passed": self.passed,
            "verdict": self.verdict(),
            "first": place(self.first),
            "culprit": place(self.culprit),
            "culprits": [place(layer) for layer in self.culprits],
            "largest_step": place(self.largest_step),
            "layers": [plain(layer) for layer in self.layers],
            "unmatched": [{"path": path, "reason": reason} for path, reason in self.unmatched],
            "notes": list(self.notes),
        }

    def series(self) -> dict[str, list[Any]]:
        """For a plot, per layer: ``names``, ``drift``, ``own`` (NaN: none), ``noise``, ``budget``, ``recovers``."""
        return {
            "names": [layer.title for layer in self.layers],
            "drift": [layer.drift for layer in self.layers],
            "own": [math.nan if layer.own is None else layer.own for layer in self.layers],
            "noise": [layer.noise for layer in self.layers],
            "budget": [layer.budget for layer in self.layers],
            "recovers": [layer.recovers for layer in self.layers],
        }


def explain_file(
    path: Path,
    format: formats.Format,
    graph: nn.Module,
    images: np.ndarray,
    *,
    precision: str = "fp32",
    options: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Explanation:
    """Measure the drift of a written file at every layer.

    Args:
        path: The file.
        format: Its format.
        graph: The trained model, a :class:`byol_deploy.graph.EncoderGraph` or any module that takes ``images``.
        images: (n, H, W, 3) uint8, preprocessed; about 4. They are run one at a time.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        options: Provider and threads.

    Returns:
        The explanation; a difference is no exception.

    Raises:
        BundleError: The file is damaged, or cannot be run layer by layer.
        ProviderError: The provider is not there.
        UsageError: No image, or an unknown precision.
    """
    if precision not in UNIT_ROUNDOFF:
        raise UsageError(f"precision is {precision!r}; use one of {', '.join(UNIT_ROUNDOFF)}")
    if not len(images):
        raise UsageError("no image was given to explain a file with; pass a few, e.g. 4")
    from byol_deploy.pipeline.explain.recording import doubled, record_both

    double_graph = doubled(graph)
    file: LayeredFile | None = None
    drift, own, noise = np.zeros(0), np.zeros(0), np.zeros(0)
    notes: list[str] = []
    for start in range(len(images)):
        image = images[start : start + 1]
        single, double = record_both(graph, image, double_graph)
        if file is None:
            file = format.layers(path, options, single.calls, single.slots, image)
            drift, own, noise = np.zeros((3, len(file.points)))
        truths = [double.slots[point.slot] for point in file.points]
        drift = np.maximum(drift, _distances(file.values(image, double.slots), truths))
        noise = np.maximum(noise, _distances([single.slots[point.slot] for point in file.points], truths))
        fed = file.fed(image, double.slots)
        own = np.full(len(truths), np.nan) if fed is None else np.maximum(own, _distances(fed, truths))
    assert file is not None
    if not file.adds_up:
        notes.append("the file has control flow: each module was called by itself, on the reference's input")
    layers = _rows(file, drift, own, noise, precision, single)
    return Explanation(
        path.name, format.name, precision, len(images), file.adds_up, layers, file.unmatched, tuple(notes)
    )


def budget_of(noise: float, precision: str) -> float:
    """How far a layer's value may be from float64, relative L2.

    Args:
        noise: The model's own float32 noise there.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    """
    floor = NOISE_MULTIPLE * max(noise, LEAST_NOISE)
    return floor if precision == "fp32" else max(floor, ROUNDOFF_MULTIPLE * UNIT_ROUNDOFF[precision])


def relative_l2(actual: np.ndarray, truth: np.ndarray) -> float:
    """``|actual - truth| / |truth|`` in float64; infinite where either is not finite.

    A truth of zeros alone has no relative error: 0 where ``actual`` is zero too, else 1.
    """
    wanted = np.asarray(truth, np.float64).ravel()
    difference = np.asarray(actual, np.float64).ravel() - wanted
    size, distance = float(np.linalg.norm(wanted)), float(np.linalg.norm(difference))
    if not (math.isfinite(size) and math.isfinite(distance)):
        return math.inf
    if size == 0:
        return 0.0 if distance == 0 else 1.0
    return distance / size


def _distances(values: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([relative_l2(value, truth) for value, truth in zip(values, truths, strict=True)])


def _rows(
    file: LayeredFile, drift: np.ndarray, own: np.ndarray, noise: np.ndarray, precision: str, recorded: Recording
) -> tuple[Layer, ...]:
    budgets = [budget_of(float(value), precision) for value in noise]
    past = [not value <= budget for value, budget in zip(drift.tolist(), budgets, strict=True)]
    readers: dict[int, list[int]] = {}
    for place, point in enumerate(file.points):
        for before in point.after:
            readers.setdefault(before, []).append(place)
    recovers = [False] * len(past)
    # Wide budgets hide what fades: a badly calibrated branch is lost in the sum behind it, and yet is at fault.
    for place in reversed(range(len(past)) if precision == "fp32" else ()):  # from the end: readers come later
        # What the whole gives out is read by its user: nothing behind it can make it good.
        if past[place] and readers.get(place) and file.points[place].slot not in recorded.outputs():
            recovers[place] = all(not past[reader] or recovers[reader] for reader in readers[place])
    sources = {(call.path, call.number): call.source for call in recorded.calls}
    return tuple(
        Layer(
            point.path,
            point.class_name,
            point.number,
            point.kind,
            point.nodes,
            point.name,
            # Where its module is called says nothing about an operation inside.
            point.source or ("" if point.kind == "operation" else sources.get((point.path, max(point.number, 0)), "")),
            float(drift[place]),
            None if math.isnan(own[place]) else float(own[place]),
            float(noise[place]),
            budgets[place],
            recovers[place],
        )
        for place, point in enumerate(file.points)
    )


def _described(layer: Layer) -> str:
    said = f"{layer.title} ({layer.class_name})" if layer.class_name and layer.kind == "module" else layer.title
    if layer.nodes and layer.nodes[-1] != layer.path:
        said += (
            f", node {layer.nodes[-1]}" if len(layer.nodes) < 3 else f", nodes {layer.nodes[0]} to {layer.nodes[-1]}"
        )
    return f"{said}, {layer.source}" if layer.source else said
