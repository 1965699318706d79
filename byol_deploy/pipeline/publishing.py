"""Export: every file is written, closed, loaded again and compared, and only then published."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from byol_deploy import __version__
from byol_deploy import formats as known_formats
from byol_deploy.bundle import (
    GOLDEN_FILE,
    Artefact,
    Bundle,
    GoldenFile,
    InputContract,
    Manifest,
    ModelInfo,
    Output,
    carry,
    golden_to_bytes,
    publish,
)
from byol_deploy.errors import ExportError, OutputError, ParityError, UsageError
from byol_deploy.formats import Format, Signature
from byol_deploy.images import printable
from byol_deploy.parity import Limit
from byol_deploy.pipeline.proof import few
from byol_deploy.pipeline.reducing import check_precisions, gather, precisions_of
from byol_deploy.pipeline.reference import Reference, build_reference, choose_golden
from byol_deploy.pipeline.tuning import LEAST_BUDGET_S, candidates, tune
from byol_deploy.pipeline.writing import Writer
from byol_deploy.preprocess import Preprocessing
from byol_deploy.quantization import Goal, resolve_target
from byol_deploy.report import write_bundle_report
from byol_deploy.runtime import usable_cores

if TYPE_CHECKING:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.training.checkpoints import LoadedCheckpoint

_PACKAGES = ("torch", "torchvision", "timm", "lightning", "onnx", "onnxscript", "numpy", "pillow")

Say = Callable[[str], None]


def export(
    checkpoint: str | os.PathLike[str],
    *,
    formats: Sequence[str] = ("onnx",),
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    outputs: Sequence[str] | None = None,
    image_size: int | None = None,
    opset: int | None = None,
    backbone: str | None = None,
    trust_backbone: bool = False,
    keep_failed: str | os.PathLike[str] | None = None,
    precisions: Sequence[str] = (),
    calibration: str | os.PathLike[str] | None = None,
    target: str = "this",
    agreement: float = Goal.agreement,
    tune_s: float | None = None,
    say: Say | None = None,
) -> Bundle:
    """Export the online branch of a checkpoint, prove every written file, and publish them as one bundle.

    Args:
        checkpoint: A checkpoint, or a run directory.
        formats: Names of formats, see :func:`byol_deploy.formats.available`.
        out: The bundle folder; None is ``bundle`` in the run directory, or a folder beside the checkpoint. An existing
            bundle there is replaced when everything passed; any other folder is refused.
        data: Real images for the comparison and the golden cases; None takes photographs that ship with byol-deploy.
        outputs: Some of ``embedding``, ``projection``, ``prediction``; None is all.
        image_size: Side in pixels, for a checkpoint that does not carry its preprocessing.
        opset: ONNX operator set; None is the format's choice.
        backbone: For a checkpoint that does not say what its backbone is.
        trust_backbone: Import the recipe's own ``module:callable`` backbone.
        keep_failed: Where files that failed are kept, with their report, for a look; must not exist.
        precisions: "fp16", "bf16", "int8", beside float32, which always comes along; a format that lacks one is
            written without it.
        calibration: A folder of images for the ranges of activations; None takes those that the training kept, and
            where there are none ``data``.
        target: Processor that int8 files are for: "x86-vnni", "x86", "arm64", or "this" one.
        agreement: Share of images that must keep their nearest neighbour in a file of reduced precision.
        tune_s: Seconds to measure in which file and number of threads is fastest here, see
            :mod:`byol_deploy.pipeline.tuning`; with no formats or precisions named, all that are installed take part,
            and one that does not reach the goal is left out. None does not tune.
        say: Called with a line of progress now and then.

    Returns:
        The published bundle.

    Raises:
        ParityError: A file differs from the trained model, or holds other parameters. Nothing was published.
        ExportError: An exporter could not write its file. Nothing was published.
        CheckpointError, DataError, OutputError, UsageError, MissingExtraError: See :mod:`byol_deploy.errors`.
    """
    say = say or (lambda line: None)
    tuning = tune_s is not None
    if tune_s is not None and tune_s < LEAST_BUDGET_S:
        raise UsageError(f"a time budget of {tune_s:g} s is too small to decide; give {LEAST_BUDGET_S:g} s or more")
    if tuning and not formats:
        formats = candidates()
    chosen = _chosen_formats(formats)
    if tuning and not precisions:
        precisions = tuple(dict.fromkeys(name for format in chosen for name in format.precisions if name != "fp16"))
    check_precisions(chosen, precisions)
    goal = Goal(agreement)
    if precisions:
        resolve_target(target)  # before anything is computed
    if keep_failed is not None and Path(keep_failed).exists():
        raise OutputError(f"{printable(keep_failed)} exists already; choose another folder for --keep-failed")

    from byol_deploy.graph import OUTPUTS, EncoderGraph, choose_outputs
    from byol_deploy.training.checkpoints import load_checkpoint

    names = choose_outputs(OUTPUTS if outputs is None else outputs)
    loaded = load_checkpoint(checkpoint, backbone=backbone, trust_backbone=trust_backbone)
    preprocessing = checkpoint_preprocessing(loaded, image_size)
    place = Path(out) if out is not None else _default_out(loaded.path)
    graph = EncoderGraph(loaded.model, preprocessing, names)
    label = _backbone_name(loaded)
    say(f"online branch of {printable(loaded.path)}: {label}, {graph.parameter_count():,} parameters, "
        f"{graph.parameter_hash()}")  # fmt: skip
    say(f"stripped: {len(loaded.momentum_keys)} tensors of the momentum branch")

    with publish(place) as folder:
        say("computing the reference in float32 and float64")
        reference = build_reference(loaded, graph, preprocessing, data)
        say(f"comparing on {reference.described}{'' if data else ' (name your own with --data)'}")
        golden, limits = choose_golden(reference)
        manifest = describe_export(loaded, graph, preprocessing, reference, limits, label)
        carried = carry(manifest, golden, sealed=True)
        signature = _signature(graph, opset)
        noted = {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": usable_cores(),
            "images": reference.described,
            **_versions(),
        }
        writer = Writer(folder, graph, loaded, reference, signature, carried, noted, say)
        material = None
        if any(precisions_of(format, precisions) for format in chosen):
            material = gather(
                graph,
                preprocessing,
                reference,
                run=_run_of(loaded.path),
                images=calibration,
                data=data,
                target=target,
                goal=goal,
            )
            say(f"calibrating for {material.calibration.target} on {len(material.calibration.images)} of "
                f"{material.described}")  # fmt: skip

        for format in chosen:
            # Tuning chooses among what passes; only the float32 file of the first format must be there.
            optional = tuning and format is not chosen[0]
            try:
                full = writer.full(format, optional=optional)
                for precision in precisions_of(format, precisions) if full else ():
                    assert full is not None and material is not None  # noqa: PT018
                    writer.reduced(format, full, precision, material, optional=tuning)
            except ExportError as error:
                raise ExportError(f"{label} cannot be exported to {format.name}: {error}") from error
        if writer.failures:
            kept = ""
            if keep_failed is not None:
                _keep(folder, Path(keep_failed), writer.artefacts)
                kept = f" The files are in {printable(keep_failed)}."
            raise ParityError(
                f"nothing was published: what was written differs from the trained model, or is not what was asked "
                f"for. {few(writer.failures, 6)}.{kept}"
            )
        packed = golden_to_bytes(golden)
        (folder / GOLDEN_FILE).write_bytes(packed)
        entry = GoldenFile(GOLDEN_FILE, hashlib.sha256(packed).hexdigest(), len(golden.images))
        tuned = None
        if tune_s is not None:
            tuned = tune(folder, writer.artefacts, reference.real.images, graph.outputs[0], budget_s=tune_s, say=say)
        replace(manifest, golden=entry, artefacts=tuple(writer.artefacts), tuned=tuned).save(folder)
        write_bundle_report(folder, writer.evidence)
    say(f"published {printable(place)}")
    return Bundle.open(place)


def _chosen_formats(names: Sequence[str]) -> list[Format]:
    if not names:
        raise UsageError(f"no format is given; choose from {', '.join(known_formats.available())}")
    chosen = [known_formats.get(name) for name in dict.fromkeys(names)]
    for format in chosen:
        known_formats.require(format)
    return chosen


def _signature(graph: EncoderGraph, opset: int | None) -> Signature:
    return Signature(size_px=graph.size_px, outputs=graph.outputs, opset=opset)


def checkpoint_preprocessing(loaded: LoadedCheckpoint, image_size: int | None) -> Preprocessing:
    """What a checkpoint says about its input, or ``image_size`` with ImageNet statistics where it says nothing."""
    own = loaded.preprocessing
    if own is None:
        if image_size is None:
            raise UsageError(
                f"{printable(loaded.path)} does not say how its images were prepared; give --image-size, the side in "
                "pixels of the images that it was trained on"
            )
        try:
            return Preprocessing(size_px=image_size)
        except ValueError as error:
            raise UsageError(f"--image-size: {error}") from None
    if image_size is not None and image_size != own.size_px:
        raise UsageError(
            f"--image-size is {image_size}, but the checkpoint was trained for {own.size_px} px; leave the option out"
        )
    return own


def _default_out(checkpoint: Path) -> Path:
    run = checkpoint.parent.parent
    if checkpoint.parent.name == "checkpoints" and (run / "recipe.yaml").is_file():
        return run / "bundle"
    return checkpoint.with_name(f"{checkpoint.stem}-bundle")


def _backbone_name(loaded: LoadedCheckpoint) -> str:
    return loaded.recipe.model.backbone if loaded.recipe else type(loaded.model.backbone).__name__


def describe_export(
    loaded: LoadedCheckpoint,
    graph: EncoderGraph,
    preprocessing: Preprocessing,
    reference: Reference,
    limits: Mapping[str, Limit],
    label: str,
) -> Manifest:
    """The manifest of an export, still without artefacts and golden cases; ``limits`` are those of the golden cases."""
    widths = {name: values.shape[1] for name, values in reference.real.expected.items()}
    recipe = loaded.recipe
    return Manifest(
        model=ModelInfo(
            backbone=label,
            backbone_args=dict(recipe.model.backbone_args) if recipe else {},
            width=loaded.model.width,
            parameters=graph.parameter_count(),
            parameter_hash=graph.parameter_hash(),
            checkpoint_sha256=loaded.sha256,
            global_step=loaded.global_step,
            epoch=loaded.epoch,
            stripped_keys=loaded.momentum_keys,
        ),
        input=InputContract(preprocessing),
        outputs=tuple(Output(name, widths[name]) for name in graph.outputs),
        limits={name: limit.to_dict() for name, limit in limits.items()},
        recipe=recipe.to_dict() if recipe else None,
        written_by=_versions(),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def _versions() -> dict[str, str]:
    found = {"byol-deploy": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import onnxruntime

    return {**found, "onnxruntime": onnxruntime.__version__}


def _keep(folder: Path, target: Path, artefacts: Iterable[Artefact]) -> None:
    report = {artefact.file: {"parity": artefact.parity, "host": artefact.host} for artefact in artefacts}
    try:
        shutil.copytree(folder, target)
        (target / "failed.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--keep-failed {printable(target)} cannot be written: {error}; choose another") from error
