"""`byol-deploy train` as a person types it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = [
    "--backbone=timm/test_resnet",
    "--image-size=32",
    "--batch-size=16",
    "--precision=32",
    "--seed=3",
    "--workers=0",
    "--set=model.projection_hidden=32",
    "--set=model.projection_size=16",
]


@pytest.fixture
def train(program: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`byol-deploy train`, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield partial(program, "train")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 garments."""
    root = tmp_path_factory.mktemp("few")
    for number, path in enumerate(sorted(fashion.rglob("*.png"))[::10]):
        (root / f"{number}.PNG").write_bytes(path.read_bytes())
    return root


def test_train_and_again(few, tmp_path, train) -> None:
    run = tmp_path / "run"
    first = train(few, *SMALL, "--epochs", 2, "--out", run, "--json")
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    assert (document["epochs"], document["steps"], document["images"]) == (2, 4, 40)
    assert document["checkpoint"] == str(run / "checkpoints/last.ckpt")
    assert Path(document["checkpoint"]).is_file()
    assert document["metrics"]["step"] == 4
    for part in ("precision 32 (as asked)", "loader processes: 0 (as asked)", "40 grey", "saturation, hue, grey"):
        assert part in first.stderr

    # The same command line again, and none of its options: all is done. A longer one is another training.
    for options in ([*SMALL, "--epochs", 2], []):
        again = train(few, *options, "--out", run, "--resume")
        assert again.returncode == 0, again.stderr
        assert "complete: 2 of 2" in again.stderr
        assert again.stdout.strip() == str(run / "checkpoints/last.ckpt")
    longer = train(few, "--epochs", 7, "--out", run, "--resume")
    assert longer.returncode == 2
    assert "train.epochs is 2 in the run, 7 was asked for" in longer.stderr


def test_the_run_directory_has_a_name_by_default(few, tmp_path, train, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BYOL_DEPLOY_RUN_DIR", raising=False)
    done = train(few, *SMALL, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(few.name)
    assert (run / "checkpoints/last.ckpt").is_file()


def test_faults_are_told_together_and_first(few, tmp_path, train) -> None:
    run = tmp_path / "run"
    done = train(few, "--epochs", 0, "--image-size", 5, "--set", "optim.lrr=3", "--out", run, "--json")
    assert done.returncode == 3
    message = json.loads(done.stdout)["error"]["message"]
    assert "train.epochs is 0; use a whole number from 1" in message
    assert "data.image_size is 5; use a whole number from 8" in message
    assert "optim.lrr is not a key of a recipe (did you mean lr?)" in message
    assert "Traceback" not in done.stderr
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent"], 3, "does not exist"),
        (["."], 3, "no image"),
        (["FEW", "--backbone", "resnet19"], 2, "resnet19"),
        (["FEW", "--recipe", "papre"], 3, "did you mean paper?"),
        (["FEW", "--resume"], 2, "--resume needs --out"),
        (["FEW", "--out", "taken"], 3, "not empty"),
        (["FEW", "--max-bad-share", "2"], 3, "data.max_bad_share is 2.0; use a number from 0 to 1"),
    ],
)
def test_bad_input(few, tmp_path, train, monkeypatch, arguments, code, words) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("precious")
    done = train(*(str(few) if part == "FEW" else part for part in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "taken/file").read_text() == "precious"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(few, tmp_path, train) -> None:
    tmp_path.chmod(0o500)
    done = train(few, *SMALL, "--out", tmp_path / "run")
    tmp_path.chmod(0o700)
    assert done.returncode == 3
    assert "cannot be made" in done.stderr


def test_output_below_a_file(few, tmp_path, train) -> None:
    (tmp_path / "file").write_text("")
    done = train(few, *SMALL, "--out", tmp_path / "file/run")
    assert done.returncode == 3
    assert "choose another --out" in done.stderr
