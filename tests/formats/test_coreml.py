"""Core ML: what can be known of a file without a Mac, and that nobody takes that for a run."""

from __future__ import annotations

import io
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import SIZE, encoder, images

from byol_deploy import formats
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.parity import compare, derive_limits
from byol_deploy.quantization import Calibration

pytest.importorskip("coremltools")
FORMAT: Any = formats.get("coreml")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("timm/test_resnet", {}),
    "vit": ("timm/vit_tiny_patch16_224", {"img_size": SIZE, "patch_size": 7, "depth": 2}),
    "mobile": ("timm/mobilenetv3_small_050", {}),
    "shuffle": ("torchvision/shufflenet_v2_x0_5", {}),
}
not_on_a_mac = pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")


def build(family: str) -> EncoderGraph:
    return encoder(*FAMILIES[family])


def unpacked(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    (package,) = folder.iterdir()
    return package


def evaluated(package: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    from byol_deploy.formats._coreml_evaluate import evaluate

    rows = [evaluate(package, {"images": image.transpose(2, 0, 1)[None]}) for image in pixels]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    graph = build(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.mlpackage.zip"
    FORMAT.export(graph, Signature(SIZE, graph.outputs), path, {"a": "text"})
    return graph, path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    graph = build("resnet")
    path = tmp_path_factory.mktemp("one") / "model.mlpackage.zip"
    FORMAT.export(graph, Signature(SIZE, graph.outputs), path, {})
    return graph, path


def test_its_operators_compute_the_graph_within_its_rounding_noise(
    written: tuple[EncoderGraph, Path], tmp_path: Path
) -> None:
    graph, path = written
    pixels = images(3)
    expected = graph.run(pixels)
    actual = evaluated(unpacked(path, tmp_path), pixels)
    report = compare(expected, actual, limits=derive_limits(expected, graph.doubled().run(pixels)), subject="x")
    assert report.passed, report.table()
    assert "numbers compared" in FORMAT.carried(path)["byol_deploy.checked"]


def test_what_a_swift_programmer_sees(resnet: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    from coremltools.models.utils import load_spec

    graph, path = resnet
    package = unpacked(path, tmp_path)
    assert package.name == "model.mlpackage"
    spec = load_spec(str(package))
    (image,) = spec.description.input
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == ("images", SIZE, SIZE)
    assert image.type.imageType.colorSpace == image.type.imageType.RGB
    assert [output.name for output in spec.description.output] == list(graph.outputs)
    assert spec.specificationVersion == 6, "iOS 15"
    function = spec.mlProgram.functions["main"]
    kinds = [operation.type for operation in function.block_specializations[function.opset].operations]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in graph.modules())
    assert kinds.count("conv") == convolutions
    assert kinds.count("linear") == sum(isinstance(module, torch.nn.Linear) for module in graph.modules())


def test_equal_graphs_give_equal_bytes(resnet: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = resnet
    again = tmp_path / path.name
    FORMAT.export(graph, Signature(SIZE, graph.outputs), again, {})
    assert again.read_bytes() == path.read_bytes()


@not_on_a_mac
def test_elsewhere_it_is_not_run_and_says_so(resnet: tuple[EncoderGraph, Path]) -> None:
    _, path = resnet
    assert FORMAT.runs_here() == "Core ML predicts only on macOS; built here, not run here"
    assert not FORMAT.opens_in_encoder
    with pytest.raises(ProviderError, match=r"only on macOS; built here, not run here; copy it to a Mac"):
        FORMAT.load(path, RunOptions())


class FakeModel:
    """Stands for Core ML, which is absent here: takes and gives what ``coremltools.models.MLModel`` does on a Mac."""

    opened: Path
    units: str

    def __init__(self, package: str, compute_units: Any) -> None:
        from coremltools.models.utils import load_spec

        FakeModel.opened, FakeModel.units = Path(package), compute_units.name
        self._spec = load_spec(package)

    def get_spec(self) -> Any:
        return self._spec

    def predict(self, pictures: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        pixels = np.stack([np.asarray(picture["images"]) for picture in pictures])
        rows = evaluated(self.opened, pixels)
        return [{name: values[place : place + 1] for name, values in rows.items()} for place in range(len(pixels))]


@not_on_a_mac
def test_on_a_mac_it_is_opened_and_called_one_image_at_a_time(
    resnet: tuple[EncoderGraph, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import coremltools

    graph, path = resnet
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", FakeModel)
    opened = FORMAT.load(path, RunOptions())
    assert FORMAT.runs_here() == ""
    assert FakeModel.units == "CPU_ONLY"
    pixels = images(3)[:, ::-1]
    expected = graph.run(pixels)
    for name, values in opened(pixels).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert list(opened.compute(pixels, ["projection"])) == ["projection"]
    assert opened.inputs[0].shape == (None, SIZE, SIZE, 3)
    assert [port.name for port in opened.outputs] == list(graph.outputs)
    folder = FakeModel.opened.parent
    assert folder.is_dir()
    del opened
    assert not folder.exists(), "what was unpacked goes with the model"
    with pytest.raises(ProviderError, match="not on 'cuda'"):
        FORMAT.load(path, RunOptions("cuda"))


def test_half_precision_halves_the_file(resnet: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = resnet
    reducer = FORMAT.reducer(graph, Signature(SIZE, graph.outputs), path, "fp16", Calibration(images(2), "arm64"))
    half = tmp_path / "model.fp16.mlpackage.zip"
    assert (reducer.methods, reducer.layers) == (("",), ())
    reducer.write(half, {"a": "text"}, "", ())
    assert FORMAT.carried(half)["a"] == "text"
    assert half.stat().st_size < 0.6 * path.stat().st_size
    expected = graph.run(images(2))
    for name, values in evaluated(unpacked(half, tmp_path / "package"), images(2)).items():
        assert 1e-6 < np.linalg.norm(values - expected[name]) / np.linalg.norm(expected[name]) < 1e-2, name
    with pytest.raises(ExportError, match="there is no int8 in this format; it has fp32, fp16"):
        FORMAT.reducer(graph, Signature(SIZE, graph.outputs), path, "int8", Calibration(images(2), "arm64"))


def epsilon(package: Path) -> None:
    edit(package, "batch_norm", "epsilon", 1e-1)


def weights(package: Path) -> None:
    """Some channels of one convolution, as a batch norm that was folded wrongly would leave them."""
    file = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(file.read_bytes())
    middle = np.frombuffer(content, np.float32, 40_000, len(content) // 2 // 4 * 4)
    middle *= 1.2
    file.write_bytes(content)


def names(package: Path) -> None:
    from coremltools.models.utils import load_spec

    file = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = load_spec(str(package))
    spec.description.output[0].name = "other"
    file.write_bytes(spec.SerializeToString())


def edit(package: Path, kind: str, argument: str, value: float) -> None:
    from coremltools.models.utils import load_spec

    file = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = load_spec(str(package))
    function = spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    operation = next(item for item in operations if item.type == kind)
    given = operation.inputs[argument].arguments[0].name
    constant = next(item for item in operations if item.type == "const" and item.outputs[0].name == given)
    constant.attributes["val"].immediateValue.tensor.floats.values[0] = value
    file.write_bytes(spec.SerializeToString())


@pytest.mark.parametrize("damage", [epsilon, weights, names])
def test_a_wrong_conversion_is_not_written(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from byol_deploy.formats import _coreml_convert

    settle = _coreml_convert._settle
    monkeypatch.setattr(_coreml_convert, "_settle", lambda package, side: (settle(package, side), damage(package)))
    graph = build("resnet")
    with pytest.raises(ExportError, match=r"is not the graph: .* of its length off|takes and gives .*'other'"):
        FORMAT.export(graph, Signature(SIZE, graph.outputs), tmp_path / "model.mlpackage.zip", {})
    assert not list(tmp_path.iterdir())


def test_an_operator_that_the_check_does_not_know_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byol_deploy.formats import _coreml_evaluate

    monkeypatch.delitem(_coreml_evaluate._RULES, "max_pool")
    graph, path = build("resnet"), tmp_path / "model.mlpackage.zip"
    FORMAT.export(graph, Signature(SIZE, graph.outputs), path, {})
    assert FORMAT.carried(path)["byol_deploy.checked"].endswith("because of the operator max_pool")


def test_an_operator_that_core_ml_lacks_is_named_with_its_layer(tmp_path: Path) -> None:
    class Fourier(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.linalg.svdvals(images.float().mean(-1)),)

    with pytest.raises(ExportError, match="svd") as caught:
        FORMAT.export(Fourier().eval(), Signature(SIZE, ("embedding",)), tmp_path / "x.mlpackage.zip", {})
    assert "\n" not in str(caught.value)


def archive_of(names: list[str], method: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return packed.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        archive_of(["a.mlpackage/Manifest.json", "b.mlpackage/x"]),
        archive_of(["a.mlpackage/../../x"]),
        archive_of(["/a.mlpackage/x"]),
        archive_of(["other/x"]),
        archive_of(["a.mlpackage/x"], zipfile.ZIP_DEFLATED),
        archive_of([]),
    ],
    ids=["two folders", "out of the folder", "absolute", "no package", "compressed", "empty"],
)
def test_an_archive_from_a_stranger_is_refused(
    content: bytes, resnet: tuple[EncoderGraph, Path], tmp_path: Path
) -> None:
    _, path = resnet
    for item in path.parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    (tmp_path / path.name).write_bytes(content)
    with pytest.raises(BundleError, match=r"not a zip archive of an \.mlpackage"):
        FORMAT.load(tmp_path / path.name, RunOptions())
