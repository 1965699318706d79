"""The self-test that travels: real files in real sessions, golden cases from pixels and from image files."""

from __future__ import annotations

import dataclasses
import io
import json
import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from byol_deploy import Bundle, Encoder, formats
from byol_deploy.bundle import Golden, Manifest, seal_artefact
from byol_deploy.errors import BundleError, MissingExtraError, ProviderError
from byol_deploy.formats import RunOptions
from byol_deploy.golden import pixels_hash
from byol_deploy.host import describe_host
from byol_deploy.preprocess import Preprocessing
from byol_deploy.selftest import SelfTest, check_golden, run_in_batches, self_test, self_test_file

tiny = runpy.run_path(str(Path(__file__).with_name("tiny_encoder.py")))
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture(scope="module")
def opened(whole: Path) -> SimpleNamespace:
    """Manifest, golden cases and the run of the tiny encoder."""
    encoder = Encoder(whole, outputs="all", threads=1)
    return SimpleNamespace(manifest=encoder.manifest, golden=encoder.golden, run=encoder.run)


def changed(run: Run, change: Callable[[np.ndarray], np.ndarray]) -> Run:
    return lambda images: {name: change(values).astype(np.float32) for name, values in run(images).items()}


def groups(report: object) -> dict[str, set[bool]]:
    """Verdicts by the last part of the subject."""
    found: dict[str, set[bool]] = {}
    for row in report.rows:  # type: ignore[attr-defined]
        found.setdefault(row.subject.rpartition(", ")[2], set()).add(row.passed)
    return found


# --- a trained encoder, exported ---------------------------------------------------------------------------------


def test_bundle_and_lone_files_of_a_trained_encoder_pass(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    paths = [tiny_bundle]
    for entry in bundle.manifest.artefacts:
        suffix = formats.get(entry.format).suffix
        paths.append(Path(shutil.copy(tiny_bundle / entry.file, tmp_path / f"renamed{suffix}")))
    assert len(paths) == 3
    for path in paths:
        found = self_test(path, threads=1)
        assert found.passed, found.text()
        assert (found.precision, found.provider, found.threads) == ("fp32", "cpu", 1)
        assert {"batch 8", "batch 1"} <= set(groups(found.report))
        assert {row.output for row in found.report.rows} == {output.name for output in bundle.manifest.outputs}


def test_the_bundle_of_an_older_version_passes_and_says_that_it_has_no_seal(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "models" / "fashion-mnist" / "bundle"
    lone = Path(shutil.copy(tiny["write_bundle"](tmp_path / "old", sealed=False) / "model.onnx", tmp_path / "x.onnx"))
    assert self_test(shipped, threads=1).passed
    found = self_test(lone, threads=1)
    assert found.passed
    assert found.content == "absent"
    assert "without a seal" in found.text()


# --- graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [lambda v: v * 1.001, lambda v: -v, lambda v: np.roll(v, 1, axis=1), lambda v: v * np.nan, np.zeros_like],
    ids=["scaled", "negated", "rolled", "nan", "zero"],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_other_numbers_fail(opened: SimpleNamespace, change: Callable, precision: str) -> None:
    judge = {"manifest": opened.manifest, "golden": opened.golden, "subject": "x", "precision": precision}
    assert check_golden(opened.run, **judge).passed
    report = check_golden(changed(opened.run, change), **judge)
    if precision == "int8" and change(np.ones((1, 1)))[0, 0] == 1.001:
        assert report.passed, "a thousandth is far less than what images differ by"
    else:
        assert not report.passed


def test_an_encoder_that_mixes_up_its_batch_fails(opened: SimpleNamespace) -> None:
    for precision in ("fp32", "int8"):
        mixed = changed(opened.run, lambda values: values[::-1])
        report = check_golden(mixed, opened.manifest, opened.golden, subject="x", precision=precision)
        assert groups(report)["batch 3"] == {False}
        assert groups(report)["batch 1"] == {True}


def test_reduced_precision_is_judged_by_the_margin(opened: SimpleNamespace) -> None:
    def rounded(values: np.ndarray) -> np.ndarray:
        return np.round(values * 64) / 64

    run = changed(opened.run, rounded)
    assert not check_golden(run, opened.manifest, opened.golden, subject="x").passed
    report = check_golden(run, opened.manifest, opened.golden, subject="x", precision="int8")
    assert report.passed, report.table()
    assert all(row.margin is not None for row in report.rows if not row.subject.endswith("batch 1"))


def alike(golden: Golden) -> Golden:
    same = {name: np.repeat(values[:1], len(values), axis=0) for name, values in golden.outputs.items()}
    return dataclasses.replace(golden, images=np.repeat(golden.images[:1], 3, axis=0), outputs=same)


def alone(golden: Golden) -> Golden:
    return Golden(golden.images[:1], {name: values[:1] for name, values in golden.outputs.items()})


@pytest.mark.parametrize("make", [alike, alone])
def test_a_margin_that_cannot_be_formed_is_no_pass(opened: SimpleNamespace, make: Callable[[Golden], Golden]) -> None:
    report = check_golden(opened.run, opened.manifest, make(opened.golden), subject="x", precision="int8")
    assert not report.passed
    assert all("not comparable" in row.reason for row in report.rows if not row.passed)
    assert set(groups(report)) >= {"batch 1"}


def test_a_run_that_raises_is_a_failed_row(opened: SimpleNamespace) -> None:
    def single(images: np.ndarray) -> dict[str, np.ndarray]:
        if len(images) > 1:
            raise RuntimeError("got invalid dimensions for input: images\nmore")
        return opened.run(images)

    report = check_golden(single, opened.manifest, opened.golden, subject="x")
    assert groups(report)["batch 1"] == {True}
    assert groups(report)["batch 3"] == groups(report)["golden files"] == {False}
    assert any("invalid dimensions" in failure for failure in report.failures)


def test_too_few_vectors_and_missing_outputs_are_failed_rows(opened: SimpleNamespace) -> None:
    def short(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[:1] for name, values in opened.run(images).items() if name != "prediction"}

    report = check_golden(short, opened.manifest, opened.golden, subject="x")
    assert groups(report)["same pixels"] == {False}
    assert any("prediction: not comparable: the output is missing" in failure for failure in report.failures)


def test_limits_that_limit_nothing_are_refused(opened: SimpleNamespace) -> None:
    loose = {name: {"rel_l2": 1e9, "cosine": -1.0, "noise_rel_l2": 0.0} for name in tiny["WIDTHS"]}
    manifest = dataclasses.replace(opened.manifest, limits=loose)
    with pytest.raises(BundleError, match="limits in the manifest"):
        check_golden(opened.run, manifest, opened.golden, subject="x")
    none = dataclasses.replace(opened.manifest, limits={})
    assert not check_golden(opened.run, none, opened.golden, subject="x").passed


# --- from the bytes of image files on ----------------------------------------------------------------------------


def other_pixels(golden: Golden, *names: str) -> Golden:
    """As if the exporting machine's decoder had given other pixels for these files."""
    return dataclasses.replace(golden, pixels_sha256={**golden.pixels_sha256, **dict.fromkeys(names, "0" * 64)})


def with_preprocessing(manifest: Manifest, preprocessing: Preprocessing) -> Manifest:
    return dataclasses.replace(manifest, input=dataclasses.replace(manifest.input, preprocessing=preprocessing))


def test_a_lossless_file_with_other_pixels_fails_and_is_named(opened: SimpleNamespace) -> None:
    report = check_golden(opened.run, opened.manifest, other_pixels(opened.golden, "alpha.png"), subject="x")
    assert groups(report) == {"batch 3": {True}, "batch 1": {True}, "other pixels": {False}, "same pixels": {True}}
    assert any("preprocessing differs here: alpha.png gives other pixels" in text for text in report.failures)


def test_a_jpeg_of_another_decoder_is_judged_by_the_margin(opened: SimpleNamespace) -> None:
    golden = other_pixels(opened.golden, "exif-6.jpg")
    report = check_golden(opened.run, opened.manifest, golden, subject="x", decoders="exported with a, here b")
    assert report.passed, report.table()
    assert "pixels of another decoder" in groups(report)
    (warning,) = report.warnings
    assert "exported with a, here b" in warning
    assert "exif-6.jpg" in warning

    def drifted(values: np.ndarray) -> np.ndarray:
        return values + 0.01

    # Too much for a graph that saw the same pixels, nothing for another decoder.
    report = check_golden(changed(opened.run, drifted), opened.manifest, golden, subject="x")
    assert groups(report)["same pixels"] == {False}
    assert groups(report)["pixels of another decoder"] == {True}
    far = {name: values + 100 for name, values in golden.file_outputs.items()}
    report = check_golden(opened.run, opened.manifest, dataclasses.replace(golden, file_outputs=far), subject="x")
    assert groups(report)["pixels of another decoder"] == {False}


def test_a_decoder_that_is_a_level_off_passes(opened: SimpleNamespace) -> None:
    """What another libjpeg does: the trained model saw pixels one level apart on a third of them."""
    name, content = "exif-6.jpg", opened.golden.files["exif-6.jpg"]
    preprocessing = opened.manifest.preprocessing
    pixels = preprocessing(content)
    pixels = np.clip(pixels.astype(int) + np.random.default_rng(0).integers(-1, 2, pixels.shape), 0, 255)
    there = pixels.astype(np.uint8)
    golden = Golden(
        opened.golden.images,
        opened.golden.outputs,
        {name: content},
        {name: pixels_hash(there)},
        tiny["expected"](there[None], preprocessing),
    )
    report = check_golden(opened.run, opened.manifest, golden, subject="x")
    assert report.passed, report.table()
    assert not groups(report).get("same pixels")


def test_the_margin_of_files_needs_golden_images_that_differ(opened: SimpleNamespace) -> None:
    golden = other_pixels(alike(opened.golden), "exif-6.jpg")
    report = check_golden(opened.run, opened.manifest, golden, subject="x")
    rows = [row for row in report.rows if row.subject.endswith("another decoder")]
    assert rows
    assert all("not comparable" in row.reason and not row.passed for row in rows)


@pytest.mark.parametrize("stale", [Preprocessing(16, 20, "bilinear"), Preprocessing(16, 16), Preprocessing(16, 21)])
def test_stale_preprocessing_fails(opened: SimpleNamespace, stale: Preprocessing) -> None:
    report = check_golden(opened.run, with_preprocessing(opened.manifest, stale), opened.golden, subject="x")
    assert groups(report)["batch 3"] == {True}, "the graph alone cannot tell"
    assert groups(report)["other pixels"] == {False}


def test_exif_that_is_ignored_fails(opened: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from byol_deploy import images

    monkeypatch.setattr(images, "_UPRIGHT", {})
    report = check_golden(opened.run, opened.manifest, opened.golden, subject="x")
    assert groups(report)["same pixels"] == {True}
    assert groups(report)["other pixels"] == {False}
    assert any("exif-6.png gives other pixels" in failure for failure in report.failures)


def test_a_file_that_cannot_be_decoded_here_fails(opened: SimpleNamespace) -> None:
    files = {**opened.golden.files, "grey.png": b"\x89PNG and no more"}
    report = check_golden(
        opened.run, opened.manifest, dataclasses.replace(opened.golden, files=files), subject="x", precision="int8"
    )
    assert groups(report)["other pixels"] == {False}
    assert any("grey.png: an image given as" in failure for failure in report.failures)


def tiff(**options: str) -> bytes:
    packed = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(packed, "TIFF", **options)
    return packed.getvalue()


@pytest.mark.parametrize(("content", "lossless"), [(tiff(), True), (tiff(compression="jpeg"), False)])
def test_a_tiff_is_lossy_where_it_holds_a_jpeg(opened: SimpleNamespace, content: bytes, lossless: bool) -> None:
    preprocessing = opened.manifest.preprocessing
    outputs = tiny["expected"](preprocessing.batch([content]), preprocessing)
    golden = Golden(opened.golden.images, opened.golden.outputs, {"a.tif": content}, {"a.tif": "0" * 64}, outputs)
    report = check_golden(opened.run, opened.manifest, golden, subject="x")
    assert report.passed is not lossless


# --- the verdict -------------------------------------------------------------------------------------------------


def test_what_differs_from_the_exporting_machine_is_listed_and_named_beside_a_failure(
    whole: Path, tmp_path: Path
) -> None:
    """The same file, sealed as if on another machine."""
    source = tiny["write_bundle"](tmp_path / "bundle")
    bundle = Bundle.open(source)
    path = tmp_path / "lone.onnx"
    from byol_deploy.bundle import carry

    tiny["write_onnx"](path, bundle.manifest.preprocessing, carry(bundle.manifest, bundle.golden, sealed=True))
    host = describe_host() | {"instructions": "NEON, SVE", "runtime": "onnxruntime 1.2.3", "provider": "cuda"}
    format = formats.get("onnx")
    seal_artefact(path, format, "fp32", host)
    found = self_test(path, threads=1)
    assert found.passed
    text = found.text()
    for part in ("instruction set: exported with NEON, SVE; here", "onnxruntime 1.2.3", "provider: exported with cuda"):
        assert part in text
    assert "likely" not in text
    wrong = {name: values * np.float32(1.01) for name, values in bundle.golden.outputs.items()}
    golden = dataclasses.replace(bundle.golden, outputs=wrong)
    found = self_test_file(path, format, RunOptions(threads=1), bundle.manifest, golden)
    assert not found.passed
    assert found.content == "passed"
    assert "the likely reason" in found.text()
    assert "likely because" in found.reason
    assert "NEON, SVE" in found.reason


def test_precision_comes_from_the_manifest_or_the_seal_and_must_be_one(tmp_path: Path) -> None:
    bundle = tiny["write_bundle"](tmp_path / "bundle", precision="int8")
    lone = Path(shutil.copy(bundle / "model.onnx", tmp_path / "lone.onnx"))
    for path in (bundle, lone):
        found = self_test(path, threads=1)
        assert found.precision == "int8"
        assert found.passed, found.text()
        assert all("margin" in row.limit.to_dict() for row in found.report.rows)
    manifest = Bundle.open(bundle).manifest
    said = dataclasses.replace(manifest, artefacts=(dataclasses.replace(manifest.artefacts[0], precision="fp32"),))
    found = self_test_file(
        bundle / "model.onnx", formats.get("onnx"), RunOptions(threads=1), said, Bundle.open(bundle).golden
    )
    assert found.content == "failed"
    assert "sealed as int8, the manifest says fp32" in found.detail
    assert not found.passed


def test_the_verdict_is_plain_json_and_speaks(whole: Path) -> None:
    found = self_test(whole, threads=1)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["passed"] is True
    assert document["content"]["status"] == "passed"
    assert document["provider"] == "cpu"
    assert len(document["parity"]["rows"]) == len(found.report.rows)
    assert found.text().startswith("PASS model.onnx: fp32 on cpu, 1 thread(s)\ncontent: the file that was exported")
    assert found.reason == ""
    assert isinstance(found, SelfTest)


def test_optimizations_and_auto_provider(whole: Path, opened: SimpleNamespace) -> None:
    options = RunOptions(threads=1, optimization="none")
    found = self_test_file(whole / "model.onnx", formats.get("onnx"), options, opened.manifest, opened.golden)
    assert found.passed, found.text()
    assert any("graph optimisation: exported with all; here none" in item for item in found.differences)
    assert self_test(whole, provider="auto").provider != "auto"


def test_what_cannot_be_tested(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    for path, said in (("x.bin", "neither a bundle"), ("absent.onnx", "does not exist"), ("x.onnx", "not an ONNX")):
        with pytest.raises(BundleError, match=said):
            self_test(tmp_path / path)
    with pytest.raises(ProviderError):
        self_test(whole, provider="CoreMLExecutionProvider")
    monkeypatch.setattr(formats.get("torchscript"), "runs_with", ("a_package_that_is_not_there",), raising=False)
    (tmp_path / "x.torchscript.pt").write_bytes(b"x")
    with pytest.raises(MissingExtraError, match="a_package_that_is_not_there"):
        self_test(tmp_path / "x.torchscript.pt")


def test_run_in_batches_keeps_order() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    got: Mapping[str, np.ndarray] = run_in_batches(
        lambda part: {"x": part.astype(np.float32).reshape(-1, 1)}, images, 2
    )
    assert got["x"].ravel().tolist() == [0, 1, 2, 3, 4]
