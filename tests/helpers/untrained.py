"""A checkpoint, untrained, in which every parameter matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from byol_deploy import Recipe
from byol_deploy.training.checkpoints import build_model

RECIPE = Recipe().with_overrides(
    [
        "model.backbone=timm/test_resnet",
        "model.projection_hidden=32",
        "model.projection_size=16",
        "data.image_size=32",
        "data.resize=36",
    ]
)


def write_checkpoint(path: Path, seed: int = 0, change: Callable[[Any], None] | None = None) -> Path:
    """A checkpoint of ours in which every parameter matters, the branches differ, and batch norm has seen images."""
    torch.manual_seed(seed)
    model = build_model(RECIPE)
    with torch.no_grad():
        # A new timm ResNet multiplies its residual branches by zero: no weight in them would matter.
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for parameter in [*model.backbone_momentum.parameters(), *model.projection_head_momentum.parameters()]:
            parameter.mul_(1.2).add_(torch.randn_like(parameter), alpha=0.02)
        for _ in range(3):
            model.train()(torch.randn(16, 3, 32, 32))
        if change is not None:
            change(model)
    entry = {
        "schema": 1,
        "version": "0.1.0",
        "recipe": RECIPE.to_dict(),
        "preprocessing": RECIPE.preprocessing().to_dict(),
    }
    torch.save({"state_dict": model.state_dict(), "byol_deploy": entry, "global_step": 12, "epoch": 3}, path)
    return path
