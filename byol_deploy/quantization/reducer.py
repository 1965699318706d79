"""What a format offers to the search: files of one reduced precision, as many as it asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a quantiser is told.

    Attributes:
        images: (N, H, W, 3) uint8 as the graph takes them: on these the ranges of activations are measured.
        target: One of :data:`TARGETS`, the processor that the file is for.
    """

    images: np.ndarray
    target: str


class Reducer(Protocol):
    """Writes files of one reduced precision from one float32 encoder, as often as :func:`search` asks."""

    methods: tuple[str, ...]
    """Calibration methods, each worth a try; one empty name where nothing is calibrated."""
    layers: tuple[str, ...]
    """Names of the layers that can be kept in float32, in the order of the graph; empty where none can."""

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        """Write a file.

        Args:
            path: Its main file; one that is there is replaced.
            carried: Texts that it must carry, see :meth:`byol_deploy.formats.Format.export`.
            method: One of :attr:`methods`.
            kept: Those of :attr:`layers` that stay in float32.

        Returns:
            Further files beside ``path`` that belong to it.

        Raises:
            ExportError: The quantiser failed.
        """
