"""What embeddings are worth: a kNN vote and a linear probe, beside the same two on raw pixels.

An encoder is only worth its cost where it beats what the pixels themselves give, so every score stands beside that
floor on the same split, and a difference counts only beyond two standard errors.

* kNN: the k = 20 nearest training images by cosine, after subtracting the training mean, one vote each. Without the
  subtraction embeddings that crowd around their mean look all alike.
* Linear probe: multinomial logistic regression on features standardised by the training part. Its L2 strength is chosen
  for each representation on a fifth of the training part: raw pixels need ten times the one that is best for a good
  embedding, and a single choice would favour one of the two.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import DataError, UsageError, require_packages
from byol_deploy.images import BadImages, decode, find_images, labels_from_folders, printable
from byol_deploy.runtime import Encoder

NEIGHBOURS = 20
RAW_PIXELS_PX = 32
"""Side to which images are shrunk for the raw-pixel floor."""
_FEWEST_PER_CLASS = 5
_L2_PER_IMAGE = (1 / 80, 1 / 2400, 1 / 800, 1 / 240, 1 / 24)
"""Strengths per training image to choose from; the first one where there are too few images for a choice."""
_FEWEST_FOR_A_CHOICE = 100

Embed = Callable[[Sequence[Path]], np.ndarray]
"""Takes n image paths, gives (n, D) float."""


@dataclass(frozen=True)
class Score:
    """How often a classifier is right.

    Attributes:
        accuracy: Share of test images that are right, 0 to 1.
        balanced_accuracy: Mean over the classes of the share of each that is right.
        standard_error: Of the accuracy: sqrt(p (1 - p) / n), which treats test images as independent draws.
        balanced_standard_error: Of the balanced accuracy, from the classes' own shares.
        n: Number of test images.
    """

    accuracy: float
    balanced_accuracy: float
    standard_error: float
    balanced_standard_error: float
    n: int

    @classmethod
    def of(cls, expected: np.ndarray, predicted: np.ndarray) -> Score:
        """Score labels (n,) against the truth (n,)."""
        right = expected == predicted
        shares, variances = [], []
        for label in np.unique(expected):
            mine = right[expected == label]
            shares.append(mine.mean())
            variances.append(mine.mean() * (1 - mine.mean()) / len(mine))
        accuracy = float(right.mean())
        return cls(
            accuracy=accuracy,
            balanced_accuracy=float(np.mean(shares)),
            standard_error=math.sqrt(accuracy * (1 - accuracy) / len(right)),
            balanced_standard_error=math.sqrt(sum(variances)) / len(shares),
            n=len(right),
        )


def standing(mine: Score, floor: Score) -> str:
    """Say "above", "level with" or "below" the floor: by balanced accuracy, beyond two standard errors."""
    gain, margin = mine.balanced_accuracy - floor.balanced_accuracy, 2 * mine.balanced_standard_error
    return "above" if gain > margin else "below" if gain < -margin else "level with"


@dataclass(frozen=True)
class Scores:
    """The two classifiers on one representation."""

    knn: Score
    probe: Score


@dataclass(frozen=True)
class Split:
    """A labelled folder in two parts.

    Attributes:
        train: Paths of the training part.
        test: Paths of the test part.
        train_labels: (n,) int64, indices into ``classes``.
        test_labels: (m,) int64.
        classes: Names of the classes.
        how: The rule of the split, in words.
    """

    train: list[Path]
    test: list[Path]
    train_labels: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    how: str


@dataclass(frozen=True)
class Evaluation:
    """An encoder's scores beside the raw pixels'.

    Attributes:
        encoder: Of the embeddings.
        raw_pixels: Of the images at 32 px.
        classes: Names of the classes.
        train: Number of training images.
        test: Number of test images.
        split: The rule of the split, in words.
        bad: (path, reason) of the images that could not be read and were left out.
    """

    encoder: Scores
    raw_pixels: Scores
    classes: tuple[str, ...]
    train: int
    test: int
    split: str
    bad: tuple[tuple[str, str], ...]

    def verdicts(self) -> dict[str, str]:
        """For kNN and probe: "above", "level with" or "below" the raw pixels, by two standard errors."""
        return {
            name: standing(getattr(self.encoder, name), getattr(self.raw_pixels, name)) for name in ("knn", "probe")
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "verdicts": self.verdicts()}


def evaluate(
    model: str | os.PathLike[str] | Embed,
    folder: str | os.PathLike[str],
    *,
    test_share: float = 0.2,
    seed: int = 0,
    max_bad_share: float = 0.05,
    provider: str = "cpu",
    threads: int | None = None,
) -> Evaluation:
    """Score an encoder on a labelled folder, beside the raw pixels of the same split.

    Args:
        model: A bundle, a lone .onnx file of ours, or a function from image paths to (n, D) embeddings.
        folder: One sub-folder per class; or ``train`` and ``test`` with one sub-folder per class each.
        test_share: Share of the images that is held out, where the folder brings no split.
        seed: Of that split.
        max_bad_share: The share of unreadable images that is tolerated.
        provider: See :class:`byol_deploy.Encoder`.
        threads: See :class:`byol_deploy.Encoder`.

    Raises:
        DataError: No classes, too few images, too many unreadable ones.
        MissingExtraError: scikit-learn is not installed.
        UsageError: ``test_share`` out of range.
    """
    require_packages("Evaluation", "evaluate", "sklearn")
    split = split_folder(folder, test_share=test_share, seed=seed)
    embed: Embed = model if callable(model) else Encoder(model, provider=provider, threads=threads)
    split, bad = _readable(split, max_bad_share)
    return Evaluation(
        encoder=score(embed(split.train), split.train_labels, embed(split.test), split.test_labels),
        raw_pixels=raw_pixel_scores(split),
        classes=tuple(split.classes),
        train=len(split.train),
        test=len(split.test),
        split=split.how,
        bad=bad,
    )


def score(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, k: int = NEIGHBOURS
) -> Scores:
    """Score features: train (n, D) with labels (n,), test (m, D) with labels (m,)."""
    return Scores(
        knn=Score.of(test_labels, knn(train, train_labels, test, k=k)),
        probe=Score.of(test_labels, linear_probe(train, train_labels, test)),
    )


def raw_pixel_scores(split: Split) -> Scores:
    """The floor: the same classifiers on the images themselves, shrunk to 32 px."""
    train, test = raw_pixels(split.train), raw_pixels(split.test)
    return score(train, split.train_labels, test, split.test_labels)


def raw_pixels(paths: Sequence[Path]) -> np.ndarray:
    """Images shrunk to 32 x 32 (bicubic), as vectors.

    Returns:
        (n, 3072) float32 in [0, 1]; (n, 1024) where all images are grey, so that no pixel counts three times.
    """
    side = (RAW_PIXELS_PX, RAW_PIXELS_PX)
    pixels = np.stack([np.asarray(decode(path).resize(side, resample=3)) for path in paths])
    if (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


def knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, k: int = NEIGHBOURS, block: int = 1024
) -> np.ndarray:
    """Classify by the vote of the ``k`` nearest training vectors.

    Args:
        train: (n, D) float.
        labels: (n,) int64 from 0.
        test: (m, D) float.
        k: Number of votes; at most n are taken.
        block: Test vectors at a time, which bounds memory.

    Returns:
        Labels (m,) int64. A tie goes to the class whose voters are nearer on average.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    reference, queries = _units(train - mean), _units(test - mean)
    k = min(k, len(reference))
    one_hot = np.eye(int(labels.max()) + 1)[labels]
    found = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), block):
        cosines = queries[start : start + block] @ reference.T
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(cosines, nearest, axis=1)
        # Cosines lie within [-1, 1]: a thousandth of one can break a tie, never outweigh a vote.
        votes = (one_hot[nearest] * (1 + near[..., None] / (1000 * k))).sum(axis=1)
        found[start : start + block] = votes.argmax(axis=1)
    return found


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classify by multinomial logistic regression on standardised features.

    Args:
        train: (n, D) float.
        labels: (n,) int64.
        test: (m, D) float.

    Returns:
        Labels (m,) int64.
    """
    require_packages("The linear probe", "evaluate", "sklearn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # scikit-learn requires it

    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    # A constant feature says nothing; dividing by its zero would say a lot.
    scale = np.where(deviation > 1e-12 * max(float(deviation.max(initial=0)), 1e-300), deviation, np.inf)
    features = ((train - mean) / scale).astype(np.float32)

    def fitted(rows: np.ndarray, strength: float) -> Any:
        classifier = LogisticRegression(C=1 / (strength * len(rows)), max_iter=300, tol=1e-3)
        return classifier.fit(features[rows], labels[rows])

    with warnings.catch_warnings(), threadpool_limits(1):
        # 300 steps leave raw pixels short of the last digit of their loss; their accuracy no longer moves.
        warnings.simplefilter("ignore", ConvergenceWarning)
        strength = _L2_PER_IMAGE[0]
        if len(train) >= _FEWEST_FOR_A_CHOICE:
            held_out = stratified(labels, 0.2, seed=0)
            scores = {
                candidate: fitted(np.flatnonzero(~held_out), candidate).score(features[held_out], labels[held_out])
                for candidate in _L2_PER_IMAGE
            }
            strength = max(scores, key=lambda candidate: scores[candidate])
        classifier = fitted(np.arange(len(train)), strength)
    return np.asarray(classifier.predict(((test - mean) / scale).astype(np.float32)), np.int64)


def stratified(labels: np.ndarray, share: float, *, seed: int) -> np.ndarray:
    """Draw ``share`` of each class, at least one image: labels (n,) int64 to a mask (n,) bool."""
    draw = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = draw.permutation(np.flatnonzero(labels == label))
        chosen[mine[: max(1, round(share * len(mine)))]] = True
    return chosen


def split_folder(folder: str | os.PathLike[str], *, test_share: float = 0.2, seed: int = 0) -> Split:
    """Find the images of a labelled folder and split them.

    A folder that holds ``train`` and ``test`` with the same classes brings its own split. Any other is split at
    random within each class, so that the classes keep their shares.

    Raises:
        DataError: No classes, or a class with fewer than 5 images.
        UsageError: ``test_share`` is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise UsageError(f"test_share is {test_share}; use a share between 0 and 1, e.g. 0.2")
    root = Path(folder)
    parts = (root / "train", root / "test")
    if all(part.is_dir() for part in parts):
        paths = [find_images(part) for part in parts]
        labels, names = zip(
            *(labels_from_folders(found, part) for found, part in zip(paths, parts, strict=True)), strict=True
        )
        if names[0] != names[1]:
            odd = sorted(set(names[0]) ^ set(names[1]))
            raise DataError(f"{printable(root)}/train and test have different classes ({', '.join(odd)} in one only)")
        _check_enough(labels[0], names[0], root)
        return Split(paths[0], paths[1], labels[0], labels[1], names[0], "the folder's own train and test")
    paths_all = find_images(root)
    label, classes = labels_from_folders(paths_all, root)
    _check_enough(label, classes, root)
    held_out = stratified(label, test_share, seed=seed)
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    return Split(
        [paths_all[i] for i in train],
        [paths_all[i] for i in test],
        label[train],
        label[test],
        classes,
        f"{1 - test_share:.0%} / {test_share:.0%} within each class, seed {seed}",
    )


def describe(evaluation: Evaluation) -> Sequence[Sequence[object]]:
    """Rows of a table: representation, kNN and probe with balanced accuracies and standard errors."""
    rows = []
    for name, scores in (("raw pixels, 32 px", evaluation.raw_pixels), ("embedding", evaluation.encoder)):
        cells: list[object] = [name]
        for one in (scores.knn, scores.probe):
            cells += [f"{one.accuracy:.3f} ± {one.standard_error:.3f}"]
            cells += [f"{one.balanced_accuracy:.3f} ± {one.balanced_standard_error:.3f}"]
        rows.append(cells)
    return rows


def _readable(split: Split, max_bad_share: float) -> tuple[Split, tuple[tuple[str, str], ...]]:
    """``split`` without the images that cannot be decoded."""
    bad = BadImages(max_bad_share)
    keep: dict[str, list[int]] = {"train": [], "test": []}
    parts: Mapping[str, list[Path]] = {"train": split.train, "test": split.test}
    for name, paths in parts.items():
        for row, path in enumerate(paths):
            try:
                decode(path)
            except DataError as error:
                bad.add(path, error)
            else:
                keep[name].append(row)
    bad.check(len(split.train) + len(split.test))
    whole = Split(
        [split.train[row] for row in keep["train"]],
        [split.test[row] for row in keep["test"]],
        split.train_labels[keep["train"]],
        split.test_labels[keep["test"]],
        split.classes,
        split.how,
    )
    _check_enough(whole.train_labels, whole.classes, Path("the readable part"), fewest=1)
    if not whole.test:
        raise DataError("no test image could be read; check the files that were listed")
    return whole, tuple(bad.items)


def _check_enough(labels: np.ndarray, classes: Sequence[str], root: Path, fewest: int = _FEWEST_PER_CLASS) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    small = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < fewest]
    if small:
        raise DataError(
            f"{printable(root)} has classes with too few images: {', '.join(small)}; at least {fewest} each are needed"
        )


def _units(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units: np.ndarray = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return units
