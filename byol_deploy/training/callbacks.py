"""What happens around the training steps: metrics, progress, checkpoints, and stopping when training went wrong.

Everything that is written is written whole: a killed run leaves the last checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from byol_deploy.atomic import publish_file
from byol_deploy.errors import CheckpointError, OutputError, RecipeError
from byol_deploy.training.augment import stateless_seed

Say = Callable[[str], None]

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "tau",
    "embedding_std",
    "projection_std",
    "effective_rank",
    "online_target_cosine",
    "images_per_s",
    "seconds",
)
"""Of metrics.csv. ``loss`` is the mean since the row before; the indicators of a collapse stand in the rows of the
steps at which they were measured; the two last columns are the only ones with a clock."""

_MEASURED = frozenset({"embedding_std", "projection_std", "effective_rank", "online_target_cosine"})

COLLAPSED_STD = 0.1
"""Warn below this standard deviation of the projections, in units of 1/sqrt(width); healthy ones are near 1."""


# --- checkpoints on the disk ----------------------------------------------------------------------------------------


class WholeCheckpointIO(TorchCheckpointIO):  # type: ignore[misc]
    """Writes a checkpoint under another name, syncs it to the disk and renames it; reads plain data only.

    Lightning's own way renames too, but keeps a second copy of the checkpoint in memory, moves it across file systems
    where /tmp is another one, and does not sync.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint``, whole or not at all.

        Raises:
            OutputError: when the place is full or read-only; what stood there stays.
        """
        with publish_file(path, force=True) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # The zip writer says "unexpected pos" where the write before it failed with the reason.
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise (cause or error) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU, never executing anything that it holds."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read one of our checkpoints to the CPU, plain data only.

    Args:
        path: the file.
        mmap: leave the tensors on the disk until they are looked at.

    Raises:
        CheckpointError: when it is not one, or damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged archive raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}; start a new run") from error
    if not isinstance(found, dict) or not isinstance(found.get("byol_deploy"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of byol-deploy train; start a new run")
    return found


# --- callbacks --------------------------------------------------------------------------------------------------


class Reseed(Callback):  # type: ignore[misc]
    """Seeds PyTorch's global generator anew in each epoch, for what a backbone draws itself (dropout, drop path).

    A resumed training then draws what an uninterrupted one draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed from (seed, epoch, rank)."""
        torch.manual_seed(stateless_seed(self.seed, trainer.current_epoch, trainer.global_rank, 2))


class Metrics(Callback):  # type: ignore[misc]
    """Writes metrics.csv, and TensorBoard events where it is installed; stops a training that has diverged.

    Args:
        run_dir: of the run.
        images: images of one optimiser step's micro-batch, over all devices.
        every: optimiser steps between rows; the end of an epoch gets a row too.
        resumed_at: the optimiser step of the checkpoint that this run continues; rows after it are dropped.
        say: tells the person.
    """

    def __init__(self, run_dir: Path, *, images: int, every: int, resumed_at: int, say: Say) -> None:
        self.path = run_dir / "metrics.csv"
        self.images = images
        self.every = every
        self.resumed_at = resumed_at
        self.say = say
        self.last: dict[str, float] = {}
        self._losses: list[Tensor] = []
        self._file: io.TextIOWrapper | None = None
        self._events: Any = None
        self._start = self._since = 0.0
        self._warned = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the files, rows of steps that will be done again left out."""
        self._start = self._since = time.perf_counter()
        if not trainer.is_global_zero:
            return
        rows = _rows_until(self.path, self.resumed_at)
        self._before_s = float(rows[-1][-1]) if rows else 0.0
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
        with publish_file(self.path, force=True) as file:
            file.write(text.getvalue().encode())
        self._file = self.path.open("a", newline="", encoding="utf-8", buffering=1)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(self.path.parent / "tensorboard", purge_step=self.resumed_at + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; write a row where one is due. On a GPU the loss is read only then: reading waits for it."""
        loss = outputs["loss"].detach() * _unscale(trainer, pl_module)
        self._losses.append(loss)
        if loss.device.type == "cpu":
            self._refuse_non_finite(trainer, float(loss))
        last_of_epoch = batch_idx + 1 == trainer.num_training_batches
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last_of_epoch or (stepped and trainer.global_step % self.every == 0):
            self._row(trainer)

    def _refuse_non_finite(self, trainer: L.Trainer, loss: float) -> None:
        if not math.isfinite(loss):
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            raise RecipeError(
                [
                    f"the loss became {loss} at step {trainer.global_step} (epoch {trainer.current_epoch + 1}, "
                    f"learning rate {lr:.3g}); lower optim.lr, lengthen optim.warmup_epochs or set "
                    "optim.clip_grad_norm=1. The last checkpoint is from before"
                ]
            )

    def _row(self, trainer: L.Trainer) -> None:
        losses = torch.stack(self._losses).float().mean().item()
        self._refuse_non_finite(trainer, losses)
        now = time.perf_counter()
        fresh = trainer.global_step % self.every == 0  # otherwise they are those of an earlier step
        known = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name in COLUMNS and (fresh or name not in _MEASURED)
        }
        row: dict[str, float] = {
            **known,
            "step": trainer.global_step,
            "epoch": trainer.current_epoch + 1,
            "loss": losses,
            "images_per_s": self.images * len(self._losses) / max(now - self._since, 1e-9),
        }
        self._losses.clear()
        self._since = now
        self.last = {**self.last, **row}
        if self._file is None:
            return
        row["seconds"] = self.last["seconds"] = self._before_s + now - self._start
        try:
            csv.writer(self._file, lineterminator="\n").writerow([_cell(name, row.get(name)) for name in COLUMNS])
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}; free some space and add --resume") from error
        if self._events is not None:
            for name in COLUMNS[2:]:
                if name in row:
                    self._events.add_scalar(name, row[name], trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say in words when the projections have nearly stopped to differ."""
        spread = self.last.get("projection_std")
        if spread is None or not trainer.is_global_zero:
            return
        if spread < COLLAPSED_STD:
            self._warned += 1
            if self._warned <= 3:
                self.say(
                    f"warning: after epoch {trainer.current_epoch + 1} the projections of different images hardly "
                    f"differ (standard deviation {spread:.3f} / sqrt(width); healthy is near 1). The network is "
                    "collapsing or has collapsed, whatever the loss says: lower optim.lr, lengthen "
                    "optim.warmup_epochs, or raise train.base_tau or the batch"
                )
        else:
            self._warned = 0

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported already
                self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the files."""
        self.close()


def _unscale(trainer: L.Trainer, pl_module: L.LightningModule) -> float:
    """Factor from the loss that Lightning hands on, divided for accumulation and scaled, to the logged one."""
    return float(trainer.accumulate_grad_batches / getattr(pl_module, "loss_scale", 1.0))


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in {"step", "epoch"}:
        return str(int(value))
    # Nine digits: float32 values are told apart, and a person can still read them.
    return f"{value:.1f}" if name in {"images_per_s", "seconds"} else f"{value:.9g}"


def _rows_until(path: Path, step: int) -> list[list[str]]:
    """The rows of a metrics file up to an optimiser step; a half-written last row is dropped."""
    if step <= 0 or not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS) and row[0].isdigit()]
    return [row for row in rows if int(row[0]) <= step]


class RunCheckpoints(Checkpoint):  # type: ignore[misc]
    """Writes last.ckpt after every epoch, and keeps an ``epoch=NNN.ckpt`` now and then.

    Args:
        folder: where they go.
        entry: plain data for the key ``byol_deploy`` of each checkpoint.
        every_epochs: how often one is kept; 0 = never.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], every_epochs: int) -> None:
        self.folder = folder
        self.entry = entry
        self.every_epochs = every_epochs

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild the model and its preprocessing."""
        checkpoint["byol_deploy"] = {**self.entry, "epochs_done": trainer.current_epoch + 1}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, unless the weights are broken: a good checkpoint is never replaced by a useless one."""
        norms = torch._foreach_norm([parameter.detach() for parameter in pl_module.parameters()])
        if not math.isfinite(float(torch.stack(list(norms)).sum())):
            raise RecipeError(
                [
                    f"weights became infinite or NaN in epoch {trainer.current_epoch + 1}; lower optim.lr or set "
                    "optim.clip_grad_norm=1. The last checkpoint is from before"
                ]
            )
        last = self.folder / "last.ckpt"
        trainer.save_checkpoint(last)
        done = trainer.current_epoch + 1
        if trainer.is_global_zero and self.every_epochs and done % self.every_epochs == 0:
            with publish_file(self.folder / f"epoch={done:03d}.ckpt", force=True) as file, last.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)


class Progress(Callback):  # type: ignore[misc]
    """One bar for the whole training at a terminal, one line per epoch (or minute) elsewhere; on stderr."""

    def __init__(self, metrics: Metrics, images: int) -> None:
        self.metrics = metrics
        self.images = images
        self._bar: Any = None
        self._task: Any = None
        self._shown = self._spoken = self._start = 0.0
        self._seen = 0
        self._batches = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._start = self._shown = self._spoken = time.perf_counter()
        if not trainer.is_global_zero:
            return
        batches = trainer.num_training_batches
        total, self._seen = batches * (trainer.max_epochs or 0), batches * trainer.current_epoch
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:3.0f}%"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("starting", total=total, completed=self._seen)
            self._bar.start()

    def _text(self, trainer: L.Trainer, loss: float) -> str:
        known = trainer.callback_metrics
        rate = self._batches * self.images / max(time.perf_counter() - self._start, 1e-9)
        values = {name: float(known[name]) for name in ("lr", "tau") if name in known}
        return "  ".join(
            [
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
                f"loss {loss:+.3f}",
                *(f"{name} {value:.4g}" for name, value in values.items()),
                f"{rate:,.0f} images/s",
            ]
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, at most five times a second."""
        self._batches += 1
        now = time.perf_counter()
        pause = 0.2 if self._bar is not None else 60.0
        if not trainer.is_global_zero or now - self._shown < pause:
            return
        self._shown = now
        text = self._text(trainer, float(outputs["loss"]) * _unscale(trainer, pl_module))
        if self._bar is None:
            share = (batch_idx + 1) / trainer.num_training_batches
            print(f"{text}  ({share:.0%} of this epoch)", file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, description=text, completed=self._seen + self._batches)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show where the epoch ended."""
        if not trainer.is_global_zero:
            return
        self._shown = time.perf_counter()
        text = self._text(trainer, self.metrics.last.get("loss", math.nan))
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, description=text, completed=self._seen + self._batches)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
