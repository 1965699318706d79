"""Verify: does a bundle or a lone file still compute what was trained?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from byol_deploy import formats
from byol_deploy.bundle import CARRIED_MANIFEST_KEY, Bundle, Golden, Manifest, read_artefact, read_carried
from byol_deploy.errors import BundleError, OutputError, ProviderError, UsageError
from byol_deploy.host import describe_host
from byol_deploy.images import printable
from byol_deploy.parity import ParityReport, first_line
from byol_deploy.pipeline.explain.drift import Explanation, explain_file
from byol_deploy.pipeline.proof import compare_file, momentum_tensors, prove_branch
from byol_deploy.pipeline.reference import Reference, build_reference
from byol_deploy.pipeline.showing import drift_of, file_evidence, show_verification
from byol_deploy.report import FileEvidence
from byol_deploy.selftest import as_tuned, check_content, self_test_file
from byol_deploy.separation import Separation

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph

EXPLAINED_IMAGES = 4
"""Images on which the drift is followed through a file."""

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
        precision: What the file promises: "fp32", "fp16", "bf16" or "int8".
        notes: Where it ran, and what is different from where it was exported.
        explanation: The drift along the graph; only where it was asked for.
    """

    file: str
    format: str
    status: Literal["passed", "failed", "not run"]
    reason: str = ""
    parity: ParityReport | None = None
    precision: str = "fp32"
    notes: tuple[str, ...] = ()
    explanation: Explanation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "notes": list(self.notes),
            "parity": None if self.parity is None else self.parity.to_dict(),
            "explanation": None if self.explanation is None else self.explanation.to_dict(),
        }

    def text(self) -> str:
        """The verdict for a person."""
        what = self.format if self.precision == "fp32" else f"{self.format}, {self.precision}"
        lines = [f"{self.file} ({what}): {_SHOWN[self.status]}{f': {self.reason}' if self.reason else ''}"]
        lines += [self.parity.table()] if self.parity is not None and self.parity.rows else []
        lines += self.notes
        lines += ["", self.explanation.text()] if self.explanation is not None else []
        return "\n".join(lines)


@dataclass(frozen=True)
class VerifyReport:
    """The verdict over a bundle or a lone file.

    Attributes:
        path: What was verified.
        artefacts: One verdict per file.
        checks: Further checks; only with a checkpoint.
        warnings: What a reader should know although it is no difference.
        images: What it was compared on.
        separation: Whether the encoder tells the images apart; only with a checkpoint.
    """

    path: str
    artefacts: tuple[ArtefactVerdict, ...]
    checks: tuple[Check, ...] = ()
    warnings: tuple[str, ...] = ()
    images: str = ""
    separation: Separation | None = None

    @property
    def passed(self) -> bool:
        """At least one file ran and passed, none failed, and every check passed."""
        states = [artefact.status for artefact in self.artefacts]
        return "passed" in states and "failed" not in states and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """``PASS``, ``PASS with warnings`` or ``FAIL``."""
        if not self.passed:
            return "FAIL"
        inside = any(artefact.parity is not None and artefact.parity.warnings for artefact in self.artefacts)
        return "PASS with warnings" if self.warnings or inside else "PASS"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": self.path,
            "passed": self.passed,
            "verdict": self.verdict,
            "artefacts": [artefact.to_dict() for artefact in self.artefacts],
            "checks": [vars(check).copy() for check in self.checks],
            "warnings": list(self.warnings),
            "images": self.images,
            "separation": None if self.separation is None else self.separation.to_dict(),
        }

    def text(self) -> str:
        """The verdict for a person, PASS or FAIL in the first line."""
        on = f" (compared on {self.images})" if self.images else ""
        lines = [f"{self.verdict} {self.path}{on}"]
        for check in self.checks:
            lines += ["", f"{check.name}: {'PASS' if check.passed else 'FAIL'}: {check.detail}"]
        for artefact in self.artefacts:
            lines += ["", artefact.text()]
        lines += ["", str(self.separation)] if self.separation is not None else []
        lines += ["", *(f"WARNING {warning}" for warning in self.warnings)] if self.warnings else []
        return "\n".join(lines)


_SHOWN = {"passed": "PASS", "failed": "FAIL", "not run": "NOT RUN HERE"}


@dataclass(frozen=True)
class _File:
    """One file of what is verified. ``format`` is None where this version does not know it."""

    path: Path
    format: formats.Format | None
    name: str
    precision: str


@dataclass(frozen=True, eq=False)
class _Opened:
    """A bundle or a lone file: its contract and its files."""

    manifest: Manifest
    golden: Golden
    files: list[_File]


@dataclass(frozen=True)
class _Judged:
    """What a judge found out about one file. ``reason`` is what failed besides the comparison."""

    parity: ParityReport
    reason: str = ""
    notes: tuple[str, ...] = ()
    explanation: Explanation | None = None


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    backbone: str | None = None,
    trust_backbone: bool = False,
    explain: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    say: Say | None = None,
) -> VerifyReport:
    """Does this bundle or file still compute what was trained?

    Without ``against``: the golden cases that it carries, for every file whose runtime is installed; PyTorch is not
    needed for ONNX. With ``against``: the full comparison with a checkpoint, including whether it holds exactly that
    checkpoint's online parameters. An ONNX file that byol-deploy did not write is compared with the PyTorch module
    that ``against`` names as ``module:callable``.

    Args:
        path: A bundle, or a lone file.
        against: A checkpoint or run directory; ``module:callable`` for a file from elsewhere.
        data: Real images for the comparison with ``against``.
        provider: Where the files run: ``cpu``, ``cuda``, ``auto``, or a runtime's own name of a provider.
        threads: Threads inside an operator; None takes what this process may use.
        backbone: For a checkpoint that does not say what its backbone is.
        trust_backbone: Import the recipe's own ``module:callable`` backbone.
        explain: A folder, made anew, for the drift along the graph of every file: a plot, and where a file leaves its
            budget the layer at fault alone, as a minimal case to reproduce. Needs ``against``.
        report: An HTML file to write, see :mod:`byol_deploy.report`. Needs ``against``.
        image_size: Side in pixels, for a file from elsewhere that leaves it open.
        mean: Mean of the channels, for a file from elsewhere that takes normalised images; None is ImageNet's.
        std: Their standard deviation.
        say: Called with a line of progress now and then.

    Returns:
        The verdict. A difference is no exception.

    Raises:
        BundleError: Absent, damaged, foreign, or from a newer schema.
        CheckpointError, DataError, UsageError: With ``against``.
        OutputError: ``explain`` or ``report`` cannot be written.
        ProviderError: No file could run on the provider.
    """
    say = say or (lambda line: None)
    given = {"--data": data, "--explain": explain, "--report": report}
    if against is None and any(value is not None for value in given.values()):
        names = " and ".join(name for name, value in given.items() if value is not None)
        raise UsageError(f"{names} needs --against: without it only the golden cases are compared")
    if _is_foreign(path):
        if against is None:
            raise BundleError(
                f"{printable(path)} is not a byol-deploy file: it carries no contract and no golden cases to test it "
                "with; compare it with the PyTorch module that it was made from: --against module:callable"
            )
        from byol_deploy.pipeline.foreign import verify_foreign

        if explain is not None or report is not None:
            raise UsageError("--explain and --report are for files of byol-deploy; leave them out")
        return verify_foreign(path, against=os.fspath(against), data=data, image_size=image_size, mean=mean, std=std,
                              provider=provider, threads=threads, say=say)  # fmt: skip
    stated = {"--image-size": image_size, "--mean": mean, "--std": std}
    if any(value is not None for value in stated.values()):
        names = " and ".join(name for name, value in stated.items() if value is not None)
        raise UsageError(f"{names} is for a file from elsewhere: {printable(path)} says itself how its images are made")
    opened = _open(path)
    options = formats.RunOptions(provider, threads)
    shown = printable(path)
    if against is not None:
        return _verify_against(
            shown, opened, against, data, options, backbone, trust_backbone,
            None if explain is None else Path(explain), None if report is None else Path(report), say,
        )  # fmt: skip

    def golden_cases(file: _File, format: formats.Format) -> _Judged:
        asked = as_tuned(options, opened.manifest, file.path)
        found = self_test_file(file.path, format, asked, opened.manifest, opened.golden)
        ran = f"ran on {found.provider} with {found.threads} thread(s); {found.detail}"
        notes = (ran, *(f"not as on the exporting machine: {difference}" for difference in found.differences))
        return _Judged(found.report, found.reason, notes)

    count = len(opened.golden.images) + len(opened.golden.files)
    return VerifyReport(shown, _each_file(opened, golden_cases), images=f"the {count} golden cases inside")


def _is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether this is a model file that byol-deploy did not write."""
    root = Path(path)
    format = formats.of_file(root) if root.is_file() else None
    return format is not None and CARRIED_MANIFEST_KEY not in format.carried(root)


def _open(path: str | os.PathLike[str]) -> _Opened:
    root = Path(path)
    if root.is_dir():
        bundle = Bundle.open(root)
        known = formats.available()
        return _Opened(bundle.manifest, bundle.golden, [
            _File(root / entry.file, formats.get(entry.format) if entry.format in known else None, entry.format,
                  entry.precision)
            for entry in bundle.manifest.artefacts
        ])  # fmt: skip
    format = formats.of_lone_file(root)
    missing = formats.missing_to_run(format)
    if missing:
        raise BundleError(f"{printable(root)} cannot be verified here: {missing} is not installed")
    texts = format.carried(root)
    manifest, golden = read_carried(texts, printable(root))
    sealed = read_artefact(texts, printable(root))
    return _Opened(manifest, golden, [_File(root, format, format.name, sealed.precision if sealed else "fp32")])


def _each_file(opened: _Opened, judge: Callable[[_File, formats.Format], _Judged]) -> tuple[ArtefactVerdict, ...]:
    verdicts: list[ArtefactVerdict] = []
    refusals: list[ProviderError] = []
    for file in opened.files:
        name, precision = file.path.name, file.precision
        missing = "" if file.format is None else formats.missing_to_run(file.format)
        if file.format is None or missing:
            why = f"{missing} is not installed" if missing else "this version does not know the format"
            verdicts.append(ArtefactVerdict(name, file.name, "not run", why, precision=precision))
            continue
        try:
            found = judge(file, file.format)
        except ProviderError as error:
            refusals.append(error)
            verdicts.append(ArtefactVerdict(name, file.name, "not run", str(error), precision=precision))
            continue
        passed = found.parity.passed and not found.reason
        verdicts.append(
            ArtefactVerdict(name, file.name, "passed" if passed else "failed", found.reason, found.parity, precision,
                            found.notes, found.explanation)
        )  # fmt: skip
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
    explain: Path | None,
    report: Path | None,
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
    evidence: dict[str, FileEvidence] = {}

    def full(file: _File, format: formats.Format) -> _Judged:
        say(f"comparing {file.path.name} with PyTorch")
        compared = compare_file(file.path, format, reference, options, precision=file.precision)
        found = compared.report
        proof = prove_branch(format.tensors(file.path), online, momentum, precision=file.precision)
        content, detail = check_content(file.path, format, file.precision)
        faults = [*proof.faults, *([detail] if content == "failed" else [])]
        notes = [str(proof), detail]
        drift = None
        if explain is not None:
            say(f"following the drift through {file.path.name}")
            images = telling_images(reference, found)
            drift, written = _explain(file, format, graph, images, options, explain, broken=not found.passed)
            notes += written
        if report is not None:
            broken = not found.passed
            drawn = drift or drift_of(file.path, format, graph, reference, file.precision, broken=broken)
            evidence[file.path.name] = file_evidence(reference, compared.crowd, drawn)
        return _Judged(found, "; ".join(faults), tuple(notes), drift)

    verdicts = _each_file(opened, full)
    result = VerifyReport(shown, verdicts, checks, reference.warnings, reference.described, reference.separation)
    if report is not None:
        words = ["byol-deploy", "verify", shown, "--against", printable(against)]
        words += ["--data", printable(data)] if data is not None else []
        words += ["--report", printable(report)]
        here = describe_host(provider=options.provider, threads=options.threads)
        show_verification(report, result, evidence, [*here.items()], shlex.join(words))
    return result


def _explain(
    file: _File,
    format: formats.Format,
    graph: EncoderGraph,
    images: np.ndarray,
    options: formats.RunOptions,
    out: Path,
    *,
    broken: bool,
) -> tuple[Explanation | None, list[str]]:
    """The drift along the graph, its plot, and the layer at fault alone; and in words what was written."""
    from byol_deploy.pipeline.explain.reproduction import write_reproduction
    from byol_deploy.pipeline.explain.view import write_drift_plot

    try:
        found = explain_file(file.path, format, graph, images, precision=file.precision, options=options)
    except Exception as error:
        # A broken file raises whatever its runtime calls that, and the comparison has said so; any other is our bug.
        if not (broken or isinstance(error, BundleError)):
            raise
        return None, [f"the drift cannot be followed: {first_line(error)}"]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{printable(out)} cannot be made: {error.strerror}; choose another folder") from error
    plot = out / f"{file.path.name}.svg"
    write_drift_plot(plot, found, force=True)
    written = [f"drift plotted in {printable(plot)}"]
    if found.culprit is not None:
        case = out / f"{file.path.name}-case"
        made = write_reproduction(case, file.path, format, graph, images, found, options=options, force=True)
        written.append(f"minimal case in {printable(case)} ({made.kind}); run reproduce.py there")
    return found, written


def telling_images(reference: Reference, report: ParityReport) -> np.ndarray:
    """A few images to follow the drift on: the one that failed worst first, then some real ones.

    Returns:
        (n, H, W, 3) uint8, at most 4.
    """
    failed = sorted((row for row in report.rows if not row.passed and row.image is not None),
                    key=lambda row: -row.severity)  # fmt: skip
    for row in failed:
        for images in (reference.awkward, reference.crowd, reference.real):
            if f", {images.name}, " in row.subject and row.image is not None:
                worst = images.images[row.image : row.image + 1]
                return np.concatenate([worst, reference.real.images[: EXPLAINED_IMAGES - 1]])
    return reference.real.images[:EXPLAINED_IMAGES]
