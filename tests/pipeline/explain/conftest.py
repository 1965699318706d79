"""Right files of three families, and one that is damaged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import BACKBONES, FORMATS, explain, one_weight, write

from byol_deploy import formats
from byol_deploy.graph import EncoderGraph
from byol_deploy.pipeline.explain.drift import Explanation
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL


@pytest.fixture(scope="session")
def encoders(fashion: Path) -> dict[str, tuple[EncoderGraph, np.ndarray]]:
    """Per family a graph whose batch norms have seen real images, and three of these."""
    made = {}
    for family, (name, size, arguments) in BACKBONES.items():
        preprocessing = Preprocessing(size, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
        pixels = preprocessing.batch(sorted(fashion.rglob("*.png"))[::12])
        torch.manual_seed(0)
        model = BYOL(build_backbone(name, **arguments), projection_hidden=32, projection_size=16)
        seen = torch.from_numpy(preprocessing.normalize(pixels))
        with torch.no_grad():
            for _ in range(10):
                model.train()(seen)
            for parameter in model.parameters():
                if parameter.ndim == 1:  # some begin with zeros, behind which no fault shows
                    parameter.add_(0.1 * torch.randn_like(parameter))
        made[family] = (EncoderGraph(model, preprocessing), pixels[::10][:3])
    return made


@pytest.fixture(scope="session")
def files(encoders: dict[str, tuple[EncoderGraph, np.ndarray]], tmp_path_factory: Any) -> dict[tuple[str, str], Path]:
    """Per family and format the file that is right. Read only."""
    folder = tmp_path_factory.mktemp("right")
    written = {}
    for family, (graph, _) in encoders.items():
        for name in FORMATS:
            written[family, name] = write(graph, name, folder / f"{family}{formats.get(name).suffix}")
    return written


@pytest.fixture(scope="session")
def damaged(encoders: Any, tmp_path_factory: Any) -> tuple[Path, Explanation]:
    graph = copy.deepcopy(encoders["resnet"][0])
    one_weight(graph)
    path = write(graph, "onnx", tmp_path_factory.mktemp("damaged") / "model.onnx")
    return path, explain(path, encoders["resnet"])
