"""Lightning's Trainer as this machine has it: precision, devices, and its talk kept off the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

from byol_deploy.cores import usable_cores
from byol_deploy.errors import ProviderError
from byol_deploy.recipe import Recipe
from byol_deploy.training.callbacks import WholeCheckpointIO
from byol_deploy.training.run_directory import RUN_DIR_VARIABLE


def choose_precision(asked: str, accelerator: str = "auto") -> tuple[str, str]:
    """Settle ``train.precision``. Returns ``32`` or ``bf16``, and why."""
    if asked != "auto":
        return asked, "as asked"
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        # Emulated bfloat16 (before Ampere) is slower than float32.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has it") if native else ("32", "this GPU has no bfloat16")
    if accelerator not in ("auto", "cpu"):
        return "32", f"bfloat16 is chosen on CUDA and CPUs only, not on {accelerator}"
    found = _cpu_bf16()
    return ("bf16", f"this CPU has {found}") if found else ("32", "this CPU has no bfloat16 instructions")


def _cpu_bf16() -> str:
    """Name of the CPU's bfloat16 matrix instructions, or nothing."""
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), "")
    for question, name in (("_is_amx_tile_supported", "amx"), ("_is_avx512_bf16_supported", "avx512_bf16")):
        answer = getattr(torch.cpu, question, None)  # not public, and only where there is no /proc
        if answer is not None and answer():
            return name
    return ""


def make_trainer(recipe: Recipe, precision: str, options: dict[str, Any]) -> L.Trainer:
    train = recipe.train
    devices = options["devices"]
    try:
        return L.Trainer(
            **{**options, "devices": int(devices) if str(devices).lstrip("-").isdigit() else devices},
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_epochs=train.epochs,
            gradient_clip_val=recipe.optim.clip_grad_norm or None,
            log_every_n_steps=train.log_every_steps,
            deterministic=train.deterministic or None,
            plugins=[WholeCheckpointIO()],
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,  # ours are added when the Trainer has said how many devices there are
        )
    except (RuntimeError, ValueError, TypeError) as error:
        # Lightning's MisconfigurationException is a plain Exception subclass of its own.
        raise ProviderError(_device_fault(error, options)) from error
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":
            raise
        raise ProviderError(_device_fault(error, options)) from error


def _device_fault(error: Exception, options: dict[str, Any]) -> str:
    asked = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"training cannot run with {asked}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice and PyTorch's notices about third parties off the terminal: one place for all of it."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for part in (
            ".*does not have many workers.*",  # settled and printed by choose_workers
            ".*smaller than the logging interval.*",  # every epoch ends with a row of its own
            ".*GPU available but not used.*",  # the device is printed
            ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning's own use of PyTorch
            ".*Checkpoint directory .* exists and is not empty.*",  # ours to judge
            ".*multi-threaded, use of fork\\(\\) may lead to deadlocks.*",  # Python 3.12 on loader processes
            ".*lr_scheduler.step\\(\\)` before `optimizer.step\\(\\).*",  # a resumed scheduler's first step
            ".*does not have a `val_dataloader`.*",
            ".*Decompression.*",  # images.decode refuses and counts such a file
        ):
            warnings.filterwarnings("ignore", message=part)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def globals_given_back() -> Iterator[None]:
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    threads = torch.get_num_threads()
    # PyTorch counts the machine's cores inside a container too, and threads that have to share one wait for each other.
    torch.set_num_threads(min(threads, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        if run_dir is None:
            os.environ.pop(RUN_DIR_VARIABLE, None)
