"""What a format answers where it has nothing of its own to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError, ExportError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.formats._layers import Call, LayeredFile
from byol_deploy.quantization import Calibration, Reducer


class Defaults:
    """The part of :class:`byol_deploy.formats.Format` that many formats answer alike: float32 on the CPU, no more."""

    name = ""
    precisions: tuple[str, ...] = ("fp32",)
    keeps_tensors = False
    shows_layers = False
    can_wait_idly = False
    can_fix_batches = False
    optimizations: tuple[str, ...] = ()

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`."""
        raise ExportError(f"there is no {precision} in the format {self.name}; it has {', '.join(self.precisions)}")

    def runs_here(self) -> str:
        """See :meth:`byol_deploy.formats.Format.runs_here`."""
        return ""

    def providers(self) -> tuple[str, ...]:
        """See :meth:`byol_deploy.formats.Format.providers`."""
        return ("cpu",)

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`: the runtime's own layout of the weights tells nothing."""
        return {}

    def layers(
        self, path: Path, options: RunOptions, calls: Sequence[Call], slots: Sequence[np.ndarray], images: np.ndarray
    ) -> LayeredFile:
        """See :meth:`byol_deploy.formats.Format.layers`.

        Raises:
            BundleError: Always: this format does not show its layers.
        """
        raise BundleError(f"{path.name}: the format {self.name} does not show its layers; explain the ONNX file")
