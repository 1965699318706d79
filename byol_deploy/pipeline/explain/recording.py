"""What every module of a PyTorch model takes and gives, recorded by hooks while the model runs as it always does."""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_deploy.formats._layers import Call

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Recording:
    """One run of a model.

    Attributes:
        calls: Every call of a module, in the order in which they ended.
        slots: Every tensor that a module took or gave, once each, in the type it was computed in.
    """

    calls: tuple[Call, ...]
    slots: tuple[np.ndarray, ...]

    def outputs(self) -> tuple[int, ...]:
        """Slots of the outputs of the whole model."""
        return self.calls[-1].outputs


class _Slots:
    """Tensors by identity, each copied when it is first seen: in-place operations change what was recorded."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        # By id and version. A weak reference tells whether the id still belongs to the tensor that was seen.
        self._seen: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}

    def number(self, tensor: Tensor) -> int:
        key = (id(tensor), tensor._version)
        found = self._seen.get(key)
        if found is not None and found[0]() is tensor:
            return found[1]
        self.values.append(tensor.detach().cpu().numpy().copy())
        self._seen[key] = (weakref.ref(tensor), len(self.values) - 1)
        return len(self.values) - 1


def record(model: nn.Module, images: np.ndarray) -> Recording:
    """Run ``model`` once and keep what its modules took and gave.

    Args:
        model: In evaluation mode. Its hooks, mode and weights are afterwards as they were.
        images: What it takes, e.g. (n, H, W, 3) uint8.

    Returns:
        The calls and the tensors.
    """
    import torch

    calls: list[Call] = []
    slots = _Slots()
    counts: Counter[str] = Counter()
    # Of each call under way: its input's slot and whether it called another module.
    under_way: list[list[Any]] = []
    names = {id(module): path for path, module in model.named_modules()}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if under_way:
            under_way[-1][1] = True
        tensors = _tensors([*args, *kwargs.values()])
        under_way.append([slots.number(tensors[0]) if tensors else None, False, _source(sys._getframe(1))])

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken, called, source = under_way.pop()
        path = names[id(module)]
        given = tuple(slots.number(tensor) for tensor in _tensors([output]))
        number = counts[path]
        counts[path] += 1
        calls.append(Call(path, type(module).__name__, number, 0, not called, source, taken, given, given == (taken,)))

    with _hooks(model, before, after), torch.no_grad():  # not inference mode: its tensors count no versions
        model(torch.from_numpy(np.require(images, requirements=["C", "W"])))
    return Recording(tuple(replace(call, of=counts[call.path]) for call in calls), tuple(slots.values))


def record_both(model: nn.Module, images: np.ndarray, double_model: nn.Module) -> tuple[Recording, Recording]:
    """:func:`record` in float32 and in float64.

    Args:
        model: In float32.
        images: What it takes.
        double_model: The model in float64, see :func:`doubled`.

    Raises:
        ValueError: The two runs called different modules: there is no one reference to compare with.
    """
    single = record(model, images)
    double = record(double_model, images)
    if [(call.path, call.outputs) for call in single.calls] != [(call.path, call.outputs) for call in double.calls]:
        raise ValueError("the model calls other modules in float64 than in float32; its layers cannot be compared")
    return single, double


@contextlib.contextmanager
def _hooks(model: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: list[Any]) -> list[Tensor]:
    """The tensors in arguments or results, one level of lists, tuples and mappings deep."""
    import torch

    found: list[Tensor] = []
    for value in values:
        if isinstance(value, dict):
            value = tuple(value.values())
        found += [item for item in (value if isinstance(value, list | tuple) else (value,))
                  if isinstance(item, torch.Tensor)]  # fmt: skip
    return found


def _source(frame: FrameType | None) -> str:
    """``timm/models/resnet.py:241``: the innermost line that is neither PyTorch's nor this file's.

    The notation of the files' own source lines: no folder of this machine.
    """
    while frame is not None:
        parts = frame.f_code.co_filename.replace("\\", "/").split("/")
        anchor = next((name for name in ("site-packages", "dist-packages") if name in parts), None)
        if "byol_deploy" in parts:
            inside = parts[parts.index("byol_deploy") :]
        else:
            inside = parts[parts.index(anchor) + 1 :] if anchor else parts[-1:]
        if inside[0] != "torch" and frame.f_code.co_filename != __file__:
            return f"{'/'.join(inside)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def doubled(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float64."""
    return copy.deepcopy(model).double()
