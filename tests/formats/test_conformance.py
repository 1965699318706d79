"""What every format must hold. A new file in byol_deploy/formats/ is picked up here by itself."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byol_deploy import formats
from byol_deploy.errors import BundleError, ExportError, MissingExtraError, UsageError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.parity import compare, derive_limits
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL

SIZE = 32
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=f"{missing} is not installed"))
    for name in formats.available()
    for missing in [
        next((item for item in formats.get(name).requires if not importlib.util.find_spec(item)), "")
        # This one compiles: without a compiler there is nothing to try.
        or ("a C++ compiler" if name == "aotinductor" and not (shutil.which("g++") or shutil.which("clang++")) else "")
    ]
]
TEXTS = {"byol_deploy.test": "a text with ünïcode\nand lines", "other": "x" * 70_000}


@pytest.fixture(scope="module")
def graph() -> EncoderGraph:
    torch.manual_seed(0)
    model = BYOL(build_backbone("timm/test_resnet"), projection_hidden=32, projection_size=16)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIZE, SIZE))
    return EncoderGraph(model, Preprocessing(SIZE))


@pytest.fixture(scope="module", params=INSTALLED)
def written(request: pytest.FixtureRequest, graph: EncoderGraph, tmp_path_factory: Any) -> tuple[Any, Path]:
    format = formats.get(request.param)
    path = tmp_path_factory.mktemp(format.name) / f"model{format.suffix}"
    format.export(graph, Signature(SIZE, graph.outputs), path, TEXTS)
    return format, path


def images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def named(values: dict[str, np.ndarray], graph: EncoderGraph) -> dict[str, np.ndarray]:
    """Formats without names of their own take them from the manifest, which this test does not carry."""
    return dict(zip(graph.outputs, values.values(), strict=True))


def test_the_object_is_complete() -> None:
    assert set(formats.available()) >= {"onnx", "torchscript"}
    for name in ("onnx", "torchscript"):
        formats.require(formats.get(name))  # these two are never skipped
    suffixes = []
    for name in formats.available():
        format = formats.get(name)
        assert format.name == name
        assert format.suffix.startswith(".")
        assert set(format.runs_with) <= set(format.requires)
        assert format.precisions[0] == "fp32"
        suffixes.append(format.suffix)
        assert formats.of_file(f"some/model{format.suffix}") is format
    assert len(set(suffixes)) == len(suffixes)
    assert formats.of_file("model.bin") is None


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_parity_at_every_batch_size(written: tuple[Any, Path], graph: EncoderGraph, batch: int) -> None:
    format, path = written
    if format.runs_here():
        pytest.skip(format.runs_here())
    pixels = images(batch)
    expected = graph.run(pixels)
    actual = named(format.load(path, RunOptions())(pixels), graph)
    limits = derive_limits(expected, graph.doubled().run(pixels))
    report = compare(expected, actual, limits=limits, subject=path.name)
    assert report.passed, report.table()
    assert all(values.dtype == np.float32 for values in actual.values())


class PaddedPool(torch.nn.Module):
    """Negative values, padded with zeros, then pooled: an optimiser that merges the two pads with minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.pool = torch.nn.Sequential(torch.nn.ConstantPad2d(1, 0.0), torch.nn.MaxPool2d(3, 2))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        values = self.convolution(images.permute(0, 3, 1, 2).float() / 255) - 5
        return (self.pool(values).amax((2, 3)),)


@pytest.mark.parametrize("name", INSTALLED)
def test_zeros_around_a_pool_of_negative_values_stay_zeros(name: str, tmp_path: Path) -> None:
    format = formats.get(name)
    if format.runs_here():
        pytest.skip(format.runs_here())
    path = tmp_path / f"model{format.suffix}"
    format.export(PaddedPool().eval(), Signature(SIZE, ("embedding",)), path, {})
    for level in (None, *format.optimizations):
        (values,) = format.load(path, RunOptions(optimization=level))(images(3)).values()
        np.testing.assert_array_equal(values, np.zeros((3, 8), np.float32))


def test_read_only_and_strided_images_are_taken(written: tuple[Any, Path], graph: EncoderGraph) -> None:
    format, path = written
    if format.runs_here():
        pytest.skip(format.runs_here())
    pixels = images(4)[::2, :, ::-1]
    pixels.flags.writeable = False
    actual = named(format.load(path, RunOptions(threads=1))(pixels), graph)
    assert np.allclose(actual["embedding"], graph.run(pixels.copy())["embedding"], rtol=1e-4, atol=1e-5)


def test_the_trained_tensors_are_in_the_file_bit_for_bit(written: tuple[Any, Path], graph: EncoderGraph) -> None:
    format, path = written
    stored = format.tensors(path)
    if not format.keeps_tensors:
        pytest.skip("the runtime has a layout of its own for the weights")
    for name, tensor in graph.tensors().items():
        assert stored[name].dtype == tensor.dtype, name
        assert np.array_equal(stored[name], tensor), name
    assert not any("momentum" in name for name in stored)


def test_the_file_carries_texts(written: tuple[Any, Path]) -> None:
    format, path = written
    carried = format.carried(path)
    assert {key: carried[key] for key in TEXTS} == TEXTS


def test_no_folder_of_the_builder_is_in_the_file(written: tuple[Any, Path]) -> None:
    _, path = written
    contents = [item.read_bytes() for item in path.parent.iterdir() if item.is_file()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(entry) for entry in archive.namelist()]
    here = {str(Path(torch.__file__).parent.parent), str(Path(formats.__file__).parent), str(Path.cwd()), "/home/"}
    for content in contents:
        assert not [place for place in here if place.encode() in content]


@pytest.mark.parametrize("name", INSTALLED)
def test_the_graph_and_torchs_settings_stay_as_they_were(name: str, graph: EncoderGraph, tmp_path: Path) -> None:
    before = {name: tensor.copy() for name, tensor in graph.tensors().items()}
    settings = (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled())
    format = formats.get(name)
    format.export(graph, Signature(SIZE, graph.outputs), tmp_path / f"model{format.suffix}", {})
    assert (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled()) == settings
    assert not any(module.training for module in graph.modules())
    assert all(np.array_equal(before[name], tensor) for name, tensor in graph.tensors().items())


@pytest.mark.parametrize("name", INSTALLED)
def test_a_graph_that_cannot_be_expressed_is_an_export_error(name: str, tmp_path: Path) -> None:
    class Impossible(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            raise RuntimeError("this backbone cannot be traced\nsecond line")

    format = formats.get(name)
    with pytest.raises(ExportError, match="cannot be traced") as caught:
        format.export(Impossible().eval(), Signature(SIZE, ("embedding",)), tmp_path / f"x{format.suffix}", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nothing of that kind", b"PK\x03\x04 and then nothing"])
@pytest.mark.parametrize("name", INSTALLED)
def test_a_damaged_file_is_a_bundle_error(name: str, content: bytes, tmp_path: Path) -> None:
    format = formats.get(name)
    path = tmp_path / f"model{format.suffix}"
    path.write_bytes(content)
    with pytest.raises(BundleError):
        format.load(path, RunOptions())
    with pytest.raises(BundleError):
        format.carried(path)


@pytest.mark.parametrize("name", INSTALLED)
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    format = formats.get(name)
    formats.require(format)
    assert formats.missing_to_run(format) == ""
    absent = format.requires[0]
    there = importlib.util.find_spec
    for module in ("byol_deploy.errors", "byol_deploy.formats"):
        monkeypatch.setattr(
            f"{module}.find_spec", lambda package: None if package in (absent, *format.runs_with) else there(package)
        )
    with pytest.raises(MissingExtraError, match=f"byol-deploy\\[{format.extra}\\]"):
        formats.require(format)
    assert formats.missing_to_run(format) == format.runs_with[0]


def test_an_unknown_format_is_named_with_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"did you mean onnx\?.*onnx, openvino"):
        formats.get("onxx")


def test_a_written_file_runs_in_a_process_without_our_code(written: tuple[Any, Path], graph: EncoderGraph) -> None:
    format, path = written
    if format.name != "torchscript":
        pytest.skip("ONNX Runtime never sees Python code")
    code = (
        "import sys, warnings; warnings.simplefilter('ignore');"
        "sys.modules['byol_deploy'] = sys.modules['timm'] = None;"
        "import torch; model = torch.jit.load(sys.argv[1]);"
        "print(model(torch.full((2, 32, 32, 3), 7, dtype=torch.uint8))[0][0, :3].tolist())"
    )
    got = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    expected = graph.run(np.full((2, SIZE, SIZE, 3), 7, np.uint8))["embedding"][0, :3]
    assert np.allclose(ast.literal_eval(got), expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def onnx_file(graph: EncoderGraph, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("netron") / "model.onnx"
    formats.get("onnx").export(graph, Signature(SIZE, graph.outputs), path, {})
    return path


class TestOnnx:
    """What a person sees in Netron, and the two-file form."""

    @pytest.fixture
    def model(self, onnx_file: Path) -> Any:
        import onnx

        return onnx.load(onnx_file)

    def test_equal_graphs_give_equal_bytes(self, onnx_file: Path, graph: EncoderGraph, tmp_path: Path) -> None:
        formats.get("onnx").export(graph, Signature(SIZE, graph.outputs), tmp_path / "model.onnx", {})
        assert (tmp_path / "model.onnx").read_bytes() == onnx_file.read_bytes()

    def test_nodes_are_named_after_modules(self, model: Any) -> None:
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert {"preprocessing/Cast", "backbone/layer1/0/conv1/Conv", "backbone/layer1/0/bn1/BatchNormalization",
                "projection_head/2/0/Gemm"} <= set(names)  # fmt: skip
        assert all(node.name.split("/")[0] in {"preprocessing", "backbone", "feature_map", "projection_head",
                                               "prediction_head"} for node in model.graph.node)  # fmt: skip

    def test_input_and_outputs(self, model: Any, graph: EncoderGraph) -> None:
        import onnx

        def dims(value: Any) -> list[Any]:
            return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

        (image,) = model.graph.input
        assert (image.name, dims(image)) == ("images", ["batch", SIZE, SIZE, 3])
        assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        assert [output.name for output in model.graph.output] == list(graph.outputs)
        assert [dims(output) for output in model.graph.output] == [["batch", 96], ["batch", 16], ["batch", 16]]

    def test_only_short_source_lines_are_left_of_the_exporters_notes(self, model: Any) -> None:
        for node in model.graph.node:
            assert [entry.key for entry in node.metadata_props] in ([], ["byol_deploy.source"])
            assert all(":" in entry.value and not entry.value.startswith("/") for entry in node.metadata_props)
        assert not model.metadata_props
        assert not model.graph.metadata_props

    def test_a_newer_opset(self, graph: EncoderGraph, tmp_path: Path) -> None:
        import onnx

        opset = 23
        path = tmp_path / "model.onnx"
        format = formats.get("onnx")
        format.export(graph, Signature(SIZE, graph.outputs, opset), path, {})
        assert {entry.domain: entry.version for entry in onnx.load(path).opset_import} == {"": opset}
        got = format.load(path, RunOptions())(images(2))
        assert np.allclose(got["embedding"], graph.run(images(2))["embedding"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("opset", [9, 17, 99])
    def test_an_opset_out_of_range_is_named(self, graph: EncoderGraph, tmp_path: Path, opset: int) -> None:
        with pytest.raises(UsageError, match=f"opset is {opset}; use 18 to"):
            formats.get("onnx").export(graph, Signature(SIZE, graph.outputs, opset), tmp_path / "x", {})

    def test_two_files_above_the_threshold(
        self, graph: EncoderGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from byol_deploy.formats import onnx as module

        size = sum(tensor.nbytes for tensor in graph.tensors().values())
        monkeypatch.setattr(module, "EXTERNAL_ABOVE_BYTES", size // 2)
        path = tmp_path / "model.onnx"
        format = formats.get("onnx")
        further = format.export(graph, Signature(SIZE, graph.outputs), path, TEXTS)
        assert [item.name for item in further] == ["model.onnx.data"]
        assert path.stat().st_size < size / 2 < further[0].stat().st_size
        got = format.load(path, RunOptions())(images(3))
        assert np.allclose(got["embedding"], graph.run(images(3))["embedding"], rtol=1e-4, atol=1e-5)
        stored = format.tensors(path)
        assert all(np.array_equal(stored[name], tensor) for name, tensor in graph.tensors().items())
        assert format.carried(path)["other"] == TEXTS["other"]
