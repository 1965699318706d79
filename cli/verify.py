"""`byol-deploy verify`: does this bundle or file still compute what was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BackboneOption, TrustBackboneOption, three_numbers
from .output import JsonOption, emit, talk


def verify(
    path: Annotated[Path, typer.Argument(help="A bundle, or a lone file; with module:callable any ONNX file.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint or run directory: the full comparison. Needs PyTorch. For an ONNX file from elsewhere "
            "module:callable, which gives the PyTorch module that it was made from."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of real images for the comparison with --against.")] = None,
    provider: Annotated[
        str, typer.Option(help="Where the files run: cpu, cuda, auto, or a runtime's own name.")
    ] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; what this process may use when left out.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="With --against: the drift along the graph, layer by layer.")
    ] = False,
    explain_to: Annotated[
        Path | None,
        typer.Option(help="Folder for the plot and the minimal case of --explain; 'NAME-explained' when left out."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="With --against: an HTML page of all this.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels, for a file from elsewhere that leaves it open.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Channel means for a file from elsewhere, with commas; ImageNet's when left out.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Channel deviations for a file from elsewhere, with commas.")] = None,
    backbone: BackboneOption = None,
    trust_backbone: TrustBackboneOption = False,
    json: JsonOption = False,
) -> None:
    """Check a bundle or a file: PASS or FAIL with numbers. The exit code is 0 or 5.

    Alone it runs the golden cases that travel in the bundle and in each file, without PyTorch for ONNX. With
    --against it makes the full comparison with a checkpoint, including the hash of its online parameters, or of an
    ONNX file from elsewhere with any PyTorch module.
    """
    from byol_deploy.errors import ParityError
    from byol_deploy.pipeline import verify as run_verify

    folder = explain_to or (Path(f"{path.name}-explained") if explain else None)
    found = run_verify(
        path,
        against=against,
        data=data,
        provider=provider,
        threads=threads,
        backbone=backbone,
        trust_backbone=trust_backbone,
        explain=folder,
        report=report,
        image_size=image_size,
        mean=three_numbers("--mean", mean),
        std=three_numbers("--std", std),
        say=talk,
    )
    emit(found.to_dict(), found.text(), as_json=json)
    for place in filter(None, (folder, report)):
        talk(f"written {place}")
    if not found.passed:
        raise typer.Exit(ParityError.exit_code)
