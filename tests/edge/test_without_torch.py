"""The torch-free half in a process where importing the training side fails, whatever is installed here."""

from __future__ import annotations

import json
import runpy
import shutil
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


MODULES = (
    "images",
    "preprocess",
    "manifest",
    "golden",
    "sealing",
    "bundle",
    "atomic",
    "providers",
    "runtime",
    "embedding",
    "environment",
    "host",
    "selftest",
    "formats.onnx",
    "formats.torchscript",
)


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


SELF_TEST = "from byol_deploy.selftest import self_test; found = self_test(sys.argv[1]); print(found.text()); "


def test_self_test_of_a_bundle_and_of_a_lone_file(place: Path, tmp_path: Path) -> None:
    lone = shutil.copy(place / "bundle" / "model.onnx", tmp_path / "mailed.onnx")
    for path in (place / "bundle", lone):
        shown = run(SELF_TEST + "print(sorted(n for n in sys.modules if n.startswith('onnx.')))", path)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith("PASS"), shown.stdout
        assert "content: the file that was exported" in shown.stdout
        assert shown.stdout.endswith("[]\n")


@pytest.mark.parametrize("part", ["weights", "names", "manifest", "golden cases", "seal"])
def test_a_flipped_byte_in_a_lone_file_fails(part: str, place: Path, tmp_path: Path) -> None:
    content = bytearray((place / "bundle" / "model.onnx").read_bytes())
    tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))
    marks = {
        "weights": tiny["weights"]()["conv"].tobytes()[:64],
        "names": b"projection",
        "manifest": b"tests/tiny",
        "golden cases": b"byol_deploy.golden",
        "seal": b'"threads"',
    }
    at = content.index(marks[part])
    # The packed cases lie behind their key.
    content[at + (200 if part == "golden cases" else 2)] ^= 1
    path = tmp_path / "mailed.onnx"
    path.write_bytes(content)
    shown = command("verify", path)
    assert shown.returncode in (3, 5), shown.stdout + shown.stderr
    assert "PASS" not in shown.stdout


def test_commands(place: Path) -> None:
    embedded = command("embed", place / "bundle", place / "images", "--out", place / "x.npy", "--json")
    assert embedded.returncode == 0, embedded.stderr
    assert json.loads(embedded.stdout)["rows"] == 5
    inspected = command("inspect", place / "bundle" / "model.onnx")
    assert "tests/tiny" in inspected.stdout, inspected.stderr
    doctor = command("doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    assert json.loads(doctor.stdout)["healthy"] is True
