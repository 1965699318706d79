"""The torch-free half in a process where importing the training side fails, whatever is installed here."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BLOCKED = ("torch", "torchvision", "timm", "lightning", "onnx", "onnxscript", "sklearn", "jinja2", "pyarrow")
PRELUDE = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")  # writes the tiny encoder; the process under test has none of it
    root = tmp_path_factory.mktemp("edge")
    runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))["write_bundle"](root / "bundle")
    (root / "images").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    return root


def run(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PRELUDE + code, *map(str, words)], capture_output=True, text=True)


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return run("from byol_deploy.cli.main import main; main()", *words)


MODULES = ("images", "preprocess", "manifest", "bundle", "atomic", "providers", "runtime", "embedding", "environment")


@pytest.mark.parametrize("module", [*MODULES, "inspection", "cli.main"])
def test_modules_import(module: str) -> None:
    shown = run(f"import byol_deploy.{module}")
    assert shown.returncode == 0, shown.stderr


def test_bundle_and_encoder(place: Path) -> None:
    shown = run(
        "from byol_deploy import Bundle, Encoder; "
        "bundle = Bundle.open(sys.argv[1] + '/bundle'); encoder = Encoder(bundle.artefact()); "
        "print(encoder([sys.argv[1] + '/images/0.png'] * 3).shape)",
        place,
    )
    assert shown.stdout.strip() == "(3, 8)", shown.stderr


def test_commands(place: Path) -> None:
    embedded = command("embed", place / "bundle", place / "images", "--out", place / "x.npy", "--json")
    assert embedded.returncode == 0, embedded.stderr
    assert json.loads(embedded.stdout)["rows"] == 5
    inspected = command("inspect", place / "bundle" / "model.onnx")
    assert "tests/tiny" in inspected.stdout, inspected.stderr
    doctor = command("doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    assert json.loads(doctor.stdout)["healthy"] is True
