"""Embeddings laid out in the plane, and where a written file puts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from byol_deploy.parity.measures import centred_units
from byol_deploy.report.numbers import rows_of, same_length


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """Embeddings laid out in the plane.

    Attributes:
        points: (N, 2).
        labels: For each point the number of its class; None without classes.
        names: Name of each class.
        method: How the points were found, e.g. "t-SNE".
        moved: (N, 2), where a written file puts the same images; None where nothing is compared.
        title: Name of the file, where something is.
    """

    points: np.ndarray
    labels: Sequence[int] | None = None
    names: Sequence[str] | None = None
    method: str = ""
    moved: np.ndarray | None = None
    title: str = ""


def embedding_map(
    embeddings: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    max_points: int = 1000,
    *,
    moved: np.ndarray | None = None,
    title: str = "",
) -> EmbeddingMap:
    """Lay embeddings out in the plane: by t-SNE where scikit-learn is installed, by their two principal axes elsewhere.

    With ``moved`` always by the principal axes: t-SNE has no place for a second vector of the same image. Both sides
    are then centred and brought to unit length first, as for the separation margin, so that a line in the plane is the
    projection of what the verdict measures.

    Args:
        embeddings: (N, D), finite.
        labels: For each the number of its class; only colours depend on it.
        names: Name of each class.
        seed: Of the layout, and of the draw where there are more than ``max_points``.
        max_points: Most points to lay out.
        moved: (N, D) of the same images by a written file, finite.
        title: Name of the file.

    Raises:
        ValueError: The lengths differ, or an embedding is not finite.
    """
    rows = rows_of(embeddings)
    same_length(rows, labels=labels)
    others = None if moved is None else rows_of(moved)
    if others is not None and others.shape != rows.shape:
        raise ValueError(f"embeddings are {rows.shape} and {others.shape}; both must be of the same images and width")
    if others is not None:
        rows, others = centred_units(rows), centred_units(others)
    if len(rows) > max_points:
        places = np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_points])
        rows = rows[places]
        others = None if others is None else others[places]
        labels = None if labels is None else np.asarray(labels)[places]
    numbers = None if labels is None else [int(label) for label in labels]
    if others is None:
        points, method = _layout(rows, seed)
        return EmbeddingMap(points, numbers, names, method, title=title)
    mean, axes = _principal_axes(rows)
    return EmbeddingMap(_on(rows, mean, axes), numbers, names, "PCA", _on(others, mean, axes), title)


def _layout(rows: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    # t-SNE needs some points, two directions to start from, and vectors that are not all alike.
    if len(rows) >= 8 and rows.shape[1] >= 2 and np.ptp(rows, axis=0).any():
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
    mean, axes = _principal_axes(rows)
    return _on(rows, mean, axes), "PCA"


def _principal_axes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = rows.mean(axis=0)
    return mean, np.linalg.svd(rows - mean, full_matrices=False)[2][:2]


def _on(rows: np.ndarray, mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
    points = np.zeros((len(rows), 2))
    points[:, : len(axes)] = (rows - mean) @ axes.T
    return points
