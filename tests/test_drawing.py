"""Drawings: the drift along a graph, by itself and for a page; pictures that stay small."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from byol_deploy.drawing import draw_drift, picture
from byol_deploy.report import drift_svg

HOSTILE = '<script>alert(\'x\')</script><img src=x onerror="alert(1)"> & "quoted" {{ 7*7 }}'


def drift_series(n: int = 30, fault: int | None = None) -> dict[str, list[Any]]:
    noise = [1e-7 * (1 + place % 3) for place in range(n)]
    drift = [2 * value for value in noise]
    if fault is not None:
        drift[fault:] = [1e-3] * (n - fault)
    names = [f"backbone.layer{place // 10}.{place % 10}.conv" for place in range(n)]
    return {"names": names, "drift": drift, "own": list(noise), "noise": noise, "budget": [10 * v for v in noise]}


def numbers(path: str) -> np.ndarray:
    return np.array([float(text) for text in re.findall(r"-?\d+\.?\d*", path)]).reshape(-1, 2)


def test_drift_is_drawn_on_a_logarithmic_scale() -> None:
    drawn = draw_drift({"names": list("abcd"), "drift": [1e-7, 1e-6, 1e-5, 1e-4], "noise": [1e-7] * 4,
                        "budget": [1e-3] * 4})  # fmt: skip
    heights = numbers(drawn["lines"]["drift"])[:, 1]
    assert np.allclose(np.diff(heights), np.diff(heights)[0], atol=0.11)
    assert heights[0] > heights[-1]
    assert numbers(drawn["lines"]["noise"])[:, 1] == pytest.approx(heights[0])
    assert [label for _, label in drawn["y_ticks"]] == ["10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³"]
    # The height of a tick is the height of its number.
    assert float({label: y for y, label in drawn["y_ticks"]}["10⁻⁵"]) == pytest.approx(heights[2], abs=0.11)
    assert drawn["first"] is None
    assert drawn["past"] == 0


def test_the_first_layer_past_its_budget_is_marked_and_named() -> None:
    drawn = draw_drift(drift_series(fault=17))
    assert drawn["first"]["place"] == 17
    assert drawn["first"]["name"] == "backbone.layer1.7.conv"
    assert drawn["past"] == 13
    x = numbers(drawn["lines"]["drift"])[17, 0]
    assert float(drawn["first"]["x"]) == pytest.approx(x)
    said = [text for _, _, text in drawn["hovers"]]
    assert len(said) == 30
    assert said[17] == (
        "backbone.layer1.7.conv: drift 1.0e-03, by itself 3.0e-07, noise floor 3.0e-07, budget 3.0e-06, past its budget"
    )
    assert "past" not in said[16]


def test_a_layer_that_recovers_is_not_the_first() -> None:
    series = drift_series(fault=17) | {"recovers": [place == 17 for place in range(30)]}
    assert draw_drift(series)["first"]["place"] == 18


def test_layers_at_fault_by_themselves_are_marked() -> None:
    series = drift_series(fault=17)
    series["own"][17] = 1e-3
    series["own"][3] = math.nan
    drawn = draw_drift(series)
    assert len(drawn["alone"]) == 1
    assert drawn["alone"][0][0] == drawn["first"]["x"]


def test_labels_name_the_stages_and_fit() -> None:
    ticks = draw_drift(drift_series())["x_ticks"]
    assert [label for _, label in ticks] == ["layer0", "layer1", "layer2"]
    many = draw_drift({"names": [f"backbone.block{place}.conv" for place in range(300)], "drift": [1e-7] * 300,
                       "noise": [1e-7] * 300, "budget": [1e-6] * 300})["x_ticks"]  # fmt: skip
    places = [float(x) for x, _ in many]
    assert 1 <= len(many) <= 24
    room = np.diff(places)
    assert all(space > 6 * len(label) for space, (_, label) in zip(room, many, strict=False))


@pytest.mark.parametrize(
    "drift",
    [
        [],
        [math.nan] * 3,
        [5e-3, 1e-9],
        [math.inf] * 3,
        [0.0] * 3,
        [1e-7],
        [1e-7, math.nan, math.inf, 0.0, 1e-300],
        [1e-7] * 2000,
    ],
)
def test_drift_of_all_kinds_stays_inside(drift: list[float]) -> None:
    n = len(drift)
    series = {"names": ["m"] * n, "drift": drift, "noise": [0.0] * n, "budget": [2e-6] * n}
    drawn = draw_drift(series)
    for path in drawn["lines"].values():
        inside = numbers(path.replace("h.1", ""))
        assert ((inside[:, 0] >= drawn["left"] - 0.1) & (inside[:, 0] <= drawn["right"] + 0.1)).all()
        assert ((inside[:, 1] >= drawn["top"] - 0.1) & (inside[:, 1] <= drawn["bottom"] + 0.1)).all()
    bad = [place for place, value in enumerate(drift) if not value <= 2e-6]
    assert (drawn["first"] or {}).get("place") == (bad[0] if bad else None)
    assert len(drawn["hovers"]) <= 500
    assert ("not finite" in drift_svg(series)) == (math.inf in drift)
    root = ElementTree.fromstring(drift_svg(series, title=HOSTILE))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == len(drawn["hovers"])


@pytest.mark.parametrize("budget", [[0.0, 0.0], [math.nan, 1e-6], [1e-6, math.inf]])
def test_budgets_of_all_kinds(budget: list[float]) -> None:
    drawn = draw_drift({"names": ["a", "b"], "drift": [1e-7, 2e-7], "noise": [1e-7, 1e-7], "budget": budget})
    heights = numbers(drawn["lines"]["drift"])[:, 1]
    assert drawn["bottom"] >= heights[0] > heights[1] >= drawn["top"]
    assert drawn["past"] == sum(not value > 2e-7 for value in budget)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="30 names"):
        draw_drift(drift_series() | {"noise": [1e-7]})


def test_the_drawing_by_itself_loads_nothing() -> None:
    series = drift_series(fault=4)
    series["names"][4] = HOSTILE
    text = drift_svg(series, title="model.onnx", verdict=f"the drift first shows at {HOSTILE}")
    root = ElementTree.fromstring(text)
    assert not [element for element in root.iter() if element.tag.rpartition("}")[2] in ("script", "image", "use", "a")]
    assert "url(" not in text
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert any(HOSTILE in (element.text or "") for element in root.iter("{http://www.w3.org/2000/svg}title"))


def test_a_photograph_becomes_a_small_jpeg_and_a_small_picture_stays_exact() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (126, 126, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((21, 21)).resize((126, 126), Image.Resampling.BICUBIC))
    photograph = smooth // 2 + noise // 32
    kind, packed = picture(photograph)["uri"].split(";base64,")
    assert kind == "data:image/jpeg"
    assert len(packed) < 15_000
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(packed))), np.float64)
    assert np.abs(shown - photograph).mean() < 4
    assert picture(noise[:30, :30])["uri"].startswith("data:image/png")
