"""`byol-deploy demo`: the whole chain on images that come with the package, or on one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOption, emit, table


def demo(
    data: Annotated[
        Path | None, typer.Option(help="A folder of your own images; default: the Fashion-MNIST that ships with it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo-out"),
    recipe: Annotated[str | None, typer.Option(help="A recipe file or name instead of the demo's.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training instead of the recipe's.")] = None,
    json: JsonOption = False,
) -> None:
    """Train, export, prove, embed and evaluate an encoder in one go, and write report.html.

    Run it again with the same --out and it continues where it stopped.
    """
    from ..demo import run_demo
    from ..errors import ParityError
    from ..recipe import Recipe

    result = run_demo(data, out=out, recipe=Recipe.load(recipe) if recipe else None, epochs=epochs)
    columns = ("", "kNN (k=20)", "linear probe", "agreement", "latency", "vs PyTorch")
    words = (
        f"{'PASS' if result.passed else 'FAIL'}: the written files "
        f"{'compute' if result.passed else 'do not compute'} what was trained. "
        f"{result.train} images trained on without labels, {result.test} held out, "
        f"{sum(result.seconds.values()):.0f} s in all.\n"
        f"{result.worth()}\n"
        f"report      {result.report}\nbundle      {result.bundle}\nembeddings  {result.embeddings}"
    )
    emit(result.to_dict(), f"{table('', columns, result.table())}\n{words}", as_json=json)
    if not result.passed:
        raise typer.Exit(ParityError.exit_code)
