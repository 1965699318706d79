"""The table of benchmarks/backbones.py as Markdown: rows of measurements in, a page out."""

from __future__ import annotations

from typing import Any

from byol_deploy import formats
from byol_deploy.parity import NOISE_MULTIPLE
from byol_deploy.pipeline.reference import REAL_IMAGES

PLAIN = {"plain": (1, False), "plain, dynamic": (1, True), "plain, dynamic, example of 2": (2, True)}
"""Calls of torch.onnx.export: batch of the example, and whether the batch is asked to be dynamic. The last one, which
torch.export's documentation advises where a batch of 1 is taken for a constant, is tried where the second fails."""
PLAIN_BATCHES = (1, 2, 7)
KINDS = ("real images", "awkward images", "image files")


def as_markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The table, its summary, and the reason of everything that failed."""
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    table = {(row["backbone"], row["exporter"]): row for row in rows}
    ours = formats.available()
    lines = [
        f"# {len(names)} backbones: exported, verified, and beside it plain torch.onnx.export",
        "",
        f"Written by `python benchmarks/backbones.py` on {machine['date']}. {machine['cpu']}, {machine['cores']} "
        f"cores, {machine['system']}; Python {machine['python']}, PyTorch {machine['torch']}, torchvision "
        f"{machine['torchvision']}, timm {machine['timm']}, ONNX Runtime {machine['onnxruntime']}.",
        "",
        "## Summary",
        "",
        *_summary(names, table),
        "",
        "## How",
        "",
        "Random weights without constants, batch-norm statistics from training-mode passes. Encoders of three outputs "
        "(embedding, projection, prediction), uint8 images in.",
        "",
        "- **Ours**: exported and judged as `byol-deploy export` does, with every comparison of its matrix.",
        "- **Plain**: the same module through `torch.onnx.export(graph, (example,), path, dynamo=True, "
        'input_names=["images"], output_names=[...], verify=True)`, the example being one random image; for the '
        'dynamic one also `dynamic_shapes=({0: "batch"},)`. All else is PyTorch\'s default. Where the dynamic one '
        "fails, it is tried again with an example of two images, and the better result stands here. Judged on "
        f"the same {REAL_IMAGES} real images, against the same limits, at batch "
        f"{', '.join(map(str, PLAIN_BATCHES))}. *Own check* is what `verify=True` prints about the dynamic file; "
        "nothing is raised and the file is written whatever it says.",
        "- **Error** is in noise floors of the image: relative L2 error over the largest of the model's own float32 "
        f"evaluations against float64; the worst image of all comparisons. The limit is {NOISE_MULTIPLE:g}. Three "
        "numbers are real images, synthetic ones (black, white, noise, checkerboard), and image files from the bytes "
        "on (photographs and awkward files, two implementations of decoding and resizing).",
        "- `*`: arguments that make a small variant; they are in the JSON file beside this one, with all numbers.",
        "",
        "## Table",
        "",
        f"| backbone | px | parameters | {' | '.join(f'{name} | error' for name in ours)} | plain runs at batch | "
        "plain, dynamic: runs at batch | error | own check | files |",
        f"|---|---|---|{'---|---|' * len(ours)}---|---|---|---|---|",
    ]
    for name in names:
        any_row = next(row for row in rows if row["backbone"] == name)
        cells = [name + "*" * bool(any_row["arguments"]), str(any_row["size_px"])]
        parameters = any_row.get("parameters_backbone")
        cells.append("–" if parameters is None else f"{parameters / 1e6:.1f} M")
        for exporter in ours:
            row = table.get((name, exporter), {})
            cells += [_verdict(row), " / ".join(_floors(row, kind) for kind in KINDS)]
        plain, dynamic = table.get((name, next(iter(PLAIN))), {}), _dynamic(name, table)
        cells += [_batches(plain), _batches(dynamic), _floors(dynamic, KINDS[0])]
        cells += [dynamic.get("own_verification", "–"), str(dynamic.get("files", "–"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    for row in rows:
        reason = row.get("error") or "; ".join(row.get("failures", [])[:2])
        # That a file of a fixed batch runs at no other one is the table's own column.
        if reason and not (row["exporter"] == next(iter(PLAIN)) and "error" not in row and _batches(row) == "1"):
            lines.append(f"- {row['backbone']}, {row['exporter']}: {reason}")
    told = dict.fromkeys((row["backbone"], warning) for row in rows for warning in row.get("warnings", []))
    lines += ["", "## Warnings about the encoders", ""]
    return "\n".join([*lines, *(f"- {name}: {warning}" for name, warning in told)]) + "\n"


def _summary(names: list[str], table: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    total = len(names)
    lines = []
    for exporter in formats.available():
        found = [table.get((name, exporter), {}) for name in names]
        lines.append(f"- Ours, {exporter}: {sum(row.get('passed', False) for row in found)} of {total} pass.")
        for kind in KINDS:
            floors = sorted(row[kind]["floors"] for row in found if kind in row)
            if floors:
                shares = ", ".join(f"{words} {floors[min(int(share * len(floors)), len(floors) - 1)]:.1f}"
                                   for words, share in (("median", 0.5), ("90 %", 0.9), ("largest", 1.0)))  # fmt: skip
                lines.append(f"  - error in noise floors, {kind}: {shares}")
    plain = [table.get((name, next(iter(PLAIN))), {}) for name in names]
    dynamic = [_dynamic(name, table) for name in names]
    again = sum((name, list(PLAIN)[-1]) in table for name in names)
    for words, rows in (("as it comes", plain), ("asked for a dynamic batch", dynamic)):
        exported = [row for row in rows if "files" in row]
        several = [row for row in exported if _batches(row) == ", ".join(map(str, PLAIN_BATCHES))]
        within = [row for row in exported if row.get(KINDS[0]) and row[KINDS[0]]["floors"] <= NOISE_MULTIPLE]
        checked = [row for row in exported if row["own_verification"] == "pass"]
        passed = sum(row.get("passed", False) for row in rows)
        lines += [
            f"- Plain `torch.onnx.export`, {words}: {len(exported)} of {total} export; {len(several)} of {total} run "
            f"at batch {', '.join(map(str, PLAIN_BATCHES))}; {len(within)} are within the limit wherever they run; "
            f"{passed} are all of that. Its own check passes {len(checked)}; "
            f"{sum(row.get('files', 0) > 1 for row in rows)} are more than one file.",
        ]
    return [*lines, f"- {again} needed another try of the dynamic export, with an example of two images."]


def _dynamic(name: str, table: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The dynamic plain export of a backbone: the second try where there is a better one."""
    first, second = (table.get((name, exporter), {}) for exporter in list(PLAIN)[1:])
    return second if second.get("passed") or (second and "files" not in first) else first


def _verdict(row: dict[str, Any]) -> str:
    return "–" if not row else "PASS" if row.get("passed") else "FAIL"


def _floors(row: dict[str, Any], kind: str) -> str:
    return f"{row[kind]['floors']:.1f}" if kind in row else "–"


def _batches(row: dict[str, Any]) -> str:
    """The batch sizes at which a plain file runs."""
    if "files" not in row:
        return "no export" if row else "–"
    if "error" in row:
        return "no load"
    failed = {int(words.rpartition(" ")[2]) for words in row["cannot_run"]}
    return ", ".join(str(size) for size in PLAIN_BATCHES if size not in failed) or "none"
