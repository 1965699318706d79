"""Every error that byol-deploy raises on purpose, and the exit code that each one carries.

::

    ByolDeployError
    ├── UsageError               exit 2   wrong usage: an option, key or name that does not exist
    ├── InputError               exit 3   bad input
    │   ├── DataError                     a folder or an image
    │   ├── RecipeError                   a training recipe
    │   ├── CheckpointError               a checkpoint
    │   ├── BundleError                   an exported model: a bundle or a lone file
    │   └── OutputError                   a place that cannot be written, or is taken
    ├── ExportError              exit 4   an exporter could not write its file
    ├── ParityError              exit 5   a written file differs from the trained model
    └── MissingError             exit 6   the environment lacks something
        ├── MissingExtraError             a package: says which extra brings it
        └── ProviderError                 an execution provider or a device

A message states the value, the expectation and the next step. These errors are the user's to mend and print
without a trace; any other exception is our own bug, keeps its trace and exits with 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec


class ByolDeployError(Exception):
    """Root of the tree. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UsageError(ByolDeployError):
    """An option, a key or a name that does not exist, or two that exclude each other."""

    exit_code = 2


class InputError(ByolDeployError):
    """Input that cannot be used as it is."""

    exit_code = 3


class DataError(InputError):
    """A folder without images, an image that cannot be decoded, too many bad images."""


class RecipeError(InputError):
    """A recipe with faults. ``faults`` lists all of them; the message shows all of them."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


class CheckpointError(InputError):
    """A checkpoint that is absent, not a checkpoint, unsafe to load, or of another model."""


class BundleError(InputError):
    """A bundle or a lone model file that is absent, damaged, foreign, or from a newer schema."""


class OutputError(InputError):
    """The output cannot be written: read-only, full, or already there."""


class ExportError(ByolDeployError):
    """An exporter could not write its file. Nothing was published."""

    exit_code = 4


class ParityError(ByolDeployError):
    """A written file differs from the trained model. Nothing was published; an older bundle stays."""

    exit_code = 5


class MissingError(ByolDeployError):
    """The environment lacks something that was asked for."""

    exit_code = 6


class MissingExtraError(MissingError):
    """A package that an optional part needs is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{what} needs the package {package}, which is not installed; run: pip install 'byol-deploy[{extra}]'"
        )


class ProviderError(MissingError):
    """The execution provider or device that was asked for is not the one that would run."""


def require_packages(what: str, extra: str, *packages: str) -> None:
    """Check that ``packages`` can be imported, without importing them.

    Raises:
        MissingExtraError: Names the first one that is absent and the ``extra`` that brings it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(what, package, extra)
