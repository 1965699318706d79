"""The run directory of a training: chosen, claimed, filled, and never taken from somebody else."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from byol_deploy.atomic import publish_file
from byol_deploy.errors import DataError, OutputError, UsageError
from byol_deploy.images import BadImages
from byol_deploy.recipe import Recipe
from byol_deploy.training.callbacks import Say
from byol_deploy.training.data import ByolData, ImageFile, ImageStore, changes, list_text, read_list

# Never change what is computed: a resumed run may have others than it started with.
_FREE_ON_RESUME = frozenset(
    {"description", "data.workers", "data.cache_mb", "data.max_bad_share", "train.checkpoint_every_epochs"}
)
RUN_DIR_VARIABLE = "BYOL_DEPLOY_RUN_DIR"
_PAIRS_SHOWN = 8


def choose_run_dir(data: Path, out: Path | None, resume: bool, num_nodes: int) -> Path:
    if out is not None:
        return out
    if resume:
        raise UsageError("--resume needs --out DIR, the run to continue")
    if num_nodes > 1:
        raise UsageError("several nodes need --out DIR: each would name the run after its own clock")
    # Lightning starts further processes with this same command line; they must find the first one's choice.
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    chosen = Path("runs") / f"{data.resolve().name or 'images'}-{datetime.now():%Y%m%d-%H%M%S}"
    os.environ[RUN_DIR_VARIABLE] = str(chosen)
    return chosen


@contextlib.contextmanager
def unstarted_forgotten(run_dir: Path) -> Iterator[None]:
    """Take back a run directory in which no step was done: the next try, with better data, may have its name."""
    fresh = not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir()))
    try:
        yield
    except BaseException:
        if fresh and not (run_dir / "metrics.csv").exists() and not any((run_dir / "checkpoints").glob("*")):
            with contextlib.suppress(OSError):
                for name in ("recipe.yaml", "images.tsv", "bad_images.txt", "views.png"):
                    (run_dir / name).unlink(missing_ok=True)
                (run_dir / "checkpoints").rmdir()
                run_dir.rmdir()  # only when nobody put anything else there
        raise


def settle_recipe(recipe: Recipe | None, run_dir: Path, resume: bool) -> Recipe:
    kept = run_dir / "recipe.yaml"
    if not resume or not kept.exists():
        return (recipe or Recipe.load("default")).resolved()
    own = Recipe.load(kept).resolved()
    if recipe is None:
        return own
    asked = recipe.resolved()
    differences = own.differences(asked)
    faults = [f"{key} is {old} in the run, {new} was asked for"
              for key, old, new in differences if key not in _FREE_ON_RESUME]  # fmt: skip
    if faults:
        raise UsageError(
            f"{run_dir} cannot continue with another recipe: {'; '.join(faults)}. "
            "Leave these options out, or start a new run"
        )
    return asked


def prepare_run_dir(run_dir: Path, recipe: Recipe, resume: bool) -> None:
    """Make the run directory with its recipe; refuse one that holds anything of somebody else's."""
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise OutputError(f"{run_dir} is a file; choose another --out")
        if not resume and run_dir.is_dir() and any(run_dir.iterdir()):
            more = " or add --resume to continue it" if (run_dir / "recipe.yaml").exists() else ""
            raise OutputError(f"{run_dir} is not empty, and nothing in it is overwritten; choose another --out{more}")
        if resume and run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / "recipe.yaml").exists():
            raise OutputError(f"{run_dir} is not a run of byol-deploy train (no recipe.yaml); choose another --out")
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{run_dir} cannot be made: {error}; choose another --out") from error
    recipe.save(run_dir / "recipe.yaml")


def scan_images(
    data: Path, recipe: Recipe, run_dir: Path, resume: bool, say: Say, first: bool
) -> tuple[ImageStore, BadImages]:
    listed = run_dir / "images.tsv"
    known: list[ImageFile] | None = read_list(listed) if resume and listed.exists() else None
    spoken = time.perf_counter()

    def tell(done: int, total: int, bad: int) -> None:
        nonlocal spoken
        if time.perf_counter() - spoken > 5 and done < total:
            spoken = time.perf_counter()
            say(f"looking at the images: {done} of {total}" + (f", {bad} bad" if bad else ""))

    settings = recipe.data
    assert settings.store_size != "auto", "scan with a resolved recipe"
    store, bad = ImageStore.scan(
        data,
        max_bad_share=settings.max_bad_share,
        cache_mb=settings.cache_mb,
        store_px=settings.store_size,
        trusted=known or (),
        progress=tell,
    )
    if first and bad.items:
        text = "".join(
            f"{' '.join((reason if name in reason else f'{name}: {reason}').split())}\n" for name, reason in bad.items
        )
        with publish_file(run_dir / "bad_images.txt", force=True) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    if known is not None:
        differences = changes(known, store.files)
        if differences:
            raise DataError(
                f"the images below {data} are not those that {run_dir} was started with: {'; '.join(differences)}. "
                "A resumed training must see the same ones: put them back, or start a new run"
            )
    elif first:
        with publish_file(listed, force=True) as file:
            file.write(list_text(store.files))
    return store, bad


def draw_views(data: ByolData, path: Path) -> None:
    """Draw the first pairs: view 1 above, view 2 below, enlarged where they are small."""
    size = data.recipe.data.image_size
    zoom = max(1, 96 // size)
    first, second = data.first_pairs(_PAIRS_SHOWN)
    gap = 4
    cell = size * zoom + gap
    sheet = Image.new("RGB", (len(first) * cell + gap, 2 * cell + gap), "white")
    for row, views in enumerate((first, second)):
        for column, view in enumerate(views):
            pixels = (view.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * cell, gap + row * cell))
    with publish_file(path, force=True) as file:
        sheet.save(file, format="PNG")
