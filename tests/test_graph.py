"""The encoder graph against the model it is made from, and that making it changes nothing there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from byol_deploy.bundle import parameter_hash
from byol_deploy.errors import UsageError
from byol_deploy.graph import OUTPUTS, EncoderGraph, choose_outputs
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL

PREPROCESSING = Preprocessing(32, mean=(0.3, 0.4, 0.5), std=(0.2, 0.25, 0.3))


def trained(name: str = "timm/test_resnet") -> BYOL:
    torch.manual_seed(0)
    model = BYOL(build_backbone(name), projection_hidden=32, projection_size=16)
    with torch.no_grad():
        for parameter in model.backbone_momentum.parameters():
            parameter.mul_(1.5)
        for _ in range(3):
            model.train()(torch.randn(8, 3, 32, 32))
    return model


def images(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def test_it_gives_what_the_online_branch_gives() -> None:
    model = trained().eval()
    got = EncoderGraph(model, PREPROCESSING).run(images(), batch_size=5)
    x = torch.from_numpy(PREPROCESSING.normalize(images()))
    # Close and not equal: the graph's images are channels-last in memory, for which PyTorch may take other kernels.
    close = {"rtol": 1e-4, "atol": 1e-6}
    with torch.no_grad():
        assert np.allclose(got["embedding"], model.embed(x).numpy(), **close)
        assert np.allclose(got["prediction"], model(x).numpy(), **close)
        assert np.allclose(got["projection"], model.online()(x)[1].numpy(), **close)
        assert not np.allclose(got["projection"], model.forward_momentum(x).numpy(), rtol=1e-2)


def test_the_model_stays_as_it_was() -> None:
    model = trained()
    model.train()
    model.backbone.conv1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()

    graph = EncoderGraph(model, PREPROCESSING)
    graph.run(images())
    graph.doubled().run(images())

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module.training for module in graph.modules())
    assert not any(parameter.requires_grad for parameter in graph.parameters())
    assert not {id(p) for p in graph.parameters()} & {id(p) for p in model.parameters()}


def test_a_low_precision_model_becomes_float32() -> None:
    model = trained().to(torch.bfloat16)
    graph = EncoderGraph(model, PREPROCESSING)
    assert {parameter.dtype for parameter in graph.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_momentum_branch_cannot_be_reached() -> None:
    model = trained()
    graph = EncoderGraph(model, PREPROCESSING)
    momentum = {parameter.data_ptr() for parameter in model.backbone_momentum.parameters()}
    momentum |= {parameter.data_ptr() for parameter in model.projection_head_momentum.parameters()}
    assert not any("momentum" in name for name in graph.state_dict())
    assert not momentum & {tensor.data_ptr() for tensor in graph.state_dict().values()}


@pytest.mark.parametrize(
    ("outputs", "heads"),
    [
        (["embedding"], set()),
        (["projection"], {"projection_head"}),
        (["prediction", "embedding"], {"projection_head", "prediction_head"}),
    ],
)
def test_heads_that_no_output_needs_are_left_out(outputs: list[str], heads: set[str]) -> None:
    model = trained()
    graph = EncoderGraph(model, PREPROCESSING, outputs)
    whole = EncoderGraph(model, PREPROCESSING).run(images())
    got = graph.run(images())
    assert list(got) == [name for name in OUTPUTS if name in outputs]
    assert all(np.allclose(got[name], whole[name], rtol=1e-4, atol=1e-6) for name in got)
    assert {name.split(".")[0] for name in graph.tensors()} == {"backbone", *heads}


@pytest.mark.parametrize("outputs", [[], ["embeding"], ["embedding", "loss"]])
def test_an_unknown_output_is_named(outputs: list[str]) -> None:
    with pytest.raises(UsageError, match="choose from embedding, projection, prediction"):
        choose_outputs(outputs)


def test_the_hash_is_that_of_the_online_tensors_and_moves_with_each() -> None:
    model = trained()
    graph = EncoderGraph(model, PREPROCESSING)
    online = {
        key: value.numpy()
        for key, value in model.state_dict().items()
        if key.startswith(("backbone.", "projection_head.", "prediction_head.")) and "num_batches" not in key
    }
    assert graph.parameter_hash() == parameter_hash(online)
    with torch.no_grad():
        model.backbone_momentum.conv1[0].weight.add_(1)
        assert EncoderGraph(model, PREPROCESSING).parameter_hash() == graph.parameter_hash()
        model.backbone.bn1.running_mean[0] += 1e-6
        assert EncoderGraph(model, PREPROCESSING).parameter_hash() != graph.parameter_hash()


def test_float64_is_the_same_model_with_less_noise() -> None:
    graph = EncoderGraph(trained(), PREPROCESSING)
    single, double = graph.run(images()), graph.doubled().run(images())
    assert {values.dtype for values in double.values()} == {np.dtype(np.float64)}
    error = np.abs(single["prediction"] - double["prediction"]).max() / np.abs(double["prediction"]).max()
    assert 0 < error < 1e-5


def test_ones_own_head_on_ones_own_backbone() -> None:
    backbone = torch.nn.Conv2d(3, 6, 3)
    head = torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(1), torch.nn.Linear(6, 4))
    model = BYOL(backbone, projection_head=head, prediction_head=torch.nn.Linear(4, 4)).eval()
    got = EncoderGraph(model, PREPROCESSING).run(images())
    with torch.no_grad():
        assert np.allclose(got["prediction"], model(torch.from_numpy(PREPROCESSING.normalize(images()))).numpy())


def test_read_only_images_are_taken() -> None:
    frozen = images()
    frozen.flags.writeable = False
    graph = EncoderGraph(trained(), PREPROCESSING)
    np.testing.assert_array_equal(graph.run(frozen)["embedding"], graph.run(images())["embedding"])
