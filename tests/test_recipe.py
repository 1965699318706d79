"""Recipes: every fault at once, plain YAML in and out, and the numbers of the paper."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from byol_deploy.errors import OutputError, RecipeError
from byol_deploy.recipe import AugmentRecipe, OptimRecipe, Recipe, ViewRecipe, recipe_names


def faults(document: object) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(document)
    return caught.value.faults


def test_the_default_file_says_what_the_defaults_are() -> None:
    shipped = Recipe.load("default")
    assert [key for key, _, _ in shipped.differences(Recipe())] == ["description"]
    path = Path(__file__).parent.parent / "byol_deploy/data/default.yaml"
    assert yaml.safe_load(path.read_text()) == shipped.to_dict(), "default.yaml names every key"


def test_the_paper_s_numbers() -> None:
    """Tables of the appendix of arXiv:2006.07733 and the authors' code."""
    paper = Recipe.load("paper").resolved()
    assert (paper.optim.name, paper.optim.lr, paper.optim.weight_decay) == ("lars", 0.2, 1.5e-6)
    assert paper.train.batch_size * paper.train.accumulate == 4096
    assert (paper.train.epochs, paper.train.base_tau, paper.optim.warmup_epochs) == (1000, 0.996, 10)
    assert (paper.model.projection_hidden, paper.model.projection_size) == (4096, 256)
    one, two = paper.augment.view1, paper.augment.view2
    assert (one.blur, two.blur, one.solarise, two.solarise) == (1.0, 0.1, 0.0, 0.2)
    for view in (one, two):
        assert (view.crop_area, view.blur_kernel, view.blur_sigma) == ((0.08, 1.0), 23, (0.1, 2.0))
        assert (view.jitter, view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
        assert view.grey == 0.2


@pytest.mark.parametrize(("size", "kernel", "blurs"), [(32, 3, (0, 0)), (96, 9, (1, 0.1)), (224, 23, (1, 0.1))])
def test_auto_is_settled_by_the_image_size(size, kernel, blurs) -> None:
    settled = Recipe().updated({"data.image_size": size}).resolved()
    assert (settled.augment.view1.blur, settled.augment.view2.blur) == blurs
    assert settled.augment.view1.blur_kernel == kernel
    assert settled.data.resize == size
    assert settled.data.store_size == 4 * size
    assert settled.resolved() == settled


def test_every_fault_is_reported_at_once() -> None:
    found = faults(
        {
            "optim": {"lr": math.nan, "nam": "sgd", "momentum": True},
            "data": {"image_size": 7, "workers": -1},
            "augment": {"view2": {"blur_kernel": 4, "crop_area": [1, 0.2], "flip": "often"}},
            "train": [1],
            "modle": {},
        }
    )
    text = "\n".join(found)
    assert len(found) == 10
    assert "optim.lr is nan; use a number above 0" in found
    assert "optim.nam is not a key of a recipe (did you mean name?)" in text
    assert "optim.momentum is True" in text
    assert "augment.view2.blur_kernel is 4; use an odd whole number" in text
    assert "train is [1]; use a mapping" in text
    assert "modle is not a key of a recipe (did you mean model?)" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 0),
        ("train.epochs", 1.5),
        ("train.epochs", True),
        ("train.epochs", None),
        ("train.epochs", "three"),
        ("train.epochs", 10**9),
        ("train.batch_size", 1),
        ("train.base_tau", 1.5),
        ("train.precision", "fp8"),
        ("train.precision", 16),
        ("train.seed", -1),
        ("optim.lr", math.inf),
        ("optim.lr", 0),
        ("optim.name", "adam"),
        ("data.image_size", 100_000),
        ("data.resize", 10),
        ("data.mean", [0.5, 0.5]),
        ("data.std", [0.5, 0.5, 0]),
        ("data.store_size", 20),
        ("model.backbone", ""),
        ("model.backbone", 18),
        ("model.backbone_args", {"x": object()}),
        ("augment.view1.hue", 0.6),
        ("augment.view1.crop_area", [0, 1]),
        ("augment.view1.crop_area", 0.5),
        ("train.deterministic", "yes"),
        ("train", 5),
        ("description", 5),
    ],
)
def test_out_of_range_is_refused_with_the_expectation(key, value) -> None:
    with pytest.raises(RecipeError, match=rf"{key}.* is .*; use "):
        Recipe().updated({key: value})


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="lr is -1"):
        OptimRecipe(lr=-1)
    with pytest.raises(RecipeError, match="optim is 'sgd'"):
        Recipe(optim="sgd")  # type: ignore[arg-type]
    assert ViewRecipe(crop_area=[0.5, 1]).crop_area == (0.5, 1.0)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().train.epochs = 3  # type: ignore[misc]


def test_overrides_are_yaml_and_name_keys() -> None:
    changed = Recipe().with_overrides(
        [
            "optim.lr=1e-3",
            "train.precision=32",
            "train.deterministic=true",
            "augment.view2.crop_area=[0.1, 0.9]",
            "model.backbone_args.drop_path_rate=0.1",
            "data.workers=auto",
        ]
    )
    assert changed.optim.lr == 1e-3
    assert changed.train.precision == "32"
    assert changed.train.deterministic is True
    assert changed.augment.view2.crop_area == (0.1, 0.9)
    assert changed.augment.view2.solarise == 0.2
    assert changed.model.backbone_args == {"drop_path_rate": 0.1}


def test_faulty_overrides_are_all_reported() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe().with_overrides(
            ["train.epochs", "=3", "trian.epochs=3", "train.epochs.x=3", "optim.lr=-1", "optim.lr: 3", "data.mean=[1"]
        )
    text = str(caught.value)
    assert "'train.epochs' is not an override; use section.key=value" in text
    assert "trian is not a key of a recipe (did you mean train?)" in text
    assert "train.epochs is not a section" in text
    assert "optim.lr is -1" in text
    assert "'data.mean=[1': the value is not valid YAML" in text


def test_a_section_in_a_file_keeps_the_other_defaults_of_its_place() -> None:
    recipe = Recipe.from_dict({"augment": {"view2": {"flip": 0.1}}})
    assert recipe.augment == AugmentRecipe(view2=ViewRecipe(flip=0.1, solarise=0.2))


def test_yaml_round_trip(tmp_path) -> None:
    recipe = Recipe.load("paper").updated({"model.backbone_args": {"a": [1, {"b": None}]}, "description": "größer"})
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    (tmp_path / "empty.yaml").write_text("")
    assert Recipe.load(tmp_path / "empty.yaml") == Recipe()


def test_files_that_are_no_recipes(tmp_path) -> None:
    cases = {
        "list.yaml": (b"[1, 2]", "the recipe is"),
        "broken.yaml": (b"data: [", "not valid YAML"),
        "binary.yaml": (b"\x80\x81\xff", "cannot be read as text"),
        "code.yaml": (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        "alias.yaml": (b"data: &a {image_size: 32}\ntrain: *a", "anchors and aliases"),
        "twice.yaml": (b"train: {epochs: 3, epochs: 4}", "epochs is given twice"),
        "long.yaml": (b"#" * 2_000_000, "a recipe has a few hundred"),
        "number.yaml": (b"1: 2", "1 is not a key"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match=expected):
            Recipe.load(tmp_path / name)
    with pytest.raises(RecipeError, match="is a folder"):
        Recipe.load(tmp_path)
    with pytest.raises(RecipeError, match=r"no recipe 'papre' \(did you mean paper\?\)"):
        Recipe.load("papre")
    with pytest.raises(OutputError, match="cannot be written"):
        Recipe().save(tmp_path / "list.yaml" / "r.yaml")


def test_every_shipped_recipe_loads() -> None:
    names = recipe_names()
    assert {"default", "paper"} <= set(names)
    for name in names:
        assert Recipe.load(name).description


def test_differences_name_both_values() -> None:
    changed = Recipe().updated({"train.epochs": 3, "augment.view2.flip": 0})
    assert changed.differences(Recipe()) == [("augment.view2.flip", 0.0, 0.5), ("train.epochs", 3, 100)]


def test_the_evaluation_preprocessing_follows() -> None:
    preprocessing = Recipe.load("paper").preprocessing()
    assert (preprocessing.size_px, preprocessing.resize_px) == (224, 256)
    assert Recipe().preprocessing().resize_px == 96
