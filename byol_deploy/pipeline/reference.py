"""What written files are compared with: the trained model's outputs for real and for awkward images."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byol_deploy.bundle import Golden
from byol_deploy.errors import DataError
from byol_deploy.images import BadImages, ImageSource, find_images
from byol_deploy.parity import NOISE_MULTIPLE, Limit, derive_limits, image_noise
from byol_deploy.preprocess import Preprocessing
from byol_deploy.separation import separation

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.training.checkpoints import LoadedCheckpoint

REAL_IMAGES = 16
"""Real images in a comparison. The float64 reference is the slow part: it computes them once."""
GOLDEN_CASES = 8
AWKWARD = ("black", "white", "noise", "dark noise", "checkerboard")
AWKWARD_MULTIPLE = 100.0
"""The limit on awkward images, in noise floors; ten times that on real images.

Far from every photograph a network can be ill-conditioned, and one draw of rounding errors then says little about the
next: on a white image an untrained EfficientNet in ONNX Runtime lies ten floors away. These images are there for what
real ones cannot show: saturation, overflow, wrong types. Such faults are far beyond this. Drift is judged on real ones.
"""
CHAOS_REL_L2 = 1e-3
"""An awkward image on which the reference's own noise is above this is left out, and the report says so."""
_FILES_END_TO_END = 5


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with what the trained model gives for them, and what a file may differ by."""

    name: str
    images: np.ndarray
    expected: dict[str, np.ndarray]
    limits: dict[str, Limit]


@dataclass(frozen=True, eq=False)
class Reference:
    """Everything that written files are compared with.

    Attributes:
        real: Real images, preprocessed.
        awkward: Black, white, noise: what no photograph reaches.
        sources: Some of the real images as they were found, for the comparison from file bytes on.
        end_to_end: (n, D) float32 embedding of ``sources`` by the training side alone.
        described: Where the real images come from.
        warnings: About the encoder itself, such as a collapse.
    """

    real: ImageSet
    awkward: ImageSet
    sources: list[ImageSource]
    end_to_end: np.ndarray
    described: str
    warnings: tuple[str, ...]


def build_reference(
    checkpoint: LoadedCheckpoint, graph: EncoderGraph, preprocessing: Preprocessing, data: str | os.PathLike[str] | None
) -> Reference:
    """Compute the reference in float32 and float64.

    Raises:
        DataError: ``data`` holds no usable image.
    """
    import torch

    sources, described = real_images(data, preprocessing)
    images = preprocessing.batch(sources)
    doubled = graph.doubled()
    sets = []
    warnings: list[str] = []
    for name, batch, multiple in (
        ("real images", images, NOISE_MULTIPLE),
        ("awkward images", awkward_images(preprocessing.size_px), AWKWARD_MULTIPLE),
    ):
        single = graph.run(batch)
        double = None
        try:
            double = doubled.run(batch)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            # A backbone that fixes float32 somewhere inside.
            warnings.append(f"the model cannot compute in float64 ({first_line(error)}); limits are fixed numbers")
        if double is not None and name == "awkward images":
            # Far from every photograph a deep network can be chaotic: there float32 does not determine the output at
            # all, and no correct runtime could agree with PyTorch. Real images are never left out.
            noise = image_noise(single, double)
            told = noise <= CHAOS_REL_L2
            if not told.all():
                names = ", ".join(AWKWARD[place] for place in np.flatnonzero(~told))
                warnings.append(
                    f"left out of the awkward images: {names}; the model's own float32 noise there is "
                    f"{float(noise.max()):.1%} of the output, so nothing can be compared"
                )
                batch = batch[told]
                single, double = ({key: values[told] for key, values in part.items()} for part in (single, double))
        sets.append(ImageSet(name, batch, single, derive_limits(single, double, multiple=multiple)))
    real, awkward = sets
    if "embedding" in real.expected:
        floor = real.limits["embedding"].noise_rel_l2
        warnings += separation(real.expected["embedding"], noise_rel_l2=floor).warnings
    if len(images) < GOLDEN_CASES:
        warnings.append(f"only {len(images)} different real images were compared; {GOLDEN_CASES} or more say more")
    # The training side on its own: the checkpoint's model and NumPy's normalisation, not the graph that is exported.
    chosen = sources[:_FILES_END_TO_END]
    with torch.inference_mode():
        embedding = checkpoint.model.online()(torch.from_numpy(preprocessing.normalize(preprocessing.batch(chosen))))[0]
    return Reference(real, awkward, chosen, embedding.numpy(), described, tuple(dict.fromkeys(warnings)))


def real_images(
    data: str | os.PathLike[str] | None, preprocessing: Preprocessing, count: int = REAL_IMAGES
) -> tuple[list[ImageSource], str]:
    """Choose up to ``count`` different real images, the same ones each time.

    Args:
        data: A folder of images; None takes photographs that ship with byol-deploy.
        preprocessing: Two images that it makes equal count once.
        count: How many.

    Returns:
        The images, and where they are from in words.

    Raises:
        DataError: No usable image, or too many bad ones.
    """
    bad = BadImages(max_share=0.5)
    candidates: Sequence[ImageSource]
    if data is None:
        packed = (files("byol_deploy") / "data" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz").read_bytes()
        candidates = list(np.frombuffer(gzip.decompress(packed), np.uint8, offset=16).reshape(-1, 28, 28))
        described = "Fashion-MNIST photographs that ship with byol-deploy"
    else:
        candidates = find_images(data)
        described = f"the folder {Path(data).resolve().name} ({len(candidates)} images)"
    chosen: list[ImageSource] = []
    seen: set[bytes] = set()
    looked = 0
    # A few times more than needed: a folder may be full of copies.
    for place in itertools.islice(np.random.default_rng(0).permutation(len(candidates)), 8 * count):
        looked += 1
        try:
            pixels = preprocessing(candidates[place])
        except DataError as error:
            bad.add(candidates[place], error)
            continue
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            chosen.append(candidates[place])
        if len(chosen) == count:
            break
    bad.check(looked)
    return chosen, f"{len(chosen)} of {described}"


def awkward_images(size_px: int) -> np.ndarray:
    """(5, size_px, size_px, 3) uint8, in the order of :data:`AWKWARD`; the checkerboard has single pixels."""
    random = np.random.default_rng(20_06_07733)
    shape = (size_px, size_px, 3)
    board = (np.indices(shape[:2]).sum(axis=0) % 2 * 255).astype(np.uint8)
    return np.stack(
        [
            np.zeros(shape, np.uint8),
            np.full(shape, 255, np.uint8),
            random.integers(0, 256, shape, dtype=np.uint8),
            random.integers(0, 4, shape, dtype=np.uint8),
            np.repeat(board[:, :, None], 3, axis=2),
        ]
    )


def choose_golden(reference: Reference, count: int = GOLDEN_CASES) -> Golden:
    """The golden cases: real images that the encoder holds far apart, so that mixed-up outputs cannot pass.

    Farthest-point sampling on the first output, starting from the first image.
    """
    real = reference.real
    vectors = next(iter(real.expected.values())).astype(np.float64)
    vectors = vectors - vectors.mean(axis=0)
    chosen = [0]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < min(count, len(vectors)):
        distance = np.minimum(distance, np.linalg.norm(vectors - vectors[chosen[-1]], axis=1))
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
    return Golden(real.images[chosen], {name: values[chosen] for name, values in real.expected.items()})


def first_line(error: BaseException) -> str:
    """An exception in one line for a person."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
