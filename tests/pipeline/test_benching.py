"""Bench: real files in processes of their own; what fails is red, what is missing is told, and the control is honest.

No test looks at an absolute time, nor asks that one engine is faster than another.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from untrained import write_checkpoint

from byol_deploy import formats
from byol_deploy.bench import CandidateFailed
from byol_deploy.bundle import Bundle, carry, seal_artefact
from byol_deploy.errors import BundleError, DataError, MissingError, OutputError, UsageError
from byol_deploy.parity import FidelityLimit, Limit
from byol_deploy.pipeline.benching import SpeedReport, bench
from byol_deploy.pipeline.benching import sessions as benching_sessions
from byol_deploy.pipeline.benching.fidelity import Anchor, against_checkpoint
from byol_deploy.pipeline.benching.processes import Worker, empty_process_bytes
from byol_deploy.pipeline.benching.rows import Fidelity
from byol_deploy.pipeline.reference import ImageSet, Reference

QUICK: dict[str, Any] = {"batches": (1,), "threads": (1,), "starts": 1, "rounds": 6, "budget_s": 20.0}


def changed(bundle: Path, path: Path, by: float = 0.1) -> Path:
    """An ONNX file that subtracts another mean than it was exported with."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.onnx")
    tensor = next(item for item in model.graph.initializer if item.name == "preprocessing.shift")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(by), tensor.name))
    onnx.save(model, path)
    return path


def onnx_worker(bundle: Path, **more: Any) -> Worker:
    what = {"format": "onnx", "path": str(bundle / "model.onnx"), "imports": ["onnxruntime"]}
    return Worker(what, **more)


@pytest.fixture(scope="module")
def measured(bundle: Path) -> SpeedReport:
    return bench([bundle], batches=(1, 4), threads=(1,), starts=2, rounds=6, budget_s=20.0)


def test_a_row_for_each_file_and_batch_with_everything_in_it(measured: SpeedReport, bundle: Path) -> None:
    assert [(row.name, row.threads, row.batch) for row in measured.rows] == [
        ("model.onnx", 1, 1), ("model.torchscript.pt", 1, 1), ("model.onnx", 1, 4), ("model.torchscript.pt", 1, 4),
    ]  # fmt: skip
    sizes = {entry.file: entry.bytes for entry in Bundle.open(bundle).manifest.artefacts}
    for row in measured.rows:
        assert row.status == "passed", row.fidelity.reason
        assert row.calls >= 6
        assert row.p50_ms is not None
        assert row.p90_ms is not None
        assert 0 < row.p50_ms <= row.p90_ms
        assert row.images_per_s == pytest.approx(1000 * row.batch / row.p50_ms)
        assert row.base == "model.onnx"
        assert row.cold is not None
        assert row.cold.starts == 2
        assert min(row.cold.start_ms, row.cold.import_ms, row.cold.load_ms, row.cold.first_ms) > 0
        assert measured.empty_bytes is not None
        assert row.peak_bytes is not None
        assert row.peak_bytes > 2 * measured.empty_bytes
        assert row.file_bytes == sizes[row.name]
        assert row.fidelity.rel_l2 is not None
        assert row.fidelity.rel_l2 < 1e-4
        assert row.fidelity.margin is not None
        assert row.fidelity.cosine_min is not None
        assert "golden cases" in row.fidelity.against
    onnx, torchscript = measured.rows[:2]
    assert onnx.engine.startswith("onnxruntime ")
    assert onnx.ratio == 1.0
    assert torchscript.ratio_low is not None
    assert torchscript.ratio is not None
    assert torchscript.ratio_high is not None
    assert torchscript.ratio_low <= torchscript.ratio <= torchscript.ratio_high
    assert torchscript.peak_bytes is not None
    assert onnx.peak_bytes is not None
    assert torchscript.peak_bytes > onnx.peak_bytes  # PyTorch is in one of them


def test_memory_is_that_of_the_file_and_not_of_the_process_that_asks(measured: SpeedReport) -> None:
    """A child's ru_maxrss begins at its parent's: here several hundred megabytes, with PyTorch loaded."""
    import torch  # noqa: F401

    assert empty_process_bytes() == pytest.approx(measured.empty_bytes, rel=0.3)
    assert (empty_process_bytes() or 0) < 60e6


def test_the_control_is_reported_and_decides(measured: SpeedReport) -> None:
    control = measured.control
    assert control is not None
    assert control.name == "model.onnx (1 thread, batch 1)"
    assert control.low <= control.ratio <= control.high
    assert measured.reliable == (abs(control.ratio - 1) <= 0.03)
    document = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert document["reliable"] is measured.reliable
    assert document["control"]["tolerance"] == 0.03
    assert document["rounds"] >= 6
    off = replace(measured, control=replace(control, ratio=1.2))
    assert off.to_dict()["reliable"] is False
    assert "1.200 times its own time" in off.text()


def test_the_table(measured: SpeedReport) -> None:
    lines = measured.table(colour=True).splitlines()
    assert len(lines) == 1 + len(measured.rows)
    assert "\x1b" not in measured.table(colour=True)  # nothing failed
    assert lines[1].startswith("model.onnx")
    assert lines[1].endswith("PASS")
    failed = replace(measured.rows[0], fidelity=Fidelity("failed", "it drifts"))
    report = replace(measured, rows=(failed, *measured.rows[1:]))
    red = report.table(colour=True).splitlines()
    assert red[1].startswith("\x1b[31mmodel.onnx")
    assert "\x1b" not in "".join(red[2:])
    assert "model.onnx: FAIL: it drifts" in report.text()
    assert not report.passed


def test_a_file_that_computes_something_else_is_red_whatever_its_speed(bundle: Path, tmp_path: Path) -> None:
    found = bench([bundle / "model.onnx", changed(bundle, tmp_path / "wrong.onnx")], **QUICK)
    good, bad = found.rows
    assert (good.status, bad.status) == ("passed", "failed")
    assert "it is not the file that was exported" in bad.fidelity.reason
    assert "above the limit" in bad.fidelity.reason
    assert bad.fidelity.rel_l2 is not None
    assert bad.fidelity.rel_l2 > 1e-3
    assert bad.p50_ms is not None  # it is measured all the same
    assert not found.passed


def test_against_the_checkpoint_with_pytorch_beside(
    bundle: Path, checkpoint: Path, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes a minute; here it is the row that says why it was given up.
    monkeypatch.setattr(benching_sessions, "COMPILE_PATIENCE_S", 0.2)
    wrong = changed(bundle, tmp_path / "wrong.onnx", by=0.01)
    found = bench([bundle, wrong], against=checkpoint, data=fashion, **{**QUICK, "budget_s": 40.0})
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["PyTorch eager", "torch.compile", "TorchScript", "model.onnx", "model.torchscript.pt",
                          "wrong.onnx"]  # fmt: skip
    assert rows["torch.compile"].status == "not run"
    assert rows["torch.compile"].not_run == "it gave no answer within 0.2 s"
    for name in ("PyTorch eager", "TorchScript", "model.onnx", "model.torchscript.pt"):
        row = rows[name]
        assert row.status == "passed", row.fidelity.reason
        assert row.fidelity.against == "the checkpoint on 128 real images"
        assert row.fidelity.neighbours is not None
        assert row.fidelity.neighbours.value > 0.95
        assert row.base == "PyTorch eager"
    assert rows["PyTorch eager"].ratio == 1.0
    assert rows["PyTorch eager"].baseline
    assert rows["PyTorch eager"].file_bytes is None
    assert rows["wrong.onnx"].status == "failed"
    assert found.control is not None
    assert found.control.name.startswith("model.onnx")  # a file, not PyTorch
    assert found.images.startswith("128 of the folder")


@pytest.mark.slow
def test_torch_compile_is_measured_and_compared(bundle: Path, checkpoint: Path) -> None:
    found = bench([bundle / "model.onnx"], against=checkpoint, **{**QUICK, "budget_s": 60.0})
    row = next(row for row in found.rows if row.name == "torch.compile")
    if row.not_run:
        pytest.skip(f"no C++ compiler that works: {row.not_run}")
    assert row.status == "passed", row.fidelity.reason
    assert row.cold is not None
    assert row.cold.starts == 1
    assert row.fidelity.rel_l2 is not None
    assert row.fidelity.rel_l2 > 0  # compiled code rounds otherwise: it is not eager under another name


def test_a_file_of_another_checkpoint_fails_and_says_so(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching_sessions, "COMPILE_PATIENCE_S", 0.2)
    other = write_checkpoint(tmp_path / "other.ckpt", seed=1)
    found = bench([bundle / "model.onnx"], against=other, **{**QUICK, "budget_s": 40.0})
    row = next(row for row in found.rows if row.name == "model.onnx")
    assert row.status == "failed"
    assert "exported from another checkpoint" in row.fidelity.reason
    assert next(row for row in found.rows if row.name == "PyTorch eager").status == "passed"


def test_an_engine_that_is_not_installed_is_a_row_with_the_command(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = bench([bundle], **QUICK)
    rows = {row.name: row for row in found.rows}
    assert rows["model.onnx"].status == "passed"
    absent = rows["model.torchscript.pt"]
    assert absent.status == "not run"
    assert absent.not_run == "torch is not installed; run: pip install 'byol-deploy[train]'"
    assert absent.p50_ms is None
    assert "not run: torch is not installed" in found.text()
    with pytest.raises(MissingError, match="nothing can be measured here"):
        bench([bundle / "model.torchscript.pt"], **QUICK)


def test_two_bundles_with_files_of_the_same_name(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    shutil.copytree(bundle, other)
    found = bench([bundle / "model.onnx", other / "model.onnx", bundle / "model.onnx"], **QUICK)
    assert [row.name for row in found.rows] == ["bundle/model.onnx", "copy/model.onnx"]


def test_reduced_precision_is_compared_with_the_float32_file_on_many_images(
    bundle: Path, fashion: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.training.checkpoints import load_checkpoint

    opened = Bundle.open(bundle)
    manifest, onnx = opened.manifest, formats.get("onnx")
    graph = EncoderGraph(load_checkpoint(checkpoint).model, manifest.preprocessing)
    path = tmp_path / "rounded.onnx"
    signature = formats.Signature(manifest.preprocessing.size_px, graph.outputs)
    onnx.export(graph, signature, path, carry(manifest, opened.golden, sealed=True))
    seal_artefact(path, onnx, "fp16", {})
    found = bench([path, bundle / "model.onnx"], data=fashion, **QUICK)
    half, full = found.rows
    assert (half.name, half.precision) == ("rounded.onnx", "fp16")
    assert half.status == full.status == "passed", half.fidelity.reason
    assert half.fidelity.against == "model.onnx on 128 real images"
    assert half.fidelity.neighbours is not None
    assert half.fidelity.neighbours.value > 0.95
    assert "golden cases" in full.fidelity.against
    assert "golden cases" in bench([path], **QUICK).rows[0].fidelity.against  # nothing in float32 beside it


# The judges, on made numbers.


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)


def image_set(name: str, n: int, *, different: bool = True) -> ImageSet:
    images = np.zeros((n, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    limits = {"embedding": Limit(1e-5, 0.999, 1e-6, apart=None if name == "many" else 0.6)}
    return ImageSet(name, images, {"embedding": vectors(256)[:n]}, limits, different)


def made_reference(n: int = 128, fault: str = "") -> Reference:
    sets = [image_set("real images", 16), image_set("awkward images", 5, different=False), image_set("many", n)]
    return Reference(*sets, [], [], sets[0], "made", None, (), fault)  # type: ignore[arg-type]


def gives(noise: float, n: int = 256) -> Any:
    table = vectors(n) + noise * vectors(n, 1)
    return lambda images: {"embedding": table[images[:, 0, 0, 0].astype(int)].astype(np.float32)}


def test_judged_by_the_limits_of_its_precision() -> None:
    reference = made_reference()

    def status(noise: float, precision: str) -> str:
        found = against_checkpoint(reference, ["embedding"], gives(noise), precision, (1, 7))
        assert set(found) == {1, 7}
        assert found[1].status == found[7].status
        return found[1].status

    assert status(0.0, "fp32") == "passed"
    assert status(0.01, "fp32") == "failed"
    assert status(0.01, "int8") == "passed"
    assert status(1.0, "int8") == "failed"


def test_a_reference_that_says_nothing_makes_no_row_green() -> None:
    faulty = against_checkpoint(made_reference(fault="it gives other numbers"), ["embedding"], gives(0), "fp32", (1,))
    assert (faulty[1].status, faulty[1].reason) == ("not compared", "it gives other numbers")
    few = against_checkpoint(made_reference(20), ["embedding"], gives(0.001), "int8", (1,))
    assert few[1].status == "not compared"
    assert "needs 50 images" in few[1].reason
    alike = made_reference()
    alike.crowd.expected["embedding"] = np.ones((128, 16), np.float32)
    assert against_checkpoint(alike, ["embedding"], gives(0), "fp32", (1,))[1].status == "not compared"


def test_a_file_that_gives_nan_or_raises_fails() -> None:
    def nan(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"embedding": np.full((len(images), 16), np.nan, np.float32)}

    def raises(images: np.ndarray) -> dict[str, np.ndarray]:
        raise CandidateFailed("its process was ended by signal 11")

    for run, words in ((nan, "NaN or infinite"), (raises, "signal 11")):
        found = against_checkpoint(made_reference(), ["embedding"], run, "fp32", (1,))[1]
        assert found.status == "failed"
        assert words in found.reason
        assert found.rel_l2 is None


def test_a_batch_size_that_goes_wrong_fails_alone() -> None:
    right = gives(0)

    def mixed_up(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = right(images)
        return {"embedding": outputs["embedding"][::-1]} if len(images) == 3 else outputs

    found = against_checkpoint(made_reference(), ["embedding"], mixed_up, "fp32", (1, 3, 8))
    assert {batch: one.status for batch, one in found.items()} == {1: "passed", 3: "failed", 8: "passed"}
    assert "batch 3" in found[3].reason


def test_many_images_do_not_make_good_what_the_golden_cases_found() -> None:
    anchor = Anchor("model.onnx", image_set("x", 128).images, {"embedding": vectors(256)[:128]})
    known = {1: Fidelity("passed"), 8: Fidelity("failed", "a golden case drifts")}
    found = anchor.judge(gives(0.001), (1, 8), known)
    assert (found[1].status, found[1].against) == ("passed", "model.onnx on 128 real images")
    assert (found[8].status, found[8].reason) == ("failed", "a golden case drifts")
    assert anchor.judge(gives(2.0), (1,), {1: Fidelity("passed")})[1].status == "failed"
    few = Anchor("model.onnx", image_set("x", 20).images, {"embedding": vectors(256)[:20]})
    assert few.judge(gives(0.001), (1,), {1: Fidelity("passed")})[1].status == "not compared"
    assert FidelityLimit().agreement is not None  # which is why twenty are too few


# Processes.


def test_what_an_engine_prints_does_not_disturb_the_pipe(bundle: Path) -> None:
    what = {"format": "onnx", "path": str(bundle / "model.onnx"), "imports": ["this", "onnxruntime"]}
    images = Bundle.open(bundle).golden.images
    with Worker(what) as worker:
        assert worker.open(1) > 0
        outputs = worker.run(1, images)
    expected = formats.get("onnx").load(bundle / "model.onnx", formats.RunOptions(threads=1))(images)
    assert {name: array.tobytes() for name, array in outputs.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_what_goes_wrong_in_a_process_is_told(bundle: Path, tmp_path: Path) -> None:
    with onnx_worker(bundle) as worker:
        worker.open(1)
        with pytest.raises(CandidateFailed, match="Invalid rank"):
            worker.run(1, np.zeros((4, 4), np.uint8))
        worker.keep(Bundle.open(bundle).golden.images)
        assert len(worker.block(1, 2, 3)) == 3  # it goes on
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(CandidateFailed, match=r"its process was ended by signal 9"):
            worker.block(1, 2, 3)
        with pytest.raises(CandidateFailed):
            worker.open(1)
    with pytest.raises(CandidateFailed, match="No module named 'no_such_engine'"):
        Worker({"format": "onnx", "path": "x", "imports": ["no_such_engine"]})
    with pytest.raises(CandidateFailed, match=r"no answer within 0.05 s"):
        onnx_worker(bundle, patience_s=0.05)
    (tmp_path / "cut.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:2000])
    cut = {"format": "onnx", "path": str(tmp_path / "cut.onnx"), "imports": ["onnxruntime"]}
    with Worker(cut) as worker, pytest.raises(CandidateFailed, match=r"not an ONNX file"):
        worker.open(1)


def test_a_process_that_ends_by_itself_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine_that_exits.py").write_text("import os, sys\nsys.stderr.write('out of luck\\n')\nos._exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CandidateFailed, match="its process ended with code 3: out of luck"):
        Worker({"format": "onnx", "path": "x", "imports": ["engine_that_exits"]})


def test_a_file_that_dies_while_it_is_measured_is_a_row_that_says_so(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, whole, doomed = Worker.__init__, Worker.block, []

    def remember(self: Worker, what: Any, **more: Any) -> None:
        begin(self, what, **more)
        doomed.extend([self] if what.get("format") == "torchscript" else [])

    def block(self: Worker, threads: int, batch: int, calls: int) -> list[float]:
        if self in doomed:
            self._process.kill()
            self._process.wait()
        return whole(self, threads, batch, calls)

    monkeypatch.setattr(Worker, "__init__", remember)
    monkeypatch.setattr(Worker, "block", block)
    found = bench([bundle], **QUICK)
    rows = {row.name: row for row in found.rows}
    assert rows["model.onnx"].status == "passed"
    assert rows["model.torchscript.pt"].status == "not run"
    assert "ended by signal 9" in rows["model.torchscript.pt"].not_run


# Bad input.


def test_bad_input(bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for paths, changes, error, words in (
        ([], {}, UsageError, "nothing to measure"),
        ([bundle], {"batches": (0,)}, UsageError, "a batch size is 0"),
        ([bundle], {"batches": (4096,)}, UsageError, "from 1 to 1024"),
        ([bundle], {"batches": ()}, UsageError, "at least one batch size"),
        ([bundle], {"threads": (0,)}, UsageError, "a number of threads is 0"),
        ([bundle], {"threads": (10_000,)}, UsageError, "this process may use"),
        ([bundle], {"starts": 0}, UsageError, "use 1 or more"),
        ([bundle], {"rounds": 2}, UsageError, "6 or more"),
        ([bundle], {"budget_s": 0.0}, UsageError, "above 0"),
        ([bundle], {"budget_s": 0.02}, UsageError, "too small to decide"),
        ([bundle], {"plot": tmp_path / "plot.pdf"}, UsageError, "name it .svg or .png"),
        ([bundle], {"report": empty}, OutputError, "is a folder"),
        ([empty], {}, BundleError, "not a bundle"),
        ([tmp_path / "absent"], {}, BundleError, "does not exist"),
        ([tmp_path / "notes.txt"], {}, BundleError, "neither a bundle nor a file"),
        ([bundle], {"data": empty}, DataError, "no image"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            bench(paths, **{**QUICK, **changes})


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("byol_deploy.errors.find_spec", lambda name: None if name == "jinja2" else object())
    for place in ({"report": tmp_path / "r.html"}, {"plot": tmp_path / "p.svg"}):
        with pytest.raises(MissingError, match="jinja2"):
            bench([bundle], **QUICK, **place)


def test_too_little_memory_is_told_before_the_disk_is_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"total_bytes": 10**8, "available_bytes": 10**8, "limit_bytes": None}
    monkeypatch.setattr(benching_sessions, "memory", lambda: small)
    with pytest.raises(UsageError, match=r"3 processes at once need about .* and 0.1 GB are free"):
        bench([bundle], **QUICK)


def test_the_parent_imports_no_engine() -> None:
    import subprocess

    code = "import sys, byol_deploy.pipeline.benching; print([m for m in ('torch', 'openvino') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
