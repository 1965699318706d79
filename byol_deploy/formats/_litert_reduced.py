"""LiteRT files in int8, by ai-edge-quantizer: weights in 8 bits per channel; activations in 8 bits, calibrated or not.

``dynamic`` takes the scale of a layer's activations from each input while the file runs, ``calibrated`` measures it on
images before. What lies between the layers stays float32: the mean over an image, in 8 bits, costs more than all layers
together.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_deploy.errors import ExportError
from byol_deploy.formats._own_environment import call
from byol_deploy.quantization import Calibration, Reducer

if TYPE_CHECKING:
    from byol_deploy.formats.litert import _LiteRt

_RECIPES = {"dynamic": "dynamic_wi8_afp32", "calibrated": "static_wi8_ai8"}
# "timm.models.resnet.BasicBlock_0": the class of a module and its name in the one around it.
_CLASS = re.compile(r"^(?:[\w<>]+\.)*[A-Za-z0-9]+_(?=\w)")


def reducer(format: _LiteRt, full: Path, calibration: Calibration) -> Reducer:
    """See :meth:`byol_deploy.formats.Format.reducer`."""
    return _Int8(format, full, calibration)


class _Int8:
    methods: tuple[str, ...] = tuple(_RECIPES)

    def __init__(self, format: _LiteRt, full: Path, calibration: Calibration) -> None:
        self._format, self._full, self._images = format, full, calibration.images
        found = self._ask({"task": "layers"})["layers"]
        if not found:
            raise ExportError("ai-edge-quantizer finds no layers with weights in this graph")
        self._scopes: dict[str, str] = {}
        for layer in found:
            name = _readable(layer["scope"], layer["kind"])
            count = sum(other == name or other.startswith(f"{name} #") for other in self._scopes)
            self._scopes[f"{name} #{count + 1}" if count else name] = layer["scope"]
        self.layers = tuple(self._scopes)

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        if set(self.layers) <= set(kept):  # which the quantiser refuses, as nothing is left to calibrate
            path.write_bytes(self._full.read_bytes())
            return self._format.finish(path, carried)
        with tempfile.TemporaryDirectory() as folder:
            images, target = Path(folder) / "images.npy", Path(folder) / "model.tflite"
            np.save(images, self._images)
            self._ask(
                {
                    "task": "quantize",
                    "target": str(target),
                    "images": str(images),
                    "recipe": _RECIPES[method],
                    "kept": [self._scopes[name] for name in self.layers if name in set(kept)],
                }
            )
            path.write_bytes(target.read_bytes())
        return self._format.finish(path, carried)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        from byol_deploy.formats.litert import ENVIRONMENT, WORKER

        try:
            return call(ENVIRONMENT, WORKER, {"source": str(self._full.absolute()), **request})
        except ExportError as error:
            raise ExportError(f"ai-edge-quantizer cannot take this file: {error}") from error


def _readable(scope: str, kind: str) -> str:
    """``a.Encoder_encoder/b.Conv2d_conv1;3;`` as ``conv1/CONV_2D``: the module path without classes."""
    first = next((part for part in scope.split(";") if "/" in part), "")
    steps = [_CLASS.sub("", step, count=1) for step in first.split("/")[2:]]
    return "/".join([*steps, kind])
