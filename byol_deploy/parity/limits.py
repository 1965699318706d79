"""How much may a file differ? That depends on the model, and on the precision that the file promises.

**float32.** A deep transformer gathers more rounding error than a small ResNet, and an image can be harder than its
neighbour: a fixed tolerance is blind on the one or too strict for the other. So the limit comes from the model and the
image. The reference is computed in float64 and, several times, in float32: as it is, with its memory laid out
otherwise, and with weights moved by half of their last bit, which is what a runtime does that folds batch norm. The
largest distance of these from float64 is the *noise floor* of an image, :func:`image_noise`. A correct float32 runtime
orders its sums in yet another way and lands at about the same distance; the limit is :data:`NOISE_MULTIPLE` floors.
Real faults are orders of magnitude beyond it (wrong mean or channel order: 0.1 to 1 relative; another epsilon in batch
norm: about 1e-4). benchmarks/results/backbones.md holds what was measured on the families of timm and torchvision.

**Reduced precision.** An int8 file is not the same function, and no multiple of float32's noise says whether it is
still the same *encoder*. :class:`FidelityLimit` asks what an embedding is used for: by what part of the distance
between two images do they drift (the margin), and do they keep their nearest neighbours? Measured on three trained
encoders (benchmarks/results/faults.md): bfloat16, float16 and int8 with a sound calibration have margins up to 0.21,
int8 calibrated on noise and int8 that ruins a network from 0.30 up. Raw distances do not separate them: bfloat16 moves
all images of a crowded embedding alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from byol_deploy.parity.measures import as_rows, relative_l2

NOISE_MULTIPLE = 10.0
"""The limit on relative L2, in noise floors of the image."""

LEAST_REL_L2 = 2e-6
"""The limit where the noise floor is smaller than a tenth of it: 17 float32 roundings (2**-23)."""

MOST_REL_L2 = 0.1
"""More than a tenth of the vector's length is no rounding any more, whatever the model does with it."""

BLIND_REL_L2 = 1e-4
"""The limit where the model cannot compute in float64, so that its noise is not known."""

MOST_MARGIN = 0.25
"""Two images that each drift by less than a quarter of their distance are at least half as far apart as they were, and
at most one and a half times: even the nearest ones stay the nearest ones, and stay two."""

LESS_STRICT = 2.0
"""What multiplies that margin for heads, which serve training, and again for images that are no photographs of the kind
that was trained on and calibrated with. Measured on harmless files, photographs and others: embedding 0.21 and 0.26,
heads 0.28 and 0.55."""

LEAST_AGREEMENT = 0.85
"""Share of images that must keep their nearest neighbour at reduced precision. Not more: a garment may have several
neighbours that are nearly level, between which any rounding chooses anew (bfloat16 on the most crowded of the measured
encoders: 0.89). It catches what moves few images far, which the margin's percentile does not see."""


@dataclass(frozen=True)
class Limit:
    """What one output of a float32 file may differ by.

    Attributes:
        rel_l2: Largest relative L2 error of any image.
        cosine: Smallest cosine of any image with its reference.
        noise_rel_l2: The model's own noise floor that the two were derived from; 0 when it is not known.
        each: Limit on the relative L2 error of each single image, none above ``rel_l2``; empty where ``rel_l2``
            holds for all.
        apart: :func:`byol_deploy.parity.distance_apart` of the reference, for the margin; None where it is taken from
            the images that are compared.
    """

    rel_l2: float
    cosine: float
    noise_rel_l2: float = 0.0
    each: tuple[float, ...] = ()
    apart: float | None = None

    def of_images(self, n: int) -> np.ndarray | None:
        """(n,) float64: each image's limit; None when this limit was derived for another number of images."""
        if self.each and len(self.each) != n:
            return None
        return np.array(self.each) if self.each else np.full(n, self.rel_l2)

    def noise_of_images(self, n: int) -> np.ndarray:
        """(n,) float64: each image's noise floor, from which its limit was derived; 0 where it is not known."""
        if not self.each:
            return np.full(n, self.noise_rel_l2)
        return np.minimum(np.array(self.each) / NOISE_MULTIPLE, self.noise_rel_l2)

    def subset(self, places: Sequence[int]) -> Limit:
        """The limit of some of the images: what the others are like says nothing about them."""
        if not self.each or not len(places):
            return self
        return _limit([self.each[place] for place in places], self.noise_rel_l2, self.apart)

    def widened(self, spread: np.ndarray) -> Limit:
        """The limit of other images of the same kind, of which no float64 is known.

        Args:
            spread: (N,), for each of them the relative L2 distance of two float32 evaluations that round otherwise.
                Where that alone is beyond the noise that is known, it is the image's floor.
        """
        each = np.clip(NOISE_MULTIPLE * spread, self.rel_l2, MOST_REL_L2)
        return _limit(each.tolist(), max(self.noise_rel_l2, float(spread.max(initial=0.0))), self.apart)

    def to_dict(self) -> dict[str, Any]:
        """As in a manifest: rel_l2, cosine, noise_rel_l2, and ``each`` and ``apart`` where there are any."""
        document = asdict(self) | {"each": list(self.each)}
        return {name: value for name, value in document.items() if value not in ([], None)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limit:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: A key is missing or unknown, or a value cannot be a limit. A limit that lets everything pass
                (an error above 1, a cosine of 0 or below) is no limit.
        """
        names = ("rel_l2", "cosine", "noise_rel_l2")
        if not isinstance(data, Mapping) or set(data) - {"each", "apart"} != set(names):
            raise ValueError(f"a limit is {data!r}; it has the keys {', '.join(names)}")
        each = data.get("each", ())
        if not isinstance(each, list | tuple):
            raise ValueError(f"each is {each!r}; it must be a list of numbers")
        apart = data.get("apart")
        numbers = {name: data[name] for name in names} | {f"each[{at}]": value for at, value in enumerate(each)}
        for name, value in (numbers | ({} if apart is None else {"apart": apart})).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}; it must be a number")
        made = cls(
            float(data["rel_l2"]),
            float(data["cosine"]),
            float(data["noise_rel_l2"]),
            tuple(float(value) for value in each),
            None if apart is None else float(apart),
        )
        if not (0 < made.rel_l2 <= 1 and 0 < made.cosine <= 1 and 0 <= made.noise_rel_l2 <= 1):
            raise ValueError(f"a limit is {dict(data)}; rel_l2 and cosine lie above 0 and up to 1, the noise in 0 to 1")
        if made.apart is not None and not 0 <= made.apart <= 2:
            raise ValueError(f"a limit is {dict(data)}; apart is a distance from 0 to 2")
        if not all(0 < value <= made.rel_l2 for value in made.each):
            raise ValueError(f"a limit is {dict(data)}; each of its images' limits lies above 0 and up to rel_l2")
        return made


@dataclass(frozen=True)
class FidelityLimit:
    """What one output of a file of reduced precision may differ by.

    Attributes:
        margin: Largest drift in distances between different images, see :func:`byol_deploy.parity.separation_margin`.
        agreement: Smallest share of images with the same nearest neighbour; None where it is not asked for, because
            there are too few images for it.
        apart: As in :class:`Limit`.
    """

    margin: float = MOST_MARGIN
    agreement: float | None = LEAST_AGREEMENT
    apart: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """``{"margin": ..., "agreement": ..., "apart": ...}``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FidelityLimit:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: A key is missing or unknown, or a value cannot be a limit.
        """
        if not isinstance(data, Mapping) or set(data) != {"margin", "agreement", "apart"}:
            raise ValueError(f"a fidelity limit is {data!r}; it has the keys margin, agreement, apart")
        most = {"margin": 1.0, "agreement": 1.0, "apart": 2.0}
        for name, value in data.items():
            if value is None and name != "margin":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most[name]:
                raise ValueError(f"{name} is {value!r}; it must be a number above 0 and up to {most[name]:g}")
        return cls(**{name: None if value is None else float(value) for name, value in data.items()})  # type: ignore[arg-type]


AnyLimit = Limit | FidelityLimit


def fidelity_limits(limits: Mapping[str, Limit], *, photographs: bool, agreement: bool) -> dict[str, AnyLimit]:
    """What a file of reduced precision may differ by, where a float32 file has these limits.

    Args:
        limits: Output name to the float32 limit; the first output is the one that is deployed.
        photographs: Whether the images are such as the encoder was trained on, and enough of them for a percentile.
        agreement: Whether there are enough images to ask for neighbours too.
    """
    found: dict[str, AnyLimit] = {}
    for name, limit in limits.items():
        margin = MOST_MARGIN * (LESS_STRICT if found else 1.0) * (1.0 if photographs else LESS_STRICT)
        asked = LEAST_AGREEMENT if agreement and not found else None
        # A distance of 0 tells no images apart: then there is none.
        found[name] = FidelityLimit(margin, asked, limit.apart or None)
    return found


def derive_limits(
    single: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]],
    double: Mapping[str, np.ndarray] | None,
    *,
    ordinary: int | None = None,
) -> dict[str, Limit]:
    """Limits for each image from the reference's own float32 noise.

    Args:
        single: Output name to (N, D), the reference in float32; or several such evaluations, each of which rounds
            otherwise. One evaluation is one draw of rounding errors, which may happen to be small.
        double: The same images in float64; None where the model cannot compute in float64. The limit is then
            a round 1e-4, which every family measured so far keeps with an order to spare.
        ordinary: How many of the images, the first ones, are such as the model was made for; None is all.

    Returns:
        Output name to its limit. An image's floor is its own noise, and no less than the median of the ordinary ones:
        a draw that happened to round well must not make its limit unreachable. A cosine belongs to a relative error r:
        the angle between a vector and one that lies r of its length away is at most asin(r), so it is at least
        sqrt(1 - r^2).
    """
    draws = [single] if isinstance(single, Mapping) else list(single)
    limits = {}
    for name, expected in draws[0].items():
        if double is None:
            limits[name] = Limit(BLIND_REL_L2, _cosine_of(BLIND_REL_L2))
            continue
        noise = np.max([_noise(draw[name], double[name]) for draw in draws], axis=0, initial=0.0)
        known = noise[: len(expected) if ordinary is None else ordinary]
        known = known[np.isfinite(known)]
        typical = float(np.median(known)) if known.size else 0.0
        floors = np.where(np.isfinite(noise), np.maximum(noise, typical), typical)
        each = np.clip(NOISE_MULTIPLE * floors, LEAST_REL_L2, MOST_REL_L2)
        finite = noise[np.isfinite(noise)]
        limits[name] = _limit(each.tolist() or [LEAST_REL_L2], float(finite.max(initial=0.0)), None)
    return limits


def _limit(each: Sequence[float], noise: float, apart: float | None) -> Limit:
    """A limit for each image, with the noise of these images: no more than they were given room for."""
    largest = max(each)
    return Limit(largest, _cosine_of(largest), min(noise, largest / NOISE_MULTIPLE), tuple(each), apart)


def image_noise(
    single: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]], double: Mapping[str, np.ndarray]
) -> np.ndarray:
    """For each image the largest relative L2 distance of any output's float32 from its float64.

    Args:
        single: Output name to (N, D), the reference in float32; or several such evaluations.
        double: The same images in float64.

    Returns:
        (N,) float64; infinite where an output is not finite.
    """
    draws = [single] if isinstance(single, Mapping) else list(single)
    noise = np.max([_noise(values, double[name]) for draw in draws for name, values in draw.items()], axis=0)
    return np.asarray(np.where(np.isfinite(noise), noise, np.inf))


def _noise(single: np.ndarray, double: np.ndarray) -> np.ndarray:
    return relative_l2(as_rows(single), as_rows(double))


def _cosine_of(rel_l2: float) -> float:
    return math.sqrt(1.0 - min(rel_l2, 1.0) ** 2)
