"""LARS against a NumPy transcription of its formula; groups and schedules against what they promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from byol_deploy.errors import UsageError
from byol_deploy.training.byol import BYOL
from byol_deploy.training.optim import LARS, build_optimizer, parameter_groups, warmup_cosine, warmup_cosine_factor


def numpy_lars(
    p: np.ndarray, grads: list[np.ndarray], lr: float, momentum: float, wd: float, eta: float, adapt: bool
) -> np.ndarray:
    """The four lines of the docstring, in float64."""
    p, mu = p.astype(np.float64), np.zeros(p.shape)
    for g in grads:
        g = g + wd * p
        p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
        trust = eta * p_norm / g_norm if adapt and p_norm > 0 and g_norm > 0 else 1.0
        mu = momentum * mu + trust * g
        p = p - lr * mu
    return p


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("wd", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_against_numpy(adapt: bool, wd: float, momentum: float) -> None:
    rng = np.random.default_rng(0)
    shapes = [(5, 3), (4,), (2, 3, 3, 3), (3, 2)]
    starts = [rng.normal(size=shape) for shape in shapes]
    starts[3][:] = 0  # a zero tensor must start to move
    grads = [[rng.normal(size=shape) for shape in shapes] for _ in range(4)]
    for step in grads:
        step[1][:] = 0  # and a zero gradient must divide nothing by zero
    params = [nn.Parameter(torch.tensor(start, dtype=torch.float32)) for start in starts]
    group = {"params": params, "weight_decay": wd, "adapt": adapt}
    optimizer = LARS([group], lr=0.3, momentum=momentum, eta=0.02)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float32)
        kept = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))  # gradients are only lent
    for i, p in enumerate(params):
        expected = numpy_lars(starts[i], [step[i] for step in grads], 0.3, momentum, wd, 0.02, adapt)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=2e-5, atol=1e-6)


def test_trust_ratio_is_on_without_weight_decay() -> None:
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.tensor([[1000.0, 0.0]])
    LARS([p], lr=1.0, momentum=0.0, weight_decay=0.0, eta=0.1).step()
    torch.testing.assert_close(p.detach(), torch.tensor([[3.0 - 0.5, 4.0]]))


def test_lars_state_is_plain_and_resumes_exactly() -> None:
    def run(steps: int, optimizer: LARS, p: nn.Parameter, start: int = 0) -> None:
        for k in range(start, steps):
            p.grad = torch.full_like(p, float(k + 1))
            optimizer.step()

    p = nn.Parameter(torch.ones(3, 2))
    whole = LARS([p], lr=0.1)
    run(6, whole, p)
    q = nn.Parameter(torch.ones(3, 2))
    first = LARS([q], lr=0.1)
    run(3, first, q)
    second = LARS([q], lr=0.5)
    second.load_state_dict(first.state_dict())
    run(6, second, q, start=3)
    assert torch.equal(p, q)


def test_lars_closure_and_unused_parameter() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([used, unused], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


@pytest.mark.parametrize(
    "arguments", [{"lr": -1.0}, {"lr": math.nan}, {"momentum": 1.0}, {"weight_decay": -1e-6}, {"eta": -1.0}]
)
def test_lars_settings_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        LARS([nn.Parameter(torch.ones(1))], **arguments)


def test_parameter_groups_of_a_byol_model() -> None:
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 6, 6)), nn.ReLU()
    )
    model = BYOL(nn.Sequential(*backbone[:3]), projection_hidden=8, projection_size=8)
    groups = parameter_groups(model, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert decayed == {
        "backbone.0.weight",
        "projection_head.2.0.weight",
        "projection_head.2.3.weight",
        "prediction_head.0.weight",
        "prediction_head.3.weight",
    }
    given = [id(p) for group in groups for p in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(p) for p in model.online_parameters()}
    assert [(g["weight_decay"], g["adapt"]) for g in groups] == [(0.01, True), (0.0, False)]
    # norm parameters are exempt however many axes they have
    assert {p.shape for p in parameter_groups(backbone, 0.01)[0]["params"]} == {torch.Size([4, 3, 3, 3])}
    # no empty group
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.01)) == 1


def test_parameter_groups_of_a_transformer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in parameter_groups(model, 0.1)[0]["params"]}
    assert decayed == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    }


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("lars", LARS)])
def test_build_optimizer(name: str, kind: type) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(name, model, lr=0.1, weight_decay=0.01, momentum=0.8)
    assert type(optimizer) is kind
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert all(g["lr"] == 0.1 for g in optimizer.param_groups)
    if name != "adamw":
        assert all(g["momentum"] == 0.8 for g in optimizer.param_groups)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def test_build_optimizer_refuses() -> None:
    with pytest.raises(UsageError, match="'adam' is unknown; use sgd, adamw or lars"):
        build_optimizer("adam", nn.Linear(1, 1), lr=0.1)
    with pytest.raises(UsageError, match="no trainable parameter"):
        build_optimizer("sgd", nn.ReLU(), lr=0.1)


def test_warmup_cosine_against_numpy() -> None:
    total, warmup, lr = 20, 5, 0.4
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = warmup_cosine(optimizer, warmup_steps=warmup, total_steps=total)
    used = []
    for _ in range(total):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    k = np.arange(total)
    expected = lr * np.where(k < warmup, (k + 1) / warmup, 0.5 * (1 + np.cos(np.pi * (k - warmup) / (total - warmup))))
    np.testing.assert_allclose(used, expected, rtol=1e-12)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert scheduler.state_dict()["lr_lambdas"] == [None]  # nothing but plain data reaches a checkpoint


def test_warmup_cosine_edges() -> None:
    assert [warmup_cosine_factor(k, 0, 1) for k in (0, 1, 2)] == [1.0, 0.0, 0.0]
    assert [warmup_cosine_factor(k, 2, 2) for k in (0, 1, 2)] == [0.5, 1.0, 0.0]
    for warmup, total in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(UsageError, match="warmup_steps"):
            warmup_cosine_factor(0, warmup, total)
