"""The on-disk contract of an exported model: manifest, golden cases, hashes, atomic publishing.

A bundle is a folder::

    manifest.json       see :class:`Manifest`
    model.onnx ...      the artefacts that the manifest lists, each with its sha256
    golden.npz          a few real images (uint8) and what the trained model gives for them
    report.html         for a person

A lone ONNX or TorchScript file carries the manifest (without the list of artefacts) and the golden cases in its
metadata: :func:`carry` and :func:`read_carried`; and, once it is sealed, a hash over everything in it, see
:mod:`byol_deploy.sealing`. Everything read here is data from a stranger: sizes are limited, no path leaves the folder,
every hash is checked first, and nothing that is read can execute code.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from byol_deploy.atomic import publish_folder
from byol_deploy.errors import BundleError, OutputError
from byol_deploy.golden import MAX_GOLDEN_BYTES, Golden, golden_from_bytes, golden_to_bytes
from byol_deploy.images import printable
from byol_deploy.manifest import (
    SCHEMA,
    Artefact,
    ExtraFile,
    GoldenFile,
    InputContract,
    Manifest,
    ModelInfo,
    Output,
)
from byol_deploy.sealing import (
    CARRIED_ARTEFACT_KEY,
    CARRIED_GOLDEN_KEY,
    CARRIED_MANIFEST_KEY,
    PROMISE,
    CarriedArtefact,
    read_artefact,
    seal_artefact,
)
from byol_deploy.strict_json import is_plain_path

__all__ = [
    "CARRIED_ARTEFACT_KEY",
    "CARRIED_GOLDEN_KEY",
    "CARRIED_MANIFEST_KEY",
    "MAX_GOLDEN_BYTES",
    "SCHEMA",
    "Artefact",
    "Bundle",
    "CarriedArtefact",
    "ExtraFile",
    "Golden",
    "GoldenFile",
    "InputContract",
    "Manifest",
    "ModelInfo",
    "Output",
    "carry",
    "golden_from_bytes",
    "golden_to_bytes",
    "parameter_hash",
    "publish",
    "read_artefact",
    "read_carried",
    "seal_artefact",
    "sha256_file",
]

MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"
REPORT_FILE = "report.html"

MAX_MANIFEST_BYTES = 16 << 20
_EXPORT_AGAIN = "export it again with: byol-deploy export CHECKPOINT"


def carry(manifest: Manifest, golden: Golden, *, sealed: bool = False) -> dict[str, str]:
    """The metadata that makes a lone model file a complete, self-testing encoder.

    Args:
        manifest: Its artefacts are left out: a file cannot carry its own hash.
        golden: The golden cases, packed inside.
        sealed: Promise that the file will carry a seal too (:func:`seal_artefact`). A file that promises one and
            carries none is refused, so that a seal cannot get lost unnoticed.

    Returns:
        Text by key, for ONNX ``metadata_props`` and TorchScript extra files.
    """
    packed = golden_to_bytes(golden)
    entry = GoldenFile(file=GOLDEN_FILE, sha256=_sha256(packed), count=len(golden.images))
    text = manifest.carried(entry).to_json()
    if sealed:
        text = json.dumps(json.loads(text) | {PROMISE: True}, indent=1) + "\n"
    return {CARRIED_MANIFEST_KEY: text, CARRIED_GOLDEN_KEY: base64.b64encode(packed).decode("ascii")}


def read_carried(metadata: Mapping[str, str], name: str = "the file") -> tuple[Manifest, Golden]:
    """Read what :func:`carry` made.

    Args:
        metadata: The file's metadata.
        name: How messages call the file.

    Raises:
        BundleError: The metadata is absent ("not a byol-deploy file"), damaged, or from a newer schema.
    """
    if CARRIED_MANIFEST_KEY not in metadata or CARRIED_GOLDEN_KEY not in metadata:
        raise BundleError(
            f"{name} is not a byol-deploy file: it carries no preprocessing contract and no golden cases "
            f"(metadata {CARRIED_MANIFEST_KEY}); pass a bundle or a file that byol-deploy export wrote"
        )
    text, packed = metadata[CARRIED_MANIFEST_KEY], metadata[CARRIED_GOLDEN_KEY]
    if len(text) > MAX_MANIFEST_BYTES or len(packed) > MAX_GOLDEN_BYTES * 4 // 3 + 4:
        raise BundleError(f"{name} carries metadata beyond the size limits; {_EXPORT_AGAIN}")
    manifest = Manifest.from_json(text, f"the manifest in {name}")
    try:
        data = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BundleError(f"the golden cases in {name} are damaged: {error}; {_EXPORT_AGAIN}") from error
    if manifest.golden is not None and _sha256(data) != manifest.golden.sha256:
        raise BundleError(f"the golden cases in {name} have changed: their sha256 is not the one noted; get it again")
    golden = golden_from_bytes(data)
    _check_agreement(manifest, golden, name)
    return manifest, golden


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: every file in it was found and has the bytes that the manifest promises.

    Attributes:
        path: The folder.
        manifest: Its manifest.
        golden: Its golden cases.
    """

    path: Path
    manifest: Manifest
    golden: Golden

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle and check every hash in it.

        Raises:
            BundleError: It is absent, not a bundle, damaged, from a newer schema, or reaches outside its folder. The
                message names the file.
        """
        root = Path(path)
        shown = printable(root)
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise BundleError(f"{shown} {what}; pass the bundle folder that byol-deploy export wrote")
        if not (root / MANIFEST_FILE).is_file():
            # A run directory and a zoo entry hold their bundle under this name.
            inside = (root / "bundle" / MANIFEST_FILE).is_file()
            wanted = f"{shown}/bundle, which is one" if inside else "the folder that byol-deploy export wrote"
            raise BundleError(f"{shown} is not a bundle: it has no {MANIFEST_FILE}; pass {wanted}")
        manifest = Manifest.from_json(_read(root, MANIFEST_FILE, MAX_MANIFEST_BYTES), f"{shown}/{MANIFEST_FILE}")
        if manifest.golden is None or not manifest.artefacts:
            absent = "golden cases" if manifest.golden is None else "artefacts"
            raise BundleError(f"{shown}/{MANIFEST_FILE} lists no {absent}; {_EXPORT_AGAIN}")
        for artefact in manifest.artefacts:
            _check_file(root, artefact.file, artefact.sha256, artefact.bytes)
            for extra in artefact.extra_files:
                _check_file(root, extra.file, extra.sha256, extra.bytes)
        _check_file(root, manifest.golden.file, manifest.golden.sha256)
        golden = golden_from_bytes(_read(root, manifest.golden.file, MAX_GOLDEN_BYTES))
        _check_agreement(manifest, golden, shown)
        return cls(root, manifest, golden)

    def artefact(self, format: str = "onnx", precision: str | None = None) -> Path:
        """The path of one artefact.

        Args:
            format: Its format, e.g. "onnx" or "torchscript".
            precision: Its precision; None takes fp32, or the first one where there is no fp32.

        Raises:
            BundleError: There is none. The message lists what there is.
        """
        matching = [
            entry
            for entry in self.manifest.artefacts
            if entry.format == format and precision in (None, entry.precision)
        ]
        if not matching:
            wanted = format if precision is None else f"{format} {precision}"
            there = ", ".join(f"{entry.file} ({entry.format} {entry.precision})" for entry in self.manifest.artefacts)
            raise BundleError(f"{printable(self.path)} has no {wanted}; it has {there}")
        best = next((entry for entry in matching if entry.precision == "fp32"), matching[0])
        return self.path / best.file


@contextlib.contextmanager
def publish(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``target``; it becomes ``target`` when the block ends without an error.

    A bundle that is there is replaced only then, and only when it holds nothing but what its manifest lists. On an
    error the temporary folder goes and the old bundle stays. What a killed run left is removed by the next one.

    Yields:
        The temporary folder. Write the artefacts, the golden cases and the manifest (:meth:`Manifest.save`) into it.

    Raises:
        OutputError: The target is a file, or a folder that is not a bundle or that holds other files too, or the
            place is full or cannot be written.
    """
    with publish_folder(target, _may_replace) as folder:
        yield folder


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as 64 lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameter_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """A hash of named tensors that does not depend on their order, on the byte order of the machine or on torch.

    Args:
        tensors: Arrays by name, e.g. of a state dict.

    Returns:
        ``sha256:`` and 64 hexadecimal digits, over name, type, shape and little-endian bytes in the order of names.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}\0{little.dtype.str}\0{list(array.shape)}\0".encode())
        digest.update(np.ascontiguousarray(little).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _inside(root: Path, name: str) -> Path:
    """The path of a file that a manifest names, which must lie in the folder, through links too."""
    path = root / name
    if not is_plain_path(name) or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{printable(root)} names the file {name!r}, which leaves the bundle; do not use this bundle")
    if not path.is_file():
        raise BundleError(f"{printable(path)} is missing, though the manifest lists it; copy the whole folder again")
    return path


def _read(root: Path, name: str, limit: int) -> bytes:
    path = _inside(root, name)
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{printable(path)} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise BundleError(f"{printable(path)} is larger than the limit of {limit} bytes; {_EXPORT_AGAIN}")
    return data


def _check_file(root: Path, name: str, sha256: str, size: int | None = None) -> None:
    path = _inside(root, name)
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise BundleError(
                f"{printable(path)} has {found} bytes, the manifest says {size}: it was changed or cut off; "
                "copy the bundle again"
            )
        digest = sha256_file(path)
    except OSError as error:
        raise BundleError(f"{printable(path)} cannot be read: {error.strerror}") from error
    if digest != sha256:
        raise BundleError(
            f"{printable(path)} was changed: its sha256 is {digest[:12]}…, the manifest says {sha256[:12]}…; "
            "copy the bundle again"
        )


def _check_agreement(manifest: Manifest, golden: Golden, name: str) -> None:
    faults = []
    side = manifest.input.preprocessing.size_px
    if golden.images.shape[1:] != (side, side, 3):
        faults.append(f"golden images are {golden.images.shape[1:]}, the input is ({side}, {side}, 3)")
    if manifest.golden is not None and manifest.golden.count != len(golden.images):
        faults.append(f"there are {len(golden.images)} golden cases, the manifest says {manifest.golden.count}")
    for output in manifest.outputs:
        values = golden.outputs.get(output.name)
        if values is None:
            faults.append(f"output {output.name} has no golden cases")
        elif values.shape[1] != output.width:
            faults.append(f"golden {output.name} is {values.shape[1]} wide, the output is {output.width}")
        if golden.files and output.name not in golden.file_outputs:
            faults.append(f"output {output.name} has no golden cases from files")
    if faults:
        raise BundleError(f"{name} contradicts itself: {'; '.join(faults)}; {_EXPORT_AGAIN}")


def _may_replace(folder: Path) -> None:
    """Refuse to replace what is not ours: a folder that is no bundle, or one with somebody's own files in it."""
    advice = "choose another --out, or move it away"
    try:
        manifest = json.loads(_read(folder, MANIFEST_FILE, MAX_MANIFEST_BYTES))
        entries = [*manifest["artefacts"], *(extra for item in manifest["artefacts"] for extra in item["extra_files"])]
        # A newer schema or a damaged bundle may be replaced too, so no more is asked than this.
        listed = {str(entry["file"]) for entry in entries} | {str(manifest["golden"]["file"])}
    except (BundleError, ValueError, TypeError, KeyError, RecursionError):
        raise OutputError(f"{printable(folder)} is there already and is not a bundle; {advice}") from None
    known = {MANIFEST_FILE, REPORT_FILE, ".DS_Store", "Thumbs.db"} | listed
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    foreign = sorted(present - known)
    if foreign:
        shown = ", ".join(map(printable, foreign[:5]))
        raise OutputError(f"{printable(folder)} holds files that are not part of the bundle ({shown}); {advice}")
