"""Do a model's batch-norm statistics belong to its weights and to the images? No comparison of two files can tell.

In evaluation mode batch normalisation (Ioffe and Szegedy, arXiv:1502.03167, algorithm 2) uses the running mean and
variance of training. When they are another branch's, were never updated, or come from images that were normalised
otherwise, the exported file agrees with PyTorch exactly, and both are wrong. Here the running statistics are held
against fresh ones: of what each layer really takes on real images, with all layers in evaluation mode as at deployment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FEWEST_IMAGES = 8
"""With fewer different images the spread between images, and with it the sampling error, is not known."""
ERRORS = 3.0
"""Standard errors that a deviation must exceed before the rest of it counts; 2 were too few on 8 to 16 images."""
MEAN_SHIFT_LIMIT = 0.6
LOG_VARIANCE_LIMIT = math.log(2.0)
PIXEL_LOG_VARIANCE_LIMIT = 0.4
"""Limits on what is left of a layer's deviation after :data:`ERRORS` standard errors; the last one is for a layer next
to the pixels, with at most one other layer with weights before it.

Training sees augmented views and the check sees plain images, so healthy statistics deviate too, and the deviation adds
up with depth. The largest healthy ones that were met, in small networks after six epochs of BYOL's own augmentation: a
mean off by 0.4, a log variance by 0.4, and next to the pixels one by 0.1. Those of a wrong mean and std begin at 0.5
there. A shift of the means below the limit, as of a mean that is wrong by 0.1 of the pixels' range, stays unseen.
"""
UNSEEN_SHARE = 3.0
UNSEEN_VARIANCE = 10.0
"""A fresh variance that is too small may only lack rare images, whose absence no standard error shows.

What was not met in n images has a share of up to 3/n (rule of three: Hanley and Lippman-Hand, JAMA 249, 1983). In a
healthy MobileNetV3 some 3 % of the images had more than ten times the mean variance in the deep layers. A layer next to
the pixels is exempt: they are bounded.
"""
_SHOWN = 3


@dataclass(frozen=True)
class LayerStatistics:
    """How far one layer's running statistics are from fresh ones: medians over its channels.

    Attributes:
        layer: Path of the module.
        channels: Number of channels.
        mean_shift: |fresh mean - running mean|, in running standard deviations.
        mean_error: Standard error of the fresh mean, in running standard deviations.
        log_variance: |ln(fresh variance / running variance)|.
        log_variance_error: Standard error of the fresh variance, relative to it.
        log_variance_unseen: What rare images that are not among these could explain; infinite for a deep layer with
            too small a fresh variance on 30 images or fewer.
        variance_ratio: Fresh variance / running variance; tells the direction.
        on_pixels: At most one layer with weights lies between the pixels and this one; its limit on the variance is a
            tighter one.
        far: One of the limits is passed.
    """

    layer: str
    channels: int
    mean_shift: float
    mean_error: float
    log_variance: float
    log_variance_error: float
    log_variance_unseen: float
    variance_ratio: float
    on_pixels: bool
    far: bool

    @property
    def mean_excess(self) -> float:
        """What of ``mean_shift`` the choice of images does not explain; at least 0."""
        return max(0.0, self.mean_shift - ERRORS * self.mean_error)

    @property
    def log_variance_excess(self) -> float:
        """What of ``log_variance`` the choice of images does not explain; at least 0."""
        return max(0.0, self.log_variance - ERRORS * self.log_variance_error - self.log_variance_unseen)

    def __str__(self) -> str:
        return (
            f"{self.layer} (mean off by {self.mean_shift:.2g} standard deviations, "
            f"variance {self.variance_ratio:.2g} times the stored one)"
        )


@dataclass(frozen=True)
class StatisticsReport:
    """The batch-norm layers of a model on real images.

    Attributes:
        images: Number of different images.
        layers: The layers that could be measured, in the order in which they run.
        warnings: What is wrong, at most one sentence of each kind; empty for a healthy model.
        summary: One sentence for a person.
    """

    images: int
    layers: tuple[LayerStatistics, ...]
    warnings: tuple[str, ...]
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null."""
        layers = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in map(asdict, self.layers)
        ]
        return {
            "images": self.images,
            "layers": layers,
            "warnings": list(self.warnings),
            "summary": self.summary,
        }


def batch_norm_check(graph: nn.Module, images: np.ndarray, batch_size: int = 16) -> StatisticsReport:
    """Compare the running statistics of every batch-norm layer with fresh ones on real images.

    The model is measured with all modules in evaluation mode and left as it was: modes, weights and statistics.

    Args:
        graph: An :class:`byol_deploy.graph.EncoderGraph`, which holds the online branch alone; any other module that
            takes such a batch will do. On the CPU.
        images: (N, H, W, 3) uint8, preprocessed; for another module whatever it takes, images first.
        batch_size: Images per pass; it changes the memory needed and not the result.

    Returns:
        The report. It warns about layers in training mode, without running statistics, with those that they were
        created with, with NaN or infinite inputs, and with statistics far from the fresh ones. A model without batch
        norm has no warning; with fewer than 8 different images it says that it cannot tell.
    """
    layers = {name: module for name, module in graph.named_modules() if isinstance(module, _BatchNorm)}
    different = len({image.tobytes() for image in images})
    if not layers:
        return StatisticsReport(different, (), (), "the model has no batch norm")
    stored = {name: layer for name, layer in layers.items() if layer.running_mean is not None}
    measured: list[LayerStatistics] = []
    if stored and different >= FEWEST_IMAGES:
        found, first = _collect(graph, stored, images, batch_size)
        measured = [_measure(name, stored[name], moments, name == first) for name, moments in found.items()]
    warnings = _structural(layers)
    if stored and different < FEWEST_IMAGES:
        warnings.append(
            f"whether the batch-norm statistics fit the model cannot be said from {different} different image(s); "
            f"pass {FEWEST_IMAGES} or more"
        )
    warnings += _numerical(measured, different)
    return StatisticsReport(different, tuple(measured), tuple(warnings), _summary(measured, len(layers), different))


class _Moments:
    """What one layer takes: per image and channel the mean and the mean square, about the running mean."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        self.centre = layer.running_mean.detach().clone()
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []

    def take(self, x: Tensor, images: int) -> None:
        """x: (R, C, ...), where R is a multiple of ``images`` if the layer sees several rows of each image."""
        x = x.detach() - self.centre.view(1, -1, *[1] * (x.ndim - 2))
        groups = images if x.shape[0] % images == 0 else x.shape[0]
        x = x.reshape(groups, x.shape[0] // groups, x.shape[1], -1)
        self.means.append(x.mean(dim=(1, 3), dtype=torch.float64))
        self.squares.append(x.double().square().mean(dim=(1, 3)))


def _collect(
    graph: nn.Module, layers: dict[str, _BatchNorm], images: np.ndarray, batch_size: int
) -> tuple[dict[str, _Moments], str | None]:
    """One pass over the images.

    Returns:
        The layers that it reached, in the order of their first call; and the first one, if at most one module with
        weights ran before it.
    """
    found: dict[str, _Moments] = {}
    weighted: set[int] = set()
    on_pixels: str | None = None
    size = 0

    def note(module: nn.Module, _: Any) -> None:
        weighted.add(id(module))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal on_pixels
            assert isinstance(layer, _BatchNorm)
            if not found and len(weighted - {id(layer)}) <= 1:
                on_pixels = name
            found.setdefault(name, _Moments(layer)).take(args[0] if args else kwargs["input"], size)

        return before

    handles = [
        module.register_forward_pre_hook(note)
        for module in graph.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    handles += [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with _evaluating(graph), torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(np.array(images[start : start + batch_size]))
                size = len(batch)
                graph(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found, on_pixels


@contextmanager
def _evaluating(graph: nn.Module) -> Iterator[None]:
    # The flags alone: a module may override train(), and one in training mode would update its statistics.
    modes = [(module, module.training) for module in graph.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _measure(name: str, layer: _BatchNorm, moments: _Moments, on_pixels: bool) -> LayerStatistics:
    assert layer.running_var is not None
    running = layer.running_var.detach().double().numpy() + layer.eps
    means, squares = torch.cat(moments.means).numpy(), torch.cat(moments.squares).numpy()
    # Pixels of one image depend on each other; images do not. So the errors come from the spread between images.
    n = len(means)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = means.mean(axis=0)
        spread = squares - 2 * means * shift + shift**2  # of each image about the common mean
        variance = spread.mean(axis=0) + layer.eps
        columns = {
            "mean_shift": np.abs(shift) / np.sqrt(running),
            "mean_error": means.std(axis=0, ddof=1) / math.sqrt(n) / np.sqrt(running),
            "log_variance": np.abs(np.log(variance / running)),
            "log_variance_error": spread.std(axis=0, ddof=1) / math.sqrt(n) / variance,
            "variance_ratio": variance / running,
        }
        numbers = {key: float(np.median(column)) for key, column in columns.items()}
    seen = 1.0 - UNSEEN_SHARE * UNSEEN_VARIANCE / n
    exempt = on_pixels or not numbers["variance_ratio"] < 1
    unseen = 0.0 if exempt else -math.log(seen) if seen > 0 else math.inf
    row = LayerStatistics(name, len(running), **numbers, log_variance_unseen=unseen, on_pixels=on_pixels, far=False)
    limit = PIXEL_LOG_VARIANCE_LIMIT if on_pixels else LOG_VARIANCE_LIMIT
    return replace(row, far=row.mean_excess > MEAN_SHIFT_LIMIT or row.log_variance_excess > limit)


def _structural(layers: dict[str, _BatchNorm]) -> list[str]:
    """What can be said without an image."""
    kinds = [
        (
            [name for name, layer in layers.items() if layer.training],
            "in training mode",
            "each image's output then depends on the other images of its batch; call eval() on the model",
        ),
        (
            [name for name, layer in layers.items() if layer.running_mean is None],
            "without running statistics",
            "each image's output depends on the other images of its batch; train with track_running_stats=True",
        ),
        (
            [name for name, layer in layers.items() if _initial(layer)],
            "with the running statistics of a new layer (mean 0, variance 1)",
            "they were never updated, or lost from the checkpoint; train in training mode, or load them",
        ),
    ]
    return [f"{len(names)} of {len(layers)} batch-norm layers {what}: {_list(names)}; {then}"
            for names, what, then in kinds if names]  # fmt: skip


def _initial(layer: _BatchNorm) -> bool:
    mean, variance = layer.running_mean, layer.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())


def _numerical(rows: Sequence[LayerStatistics], images: int) -> list[str]:
    warnings = []
    broken = [row.layer for row in rows if not _finite(row)]
    if broken:
        warnings.append(
            f"{len(broken)} of {len(rows)} batch-norm layers have NaN or infinite statistics or inputs: "
            f"{_list(broken)}; the training diverged: take an earlier checkpoint"
        )
    far = sorted((row for row in rows if row.far and _finite(row)), key=_badness, reverse=True)
    if far:
        if rows[0].on_pixels and rows[0].far:
            then = (
                "this begins at the pixels, so check mean, std and size of the preprocessing, and that these images "
                "are of the kind that the model was trained on"
            )
        elif rows[0].on_pixels:
            then = (
                "next to the pixels they agree, so they are not of these weights (another branch's, or too few "
                "training steps): take statistics and weights of the same branch and step, or train longer"
            )
        else:
            then = (
                "check mean, std and size of the preprocessing, that these images are of the kind that the model was "
                "trained on, and that statistics and weights are of the same branch and step"
            )
        warnings.append(
            f"the running statistics of {len(far)} of {len(rows)} batch-norm layers are far from fresh ones on "
            f"{images} images, most of all {_list([str(row) for row in far])}; {then}"
        )
    return warnings


def _finite(row: LayerStatistics) -> bool:
    return math.isfinite(row.mean_shift) and math.isfinite(row.log_variance)


def _badness(row: LayerStatistics) -> float:
    return max(row.mean_excess / MEAN_SHIFT_LIMIT, row.log_variance_excess / LOG_VARIANCE_LIMIT)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _summary(rows: Sequence[LayerStatistics], layers: int, images: int) -> str:
    if not rows:
        return f"the statistics of {layers} batch-norm layer(s) could not be compared"
    worst = max(rows, key=_badness)
    return f"{len(rows)} of {layers} batch-norm layers compared on {images} images; farthest: {worst}"
