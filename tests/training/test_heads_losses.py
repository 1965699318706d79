"""The heads' shape and the loss against NumPy and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from byol_deploy.training.heads import MLP, byol_mlp
from byol_deploy.training.losses import NegativeCosineSimilarity


def test_mlp_layout() -> None:
    mlp = byol_mlp(12, 16, 8)
    assert [type(layer) for layer in mlp] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert set(mlp.state_dict()) >= {"0.weight", "0.bias", "1.running_mean", "3.weight", "3.bias"}
    assert mlp(torch.randn(4, 12)).shape == (4, 8)
    assert mlp[1].momentum == 0.1
    assert mlp[1].eps == 1e-5


def test_mlp_against_numpy() -> None:
    torch.manual_seed(0)
    mlp = byol_mlp(6, 10, 4).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    w = {key: value.numpy() for key, value in mlp.state_dict().items()}
    h = x.numpy() @ w["0.weight"].T + w["0.bias"]
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * w["1.weight"] + w["1.bias"]
    expected = np.maximum(h, 0) @ w["3.weight"].T + w["3.bias"]
    np.testing.assert_allclose(mlp(x).detach().numpy(), expected, rtol=1e-10)


def test_mlp_options() -> None:
    mlp = MLP([4, 5, 6, 2], nn.LeakyReLU, None, nn.Tanh(), 0.3)
    names = [type(layer).__name__ for layer in mlp]
    assert names == ["Linear", "LeakyReLU", "Linear", "LeakyReLU", "Linear", "Tanh"]
    assert mlp[1].negative_slope == 0.3
    assert [type(layer) for layer in MLP([4, 2])] == [nn.Linear]


def test_mlp_refuses() -> None:
    for sizes in ([], [3], [3, 0], [3, -1], [3, 2.5]):
        with pytest.raises(ValueError, match="layer_sizes is"):
            MLP(sizes)
    with pytest.raises(ValueError, match="intermediate_ops has 1 entries; pass 2"):
        MLP([3, 4, 5], intermediate_ops=[None])


def test_loss_against_numpy_and_torch() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 17)), rng.normal(size=(9, 17))
    expected = -np.mean((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))
    x, y = torch.tensor(a), torch.tensor(b)
    loss = NegativeCosineSimilarity()
    assert loss(x, y).item() == pytest.approx(expected, abs=1e-6)
    assert loss(x, y).item() == pytest.approx(-torch.cosine_similarity(x, y, dim=1, eps=1e-8).mean().item(), abs=1e-6)
    assert loss(x, 3 * x).item() == pytest.approx(-1, abs=1e-6)
    assert loss(x, -x).item() == pytest.approx(1, abs=1e-6)
    assert NegativeCosineSimilarity(dim=0)(x, y).item() == pytest.approx(
        -torch.cosine_similarity(x, y, dim=0).mean().item(), abs=1e-6
    )
    assert not list(loss.state_dict())


def test_loss_of_zero_vectors_is_finite_and_differentiable() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    loss = NegativeCosineSimilarity()(x, torch.ones(2, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(x.grad).all()


def test_loss_is_float32_under_autocast_and_for_bfloat16() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    y = x + 0.02 * torch.randn(64, 32)
    loss = NegativeCosineSimilarity()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(x, y)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(x, y))
    assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32
