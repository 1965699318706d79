"""The self-test that travels: does this file, on this machine, still compute what was trained?

Needs no network and no data, and for ONNX no PyTorch: the golden cases are in the bundle and in every lone file. Three
questions are asked. Is it the file that was exported, byte for byte (its seal)? Does the graph give what the trained
model gave, for the same pixels? And from the bytes of image files on, does this machine's own decoder and preprocessing
lead there too?

**What may differ.** A float32 file keeps the limits in its manifest. A file of reduced precision is another function;
it is asked for the separation margin: how far a vector drifted, in distances between different golden images. An image
file must give the very pixels that it gave at export, and the limit of the graph holds; a JPEG may be decoded a level
or two apart by another decoder, and then it is judged by the margin as well.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from byol_deploy import formats
from byol_deploy.bundle import Bundle, Golden, Manifest, read_artefact, read_carried
from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, DataError, require_packages
from byol_deploy.formats import Format, RunOptions
from byol_deploy.golden import pixels_hash
from byol_deploy.host import describe_host, differences
from byol_deploy.images import printable
from byol_deploy.parity import (
    AnyLimit,
    Limit,
    ParityReport,
    as_rows,
    cannot_run,
    compare,
    compare_run,
    distance_apart,
    fidelity_limits,
    not_comparable,
    run_in_batches,
)
from byol_deploy.providers import short_name
from byol_deploy.runtime import Encoder

__all__ = ["SelfTest", "as_tuned", "check_content", "check_golden", "run_in_batches", "self_test", "self_test_file"]

_FULL_PRECISION = "fp32"
# Pillow's names of formats from which every decoder makes the same pixels.
_LOSSLESS = frozenset({"PNG", "BMP", "GIF", "PPM", "TGA", "PCX", "TIFF"})

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]
Content = Literal["passed", "failed", "absent"]


@dataclass(frozen=True)
class SelfTest:
    """The verdict of a file about itself.

    Attributes:
        file: Its name.
        report: Golden cases against what the file computes here.
        content: Whether the file is, byte for byte, the one that was exported: "passed", "failed", or "absent" for a
            file of an older version, which has no seal.
        detail: The same in a sentence, with the hash.
        differences: What can change numbers and is not as on the exporting machine; no fault by itself.
        precision: e.g. "fp32", "int8".
        provider: Where it ran, e.g. "cpu".
        threads: Threads inside an operator.
    """

    file: str
    report: ParityReport
    content: Content
    detail: str
    differences: tuple[str, ...]
    precision: str
    provider: str
    threads: int

    @property
    def passed(self) -> bool:
        """It is the exported file (or one without a seal), and every golden case passed."""
        return self.content != "failed" and self.report.passed

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know although it is no failure."""
        return self.report.warnings

    @property
    def reason(self) -> str:
        """Why it did not pass, with the likely reason; empty when it did."""
        said = [self.detail] if self.content == "failed" else []
        said += self.report.failures if not self.report.passed else []
        if said and self.differences and self.content != "failed":
            said.append(f"likely because this machine is not as the exporting one: {'; '.join(self.differences)}")
        return "; ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "file": self.file,
            "passed": self.passed,
            "reason": self.reason,
            "content": {"status": self.content, "detail": self.detail},
            "precision": self.precision,
            "provider": self.provider,
            "threads": self.threads,
            "differences": list(self.differences),
            "warnings": list(self.warnings),
            "parity": self.report.to_dict(),
        }

    def text(self) -> str:
        """The verdict for a person, PASS or FAIL in the first line."""
        verdict = "PASS" if self.passed else "FAIL"
        lines = [f"{verdict} {self.file}: {self.precision} on {self.provider}, {self.threads} thread(s)"]
        lines += [f"content: {self.detail}", self.report.table()]
        if self.differences:
            likely = not self.passed and self.content != "failed"
            lines.append(
                "not as on the exporting machine, the likely reason:" if likely else "not as on the exporting machine:"
            )
            lines += [f"  {difference}" for difference in self.differences]
        return "\n".join(line for line in lines if line)


def self_test(path: str | os.PathLike[str], *, provider: str = "cpu", threads: int | None = None) -> SelfTest:
    """Test a bundle or a lone file of byol-deploy with what it carries.

    Args:
        path: A lone file; or a bundle, of which the file is tested that :class:`byol_deploy.Encoder` opens, as it was
            tuned, or where there is none the first one whose runtime is installed.
        provider: Where it runs: "cpu", "cuda", "auto", or a runtime's own name of a provider.
        threads: Threads inside an operator; None takes what this process may use.

    Returns:
        The verdict. A difference is no exception.

    Raises:
        BundleError: Absent, damaged or foreign.
        MissingExtraError: The runtime of its format is not installed.
        ProviderError: The provider does not work here.
    """
    root, shown = Path(path), printable(path)
    options = RunOptions(provider, threads)
    if root.is_dir():
        bundle = Bundle.open(root)
        file, format = _choose(bundle)
        return self_test_file(file, format, as_tuned(options, bundle.manifest, file), bundle.manifest, bundle.golden)
    found = formats.of_lone_file(root)
    require_packages(f"the self-test of {shown}", found.extra, *found.runs_with)
    manifest, golden = read_carried(found.carried(root), shown)
    return self_test_file(root, found, options, manifest, golden)


def as_tuned(options: RunOptions, manifest: Manifest, file: Path) -> RunOptions:
    """How :class:`byol_deploy.Encoder` runs a file of a bundle: as it was tuned, where it was and nothing else is said.

    Args:
        options: What is said.
        manifest: The bundle's.
        file: One of its files.
    """
    tuned = manifest.tuned
    if tuned is None or tuned.file != file.name:
        return options
    threads = min(tuned.threads, usable_cores()) if options.threads is None else options.threads
    return replace(options, threads=threads, batches=tuned.batches, streams=tuned.streams)


def self_test_file(path: Path, format: Format, options: RunOptions, manifest: Manifest, golden: Golden) -> SelfTest:
    """Test one written file.

    Args:
        path: The file.
        format: Its format, whose runtime is installed.
        options: Where and how it runs.
        manifest: The bundle's, or the file's own.
        golden: The bundle's cases, or the file's own.

    Returns:
        The verdict. What the runtime raises on the golden cases is a failed row.

    Raises:
        BundleError: It cannot be opened: damaged, its seal or a carried text has changed, or it contradicts its
            manifest.
        ProviderError: The provider does not work here.
    """
    shown = printable(path.name)
    artefact = read_artefact(format.carried(path), shown)
    entry = next((item for item in manifest.artefacts if item.file == path.name), None)
    precision = entry.precision if entry else artefact.precision if artefact else _FULL_PRECISION
    content, detail = check_content(path, format, precision)
    if format.opens_in_encoder and options.optimization is None:
        encoder = Encoder(path, provider=options.provider, threads=options.threads, outputs="all",
                          batches=options.batches, streams=options.streams)  # fmt: skip
        run: Run = encoder.run
        provider = short_name(encoder.provider)
    else:
        run, provider = format.load(path, options), options.provider
    threads = options.threads or usable_cores()
    runtime = format.runs_with[0]
    here = describe_host(
        provider=provider, threads=threads, optimization=options.optimization or "all", runtime=runtime
    )
    there = dict(artefact.host) if artefact else _older_host(entry.host if entry else {}, runtime)
    decoders = f"exported with {there['jpeg']}, here {here['jpeg']}" if there.get("jpeg") else f"here {here['jpeg']}"
    report = check_golden(run, manifest, golden, subject=shown, precision=precision, decoders=decoders)
    return SelfTest(shown, report, content, detail, differences(there, here), precision, provider, threads)


def check_content(path: Path, format: Format, precision: str) -> tuple[Content, str]:
    """Is a file, byte for byte, the one that was exported?

    Args:
        path: The file.
        format: Its format.
        precision: What it is taken for.

    Returns:
        "passed", "failed", or "absent" for a file of an older version, which has no seal; and a sentence.

    Raises:
        BundleError: Its seal is damaged or gone, or a text in it has changed.
    """
    artefact = read_artefact(format.carried(path), printable(path.name))
    if artefact is None:
        return "absent", "not checked: an older version wrote the file, without a seal"
    faults = []
    if artefact.format != format.name:
        faults.append(f"it was sealed as {artefact.format} and is {format.name}")
    if artefact.precision != precision:
        faults.append(f"it was sealed as {artefact.precision}, the manifest says {precision}")
    found = format.content_hash(path)
    if found != artefact.content:
        faults.append(f"its content has the hash {found[:19]}…, it was exported with {artefact.content[:19]}…")
    if faults:
        return "failed", f"it is not the file that was exported: {'; '.join(faults)}; copy or export it again"
    return "passed", f"the file that was exported, {found}"


def check_golden(
    run: Run,
    manifest: Manifest,
    golden: Golden,
    *,
    subject: str,
    precision: str = _FULL_PRECISION,
    decoders: str = "",
) -> ParityReport:
    """Compare what ``run`` gives for the golden cases with what was trained.

    Args:
        run: (N, H, W, 3) uint8 to output name → (N, D) float32.
        manifest: Says which outputs there are and what they may differ by.
        golden: The cases.
        subject: What is tested, for the report.
        precision: What the file promises: "fp32" is held to the limits in the manifest, everything else to the
            separation margin.
        decoders: Which image decoders there were and are, for the warning about pixels that differ.

    Returns:
        Rows for all images in one batch, for each image on its own, and for the image files, each from its bytes on.

    Raises:
        BundleError: The manifest's limits are no limits.
    """
    known = _limits(manifest, golden)
    limits: Mapping[str, AnyLimit] = known
    if precision != _FULL_PRECISION:
        # Eight images are far too few for a share of neighbours, and for a percentile.
        limits = fidelity_limits(known, photographs=False, agreement=False)
    expected = {output.name: golden.outputs[output.name] for output in manifest.outputs}
    images = golden.images
    here: dict[str, np.ndarray] = {}

    def kept(batch: np.ndarray) -> Mapping[str, np.ndarray]:
        outputs = run(batch)
        if len(batch) == len(images):
            here.update(outputs)
        return outputs

    reports = [
        compare_run(kept, images, size, expected, limits, f"{subject}, golden cases, batch {size}")
        for size in dict.fromkeys((len(images), 1))
    ]
    if golden.files:
        reports.append(_check_files(run, manifest, golden, limits, known, here, f"{subject}, golden files", decoders))
    return ParityReport.merged(reports)


def _choose(bundle: Bundle) -> tuple[Path, Format]:
    """The file of a bundle that is tested: what Encoder opens comes first, so what was tuned, then full precision."""
    known = formats.available()
    found = [(entry, formats.get(entry.format)) for entry in bundle.manifest.artefacts if entry.format in known]
    if not found:
        there = ", ".join(f"{entry.file} ({entry.format})" for entry in bundle.manifest.artefacts)
        raise BundleError(f"{printable(bundle.path)} holds only formats that this version does not know: {there}")
    found.sort(
        key=lambda item: (
            bundle.manifest.tuned is None or item[0].file != bundle.manifest.tuned.file,
            bool(formats.missing_to_run(item[1]) or item[1].runs_here()),
            not item[1].opens_in_encoder,
            item[0].precision != _FULL_PRECISION,
        )
    )
    entry, format = found[0]
    require_packages(f"the self-test of {entry.file}", format.extra, *format.runs_with)
    return bundle.path / entry.file, format


def _older_host(host: Mapping[str, Any], runtime: str) -> dict[str, str]:
    """What the manifest of an older version notes about the exporting machine, under today's keys."""
    found = {key: str(host[key]) for key in ("machine", "system", "pillow") if key in host}
    return found | ({"runtime": f"{runtime} {host[runtime]}"} if runtime in host else {})


def _limits(manifest: Manifest, golden: Golden) -> dict[str, Limit]:
    """The manifest's limits, each with a distance between different images: its own, or that of the golden images."""
    try:
        limits = {name: Limit.from_dict(limit) for name, limit in manifest.limits.items()}
    except ValueError as fault:
        raise BundleError(f"the limits in the manifest are not usable: {fault}; export it again") from fault
    return {
        name: limit if limit.apart is not None else replace(limit, apart=distance_apart(as_rows(golden.outputs[name])))
        for name, limit in limits.items()
        if name in golden.outputs
    }


def _check_files(
    run: Run,
    manifest: Manifest,
    golden: Golden,
    limits: Mapping[str, AnyLimit],
    known: Mapping[str, Limit],
    here: Mapping[str, np.ndarray],
    subject: str,
    decoders: str,
) -> ParityReport:
    """From the bytes of image files on, through this machine's own preprocessing.

    ``here`` is what the file gave for the golden images: the margin of files is measured among these.
    """
    expected = {output.name: golden.file_outputs[output.name] for output in manifest.outputs}
    pixels: dict[int, np.ndarray] = {}
    same, moved, broken = [], [], {}
    names = list(golden.files)
    for place, (name, content) in enumerate(golden.files.items()):
        try:
            pixels[place] = manifest.preprocessing(content)
        except DataError as error:
            broken[place] = f"{name}: {error}"
            continue
        if pixels_hash(pixels[place]) == golden.pixels_sha256[name]:
            same.append(place)
        elif _is_lossless(content):
            broken[place] = f"{name} gives other pixels than at export"
        else:
            moved.append(place)
    reports = []
    if broken:
        reason = f"preprocessing differs here: {'; '.join(broken.values())}"
        part = {name: values[list(broken)] for name, values in expected.items()}
        reports.append(not_comparable(part, reason, subject=f"{subject}, other pixels", limits=limits))
    # The limits of single images belong to the golden images.
    exact = {name: replace(limit, each=()) if isinstance(limit, Limit) else limit for name, limit in limits.items()}
    lenient = fidelity_limits(known, photographs=False, agreement=False)
    decoded = [*same, *moved]
    if decoded:
        try:
            actual = run_in_batches(run, np.stack([pixels[place] for place in decoded]), len(decoded))
        except Exception as error:
            # Whatever a runtime calls its trouble with this batch.
            return ParityReport.merged([*reports, cannot_run(expected, limits, subject, error)])
        for places, what in ((same, "same pixels"), (moved, "pixels of another decoder")):
            if not places:
                continue
            rows = [decoded.index(place) for place in places]
            wanted = {name: values[places] for name, values in expected.items()}
            # Another number of vectors than images stays as it is: the comparison names it.
            given = {name: values[rows] if len(values) == len(decoded) else values for name, values in actual.items()}
            allowed = lenient if places is moved else exact
            # One picture in several orientations and encodings: these are not all different images, and the margin is
            # measured from the centres of the golden ones.
            reports.append(compare(wanted, given, limits=allowed, subject=f"{subject}, {what}", different_images=False,
                                   among=(golden.outputs, here)))  # fmt: skip
    if moved:
        listed = ", ".join(names[place] for place in moved)
        told = f" ({decoders})" if decoders else ""
        warning = f"another image decoder{told} gives other pixels for {listed}: judged by the separation margin"
        reports.append(ParityReport((), (warning,)))
    return ParityReport.merged(reports)


def _is_lossless(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return image.format in _LOSSLESS and image.info.get("compression") != "jpeg"
