"""What written files are compared with: the trained model's outputs for real and for awkward images."""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byol_deploy.awkward import awkward_files
from byol_deploy.errors import DataError
from byol_deploy.golden import Golden, pixels_hash
from byol_deploy.images import BadImages, ImageSource, describe, find_images
from byol_deploy.parity import (
    Limit,
    as_rows,
    derive_limits,
    distance_apart,
    first_line,
    image_noise,
    relative_l2,
    unsteady,
)
from byol_deploy.preprocess import Preprocessing
from byol_deploy.separation import Separation, separation

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.training.checkpoints import LoadedCheckpoint

REAL_IMAGES = 16
"""Real images in every comparison of the matrix. The float64 reference is the slow part: it computes them once."""
CROWD = 128
"""Real images for what needs many: neighbours, margins, and the statistics of batch norm."""
GOLDEN_CASES = 8
SYNTHETIC = ("black", "white", "noise", "dark noise", "checkerboard")
CHAOS_REL_L2 = 1e-3
"""An awkward image on which the reference's own noise is above this is left out, and the report says so."""
GOLDEN_FILES = (
    "rgb-large.png", "crop-41x32.png", "exif-6.png", "exif-8.jpg", "progressive.jpg", "cmyk.jpg", "grey16.png",
    "rgba.png", "palette-alpha.png", "97x3.png", "black.png",
)  # fmt: skip
"""The awkward files that travel with an export, 30 kB: they test a device's own decoder and preprocessing."""
_USERS_FILES = 8
_FOR_STATISTICS = 64
_BATCH = 16


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with what the trained model gives for them, and what a float32 file may differ by.

    Attributes:
        name: For the report.
        images: (N, H, W, 3) uint8, preprocessed.
        expected: Output name to (N, D) float32.
        limits: Output name to the limit.
        different: Whether the images tell something about neighbours and distances: different real ones do.
    """

    name: str
    images: np.ndarray
    expected: dict[str, np.ndarray]
    limits: dict[str, Limit]
    different: bool = True


@dataclass(frozen=True, eq=False)
class Reference:
    """Everything that written files are compared with.

    Attributes:
        real: Real images, preprocessed.
        awkward: Black, white, noise: what no photograph reaches.
        crowd: Many more real images, the ones in ``real`` first.
        sources: Image files as they were found: some of the real ones, then the built-in awkward ones.
        names: A name for each of ``sources``.
        end_to_end: What the training side gives for ``sources``, from the file on, by an implementation of decoding
            and resizing that is not the one that is shipped; ``images`` are its pixels.
        described: Where the real images come from.
        separation: Whether the encoder tells the real images apart.
        warnings: About the encoder itself, such as a collapse.
        fault: Why nothing can be compared with this reference; empty when something can.
    """

    real: ImageSet
    awkward: ImageSet
    crowd: ImageSet
    sources: list[ImageSource]
    names: list[str]
    end_to_end: ImageSet
    described: str
    separation: Separation
    warnings: tuple[str, ...] = field(default=())
    fault: str = ""


def build_reference(
    checkpoint: LoadedCheckpoint, graph: EncoderGraph, preprocessing: Preprocessing, data: str | os.PathLike[str] | None
) -> Reference:
    """Compute the reference: in float64, several times in float32, and from the image files on.

    Raises:
        DataError: ``data`` holds no usable image.
    """
    import torch

    from byol_deploy.training.evaluation_path import reference_pixels, reference_tensor
    from byol_deploy.training.statistics import batch_norm_check

    found, described = real_images(data, preprocessing, CROWD)
    crowd_images = preprocessing.batch(found)
    count = min(REAL_IMAGES, len(found))
    built_in = {name: content for name, content in awkward_files().items() if _fits(content, preprocessing)}
    users = min(_USERS_FILES, count)
    sources: list[ImageSource] = [*found[:users], *built_in.values()]
    names = [*(describe(source) for source in found[:users]), *built_in]
    pixels = np.stack([reference_pixels(source, preprocessing) for source in built_in.values()])

    crowd_expected = graph.run(crowd_images, _BATCH)
    noise = Noise(
        graph,
        np.concatenate([crowd_images[:count], synthetic_images(preprocessing.size_px), pixels]),
        {name: distance_apart(as_rows(values)) for name, values in crowd_expected.items()},
        ordinary=count,
    )
    warnings = [noise.blind] if noise.blind else []
    first, second = count, count + len(SYNTHETIC)
    real = noise.image_set("real images", range(count))
    told = noise.told(range(first, len(noise.images)))
    awkward_names = [*SYNTHETIC, *built_in]
    left = [name for place, name in enumerate(awkward_names, first) if place not in told]
    if left:
        warnings.append(
            f"left out of the awkward images: {', '.join(left)}; the model's own float32 noise there is up to "
            f"{noise.largest(range(first, len(noise.images))):.1%} of the output, so nothing can be compared"
        )
    awkward = noise.image_set("awkward images", [place for place in told if place < second], different=False)

    # The training side on its own: the checkpoint's model, a second implementation of everything before it.
    kept = [*range(users), *(place for place in told if place >= second)]
    at = [place if place < count else place - second + users for place in kept]
    chosen = [sources[place] for place in at]
    with torch.inference_mode():
        tensors = torch.stack([reference_tensor(source, preprocessing) for source in chosen])
        values = dict(zip(("embedding", "projection", "prediction"), checkpoint.model.online()(tensors), strict=True))
    end_to_end = ImageSet(
        "from the image files on",
        noise.images[kept],
        {name: values[name].numpy() for name in graph.outputs},
        {name: limit.subset(kept) for name, limit in noise.limits.items()},
        different=False,
    )

    crowd = ImageSet(
        f"{len(found)} real images",
        crowd_images,
        crowd_expected,
        crowd_limits(graph, crowd_images, crowd_expected, real.limits) if not noise.blind else dict(real.limits),
    )
    deployed = next(iter(crowd.expected))
    usual = float(np.median(real.limits[deployed].noise_of_images(count)))
    apart = separation(crowd.expected[deployed], noise_rel_l2=usual)
    warnings += apart.warnings
    if len(found) < GOLDEN_CASES:
        warnings.append(f"only {len(found)} different real images were compared; {GOLDEN_CASES} or more say more")
    warnings += batch_norm_check(graph, crowd_images[:_FOR_STATISTICS]).warnings
    fault = unsteady(real.expected, graph.run(real.images), real.limits)
    return Reference(
        real, awkward, crowd, chosen, [names[place] for place in at], end_to_end, described, apart,
        tuple(dict.fromkeys(warnings)), fault,
    )  # fmt: skip


def crowd_limits(
    graph: EncoderGraph, images: np.ndarray, expected: Mapping[str, np.ndarray], known: Mapping[str, Limit]
) -> dict[str, Limit]:
    """Limits of many images from those of a few: float64 for all of them would take too long."""
    other = rounded_otherwise(graph)[-1].run(images, _BATCH)
    return {
        name: known[name].widened(relative_l2(as_rows(other[name]), as_rows(values)))
        for name, values in expected.items()
    }


class Noise:
    """The reference for some images in float64, in float32, and in float32 with other rounding.

    Args:
        graph: The reference.
        images: (N, H, W, 3) uint8.
        apart: For each output how near two different real images lie, for the limits.
        ordinary: How many of the images, the first ones, are real.
    """

    def __init__(
        self, graph: EncoderGraph, images: np.ndarray, apart: Mapping[str, float | None], *, ordinary: int
    ) -> None:
        self.images = images
        self.blind = ""
        # An upright image and the same one stored lying on its side are one image here: float64 is slow.
        places: dict[bytes, int] = {}
        back = np.array([places.setdefault(image.tobytes(), len(places)) for image in images])
        once = images[np.unique(back, return_index=True)[1]]
        draws = [graph.run(once)]
        double = None
        try:
            double = graph.doubled().run(once, _BATCH)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            # A backbone that fixes float32 somewhere inside.
            self.blind = f"the model cannot compute in float64 ({first_line(error)}); limits are fixed numbers"
        for other in rounded_otherwise(graph) if double is not None else []:
            # One with views of its memory cannot be laid out otherwise: its noise is known from one draw less.
            with contextlib.suppress(RuntimeError):
                draws.append(other.run(once, _BATCH))
        self.single = {name: values[back] for name, values in draws[0].items()}
        self.noise = np.zeros(len(images)) if double is None else image_noise(draws, double)[back]
        self.limits = {
            name: replace(limit.subset(back.tolist()), apart=apart[name])
            for name, limit in derive_limits(draws, double, ordinary=ordinary).items()
        }

    def told(self, places: Sequence[int]) -> list[int]:
        """The images on which float32 determines the output.

        Far from every photograph a deep network can be chaotic: there float32 does not determine the output at all,
        and no correct runtime could agree with PyTorch. Real images are never left out.
        """
        return [place for place in places if self.noise[place] <= CHAOS_REL_L2]

    def largest(self, places: Sequence[int]) -> float:
        """The largest noise on these images."""
        return float(self.noise[list(places)].max())

    def image_set(self, name: str, places: Sequence[int], *, different: bool = True) -> ImageSet:
        """Some of the images with their own limits."""
        chosen = list(places)
        return ImageSet(
            name,
            self.images[chosen],
            {output: values[chosen] for output, values in self.single.items()},
            {output: limit.subset(chosen) for output, limit in self.limits.items()},
            different,
        )


def rounded_otherwise(graph: EncoderGraph) -> list[EncoderGraph]:
    """Copies of a graph that compute the same in exact arithmetic, or nearly so, and round otherwise in float32.

    One has its memory laid out with channels last, which calls other kernels; in one, half of the parameters are moved
    by one unit in the last place, which is what folding batch norm into a convolution does to them.
    """
    import torch

    last = copy.deepcopy(graph).to(memory_format=torch.channels_last)
    nudged = copy.deepcopy(graph)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in nudged.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("preprocessing."):
                draw = torch.rand(tensor.shape, generator=generator)
                moved = torch.nextafter(tensor, torch.where(draw < 0.25, -torch.inf, torch.inf))
                tensor.copy_(torch.where(draw < 0.5, moved, tensor))
    return [last, nudged]


def _fits(content: bytes, preprocessing: Preprocessing) -> bool:
    """Whether the contract takes this image at all: it refuses extreme aspects at very large sizes."""
    try:
        preprocessing(content)
    except DataError:
        return False
    return True


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


def synthetic_images(size_px: int) -> np.ndarray:
    """(5, size_px, size_px, 3) uint8, in the order of :data:`SYNTHETIC`; the checkerboard has single pixels."""
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


def choose_golden(reference: Reference, count: int = GOLDEN_CASES) -> tuple[Golden, dict[str, Limit]]:
    """The golden cases: real images that the encoder holds far apart, so that mixed-up outputs cannot pass.

    Farthest-point sampling on the first output, starting from the first image. Beside them some awkward image files.

    Returns:
        The cases, and for each output what a file may differ by on them.
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
    limits = {name: limit.subset(chosen) for name, limit in real.limits.items()}
    whole = reference.end_to_end
    # There is one limit for all files, that of the golden images: a file that is far noisier cannot travel. A third of
    # its own limit is still more than three noise floors.
    places = [
        place
        for place, name in enumerate(reference.names)
        if name in GOLDEN_FILES
        and all(
            not limit.each or limit.each[place] <= 3 * limits[output].rel_l2 for output, limit in whole.limits.items()
        )
    ]
    golden = Golden(
        real.images[chosen],
        {name: values[chosen] for name, values in real.expected.items()},
        {reference.names[place]: awkward_files()[reference.names[place]] for place in places},
        {reference.names[place]: pixels_hash(whole.images[place]) for place in places},
        {name: values[places] for name, values in whole.expected.items()} if places else {},
    )
    return golden, limits
