"""Images with what an encoder holds nearest to them, and what became of these neighbours in a written file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from byol_deploy.drawing import class_name
from byol_deploy.images import ImageSource
from byol_deploy.parity import FEWEST_FOR_NEIGHBOURS, neighbours
from byol_deploy.parity.measures import centred_units
from byol_deploy.report.numbers import rows_of, same_length

Fate = Literal["changed", "level", "same"]


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
class ChangedRow:
    """An image, the trained model's nearest neighbour of it and the written file's.

    Attributes:
        image: The image, as in :class:`GalleryRow`.
        label: Its class, None where there are none.
        fate: ``changed``; ``level``: exchanged for one that the trained model holds level within its noise; ``same``.
        mine: The trained model's neighbour: image, class, cosine by the trained model, cosine by the file.
        theirs: The file's neighbour, in the same way; equal to ``mine`` where ``fate`` is ``same``.
    """

    image: ImageSource
    label: str | None
    fate: Fate
    mine: tuple[ImageSource, str | None, float, float]
    theirs: tuple[ImageSource, str | None, float, float]


@dataclass(frozen=True, eq=False)
class ChangedGallery:
    """What became of the nearest neighbours in one file.

    Attributes:
        rows: Changed ones first, the largest change at the top, then exchanged ones, then a few by lot.
        verdict: How many changed, in a sentence.
        note: How the rows were chosen.
        changed: Number of images whose neighbour changed.
        title: Name of the file.
    """

    rows: Sequence[ChangedRow]
    verdict: str
    note: str = ""
    changed: int = 0
    title: str = ""


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
    rows = rows_of(embeddings)
    same_length(rows, images=images, labels=labels)
    units = centred_units(rows)
    found = []
    for query in np.random.default_rng(seed).permutation(len(rows))[:queries].tolist():
        cosines = units @ units[query]
        order = [int(place) for place in np.argsort(-cosines, kind="stable") if place != query][:neighbours]
        near = [(images[place], class_name(labels, names, place), float(cosines[place])) for place in order]
        found.append(GalleryRow(images[query], class_name(labels, names, query), near))
    return Gallery(found, f"{len(found)} of {len(rows):,} images, drawn by lot (seed {seed}), not picked by hand.")


def changed_gallery(
    reference: np.ndarray,
    other: np.ndarray,
    images: Sequence[ImageSource] | np.ndarray,
    noise_rel_l2: float | np.ndarray = 0.0,
    labels: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    most: int = 6,
    by_lot: int = 2,
    seed: int = 0,
) -> ChangedGallery:
    """Images whose nearest neighbour a written file exchanged, then a few that kept theirs.

    Args:
        reference: (N, D), the trained model's, finite.
        other: (N, D) of the same images, the file's, finite.
        images: N images.
        noise_rel_l2: Relative L2 noise of the reference, as :func:`byol_deploy.parity.neighbours` takes it.
        labels: For each image the number of its class.
        names: Name of each class.
        title: Name of the file.
        most: Exchanged neighbours to show at most.
        by_lot: Images that kept their neighbour to show, drawn by lot.
        seed: Of the draw.

    Returns:
        Neighbours as :func:`byol_deploy.parity.neighbours` finds them; no rows for too few images, or vectors that
        are all alike, with the reason as the verdict.

    Raises:
        ValueError: The lengths differ, or an embedding is not finite.
    """
    mine, theirs = rows_of(reference), rows_of(other)
    same_length(mine, images=images, labels=labels, other=theirs)
    found = neighbours(mine, theirs, noise_rel_l2=noise_rel_l2)
    n = len(mine)
    if found is None:
        few = n < FEWEST_FOR_NEIGHBOURS
        why = f"that needs {FEWEST_FOR_NEIGHBOURS} images, there are {n}" if few else "the vectors are all alike"
        return ChangedGallery((), f"Whether neighbours changed cannot be said: {why}.", title=title)
    a, b = centred_units(mine), centred_units(theirs)
    places = np.arange(n)
    # How much farther away the reference holds what the file holds nearest.
    gap = (a * a[found.mine]).sum(axis=1) - (a * a[found.theirs]).sum(axis=1)
    moved = found.mine != found.theirs
    order = np.argsort(-gap, kind="stable")
    changed = [int(place) for place in order if not found.same[place]]
    level = [int(place) for place in order if found.same[place] and moved[place]]
    lot = np.random.default_rng(seed).permutation(places[~moved])[:by_lot].tolist()

    def near(query: int, place: int) -> tuple[ImageSource, str | None, float, float]:
        return images[place], class_name(labels, names, place), float(a[query] @ a[place]), float(b[query] @ b[place])

    rows = [
        ChangedRow(
            images[query], class_name(labels, names, query), fate, near(query, int(found.mine[query])),
            near(query, int(found.theirs[query])),
        )
        for fate, chosen in _first(most, changed, level, lot)
        for query in chosen
    ]  # fmt: skip
    verdict = f"{_count(len(changed))} of {n} changed."
    if level:
        verdict += (
            f" {len(level)} more {'was' if len(level) == 1 else 'were'} exchanged for one that the trained model "
            "itself holds level within its rounding noise, which is agreement."
        )
    return ChangedGallery(rows, verdict, _how_chosen(rows, len(changed), len(level), seed), len(changed), title)


def _first(most: int, changed: list[int], level: list[int], lot: list[int]) -> list[tuple[Fate, list[int]]]:
    return [("changed", changed[:most]), ("level", level[: max(0, most - len(changed))]), ("same", lot)]


def _count(number: int) -> str:
    return str(number) if number else "None"


def _how_chosen(rows: Sequence[ChangedRow], changed: int, level: int, seed: int) -> str:
    shown = {fate: sum(row.fate == fate for row in rows) for fate in ("changed", "level", "same")}
    said = []
    if shown["changed"]:
        said.append(f"the {shown['changed']} with the largest change" if shown["changed"] < changed else "all changed")
    if shown["level"]:
        said.append(f"{shown['level']} of the exchanged" if shown["level"] < level else "all exchanged for a level one")
    if shown["same"]:
        said.append(f"{shown['same']} that kept theirs, drawn by lot (seed {seed})")
    return f"Shown: {', then '.join(said)}." if said else ""
