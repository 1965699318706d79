"""`byol-deploy export` as a person calls it: what it prints, where it writes, how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(program: Callable[..., Any]) -> Callable[..., Any]:
    return partial(program, "export")


def test_a_run_directory_becomes_a_bundle(
    run: Callable[..., Any], tiny_run: Path, fashion: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    arguments = (tiny_run, "--format", "onnx", "--format", "torchscript", "--data", fashion, "--out", out)
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["passed"] is True
    assert document["path"] == str(out)
    assert [item["file"] for item in document["artefacts"]] == ["model.onnx", "model.torchscript.pt"]
    assert sorted(path.name for path in out.iterdir()) == [
        "golden.npz",
        "manifest.json",
        "model.onnx",
        "model.torchscript.pt",
        "report.html",
    ]
    for words in ("stripped", "sha256:", "PASS", "none of the momentum branch's", "published"):
        assert words in done.stderr
    assert "Warning" not in done.stderr


def test_for_a_person(run: Callable[..., Any], tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = run(tiny_run, "--format", "torchscript", "--outputs", "embedding, projection", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "model.torchscript.pt" in done.stdout
    assert f"published {out}" in done.stdout
    again = run(tiny_run, "--format", "torchscript", "--outputs", "embedding", "--out", out)
    assert again.returncode == 0, "a bundle is replaced when everything passed"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["RUN", "--format", "onxn"], 2, "did you mean onnx"),
        (["RUN", "--format", "onnx", "--opset", "9"], 2, "use 18 to"),
        (["RUN", "--outputs", "embedding,loss"], 2, "choose from embedding, projection, prediction"),
        (["RUN", "--image-size", "64"], 2, "--image-size"),
        (["RUN", "--format", "torchscript", "--data", "absent"], 3, "absent"),
        (["absent.ckpt"], 3, "absent.ckpt"),
        (["FILE"], 3, "FILE"),
    ],
)
def test_bad_input_is_one_sentence_and_its_code(
    run: Callable[..., Any], tiny_run: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    (tmp_path / "FILE").write_bytes(b"no checkpoint at all")
    places = {"RUN": str(tiny_run), "FILE": str(tmp_path / "FILE")}
    done = run(*(places.get(item, item) for item in arguments), "--out", tmp_path / "bundle")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()
