"""TensorRT: what is prepared on any machine, and the order of calls on a GPU, which a stand-in takes the place of."""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import shlex
import shutil
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_encoders import FAMILIES, SIZE, build, images

from byol_deploy import formats
from byol_deploy.errors import BundleError, ExportError, MissingExtraError, ProviderError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.parity import compare, derive_limits
from byol_deploy.providers import create_session
from byol_deploy.quantization import Calibration

FORMAT: Any = formats.get("tensorrt")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here; see tests/gpu")


def signature(graph: EncoderGraph) -> Signature:
    return Signature(SIZE, graph.outputs)


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    graph = build(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.tensorrt.json"
    FORMAT.export(graph, signature(graph), path, {"a": "text"})
    return graph, path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    graph = build("resnet")
    path = tmp_path_factory.mktemp("one") / "model.tensorrt.json"
    FORMAT.export(graph, signature(graph), path, {})
    return graph, path


# --- prepared anywhere -------------------------------------------------------------------------------------------


def test_the_prepared_graph_computes_within_its_rounding_noise(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    pixels = images(7)
    session = create_session(path.with_name("model.tensorrt.onnx"))
    actual = dict(zip(graph.outputs, session.run(list(graph.outputs), {"images": pixels}), strict=True))
    expected = graph.run(pixels)
    report = compare(expected, actual, limits=derive_limits(expected, graph.doubled().run(pixels)), subject="x")
    assert report.passed, report.table()
    assert FORMAT.carried(path)["byol_deploy.checked"].startswith("not run by TensorRT")


def test_uint8_goes_straight_into_one_cast(written: tuple[EncoderGraph, Path]) -> None:
    _, path = written
    graph = onnx.load(path.with_name("model.tensorrt.onnx")).graph
    (taker,) = (node for node in graph.node if "images" in node.input)
    assert (taker.op_type, taker.attribute[0].i) == ("Cast", TensorProto.FLOAT)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path.with_name("model.tensorrt.onnx")), strict_mode=True)
    assert not [
        value.name
        for value in inferred.graph.value_info
        if value.type.tensor_type.elem_type in (TensorProto.UINT8, TensorProto.INT8)
    ]


def test_the_command_says_what_the_description_says(resnet: tuple[EncoderGraph, Path]) -> None:
    graph, path = resnet
    found = json.loads(path.read_text())
    assert (found["precision"], found["outputs"]) == ("fp32", list(graph.outputs))
    command, *words = shlex.split(found["trtexec"])
    assert command == "trtexec"
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    assert given["onnx"] == found["onnx"] == "model.tensorrt.onnx"
    for which, shape in zip(("min", "opt", "max"), found["profile"], strict=True):
        assert given[f"{which}Shapes"] == f"images:{'x'.join(map(str, shape))}"
    assert {"noTF32", "stronglyTyped"} <= set(given)
    assert not {"fp16", "int8", "best"} & set(given), "TensorRT 11 has no such flags; precision is in the ONNX file"


def test_equal_graphs_give_equal_bytes(resnet: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = resnet
    FORMAT.export(graph, signature(graph), tmp_path / path.name, {})
    for item in path.parent.iterdir():
        assert (tmp_path / item.name).read_bytes() == item.read_bytes(), item.name


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precision_is_in_the_graph(precision: str, resnet: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = resnet
    reducer = FORMAT.reducer(graph, signature(graph), path, precision, Calibration(images(16), "x86-vnni"))
    reduced = tmp_path / f"model.{precision}.tensorrt.json"
    reducer.write(reduced, {"a": "text"}, reducer.methods[0], ())
    assert FORMAT.carried(reduced)["a"] == "text"
    assert json.loads(reduced.read_text())["precision"] == precision
    model = onnx.load(tmp_path / f"model.{precision}.tensorrt.onnx")
    kinds = [node.op_type for node in model.graph.node]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if precision == "fp16":
        assert sum(tensor.data_type == TensorProto.FLOAT16 for tensor in stored.values()) > 20
    else:
        assert kinds.count("QuantizeLinear") > 10
        # Only int8, nothing shifted: what TensorRT takes. A stored int32 is a bias that it refuses.
        assert not [
            name for name, tensor in stored.items() if tensor.data_type in (TensorProto.INT32, TensorProto.UINT8)
        ]
        zeros = {node.input[2] for node in model.graph.node if node.op_type.endswith("quantizeLinear") or
                 node.op_type == "QuantizeLinear"}  # fmt: skip
        assert zeros
        assert not any(numpy_helper.to_array(stored[name]).any() for name in zeros)
    session = create_session(tmp_path / f"model.{precision}.tensorrt.onnx")
    for name, values in graph.run(images(4, seed=1)).items():
        (actual,) = session.run([name], {"images": images(4, seed=1)})
        assert 0 < np.linalg.norm(actual - values) < 0.25 * np.linalg.norm(values), name


def test_an_unknown_precision_is_refused(resnet: tuple[EncoderGraph, Path]) -> None:
    graph, path = resnet
    with pytest.raises(ExportError, match="there is no bf16 in this format; it has fp32, fp16, int8"):
        FORMAT.reducer(graph, signature(graph), path, "bf16", Calibration(images(2), "x86"))


def test_a_graph_that_computes_with_integers_is_refused_by_name(tmp_path: Path) -> None:
    class Integers(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return ((images * 2).float().mean((1, 2)),)

    with pytest.raises(ExportError, match=r"\(Mul\) computes with uint8 images; make them float first"):
        FORMAT.export(Integers().eval(), Signature(SIZE, ("embedding",)), tmp_path / "x.tensorrt.json", {})


def test_shifted_integers_are_refused(tmp_path: Path) -> None:
    from byol_deploy.formats._tensorrt_graph import prepare

    def number(name: str, value: Any) -> Any:
        return numpy_helper.from_array(np.asarray(value), name)

    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "here/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["embedding"], "there/DequantizeLinear"),
    ]
    ports = [helper.make_tensor_value_info(name, kind, [1, 2]) for name, kind in
             (("images", TensorProto.UINT8), ("embedding", TensorProto.FLOAT))]  # fmt: skip
    stored = [number("scale", np.float32(0.1)), number("zero", np.int8(3))]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], stored))
    onnx.save(model, tmp_path / "source.onnx")
    with pytest.raises(ExportError, match="here/QuantizeLinear is not of int8 with a zero point of 0"):
        prepare(tmp_path / "source.onnx", tmp_path / "target.onnx")


def test_a_wrong_preparation_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byol_deploy.formats import _tensorrt_graph

    def spoil(graph: Any) -> None:
        weight = next(tensor for tensor in graph.initializer if tensor.name.endswith("conv1.0.weight"))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))

    monkeypatch.setattr(_tensorrt_graph, "_plain_biases", spoil)
    graph = build("resnet")
    with pytest.raises(ExportError, match=r"prepared for TensorRT is not the graph: embedding is .* of its length off"):
        FORMAT.export(graph, signature(graph), tmp_path / "model.tensorrt.json", {})


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byol_deploy.formats import _tensorrt_graph

    monkeypatch.setattr(_tensorrt_graph, "_EXTERNAL_ABOVE_BYTES", 100_000)
    graph, path = build("resnet"), tmp_path / "model.tensorrt.json"
    further = FORMAT.export(graph, signature(graph), path, {})
    assert [item.name for item in further] == [
        "model.tensorrt.onnx", "model.tensorrt.onnx.data", "model.tensorrt.json.byol.json"]  # fmt: skip
    stored = FORMAT.tensors(path)
    assert all(np.array_equal(stored[name], values) for name, values in graph.tensors().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("profile"),
        lambda found: found.update(schema=2),
        lambda found: found.update(profile=[[1, 2, 2, 3]]),
        lambda found: found.update(profile="abc"),
        lambda found: found["profile"][0].__setitem__(0, 64),
        lambda found: found["profile"][1].__setitem__(1, 7),
        lambda found: found["profile"][2].__setitem__(0, True),
    ],
)
def test_a_description_from_a_stranger_is_refused(
    change: Any, resnet: tuple[EncoderGraph, Path], tmp_path: Path
) -> None:
    _, path = resnet
    for item in path.parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    found = json.loads(path.read_text())
    change(found)
    (tmp_path / path.name).write_text(json.dumps(found))
    with pytest.raises(BundleError, match="not a TensorRT build description, or is damaged"):
        FORMAT.load(tmp_path / path.name, RunOptions())


@without_gpu
def test_without_a_gpu_it_is_not_run_and_says_so(resnet: tuple[EncoderGraph, Path]) -> None:
    _, path = resnet
    assert "NVIDIA GPUs alone, and PyTorch finds none; built here, not run here" in FORMAT.runs_here()
    assert not FORMAT.opens_in_encoder
    with pytest.raises(ProviderError, match=r"built here, not run here; verify it on a machine with an NVIDIA GPU"):
        FORMAT.load(path, RunOptions())
    with pytest.raises(ProviderError, match="TensorRT runs on cuda, not on 'openvino'"):
        FORMAT.load(path, RunOptions("openvino"))


@without_gpu
def test_with_a_gpu_and_without_the_package_its_extra_is_named(
    resnet: tuple[EncoderGraph, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = resnet
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("byol_deploy.formats.tensorrt.find_spec", lambda name: name == "torch" or None)
    assert FORMAT.runs_here() == "the package tensorrt is not installed; built here, not run here"
    with pytest.raises(MissingExtraError, match=r"byol-deploy\[tensorrt\]"):
        FORMAT.load(path, RunOptions())


# --- the order of calls on a GPU ---------------------------------------------------------------------------------


class Stage:
    """Stands for TensorRT and the GPU, which are absent here: the calls of ``tensorrt`` 10 and 11 that are used.

    A plan is the ONNX file and its profile; a context computes it with ONNX Runtime, from the addresses that it was
    given and only within its profile.
    """

    def __init__(self) -> None:
        self.built = 0
        self.cleared: list[str] = []
        self.batches: list[int] = []
        self.contexts: set[int] = set()
        self.refuses = ""

    def module(self) -> ModuleType:
        stage = self

        class Builder:
            def __init__(self, log: Any) -> None:
                self.log = log

            def create_network(self, flags: int) -> Any:
                assert flags == 1 << 1, "strongly typed"
                return SimpleNamespace()

            def create_builder_config(self) -> Any:
                return SimpleNamespace(clear_flag=stage.cleared.append, profiles=[],
                                       add_optimization_profile=lambda profile: profiles.append(profile))  # fmt: skip

            def create_optimization_profile(self) -> Any:
                return Profile()

            def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
                if stage.refuses == "build":
                    self.log.log("error", "no implementation obeys\nthe requested constraints")
                    return None
                stage.built += 1
                (profile,) = profiles
                return json.dumps({"onnx": network.path, "profile": profile.shapes}).encode()

        profiles: list[Any] = []

        class Profile:
            def set_shape(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
                assert name == "images"
                assert all(isinstance(shape, tuple) for shape in (smallest, usual, largest))
                self.shapes = [smallest, usual, largest]

        class Parser:
            num_errors = 1

            def __init__(self, network: Any, log: Any) -> None:
                self.network = network

            def parse_from_file(self, path: str) -> bool:
                self.network.path = path
                return stage.refuses != "parse"

            def get_error(self, place: int) -> Any:
                return SimpleNamespace(desc=lambda: "no importer for the operator SVD of node backbone/SVD")

        class Runtime:
            def __init__(self, log: Any) -> None:
                pass

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                return None if stage.refuses == "open" else Plan(**json.loads(plan))

        class Plan:
            def __init__(self, onnx: str, profile: list[list[int]]) -> None:
                self.session, self.profile = create_session(onnx), profile
                self.names = ["images", *(output.name for output in self.session.get_outputs())]
                self.num_io_tensors = len(self.names)
                self.get_tensor_name = self.names.__getitem__

            def get_tensor_mode(self, name: str) -> str:
                return "in" if name == "images" else "out"

            def create_execution_context(self) -> Any:
                context = Context(self)
                stage.contexts.add(id(context))
                return context

        class Context:
            def __init__(self, plan: Plan) -> None:
                self.plan, self.addresses = plan, {}
                self.shape: tuple[int, ...] = ()

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self.shape = shape
                low, _, high = self.plan.profile
                return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                (width,) = (port.shape[1] for port in self.plan.session.get_outputs() if port.name == name)
                return (self.shape[0], width)

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.addresses[name] = address
                return True

            def execute_async_v3(self, stream: int) -> bool:
                assert stream == 7, "the stream of the caller"
                assert set(self.addresses) == set(self.plan.names)
                stage.batches.append(self.shape[0])
                count = int(np.prod(self.shape))
                taken = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(self.addresses["images"]))
                values = self.plan.session.run(self.plan.names[1:], {"images": taken.reshape(self.shape)})
                for name, value in zip(self.plan.names[1:], values, strict=True):
                    ctypes.memmove(self.addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
                self.addresses = {}
                return stage.refuses != "run"

        class Log:
            Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal")
            ERROR = "error"

            def __init__(self, *given: Any) -> None:
                pass

        made: Any = ModuleType("tensorrt")
        made.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        made.__version__ = "11.0"
        made.Builder, made.OnnxParser, made.Runtime, made.Logger, made.ILogger = Builder, Parser, Runtime, Log, Log
        made.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        made.BuilderFlag = SimpleNamespace(TF32="tf32")
        made.TensorIOMode = SimpleNamespace(INPUT="in")
        return made


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage()
    monkeypatch.setitem(sys.modules, "tensorrt", found.module())
    monkeypatch.setattr(FORMAT, "_plans", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr("byol_deploy.formats.tensorrt._device", lambda: torch.device("cpu"))
    return found


@without_gpu
def test_batches_of_any_size_within_the_profile(stage: Stage, resnet: tuple[EncoderGraph, Path]) -> None:
    graph, path = resnet
    opened = FORMAT.load(path, RunOptions())
    assert stage.cleared == ["tf32"]
    assert opened.inputs[0].shape == (None, SIZE, SIZE, 3)
    assert [port.name for port in opened.outputs] == list(graph.outputs)
    for count in (1, 3, 70):
        pixels = images(count)[:, ::-1]
        expected = graph.run(pixels.copy())
        for name, values in opened(pixels).items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert stage.batches == [1, 3, 32, 32, 6]
    assert list(opened.compute(images(2), ["projection"])) == ["projection"]


@without_gpu
def test_a_tensor_on_the_device_is_taken_where_it_lies(stage: Stage, resnet: tuple[EncoderGraph, Path]) -> None:
    graph, path = resnet
    engine = FORMAT.load(path, RunOptions()).session
    found = engine(torch.from_numpy(images(3)))
    assert all(isinstance(values, torch.Tensor) for values in found.values())
    np.testing.assert_allclose(found["embedding"].numpy(), graph.run(images(3))["embedding"], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="did not accept a batch of 40"):
        engine(torch.from_numpy(images(40)))


@without_gpu
def test_a_plan_is_built_once_and_each_thread_has_a_context(stage: Stage, resnet: tuple[EncoderGraph, Path]) -> None:
    _, path = resnet
    first, second = FORMAT.load(path, RunOptions()), FORMAT.load(path, RunOptions(threads=1))
    assert stage.built == 1
    workers = [threading.Thread(target=first, args=(images(2),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    first(images(1))
    second(images(1))
    assert stage.batches.count(2) == 3
    assert len(stage.contexts) >= 2


@without_gpu
@pytest.mark.parametrize(
    ("refuses", "kind", "said"),
    [
        ("parse", ExportError, "cannot take this graph: no importer for the operator SVD of node backbone/SVD"),
        ("build", ExportError, "cannot take this graph: no implementation obeys the requested constraints"),
        ("open", ProviderError, "does not open the plan that it built"),
    ],
)
def test_what_tensorrt_refuses_is_told(
    refuses: str, kind: type[Exception], said: str, stage: Stage, resnet: tuple[EncoderGraph, Path]
) -> None:
    _, path = resnet
    stage.refuses = refuses
    with pytest.raises(kind, match=said):
        FORMAT.load(path, RunOptions())


@without_gpu
def test_a_run_that_fails_is_no_result(stage: Stage, resnet: tuple[EncoderGraph, Path]) -> None:
    _, path = resnet
    opened = FORMAT.load(path, RunOptions())
    stage.refuses = "run"
    with pytest.raises(RuntimeError, match="did not accept the run"):
        opened(images(1))
