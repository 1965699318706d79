"""The section about speed: escaped, balanced, red where it failed; the drawing says what the numbers say."""

from __future__ import annotations

import io
import itertools
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from byol_deploy.bench import Control
from byol_deploy.errors import UsageError
from byol_deploy.parity import MOST_MARGIN, Share
from byol_deploy.pipeline.benching.rows import ColdStart, Fidelity, SpeedReport, SpeedRow, by_condition
from byol_deploy.report.speed import check_plot, draw_speed, write_speed_plot, write_speed_report

PAGE = runpy.run_path(str(Path(__file__).with_name("test_report.py")))["Page"]
HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7*7 }}"
GREEN, RED = (10, 107, 80), (179, 38, 30)


def row(name: str, ms: float, margin: float | None, status: Any = "passed", **more: Any) -> SpeedRow:
    values: dict[str, Any] = {
        "calls": 200, "p50_ms": ms, "p90_ms": 1.1 * ms, "p99_ms": None, "images_per_s": 1000 / ms, "ratio": 1.0,
        "ratio_low": 0.9, "ratio_high": 1.1, "base": "first.onnx", "cold": ColdStart(1, 2, 3, 4, 3),
        "peak_bytes": 10**8, "file_bytes": 10**6,
        "fidelity": Fidelity(status, f"{name} drifts" if status == "failed" else "", "x", "embedding", 1e-6, 0.9999,
                             margin, Share(0.97, 0.9, 1.0)),
    }  # fmt: skip
    plain: dict[str, Any] = {"precision": "fp32", "threads": 1, "batch": 1}
    return SpeedRow(name, "onnx", "onnxruntime 1.31", **{**plain, **values, **more})


def report(*rows: SpeedRow, **more: Any) -> SpeedReport:
    control = Control("first.onnx (1 thread, batch 1)", 1.01, 0.99, 1.02)
    return SpeedReport(("somewhere/bundle",), tuple(by_condition(rows)), control, 20, 30.0, 60.0,
                       "128 images", {"cpu": "a processor"}, 10**7, **more)  # fmt: skip


def read(path: Path) -> tuple[str, Any]:
    html = path.read_text(encoding="utf-8")
    page = PAGE(html)
    page.assert_self_contained(html)
    return html, page


def test_the_page(tmp_path: Path) -> None:
    bad = row("bad.onnx", 0.5, 0.4, "failed")
    absent = SpeedRow("absent.pte", "executorch", "", "int8", 1, 1, not_run="executorch is not installed")
    unknown = row("unknown.tflite", 3.0, None, "not compared")
    write_speed_report(
        tmp_path / "r.html", report(row("first.onnx", 2.0, 1e-6), bad, absent, unknown), "byol-deploy bench b"
    )
    html, page = read(tmp_path / "r.html")
    assert ("div", "class", "verdict fail") in page.attributes
    assert "Of 4 rows 1 computed what was trained, 1 did not, 1 could not be compared, 1 could not be run." in page.text
    assert html.count('<tr class="failed">') == 1
    assert html.count('<tr class="passed">') == 1
    for shown in ("control within its limit", "takes 1.010 times its own time", "bad.onnx drifts", "a processor",
                  "executorch is not installed", "byol-deploy bench b", "Batch 1, 1 thread", "97.0 %"):  # fmt: skip
        assert shown in page.text, shown
    assert html.index('class="speed"') > html.index("<main>")


def test_times_that_are_not_reliable_are_marked(tmp_path: Path) -> None:
    off = replace(report(row("first.onnx", 2.0, 1e-6)), control=Control("first.onnx", 1.2, 1.1, 1.3))
    write_speed_report(tmp_path / "r.html", replace(off, warnings=("these times are not reliable",)))
    page = read(tmp_path / "r.html")[1]
    assert "✕ times not reliable" in page.text
    assert "All 1 rows computed what was trained. The times are not reliable" in page.text
    assert "These times are not reliable" in page.text
    assert ("div", "class", "verdict warn") in page.attributes
    write_speed_report(tmp_path / "n.html", replace(off, control=None))
    assert "A/A control: not measured" in read(tmp_path / "n.html")[1].text


def test_names_from_elsewhere_are_text(tmp_path: Path) -> None:
    rows = [row(HOSTILE, 2.0, 1e-6), row("caf\udce9.onnx", 1.0, 0.5, "failed")]
    write_speed_report(tmp_path / "r.html", report(*rows), HOSTILE)
    html, page = read(tmp_path / "r.html")
    assert "<script" not in html
    assert HOSTILE in page.text
    write_speed_plot(tmp_path / "p.svg", report(*rows))
    write_speed_plot(tmp_path / "p.png", report(*rows))
    svg = ElementTree.fromstring((tmp_path / "p.svg").read_bytes())
    assert "{http://www.w3.org/2000/svg}script" not in {item.tag for item in svg.iter()}


def test_left_is_faster_and_down_is_nearer() -> None:
    drawn = draw_speed([row("slow", 20.0, 1e-6), row("fast", 2.0, 0.1), row("off", 2.0, 0.5, "failed"),
                        row("other batch", 1.0, 1e-6, batch=8)])  # fmt: skip
    slow, fast, off = drawn["marks"]
    assert fast["x"] == off["x"] < slow["x"]
    assert off["y"] < drawn["limit"] < fast["y"] < slow["y"]
    assert [mark["ink"] for mark in drawn["marks"]] == ["passed", "passed", "failed"]
    # The distance of a decade is the same everywhere on the axis.
    ticks = {said: at for at, said in drawn["y_ticks"]}
    assert ticks["1e-2"] - ticks["1e-1"] == pytest.approx(ticks["1e-5"] - ticks["1e-4"])
    assert drawn["limit"] == pytest.approx(
        ticks["1e-1"] - (ticks["1e-2"] - ticks["1e-1"]) * (1 + math.log10(MOST_MARGIN))
    )


def test_what_has_no_margin_stands_apart() -> None:
    drawn = draw_speed([row("same", 1.0, 0.0), row("unknown", 2.0, None, "not compared"),
                        row("nan", 3.0, None, "failed"), row("usual", 2.0, 1e-6)])  # fmt: skip
    same, unknown, nan, usual = (mark["y"] for mark in drawn["marks"])
    assert same == unknown > usual > nan
    assert {"0 or none", "not finite"} <= {said for _, said in drawn["y_ticks"]}
    assert [mark["ink"] for mark in drawn["marks"]] == ["passed", "none", "failed", "passed"]


def test_threads_of_one_file_are_joined() -> None:
    rows = [row("a", 8.0, 1e-6), row("a", 4.0, 1e-6, threads=2), row("a", 3.99, 1e-6, threads=4), row("b", 2.0, 1e-5)]
    drawn = draw_speed(rows)
    assert [len(places) for places in drawn["lines"]] == [3, 1]
    assert [said for _, _, said in drawn["counts"]] == ["4, 2", "1", "1"]  # two marks lie on each other
    assert draw_speed([rows[0], rows[3]])["counts"] == []


def test_labels_cover_neither_each_other_nor_marks() -> None:
    rows = [row(f"model.number{number}.onnx", 2.0 + 0.05 * number, 1.1e-6 + 1e-8 * number) for number in range(12)]
    drawn = draw_speed(rows)
    assert len(drawn["labels"]) >= 10
    boxes = []
    for label in drawn["labels"]:
        wide = 6.1 * len(label["text"])
        left = label["x"] - (wide if label["anchor"] == "end" else 0)
        boxes.append((left, label["y"] - 12, left + wide, label["y"] + 3))
        assert drawn["left"] <= left
        assert left + wide <= drawn["right"]
    for one, other in itertools.combinations(boxes, 2):
        assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def test_plot_files(tmp_path: Path) -> None:
    made = report(row("first.onnx", 2.0, 1e-6), row("bad.onnx", 1.0, 0.4, "failed"))
    write_speed_plot(tmp_path / "p.svg", made)
    text = (tmp_path / "p.svg").read_text()
    ElementTree.fromstring(text.encode())
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert re.search(r'<text class="s-failed"[^>]*>bad.onnx</text>', text)
    write_speed_plot(tmp_path / "p.PNG", made)
    with Image.open(io.BytesIO((tmp_path / "p.PNG").read_bytes())) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
        assert {GREEN, RED} <= colours
    with pytest.raises(UsageError):
        check_plot("plot.jpg")


def test_nothing_measured_is_a_drawing_that_says_so(tmp_path: Path) -> None:
    absent = SpeedRow("absent.pte", "executorch", "", "int8", 1, 1, not_run="executorch is not installed")
    write_speed_plot(tmp_path / "p.svg", report(absent))
    assert "Nothing was measured." in (tmp_path / "p.svg").read_text()
    write_speed_plot(tmp_path / "p.png", report(absent))
    write_speed_report(tmp_path / "r.html", report(absent))
    assert ("div", "class", "verdict fail") in read(tmp_path / "r.html")[1].attributes
