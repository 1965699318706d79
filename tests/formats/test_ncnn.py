"""ncnn: families, bfloat16, odd sizes, the files as ncnn alone reads them, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import encoder, golden_without_pytorch, images, mixed_up

from byol_deploy import export, formats
from byol_deploy.errors import BundleError, DataError, ExportError, ProviderError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.images import find_images
from byol_deploy.parity import MOST_MARGIN, compare, derive_limits, separation_margin
from byol_deploy.quantization import Calibration
from byol_deploy.selftest import self_test
from byol_deploy.training.checkpoints import load_checkpoint

ncnn = pytest.importorskip("ncnn")
pytest.importorskip("pnnx")
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("timm/test_resnet", 28, {}),
    # 29 by 29 values are no multiple of 16 bytes, at which ncnn begins each plane.
    "odd": ("timm/test_resnet", 29, {}),
    "vit": ("timm/vit_tiny_patch16_224", 28, {"img_size": 28, "patch_size": 7, "depth": 2}),
    "mobile": ("timm/test_efficientnet", 28, {}),
    "convnext": ("timm/test_convnext", 32, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    name, size, arguments = FAMILIES[request.param]
    graph = encoder(name, arguments, size)
    path = tmp_path_factory.mktemp(request.param) / "model.ncnn.param"
    further = formats.get("ncnn").export(graph, Signature(size, graph.outputs), path, {"a": "text"})
    assert [item.name for item in further] == ["model.ncnn.bin", "model.ncnn.param.byol.json"]
    assert {item.name for item in path.parent.iterdir()} == {path.name, *(item.name for item in further)}
    return graph, path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, fashion: Path) -> tuple[EncoderGraph, Path, Any]:
    """A trained encoder, its float32 file, and real images."""
    loaded = load_checkpoint(tiny_run)
    assert loaded.preprocessing is not None
    graph = EncoderGraph(loaded.model, loaded.preprocessing)
    path = tmp_path_factory.mktemp("trained") / "model.ncnn.param"
    formats.get("ncnn").export(graph, Signature(graph.size_px, graph.outputs), path, {})
    return graph, path, loaded.preprocessing.batch(find_images(fashion)[:64])


def test_every_family_keeps_to_its_rounding_noise(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    pixels = images(5, graph.size_px)
    expected = graph.run(pixels)
    opened = formats.get("ncnn").load(path, RunOptions(threads=2))
    report = compare(expected, opened(pixels), limits=derive_limits(expected, graph.doubled().run(pixels)), subject="x")
    assert report.passed, report.table()
    assert opened.inputs[0].shape == (None, graph.size_px, graph.size_px, 3)
    chosen = opened.compute(pixels, ("projection",))
    assert list(chosen) == ["projection"]
    assert np.array_equal(chosen["projection"], opened(pixels)["projection"])


def test_equal_graphs_give_equal_bytes(written: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = written
    formats.get("ncnn").export(graph, Signature(graph.size_px, graph.outputs), tmp_path / path.name, {"a": "text"})
    for item in path.parent.iterdir():
        assert (tmp_path / item.name).read_bytes() == item.read_bytes(), item.name


def test_ncnn_alone_reads_the_files_as_the_docstring_says(resnet: tuple[EncoderGraph, Path, np.ndarray]) -> None:
    graph, path, pixels = resnet
    net = ncnn.Net()
    assert net.load_param(str(path)) == net.load_model(str(path.with_suffix(".bin"))) == 0
    side = graph.size_px
    taken = ncnn.Mat.from_pixels(np.ascontiguousarray(pixels[0]), ncnn.Mat.PixelType.PIXEL_RGB, side, side)
    run = net.create_extractor()
    run.input("images", taken)
    status, value = run.extract("embedding")
    expected = graph.run(pixels[:1])["embedding"][0]
    assert status == 0
    assert np.allclose(np.array(value), expected, rtol=1e-2, atol=1e-2)  # by itself it may compute in float16


def test_threads_at_once_get_their_own_results(resnet: tuple[EncoderGraph, Path, np.ndarray]) -> None:
    opened = formats.get("ncnn").load(resnet[1], RunOptions(threads=1))
    assert mixed_up(lambda pixels: opened(pixels)["embedding"], resnet[0].size_px) == []


def test_bfloat16_is_another_arithmetic_and_still_the_encoder(
    resnet: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path
) -> None:
    graph, full, pixels = resnet
    signature = Signature(graph.size_px, graph.outputs)
    found = formats.get("ncnn").reducer(graph, signature, full, "bf16", Calibration(pixels[:8], "x86-vnni"))
    assert found.layers == ()
    path = tmp_path / "model.ncnn.param"
    further = found.write(path, {"a": "text"}, *found.methods, ())
    assert [item.name for item in further] == ["model.ncnn.bin", "model.ncnn.param.byol.json"]
    assert formats.get("ncnn").carried(path) == {"a": "text"}
    assert formats.get("ncnn").content_hash(path) != formats.get("ncnn").content_hash(full)
    expected = graph.run(pixels)["embedding"]
    margins = {}
    for name, file in {"fp32": full, "bf16": path}.items():
        margin = separation_margin(formats.get("ncnn").load(file, RunOptions())(pixels)["embedding"], expected)
        assert margin is not None
        margins[name] = margin
    assert margins["fp32"] < 1e-4 < margins["bf16"] < MOST_MARGIN


def test_an_exported_file_runs_without_pytorch(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, formats=("ncnn",), out=tmp_path / "bundle", data=fashion)
    (artefact,) = bundle.manifest.artefacts
    assert artefact.parity["passed"]
    assert self_test(bundle.path, threads=1).passed
    for place in (bundle.path, bundle.path / "model.ncnn.param"):
        assert golden_without_pytorch(place) == "True True"


def test_a_layer_that_is_lacking_is_named(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
            return (pixels.float().mean((1, 2)).cumprod(1),)

    path = tmp_path / "model.ncnn.param"
    with pytest.raises(ExportError, match=r"ncnn has no layer for .*cumprod"):
        formats.get("ncnn").export(Odd().eval(), Signature(16, ("embedding",)), path, {})
    assert list(tmp_path.iterdir()) == []


def test_the_same_value_under_two_names(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.convolution = torch.nn.Conv2d(3, 4, 3)

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value = self.convolution(pixels.permute(0, 3, 1, 2).float() / 255).mean((2, 3))
            return value, value

    path, module = tmp_path / "model.ncnn.param", Twice().eval()
    formats.get("ncnn").export(module, Signature(16, ("one", "two")), path, {})
    pixels = images(2, 16)
    found = formats.get("ncnn").load(path, RunOptions())(pixels)
    assert sorted(found) == ["one", "two"]
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels))[0].numpy()
    assert all(np.allclose(values, expected, rtol=1e-4, atol=1e-6) for values in found.values())


def test_other_providers_and_images_are_refused(resnet: tuple[EncoderGraph, Path, np.ndarray]) -> None:
    opened = formats.get("ncnn").load(resnet[1], RunOptions("auto"))
    assert opened.provider == "CPU"
    with pytest.raises(DataError, match=r"takes \(N, 32, 32, 3\) uint8"):
        opened(images(1, 40))
    with pytest.raises(ProviderError, match="on the CPU here, not on 'cuda'"):
        formats.get("ncnn").load(resnet[1], RunOptions("cuda"))


@pytest.mark.parametrize(
    ("file", "size"),
    [("model.ncnn.param", 5), ("model.ncnn.param", 700), ("model.ncnn.bin", 0), ("model.ncnn.bin", 999)],
)
def test_a_cut_file_is_refused_quietly(
    file: str,
    size: int,
    resnet: tuple[EncoderGraph, Path, np.ndarray],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for item in resnet[1].parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:size])
    with pytest.raises(BundleError, match=r"damaged.*export it again"):
        formats.get("ncnn").load(tmp_path / "model.ncnn.param", RunOptions())
    assert capfd.readouterr() == ("", "")


def test_a_file_of_another_program_is_refused(resnet: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path) -> None:
    for item in resnet[1].parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    path = tmp_path / "model.ncnn.param"
    path.write_text(path.read_text().replace("Input images", "Input in0"))
    with pytest.raises(BundleError, match="not an ncnn file of byol-deploy"):
        formats.get("ncnn").load(path, RunOptions())
