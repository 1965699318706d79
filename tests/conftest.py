"""Shared real parts: a folder of photographs, a run that was really trained, a bundle that was really exported.

Nothing here imports PyTorch at the top: a session that only runs the torch-free tests must not pay for it.
"""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

# The networks of the tests are tiny: on a busy machine two threads wait for each other far longer than one works.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GARMENTS = Path(__file__).resolve().parent.parent / "byol_deploy" / "data" / "fashion-mnist"


def garments(count_per_class: int, first: int = 0) -> list[tuple[int, np.ndarray]]:
    """(class, 28 x 28 uint8) pairs of the vendored Fashion-MNIST, in file order, classes in turn."""
    packed = {name: (GARMENTS / f"t10k-{name}-ubyte.gz").read_bytes() for name in ("images-idx3", "labels-idx1")}
    images = np.frombuffer(gzip.decompress(packed["images-idx3"]), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(gzip.decompress(packed["labels-idx1"]), np.uint8, offset=8)
    pairs = []
    for label in range(10):
        rows = np.flatnonzero(labels == label)[first : first + count_per_class]
        pairs += [(label, images[row]) for row in rows]
    return pairs


def write_garments(root: Path, count_per_class: int, first: int = 0) -> Path:
    """Write garments as PNG files, one sub-folder a class, and return ``root``."""
    for number, (label, pixels) in enumerate(garments(count_per_class, first)):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return root


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """`byol-deploy` as its entry point runs it, in this process: loading PyTorch for each call would take minutes.

    Takes the command's words, gives ``returncode``, ``stdout`` and ``stderr``, as ``subprocess.run`` does.
    """
    from byol_deploy.cli.main import main

    def run(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["byol-deploy", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capfd.readouterr()
        return SimpleNamespace(returncode=int(stopped.value.code or 0), stdout=said.out, stderr=said.err)

    return run


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 400 grey 28 x 28 PNGs, 40 in each of 10 sub-folders. Read only: it is shared."""
    return write_garments(tmp_path_factory.mktemp("fashion"), 40)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Path:
    """The run directory of a small encoder trained for a few steps on ``fashion``. Read only: it is shared."""
    from byol_deploy import Recipe, fit

    recipe = Recipe.load("default").with_overrides(
        [
            "model.backbone=timm/test_resnet",
            "model.projection_hidden=64",
            "model.projection_size=32",
            "data.image_size=32",
            "train.epochs=2",
            "train.batch_size=64",
            "train.precision=32",
        ]
    )
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return Path(fit(fashion, recipe, out=out, progress=False).run_dir)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, fashion: Path) -> Path:
    """The bundle of ``tiny_run`` in ONNX and TorchScript. Read only: copy it before you break it."""
    from byol_deploy import export

    checkpoint = tiny_run / "checkpoints" / "last.ckpt"
    out = tiny_run.parent / "tiny-bundle"
    return Path(export(checkpoint, formats=("onnx", "torchscript"), out=out, data=fashion).path)
