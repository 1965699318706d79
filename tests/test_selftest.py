"""The self-test that travels, on a bundle that was really exported."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from byol_deploy import Bundle, Encoder
from byol_deploy.errors import BundleError
from byol_deploy.selftest import check_golden, run_in_batches, self_test


def test_bundle_and_lone_file_pass(tiny_bundle: Path, tmp_path: Path) -> None:
    lone = shutil.copy(tiny_bundle / "model.onnx", tmp_path / "renamed.onnx")
    for path in (tiny_bundle, lone):
        report = self_test(path, threads=1)
        assert report.passed, report.table()
        outputs = Bundle.open(tiny_bundle).manifest.outputs
        assert len(report.rows) == 2 * len(outputs)
        assert {row.subject.rsplit(", ", 1)[1] for row in report.rows} == {"batch 8", "batch 1"}


@pytest.mark.parametrize("factor", [1.0001, -1.0])
def test_other_numbers_fail(tiny_bundle: Path, factor: float) -> None:
    encoder = Encoder(tiny_bundle, outputs="all")
    assert check_golden(encoder.run, encoder.manifest, encoder.golden, subject="x").passed

    def drifted(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values * np.float32(factor) for name, values in encoder.run(images).items()}

    assert not check_golden(drifted, encoder.manifest, encoder.golden, subject="x").passed


def test_an_encoder_that_mixes_up_its_batch_fails(tiny_bundle: Path) -> None:
    encoder = Encoder(tiny_bundle, outputs="all")

    def mixed(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[::-1] for name, values in encoder.run(images).items()}

    report = check_golden(mixed, encoder.manifest, encoder.golden, subject="x")
    assert {row.passed for row in report.rows if row.subject.endswith("batch 8")} == {False}


def test_limits_that_limit_nothing_are_refused(tiny_bundle: Path) -> None:
    encoder = Encoder(tiny_bundle, outputs="all")
    loose = {name: {"rel_l2": 1e9, "cosine": -1.0, "noise_rel_l2": 0.0} for name in encoder.outputs}
    manifest = dataclasses.replace(encoder.manifest, limits=loose)
    with pytest.raises(BundleError, match="limits in the manifest"):
        check_golden(encoder.run, manifest, encoder.golden, subject="x")
    none = dataclasses.replace(encoder.manifest, limits={})
    assert not check_golden(encoder.run, none, encoder.golden, subject="x").passed


def test_run_in_batches_keeps_order() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    got = run_in_batches(lambda part: {"x": part.astype(np.float32).reshape(-1, 1)}, images, 2)
    assert got["x"].ravel().tolist() == [0, 1, 2, 3, 4]
