"""Training runs: reproducible, resumable bit for bit, nothing half-written, faults in words."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import byol_deploy.training.callbacks as callbacks
from byol_deploy.errors import (
    CheckpointError,
    DataError,
    OutputError,
    ProviderError,
    RecipeError,
    UsageError,
)
from byol_deploy.recipe import Recipe
from byol_deploy.training.callbacks import COLUMNS, RunCheckpoints, WholeCheckpointIO, read_checkpoint
from byol_deploy.training.fit import fit
from byol_deploy.training.trainer import choose_precision


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 of the garments, one of them in colour, and a broken file."""
    root = tmp_path_factory.mktemp("images")
    for number, path in enumerate(sorted(fashion.rglob("*.png"))[::8]):
        image = Image.open(path)
        (image.convert("RGB").quantize(4) if number == 7 else image).save(root / f"{number:02d}.png")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(root / "red.png")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


def small(**changes: object) -> Recipe:
    """Four epochs of three steps."""
    return Recipe().updated(
        {
            "model.backbone": "timm/test_resnet",
            "model.projection_hidden": 32,
            "model.projection_size": 16,
            "data.image_size": 32,
            "train.epochs": 4,
            "train.batch_size": 16,
            "train.precision": "32",
            "train.checkpoint_every_epochs": 2,
            "train.log_every_steps": 2,
            **changes,
        }
    )


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without its two columns that come from a clock."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{key: row[key] for key in COLUMNS[:-2]} for row in csv.DictReader(file)]


def assert_equal_states(one: Path, two: Path) -> None:
    """Weights, optimiser, schedule and counters equal bit for bit."""
    first, second = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (one, two))
    assert first["global_step"] == second["global_step"]
    assert list(first["state_dict"]) == list(second["state_dict"])
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    for mine, theirs in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for key, state in mine["state"].items():
            for name, value in state.items():
                other = theirs["state"][key][name]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert first["lr_schedulers"] == second["lr_schedulers"]
    assert first["byol_target_updates"] == second["byol_target_updates"]


@pytest.fixture(scope="module")
def whole_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(images, small(), out=run, progress=False)
    return run


def test_a_run_directory_has_everything(images, whole_run) -> None:
    assert {path.name for path in whole_run.iterdir()} >= {
        "recipe.yaml",
        "metrics.csv",
        "views.png",
        "images.tsv",
        "bad_images.txt",
        "checkpoints",
    }
    assert {path.name for path in (whole_run / "checkpoints").iterdir()} == {
        "last.ckpt",
        "epoch=002.ckpt",
        "epoch=004.ckpt",
    }
    assert Recipe.load(whole_run / "recipe.yaml") == small().resolved()
    assert "broken.png" in (whole_run / "bad_images.txt").read_text()
    written = rows(whole_run)
    assert [int(row["step"]) for row in written] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert all(float(row["loss"]) < 1 for row in written)
    assert float(written[0]["tau"]) >= 0.99
    assert 0 < float(written[-1]["lr"]) < float(written[1]["lr"])
    assert float(written[-1]["projection_std"]) > 0.1  # measured at steps 2, 4, 6, ...
    with Image.open(whole_run / "views.png") as sheet:
        assert sheet.size == (8 * 100 + 4, 2 * 100 + 4)


def test_a_checkpoint_is_plain_data_with_what_rebuilds_the_model(whole_run) -> None:
    entry = read_checkpoint(whole_run / "checkpoints/epoch=002.ckpt")["byol_deploy"]
    assert entry["schema"] == 1
    assert entry["epochs_done"] == 2
    assert Recipe.from_dict(entry["recipe"]) == small().resolved()
    assert entry["preprocessing"] == small().preprocessing().to_dict()
    assert entry["data"]["images"] == 51
    assert entry["data"]["channels"] == 3


def test_the_target_moved_once_per_optimiser_step(whole_run) -> None:
    assert read_checkpoint(whole_run / "checkpoints/last.ckpt")["byol_target_updates"] == 12


def test_same_seed_same_numbers_whatever_the_loader(images, whole_run, tmp_path) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = small(**{"data.cache_mb": 0, "data.workers": 1})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*")  # Python 3.12 on loader processes
        fit(images, again, out=tmp_path / "again", progress=False)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state was lent"
    assert_equal_states(whole_run, tmp_path / "again")
    assert rows(whole_run) == rows(tmp_path / "again")


def test_another_seed_other_numbers(images, whole_run, tmp_path) -> None:
    fit(images, small(**{"train.seed": 1}), out=tmp_path / "other", progress=False)
    assert rows(whole_run)[0]["loss"] != rows(tmp_path / "other")[0]["loss"]


@pytest.mark.parametrize("changes", [{}, {"optim.name": "adamw", "train.accumulate": 2, "train.precision": "bf16"}])
def test_resumed_equals_uninterrupted(images, whole_run, tmp_path, monkeypatch, changes) -> None:
    recipe = small(**changes)
    reference = whole_run
    if changes:
        reference = tmp_path / "reference"
        fit(images, recipe, out=reference, progress=False)
    save = RunCheckpoints.on_train_epoch_end

    def stop_after_two(self: RunCheckpoints, trainer, pl_module) -> None:
        save(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunCheckpoints, "on_train_epoch_end", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fit(images, recipe, out=tmp_path / "run", progress=False)
    monkeypatch.setattr(RunCheckpoints, "on_train_epoch_end", save)
    result = fit(images, out=tmp_path / "run", resume=True, progress=False)
    assert (result.resumed_epochs, result.epochs) == (2, 4)
    assert_equal_states(reference, tmp_path / "run")
    assert rows(reference) == rows(tmp_path / "run")


def test_killed_in_the_middle_of_an_epoch(images, whole_run, tmp_path) -> None:
    """SIGKILL, as the out-of-memory killer does it; the next run continues as if nothing had happened."""
    run = tmp_path / "run"
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from byol_deploy.training import callbacks, fit\n"
        "from byol_deploy.recipe import Recipe\n"
        "old = callbacks.Metrics.on_train_batch_end\n"
        "def slow(self, trainer, *args):\n"
        "    old(self, trainer, *args)\n"
        "    if trainer.global_step == 8:\n"
        "        print('now', flush=True)\n"
        "        time.sleep(60)\n"
        "callbacks.Metrics.on_train_batch_end = slow\n"
        "fit.fit(sys.argv[1], Recipe.load(sys.argv[2]), out=sys.argv[3], progress=False)\n"
    )
    small().save(tmp_path / "recipe.yaml")
    arguments = [str(images), str(tmp_path / "recipe.yaml"), str(run)]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 6
    # What a kill during writing leaves: half a row, and a temporary file beside the checkpoint.
    with (run / "metrics.csv").open("a") as file:
        file.write("9,3,-0.")
    (run / "checkpoints/.last.ckpt.partial-1").write_bytes(b"half")
    fit(images, out=run, resume=True, progress=False)
    assert_equal_states(whole_run, run)
    assert rows(whole_run) == rows(run)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_without_a_checkpoint_starts_again(images, whole_run, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    small().resolved().save(run / "recipe.yaml")
    fit(images, out=run, resume=True)
    said = capsys.readouterr()
    assert "no checkpoint yet: starting from the beginning" in said.err
    assert said.out == ""
    assert_equal_states(whole_run, run)
    # What was said on the way.
    for part in ("51 colour", "1 bad image", "3 an epoch, 12 in all", "timm/test_resnet", "epoch 4/4", "images/s"):
        assert part in said.err
    assert "Lightning" not in said.err
    assert "GPU" not in said.err


def test_a_complete_run_says_so(images, whole_run, capsys) -> None:
    before = (whole_run / "checkpoints/last.ckpt").stat()
    result = fit(images, small(), out=whole_run, resume=True)
    assert "complete: 4 of 4 epochs" in capsys.readouterr().err
    assert (result.epochs, result.steps) == (4, 12)
    assert (whole_run / "checkpoints/last.ckpt").stat().st_mtime_ns == before.st_mtime_ns


def test_nothing_is_overwritten(images, whole_run, tmp_path) -> None:
    with pytest.raises(OutputError, match=r"not empty.*or add --resume"):
        fit(images, small(), out=whole_run, progress=False)
    (tmp_path / "mine.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"not empty|not a run"):
            fit(images, small(), out=tmp_path, resume=resume, progress=False)
    with pytest.raises(OutputError, match="is a file"):
        fit(images, small(), out=tmp_path / "mine.txt", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_contradicts_the_run_is_refused_with_both_values(images, whole_run) -> None:
    changed = small(**{"train.epochs": 8, "optim.lr": 0.5, "data.workers": 0})
    with pytest.raises(UsageError) as caught:
        fit(images, changed, out=whole_run, resume=True, progress=False)
    assert "optim.lr is 0.12 in the run, 0.5 was asked for" in str(caught.value)
    assert "train.epochs is 4 in the run, 8 was asked for" in str(caught.value)
    assert "workers" not in str(caught.value)
    with pytest.raises(UsageError, match="--resume needs --out"):
        fit(images, resume=True)


def test_changed_images_are_refused_on_resume(images, whole_run, tmp_path) -> None:
    other = tmp_path / "images"
    other.mkdir()
    for path in sorted(images.glob("*.png"))[1:]:
        (other / path.name).write_bytes(path.read_bytes())
    (other / "new.png").write_bytes((images / "00.png").read_bytes())
    with pytest.raises(DataError, match=r"1 added \(new\.png\); 1 gone or no longer readable \(00\.png\)"):
        fit(other, out=whole_run, resume=True, progress=False)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, None])
def test_a_damaged_checkpoint_is_refused(images, tmp_path, content) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    small().resolved().save(run / "recipe.yaml")
    last = run / "checkpoints/last.ckpt"
    last.mkdir() if content is None else last.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        fit(images, out=run, resume=True, progress=False)


def test_foreign_and_dangerous_checkpoints_are_refused(tmp_path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of byol-deploy"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    torch.save({"byol_deploy": {}, "code": os.system}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "code.ckpt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    target = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"a": torch.ones(3)}, target)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full; free some space"):
        WholeCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, target)
    monkeypatch.undo()
    assert torch.equal(torch.load(target, weights_only=True)["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fills_up(tmp_path) -> None:
    """With a real limit on file sizes, in a process of its own, since it cannot be raised again."""
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX matter")
    assert resource
    script = (
        "import resource, sys, torch\n"
        "from byol_deploy.training.callbacks import WholeCheckpointIO\n"
        "from byol_deploy.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    WholeCheckpointIO().save_checkpoint({'a': torch.ones(100_000)}, sys.argv[1])\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "last.ckpt")], capture_output=True, text=True, timeout=60
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_diverging_training_stops_in_words_and_keeps_the_checkpoint(images, tmp_path) -> None:
    recipe = small(**{"optim.lr": 1e30, "optim.lr_scaling": False, "optim.weight_decay": 1.0})
    with pytest.raises(RecipeError, match=r"lower optim\.lr"):
        fit(images, recipe, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_a_collapse_is_said_in_words(images, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(callbacks, "COLLAPSED_STD", 100.0)
    fit(images, small(**{"train.epochs": 1}), out=tmp_path / "run")
    assert "warning: after epoch 1 the projections of different images hardly differ" in capsys.readouterr().err


def test_an_unreadable_image_during_training_is_named(images, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "images"
    copy.mkdir()
    for path in sorted(images.glob("*.png"))[:20]:
        (copy / path.name).write_bytes(path.read_bytes())
    start = callbacks.Metrics.on_train_start

    def lose(self, trainer, pl_module) -> None:
        start(self, trainer, pl_module)
        for path in copy.iterdir():
            path.unlink()

    monkeypatch.setattr(callbacks.Metrics, "on_train_start", lose)
    with pytest.raises(DataError, match=r"\.png.*it could be read when training started"):
        fit(copy, small(**{"data.cache_mb": 0}), out=tmp_path / "run", progress=False)


def test_a_tiny_folder_trains_with_a_reduced_batch(images, tmp_path, capsys) -> None:
    few = tmp_path / "images"
    few.mkdir()
    for path in sorted(images.glob("0*.png"))[:5]:
        (few / path.name).write_bytes(path.read_bytes())
    result = fit(few, small(**{"train.epochs": 1}), out=tmp_path / "run")
    assert (result.images, result.steps) == (5, 1)
    assert "train.batch_size 16 is more than the 5 images allow; reduced to 5" in capsys.readouterr().err


def test_devices_that_are_not_there(images, tmp_path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ProviderError, match="accelerator=cuda"):
            fit(images, small(), out=tmp_path / "a", accelerator="cuda", progress=False)
    with pytest.raises(ProviderError, match="strategy=nonsense"):
        fit(images, small(), out=tmp_path / "b", strategy="nonsense", progress=False)


def test_unknown_backbones_are_a_usage_error(images, tmp_path) -> None:
    with pytest.raises(UsageError, match="resnet19"):
        fit(images, small(**{"model.backbone": "resnet19"}), out=tmp_path / "run", progress=False)


def test_precision_says_why() -> None:
    assert choose_precision("32") == ("32", "as asked")
    assert choose_precision("bf16") == ("bf16", "as asked")
    value, why = choose_precision("auto", "cpu")
    assert (value == "bf16") == ("no bfloat16" not in why)


def test_two_processes_share_an_epoch(images, tmp_path) -> None:
    """Two CPU processes through Lightning's launcher: one run directory, each process its own images."""
    run = tmp_path / "run"
    recipe = small(**{"train.epochs": 1, "train.batch_size": 8})
    recipe.save(tmp_path / "recipe.yaml")
    command = [str(Path(sys.executable).with_name("byol-deploy")), "train", str(images)]
    command += ["--recipe", str(tmp_path / "recipe.yaml")]
    command += ["--out", str(run), "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "batch 16 (8 x 2 devices)" in done.stderr
    assert [int(row["step"]) for row in rows(run)] == [2, 3]
    assert time.perf_counter() - start < 120
