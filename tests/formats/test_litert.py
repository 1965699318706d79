"""LiteRT: families, int8 of both kinds, layers that are kept, threads, and what is refused."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_encoders import SIZE, build, golden_without_pytorch, images, mixed_up

from byol_deploy import export, formats
from byol_deploy.errors import BundleError, DataError, ExportError, ProviderError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.images import find_images
from byol_deploy.parity import compare, derive_limits, separation_margin
from byol_deploy.quantization import Calibration
from byol_deploy.selftest import self_test
from byol_deploy.training.checkpoints import load_checkpoint

pytest.importorskip("ai_edge_litert")


@pytest.fixture(scope="module")
def trained(
    tiny_run: Path, fashion: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EncoderGraph, Path, np.ndarray]:
    """A trained encoder, its float32 file, and real images."""
    loaded = load_checkpoint(tiny_run)
    assert loaded.preprocessing is not None
    graph = EncoderGraph(loaded.model, loaded.preprocessing)
    path = tmp_path_factory.mktemp("trained") / "model.tflite"
    formats.get("litert").export(graph, Signature(graph.size_px, graph.outputs), path, {"a": "text"})
    return graph, path, loaded.preprocessing.batch(find_images(fashion)[:128])


@pytest.mark.parametrize("family", ["vit", "mobile"])
def test_every_family_keeps_to_its_rounding_noise(family: str, tmp_path: Path) -> None:
    graph = build(family)
    path = tmp_path / "model.tflite"
    further = formats.get("litert").export(graph, Signature(SIZE, graph.outputs), path, {})
    assert [item.name for item in further] == ["model.tflite.byol.json"]
    pixels = images(5)
    expected = graph.run(pixels)
    opened = formats.get("litert").load(path, RunOptions(threads=2))
    report = compare(expected, opened(pixels), limits=derive_limits(expected, graph.doubled().run(pixels)), subject="x")
    assert report.passed, report.table()
    assert [(port.name, port.shape[1]) for port in opened.outputs] == [
        (name, values.shape[1]) for name, values in expected.items()
    ]


def test_the_runtime_alone_reads_the_file_as_the_docstring_says(trained: tuple[EncoderGraph, Path, np.ndarray]) -> None:
    graph, path, pixels = trained
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(path))
    embedding = interpreter.get_signature_runner()(images=pixels[:1])["embedding"]
    assert np.allclose(embedding, graph.run(pixels[:1])["embedding"], rtol=1e-4, atol=1e-5)


def test_equal_graphs_give_equal_bytes(trained: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path) -> None:
    graph, path, _ = trained
    formats.get("litert").export(graph, Signature(graph.size_px, graph.outputs), tmp_path / path.name, {"a": "text"})
    for item in path.parent.iterdir():
        assert (tmp_path / item.name).read_bytes() == item.read_bytes(), item.name


def test_threads_at_once_get_their_own_results(trained: tuple[EncoderGraph, Path, np.ndarray]) -> None:
    opened = formats.get("litert").load(trained[1], RunOptions(threads=1))
    assert mixed_up(lambda pixels: opened(pixels)["embedding"], trained[0].size_px) == []


def test_int8_of_both_kinds_and_the_layers_that_are_kept(
    trained: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path
) -> None:
    graph, full, pixels = trained
    format, signature = formats.get("litert"), Signature(graph.size_px, graph.outputs)
    found = format.reducer(graph, signature, full, "int8", Calibration(pixels[:16], "x86-vnni"))
    assert len(set(found.layers)) == len(found.layers) > 5
    assert any(name.startswith("backbone/layer1/0/") for name in found.layers), found.layers
    expected = graph.run(pixels)["embedding"]
    path = tmp_path / "model.tflite"
    margins, sizes = {}, {}
    for method in found.methods:
        for kept in ((), found.layers[:2], found.layers):
            found.write(path, {"b": "text"}, method, kept)
            assert format.carried(path) == {"b": "text"}
            actual = format.load(path, RunOptions()).compute(pixels, ("embedding",))["embedding"]
            assert (actual.dtype, actual.shape) == (np.dtype(np.float32), expected.shape)
            margins[method, len(kept)] = separation_margin(actual, expected)
            sizes[method, len(kept)] = path.stat().st_size
        assert sizes[method, 0] < full.stat().st_size / 2
        assert sizes[method, 0] < sizes[method, 2] < sizes[method, len(found.layers)]
        assert margins[method, 0] > 1e-4
        assert margins[method, len(found.layers)] < 1e-4
    assert margins["dynamic", 0] < 0.25


def test_an_exported_file_runs_without_pytorch(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, formats=("litert",), out=tmp_path / "bundle", data=fashion)
    (artefact,) = bundle.manifest.artefacts
    assert artefact.parity["passed"]
    assert self_test(bundle.path, threads=1).passed
    for place in (bundle.path, bundle.path / "model.tflite"):
        assert golden_without_pytorch(place) == "True True"


def test_a_graph_that_the_converter_cannot_take_is_one_sentence(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.linalg.svdvals(pixels.float().mean(3)),)

    path = tmp_path / "model.tflite"
    with pytest.raises(ExportError, match=r"litert-torch cannot take this graph: .*svd") as caught:
        formats.get("litert").export(Odd().eval(), Signature(8, ("embedding",)), path, {})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_providers_and_images_are_refused(trained: tuple[EncoderGraph, Path, np.ndarray]) -> None:
    opened = formats.get("litert").load(trained[1], RunOptions("auto"))
    assert opened.provider == "CPU"
    with pytest.raises(DataError, match=r"takes \(N, 32, 32, 3\) uint8"):
        opened(images(1, 40))
    with pytest.raises(ProviderError, match="on the CPU here, not on 'cuda'"):
        formats.get("litert").load(trained[1], RunOptions("cuda"))


@pytest.mark.parametrize("size", [4, 400, 20_000])
def test_a_cut_file_is_refused_quietly(
    size: int, trained: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for item in trained[1].parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    path = tmp_path / "model.tflite"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BundleError, match=r"model\.tflite is not a LiteRT file of byol-deploy, or is damaged"):
        formats.get("litert").load(path, RunOptions())
    assert capfd.readouterr() == ("", "")
