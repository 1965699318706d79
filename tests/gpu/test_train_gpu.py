"""Training on a CUDA GPU: bfloat16 steps, the same views as on the CPU, and resuming across devices."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from byol_deploy.recipe import Recipe
from byol_deploy.training.augment import apply_view, draw_views
from byol_deploy.training.callbacks import RunCheckpoints, read_checkpoint
from byol_deploy.training.fit import fit
from byol_deploy.training.trainer import choose_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no CUDA GPU here"),
]


def small(**changes: object) -> Recipe:
    """Four epochs of six steps on the 400 garments."""
    return Recipe().updated(
        {
            "model.backbone": "timm/test_resnet",
            "model.projection_hidden": 64,
            "model.projection_size": 32,
            "data.image_size": 32,
            "train.epochs": 4,
            "train.batch_size": 64,
            "train.log_every_steps": 2,
            **changes,
        }
    )


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_bf16_steps_on_cuda(fashion, tmp_path) -> None:
    result = fit(fashion, small(**{"train.precision": "bf16"}), out=tmp_path / "run", devices=1, progress=False)
    assert result.device == "cuda:0"
    assert result.precision == "bf16"
    assert result.steps == 24
    found = losses(tmp_path / "run")
    assert all(math.isfinite(loss) for loss in found)
    assert found[-1] < found[0]
    checkpoint = read_checkpoint(result.checkpoint)
    assert checkpoint["byol_target_updates"] == 24
    state = checkpoint["state_dict"]
    assert all(value.dtype != torch.bfloat16 for value in state.values()), "weights and target stay float32"
    moved = [
        not torch.equal(value, state[name.replace("backbone.", "backbone_momentum.", 1)])
        for name, value in state.items()
        if name.startswith("backbone.") and name.endswith("weight")
    ]
    assert any(moved)


def test_auto_precision_on_cuda_says_why() -> None:
    value, why = choose_precision("auto", "auto")
    assert (value == "bf16") == torch.cuda.is_bf16_supported(including_emulation=False)
    assert "GPU" in why


def test_float32_on_cuda_starts_like_the_cpu(fashion, tmp_path) -> None:
    """Same draws and same initial weights: the first losses agree up to arithmetic (TF32 convolutions included)."""
    recipe = small(**{"train.precision": "32", "train.epochs": 1})
    for name in ("cpu", "cuda"):
        fit(fashion, recipe, out=tmp_path / name, accelerator=name, devices=1, progress=False)
    assert losses(tmp_path / "cuda")[0] == pytest.approx(losses(tmp_path / "cpu")[0], abs=0.02)


def test_views_on_cuda_are_those_of_the_cpu() -> None:
    recipe = Recipe().updated({"data.image_size": 64, "augment.view1.rotation_degrees": 20}).resolved()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), np.uint8))
    draws, _ = draw_views(recipe.augment, seed=0, epoch=0, indices=range(32), sizes=np.full((32, 2), 64.0))
    mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    view = recipe.augment.view1
    here = apply_view(pixels, draws, view, mean, std)
    there = apply_view(pixels.cuda(), draws, view, mean.cuda(), std.cuda())
    assert there.device.type == "cuda"
    # Hue is discontinuous where two channels are equal: a few pixels may differ by more than arithmetic.
    assert ((there.cpu() - here).abs() < 1e-4).float().mean() > 0.999


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_resume_on_another_device(fashion, tmp_path, monkeypatch, first, second) -> None:
    recipe = small(**{"train.precision": "auto", "optim.name": "adamw", "optim.lr": 1e-3})
    save = RunCheckpoints.on_train_epoch_end

    def stop_after_two(self: RunCheckpoints, trainer, pl_module) -> None:
        save(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    monkeypatch.setattr(RunCheckpoints, "on_train_epoch_end", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fit(fashion, recipe, out=run, accelerator=first, devices=1, progress=False)
    monkeypatch.setattr(RunCheckpoints, "on_train_epoch_end", save)
    result = fit(fashion, out=run, resume=True, accelerator=second, devices=1, progress=False)
    assert result.device.startswith(second)
    assert (result.resumed_epochs, result.epochs, result.steps) == (2, 4, 24)
    found = losses(run)
    assert all(math.isfinite(loss) for loss in found)
    # Continued, not started again: far below where an untrained network begins.
    assert found[len(found) // 2] < found[0]
    checkpoint = read_checkpoint(result.checkpoint)
    assert all(value.device.type == "cpu" for value in checkpoint["state_dict"].values())
