"""Checkpoints in: ours, the reference class's, bare state dicts. Nothing that is read can execute code.

Three doors are shut for a checkpoint from a stranger: ``torch.load`` runs with ``weights_only=True``; a backbone of
``module:callable`` form is imported only when the caller says that it is trusted; and arguments that would make timm
or torchvision download or open further files are dropped, since the weights come from the checkpoint anyway.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from byol_deploy.errors import CheckpointError, RecipeError, UsageError
from byol_deploy.preprocess import Preprocessing
from byol_deploy.recipe import Recipe
from byol_deploy.training.backbones import build_backbone, probe_backbone
from byol_deploy.training.byol import BYOL
from byol_deploy.training.heads import byol_mlp

KEY = "byol_deploy"
"""Where our own entry stands in a Lightning checkpoint: schema, version, recipe, preprocessing."""
SCHEMA = 1
"""The newest schema of that entry that is understood here."""

_ONLINE = ("backbone.", "projection_head.", "prediction_head.")
_MOMENTUM = ("backbone_momentum.", "projection_head_momentum.")
_DEEPLAB = "backbone.RN50model."
# Keyword arguments that name weights elsewhere: not followed when a checkpoint is read.
_WEIGHT_SOURCES = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights",
    "weights_backbone",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read and found whole.

    Attributes:
        path: The file that was read; inside a run directory, its last checkpoint.
        model: In evaluation mode, on the CPU, float32.
        recipe: What it was trained with; None where the file does not say.
        preprocessing: How an image reaches the encoder; None where the file does not say.
        global_step: Optimiser steps done, 0 where unknown.
        epoch: Last epoch begun, from 0; 0 where unknown.
        sha256: Of the file, 64 hexadecimal digits.
        online_keys: Sorted state-dict keys of the online branch.
        momentum_keys: Sorted state-dict keys of the momentum branch in the file: what an export strips.
    """

    path: Path
    model: BYOL
    recipe: Recipe | None
    preprocessing: Preprocessing | None
    global_step: int
    epoch: int
    sha256: str
    online_keys: tuple[str, ...]
    momentum_keys: tuple[str, ...]


def build_model(recipe: Recipe) -> BYOL:
    """The untrained model of a recipe, the same for training and for loading. Uses torch's random generator.

    A backbone that insists on another image size than the recipe's gets ``img_size`` (timm) or ``image_size``
    (torchvision) by itself, where it takes that.

    Raises:
        UsageError: The backbone is unknown, or takes no images of ``data.image_size``.
    """
    return _model(recipe, recipe.model.backbone_args)


def _model(recipe: Recipe, backbone_args: Mapping[str, Any], backbone: nn.Module | None = None) -> BYOL:
    if backbone is None:
        backbone = _sized_backbone(recipe.model.backbone, dict(backbone_args), recipe.data.image_size)
    return BYOL(
        backbone,
        learning_rate=recipe.optim.lr,
        schedule="auto",
        base_tau=recipe.train.base_tau,
        projection_hidden=recipe.model.projection_hidden,
        projection_size=recipe.model.projection_size,
    )


def _sized_backbone(name: str, args: dict[str, Any], size_px: int) -> nn.Module:
    backbone = build_backbone(name, **args)
    try:
        probe_backbone(backbone, size_px)
    except UsageError as misfit:
        for argument in ("img_size", "image_size"):
            if argument in args:
                break
            try:
                sized = build_backbone(name, **args, **{argument: size_px})
                probe_backbone(sized, size_px)
            except UsageError:
                continue
            return sized
        raise UsageError(f"backbone {name} does not take data.image_size {size_px}: {misfit}") from misfit
    return backbone


def load_checkpoint(
    path: str | os.PathLike[str], *, backbone: str | nn.Module | None = None, trust_backbone: bool = False
) -> LoadedCheckpoint:
    """Read a checkpoint and rebuild its model.

    Understood are our own checkpoints, Lightning checkpoints of the reference class, and bare state dicts. The
    momentum branch may be missing as a whole (a stripped file): it is then a copy of the online branch.

    Args:
        path: A file, or a run directory, whose last checkpoint is taken.
        backbone: For a file that does not say what its backbone is: a name for `build_backbone`, or a module, which
            is copied. The weights are the file's.
        trust_backbone: Import the recipe's ``module:callable`` backbone. Leave it off for files from others.

    Raises:
        CheckpointError: The file is absent, empty, damaged, no checkpoint, would run code, belongs to another model,
            comes from a newer version, or holds weights that are not finite.
        UsageError: ``backbone`` is an unknown name.
    """
    file = _find(Path(path))
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            content = _read(stream, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}; check its permissions") from error

    state = _state_dict(content, file)
    recipe, preprocessing = _own_entry(content, file)
    try:
        with torch.random.fork_rng(devices=[]):  # building draws random weights; the caller's generator is only lent
            model = _rebuild(file, state, recipe, backbone, trust_backbone)
    except (MemoryError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{file} describes a model that cannot be built here: {_brief(error)}") from error
    online, momentum = _load(model, state, file)
    return LoadedCheckpoint(
        path=file,
        model=model.eval(),
        recipe=recipe,
        preprocessing=preprocessing,
        global_step=_count(content.get("global_step")),
        epoch=_count(content.get("epoch")),
        sha256=sha256,
        online_keys=online,
        momentum_keys=momentum,
    )


# ---- the file ----


def _find(path: Path) -> Path:
    try:
        if path.is_dir():
            for candidate in (path / "checkpoints" / "last.ckpt", path / "last.ckpt"):
                if candidate.is_file():
                    return candidate
            raise CheckpointError(
                f"{path} is a directory without checkpoints/last.ckpt; pass a run directory of byol-deploy train, "
                "or a .ckpt file"
            )
        if not path.exists():
            raise CheckpointError(f"there is no checkpoint {path}; pass the run directory or a .ckpt file of training")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; pass the run directory or a .ckpt file of training")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be looked at: {error}; pass a .ckpt file") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); pass another checkpoint, this one was never written out")
    return path


class _NumpyType:
    """Stands in for ``numpy.dtype`` while reading; see `_numpy_scalar`."""

    def __init__(self, spec: str, *_: Any) -> None:
        self.spec = spec
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])


def _numpy_scalar(dtype: _NumpyType, raw: bytes = b"") -> float | int | bool:
    """A NumPy number as a Python number.

    The reference class lets ``numpy.float64`` leak into its checkpoints (its momentum value), and PyTorch refuses
    them. These two stand-ins read plain numbers and nothing else.
    """
    if not re.fullmatch(r"[fiub]\d{1,2}", dtype.spec):
        raise ValueError(f"a NumPy value of type {dtype.spec}")
    value: float | int | bool = np.frombuffer(raw, np.dtype(dtype.order.replace("|", "=") + dtype.spec))[0].item()
    return value


_READABLE: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def _read(stream: IO[bytes], file: Path) -> Mapping[Any, Any]:
    head = stream.read(4)
    stream.seek(0)
    zipped = head.startswith(b"PK")
    # PyTorch writes zip files; before 1.6, pickles of protocol 2. A pickle of another protocol is somebody's own.
    if not zipped and head[:2] != b"\x80\x02":
        kind = "a pickle, which PyTorch did not write" if head[:1] == b"\x80" else "not a PyTorch file"
        raise CheckpointError(f"{file} is {kind}; it was not opened. Pass the .ckpt file that training wrote")
    if zipped and (part := _changed_part(stream)):
        raise CheckpointError(
            f"{file} is damaged: its part {part} does not match its checksum; copy it again or pass an earlier one"
        )
    try:
        with torch.serialization.safe_globals(_READABLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or damaged file can provoke in there, an OSError of seek included
        raise CheckpointError(_why_unreadable(file, str(error), zipped)) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; a checkpoint holds named tensors")
    return content


def _changed_part(stream: IO[bytes]) -> str | None:
    """The first member of the zip file that differs from its checksum, which PyTorch writes but does not look at."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return archive.testzip()
    except Exception:  # not even a zip file: torch.load finds the words for that
        return None
    finally:
        stream.seek(0)


def _why_unreadable(file: Path, reason: str, zipped: bool) -> str:
    # PyTorch's own message advises weights_only=False, which is the one thing not to do here.
    unsafe = re.search(r"GLOBAL ([\w.]+)", reason)
    if unsafe:
        return (
            f"{file} holds more than tensors and plain data: it names {unsafe[1]}, which would run code when loaded, "
            "so it was refused and nothing of it was run. If it is your own, save the weights alone: "
            "torch.save(model.state_dict(), ...)"
        )
    if "TorchScript" in reason:
        return f"{file} is a TorchScript file, not a checkpoint; pass the .ckpt file that training wrote"
    if zipped:
        return f"{file} is cut off, damaged, or not a PyTorch checkpoint; copy it again or pass an earlier one"
    return f"{file} is not a PyTorch checkpoint, or is damaged; pass the .ckpt file that training wrote"


def _brief(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


# ---- its content ----


def _state_dict(content: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{file} has no weights in its state_dict; pass a checkpoint of a model")
    others = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{file} is not a state dict: {_few(others)} {_is_are(others)} no tensor; "
            "pass a Lightning checkpoint or torch.save(model.state_dict(), ...)"
        )
    for wrapper in ("module.", "_orig_mod."):  # what DistributedDataParallel and torch.compile put before each key
        if all(key.startswith(wrapper) for key in state):
            state = {key[len(wrapper) :]: value for key, value in state.items()}
    for key, value in state.items():
        # A tensor of a few bytes may claim any shape (strides of 0), and the model built for it would fill the memory.
        dense = value.layout == torch.strided and value.device.type == "cpu"
        if not dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(
                f"{file}: {key} claims the shape {tuple(value.shape)} but does not hold that many values; "
                "pass another checkpoint, this one is damaged"
            )
    return dict(state)


def _own_entry(content: Mapping[Any, Any], file: Path) -> tuple[Recipe | None, Preprocessing | None]:
    if KEY not in content:
        return None, None
    entry = content[KEY]
    schema = entry.get("schema") if isinstance(entry, Mapping) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(
            f"{file} was written by byol-deploy {entry.get('version')} with checkpoint schema {schema}; "
            f"this version reads up to {SCHEMA}: pip install --upgrade byol-deploy"
        )
    if not isinstance(schema, int) or schema < 1 or "recipe" not in entry:
        raise CheckpointError(f"{file}: its entry {KEY!r} is damaged; pass another checkpoint")
    try:
        recipe = Recipe.from_dict(entry["recipe"])
        given = entry.get("preprocessing")
        preprocessing = recipe.preprocessing() if given is None else Preprocessing.from_dict(given)
    except RecipeError as error:
        raise CheckpointError(f"{file} carries a recipe with faults: {'; '.join(error.faults)}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} carries a preprocessing with faults: {error}") from error
    return recipe, preprocessing


def _rebuild(
    file: Path, state: Mapping[str, Tensor], recipe: Recipe | None, backbone: str | nn.Module | None, trust: bool
) -> BYOL:
    given = build_backbone(backbone) if isinstance(backbone, str) else copy.deepcopy(backbone)
    given = None if given is None else given.to("cpu", torch.float32)
    if recipe is not None:
        own_code = ":" in recipe.model.backbone
        if own_code and given is None and not trust:
            raise CheckpointError(
                f"{file} asks for its backbone to be built by {recipe.model.backbone}, which is code outside this "
                "package; it was not imported. If you know it, allow it with trust_backbone=True (--trust-backbone)"
            )
        args = recipe.model.backbone_args
        if not own_code:
            args = {key: value for key, value in args.items() if key not in _WEIGHT_SOURCES}
        try:
            return _model(recipe, args, given)
        except UsageError as error:
            raise CheckpointError(f"{file}: {error}") from error

    if not any(key.startswith("backbone.") for key in state):
        raise CheckpointError(
            f"{file} is a checkpoint of another model: no key starts with backbone. (its first keys: "
            f"{_few(list(state))}); pass one of byol-deploy train or of the class BYOL"
        )
    if given is None and not any(key.startswith(_DEEPLAB) for key in state):
        first = [key for key in state if key.startswith("backbone.")]
        raise CheckpointError(
            f"{file} does not say what its backbone is (its first keys: {_few(first)}); "
            "name it, e.g. backbone='torchvision/resnet18' (--backbone torchvision/resnet18)"
        )
    hidden, size = _head_sizes(file, state, "projection_head.2.")[1:]
    prediction = byol_mlp(*_head_sizes(file, state, "prediction_head."))
    try:
        return BYOL(given, prediction_head=prediction, projection_hidden=hidden, projection_size=size)
    except UsageError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _head_sizes(file: Path, state: Mapping[str, Tensor], prefix: str) -> tuple[int, int, int]:
    """Input, hidden and output width of the paper's MLP as the file's tensors have them."""
    first, last = state.get(f"{prefix}0.weight"), state.get(f"{prefix}3.weight")
    if first is None or last is None or first.ndim != 2 or last.ndim != 2 or first.shape[0] != last.shape[1]:
        name = prefix.split(".")[0]
        found = [key for key in state if key.startswith(f"{name}.")]
        raise CheckpointError(
            f"{file} has a {name} of another form (its keys: {_few(found) if found else 'none'}); "
            f"expected {prefix}0 (Linear), 1 (BatchNorm1d), 3 (Linear)"
        )
    if 0 in first.shape or 0 in last.shape:
        raise CheckpointError(f"{file}: {prefix}0.weight or {prefix}3.weight is empty; pass another checkpoint")
    return first.shape[1], first.shape[0], last.shape[0]


# ---- weights into the model ----


def _load(model: BYOL, state: Mapping[str, Tensor], file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Load in place. Returns the sorted online and momentum keys of the file."""
    wanted = model.state_dict()
    # The reference class keeps ResNet's unused classifier; ours has none.
    unused = {f"{branch}.RN50model.fc.{part}" for branch in ("backbone", "backbone_momentum")
              for part in ("weight", "bias")} - set(wanted)  # fmt: skip
    given = {key: value for key, value in state.items() if key not in unused}
    stripped = not any(key.startswith(_MOMENTUM) for key in given)
    expected = {key for key in wanted if key.startswith(_ONLINE) or not stripped}
    # Batch norm's counter came with PyTorch 0.4.1 and does nothing in evaluation.
    missing = sorted(key for key in expected - set(given) if not key.endswith(".num_batches_tracked"))
    unexpected = sorted(set(given) - expected)
    other = [
        f"{key}: {_form(given[key])}, expected {_form(wanted[key])}"
        for key in sorted(expected & set(given))
        if given[key].shape != wanted[key].shape or given[key].is_floating_point() != wanted[key].is_floating_point()
    ]
    faults = [
        f"{len(keys)} {what} ({_few(keys)})"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (other, "of another form"))
        if keys
    ]
    if faults:
        raise CheckpointError(
            f"{file} does not fit this model, its keys: {'; '.join(faults)}. "
            "It is another model's or damaged; pass the backbone that it was trained with, or another checkpoint"
        )
    with torch.no_grad():
        for key in expected & set(given):
            wanted[key].copy_(given[key])
    broken = sorted(key for key in given if not torch.isfinite(wanted[key]).all())
    if broken:
        raise CheckpointError(
            f"{file} holds weights that are not finite in {len(broken)} of {len(given)} tensors ({_few(broken)}): the "
            "training diverged; pass an earlier checkpoint, or train with a lower learning rate"
        )
    if stripped:
        model.backbone_momentum.load_state_dict(model.backbone.state_dict())
        model.projection_head_momentum.load_state_dict(model.projection_head.state_dict())
    online = tuple(sorted(key for key in state if key.startswith(_ONLINE) and key not in unused))
    return online, tuple(sorted(key for key in state if key.startswith(_MOMENTUM)))


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _few(items: list[Any], count: int = 3) -> str:
    shown = ", ".join(str(item)[:120] for item in items[:count])
    return f"{shown}, ..." if len(items) > count else shown


def _is_are(items: list[Any]) -> str:
    return "is" if len(items) == 1 else "are"
