"""Small networks, and files of plain ``torch.onnx.export``."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE = 32


class Two(nn.Module):
    """A small network with batch norm, and two outputs of the same width."""

    def __init__(self, seed: int = 0, *, eps: float = 1e-5, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8, eps=eps)
        self.deep = nn.Conv2d(8, 16, 3, 2, 1)
        self.one, self.two = nn.Linear(16, 6), nn.Linear(16, 6)
        self.dropout = dropout
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.3, 0.3)
            self.norm.running_var.uniform_(0.2, 0.6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.deep(torch.relu(self.norm(self.conv(x)))))
        x = nn.functional.dropout(x.mean(dim=(2, 3)), self.dropout, training=self.dropout > 0)
        return self.one(x), self.two(x)


class Pixels(nn.Module):
    """(N, H, W, 3) uint8 in: the normalisation is inside."""

    def __init__(self, net: nn.Module, mean: float = 0.45, std: float = 0.22) -> None:
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, pixels: Tensor) -> Any:
        return self.net((pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Two()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one, two = self.net(x)
        return {"one": one, "two": two}


def write(
    module: nn.Module, path: Path, example: Tensor, *, batch: bool = True, sides: bool = False,
    dims: tuple[int, ...] = (2, 3), outputs: tuple[str, ...] = ("one", "two"), eval_mode: bool = True,
    trace: bool = False,
) -> Path:  # fmt: skip
    """A file of plain ``torch.onnx.export``."""
    module = copy.deepcopy(module)
    module.train(not eval_mode)
    open_dims: dict[int, Any] = {0: torch.export.Dim("batch")} if batch else {}
    if sides:
        open_dims |= {dim: torch.export.Dim(f"side{dim}", min=8, max=2048) for dim in dims}
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's about its own insides
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if trace:
            torch.onnx.export(
                module, (example,), str(path), dynamo=False, input_names=["images"], output_names=list(outputs),
                dynamic_axes={name: {0: "batch"} for name in ("images", *outputs)}, verbose=False,
                training=torch.onnx.TrainingMode.EVAL if eval_mode else torch.onnx.TrainingMode.TRAINING,
            )  # fmt: skip
        else:
            torch.onnx.export(
                module, (example,), str(path), dynamo=True, input_names=["images"], output_names=list(outputs),
                dynamic_shapes=(open_dims,) if open_dims else None, verbose=False, external_data=False,
            )  # fmt: skip
    return path


def floats(batch: int = 3, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
