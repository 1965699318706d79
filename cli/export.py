"""`byol-deploy export`: a checkpoint becomes a bundle of verified model files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BackboneOption, TrustBackboneOption
from .output import JsonOption, emit, table, talk


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory of byol-deploy train.")],
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="A format to write; repeat it for more. onnx when left out.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The bundle folder. Left out: 'bundle' in the run, or a folder beside the checkpoint."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of real images for the comparison; a few travel in the bundle.")
    ] = None,
    outputs: Annotated[
        str | None, typer.Option(help="Some of embedding,projection,prediction, with commas. All when left out.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels, for a checkpoint that does not carry its preprocessing.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 18 or newer.")] = None,
    backbone: BackboneOption = None,
    trust_backbone: TrustBackboneOption = False,
    precisions: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="fp16, bf16 or int8, beside fp32, which always comes along; repeat it for more.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Images to calibrate int8 with. Left out: those that the training kept, or --data."),
    ] = None,
    target: Annotated[str, typer.Option(help="Processor that int8 is for: this, x86-vnni, x86 or arm64.")] = "this",
    agreement: Annotated[
        float,
        typer.Option(help="Share of images that must keep their nearest neighbour at reduced precision."),
    ] = 0.98,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Measure here, and let the encoder use the fastest file that passes."),
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds for the measurement of --tune.")] = 60.0,
    keep_failed: Annotated[
        Path | None, typer.Option(help="Where to keep files that failed the comparison, for a look.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Export the online branch, prove every file against the trained model, and publish them as one bundle.

    The momentum branch is stripped, preprocessing goes into the graph, and each file is loaded again and compared
    with PyTorch on real and on awkward images at batch 1, 2 and 7. Files of reduced precision must keep the nearest
    neighbours; layers that cost too much go back to float. When one fails nothing is published, an older bundle stays,
    and the exit code is 5.
    """
    from byol_deploy.pipeline import export as run_export

    bundle = run_export(
        checkpoint,
        formats=formats or (() if tune else ("onnx",)),
        out=out,
        data=data,
        outputs=None if outputs is None else [name.strip() for name in outputs.split(",") if name.strip()],
        image_size=image_size,
        opset=opset,
        backbone=backbone,
        trust_backbone=trust_backbone,
        keep_failed=keep_failed,
        precisions=precisions or (),
        calibration=calibration,
        target=target,
        agreement=agreement,
        tune_s=budget if tune else None,
        say=talk,
    )
    manifest = bundle.manifest
    rows = [
        (
            item.file,
            item.format,
            item.precision,
            f"{item.bytes + sum(extra.bytes for extra in item.extra_files):,}",
            "not run here" if "not_run" in item.parity else "PASS" if item.parity["passed"] else "FAIL",
        )
        for item in manifest.artefacts
    ]
    warnings = dict.fromkeys(text for item in manifest.artefacts for text in item.parity["warnings"])
    lines = [
        table("", ("file", "format", "precision", "bytes", "parity"), rows),
        f"stripped {len(manifest.model.stripped_keys)} keys of the momentum branch; "
        f"online parameters {manifest.model.parameter_hash}",
        *(f"WARNING {warning}" for warning in warnings),
        *([f"tuned for this machine: {manifest.tuned.evidence['chosen']}"] if manifest.tuned else []),
        f"published {bundle.path}",
    ]
    emit({"path": str(bundle.path), "passed": True, **manifest.to_dict()}, "\n".join(lines), as_json=json)
