"""A trained encoder, its clean export, and what is needed to make a faulty file of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from byol_deploy import export, fit, formats
from byol_deploy.bundle import CARRIED_GOLDEN_KEY, CARRIED_MANIFEST_KEY, carry, read_carried, seal_artefact
from byol_deploy.formats import Signature
from byol_deploy.graph import EncoderGraph
from byol_deploy.images import find_images
from byol_deploy.preprocess import IMAGENET_MEAN, IMAGENET_STD
from byol_deploy.training.checkpoints import LoadedCheckpoint, load_checkpoint

CALIBRATION_IMAGES = 256
EXAMPLE_BATCH = 3
"""Batch of the tensor that byol-deploy traces a graph with: what a check on the traced tensor sees."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained encoder.

    Attributes:
        name: What the table calls it.
        run: Its run directory.
        data: A folder of real images that it was not trained on.
        training: A folder of its training images.
        folder: Where the clean files lie.
        loaded: The checkpoint.
    """

    name: str
    run: Path
    data: Path
    training: Path
    folder: Path
    loaded: LoadedCheckpoint

    @classmethod
    def open(cls, name: str, run: Path, data: Path, training: Path, folder: Path) -> Subject:
        """Read the checkpoint. The clean export is made when it is first asked for."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(name, Path(run), Path(data), Path(training), folder, load_checkpoint(run))

    @cached_property
    def earlier(self) -> Path:
        """A run directory of the same recipe that was stopped after its first epoch, trained now if it is not there."""
        run = self.folder / "earlier"
        if not (run / "checkpoints" / "last.ckpt").exists():
            assert self.loaded.recipe is not None
            recipe = self.loaded.recipe.with_overrides(["train.epochs=1"])
            fit(self.training, recipe, out=run, resume=(run / "recipe.yaml").exists(), progress=False)
        return run

    @cached_property
    def bundle(self) -> Path:
        """The clean export in ONNX and TorchScript, made anew: what is judged is today's export."""
        return export(self.run, formats=("onnx", "torchscript"), out=self.folder / "bundle", data=self.data).path

    @property
    def clean(self) -> Path:
        """The clean ONNX file."""
        return self.bundle / "model.onnx"

    @cached_property
    def carried(self) -> dict[str, str]:
        """The texts that the clean file carries about the encoder: contract and golden cases, without its seal."""
        texts = formats.get("onnx").carried(self.clean)
        return {key: texts[key] for key in (CARRIED_MANIFEST_KEY, CARRIED_GOLDEN_KEY)}

    @cached_property
    def graph(self) -> EncoderGraph:
        """The trained encoder as byol-deploy exports it, with all outputs. Copy it before you break it."""
        assert self.loaded.preprocessing is not None
        return EncoderGraph(self.loaded.model, self.loaded.preprocessing)

    def broken(self) -> EncoderGraph:
        """A copy of :attr:`graph` to break."""
        return copy.deepcopy(self.graph)

    @property
    def other_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and deviation of another recipe: ImageNet's, or a half each where those are the trained ones."""
        assert self.loaded.preprocessing is not None
        if self.loaded.preprocessing.mean != IMAGENET_MEAN:
            return IMAGENET_MEAN, IMAGENET_STD
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    @cached_property
    def training_images(self) -> np.ndarray:
        """(256, H, W, 3) uint8, spread over the training folder: what a careful person calibrates with."""
        return self._images(self.training, CALIBRATION_IMAGES)

    @cached_property
    def test_images(self) -> np.ndarray:
        """(512, H, W, 3) uint8 of the folder that the encoder was not trained on."""
        return self._images(self.data, 512)

    def _images(self, folder: Path, count: int) -> np.ndarray:
        assert self.loaded.preprocessing is not None
        paths = find_images(folder)
        order = np.random.default_rng(0).permutation(len(paths))[:count]
        return self.loaded.preprocessing.batch([paths[place] for place in order])

    def example(self, batch: int = EXAMPLE_BATCH) -> np.ndarray:
        """(batch, H, W, 3) uint8: random, as an exporter's example input is."""
        side = self.graph.size_px
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator).numpy()

    def write(
        self, graph: torch.nn.Module, path: Path, carried: Mapping[str, str] | None = None, precision: str = "fp32"
    ) -> Path:
        """Export a graph with byol-deploy's own exporter, without any check of what it computes.

        Args:
            graph: The module, as the exporter is given it.
            path: Its ending names the format.
            carried: What the file says about itself; None is the clean file's contract and golden cases.
            precision: What the file declares itself to be.
        """
        format = formats.of_file(path)
        assert format is not None
        signature = Signature(size_px=self.graph.size_px, outputs=self.graph.outputs)
        format.export(graph, signature, path, self.carried if carried is None else carried)
        seal(path, precision)
        return path


def seal(path: Path, precision: str = "fp32") -> None:
    """Seal a written file, as every pass of byol-deploy that writes a file does.

    A fault in a pass comes with a good seal; only a file that was changed afterwards has a broken one.
    """
    format = formats.of_file(path)
    assert format is not None
    beside = path.with_name(f"{path.name}.data")
    seal_artefact(path, format, precision, {}, (beside.name,) if beside.exists() else ())


def carried_with(texts: Mapping[str, str], **changes: object) -> dict[str, str]:
    """The texts of a file whose contract says something else: fields of the manifest, or ``golden``."""
    from dataclasses import replace

    manifest, golden = read_carried(texts, "the clean file")
    golden = changes.pop("golden", golden)  # type: ignore[assignment]
    return {**texts, **carry(replace(manifest, **changes), golden, sealed=True)}  # type: ignore[arg-type]
