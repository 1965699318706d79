"""Images to calibrate with: a spread-out pick from many, kept with a training run.

A quantiser takes the ranges of activations from a hundred or so images, which must be like those of production and
unlike each other. A training keeps such a pick in its run directory (``calibration.npz``), so that an export months
later needs no data.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from byol_deploy.atomic import publish_file
from byol_deploy.errors import DataError
from byol_deploy.images import ImageSource, printable
from byol_deploy.preprocess import Preprocessing

CALIBRATION_FILE = "calibration.npz"
KEPT = 256
"""Images that a run keeps: every other one calibrates, the others try what came of it."""
FEWEST = 16
"""With fewer different images than this the ranges of activations are guesses."""

_POOL = 2
_THUMBNAIL_PX = 12
_MOST_BYTES = 1 << 30


def pick(sources: Sequence[ImageSource], preprocessing: Preprocessing, count: int = KEPT) -> np.ndarray:
    """Choose different images that lie far apart: farthest-point sampling on small thumbnails.

    Args:
        sources: Images; twice ``count`` of them, drawn with a fixed seed, are looked at. What cannot be decoded is
            skipped.
        preprocessing: Brings them to the size of the graph.
        count: How many.

    Returns:
        (N, H, W, 3) uint8, N up to ``count``.
    """
    pixels, seen = [], set()
    for place in np.random.default_rng(0).permutation(len(sources))[: _POOL * count]:
        try:
            image = preprocessing(sources[place])
        except DataError:
            continue
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            pixels.append(image)
    if not pixels:
        side = preprocessing.size_px
        return np.empty((0, side, side, 3), np.uint8)
    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)
    small = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in pixels])
    vectors = small.reshape(len(small), -1).astype(np.float32)
    chosen = [int(np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).argmin())]
    distance = np.full(len(vectors), np.inf)
    while len(chosen) < min(count, len(vectors)):
        distance = np.minimum(distance, np.linalg.norm(vectors - vectors[chosen[-1]], axis=1))
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
    return np.stack([pixels[place] for place in chosen])


def keep(run: Path, images: np.ndarray) -> None:
    """Write a pick, (N, H, W, 3) uint8, into a run directory."""
    with publish_file(run / CALIBRATION_FILE, force=True) as file:
        np.savez_compressed(file, images=images)


def kept(run: Path) -> np.ndarray | None:
    """The pick of a run directory, (N, H, W, 3) uint8; None where there is none.

    Raises:
        DataError: It is damaged.
    """
    path = run / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError("it is larger than 1 GiB")
        with np.load(path, allow_pickle=False) as content:
            images: np.ndarray = content["images"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"it holds {images.shape} {images.dtype}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{printable(path)} is damaged ({error}); give --calibration IMAGES") from error
    return images


def check(images: np.ndarray, where: str) -> None:
    """Refuse images that calibrate nothing.

    Raises:
        DataError: They are too few, or all alike.
    """
    if len(images) < FEWEST:
        raise DataError(
            f"{where} holds {len(images)} different images; calibration takes {FEWEST} or more like those of "
            "production, best 100 to 500: give --calibration IMAGES"
        )
    spread = float(images.astype(np.float32).std(axis=0).mean())
    if spread < 1.0:
        raise DataError(
            f"the {len(images)} images of {where} are all alike (their pixels differ by {spread:.2f} of 255 levels); "
            "calibrate with images as different as those of production: give --calibration IMAGES"
        )
