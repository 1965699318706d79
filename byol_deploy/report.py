"""One self-contained HTML page for a person: what was exported, how it was checked, what the encoder sees as alike.

The page holds no script and loads nothing: images are PNG data URIs, drawings are inline SVG, and its own security
policy forbids the rest. Everything that is shown comes from elsewhere (names of files and classes above all), so it is
escaped without exception. Callers hand over plain values in small frozen objects; nothing here needs PyTorch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy import __version__
from byol_deploy.atomic import publish_file
from byol_deploy.bundle import REPORT_FILE, Bundle
from byol_deploy.drawing import class_name, draw_curve, draw_map, picture
from byol_deploy.errors import MissingExtraError
from byol_deploy.images import ImageSource
from byol_deploy.parity import ParityReport

FEWEST_ROWS_TO_FOLD = 10
"""A table of facts with more rows than this is folded."""


Fact = tuple[str, str | Sequence[str]]
"""A key and its value; a list of values is folded behind its length."""


@dataclass(frozen=True)
class ResultRow:
    """One encoder, or one file of it, in the table of results.

    Attributes:
        name: What was measured.
        knn: Accuracy of the nearest-neighbour vote, 0 to 1; None where it was not measured, as for all the numbers.
        knn_se: Its standard error.
        probe: Accuracy of the linear probe, 0 to 1.
        probe_se: Its standard error.
        agreement: Share of images whose nearest neighbour is the trained model's, 0 to 1.
        latency_ms: Median time for one image.
        note: A remark.
    """

    name: str
    knn: float | None = None
    knn_se: float | None = None
    probe: float | None = None
    probe_se: float | None = None
    agreement: float | None = None
    latency_ms: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ParityBlock:
    """One written file and how it compares with the trained model.

    Attributes:
        artefact: Name of the file.
        format: e.g. "onnx".
        precision: e.g. "fp32".
        bytes: Size, with the files that belong to it.
        report: The comparison.
        note: A sentence below the table, such as whose parameters the file holds.
    """

    artefact: str
    format: str
    precision: str
    bytes: int
    report: ParityReport
    note: str = ""


@dataclass(frozen=True, eq=False)
class GalleryRow:
    """An image and what lies nearest to it.

    Attributes:
        image: (H, W, 3) uint8, or anything else that :func:`byol_deploy.images.decode` takes.
        label: Its class, None where there are none.
        neighbours: (image, class, cosine), nearest first.
    """

    image: ImageSource
    label: str | None
    neighbours: Sequence[tuple[ImageSource, str | None, float]]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images with their nearest neighbours, and a sentence on how they were chosen."""

    queries: Sequence[GalleryRow]
    note: str = ""


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Embeddings laid out in the plane.

    Attributes:
        points: (N, 2).
        labels: For each point the number of its class; None without classes.
        names: Name of each class.
        method: How the points were found, e.g. "t-SNE".
    """

    points: np.ndarray
    labels: Sequence[int] | None = None
    names: Sequence[str] | None = None
    method: str = ""


def nearest_gallery(
    embeddings: np.ndarray,
    images: Sequence[ImageSource] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    queries: int = 6,
    neighbours: int = 5,
    seed: int = 0,
) -> Gallery:
    """Some images, drawn by lot and not picked by hand, with what the encoder holds nearest to them.

    Args:
        embeddings: (N, D), finite.
        images: N images.
        labels: For each image the number of its class.
        names: Name of each class.
        queries: How many images to draw.
        neighbours: How many neighbours of each to show; never the image itself.
        seed: Of the draw.

    Returns:
        Neighbours by cosine after the mean embedding was subtracted: embeddings crowd around it, and without this
        every image looks like every other one.

    Raises:
        ValueError: The lengths differ, or an embedding is not finite.
    """
    rows = _embeddings(embeddings)
    _same_length(rows, images=images, labels=labels)
    units = rows - rows.mean(axis=0)
    units /= np.maximum(np.linalg.norm(units, axis=1), np.finfo(np.float64).tiny)[:, None]
    found = []
    for query in np.random.default_rng(seed).permutation(len(rows))[:queries].tolist():
        cosines = units @ units[query]
        order = [int(place) for place in np.argsort(-cosines, kind="stable") if place != query][:neighbours]
        near = [(images[place], class_name(labels, names, place), float(cosines[place])) for place in order]
        found.append(GalleryRow(images[query], class_name(labels, names, query), near))
    return Gallery(found, f"{len(found)} of {len(rows):,} images, drawn by lot (seed {seed}), not picked by hand.")


def embedding_map(
    embeddings: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    max_points: int = 1000,
) -> EmbeddingMap:
    """Lay embeddings out in the plane: by t-SNE where scikit-learn is installed, by their two principal axes elsewhere.

    Args:
        embeddings: (N, D), finite.
        labels: For each the number of its class; only colours depend on it.
        names: Name of each class.
        seed: Of the layout, and of the draw where there are more than ``max_points``.
        max_points: Most points to lay out.

    Raises:
        ValueError: The lengths differ, or an embedding is not finite.
    """
    rows = _embeddings(embeddings)
    _same_length(rows, labels=labels)
    if len(rows) > max_points:
        places = np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_points])
        rows = rows[places]
        labels = None if labels is None else np.asarray(labels)[places]
    points, method = _layout(rows, seed)
    return EmbeddingMap(points, None if labels is None else [int(label) for label in labels], names, method)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    passed: bool,
    verdict: str,
    results: Sequence[ResultRow] = (),
    parity: Sequence[ParityBlock] = (),
    gallery: Gallery | None = None,
    map: EmbeddingMap | None = None,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    facts: Mapping[str, Sequence[Fact]] | None = None,
    commands: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> None:
    """Write the page, whole or not at all; a page that is there is replaced.

    Args:
        path: The HTML file.
        title: Heading.
        passed: The verdict. A file in ``parity`` that did not pass makes it FAIL, whatever this says.
        verdict: The verdict in a sentence.
        results: Rows of the table of results; a column in which no row has a number is left out.
        parity: The files and their comparisons.
        gallery: Images with their nearest neighbours.
        map: Embeddings in the plane.
        curves: Title to (steps, values); values that are not finite interrupt the line.
        facts: Title to a table of keys and values.
        commands: What to type to get all this again.
        warnings: What a reader should see first. The comparisons' own warnings are added.

    Raises:
        OutputError: The place is full or cannot be written.
        MissingExtraError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("the report", "jinja2", "train") from error
    failed = [block.artefact for block in parity if not block.report.passed]
    listed = [f"{name} did not pass its comparison with the trained model." for name in failed]
    listed += [*warnings, *(warning for block in parity for warning in block.report.warnings)]
    template = (files("byol_deploy") / "data" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=_percent, short=_short, cosine=_cosine, size=_size, share=_share, picture=picture, latency=_latency
    )
    environment.tests["text"] = lambda value: isinstance(value, str)
    page = environment.from_string(template).render(
        title=title,
        passed=passed and not failed,
        verdict=verdict,
        warnings=list(dict.fromkeys(listed)),
        results=results,
        columns={name for name in vars(ResultRow("")) if any(getattr(row, name) not in (None, "") for row in results)},
        parity=[(block, block.report.worst()) for block in parity],
        gallery=gallery,
        map=None if map is None else draw_map(map.points, map.labels, map.names) | {"method": map.method},
        curves=[draw_curve(name, *series) for name, series in (curves or {}).items()],
        facts=facts or {},
        fold_from=FEWEST_ROWS_TO_FOLD,
        commands=commands,
        version=__version__,
    )
    with publish_file(path, force=True) as file:
        # File names may hold halves of surrogate pairs, which UTF-8 cannot write.
        file.write(page.encode("utf-8", "backslashreplace"))


def write_bundle_report(folder: str | os.PathLike[str]) -> None:
    """Write ``report.html`` into a bundle: how each file was checked, what goes in, what was left out.

    Args:
        folder: A bundle with its manifest, artefacts and golden cases; what the page says is read from there.

    Raises:
        BundleError: It is not a bundle, or a file in it is damaged.
        OutputError: The place is full or cannot be written.
        MissingExtraError: Jinja2 is not installed.
    """
    bundle = Bundle.open(folder)
    manifest, golden, model = bundle.manifest, bundle.golden, bundle.manifest.model
    blocks = []
    for artefact in manifest.artefacts:
        size = artefact.bytes + sum(extra.bytes for extra in artefact.extra_files)
        try:
            report = ParityReport.from_dict(artefact.parity)
        except ValueError as error:
            # Nothing compared means not passed; why it cannot be read belongs on the page.
            report = ParityReport((), (f"the comparison of {artefact.file} cannot be read: {error}",))
        note = str(artefact.host.get("tensors", ""))
        blocks.append(ParityBlock(artefact.file, artefact.format, artefact.precision, size, report, note))

    facts: dict[str, list[Fact]] = {
        "Input and outputs": [
            ("Takes", f"{manifest.input.name}: {manifest.input.dtype}, {manifest.input.layout}, any number of "
             f"{manifest.preprocessing.size_px} x {manifest.preprocessing.size_px} px images"),
            ("Made from an image by", manifest.preprocessing.describe()),
            *((f"Gives {output.name}", f"{output.width} numbers (float32) per image") for output in manifest.outputs),
        ],
        "Model, and what was left out": [
            ("Backbone", model.backbone),
            ("Parameters", f"{model.parameters:,}"),
            ("Branch", f"{model.branch} (the momentum branch serves training only)"),
            ("Left out of the checkpoint", model.stripped_keys),
            ("Hash of the parameters", model.parameter_hash),
            ("SHA-256 of the checkpoint", model.checkpoint_sha256),
            *([("Trained for", f"{model.global_step:,} steps")] if model.global_step else []),
        ],
        "Files": [(artefact.file, f"sha256 {artefact.sha256}") for artefact in manifest.artefacts],
        "Written by": [("created", manifest.created), *manifest.written_by.items()],
    }  # fmt: skip
    for artefact in manifest.artefacts:
        host: list[Fact] = [(str(key), str(value)) for key, value in artefact.host.items()
                if key != "tensors" and str(value) != manifest.written_by.get(key)]  # fmt: skip
        if host:
            facts[f"{artefact.file} was compared on"] = host
    if manifest.recipe:
        facts["Training recipe"] = _flat(manifest.recipe)

    first = "embedding" if "embedding" in golden.outputs else manifest.outputs[0].name
    drawn = nearest_gallery(golden.outputs[first], golden.images, queries=len(golden.images), neighbours=1)
    write_report(
        Path(folder) / REPORT_FILE,
        title=f"{model.backbone}, {manifest.preprocessing.size_px} px",
        passed=all(block.report.passed for block in blocks),
        verdict=_bundle_verdict(blocks),
        parity=blocks,
        gallery=Gallery(drawn.queries, f"The {len(drawn.queries)} golden cases, real images that travel with the files "
                        f"for the self-test, each with the nearest other one by {first}. They were chosen to lie far "
                        "apart, so the two need not look alike."),
        facts=facts,
        commands=[
            "byol-deploy verify BUNDLE",
            "byol-deploy verify BUNDLE --against CHECKPOINT --data IMAGES",
            "byol-deploy embed BUNDLE IMAGES --out embeddings.npy",
        ],
    )  # fmt: skip


def _bundle_verdict(blocks: Sequence[ParityBlock]) -> str:
    failed = [block for block in blocks if not block.report.passed]
    if failed:
        reasons = [f"{block.artefact}: {reason}" for block in failed for reason in block.report.failures[:3]]
        return f"Do not use it: {'; '.join(reasons)}."
    worst = max(row.severity for block in blocks for row in block.report.rows)
    listed = " and ".join(block.artefact for block in blocks)
    compute = "computes" if len(blocks) == 1 else "compute"
    return (f"{listed} {compute} what was trained. The largest error is {_share(worst)} of what this model's own "
            "rounding noise allows.")  # fmt: skip


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[Fact]:
    rows: list[Fact] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{name}.")
        else:
            rows.append((name, str(value)))
    return rows


# --- numbers and images for the template ------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _short(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1e}" if value else "0"


def _cosine(value: float | None) -> str:
    """A cosine near 1 as its distance from 1: 1 − 2e-13 says more than 1.0000."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4f}" if value <= 0.999 else f"1 − {1 - value:.0e}" if value < 1 else "1"


def _share(value: float) -> str:
    """An error in limits as a percentage of the limit."""
    if not math.isfinite(value):
        return "–"
    if value >= 10:
        return f"{value:,.0f} times"
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def _latency(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


# --- helpers ----------------------------------------------------------------------------------------------------


def _layout(rows: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    centred = rows - rows.mean(axis=0)
    # t-SNE needs some points, two directions to start from, and vectors that are not all alike.
    if len(rows) >= 8 and rows.shape[1] >= 2 and centred.any():
        try:
            from sklearn.manifold import TSNE

            # scikit-learn requires it.
            from threadpoolctl import threadpool_limits
        except ImportError:
            pass
        else:
            layout = TSNE(init="pca", perplexity=min(30.0, len(rows) / 4), random_state=seed)
            # Its many short parallel loops cost far more than they save: on two busy cores 7 times the time.
            with threadpool_limits(1):
                return np.asarray(layout.fit_transform(rows.astype(np.float32)), np.float64), "t-SNE"
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    points = np.zeros((len(rows), 2))
    points[:, : len(axes)] = centred @ axes.T
    return points, "PCA"


def _embeddings(values: np.ndarray) -> np.ndarray:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        raise ValueError(f"embeddings are {rows.shape}; they must be (N, D) with finite numbers, N and D at least 1")
    return rows


def _same_length(rows: np.ndarray, **others: Sequence[Any] | np.ndarray | None) -> None:
    for name, values in others.items():
        if values is not None and len(values) != len(rows):
            raise ValueError(f"there are {len(values)} {name} for {len(rows)} embeddings; give one for each")
