"""`byol-deploy verify` as a person calls it: PASS or FAIL, numbers, exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(program: Callable[..., Any]) -> Callable[..., Any]:
    return partial(program, "verify")


def test_a_bundle_passes(run: Callable[..., Any], tiny_bundle: Path) -> None:
    done = run(tiny_bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("PASS")
    assert "model.onnx (onnx): PASS" in done.stdout
    assert "model.torchscript.pt (torchscript): PASS" in done.stdout
    document = json.loads(run(tiny_bundle / "model.onnx", "--json").stdout)
    assert document["passed"] is True
    assert document["artefacts"][0]["parity"]["rows"][0]["rel_l2"] < 1e-3


def test_against_its_checkpoint(run: Callable[..., Any], tiny_bundle: Path, tiny_run: Path, fashion: Path) -> None:
    done = run(tiny_bundle, "--against", tiny_run, "--data", fashion)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parameters: PASS: both sha256:" in done.stdout


def test_a_file_that_computes_something_else_fails_with_5(
    run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "model.onnx"
    model = onnx.load(tiny_bundle / "model.onnx")
    tensor = next(item for item in model.graph.initializer if item.name == "preprocessing.shift")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.1, tensor.name))
    onnx.save(model, path)
    done = run(path)
    assert done.returncode == 5, done.stderr
    assert done.stdout.startswith("FAIL")
    assert "is above the limit" in done.stdout
    as_json = run(path, "--json")
    assert as_json.returncode == 5
    assert json.loads(as_json.stdout)["passed"] is False


def test_bad_input_is_one_sentence_and_its_code(run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_bundle, changed)
    with open(changed / "model.onnx", "r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))
    (tmp_path / "empty.onnx").write_bytes(b"")
    for path, words in ((changed, "was changed"), (tmp_path / "absent", "does not exist"), (tmp_path, "not a bundle"),
                        (tmp_path / "empty.onnx", "empty")):  # fmt: skip
        done = run(path)
        assert done.returncode == 3, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert run(tiny_bundle, "--data", tmp_path).returncode == 2
    assert run(tiny_bundle, "--threads", "0").returncode == 2
    assert run(tiny_bundle, "--provider", "nonsense").returncode == 2


def test_options_of_foreign_files_are_not_taken_in_silence(
    run: Callable[..., Any], tiny_bundle: Path, tiny_run: Path, tmp_path: Path
) -> None:
    done = run(tiny_bundle, "--against", tiny_run, "--mean", "0.5,0.5,0.5", "--image-size", "64")
    assert done.returncode == 2
    assert "--image-size and --mean is for a file from elsewhere" in done.stderr
    assert run(tiny_bundle, "--mean", "0.5").returncode == 2


def test_a_foreign_file_alone_says_what_to_compare_it_with(
    run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(tiny_bundle / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    done = run(tmp_path / "foreign.onnx")
    assert done.returncode == 3
    assert "--against module:callable" in done.stderr


def test_another_decoder_is_a_pass_with_warnings(run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    """A JPEG whose pixels are not those of the exporting machine, as another libjpeg would give them."""
    from byol_deploy.bundle import Bundle, golden_to_bytes, sha256_file

    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    golden = Bundle.open(bundle).golden
    hashes = golden.pixels_sha256 | {"progressive.jpg": "0" * 64}
    moved = type(golden)(golden.images, golden.outputs, golden.files, hashes, golden.file_outputs)
    (bundle / "golden.npz").write_bytes(golden_to_bytes(moved))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["golden"]["sha256"] = sha256_file(bundle / "golden.npz")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = run(bundle)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("PASS with warnings")
    assert "gives other pixels for progressive.jpg" in done.stdout
