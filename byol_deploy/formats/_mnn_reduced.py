"""MNN files in int8: weights in 8 bits per output channel, activations brought to 8 bits while the file runs.

MNN's calibrating quantiser is not used. Of its three methods in version 3.6.1 KL ends the process, EMA and ADMM give
files that are another function, on every encoder that was tried. What its converter does to weights alone is sound,
and the runtime takes the scale of activations from each input.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byol_deploy.errors import ExportError
from byol_deploy.formats.mnn import convert
from byol_deploy.quantization import Reducer

if TYPE_CHECKING:
    from byol_deploy.formats.mnn import _Mnn

_METHODS = {"symmetric weights": False, "asymmetric weights": True}


def reducer(format: _Mnn, full: Path) -> Reducer:
    """See :meth:`byol_deploy.formats.Format.reducer`."""
    return _Int8(format, full)


class _Int8:
    methods: tuple[str, ...] = tuple(_METHODS)

    def __init__(self, format: _Mnn, full: Path) -> None:
        self._format, self._full = format, full
        with tempfile.TemporaryDirectory() as folder:
            plan = Path(folder) / "plan.json"
            # The converter writes down what it does where there is no plan yet.
            convert(full, Path(folder) / "model.mnn", "int8", "--weightQuantBits", "8", "--compressionParamsFile",
                    str(plan))  # fmt: skip
            self._plan: dict[str, Any] = json.loads(plan.read_text(encoding="utf-8"))
        try:
            (algorithm,) = self._plan["algo"]
            self._layers: list[dict[str, Any]] = algorithm["quantParams"]["layer"]
            self.layers = tuple(str(layer["opName"]) for layer in self._layers)
        except (KeyError, TypeError, ValueError) as error:
            raise ExportError("this version of MNN plans its weights otherwise; use MNN 3.6") from error
        if not self.layers:
            raise ExportError("MNN finds no weights in this graph that it can bring to 8 bits")

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        plan = json.loads(json.dumps(self._plan))
        # A layer that no plan names stays in float32.
        plan["algo"][0]["quantParams"]["layer"] = [
            {**layer, "weight": [{**weight, "asymmetric": _METHODS[method]} for weight in layer["weight"]]}
            for layer in self._layers
            if layer["opName"] not in set(kept)
        ]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            file.write_text(json.dumps(plan), encoding="utf-8")
            convert(self._full, path, "int8", "--compressionParamsFile", str(file))
        return self._format.finish(path, carried)
