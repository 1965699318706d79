"""Checkpoints of all origins, and everything that a file can be instead of one."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from byol_deploy.errors import CheckpointError, UsageError
from byol_deploy.recipe import Recipe
from byol_deploy.training.byol import BYOL
from byol_deploy.training.checkpoints import KEY, SCHEMA, build_model, load_checkpoint

RECIPE = Recipe.from_dict(
    {
        "data": {"image_size": 32},
        "model": {
            "backbone": "timm/test_resnet",
            "projection_hidden": 24,
            "projection_size": 12,
        },
        "train": {"base_tau": 0.9},
    }
)


def entry(recipe: Recipe = RECIPE, **changes: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "recipe": recipe.to_dict(),
        "preprocessing": recipe.preprocessing().to_dict(),
        **changes,
    }


def moved(model: BYOL) -> BYOL:
    """The two branches differ, as after training."""
    with torch.no_grad():
        for parameter in model.backbone_momentum.parameters():
            parameter.add_(0.5)
    return model


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    torch.manual_seed(0)
    model = moved(build_model(RECIPE))
    return {"state_dict": model.state_dict(), "global_step": 42, "epoch": 3, KEY: entry()}


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same_weights(model: BYOL, state: dict[str, Tensor]) -> bool:
    mine = model.state_dict()
    return all(torch.equal(mine[key], value) for key, value in state.items())


# ---- what loads ----


def test_our_checkpoint(tmp_path: Path, ours: dict[str, Any]) -> None:
    rng = torch.get_rng_state()
    loaded = load_checkpoint(write(tmp_path / "x.ckpt", ours))
    assert torch.equal(torch.get_rng_state(), rng)
    assert same_weights(loaded.model, ours["state_dict"])
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.recipe == RECIPE
    assert loaded.preprocessing == RECIPE.preprocessing()
    assert (loaded.global_step, loaded.epoch) == (42, 3)
    assert len(loaded.sha256) == 64
    assert loaded.path == tmp_path / "x.ckpt"
    assert set(loaded.online_keys) | set(loaded.momentum_keys) == set(ours["state_dict"])
    assert all("_momentum." in key for key in loaded.momentum_keys)
    assert not any("_momentum." in key for key in loaded.online_keys)
    assert (loaded.model.base_tau, loaded.model.projection_hidden, loaded.model.projection_size) == (0.9, 24, 12)
    assert loaded.model(torch.randn(2, 3, 32, 32)).shape == (2, 12)
    frozen = {key.split(".")[0] for key, p in loaded.model.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone_momentum", "projection_head_momentum"}


def test_run_directory_gives_its_last_checkpoint(tmp_path: Path, ours: dict[str, Any]) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = write(tmp_path / "checkpoints" / "last.ckpt", ours)
    assert load_checkpoint(tmp_path).path == path
    assert load_checkpoint(str(tmp_path / "checkpoints")).path == path


@pytest.mark.filterwarnings(
    # Lightning's advice on workers, and Lightning with a newer PyTorch.
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)
def test_a_real_lightning_checkpoint(tmp_path: Path) -> None:
    class Entry(L.Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint[KEY] = entry()

    model = build_model(RECIPE)
    run = L.Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, enable_progress_bar=False, callbacks=[Entry()],
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    x = torch.randn(8, 2, 3, 32, 32)
    loader = DataLoader([(a, b) for a, b in x], batch_size=4)
    run.fit(model, loader)
    run.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert same_weights(loaded.model, model.state_dict())
    assert loaded.global_step == 2


def test_stripped_checkpoint_loads_with_a_copied_momentum_branch(tmp_path: Path, ours: dict[str, Any]) -> None:
    online = {key: value for key, value in ours["state_dict"].items() if "_momentum." not in key}
    loaded = load_checkpoint(write(tmp_path / "x.ckpt", {**ours, "state_dict": online}))
    assert loaded.momentum_keys == ()
    assert set(loaded.online_keys) == set(online)
    assert same_weights(loaded.model, online)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[key.replace("backbone.", "backbone_momentum.", 1)], state[key])
               for key in online if key.startswith("backbone."))  # fmt: skip


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """The state dict of the reference class: default backbone, heads of other sizes, an unused classifier."""
    torch.manual_seed(0)
    model = BYOL(projection_hidden=20, projection_size=10)
    state = dict(moved(model).state_dict())
    for branch in ("backbone", "backbone_momentum"):
        state[f"{branch}.RN50model.fc.weight"] = torch.zeros(1000, 2048)
        state[f"{branch}.RN50model.fc.bias"] = torch.zeros(1000)
    return state


def test_checkpoint_of_the_reference_class(tmp_path: Path, original: dict[str, Tensor]) -> None:
    content = {
        "state_dict": original,
        "global_step": 9,
        "epoch": 1,
        "pytorch-lightning_version": "2.2.0",
        # what its momentum schedule lets leak
        "callbacks": {"x": {"momentum": np.float64(0.996), "n": np.int64(3), "f": np.float32(0.5)}},
    }
    loaded = load_checkpoint(write(tmp_path / "x.ckpt", content))
    kept = {key: value for key, value in original.items() if ".fc." not in key}
    assert same_weights(loaded.model, kept)
    assert set(loaded.model.state_dict()) == set(kept)
    assert loaded.recipe is None
    assert loaded.preprocessing is None
    assert (loaded.global_step, loaded.epoch) == (9, 1)
    assert loaded.model.projection_head[2][0].out_features == 20
    assert loaded.model.projection_size == 10
    assert not any(".fc." in key for key in loaded.online_keys)
    assert loaded.model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_bare_state_dict_of_wrapped_model(tmp_path: Path, original: dict[str, Tensor]) -> None:
    wrapped = {f"module.{key}": value for key, value in original.items()}
    loaded = load_checkpoint(write(tmp_path / "x.pt", wrapped))
    assert same_weights(loaded.model, {key: value for key, value in original.items() if ".fc." not in key})
    assert (loaded.global_step, loaded.epoch) == (0, 0)


def test_bare_state_dict_needs_the_backbones_name(tmp_path: Path, ours: dict[str, Any]) -> None:
    path = write(tmp_path / "x.pt", ours["state_dict"])
    with pytest.raises(CheckpointError, match=r"does not say what its backbone is \(its first keys: backbone\.conv1"):
        load_checkpoint(path)
    assert same_weights(load_checkpoint(path, backbone="timm/test_resnet").model, ours["state_dict"])
    own = build_model(RECIPE).backbone
    before = copy.deepcopy(own.state_dict())
    assert same_weights(load_checkpoint(path, backbone=own).model, ours["state_dict"])
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())  # it was only lent
    with pytest.raises(CheckpointError, match=r"does not fit.*missing.*unexpected"):
        load_checkpoint(path, backbone="timm/test_vit")
    with pytest.raises(UsageError, match="unknown"):
        load_checkpoint(path, backbone="timm/tset_resnet")


def test_half_precision_weights_become_float32(tmp_path: Path, ours: dict[str, Any]) -> None:
    half = {key: v.bfloat16() if v.is_floating_point() else v for key, v in ours["state_dict"].items()}
    loaded = load_checkpoint(write(tmp_path / "x.ckpt", {**ours, "state_dict": half}))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert same_weights(loaded.model, {key: v.to(ours["state_dict"][key].dtype) for key, v in half.items()})


# ---- files that are something else ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (os.urandom(5000).replace(b"\x80", b"\x01", 1).lstrip(b"P\x80"), "is not a PyTorch file"),
        (b"hello\n" * 20, "is not a PyTorch file"),
        (b"PK\x03\x04" + b"\0" * 500, "cut off, damaged"),
        (b"\x80\x02" + b"\xff" * 50, "is not a PyTorch checkpoint, or is damaged"),
        (pickle.dumps({"a": 1}), "is a pickle, which PyTorch did not write"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "weights_only=False" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_directory_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*nothing\.ckpt"):
        load_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match=r"is a directory without checkpoints/last\.ckpt"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint("a\0b")
    with pytest.raises(CheckpointError, match=r"cannot be looked at|no checkpoint"):
        load_checkpoint("x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "pipe")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_truncated(tmp_path: Path, ours: dict[str, Any], share: float) -> None:
    path = write(tmp_path / "x.ckpt", ours)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="cut off, damaged"):
        load_checkpoint(path)


def test_a_flipped_bit_in_the_weights(tmp_path: Path, ours: dict[str, Any]) -> None:
    path = write(tmp_path / "x.ckpt", ours)
    data = bytearray(path.read_bytes())
    weight = ours["state_dict"]["prediction_head.0.weight"].numpy().tobytes()
    data[data.index(weight) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(path)


class Evil:
    """Creates a file when unpickled by anything that runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, ours: dict[str, Any], form: str) -> None:
    owned, path = tmp_path / "owned", tmp_path / "x.ckpt"
    content = {**ours, "callbacks": Evil(owned)}
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Evil(owned), protocol=int(form[-1])))
    with pytest.raises(CheckpointError, match=r"refused and nothing of it was run|was not opened") as caught:
        load_checkpoint(path)
    assert not owned.exists()
    assert "weights_only=False" not in str(caught.value)
    # The same file does run its code where it is not refused: the test can fail.
    if form.startswith("pickle"):
        pickle.loads(path.read_bytes())
        assert owned.exists()


def test_other_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"names torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(write(tmp_path / "x.pt", nn.Linear(1, 1)))
    with pytest.raises(CheckpointError, match=r"cut off, damaged|refused"):
        load_checkpoint(write(tmp_path / "x.pt", {"a": np.array([object()])}))
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(write(tmp_path / "x.pt", [torch.ones(1)]))


# ---- checkpoints of other models, and damaged ones ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no weights"),
        ({"state_dict": {}}, "no weights"),
        ({"state_dict": 3}, "no weights"),
        ({"epoch": 3, "model": "text"}, "epoch, model are no tensor"),
        ({"fc.weight": torch.ones(1), "fc.bias": torch.ones(1)}, r"no key starts with backbone.*fc\.weight"),
        ({"backbone.RN50model.x": torch.ones(1)}, r"a projection_head of another form \(its keys: none\)"),
    ],
)
def test_other_content(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path / "x.ckpt", content))


def test_missing_unexpected_and_reshaped_keys_are_named(tmp_path: Path, ours: dict[str, Any]) -> None:
    state = dict(ours["state_dict"])
    del state["prediction_head.0.weight"]
    state["backbone.extra"] = torch.ones(1)
    state["prediction_head.3.bias"] = torch.ones(7)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(write(tmp_path / "x.ckpt", {**ours, "state_dict": state}))
    message = str(caught.value)
    assert "1 missing (prediction_head.0.weight)" in message
    assert "1 unexpected (backbone.extra)" in message
    assert "prediction_head.3.bias: (7,) float32, expected (12,) float32" in message
    # half a momentum branch is damage, not a stripped file
    state = dict(ours["state_dict"])
    del state["backbone_momentum.conv1.0.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing \(backbone_momentum"):
        load_checkpoint(write(tmp_path / "x.ckpt", {**ours, "state_dict": state}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, ours: dict[str, Any], value: float) -> None:
    state = {key: tensor.clone() for key, tensor in ours["state_dict"].items()}
    state["prediction_head.3.bias"][2] = value
    with pytest.raises(CheckpointError, match=r"not finite in 1 of \d+ tensors \(prediction_head\.3\.bias\)"):
        load_checkpoint(write(tmp_path / "x.ckpt", {**ours, "state_dict": state}))


def test_tensor_that_claims_more_than_it_holds(tmp_path: Path, original: dict[str, Tensor]) -> None:
    state = {**original, "projection_head.2.0.weight": torch.zeros(1).expand(10_000_000, 2048)}
    with pytest.raises(CheckpointError, match=r"claims the shape \(10000000, 2048\)"):
        load_checkpoint(write(tmp_path / "x.ckpt", state))
    meta = {**original, "projection_head.2.0.weight": torch.zeros(10, 2048, device="meta")}
    with pytest.raises(CheckpointError, match="does not hold that many values"):
        load_checkpoint(write(tmp_path / "x.ckpt", meta))


# ---- our own entry ----


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"schema": 2, "version": "9.0"}, "written by byol-deploy 9.0 with checkpoint schema 2.*--upgrade"),
        ({"schema": "one"}, "is damaged"),
        ({"schema": 1}, "is damaged"),
        ("text", "is damaged"),
        ({"schema": 1, "recipe": {"optim": {"lrr": 1}, "seeed": 0}}, "recipe with faults: .*seeed.*;|lrr"),
        ({"schema": 1, "recipe": {}, "preprocessing": {"size": 3}}, "preprocessing with faults: .*size"),
    ],
)
def test_entry_with_faults(tmp_path: Path, ours: dict[str, Any], made: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path / "x.ckpt", {**ours, KEY: made}))


def test_recipe_of_an_unknown_backbone(tmp_path: Path, ours: dict[str, Any]) -> None:
    recipe = RECIPE.updated({"model.backbone": "timm/gone_tomorrow"})
    with pytest.raises(CheckpointError, match="'timm/gone_tomorrow' is unknown"):
        load_checkpoint(write(tmp_path / "x.ckpt", {**ours, KEY: entry(recipe)}))


def test_own_code_is_imported_only_when_trusted(
    tmp_path: Path, ours: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def build(**kwargs: Any) -> nn.Module:
        calls.append(kwargs)
        return build_model(RECIPE).backbone

    module = types.ModuleType("own_backbone_of_a_checkpoint")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    recipe = RECIPE.updated({"model.backbone": f"{module.__name__}:build", "model.backbone_args": {"a": 1}})
    path = write(tmp_path / "x.ckpt", {**ours, KEY: entry(recipe)})
    with pytest.raises(CheckpointError, match=r"was not imported.*trust_backbone=True"):
        load_checkpoint(path)
    assert calls == []
    assert same_weights(load_checkpoint(path, trust_backbone=True).model, ours["state_dict"])
    assert calls == [{"a": 1}]
    assert same_weights(load_checkpoint(path, backbone="timm/test_resnet").model, ours["state_dict"])


def test_arguments_that_fetch_weights_are_dropped(tmp_path: Path, ours: dict[str, Any]) -> None:
    recipe = RECIPE.updated({"model.backbone_args": {"checkpoint_path": "/nowhere/evil.pt", "pretrained": True}})
    loaded = load_checkpoint(write(tmp_path / "x.ckpt", {**ours, KEY: entry(recipe)}))
    assert same_weights(loaded.model, ours["state_dict"])
    assert loaded.recipe == recipe


# ---- models from recipes ----


def test_build_model_is_reproducible_and_sizes_a_transformer() -> None:
    def built(recipe: Recipe) -> BYOL:
        torch.manual_seed(1)
        return build_model(recipe)

    a, b = built(RECIPE), built(RECIPE)
    assert same_weights(a, b.state_dict())
    assert a.schedule_length == "auto"
    name, args = "timm/vit_tiny_patch16_224", {"depth": 1}
    vit = RECIPE.updated({"model.backbone": name, "model.backbone_args": args, "data.image_size": 48})
    model = built(vit).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 48, 48)).shape == (2, 12)
    fixed = vit.updated({"model.backbone_args": {**args, "img_size": 64}})
    with pytest.raises(UsageError, match=r"timm/vit_tiny_patch16_224 does not take data\.image_size 48"):
        built(fixed)
    with pytest.raises(UsageError, match="'timm/rsenet18' is unknown"):
        built(RECIPE.updated({"model.backbone": "timm/rsenet18"}))
