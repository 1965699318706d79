"""What is to be measured: the files of bundles, lone files, and PyTorch itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from byol_deploy import formats
from byol_deploy.bundle import Bundle, Golden, Manifest, read_artefact, read_carried
from byol_deploy.errors import MissingExtraError, UsageError
from byol_deploy.images import printable
from byol_deploy.selftest import check_content

BASELINE_NAMES = {"eager": "PyTorch eager", "compile": "torch.compile", "torchscript": "TorchScript"}


@dataclass(frozen=True, eq=False)
class Item:
    """One file, or one way to run the checkpoint in PyTorch.

    Attributes:
        name: For the reader; different for each item.
        format: Of the file; "pytorch" for a baseline.
        package: The package that runs it.
        precision: What it promises; empty where it is not known.
        what: What a process is told to hold, see :mod:`byol_deploy.pipeline.benching.worker`.
        bytes: Size of the file with what belongs to it; None for a baseline.
        contract: Manifest and golden cases; None where they cannot be read here.
        missing: Why it cannot be run here; empty where it can.
        fault: What speaks against the file before it is run; empty where nothing does.
        path: The file; None for a baseline.
    """

    name: str
    format: str
    package: str
    precision: str
    what: Mapping[str, Any]
    bytes: int | None = None
    contract: tuple[Manifest, Golden] | None = None
    missing: str = ""
    fault: str = ""
    path: Path | None = None

    @property
    def baseline(self) -> bool:
        """Whether it is PyTorch and no file."""
        return self.path is None

    @property
    def outputs(self) -> list[str]:
        """Names of its outputs."""
        if self.path is None:
            return [str(name) for name in self.what["outputs"]]
        return [] if self.contract is None else [output.name for output in self.contract[0].outputs]


def find_items(paths: Sequence[str | os.PathLike[str]]) -> list[Item]:
    """The files behind the paths, each once.

    Raises:
        UsageError: No path.
        BundleError: A path is absent, damaged, or neither a bundle nor a file of byol-deploy.
    """
    if not paths:
        raise UsageError("there is nothing to measure; pass a bundle, or files that byol-deploy export wrote")
    found: dict[str, Item] = {}
    for path in paths:
        for item in _in_bundle(Path(path)) if Path(path).is_dir() else [_lone(Path(path))]:
            found.setdefault(os.path.realpath(item.path or ""), item)
    items = list(found.values())
    names = [item.name for item in items]
    # The shortest that tells them apart: two bundles both have a model.onnx.
    return [
        item
        if names.count(item.name) == 1 or item.path is None
        else replace(item, name=_longer(item.path, [other.path for other in items if other.path]))
        for item in items
    ]


def baselines(
    checkpoint: Path, like: Item, backbone: str | None, trust_backbone: bool, preprocessing: Mapping[str, Any]
) -> list[Item]:
    """PyTorch as it is, compiled, and traced: with the outputs of a file, so that all compute the same."""
    what = {
        "imports": ["byol_deploy.graph", "byol_deploy.training.checkpoints"],
        "checkpoint": str(checkpoint.resolve()),
        "backbone": backbone,
        "trust_backbone": trust_backbone,
        "preprocessing": dict(preprocessing),
        "outputs": like.outputs,
    }
    return [
        Item(name, "pytorch", "torch", "fp32", {**what, "baseline": kind}, contract=like.contract)
        for kind, name in BASELINE_NAMES.items()
    ]


def _in_bundle(root: Path) -> list[Item]:
    bundle = Bundle.open(root)
    items = []
    for entry in bundle.manifest.artefacts:
        size = entry.bytes + sum(extra.bytes for extra in entry.extra_files)
        path = root / entry.file
        contract = (bundle.manifest, bundle.golden)
        if entry.format not in formats.available():
            why = "this version does not know the format"
            items.append(Item(entry.file, entry.format, "", entry.precision, {}, size, contract, why, path=path))
            continue
        item = _item(path, formats.get(entry.format), entry.precision, size, contract)
        tuned = bundle.manifest.tuned
        if tuned is not None and tuned.file == entry.file:
            # As the encoder runs it; how many threads is what the rows are about.
            kept = {"allow_spinning": tuned.allow_spinning, "batches": list(tuned.batches), "streams": tuned.streams}
            item = replace(item, what={**item.what, "options": kept})
        items.append(item)
    return items


def _lone(path: Path) -> Item:
    shown = printable(path)
    format = formats.of_lone_file(path)
    # Some formats need their package to read what a file carries; without it there is nothing to say but that.
    with contextlib.suppress(ImportError, MissingExtraError):
        texts = format.carried(path)
        contract = read_carried(texts, shown)
        sealed = read_artefact(texts, shown)
        further = sealed.extra_files if sealed else ()
        size = sum(place.stat().st_size for place in (path, *map(path.with_name, further)) if place.is_file())
        return _item(path, format, sealed.precision if sealed else "fp32", size, contract)
    return _item(path, format, "", path.stat().st_size, None)


def _item(
    path: Path, format: formats.Format, precision: str, size: int, contract: tuple[Manifest, Golden] | None
) -> Item:
    package = formats.missing_to_run(format)
    missing = f"{package} is not installed; run: pip install 'byol-deploy[{format.extra}]'" if package else ""
    fault = ""
    if contract is not None:
        content, detail = check_content(path, format, precision)
        fault = detail if content == "failed" else ""
    what = {"format": format.name, "path": str(path.resolve()), "imports": list(format.runs_with)}
    return Item(path.name, format.name, format.runs_with[0], precision, what, size, contract, missing, fault, path)


def _longer(path: Path, others: Sequence[Path]) -> str:
    parts = path.resolve().parts
    for count in range(2, len(parts)):
        tail = parts[-count:]
        if sum(other.resolve().parts[-count:] == tail for other in others) == 1:
            return "/".join(tail)
    return str(path)
