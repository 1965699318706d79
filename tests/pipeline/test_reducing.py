"""export --precision and --tune on a trained encoder: what is published, what is refused, what the encoder opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_deploy import Bundle, Encoder, calibration, cores, export, formats, verify
from byol_deploy.errors import BundleError, DataError, ExportError, MissingExtraError, ParityError, UsageError
from byol_deploy.formats import RunOptions
from byol_deploy.pipeline.benching.items import find_items
from byol_deploy.pipeline.benching.worker import _Served
from byol_deploy.pipeline.tuning import tune
from byol_deploy.quantization import Goal
from byol_deploy.selftest import as_tuned as as_chosen
from byol_deploy.selftest import self_test


@pytest.fixture(scope="module")
def reduced(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 for a processor that this is not, whose time is no reason to leave it out; calibrated by the run's pick."""
    out = tmp_path_factory.mktemp("reduced") / "bundle"
    return export(tiny_run, precisions=["int8"], target="arm64", agreement=0.9, out=out).path


def test_a_training_keeps_images_to_calibrate_with(tiny_run: Path) -> None:
    images = calibration.kept(tiny_run)
    assert images is not None
    assert images.shape == (calibration.KEPT, 32, 32, 3)
    assert len({image.tobytes() for image in images}) == len(images)


def test_both_files_are_published_and_pass(reduced: Path) -> None:
    manifest = Bundle.open(reduced).manifest
    assert [(entry.file, entry.precision) for entry in manifest.artefacts] == [
        ("model.onnx", "fp32"), ("model.int8.onnx", "int8")]  # fmt: skip
    assert all(entry.parity["passed"] for entry in manifest.artefacts)
    found = manifest.artefacts[1].reduction
    assert found["target"] == "arm64"
    assert found["method"] in ("minmax", "percentile", "entropy")
    assert len(found["trials"]) >= 3
    chosen = [trial for trial in found["trials"]
              if (trial["method"], trial["kept"]) == (found["method"], found["kept"])]  # fmt: skip
    assert chosen[-1]["passed"]
    assert chosen[-1]["agreement"] >= 0.9
    assert not list(reduced.glob("trial*"))
    assert manifest.artefacts[0].reduction == {}


def test_the_bundle_proves_itself_and_is_verified_against_the_checkpoint(reduced: Path, tiny_run: Path) -> None:
    found = self_test(reduced)
    assert found.passed, found.text()
    assert verify(reduced, against=tiny_run).passed
    assert self_test(reduced / "model.int8.onnx").passed, "the lone file too"


def test_the_encoder_opens_what_is_asked_for(reduced: Path, fashion: Path) -> None:
    images = sorted(fashion.rglob("*.png"))[:6]
    exact, small = Encoder(reduced)(images), Encoder(reduced, precision="int8")(images)
    assert np.array_equal(exact, Encoder(reduced, prefer="accuracy")(images))
    difference = np.linalg.norm(small - exact) / np.linalg.norm(exact)
    assert 1e-5 < difference < 0.3
    with pytest.raises(BundleError, match=r"has no bf16 file that Encoder opens; it has model\.onnx \(onnx fp32\)"):
        Encoder(reduced, precision="bf16")
    with pytest.raises(UsageError, match="prefer is 'size'"):
        Encoder(reduced, prefer="size")  # type: ignore[arg-type]


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A margin below float32's own rounding, which no reduced file reaches, however fast it happens to be."""
    monkeypatch.setattr("byol_deploy.pipeline.publishing.Goal", lambda agreement: Goal(agreement, 1e-9))


@pytest.mark.usefixtures("out_of_reach")
def test_a_goal_out_of_reach_publishes_nothing(tiny_run: Path, tmp_path: Path, fashion: Path) -> None:
    said: list[str] = []
    with pytest.raises(ParityError, match=r"model\.int8\.onnx: int8 cannot reach the goal.*--agreement"):
        export(tiny_run, precisions=["int8"], data=fashion, out=tmp_path / "out", say=said.append)
    assert not (tmp_path / "out").exists()
    assert any("below the goal" in line for line in said), "the trade is shown"


def test_calibration_that_says_nothing_is_refused(tiny_run: Path, tmp_path: Path, fashion: Path) -> None:
    few, alike, out = tmp_path / "few", tmp_path / "alike", tmp_path / "out"
    for folder in (few, alike):
        folder.mkdir()
    for place, path in enumerate(sorted(fashion.rglob("*.png"))[:5]):
        shutil.copy(path, few / f"{place}.png")
    for place in range(30):
        Image.fromarray(np.full((28, 28), 90, np.uint8) + np.eye(28, k=place, dtype=np.uint8)).save(
            alike / f"{place}.png"
        )
    with pytest.raises(DataError, match="holds 5 different images; calibration takes 16"):
        export(tiny_run, precisions=["int8"], calibration=few, out=out)
    with pytest.raises(DataError, match="are all alike"):
        export(tiny_run, precisions=["int8"], calibration=alike, out=out)
    lone = tmp_path / "lone.ckpt"
    shutil.copy(tiny_run / "checkpoints" / "last.ckpt", lone)
    with pytest.raises(DataError, match=r"no images to calibrate with.*--calibration"):
        export(lone, precisions=["int8"], out=out)
    assert not out.exists()


def test_precisions_and_targets_that_do_not_exist(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chosen format writes int4: onnx has fp32, fp16, int8"):
        export(tiny_run, precisions=["int4"], out=tmp_path / "out")
    with pytest.raises(UsageError, match="target 'mips' does not exist"):
        export(tiny_run, precisions=["int8"], target="mips", out=tmp_path / "out")
    with pytest.raises(UsageError, match="too small to decide; give 5 s or more"):
        export(tiny_run, tune_s=0.5, out=tmp_path / "out")


@pytest.fixture(scope="module")
def tuned(tiny_run: Path, fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("tuned") / "bundle"
    return export(tiny_run, formats=["onnx", "openvino"], precisions=["bf16"], tune_s=15, agreement=0.9, data=fashion,
                  out=out).path  # fmt: skip


def test_tuning_chooses_by_measurement_and_says_on_what(tuned: Path) -> None:
    manifest = Bundle.open(tuned).manifest
    assert manifest.tuned is not None
    evidence = manifest.tuned.evidence
    assert evidence["machine"]["cores"]
    assert list(evidence["batches"]) == ["1", "8"]
    one, eight = ({row["name"]: row["p50_ms"] for row in found["candidates"]} for found in evidence["batches"].values())
    assert len(one) >= 2 * len(manifest.artefacts) - 2
    assert set(eight) <= set(one)
    best = min(eight, key=lambda name: one[name] * eight[name])
    assert best == evidence["chosen"]
    assert best.startswith(f"{manifest.tuned.file}, {manifest.tuned.threads} thread")
    assert ("waiting idly" in best) is not manifest.tuned.allow_spinning
    assert ("with fixed shapes" in best) is bool(manifest.tuned.batches)
    assert ("in 2 streams" in best) is (manifest.tuned.streams == 2)
    # What does the same at this batch is measured once: no noise decides between the two.
    streamed = [name for name in one if name.endswith("in 2 streams")]
    assert streamed or cores.usable_cores() != 2
    assert all(one[name] == one[name.removesuffix(" in 2 streams")] for name in streamed)
    assert "model.onnx, 2 threads waiting idly" in one or cores.usable_cores() != 2
    assert all(found["control"]["tolerance"] > 0 for found in evidence["batches"].values())


def test_a_budget_in_which_nothing_can_be_told_apart_names_one_that_suffices(tuned: Path) -> None:
    bundle = Bundle.open(tuned)
    images = np.zeros((8, 32, 32, 3), np.uint8)
    with pytest.raises(UsageError, match=r"too small to decide between \d+ candidates at batch 1; give --budget \d+"):
        tune(tuned, bundle.manifest.artefacts, images, "embedding", budget_s=0.02, say=print)


@pytest.mark.usefixtures("out_of_reach")
def test_tuning_leaves_out_what_does_not_reach_the_goal(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    said: list[str] = []
    bundle = export(tiny_run, formats=["onnx"], precisions=["int8"], tune_s=8, data=fashion,
                    out=tmp_path / "bundle", say=said.append)  # fmt: skip
    assert [item.file for item in bundle.manifest.artefacts] == ["model.onnx"]
    assert bundle.manifest.tuned is not None
    assert any(line.startswith("left out: model.int8.onnx: int8 cannot reach the goal") for line in said)
    assert {path.name for path in bundle.path.iterdir()} == {"model.onnx", "manifest.json", "golden.npz", "report.html"}


def test_tuning_leaves_out_a_format_that_fails_half_way_and_nothing_of_it_stays(
    tiny_run: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from byol_deploy.formats.openvino import FORMAT

    def broken(model: object, path: Path, carried: object, computes_in: str = "f32") -> tuple[Path, ...]:
        path.write_text("half a file")
        raise ExportError("this engine lacks the operator Mish (backbone/act1)")

    monkeypatch.setattr(FORMAT, "write", broken)
    said: list[str] = []
    bundle = export(tiny_run, formats=["onnx", "openvino"], precisions=["bf16"], tune_s=8, data=fashion,
                    out=tmp_path / "bundle", say=said.append)  # fmt: skip
    assert [item.file for item in bundle.manifest.artefacts] == ["model.onnx"]
    assert any("left out: model.openvino.xml: this engine lacks the operator Mish" in line for line in said)
    assert not list(bundle.path.glob("*openvino*"))
    with pytest.raises(ExportError, match="cannot be exported to openvino: this engine lacks the operator Mish"):
        export(tiny_run, formats=["onnx", "openvino"], data=fashion, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_precision_that_cannot_run_here_is_written_and_never_called_verified(
    program: Callable[..., object], tiny_run: Path, fashion: Path, tmp_path: Path
) -> None:
    if not formats.get("tensorrt").runs_here():
        pytest.skip("it runs here")
    bundle = export(tiny_run, formats=["onnx", "tensorrt"], precisions=["fp16"], agreement=0.9, target="arm64",
                    data=fashion, out=tmp_path / "bundle")  # fmt: skip
    found = {item.file: item for item in bundle.manifest.artefacts}
    assert list(found) == ["model.onnx", "model.fp16.onnx", "model.tensorrt.json", "model.fp16.tensorrt.json"]
    for name, item in found.items():
        assert item.parity["passed"] is not name.endswith("tensorrt.json")
        assert ("not_run" in item.parity) is name.endswith("tensorrt.json")
    assert self_test(bundle.path).file == "model.onnx"
    listed = program("verify", bundle.path, "--against", tiny_run, "--data", fashion)
    assert listed.stdout.count("NOT RUN HERE") == 2, listed.stdout  # type: ignore[attr-defined]
    assert "Traceback" not in listed.stderr  # type: ignore[attr-defined]


def as_tuned(
    tuned: Path, target: Path, file: str, threads: int = 1, allow_spinning: object = True, **further: object
) -> Path:
    """The same bundle, with this file as what tuning chose."""
    shutil.copytree(tuned, target)
    manifest = json.loads((target / "manifest.json").read_text())
    chosen = {"file": file, "threads": threads, "allow_spinning": allow_spinning, "batches": [], "streams": 1}
    manifest["tuned"] |= chosen | further
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_the_encoder_follows_the_choice_unless_told_otherwise(tuned: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = as_tuned(tuned, tmp_path / "bundle", "model.openvino.xml")
    images = sorted(fashion.rglob("*.png"))[:4]
    fast, exact = Encoder(bundle), Encoder(bundle, prefer="accuracy")
    assert (fast.provider, fast.threads) == ("CPU", 1)
    assert exact.provider == "CPUExecutionProvider"
    assert np.allclose(fast(images), exact(images), rtol=1e-3, atol=1e-4)


def test_the_encoder_waits_as_it_was_tuned_unless_told_otherwise(tuned: Path, tmp_path: Path) -> None:
    def spins(encoder: Encoder) -> str:
        options = encoder.session.get_session_options()
        return str(options.get_session_config_entry("session.intra_op.allow_spinning"))

    idle = as_tuned(tuned, tmp_path / "idle", "model.onnx", threads=2, allow_spinning=False)
    assert spins(Encoder(idle)) == "0"
    assert spins(Encoder(idle, allow_spinning=True)) == "1"
    busy = as_tuned(tuned, tmp_path / "busy", "model.onnx", threads=2)
    assert spins(Encoder(busy)) == "1"
    with pytest.raises(BundleError, match=r"tuned\.allow_spinning is 3; it must be true or false"):
        Encoder(as_tuned(tuned, tmp_path / "odd", "model.onnx", allow_spinning=3))


def test_a_file_is_run_and_tested_and_measured_with_the_shapes_that_were_tuned(tuned: Path, tmp_path: Path) -> None:
    bundle = as_tuned(tuned, tmp_path / "bundle", "model.openvino.xml", threads=2, batches=[1, 8], streams=2)
    fixed = Encoder(bundle)
    assert fixed.session.inputs[0].partial_shape[0].get_length() == 1
    assert Encoder(bundle, batches=(4,), streams=1).session.inputs[0].partial_shape[0].get_length() == 4
    assert Encoder(bundle, batches=()).session.inputs[0].partial_shape[0].is_dynamic
    found = self_test(bundle)
    assert (found.file, found.passed) == ("model.openvino.xml", True)
    options = as_chosen(RunOptions(), Bundle.open(bundle).manifest, Path("model.openvino.xml"))
    assert (options.batches, options.streams) == ((1, 8), 2)
    assert as_chosen(RunOptions(), Bundle.open(bundle).manifest, Path("model.onnx")) == RunOptions()
    served = {item.name: _Served(item.what) for item in find_items([bundle])}
    assert "options" not in served["model.onnx"].what
    served["model.openvino.xml"].open(2)
    run = served["model.openvino.xml"].opened[2]
    assert run.session.inputs[0].partial_shape[0].get_length() == 1  # type: ignore[attr-defined]
    for wrong in ({"batches": [0]}, {"batches": [5000]}, {"batches": 8}, {"streams": 0}):
        with pytest.raises(BundleError, match=rf"tuned\.{next(iter(wrong))}"):
            Encoder(as_tuned(tuned, tmp_path / str(wrong), "model.openvino.xml", **wrong))  # type: ignore[arg-type]


def test_the_self_test_needs_the_engine_that_was_tuned_for(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = as_tuned(tuned, tmp_path / "bundle", "model.openvino.xml")
    monkeypatch.setattr("byol_deploy.selftest.require_packages", refuse)
    with pytest.raises(MissingExtraError, match="openvino"):
        self_test(bundle)


def refuse(what: str, extra: str, *packages: str) -> None:
    raise MissingExtraError(what, packages[0], extra)


def test_an_engine_that_is_not_installed_is_no_silent_fallback(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = as_tuned(tuned, tmp_path / "bundle", "model.openvino.xml")
    monkeypatch.setattr("byol_deploy.formats.missing_to_run", lambda format: format.runs_with[0])
    with pytest.raises(MissingExtraError, match=r"byol-deploy\[openvino\]"):
        Encoder(bundle)


def test_a_choice_that_is_no_artefact_is_refused(tuned: Path, tmp_path: Path) -> None:
    bundle = as_tuned(tuned, tmp_path / "bundle", "other.onnx")
    with pytest.raises(BundleError, match=r"tuned\.file is 'other\.onnx'; it must be one of the artefacts"):
        Encoder(bundle)


def test_the_command_says_what_it_made(
    program: Callable[..., object], tiny_run: Path, fashion: Path, tmp_path: Path
) -> None:
    done = program("export", tiny_run, "--precision", "int8", "--target", "arm64", "--agreement", "0.9", "--data",
                   fashion, "--out", tmp_path / "out", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    document = json.loads(done.stdout)  # type: ignore[attr-defined]
    assert [entry["precision"] for entry in document["artefacts"]] == ["fp32", "int8"]
    assert "calibration" in done.stderr  # type: ignore[attr-defined]
    failed = program("export", tiny_run, "--precision", "int9", "--out", tmp_path / "other")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)  # type: ignore[attr-defined]
