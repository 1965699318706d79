"""What the formats share whose files are PyTorch's archives of a graph (``.pt2`` and its kind), with texts inside.

They are laid out like TorchScript files, texts under ``extra/``, and so :mod:`_torchscript_file` reads and seals both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from byol_deploy.errors import ProviderError
from byol_deploy.formats import RunOptions, _torchscript_file
from byol_deploy.formats._defaults import Defaults


class ArchiveFormat(Defaults):
    """The part of :class:`byol_deploy.formats.Format` that is the same for all formats of this kind.

    A subclass has its names, :attr:`kind`, ``export`` and ``load``.
    """

    suffix = ""
    kind = ""
    """How messages call such a file, with its article."""
    extra = "train"
    requires: tuple[str, ...] = ("torch",)
    runs_with: tuple[str, ...] = ("torch",)
    opens_in_encoder = False

    def check_provider(self, options: RunOptions) -> None:
        """Refuse another provider than those of :meth:`providers`."""
        if options.provider.lower() not in ("cpu", "auto"):
            raise ProviderError(f"{self.suffix} files are run on cpu here, not on {options.provider!r}; use cpu")

    def carried(self, path: Path) -> dict[str, str]:
        """See :meth:`byol_deploy.formats.Format.carried`. The file is a zip archive: PyTorch is not needed."""
        return _torchscript_file.texts(path, self.kind)

    def content_hash(self, path: Path) -> str:
        """See :meth:`byol_deploy.formats.Format.content_hash`. PyTorch is not needed."""
        return _torchscript_file.content_hash(path, self.kind)

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """See :meth:`byol_deploy.formats.Format.seal`."""
        _torchscript_file.add_texts(path, texts, self.kind)
