"""The section about speed: every file with its times, its needs and its fidelity, and the plot of both.

The plot exists as SVG, inside the page or alone, and as PNG for places that take no SVG; both are drawn from the same
coordinates.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from byol_deploy.atomic import publish_file
from byol_deploy.drawing import log_range, log_ticks
from byol_deploy.errors import UsageError
from byol_deploy.parity import MOST_MARGIN
from byol_deploy.report.page import render, write_report

if TYPE_CHECKING:
    from byol_deploy.pipeline.benching.rows import SpeedReport, SpeedRow

_WIDTH, _HEIGHT = 860.0, 470.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 84.0, 24.0, 46.0, 56.0
_STRIP = 30.0
_LETTER = 6.1
"""Width of a letter of a label, about."""
_ALONE = """
svg{background:#fff;color:#222}text{font:12px system-ui,sans-serif;fill:currentColor}
.grid{stroke:currentColor;opacity:.14}
"""
_INK = {"passed": "#0a6b50", "failed": "#b3261e", "none": "#7d7d7d"}
_MARKS = 4
_KEY = "small numbers are threads; red did not pass its comparison, grey was not compared"


def check_plot(path: str | os.PathLike[str]) -> str:
    """The kind of plot that a file's name asks for, ``svg`` or ``png``.

    Raises:
        UsageError: Neither.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise UsageError(f"the plot is {os.fspath(path)!r}; name it .svg or .png")
    return kind


def write_speed_plot(path: str | os.PathLike[str], report: SpeedReport) -> None:
    """Write the plot of latency against fidelity as a file of its own.

    Raises:
        OutputError: The place is full or cannot be written.
        UsageError: The name ends neither in .svg nor in .png.
        MissingExtraError: An SVG, and Jinja2 is not installed.
    """
    kind = check_plot(path)
    drawn = draw_speed(report.rows)
    if kind == "svg":
        text = render("speed.svg.j2", drawn=drawn, ink=_INK, alone=_ALONE, marks=MARKS, key=_KEY)
        content = (text.strip() + "\n").encode("utf-8", "backslashreplace")
    else:
        content = _png(drawn)
    with publish_file(path, force=True) as file:
        file.write(content)


def speed_section(report: SpeedReport) -> str:
    """The section as HTML with its own style: the control, the table, the plot, and why rows failed.

    Raises:
        MissingExtraError: Jinja2 is not installed.
    """
    base = next((row.base for row in report.rows if row.base), "")
    return render("speed.html.j2", report=report, drawn=draw_speed(report.rows), base=base, ink=_INK,
                  rows=_grouped(report), marks=MARKS, key=_KEY)  # fmt: skip


def write_speed_report(path: str | os.PathLike[str], report: SpeedReport, command: str = "") -> None:
    """Write a page with this section.

    Args:
        path: The HTML file; one that is there is replaced.
        report: What was measured.
        command: What to type to measure it again.

    Raises:
        OutputError: The place is full or cannot be written.
        MissingExtraError: Jinja2 is not installed.
    """
    states = [row.status for row in report.rows]
    counted = {status: states.count(status) for status in ("passed", "failed", "not compared", "not run")}
    told = ", ".join(f"{count} {_SAID[status]}" for status, count in counted.items() if count)
    told = (
        f"All {len(states)} rows {told.partition(' ')[2]}"
        if states.count("passed") == len(states)
        else f"Of {len(states)} rows {told}"
    )
    trust = "" if report.reliable else " The times are not reliable: see the warning."
    write_report(
        path,
        title=f"Speed of {', '.join(Path(item).name for item in report.paths)}",
        passed=report.passed,
        verdict=f"{told}.{trust}",
        sections=[speed_section(report)],
        facts={"Where it was measured": [(name, text) for name, text in report.host.items() if text]},
        commands=[command] if command else [],
        warnings=[warning[:1].upper() + warning[1:] for warning in report.warnings],
    )


_SAID = {"passed": "computed what was trained", "failed": "did not", "not compared": "could not be compared",
         "not run": "could not be run"}  # fmt: skip


def draw_speed(rows: Sequence[SpeedRow]) -> dict[str, Any]:
    """Latency against fidelity at the smallest batch: one mark for each file and number of threads.

    Both axes are logarithmic. To the left is faster; further down is nearer to the trained model: the drift of images
    in distances between different ones (the margin). What has no margin stands in a strip: above where it failed,
    below where nothing was compared or there is no difference at all.

    Returns:
        What the template ``speed.svg.j2`` draws: sizes, ticks, ``marks``, ``lines`` (between the thread counts of one
        file) and ``labels``, all in pixels; ``limit``, the height of the largest margin that reduced precision may
        have; None where it is outside.
    """
    timed = [row for row in rows if not row.not_run and row.p50_ms]
    smallest = min((row.batch for row in timed), default=1)
    timed = [row for row in timed if row.batch == smallest]
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    drawn: dict[str, Any] = {
        "width": _WIDTH, "height": _HEIGHT, "left": left, "right": right, "top": top, "bottom": bottom,
        "batch": smallest, "x_ticks": [], "y_ticks": [], "marks": [], "lines": [], "counts": [], "labels": [],
        "limit": None,
        "threads": sorted({row.threads for row in timed}),
    }  # fmt: skip
    if not timed:
        return drawn
    low_x, high_x = log_range([math.log10(row.p50_ms) for row in timed if row.p50_ms])
    margins = [margin for row in timed if (margin := row.fidelity.margin) is not None and 0 < margin < math.inf]
    low_y, high_y = log_range([math.log10(margin) for margin in [*margins, MOST_MARGIN]])

    def across(value: float) -> float:
        return left + (math.log10(value) - low_x) / (high_x - low_x) * (right - left)

    def up(row: SpeedRow) -> float:
        margin = row.fidelity.margin
        if margin is None or not math.isfinite(margin):
            return top + _STRIP / 2 if row.status == "failed" else bottom - _STRIP / 2
        return height(margin) if margin > 0 else bottom - _STRIP / 2

    def height(margin: float) -> float:
        share = (math.log10(margin) - low_y) / (high_y - low_y)
        return bottom - _STRIP - share * (bottom - top - 2 * _STRIP)

    drawn["limit"] = height(MOST_MARGIN)
    drawn["x_ticks"] = [(across(value), f"{value:g}") for value in log_ticks(low_x, high_x)]
    every = max(1, math.ceil((high_y - low_y) / 8))
    drawn["y_ticks"] = [
        (height(10.0**power), f"1e{power}") for power in range(math.ceil(low_y), math.floor(high_y) + 1, every)
    ]
    strip = {"none" if row.fidelity.margin is None else "0" for row in timed if up(row) == bottom - _STRIP / 2}
    drawn["y_ticks"] += [(bottom - _STRIP / 2, " or ".join(sorted(strip)))] if strip else []
    if any(up(row) == top + _STRIP / 2 for row in timed):
        drawn["y_ticks"].append((top + _STRIP / 2, "not finite"))
    names = list(dict.fromkeys(row.name for row in timed))
    for number, name in enumerate(names):
        mine = sorted((row for row in timed if row.name == name), key=lambda row: row.threads)
        places = [(across(row.p50_ms or 1.0), up(row)) for row in mine]
        drawn["lines"].append(places)
        for row, (x, y) in zip(mine, places, strict=True):
            ink = row.status if row.status in ("passed", "failed") else "none"
            margin = row.fidelity.margin
            drift = "no margin" if margin is None else f"margin {margin:.2g}"
            said = f"{name}, {row.threads} thread(s): {row.p50_ms:.3g} ms, {drift}, {row.status}"
            drawn["marks"].append({"x": x, "y": y, "ink": ink, "shape": number % _MARKS, "said": said})
        drawn["counts"] += _counts(mine, places) if len(drawn["threads"]) > 1 else []
    drawn["labels"] = _labels(timed, names, drawn)
    return drawn


def _counts(rows: Sequence[SpeedRow], places: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """The number of threads above each mark; one text for marks that lie on each other."""
    groups: list[list[tuple[float, float, int]]] = []
    for (x, y), row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0]):
        last = groups[-1][-1] if groups else None
        if last is not None and x - last[0] < 12 and abs(y - last[1]) < 12:
            groups[-1].append((x, y, row.threads))
        else:
            groups.append([(x, y, row.threads)])
    return [
        (sum(x for x, _, _ in group) / len(group), min(y for _, y, _ in group),
         ", ".join(str(count) for _, _, count in group))
        for group in groups
    ]  # fmt: skip


def _labels(rows: Sequence[SpeedRow], names: Sequence[str], drawn: dict[str, Any]) -> list[dict[str, Any]]:
    """A name beside one mark of each file, where it covers nothing; with a line to it where that is farther away."""
    above = 18 if len(drawn["threads"]) > 1 else 7  # where the number of threads stands
    taken = [(mark["x"] - 7, mark["y"] - above, mark["x"] + 7, mark["y"] + 7) for mark in drawn["marks"]]
    for places in drawn["lines"]:
        taken += [(min(x, u), min(y, v) - 2, max(x, u), max(y, v) + 2)
                  for (x, y), (u, v) in itertools.pairwise(places)]  # fmt: skip
    if drawn["limit"] is not None:
        limit = drawn["limit"]
        taken += [(drawn["left"], limit - 1, drawn["right"], limit + 1)]
        taken += [(drawn["right"] - 28 * _LETTER, limit - 18, drawn["right"], limit)]  # its own words
    labels = []
    for name, places in sorted(zip(names, drawn["lines"], strict=True), key=lambda pair: pair[1][0][1]):
        row = next(row for row in rows if row.name == name)
        text = name if row.precision in ("", "fp32") or row.precision in name else f"{name} {row.precision}"
        status = [row.status for row in rows if row.name == name]
        ink = "failed" if "failed" in status else "passed" if set(status) == {"passed"} else "none"
        wide = _LETTER * len(text)
        (x, y), (far, other) = min(places), max(places)
        for step in range(24):
            dy = 15.0 * ((step + 1) // 2) * (-1 if step % 2 else 1)
            # On the left of the fastest mark, or on the right of the slowest.
            sides = [(x - 12 - wide, "end", x, y), (far + 12, "start", far, other)]
            fitting = [
                (box, anchor, u, v)
                for start, anchor, u, v in sides
                if (box := (start, v + dy - 8, start + wide, v + dy + 7))[0] >= drawn["left"] + 2
                and box[2] <= drawn["right"]
                and drawn["top"] <= box[1]
                and box[3] <= drawn["bottom"]
                and not any(_meet(box, other) for other in taken)
            ]
            if fitting:
                box, anchor, u, v = fitting[0]
                taken.append(box)
                at = box[2] if anchor == "end" else box[0]
                labels.append({"x": at, "y": v + dy + 4, "anchor": anchor, "text": text, "ink": ink,
                               "leader": (u, v, at, v + dy) if abs(dy) > 15 else None})  # fmt: skip
                break
    return labels


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _grouped(report: SpeedReport) -> list[tuple[str, list[SpeedRow]]]:
    """Rows under the condition that they share."""
    groups: dict[str, list[SpeedRow]] = {}
    for row in report.rows:
        threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
        groups.setdefault(f"Batch {row.batch}, {threads}", []).append(row)
    return list(groups.items())


def _png(drawn: dict[str, Any], scale: int = 2) -> bytes:
    """The same drawing in pixels, twice as many in each direction as the SVG's units."""
    image = Image.new("RGB", (int(drawn["width"] * scale), int(drawn["height"] * scale)), "white")
    pen = ImageDraw.Draw(image)
    font, small = (ImageFont.load_default(size * scale) for size in (12, 10))

    def points(*values: float) -> list[float]:
        return [scale * value for value in values]

    def text(x: float, y: float, said: str, anchor: str, ink: str = "#444444", face: Any = font) -> None:
        # The built-in font has no letters beyond Latin.
        pen.text((scale * x, scale * y), said.encode("latin-1", "replace").decode("latin-1"), ink, face, anchor)

    left, right, top, bottom = (drawn[name] for name in ("left", "right", "top", "bottom"))
    for x, said in drawn["x_ticks"]:
        pen.line(points(x, top, x, bottom), "#e6e6e6", scale)
        text(x, bottom + 8, said, "mt")
    for y, said in drawn["y_ticks"]:
        pen.line(points(left, y, right, y), "#e6e6e6", scale)
        text(left - 8, y, said, "rm")
    text(left, 12, "margin: drift of images, in distances between different ones (further down is nearer)", "lm")
    text(left, 30, _KEY, "lm", "#777777", small)
    text(right, bottom + 34, f"median time of batch {drawn['batch']}, ms (to the left is faster)", "rm")
    if drawn["limit"] is not None:
        for at in range(int(left), int(right), 10):
            pen.line(points(at, drawn["limit"], at + 5, drawn["limit"]), _INK["failed"], scale)
        text(right - 4, drawn["limit"] - 9, "limit of reduced precision", "rm", _INK["failed"], small)
    for places in drawn["lines"]:
        pen.line([tuple(points(*place)) for place in places], "#999999", scale)
    for label in drawn["labels"]:
        if label["leader"]:
            pen.line(points(*label["leader"]), "#bbbbbb", scale)
    for mark in drawn["marks"]:
        x, y, ink = mark["x"], mark["y"], _INK[mark["ink"]]
        pen.polygon([tuple(points(x + dx, y + dy)) for dx, dy in MARKS[mark["shape"]]], ink)
    for x, y, said in drawn["counts"]:
        text(x, y - 12, said, "mm", "#777777", small)
    for label in drawn["labels"]:
        text(label["x"], label["y"] - 4, label["text"], "rm" if label["anchor"] == "end" else "lm", _INK[label["ink"]])
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def _ring(count: int, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * number / count for number in range(count)]
    return [(round(radius * math.sin(angle), 2), round(-radius * math.cos(angle), 2)) for angle in angles]


MARKS = (_ring(20, 5.2), _ring(4, 6.6, math.pi / 4), _ring(3, 6.8), _ring(4, 6.6))
"""Circle, square, triangle, diamond, as corners around the middle."""
