"""The runtime half, as a production engineer has it: no PyTorch, and an encoder that proves itself.

Runs twice: with the rest of the tests, and from tests/edge/run in an environment that holds the wheel with the
extra "edge" and nothing else. There BYOL_DEPLOY_EDGE_ONLY is set and the absence of PyTorch is asserted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import byol_deploy
from byol_deploy import Bundle, Encoder
from byol_deploy.errors import BundleError, ProviderError

ALONE = bool(os.environ.get("BYOL_DEPLOY_EDGE_ONLY"))
MODELS = Path(os.environ.get("BYOL_DEPLOY_MODELS", Path(__file__).resolve().parents[2] / "models"))
BUNDLE = MODELS / "fashion-mnist" / "bundle"
TRAINING_SIDE = ("torch", "torchvision", "timm", "lightning", "onnx", "onnxscript", "sklearn", "jinja2", "pyarrow")
# Blocks the training side wherever this runs, so that both runs test the same thing.
PROGRAM = (
    f"import sys; sys.modules.update(dict.fromkeys({TRAINING_SIDE})); from byol_deploy.cli.main import main; main()"
)


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Twelve images of the kinds a folder holds in practice, and one that is broken."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(12):
        pixels = noise.integers(0, 255, (40 + number, 60 - number, 3), dtype=np.uint8)
        mode = ("RGB", "L", "RGBA", "P")[number % 4]
        Image.fromarray(pixels).convert(mode).save(folder / f"{number:02d}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.mark.skipif(not ALONE, reason="PyTorch is installed here; tests/edge/run makes the environment without it")
def test_nothing_of_the_training_side_is_installed() -> None:
    assert [name for name in TRAINING_SIDE if importlib.util.find_spec(name)] == []
    assert "site-packages" in str(byol_deploy.__file__)


def test_encoder_embeds_a_path_an_image_an_array_and_a_list(photographs: Path) -> None:
    encoder = Encoder(BUNDLE)
    path = photographs / "00.png"
    image = Image.open(path)
    one = encoder(path)
    assert one.shape == (1, encoder.width)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(encoder(image), one)
    np.testing.assert_array_equal(encoder(np.asarray(image)), one)
    many = encoder([path, image, np.asarray(image)])
    np.testing.assert_allclose(many, np.repeat(one, 3, axis=0), rtol=1e-4, atol=1e-5)


def test_a_lone_file_embeds_as_its_bundle_does(tmp_path: Path, photographs: Path) -> None:
    lone = Path(shutil.copy(BUNDLE / "model.onnx", tmp_path / "mailed.onnx"))
    np.testing.assert_array_equal(Encoder(lone)(photographs / "01.png"), Encoder(BUNDLE)(photographs / "01.png"))


def test_a_provider_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ProviderError):
        Encoder(BUNDLE, provider="CoreMLExecutionProvider")


@pytest.mark.parametrize("target", ["bundle", "file"])
def test_verify_proves_the_encoder(target: str, tmp_path: Path) -> None:
    path = BUNDLE if target == "bundle" else Path(shutil.copy(BUNDLE / "model.onnx", tmp_path / "mailed.onnx"))
    shown = run("verify", path)
    assert shown.returncode == 0, shown.stderr
    assert "PASS" in shown.stdout
    assert json.loads(run("verify", path, "--json").stdout)["passed"] is True


def test_verify_fails_a_bundle_whose_promises_do_not_hold(tmp_path: Path) -> None:
    # Same file, other golden outputs: what a wrong model with right hashes would look like.
    from byol_deploy.bundle import golden_from_bytes, golden_to_bytes, sha256_file

    broken = tmp_path / "bundle"
    shutil.copytree(BUNDLE, broken)
    golden = golden_from_bytes((broken / "golden.npz").read_bytes())
    moved = {name: np.roll(value, 1, axis=0) for name, value in golden.outputs.items()}
    (broken / "golden.npz").write_bytes(golden_to_bytes(type(golden)(images=golden.images, outputs=moved)))
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["golden"]["sha256"] = sha256_file(broken / "golden.npz")
    (broken / "manifest.json").write_text(json.dumps(manifest))
    shown = run("verify", broken)
    assert shown.returncode == 5, shown.stdout + shown.stderr
    assert "FAIL" in shown.stdout


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    shutil.copytree(BUNDLE, broken)
    content = bytearray((broken / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Bundle.open(broken)
    assert run("verify", broken).returncode == 3


def test_a_flipped_byte_in_a_lone_file_fails(tmp_path: Path) -> None:
    content = bytearray((BUNDLE / "model.onnx").read_bytes())
    draw = np.random.default_rng(0)
    path = tmp_path / "mailed.onnx"
    path.write_bytes(content)
    assert run("verify", path).returncode == 0
    for place in draw.integers(0, len(content), 3).tolist():
        changed = content.copy()
        changed[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(changed)
        shown = run("verify", path)
        assert shown.returncode in (3, 5), f"byte {place}: {shown.stdout}{shown.stderr}"


def test_the_self_test_needs_no_network(tmp_path: Path) -> None:
    lone = shutil.copy(BUNDLE / "model.onnx", tmp_path / "mailed.onnx")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({TRAINING_SIDE})); import socket; socket.socket = None; "
        "from byol_deploy.selftest import self_test; found = self_test(sys.argv[1]); print(found.text()); "
        "sys.exit(not found.passed)"
    )
    shown = subprocess.run([sys.executable, "-c", code, lone], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.startswith("PASS")


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_embed_writes_one_row_an_image_and_counts_the_bad_one(suffix: str, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / f"x.{suffix}"
    shown = run("embed", BUNDLE, photographs, "--out", out, "--max-bad-share", "0.5", "--json")
    assert shown.returncode == 0, shown.stderr
    rows = len(np.load(out, allow_pickle=False)) if suffix == "npy" else len(out.read_text().splitlines()) - 1
    assert rows == 12
    assert "broken.png" in shown.stderr


def test_embed_to_parquet_without_pyarrow_says_what_to_install(photographs: Path, tmp_path: Path) -> None:
    shown = run("embed", BUNDLE, photographs, "--out", tmp_path / "x.parquet", "--max-bad-share", "0.5")
    assert shown.returncode == 6
    assert "byol-deploy[parquet]" in shown.stderr


def test_inspect_and_doctor_run() -> None:
    assert "embedding" in run("inspect", BUNDLE).stdout
    assert json.loads(run("inspect", BUNDLE, "--json").stdout)
    doctor = run("doctor", "--json")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert json.loads(doctor.stdout)


def test_training_says_what_is_missing(photographs: Path, tmp_path: Path) -> None:
    shown = run("train", photographs, "--out", tmp_path / "run")
    assert shown.returncode == 6
    assert "byol-deploy[train]" in shown.stderr
    assert not (tmp_path / "run").exists()
