"""The fidelity columns: what a row computes, in the process and under the condition that is timed, against the truth.

The truth is the checkpoint where there is one. Without it, the golden cases that travel in each file; and for a file
of reduced precision, which eight images tell little about, the float32 file of the same parameters on real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from byol_deploy.bundle import Golden, Manifest
from byol_deploy.formats import Run
from byol_deploy.parity import (
    AnyLimit,
    Limit,
    Outputs,
    ParityReport,
    as_rows,
    cannot_run,
    compare,
    compare_run,
    distance_apart,
    fidelity_limits,
    run_in_batches,
)
from byol_deploy.pipeline.benching.rows import Fidelity
from byol_deploy.pipeline.proof import limits_for
from byol_deploy.pipeline.reference import ImageSet, Reference
from byol_deploy.selftest import check_golden


def against_checkpoint(
    reference: Reference, outputs: Sequence[str], run: Run, precision: str, batches: Sequence[int]
) -> dict[int, Fidelity]:
    """Compare one session with the trained model, at each batch size.

    Many real images and the awkward ones at the largest batch, some of the real ones at every batch.

    Args:
        reference: The trained model's outputs.
        outputs: Those that the file has.
        run: The session.
        precision: What the file promises.
        batches: Sizes of a batch.
    """
    crowd = _only(reference.crowd, outputs)
    words = f"the checkpoint on {crowd.name}"
    if reference.fault:
        return dict.fromkeys(batches, Fidelity("not compared", reference.fault, words))
    limits = limits_for(crowd, precision, agreement=True)
    # A reference that fails against itself (collapsed, too few images, not finite) says nothing about any file.
    blind = compare(crowd.expected, crowd.expected, limits=limits, subject=crowd.name)
    if not blind.passed:
        return dict.fromkeys(batches, Fidelity("not compared", blind.failures[0], words))
    most = max(batches)
    subject = f"{crowd.name}, batch {most}"
    try:
        found = run_in_batches(run, crowd.images, most)
    except Exception as error:
        return dict.fromkeys(batches, _told(cannot_run(crowd.expected, limits, subject, error), None, words))
    many = compare(crowd.expected, found, limits=limits, subject=subject)
    among = (crowd.expected, found)

    def more(images: ImageSet, batch: int) -> ParityReport:
        return compare_run(run, images.images, batch, images.expected, limits_for(images, precision),
                           f"{images.name}, batch {batch}", different_images=images.different, among=among)  # fmt: skip

    odd = more(_only(reference.awkward, outputs), most)
    real = _only(reference.real, outputs)
    return {batch: _told(many, ParityReport.merged([odd, more(real, batch)]), words) for batch in batches}


def by_golden(
    manifest: Manifest, golden: Golden, run: Run, precision: str, batches: Sequence[int]
) -> dict[int, Fidelity]:
    """Compare one session with the golden cases that travel with the file, at each batch size."""
    found = {}
    for batch in batches:

        def run_so(images: np.ndarray, batch: int = batch) -> Mapping[str, np.ndarray]:
            return run_in_batches(run, images, batch)

        report = check_golden(run_so, manifest, golden, subject=f"batch {batch}", precision=precision)
        words = f"the {len(golden.images) + len(golden.files)} golden cases"
        found[batch] = _told(report, None, words)
    return found


@dataclass(frozen=True, eq=False)
class Anchor:
    """The float32 file that files of reduced precision are compared with, where there is no checkpoint.

    Attributes:
        name: Of the file.
        images: (N, H, W, 3) uint8, different real ones.
        expected: Its outputs, (N, D) by name.
    """

    name: str
    images: np.ndarray
    expected: dict[str, np.ndarray]

    def judge(self, run: Run, batches: Sequence[int], known: Mapping[int, Fidelity]) -> dict[int, Fidelity]:
        """What the golden cases said, with what many images say."""
        words = f"{self.name} on {len(self.images)} real images"
        # The float32 limit itself is not asked for; only where its images lie.
        known_limits = {
            name: Limit(1e-4, 0.999, apart=distance_apart(as_rows(values))) for name, values in self.expected.items()
        }
        limits = fidelity_limits(known_limits, photographs=True, agreement=True)
        blind = compare(self.expected, self.expected, limits=limits, subject=words)
        if not blind.passed:
            reason = blind.failures[0]
            return {batch: fidelity if fidelity.status == "failed" else replace(
                fidelity, status="not compared", reason=reason, against=words
            ) for batch, fidelity in known.items()}  # fmt: skip
        most = max(batches)
        report = compare_run(run, self.images, most, self.expected, limits, f"{words}, batch {most}")
        told = _told(report, None, words)
        return {batch: told if fidelity.status == "passed" else replace(told, status=fidelity.status,
                reason=fidelity.reason) for batch, fidelity in known.items()}  # fmt: skip


def _only(images: ImageSet, outputs: Sequence[str]) -> ImageSet:
    """The part of the reference that a file with these outputs can be compared with."""
    expected: Outputs = images.expected
    names = [name for name in expected if name in outputs]
    limits: Mapping[str, AnyLimit] = images.limits
    return replace(images, expected={name: images.expected[name] for name in names},
                   limits={name: images.limits[name] for name in names if name in limits})  # fmt: skip


def _told(shown: ParityReport, further: ParityReport | None, against: str) -> Fidelity:
    """The numbers of the first output of ``shown``, and the verdict over both."""
    whole = shown if further is None else ParityReport.merged([shown, further])
    if not whole.rows:
        return Fidelity("not compared", "nothing was compared", against)
    reason = "" if whole.passed else whole.failures[0]
    more = len(whole.failures) - 1 if reason else 0
    if more > 0:
        reason += f"; and {more} more"
    first = [row for row in shown.rows if row.output == shown.rows[0].output]
    numbers = [row for row in first if np.isfinite(row.cosine_min)]
    worst = ParityReport(tuple(first)).worst()[0]
    return Fidelity(
        "passed" if whole.passed else "failed",
        reason,
        against,
        worst.output,
        max((row.tolerance for row in numbers), default=None),
        min((row.cosine_min for row in numbers), default=None),
        worst.margin,
        worst.neighbours,
    )
