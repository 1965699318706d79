"""The whole chain in one call: train, export, prove, embed, and say what the embeddings are worth.

Nothing in here is special to the demonstration: each step is the public function that its command calls.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from byol_deploy.bench import measure
from byol_deploy.errors import DataError, OutputError, require_packages
from byol_deploy.evaluation import Scores, Split, raw_pixel_scores, score, split_folder, standing
from byol_deploy.images import find_images, printable
from byol_deploy.recipe import Recipe

GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
_EMBEDDED = Path(__file__).parent / "data" / "fashion-mnist"
_MOST_IMAGES = 10_000
"""Images of a user's folder that are scored: memory and minutes stay bounded."""
_USER_EPOCHS = 5
_RAW_PIXELS = "raw pixels, 32 px"
_ONNX = "ONNX Runtime"
_BATCH = 250

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class DemoRow:
    """One line of the final table.

    Attributes:
        name: What was measured.
        scores: kNN and linear probe; None where the folder has no labels.
        agreement: Share of test images whose nearest neighbour is the trained PyTorch encoder's; None for the others.
        latency_ms: Median for one image, preprocessing of the file not included.
        latency_ratio: The same as a ratio to PyTorch, formed round by round.
    """

    name: str
    scores: Scores | None
    agreement: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration made and measured.

    Attributes:
        rows: Raw pixels, untrained network, trained PyTorch, ONNX, TorchScript.
        passed: Whether every written file agrees with the trained model.
        train: Number of images that were trained on; no label was used.
        test: Number of images held out from training.
        run_dir: The training's run directory.
        bundle: The exported bundle.
        report: The page.
        embeddings: ONNX Runtime's embeddings of the test images.
        seconds: Wall time of each step.
    """

    rows: tuple[DemoRow, ...]
    passed: bool
    train: int
    test: int
    run_dir: Path
    bundle: Path
    report: Path
    embeddings: Path
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}

    def worth(self) -> str:
        """What the embeddings are worth beside raw pixels, in a sentence; empty without labels."""
        scores = {row.name: row.scores for row in self.rows}
        floor, mine = scores.get(_RAW_PIXELS), scores.get(_ONNX)
        if floor is None or mine is None:
            return ""
        return (
            f"kNN on the exported embeddings is {standing(mine.knn, floor.knn)} raw pixels, "
            f"the linear probe {standing(mine.probe, floor.probe)} them (two standard errors)."
        )

    def table(self) -> list[list[object]]:
        """Rows for a text table: name, kNN, probe, agreement, latency, ratio."""

        def shown(row: DemoRow, which: str) -> str | None:
            one = getattr(row.scores, which) if row.scores else None
            return f"{one.accuracy:.3f} ± {one.standard_error:.3f}" if one else None

        return [
            [
                row.name,
                shown(row, "knn"),
                shown(row, "probe"),
                None if row.agreement is None else f"{row.agreement:.2%}",
                None if row.latency_ms is None else f"{row.latency_ms:.2f} ms",
                None if row.latency_ratio is None else f"{row.latency_ratio:.2f}",
            ]
            for row in self.rows
        ]


def run_demo(
    data: str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] = "demo-out",
    recipe: Recipe | None = None,
    epochs: int | None = None,
    progress: bool = True,
) -> DemoResult:
    """Run the whole chain.

    A folder that holds an unfinished demonstration of the same images and recipe is continued; steps before the
    training's end are not repeated, the others are made anew.

    Args:
        data: A folder of images, with one sub-folder per class or without classes; None is the embedded Fashion-MNIST.
        out: Where everything goes.
        recipe: None is "demo" for the embedded images and "default" with 5 epochs for one's own.
        epochs: Overrides the recipe's.
        progress: Talk on stderr.

    Raises:
        ByolDeployError: Whatever the steps raise; each says what to do.
    """
    require_packages("The demo", "train", "torch", "lightning", "timm", "torchvision", "onnx", "onnxscript", "sklearn")
    from byol_deploy.embedding import embed_folder
    from byol_deploy.pipeline import export, verify
    from byol_deploy.training.fit import fit

    target = Path(out)
    say: Callable[[str], None] = (
        (lambda text: print(text, file=sys.stderr, flush=True)) if progress else (lambda _: None)
    )
    clock = _Clock(say)
    if recipe is None:
        recipe = Recipe.load("demo" if data is None else "default")
        if data is not None and epochs is None:
            epochs = _USER_EPOCHS
    if epochs is not None:
        recipe = recipe.updated({"train.epochs": epochs})

    images, run_dir, bundle_dir = target / "images", target / "run", target / "bundle"
    with clock.step("images", f"images → {images}"):
        prepare_images(images, None if data is None else Path(data), recipe.train.seed)
    with clock.step("train", "train BYOL on images/train, without labels"):
        resume = (run_dir / "recipe.yaml").exists()
        fitted = fit(images / "train", recipe, out=run_dir, resume=resume, progress=progress)
    with clock.step("export", f"export to ONNX and TorchScript → {bundle_dir}"):
        bundle = export(run_dir, formats=("onnx", "torchscript"), out=bundle_dir, data=images / "test")
    with clock.step("verify", "verify the bundle against the checkpoint"):
        verdict = verify(bundle_dir, against=run_dir, data=images / "test")
    with clock.step("embed", "embed images/test with ONNX Runtime"):
        embeddings = embed_folder(bundle_dir, images / "test", target / "embeddings.npy", force=True)
    with clock.step("evaluate", "what the embeddings are worth"):
        split = _split(images)
        if not split.classes:
            say(f"      {split.how}")
        measured = _Measured(recipe, run_dir, bundle_dir, bundle.manifest, split)
    with clock.step("report", f"report → {target / 'report.html'}"):
        result = DemoResult(
            rows=measured.rows,
            passed=verdict.passed,
            train=fitted.images,
            test=len(measured.split.test),
            run_dir=run_dir,
            bundle=bundle_dir,
            report=target / "report.html",
            embeddings=embeddings.out,
            seconds=clock.seconds,
        )
        _write_report(result, measured, bundle, measured.split, None if data is None else Path(data))
    return result


class _Clock:
    """Announces each step, and says how long it took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, words: str) -> Iterator[None]:
        self.say(f"[{len(self.seconds) + 1}/7] {words}")
        began = time.perf_counter()
        self.seconds[name] = 0.0
        yield
        self.seconds[name] = time.perf_counter() - began
        self.say(f"      {self.seconds[name]:.1f} s")


class _Measured:
    """The rows of the table, and what the report shows beside them."""

    def __init__(self, recipe: Recipe, run_dir: Path, bundle_dir: Path, manifest: Any, split: Split) -> None:
        import torch

        from byol_deploy.graph import EncoderGraph
        from byol_deploy.parity import neighbour_agreement
        from byol_deploy.pipeline import open_artefact
        from byol_deploy.runtime import Encoder
        from byol_deploy.training.augment import stateless_seed
        from byol_deploy.training.checkpoints import build_model, load_checkpoint

        preprocessing = manifest.preprocessing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stateless_seed(recipe.train.seed, 0))  # the very weights that the training began with
            untrained = EncoderGraph(build_model(recipe), preprocessing, ("embedding",))
        trained = EncoderGraph(load_checkpoint(run_dir).model, preprocessing, ("embedding",))
        runs: dict[str, Run] = {
            "untrained network": lambda batch: untrained.run(batch, _BATCH),
            "trained, PyTorch": lambda batch: trained.run(batch, _BATCH),
            _ONNX: Encoder(bundle_dir).run,
            "TorchScript": open_artefact(bundle_dir, "torchscript"),
        }
        train, _, train_rows = _embed_all(runs, preprocessing, split.train if split.classes else [])
        test, self.test_images, test_rows = _embed_all(runs, preprocessing, split.test)
        self.split = split = _only(split, train_rows, test_rows)
        self.test_embeddings = test[_ONNX]

        one = self.test_images[:1]
        timed = {name: runs[name] for name in ("trained, PyTorch", _ONNX, "TorchScript")}
        latency = measure({name: (lambda run=run: run(one)) for name, run in timed.items()})  # type: ignore[misc]
        noise = float(manifest.limits["embedding"]["noise_rel_l2"])
        rows = []
        if split.classes:
            floor = raw_pixel_scores(split)
            rows.append(DemoRow(_RAW_PIXELS, floor))
        for name in runs:
            scores = score(train[name], split.train_labels, test[name], split.test_labels) if split.classes else None
            timing = latency[name] if name in timed else None
            agreement = None
            if name in (_ONNX, "TorchScript"):
                agreement = neighbour_agreement(test["trained, PyTorch"], test[name], noise_rel_l2=noise)
            rows.append(
                DemoRow(name, scores, agreement, timing.p50_ms if timing else None, timing.ratio if timing else None)
            )
        self.rows = tuple(rows)


def _embed_all(
    runs: Mapping[str, Run], preprocessing: Any, paths: Sequence[Path]
) -> tuple[dict[str, np.ndarray], np.ndarray, list[int]]:
    """Embed files with every encoder: each file is decoded once.

    Files that cannot be read are left out, as the training left them out; how many may be was checked there.

    Returns:
        (n, D) by name, the n images as uint8, and the places in ``paths`` that they come from.
    """
    batches, found = [], {name: [np.empty((0, 0), np.float32)] for name in runs}
    rows: list[int] = []
    for start in range(0, len(paths), _BATCH):
        images = []
        for row, path in enumerate(paths[start : start + _BATCH], start):
            with contextlib.suppress(DataError):
                images.append(preprocessing(path))
                rows.append(row)
        if not images:
            continue
        batches.append(np.stack(images))
        for name, run in runs.items():
            found[name].append(np.asarray(run(batches[-1])["embedding"]))
    embedded = {name: np.concatenate(parts[1:]) if len(parts) > 1 else parts[0] for name, parts in found.items()}
    return embedded, np.concatenate(batches) if batches else np.empty((0, 0, 0, 3), np.uint8), rows


def _only(split: Split, train: Sequence[int], test: Sequence[int]) -> Split:
    """``split`` with these rows alone."""
    return replace(
        split,
        train=[split.train[row] for row in train],
        test=[split.test[row] for row in test],
        train_labels=split.train_labels[train] if split.classes else split.train_labels,
        test_labels=split.test_labels[test] if split.classes else split.test_labels,
    )


def _write_report(result: DemoResult, measured: _Measured, bundle: Any, split: Split, data: Path | None) -> None:
    from byol_deploy import report
    from byol_deploy.parity import ParityReport

    def row(found: DemoRow) -> report.ResultRow:
        knn, probe = (found.scores.knn, found.scores.probe) if found.scores else (None, None)
        return report.ResultRow(
            found.name,
            knn=knn.accuracy if knn else None,
            knn_se=knn.standard_error if knn else None,
            probe=probe.accuracy if probe else None,
            probe_se=probe.standard_error if probe else None,
            agreement=found.agreement,
            latency_ms=found.latency_ms,
        )

    labels, names = (split.test_labels, split.classes) if split.classes else (None, None)
    files = ", ".join(artefact.file for artefact in bundle.manifest.artefacts)
    size = bundle.manifest.preprocessing.size_px
    command = "byol-deploy demo" + (f" --data {data}" if data else "")
    report.write_report(
        result.report,
        title="byol-deploy demo: " + (str(data) if data else "Fashion-MNIST, test part"),
        passed=result.passed,
        verdict=f"{files} compute what was trained. {result.worth()}".strip()
        if result.passed
        else "A written file differs from the trained model; see the comparisons.",
        results=[row(found) for found in result.rows],
        parity=[
            report.ParityBlock(
                artefact.file, artefact.format, artefact.precision, artefact.bytes,
                ParityReport.from_dict(artefact.parity), str(artefact.host.get("tensors", "")),
            )
            for artefact in bundle.manifest.artefacts
        ],
        gallery=report.nearest_gallery(measured.test_embeddings, measured.test_images, labels, names),
        map=report.embedding_map(measured.test_embeddings, labels, names),
        curves=_curves(result.run_dir / "metrics.csv"),
        facts={
            "Data": [
                ("images trained on", f"{result.train}, without labels"),
                ("images held out", f"{result.test}; all results and pictures are of these"),
                ("split", split.how),
            ],
            "Input": [
                ("takes", f"{size} x {size} px images, uint8, (N, {size}, {size}, 3)"),
                ("made from an image by", bundle.manifest.preprocessing.describe()),
            ],
            "Seconds": [(name, f"{taken:.1f}") for name, taken in result.seconds.items() if taken],
            "Environment": list(bundle.manifest.written_by.items()),
        },
        commands=[command, f"byol-deploy verify {result.bundle} --against {result.run_dir}"],
    )  # fmt: skip


def _curves(metrics: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Loss and spread of the embeddings over the steps, from a run's metrics.csv."""
    shown = {"loss": "loss", "embedding_std": "spread of the embeddings (1: all directions, 0: collapsed)"}
    curves: dict[str, tuple[list[float], list[float]]] = {title: ([], []) for title in shown.values()}
    with metrics.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for column, title in shown.items():
                if line.get(column):
                    curves[title][0].append(float(line["step"]))
                    curves[title][1].append(float(line[column]))
    return {title: series for title, series in curves.items() if series[0]}


# --- images -----------------------------------------------------------------------------------------------------


def prepare_images(images: Path, data: Path | None, seed: int) -> None:
    """Make images/train and images/test, whole or not at all; what is already there stays."""
    origin = "embedded Fashion-MNIST test part" if data is None else str(data.resolve())
    marker = images / ".origin"
    if images.exists():
        found = marker.read_text(encoding="utf-8") if marker.exists() else "something else"
        if found != origin:
            raise OutputError(f"{images} holds {found}, not {origin}; choose another --out")
        return
    partial = images.with_name(".images.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if data is None:
            _unpack_embedded(partial, seed)
        else:
            _link_folder(data, partial, seed)
        (partial / ".origin").write_text(origin, encoding="utf-8")
        os.replace(partial, images)
    except OSError as error:
        raise OutputError(f"{images} cannot be written: {error}; choose another --out or free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def embedded_images() -> tuple[np.ndarray, np.ndarray]:
    """The vendored test part of Fashion-MNIST: images (10000, 28, 28) uint8, labels (10000,) uint8."""
    images = gzip.decompress((_EMBEDDED / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((_EMBEDDED / "t10k-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8),
    )


def _unpack_embedded(target: Path, seed: int) -> None:
    pixels, labels = embedded_images()
    draw = np.random.default_rng(seed)
    for label, name in enumerate(GARMENTS):
        mine = draw.permutation(np.flatnonzero(labels == label))
        held_out = len(mine) // 5
        for part, rows in (("test", mine[:held_out]), ("train", mine[held_out:])):
            folder = target / part / name
            folder.mkdir(parents=True)
            for row in rows:
                Image.fromarray(pixels[row]).save(folder / f"{row:05d}.png", compress_level=1)


def _link_folder(data: Path, target: Path, seed: int) -> None:
    """Lay links to a user's images out as train/ and test/, with their classes where they have some."""
    draw = np.random.default_rng(seed)
    labelled = True
    try:
        split = split_folder(data, seed=seed)
    except DataError:
        labelled = False
        paths = find_images(data)
        order = draw.permutation(len(paths))
        held_out = max(1, len(paths) // 5)
        parts = {"test": [paths[row] for row in order[:held_out]], "train": [paths[row] for row in order[held_out:]]}
    else:
        parts = {"train": split.train, "test": split.test}
    total = sum(map(len, parts.values()))
    if total < 2:
        raise DataError(f"{printable(data)} has one image, which is too few; pass a folder of at least 20")
    own_split = labelled and (data / "train").is_dir() and (data / "test").is_dir()
    for part, found in parts.items():
        count = min(len(found), max(1, len(found) * _MOST_IMAGES // total))
        root = data / part if own_split else data
        for row in np.sort(draw.permutation(len(found))[:count]):
            # Without classes the folders' names must not be taken for some.
            name = found[row].relative_to(root) if labelled else Path(f"{row:06d}-{found[row].name}")
            _link(found[row], target / part / name)


def _link(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(path.resolve())
    except OSError:  # file systems and Windows accounts without links
        shutil.copyfile(path, place)


def _split(images: Path) -> Split:
    """The two parts with their labels; without classes where the folder has none."""
    try:
        return split_folder(images)
    except DataError as reason:
        none = np.empty(0, np.int64)
        parts = find_images(images / "train"), find_images(images / "test")
        return Split(*parts, none, none, [], f"no kNN and no probe: {reason}")
