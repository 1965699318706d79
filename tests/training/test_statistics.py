"""The batch-norm check: silent on statistics that fit, and plain about each way in which they do not."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from byol_deploy.graph import EncoderGraph
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL
from byol_deploy.training.checkpoints import load_checkpoint
from byol_deploy.training.statistics import StatisticsReport, batch_norm_check

PREPROCESSING = Preprocessing(32, mean=(0.29, 0.29, 0.29), std=(0.35, 0.35, 0.35))
CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """(400, 32, 32, 3) uint8, classes mixed."""
    pairs = runpy.run_path(str(CONFTEST))["garments"](40)
    order = np.random.default_rng(0).permutation(len(pairs))
    return PREPROCESSING.batch([pairs[place][1] for place in order])


def settle(model: BYOL, images: np.ndarray, steps: int = 60) -> None:
    """Let the running statistics follow the weights, as the last steps of a training do."""
    x = torch.from_numpy(PREPROCESSING.normalize(images))
    draw = torch.Generator().manual_seed(1)
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            batch = x[torch.randint(len(x), (64,), generator=draw)]
            model(batch)
            model.forward_momentum(batch)


@pytest.fixture(scope="module")
def model(photographs: np.ndarray) -> BYOL:
    """Online statistics of the first 200 photographs; the target has gone another way, as when training diverges."""
    torch.manual_seed(0)
    made = BYOL(build_backbone("timm/test_resnet"), projection_hidden=64, projection_size=16)
    with torch.no_grad():
        for parameter in made.backbone_momentum.parameters():
            parameter.mul_(2.0)
    settle(made, photographs[:200])
    return made.eval()


@pytest.fixture
def graph(model: BYOL) -> EncoderGraph:
    return EncoderGraph(model, PREPROCESSING)


@pytest.fixture(scope="module")
def others(photographs: np.ndarray) -> np.ndarray:
    return photographs[200:]


def norms(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


def only_warning(report: StatisticsReport) -> str:
    (warning,) = report.warnings
    return warning


@pytest.mark.parametrize("count", [8, 16, 64, 200])
def test_statistics_that_fit_do_not_warn(graph: EncoderGraph, others: np.ndarray, count: int) -> None:
    for start in range(0, 200 - count + 1, count):
        report = batch_norm_check(graph, others[start : start + count])
        assert report.warnings == ()
        assert report.images == count
        assert {row.layer for row in report.layers} == set(norms(graph))
        assert report.layers[0].on_pixels
        assert not any(row.on_pixels for row in report.layers[1:])


def test_the_numbers_are_those_of_the_definition(graph: EncoderGraph, others: np.ndarray) -> None:
    """Against NumPy on the input of one layer in the middle, taken by hand."""
    name = "backbone.layer2.0.bn1"
    layer = norms(graph)[name]
    taken: list[np.ndarray] = []
    handle = layer.register_forward_pre_hook(lambda _, args: taken.append(args[0].double().numpy()))
    graph.run(others[:64], batch_size=64)
    handle.remove()
    x = taken[0]
    mean, variance = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)) + layer.eps
    assert layer.running_mean is not None
    assert layer.running_var is not None
    running = layer.running_var.double().numpy() + layer.eps
    each = x.mean(axis=(2, 3))
    squares = ((x - mean[:, None, None]) ** 2).mean(axis=(2, 3))
    expected = {
        "mean_shift": np.abs(mean - layer.running_mean.double().numpy()) / np.sqrt(running),
        "mean_error": each.std(axis=0, ddof=1) / 8 / np.sqrt(running),
        "log_variance": np.abs(np.log(variance / running)),
        "log_variance_error": squares.std(axis=0, ddof=1) / 8 / variance,
        "variance_ratio": variance / running,
    }
    found = next(row for row in batch_norm_check(graph, others[:64]).layers if row.layer == name)
    for key, values in expected.items():
        assert getattr(found, key) == pytest.approx(np.median(values), rel=1e-4), key


def test_the_error_is_the_spread_of_repeated_draws(graph: EncoderGraph, photographs: np.ndarray) -> None:
    """The standard error must be that of images. One of pixels would be many times smaller."""
    layer = norms(graph)["backbone.conv1.1"]
    assert layer.running_mean is not None
    reports = [batch_norm_check(graph, photographs[start : start + 40]) for start in range(0, 400, 40)]
    x = torch.from_numpy(PREPROCESSING.normalize(photographs))
    with torch.no_grad():
        means = graph.backbone.conv1[0](x).mean(dim=(2, 3)).numpy()
    spread = means.reshape(10, 40, -1).mean(axis=1).std(axis=0, ddof=1)
    assert layer.running_var is not None
    measured = float(np.median(spread / np.sqrt(layer.running_var.numpy() + layer.eps)))
    stated = float(np.mean([report.layers[0].mean_error for report in reports]))
    assert 0.5 < measured / stated < 2.0


def test_the_batch_size_does_not_matter(graph: EncoderGraph, others: np.ndarray) -> None:
    one = batch_norm_check(graph, others[:50], batch_size=50)
    other = batch_norm_check(graph, others[:50], batch_size=7)
    for first, second in zip(one.layers, other.layers, strict=True):
        assert first.mean_shift == pytest.approx(second.mean_shift, rel=1e-3, abs=1e-5)
        assert first.log_variance_error == pytest.approx(second.log_variance_error, rel=1e-3)


def test_statistics_of_new_layers_are_named(graph: EncoderGraph, others: np.ndarray) -> None:
    for layer in norms(graph).values():
        layer.reset_running_stats()
    warnings = batch_norm_check(graph, others).warnings
    assert len(warnings) == 2
    assert "17 of 17 batch-norm layers with the running statistics of a new layer" in warnings[0]
    assert "far from fresh ones on 200 images" in warnings[1]
    one = EncoderGraph(BYOL(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), PREPROCESSING, ("embedding",))
    assert "backbone.1" in batch_norm_check(one, others[:16]).warnings[0]


def test_statistics_of_a_diverged_target_are_far(model: BYOL, others: np.ndarray) -> None:
    mixed = copy.deepcopy(model)
    online, target = mixed.backbone.state_dict(), mixed.backbone_momentum.state_dict()
    mixed.backbone.load_state_dict({key: target[key] if "running" in key else online[key] for key in online})
    warning = only_warning(batch_norm_check(EncoderGraph(mixed, PREPROCESSING), others[:64]))
    assert "far from fresh ones" in warning
    assert "standard deviations, variance" in warning
    whole = copy.deepcopy(model)
    whole.backbone.load_state_dict(target)
    report = batch_norm_check(EncoderGraph(whole, PREPROCESSING, ("embedding",)), others[:64])
    assert report.warnings == ()  # the target's own statistics do fit the target's weights


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    ],
    ids=["none", "half", "imagenet", "not scaled"],
)
def test_another_normalisation_is_far_from_the_pixels_on(
    model: BYOL, others: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    wrong = EncoderGraph(model, Preprocessing(32, mean=mean, std=std))
    warning = only_warning(batch_norm_check(wrong, others[:100]))
    assert "this begins at the pixels, so check mean, std" in warning


def test_too_few_steps_are_noticed(tiny_run: Path, others: np.ndarray) -> None:
    loaded = load_checkpoint(tiny_run)
    assert loaded.preprocessing is not None
    warning = only_warning(batch_norm_check(EncoderGraph(loaded.model, loaded.preprocessing), others))
    assert "too few training steps" in warning


def test_a_layer_in_training_mode_is_named_and_stays_as_it_was(graph: EncoderGraph, others: np.ndarray) -> None:
    graph.backbone.bn1.train()
    before = copy.deepcopy(graph.state_dict())
    modes = [module.training for module in graph.modules()]
    warning = only_warning(batch_norm_check(graph, others[:32]))
    assert "1 of 17 batch-norm layers in training mode: backbone.bn1; " in warning
    assert [module.training for module in graph.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())
    assert not any(module._forward_pre_hooks for module in graph.modules())


def test_hooks_and_modes_come_back_after_an_error(graph: EncoderGraph, others: np.ndarray) -> None:
    graph.train()
    with pytest.raises(RuntimeError):
        batch_norm_check(graph, others[..., :2])
    assert all(module.training for module in graph.modules())
    assert not any(module._forward_pre_hooks for module in graph.modules())


def test_a_layer_without_running_statistics_is_named(others: np.ndarray) -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    report = batch_norm_check(EncoderGraph(BYOL(backbone), PREPROCESSING, ("embedding",)), others[:16])
    assert "1 of 1 batch-norm layers without running statistics: backbone.1; " in only_warning(report)
    assert report.layers == ()
    assert "could not be compared" in report.summary


def test_numbers_that_are_not_finite_are_named(graph: EncoderGraph, others: np.ndarray) -> None:
    with torch.no_grad():
        graph.backbone.layer3[0].conv1.weight[:] = np.nan
    report = batch_norm_check(graph, others[:16])
    assert "NaN or infinite" in only_warning(report)
    assert "backbone.layer3.0.bn1" in only_warning(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_few_or_equal_images_say_nothing(graph: EncoderGraph, others: np.ndarray) -> None:
    for images in (others[:7], np.repeat(others[:7], 5, axis=0), others[:0]):
        report = batch_norm_check(graph, images)
        assert "cannot be said" in only_warning(report)
        assert report.layers == ()


def test_a_model_without_batch_norm(others: np.ndarray) -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    for images in (others[:16], others[:2]):
        report = batch_norm_check(EncoderGraph(BYOL(backbone), PREPROCESSING, ("embedding",)), images)
        assert report.warnings == ()
        assert report.summary == "the model has no batch norm"


class Tokens(nn.Module):
    """Batch norm over rows, several of which belong to one image."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, images: torch.Tensor) -> Any:
        rows = images.float().div(255).reshape(len(images) * 256, 12)
        return self.norm(input=rows).reshape(len(images), -1)


def test_rows_of_one_image_are_not_counted_as_images(others: np.ndarray) -> None:
    model = Tokens()
    x = others[:50].astype(np.float64).reshape(50, 256, 12) / 255
    report = batch_norm_check(model, others[:50])
    assert report.layers[0].mean_error == pytest.approx(
        float(np.median(x.mean(axis=1).std(axis=0, ddof=1) / np.sqrt(50) / np.sqrt(1 + model.norm.eps))), rel=1e-4
    )


def test_to_dict_is_plain(graph: EncoderGraph, others: np.ndarray) -> None:
    report = batch_norm_check(graph, others[:16])
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["images"] == 16
    assert [row["layer"] for row in data["layers"]] == [row.layer for row in report.layers]
    # 16 images cannot bound a small variance deep inside: no number, and null in JSON.
    assert any(row["log_variance_unseen"] is None for row in data["layers"])
