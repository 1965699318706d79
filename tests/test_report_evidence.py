"""The report's evidence: neighbours that changed, drift along the graph, what moved, separation; a page that fits."""

from __future__ import annotations

import math
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byol_deploy.bundle import Bundle
from byol_deploy.drawing import draw_drift, draw_map
from byol_deploy.parity import FidelityLimit, Limit, ParityReport, compare, neighbours
from byol_deploy.report import (
    ChangedGallery,
    DriftBlock,
    FileEvidence,
    ParityBlock,
    changed_gallery,
    drift_svg,
    embedding_map,
    write_bundle_report,
    write_report,
    write_verify_report,
)
from byol_deploy.separation import Separation, separation

HERE = Path(__file__).resolve().parent
REPORT = runpy.run_path(str(HERE / "test_report.py"))
drift_series = runpy.run_path(str(HERE / "test_drawing.py"))["drift_series"]
HOSTILE, read, bundle_with, comparison = (REPORT[name] for name in ("HOSTILE", "read", "bundle_with", "comparison"))


def crowd(n: int = 40, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of n images, far from level, and images whose first pixel tells which one it is."""
    vectors = np.random.default_rng(seed).standard_normal((n, width)) + 3.0
    images = np.zeros((n, 6, 6, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return vectors, images


def place_of(image: Any) -> int:
    return int(np.asarray(image)[0, 0, 0])


# --- neighbours --------------------------------------------------------------------------------------------------


def test_none_changed_is_said_and_a_few_are_shown() -> None:
    vectors, images = crowd()
    found = changed_gallery(vectors, vectors * (1 + 1e-9), images, 1e-7)
    assert found.changed == 0
    assert found.verdict == "None of 40 changed."
    assert [row.fate for row in found.rows] == ["same", "same"]
    for row in found.rows:
        assert row.mine is not row.theirs
        assert place_of(row.mine[0]) == place_of(row.theirs[0]) != place_of(row.image)
        assert row.mine[2] == pytest.approx(row.mine[3])


def test_changed_neighbours_come_first_with_the_largest_change_at_the_top() -> None:
    vectors, images = crowd()
    moved = vectors.copy()
    # Two images are put where others are: their neighbours, and those of whoever was near them, change.
    moved[3], moved[7] = moved[20] + 0.01, moved[21] + 0.01
    found = changed_gallery(vectors, moved, images, 1e-7, most=50, by_lot=3)
    truth = neighbours(vectors, moved, noise_rel_l2=1e-7)
    assert truth is not None
    assert found.changed == (~truth.same).sum() > 2
    assert f"{found.changed} of 40 changed." in found.verdict
    assert [row.fate for row in found.rows] == ["changed"] * found.changed + ["same"] * 3
    gaps = [row.mine[2] - row.theirs[2] for row in found.rows[: found.changed]]
    assert gaps == sorted(gaps, reverse=True)
    a, b = (rows - rows.mean(axis=0) for rows in (vectors, moved))
    a, b = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (a, b))
    for row in found.rows:
        at, mine, theirs = place_of(row.image), place_of(row.mine[0]), place_of(row.theirs[0])
        assert (mine, theirs) == (truth.mine[at], truth.theirs[at])
        assert row.mine[2:] == pytest.approx((a[at] @ a[mine], b[at] @ b[mine]))
        assert row.theirs[2:] == pytest.approx((a[at] @ a[theirs], b[at] @ b[theirs]))
    few = changed_gallery(vectors, moved, images, 1e-7, most=2, by_lot=0)
    assert [place_of(row.image) for row in few.rows] == [place_of(row.image) for row in found.rows[:2]]
    assert few.note == "Shown: the 2 with the largest change."


def test_a_neighbour_exchanged_for_a_level_one_is_no_change() -> None:
    vectors, images = crowd()
    units = vectors - vectors.mean(axis=0)
    units /= np.linalg.norm(units, axis=1)[:, None]
    cosines = units @ units.T - 9 * np.eye(40)
    order = np.argsort(-cosines, axis=1)
    gaps = np.take_along_axis(cosines, order[:, :1], 1)[:, 0] - np.take_along_axis(cosines, order[:, 1:2], 1)[:, 0]
    query = int(gaps.argmin())
    nearest, second = order[query, :2].tolist()
    # The file moves the nearest image away by a little more than the gap to the second one.
    other = vectors.copy()
    other[nearest] -= 2 * gaps[query] * np.linalg.norm(vectors[nearest] - vectors.mean(axis=0)) * units[query]
    strict, level = (changed_gallery(vectors, other, images, noise, by_lot=0) for noise in (0.0, float(gaps[query])))
    assert [row.fate for row in strict.rows] == ["changed"]
    assert [row.fate for row in level.rows] == ["level"]
    assert [place_of(shown) for shown in (level.rows[0].image, level.rows[0].mine[0], level.rows[0].theirs[0])] == [
        query,
        nearest,
        second,
    ]
    assert level.changed == 0
    assert level.verdict.startswith("None of 40 changed. 1 more was exchanged for one that the trained model")


@pytest.mark.parametrize(
    ("vectors", "why"), [(np.eye(5), "needs 8 images, there are 5"), (np.ones((9, 4)), "the vectors are all alike")]
)
def test_where_nothing_can_be_said_the_gallery_says_so(vectors: np.ndarray, why: str) -> None:
    found = changed_gallery(vectors, vectors, np.zeros((len(vectors), 2, 2, 3), np.uint8))
    assert isinstance(found, ChangedGallery)
    assert not found.rows
    assert why in found.verdict


def test_unfit_embeddings_are_refused() -> None:
    vectors, images = crowd()
    broken = vectors.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        changed_gallery(vectors, broken, images)
    with pytest.raises(ValueError, match="39 other for 40 embeddings"):
        changed_gallery(vectors, vectors[1:], images)
    with pytest.raises(ValueError, match="same images and width"):
        embedding_map(vectors, moved=vectors[:, 1:])


# --- maps and pictures -------------------------------------------------------------------------------------------


def test_a_move_in_the_plane_is_the_projection_of_the_drift() -> None:
    vectors, _ = crowd()
    other = vectors.copy()
    other[5] += [2.0, -1.0, *np.zeros(10)]
    found = embedding_map(vectors, moved=other, title="m.onnx")
    assert (found.method, found.title) == ("PCA", "m.onnx")
    assert found.moved is not None

    def units(rows: np.ndarray) -> np.ndarray:
        centred = rows - rows.mean(axis=0)
        return centred / np.linalg.norm(centred, axis=1)[:, None]

    a, b = units(vectors), units(other)
    axes = np.linalg.eigh(np.cov(a.T))[1][:, ::-1][:, :2]
    assert np.allclose(np.abs(found.moved - found.points), np.abs((b - a) @ axes))
    drawn = draw_map(found.points, None, None, moved=found.moved)
    assert drawn["moved"] >= 1
    assert drawn["moves"].count("M") == drawn["moved"]
    still = draw_map(found.points, None, None, moved=found.points + 1e-9)
    assert (still["moved"], still["moves"]) == (0, "")
    assert still["largest"] < 1e-8


def test_maps_on_which_nothing_moves_are_drawn_once(tmp_path: Path) -> None:
    vectors, _ = crowd()
    still = [embedding_map(vectors, moved=vectors * (1 + 1e-9), title=name) for name in ("a.onnx", "b.pt")]
    moved = embedding_map(vectors, moved=vectors + np.eye(40, 12) * 3, title="c.onnx")
    write_report(tmp_path / "r.html", title="t", passed=True, verdict="v", maps=[*still, moved])
    _, page = read(tmp_path / "r.html")
    assert ("svg", "class", "plane") in page.attributes
    assert page.attributes.count(("svg", "class", "plane")) == 2
    assert "a.onnx, b.pt" in page.text
    assert page.attributes.count(("path", "class", "moves")) == 1


# --- the page ----------------------------------------------------------------------------------------------------


def evidence(fault: int | None = None, n: int = 40) -> FileEvidence:
    vectors, images = crowd(n)
    other = vectors * (1 + 1e-8)
    if fault is not None:
        other = other + np.eye(n, 12) * 5
    return FileEvidence(vectors, other, images, 1e-7, drift_series(fault=fault), f"m: says so ({fault})")


def verified(path: Path, **changes: Any) -> tuple[str, Any]:
    arguments: dict[str, Any] = {
        "title": "bundle",
        "passed": True,
        "blocks": [ParityBlock("m.onnx", "onnx", "fp32", 10, comparison(2e-6))],
        "images": "40 real images",
    }
    write_verify_report(path, **(arguments | changes))
    return read(path)


def test_the_page_of_a_verification(tmp_path: Path) -> None:
    _, page = verified(
        tmp_path / "r.html",
        checks=[("parameters", True, "both sha256:12")],
        evidence={"m.onnx": evidence()},
        facts={"Where it ran": [("cpu", "some processor")]},
        commands=["byol-deploy verify bundle --against run"],
    )
    assert ("div", "class", "verdict pass") in page.attributes
    for shown in (
        "m.onnx computes what was trained. The largest error is 21 % of", "Compared on 40 real images.",
        "both sha256:12", "None of 40 changed.", "m: says so (None).", "Two of 40 different images", "Yes.",
        "some processor", "byol-deploy verify bundle --against run", "None of 40 images moved far enough",
    ):  # fmt: skip
        assert shown in page.text, shown
    assert "first past its budget" not in page.text


def test_a_page_shows_what_went_wrong(tmp_path: Path) -> None:
    bad = ParityBlock("m.onnx", "onnx", "fp32", 10, comparison(1e-2), fault="the seal is broken")
    _, page = verified(tmp_path / "r.html", blocks=[bad], passed=False, evidence={"m.onnx": evidence(7)})
    assert ("div", "class", "verdict fail") in page.attributes
    assert "Do not use it: m.onnx: the seal is broken; and 1 more, below." in page.text
    assert "first past its budget: backbone.layer0.7.conv" in page.text
    assert "✕ changed" in page.text
    assert ("path", "class", "moves") in [item for item in page.attributes if item[2] == "moves"]


def test_each_kind_of_failure_is_told_once_with_the_worst_first() -> None:
    reports = [
        comparison(error, subject=f"m.onnx, batch {batch}") for batch, error in ((1, 1e-3), (2, 1e-2), (3, 2e-3))
    ]
    said = ParityBlock("m.onnx", "onnx", "fp32", 1, ParityReport.merged(reports)).failures
    assert len(said) == 1
    assert said[0].startswith("batch 2: embedding: relative L2 error 1.0e-02")
    assert said[0].endswith("(the worst of 3 like it)")


def test_a_number_stands_beside_the_limit_it_was_held_to() -> None:
    vectors, _ = crowd(60)
    near = vectors + 1e-3 * np.random.default_rng(1).standard_normal(vectors.shape)
    far = vectors + 3e-2 * np.random.default_rng(1).standard_normal(vectors.shape)

    def report(actual: np.ndarray, n: int, limit: FidelityLimit) -> ParityReport:
        single = {"e": vectors[:n].astype(np.float32)}
        return compare(single, {"e": actual[:n].astype(np.float32)}, limits={"e": limit}, subject=f"{n}")

    few = report(far, 16, FidelityLimit(0.9, None))
    many = report(near, 60, FidelityLimit(0.01, 0.85))
    (row,) = ParityBlock("m", "onnx", "int8", 1, ParityReport.merged([few, many])).shown_rows()
    worst = max([few.rows[0], many.rows[0]], key=lambda found: found.severity)
    assert isinstance(row.limit, FidelityLimit)
    assert isinstance(worst.limit, FidelityLimit)
    assert (row.margin, row.limit.margin, row.limit.agreement) == (worst.margin, worst.limit.margin, 0.85)
    assert (row.neighbours, row.overlap) == (many.rows[0].neighbours, many.rows[0].overlap)


def test_both_rules_are_shown_with_their_limits(tmp_path: Path) -> None:
    vectors, _ = crowd(60)
    single = {"embedding": vectors.astype(np.float32)}
    near = {"embedding": (vectors + 1e-3).astype(np.float32)}
    int8 = compare(single, near, limits={"embedding": FidelityLimit(0.25, 0.85)}, subject="q")
    fp32 = compare(single, single, limits={"embedding": Limit(1e-5, 0.99, 1e-6)}, subject="s")
    blocks = [ParityBlock("q.onnx", "onnx", "int8", 1, int8), ParityBlock("s.onnx", "onnx", "fp32", 1, fp32)]
    _, page = verified(tmp_path / "r.html", blocks=blocks)
    assert int8.passed
    for shown in ("limit 85 %", "0.25", "1.0e-05", "0 of 1.0e-06", "no difference", "95.1 to 100", "What is stored at"):
        assert shown in page.text, shown
    assert "q.onnx and s.onnx compute what was trained" in page.text


def test_statistics_that_were_left_out_say_how_many_images_they_need(tmp_path: Path) -> None:
    few = compare(
        {"e": np.eye(5, dtype=np.float32)}, {"e": np.eye(5, dtype=np.float32)}, limits={"e": Limit(1e-5, 0.9)}
    )
    _, page = verified(tmp_path / "r.html", blocks=[ParityBlock("m.onnx", "onnx", "fp32", 1, few)])
    assert "Left out, with 5 images at most: agreement of nearest neighbours needs 8 images" in page.text
    assert "overlap of ten neighbours needs 30 images" in page.text


@pytest.mark.parametrize(
    ("vectors", "word"), [(np.ones((9, 4)) + 1e-9 * np.eye(9, 4), "collapsed"), (crowd()[0] + 40, "crowded")]
)
def test_a_pass_of_a_collapsed_or_crowded_encoder_is_a_pass_with_warnings(
    vectors: np.ndarray, word: str, tmp_path: Path
) -> None:
    found = separation(vectors)
    assert word in found.warnings[0]
    html, page = verified(tmp_path / "r.html", separation=found)
    assert ("div", "class", "verdict warn") in page.attributes
    assert "✓ PASS with warnings" in page.text
    assert "<title>PASS with warnings – bundle</title>" in html
    assert word in page.text.split("Does each file compute")[0]
    assert "Yes. Two of" not in page.text


def test_a_separation_that_is_not_known_says_why(tmp_path: Path) -> None:
    unknown = Separation(2, math.nan, math.nan, math.nan, ("it cannot be said from only 2 images",))
    html, page = verified(tmp_path / "r.html", separation=unknown)
    assert "it cannot be said from only 2 images" in page.text
    assert "nan" not in html.lower()


def test_what_was_not_run_is_no_pass_and_a_failed_check_is_a_fail(tmp_path: Path) -> None:
    absent = ParityBlock("m.mlmodel", "coreml", "", 0, ParityReport(()), not_run="coremltools is not installed")
    good = ParityBlock("m.onnx", "onnx", "fp32", 10, comparison())
    _, page = verified(tmp_path / "r.html", blocks=[absent])
    assert ("div", "class", "verdict fail") in page.attributes
    assert "Nothing was compared, and what was not compared has not passed." in page.text
    _, page = verified(tmp_path / "r.html", blocks=[absent, good])
    assert ("div", "class", "verdict warn") in page.attributes
    assert "m.mlmodel was not compared here: coremltools is not installed" in page.text
    _, page = verified(tmp_path / "r.html", blocks=[good], checks=[("parameters", False, "the hash differs")])
    assert ("div", "class", "verdict fail") in page.attributes
    assert "Do not use it: parameters: the hash differs." in page.text


def test_a_file_that_gives_nan_leaves_its_pictures_out(tmp_path: Path) -> None:
    broken = replace(evidence(), embeddings=np.full((40, 12), np.nan))
    _, page = verified(tmp_path / "r.html", evidence={"m.onnx": broken, "s.onnx": FileEvidence()})
    assert (
        "m.onnx: neighbours and map are left out: embeddings are (40, 12); they must be (N, D) with finite" in page.text
    )
    assert "Two of 40 different images" in page.text


def test_names_in_evidence_are_text(tmp_path: Path) -> None:
    series = drift_series(fault=2)
    series["names"][2] = HOSTILE
    one = replace(evidence(2), drift=series, drift_verdict=HOSTILE)
    html, page = verified(
        tmp_path / "r.html", evidence={HOSTILE: one}, checks=[(HOSTILE, False, HOSTILE)], images=HOSTILE, title=HOSTILE,
        blocks=[ParityBlock(HOSTILE, HOSTILE, HOSTILE, 1, ParityReport(()), HOSTILE, HOSTILE)],
    )  # fmt: skip
    assert "<script" not in html
    assert page.text.count("<script>alert('x')</script>") >= 12


def test_drift_blocks_and_the_drawing_are_the_same(tmp_path: Path) -> None:
    series = drift_series(fault=11)
    write_report(tmp_path / "r.html", title="t", passed=True, verdict="v", drift=[DriftBlock("m.onnx", series, "said")])
    html, _ = read(tmp_path / "r.html")
    paths = re.findall(r'class="d-line d-drift" d="([^"]*)"', html)
    assert paths == re.findall(r'class="d-line d-drift" d="([^"]*)"', drift_svg(series))
    assert draw_drift(series)["lines"]["drift"] in paths


def test_the_page_of_a_bundle_with_evidence(tmp_path: Path) -> None:
    folder = bundle_with(tmp_path / "bundle", comparison(4e-6))
    write_bundle_report(folder, {"model.onnx": evidence(5)}, commands=["byol-deploy export run --out bundle"])
    _, page = read(folder / "report.html")
    assert "golden cases, real images that travel" not in page.text
    assert "✕ changed" in page.text
    assert "byol-deploy export run --out bundle" in page.text
    assert "Environment" in page.text or "was compared on" in page.text


def test_the_environment_is_told_once_where_it_is_the_same(tmp_path: Path) -> None:
    folder = bundle_with(tmp_path / "bundle", comparison(4e-6))
    manifest = Bundle.open(folder).manifest
    first = replace(manifest.artefacts[0], host={"cpu": "one processor", "runtime": "onnxruntime 1"})
    second = replace(first, file="other.onnx", host={"cpu": "one processor", "runtime": "torch 2"})
    (folder / "other.onnx").write_bytes((folder / first.file).read_bytes())
    replace(manifest, artefacts=(first, second)).save(folder)
    write_bundle_report(folder)
    _, page = read(folder / "report.html")
    assert page.text.count("one processor") == 1
    assert "Environment of the comparison" in page.text
    assert "onnxruntime 1" in page.text
    assert "torch 2" in page.text


def test_a_full_page_of_photographs_stays_under_a_megabyte(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((128, 64))
    # As rough as a photograph is: detail at every scale.
    images = np.zeros((128, 224, 224, 3))
    for side in (7, 28, 112, 224):
        part = random.integers(-60, 60, (128, side, side, 3))
        images += part.repeat(224 // side, axis=1).repeat(224 // side, axis=2) / (1 + side / 56)
    pixels = np.clip(images + 128, 0, 255).astype(np.uint8)
    files = {
        f"model{number}.onnx": FileEvidence(
            vectors, vectors + random.standard_normal(vectors.shape), pixels, 1e-7, drift_series(200, 50), "said"
        )
        for number in range(3)
    }
    html, page = verified(tmp_path / "r.html", evidence=files)
    assert page.tags.count("img") >= 16
    assert len(html.encode()) < 1_000_000
