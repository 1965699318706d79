"""Shared by the tests of the pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 different colour images of 48 x 40 px."""
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for number in range(60):
        small = random.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC).save(root / f"{number:02d}.png")
    return root
