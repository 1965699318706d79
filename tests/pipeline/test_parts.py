"""The parts of the pipeline on their own: whose tensors a file holds, and which images it is compared on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from byol_deploy import Recipe
from byol_deploy.pipeline.proof import prove_branch
from byol_deploy.pipeline.reference import real_images, synthetic_images


def test_prove_branch_looks_at_values_and_names() -> None:
    random = np.random.default_rng(0)
    online = {"backbone.w": random.normal(size=(4, 3)).astype(np.float32), "backbone.b": np.zeros(4, np.float32)}
    momentum = {
        "backbone_momentum.w": online["backbone.w"] * np.float32(1.5),
        "backbone_momentum.b": np.zeros(4, np.float32),
    }
    good = prove_branch({**online, "constant": np.zeros(4, np.float32)}, online, momentum)
    assert (good.passed, good.kept, good.total) == (True, 2, 2)
    folded = prove_branch({"backbone.b": online["backbone.b"]}, online, momentum)
    assert folded.passed
    assert "backbone.w" in str(folded)
    target = momentum["backbone_momentum.w"]
    for stored in ({**online, "val_3": target}, {**online, "val_3": np.ascontiguousarray(target.T)},
                   {**online, "x/backbone_momentum.q": online["backbone.b"]}, {**online, "backbone.w": target + 1},
                   {**online, "backbone.w": online["backbone.w"].T}):  # fmt: skip
        assert not prove_branch(stored, online, momentum).passed
    assert prove_branch(online, online, {"backbone_momentum.w": online["backbone.w"]}).passed, "not yet moved"


def test_real_images_are_different_and_the_same_each_time(fashion: Path, tmp_path: Path) -> None:
    preprocessing = Recipe.load("demo").preprocessing()
    chosen, described = real_images(fashion, preprocessing)
    assert chosen == real_images(fashion, preprocessing)[0]
    assert len(chosen) == 16
    assert str(fashion.parent) not in described
    one = next(fashion.rglob("*.png"))
    for copy_number in range(5):
        shutil.copy(one, tmp_path / f"{copy_number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert len(real_images(tmp_path, preprocessing)[0]) == 1


def test_synthetic_images() -> None:
    batch = synthetic_images(9)
    assert batch.shape == (5, 9, 9, 3)
    assert (batch[0].max(), batch[1].min()) == (0, 255)
    assert len({image.tobytes() for image in batch}) == 5


def test_a_weight_into_which_batch_norm_was_folded_is_neither_kept_nor_a_fault() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
    factor = np.array([0.5, -2, 1, 3, 0.1], np.float32)[:, None, None, None]
    bias = np.zeros(5, np.float32)
    online = {"conv.weight": weight, "conv.bias": bias}
    proof = prove_branch({"conv.weight": weight * factor, "conv.bias": bias + 1}, online, {})
    assert (proof.passed, proof.kept, proof.absent) == (True, 0, ("conv.weight", "conv.bias"))
    assert not prove_branch({"conv.weight": weight, "conv.bias": bias + 1}, online, {}).passed
    moved = weight * factor
    moved[2, 1, 1, 1] += 0.01
    assert not prove_branch({"conv.weight": moved}, {"conv.weight": weight}, {}).passed


def test_a_rounded_weight_is_kept_at_the_precision_that_it_promises() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    rounded = {"w": weight.astype(np.float16)}
    assert prove_branch(rounded, {"w": weight}, {}, precision="fp16").kept == 1
    assert not prove_branch({"w": rounded["w"] * np.float16(1.1) + 1}, {"w": weight}, {}, precision="fp16").passed
