"""What the formats share whose files are PyTorch's archives of a graph (``.pt2`` and its kind), with texts inside.

They are laid out like TorchScript files, texts under ``extra/``, and so :mod:`_torchscript_file` reads and seals both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import RunOptions, Signature, _torchscript_file
from byol_deploy.formats._layers import Call, LayeredFile
from byol_deploy.quantization import Calibration, Reducer


class ArchiveFormat:
    """The part of :class:`byol_deploy.formats.Format` that is the same for all formats of this kind.

    A subclass has its names, :attr:`kind`, ``export`` and ``load``.
    """

    name = ""
    suffix = ""
    kind = ""
    """How messages call such a file, with its article."""
    extra = "train"
    requires: tuple[str, ...] = ("torch",)
    runs_with: tuple[str, ...] = ("torch",)
    opens_in_encoder = False
    precisions: tuple[str, ...] = ("fp32",)
    keeps_tensors = False
    shows_layers = False
    optimizations: tuple[str, ...] = ()

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`."""
        raise ExportError(f"there is no {precision} in the format {self.name}; it has {', '.join(self.precisions)}")

    def providers(self) -> tuple[str, ...]:
        """See :meth:`byol_deploy.formats.Format.providers`."""
        return ("cpu",)

    def runs_here(self) -> str:
        """See :meth:`byol_deploy.formats.Format.runs_here`."""
        return ""

    def check_provider(self, options: RunOptions) -> None:
        """Refuse another provider than those of :meth:`providers`."""
        if options.provider.lower() not in ("cpu", "auto"):
            raise ProviderError(f"{self.suffix} files are run on cpu here, not on {options.provider!r}; use cpu")

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`."""
        return {}

    def layers(
        self, path: Path, options: RunOptions, calls: Sequence[Call], slots: Sequence[np.ndarray], images: np.ndarray
    ) -> LayeredFile:
        """See :meth:`byol_deploy.formats.Format.layers`.

        Raises:
            BundleError: Always: this format does not show its layers.
        """
        raise BundleError(f"{path.name}: the format {self.name} does not show its layers; explain the ONNX file")

    def carried(self, path: Path) -> dict[str, str]:
        """See :meth:`byol_deploy.formats.Format.carried`. The file is a zip archive: PyTorch is not needed."""
        with self._named():
            return _torchscript_file.texts(path)

    def content_hash(self, path: Path) -> str:
        """See :meth:`byol_deploy.formats.Format.content_hash`. PyTorch is not needed."""
        with self._named():
            return _torchscript_file.content_hash(path)

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """See :meth:`byol_deploy.formats.Format.seal`."""
        with self._named():
            _torchscript_file.add_texts(path, texts)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BundleError as error:
            raise BundleError(str(error).replace("a TorchScript file", self.kind)) from error
