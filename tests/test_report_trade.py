"""What reduced precision costs and what tuning measured, on the page of a bundle."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from byol_deploy import export
from byol_deploy.bundle import Bundle
from byol_deploy.report.trade import draw_trade, trade_section, tuned_section, used_of_goal

GOAL = {"agreement": 0.98, "margin": 0.25}


def trial(agreement: float, margin: float | None, kept: int = 0, latency: float | None = 0.5) -> dict[str, object]:
    return {
        "method": "minmax", "kept": [f"layer{number}" for number in range(kept)], "agreement": agreement,
        "margin": margin, "outliers": 0.2, "drift": 0.1, "latency": latency, "bytes": 1000,
        "passed": margin is not None and margin <= 0.25 and agreement >= 0.98,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "used"),
    [(trial(1.0, 0.125), 0.5), (trial(0.97, 0.125), 1.5), (trial(1.0, 0.0), 0.2), (trial(0.0, None), math.inf)],
)
def test_the_goal_is_used_by_whatever_uses_most_of_it(found: dict[str, object], used: float) -> None:
    assert used_of_goal(found, GOAL) == pytest.approx(used)


def test_what_is_faster_lies_left_and_what_is_nearer_lies_below() -> None:
    trials = [trial(0.95, 0.2, 0, 0.3), trial(0.99, 0.1, 2, 0.6), trial(1.0, 0.02, 4, 1.2), trial(0.0, None, 0, None)]
    drawn = draw_trade({"goal": GOAL, "trials": trials, "method": "minmax", "kept": ["layer0", "layer1"]})
    worst, chosen, best = drawn["marks"]
    assert worst.x < chosen.x < drawn["par"] < best.x
    assert worst.y < drawn["goal"] < chosen.y < best.y
    assert [mark.ink for mark in drawn["marks"]] == ["failed", "chosen", "passed"]
    assert [mark.kept for mark in drawn["marks"]] == ["0", "2", "4"]
    for mark in drawn["marks"]:
        assert drawn["left"] <= mark.x <= drawn["right"]
        assert drawn["top"] <= mark.y <= drawn["bottom"]


def test_nothing_reduced_and_nothing_tuned_is_no_section(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert trade_section(manifest.artefacts) == ""
    assert tuned_section(manifest.tuned) == ""
    html = (tiny_bundle / "report.html").read_text()
    assert "What reduced precision costs" not in html
    assert "Which file is the fastest?" not in html


def test_the_page_of_a_bundle_shows_both(tiny_run: Path, fashion: Path, tmp_path: Path) -> None:
    bundle = export(tiny_run, formats=["onnx"], precisions=["fp16"], agreement=0.9, target="arm64", tune_s=8,
                    data=fashion, out=tmp_path / "bundle")  # fmt: skip
    html = (bundle.path / "report.html").read_text()
    reduced = next(item for item in bundle.manifest.artefacts if item.precision == "fp16")
    section = html[html.index('<section class="trade">') : html.index('<section class="tuned">')]
    assert reduced.file in section
    assert section.count("<circle") == sum(item["latency"] is not None for item in reduced.reduction["trials"])
    assert section.count('<circle class="t-chosen"') == 1
    assert len(re.findall("<tr[ >]", section)) == 1 + len(reduced.reduction["trials"])
    assert bundle.manifest.tuned is not None
    tuned = html[html.index('<section class="tuned">') :]
    tuned = tuned[: tuned.index("</section>")]
    for found in bundle.manifest.tuned.evidence["batches"].values():
        assert all(row["name"] in tuned for row in found["candidates"])
        assert np.isfinite([row["p50_ms"] for row in found["candidates"]]).all()
    assert tuned.count('class="chosen"') == 2
