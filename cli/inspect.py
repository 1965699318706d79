"""`byol-deploy inspect`: what is in this file, as a person wants to read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import JsonOption, emit, table


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A bundle, an .onnx or TorchScript file, or a checkpoint.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what a model file is and what it holds."""
    from ..inspection import inspect_path

    document = inspect_path(path)
    emit(document, _shown(document), as_json=as_json)


def _shown(document: dict[str, Any]) -> str:
    lines = [("what", f"{_KINDS[document['kind']]}: {document['path']}")]
    if "bytes" in document:
        lines.append(("size", _size(document["bytes"])))
    parts = []
    manifest = document.get("manifest")
    if manifest is not None:
        lines += _manifest_lines(manifest, document["input_in_words"])
        if manifest["artefacts"]:
            parts.append(_artefacts(manifest["artefacts"]))
    elif document["kind"] == "checkpoint":
        lines += _checkpoint_lines(document)
    else:
        lines.append(("note", document["note"]))
        if document.get("producer"):
            lines.append(("producer", document["producer"]))
        parts += [_ports(side, document[side]) for side in ("inputs", "outputs") if side in document]
    if "sha256" in document:
        lines.append(("sha256", document["sha256"]))
    if "checked" in document:
        lines.append(("checked", document["checked"]))
    width = max(len(name) for name, _ in lines)
    # A stranger's text must not steer the terminal.
    return "\n".join([*(f"{name:<{width}}  {_clean(str(text))}" for name, text in lines), *map(_clean, parts)])


_KINDS = {
    "bundle": "a byol-deploy bundle",
    "onnx": "a byol-deploy ONNX file",
    "foreign onnx": "an ONNX file that byol-deploy did not write",
    "torchscript": "a byol-deploy TorchScript file",
    "foreign torchscript": "a TorchScript file that byol-deploy did not write",
    "checkpoint": "a training checkpoint",
}


def _manifest_lines(manifest: dict[str, Any], input_in_words: str) -> list[tuple[str, str]]:
    model = manifest["model"]
    trained = _trained(model["global_step"], model["epoch"])
    side = manifest["input"]["size_px"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["written_by"].items())
    golden = manifest.get("golden")
    return [
        ("backbone", f"{model['backbone']}, {model['parameters']:,} parameters, {model['branch']} branch"),
        ("trained", trained or "not known"),
        ("input", f"{manifest['input']['name']}: (N, {side}, {side}, 3) uint8"),
        ("prepared", input_in_words),
        ("outputs", ", ".join(f"{output['name']} (N, {output['width']})" for output in manifest["outputs"])),
        ("stripped", f"{len(model['stripped_keys'])} tensors of the momentum branch and the training"),
        ("golden cases", str(golden["count"]) if golden else "none"),
        ("parameters", model["parameter_hash"]),
        ("checkpoint", f"sha256:{model['checkpoint_sha256']}"),
        ("written", f"{manifest['created']} by {versions}; schema {manifest['schema']}"),
    ]


def _trained(step: int | None, epoch: int | None) -> str:
    counts = [f"step {step:,}"] if step is not None else []
    return ", ".join([*counts, f"last epoch {epoch} (from 0)"] if epoch is not None else counts)


def _checkpoint_lines(document: dict[str, Any]) -> list[tuple[str, str]]:
    model = (document["recipe"] or {}).get("model", {})
    return [
        ("backbone", str(model.get("backbone", "not noted (a checkpoint of another program)"))),
        ("width", str(document["width"])),
        ("trained", _trained(document["global_step"], document["epoch"]) or "not known"),
        ("prepared", document["input_in_words"] or "not noted: export needs --image-size"),
        ("tensors", f"{document['online_tensors']} online, {document['momentum_tensors']} momentum"),
    ]


def _artefacts(artefacts: list[dict[str, Any]]) -> str:
    rows = [
        (
            entry["file"],
            entry["format"],
            entry["precision"],
            _size(entry["bytes"] + sum(extra["bytes"] for extra in entry["extra_files"])),
            {True: "passed", False: "FAILED"}.get(entry["parity"].get("passed"), "not noted"),
            entry["sha256"][:12],
        )
        for entry in artefacts
    ]
    return table("", ("artefact", "format", "precision", "size", "parity", "sha256"), rows)


def _ports(side: str, ports: list[dict[str, Any]]) -> str:
    rows = [(port["name"], port["type"], " x ".join(map(str, port["shape"]))) for port in ports]
    return table("", (side, "type", "shape"), rows)


def _size(count: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "KB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)
