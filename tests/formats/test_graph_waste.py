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
# What the architecture itself has: every convolution once, one Transpose and one Cast for the uint8 NHWC input.
KNOWN = {
    "resnet18": {"Conv": 20, "BatchNormalization": 20, "Relu": 17, "MaxPool": 1, "Transpose": 1, "Cast": 1},
    "timm/mobilenetv3_small_050": {"Conv": 53, "BatchNormalization": 34, "HardSwish": 19, "Transpose": 1, "Cast": 1},
    "timm/convnext_atto": {"Conv": 40, "LayerNormalization": 17, "Cast": 1},
}


@pytest.mark.parametrize("name", KNOWN)
def test_operators_are_those_of_the_architecture(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BYOL(build_backbone(name), projection_hidden=16, projection_size=8).eval()
    graph = EncoderGraph(model, Preprocessing(SIZE), ("embedding",))
    path = tmp_path / "model.onnx"
    formats.get("onnx").export(graph, Signature(SIZE, graph.outputs), path, {})
    written = onnx.load(path).graph
    counts = Counter(node.op_type for node in written.node)
    assert {kind: counts[kind] for kind in KNOWN[name]} == KNOWN[name]
    assert not {"Identity", "Dropout", "CastLike"} & set(counts)
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
