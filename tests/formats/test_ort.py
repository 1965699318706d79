"""ONNX Runtime's own format: portable operators, the list of them, no PyTorch where it runs, and what it refuses."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_encoders import FAMILIES, SIZE, build, golden_without_pytorch, images

from byol_deploy import export, formats
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.parity import compare, derive_limits
from byol_deploy.quantization import Calibration
from byol_deploy.selftest import self_test

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderGraph, Path]:
    graph = build(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.ort"
    formats.get("ort").export(graph, Signature(SIZE, graph.outputs), path, {"a": "text"})
    return graph, path


def needed(path: Path) -> dict[tuple[str, int], set[str]]:
    lines = path.with_name("model.required_operators.config").read_text().splitlines()
    parts = [line.split(";") for line in lines if not line.startswith("#")]
    return {(domain, int(version)): set(names.split(",")) for domain, version, names in parts}


def test_every_family_keeps_to_its_rounding_noise(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    pixels = images(7)
    expected = graph.run(pixels)
    actual = formats.get("ort").load(path, RunOptions())(pixels)
    report = compare(expected, actual, limits=derive_limits(expected, graph.doubled().run(pixels)), subject="x")
    assert report.passed, report.table()


def test_no_operator_belongs_to_the_processor_that_wrote_the_file(written: tuple[EncoderGraph, Path]) -> None:
    _, path = written
    found = needed(path)
    assert found
    # com.microsoft.nchwc is the weights in blocks of this machine's vector length.
    assert {domain for domain, _ in found} <= {"ai.onnx", "com.microsoft"}
    assert not {name for names in found.values() for name in names} & {"ReorderInput", "ReorderOutput"}


def test_the_list_of_operators_is_what_the_runtimes_own_tool_finds(written: tuple[EncoderGraph, Path]) -> None:
    _, path = written
    code = (
        "import sys; from onnxruntime.tools.ort_format_model import OrtFormatModelProcessor as Reader; found = {};"
        "Reader(sys.argv[1], found, None).process();"
        "print([(domain, version, sorted(names)) for domain, sets in sorted(found.items())"
        " for version, names in sorted(sets.items())])"
    )
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert told.strip() == str([(domain, version, sorted(names)) for (domain, version), names in needed(path).items()])


def test_the_model_is_one_file_for_the_runtime(written: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    import onnxruntime

    graph, path = written
    alone = shutil.copy(path, tmp_path / "model.ort")
    session = onnxruntime.InferenceSession(alone, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(["embedding"], {"images": images(2)})
    assert np.allclose(embedding, graph.run(images(2))["embedding"], rtol=1e-4, atol=1e-5)


def test_what_was_not_folded_is_stored_bit_for_bit(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    before = list(sys.path)
    stored = formats.get("ort").tensors(path)
    assert sys.path == before
    ours = graph.tensors()
    assert set(ours) & set(stored) >= {"projection_head.2.0.weight", "prediction_head.3.bias"}
    for name in set(ours) & set(stored):
        assert stored[name].dtype == ours[name].dtype, name
        assert np.array_equal(stored[name], ours[name]), name
    assert not any("momentum" in name for name in stored)


def test_an_exported_file_runs_without_pytorch_and_without_onnx(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, formats=("ort",), out=tmp_path / "bundle", data=fashion)
    (artefact,) = bundle.manifest.artefacts
    assert artefact.parity["passed"]
    assert [item.file for item in artefact.extra_files] == ["model.required_operators.config", "model.ort.byol.json"]
    assert self_test(bundle.path, threads=1).passed
    for place in (bundle.path, bundle.path / "model.ort"):
        assert (
            golden_without_pytorch(
                place, "__import__('byol_deploy.selftest').selftest.self_test(sys.argv[1], threads=1).passed"
            )
            == "True True"
        )


def test_other_providers_are_refused(written: tuple[EncoderGraph, Path]) -> None:
    _, path = written
    for name in ("auto", "CPUExecutionProvider"):
        assert formats.get("ort").load(path, RunOptions(name)).provider == "CPUExecutionProvider"
    with pytest.raises(ProviderError, match=r"for the CPU, not for 'cuda'; use --provider cpu"):
        formats.get("ort").load(path, RunOptions("cuda"))


@pytest.mark.parametrize("size", [4, 8, 400, 50_000])
def test_a_cut_file_is_refused(size: int, written: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    _, path = written
    for item in path.parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    cut = tmp_path / "model.ort"
    cut.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BundleError, match=r"model\.ort"):
        formats.get("ort").load(cut, RunOptions())
    with pytest.raises(BundleError, match=r"model\.ort"):
        formats.get("ort").tensors(cut)


def test_an_onnx_file_of_that_name_is_refused(written: tuple[EncoderGraph, Path], tmp_path: Path) -> None:
    graph, path = written
    for item in path.parent.iterdir():
        shutil.copy(item, tmp_path / item.name)
    formats.get("onnx").export(graph, Signature(SIZE, graph.outputs), tmp_path / "x.onnx", {})
    (tmp_path / "x.onnx").replace(tmp_path / "model.ort")
    with pytest.raises(BundleError, match=r"is not an \.ort file"):
        formats.get("ort").load(tmp_path / "model.ort", RunOptions())


def test_a_model_above_two_gibibytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from byol_deploy.formats import ort

    monkeypatch.setattr(ort, "MAX_BYTES", 100_000)
    graph = build("resnet")
    with pytest.raises(ExportError, match=r"ends at 2 GiB; use --format onnx"):
        formats.get("ort").export(graph, Signature(SIZE, graph.outputs), tmp_path / "model.ort", {})
    assert not list(tmp_path.iterdir())


def test_an_unknown_precision_is_refused(written: tuple[EncoderGraph, Path]) -> None:
    graph, path = written
    with pytest.raises(ExportError, match="there is no fp16 in this format; it has fp32, int8"):
        formats.get("ort").reducer(
            graph, Signature(SIZE, graph.outputs), path, "fp16", Calibration(images(2), "x86-vnni")
        )


@pytest.mark.skipif(
    importlib.util.find_spec("byol_deploy.formats._onnx_reduced") is None, reason="there is no int8 in ONNX yet"
)
@pytest.mark.parametrize("target", ["x86-vnni", "arm64"])
def test_int8_computes_what_the_int8_onnx_file_computes(target: str, tmp_path: Path) -> None:
    graph = build("resnet")
    signature = Signature(SIZE, graph.outputs)
    full = {name: tmp_path / f"full{formats.get(name).suffix}" for name in ("onnx", "ort")}
    reduced = {name: tmp_path / f"model{formats.get(name).suffix}" for name in full}
    calibration = Calibration(images(16), target)
    found = {}
    for name, path in full.items():
        format = formats.get(name)
        format.export(graph, signature, path, {})
        reducer = format.reducer(graph, signature, path, "int8", calibration)
        reducer.write(reduced[name], {"a": "text"}, reducer.methods[0], ())
        found[name] = format.load(reduced[name], RunOptions())(images(4, seed=1))
        assert format.carried(reduced[name])["a"] == "text"
    operators = {name for names in needed(reduced["ort"]).values() for name in names}
    assert "QLinearConv" in operators, "8-bit convolutions that are not fused at writing stay float32 for ever"
    assert reduced["ort"].stat().st_size < 0.5 * full["ort"].stat().st_size
    for name, values in found["onnx"].items():
        # The same integers; what lies between them is rounded once more or less, by how the fusions went.
        scale = np.abs(values).max()
        assert np.abs(found["ort"][name] - values).max() < 0.05 * scale, name
