"""`byol-deploy train` as a person types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("byol-deploy"))
SMALL = (
    "--backbone=timm/test_resnet --image-size=32 --batch-size=16 --precision=32 --seed=3 --workers=0 "
    "--set=model.projection_hidden=32 --set=model.projection_size=16"
).split()


def train(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def few(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 garments."""
    root = tmp_path_factory.mktemp("few")
    for number, path in enumerate(sorted(fashion.rglob("*.png"))[::10]):
        (root / f"{number}.PNG").write_bytes(path.read_bytes())
    return root


def test_train_kill_resume(few, tmp_path) -> None:
    """Killed as soon as there is a checkpoint, continued to the same result as a run that was left alone."""
    whole = train(few, *SMALL, "--epochs", 6, "--out", tmp_path / "whole", "--json")
    assert whole.returncode == 0, whole.stderr
    document = json.loads(whole.stdout)
    assert document["epochs"] == 6
    assert document["steps"] == 12
    assert Path(document["checkpoint"]).is_file()
    assert "precision 32 (as asked)" in whole.stderr

    run = tmp_path / "run"
    command = [PROGRAM, "train", str(few), *SMALL, "--epochs", "6", "--out", str(run)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not (run / "checkpoints/last.ckpt").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = train(few, "--out", run, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    mine, theirs = json.loads(resumed.stdout)["metrics"], document["metrics"]
    for name in ("loss", "lr", "tau", "step"):
        assert mine[name] == theirs[name]

    # The same command line again says that all is done; a longer one is another training.
    again = train(few, *SMALL, "--epochs", 6, "--out", run, "--resume")
    assert again.returncode == 0
    assert "complete: 6 of 6" in again.stderr
    assert again.stdout.strip() == str(run / "checkpoints/last.ckpt")
    longer = train(few, "--epochs", 7, "--out", run, "--resume")
    assert longer.returncode == 2
    assert "train.epochs is 6 in the run, 7 was asked for" in longer.stderr


def test_faults_are_told_together_and_first(few, tmp_path) -> None:
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
def test_bad_input(few, tmp_path, arguments, code, words) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("precious")
    done = train(*(str(few) if part == "FEW" else part for part in arguments), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "taken/file").read_text() == "precious"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(few, tmp_path) -> None:
    tmp_path.chmod(0o500)
    done = train(few, *SMALL, "--out", tmp_path / "run")
    tmp_path.chmod(0o700)
    assert done.returncode == 3
    assert "cannot be made" in done.stderr


def test_output_below_a_file(few, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    done = train(few, *SMALL, "--out", tmp_path / "file/run")
    assert done.returncode == 3
    assert "choose another --out" in done.stderr
