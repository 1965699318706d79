"""What formats share whose files cannot carry texts: a small JSON file beside the main one carries them.

``model.openvino.xml`` has ``model.openvino.xml.byol.json`` beside it, with the texts (manifest, golden cases, seal) and
the names of the other files that belong to the model, such as its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from byol_deploy.errors import BundleError
from byol_deploy.formats._defaults import Defaults
from byol_deploy.images import printable
from byol_deploy.strict_json import is_plain_path

_SUFFIX = ".byol.json"
_MAX_BYTES = 128 << 20
_MAX_FILES = 64


class SidecarFormat(Defaults):
    """The part of :class:`byol_deploy.formats.Format` that is the same for all formats of this kind.

    A subclass has its names, ``export`` (which ends with :meth:`finish`), ``load`` (which begins with :meth:`carried`,
    so that a file that is none of ours or incomplete is refused), and, where it writes other precisions, ``reducer``.
    """

    def finish(self, path: Path, carried: Mapping[str, str], companions: Sequence[Path] = ()) -> tuple[Path, ...]:
        """Write the texts beside a written file.

        Args:
            path: The main file.
            carried: The texts.
            companions: Other files beside ``path`` that the model needs.

        Returns:
            All files beside ``path`` that belong to it, as ``export`` must return them.
        """
        sidecar = _sidecar(path)
        _write(sidecar, [item.name for item in companions], carried)
        return (*companions, sidecar)

    def carried(self, path: Path) -> dict[str, str]:
        """See :meth:`byol_deploy.formats.Format.carried`."""
        return _read(path)[1]

    def content_hash(self, path: Path) -> str:
        """See :meth:`byol_deploy.formats.Format.content_hash`: name, size and bytes of every file but the sidecar."""
        names, _ = _read(path)
        digest = hashlib.sha256()
        for name in sorted(names):
            content = _hash(path.with_name(name), printable(path))
            digest.update(f"{name.removeprefix(path.name.split('.')[0])}\0{content}\n".encode())
        digest.update(_hash(path, printable(path)).encode())
        return f"sha256:{digest.hexdigest()}"

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """See :meth:`byol_deploy.formats.Format.seal`."""
        names, known = _read(path)
        twice = sorted(set(texts) & set(known))
        if twice:
            raise ValueError(f"{path.name} carries {', '.join(twice)} already")
        _write(_sidecar(path), names, {**known, **texts})


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + _SUFFIX)


def _write(sidecar: Path, names: Sequence[str], texts: Mapping[str, str]) -> None:
    document = {"files": list(names), "texts": dict(texts)}
    sidecar.write_text(json.dumps(document, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def _read(path: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the companions, which are there, and the texts."""
    sidecar, shown = _sidecar(path), printable(path)
    try:
        with open(sidecar, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if not path.stat().st_size:
            raise BundleError(f"{shown} is empty; copy or export it again")
    except FileNotFoundError:
        raise BundleError(
            f"{shown} has no {printable(sidecar.name)} beside it, in which its contract lies; copy all files of the "
            "export into the same folder"
        ) from None
    except OSError as error:
        raise BundleError(f"{printable(sidecar)} cannot be read: {error.strerror}") from error
    again = f"{printable(sidecar)} is damaged; copy or export it again"
    if len(content) > _MAX_BYTES:
        raise BundleError(again)
    try:
        text = content.decode("utf-8")
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleError(again) from None
    names, texts = (data.get("files"), data.get("texts")) if isinstance(data, dict) else (None, None)
    if not (isinstance(names, list) and len(names) <= _MAX_FILES and all(isinstance(name, str) for name in names)):
        raise BundleError(again)
    if not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
        raise BundleError(again)
    # Byte for byte as it was written: a changed space between the values shows too.
    if json.dumps({"files": names, "texts": texts}, indent=1, ensure_ascii=True) + "\n" != text:
        raise BundleError(again)
    for name in names:
        if not is_plain_path(name) or "/" in name or path.with_name(name).is_symlink():
            raise BundleError(f"{shown} names the file {name!r}, which leaves its folder; do not use this file")
        if not path.with_name(name).is_file():
            raise BundleError(f"{shown} needs {printable(name)}, which is missing beside it; copy that file too")
    return names, texts


def _hash(path: Path, shown: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{shown}: {printable(path.name)} cannot be read: {error.strerror}") from error
