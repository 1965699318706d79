"""The report: self-contained, escaped, balanced; verdicts and neighbours are what the data say."""

from __future__ import annotations

import base64
import builtins
import io
import re
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from byol_deploy.bundle import Bundle
from byol_deploy.errors import BundleError, MissingExtraError
from byol_deploy.parity import Limit, ParityReport, Share, compare
from byol_deploy.report import (
    EmbeddingMap,
    Gallery,
    GalleryRow,
    ParityBlock,
    ResultRow,
    embedding_map,
    nearest_gallery,
    write_bundle_report,
    write_report,
)

HERE = Path(__file__).resolve().parent
GARMENTS = runpy.run_path(str(HERE / "conftest.py"))["garments"]
TINY = runpy.run_path(str(HERE / "tiny_encoder.py"))
VOID = {"meta", "img", "link", "br", "hr", "input", "base", "source"}
HOSTILE = '<script>alert(\'x\')</script><img src=x onerror="alert(1)"> & "quoted" {{ 7*7 }}'


class Page(HTMLParser):
    """A page read back: its tags must balance; collects attributes, tags, and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style"}:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def assert_self_contained(self, html: str) -> None:
        assert "script" not in self.tags
        assert not {"link", "iframe", "object", "embed", "base", "form"} & set(self.tags)
        assert "@import" not in html
        assert "url(" not in html
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), f"<{tag} {name}={value!r}>"
            if name in {"src", "href", "xlink:href", "srcset", "action", "poster", "background"}:
                assert re.match(r"data:image/(png|jpeg);base64,", value), f"<{tag} {name}={value[:80]!r}>"
        policy = [value for tag, name, value in self.attributes if tag == "meta" and "default-src" in value]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def comparison(error: float = 1e-7, output: str = "embedding", subject: str = "real images") -> ParityReport:
    expected = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    limits = {output: Limit(1e-5, 0.9999, 1e-6)}
    return compare({output: expected}, {output: expected * np.float32(1 + error)}, limits=limits, subject=subject)


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    page.assert_self_contained(html)
    return html, page


def garments(per_class: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    pairs = GARMENTS(per_class)
    images = np.stack([np.repeat(pixels[:, :, None], 3, axis=2) for _, pixels in pairs])
    return images, np.array([label for label, _ in pairs]), [f"class-{label}" for label in range(10)]


def full_page(path: Path, name: str = "model.onnx", **changes: Any) -> tuple[str, Page]:
    images, labels, names = garments(3)
    vectors = images.reshape(len(images), -1) / 255.0
    arguments: dict[str, Any] = {
        "title": name,
        "passed": True,
        "verdict": f"{name} is fine",
        "results": [ResultRow(name, 0.8125, 0.0091, 0.9, None, 0.96, 1.234, name), ResultRow("raw pixels", knn=0.5)],
        "parity": [ParityBlock(name, "onnx", "fp32", 1_234_567, comparison(subject=name), name)],
        "gallery": nearest_gallery(vectors, images, labels, [f"{name} {item}" for item in names], queries=2),
        "map": EmbeddingMap(vectors[:, 300:302], labels.tolist(), [f"{name} {item}" for item in names], name),
        "curves": {f"loss {name}": ([0, 10, 20, 30], [2.0, 1.0, float("nan"), 0.5])},
        "facts": {name: [(name, name), ("keys", [name, "other"])]},
        "commands": [f"byol-deploy verify '{name}'"],
        "warnings": [f"look at {name}"],
    }
    write_report(path, **(arguments | changes))
    return read(path)


def test_a_full_page_is_balanced_and_self_contained(tmp_path: Path) -> None:
    html, page = full_page(tmp_path / "report.html")
    assert "✓ PASS" in page.text
    assert "FAIL" not in page.text
    for shown in ("81.2 %", "± 0.9", "96.0 %", "1.23", "1.2 MB", "1.0e-05", "look at model.onnx", "loss model.onnx"):
        assert shown in page.text, shown
    assert "://" not in html
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_names_from_elsewhere_are_text(tmp_path: Path) -> None:
    html, page = full_page(tmp_path / "report.html", HOSTILE)
    assert "<script" not in html
    assert page.text.count("<script>alert('x')</script>") >= 12
    assert "{{ 7*7 }}" in page.text
    assert all(value == HOSTILE or "class-" in value for _, name, value in page.attributes if name == "alt" and value)


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    _, page = full_page(tmp_path / "report.html", "caf\udce9.onnx")
    assert "caf\\udce9.onnx" in page.text


def test_an_empty_page_and_one_that_replaces_it(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report(target, title="t", passed=True, verdict="v")
    _, page = read(target)
    assert {"table", "svg", "img", "section"}.isdisjoint(page.tags)
    write_report(target, title="again", passed=False, verdict="v")
    text = read(target)[1].text
    assert "again" in text
    assert "✕ FAIL" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("said", [True, False])
def test_a_file_that_failed_is_shown_as_failed_whatever_the_caller_says(tmp_path: Path, said: bool) -> None:
    blocks = [
        ParityBlock("good.onnx", "onnx", "fp32", 10, comparison()),
        ParityBlock("bad.pt", "torchscript", "fp32", 10, comparison(error=1e-2)),
    ]
    _, page = full_page(tmp_path / "report.html", parity=blocks, passed=said)
    assert page.tags.count("strong") == 2
    assert ("div", "class", "verdict fail") in page.attributes
    assert "bad.pt did not pass its comparison with the trained model." in page.text
    assert "is above the limit 1.0e-05" in page.text
    assert "good.onnx did not pass" not in page.text
    # The page, the block and its row; the good block and its row.
    assert page.text.count("✕ FAIL") == 3
    assert page.text.count("✓ PASS") == 2


def test_nothing_compared_is_no_pass(tmp_path: Path) -> None:
    _, page = full_page(tmp_path / "report.html", parity=[ParityBlock("m.onnx", "onnx", "fp32", 1, ParityReport(()))])
    assert ("div", "class", "verdict fail") in page.attributes
    assert "nothing was compared" in page.text


def test_a_column_without_numbers_is_left_out(tmp_path: Path) -> None:
    _, page = full_page(tmp_path / "report.html", results=[ResultRow("pixels", knn=0.25)])
    assert "Nearest neighbours" in page.text
    for absent in ("Linear probe", "Time per image", "Same nearest neighbour"):
        assert absent not in page.text


def test_comparisons_are_folded_behind_the_worst(tmp_path: Path) -> None:
    report = ParityReport.merged([comparison(1e-7, subject="first"), comparison(4e-6, subject="second")])
    _, page = full_page(tmp_path / "report.html", parity=[ParityBlock("m.onnx", "onnx", "fp32", 1, report)])
    before, after = page.text.split("All 2 comparisons; above is the worst for each output")
    assert "4.1e-06" in before
    assert "first" in after
    assert "second" in after


def test_neighbours_come_from_all_comparisons_where_the_worst_has_too_few_images(tmp_path: Path) -> None:
    many = comparison(1e-7)
    few = ParityReport((replace(comparison(4e-6).rows[0], n=5, neighbours=None),))
    half = ParityReport((replace(many.rows[0], neighbours=Share(0.5, 0.3, 0.7)),))
    report = ParityReport.merged([many, few, half])
    _, page = full_page(tmp_path / "r.html", parity=[ParityBlock("m.onnx", "onnx", "fp32", 1, report)], results=())
    shown = page.text.split("All 3 comparisons")[0]
    assert "4.1e-06" in shown
    assert "50.0 %" in shown


def test_comparisons_come_first_unless_there_are_results(tmp_path: Path) -> None:
    for results, first in (((), True), ([ResultRow("m", 0.5)], False)):
        text = full_page(tmp_path / "r.html", results=results)[1].text
        order = [text.index("Does each file compute"), text.index("What the encoder holds alike")]
        assert (order == sorted(order)) == first


def test_neighbours_of_a_constructed_example() -> None:
    # A common offset makes all plain cosines nearly 1; without it there are three pairs and their order.
    angles = np.deg2rad([0, 10, 120, 125, 240, 255])
    vectors = np.c_[np.cos(angles), np.sin(angles), np.zeros(6)] + [0, 0, 50]
    images = [np.full((4, 4, 3), 10 * place, np.uint8) for place in range(6)]
    gallery = nearest_gallery(vectors, images, [0, 0, 1, 1, 2, 2], ["a", "b", "c"], queries=6, neighbours=2)
    found = {int(row.image[0, 0, 0]) // 10: row for row in gallery.queries}  # type: ignore[call-overload, index]
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    for place, row in found.items():
        nearest = [int(image[0, 0, 0]) // 10 for image, _, _ in row.neighbours]  # type: ignore[call-overload, index]
        assert nearest[0] == place ^ 1, place
        assert place not in nearest
        assert row.label == row.neighbours[0][1] == "abc"[place // 2]
        centred = vectors - vectors.mean(axis=0)
        cosine = centred[place] @ centred[place ^ 1] / np.linalg.norm(centred[[place, place ^ 1]], axis=1).prod()
        assert row.neighbours[0][2] == pytest.approx(cosine)
        assert row.neighbours[0][2] >= row.neighbours[1][2]


def test_queries_are_drawn_by_seed() -> None:
    images, labels, names = garments(4)
    vectors = images.reshape(len(images), -1).astype(np.float32)

    def drawn(seed: int) -> list[bytes]:
        return [
            np.asarray(row.image).tobytes()
            for row in nearest_gallery(vectors, images, labels, names, seed=seed).queries
        ]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(drawn(0)) == 6


@pytest.mark.parametrize(
    ("embeddings", "images"),
    [(np.full((3, 2), np.nan), np.zeros((3, 2, 2, 3), np.uint8)), (np.ones((3, 2)), np.zeros((2, 2, 2, 3), np.uint8)),
     (np.ones(3), np.zeros((3, 2, 2, 3), np.uint8))],
)  # fmt: skip
def test_a_gallery_of_unfit_data_is_refused(embeddings: np.ndarray, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="embeddings"):
        nearest_gallery(embeddings, images)


def test_images_come_back_pixel_for_pixel(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    grey = GARMENTS(1)[0][1]
    large = np.zeros((400, 800, 3), np.uint8)
    gallery = Gallery([GalleryRow(colour, None, [(grey, None, 0.5), (large, None, 0.25)])])
    write_report(tmp_path / "r.html", title="t", passed=True, verdict="v", gallery=gallery)
    html, page = read(tmp_path / "r.html")
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    shown = [Image.open(io.BytesIO(base64.b64decode(value.split(",")[1]))) for value in sources]
    assert np.array_equal(np.asarray(shown[0]), colour)
    assert shown[1].mode == "L"
    assert np.array_equal(np.asarray(shown[1]), grey)
    assert max(shown[2].size) <= 168
    # 30 x 3, 28 x 3, and the large one scaled down to 84 x 42, not enlarged.
    sizes = re.findall(r'width="(\d+)" height="(\d+)" alt="[^"]*"( class="enlarged")?', html)
    assert [(int(w), int(h), bool(e)) for w, h, e in sizes] == [(90, 60, True), (84, 84, True), (84, 42, False)]


def test_the_map_keeps_groups_together_with_and_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    vectors = 10 * random.standard_normal((3, 16))[labels] + random.standard_normal((36, 16))
    with_it = embedding_map(vectors, labels, ["a", "b", "c"])
    assert with_it.method == "t-SNE"

    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    without = embedding_map(vectors, labels, ["a", "b", "c"])
    assert without.method == "PCA"
    for found in (with_it, without):
        assert found.points.shape == (36, 2)
        distance = np.linalg.norm(found.points[:, None] - found.points[None], axis=2) + np.diag(np.full(36, np.inf))
        assert (labels[distance.argmin(axis=1)] == labels).all()
    # The plain formula: the two eigenvectors of the covariance, up to sign.
    centred = vectors - vectors.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :2]
    assert np.allclose(np.abs(without.points), np.abs(centred @ axes))


def test_the_map_draws_at_most_so_many_points_and_groups(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 30, 200)
    found = embedding_map(random.standard_normal((200, 1)), labels, None, max_points=150)
    assert found.points.shape == (150, 2)
    assert found.labels is not None
    assert len(found.labels) == 150
    _, page = full_page(tmp_path / "r.html", map=found)
    assert "150 embeddings in the plane, laid out by PCA" in page.text
    assert "others" in page.text
    assert page.tags.count("title") == 1 + 12


@pytest.mark.parametrize("vectors", [np.zeros((20, 4)), np.ones((1, 3)), np.eye(3)])
def test_a_map_of_a_collapsed_or_tiny_set(vectors: np.ndarray, tmp_path: Path) -> None:
    found = embedding_map(vectors)
    assert np.isfinite(found.points).all()
    html, _ = full_page(tmp_path / "r.html", map=found)
    assert "nan" not in html.lower()


@pytest.mark.parametrize(
    "values", [[1.0], [1.0, 1.0, 1.0], [0.0] * 5, [float("nan")] * 3, [1e-9, 2e-9], [1.0, float("inf"), 3.0],
               list(range(5000))]
)  # fmt: skip
def test_curves_of_all_kinds(values: list[float], tmp_path: Path) -> None:
    html, page = full_page(tmp_path / "r.html", curves={"loss": (list(range(len(values))), values)})
    assert ("There is no finite value." in page.text) == (not np.isfinite(values).any())
    drawn = re.findall(r'class="line" d="([^"]*)"', html)
    numbers = [float(number) for path in drawn for number in re.findall(r"-?\d+\.\d+", path)]
    assert all(0 <= number <= 380 for number in numbers)
    assert len(numbers) <= 800
    assert html.count("<circle") == {1: 1, 3: 2 if values[0] == 1.0 and values[-1] == 3.0 else 0}.get(len(values), 0)


def test_without_jinja2_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="jinja2"):
        write_report(tmp_path / "r.html", title="t", passed=True, verdict="v")


def bundle_with(target: Path, report: ParityReport | None) -> Path:
    TINY["write_bundle"](target)
    if report is not None:
        manifest = Bundle.open(target).manifest
        artefact = replace(
            manifest.artefacts[0], parity=report.to_dict(), host={"tensors": "3 of 3 tensors", "cores": 2}
        )
        replace(manifest, artefacts=(artefact,)).save(target)
    return target


def test_the_page_of_a_bundle(tmp_path: Path) -> None:
    folder = bundle_with(tmp_path / "bundle", comparison(4e-6))
    write_bundle_report(folder)
    _, page = read(folder / "report.html")
    assert ("div", "class", "verdict pass") in page.attributes
    assert "model.onnx computes what was trained. The largest error is 41 % of" in page.text
    for shown in (
        "tests/tiny, 16 px",
        "backbone_momentum.conv",
        "2 tensors",
        Bundle.open(folder).manifest.model.parameter_hash,
        "shorter side resized to 20 px",
        "3 of 3 tensors.",
        "byol-deploy verify BUNDLE",
    ):
        assert shown in page.text, shown
    # Three golden cases, each with its nearest other one.
    assert page.tags.count("img") == 6
    golden = Bundle.open(folder).golden
    vectors = golden.outputs["embedding"].astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    cosines = centred @ centred.T / np.outer(*[np.linalg.norm(centred, axis=1)] * 2) - 9 * np.eye(3)
    pictures = [value.split(",")[1] for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in pictures]
    for query, nearest in zip(decoded[::2], decoded[1::2], strict=True):
        place = next(number for number, image in enumerate(golden.images) if np.array_equal(image, query))
        assert np.array_equal(nearest, golden.images[cosines[place].argmax()])


@pytest.mark.parametrize("report", [None, comparison(1e-2), ParityReport(())], ids=["unreadable", "failed", "empty"])
def test_the_page_of_a_bundle_that_proves_nothing(tmp_path: Path, report: ParityReport | None) -> None:
    folder = bundle_with(tmp_path / "bundle", report)
    write_bundle_report(folder)
    _, page = read(folder / "report.html")
    assert ("div", "class", "verdict fail") in page.attributes
    assert "Do not use it: model.onnx" in page.text
    assert "✓ PASS" not in page.text


def test_the_page_of_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_of_a_real_export(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    write_bundle_report(folder)
    _, page = read(folder / "report.html")
    manifest = Bundle.open(folder).manifest
    warned = any(artefact.parity["warnings"] for artefact in manifest.artefacts)
    assert ("div", "class", f"verdict {'warn' if warned else 'pass'}") in page.attributes
    assert f"{len(manifest.model.stripped_keys)} tensors" in page.text
    assert all(key in page.text for key in manifest.model.stripped_keys)
    assert all(artefact.sha256 in page.text for artefact in manifest.artefacts)
    assert page.tags.count("img") == 2 * manifest.golden.count  # type: ignore[union-attr]
