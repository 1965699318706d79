"""The two random views: every random number drawn from (seed, epoch, image), every pixel operation on the device.

The draws are made where the images are loaded, by a stateless hash: they depend on neither the number of loader
processes nor the batch, the device or what was drawn before, so that a resumed training sees what an uninterrupted
one sees. The operations are applied to a whole batch, each image with its own draws.

Operations and their order: google-deepmind/deepmind-research, byol/utils/augmentations.py. Each one follows
torchvision's functional form of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from byol_deploy.recipe import AugmentRecipe, ViewRecipe

Floats = npt.NDArray[np.float64]
Draws = dict[str, npt.NDArray[Any]]
"""Per-image draws of one view, each array (N,) or (N, 4); see :func:`draw_view`."""

CROP_TRIES = 10
_PER_VIEW = 2 * CROP_TRIES + 18
_GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R 601, as torchvision and the paper's code round them
_MASK = (1 << 64) - 1


# --- drawing ----------------------------------------------------------------------------------------------------


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stateless_seed(*parts: int) -> int:
    """One 63-bit seed from several whole numbers, such as (seed, epoch, rank)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + np.uint64(0x9E3779B97F4A7C15) + np.array([part & _MASK], np.uint64))
    return int(key[0]) >> 1


def uniforms(seed: int, epoch: int, indices: npt.ArrayLike, count: int) -> Floats:
    """``count`` numbers in [0, 1) for each image. Returns (N, count) float64, a pure function of its arguments."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    base = np.array([stateless_seed(seed, epoch)], np.uint64)
    keys = _mix(base + (np.asarray(indices, np.uint64) + np.uint64(1)) * golden)
    counters = np.arange(1, count + 1, dtype=np.uint64) * golden
    return (_mix(keys[:, None] + counters[None, :]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_views(
    recipe: AugmentRecipe, *, seed: int, epoch: int, indices: npt.ArrayLike, sizes: npt.ArrayLike
) -> tuple[Draws, Draws]:
    """Draw both views of some images.

    Args:
        recipe: resolved, without ``auto``.
        seed: the recipe's.
        epoch: from 0.
        indices: (N,) each image's place in the sorted list of images.
        sizes: (N, 2) width and height of each image, in pixels.
    """
    u = uniforms(seed, epoch, indices, 2 * _PER_VIEW)
    wh = np.asarray(sizes, np.float64)
    return draw_view(recipe.view1, u[:, :_PER_VIEW], wh), draw_view(recipe.view2, u[:, _PER_VIEW:], wh)


def draw_view(view: ViewRecipe, u: Floats, sizes: Floats) -> Draws:
    """Turn uniform numbers (N, 38) into one view's draws.

    Returns arrays by name: ``box`` (N, 4) float64 left, upper, right, lower in pixels; ``flip``, ``vertical_flip``,
    ``grey``, ``solarise`` (N,) bool; ``angle`` (N,) degrees; ``sigma`` (N,) pixels, 0 = no blur; ``brightness``,
    ``contrast``, ``saturation`` (N,) factors and ``hue`` (N,) turns, all without effect where ``jitter`` (N,) is
    False; ``order`` (N, 4) in which those four are applied.
    """
    tries, rest = u[:, : 2 * CROP_TRIES], u[:, 2 * CROP_TRIES :]
    factors = rest[:, 6:10] * 2 - 1
    assert view.blur != "auto", "draw from a resolved recipe"
    low, high = view.blur_sigma
    return {
        "box": crop_boxes(tries[:, :CROP_TRIES], tries[:, CROP_TRIES:], rest[:, 0:2], sizes, view),
        "flip": rest[:, 2] < view.flip,
        "vertical_flip": rest[:, 3] < view.vertical_flip,
        "angle": (rest[:, 4] * 2 - 1) * view.rotation_degrees,
        "jitter": rest[:, 5] < view.jitter,
        "brightness": 1 + view.brightness * factors[:, 0],
        "contrast": 1 + view.contrast * factors[:, 1],
        "saturation": 1 + view.saturation * factors[:, 2],
        "hue": view.hue * factors[:, 3],
        "order": np.argsort(rest[:, 10:14], axis=1),
        "grey": rest[:, 14] < view.grey,
        "sigma": np.where(rest[:, 15] < view.blur, low + (high - low) * rest[:, 16], 0.0),
        "solarise": rest[:, 17] < view.solarise,
    }


def crop_boxes(u_area: Floats, u_ratio: Floats, u_place: Floats, sizes: Floats, view: ViewRecipe) -> Floats:
    """Random crops: area uniform, log of the ratio uniform, the first of ten tries that fits into the image.

    Where none fits (a very long image) the largest centred crop with the nearest allowed ratio is taken, as
    torchvision's RandomResizedCrop does. Boxes are not rounded to whole pixels: Pillow resamples from fractions.

    Returns:
        (N, 4) left, upper, right, lower, within the image.
    """
    width, height = sizes[:, :1], sizes[:, 1:]
    low, high = view.crop_area
    area = width * height * (low + (high - low) * u_area)
    log_low, log_high = math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])
    ratio = np.exp(log_low + (log_high - log_low) * u_ratio)
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (w <= width) & (h <= height)
    first = fits.argmax(axis=1)
    rows = np.arange(len(w))
    none: npt.NDArray[np.bool_] = np.logical_not(fits.any(axis=1))
    limited = np.clip(width[:, 0] / height[:, 0], *view.crop_ratio)
    w_one = np.where(none, np.minimum(width[:, 0], height[:, 0] * limited), w[rows, first])
    h_one = np.where(none, np.minimum(height[:, 0], width[:, 0] / limited), h[rows, first])
    place = np.where(none[:, None], 0.5, u_place)
    left = (width[:, 0] - w_one) * place[:, 0]
    upper = (height[:, 0] - h_one) * place[:, 1]
    # Rounding may put a border a hair outside, which Pillow refuses.
    right = np.minimum(left + w_one, width[:, 0])
    lower = np.minimum(upper + h_one, height[:, 0])
    return np.stack([left, upper, right, lower], axis=1)


def left_out(view: ViewRecipe) -> list[str]:
    """Names of the operations of a view that have no meaning for grey images and would be done in colour."""
    colour = [("saturation", view.jitter * view.saturation), ("hue", view.jitter * view.hue), ("grey", view.grey)]
    return [name for name, amount in colour if amount > 0]


# --- operations -------------------------------------------------------------------------------------------------
# All of them: x (N, C, H, W) float32 in [0, 1], C 1 or 3; one factor per image (N, 1, 1, 1); a new tensor returned.


def to_grey(x: Tensor) -> Tensor:
    """Luma of RGB. (N, 3, H, W) or (N, 1, H, W) to (N, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    r, g, b = _GREY_WEIGHTS
    return (x[:, 0:1] * r).add_(x[:, 1:2], alpha=g).add_(x[:, 2:3], alpha=b)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luma."""
    mean = to_grey(x).mean(dim=(1, 2, 3), keepdim=True)
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's luma. Nothing changes in a grey image."""
    return (x * factor).add_(to_grey(x) * (1 - factor)).clamp_(0, 1) if x.shape[1] == 3 else x


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the colour circle, through HSV. Nothing changes in a grey image."""
    if x.shape[1] == 1:
        return x
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    safe = torch.where(chroma == 0, 1.0, chroma)
    # Hue in sixths of the circle, by which channel is the largest (Smith 1978).
    sixths = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sixths = sixths.add_(turn * 6)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (sixths + offset).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.cat(channels, dim=1)


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Separable Gaussian blur with mirrored borders, ``kernel`` pixels wide. sigma: (N, 1, 1, 1) pixels, above 0."""
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)  # (N, 1, 1, kernel)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    for axis in (2, 3):
        size = x.shape[axis]
        # Mirrored without repeating the edge, written as an index so that any kernel fits any size.
        places = torch.arange(-reach, size + reach, device=x.device)
        period = max(2 * (size - 1), 1)
        places = places.remainder(period)
        places = torch.where(places >= size, period - places, places)
        padded = x.index_select(axis, places)
        total = padded.narrow(axis, 0, size) * weights[..., 0:1]
        for tap in range(1, kernel):
            total.addcmul_(padded.narrow(axis, tap, size), weights[..., tap : tap + 1])
        x = total
    return x


def solarise(x: Tensor, threshold: float) -> Tensor:
    """Invert what is at or above ``threshold``."""
    return torch.where(x >= threshold, 1 - x, x)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotate counter-clockwise around the centre, bilinear, corners mirrored. degrees: (N, 1, 1, 1)."""
    angle = torch.deg2rad(degrees.flatten())
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = x.shape[-2:]
    # affine_grid works in a square of side 2 whatever the image's shape: the ratio keeps the rotation rigid.
    theta = torch.stack(
        [cos, -sin * (height / width), zero, sin * (width / height), cos, zero],
        dim=1,
    ).view(-1, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


_JITTER: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("brightness", brightness),
    ("contrast", contrast),
    ("saturation", saturation),
    ("hue", hue),
)


def apply_view(pixels: Tensor, draws: Draws, view: ViewRecipe, mean: Tensor, std: Tensor) -> Tensor:
    """Make one view of a batch, after the crop.

    Args:
        pixels: (N, H, W, C) uint8 on the device; C is 1 where all images of the data are grey, otherwise 3.
        draws: from :func:`draw_views`, on the host.
        view: the resolved recipe of this view.
        mean: (1, 3, 1, 1) float32 on the device.
        std: (1, 3, 1, 1) float32 on the device.

    Returns:
        (N, 3, H, W) float32, normalised, in channels-last memory.
    """
    device = pixels.device

    def places(mask: npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(mask)).to(device, non_blocking=True)

    def factor(name: str, mask: npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(draws[name][mask].astype(np.float32)).to(device, non_blocking=True).view(-1, 1, 1, 1)

    def change(mask: npt.NDArray[np.bool_], operation: Callable[[Tensor], Tensor]) -> None:
        # Whoever is not drawn is not touched: the masks are known on the host, so this never waits for the device.
        if mask.any():
            where = places(mask)
            x.index_copy_(0, where, operation(x.index_select(0, where)).expand(-1, x.shape[1], -1, -1))

    def jitter(
        operation: Callable[[Tensor, Tensor], Tensor], name: str, mask: npt.NDArray[np.bool_], part: Tensor
    ) -> Tensor:
        return operation(part, factor(name, mask))

    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    change(draws["flip"], lambda part: part.flip(-1))
    change(draws["vertical_flip"], lambda part: part.flip(-2))
    if view.rotation_degrees > 0:
        everyone = np.ones(len(x), np.bool_)
        change(everyone, lambda part: rotate(part, factor("angle", everyone)))
    colours = 2 if x.shape[1] == 1 else 4  # saturation and hue of a grey image have no meaning
    for place in range(4):
        for number, (name, operation) in enumerate(_JITTER[:colours]):
            if getattr(view, name) > 0:
                mask = draws["jitter"] & (draws["order"][:, place] == number)
                change(mask, partial(jitter, operation, name, mask))
    if x.shape[1] == 3:
        change(draws["grey"], to_grey)
    assert view.blur_kernel != "auto", "apply a resolved recipe"
    if view.blur_kernel > 1:
        kernel = view.blur_kernel
        mask = draws["sigma"] > 0
        change(mask, lambda part: gaussian_blur(part, factor("sigma", mask), kernel))
    change(draws["solarise"], lambda part: solarise(part, view.solarise_threshold))
    x.clamp_(0, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
