"""Faults put into real files on purpose: the layer that is named must be the one that was damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from damaged import (
    BACKBONES,
    FORMATS,
    Damage,
    edit,
    epsilon,
    explain,
    initializer,
    mean,
    mobile_epsilon,
    one_weight,
    position,
    scale,
    squeeze,
    vit_weight,
    write,
)

from byol_deploy import formats
from byol_deploy.errors import BundleError, OutputError, UsageError
from byol_deploy.graph import EncoderGraph
from byol_deploy.pipeline.explain.drift import Explanation, budget_of, relative_l2
from byol_deploy.pipeline.explain.recording import record
from byol_deploy.pipeline.explain.view import write_drift_plot
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.byol import BYOL


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", BACKBONES)
def test_a_right_file_is_within_its_budgets_everywhere(family: str, format: str, encoders: Any, files: Any) -> None:
    explanation = explain(files[family, format], encoders[family])
    assert explanation.passed, explanation.text()
    assert explanation.first is None
    assert explanation.culprit is None
    assert explanation.adds_up
    modules = {layer.path for layer in explanation.layers if layer.kind == "module"}
    weighted = {name.rpartition(".")[0] for name, _ in encoders[family][0].named_parameters()}
    found = {layer.path for layer in explanation.layers}
    # A parameter of the whole backbone (a class token) belongs to an operation.
    assert weighted <= found, weighted - found
    assert len(modules) > 20
    assert not [path for path, _ in explanation.unmatched if path in weighted]
    assert all(0 <= layer.drift < layer.budget and layer.own is not None for layer in explanation.layers)
    assert explanation.layers[0].path == "preprocessing"
    assert explanation.layers[-1].path == "prediction_head.3"


DAMAGES: list[tuple[str, Damage, str, str]] = [
    ("resnet", one_weight, "backbone.layer2.0.conv1", "timm/models/resnet.py:"),
    ("resnet", epsilon, "backbone.layer3.0.bn2", "timm/models/resnet.py:"),
    ("resnet", mean, "preprocessing", "byol_deploy/graph.py:"),
    ("vit", vit_weight, "backbone.blocks.1.mlp.fc1", "timm/layers/mlp.py:"),
    ("vit", position, "backbone", "timm/models/vision_transformer.py:"),
    ("mobile", mobile_epsilon, "backbone.blocks.3.0.bn2", "timm/"),
    ("mobile", squeeze, "backbone.blocks.4.0.se.conv_reduce", "timm/models/_efficientnet_blocks.py:"),
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("family", "damage", "path", "source"), DAMAGES, ids=[case[1].__name__ for case in DAMAGES])
def test_the_damaged_layer_is_named(
    family: str, damage: Damage, path: str, source: str, format: str, encoders: Any, tmp_path: Path
) -> None:
    damaged = copy.deepcopy(encoders[family][0])
    damage(damaged)
    file = write(damaged, format, tmp_path / f"model{formats.get(format).suffix}")
    explanation = explain(file, encoders[family])
    assert not explanation.passed
    assert explanation.first is explanation.culprit
    assert explanation.culprit is not None
    assert explanation.culprit.path == path, explanation.text()
    assert [layer.path for layer in explanation.culprits] == [path]
    known = format == "onnx" or explanation.culprit.kind == "module"  # TorchScript files carry no lines
    assert explanation.culprit.source.startswith(source) if known else not explanation.culprit.source
    assert explanation.largest_step is explanation.culprit
    assert path in explanation.verdict()
    before = explanation.layers[: explanation.layers.index(explanation.culprit)]
    assert not any(layer.past for layer in before)


def test_two_swapped_layers_are_both_named(encoders: Any, tmp_path: Path) -> None:
    damaged = copy.deepcopy(encoders["resnet"][0])
    block = damaged.backbone.layer1[0]
    block.conv1.weight, block.conv2.weight = block.conv2.weight, block.conv1.weight
    explanation = explain(write(damaged, "onnx", tmp_path / "model.onnx"), encoders["resnet"])
    assert [layer.path for layer in explanation.culprits] == ["backbone.layer1.0.conv1", "backbone.layer1.0.conv2"]
    assert explanation.first is explanation.culprits[0]
    assert "At fault by themselves too: backbone.layer1.0.conv2" in explanation.verdict()


def test_a_fault_that_nothing_depends_on_is_no_layer_past_its_budget(encoders: Any, tmp_path: Path) -> None:
    graph = copy.deepcopy(encoders["resnet"][0])
    with torch.no_grad():
        graph.backbone.layer1[0].bn2.weight.zero_()
    damaged = copy.deepcopy(graph)
    with torch.no_grad():
        damaged.backbone.layer1[0].conv1.weight.mul_(1.5)
    explanation = explain(write(damaged, "onnx", tmp_path / "model.onnx"), (graph, encoders["resnet"][1]))
    assert explanation.passed, explanation.text()
    conv = next(layer for layer in explanation.layers if layer.path == "backbone.layer1.0.conv1")
    assert conv.past
    assert conv.recovers


def test_an_operation_between_modules_is_named_with_its_node(encoders: Any, files: Any, tmp_path: Path) -> None:
    def subtract(model: Any) -> None:
        next(node for node in model.graph.node if node.name == "backbone/layer2/0/Add").op_type = "Sub"

    (tmp_path / "model.onnx").write_bytes(files["resnet", "onnx"].read_bytes())
    explanation = explain(edit(tmp_path / "model.onnx", subtract), encoders["resnet"])
    culprit = explanation.culprit
    assert culprit is not None
    assert (culprit.kind, culprit.path, culprit.nodes) == ("operation", "backbone.layer2.0", ("backbone/layer2/0/Add",))
    assert culprit.source.startswith("timm/models/resnet.py:")
    assert explanation.culprits == (culprit,)


def test_an_attention_product_is_named(encoders: Any, files: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(files["vit", "onnx"].read_bytes())
    edited = edit(
        tmp_path / "model.onnx",
        lambda model: scale(initializer(model, "backbone/blocks/1/attn/Mul/constant_1"), 1.1),
    )
    culprit = explain(edited, encoders["vit"]).culprit
    assert culprit is not None
    assert (culprit.kind, culprit.path, culprit.class_name) == ("operation", "backbone.blocks.1.attn", "Attention")
    assert "backbone/blocks/1/attn/Softmax" in culprit.nodes


def test_values_that_are_not_numbers(encoders: Any, files: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(files["resnet", "onnx"].read_bytes())
    name = "backbone.layer1.0.conv1.weight"
    edited = edit(tmp_path / "model.onnx", lambda model: scale(initializer(model, name), float("nan")))
    explanation = explain(edited, encoders["resnet"])
    assert explanation.culprit is not None
    assert explanation.culprit.path == "backbone.layer1.0.conv1"
    assert explanation.culprit.drift == float("inf")
    found = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert found["layers"][found["first"]]["drift"] is None
    assert not found["passed"]
    write_drift_plot(tmp_path / "drift.svg", explanation)


@pytest.fixture(scope="module")
def quantized(encoders: Any, files: Any, fashion: Path, tmp_path_factory: Any) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    preprocessing = Preprocessing(32)
    batches = [preprocessing.batch([path]) for path in sorted(fashion.rglob("*.png"))[::9]]

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    path: Path = tmp_path_factory.mktemp("int8") / "model.onnx"
    quantize_static(
        files["resnet", "onnx"],
        path,
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    return path


class TestInt8:
    """Files of onnxruntime.quantization."""

    def test_a_well_calibrated_file_has_no_layer_at_fault(self, quantized: Path, encoders: Any) -> None:
        explanation = explain(quantized, encoders["resnet"], precision="int8")
        assert explanation.culprits == (), explanation.text(True)
        convolutions = [layer for layer in explanation.layers if layer.class_name == "Conv2d"]
        assert len(convolutions) > 10
        assert all(layer.drift > 1e-3 for layer in convolutions)
        assert explanation.largest_step is not None

    def test_a_badly_calibrated_layer_is_named(self, quantized: Path, encoders: Any) -> None:
        value = "backbone/layer2/0/act1/Relu:0_scale"
        edited = edit(quantized, lambda model: scale(initializer(model, value), 0.2))
        explanation = explain(edited, encoders["resnet"], precision="int8")
        assert explanation.culprit is not None
        assert explanation.culprit.path == "backbone.layer2.0.act1", explanation.text(True)
        assert explanation.largest_step is explanation.culprit


def test_half_precision(encoders: Any, files: Any, tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(files["resnet", "onnx"]), keep_io_types=True)
    onnx.save(model, tmp_path / "model.onnx")
    explanation = explain(tmp_path / "model.onnx", encoders["resnet"], precision="fp16")
    assert explanation.passed, explanation.text(True)
    assert len(explanation.layers) > 40
    assert max(layer.drift for layer in explanation.layers) > 1e-4
    assert not explain(tmp_path / "model.onnx", encoders["resnet"]).passed  # and fp32 it is not


class TestForeign:
    """Files that did not come from this project's exporter, or went through other tools."""

    def test_folded_batch_norm(self, encoders: Any, files: Any, tmp_path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "folded.onnx")
        onnxruntime.InferenceSession(files["resnet", "onnx"], options, providers=["CPUExecutionProvider"])
        explanation = explain(tmp_path / "folded.onnx", encoders["resnet"])
        assert explanation.passed, explanation.text(True)
        assert "backbone.layer2.0.conv1" in dict(explanation.unmatched)
        assert {"backbone.layer2.0.bn1", "prediction_head.3"} <= {layer.path for layer in explanation.layers}

        def damage(model: Any) -> None:
            node = next(node for node in model.graph.node if "layer2/0/bn1" in node.output[0])
            scale(initializer(model, node.input[1]), 1.05)

        culprit = explain(edit(tmp_path / "folded.onnx", damage), encoders["resnet"]).culprit
        assert culprit is not None
        assert culprit.path == "backbone.layer2.0.bn1"

    def test_names_of_weights_are_enough(self, encoders: Any, files: Any, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(files["resnet", "onnx"].read_bytes())
        lost = edit(tmp_path / "model.onnx", lambda model: forget(model, weights=False))
        assert explain(lost, encoders["resnet"]).passed
        lost = edit(lost, lambda model: scale(initializer(model, "backbone.layer3.0.conv2.weight"), 1.01))
        culprit = explain(lost, encoders["resnet"]).culprit
        assert culprit is not None
        assert culprit.path == "backbone.layer3.0.conv2"

    @pytest.mark.parametrize("family", ["resnet", "mobile"])
    def test_order_is_enough(self, family: str, encoders: Any, files: Any, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(files[family, "onnx"].read_bytes())
        lost = edit(tmp_path / "model.onnx", lambda model: forget(model, weights=True))
        explanation = explain(lost, encoders[family])
        assert explanation.passed, explanation.text()
        assert len([layer for layer in explanation.layers if layer.class_name == "Conv2d"]) > 10

    def test_nothing_to_match_is_no_pass(self, encoders: Any, tmp_path: Path) -> None:
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
                helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0),
            ],
            "other",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 32, 32, 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        )
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "model.onnx"
        )
        explanation = explain(tmp_path / "model.onnx", encoders["resnet"])
        assert not explanation.passed
        assert explanation.layers == ()
        assert "nothing to match" in explanation.text()

    def test_external_data(self, encoders: Any, files: Any, tmp_path: Path) -> None:
        onnx.save(onnx.load(files["resnet", "onnx"]), tmp_path / "model.onnx", save_as_external_data=True,
                  location="model.onnx.data", size_threshold=100)  # fmt: skip
        assert explain(tmp_path / "model.onnx", encoders["resnet"]).passed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
        (tmp_path / "model.onnx.data").unlink()
        with pytest.raises(BundleError, match=r"model\.onnx\.data, which is not beside it"):
            explain(tmp_path / "model.onnx", encoders["resnet"])

    def test_a_file_that_is_none(self, encoders: Any, tmp_path: Path) -> None:
        for name in FORMATS:
            path = tmp_path / f"model{formats.get(name).suffix}"
            path.write_bytes(b"not a model")
            with pytest.raises(BundleError, match="export it again"):
                explain(path, encoders["resnet"])


def forget(model: Any, weights: bool) -> None:
    """Rename everything inside to numbers, as some tools do."""
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    if not weights:
        kept |= {tensor.name for tensor in graph.initializer}
    names: dict[str, str] = {}

    def new(name: str) -> str:
        return name if not name or name in kept else names.setdefault(name, f"v{len(names)}")

    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.name = new(tensor.name)
    for number, node in enumerate(graph.node):
        node.name = f"n{number}"
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]


class Twice(torch.nn.Module):
    """One activation that is called twice, in place, and an addition that no module makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.second = torch.nn.Conv2d(6, 6, 3, padding=1)
        self.act = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        y = self.second(x)
        y += x
        return self.act(y).mean((2, 3))


@pytest.mark.parametrize("format", FORMATS)
def test_calls_of_one_module_are_told_apart(format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = EncoderGraph(BYOL(Twice(), projection_hidden=8, projection_size=4), Preprocessing(16), ["embedding"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    explanation = explain(write(graph, format, tmp_path / f"m{formats.get(format).suffix}"), (graph, pixels))
    assert explanation.passed, explanation.text()
    titles = [layer.title for layer in explanation.layers]
    assert titles[:6] == [
        "preprocessing",
        "backbone.first",
        "backbone.act (call 1)",
        "backbone.second",
        f"backbone · {'Add' if format == 'onnx' else 'add_'}",
        "backbone.act (call 2)",
    ]
    # The mean, which no module takes: it is an output.
    assert titles[6:] == [f"the whole model · output{' embedding' if format == 'onnx' else ''}"]


class Clip(torch.nn.Module):
    """Control flow that depends on the values: what tracing cannot follow and scripting keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x.clamp(min=0)
        return x.clamp(min=-1)


def test_a_file_with_control_flow_is_read_module_by_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), Clip(), torch.nn.Conv2d(6, 6, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    graph = EncoderGraph(BYOL(backbone, projection_hidden=8, projection_size=4), Preprocessing(16), ["embedding"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    scripted = copy.deepcopy(graph)
    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted.backbone[1] = torch.jit.script(Clip())
    explanation = explain(write(scripted, "torchscript", tmp_path / "right.torchscript.pt"), (graph, pixels))
    assert explanation.passed, explanation.text()
    assert not explanation.adds_up
    assert "control flow" in explanation.text()
    with torch.no_grad():
        scripted.backbone[2].bias += 0.1
    culprit = explain(write(scripted, "torchscript", tmp_path / "wrong.torchscript.pt"), (graph, pixels)).culprit
    assert culprit is not None
    assert culprit.path == "backbone.2"


def test_recording_leaves_the_model_as_it_was() -> None:
    model = Twice().eval()
    seen = record(model, np.zeros((1, 3, 8, 8), np.float32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    act, again = (call for call in seen.calls if call.path == "act")
    first, second = (next(call for call in seen.calls if call.path == name) for name in ("first", "second"))
    # In place or not, what a convolution gave is kept as it was when it gave it.
    assert act.input == first.outputs[0] != act.outputs[0] == second.input
    assert seen.slots[first.outputs[0]].min() < 0 <= seen.slots[act.outputs[0]].min()
    assert again.input not in (second.outputs[0], act.outputs[0])
    assert [call.path for call in seen.calls] == ["first", "act", "second", "act", ""]


class TestReading:
    """What a person and a program make of an explanation."""

    def test_the_table(self, damaged: tuple[Path, Explanation]) -> None:
        _, explanation = damaged
        lines = explanation.text().splitlines()
        assert "drift first shows at backbone.layer2.0.conv1 (Conv2d), node backbone/layer2/0/conv1/Conv" in lines[0]
        marked = [line for line in lines if line.startswith("→")]
        assert len(marked) == 1
        assert "backbone.layer2.0.conv1 " in marked[0]
        assert "timm/models/resnet.py:" in marked[0]
        assert "..." in explanation.text()
        assert len(explanation.text(True).splitlines()) >= len(explanation.layers) + 2 > len(lines)

    def test_the_dictionary_and_the_series(self, damaged: tuple[Path, Explanation]) -> None:
        _, explanation = damaged
        found = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
        assert found["layers"][found["culprit"]]["path"] == "backbone.layer2.0.conv1"
        assert found["layers"][found["culprit"]]["past"]
        series = explanation.series()
        assert {len(values) for values in series.values()} == {len(explanation.layers)}
        assert set(series) == {"names", "drift", "own", "noise", "budget", "recovers"}

    def test_the_drawing_is_one_file_that_names_the_culprit(
        self, damaged: tuple[Path, Explanation], tmp_path: Path
    ) -> None:
        _, explanation = damaged
        write_drift_plot(tmp_path / "drift.svg", explanation)
        root = ElementTree.fromstring((tmp_path / "drift.svg").read_bytes())
        texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any("backbone.layer2.0.conv1" in text for text in texts)
        content = (tmp_path / "drift.svg").read_text(encoding="utf-8")
        assert "nan" not in content
        assert "href" not in content
        assert "prefers-color-scheme" in content
        with pytest.raises(OutputError):
            write_drift_plot(tmp_path / "drift.svg", explanation)


def test_budgets_and_distances() -> None:
    assert budget_of(1e-6, "fp32") == pytest.approx(1e-5)
    assert budget_of(0.0, "fp32") == pytest.approx(2e-6)
    assert budget_of(1e-6, "int8") == pytest.approx(10 / 128)
    assert budget_of(1e-6, "fp16") == pytest.approx(10 / 2048)
    truth = np.array([3.0, 4.0])
    assert relative_l2(truth + np.array([0.0, 0.5]), truth) == pytest.approx(0.1)
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0
    assert relative_l2(np.ones(2), np.zeros(2)) == 1
    assert relative_l2(np.array([np.nan, 1]), truth) == np.inf


def test_wrong_use(encoders: Any, files: Any) -> None:
    with pytest.raises(UsageError, match="fp32, bf16, fp16, int8"):
        explain(files["resnet", "onnx"], encoders["resnet"], precision="fp8")
    with pytest.raises(UsageError, match="no image"):
        explain(files["resnet", "onnx"], (encoders["resnet"][0], encoders["resnet"][1][:0]))
