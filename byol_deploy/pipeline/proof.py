"""Checks of one written file: does it compute what was trained, and whose parameters does it hold?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byol_deploy.bundle import read_carried
from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, ProviderError
from byol_deploy.formats import Format, Run, RunOptions
from byol_deploy.parity import (
    AnyLimit,
    Outputs,
    ParityReport,
    ParityRow,
    cannot_run,
    compare,
    compare_run,
    fidelity_limits,
    not_comparable,
    run_in_batches,
)
from byol_deploy.pipeline.reference import ImageSet, Reference
from byol_deploy.runtime import Encoder

if TYPE_CHECKING:
    from byol_deploy.training.checkpoints import LoadedCheckpoint

BATCH_SIZES = (1, 2, 3, 7)
"""What every file is run at, beside the largest."""
LARGEST_BATCH = 32
TUNED_BATCHES = (1, 8)
"""What tuning measures, and prepares the runtime for where that is faster."""
_AWKWARD_BATCH = 7


@dataclass(frozen=True)
class BranchProof:
    """Which branch's parameters a written file holds.

    Attributes:
        kept: Online tensors that are in the file under their own names.
        total: Online tensors in all.
        absent: Names that the file does not hold: tensors that no output needs, or that the format folded.
        faults: What speaks against the online branch; empty when nothing does.
        exact: Whether they are there bit for bit, and not rounded to a smaller type.
    """

    kept: int
    total: int
    absent: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    exact: bool = True

    @property
    def passed(self) -> bool:
        """Nothing speaks against the online branch. Folded tensors alone are no fault: parity covers them."""
        return not self.faults

    def __str__(self) -> str:
        """One sentence for a person."""
        if self.faults:
            return "; ".join(self.faults)
        how = "bit for bit" if self.exact else "rounded"
        text = f"{self.kept} of {self.total} online tensors are in the file {how}, none of the momentum branch's"
        return f"{text}; not stored as they are: {few(self.absent)}" if self.absent else text


def prove_branch(
    stored: Mapping[str, np.ndarray],
    online: Mapping[str, np.ndarray],
    momentum: Mapping[str, np.ndarray],
    *,
    precision: str = "fp32",
) -> BranchProof:
    """Look at the tensors in a written file.

    Args:
        stored: Every tensor of the file by its name there.
        online: The online branch's tensors by state-dict key.
        momentum: The momentum branch's tensors by state-dict key.
        precision: What the file promises. At another than "fp32" a tensor is kept when it is the online one, rounded.

    Returns:
        Faults are: a name of the momentum branch; a tensor equal to one of the momentum branch (or to its transpose)
        that no online tensor equals; an online name with other values.
    """

    def digest(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
        return array.dtype.str, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()

    faults = [f"{name} belongs to the momentum branch" for name in stored if "_momentum." in name.replace("/", ".")]
    ours = {digest(array) for array in online.values()}
    theirs: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    for name, array in momentum.items():
        # A constant tensor such as zeros(64) belongs to everybody, and so does a single number.
        if array.dtype.kind != "f" or array.size < 2 or np.ptp(array) == 0:
            continue
        for form in (array, array.T) if array.ndim == 2 else (array,):
            if digest(array) not in ours:
                theirs[digest(form)] = name
    for name, array in stored.items():
        owner = theirs.get(digest(array))
        if owner is not None:
            faults.append(f"{name} holds the values of {owner}")
    kept = 0
    absent = []
    # With the weight its bias changes too.
    folded = {
        name
        for name, array in online.items()
        if name in stored and not _same(stored[name], array, precision) and _folded(stored[name], array)
    }
    for name, array in online.items():
        if name not in stored:
            absent.append(name)
        elif _same(stored[name], array, precision):
            kept += 1
        elif name in folded or name.removesuffix(".bias") + ".weight" in folded:
            absent.append(name)
        else:
            faults.append(f"{name} has other values than the online branch")
    if len(faults) > 5:
        faults = [*faults[:5], f"and {len(faults) - 5} more"]
    return BranchProof(kept, len(online), tuple(absent), tuple(faults), precision == "fp32")


@dataclass(frozen=True)
class Condition:
    """One way to run a file: where, with what, and how many images at once."""

    options: RunOptions
    batch_size: int
    words: str

    def subject(self, file: str, images: ImageSet) -> str:
        """For the report: ``model.onnx, real images, 1 thread, batch 7``."""
        return ", ".join(part for part in (file, images.name, self.words, f"batch {self.batch_size}") if part)


def matrix(format: Format, base: RunOptions) -> list[Condition]:
    """The conditions under which a file must compute the same.

    Every batch size as asked; then, at one batch size, what else a deployment may change: one thread instead of all,
    graph optimisation off, prepared for numbers of images as tuning may choose it, each other provider that works
    here. What the caller fixed is not varied.
    """
    conditions = [Condition(base, size, "") for size in BATCH_SIZES]
    size = BATCH_SIZES[-1]
    if base.threads is None and usable_cores() > 1:
        conditions.append(Condition(replace(base, threads=1), size, "1 thread"))
    if base.optimization is None:
        conditions += [
            Condition(replace(base, optimization=level), size, f"optimisation {level}")
            for level in format.optimizations
        ]
    if format.can_fix_batches and not base.batches:
        conditions.append(Condition(prepared(base), sum(TUNED_BATCHES), "fixed shapes"))
    if base == RunOptions(threads=base.threads, optimization=base.optimization):
        conditions += [
            Condition(replace(base, provider=name), size, f"provider {name}") for name in format.providers()[1:]
        ]
    return conditions


def prepared(base: RunOptions) -> RunOptions:
    """The same with the runtime prepared for the batches that are tuned for, cut into parts that run side by side."""
    threads = base.threads or usable_cores()
    streams = max(count for count in range(1, max(TUNED_BATCHES) + 1) if not max(TUNED_BATCHES) % count
                  and count <= threads)  # fmt: skip
    return replace(base, batches=TUNED_BATCHES, streams=streams)


class Sessions:
    """A file opened under several conditions, under each of them once.

    Args:
        file: Its name, for the report.
        load: Opens it.
    """

    def __init__(self, file: str, load: Callable[[RunOptions], Run]) -> None:
        self.file = file
        self.load = load
        self._open: dict[RunOptions, Run] = {}

    def __getitem__(self, options: RunOptions) -> Run:
        """The file as a function; raises what ``load`` raises."""
        if options not in self._open:
            self._open[options] = self.load(options)
        return self._open[options]

    def compare(
        self,
        condition: Condition,
        images: ImageSet,
        limits: Mapping[str, AnyLimit],
        among: tuple[Outputs, Outputs] | None = None,
    ) -> ParityReport:
        """Run images under one condition and compare; a file that does not open so is a failed row."""
        subject = condition.subject(self.file, images)
        try:
            run = self[condition.options]
        except (BundleError, ProviderError) as error:
            return cannot_run(images.expected, limits, subject, error)
        return compare_run(run, images.images, condition.batch_size, images.expected, limits, subject,
                           different_images=images.different, among=among)  # fmt: skip


def _folded(stored: np.ndarray, online: np.ndarray) -> bool:
    """Whether a weight is the online one times a factor for each output channel: batch norm was folded into it.

    Such a factor is no proof for or against a branch; what it does to the outputs the comparison shows.
    """
    if stored.shape != online.shape or online.ndim < 2 or stored.dtype.kind != "f" or not stored.any():
        return False
    rows, ours = stored.reshape(len(stored), -1).astype(np.float64), online.reshape(len(online), -1).astype(np.float64)
    length = (ours**2).sum(axis=1)
    factor = (rows * ours).sum(axis=1) / np.where(length > 0, length, 1.0)
    return bool(np.allclose(rows, factor[:, None] * ours, rtol=1e-5, atol=1e-6 * float(np.abs(rows).max(initial=0.0))))


def _same(stored: np.ndarray, online: np.ndarray, precision: str) -> bool:
    if stored.shape != online.shape:
        return False
    if precision == "fp32":
        return bool(np.array_equal(stored, online))
    # One rounding to bfloat16, the coarsest of the floating types; what float16 cannot hold (below 6e-8) becomes zero.
    return bool(np.allclose(stored.astype(np.float64), online, rtol=2.0**-8, atol=6e-8))


@dataclass(frozen=True, eq=False)
class FileComparison:
    """What :func:`compare_file` found.

    Attributes:
        report: The verdict.
        crowd: The file's outputs for ``reference.crowd``, (N, D) by name; empty where it could not run.
    """

    report: ParityReport
    crowd: dict[str, np.ndarray]


def compare_file(
    path: Path, format: Format, reference: Reference, options: RunOptions, *, precision: str = "fp32"
) -> FileComparison:
    """Load a written file in fresh sessions and compare it with the reference, never on the traced tensor.

    Graph: many real images at the largest batch, which also tell about neighbours and margins; some of them under every
    condition of :func:`matrix`; awkward ones. End to end: from image files on, the preprocessing that the file itself
    carries against the training side's. Whatever the file's runtime raises on such input is a failed row, not an
    exception.

    Args:
        path: The file.
        format: Its format.
        reference: What it must compute.
        options: How it is run; what it leaves open is varied.
        precision: What the file promises. "fp32" is held to the model's own rounding noise, anything else to margin
            and neighbours.

    Raises:
        BundleError, ProviderError: The file cannot be opened at all.
    """
    if reference.fault:
        return FileComparison(not_comparable(reference.real.expected, reference.fault, subject=path.name), {})
    sessions = Sessions(path.name, lambda asked: format.load(path, asked))
    whole = sessions[options]
    crowd, everybody = _crowd(path, whole, reference.crowd, precision)
    among = (reference.crowd.expected, crowd)

    def run(condition: Condition, images: ImageSet) -> ParityReport:
        return sessions.compare(condition, images, limits_for(images, precision), among)

    reports = [run(condition, reference.real) for condition in matrix(format, options)]
    reports += [run(Condition(options, size, ""), reference.awkward) for size in (_AWKWARD_BATCH, 1)]
    reports.append(everybody)
    if "embedding" in reference.real.expected:
        reports.append(_end_to_end(path, format, whole, reference, precision, among))
    return FileComparison(ParityReport.merged(reports), crowd)


def _crowd(path: Path, run: Run, images: ImageSet, precision: str) -> tuple[dict[str, np.ndarray], ParityReport]:
    """The file's outputs for many real images at the largest batch, and what they say."""
    limits = limits_for(images, precision, agreement=True)
    subject = f"{path.name}, {images.name}, batch {LARGEST_BATCH}"
    try:
        outputs = run_in_batches(run, images.images, LARGEST_BATCH)
    except Exception as error:
        return {}, cannot_run(images.expected, limits, subject, error)
    return outputs, compare(images.expected, outputs, limits=limits, subject=subject)


def limits_for(images: ImageSet, precision: str, *, agreement: bool = False) -> Mapping[str, AnyLimit]:
    """What a file of this precision may differ by on these images: margin, and neighbours where ``agreement``."""
    if precision == "fp32":
        return images.limits
    return fidelity_limits(images.limits, photographs=images.different, agreement=agreement)


def _end_to_end(
    path: Path, format: Format, run: Run, reference: Reference, precision: str, among: tuple[Outputs, Outputs]
) -> ParityReport:
    images = reference.end_to_end
    subject = f"{path.name}, {images.name}"
    expected = {"embedding": images.expected["embedding"]}
    limits = {"embedding": limits_for(images, precision)["embedding"]}
    try:
        if format.opens_in_encoder:
            embedding = Encoder(path)(reference.sources)
        else:
            preprocessing = read_carried(format.carried(path), path.name)[0].preprocessing
            embedding = run(preprocessing.batch(reference.sources))["embedding"]
    except Exception as error:
        # As above; and a file whose own contract cannot be read is no more than a file that failed.
        return cannot_run(expected, limits, subject, error)
    report = compare(expected, {"embedding": embedding}, limits=limits, subject=subject, different_images=False,
                     among=among)  # fmt: skip
    return ParityReport(tuple(_named(row, reference.names) for row in report.rows))


def _named(row: ParityRow, names: Sequence[str]) -> ParityRow:
    """A row that says which file is the worst one."""
    if row.passed or row.image is None:
        return row
    return replace(row, reason=f"{row.reason} (worst: {names[row.image]})")


def momentum_tensors(loaded: LoadedCheckpoint) -> dict[str, np.ndarray]:
    """The momentum branch's tensors that the checkpoint holds, by state-dict key."""
    state = loaded.model.state_dict()
    return {key: state[key].detach().cpu().numpy() for key in loaded.momentum_keys if key in state}


def few(items: Sequence[str], count: int = 3) -> str:
    """The first items as text, and how many more there are."""
    more = f"; and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(items[:count]) + more
