"""Every model in models/: its recipe loads, its card is there, its shipped bundle proves itself without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from byol_deploy import Bundle, Recipe

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.parent for path in (ROOT / "models").glob("*/recipe.yaml"))
BUNDLES = [model / "bundle" for model in MODELS if (model / "bundle").exists()]


def test_there_is_a_model_with_a_bundle() -> None:
    assert BUNDLES


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_recipe_and_card(model: Path) -> None:
    recipe = Recipe.load(model / "recipe.yaml")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    card = (model / "README.md").read_text(encoding="utf-8")
    assert recipe.model.backbone in card


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.parent.name)
def test_the_shipped_bundle_passes_its_self_test_without_torch(bundle: Path) -> None:
    blocked = (
        "import sys; sys.modules['torch'] = None; from byol_deploy.cli.main import main; "
        f"sys.argv = ['byol-deploy', 'verify', {str(bundle)!r}, '--json']; main()"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.parent.name)
def test_the_shipped_bundle_is_small_and_whole(bundle: Path) -> None:
    assert Bundle.open(bundle).manifest.model.branch == "online"
    assert sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) < 8e6
