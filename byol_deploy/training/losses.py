"""The loss of BYOL in the reference class's scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NegativeCosineSimilarity(nn.Module):
    """Mean of ``-cos(x0, x1)`` over the batch: -1 where all pairs agree, 0 where they are orthogonal.

    The paper's loss (arXiv:2006.07733, eq. 2) is ``2 - 2 cos``, summed over the two view orders. The reference
    class takes half the sum of two negative cosines instead: the same optimum, a quarter of the gradient. A learning
    rate that was tuned for one is four times off for the other (LARS, which divides by the gradient's norm, is
    nearly indifferent).

    Args:
        dim: The axis of the vectors.
        eps: Lower bound of each norm, against a division by zero.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """x0, x1: (N, D), any floating dtype. Returns a float32 scalar, also under autocast."""
        # In bfloat16 a cosine near 1 has steps of 2**-8: late in training the loss would no longer move.
        with torch.autocast(device_type=x0.device.type, enabled=False):
            return -F.cosine_similarity(x0.float(), x1.float(), dim=self.dim, eps=self.eps).mean()

    def extra_repr(self) -> str:
        """The settings, as ``print(model)`` shows them."""
        return f"dim={self.dim}, eps={self.eps}"
