"""An ML program computed without Core ML: what its operators are documented to do, in PyTorch and float32.

Core ML itself runs on macOS alone. This reads a written package back, its weights from ``weight.bin`` included, and
computes it, so that a wrong weight, edge, axis or epsilon of the conversion shows on any machine. It does not show what
Core ML's own kernels do. Operators as in
https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class UnknownOperator(Exception):
    """An operator, or a mode of one, that is not written down here."""


def evaluate(package: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute a package.

    Args:
        package: The folder ``*.mlpackage``.
        inputs: Arrays by input name, in the shapes of the program.

    Returns:
        Arrays by output name, in float32.

    Raises:
        UnknownOperator: It has an operator that is not known here.
    """
    import torch
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models.utils import load_spec

    spec = load_spec(str(package))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    function = load(spec, spec.specificationVersion, str(weights)).functions["main"]
    known: dict[str, Any] = {name: torch.from_numpy(values.astype(np.float32)) for name, values in inputs.items()}
    with torch.inference_mode():
        for operation in function.operations:
            if operation.op_type == "const":
                known[operation.outputs[0].name] = _constant(operation.outputs[0].val)
                continue
            rule = _RULES.get(operation.op_type)
            if rule is None:
                raise UnknownOperator(operation.op_type)
            given = _Arguments(operation, known)
            values = rule(given)
            if given.unread():
                raise UnknownOperator(f"{operation.op_type} with {', '.join(given.unread())}")
            values = values if isinstance(values, tuple | list) else [values]
            known.update(zip((output.name for output in operation.outputs), values, strict=True))
    return {output.name: known[output.name].numpy() for output in function.outputs}


class _Arguments:
    """The arguments of one operation: tensors as attributes, constants as Python values by :meth:`get`."""

    def __init__(self, operation: Any, known: Mapping[str, Any]) -> None:
        self.kind: str = operation.op_type
        self._operation, self._known = operation, known
        self._read: set[str] = set()

    def unread(self) -> list[str]:
        """Arguments that a rule has not looked at: it cannot know what they change."""
        return sorted(name for name, given in self._operation.inputs.items() if given is not None and
                      name not in self._read)  # fmt: skip

    def tensor(self, name: str) -> Any:
        self._read.add(name)
        given = self._operation.inputs.get(name)
        if given is None:
            return None
        if isinstance(given, tuple | list):
            return [self._known[item.name] for item in given]
        return self._known[given.name]

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        given = self._operation.inputs.get(name)
        if given is None or given.val is None:
            return default
        return given.val.tolist() if isinstance(given.val, np.ndarray | np.generic) else given.val

    @property
    def x(self) -> Any:
        return self.tensor("x")


def _constant(value: Any) -> Any:
    import torch

    if not isinstance(value, np.ndarray | np.generic):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        return value
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array.copy())


def _one(name: str) -> Callable[[_Arguments], Any]:
    """A function of PyTorch of one tensor."""

    def rule(given: _Arguments) -> Any:
        import torch

        return getattr(torch, name)(given.x)

    return rule


def _two(name: str) -> Callable[[_Arguments], Any]:
    """A function of PyTorch of two tensors."""

    def rule(given: _Arguments) -> Any:
        import torch

        return getattr(torch, name)(given.x, given.tensor("y"))

    return rule


def _reduce(name: str) -> Callable[[_Arguments], Any]:
    def rule(given: _Arguments) -> Any:
        import torch

        axes = given.get("axes") or list(range(given.x.dim()))
        return getattr(torch, name)(given.x, dim=axes, keepdim=given.get("keep_dims", False))

    return rule


def _norm(given: _Arguments) -> Any:
    return given.x.square().sum(dim=given.get("axes"), keepdim=given.get("keep_dims", False)).sqrt()


def _padding(given: _Arguments, kernel: list[int], dilations: list[int]) -> list[int]:
    """(before, after) of each spatial axis, in the order of the axes."""
    kind, sides = given.get("pad_type", "valid"), given.get("pad")
    if kind == "valid":
        return [0, 0] * len(kernel)
    if kind == "custom":
        return list(sides)
    found = []
    for place, (size, dilation) in enumerate(zip(kernel, dilations, strict=True)):
        length, stride = given.x.shape[2 + place], given.get("strides", [1] * len(kernel))[place]
        total = max((-(-length // stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
        small, large = total // 2, total - total // 2
        found += [large, small] if kind == "same_lower" else [small, large]
    return found


def _padded(values: Any, sides: list[int], fill: float) -> Any:
    """``sides`` are (before, after) of the last axes, in the order of the axes; PyTorch wants the last axis first."""
    import torch

    pairs = [sides[place : place + 2] for place in range(0, len(sides), 2)]
    return torch.nn.functional.pad(values, [side for pair in reversed(pairs) for side in pair], value=fill)


def _conv(given: _Arguments) -> Any:
    import torch

    weight = given.tensor("weight")
    axes = weight.dim() - 2
    dilations = given.get("dilations", [1] * axes)
    values = _padded(given.x, _padding(given, list(weight.shape[2:]), dilations), 0.0)
    run = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[axes - 1]
    return run(values, weight, given.tensor("bias"), given.get("strides", [1] * axes), 0, dilations,
               given.get("groups", 1))  # fmt: skip


def _pool(given: _Arguments) -> Any:
    import torch

    kernel, ceil = given.get("kernel_sizes"), given.get("ceil_mode", False)
    sides, strides = _padding(given, kernel, [1] * len(kernel)), given.get("strides", [1] * len(kernel))
    exclude = given.get("exclude_padding_from_average", False)
    if len(kernel) != 2 or sides[0] != sides[1] or sides[2] != sides[3]:
        raise UnknownOperator(f"{given.kind} not of two axes, or with uneven padding")
    if given.kind == "max_pool":
        return torch.nn.functional.max_pool2d(given.x, kernel, strides, sides[::2], ceil_mode=ceil)
    return torch.nn.functional.avg_pool2d(given.x, kernel, strides, sides[::2], ceil, not exclude)


def _batch_norm(given: _Arguments) -> Any:
    import torch

    return torch.nn.functional.batch_norm(given.x, given.tensor("mean"), given.tensor("variance"),
                                          given.tensor("gamma"), given.tensor("beta"),
                                          eps=given.get("epsilon", 1e-5))  # fmt: skip


def _layer_norm(given: _Arguments) -> Any:
    axes = [axis % given.x.dim() for axis in given.get("axes")]
    centred = given.x - given.x.mean(dim=axes, keepdim=True)
    values = centred / (centred.square().mean(dim=axes, keepdim=True) + given.get("epsilon", 1e-5)).sqrt()
    shape = [size if axis in axes else 1 for axis, size in enumerate(given.x.shape)]
    gamma, beta = given.tensor("gamma"), given.tensor("beta")
    values = values if gamma is None else values * gamma.reshape(shape)
    return values if beta is None else values + beta.reshape(shape)


def _matmul(given: _Arguments) -> Any:
    x, y = given.x, given.tensor("y")
    x = x.transpose(-1, -2) if given.get("transpose_x", False) else x
    return x @ (y.transpose(-1, -2) if given.get("transpose_y", False) else y)


def _linear(given: _Arguments) -> Any:
    import torch

    return torch.nn.functional.linear(given.x, given.tensor("weight"), given.tensor("bias"))


def _gelu(given: _Arguments) -> Any:
    import torch

    mode = given.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return given.x * torch.sigmoid(1.702 * given.x)
    return torch.nn.functional.gelu(given.x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _pad(given: _Arguments) -> Any:
    mode, fill = given.get("mode", "constant"), float(given.get("constant_val", 0.0))
    if mode != "constant":
        raise UnknownOperator(f"pad in the mode {mode}")
    return _padded(given.x, given.get("pad"), fill)


def _slice(given: _Arguments) -> Any:
    axes = range(given.x.dim())
    none = [False] * len(axes)
    begin, end, steps = given.get("begin"), given.get("end"), given.get("stride") or [1] * len(axes)
    whole, open_end = given.get("begin_mask") or none, given.get("end_mask") or none
    squeezed = given.get("squeeze_mask") or none
    if any(step < 1 for step in steps):
        raise UnknownOperator("slice_by_index backwards")
    chosen = [begin[axis] if squeezed[axis] else slice(None if whole[axis] else begin[axis],
                                                       None if open_end[axis] else end[axis], steps[axis])
              for axis in axes]  # fmt: skip
    return given.x[tuple(chosen)]


def _split(given: _Arguments) -> Any:
    axis = given.get("axis")
    sizes, parts = given.get("split_sizes"), given.get("num_splits")
    return given.x.split(sizes or given.x.shape[axis] // parts, dim=axis)


def _squeeze(given: _Arguments) -> Any:
    axes = given.get("axes")
    return given.x.squeeze() if axes is None else given.x.squeeze(tuple(axes))


def _expand(given: _Arguments) -> Any:
    values = given.x
    final = values.dim() + len(given.get("axes"))
    for axis in sorted(axis % final for axis in given.get("axes")):
        values = values.unsqueeze(axis)
    return values


def _concat(given: _Arguments) -> Any:
    import torch

    values, axis = given.tensor("values"), given.get("axis")
    if given.get("interleave", False):  # the first row of each, then the second of each, ...
        axis %= values[0].dim()
        return torch.stack(values, dim=axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, dim=axis)


def _stack(given: _Arguments) -> Any:
    import torch

    return torch.stack(given.tensor("values"), dim=given.get("axis"))


def _cast(given: _Arguments) -> Any:
    import torch

    kind = given.get("dtype")
    # Everything is computed in float32 here, as the weights were stored.
    return given.x.to({"int32": torch.int32, "bool": torch.bool}.get(kind, torch.float32))


_RULES: dict[str, Callable[[_Arguments], Any]] = {
    **{name: _one(name) for name in ("relu", "sigmoid", "tanh", "sqrt", "square", "exp", "erf", "abs")},
    "add": _two("add"),
    "sub": _two("sub"),
    "mul": _two("mul"),
    "real_div": _two("true_divide"),
    "maximum": _two("maximum"),
    "minimum": _two("minimum"),
    "pow": _two("pow"),
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "reduce_max": _reduce("amax"),
    "reduce_l2_norm": _norm,
    "conv": _conv,
    "max_pool": _pool,
    "avg_pool": _pool,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "gelu": _gelu,
    "silu": lambda given: given.x * given.x.sigmoid(),
    "rsqrt": lambda given: (given.x + given.get("epsilon", 1e-12)).rsqrt(),
    "clip": lambda given: given.x.clamp(given.get("alpha"), given.get("beta")),
    "relu6": lambda given: given.x.clamp(0, 6),
    "leaky_relu": lambda given: given.x.clamp(min=0) + given.get("alpha", 0.01) * given.x.clamp(max=0),
    "sigmoid_hard": lambda given: (given.get("alpha", 0.2) * given.x + given.get("beta", 0.5)).clamp(0, 1),
    "thresholded_relu": lambda given: given.x * (given.x >= given.get("alpha", 1.0)),
    "softmax": lambda given: given.x.softmax(given.get("axis", -1)),
    "pad": _pad,
    "reshape": lambda given: given.x.reshape(given.get("shape")),
    "transpose": lambda given: given.x.permute(given.get("perm")),
    "tile": lambda given: given.x.tile(given.get("reps")),
    "slice_by_index": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "concat": _concat,
    "stack": _stack,
    "cast": _cast,
    "identity": lambda given: given.x,
}
