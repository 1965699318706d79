"""`byol-deploy bench`: how fast is each file, what does it need, and does it still compute what was trained?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import BackboneOption, TrustBackboneOption
from .output import JsonOption, emit, talk


def bench(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Bundles, and files that byol-deploy export wrote.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint or run directory: the truth for the fidelity columns, and PyTorch eager, torch.compile "
            "and TorchScript as further rows. Needs PyTorch."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of real images to measure and compare on.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images at once; repeat it for more. 1 and 8 when left out.")
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Threads; repeat it for more. 1 and all that this process may use when left out."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Least number of rounds; 12 when left out.")] = None,
    starts: Annotated[int | None, typer.Option(help="Fresh processes for each cold start; 3 when left out.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds for the interleaved run; 60 when left out. Cold starts and comparisons come first."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Latency against fidelity as a picture, .svg or .png.")] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML page of all this.")] = None,
    backbone: BackboneOption = None,
    trust_backbone: TrustBackboneOption = False,
    json: JsonOption = False,
) -> None:
    """Measure files side by side: cold start, latency, throughput, memory, size, and fidelity in the same row.

    Each file is opened in a process of its own, and one works at a time, in rounds whose order is drawn anew. One file
    is opened twice and measured as two: that A/A control says how far the numbers can be trusted. A row that fails its
    comparison is red whatever its speed, and the exit code is then 5.
    """
    from ..bench import ROUNDS
    from ..errors import ParityError
    from ..pipeline.benching import BATCHES, BUDGET_S, STARTS
    from ..pipeline.benching import bench as run_bench

    found = run_bench(
        paths or [],
        against=against,
        data=data,
        batches=batch or BATCHES,
        threads=threads or None,
        rounds=ROUNDS if repeats is None else repeats,
        starts=STARTS if starts is None else starts,
        budget_s=BUDGET_S if budget is None else budget,
        plot=plot,
        report=report,
        backbone=backbone,
        trust_backbone=trust_backbone,
        say=talk,
    )
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    emit(found.to_dict(), found.text(colour=colour), as_json=json)
    for place in filter(None, (plot, report)):
        talk(f"written {place}")
    if any(row.status == "failed" for row in found.rows):
        raise typer.Exit(ParityError.exit_code)
