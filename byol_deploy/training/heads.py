"""The multilayer perceptrons behind the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class MLP(nn.Sequential):
    """Linear layers with an activation between them; the last layer stays linear.

    It is an ``nn.Sequential``, so that the state-dict keys are plain indices. ``MLP([2048, 4096, 256],
    intermediate_ops=[nn.BatchNorm1d(4096), None])`` is Linear (0), BatchNorm1d (1), ReLU (2), Linear (3).

    Args:
        layer_sizes: Widths from the input to the output, at least two positive integers.
        activation_cls: Class of the activation between two linear layers.
        intermediate_ops: One entry per linear layer: a module put right after it, before the activation, or None.
        final_op: A module put at the very end.
        *args: Positional arguments of the activation.
        **kwargs: Keyword arguments of the activation.

    Raises:
        ValueError: For fewer than two sizes, a size below 1, or a wrong number of ``intermediate_ops``.
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        activation_cls: type[nn.Module] = nn.ReLU,
        intermediate_ops: Sequence[nn.Module | None] | None = None,
        final_op: nn.Module | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        sizes = list(layer_sizes)
        if len(sizes) < 2 or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"layer_sizes is {sizes}; pass two or more positive integers, e.g. [512, 4096, 256]")
        count = len(sizes) - 1
        ops = [None] * count if intermediate_ops is None else list(intermediate_ops)
        if len(ops) != count:
            raise ValueError(
                f"intermediate_ops has {len(ops)} entries; pass {count}, one per linear layer (None for nothing)"
            )
        layers: list[nn.Module] = []
        for i, op in enumerate(ops):
            layers.append(nn.Linear(sizes[i], sizes[i + 1]))
            if op is not None:
                layers.append(op)
            if i < count - 1:
                layers.append(activation_cls(*args, **kwargs))
        if final_op is not None:
            layers.append(final_op)
        super().__init__(*layers)


def byol_mlp(width: int, hidden: int = 4096, size: int = 256) -> MLP:
    """The paper's head: Linear, batch norm, ReLU, Linear (arXiv:2006.07733, section 3.3).

    Takes (N, width) and gives (N, size), float32.
    """
    return MLP([width, hidden, size], nn.ReLU, [nn.BatchNorm1d(hidden), None])
