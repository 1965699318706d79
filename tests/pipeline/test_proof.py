"""What a file is compared with, under which conditions, and that the shipped preprocessing is really looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byol_deploy import export, formats, verify
from byol_deploy.awkward import awkward_files
from byol_deploy.bundle import CARRIED_ARTEFACT_KEY, seal_artefact
from byol_deploy.errors import OutputError, ParityError, UsageError
from byol_deploy.formats import RunOptions
from byol_deploy.graph import EncoderGraph
from byol_deploy.host import describe_host
from byol_deploy.parity import FidelityLimit, Limit, compare
from byol_deploy.pipeline.proof import limits_for, matrix
from byol_deploy.pipeline.reference import (
    CROWD,
    GOLDEN_FILES,
    REAL_IMAGES,
    Reference,
    build_reference,
    choose_golden,
    rounded_otherwise,
)
from byol_deploy.training.checkpoints import LoadedCheckpoint, load_checkpoint


@pytest.fixture(scope="module")
def loaded(tiny_run: Path) -> LoadedCheckpoint:
    return load_checkpoint(tiny_run)


@pytest.fixture(scope="module")
def graph(loaded: LoadedCheckpoint) -> EncoderGraph:
    assert loaded.preprocessing is not None
    return EncoderGraph(loaded.model, loaded.preprocessing)


@pytest.fixture(scope="module")
def reference(loaded: LoadedCheckpoint, graph: EncoderGraph, fashion: Path) -> Reference:
    assert loaded.preprocessing is not None
    return build_reference(loaded, graph, loaded.preprocessing, fashion)


# --- the reference ---


def test_the_reference_is_what_pytorch_gives(reference: Reference, graph: EncoderGraph) -> None:
    for images, count in (
        (reference.real, REAL_IMAGES),
        (reference.crowd, CROWD),
        (reference.end_to_end, 8 + len(awkward_files())),
    ):
        assert len(images.images) == count
        expected = graph.run(images.images)
        report = compare(expected, images.expected, limits=images.limits, different_images=images.different)
        assert report.passed, report.table()
    assert set(reference.names) >= set(awkward_files())
    assert reference.fault == ""


def test_every_image_has_a_limit_of_its_own(reference: Reference) -> None:
    limits = reference.real.limits["embedding"]
    assert len(limits.each) == REAL_IMAGES
    assert max(limits.each) == limits.rel_l2 < 1e-3
    assert len(set(limits.each)) > 3
    assert 0 < (limits.apart or 0) < 2


def test_golden_cases_are_images_and_files(reference: Reference) -> None:
    golden, limits = choose_golden(reference)
    assert set(golden.files) == set(GOLDEN_FILES)
    assert all(len(values) == len(GOLDEN_FILES) for values in golden.file_outputs.values())
    assert all(len(limit.each) == len(golden.images) == 8 for limit in limits.values())


def test_other_roundings_are_the_same_function_to_within_rounding(graph: EncoderGraph, reference: Reference) -> None:
    before = {name: value.copy() for name, value in graph.tensors().items()}
    truth = graph.doubled().run(reference.real.images)["embedding"]
    for other in rounded_otherwise(graph):
        moved = other.run(reference.real.images)["embedding"]
        error = np.linalg.norm(moved - truth, axis=1) / np.linalg.norm(truth, axis=1)
        assert 0 < error.max() < 1e-5
    assert all(np.array_equal(before[name], value) for name, value in graph.tensors().items())


def test_a_reference_that_is_not_deterministic_is_a_failure(
    tiny_run: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EncoderGraph.forward

    def restless(self: EncoderGraph, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.nn.functional.dropout(value, 0.1) for value in whole(self, images))

    format = formats.get("torchscript")
    written = format.export

    def steady(*words: Any) -> tuple[Path, ...]:
        with monkeypatch.context() as context:
            context.setattr(EncoderGraph, "forward", whole)
            return written(*words)

    monkeypatch.setattr(EncoderGraph, "forward", restless)
    monkeypatch.setattr(format, "export", steady)
    with pytest.raises(ParityError, match="gives other numbers when it is asked again"):
        export(tiny_run, formats=["torchscript"], data=fashion, out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


# --- the matrix ---


def test_what_the_caller_leaves_open_is_varied(monkeypatch: pytest.MonkeyPatch) -> None:
    format = formats.get("onnx")
    monkeypatch.setattr("byol_deploy.pipeline.proof.usable_cores", lambda: 4)
    monkeypatch.setattr(type(format), "providers", lambda self: ("cpu", "cuda"))
    words = {(item.words, item.batch_size, item.options) for item in matrix(format, RunOptions())}
    assert words == {
        *(("", size, RunOptions()) for size in (1, 2, 3, 7)),
        ("1 thread", 7, RunOptions(threads=1)),
        ("optimisation none", 7, RunOptions(optimization="none")),
        ("provider cuda", 7, RunOptions(provider="cuda")),
    }
    fixed = matrix(format, RunOptions(provider="cuda", threads=2, optimization="none"))
    assert {item.options for item in fixed} == {RunOptions(provider="cuda", threads=2, optimization="none")}


def test_reduced_precision_is_held_to_margin_and_neighbours(reference: Reference) -> None:
    assert isinstance(limits_for(reference.crowd, "fp32")["embedding"], Limit)
    limit = limits_for(reference.crowd, "int8", agreement=True)["embedding"]
    assert isinstance(limit, FidelityLimit)
    assert limit.agreement is not None
    assert limit.apart == reference.crowd.limits["embedding"].apart
    few = limits_for(reference.real, "int8")["embedding"]
    assert isinstance(few, FidelityLimit)
    assert few.agreement is None


# --- end to end ---


def _lying(image: Image.Image) -> Image.Image:
    return image


def _over_black(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


BROKEN = {"EXIF ignored": ("_upright", _lying, "exif"), "alpha dropped": ("_to_rgb", _over_black, "alpha|rgba|grey16")}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_decoder_that_both_sides_share_is_caught(
    fault: str, tiny_run: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, broken, worst = BROKEN[fault]
    monkeypatch.setattr(f"byol_deploy.images.{name}", broken)
    with pytest.raises(ParityError, match=rf"from the image files on: embedding: .*\(worst: .*({worst})"):
        export(tiny_run, formats=["onnx"], outputs=["embedding"], data=fashion, out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


# --- reduced precision, really written ---


@pytest.fixture(scope="module")
def half(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny encoder in float16 by ONNX Runtime's own converter, sealed as whatever precision is asked for."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = onnx.load(tiny_bundle / "model.onnx")
    texts = {entry.key: entry.value for entry in source.metadata_props if entry.key != CARRIED_ARTEFACT_KEY}
    # Its first nodes take uint8 and divide by 255: they stay as they are.
    small = convert_float_to_float16(source, keep_io_types=True, disable_shape_infer=True)
    onnx.helper.set_model_props(small, texts)

    def made(precision: str) -> Path:
        path = tmp_path_factory.mktemp("half") / "model.onnx"
        onnx.save(small, path)
        seal_artefact(path, formats.get("onnx"), precision, describe_host())
        return path

    return made


def test_float16_passes_as_float16_and_fails_as_float32(
    half: Callable[[str], Path], tiny_run: Path, fashion: Path
) -> None:
    honest = half("fp16")
    alone = verify(honest)
    assert alone.passed, alone.text()
    assert alone.artefacts[0].precision == "fp16"
    full = verify(honest, against=tiny_run, data=fashion)
    assert full.passed, full.text()
    assert "rounded" in full.text()
    posing = half("fp32")
    assert not verify(posing).passed
    assert "has other values" in verify(posing, against=tiny_run, data=fashion).text()


# --- explain ---


def test_explain_names_the_layer_and_writes_a_case_that_fails_by_itself(
    tiny_bundle: Path, tiny_run: Path, fashion: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(tiny_bundle / "model.onnx")
    tensor = next(item for item in model.graph.initializer if item.name == "backbone.layer2.0.conv1.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.05), tensor.name))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    out = tmp_path / "explained"
    report = verify(path, against=tiny_run, data=fashion, explain=out)
    assert not report.passed
    assert "the drift first shows at backbone.layer2.0.conv1 (" in report.text()
    json.dumps(report.to_dict(), allow_nan=False)
    assert (out / "model.onnx.svg").read_text(encoding="utf-8").count("<svg") == 1
    case = out / "model.onnx-case"
    done = subprocess.run([sys.executable, case / "reproduce.py"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    # Once more into the same folder: it is ours to replace.
    again = verify(tiny_bundle / "model.onnx", against=tiny_run, data=fashion, explain=out)
    assert again.passed
    assert "within their budgets" in again.text()


def test_explain_into_a_place_that_is_taken(tiny_bundle: Path, tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError):
        verify(tiny_bundle, against=tiny_run, data=fashion, explain=tmp_path / "taken")
    with pytest.raises(UsageError, match="--explain needs --against"):
        verify(tiny_bundle, explain=tmp_path / "x")


# --- the file itself ---


def test_a_byte_that_no_output_shows_is_found(tiny_bundle: Path, tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    import onnx

    path = Path(shutil.copy(tiny_bundle / "model.onnx", tmp_path / "model.onnx"))
    weight = next(
        item for item in onnx.load(path).graph.initializer if item.name == "backbone.layer1.0.conv1.weight"
    ).raw_data
    content = bytearray(path.read_bytes())
    place = content.index(weight)
    content[place] ^= 1  # the lowest bit of a float32
    path.write_bytes(content)
    alone = verify(path)
    assert alone.artefacts[0].parity is not None
    assert alone.artefacts[0].parity.passed, "one last bit does not show in the outputs"
    assert not alone.passed
    assert "it is not the file that was exported" in alone.text()
    assert not verify(path, against=tiny_run, data=fashion).passed


def test_what_differs_from_the_exporting_machine_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(tiny_bundle / "model.onnx")
    texts = {entry.key: entry.value for entry in model.metadata_props if entry.key != CARRIED_ARTEFACT_KEY}
    onnx.helper.set_model_props(model, texts)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    elsewhere = describe_host() | {"instructions": "NEON", "runtime": "onnxruntime 1.20.0", "threads": "64"}
    seal_artefact(path, formats.get("onnx"), "fp32", elsewhere)
    report = verify(path)
    assert report.passed
    text = report.text()
    for words in (
        "instruction set: exported with NEON",
        "exported with onnxruntime 1.20.0",
        "threads: exported with 64",
    ):
        assert words in text
    assert replace(report, artefacts=()).passed is False
