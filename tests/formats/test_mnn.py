"""MNN: families, int8 with activations in 8 bits, a quiet standard output, no telemetry, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_encoders import FAMILIES, SIZE, build, golden_without_pytorch, images, mixed_up

from byol_deploy import export, formats
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.formats._native_output import captured, give_back
from byol_deploy.graph import EncoderGraph
from byol_deploy.images import find_images
from byol_deploy.parity import MOST_MARGIN, compare, derive_limits, separation_margin
from byol_deploy.quantization import Calibration
from byol_deploy.selftest import self_test
from byol_deploy.training.checkpoints import load_checkpoint

if formats.missing_to_run(formats.get("mnn")):  # not importorskip: importing it prints
    pytest.skip("MNN is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    graph = build(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.mnn"
    formats.get("mnn").export(graph, Signature(SIZE, graph.outputs), path, {"a": "text"})
    return graph, path


@pytest.fixture(scope="module")
def trained(
    tiny_run: Path, fashion: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EncoderGraph, Path, np.ndarray]:
    """A trained encoder, its float32 file, and real images."""
    loaded = load_checkpoint(tiny_run)
    assert loaded.preprocessing is not None
    graph = EncoderGraph(loaded.model, loaded.preprocessing)
    path = tmp_path_factory.mktemp("trained") / "model.mnn"
    formats.get("mnn").export(graph, Signature(graph.size_px, graph.outputs), path, {})
    return graph, path, loaded.preprocessing.batch(find_images(fashion)[:128])


def reducer(trained: tuple[EncoderGraph, Path, np.ndarray]) -> Any:
    graph, path, pixels = trained
    signature = Signature(graph.size_px, graph.outputs)
    return formats.get("mnn").reducer(graph, signature, path, "int8", Calibration(pixels[:16], "x86-vnni"))


def test_every_family_keeps_to_its_rounding_noise(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    pixels = images(7)
    expected = graph.run(pixels)
    opened = formats.get("mnn").load(path, RunOptions(threads=2))
    report = compare(expected, opened(pixels), limits=derive_limits(expected, graph.doubled().run(pixels)), subject="x")
    assert report.passed, report.table()
    assert [port.name for port in opened.outputs] == list(graph.outputs)
    chosen = opened.compute(pixels, ("projection",))
    assert list(chosen) == ["projection"]
    assert np.array_equal(chosen["projection"], opened(pixels)["projection"])


def test_equal_graphs_give_equal_bytes(written: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = written
    formats.get("mnn").export(graph, Signature(SIZE, graph.outputs), tmp_path / "other.mnn", {})
    assert (tmp_path / "other.mnn").read_bytes() == path.read_bytes()


def test_threads_at_once_get_their_own_results(written: tuple[EncoderGraph, Path]) -> None:
    _, path = written
    opened = formats.get("mnn").load(path, RunOptions(threads=1))
    assert mixed_up(lambda pixels: opened(pixels)["embedding"]) == []


def test_int8_is_smaller_and_still_the_encoder(trained: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path) -> None:
    graph, full, pixels = trained
    found = reducer(trained)
    assert found.layers
    assert any(name.startswith("backbone/layer1") for name in found.layers)
    expected = graph.run(pixels)["embedding"]
    for method in found.methods:
        path = tmp_path / "model.mnn"
        found.write(path, {"a": "text"}, method, ())
        assert path.stat().st_size < full.stat().st_size / 2
        assert formats.get("mnn").carried(path) == {"a": "text"}
        opened = formats.get("mnn").load(path, RunOptions())
        for count in (1, len(pixels)):
            actual = opened.compute(pixels[:count], ("embedding",))["embedding"]
            assert actual.shape == expected[:count].shape
        margin = separation_margin(actual, expected)
        assert margin is not None
        assert 1e-4 < margin < MOST_MARGIN


def test_activations_of_int8_have_8_bits_too(trained: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path) -> None:
    import MNN

    found, (_, _, pixels) = reducer(trained), trained
    path = tmp_path / "model.mnn"
    found.write(path, {}, found.methods[0], ())
    ours = formats.get("mnn").load(path, RunOptions(threads=1)).compute(pixels[:8], ("embedding",))["embedding"]
    given = MNN.expr.const(pixels[:8], pixels[:8].shape, MNN.expr.NCHW, MNN.expr.uint8)
    alone = {}
    for name in ("Normal", "Low"):
        module = MNN.nn.load_module_from_file(
            str(path), ["images"], ["embedding"], precision_mode=MNN.expr.PrecisionMode.High,
            memory_mode=getattr(MNN.expr.MemoryMode, name), thread_num=1,
        )  # fmt: skip
        alone[name] = np.array(module.forward([given])[0].read())
    assert np.array_equal(ours, alone["Low"])
    # With the weights alone reduced the result is another one: what differs is the rounding of activations.
    assert np.abs(ours - alone["Normal"]).max() > 1e-5


def test_layers_that_are_kept_stay_in_float32(trained: tuple[EncoderGraph, Path, np.ndarray], tmp_path: Path) -> None:
    graph, _, pixels = trained
    found = reducer(trained)
    expected = graph.run(pixels[:8])["embedding"]

    def write(kept: tuple[str, ...]) -> tuple[int, float]:
        path = tmp_path / "model.mnn"
        found.write(path, {}, found.methods[0], kept)
        actual = formats.get("mnn").load(path, RunOptions()).compute(pixels[:8], ("embedding",))["embedding"]
        return path.stat().st_size, float(np.abs(actual - expected).max())

    none, one, every = write(()), write(found.layers[:1]), write(found.layers)
    assert none[0] < one[0] < every[0]
    assert every[1] < 1e-5 < none[1]


def test_an_exported_file_runs_without_pytorch_and_quietly(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, formats=("mnn",), out=tmp_path / "bundle", data=fashion)
    assert [item.parity["passed"] for item in bundle.manifest.artefacts] == [True]
    assert self_test(bundle.path, threads=1).passed
    for place in (bundle.path, bundle.path / "model.mnn"):
        assert golden_without_pytorch(place, "'MNN.tools' not in sys.modules") == "True True"


def test_the_console_program_that_reports_home_is_not_used(written: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from byol_deploy.formats import mnn;"
        'mnn._CONVERTER += \'; print("MNN.tools" in sys.modules, "aliyun" in sys.modules)\';'
        "run = mnn.subprocess.run; "
        "mnn.subprocess.run = lambda *a, **k: (lambda done: (print(done.stdout.decode()), done)[1])(run(*a, **k));"
        "mnn.convert(Path(sys.argv[1]), Path(sys.argv[2]), 'fp32')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(written[1]), str(tmp_path / "x.mnn")], capture_output=True, text=True
    )
    assert "Converted Success" in done.stdout, done.stderr
    assert "False False" in done.stdout
    assert "pip" not in done.stdout


def test_an_operator_that_is_lacking_is_named_with_its_layer(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = torch.nn.Mish()

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.act(pixels.float()).mean((1, 2)),)

    path = tmp_path / "model.mnn"
    with pytest.raises(ExportError, match=r"lacks the operator Mish \(first in act/Mish\)"):
        formats.get("mnn").export(Odd().eval(), Signature(SIZE, ("embedding",)), path, {})
    assert not path.exists()


def test_other_providers_are_refused(written: tuple[EncoderGraph, Path]) -> None:
    assert formats.get("mnn").load(written[1], RunOptions("auto")).provider == "CPU"
    with pytest.raises(ProviderError, match="on the CPU here, not on 'cuda'"):
        formats.get("mnn").load(written[1], RunOptions("cuda"))


@pytest.mark.parametrize("size", [4, 400, 50_000])
def test_a_cut_file_is_refused_quietly(
    size: int, written: tuple[EncoderGraph, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for item in written[1].parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    path = tmp_path / "model.mnn"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BundleError, match=r"model\.mnn is not an MNN file, or is damaged.*export it again"):
        formats.get("mnn").load(path, RunOptions())
    assert capfd.readouterr().out == ""


def test_images_of_another_size_are_one_error(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    if not hasattr(graph.backbone, "patch_embed"):
        pytest.skip("a convolutional encoder takes other sizes")
    with pytest.raises(BundleError, match="cannot be run by MNN"):
        formats.get("mnn").load(path, RunOptions())(np.zeros((1, 5, 5, 3), np.uint8))


def test_what_others_print_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with captured(said):
        os.write(1, b"from a thread\nfrom a library\n")
    assert said == ["from a thread", "from a library"]
    assert capfd.readouterr().out == ""
    give_back(said[:1])
    print("after")
    assert capfd.readouterr().out == "from a thread\nafter\n"
