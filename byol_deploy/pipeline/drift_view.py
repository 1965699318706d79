"""An explanation for the eye: a table for the terminal, and one self-contained drawing."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from byol_deploy.atomic import publish_file

if TYPE_CHECKING:
    from byol_deploy.pipeline.explaining import Explanation, Layer

_NEIGHBOURS = 2
_WORST = 3
_WIDTH, _HEIGHT = 960.0, 430.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 20.0, 62.0, 104.0
_LEAST_DRAWN = 1e-9
_MOST_DRAWN = 1e3
_DEPTHS = 4
_TICK_SPACE = 0.035

# Colours that hold on white and on black, chosen apart in lightness too; the lines differ in dashes as well.
_STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; color: #222; }
text { fill: currentColor; } .small { font-size: 11px; } .title { font-weight: 600; font-size: 14px; }
.axis { stroke: currentColor; opacity: .16; fill: none; } .noise { stroke: #888; stroke-dasharray: 2 3; }
.drift { stroke: #1f6fb5; stroke-width: 2; } .budget { stroke: #b5651d; stroke-dasharray: 7 4; }
.line { fill: none; } .dot { fill: #1f6fb5; } .past { fill: #c62828; } .mark { stroke: #c62828; stroke-width: 1.5; }
.own { fill: none; stroke: #1f6fb5; } .culprit { fill: #c62828; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171a; color: #e6e6e6; } .drift, .own { stroke: #6cb4f0; } .dot { fill: #6cb4f0; }
  .budget { stroke: #e0a060; } .noise { stroke: #9a9a9a; } .past, .culprit { fill: #ff7b72; } .mark { stroke: #ff7b72; }
}
"""


def table(explanation: Explanation, all_layers: bool = False) -> str:
    """See :meth:`byol_deploy.pipeline.explaining.Explanation.text`."""
    lines = [explanation.verdict()]
    lines += [f"note: {note}" for note in explanation.notes]
    layers = explanation.layers
    if layers:
        shown = range(len(layers)) if all_layers else _chosen(explanation)
        rows: list[tuple[str, ...]] = [("", "layer", "drift", "own", "noise", "budget", "source")]
        before = -1
        for place in shown:
            if place != before + 1:
                rows.append(("", "...", "", "", "", "", ""))
            rows.append(_row(layers[place], explanation))
            before = place
        if before != len(layers) - 1:
            rows.append(("", "...", "", "", "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines += [
            f"{row[0]:<{widths[0]}} {row[1]:<{widths[1]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[2:6], widths[2:], strict=True))
            + (f"  {row[6]}" if row[6] else "")
            for row in rows
        ]
        lines = [line.rstrip() for line in lines]
        lines.append(
            "drift: relative L2 from float64, added up from the images on; own: of the layer alone, on the reference's "
            "values; noise: of PyTorch's float32"
        )
    if explanation.unmatched:
        lines.append(f"without a place of their own in the file: {len(explanation.unmatched)}")
        few = explanation.unmatched if all_layers else explanation.unmatched[:4]
        lines += [f"  {path}: {reason}" for path, reason in few]
        if len(few) < len(explanation.unmatched):
            lines.append("  ...")
    return "\n".join(lines)


def draw_drift(explanation: Explanation) -> str:
    """The drawing as an SVG element: drift, each layer's own, noise floor and budget over the layers, in logarithms.

    It carries its style, needs no network, and adapts to a dark background.
    """
    series = explanation.series()
    count = len(explanation.layers)
    values = [value for name in ("drift", "own", "noise", "budget") for value in series[name]
              if math.isfinite(value) and value > 0]  # fmt: skip
    low = math.floor(math.log10(max(min(values, default=1e-8), _LEAST_DRAWN)))
    high = max(math.ceil(math.log10(min(max(values, default=1.0), _MOST_DRAWN))), low + 1)

    def across(place: float) -> float:
        return _LEFT + (place + 0.5) / max(count, 1) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        power = high if value == math.inf else math.log10(max(value, 10.0**low))
        return _HEIGHT - _BOTTOM - (min(power, high) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(explanation.verdict(), quote=True)}"><style>{_STYLE}</style>',
        f'<text class="title" x="{_LEFT}" y="20">{escape(explanation.file)}: drift along the graph</text>',
    ]
    for power in range(low, high + 1):
        y = up(10.0**power)
        parts.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        if (high - power) % max(1, (high - low) // 6) == 0:
            parts.append(
                f'<text class="small" text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">10<tspan dy="-4" '
                f'font-size="9">{power}</tspan></text>'
            )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="small" text-anchor="middle" transform="translate(16 {middle:.0f}) rotate(-90)">'
        "relative L2 from float64</text>"
    )
    for place, name in _ticks(explanation.layers):
        x = across(place)
        parts.append(
            f'<path class="axis" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM + 5}"/><text class="small" text-anchor="end" '
            f'transform="translate({x + 4:.1f} {_HEIGHT - _BOTTOM + 17}) rotate(-35)">{escape(name)}</text>'
        )
    for name in ("noise", "budget", "drift"):
        line = "L".join(f"{across(place):.1f} {up(value):.1f}" for place, value in enumerate(series[name]))
        parts.append(f'<path class="line {name}" d="M{line}"/>' if line else "")
    for place, layer in enumerate(explanation.layers):
        if layer.own is not None and explanation.adds_up:
            parts.append(f'<circle class="own" r="2.2" cx="{across(place):.1f}" cy="{up(layer.own):.1f}"/>')
        look = "past" if layer.past and not layer.recovers else "dot"
        parts.append(
            f'<circle class="{look}" r="{3 if look == "past" else 2}" cx="{across(place):.1f}" '
            f'cy="{up(layer.drift):.1f}"><title>{escape(layer.title)}: {layer.drift:.2g}</title></circle>'
        )
    marked = explanation.culprit
    if marked is not None:
        x = across(next(place for place, layer in enumerate(explanation.layers) if layer is marked))
        side, shift = ("end", -6) if x > _WIDTH * 0.55 else ("start", 6)
        parts.append(f'<path class="mark" d="M{x:.1f} {_TOP - 10}V{_HEIGHT - _BOTTOM}"/>')
        where = f'text-anchor="{side}" x="{x + shift:.1f}" y="{_TOP - 4}"'
        parts.append(f'<text class="culprit" {where}>{escape(marked.title)}</text>')
    legend = [("drift", "drift, added up"), ("own", "a layer alone"), ("budget", "budget"), ("noise", "float32 noise")]
    x = _WIDTH - _RIGHT - 440
    for kind, words in legend:
        if kind == "own":
            if not explanation.adds_up:
                continue
            parts.append(f'<circle class="own" r="2.2" cx="{x + 11}" cy="16"/>')
        else:
            parts.append(f'<path class="line {kind}" d="M{x} 16h22"/>')
        parts.append(f'<text class="small" x="{x + 28}" y="20">{words}</text>')
        x += 42 + 6.2 * len(words)
    return "\n".join([*filter(None, parts), "</svg>"])


def write_drift_plot(path: str | os.PathLike[str], explanation: Explanation, *, force: bool = False) -> None:
    """Write :func:`draw_drift` to a file of its own.

    Args:
        path: The .svg file.
        explanation: What to draw.
        force: Replace a file that is there.

    Raises:
        OutputError: It is there already, or cannot be written.
    """
    with publish_file(path, force=force) as file:
        file.write(f'<?xml version="1.0" encoding="UTF-8"?>\n{draw_drift(explanation)}\n'.encode())


def _chosen(explanation: Explanation) -> list[int]:
    """Positions of the rows that a reader wants first: the culprit and the first past, their neighbours, the worst."""
    layers = explanation.layers
    marked = [layer for layer in (explanation.culprit, explanation.first, explanation.largest_step) if layer]
    chosen = {len(layers) - 1}
    for place, layer in enumerate(layers):
        if any(layer is mark for mark in marked):
            chosen |= set(range(place - _NEIGHBOURS, place + _NEIGHBOURS + 1))
    worst = sorted(range(len(layers)), key=lambda place: -layers[place].drift / layers[place].budget)
    return sorted(place for place in chosen | set(worst[:_WORST]) if 0 <= place < len(layers))


def _row(layer: Layer, explanation: Explanation) -> tuple[str, ...]:
    mark = "→" if layer is explanation.culprit else "past" if layer.past and not layer.recovers else ""
    own = "" if layer.own is None else f"{layer.own:.2g}"
    return (
        mark or ("(past)" if layer.recovers else ""),
        layer.title,
        f"{layer.drift:.2g}",
        own,
        f"{layer.noise:.2g}",
        f"{layer.budget:.2g}",
        layer.source,
    )


def _ticks(layers: Sequence[Layer]) -> list[tuple[int, str]]:
    """Where another part of the model begins: the large parts first, then smaller ones where there is room."""
    kept: dict[int, str] = {}
    for depth in range(1, _DEPTHS + 1):
        before = None
        for place, layer in enumerate(layers):
            name = ".".join(layer.path.split(".")[:depth]) or "output"
            if name != before and all(abs(place - other) >= _TICK_SPACE * len(layers) for other in kept):
                kept[place] = name
            before = name
    return sorted(kept.items())
