"""Files of reduced precision in an export: where their images come from, and the search for one that keeps the goal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byol_deploy import calibration as kept_images
from byol_deploy.cores import usable_cores
from byol_deploy.errors import DataError, UsageError
from byol_deploy.formats import Format, RunOptions, Signature
from byol_deploy.images import find_images
from byol_deploy.parity import FidelityLimit, fidelity_limits
from byol_deploy.pipeline.reference import Reference, real_images
from byol_deploy.preprocess import Preprocessing
from byol_deploy.quantization import Calibration, Goal, Outliers, Trade, resolve_target, search

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph

CALIBRATING = 128
TRYING = 768
"""Images on which trials are judged: with 768 of them the standard error of an agreement of 99 % is 0.4 %."""

# The gate judges other images: what just passes here might just fail there.
_SLACK = 0.9

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Material:
    """What all files of reduced precision of one export share.

    Attributes:
        calibration: Images and target of the quantisers.
        trying: (N, H, W, 3) uint8, none of which calibrates.
        expected: Output name to (N, D) float32, what the trained model gives for them.
        outliers: Images far from those that calibrate: black, white, noise, as the gate has them.
        goal: What must be reached.
        timed: Whether a file for the target is timed rightly on this machine.
        described: Where the images are from, in words.
    """

    calibration: Calibration
    trying: np.ndarray
    expected: dict[str, np.ndarray]
    outliers: Outliers
    goal: Goal
    timed: bool
    described: str


def gather(
    graph: EncoderGraph,
    preprocessing: Preprocessing,
    reference: Reference,
    *,
    run: Path | None,
    images: str | os.PathLike[str] | None,
    data: str | os.PathLike[str] | None,
    target: str,
    goal: Goal,
) -> Material:
    """Find images to calibrate with and others to judge by.

    Args:
        graph: The trained encoder.
        preprocessing: Its input.
        reference: What files are compared with afterwards: the search holds itself to the same odd images.
        run: A run directory, whose training kept a pick of its images.
        images: A folder to calibrate with; None takes the run's pick, and where there is none ``data``.
        data: A folder of real images to judge by; None takes those that do not calibrate.
        target: See :func:`byol_deploy.quantization.resolve_target`.
        goal: What must be reached.

    Raises:
        DataError: Too few images, or all alike.
        UsageError: An unknown target.
    """
    resolved, timed = resolve_target(target)
    chosen = data if images is None else images
    pool = kept_images.kept(run) if run is not None and images is None else None
    if pool is not None:
        described = "images that the training kept"
    elif chosen is not None:
        described = f"the folder {Path(chosen).resolve().name}"
        pool = kept_images.pick(find_images(chosen), preprocessing)
    else:
        raise DataError(
            "there are no images to calibrate with: this run kept none; give --calibration IMAGES, a folder of images "
            "like those of production"
        )
    kept_images.check(pool, described)
    if data is None:
        calibrating, trying = pool[::2], pool[1::2]
    else:
        calibrating = pool[:CALIBRATING] if len(pool) > CALIBRATING else pool[::2]
        used = {image.tobytes() for image in calibrating}
        sources, _ = real_images(data, preprocessing, TRYING + len(calibrating))
        others = [image for image in preprocessing.batch(sources) if image.tobytes() not in used]
        trying = np.stack(others[:TRYING]) if others else pool[1::2]
    if len(trying) < kept_images.FEWEST:
        raise DataError(
            f"{len(trying)} images are left to judge files of reduced precision by; give --data a folder with "
            f"{CALIBRATING + TRYING} or more"
        )
    limits = fidelity_limits(reference.awkward.limits, photographs=False, agreement=False)
    odd = Outliers(
        reference.awkward.images,
        reference.awkward.expected,
        {name: _SLACK * limit.margin for name, limit in limits.items() if isinstance(limit, FidelityLimit)},
    )
    return Material(
        Calibration(calibrating[:CALIBRATING], resolved), trying, graph.run(trying), odd, goal, timed,
        f"{described}; judged by {len(trying)} others",
    )  # fmt: skip


def precisions_of(format: Format, asked: Sequence[str]) -> list[str]:
    """Those of the asked precisions that a format writes, float32 left out: it always comes along."""
    return [name for name in dict.fromkeys(asked) if name in format.precisions and name != "fp32"]


def check_precisions(formats: Sequence[Format], asked: Sequence[str]) -> None:
    """Refuse a precision that none of the formats writes.

    Raises:
        UsageError: There is one.
    """
    for name in asked:
        if not any(name in format.precisions for format in formats):
            offered = "; ".join(f"{format.name} has {', '.join(format.precisions)}" for format in formats)
            raise UsageError(f"no chosen format writes {name}: {offered}")


def reduce(
    format: Format,
    graph: EncoderGraph,
    signature: Signature,
    full: Path,
    path: Path,
    precision: str,
    material: Material,
    carried: Mapping[str, str],
    say: Say,
) -> tuple[Trade, tuple[Path, ...]]:
    """Search, and write what was found to ``path``; nothing is written when nothing was found.

    Returns:
        The trade, and the further files that belong to ``path``.

    Raises:
        ExportError: The quantiser failed.
    """
    names = graph.outputs
    reducer = format.reducer(graph, signature, full, precision, material.calibration)

    def open_file(file: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        opened = format.load(file, RunOptions(threads=usable_cores()))
        return lambda images: opened.compute(images, names)

    scratch = path.with_name(f"trial{format.suffix}")
    try:
        trade = search(
            reducer,
            open_file,
            open_file(full),
            material.trying,
            material.expected,
            precision=precision,
            calibration=material.calibration,
            goal=material.goal,
            scratch=scratch,
            outliers=material.outliers,
            must_be_faster=material.timed,
            say=lambda line: say(f"{format.name} {line}"),
        )
    finally:
        for left in path.parent.glob("trial.*"):
            left.unlink()
    if trade.chosen is None:
        return trade, ()
    return trade, reducer.write(path, carried, trade.chosen.method, trade.chosen.kept)
