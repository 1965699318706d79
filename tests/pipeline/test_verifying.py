"""Verify: the bundle and its lone files, alone and against a checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from untrained import write_checkpoint

from byol_deploy import export, verify
from byol_deploy.errors import BundleError, ProviderError


def test_verify_passes_the_bundle_and_each_lone_file(bundle: Path, tmp_path: Path) -> None:
    report = verify(bundle)
    assert report.passed
    assert [item.status for item in report.artefacts] == ["passed", "passed"]
    assert report.text().startswith("PASS")
    json.dumps(report.to_dict(), allow_nan=False)
    for name in ("model.onnx", "model.torchscript.pt"):
        lone = shutil.copy(bundle / name, tmp_path / name)
        assert verify(lone).passed


def test_verify_onnx_without_torch(bundle: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from byol_deploy import verify;"
        "report = verify(sys.argv[1]); print(report.text());"
        "assert report.passed and [a.status for a in report.artefacts] == ['passed', 'not run']"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "NOT RUN HERE: torch is not installed" in done.stdout


def test_nothing_that_ran_is_not_a_pass(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    got = export(checkpoint, formats=["torchscript"], outputs=["embedding"], out=tmp_path / "bundle")
    code = (
        "import sys; sys.modules['torch'] = None; from byol_deploy import verify;"
        "report = verify(sys.argv[1]); print(report.passed)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(got.path)], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_verify_against_its_checkpoint_and_against_another(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    mine = verify(bundle, against=checkpoint)
    assert mine.passed, mine.text()
    other = verify(bundle, against=write_checkpoint(tmp_path / "other.ckpt", seed=1))
    assert not other.passed
    assert "the hash differs" in other.text()
    assert [item.status for item in other.artefacts] == ["failed", "failed"]
    # The same weights and another contract: only what reaches the weights has changed.
    changed = torch.load(checkpoint, weights_only=True)
    changed["byol_deploy"]["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    torch.save(changed, tmp_path / "mean.ckpt")
    stale = verify(bundle / "model.onnx", against=tmp_path / "mean.ckpt")
    assert [check.passed for check in stale.checks] == [True, False]
    assert not stale.passed


def test_a_changed_weight_in_a_lone_file_fails(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.onnx")
    tensor = next(item for item in model.graph.initializer if item.name == "backbone.layer2.0.conv1.weight")
    weights = numpy_helper.to_array(tensor).copy()
    weights[0, 0, 0, 0] += 0.05
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    assert not verify(tmp_path / "model.onnx").passed
    report = verify(tmp_path / "model.onnx", against=checkpoint)
    assert "backbone.layer2.0.conv1.weight has other values" in report.text()


def test_what_cannot_be_verified_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        verify(tmp_path / "absent.onnx")
    (tmp_path / "model.bin").write_bytes(b"1234")
    with pytest.raises(BundleError, match="neither a bundle"):
        verify(tmp_path / "model.bin")
    import onnx

    foreign = onnx.load(bundle / "model.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(BundleError, match="not a byol-deploy file"):
        verify(tmp_path / "foreign.onnx")
    if not torch.cuda.is_available():
        with pytest.raises(ProviderError):
            verify(bundle, provider="cuda")
