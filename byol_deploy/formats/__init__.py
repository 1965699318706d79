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

from byol_deploy.errors import BundleError, UsageError, require_packages
from byol_deploy.formats._layers import Call, LayeredFile
from byol_deploy.images import printable
from byol_deploy.quantization import Calibration, Reducer

Run: TypeAlias = Callable[[np.ndarray], dict[str, np.ndarray]]
"""(N, H, W, 3) uint8 to output name → (N, D) float32, for any N."""


@dataclass(frozen=True)
class Port:
    """An input or output as a file declares it.

    Attributes:
        name: Its name.
        dtype: NumPy's name of the type, e.g. "uint8", "float32".
        shape: Its sizes; None for those that the file leaves open.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Opened:
    """A written file in a fresh session. Called with (N, H, W, 3) uint8 it gives output name → (N, D) float32.

    Attributes:
        compute: Images, and names of outputs or None for all, to arrays by name.
        outputs: What the file gives, in order, also what ``RunOptions.outputs`` leaves out; empty where the format does
            not declare it.
        inputs: What it takes; empty where the format does not declare it.
        provider: Where it runs, in the runtime's own words, e.g. "CPUExecutionProvider".
        session: The runtime's own object, for those who need it.
    """

    compute: Callable[[np.ndarray, Sequence[str] | None], dict[str, np.ndarray]]
    outputs: tuple[Port, ...] = ()
    inputs: tuple[Port, ...] = ()
    provider: str = "cpu"
    session: Any = None

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs, (N, D) float32 by name, for images (N, H, W, 3) uint8."""
        return self.compute(images, None)


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
        outputs: The only outputs that will be asked for, so that the others need not be computed; None is all.
        allow_spinning: Whether idle threads wait busily, where the runtime knows that choice.
        batches: Numbers of images that come often: where the runtime can, it is prepared for each of them, at the
            first call with it. All other numbers work as before.
        streams: Parts of such a batch that run side by side, each on its share of the threads, where they divide it.
    """

    provider: str = "cpu"
    threads: int | None = None
    optimization: str | None = None
    outputs: tuple[str, ...] | None = None
    allow_spinning: bool = True
    batches: tuple[int, ...] = ()
    streams: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no number of images or of parts."""
        for name, value in (*(("batches", size) for size in self.batches), ("streams", self.streams)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: {value!r} is no whole number from 1; use e.g. batches (1, 32) and 2 streams")


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
    precisions: tuple[str, ...]
    """What it can write: "fp32" first, then those that :meth:`reducer` makes."""
    keeps_tensors: bool
    """Whether a float32 file holds the trained tensors bit for bit under their own names."""
    shows_layers: bool
    """Whether :meth:`layers` can look inside a file."""
    can_wait_idly: bool
    """Whether its runtime can be told that idle threads shall not wait busily, see :class:`RunOptions`."""
    can_fix_batches: bool
    """Whether its runtime can be prepared for numbers of images, see :class:`RunOptions`."""
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

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """Prepare files of reduced precision.

        Args:
            graph: As in :meth:`export`.
            signature: Shapes and names.
            full: A float32 file of this format, written from the same graph. Read, never changed.
            precision: One of :attr:`precisions`, not "fp32".
            calibration: Images, and the processor that the file is for.

        Raises:
            ExportError: The format cannot express this graph at this precision; one sentence.
            MissingExtraError: The quantiser is not installed.
        """

    def load(self, path: Path, options: RunOptions) -> Opened:
        """Open a written file in a fresh session.

        Raises:
            BundleError: It is damaged, or not of this format.
            ProviderError: The provider is not there.
        """

    def providers(self) -> tuple[str, ...]:
        """Where its runtime really works on this machine, as in ``RunOptions.provider``; the default comes first."""

    def runs_here(self) -> str:
        """Why a written file cannot run on this machine, whatever is installed; empty when it can."""

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """Every tensor stored in a written file, by its name in the file; empty where the format cannot tell."""

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


def of_lone_file(path: Path) -> Format:
    """The format of a file that is there and has the ending of one.

    Raises:
        BundleError: It is not there, or has another ending.
    """
    shown = printable(path)
    if not path.is_file():
        raise BundleError(f"{shown} does not exist; pass a bundle or a file that byol-deploy export wrote")
    found = of_file(path)
    if found is None:
        endings = ", ".join(get(name).suffix for name in available())
        raise BundleError(f"{shown} is neither a bundle nor a file that ends in {endings}")
    return found


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
