"""Small encoders of three families, files of them, and ways to damage either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from byol_deploy import formats
from byol_deploy.formats import Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.pipeline.explain.drift import Explanation, explain_file

BACKBONES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("timm/test_resnet", 32, {}),
    "vit": ("timm/vit_tiny_patch16_224", 28, {"img_size": 28, "patch_size": 7, "depth": 2}),
    "mobile": ("timm/test_efficientnet", 32, {}),
}
FORMATS = ("onnx", "torchscript")
Damage = Callable[[EncoderGraph], None]


def write(graph: EncoderGraph, format: str, path: Path) -> Path:
    formats.get(format).export(graph, Signature(graph.size_px, graph.outputs), path, {})
    return path


def explain(path: Path, encoder: tuple[EncoderGraph, np.ndarray], **options: Any) -> Explanation:
    format = formats.of_file(path)
    assert format is not None
    return explain_file(path, format, *encoder, **options)


def edit(path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(path)
    change(model)
    edited = path.with_name("edited.onnx")
    onnx.save(model, edited)
    return edited


def initializer(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def scale(tensor: Any, factor: float) -> None:
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float32), tensor.name))


def one_weight(graph: EncoderGraph) -> None:
    with torch.no_grad():
        graph.backbone.layer2[0].conv1.weight.view(-1)[7] += 0.05


def epsilon(graph: EncoderGraph) -> None:
    graph.backbone.layer3[0].bn2.eps = 1e-3


def mean(graph: EncoderGraph) -> None:
    graph.preprocessing.mean += 0.01


def vit_weight(graph: EncoderGraph) -> None:
    with torch.no_grad():
        graph.backbone.blocks[1].mlp.fc1.weight[3, 5] += 0.05


def position(graph: EncoderGraph) -> None:
    with torch.no_grad():
        graph.backbone.pos_embed[0, 3, :50] += 0.1  # of all channels alike, the first layer norm would take it out


def mobile_epsilon(graph: EncoderGraph) -> None:
    graph.backbone.blocks[3][0].bn2.eps = 1e-2


def squeeze(graph: EncoderGraph) -> None:
    with torch.no_grad():
        graph.backbone.blocks[4][0].se.conv_reduce.bias += 0.1
