"""`byol-deploy train`: images in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import JsonOption, emit


def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of images, walked recursively.")],
    backbone: Annotated[
        str | None, typer.Option(help="timm or torchvision name, or module:callable. [default: resnet18]")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="A YAML file, or a name: default, paper. [default: default]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a batch of one device.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the views, in pixels.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory. [default: runs/<folder>-<time>]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same CPU: same numbers.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change any key of the recipe; may be repeated."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, 32 or bf16.")] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu, cuda, ... as Lightning takes it.")] = "auto",
    devices: Annotated[str, typer.Option(help='auto, a number, or a list such as "0,2".')] = "auto",
    num_nodes: Annotated[int, typer.Option(help="Machines that train together.")] = 1,
    strategy: Annotated[str, typer.Option(help="auto, ddp, ... as Lightning takes it.")] = "auto",
    workers: Annotated[str | None, typer.Option(help="Loader processes: a number or auto.")] = None,
    max_bad_share: Annotated[
        float | None, typer.Option(help="Fail when more than this share of the files is bad. [default: 0.05]")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train a BYOL encoder on a folder of images."""
    from ..errors import MissingExtraError, RecipeError
    from ..recipe import Recipe

    options: dict[str, Any] = {
        "model.backbone": backbone,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "data.image_size": image_size,
        "train.seed": seed,
        "train.precision": precision,
        "data.workers": workers,
        "data.max_bad_share": max_bad_share,
    }
    changes = {key: value for key, value in options.items() if value is not None}
    # A resumed run starts from its own recipe: options are then checked against it, and none are needed.
    own = out / "recipe.yaml" if resume and out is not None else None
    chosen = recipe or (str(own) if own is not None and own.is_file() else "default")
    base = Recipe.load(chosen)
    faults: list[str] = []
    settled = base
    for change in (lambda r: r.with_overrides(set_ or []), lambda r: r.updated(changes)):
        try:
            settled = change(settled)
        except RecipeError as error:
            faults.extend(error.faults)
    if faults:
        raise RecipeError(faults)

    # Only now: a typing mistake should not wait for PyTorch.
    try:
        from ..training.fit import fit
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in {"torch", "torchvision", "timm", "lightning"}:
            raise
        raise MissingExtraError("training", package, "train") from error

    result = fit(
        data,
        settled,
        out=out,
        resume=resume,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
    )
    emit(
        {"run": str(result.run_dir), **result.to_dict()},
        f"{result.checkpoint}",
        as_json=json,
    )
