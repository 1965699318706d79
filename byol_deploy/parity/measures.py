"""The numbers that a comparison is made of: each is a function of the reference's rows and the tested ones.

Rows are (N, D), one per image. An embedding is judged as an embedding: its errors in units of its own length, its
direction after the mean embedding was subtracted (embeddings crowd around their mean, and without this every image
looks like every other one), its nearest neighbours, and its drift in units of the distance between different images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST_FOR_NEIGHBOURS = 8
"""With fewer images than this an agreement of nearest neighbours says nothing."""

OVERLAP_AT = 10
FEWEST_FOR_OVERLAP = 30
"""With fewer images than this ten neighbours are a large part of all."""

FEWEST_FOR_SEPARATION = 3
"""With fewer images than this there is no distribution of distances between different images."""

_TINY = np.finfo(np.float64).tiny
_MOST_FOR_DISTANCES = 512
_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A share of images with its 95 % interval.

    Attributes:
        value: 0 to 1.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        """``[value, low, high]``."""
        return [self.value, self.low, self.high]

    @classmethod
    def from_list(cls, data: Any) -> Share:
        """Read what :meth:`to_list` wrote.

        Raises:
            ValueError: It is not three numbers from 0 to 1.
        """
        if not isinstance(data, list | tuple) or len(data) != 3:
            raise ValueError(f"a share is {data!r}; it is a list of value, low and high")
        if any(isinstance(item, bool) or not isinstance(item, int | float) or not 0 <= item <= 1 for item in data):
            raise ValueError(f"a share is {data!r}; its numbers lie from 0 to 1")
        return cls(*(float(item) for item in data))

    def __str__(self) -> str:
        """E.g. ``98.4% [96.1, 100]``."""
        return f"{self.value:.1%} [{100 * self.low:.3g}, {100 * self.high:.3g}]"


def as_rows(values: np.ndarray) -> np.ndarray:
    """(N, ...) as (N, D) float64."""
    flat: np.ndarray = values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)
    return flat


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|actual - expected| / |expected| of each row; 0 where both are zero, infinite where only the reference is."""
    difference, length = np.linalg.norm(actual - expected, axis=1), np.linalg.norm(expected, axis=1)
    safe = np.where(length > 0, length, 1.0)
    ratio: np.ndarray = np.where(length > 0, difference / safe, np.where(difference > 0, np.inf, 0.0))
    return ratio


def sqnr_db(actual: np.ndarray, expected: np.ndarray) -> float | None:
    """Signal to quantisation noise, 10 log10(sum |expected|^2 / sum |actual - expected|^2), in decibels.

    None where there is no difference; minus infinity where the reference is zero and the other is not.
    """
    noise = float(((actual - expected) ** 2).sum())
    signal = float((expected**2).sum())
    if noise == 0.0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows; 1 where both are zero, 0 where one is."""
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~(a.any(axis=1) | b.any(axis=1))
    found: np.ndarray = np.where(
        product > 0, (a * b).sum(axis=1) / np.where(product > 0, product, 1.0), both_zero.astype(np.float64)
    )
    return found


def centred_cosine_min(actual: np.ndarray, expected: np.ndarray, noise_rel_l2: float | np.ndarray) -> float | None:
    """Smallest cosine after subtracting the means, over the images that are farther from the mean than noise."""
    centred = expected - expected.mean(axis=0)
    floor = 10 * noise_rel_l2 * np.linalg.norm(expected, axis=1)
    telling = np.linalg.norm(centred, axis=1) > floor
    if len(expected) < 2 or not telling.any():
        return None
    return float(cosines(actual - actual.mean(axis=0), centred)[telling].min())


def distances(rows: np.ndarray) -> np.ndarray:
    """Euclidean distances between different rows, of 512 of them (drawn with a fixed seed) where there are more."""
    if len(rows) > _MOST_FOR_DISTANCES:
        rows = rows[np.random.default_rng(0).permutation(len(rows))[:_MOST_FOR_DISTANCES]]
    # Differences, not |a|^2 + |b|^2 - 2ab: embeddings crowd, and the latter cancels to nothing there.
    upper = [np.linalg.norm(rows[place + 1 :] - rows[place], axis=1) for place in range(len(rows) - 1)]
    return np.concatenate(upper) if upper else np.empty(0)


def centred_units(rows: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Rows minus their mean, or that of ``among``, at unit length: the sphere on which neighbours by cosine live."""
    centred = rows - (rows if among is None else among).mean(axis=0)
    units: np.ndarray = centred / np.maximum(np.linalg.norm(centred, axis=1), _TINY)[:, None]
    return units


def distance_apart(expected: np.ndarray) -> float | None:
    """How near two different images lie to each other: the 1st percentile of their distances on the unit sphere.

    Args:
        expected: (N, D), of N different images.

    Returns:
        0 to 2, of :func:`centred_units`; None for fewer than 3 images.
    """
    if len(expected) < FEWEST_FOR_SEPARATION:
        return None
    return float(np.percentile(distances(centred_units(expected)), 1))


def separation_margin(
    actual: np.ndarray,
    expected: np.ndarray,
    apart: float | None = None,
    among: tuple[np.ndarray, np.ndarray] | None = None,
) -> float | None:
    """Drift in units of the distance between different images.

    Both sides are centred on their own mean and brought to unit length, as for neighbours: a file that moves all
    images alike, or makes all vectors longer, changes nothing about which images are near each other (bfloat16 does
    so on crowded embeddings). The margin is the 99th percentile over the images of the drift, divided by the 1st
    percentile of the distances between the reference's different images.

    Args:
        actual: (N, D).
        expected: (N, D), of N different images.
        apart: :func:`distance_apart`, where it is known from more images than these.
        among: (M, D) of the reference and (M, D) of the other side, of the photographs whose mean is the centre of each
            side; None where N themselves are such. A few images that are no photographs have no mean of their own.

    Returns:
        0 or more; infinite where different images have the same vector; None for fewer than 3 images and no ``apart``,
        or for a single image and no ``among``.
    """
    apart = distance_apart(expected) if apart is None else apart
    if apart is None or (among is None and len(expected) < 2):
        return None
    mine, theirs = among or (expected, actual)
    drift = float(
        np.percentile(np.linalg.norm(centred_units(actual, theirs) - centred_units(expected, mine), axis=1), 99)
    )
    if apart == 0.0:
        return 0.0 if drift == 0.0 else math.inf
    return drift / apart


def all_alike(expected: np.ndarray, noise_rel_l2: float) -> bool:
    """Whether the rows differ by no more than ten times their own noise: then nothing tells one image from another."""
    if len(expected) < 2:
        return False
    spread = float(np.linalg.norm(expected - expected.mean(axis=0), axis=1).max())
    return spread <= 10 * max(noise_rel_l2, 1e-7) * float(np.linalg.norm(expected, axis=1).max())


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What became of each image's nearest neighbours.

    Attributes:
        same: (N,) bool: the nearest one is the same, or one that the reference itself holds level with it.
        overlap: (N,) float64: share of the ten nearest that are among the reference's ten or level with its tenth;
            None for fewer than 30 images.
        mine: (N,) int: the reference's nearest.
        theirs: (N,) int: the other's nearest.
    """

    same: np.ndarray
    overlap: np.ndarray | None
    mine: np.ndarray
    theirs: np.ndarray


def neighbours(
    reference: np.ndarray, other: np.ndarray, *, noise_rel_l2: float | np.ndarray = 0.0, block: int = 1024
) -> Neighbours | None:
    """Compare nearest neighbours, by cosine after each side's mean vector was subtracted.

    A neighbour exchanged for one that the reference itself holds level within its noise counts as agreement: vectors
    that are known to a relative e_i have a cosine known to e_i + e_j in first order, so two of an image's cosines
    cannot be told apart within 2 e_i + e_j + e_k.

    Args:
        reference: (N, D), the trained model's.
        other: (N, D) of the same images.
        noise_rel_l2: Relative L2 noise of the reference's vectors, before the mean is subtracted: one number, or (N,).
        block: Images per block, to bound memory at block x N numbers.

    Returns:
        None for fewer than 8 images, or vectors that are all alike.
    """
    a, b = as_rows(np.asarray(reference)), as_rows(np.asarray(other))
    n = len(a)
    if n < FEWEST_FOR_NEIGHBOURS or a.shape != b.shape:
        return None
    lengths = np.linalg.norm(a, axis=1)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    a_lengths, b_lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    if not (a_lengths > 0).any() or not (b_lengths > 0).any():
        return None
    error = noise_rel_l2 * lengths / np.maximum(a_lengths, _TINY)
    a, b = a / np.maximum(a_lengths, _TINY)[:, None], b / np.maximum(b_lengths, _TINY)[:, None]
    same, overlap = np.empty(n, bool), np.empty(n)
    mine, theirs = np.empty(n, np.int64), np.empty(n, np.int64)
    wide = n >= FEWEST_FOR_OVERLAP
    for start in range(0, n, block):
        rows = np.arange(start, min(start + block, n))
        inside = np.arange(len(rows))
        a_cosines, b_cosines = a[rows] @ a.T, b[rows] @ b.T
        a_cosines[inside, rows] = b_cosines[inside, rows] = -np.inf
        near_a, near_b = a_cosines.argmax(axis=1), b_cosines.argmax(axis=1)
        gap = a_cosines[inside, near_a] - a_cosines[inside, near_b]
        level = 2 * error[rows] + error[near_a] + error[near_b]
        same[rows] = (near_a == near_b) | (gap <= level)
        mine[rows], theirs[rows] = near_a, near_b
        if wide:
            ten_a = np.argpartition(-a_cosines, OVERLAP_AT - 1, axis=1)[:, :OVERLAP_AT]
            ten_b = np.argpartition(-b_cosines, OVERLAP_AT - 1, axis=1)[:, :OVERLAP_AT]
            last = np.take_along_axis(a_cosines, ten_a, 1).argmin(axis=1)
            tenth = ten_a[inside, last]
            level = (2 * error[rows] + error[tenth])[:, None] + error[ten_b]
            reached = np.take_along_axis(a_cosines, ten_b, 1) >= a_cosines[inside, tenth][:, None] - level
            overlap[rows] = reached.mean(axis=1)
    return Neighbours(same, overlap if wide else None, mine, theirs)


def neighbour_agreement(
    reference: np.ndarray, other: np.ndarray, *, noise_rel_l2: float | np.ndarray = 0.0, block: int = 1024
) -> float | None:
    """Share of images whose nearest neighbour is the same on both sides, see :func:`neighbours`; None for too few."""
    found = neighbours(reference, other, noise_rel_l2=noise_rel_l2, block=block)
    return None if found is None else float(found.same.mean())


def bootstrap_share(values: np.ndarray) -> Share:
    """The mean of per-image scores in 0..1 with its 95 % interval from 1,000 resamples of the images.

    Where all images score alike, resampling shows no spread at all. Then the end of the interval is the exact
    binomial one: with n of n images agreeing, a true share below 0.05^(1/n) would show so in fewer than 5 % of draws.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (percentile interval).
    """
    values = np.asarray(values, np.float64)
    n, mean = len(values), float(values.mean())
    if np.ptp(values) == 0.0:
        slack = 1.0 - (1.0 - _CONFIDENCE) ** (1.0 / n)
        return Share(mean, max(0.0, mean - slack), min(1.0, mean + slack))
    drawn = values[np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))].mean(axis=1)
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Share(mean, float(low), float(high))
