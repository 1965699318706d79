"""From a comparison to a page: what a report draws of one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byol_deploy.errors import BundleError
from byol_deploy.formats import Format, RunOptions
from byol_deploy.parity import ParityReport
from byol_deploy.pipeline.explain.drift import Explanation, explain_file
from byol_deploy.pipeline.reference import Reference
from byol_deploy.report import FileEvidence, ParityBlock, write_verify_report

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.pipeline.verifying import ArtefactVerdict, VerifyReport

DRAWN_IMAGES = 2
"""Images on which the drift in a report is measured; ``verify --explain`` takes more."""


def file_evidence(reference: Reference, crowd: Mapping[str, np.ndarray], explained: Explanation | None) -> FileEvidence:
    """What a report draws of one file.

    Args:
        reference: What the file was compared with.
        crowd: What the file gave for ``reference.crowd``; empty where it could not run.
        explained: The drift along its graph, where it could be followed.
    """
    first = next(iter(reference.crowd.expected))
    found = crowd.get(first)
    limit = reference.crowd.limits[first]
    whole = found is not None and found.shape == reference.crowd.expected[first].shape
    return FileEvidence(
        reference=reference.crowd.expected[first],
        embeddings=found if whole else None,
        images=reference.crowd.images,
        noise_rel_l2=limit.noise_of_images(len(reference.crowd.images)),
        drift=None if explained is None else explained.series(),
        drift_verdict="" if explained is None else explained.verdict(),
    )


def drift_of(
    path: Path,
    format: Format,
    graph: EncoderGraph,
    reference: Reference,
    precision: str = "fp32",
    *,
    broken: bool,
) -> Explanation | None:
    """The drift along the graph on a few real images; None for a file that cannot be run so.

    ``broken`` says that the file failed its comparison: then whatever its runtime raises here is its own trouble.
    """
    images = reference.real.images[:DRAWN_IMAGES]
    try:
        return explain_file(path, format, graph, images, precision=precision, options=RunOptions())
    except Exception as error:
        if not (broken or isinstance(error, BundleError)):
            raise
        return None


def show_verification(
    path: Path, report: VerifyReport, evidence: dict[str, FileEvidence], facts: Sequence[tuple[str, str]], command: str
) -> None:
    """Write the page of a verification.

    Raises:
        OutputError: The place is full or cannot be written.
        MissingExtraError: Jinja2 is not installed.
    """
    write_verify_report(
        path,
        title=f"Verification of {Path(report.path).name}",
        passed=report.passed,
        blocks=[_block(verdict) for verdict in report.artefacts],
        checks=[(check.name, check.passed, check.detail) for check in report.checks],
        warnings=report.warnings,
        images=report.images,
        evidence=evidence,
        separation=report.separation,
        facts={"Where it was verified": list(facts)},
        commands=[command],
    )


def _block(verdict: ArtefactVerdict) -> ParityBlock:
    return ParityBlock(
        artefact=verdict.file,
        format=verdict.format,
        precision=verdict.precision,
        bytes=0,
        report=verdict.parity or ParityReport(()),
        note="; ".join(verdict.notes),
        fault=verdict.reason if verdict.status == "failed" else "",
        not_run=verdict.reason if verdict.status == "not run" else "",
    )
