"""Opening whatever holds an encoder, exported or not, as one function from images to embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from byol_deploy import formats
from byol_deploy.bundle import Bundle
from byol_deploy.errors import require_packages
from byol_deploy.images import ImageSource
from byol_deploy.runtime import Encoder

_BATCH = 32
_CHECKPOINT_SUFFIXES = frozenset({".ckpt", ".pt", ".pth"})

Embedder = Callable[[Sequence[ImageSource]], np.ndarray]
"""Takes n images, gives (n, D) float32."""


def open_embedder(
    path: str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    image_size: int | None = None,
    backbone: str | None = None,
    trust_backbone: bool = False,
) -> Embedder:
    """Open a bundle or an ONNX file with ONNX Runtime, a checkpoint or a run directory with PyTorch.

    Args:
        path: What to open.
        provider: Of ONNX Runtime; PyTorch computes on the CPU.
        threads: Of ONNX Runtime.
        image_size: For a checkpoint that does not carry its preprocessing.
        backbone: For a checkpoint that does not say what its backbone is.
        trust_backbone: Import the recipe's own ``module:callable`` backbone.

    Raises:
        BundleError, CheckpointError, ProviderError: It cannot be opened.
        MissingExtraError: A checkpoint, where PyTorch is not installed.
        UsageError: ``image_size`` is missing or contradicts the checkpoint.
    """
    root = Path(path)
    is_run = root.is_dir() and not (root / "manifest.json").exists() and (root / "checkpoints").is_dir()
    is_checkpoint = root.suffix in _CHECKPOINT_SUFFIXES and not root.name.endswith(".torchscript.pt")
    if not (is_run or is_checkpoint):
        return Encoder(path, provider=provider, threads=threads)

    require_packages(f"{root}, a checkpoint,", "train", "torch", "lightning", "timm", "torchvision")
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.pipeline.publishing import checkpoint_preprocessing
    from byol_deploy.training.checkpoints import load_checkpoint

    loaded = load_checkpoint(root, backbone=backbone, trust_backbone=trust_backbone)
    preprocessing = checkpoint_preprocessing(loaded, image_size)
    graph = EncoderGraph(loaded.model, preprocessing, ("embedding",))

    def embed(images: Sequence[ImageSource]) -> np.ndarray:
        rows = [
            graph.run(preprocessing.batch(images[start : start + _BATCH]), _BATCH)["embedding"]
            for start in range(0, len(images), _BATCH)
        ]
        return np.concatenate(rows) if rows else np.empty((0, loaded.model.width), np.float32)

    return embed


def open_artefact(path: str | os.PathLike[str], format: str, *, threads: int | None = None) -> formats.Run:
    """Open one format's file of a bundle: (N, H, W, 3) uint8 to output name → (N, D) float32.

    Raises:
        BundleError: The bundle is damaged, or holds no such file.
    """
    file = Bundle.open(path).artefact(format)
    return formats.get(format).load(file, formats.RunOptions(threads=threads))
