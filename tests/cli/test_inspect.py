"""`byol-deploy inspect` on everything that people have lying about."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from byol_deploy.cli.inspect import _clean, _shown

from byol_deploy.bundle import Bundle, carry
from byol_deploy.errors import BundleError, MissingExtraError
from byol_deploy.inspection import inspect_path
from byol_deploy.providers import doubling_model

PROGRAM = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()"]
tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, "inspect", *map(str, words)], capture_output=True, text=True)


def test_a_bundle(whole: Path) -> None:
    shown = run(whole)
    assert shown.returncode == 0, shown.stderr
    for part in (
        "a byol-deploy bundle",
        "tests/tiny, 264 parameters, online branch",
        "images: (N, 16, 16, 3) uint8",
        "shorter side resized to 20 px (bicubic, antialiased), centre 16 x 16 px",
        "embedding (N, 8), projection (N, 4), prediction (N, 4)",
        "2 tensors of the momentum branch",
        "model.onnx",
        "passed",
        "sha256:",
    ):
        assert part in shown.stdout
    document = json.loads(run(whole, "--json").stdout)
    assert document["kind"] == "bundle"
    assert document["manifest"] == Bundle.open(whole).manifest.to_dict()


def test_a_lone_file(whole: Path) -> None:
    document = inspect_path(whole / "model.onnx")
    assert document["kind"] == "onnx"
    assert document["manifest"]["model"]["backbone"] == "tests/tiny"
    assert "3 golden cases" in document["checked"]
    assert "a byol-deploy ONNX file" in _shown(document)


def test_somebody_elses_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(doubling_model())
    document = inspect_path(tmp_path / "other.onnx")
    assert document["kind"] == "foreign onnx"
    assert document["inputs"] == [{"name": "x", "type": "tensor(float)", "shape": [1]}]
    assert document["outputs"][0]["name"] == "y"
    shown = _shown(document)
    assert "did not write" in shown
    assert "carries no byol-deploy contract" in shown
    assert "tensor(float)" in shown


def torchscript(path: Path, extra: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", "")
        for name, text in extra.items():
            archive.writestr(f"model/extra/{name}", text)
    return path


def test_torchscript_is_read_without_torch(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    opened = Bundle.open(whole)
    ours = inspect_path(torchscript(tmp_path / "ours.pt", carry(opened.manifest, opened.golden)))
    assert ours["kind"] == "torchscript"
    assert "a byol-deploy TorchScript file" in _shown(ours)
    other = inspect_path(torchscript(tmp_path / "other.pt", {}))
    assert other["kind"] == "foreign torchscript"
    assert "did not write" in _shown(other)
    # The real torch writes extra files where this looks for them: see the bundle of the exporter below.


def test_real_torchscript_and_a_real_checkpoint(tiny_bundle: Path, tiny_run: Path) -> None:
    file = next(tiny_bundle.glob("*.pt"))
    assert inspect_path(file)["manifest"]["outputs"] == Bundle.open(tiny_bundle).manifest.to_dict()["outputs"]
    for path in (tiny_run, tiny_run / "checkpoints" / "last.ckpt"):
        document = inspect_path(path)
        assert document["kind"] == "checkpoint"
        assert document["recipe"]["model"]["backbone"] == "timm/test_resnet"
        assert document["online_tensors"] > 0
        shown = _shown(document)
        assert "a training checkpoint" in shown
        assert "momentum" in shown


def test_a_checkpoint_without_torch_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    (tmp_path / "old.pth").write_bytes(b"\x80\x02}q\x00.")
    monkeypatch.setattr("byol_deploy.inspection.find_spec", lambda _: None)
    for path in (tmp_path / "last.ckpt", tmp_path / "old.pth", tmp_path):
        with pytest.raises(MissingExtraError, match=r"is a checkpoint.*byol-deploy\[train\]"):
            inspect_path(path)


def test_what_cannot_be_inspected(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", "")
    cut = torchscript(tmp_path / "cut.pt", {"byol_deploy.manifest": "{", "byol_deploy.golden": ""})
    broken = Path(shutil.copytree(whole, tmp_path / "bundle"))
    (broken / "model.onnx").write_bytes(b"changed")
    for path, said in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "text.txt", "not an ONNX file"),
        (tmp_path / "empty.onnx", "is empty"),
        (tmp_path / "folder", "not a bundle"),
        (tmp_path / "photos.zip", "neither TorchScript nor a checkpoint"),
        (cut, "is not JSON"),
        (broken, r"model\.onnx"),
    ):
        with pytest.raises(BundleError, match=said):
            inspect_path(path)


def test_metadata_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/code/x.py", "")
        archive.writestr("model/extra/byol_deploy.manifest", b" " * 2_000_000)
    monkeypatch.setattr("byol_deploy.inspection._MAX_CARRIED", {"byol_deploy.manifest": 1000})
    with pytest.raises(BundleError, match="unpacks to more than 1000"):
        inspect_path(path)


def test_a_strangers_text_does_not_steer_the_terminal() -> None:
    assert _clean("a\x1b[2Jb\nc") == "a\\x1b[2Jb\nc"
