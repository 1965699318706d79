"""Does an encoder tell images apart? A file can compute exactly what was trained, and what was trained be worthless."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from byol_deploy.parity import FEWEST_FOR_NEIGHBOURS

CROWDED = 0.95
"""Mean cosine between different images above which embeddings are called crowded."""


@dataclass(frozen=True)
class Separation:
    """How far apart an encoder holds different images.

    Attributes:
        n: Number of images.
        cosine_mean: Mean cosine between two different images' embeddings.
        cosine_max: Largest of these cosines.
        effective_rank: exp of the entropy of the centred embeddings' singular values (Roy and Vetterli, 2007): the
            number of directions that are really used, at most n - 1; 0 when all vectors are equal.
        warnings: What is wrong with it, in sentences; empty for a healthy encoder.
    """

    n: int
    cosine_mean: float
    cosine_max: float
    effective_rank: float
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """One sentence for a person."""
        if math.isnan(self.cosine_mean):
            return self.warnings[0]
        return (
            f"the encoder holds {self.n} different images apart with a mean cosine of {self.cosine_mean:.3f} (largest "
            f"{self.cosine_max:.4f}) and an effective rank of {self.effective_rank:.1f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in (vars(self) | {"warnings": list(self.warnings)}).items()
        }


def separation(embedding: np.ndarray, *, noise_rel_l2: float = 0.0) -> Separation:
    """Does the encoder tell images apart at all? An export of a collapsed encoder is exact, and worthless.

    Args:
        embedding: (N, D) of N different images.
        noise_rel_l2: The reference's noise floor; a spread within ten times of it is none.

    Returns:
        The numbers and what they mean. Fewer than 3 images, or numbers that are not finite, are themselves a warning.
    """
    rows = np.asarray(embedding, np.float64).reshape(len(embedding), -1)
    n = len(rows)
    if n < 3 or not np.isfinite(rows).all():
        what = f"only {n} images" if n < 3 else "embeddings with NaN or infinite numbers"
        why = f"whether the encoder tells images apart cannot be said from {what}"
        return Separation(n, math.nan, math.nan, math.nan, (why,))
    units = rows / np.maximum(np.linalg.norm(rows, axis=1), np.finfo(np.float64).tiny)[:, None]
    cosines = (units @ units.T)[np.triu_indices(n, 1)]
    mean, largest = float(cosines.mean()), float(cosines.max())
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    total = float(values.sum())
    share = values[values > 0] / total if total > 0 else np.ones(0)
    rank = float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0
    # 1 - cos of two vectors that differ by nothing but noise is at most (2 noise)^2 / 2.
    alike = 1.0 - mean <= max(1e-4, 2 * (10 * noise_rel_l2) ** 2)
    warnings = []
    if alike or rank == 0.0:
        warnings.append(
            f"the encoder has collapsed: the mean cosine between {n} different images is {mean:.6f}, so their "
            "embeddings are nearly one point; the file computes what was trained, but what was trained tells no "
            "images apart"
        )
    elif mean > CROWDED:
        warnings.append(
            f"the embeddings are crowded: the mean cosine between {n} different images is {mean:.3f}, so a plain "
            "cosine says little about likeness; subtract the mean embedding first"
        )
    if not alike and 0.0 < rank < 2.0 and n >= FEWEST_FOR_NEIGHBOURS:
        warnings.append(
            f"the encoder has nearly collapsed: the embeddings of {n} different images vary along one direction only "
            f"(effective rank {rank:.2f})"
        )
    return Separation(n, mean, largest, rank, tuple(warnings))
