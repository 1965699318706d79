"""One wrong input per sentence of the promise: one clear line, the next step, the exit code, nothing lost.

The finer cases are in the tests of each part; here the program is called as a user calls it.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Refusal = Callable[..., str]


@pytest.fixture
def expect_refusal(program: Callable[..., Any]) -> Refusal:
    """Runs the program and expects a refusal."""

    def run(words: Sequence[object], exit_code: int, *said: str) -> str:
        done = program(*words)
        assert done.returncode == exit_code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("byol-deploy: "), done.stderr
        for text in said:
            assert text in done.stderr, done.stderr
        return str(done.stderr)

    return run


class Malicious:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


def test_train_on_nothing(expect_refusal: Refusal, tmp_path: Path) -> None:
    out = tmp_path / "run"
    expect_refusal(["train", tmp_path / "absent", "--out", out], 3, "does not exist")
    (tmp_path / "empty").mkdir()
    expect_refusal(["train", tmp_path / "empty", "--out", out], 3, "holds no image")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    expect_refusal(["train", tmp_path / "empty", "--out", out], 3, "holds no image")


def test_train_on_too_many_bad_images(expect_refusal: Refusal, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        Image.new("L", (40, 40), number * 50).save(data / f"{number}.png")
    (data / "zero.png").write_bytes(b"")
    (data / "truncated.png").write_bytes((data / "0.png").read_bytes()[:40])
    said = expect_refusal(["train", data, "--out", tmp_path / "run"], 3, "2 of 6")
    assert "zero.png" in said or "truncated.png" in said


@pytest.mark.parametrize(
    ("options", "exit_code", "said"),
    [
        (["--backbone", "resnet81"], 2, "resnet81"),
        (["--epochs", "0"], 3, "train.epochs is 0"),
        (["--image-size", "1"], 3, "data.image_size is 1"),
        (["--set", "optim.learning_rate=1"], 3, "optim.learning_rate"),
        (["--recipe", "defualt"], 3, "did you mean default"),
        (["--precision", "fp8"], 3, "train.precision"),
    ],
)
def test_train_with_wrong_options(
    expect_refusal: Refusal, options: list[str], exit_code: int, said: str, fashion: Path, tmp_path: Path
) -> None:
    expect_refusal(["train", fashion, "--out", tmp_path / "run", *options], exit_code, said)


def test_train_never_overwrites(expect_refusal: Refusal, fashion: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    expect_refusal(["train", fashion, "--out", tmp_path], 3, "not empty")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_export_of_what_is_no_checkpoint(expect_refusal: Refusal, fashion: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    expect_refusal(["export", tmp_path / "absent.ckpt", "--out", out], 3, "there is no checkpoint")
    expect_refusal(["export", fashion, "--out", out], 3, "directory")
    (tmp_path / "noise.ckpt").write_bytes(np.random.default_rng(0).bytes(5000))
    expect_refusal(["export", tmp_path / "noise.ckpt", "--out", out], 3, "noise.ckpt")
    target = tmp_path / "created-by-the-pickle"
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Malicious(target)}))
    expect_refusal(["export", tmp_path / "evil.ckpt", "--out", out], 3, "evil.ckpt")
    assert not target.exists()
    import torch

    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    expect_refusal(["export", tmp_path / "other.ckpt", "--out", out], 3, "other.ckpt")
    assert not out.exists()


def test_export_to_an_unknown_format_or_a_taken_place(expect_refusal: Refusal, tiny_run: Path, tmp_path: Path) -> None:
    expect_refusal(["export", tiny_run, "--format", "onxx", "--out", tmp_path / "b"], 2, "did you mean onnx")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    expect_refusal(["export", tiny_run, "--out", tmp_path / "photos"], 3, "photos")
    assert (tmp_path / "photos" / "a.txt").read_text() == "mine"


def test_verify_of_what_is_no_bundle(expect_refusal: Refusal, fashion: Path, tmp_path: Path) -> None:
    expect_refusal(["verify", tmp_path / "absent"], 3, "does not exist")
    expect_refusal(["verify", fashion], 3)
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07garbage")
    expect_refusal(["verify", tmp_path / "x.onnx"], 3, "x.onnx")


def test_verify_of_a_foreign_onnx(expect_refusal: Refusal, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "foreign", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "f.onnx")
    expect_refusal(["verify", tmp_path / "f.onnx"], 3, "f.onnx")


def test_damaged_bundles(expect_refusal: Refusal, tiny_bundle: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_bundle, tmp_path / name))

    changed = copy("changed")
    content = bytearray((changed / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (changed / "model.onnx").write_bytes(content)
    expect_refusal(["verify", changed], 3, "model.onnx")

    leaving, newer = copy("leaving"), copy("newer")
    for folder, change in ((leaving, None), (newer, 99)):
        manifest = json.loads((folder / "manifest.json").read_text())
        if change is None:
            manifest["artefacts"][0]["file"] = "../../secret.onnx"
        else:
            manifest |= {"schema": change, "readable_from": "9.1.0"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    expect_refusal(["verify", leaving], 3, "secret.onnx")
    expect_refusal(["verify", newer], 3, "9.1.0")


def test_embed_keeps_what_is_there(expect_refusal: Refusal, tiny_bundle: Path, fashion: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    out.write_bytes(b"precious")
    expect_refusal(["embed", tiny_bundle, fashion, "--out", out], 3, "x.npy")
    assert out.read_bytes() == b"precious"
    expect_refusal(["embed", tiny_bundle, fashion, "--out", tmp_path / "x.xlsx"], 2, ".npy")
    expect_refusal(["embed", tiny_bundle, fashion, "--out", tmp_path / "y.npy", "--provider", "cuda0"], 2, "cuda0")


def test_a_provider_that_cannot_work_here(
    expect_refusal: Refusal, tiny_bundle: Path, fashion: Path, tmp_path: Path
) -> None:
    from byol_deploy.providers import probe_provider

    works, _ = probe_provider("cuda")
    if works:
        pytest.skip("CUDA works here; the refusal needs a machine without it")
    expect_refusal(["embed", tiny_bundle, fashion, "--out", tmp_path / "x.npy", "--provider", "cuda"], 6)
    assert not (tmp_path / "x.npy").exists()


def test_a_full_disk_leaves_nothing_half_written(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    # A real limit of the kernel on the size of written files stands in for the full disk.
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from byol_deploy.cli.main import main; main()"
    )
    call = [sys.executable, "-c", program, "export", tiny_run, "--data", fashion, "--out", tmp_path / "bundle"]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    assert done.returncode in (3, 4), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()
