"""Reports of a bundle and of a verification: from what a comparison leaves behind to a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.bundle import REPORT_FILE, Bundle, Manifest
from byol_deploy.parity import FidelityLimit, ParityReport
from byol_deploy.report.blocks import CheckRow, DriftBlock, Fact, ParityBlock
from byol_deploy.report.gallery import ChangedGallery, Gallery, changed_gallery, nearest_gallery
from byol_deploy.report.numbers import share
from byol_deploy.report.page import write_report
from byol_deploy.report.plane import EmbeddingMap, embedding_map
from byol_deploy.report.trade import trade_section, tuned_section
from byol_deploy.separation import Separation, separation


@dataclass(frozen=True, eq=False)
class FileEvidence:
    """What the comparison of one file leaves behind for a page. All of it is optional.

    Attributes:
        reference: (N, D), the trained model's first output for N different real images.
        embeddings: (N, D), the file's for the same images.
        images: (N, H, W, 3) uint8, the images.
        noise_rel_l2: Relative L2 noise of the reference: one number, or (N,).
        drift: The drift along the graph, as :func:`byol_deploy.drawing.draw_drift` takes it.
        drift_verdict: Its sentence.
    """

    reference: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    images: np.ndarray | None = None
    noise_rel_l2: float | np.ndarray = 0.0
    drift: Mapping[str, Sequence[Any]] | None = None
    drift_verdict: str = ""


def write_bundle_report(
    folder: str | os.PathLike[str],
    evidence: Mapping[str, FileEvidence] | None = None,
    *,
    commands: Sequence[str] = (),
) -> None:
    """Write ``report.html`` into a bundle: how each file was checked, what goes in, what was left out.

    Args:
        folder: A bundle with its manifest, artefacts and golden cases; what the page says is read from there.
        evidence: For the name of a file what its comparison left behind.
        commands: What was typed to make the bundle; shown first among the commands.

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

    shown = _shown(evidence or {})
    gallery = None
    if not shown.changed:
        first = "embedding" if "embedding" in golden.outputs else manifest.outputs[0].name
        drawn = nearest_gallery(golden.outputs[first], golden.images, queries=len(golden.images), neighbours=1)
        gallery = Gallery(drawn.queries, f"The {len(drawn.queries)} golden cases, real images that travel with the "
                          f"files for the self-test, each with the nearest other one by {first}. They were chosen to "
                          "lie far apart, so the two need not look alike.")  # fmt: skip
    write_report(
        Path(folder) / REPORT_FILE,
        title=f"{model.backbone}, {manifest.preprocessing.size_px} px",
        passed=all(block.report.passed for block in blocks),
        verdict=_verdict(blocks),
        parity=blocks,
        sections=[trade_section(manifest.artefacts), tuned_section(manifest.tuned)],
        separation=shown.separation,
        gallery=gallery,
        changed=shown.changed,
        drift=shown.drift,
        maps=shown.maps,
        facts=_facts(manifest),
        commands=[
            *commands,
            "byol-deploy verify BUNDLE",
            "byol-deploy verify BUNDLE --against CHECKPOINT --data IMAGES",
            "byol-deploy embed BUNDLE IMAGES --out embeddings.npy",
        ],
        warnings=shown.notes,
    )


def write_verify_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    passed: bool,
    blocks: Sequence[ParityBlock],
    checks: Sequence[CheckRow] = (),
    warnings: Sequence[str] = (),
    images: str = "",
    evidence: Mapping[str, FileEvidence] | None = None,
    separation: Separation | None = None,
    facts: Mapping[str, Sequence[Fact]] | None = None,
    commands: Sequence[str] = (),
) -> None:
    """Write the page of a verification: a bundle or lone files against a trained model.

    Args:
        path: The HTML file; one that is there is replaced.
        title: What was verified.
        passed: The verdict over all files and checks.
        blocks: The files with their comparisons.
        checks: Further checks, such as the hash of the parameters.
        warnings: What a reader should know although it is no difference.
        images: What was compared on, in words.
        evidence: For the name of a file what its comparison left behind.
        separation: How far apart the encoder holds the images; None takes it from ``evidence``.
        facts: Title to a table of keys and values, such as where it ran.
        commands: The exact command that does this again.

    Raises:
        OutputError: The place is full or cannot be written.
        MissingExtraError: Jinja2 is not installed.
    """
    shown = _shown(evidence or {})
    faults = [f"{name}: {detail}" for name, right, detail in checks if not right]
    write_report(
        path,
        title=title,
        passed=passed,
        verdict=_verdict(blocks, faults) + (f" Compared on {images}." if images else ""),
        parity=blocks,
        checks=checks,
        separation=separation or shown.separation,
        changed=shown.changed,
        drift=shown.drift,
        maps=shown.maps,
        facts=facts,
        commands=commands,
        warnings=[*warnings, *shown.notes],
    )


@dataclass(frozen=True, eq=False)
class _Shown:
    """What evidence becomes on a page."""

    changed: list[ChangedGallery]
    maps: list[EmbeddingMap]
    drift: list[DriftBlock]
    separation: Separation | None
    notes: list[str]


def _shown(evidence: Mapping[str, FileEvidence]) -> _Shown:
    shown = _Shown([], [], [], None, [])
    apart = None
    for name, one in evidence.items():
        if one.drift is not None:
            shown.drift.append(DriftBlock(name, one.drift, one.drift_verdict))
        if one.reference is None:
            continue
        if apart is None:
            apart = separation(one.reference, noise_rel_l2=float(np.median(one.noise_rel_l2)))
        if one.embeddings is None:
            continue
        try:
            if one.images is not None:
                # The images that kept their neighbour are the same for each file: once is enough.
                by_lot = 0 if shown.changed else 2
                shown.changed.append(
                    changed_gallery(
                        one.reference, one.embeddings, one.images, one.noise_rel_l2, title=name, by_lot=by_lot
                    )
                )
            shown.maps.append(embedding_map(one.reference, moved=one.embeddings, title=name))
        except ValueError as error:
            shown.notes.append(f"{name}: neighbours and map are left out: {error}")
    return _Shown(shown.changed, shown.maps, shown.drift, apart, shown.notes)


def _verdict(blocks: Sequence[ParityBlock], faults: Sequence[str] = ()) -> str:
    reasons = []
    for block in blocks:
        why = block.failures
        bad = sum(not row.passed for row in block.report.rows)
        if why:
            many = f"{bad} of {len(block.report.rows)} comparisons failed; " if bad > 1 else ""
            more = f"; and {len(why) - 1} more, below" if len(why) > 1 else ""
            reasons.append(f"{block.artefact}: {many}{why[0]}{more}")
    reasons += faults
    if reasons:
        return f"Do not use it: {'; '.join(reasons)}."
    good = [block for block in blocks if block.status in ("pass", "warn")]
    if not good:
        return "Nothing was compared, and what was not compared has not passed."
    names = [block.artefact for block in good]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    said = f"{listed} {'computes' if len(good) == 1 else 'compute'} what was trained."
    rows = [row for block in good for row in block.report.rows]
    rounding = [row.severity for row in rows if not isinstance(row.limit, FidelityLimit)]
    fidelity = [row.severity for row in rows if isinstance(row.limit, FidelityLimit)]
    if rounding:
        said += f" The largest error is {share(max(rounding))} of what this model's own rounding noise allows."
    if fidelity:
        said += (
            " What is stored at reduced precision keeps the images apart and their neighbours: it uses "
            f"{share(max(fidelity))} of what is allowed."
        )
    return said


def _facts(manifest: Manifest) -> dict[str, list[Fact]]:
    model = manifest.model
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
    facts |= _environment_facts({artefact.file: artefact.host for artefact in manifest.artefacts}, manifest.written_by)
    if manifest.recipe:
        facts["Training recipe"] = _flat(manifest.recipe)
    return facts


def _environment_facts(hosts: Mapping[str, Mapping[str, Any]], written_by: Mapping[str, str]) -> dict[str, list[Fact]]:
    """Where the files were compared: what holds for all of them once, the rest for each."""
    told = {
        file: {str(key): str(value) for key, value in host.items()
               if str(value) and key != "tensors" and str(value) != written_by.get(key)}
        for file, host in hosts.items()
    }  # fmt: skip
    common = set.intersection(*(set(host.items()) for host in told.values())) if told else set()
    facts: dict[str, list[Fact]] = {}
    if len(told) > 1 and common:
        first = next(iter(told.values()))
        facts["Environment of the comparison"] = [item for item in first.items() if item in common]
    for file, host in told.items():
        rest: list[Fact] = [item for item in host.items() if len(told) == 1 or item not in common]
        if rest:
            facts[f"{file} was compared on"] = rest
    return facts


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[Fact]:
    rows: list[Fact] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{name}.")
        else:
            rows.append((name, str(value)))
    return rows
