"""Verify: does a bundle or a lone file still compute what was trained?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from byol_deploy import formats
from byol_deploy.bundle import Bundle, Golden, Manifest, read_carried
from byol_deploy.errors import BundleError, ProviderError, UsageError
from byol_deploy.images import printable
from byol_deploy.parity import ParityReport, first_line
from byol_deploy.pipeline.proof import compare_file, momentum_tensors, prove_branch
from byol_deploy.pipeline.reference import build_reference
from byol_deploy.selftest import check_golden

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One yes-or-no check: its name, its verdict, and the numbers or names behind it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class ArtefactVerdict:
    """What was found out about one file.

    Attributes:
        file: Its name.
        format: Its format.
        status: ``passed``, ``failed``, or ``not run`` (then ``reason`` says why; that is never a pass).
        reason: Why it was not run, or what failed besides the comparison.
        parity: The comparison; None when it was not run.
    """

    file: str
    format: str
    status: Literal["passed", "failed", "not run"]
    reason: str = ""
    parity: ParityReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "parity": None if self.parity is None else self.parity.to_dict()}


@dataclass(frozen=True)
class VerifyReport:
    """The verdict over a bundle or a lone file.

    Attributes:
        path: What was verified.
        artefacts: One verdict per file.
        checks: Further checks; only with a checkpoint.
        warnings: What a reader should know although it is no difference.
        images: What it was compared on.
    """

    path: str
    artefacts: tuple[ArtefactVerdict, ...]
    checks: tuple[Check, ...] = ()
    warnings: tuple[str, ...] = ()
    images: str = ""

    @property
    def passed(self) -> bool:
        """At least one file ran and passed, none failed, and every check passed."""
        states = [artefact.status for artefact in self.artefacts]
        return "passed" in states and "failed" not in states and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "passed": self.passed,
            "artefacts": [artefact.to_dict() for artefact in self.artefacts],
            "checks": [vars(check).copy() for check in self.checks],
            "warnings": list(self.warnings),
            "images": self.images,
        }

    def text(self) -> str:
        """The verdict for a person, PASS or FAIL in the first line."""
        on = f" (compared on {self.images})" if self.images else ""
        lines = [f"{'PASS' if self.passed else 'FAIL'} {self.path}{on}"]
        for check in self.checks:
            lines += ["", f"{check.name}: {'PASS' if check.passed else 'FAIL'}: {check.detail}"]
        for artefact in self.artefacts:
            note = f": {artefact.reason}" if artefact.reason else ""
            lines += ["", f"{artefact.file} ({artefact.format}): {_SHOWN[artefact.status]}{note}"]
            lines += [artefact.parity.table()] if artefact.parity is not None and artefact.parity.rows else []
        lines += ["", *(f"WARNING {warning}" for warning in self.warnings)] if self.warnings else []
        return "\n".join(lines)


_SHOWN = {"passed": "PASS", "failed": "FAIL", "not run": "NOT RUN HERE"}


@dataclass(frozen=True, eq=False)
class _Opened:
    """A bundle or a lone file: its contract and its files."""

    manifest: Manifest
    golden: Golden
    files: list[tuple[Path, formats.Format | None, str]]


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    backbone: str | None = None,
    trust_backbone: bool = False,
    say: Say | None = None,
) -> VerifyReport:
    """Does this bundle or file still compute what was trained?

    Without ``against``: the golden cases that it carries, for every file whose runtime is installed; PyTorch is not
    needed for ONNX. With ``against``: the full comparison with a checkpoint, including whether it holds exactly that
    checkpoint's online parameters.

    Args:
        path: A bundle, or a lone file that byol-deploy wrote.
        against: A checkpoint or run directory.
        data: Real images for the comparison with ``against``.
        provider: Where the files run: ``cpu``, ``cuda``, ``auto``, or a runtime's own name of a provider.
        threads: Threads inside an operator; None takes what this process may use.
        backbone: For a checkpoint that does not say what its backbone is.
        trust_backbone: Import the recipe's own ``module:callable`` backbone.
        say: Called with a line of progress now and then.

    Returns:
        The verdict. A difference is no exception.

    Raises:
        BundleError: Absent, damaged, foreign, or from a newer schema.
        CheckpointError, DataError, UsageError: With ``against``.
        ProviderError: No file could run on the provider.
    """
    if data is not None and against is None:
        raise UsageError("--data needs --against CHECKPOINT: without it only the golden cases are compared")
    options = formats.RunOptions(provider, threads)
    opened = _open(path)
    shown = printable(path)
    if against is None:

        def golden_cases(file: Path, format: formats.Format) -> tuple[ParityReport, str]:
            run = format.load(file, options)
            try:
                return check_golden(run, opened.manifest, opened.golden, subject=file.name), ""
            except (BundleError, ProviderError):
                raise
            except Exception as error:
                # The runtime's own words for a file that opens and cannot compute.
                return ParityReport(()), first_line(error)

        count = len(opened.golden.images)
        return VerifyReport(shown, _each_file(opened, golden_cases), images=f"the {count} golden cases inside")
    return _verify_against(shown, opened, against, data, options, backbone, trust_backbone, say or (lambda line: None))


def _open(path: str | os.PathLike[str]) -> _Opened:
    root = Path(path)
    if root.is_dir():
        bundle = Bundle.open(root)
        known = formats.available()
        return _Opened(bundle.manifest, bundle.golden, [
            (root / entry.file, formats.get(entry.format) if entry.format in known else None, entry.format)
            for entry in bundle.manifest.artefacts
        ])  # fmt: skip
    if not root.is_file():
        raise BundleError(f"{printable(root)} does not exist; pass a bundle or a file that byol-deploy export wrote")
    format = formats.of_file(root)
    if format is None:
        endings = ", ".join(formats.get(name).suffix for name in formats.available())
        raise BundleError(f"{printable(root)} is neither a bundle nor a file that ends in {endings}")
    missing = formats.missing_to_run(format)
    if missing:
        raise BundleError(f"{printable(root)} cannot be verified here: {missing} is not installed")
    manifest, golden = read_carried(format.carried(root), printable(root))
    return _Opened(manifest, golden, [(root, format, format.name)])


def _each_file(
    opened: _Opened, judge: Callable[[Path, formats.Format], tuple[ParityReport, str]]
) -> tuple[ArtefactVerdict, ...]:
    verdicts: list[ArtefactVerdict] = []
    refusals: list[ProviderError] = []
    for file, format, name in opened.files:
        if format is None:
            verdicts.append(ArtefactVerdict(file.name, name, "not run", "this version does not know the format"))
            continue
        missing = formats.missing_to_run(format)
        if missing:
            verdicts.append(ArtefactVerdict(file.name, name, "not run", f"{missing} is not installed"))
            continue
        try:
            report, reason = judge(file, format)
        except ProviderError as error:
            refusals.append(error)
            verdicts.append(ArtefactVerdict(file.name, name, "not run", str(error)))
            continue
        passed = report.passed and not reason
        verdicts.append(ArtefactVerdict(file.name, name, "passed" if passed else "failed", reason, report))
    if refusals and all(verdict.status == "not run" for verdict in verdicts):
        raise refusals[0]
    return tuple(verdicts)


def _verify_against(
    shown: str,
    opened: _Opened,
    against: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    options: formats.RunOptions,
    backbone: str | None,
    trust_backbone: bool,
    say: Say,
) -> VerifyReport:
    from byol_deploy.graph import OUTPUTS, EncoderGraph
    from byol_deploy.training.checkpoints import load_checkpoint

    manifest = opened.manifest
    names = [output.name for output in manifest.outputs]
    if any(name not in OUTPUTS for name in names):
        raise BundleError(f"{shown} has the outputs {', '.join(names)}; a checkpoint has {', '.join(OUTPUTS)}")
    loaded = load_checkpoint(against, backbone=backbone, trust_backbone=trust_backbone)
    trained = loaded.preprocessing or manifest.preprocessing
    graph = EncoderGraph(loaded.model, trained, names)
    mine, theirs = graph.parameter_hash(), manifest.model.parameter_hash
    same_hash, same_input = mine == theirs, trained == manifest.preprocessing
    checks = (
        Check(
            "parameters",
            same_hash,
            f"both {mine}"
            if same_hash
            else f"the hash differs: {theirs} in {shown}, {mine} in the checkpoint's online branch; "
            "it was exported from another checkpoint",
        ),
        Check(
            "preprocessing",
            same_input,
            trained.describe()
            if same_input
            else f"trained with: {trained.describe()}; exported with: {manifest.preprocessing.describe()}",
        ),
    )
    say("computing the reference in float32 and float64")
    reference = build_reference(loaded, graph, trained, data)
    online, momentum = graph.tensors(), momentum_tensors(loaded)

    def full(file: Path, format: formats.Format) -> tuple[ParityReport, str]:
        say(f"comparing {file.name} with PyTorch")
        report = compare_file(file, format, reference, options)
        proof = prove_branch(format.tensors(file), online, momentum)
        return report, "" if proof.passed else str(proof)

    verdicts = _each_file(opened, full)
    return VerifyReport(shown, verdicts, checks, reference.warnings, reference.described)
