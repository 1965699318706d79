"""The encoders that benchmarks are made on, really trained with BYOL.

    python benchmarks/encoders.py [--only NAME]... [--out runs/encoders]

Three small ones of different families (ENCODERS), for fidelity: the 8,000 garments that the demo trains on, for some
minutes each on two cores. Those of common size (SPEED), for latency: the 2,624 solar cells of ELPV at 224 px, and the
garments at 96 px; a quarter of an hour each at most. A run that is there already is kept, so that several benchmarks
share one training. The 2,000 other garments lie in images/test. The solar cells are CC-BY-NC-SA-4.0 and come from the
package ``elpv-dataset``; neither they nor what is trained on them belongs in a repository.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from elpv import sort_into_classes

from byol_deploy import Recipe, fit
from byol_deploy.demo import prepare_images

OUT = Path(__file__).parents[1] / "runs" / "encoders"


@dataclass(frozen=True)
class Encoder:
    """One family: its settings on top of the demo's recipe."""

    family: str
    settings: tuple[str, ...]
    recipe: str = "demo"
    cells: bool = False


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


def _common(family: str, name: str, *settings: str, cells: bool = True, epochs: int = 2) -> Encoder:
    """One of common size: the default recipe, shortened."""
    size = 224 if cells else 96
    common = (f"model.backbone={name}", f"data.image_size={size}", f"train.epochs={epochs}", "optim.warmup_epochs=1")
    return Encoder(family, (*common, *settings), "default", cells)


_ADAMW = ("optim.name=adamw", "optim.lr=0.0005", "optim.lr_scaling=false", "optim.weight_decay=0.01")

SPEED = {
    "cells-resnet18": _common("ResNet-18", "resnet18", epochs=3),
    "cells-resnet50": _common("ResNet-50", "resnet50"),
    "garments-resnet18": _common("ResNet-18", "resnet18", cells=False),
    "garments-resnet50": _common("ResNet-50", "resnet50", cells=False),
    "cells-vit": _common("ViT-tiny", "timm/vit_tiny_patch16_224", *_ADAMW),
    "cells-mobilenet": _common("MobileNetV3", "timm/mobilenetv3_large_100", *_ADAMW),
    "cells-efficientnet": _common("EfficientNet-lite", "timm/efficientnet_lite0", *_ADAMW),
    "cells-convnext": _common("ConvNeXt-atto", "timm/convnext_atto", *_ADAMW),
}


def images(out: Path = OUT) -> Path:
    """The garments as PNG files: the folder with train/ and test/."""
    folder = out / "images"
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare_images(folder, None, 0)
    return folder


def cells(out: Path = OUT) -> Path:
    """The solar cells as links: the folder with defective/ and functional/."""
    folder = out / "cells"
    if not folder.exists():
        sort_into_classes(folder, None)
    return folder


def trained(name: str, out: Path = OUT) -> Path:
    """The run directory of one of :data:`ENCODERS` or :data:`SPEED`, trained now if it is not there."""
    encoder, run = (ENCODERS | SPEED)[name], out / name
    if not (run / "checkpoints" / "last.ckpt").exists():
        recipe = Recipe.load(encoder.recipe).with_overrides(list(encoder.settings))
        data = cells(out) if encoder.cells else images(out) / "train"
        fit(data, recipe, out=run, resume=(run / "recipe.yaml").exists())
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=ENCODERS | SPEED, help="repeat it; all when left out")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    for name in arguments.only or ENCODERS | SPEED:
        print(trained(name, arguments.out), flush=True)


if __name__ == "__main__":
    main()
