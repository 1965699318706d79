"""A graph without waste: the operators of known backbones are counted, as written and as ONNX Runtime runs them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from byol_deploy import formats
from byol_deploy.formats import Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL

SIZE = 64
# What the architecture itself has, and nothing else: one Transpose and one Cast for the uint8 NHWC input, one Mul and
# one Add for mean and deviation. Stored weights of linear layers are transposed, which an engine does once, on loading.
KNOWN: dict[str, tuple[dict[str, object], dict[str, int]]] = {
    "resnet18": (
        {},
        {"Conv": 20, "BatchNormalization": 20, "Relu": 17, "Add": 8 + 1, "Mul": 1, "MaxPool": 1, "ReduceMean": 1,
         "Reshape": 1, "Transpose": 1, "Cast": 1},
    ),
    "timm/mobilenetv3_small_050": (
        {},
        {"Conv": 53, "BatchNormalization": 34, "HardSwish": 19, "HardSigmoid": 9, "Relu": 14, "Add": 7 + 1,
         "Mul": 9 + 1, "ReduceMean": 10, "Reshape": 1, "Transpose": 1, "Cast": 1},
    ),
    "timm/efficientnet_lite0": (
        {},
        {"Conv": 49, "BatchNormalization": 49, "Clip": 33, "Add": 9 + 1, "Mul": 1, "ReduceMean": 1, "Reshape": 1,
         "Transpose": 1, "Cast": 1},
    ),
    # Twelve blocks: GELU is Div, Erf, Add, Mul, Mul; a layer's scale is one Mul, and its stored vector a Reshape.
    "timm/convnext_atto": (
        {},
        {"Conv": 40, "LayerNormalization": 17, "Erf": 12, "Div": 12, "Mul": 12 * 3 + 1, "Add": 12 * 2 + 1,
         "Reshape": 12 + 1, "Transpose": 35, "ReduceMean": 1, "Cast": 1},
    ),
    # In each of twelve blocks: four linear layers (a transposed weight each), queries, keys and values picked out, one
    # scale; the class token is repeated for each image.
    "timm/vit_tiny_patch16_224": (
        {"img_size": SIZE},
        {"Conv": 1, "LayerNormalization": 25, "MatMul": 12 * 6, "Softmax": 12, "Erf": 12, "Div": 12,
         "Mul": 12 * 3 + 1, "Add": 12 * 7 + 2, "Gather": 12 * 3 + 1, "Transpose": 12 * 7 + 2, "Reshape": 12 * 2 + 2,
         "Concat": 2, "Expand": 1, "Shape": 1, "Squeeze": 1, "Cast": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_operators_are_those_of_the_architecture(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments, expected = KNOWN[name]
    model = BYOL(build_backbone(name, **arguments), projection_hidden=16, projection_size=8).eval()
    graph = EncoderGraph(model, Preprocessing(SIZE), ("embedding",))
    path = tmp_path / "model.onnx"
    formats.get("onnx").export(graph, Signature(SIZE, graph.outputs), path, {})
    written = onnx.load(path).graph
    counts = Counter(node.op_type for node in written.node)
    assert dict(counts) == expected
    used = {name for node in written.node for name in node.input} | {output.name for output in written.output}
    assert all(set(node.output) & used for node in written.node), "nothing is computed in vain"
    heads = ("projection_head", "prediction_head")
    assert not [node.name for node in written.node if node.name.startswith(heads)], "heads that are no output"
    assert {tensor.name for tensor in written.initializer} <= used

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert run["BatchNormalization"] == 0, "folded into the convolutions"
    assert run["Cast"] == counts["Cast"]
    assert run["Conv"] + run["FusedConv"] == counts["Conv"]
