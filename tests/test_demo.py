"""The whole chain on a small folder, labelled and not; and what it does when it is run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byol_deploy import Bundle, Recipe
from byol_deploy.demo import GARMENTS, _embed_all, _link_folder, _split, embedded_images, run_demo
from byol_deploy.errors import DataError, OutputError
from byol_deploy.preprocess import Preprocessing


@pytest.fixture(scope="module")
def small_recipe() -> Recipe:
    return Recipe.load("demo").updated(
        {
            "model.backbone": "timm/test_resnet",
            "model.backbone_args": {},
            "model.projection_hidden": 64,
            "model.projection_size": 32,
            "train.epochs": 1,
            "train.precision": "32",
        }
    )


def test_the_embedded_images_are_whole() -> None:
    images, labels = embedded_images()
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    assert len(GARMENTS) == 10


def test_the_zoo_model_is_the_demos_network_trained_longer() -> None:
    zoo = Recipe.load(Path(__file__).parent.parent / "models" / "fashion-mnist" / "recipe.yaml")
    assert {key for key, _, _ in Recipe.load("demo").differences(zoo)} == {"description", "train.epochs"}


def test_the_chain_on_a_labelled_folder(fashion: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    result = run_demo(fashion, out=tmp_path / "demo", recipe=small_recipe, progress=False)
    assert result.passed
    assert [row.name for row in result.rows] == [
        "raw pixels, 32 px", "untrained network", "trained, PyTorch", "ONNX Runtime", "TorchScript",
    ]  # fmt: skip
    assert (result.train, result.test) == (320, 80)
    scores = {row.name: row.scores for row in result.rows}
    assert all(scores.values())
    assert scores["ONNX Runtime"].knn.accuracy == pytest.approx(scores["trained, PyTorch"].knn.accuracy, abs=0.03)
    assert all(row.agreement >= 0.995 for row in result.rows if row.agreement is not None)
    assert sum(row.agreement is not None for row in result.rows) == 2
    assert Bundle.open(result.bundle).manifest.model.backbone == "timm/test_resnet"
    assert np.load(result.embeddings, allow_pickle=False).shape[0] == 80
    page = result.report.read_text(encoding="utf-8")
    assert "class-3" in page
    assert "PASS" in page

    # Once more: the training is not repeated, and nothing is lost.
    before = (result.run_dir / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = run_demo(fashion, out=tmp_path / "demo", recipe=small_recipe, progress=False)
    assert (result.run_dir / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert again.rows[0].scores == result.rows[0].scores

    with pytest.raises(OutputError, match="choose another --out"):
        run_demo(fashion / "class-0", out=tmp_path / "demo", recipe=small_recipe, progress=False)


def test_a_folder_without_classes_gets_agreement_and_pictures(
    fashion: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    call = [sys.executable, "-c", "from byol_deploy.cli.main import main; main()", "demo", "--json"]
    small_recipe.save(tmp_path / "small.yaml")
    options = ["--data", fashion / "class-0", "--out", tmp_path / "demo", "--recipe", tmp_path / "small.yaml"]
    # 32 images to train on: a smaller batch than the recipe's 64 is taken, and said.
    shown = subprocess.run([*call, *map(str, options)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["passed"] is True
    assert "no kNN and no probe: " in shown.stderr
    assert all(row["scores"] is None for row in document["rows"])
    assert document["rows"][-1]["agreement"] >= 0.995
    assert (tmp_path / "demo" / "report.html").exists()


def laid_out(root: Path, names: list[str]) -> tuple[list[str], int, int]:
    """Lay a folder with images of these names out as the demo does: classes, training and test images."""
    for name in names:
        path = root / "given" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6)).save(path)
    _link_folder(root / "given", root / "images", seed=0)
    split = _split(root / "images")
    assert all(path.resolve().is_relative_to((root / "given").resolve()) for path in (*split.train, *split.test))
    return split.classes, len(split.train), len(split.test)


def test_layouts_of_ones_own_folder(tmp_path: Path) -> None:
    own = [f"{part}/{name}/{i}.png" for part, n in (("train", 8), ("test", 3)) for name in "ab" for i in range(n)]
    # A folder beside train and test is neither.
    assert laid_out(tmp_path / "1", [*own, "val/a/1.png"]) == (["a", "b"], 16, 6)
    assert laid_out(tmp_path / "2", [f"{name}/{i}.png" for name in "ab" for i in range(10)]) == (["a", "b"], 16, 4)
    assert laid_out(tmp_path / "3", [f"{i}.png" for i in range(20)]) == ([], 16, 4)
    # "train" and "test" are no classes, nor are folders of three images.
    loose = [f"{part}/{i}.png" for part in ("train", "test") for i in range(10)]
    assert laid_out(tmp_path / "4", loose) == ([], 16, 4)
    assert laid_out(tmp_path / "5", [f"{name}/{i}.png" for name in "abcdef" for i in range(3)]) == ([], 15, 3)
    with pytest.raises(DataError, match="has one image"):
        laid_out(tmp_path / "6", ["1.png"])


def test_unreadable_images_are_left_out_of_the_table(fashion: Path, tmp_path: Path) -> None:
    paths = sorted(fashion.rglob("*.png"))[:5]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no")
    runs = {"mean": lambda batch: {"embedding": batch.mean(axis=(1, 2), dtype=np.float32)}}
    found, images, rows = _embed_all(runs, Preprocessing(28), [*paths[:2], broken, *paths[2:]])
    assert rows == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(images, Preprocessing(28).batch(paths))
    np.testing.assert_allclose(found["mean"], images.mean(axis=(1, 2)), rtol=1e-5)


def test_a_folder_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        run_demo(tmp_path / "absent", out=tmp_path / "demo", progress=False)
    assert list((tmp_path / "demo").iterdir()) == []
