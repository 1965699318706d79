"""The encoder graph: the one module that is exported. uint8 images in, the online branch's outputs out.

``images`` (N, H, W, 3) uint8 → cast, scale, mean/std, NCHW → online backbone → ``embedding`` (N, D) → ``projection``
→ ``prediction``. The momentum branch cannot be reached from it: it holds no reference to the `BYOL` it was made from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from byol_deploy.bundle import parameter_hash
from byol_deploy.errors import UsageError
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.byol import BYOL

OUTPUTS = ("embedding", "projection", "prediction")
"""All outputs, in the order of the graph."""


def choose_outputs(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of outputs, and bring them into the order of the graph.

    Raises:
        UsageError: A name that does not exist, or no name.
    """
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        raise UsageError(f"outputs are {', '.join(names) or 'none'}; choose from {', '.join(OUTPUTS)}")
    return tuple(name for name in OUTPUTS if name in names)


class Normalize(nn.Module):
    """(N, H, W, 3) uint8 to (N, 3, H, W) float: scale to 0..1, subtract the mean, divide by the deviation.

    The same operations in the same order as :meth:`Preprocessing.normalize`, so the numbers are the same too.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            # Not persistent: part of the input contract, not of the trained parameters.
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, H, W, 3) uint8. Returns (N, 3, H, W) in the type of the buffers."""
        scaled = images.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        return (scaled - self.mean) / self.std


class EncoderGraph(nn.Module):
    """What is deployed, as one module in evaluation mode on the CPU in float32.

    Parameters keep their names (``backbone.layer1.0.conv1.weight``, ``projection_head.2.0.weight``). Heads that no
    chosen output needs are left out. The model that it is made from is copied and stays as it is: mode, weights,
    device and ``requires_grad``.

    Args:
        model: The trained model; only its online branch is taken.
        preprocessing: The input contract.
        outputs: Some of ``embedding``, ``projection``, ``prediction``.

    Raises:
        UsageError: An unknown output.
    """

    def __init__(self, model: BYOL, preprocessing: Preprocessing, outputs: Sequence[str] = OUTPUTS) -> None:
        super().__init__()
        self.outputs = choose_outputs(outputs)
        self.size_px = preprocessing.size_px
        self.preprocessing = Normalize(preprocessing)
        modes = [(module, module.training) for module in model.modules()]
        online = copy.deepcopy(model.online())
        for module, training in modes:  # a layer that the caller froze in evaluation mode stays so
            module.training = training
        self.backbone = online.backbone
        self.feature_map = online.feature_map
        self._head_takes_map = online.head_takes_map
        needs_projection = self.outputs[-1] != "embedding"
        self.projection_head = online.projection_head if needs_projection else None
        self.prediction_head = online.prediction_head if "prediction" in self.outputs else None
        self.to("cpu", torch.float32).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (N, H, W, 3) uint8. Returns the chosen outputs in order, each (N, width) float32."""
        y = self.feature_map.unwrap(self.backbone(self.preprocessing(images)))
        values = {"embedding": self.feature_map.pool(y)}
        if self.projection_head is not None:
            values["projection"] = self.projection_head(self.feature_map(y) if self._head_takes_map else y)
        if self.prediction_head is not None:
            values["prediction"] = self.prediction_head(values["projection"])
        return tuple(values[name] for name in self.outputs)

    def run(self, images: np.ndarray, batch_size: int = 7) -> dict[str, np.ndarray]:
        """Compute the outputs, a few images at a time.

        Args:
            images: (N, H, W, 3) uint8, N at least 1.
            batch_size: Images per pass.

        Returns:
            Output name to (N, width), float32 or, from :meth:`doubled`, float64.
        """
        images = np.require(images, requirements=["C", "W"])  # PyTorch cannot share what may not be written
        with torch.inference_mode():
            parts = [self(torch.from_numpy(images[start : start + batch_size]))
                     for start in range(0, len(images), batch_size)]  # fmt: skip
        return {name: torch.cat([part[place] for part in parts]).numpy() for place, name in enumerate(self.outputs)}

    def doubled(self) -> EncoderGraph:
        """A copy that computes in float64 from the same float32 parameters: the truth that noise is measured from."""
        return copy.deepcopy(self).double()

    def tensors(self) -> dict[str, np.ndarray]:
        """Every trained tensor by its state-dict key: parameters and batch-norm statistics.

        Batch norm's step counters are left out: no evaluation looks at them, and no format stores them.
        """
        return {
            name: tensor.detach().numpy()
            for name, tensor in self.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }

    def parameter_hash(self) -> str:
        """:func:`byol_deploy.bundle.parameter_hash` over :meth:`tensors`: names the trained state that is exported."""
        return parameter_hash(self.tensors())

    def parameter_count(self) -> int:
        """Number of parameters in the graph, batch-norm statistics not counted."""
        return sum(parameter.numel() for parameter in self.parameters())
