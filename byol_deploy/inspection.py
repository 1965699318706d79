"""What a model file is: a bundle, a lone ONNX or TorchScript file, a training checkpoint, or somebody else's ONNX.

Everything but a checkpoint is read without PyTorch.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from byol_deploy.bundle import (
    CARRIED_GOLDEN_KEY,
    CARRIED_MANIFEST_KEY,
    MANIFEST_FILE,
    MAX_GOLDEN_BYTES,
    MAX_MANIFEST_BYTES,
    Bundle,
    read_carried,
    sha256_file,
)
from byol_deploy.errors import BundleError, MissingExtraError
from byol_deploy.images import printable
from byol_deploy.manifest import Manifest
from byol_deploy.providers import create_session

# Longest metadata that a TorchScript file may carry: the golden cases in base64 are the larger.
_MAX_CARRIED = {CARRIED_MANIFEST_KEY: MAX_MANIFEST_BYTES, CARRIED_GOLDEN_KEY: MAX_GOLDEN_BYTES * 4 // 3 + 4}


def inspect_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Find out what a file or folder is and what it holds.

    Args:
        path: A bundle, an ONNX file (ours or not), a TorchScript file, a checkpoint or a run directory.

    Returns:
        Plain JSON values. ``kind`` is one of "bundle", "onnx", "foreign onnx", "torchscript", "foreign torchscript",
        "checkpoint"; the first, second and fourth hold the manifest under ``manifest``, a foreign ONNX file its
        ``inputs`` and ``outputs``, a checkpoint its ``recipe``, ``steps`` and keys.

    Raises:
        BundleError: It is none of these, or damaged.
        CheckpointError: A checkpoint that cannot be read.
        MissingExtraError: A checkpoint, and PyTorch is not installed.
    """
    found = Path(path)
    shown = printable(found)
    if not found.exists():
        raise BundleError(f"{shown} does not exist; pass a bundle, a model file or a checkpoint")
    if found.is_dir():
        run = (found / "checkpoints" / "last.ckpt", found / "last.ckpt")
        if (found / MANIFEST_FILE).exists() or not any(path.exists() for path in run):
            bundle = Bundle.open(found)
            return {
                "kind": "bundle",
                "path": shown,
                "manifest": bundle.manifest.to_dict(),
                "input_in_words": bundle.manifest.preprocessing.describe(),
                "checked": "every file has the sha256 that the manifest promises",
            }
        return _checkpoint(found)
    if not found.is_file():
        raise BundleError(f"{shown} is neither a file nor a folder; pass a bundle, a model file or a checkpoint")
    try:
        with open(found, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BundleError(f"{shown} cannot be read: {error.strerror}; check its permissions") from error
    if not start:
        raise BundleError(f"{shown} is empty; copy or export it again")
    if zipfile.is_zipfile(found):
        return _zipped(found)
    if start[:1] == b"\x80":  # a pickle, as torch.save wrote until 2020
        return _checkpoint(found)
    return _onnx(found)


def _onnx(path: Path) -> dict[str, Any]:
    session = create_session(path, threads=1, optimization="none")
    meta = session.get_modelmeta()
    common = {"path": printable(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    if CARRIED_MANIFEST_KEY in meta.custom_metadata_map:
        manifest, golden = read_carried(meta.custom_metadata_map, printable(path))
        return {"kind": "onnx", **common, **_carried(manifest, len(golden.images))}

    def listed(values: Any) -> list[dict[str, Any]]:
        return [{"name": item.name, "type": item.type, "shape": list(item.shape)} for item in values]

    return {
        "kind": "foreign onnx",
        **common,
        "note": "it carries no byol-deploy contract: nothing says how images must be prepared, or what it should give",
        "producer": f"{meta.producer_name} {meta.version if meta.version > 0 else ''}".strip(),
        "graph": meta.graph_name,
        "inputs": listed(session.get_inputs()),
        "outputs": listed(session.get_outputs()),
        "metadata_keys": sorted(meta.custom_metadata_map),
    }


def _carried(manifest: Manifest, count: int) -> dict[str, Any]:
    return {
        "manifest": manifest.to_dict(),
        "input_in_words": manifest.preprocessing.describe(),
        "checked": f"it carries its contract and {count} golden cases; run byol-deploy verify to test it",
    }


def _zipped(path: Path) -> dict[str, Any]:
    """TorchScript files and checkpoints are zip archives; only the first hold a ``code`` folder."""
    shown = printable(path)
    metadata: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for key, limit in _MAX_CARRIED.items():
                for name in names:
                    if name.endswith(f"/extra/{key}"):
                        metadata[key] = _member(archive, name, limit)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise BundleError(f"{shown} is damaged: {error}; copy or export it again") from error
    if not any("/code/" in name for name in names):
        if any(name.endswith("data.pkl") for name in names):
            return _checkpoint(path)
        raise BundleError(f"{shown} is a zip archive, but neither TorchScript nor a checkpoint; unpack it first")
    common = {"path": shown, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    if CARRIED_MANIFEST_KEY in metadata:
        manifest, golden = read_carried(metadata, shown)
        return {"kind": "torchscript", **common, **_carried(manifest, len(golden.images))}
    return {
        "kind": "foreign torchscript",
        **common,
        "note": "it carries no byol-deploy contract: nothing says how images must be prepared, or what it should give",
    }


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> str:
    with archive.open(name) as member:
        content = member.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{name} unpacks to more than {limit} bytes")
    return content.decode("utf-8")


def _checkpoint(path: Path) -> dict[str, Any]:
    if find_spec("torch") is None:
        raise MissingExtraError(f"{printable(path)} is a checkpoint, and reading one", "torch", "train")
    from byol_deploy.training.checkpoints import load_checkpoint

    loaded = load_checkpoint(path)
    recipe: Mapping[str, Any] | None = None if loaded.recipe is None else loaded.recipe.to_dict()
    return {
        "kind": "checkpoint",
        "path": printable(loaded.path),
        "sha256": loaded.sha256,
        "global_step": loaded.global_step,
        "epoch": loaded.epoch,
        "width": loaded.model.width,
        "input_in_words": None if loaded.preprocessing is None else loaded.preprocessing.describe(),
        "online_tensors": len(loaded.online_keys),
        "momentum_tensors": len(loaded.momentum_keys),
        "recipe": recipe,
    }
