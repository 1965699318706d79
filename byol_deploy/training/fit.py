"""Train an encoder on a folder of images: one call from pixels to a checkpoint, and on from there after a stop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timm.layers import convert_sync_batchnorm

from byol_deploy import __version__
from byol_deploy.calibration import keep, pick
from byol_deploy.errors import DataError, RecipeError, UsageError
from byol_deploy.images import BadImages
from byol_deploy.recipe import Recipe
from byol_deploy.training.augment import left_out, stateless_seed
from byol_deploy.training.byol import BYOL
from byol_deploy.training.callbacks import (
    Metrics,
    Progress,
    Reseed,
    RunCheckpoints,
    Say,
    read_checkpoint,
)
from byol_deploy.training.checkpoints import build_model
from byol_deploy.training.data import (
    ByolData,
    ImageStore,
    Plan,
    choose_workers,
    plan_epoch,
)
from byol_deploy.training.optim import build_optimizer, warmup_cosine
from byol_deploy.training.run_directory import (
    choose_run_dir,
    draw_views,
    prepare_run_dir,
    scan_images,
    settle_recipe,
    unstarted_forgotten,
)
from byol_deploy.training.trainer import choose_precision, globals_given_back, make_trainer, quiet


@dataclass(frozen=True)
class FitResult:
    """What a training left behind.

    Attributes:
        run_dir: recipe.yaml, metrics.csv, views.png, images.tsv, bad_images.txt, checkpoints/.
        checkpoint: the last checkpoint.
        images: images that were trained on.
        bad_images: files that were left out.
        epochs: done in all.
        steps: optimiser steps done in all.
        device: such as ``cpu`` or ``cuda:0``.
        precision: ``32`` or ``bf16``.
        resumed_epochs: epochs that a run before this one had done.
        seconds: of this call.
        metrics: the last row of metrics.csv, by name.
    """

    run_dir: Path
    checkpoint: Path
    images: int
    bad_images: int
    epochs: int
    steps: int
    device: str
    precision: str
    resumed_epochs: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}


def fit(
    data: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    devices: str | int = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    progress: bool = True,
) -> FitResult:
    """Train BYOL on a folder of images.

    Args:
        data: folder, walked recursively.
        recipe: what to train; None is the default recipe or, with ``resume``, the run's own.
        out: the run directory; None makes ``runs/<folder>-<time>``.
        resume: continue the run in ``out`` where it stopped, as if nothing had happened. A run without a checkpoint
            starts from its beginning. A recipe that contradicts the run's is refused: the schedules of learning rate
            and tau span the whole training, so more epochs make another training.
        accelerator: Lightning's: auto, cpu, cuda, ...
        devices: Lightning's: auto, a number, or a list such as "0,2".
        num_nodes: Lightning's.
        strategy: Lightning's: auto, ddp, ...
        progress: talk on stderr.

    Returns:
        What was trained, and where it is.

    Raises:
        DataError: no usable images, too many bad ones, or other images than the run had.
        RecipeError: a recipe with faults, or a training that diverged.
        OutputError: the run directory cannot be written, or already holds something.
        UsageError: an unknown backbone, or options that contradict the run that is resumed.
        CheckpointError: a last.ckpt that cannot be read.
        ProviderError: a device or strategy that is not there.
    """
    start = time.perf_counter()
    with quiet(), torch.random.fork_rng(devices=[]), globals_given_back():
        run_dir = choose_run_dir(Path(data), None if out is None else Path(out), resume, num_nodes)
        with unstarted_forgotten(run_dir):
            return _fit(
                Path(data),
                recipe,
                run_dir=run_dir,
                resume=resume,
                trainer_options={
                    "accelerator": accelerator,
                    "devices": devices,
                    "num_nodes": num_nodes,
                    "strategy": strategy,
                },
                progress=progress,
                start=start,
            )


def _fit(
    data: Path,
    recipe: Recipe | None,
    *,
    run_dir: Path,
    resume: bool,
    trainer_options: dict[str, Any],
    progress: bool,
    start: float,
) -> FitResult:
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0
    say: Say = (lambda text: print(text, file=sys.stderr, flush=True)) if progress and first else (lambda text: None)
    last = run_dir / "checkpoints" / "last.ckpt"
    recipe = settle_recipe(recipe, run_dir, resume)
    if first:
        prepare_run_dir(run_dir, recipe, resume)
    before = read_checkpoint(last, mmap=True) if resume and last.exists() else None
    done = int(before["byol_deploy"].get("epochs_done", 0)) if before else 0
    if resume and before is None:
        say(f"{run_dir} has no checkpoint yet: starting from the beginning")

    store, bad = scan_images(data, recipe, run_dir, resume, say, first)
    if before is not None and done >= recipe.train.epochs:
        say(f"{run_dir} is complete: {done} of {recipe.train.epochs} epochs are done")
        return FitResult(run_dir, last, len(store), len(bad), done, int(before["global_step"]), "none", "none", done,
                         time.perf_counter() - start)  # fmt: skip

    precision, why = choose_precision(recipe.train.precision, trainer_options["accelerator"])
    trainer = make_trainer(recipe, precision, trainer_options)
    device = trainer.strategy.root_device
    plan = plan_epoch(len(store), recipe.train.batch_size, recipe.train.accumulate, trainer.world_size)
    trainer.accumulate_grad_batches = plan.accumulate
    total = plan.steps * recipe.train.epochs
    if before is not None and int(before["global_step"]) != plan.steps * done:
        raise UsageError(
            f"{last} has {before['global_step']} steps after {done} epochs, but here an epoch would have {plan.steps}; "
            f"resume with as many devices as before (now {trainer.world_size}) and without changing train.batch_size"
        )

    torch.manual_seed(stateless_seed(recipe.train.seed, 0))
    model = build_model(recipe)
    model.schedule_length = total
    lr = recipe.optim.lr * (
        plan.batch_size * plan.accumulate * trainer.world_size / 256 if recipe.optim.lr_scaling else 1
    )
    warmup = min(round(recipe.optim.warmup_epochs * plan.steps), total // 4)
    model.optimizer_factory = _optimizer_factory(recipe, lr, warmup, total)
    model.to(memory_format=torch.channels_last)
    if trainer.world_size > 1 and device.type == "cuda":
        # All devices share their batch statistics, as in the paper. timm's function keeps the activation that its own
        # normalisation layers carry, which PyTorch's and Lightning's drop.
        convert_sync_batchnorm(model)

    module_data = ByolData(store, recipe, plan, workers=0)
    workers, workers_why = choose_workers(
        recipe.data.workers, module_data.crops, plan.batch_size, on_cpu=device.type == "cpu"
    )
    module_data.workers = workers
    _announce(say, recipe, store, bad, plan, trainer, model, f"{precision} ({why})", f"{workers} ({workers_why})",
              lr, warmup, total, done, run_dir)  # fmt: skip
    if first and not (run_dir / "views.png").exists():
        draw_views(module_data, run_dir / "views.png")

    images = plan.batch_size * trainer.world_size
    metrics = Metrics(run_dir, images=images, every=recipe.train.log_every_steps, resumed_at=plan.steps * done, say=say)
    entry = {
        "schema": 1,
        "version": __version__,
        "recipe": recipe.to_dict(),
        "preprocessing": recipe.preprocessing().to_dict(),
        "data": {"fingerprint": store.fingerprint, "images": len(store), "channels": store.channels},
        "precision": precision,
    }
    trainer.callbacks.extend([Reseed(recipe.train.seed), metrics])
    if progress:
        trainer.callbacks.append(Progress(metrics, images))
    trainer.callbacks.append(RunCheckpoints(last.parent, entry, recipe.train.checkpoint_every_epochs))
    del before
    try:
        trainer.fit(model, datamodule=module_data, ckpt_path=last if done else None, weights_only=True)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into exit code 1.
        say(f"stopped; continue with: byol-deploy train {data} --out {run_dir} --resume")
        raise KeyboardInterrupt from stop
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # The effective rank of features that are no numbers any more is the first thing to fail.
        raise RecipeError(
            [
                f"training diverged at step {trainer.global_step}: the features are not finite; lower optim.lr or "
                "set optim.clip_grad_norm=1. The last checkpoint is from before"
            ]
        ) from error
    except DataError as error:
        # From a loader process the message comes wrapped in that process's trace.
        text = str(error).strip().rsplit("DataError: ", 1)[-1]
        raise DataError(f"{text} (it could be read when training started)") from error
    finally:
        metrics.close()
    if trainer.is_global_zero:
        # For int8 one day: the data may be elsewhere then.
        keep(run_dir, pick([store.root / file.name for file in store.files], recipe.preprocessing()))
    seconds = time.perf_counter() - start
    say(f"done in {seconds:.0f} s: {last}")
    return FitResult(run_dir, last, len(store), len(bad), recipe.train.epochs, trainer.global_step, str(device),
                     precision, done, seconds, {**metrics.last})  # fmt: skip


def _optimizer_factory(recipe: Recipe, lr: float, warmup: int, total: int) -> Callable[[BYOL], dict[str, Any]]:
    def make(model: BYOL) -> dict[str, Any]:
        optim = recipe.optim
        optimizer = build_optimizer(optim.name, model, lr=lr, weight_decay=optim.weight_decay, momentum=optim.momentum)
        schedule = warmup_cosine(optimizer, warmup_steps=warmup, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return make


def _announce(
    say: Say,
    recipe: Recipe,
    store: ImageStore,
    bad: BadImages,
    plan: Plan,
    trainer: L.Trainer,
    model: BYOL,
    precision: str,
    workers: str,
    lr: float,
    warmup: int,
    total: int,
    done: int,
    run_dir: Path,
) -> None:
    """Say what will be done before it starts."""
    world = trainer.world_size
    effective = plan.batch_size * plan.accumulate * world
    colour = "grey" if store.channels == 1 else "colour"
    kept = f"{store.cached_share:.0%} of them in memory, {store.cached_bytes / 1e6:.0f} MB"
    parts = f"{plan.batch_size}" + (f" x {plan.accumulate} accumulated" if plan.accumulate > 1 else "")
    parts += f" x {world} devices" if world > 1 else ""
    online = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"images     {len(store)} {colour}, {recipe.data.image_size} px views ({kept}); loader processes: {workers}")
    if world > 1:
        shared = "shared by all devices" if trainer.strategy.root_device.type == "cuda" else "each process its own"
        say(f"           batch-norm statistics: {shared}")
    if bad.items:
        say(f"           {bad.summary()} All of them: {run_dir / 'bad_images.txt'}")
    for note in plan.notes:
        say(f"           {note}")
    unused = len(store) - plan.steps * effective
    say(
        f"steps      {plan.steps} an epoch, {total} in all; batch {effective}"
        + (f" ({parts})" if parts != str(effective) else "")
        + (f"; {unused} images, others each time, sit out an epoch" if unused else "")
    )
    for number, view in enumerate((recipe.augment.view1, recipe.augment.view2), 1):
        if store.channels == 1 and (names := left_out(view)):
            say(f"view {number}     left out, without meaning for grey images: {', '.join(names)}")
    say(
        f"network    {recipe.model.backbone}, {model.width} features; "
        f"{online / 1e6:.1f} M trained parameters, heads included"
    )
    say(
        f"optimiser  {recipe.optim.name}, peak learning rate {lr:.4g} after {warmup} steps; "
        f"tau from {recipe.train.base_tau:g}"
    )
    say(f"device     {_device_name(trainer.strategy.root_device)}; precision {precision}")
    say(f"run        {run_dir}" + (f", continued after epoch {done}" if done else ""))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
