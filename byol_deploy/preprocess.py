"""The preprocessing contract: what happens between an image file and the uint8 input of an exported encoder.

There is one implementation, with Pillow. The training side's evaluation transform calls it too, and its numbers travel
in every exported file, so training and deployment cannot drift apart. Resize and crop follow torchvision's
``v2.Resize(antialias on PIL images)`` and ``v2.CenterCrop`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from byol_deploy.errors import DataError
from byol_deploy.images import ImageSource, decode, describe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIZE_PX = 8192

# Filters that average over the pixels they leave out. Nearest does not: it is left out on purpose.
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# What this implementation does and offers no choice about, written out for readers and other implementations.
_FIXED = {
    "channels": "RGB",
    "exif": "applied",
    "alpha": "over white",
    "resize": "shorter side",
    "crop": "center",
}
_CHOSEN = ("size_px", "resize_px", "filter", "mean", "std")


@dataclass(frozen=True)
class Preprocessing:
    """Decode → resize the shorter side → centre crop; the graph then scales to 0..1 and normalises.

    Attributes:
        size_px: Side of the square that the encoder sees, 1 to 8192 pixels.
        resize_px: Length of the shorter side before the crop, at least ``size_px``. None means ``size_px``; an
            instance always holds the number.
        filter: Pillow's resampling filter: bicubic, bilinear, lanczos, box or hamming.
        mean: Mean of the R, G and B channels in 0..1, subtracted in the graph.
        std: Standard deviation of the channels in 0..1, divided by in the graph.

    Raises:
        ValueError: Lists every value that is out of range.
    """

    size_px: int
    resize_px: int | None = None
    filter: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        faults = []
        if self.resize_px is None:
            object.__setattr__(self, "resize_px", self.size_px)
        if not _is_size(self.size_px):
            faults.append(f"size_px is {self.size_px!r}; use a whole number from 1 to {MAX_SIZE_PX}")
        elif not _is_size(self.resize_px) or self.shorter_side_px < self.size_px:
            faults.append(f"resize_px is {self.resize_px!r}; use {self.size_px} (size_px) to {MAX_SIZE_PX}")
        if not isinstance(self.filter, str) or self.filter not in _FILTERS:
            faults.append(f"filter is {self.filter!r}; use one of {', '.join(_FILTERS)}")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if not _is_triple(value) or (name == "std" and min(value) <= 0):
                kind = "three positive numbers" if name == "std" else "three numbers"
                faults.append(f"{name} is {value!r}; use {kind}, one each for R, G and B")
            else:
                object.__setattr__(self, name, tuple(float(number) for number in value))
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def shorter_side_px(self) -> int:
        """The shorter side before the crop, in pixels: ``resize_px`` as a number."""
        assert self.resize_px is not None  # set in __post_init__
        return self.resize_px

    def __call__(self, source: ImageSource) -> np.ndarray:
        """Preprocess one image.

        Args:
            source: What :func:`byol_deploy.images.decode` takes.

        Returns:
            (size_px, size_px, 3) uint8 RGB.

        Raises:
            DataError: The image cannot be decoded, or is so narrow that scaling it would exceed Pillow's pixel limit.
        """
        image = decode(source)
        width, height = self._scaled(image.width, image.height)
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and width * height > limit:
            raise DataError(
                f"{describe(source)} has {image.width} x {image.height} pixels, which would become {width} x {height} "
                f"at {self.shorter_side_px} px, above Pillow's limit of {limit}; cut it into pieces first"
            )
        image = image.resize((width, height), _FILTERS[self.filter])
        # torchvision's rounding (half to even), so that both sides take the same pixels.
        left = round((width - self.size_px) / 2.0)
        top = round((height - self.size_px) / 2.0)
        return np.array(image.crop((left, top, left + self.size_px, top + self.size_px)), dtype=np.uint8)

    def batch(self, sources: Iterable[ImageSource]) -> np.ndarray:
        """Preprocess many images. Returns (N, size_px, size_px, 3) uint8 RGB; raises what a call raises."""
        images = [self(source) for source in sources]
        return np.stack(images) if images else np.empty((0, self.size_px, self.size_px, 3), np.uint8)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """What the exported graph does first, in NumPy: scale to 0..1, subtract the mean, divide by the deviation.

        Args:
            images: (N, H, W, 3) uint8 RGB.

        Returns:
            (N, 3, H, W) float32.

        Raises:
            ValueError: Another shape or type.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are {images.shape} {images.dtype}; pass (N, H, W, 3) uint8")
        scaled = images.astype(np.float32) / np.float32(255)
        normal = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def to_dict(self) -> dict[str, Any]:
        """The contract as plain JSON values, the fixed steps written out."""
        return {
            "size_px": self.size_px,
            "resize_px": self.shorter_side_px,
            "filter": self.filter,
            "mean": list(self.mean),
            "std": list(self.std),
            **_FIXED,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` wrote.

        Unknown keys are refused: a step that this version does not know would be left out silently.

        Raises:
            ValueError: Lists unknown keys, fixed steps that differ from this implementation's, and bad values.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"preprocessing is a {type(data).__name__}; it must be a mapping")
        faults = [f"unknown key {key!r}" for key in data if key not in _FIXED and key not in _CHOSEN]
        faults += [
            f"{key} is {data[key]!r}; this version does {value!r} only"
            for key, value in _FIXED.items()
            if key in data and data[key] != value
        ]
        chosen = {key: data[key] for key in _CHOSEN if key in data}
        for key in ("mean", "std"):
            if isinstance(chosen.get(key), list):
                chosen[key] = tuple(chosen[key])
        made = None
        if "size_px" not in chosen:
            faults.append("size_px is missing")
        else:
            try:
                made = cls(**chosen)
            except ValueError as error:
                faults.append(str(error))
        if faults or made is None:
            raise ValueError("; ".join(faults))
        return made

    def describe(self) -> str:
        """The contract in one sentence for a person."""
        mean, std = (", ".join(f"{number:g}" for number in values) for values in (self.mean, self.std))
        return (
            f"RGB, EXIF orientation applied, transparency over white, shorter side resized to {self.shorter_side_px} "
            f"px ({self.filter}, antialiased), centre {self.size_px} x {self.size_px} px, mean {mean}, std {std}"
        )

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Size after the resize, as torchvision computes it: the longer side is rounded down."""
        short = self.shorter_side_px
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE_PX


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 3
        and all(
            # False for NaN and infinities too.
            isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e6
            for number in value
        )
    )
