"""Numbers as a report shows them: a dash for what is not known, never more digits than mean something."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from byol_deploy.parity import FidelityLimit, Share

UNKNOWN = "–"


def percent(value: float | None) -> str:
    """A share from 0 to 1: ``96.0 %``."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def interval(share: Share | None) -> str:
    """The 95 % interval of a share, in per cent: ``93.1 to 98.4``."""
    return "" if share is None else f"{100 * share.low:.3g} to {100 * share.high:.3g}"


def short(value: float | None) -> str:
    """A small number in two digits."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.1e}" if value else "0"


def cosine(value: float | None) -> str:
    """A cosine near 1 as its distance from 1: 1 − 2e-13 says more than 1.0000."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.4f}" if value <= 0.999 else f"1 − {1 - value:.0e}" if value < 1 else "1"


def decibels(value: float | None) -> str:
    """Signal to noise; no difference at all has none."""
    return "no difference" if value is None else f"{value:.0f} dB" if math.isfinite(value) else UNKNOWN


def floors(value: float | None) -> str:
    """A multiple of the noise floor."""
    return UNKNOWN if value is None else f"{value:.2g}" if value < 1000 else f"{value:.0e}"


def share(value: float) -> str:
    """An error in limits as a percentage of the limit."""
    if not math.isfinite(value):
        return UNKNOWN
    if value >= 10:
        return f"{value:,.0f} times"
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def latency(value: float | None) -> str:
    """Milliseconds in three digits."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.3g}"


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def by_fidelity(limit: Any) -> bool:
    """Whether a row is judged by margin and neighbours, and not by its rounding error."""
    return isinstance(limit, FidelityLimit)


def rows_of(values: np.ndarray) -> np.ndarray:
    """Embeddings as (N, D) float64.

    Raises:
        ValueError: Another shape, or numbers that are not finite.
    """
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        raise ValueError(f"embeddings are {rows.shape}; they must be (N, D) with finite numbers, N and D at least 1")
    return rows


def same_length(rows: np.ndarray, **others: Any) -> None:
    """Whether there is one of each for every row.

    Raises:
        ValueError: There is not.
    """
    for name, values in others.items():
        if values is not None and len(values) != len(rows):
            raise ValueError(f"there are {len(values)} {name} for {len(rows)} embeddings; give one for each")
