"""Faults in the module that is handed to the exporter: the exporter then does its work faithfully."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byol_deploy.bundle import Golden, Output, read_carried
from byol_deploy.graph import EncoderGraph
from faults.making import Case, Made
from faults.subject import Subject, carried_with

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Rewired(EncoderGraph):
    """A graph whose outputs are made of the images and the true ones by ``rewire``. Parameters keep their names."""

    def __init__(
        self, graph: EncoderGraph, rewire: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(graph.__dict__)
        self.rewire = rewire

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (N, H, W, 3) uint8."""
        y, z, q = super().forward(images)
        return self.rewire(images, y, z, q)


def compute(module: nn.Module, outputs: tuple[str, ...]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A module as a function of arrays."""

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            values = module(torch.from_numpy(np.require(images, requirements=["C", "W"])))
        return {name: value.float().numpy() for name, value in zip(outputs, values, strict=True)}

    return run


def _exported(subject: Subject, folder: Path, module: nn.Module, carried: Mapping[str, str] | None = None) -> Made:
    path = subject.write(module, folder / "model.onnx", carried)
    return Made(path, compute(module, subject.graph.outputs))


def _own_story(subject: Subject, module: nn.Module, parameter_hash: str | None = None) -> dict[str, str]:
    """What a file carries when the fault lies before everything: contract and golden cases agree with the fault."""
    manifest, golden = read_carried(subject.carried, "the clean file")
    values = compute(module, subject.graph.outputs)(golden.images)
    model = manifest.model if parameter_hash is None else replace(manifest.model, parameter_hash=parameter_hash)
    outputs = tuple(Output(name, value.shape[1]) for name, value in values.items())
    return carried_with(
        subject.carried,
        model=replace(model, width=outputs[0].width),
        outputs=outputs,
        golden=Golden(golden.images, values),
    )


def _remade(subject: Subject, change: Callable[[Any], None]) -> EncoderGraph:
    """The graph of a copy of the checkpoint's model, changed before."""
    model = copy.deepcopy(subject.loaded.model)
    change(model)
    assert subject.loaded.preprocessing is not None
    return EncoderGraph(model, subject.loaded.preprocessing)


def momentum(subject: Subject, folder: Path) -> Made:
    """The momentum branch in the place of the online one; everything else is as it should be."""

    def exchange(model: Any) -> None:
        model.backbone.load_state_dict(model.backbone_momentum.state_dict())
        model.projection_head.load_state_dict(model.projection_head_momentum.state_dict())

    graph = _remade(subject, exchange)
    return _exported(subject, folder, graph, _own_story(subject, graph, graph.parameter_hash()))


def momentum_statistics(subject: Subject, folder: Path) -> Made:
    """Online weights with the momentum branch's batch-norm statistics."""

    def exchange(model: Any) -> None:
        for online, other in (
            (model.backbone, model.backbone_momentum),
            (model.projection_head, model.projection_head_momentum),
        ):
            state = other.state_dict()
            statistics = {key: value for key, value in state.items() if "running_" in key}
            online.load_state_dict(statistics, strict=False)

    return _exported(subject, folder, _remade(subject, exchange))


def projection_as_embedding(subject: Subject, folder: Path) -> Made:
    """Embedding and projection under each other's names."""
    module = Rewired(subject.broken(), lambda images, y, z, q: (z, y, q))
    return _exported(subject, folder, module, _own_story(subject, module))


def heads_exchanged(subject: Subject, folder: Path) -> Made:
    """Projection and prediction under each other's names."""
    module = Rewired(subject.broken(), lambda images, y, z, q: (y, q, z))
    return _exported(subject, folder, module, _own_story(subject, module))


def batch_statistics(subject: Subject, folder: Path) -> Made:
    """Batch norm in training mode: each image's embedding depends on its neighbours in the batch."""
    graph = subject.broken()
    for layer in graph.modules():
        if isinstance(layer, BATCH_NORMS):
            # Without running statistics PyTorch normalises by the batch's own, which is what training mode computes.
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None  # type: ignore[assignment]
            layer.track_running_stats = False
    return _exported(subject, folder, graph)


def head_batch_statistics(subject: Subject, folder: Path) -> Made:
    """The same in the projection head alone: the embedding is right."""
    graph = subject.broken()
    assert graph.projection_head is not None
    for layer in graph.projection_head.modules():
        if isinstance(layer, BATCH_NORMS):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None  # type: ignore[assignment]
            layer.track_running_stats = False
    return _exported(subject, folder, graph)


def batch_norm_epsilon(subject: Subject, folder: Path) -> Made:
    """1e-3 (TensorFlow's) for 1e-5 (PyTorch's) in every batch norm."""
    graph = subject.broken()
    for layer in graph.modules():
        if isinstance(layer, BATCH_NORMS):
            layer.eps = 1e-3
    return _exported(subject, folder, graph)


def layer_norm_epsilon(subject: Subject, folder: Path) -> Made | None:
    """1e-5 (PyTorch's default) for 1e-6 (the transformer's) in every layer norm."""
    graph = subject.broken()
    found = [layer for layer in graph.modules() if isinstance(layer, nn.LayerNorm)]
    for layer in found:
        layer.eps = 1e-5
    return _exported(subject, folder, graph) if found else None


def other_statistics(subject: Subject, folder: Path) -> Made:
    """Another recipe's mean and deviation in the graph; the contract names the trained ones."""
    graph = subject.broken()
    mean, std = subject.other_statistics
    graph.preprocessing.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    graph.preprocessing.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    return _exported(subject, folder, graph)


class _Scale256(nn.Module):
    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() / 256 - self.mean) / self.std


def scale_256(subject: Subject, folder: Path) -> Made:
    """Pixels divided by 256 instead of 255."""
    graph = subject.broken()
    graph.preprocessing = _Scale256(graph.preprocessing.mean, graph.preprocessing.std)  # type: ignore[assignment]
    return _exported(subject, folder, graph)


class _Bgr(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.flip(3))


def bgr(subject: Subject, folder: Path) -> Made:
    """Blue where red is expected."""
    graph = subject.broken()
    graph.preprocessing = _Bgr(graph.preprocessing)  # type: ignore[assignment]
    return _exported(subject, folder, graph)


def swapped_layers(subject: Subject, folder: Path) -> Made:
    """The weights of two layers of the same shape exchanged."""
    graph = subject.broken()
    shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in graph.backbone.parameters():
        if parameter.ndim >= 2:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
    pair = max((group for group in shapes.values() if len(group) > 1), key=lambda group: group[0].numel(), default=None)
    if pair is None:  # too small a backbone: two rows of one layer
        weight = max(graph.backbone.parameters(), key=lambda parameter: parameter.numel())
        pair = [weight.data[0], weight.data[1]]
    with torch.no_grad():
        first = pair[0].detach().clone()
        pair[0].copy_(pair[1])
        pair[1].copy_(first)
    return _exported(subject, folder, graph)


class _Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3), keepdim=True)


def other_pooling(subject: Subject, folder: Path) -> Made | None:
    """The maximum over space instead of the mean; in a transformer the mean of patches instead of the class token."""
    graph = subject.broken()
    backbone: Any = graph.backbone
    if getattr(backbone, "global_pool", None) == "token":
        backbone.global_pool = "avg"
        return _exported(subject, folder, graph)
    found = False
    for layer in backbone.modules():
        if type(layer).__name__ == "SelectAdaptivePool2d":
            layer.pool, found = _Largest(), True
    return _exported(subject, folder, graph) if found else None


def normalised_embedding(subject: Subject, folder: Path) -> Made:
    """The embedding divided by its length: no cosine changes."""
    return _exported(subject, folder, Rewired(subject.broken(), lambda images, y, z, q: (F.normalize(y, dim=1), z, q)))


def nan_in_the_dark(subject: Subject, folder: Path) -> Made:
    """A division by the brightest pixel less 3: NaN for images that are dark all over, exact for all others."""

    def rewire(images: Tensor, y: Tensor, z: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        brightest = (images.float().amax((1, 2, 3)) - 3).clamp(min=0)[:, None]
        return y * (brightest / brightest), z, q

    return _exported(subject, folder, Rewired(subject.broken(), rewire))


def constant(subject: Subject, folder: Path) -> Made:
    """The mean embedding for every image."""
    mean = torch.from_numpy(subject.graph.run(subject.training_images, 32)["embedding"].mean(0, keepdims=True))
    module = Rewired(subject.broken(), lambda images, y, z, q: (0 * y + mean, z, q))
    return _exported(subject, folder, module)


def another_checkpoint(subject: Subject, folder: Path) -> Made:
    """An earlier checkpoint of the same training, exported without a fault."""
    from byol_deploy.training.checkpoints import load_checkpoint

    assert subject.loaded.preprocessing is not None
    graph = EncoderGraph(load_checkpoint(subject.earlier).model, subject.loaded.preprocessing)
    return _exported(subject, folder, graph, _own_story(subject, graph, graph.parameter_hash()))


CASES = (
    Case("momentum branch", "export", "the momentum branch exported; contract and golden cases are its own", momentum),
    Case("momentum statistics", "export", "online weights, batch-norm statistics of the momentum branch",
         momentum_statistics),
    Case("projector as embedding", "export", "embedding and projection under each other's names, golden cases alike",
         projection_as_embedding),
    Case("heads exchanged", "export", "projection and prediction under each other's names, golden cases alike",
         heads_exchanged),
    Case("batch norm in training mode", "export", "every batch norm uses the batch's statistics", batch_statistics),
    Case("head in training mode", "export", "the projection head's batch norm uses the batch's statistics",
         head_batch_statistics),
    Case("batch-norm epsilon", "export", "1e-3 for 1e-5", batch_norm_epsilon),
    Case("layer-norm epsilon", "export", "1e-5 for 1e-6 (transformer only)", layer_norm_epsilon),
    Case("mean and deviation", "export", "another recipe's in the graph, the trained ones in the contract",
         other_statistics),
    Case("scale", "export", "pixels divided by 256, not 255", scale_256),
    Case("BGR in the graph", "export", "colour channels in the wrong order; the test images are grey", bgr),
    Case("swapped layers", "export", "the weights of two layers of one shape exchanged", swapped_layers),
    Case("other pooling", "export", "maximum for mean; in the transformer patches for the class token", other_pooling),
    Case("normalised embedding", "export", "the embedding divided by its length", normalised_embedding),
    Case("NaN in the dark", "export", "NaN for images that are dark all over, exact for all others", nan_in_the_dark),
    Case("constant output", "export", "the mean embedding for every image", constant),
    Case("earlier checkpoint", "export", "an earlier checkpoint, exported without a fault", another_checkpoint),
)  # fmt: skip
