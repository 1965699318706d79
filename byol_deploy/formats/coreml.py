"""Core ML, for iPhones, iPads and Macs (iOS 15, macOS 12 and later): an ML program ``.mlpackage``, in a zip archive.

A package is a folder, and a model file is one file here, so ``model.mlpackage.zip`` holds it, without compression.
``unzip model.mlpackage.zip`` gives ``model.mlpackage`` for Xcode, and in Python on a Mac::

    model = coremltools.models.MLModel("model.mlpackage")
    embedding = model.predict({"images": Image.open("x.png").convert("RGB").resize((224, 224))})["embedding"]

The input is an RGB image of the model's size (in Swift a ``CVPixelBuffer``, straight from the camera), which Core ML
turns into numbers 0 to 255; all normalisation is inside the model. One image a call: an ``MLArrayBatchProvider``, or a
list in Python, makes a batch. Beside ``fp32`` there is ``fp16``: the Neural Engine computes nothing else.

**Core ML predicts only on macOS.** On other machines a file is converted and checked as far as that goes, and not run:
:meth:`_CoreMl.runs_here` says so. The check computes the written file from what its operators are documented to do
(``_coreml_evaluate``) and compares ports and numbers; a file that fails is not written.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature
from byol_deploy.formats._coreml_convert import convert, quiet
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.images import printable
from byol_deploy.quantization import Calibration, Reducer

CHECKED = "byol_deploy.checked"
"""Key of the text that says how far a file could be checked where it was written."""

_UNITS = {"cpu": "CPU_ONLY", "auto": "ALL", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
_DATE = (1980, 1, 1, 0, 0, 0)
_FILE_MODE = 0o100644 << 16


class _CoreMl(SidecarFormat):
    name = "coreml"
    suffix = ".mlpackage.zip"
    extra = "coreml"
    requires = ("coremltools", "torch")
    runs_with = ("coremltools",)
    # Where the file cannot be run, Encoder must take another file of the bundle.
    opens_in_encoder = False
    precisions = ("fp32", "fp16")

    def runs_here(self) -> str:
        """Why a file of this format cannot be run on this machine; empty where it can."""
        return "" if sys.platform == "darwin" else "Core ML predicts only on macOS; built here, not run here"

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        return self.write(graph, signature, "fp32", path, carried)

    def write(
        self, graph: Any, signature: Signature, precision: str, path: Path, carried: Mapping[str, str]
    ) -> tuple[Path, ...]:
        """Convert, check and pack a graph, and write its texts."""
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / path.name.removesuffix(".zip")
            checked = convert(graph, signature, precision, package)
            _pack(package, path)
        return self.finish(path, {**carried, CHECKED: checked})

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`. Nothing is calibrated, and no layer is kept apart."""
        if precision not in self.precisions[1:]:
            raise ExportError(f"there is no {precision} in this format; it has {', '.join(self.precisions)}")
        return _Half(self, graph, signature)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`. On the CPU, or for provider "auto" wherever Core ML likes."""
        self.carried(path)
        with _package(path) as content:
            names = content.namelist()
        reason = self.runs_here()
        if reason:
            raise ProviderError(f"{printable(path.name)}: {reason}; copy it to a Mac and verify it there")
        if options.provider not in _UNITS:
            raise ProviderError(f"Core ML runs on {', '.join(_UNITS)}, not on {options.provider!r}; choose one of them")
        from PIL import Image

        with quiet():
            import coremltools

        folder = Path(tempfile.mkdtemp())
        with _package(path) as content:
            content.extractall(folder, names)
        package = folder / names[0].split("/")[0]
        try:
            model = coremltools.models.MLModel(
                str(package), compute_units=coremltools.ComputeUnit[_UNITS[options.provider]]
            )
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise BundleError(f"{printable(path.name)} cannot be opened by Core ML: {str(error)[:300]}") from error
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        described = model.get_spec().description
        outputs = tuple(Port(port.name, "float32", (None, None)) for port in described.output)
        size = described.input[0].type.imageType
        lock = threading.Lock()  # a model serves one caller at a time

        def compute(images: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
            pictures = [{described.input[0].name: Image.fromarray(pixels)} for pixels in np.ascontiguousarray(images)]
            with lock:
                rows = model.predict(pictures)
            wanted = [port.name for port in outputs] if names is None else names
            return {name: np.concatenate([row[name] for row in rows]).astype(np.float32) for name in wanted}

        taken = Port(described.input[0].name, "uint8", (None, size.height, size.width, 3))
        return Opened(compute, outputs, (taken,), options.provider, model)


class _Half:
    methods: tuple[str, ...] = ("",)
    layers: tuple[str, ...] = ()

    def __init__(self, format: _CoreMl, graph: Any, signature: Signature) -> None:
        self._format, self._graph, self._signature = format, graph, signature

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.quantization.Reducer.write`."""
        return self._format.write(self._graph, self._signature, "fp16", path, carried)


def _pack(package: Path, path: Path) -> None:
    """A folder as a zip archive: sorted, stored, without dates, so that equal packages give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for item in sorted(package.rglob("*")):
            if item.is_file():
                entry = zipfile.ZipInfo(f"{package.name}/{item.relative_to(package).as_posix()}", _DATE)
                entry.external_attr = _FILE_MODE
                archive.writestr(entry, item.read_bytes())


def _package(path: Path) -> zipfile.ZipFile:
    """A written archive, of which every name lies in one folder ``*.mlpackage``."""
    again = f"{printable(path)} is not a zip archive of an .mlpackage, or is damaged; copy or export it again"
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise BundleError(again) from error
    names = archive.namelist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())  # no more than it weighs
    roots = {name.split("/")[0] for name in names}
    plain = all(".." not in name.split("/") and "\\" not in name and not name.startswith("/") for name in names)
    if not (len(roots) == 1 and next(iter(roots)).endswith(".mlpackage") and plain and stored):
        archive.close()
        raise BundleError(again)
    return archive


FORMAT = _CoreMl()
