"""BYOL against a hand-written moving average, the paper's formulas, and a real Lightning run."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from byol_deploy.errors import UsageError
from byol_deploy.training.backbones import DeepLabV3Backbone, build_backbone
from byol_deploy.training.byol import BYOL, collapse_indicators
from byol_deploy.training.losses import NegativeCosineSimilarity

SIZE = 16


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())


def small(**kwargs: Any) -> BYOL:
    torch.manual_seed(0)
    return BYOL(conv(), **{"projection_hidden": 32, "projection_size": 16, "learning_rate": 0.1, **kwargs})


def views(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 3, SIZE, SIZE, generator=generator)
    return x[0], x[1]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, n: int) -> None:
        self.x0, self.x1 = views(n)

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x0[i], self.x1[i]


def trainer(tmp_path: Path, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **{"max_epochs": 1, **kwargs},
    )


quiet_loader = pytest.mark.filterwarnings(
    # Lightning's advice on workers; these data sets are tensors in memory.
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning with a newer PyTorch
)


# ---- the reference API ----


def test_default_model_takes_256_px_and_has_the_original_keys() -> None:
    model = BYOL().eval()
    with torch.inference_mode():
        assert model(torch.randn(4, 3, 256, 256)).shape == (4, 256)
    keys = set(model.state_dict())
    for prefix in ("backbone", "backbone_momentum"):
        assert f"{prefix}.RN50model.conv1.weight" in keys
        assert f"{prefix}.RN50model.layer4.2.bn3.running_var" in keys
    for prefix in ("projection_head.2", "projection_head_momentum.2", "prediction_head"):
        assert model.state_dict()[f"{prefix}.0.weight"].shape[0] == 4096
        assert f"{prefix}.1.running_mean" in keys
        assert model.state_dict()[f"{prefix}.3.weight"].shape == (256, 4096)
    assert model.state_dict()["projection_head.2.0.weight"].shape == (4096, 2048)
    assert {key.split(".")[0] for key in keys} == {
        "backbone",
        "backbone_momentum",
        "projection_head",
        "projection_head_momentum",
        "prediction_head",
    }
    assert (model.learning_rate, model.schedule_length) == (1e-3, 90_000)
    assert isinstance(model.backbone, DeepLabV3Backbone)
    assert isinstance(model.criterion, NegativeCosineSimilarity)


def test_original_checkpoint_with_its_unused_classifier_loads_strictly() -> None:
    model = BYOL(projection_hidden=8, projection_size=8)
    state = dict(model.state_dict())
    for branch in ("backbone", "backbone_momentum"):
        state[f"{branch}.RN50model.fc.weight"] = torch.zeros(1000, 2048)
        state[f"{branch}.RN50model.fc.bias"] = torch.zeros(1000)
    model.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "backbone.RN50model.fc2.weight": torch.zeros(1)}, strict=True)


def test_momentum_branch_is_a_frozen_copy() -> None:
    model = small()
    for online, target in (
        (model.backbone, model.backbone_momentum),
        (model.projection_head, model.projection_head_momentum),
    ):
        for theta, xi in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(theta, xi)
            assert theta.data_ptr() != xi.data_ptr()
            assert theta.requires_grad
            assert not xi.requires_grad


def test_training_step_needs_no_trainer_and_is_the_symmetric_loss() -> None:
    model = small()
    x0, x1 = views()
    twin = copy.deepcopy(model)
    loss = model.training_step((x0, x1), 0)
    p0, z0 = twin(x0), twin.forward_momentum(x0)
    p1, z1 = twin(x1), twin.forward_momentum(x1)
    cos = torch.cosine_similarity
    expected = -0.5 * (cos(p0, z1).mean() + cos(p1, z0).mean())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert not z0.requires_grad
    loss.backward()
    assert all(p.grad is not None for p in model.online_parameters())
    assert all(p.grad is None for p in model.backbone_momentum.parameters())


def test_each_view_is_its_own_batch_norm_batch() -> None:
    model = small()
    seen: list[int] = []
    for module in (model.backbone[1], model.backbone_momentum[1]):
        module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    model.training_step(views(8), 0)
    assert seen == [8, 8, 8, 8]
    # and the target's statistics come from its own passes, one per view
    assert int(model.backbone_momentum[1].num_batches_tracked) == 2


def test_batch_forms() -> None:
    x0, x1 = views()
    expected = small().training_step((x0, x1), 0)
    for batch in ([x0, x1], ((x0, x1), torch.zeros(8)), [[x0, x1], "label"]):
        assert torch.equal(small().training_step(batch, 0), expected)
    for batch in (x0, (x0,), (x0, x1, x0), {"x": x0}, ((x0,), x1)):
        with pytest.raises(UsageError, match=r"must be \(x0, x1\)"):
            small().training_step(batch, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": 0}, "schedule is 0"),
        ({"schedule": "soon"}, "schedule is 'soon'"),
        ({"schedule": True}, "schedule is True"),
        ({"base_tau": 1.5}, "base_tau is 1.5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**arguments)


# ---- the schedules ----


def test_cosine_schedule_against_numpy() -> None:
    model = small()
    for max_steps, start, end in ((2, 0.9, 1.0), (10, 0.996, 1.0), (101, 1.0, 0.1)):
        steps = np.arange(max_steps)
        expected = end - (end - start) * (np.cos(np.pi * steps / (max_steps - 1)) + 1) / 2
        actual = [model.cosine_schedule(int(k), max_steps, start, end) for k in steps]
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        assert all(type(value) is float for value in actual)
        assert model.cosine_schedule(max_steps, max_steps, start, end) == end


def test_cosine_schedule_edges() -> None:
    schedule = small().cosine_schedule
    assert schedule(0, 0, 0.9, 1) == 1.0
    assert type(schedule(0, 1, 0.9, 1)) is float
    assert schedule(0, 1, 0.9, 1.0) == 1.0
    with pytest.warns(RuntimeWarning, match="past max_steps 10"):
        assert schedule(11, 10, 0.9, 1.0) == 1.0
    for step in (0, 5, 10, 15, 20, 37):
        expected = 1.0 - 0.1 * (np.cos(2 * np.pi * step / 20) + 1) / 2
        assert schedule(step, 10, 0.9, 1.0, period=20) == pytest.approx(expected, abs=1e-12)
    for arguments in ((-1, 10, 0, 1), (0, -1, 0, 1), (0, 10, 0, 1, 0), (0, 10, 0, 1, -5)):
        with pytest.raises(ValueError, match="it must be"):
            schedule(*arguments)


def test_tau_is_the_papers_formula() -> None:
    model = small(schedule=50, base_tau=0.97)
    expected = [1 - (1 - 0.97) * (np.cos(np.pi * k / 50) + 1) / 2 for k in range(51)]
    np.testing.assert_allclose([model.tau(k) for k in range(51)], expected, rtol=1e-12)
    assert model.tau(0) == pytest.approx(0.97)
    assert model.tau(50) == model.tau(1000) == 1.0


def test_auto_schedule_needs_a_trainer() -> None:
    model = small(schedule="auto")
    with pytest.raises(UsageError, match="pass a number of steps"):
        model.tau()


def test_schedule_that_ends_too_early_is_said_once() -> None:
    model = small(schedule=2)
    model.update_target()
    model.update_target()
    with pytest.warns(RuntimeWarning, match="stands still"):
        model.update_target()
    model.update_target()
    assert model.target_updates == 4


# ---- the moving average ----


def test_update_momentum_is_in_place_and_exact() -> None:
    model = small()
    online, target = conv(), conv()
    before = [p.detach().clone() for p in target.parameters()]
    objects, storage = list(target.parameters()), [p.data_ptr() for p in target.parameters()]
    buffers = [b.clone() for b in target.buffers()]
    online[1].running_mean += 1
    model.update_momentum(online, target, 0.9)
    for theta, xi, old in zip(online.parameters(), target.parameters(), before, strict=True):
        expected = 0.9 * old.double().numpy() + 0.1 * theta.detach().double().numpy()
        np.testing.assert_allclose(xi.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
    assert [id(p) for p in target.parameters()] == [id(p) for p in objects]
    assert [p.data_ptr() for p in target.parameters()] == storage
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), buffers, strict=True))
    same = [p.detach().clone() for p in target.parameters()]
    model.update_momentum(online, target, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), same, strict=True))
    model.update_momentum(online, target, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_momentum_does_not_stall_in_low_precision(dtype: torch.dtype) -> None:
    model = small()
    online, target = nn.Linear(1, 1, bias=False).to(dtype), nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(online.weight, 2.0)
    nn.init.constant_(target.weight, 1.0)
    for _ in range(500):
        model.update_momentum(online, target, 0.998)
    assert target.weight.dtype == dtype
    assert target.weight.item() == pytest.approx(2 - 0.998**500, rel=2**-8)
    nn.init.constant_(target.weight, 0.0)  # somebody else writes: the master must not bring the old value back
    model.update_momentum(online, target, 0.5)
    assert target.weight.item() == pytest.approx(1.0)


def test_hand_written_loop_with_accumulation_updates_once_per_step() -> None:
    model = small(schedule=10, base_tau=0.5)
    by_hand = copy.deepcopy(model)
    optimizer = model.configure_optimizers()
    xi = [p.detach().clone() for p in by_hand.backbone_momentum.parameters()]
    for step in range(2):
        for micro in range(2):
            model.training_step(views(seed=2 * step + micro), 0).div(2).backward()
            assert model.target_updates == step
        optimizer.step()
        optimizer.zero_grad()
        assert model.target_updates == step + 1
        tau = 1 - 0.5 * (math.cos(math.pi * step / 10) + 1) / 2
        xi = [tau * a + (1 - tau) * b.detach() for a, b in zip(xi, model.backbone.parameters(), strict=True)]
        for expected, actual in zip(xi, model.backbone_momentum.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_default_optimizer_is_plain_sgd_over_the_online_parameters() -> None:
    model = small()
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert optimizer.param_groups[0]["momentum"] == optimizer.param_groups[0]["weight_decay"] == 0
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    given = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert given == {id(p) for p in model.parameters()} - frozen


class Recorder(L.Callback):
    """Repeats the moving average by hand, from the weights after each optimiser step."""

    def __init__(self) -> None:
        self.xi: list[Tensor] = []
        self.steps: list[int] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: BYOL) -> None:
        self.xi = [p.detach().clone() for p in targets(pl_module)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: BYOL, *args: Any) -> None:
        k = len(self.steps)
        if trainer.global_step > k:
            tau = 1 - (1 - 0.9) * (math.cos(math.pi * k / 4) + 1) / 2
            self.xi = [tau * a + (1 - tau) * b.detach() for a, b in zip(self.xi, onlines(pl_module), strict=True)]
            self.steps.append(trainer.global_step)
        for expected, actual in zip(self.xi, targets(pl_module), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def targets(model: BYOL) -> list[Tensor]:
    return [*model.backbone_momentum.parameters(), *model.projection_head_momentum.parameters()]


def onlines(model: BYOL) -> list[Tensor]:
    return [*model.backbone.parameters(), *model.projection_head.parameters()]


@quiet_loader
def test_lightning_run_with_accumulation(tmp_path: Path) -> None:
    model = small(schedule="auto", base_tau=0.9)
    recorder = Recorder()
    run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[recorder], log_every_n_steps=1)
    run.fit(model, DataLoader(Pairs(32), batch_size=8))
    assert run.global_step == model.target_updates == model.total_steps == 4
    assert recorder.steps == [1, 2, 3, 4]
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert {"train_loss", "tau", "lr", "embedding_std", "projection_std", "effective_rank"} <= set(logged)
    assert logged["online_target_cosine"] == pytest.approx(-logged["train_loss"], abs=0.2)
    assert logged["lr"] == pytest.approx(0.1)
    # a Trainer that has finished is no reason to crash
    assert torch.isfinite(model.training_step(views(), 0))


@quiet_loader
def test_resumed_equals_uninterrupted_and_the_checkpoint_is_plain_data(tmp_path: Path) -> None:
    data = DataLoader(Pairs(32), batch_size=8)
    whole = small(schedule=8, base_tau=0.5)
    trainer(tmp_path, max_epochs=2).fit(whole, data)

    first = small(schedule=8, base_tau=0.5)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(first, data)
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["byol_target_updates"] == 4
    assert "hyper_parameters" not in loaded

    second = small(schedule=8, base_tau=0.5)
    trainer(tmp_path, max_epochs=2).fit(second, data, ckpt_path=path, weights_only=True)
    assert second.target_updates == whole.target_updates == 8
    for (key, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_checkpoint_of_the_reference_class_takes_up_its_global_step() -> None:
    model = small()
    model.on_load_checkpoint({"global_step": 17})
    assert model.target_updates == 17


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_do_not_move_the_target(fused: bool) -> None:
    # A plain optimiser is not called by the scaler when a gradient is not finite; a fused one skips inside.
    model = small(optimizer_factory=lambda model: torch.optim.SGD(model.online_parameters(), lr=0.1, fused=fused))
    optimizer = model.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu")
    for bad in (True, False):
        scaler.scale(model.training_step(views(), 0)).backward()
        if bad:
            next(model.online_parameters()).grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert model.target_updates == (0 if bad else 1)


@quiet_loader
def test_factory_with_a_schedule_and_a_subclass_with_its_own_optimizer(tmp_path: Path) -> None:
    def factory(model: BYOL) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(model.online_parameters(), lr=1e-3)
        half = model.total_steps / 2
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < half else 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Own(BYOL):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.online_parameters(), lr=0.1)]

    data = DataLoader(Pairs(32), batch_size=8)
    for model in (small(schedule="auto", optimizer_factory=factory), Own(conv(), projection_hidden=8)):
        run = trainer(tmp_path)
        run.fit(model, data)
        assert model.target_updates == run.global_step == 4


# ---- backbones of all kinds ----


class Dict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = conv()

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(out=self.net(x), aux=x)


BACKBONES = {
    "timm 2-D": lambda: build_backbone("timm/resnet10t"),
    "timm map": lambda: timm.create_model("resnet10t", num_classes=0, global_pool=""),
    "timm tokens": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0, global_pool=""
    ),
    "timm NHWC": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1), num_classes=0, global_pool=""
    ),
    "torchvision classifier": torchvision.models.resnet18,
    "torchvision segmentation": lambda: torchvision.models._utils.IntermediateLayerGetter(
        torchvision.models.resnet18(), {"layer4": "out"}
    ),
    "dict": Dict,
}
WIDTHS = {
    "timm 2-D": 512,
    "timm map": 512,
    "timm tokens": 192,
    "timm NHWC": 768,
    "torchvision classifier": 1000,
    "torchvision segmentation": 512,
    "dict": 8,
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_any_backbone(kind: str) -> None:
    model = BYOL(BACKBONES[kind](), projection_hidden=16, projection_size=8).eval()
    side = 64 if kind == "timm NHWC" else 32
    x = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        assert model.width == WIDTHS[kind]
        features = model.features(x)
        assert features.ndim == 4
        assert features.shape[:2] == (2, WIDTHS[kind])
        embedding = model.embed(x)
        torch.testing.assert_close(embedding, features.mean((2, 3)), rtol=1e-4, atol=1e-5)
        from_online = model.online()(x)
        torch.testing.assert_close(from_online[0], embedding)
        torch.testing.assert_close(from_online[2], model(x))
        assert model.forward_momentum(x).shape == (2, 8)
    frozen = next(module for module in model.backbone.modules() if not list(module.children()))
    model.train()
    frozen.eval()
    assert model.online().training
    assert not frozen.training  # looking at the online branch wakes nothing that its owner froze
    assert {id(p) for p in model.online().parameters()} == {id(p) for p in model.online_parameters()}
    assert set(model.online().state_dict()) == {k for k in model.state_dict() if "_momentum" not in k}


def test_own_head_takes_the_backbones_own_output() -> None:
    backbone = nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = BYOL(backbone, nn.Linear(8, 4), nn.Linear(4, 4))
    assert model(views()[0]).shape == (8, 4)
    assert model.embed(views()[0]).shape == (8, 8)

    series = BYOL(nn.Conv1d(6, 5, 3), nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), nn.Linear(4, 4))
    with torch.no_grad():
        assert series(torch.randn(3, 6, 10)).shape == (3, 4)
    with pytest.raises(UsageError, match="takes no image"):
        _ = series.width


# ---- the indicators ----


def test_collapse_indicators() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 32)
    same = torch.ones(512, 32)
    healthy = collapse_indicators(x, x, x, x)
    assert healthy["embedding_std"].item() == pytest.approx(1.0, abs=0.05)
    assert healthy["online_target_cosine"].item() == pytest.approx(1.0, abs=1e-5)
    centred = x[:256] - x[:256].mean(0)
    sigma = np.linalg.svd(centred.double().numpy(), compute_uv=False)
    share = sigma / sigma.sum()
    assert healthy["effective_rank"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
    collapsed = collapse_indicators(same, same, x, -x)
    assert collapsed["projection_std"].item() == pytest.approx(0.0, abs=1e-5)
    assert collapsed["effective_rank"].item() <= 1.01
    assert collapsed["online_target_cosine"].item() == pytest.approx(-1.0, abs=1e-5)
