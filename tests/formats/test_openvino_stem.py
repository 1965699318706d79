"""The first convolution on pixels: the same function, rounded so that real images hardly notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

openvino = pytest.importorskip("openvino")
from byol_deploy import formats  # noqa: E402
from byol_deploy.formats import Signature  # noqa: E402
from byol_deploy.formats._openvino_stem import Stem, exact_stem  # noqa: E402
from byol_deploy.formats.openvino import core, read  # noqa: E402
from byol_deploy.images import find_images  # noqa: E402
from byol_deploy.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing  # noqa: E402

SIZE = 28


class Begins(torch.nn.Module):
    """Normalisation, a convolution with a bias, and what it gives."""

    def __init__(self, convolution: torch.nn.Conv2d, std: tuple[float, float, float] = IMAGENET_STD) -> None:
        super().__init__()
        self.convolution = convolution
        self.register_buffer("scale", (1 / (255 * torch.tensor(std))).reshape(1, 3, 1, 1))
        self.register_buffer("shift", -(torch.tensor(IMAGENET_MEAN) / torch.tensor(std)).reshape(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        values = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        return (self.convolution(values).flatten(1),)


@pytest.fixture(scope="module")
def images(fashion: Path) -> np.ndarray:
    return Preprocessing(SIZE).batch(find_images(fashion)[:24])


def written(convolution: torch.nn.Conv2d, tmp_path: Path) -> Path:
    path = tmp_path / "model.openvino.xml"
    formats.get("openvino").export(Begins(convolution).eval(), Signature(SIZE, ("embedding",)), path, {})
    return path


def convolution(**options: Any) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 16, **({"kernel_size": 7, "stride": 2, "padding": 3} | options))


def run(model: Any, images: np.ndarray) -> np.ndarray:
    return np.array(core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([images])[0])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def plain(stem: Stem, path: Path) -> Any:
    """The float model with each weight of the stem rounded to the nearest value."""
    model = read(path)
    (node,) = [node for node in model.get_ordered_ops() if node.get_friendly_name() == stem.name]
    weights = np.array(node.input_value(1).get_node().data)
    step = np.abs(weights).max(axis=(1, 2, 3), keepdims=True) / 127
    rounded = openvino.opset13.constant((np.round(weights / step) * step).astype(np.float32))
    node.input(1).replace_source_output(rounded.output(0))
    return model


SHAPES = [
    {},
    {"kernel_size": 4, "stride": 4, "padding": 0},
    {"kernel_size": 3, "stride": 1, "padding": (0, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("options", SHAPES)
def test_it_is_the_same_function_and_nearer_than_rounding_each_weight(
    options: dict[str, Any], images: np.ndarray, tmp_path: Path
) -> None:
    path = written(convolution(**options), tmp_path)
    stem = exact_stem(read(path), images[:12])
    assert stem is not None
    levels = stem.weights / stem.step
    assert np.abs(levels - np.round(levels)).max() < 1e-3
    assert np.abs(levels).max() < 127.01
    model = read(path)
    stem.put_into(model)
    expected = run(read(path), images[12:])
    ours, theirs = error(run(model, images[12:]), expected), error(run(plain(stem, path), images[12:]), expected)
    assert ours < 0.01
    assert ours < 0.7 * theirs, (ours, theirs)


def test_the_border_is_padded_as_among_normalised_values(tmp_path: Path) -> None:
    path = written(convolution(), tmp_path)
    # All that is not exact is the weights' rounding, which on these images is made up for within a filter.
    even = np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in (0, 60, 124, 200, 255)])
    stem = exact_stem(read(path), even)
    assert stem is not None
    model = read(path)
    stem.put_into(model)
    expected, found = (run(item, even).reshape(5, 16, 14, 14) for item in (read(path), model))
    assert np.abs(found - expected)[:, :, 3:-3, 3:-3].max() < 0.02 * np.abs(expected).max()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_black_images_and_a_filter_of_zeros_are_no_trouble(images: np.ndarray, tmp_path: Path) -> None:
    made = convolution()
    with torch.no_grad():
        made.weight[3] = 0
    path = written(made, tmp_path)
    for given in (np.zeros((8, SIZE, SIZE, 3), np.uint8), images):
        stem = exact_stem(read(path), given)
        assert stem is not None
        assert np.isfinite(stem.weights).all()
        assert np.isfinite(stem.added).all()
        assert not stem.weights[3].any()


def test_seven_bits_where_two_products_would_overflow(images: np.ndarray, tmp_path: Path) -> None:
    stem = exact_stem(read(written(convolution(), tmp_path)), images, bits=7)
    assert stem is not None
    assert 60 < np.abs(stem.weights / stem.step).max() < 63.01


class Grey(torch.nn.Module):
    """No convolution meets the pixels."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images.permute(0, 3, 1, 2).float().mean(1).flatten(1),)


def test_a_model_that_begins_otherwise_is_left_alone(images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "model.openvino.xml"
    formats.get("openvino").export(Grey(), Signature(SIZE, ("embedding",)), path, {})
    assert exact_stem(read(path), images) is None
    assert exact_stem(read(written(convolution(bias=False), tmp_path)), images) is None
