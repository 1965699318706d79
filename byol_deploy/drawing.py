"""Pictures and drawings of a report: coordinates only, the page's template makes SVG of them."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from byol_deploy.images import ImageSource, decode

_SHOWN_PX = 84
_LARGEST_PX = 3 * _SHOWN_PX // 2
_MOST_GROUPS = 12
_MOST_CURVE_POINTS = 400
_MOST_PNG_BYTES = 8_000
_MOST_HOVERS = 500
_MOST_PARTS = 24
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def picture(source: ImageSource) -> dict[str, Any]:
    """An image as a data URI, with the size to show it at: a small one is enlarged by a whole number.

    PNG, pixel for pixel, as long as that is small; a photograph as JPEG, a fifth of the bytes: pages are forwarded.
    """
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
    kind = "png"
    if packed.tell() > _MOST_PNG_BYTES:
        packed, kind = io.BytesIO(), "jpeg"
        image.save(packed, "JPEG", quality=88, optimize=True)
    return {
        "uri": f"data:image/{kind};base64," + base64.b64encode(packed.getvalue()).decode("ascii"),
        "width": max(1, round(width * scale)),
        "height": max(1, round(height * scale)),
        "enlarged": scale > 1,
    }


def draw_map(
    points: np.ndarray,
    labels: Sequence[int] | None,
    names: Sequence[str] | None,
    side: float = 480.0,
    moved: np.ndarray | None = None,
) -> dict[str, Any]:
    """One SVG path per class: colours repeat after 7 and shapes after 4, so 28 classes differ in one of them.

    With ``moved``, (N, 2) of the same images, there is a line for each that moved by more than half a pixel;
    ``largest`` is the longest move as a share of the plane's side.
    """
    points = np.asarray(points, np.float64)
    whole = points if moved is None else np.concatenate([points, np.asarray(moved, np.float64)])
    low, high = whole.min(axis=0), whole.max(axis=0)
    margin = 10.0
    span = float(max(high - low)) or 1.0

    def placed(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = margin + (values - (low + high) / 2 + span / 2) / span * (side - 2 * margin)
        found[:, 1] = side - found[:, 1]
        return found

    places = placed(points)
    targets = places if moved is None else placed(np.asarray(moved, np.float64))
    length = np.linalg.norm(targets - places, axis=1)
    seen = np.flatnonzero(length > 0.5)
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
        "moves": "".join("M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*places[at], *targets[at]) for at in seen.tolist()),
        "moved": len(seen),
        "largest": None if moved is None else float(length.max()) / (side - 2 * margin),
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


def draw_drift(series: Mapping[str, Sequence[Any]], width: float = 760.0, height: float = 330.0) -> dict[str, Any]:
    """The drift along a graph on a logarithmic scale: drift, noise floor and budget of each layer.

    Args:
        series: ``names``, ``drift``, ``noise`` and ``budget``, one entry per layer in the order of execution; relative
            L2. Optional: ``own``, the layer's own part, NaN where not known; ``recovers``, whether everything that is
            computed from the layer is within its budget again. NaN interrupts a line; infinity is drawn at the top,
            zero and what is far below all else at the bottom.
        width: Of the drawing.
        height: Of the drawing.

    Returns:
        What the template ``drift.svg.j2`` draws: sizes, ``lines``, ticks, ``hovers``; ``first``, the first layer past
        its budget (None where there is none); ``alone``, marks of layers past their budget by themselves; ``past``,
        the number of layers past their budget; ``infinite``, whether some drift is.

    Raises:
        ValueError: The lists have different lengths.
    """
    names = [str(name) for name in series["names"]]
    n = len(names)
    values = {key: np.asarray(series[key], np.float64) for key in ("drift", "noise", "budget")}
    own = np.asarray(series.get("own", np.full(n, np.nan)), np.float64)
    recovers = np.asarray(series.get("recovers", np.zeros(n)), bool)
    if any(len(found) != n for found in (*values.values(), own, recovers)):
        raise ValueError(f"a drift has {n} names, and lists of other lengths; give one entry for each layer")
    left, right, top, bottom = 52.0, width - 14.0, 58.0, height - 34.0
    drawn: dict[str, Any] = {
        "width": width, "height": height, "left": left, "right": right, "top": top, "bottom": bottom, "count": n,
        "lines": {}, "y_ticks": [], "x_ticks": [], "hovers": [], "first": None, "alone": [], "past": 0,
        "infinite": False,
    }  # fmt: skip
    known = np.concatenate([*values.values(), own])
    known = known[np.isfinite(known) & (known > 0)]
    if not n or not known.size:
        return drawn
    high = math.ceil(np.log10(known.max()) - 1e-9)
    # Layers that only move numbers have noise of 1e-17 or none: they must not press all else together.
    budgets = values["budget"][np.isfinite(values["budget"]) & (values["budget"] > 0)]
    enough = math.floor(np.log10(budgets.min())) - 5 if budgets.size else high - 14
    low = max(math.floor(np.log10(known.min()) + 1e-9), enough, high - 14)
    low = min(low, high - 1)
    step = (right - left) / max(n - 1, 1)

    def across(place: float) -> float:
        return left + (place * step if n > 1 else (right - left) / 2)

    def up(value: float) -> float:
        if math.isinf(value):
            return top
        exponent = math.log10(value) if value > 0 else low
        return float(bottom - (min(max(exponent, low), high) - low) / (high - low) * (bottom - top - 12))

    for key, row in values.items():
        pieces, broken = [], True
        for place, value in enumerate(row.tolist()):
            if math.isnan(value):
                broken = True
                continue
            pieces.append(f"{'M' if broken else 'L'}{across(place):.1f} {up(value):.1f}")
            if broken and (place + 1 == n or math.isnan(row[place + 1])):
                pieces.append("h.1")  # a single point is a dot, with round caps
            broken = False
        drawn["lines"][key] = "".join(pieces)
    past = ~(values["drift"] <= values["budget"])
    leaving: list[int] = np.flatnonzero(past & ~recovers).tolist()
    first = leaving[0] if leaving else None
    alone = np.flatnonzero((own > values["budget"]) & ~recovers).tolist()
    every = max(1, math.ceil((high - low) / 7))
    drawn["y_ticks"] = [(f"{up(10.0**power):.1f}", "10" + str(power).translate(_SUPERSCRIPT))
                        for power in range(low, high + 1) if (power - low) % every == 0]  # fmt: skip
    drawn["x_ticks"] = [(f"{across(at):.1f}", label) for at, label in _stage_ticks(names, across, right)]
    drawn["infinite"] = bool(np.isinf(values["drift"]).any())
    drawn["alone"] = [(f"{across(at):.1f}", f"{up(own[at]):.1f}") for at in alone]
    drawn["past"] = int(past.sum())
    if first is not None:
        x = across(first)
        drawn["first"] = {
            "name": names[first], "label": _shortened(names[first], 58), "x": f"{x:.1f}", "place": first,
            "y": f"{up(float(values['drift'][first])):.1f}" if not math.isnan(values["drift"][first]) else f"{top:.1f}",
            "anchor": "start" if x < (left + right) / 2 else "end",
        }  # fmt: skip
    each = max(1, math.ceil(n / _MOST_HOVERS))
    for start in range(0, n, each):
        inside = range(start, min(start + each, n))
        at = (
            first
            if first is not None and first in inside
            else max(inside, key=lambda place: np.nan_to_num(values["drift"][place], nan=0.0))
        )
        own_part = "" if math.isnan(own[at]) else f", by itself {own[at]:.1e}"
        said = f"{names[at]}: drift {values['drift'][at]:.1e}{own_part}, noise floor {values['noise'][at]:.1e}, "
        said += f"budget {values['budget'][at]:.1e}{', past its budget' if past[at] else ''}"
        begin = max(left, across(start) - step / 2)
        end = min(right, across(inside[-1]) + step / 2)
        drawn["hovers"].append((f"{begin:.1f}", f"{max(end - begin, 0.5):.1f}", said))
    return drawn


def _stage_ticks(names: Sequence[str], across: Callable[[float], float], right: float) -> list[tuple[int, str]]:
    """Where the parts of a network begin: the longest part is divided first, and long parts get their label first."""
    paths = [re.split(r"[ (]", name)[0].split(".") for name in names]
    spans = _parts(paths, 0, len(paths), 1)
    whole: set[tuple[int, int, int]] = set()
    while True:
        left = [span for span in spans if span not in whole]
        if not left:
            break
        chosen = start, end, depth = max(left, key=lambda span: span[1] - span[0])
        parts = next(
            (found for deeper in range(depth + 1, depth + 5) if len(found := _parts(paths, start, end, deeper)) > 1), []
        )
        # Single layers are no parts.
        if not parts or len(parts) > (end - start) / 2 or len(spans) + len(parts) - 1 > _MOST_PARTS:
            whole.add(chosen)
            continue
        at = spans.index(chosen)
        spans[at : at + 1] = parts
    taken: list[tuple[float, float]] = []
    ticks = []
    for start, _, depth in sorted(spans, key=lambda span: span[0] - span[1]):
        head = paths[start][:depth]
        # `backbone` is what nearly all of them begin with; a bare number says nothing.
        label = _shortened(".".join(head[1:] if len(head) > 1 and not head[1].isdigit() else head), 18)
        begin = across(start)
        finish = begin + 6.2 * len(label) + 8
        if finish <= right + 8 and all(finish <= other or begin >= last for other, last in taken):
            taken.append((begin, finish))
            ticks.append((start, label))
    return sorted(ticks)


def _parts(paths: Sequence[Sequence[str]], start: int, end: int, depth: int) -> list[tuple[int, int, int]]:
    """Runs of equal first ``depth`` names between ``start`` and ``end``, each as its start, end and depth."""
    heads = [tuple(path[:depth]) for path in paths[start:end]]
    begins = [start + at for at in range(len(heads)) if at == 0 or heads[at] != heads[at - 1]]
    return [(one, other, depth) for one, other in zip(begins, [*begins[1:], end], strict=True)]


def _shortened(text: str, most: int) -> str:
    """The end of a name says more than its beginning."""
    return text if len(text) <= most else "…" + text[1 - most :]


def log_range(exponents: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis: some air around the exponents (of 10), at least a factor of 4 wide."""
    low, high = min(exponents), max(exponents)
    air = max(0.08 * (high - low), (0.6 - (high - low)) / 2)
    return low - air, high + air


def log_ticks(low: float, high: float) -> list[float]:
    """The values 1, 2, 5, 10, ... between two exponents of 10, fewer where there are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 2.2 else (1, 3) if high - low < 4 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= math.log10(step * 10.0**power) <= high]


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
