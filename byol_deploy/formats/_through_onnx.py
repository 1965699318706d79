"""Formats that are made from ONNX files: the float32 one, and what the ONNX reducer writes, converted."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from byol_deploy import formats
from byol_deploy.formats import Signature
from byol_deploy.quantization import Calibration

Convert = Callable[[Path, Path, Mapping[str, str]], tuple[Path, ...]]
"""An ONNX file, the main file to write, and its texts, to the files that belong to it."""


@contextlib.contextmanager
def as_onnx(graph: Any, signature: Signature) -> Iterator[Path]:
    """The graph as a float32 ONNX file without texts, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        formats.get("onnx").export(graph, signature, source, {})
        yield source


class ThroughOnnx:
    """A :class:`byol_deploy.quantization.Reducer`. Its float32 ONNX file is exported once and goes with this object."""

    def __init__(
        self, graph: Any, signature: Signature, precision: str, calibration: Calibration, convert: Convert
    ) -> None:
        onnx = formats.get("onnx")
        self._convert = convert
        self._root = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        full = self._root / "full.onnx"
        onnx.export(graph, signature, full, {})
        self._inner = onnx.reducer(graph, signature, full, precision, calibration)
        self.methods, self.layers = self._inner.methods, self._inner.layers

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.quantization.Reducer.write`."""
        source = self._root / "reduced.onnx"
        self._inner.write(source, {}, method, kept)
        return self._convert(source, path, carried)
