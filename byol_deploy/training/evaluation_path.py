"""A second implementation of the evaluation transform, written on torchvision: what end-to-end parity compares with.

The shipped runtime and training share one implementation of decoding and resizing. Comparing them with each other
would be a check that cannot fail: a wrong turn would be wrong on both sides. This one shares no code with
:mod:`byol_deploy.images` and :mod:`byol_deploy.preprocess`. From the contract it takes the numbers only. The steps are
Pillow's own for EXIF, torchvision's for resize and crop, NumPy formulas for transparency, 16 bits and CMYK, and PyTorch
for the normalisation. Both sides trust Pillow to read files and to compute a resampling filter.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from byol_deploy.errors import DataError

if TYPE_CHECKING:
    from byol_deploy.images import ImageSource
    from byol_deploy.preprocess import Preprocessing

# Opening these starts a program or a registered handler, and nothing that we read may execute code.
_REFUSED = ("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG")


def reference_pixels(source: ImageSource, preprocessing: Preprocessing) -> np.ndarray:
    """Decode, resize and crop one image by the contract, without the shipped implementation.

    Args:
        source: A path, the bytes of an image file, a Pillow image, or a uint8 array of shape (H, W), (H, W, 1),
            (H, W, 3) RGB or (H, W, 4) RGBA.
        preprocessing: The contract: sizes and filter are read from it.

    Returns:
        (size_px, size_px, 3) uint8 RGB.

    Raises:
        DataError: The image cannot be decoded.
    """
    try:
        upright = Image.fromarray(_rgb(_open(source)))
    except DataError:
        raise
    except Exception as error:  # malformed files make Pillow's plugins raise nearly anything
        raise DataError(f"the reference path cannot decode {_name(source)}: {error}; leave it out") from error
    transform = v2.Compose(
        [
            v2.Resize(preprocessing.shorter_side_px, InterpolationMode(preprocessing.filter), antialias=True),
            v2.CenterCrop(preprocessing.size_px),
        ]
    )
    return np.array(transform(upright), dtype=np.uint8)


def reference_tensor(source: ImageSource, preprocessing: Preprocessing) -> Tensor:
    """What the trained model takes for one image: :func:`reference_pixels`, scaled to 0..1 and normalised.

    Args:
        source: As for :func:`reference_pixels`.
        preprocessing: The contract.

    Returns:
        (3, size_px, size_px) float32.

    Raises:
        DataError: The image cannot be decoded.
    """
    unit = torch.from_numpy(reference_pixels(source, preprocessing)).permute(2, 0, 1).to(torch.float32).div(255.0)
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in (preprocessing.mean, preprocessing.std))
    return unit.sub(mean[:, None, None]).div(std[:, None, None]).contiguous()


def _open(source: ImageSource) -> Image.Image:
    """The loaded image, upright."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise DataError(f"{_name(source)} has {source.dtype} pixels; pass uint8")
        return Image.fromarray(source.squeeze(axis=2) if source.shape[2:] == (1,) else source)
    if isinstance(source, Image.Image):
        return _transposed(source)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as image:
        if image.format in _REFUSED:
            raise DataError(f"{_name(source)} is a {image.format} file; convert it to PNG")
        return _transposed(image)


def _transposed(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block: there is no orientation to apply
        return image.copy()


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an upright image of any mode."""
    transparent = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_grey16(np.asarray(image).astype(np.float64), transparent)
    if image.mode == "CMYK":
        ink = np.asarray(image).astype(np.int64)
        light = (255 - ink[..., :3]) * (255 - ink[..., 3:])
        return _rounded(light, 255)
    if image.mode == "F":
        raise DataError("the image has floating-point pixels; convert it to 8 or 16 bits first")
    if transparent is not None or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        # Pillow has no direct way from premultiplied grey to RGBA.
        straight = image.convert("LA") if image.mode == "La" else image
        return _over_white(np.asarray(straight.convert("RGBA")).astype(np.int64))
    return np.asarray(image.convert("RGB"))


def _from_grey16(values: np.ndarray, transparent: object) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"the image has grey values up to {values.max():.0f}; 16 bits end at 65535")
    # 65535 is white: 65535 / 255 = 257. No value lies halfway, as 257 is odd.
    grey = np.rint(values / 257.0)
    if isinstance(transparent, int):
        grey = np.where(values == transparent, 255.0, grey)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """Compose (H, W, 4) over white: the operator "over" of Porter and Duff (1984), rounded to the nearest level."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return _rounded(colour * alpha + 255 * (255 - alpha), 255)


def _rounded(numerator: np.ndarray, denominator: int) -> np.ndarray:
    """Nearest whole number of a quotient whose denominator is odd, so that no tie exists; as uint8."""
    return ((numerator + denominator // 2) // denominator).astype(np.uint8)


def _name(source: object) -> str:
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"an array of shape {source.shape}"
    return f"an image of mode {source.mode}" if isinstance(source, Image.Image) else str(source)
