"""`byol-deploy verify`: does this bundle or file still compute what was trained?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BackboneOption, TrustBackboneOption
from .output import JsonOption, emit, talk


def verify(
    path: Annotated[Path, typer.Argument(help="A bundle, or a lone file that byol-deploy wrote.")],
    against: Annotated[
        Path | None, typer.Option(help="A checkpoint or run directory: the full comparison. Needs PyTorch.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of real images for the comparison with --against.")] = None,
    provider: Annotated[
        str, typer.Option(help="Where the files run: cpu, cuda, auto, or a runtime's own name.")
    ] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; what this process may use when left out.")
    ] = None,
    backbone: BackboneOption = None,
    trust_backbone: TrustBackboneOption = False,
    json: JsonOption = False,
) -> None:
    """Check a bundle or a file: PASS or FAIL with numbers. The exit code is 0 or 5.

    Alone it runs the golden cases that travel in the bundle and in each file, without PyTorch for ONNX. With
    --against it makes the full comparison with a checkpoint, including the hash of its online parameters.
    """
    from byol_deploy.errors import ParityError
    from byol_deploy.pipeline import verify as run_verify

    report = run_verify(
        path,
        against=against,
        data=data,
        provider=provider,
        threads=threads,
        backbone=backbone,
        trust_backbone=trust_backbone,
        say=talk,
    )
    emit(report.to_dict(), report.text(), as_json=json)
    if not report.passed:
        raise typer.Exit(ParityError.exit_code)
