"""`byol-deploy bench` as a person calls it: the table, the JSON, the files it writes, the exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--batch", "1", "--threads", "1", "--starts", "1", "--repeats", "6", "--budget", "20")


@pytest.fixture
def run(program: Callable[..., Any]) -> Callable[..., Any]:
    return partial(program, "bench")


def test_a_bundle(run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    report, plot = tmp_path / "speed.html", tmp_path / "speed.svg"
    done = run(tiny_bundle, *QUICK, "--report", report, "--plot", plot)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("file")
    assert lines[1].startswith("model.onnx")
    assert lines[1].endswith("PASS")
    assert lines[2].startswith("model.torchscript.pt")
    assert "A/A control: model.onnx (1 thread, batch 1), opened twice" in done.stdout
    assert "\x1b" not in done.stdout  # nobody at a terminal reads this
    assert "measuring 3 rows side by side" in done.stderr
    assert f"written {report}" in done.stderr
    html = report.read_text()
    assert "model.torchscript.pt" in html
    assert "control" in html
    assert plot.read_text().startswith("<?xml")


def test_json_is_one_document(run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(tiny_bundle / "model.onnx", *QUICK, "--batch", "2", "--plot", tmp_path / "speed.png", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["batch"] for row in document["rows"]] == [1, 2]
    assert isinstance(document["reliable"], bool)
    assert document["control"]["tolerance"] == 0.03
    assert document["rows"][0]["fidelity"]["status"] == "passed"
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_fails_its_comparison_ends_with_5(
    run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "model.onnx"
    model = onnx.load(tiny_bundle / "model.onnx")
    tensor = next(item for item in model.graph.initializer if item.name == "preprocessing.shift")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.1, tensor.name))
    onnx.save(model, path)
    done = run(path, *QUICK)
    assert done.returncode == 5
    assert done.stdout.splitlines()[1].endswith("FAIL")
    assert json.loads(run(path, *QUICK, "--json").stdout)["passed"] is False


def test_bad_input_is_one_sentence_and_its_code(run: Callable[..., Any], tiny_bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    with open(damaged / "model.onnx", "ab") as file:
        file.write(b"x")
    for words, code, said in (
        ((), 2, "nothing to measure"),
        ((tiny_bundle, "--batch", "0"), 2, "a batch size is 0"),
        ((tiny_bundle, "--threads", "100000"), 2, "this process may use"),
        ((tiny_bundle, "--budget", "0"), 2, "above 0"),
        ((tiny_bundle, *QUICK, "--budget", "0.01"), 2, "too small to decide"),
        ((tiny_bundle, "--plot", "plot.pdf"), 2, ".svg or .png"),
        ((tmp_path / "absent",), 3, "does not exist"),
        ((tmp_path,), 3, "not a bundle"),
        ((damaged,), 3, "was changed or cut off"),
        ((tiny_bundle, "--data", tmp_path / "no-images"), 3, "does not exist"),
        ((tiny_bundle, "--against", tmp_path / "absent.ckpt"), 3, "there is no checkpoint"),
    ):
        done = run(*words)
        assert done.returncode == code, (words, done.stderr)
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
