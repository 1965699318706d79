"""Pictures and drawings of a report: coordinates only, the page's template makes SVG of them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from byol_deploy.images import ImageSource, decode

_SHOWN_PX = 84
_LARGEST_PX = 2 * _SHOWN_PX
_MOST_GROUPS = 12
_MOST_CURVE_POINTS = 400


def picture(source: ImageSource) -> dict[str, Any]:
    """An image as a PNG data URI, with the size to show it at: a small one is enlarged by a whole number."""
    image = decode(source)
    if max(image.size) > _LARGEST_PX:
        image.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    width, height = image.size
    scale = _SHOWN_PX / max(image.size)
    if scale >= 1:
        scale = round(scale)
    # Grey images are stored as such: a third of the bytes.
    pixels = np.asarray(image)
    if (pixels == pixels[:, :, :1]).all():
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]))
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return {
        "uri": "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode("ascii"),
        "width": max(1, round(width * scale)),
        "height": max(1, round(height * scale)),
        "enlarged": scale > 1,
    }


def draw_map(
    points: np.ndarray, labels: Sequence[int] | None, names: Sequence[str] | None, side: float = 480.0
) -> dict[str, Any]:
    """One SVG path per class: colours repeat after 7 and shapes after 4, so 28 classes differ in one of them."""
    points = np.asarray(points, np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 10.0
    span = float(max(high - low)) or 1.0
    places = margin + (points - (low + high) / 2 + span / 2) / span * (side - 2 * margin)
    places[:, 1] = side - places[:, 1]
    classes = np.zeros(len(points), int) if labels is None else np.asarray(labels)
    numbers, counts = np.unique(classes, return_counts=True)
    groups = [(number, classes == number) for number in numbers.tolist()]
    rest: list[tuple[str, np.ndarray]] = []
    if len(groups) > _MOST_GROUPS:
        largest = set(numbers[np.argsort(-counts, kind="stable")[: _MOST_GROUPS - 1]].tolist())
        rest = [(f"{len(groups) - len(largest)} others", ~np.isin(classes, list(largest)))]
        groups = [group for group in groups if group[0] in largest]
    named = [(class_name([number], names, 0) or "", mask) for number, mask in groups] + rest
    return {
        "side": side,
        "count": len(points),
        "groups": [
            {
                "name": name if labels is not None else "",
                "colour": number % 7,
                "path": " ".join(_marker(number % 4, x, y) for x, y in places[mask].tolist()),
                "key": _marker(number % 4, 6, 6, 4),
            }
            for number, (name, mask) in enumerate(named)
        ],
    }


def _marker(shape: int, x: float, y: float, r: float = 3.2) -> str:
    if shape == 0:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    if shape == 1:
        return f"M{x - r:.1f} {y - r:.1f}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z"
    if shape == 2:
        return f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}z"
    d = f"{1.4 * r:.1f}"
    return f"M{x:.1f} {y - 1.4 * r:.1f}l{d} {d}l-{d} {d}l-{d} -{d}z"


def draw_curve(title: str, steps: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """A line over steps with its axes; values that are not finite interrupt it."""
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{title}: {x.shape} steps and {y.shape} values; they must be two lists of the same length")
    each = max(1, math.ceil(len(x) / _MOST_CURVE_POINTS))
    if each > 1:
        # Means of neighbours, none of which is left out: NaN anywhere in a mean interrupts the line.
        cuts = np.arange(0, len(x), each)
        lengths = np.diff(np.append(cuts, len(x)))
        x, y = np.add.reduceat(x, cuts) / lengths, np.add.reduceat(y, cuts) / lengths
    good = np.isfinite(x) & np.isfinite(y)
    width, height, left, right, top, bottom = 380.0, 210.0, 52.0, 22.0, 12.0, 40.0
    drawn: dict[str, Any] = {"title": title, "width": width, "height": height, "each": each, "path": "", "dots": []}
    drawn |= {"left": left, "right": width - right, "top": top, "bottom": height - bottom, "x_ticks": [], "y_ticks": []}
    if not good.any():
        return drawn
    x_low, x_high, y_low, y_high = x[good].min(), x[good].max(), y[good].min(), y[good].max()
    x_ticks, y_ticks = _ticks(x_low, x_high), _ticks(y_low, y_high)
    x_low, x_high = min(x_low, x_ticks[0]), max(x_high, x_ticks[-1])
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def across(value: float) -> float:
        return float(left + (value - x_low) / (x_high - x_low) * (width - left - right))

    def up(value: float) -> float:
        return float(height - bottom - (value - y_low) / (y_high - y_low) * (height - top - bottom))

    pieces, alone = [], []
    for place in np.flatnonzero(good).tolist():
        begins = place == 0 or not good[place - 1]
        pieces.append(f"{'M' if begins else 'L'}{across(x[place]):.1f} {up(y[place]):.1f}")
        if begins and (place + 1 == len(x) or not good[place + 1]):
            alone.append((f"{across(x[place]):.1f}", f"{up(y[place]):.1f}"))
    drawn["path"], drawn["dots"] = "".join(pieces), alone
    drawn["x_ticks"] = [(f"{across(tick):.1f}", f"{tick:,g}") for tick in x_ticks]
    drawn["y_ticks"] = [(f"{up(tick):.1f}", f"{tick:g}") for tick in y_ticks]
    return drawn


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from ``low`` or below to ``high`` or above."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def class_name(labels: Sequence[int] | np.ndarray | None, names: Sequence[str] | None, place: int) -> str | None:
    """The name of the class of ``labels[place]``; its number where it has no name, None without labels."""
    if labels is None:
        return None
    number = int(labels[place])
    return names[number] if names is not None and 0 <= number < len(names) else str(number)
