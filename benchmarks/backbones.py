"""Ten backbones of different families, exported to every format and compared with PyTorch.

    python benchmarks/backbones.py [--only NAME] [--out benchmarks/results/backbones.md]

The weights are random, but nothing in them is trivial: parameters that start as constants (biases, normalisation
scales, ConvNeXt's layer scale of 1e-6) get noise, and batch norm's statistics come from training-mode passes over real
images. Each file is judged as `byol-deploy export` judges it: loaded again in a fresh session, real and awkward
images, batch 1, 2 and 7, from the image files on, and whose parameters it holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from byol_deploy import Recipe, formats
from byol_deploy.graph import OUTPUTS, EncoderGraph
from byol_deploy.pipeline.proof import compare_file, momentum_tensors, prove_branch
from byol_deploy.pipeline.reference import build_reference, real_images
from byol_deploy.runtime import usable_cores
from byol_deploy.training.checkpoints import LoadedCheckpoint, build_model

BACKBONES = {
    "deeplabv3": 96,
    "torchvision/resnet18": 96,
    "timm/resnet50": 224,
    "torchvision/mobilenet_v3_large": 128,
    "timm/mobilenetv3_small_100": 96,
    "timm/efficientnet_b0": 128,
    "timm/convnext_atto": 96,
    "timm/regnety_004": 128,
    "timm/vit_tiny_patch16_224": 224,
    "timm/swin_tiny_patch4_window7_224": 224,
}


COLUMNS = ("backbone", "px", "parameters", "format", "error", "noise", "ratio", "limit", "awkward", "neighbours",
           "tensors", "MB", "export s", "compare s", "verdict")  # fmt: skip


def lively_model(name: str, size_px: int) -> LoadedCheckpoint:
    """A model in which every parameter and statistic matters, as if it had been read from a checkpoint."""
    torch.manual_seed(0)
    recipe = Recipe().with_overrides([f"model.backbone={name}", f"data.image_size={size_px}", f"data.resize={size_px}"])
    model = build_model(recipe)
    preprocessing = recipe.preprocessing()
    images = torch.from_numpy(preprocessing.normalize(preprocessing.batch(real_images(None, preprocessing)[0])))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        # A plain average over a few passes: with the usual momentum of 0.1 the statistics would still be nearly those
        # of a new model, under which deep untrained networks map all images to one point.
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        for half in images.chunk(2):
            model(half)
            model.forward_momentum(half)
    state = model.eval().state_dict()
    stripped = tuple(sorted(key for key in state if "_momentum." in key))
    online = tuple(sorted(key for key in state if "_momentum." not in key))
    return LoadedCheckpoint(Path("none"), model, recipe, preprocessing, 4, 0, "0" * 64, online, stripped)


def measure(name: str, size_px: int, folder: Path) -> list[dict[str, Any]]:
    loaded = lively_model(name, size_px)
    assert loaded.preprocessing is not None
    graph = EncoderGraph(loaded.model, loaded.preprocessing)
    start = time.perf_counter()
    reference = build_reference(loaded, graph, loaded.preprocessing, None)
    reference_s = time.perf_counter() - start
    rows = []
    for format in map(formats.get, formats.available()):
        path = folder / f"model{format.suffix}"
        row: dict[str, Any] = {
            "backbone": name,
            "size_px": size_px,
            "parameters_backbone": sum(p.numel() for p in graph.backbone.parameters()),
            "format": format.name,
        }
        start = time.perf_counter()
        format.export(graph, formats.Signature(size_px, OUTPUTS), path, _carried(loaded, graph, reference))
        exported_s = time.perf_counter() - start
        start = time.perf_counter()
        report = compare_file(path, format, reference, formats.RunOptions())
        proof = prove_branch(format.tensors(path), graph.tensors(), momentum_tensors(loaded))
        worst = max((line for line in report.rows if "awkward" not in line.subject), key=lambda line: line.severity)
        awkward = max((line for line in report.rows if "awkward" in line.subject), key=lambda line: line.severity)
        assert worst.limit is not None
        assert awkward.limit is not None
        rows.append(
            row
            | {
                "rel_l2": worst.rel_l2,
                "noise_rel_l2": worst.limit.noise_rel_l2,
                "limit": worst.limit.rel_l2,
                "ratio": worst.rel_l2 / worst.limit.noise_rel_l2 if worst.limit.noise_rel_l2 else None,
                "awkward_rel_l2": awkward.rel_l2,
                "awkward_limit": awkward.limit.rel_l2,
                "max_abs": max(line.max_abs for line in report.rows),
                "neighbours": min(line.neighbour_agreement for line in report.rows if line.neighbour_agreement),
                "tensors_kept": f"{proof.kept}/{proof.total}",
                "bytes": path.stat().st_size,
                "reference_s": reference_s,
                "export_s": exported_s,
                "compare_s": time.perf_counter() - start,
                "comparisons": len(report.rows),
                "passed": report.passed and proof.passed,
                "failures": [*report.failures, *proof.faults] if not (report.passed and proof.passed) else [],
                "warnings": list(reference.warnings),
            }
        )
        path.unlink()
    return rows


def _carried(loaded: LoadedCheckpoint, graph: EncoderGraph, reference: Any) -> dict[str, str]:
    from byol_deploy.bundle import carry
    from byol_deploy.pipeline.publishing import describe_export
    from byol_deploy.pipeline.reference import choose_golden

    manifest = describe_export(loaded, graph, loaded.preprocessing, reference, loaded.recipe.model.backbone)
    return carry(manifest, choose_golden(reference))


def as_markdown(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        "# Ten backbones, exported and compared with PyTorch",
        "",
        f"Written by `python benchmarks/backbones.py` on {machine['date']}. {machine['cpu']}, {machine['cores']} "
        f"cores, {machine['system']}; Python {machine['python']}, PyTorch {machine['torch']}, ONNX Runtime "
        f"{machine['onnxruntime']}.",
        "",
        "Random weights without constants, batch-norm statistics from training-mode passes. Error: the relative L2 "
        "error that comes nearest to its limit, over all comparisons on real images (batch 1, 2 and 7; embedding, "
        "projection and prediction; from the image files on). Noise: the model's own float32 "
        "against float64 there. Tensors: online tensors found bit for bit in the file. Seconds: export, comparison "
        "(the float64 reference, shared by the formats, not counted); the machine was shared with other work. "
        "Awkward: the same error over its limit on black, white, noise and a checkerboard.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows:
        cells = (
            row["backbone"],
            row["size_px"],
            f"{row['parameters_backbone'] / 1e6:.1f} M",
            row["format"],
            f"{row['rel_l2']:.1e}",
            f"{row['noise_rel_l2']:.1e}",
            "–" if row["ratio"] is None else f"{row['ratio']:.1f}",
            f"{row['limit']:.1e}",
            f"{row['awkward_rel_l2']:.0e}/{row['awkward_limit']:.0e}",
            f"{row['neighbours']:.1%}",
            row["tensors_kept"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['export_s']:.1f}",
            f"{row['compare_s']:.1f}",
            "PASS" if row["passed"] else "FAIL",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    failed = [row for row in rows if not row["passed"]]
    lines += ["", f"{len(rows) - len(failed)} of {len(rows)} files pass."]
    lines += [f"- {row['backbone']}, {row['format']}: {'; '.join(row['failures'])}" for row in failed]
    told = dict.fromkeys((row["backbone"], warning) for row in rows for warning in row["warnings"])
    lines += ["", *(f"- {name}: {warning}" for name, warning in told)] if told else []
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line] \
        if cpuinfo.exists() else []  # fmt: skip
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": names[0] if names else platform.processor(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=BACKBONES, help="measure one backbone again, and put it into the table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "backbones.md")
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cores())
    results = arguments.out.with_suffix(".json")
    rows: list[dict[str, Any]] = []
    if arguments.only is not None and results.exists():
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as folder:
        for name, size_px in BACKBONES.items():
            if arguments.only in (None, name):
                measured = measure(name, size_px, Path(folder))
                print(json.dumps(measured), file=sys.stderr, flush=True)
                rows = [row for row in rows if row["backbone"] != name] + measured
    rows.sort(key=lambda row: list(BACKBONES).index(row["backbone"]))
    here = machine()
    text = as_markdown(rows, here)
    print(text)
    arguments.out.write_text(text, encoding="utf-8")
    results.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
