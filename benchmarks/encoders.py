"""Three small encoders of different families, really trained: what the benchmarks of fidelity are made on.

    python benchmarks/encoders.py [--only NAME] [--out runs/encoders]

BYOL on the 8,000 garments that the demo trains on, without labels, for some minutes each on two cores. A run that is
there already is kept, so that several benchmarks share one training. The 2,000 other garments lie in images/test.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from byol_deploy import Recipe, fit
from byol_deploy.demo import prepare_images

OUT = Path(__file__).parents[1] / "runs" / "encoders"


@dataclass(frozen=True)
class Encoder:
    """One family: its settings on top of the demo's recipe."""

    family: str
    settings: tuple[str, ...]


ENCODERS = {
    "resnet": Encoder("ResNet", ("train.epochs=8",)),
    "vit": Encoder(
        "ViT",
        (
            "model.backbone=timm/vit_tiny_patch16_224",
            "model.backbone_args={img_size: 28, patch_size: 7, depth: 6}",
            "optim.lr=0.0005",
            "train.epochs=6",
        ),
    ),
    "mobilenet": Encoder(
        "MobileNetV3",
        (
            "model.backbone=timm/mobilenetv3_small_100",
            "model.backbone_args={}",
            "data.image_size=64",
            "optim.lr=0.001",
            "train.epochs=6",
        ),
    ),
}


def images(out: Path = OUT) -> Path:
    """The garments as PNG files: the folder with train/ and test/."""
    folder = out / "images"
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare_images(folder, None, 0)
    return folder


def trained(name: str, out: Path = OUT) -> Path:
    """The run directory of one of :data:`ENCODERS`, trained now if it is not there."""
    run = out / name
    if not (run / "checkpoints" / "last.ckpt").exists():
        recipe = Recipe.load("demo").with_overrides(list(ENCODERS[name].settings))
        fit(images(out) / "train", recipe, out=run, resume=(run / "recipe.yaml").exists())
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=ENCODERS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    for name in ENCODERS:
        if arguments.only in (None, name):
            print(trained(name, arguments.out))


if __name__ == "__main__":
    main()
