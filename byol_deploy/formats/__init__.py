"""Export formats, one file each.

To add one: write ``byol_deploy/formats/<name>.py`` with an object ``FORMAT`` that has what :class:`Format` lists, and
import the format's own packages inside its functions. It is found by its file name; nothing else has to be edited, and
the conformance test (tests/formats/test_conformance.py) picks it up.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from byol_deploy.errors import UsageError, require_packages
from byol_deploy.formats._layers import Call, LayeredFile

Run: TypeAlias = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(N, H, W, 3) uint8 to output name → (N, D) float32, for any N."""


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives.

    Attributes:
        size_px: H and W of the input ``images`` (N, H, W, 3) uint8; N is dynamic.
        outputs: Names of the outputs, in the order of the graph, each (N, D) float32.
        opset: ONNX operator set; None is the format's own choice. Formats without operator sets ignore it.
    """

    size_px: int
    outputs: tuple[str, ...]
    opset: int | None = None


@dataclass(frozen=True)
class RunOptions:
    """How a written file is run.

    Attributes:
        provider: ``cpu``, ``cuda``, ``auto``, or a name that the format's runtime knows.
        threads: Number of threads; None is the runtime's default.
        optimization: Graph optimisation, one of the format's ``optimizations``; None is the runtime's default.
    """

    provider: str = "cpu"
    threads: int | None = None
    optimization: str | None = None


class Format(Protocol):
    """What a format must offer."""

    name: str
    """As in ``--format``; equals the file's name."""
    suffix: str
    """Of its main file, such as ``.onnx``."""
    extra: str
    """The extra of byol-deploy that brings its packages."""
    requires: tuple[str, ...]
    """Packages that an export needs."""
    runs_with: tuple[str, ...]
    """Packages that running a written file needs."""
    opens_in_encoder: bool
    """Whether :class:`byol_deploy.Encoder` opens it."""
    optimizations: tuple[str, ...]
    """Levels of graph optimisation that its runtime offers beside the default; what it computes must not depend on
    them."""

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """Write ``graph`` (a torch module in evaluation mode) to ``path``.

        Args:
            graph: Takes (N, H, W, 3) uint8, gives a tuple in the order of ``signature.outputs``.
            signature: Shapes and names.
            path: The main file.
            carried: Texts by key that the file must carry, see :meth:`carried`.

        Returns:
            Further files beside ``path`` that belong to it.

        Raises:
            ExportError: The format cannot express this graph; one sentence.
        """

    def load(self, path: Path, options: RunOptions) -> Run:
        """Open a written file in a fresh session.

        Raises:
            BundleError: It is damaged, or not of this format.
            ProviderError: The provider is not there.
        """

    def providers(self) -> tuple[str, ...]:
        """Where its runtime really works on this machine, as in ``RunOptions.provider``; the default comes first."""

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """Every tensor stored in a written file, by its name in the file."""

    def carried(self, path: Path) -> dict[str, str]:
        """The texts that a written file carries; empty for a foreign one. Needs ``runs_with`` at most.

        Raises:
            BundleError: It is damaged, or not of this format.
        """

    def layers(
        self, path: Path, options: RunOptions, calls: Sequence[Call], slots: Sequence[np.ndarray], images: np.ndarray
    ) -> LayeredFile:
        """Open a written file so that its values inside can be read, and find which is which.

        Args:
            path: The file.
            options: How it is run.
            calls: The calls of the trained model's modules.
            slots: The tensors that these took and gave for ``images``.
            images: (1, H, W, 3) uint8. The file is run on it, to learn its shapes.

        Raises:
            BundleError: It is damaged, not of this format, or cannot be run.
            ProviderError: The provider is not there.
        """

    def content_hash(self, path: Path) -> str:
        """A hash over a written file and the files that belong to it, the carried texts left out.

        Texts can be added (:meth:`seal`) after the hash is known. Together with hashes of the texts it covers every
        byte of the file. Needs none of the format's packages.

        Returns:
            ``sha256:`` and 64 hexadecimal digits.

        Raises:
            BundleError: It is damaged, not of this format, or a file that belongs to it is missing.
        """

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """Add carried texts to a written file and change nothing else: its :meth:`content_hash` stays the same.

        Raises:
            ValueError: A key is carried already.
            BundleError: It is damaged, or not of this format.
        """


def available() -> tuple[str, ...]:
    """The names of all formats, installed or not."""
    return tuple(sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_")))


def get(name: str) -> Format:
    """The format called ``name``. Imports none of its packages.

    Raises:
        UsageError: There is none.
    """
    names = available()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"format {name!r} does not exist{meant}; choose from {', '.join(names)}")
    found: Format = import_module(f"{__name__}.{name}").FORMAT
    return found


def of_file(path: str | os.PathLike[str]) -> Format | None:
    """The format that a file's name says, or None."""
    for name in available():
        if os.fspath(path).endswith(get(name).suffix):
            return get(name)
    return None


def require(format: Format) -> None:
    """Check that ``format`` can be exported here.

    Raises:
        MissingExtraError: A package is absent; the message names the extra that brings it.
    """
    require_packages(f"the format {format.name}", format.extra, *format.requires)


def missing_to_run(format: Format) -> str:
    """The first package that running ``format`` needs and that is not installed; empty when all are there."""
    return next((package for package in format.runs_with if not _installed(package)), "")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a name that was blocked in sys.modules
        return False
