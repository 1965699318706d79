"""`byol-deploy evaluate`: what an encoder's embeddings are worth on a labelled folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import BackboneOption, TrustBackboneOption
from .output import JsonOption, emit, table, talk


def evaluate(
    model: Annotated[Path, typer.Argument(help="A bundle, an .onnx file of byol-deploy, a checkpoint or a run.")],
    labelled_folder: Annotated[Path, typer.Argument(help="One sub-folder per class, or train/ and test/ of those.")],
    test_share: Annotated[float, typer.Option(help="Share held out where the folder brings no split.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of that split.")] = 0,
    provider: Annotated[str, typer.Option(help="cpu, cuda, auto, or ONNX Runtime's own name.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads; default: the cores this process may use.")] = None,
    image_size: Annotated[int | None, typer.Option(help="For a checkpoint that does not say its own, in px.")] = None,
    backbone: BackboneOption = None,
    trust_backbone: TrustBackboneOption = False,
    max_bad_share: Annotated[float, typer.Option(help="Share of unreadable images that is tolerated.")] = 0.05,
    json: JsonOption = False,
) -> None:
    """Score an encoder with kNN and a linear probe, beside raw pixels on the same split.

    The scores are accuracies and balanced accuracies with one standard error.
    """
    from ..evaluation import describe
    from ..evaluation import evaluate as run
    from ..pipeline import open_embedder

    embed = open_embedder(
        model,
        provider=provider,
        threads=threads,
        image_size=image_size,
        backbone=backbone,
        trust_backbone=trust_backbone,
    )
    found = run(embed, labelled_folder, test_share=test_share, seed=seed, max_bad_share=max_bad_share)
    for path, reason in found.bad:
        talk(f"skipped {path}: {reason}")
    columns = ("representation", "kNN accuracy", "kNN balanced", "probe accuracy", "probe balanced")
    title = f"{found.train} training and {found.test} test images, {len(found.classes)} classes; split: {found.split}"
    verdicts = found.verdicts()
    words = (
        f"kNN is {verdicts['knn']} the raw pixels, the linear probe {verdicts['probe']} them "
        "(balanced accuracy, two standard errors)."
    )
    emit(
        found.to_dict() | {"model": str(model), "data": str(labelled_folder)},
        f"{title}\n{table('', columns, describe(found))}\n{words}",
        as_json=json,
    )
