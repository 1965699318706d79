"""Checks of one written file: does it compute what was trained, and whose parameters does it hold?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byol_deploy.bundle import read_carried
from byol_deploy.formats import Format, Run, RunOptions
from byol_deploy.parity import Limit, ParityReport, compare
from byol_deploy.pipeline.reference import Reference, first_line
from byol_deploy.runtime import Encoder
from byol_deploy.selftest import run_in_batches

if TYPE_CHECKING:
    from byol_deploy.training.checkpoints import LoadedCheckpoint

BATCH_SIZES = (1, 2, 7)
"""What every file is run at. Never the batch that was traced with."""


@dataclass(frozen=True)
class BranchProof:
    """Which branch's parameters a written file holds.

    Attributes:
        kept: Online tensors that are in the file, bit for bit under their own names.
        total: Online tensors in all.
        absent: Names that the file does not hold: tensors that no output needs, or that the format folded.
        faults: What speaks against the online branch; empty when nothing does.
    """

    kept: int
    total: int
    absent: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing speaks against the online branch. Folded tensors alone are no fault: parity covers them."""
        return not self.faults

    def __str__(self) -> str:
        """One sentence for a person."""
        if self.faults:
            return "; ".join(self.faults)
        text = f"{self.kept} of {self.total} online tensors are in the file bit for bit, none of the momentum branch's"
        return f"{text}; not stored as they are: {few(self.absent)}" if self.absent else text


def prove_branch(
    stored: Mapping[str, np.ndarray], online: Mapping[str, np.ndarray], momentum: Mapping[str, np.ndarray]
) -> BranchProof:
    """Look at the tensors in a written file.

    Args:
        stored: Every tensor of the file by its name there.
        online: The online branch's tensors by state-dict key.
        momentum: The momentum branch's tensors by state-dict key.

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
    for name, array in online.items():
        if name not in stored:
            absent.append(name)
        elif stored[name].shape == array.shape and np.array_equal(stored[name], array):
            kept += 1
        else:
            faults.append(f"{name} has other values than the online branch")
    if len(faults) > 5:
        faults = [*faults[:5], f"and {len(faults) - 5} more"]
    return BranchProof(kept, len(online), tuple(absent), tuple(faults))


def compare_file(path: Path, format: Format, reference: Reference, options: RunOptions) -> ParityReport:
    """Load a written file in a fresh session and compare it with the reference, never on the traced tensor.

    Real and awkward images at batch sizes 1, 2 and 7; then, from the sources of the real images on, the preprocessing
    that the file itself carries against the training side's. Whatever the file's runtime raises on such input is a
    failed row, not an exception.

    Raises:
        BundleError, ProviderError: The file cannot be opened at all.
    """
    run = format.load(path, options)
    reports = []
    for images in (reference.real, reference.awkward):
        for size in BATCH_SIZES:
            subject = f"{path.name}, {images.name}, batch {size}"
            count = len(images.images)
            if count == 0:  # all of them were left out: not comparable, which is no pass
                reports.append(compare(images.expected, images.expected, limits=images.limits, subject=subject))
                continue
            try:
                # Tiled to the batch size: five awkward images at batch 7 must really be seven.
                places = np.arange(max(count, size)) % count
                actual = run_in_batches(run, images.images[places], size)
                actual = {name: values[:count] for name, values in actual.items()}
            except Exception as error:
                # A baked-in batch size shows here, as whatever that runtime calls it.
                reports.append(_cannot_run(images.expected, images.limits, subject, error))
                continue
            reports.append(compare(images.expected, actual, limits=images.limits, subject=subject))
    if "embedding" in reference.real.expected:
        reports.append(_end_to_end(path, format, run, reference))
    return ParityReport.merged(reports)


def _end_to_end(path: Path, format: Format, run: Run, reference: Reference) -> ParityReport:
    subject = f"{path.name}, from the image files on"
    try:
        if format.opens_in_encoder:
            embedding = Encoder(path)(reference.sources)
        else:
            carried = read_carried(format.carried(path), path.name)[0]
            embedding = run(carried.preprocessing.batch(reference.sources))["embedding"]
    except Exception as error:
        # As above; and a file whose own contract cannot be read is no more than a file that failed.
        return _cannot_run({"embedding": reference.end_to_end}, reference.real.limits, subject, error)
    return compare(
        {"embedding": reference.end_to_end}, {"embedding": embedding}, limits=reference.real.limits, subject=subject
    )


def _cannot_run(
    expected: Mapping[str, np.ndarray], limits: Mapping[str, Limit], subject: str, error: Exception
) -> ParityReport:
    report = compare(expected, {}, limits=limits, subject=subject)
    reason = f"the file cannot run this: {first_line(error)}"
    return ParityReport(tuple(replace(row, reason=reason) for row in report.rows))


def momentum_tensors(loaded: LoadedCheckpoint) -> dict[str, np.ndarray]:
    """The momentum branch's tensors that the checkpoint holds, by state-dict key."""
    state = loaded.model.state_dict()
    return {key: state[key].detach().cpu().numpy() for key in loaded.momentum_keys if key in state}


def few(items: Sequence[str], count: int = 3) -> str:
    """The first items as text, and how many more there are."""
    more = f"; and {len(items) - count} more" if len(items) > count else ""
    return "; ".join(items[:count]) + more
