"""Files of reduced precision by the engines' own quantisers, on a small encoder and real arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy import formats
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.preprocess import Preprocessing
from byol_deploy.quantization import Calibration
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL

SIZE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (24, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def graph() -> EncoderGraph:
    torch.manual_seed(0)
    model = BYOL(build_backbone("timm/test_resnet"), projection_hidden=32, projection_size=16)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIZE, SIZE))
    return EncoderGraph(model, Preprocessing(SIZE), ("embedding",))


@pytest.fixture(scope="module")
def full(graph: EncoderGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "model.onnx"
    formats.get("onnx").export(graph, Signature(SIZE, graph.outputs), path, {})
    return path


@pytest.fixture(scope="module")
def full_openvino(graph: EncoderGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    path = tmp_path_factory.mktemp("full") / "model.openvino.xml"
    formats.get("openvino").export(graph, Signature(SIZE, graph.outputs), path, {})
    return path


def reducer(graph: EncoderGraph, format: str, full: Path, precision: str, target: str = "x86-vnni") -> Any:
    signature = Signature(SIZE, graph.outputs)
    return formats.get(format).reducer(graph, signature, full, precision, Calibration(IMAGES[:16], target))


def embedding(format: str, path: Path) -> np.ndarray:
    return formats.get(format).load(path, RunOptions())(IMAGES)["embedding"]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_onnx_int8_is_near_and_carries_texts(method: str, graph: EncoderGraph, full: Path, tmp_path: Path) -> None:
    made = reducer(graph, "onnx", full, "int8")
    assert method in made.methods
    path = tmp_path / "model.int8.onnx"
    made.write(path, {"text": "ünïcode"}, method, ())
    assert formats.get("onnx").carried(path) == {"text": "ünïcode"}
    assert 1e-4 < error(embedding("onnx", path), graph.run(IMAGES)["embedding"]) < 0.3
    assert path.stat().st_size < 0.5 * full.stat().st_size


@pytest.mark.parametrize(
    ("target", "activations", "most"), [("x86-vnni", "UINT8", 127), ("x86", "UINT8", 64), ("arm64", "INT8", 127)]
)
def test_onnx_signs_and_bits_follow_the_target(
    target: str, activations: str, most: int, graph: EncoderGraph, full: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "model.onnx"
    reducer(graph, "onnx", full, "int8", target).write(path, {}, "minmax", ())
    model = onnx.load(path)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {tensors[name].dtype.name.upper() for name in points} == {activations}
    weights = [tensor for tensor in tensors.values() if tensor.dtype == np.int8 and tensor.ndim == 4]
    assert len(weights) > 5
    assert max(int(np.abs(tensor.astype(int)).max()) for tensor in weights) <= most
    per_channel = [node for node in model.graph.node if node.op_type == "DequantizeLinear"
                   and tensors[node.input[1]].ndim == 1 and tensors[node.input[1]].size > 1]  # fmt: skip
    assert len(per_channel) >= len(weights)


@pytest.mark.parametrize(("format", "precision"), [("onnx", "int8"), ("onnx", "fp16"), ("openvino", "int8")])
def test_a_layer_put_back_is_computed_as_before(
    format: str, precision: str, graph: EncoderGraph, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue("full" if format == "onnx" else "full_openvino")
    # Without VNNI named, OpenVINO computes what is not int8 in float32, not in bfloat16.
    made = reducer(graph, format, source, precision, "x86")
    path = tmp_path / f"model{formats.get(format).suffix}"
    assert any("conv1" in name for name in made.layers), made.layers
    expected = graph.run(IMAGES)["embedding"]
    errors = []
    for kept in ((), made.layers[: len(made.layers) // 2], made.layers):
        made.write(path, {}, made.methods[0], kept)
        errors.append(error(embedding(format, path), expected))
    assert errors[0] > errors[1] > errors[2]
    if precision == "int8":
        assert errors[2] < 1e-5 if format == "onnx" else errors[2] < 0.05 * errors[0]


def test_openvino_bfloat16_is_a_note_that_the_runtime_follows(
    graph: EncoderGraph, full_openvino: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.openvino.xml"
    made = reducer(graph, "openvino", full_openvino, "bf16")
    assert made.layers == ()
    made.write(path, {}, "", ())
    assert error(embedding("openvino", full_openvino), graph.run(IMAGES)["embedding"]) < 1e-5
    assert error(embedding("openvino", path), graph.run(IMAGES)["embedding"]) < 0.05
    session = formats.get("openvino").load(path, RunOptions()).session
    assert session.get_property("INFERENCE_PRECISION_HINT").to_string() in ("bf16", "f32")


class Overflowing(torch.nn.Module):
    """Values of a million between two convolutions, which float16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        values = self.first(images.permute(0, 3, 1, 2).float() / 255).relu() * 1e6
        return (self.second(values * 1e-6).mean((2, 3)),)


def test_float16_keeps_what_overflows(tmp_path: Path) -> None:
    module = Overflowing().eval()
    signature = Signature(SIZE, ("embedding",))
    format, full, path = formats.get("onnx"), tmp_path / "full.onnx", tmp_path / "half.onnx"
    format.export(module, signature, full, {})
    made = format.reducer(module, signature, full, "fp16", Calibration(IMAGES[:16], "x86"))
    made.write(path, {}, "", ())
    with torch.no_grad():
        expected = module(torch.from_numpy(IMAGES))[0].numpy()
    found = embedding("onnx", path)
    assert np.isfinite(found).all()
    assert error(found, expected) < 0.01
    stored = {str(tensor.dtype) for tensor in format.tensors(path).values()}
    assert "float16" in stored, "the rest is float16"


def test_a_format_without_the_precision_says_so(graph: EncoderGraph, full: Path) -> None:
    from byol_deploy.errors import ExportError

    with pytest.raises(ExportError, match="there is no int8"):
        reducer(graph, "torchscript", full, "int8")
