"""An explanation for the eye: a table for the terminal, and one self-contained drawing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from byol_deploy.atomic import publish_file
from byol_deploy.report import drift_svg

if TYPE_CHECKING:
    from byol_deploy.pipeline.explain.drift import Explanation, Layer

_NEIGHBOURS = 2
_WORST = 3


def table(explanation: Explanation, all_layers: bool = False) -> str:
    """See :meth:`byol_deploy.pipeline.explain.drift.Explanation.text`."""
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


def write_drift_plot(path: str | os.PathLike[str], explanation: Explanation, *, force: bool = False) -> None:
    """Draw the drift along the graph into a file of its own: one SVG that loads nothing.

    Args:
        path: The .svg file.
        explanation: What to draw.
        force: Replace a file that is there.

    Raises:
        OutputError: It is there already, or cannot be written.
    """
    with publish_file(path, force=force) as file:
        drawing = drift_svg(explanation.series(), title=explanation.file, verdict=explanation.verdict())
        file.write(drawing.encode())


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
