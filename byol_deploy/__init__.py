"""byol-deploy: unlabelled images in, a small verified encoder out, that runs without PyTorch.

The public names below are loaded when they are first used, so that ``import byol_deploy`` costs nothing and works
where PyTorch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from byol_deploy.bundle import Bundle
    from byol_deploy.evaluation import evaluate
    from byol_deploy.formats._onnx_cuda import OnDevice
    from byol_deploy.parity import ParityReport
    from byol_deploy.pipeline import export, verify
    from byol_deploy.recipe import Recipe
    from byol_deploy.runtime import Encoder
    from byol_deploy.training.backbones import DeepLabV3Backbone
    from byol_deploy.training.byol import BYOL
    from byol_deploy.training.fit import fit
    from byol_deploy.training.heads import MLP
    from byol_deploy.training.losses import NegativeCosineSimilarity
    from byol_deploy.training.optim import LARS

_HOME = {
    "BYOL": "byol_deploy.training.byol",
    "LARS": "byol_deploy.training.optim",
    "MLP": "byol_deploy.training.heads",
    "Bundle": "byol_deploy.bundle",
    "DeepLabV3Backbone": "byol_deploy.training.backbones",
    "Encoder": "byol_deploy.runtime",
    "NegativeCosineSimilarity": "byol_deploy.training.losses",
    "OnDevice": "byol_deploy.formats._onnx_cuda",
    "ParityReport": "byol_deploy.parity",
    "Recipe": "byol_deploy.recipe",
    "evaluate": "byol_deploy.evaluation",
    "export": "byol_deploy.pipeline",
    "fit": "byol_deploy.training.fit",
    "verify": "byol_deploy.pipeline",
}

__all__ = [
    "BYOL",
    "LARS",
    "MLP",
    "Bundle",
    "DeepLabV3Backbone",
    "Encoder",
    "NegativeCosineSimilarity",
    "OnDevice",
    "ParityReport",
    "Recipe",
    "evaluate",
    "export",
    "fit",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'byol_deploy' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
