"""Shared by the tests of the pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from untrained import write_checkpoint

from byol_deploy import export


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 different colour images of 48 x 40 px."""
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for number in range(60):
        small = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(root / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "trained.ckpt")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both formats. Read only: copy it before you break it."""
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return export(checkpoint, formats=("onnx", "torchscript"), data=fashion, out=out).path
