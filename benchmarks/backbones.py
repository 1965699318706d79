"""Backbones of all families, exported to every format and compared with PyTorch; beside it plain torch.onnx.export.

    python benchmarks/backbones.py [--only NAME]... [--missing] [--out benchmarks/results/backbones.md]

The weights are random, but nothing in them is trivial: parameters that start as constants (biases, normalisation
scales, ConvNeXt's layer scale of 1e-6) get noise, and batch norm's statistics come from training-mode passes over real
images. Each file is judged as `byol-deploy export` judges it: loaded again in a fresh session, real and awkward
images, several batch sizes, from the image files on, and whose parameters it holds.

Beside it stands what a user gets who calls PyTorch's exporter on the same module, see :func:`plain_export`; its files
are judged by the same comparison, save what they cannot have (a preprocessing contract).

Each backbone runs in a process of its own with a time limit, so that a crash is a row and not the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from backbones_table import KINDS, PLAIN, PLAIN_BATCHES, as_markdown
from machine import machine

from byol_deploy import Recipe, formats
from byol_deploy.graph import OUTPUTS, EncoderGraph
from byol_deploy.parity import Limit, ParityReport, ParityRow, compare_run
from byol_deploy.pipeline.proof import compare_file, momentum_tensors, prove_branch
from byol_deploy.pipeline.reference import Reference, build_reference, real_images
from byol_deploy.runtime import usable_cores
from byol_deploy.training.checkpoints import LoadedCheckpoint, build_model

RESULTS = Path(__file__).parent / "results" / "backbones.md"
LIMIT_S = 900.0


@dataclass(frozen=True)
class Entry:
    """One backbone: its image side, and arguments where the published variant is too large for this table."""

    size_px: int
    arguments: dict[str, Any] = field(default_factory=dict)


def _transformer(size_px: int, **arguments: Any) -> Entry:
    """A ViT relative of which only base sizes are published: ViT-Tiny's width, six blocks."""
    return Entry(size_px, {"embed_dim": 192, "depth": 6, "num_heads": 3} | arguments)


BACKBONES = {
    "deeplabv3": Entry(96),
    # Plain, residual and dense convolution
    "torchvision/alexnet": Entry(96),
    "torchvision/vgg11_bn": Entry(64),
    "torchvision/squeezenet1_1": Entry(96),
    "torchvision/googlenet": Entry(96),
    "torchvision/inception_v3": Entry(139),
    "torchvision/resnet18": Entry(96),
    "timm/resnet50": Entry(224),
    "torchvision/resnext50_32x4d": Entry(96),
    "torchvision/densenet121": Entry(96),
    "timm/resnetv2_50x1_bit": Entry(96),
    "timm/legacy_seresnet18": Entry(96),
    "timm/skresnet18": Entry(96),
    "timm/res2net50_26w_4s": Entry(96),
    "timm/resnest14d": Entry(96),
    "timm/dpn68": Entry(96),
    "timm/dla46x_c": Entry(96),
    "timm/hrnet_w18_small": Entry(96),
    "timm/cspresnet50": Entry(96),
    "timm/cs3darknet_s": Entry(96),
    "timm/ese_vovnet19b_dw": Entry(96),
    "timm/selecsls42b": Entry(96),
    "timm/tresnet_m": Entry(96),
    "timm/legacy_xception": Entry(128),
    "timm/eca_nfnet_l0": Entry(96),
    "timm/repvgg_a0": Entry(96),
    "timm/hgnetv2_b0": Entry(96),
    "timm/cspnext_tiny": Entry(96),
    "torchvision/regnet_x_400mf": Entry(96),
    "timm/regnety_004": Entry(128),
    "timm/rdnet_tiny": Entry(96),
    "timm/convnext_atto": Entry(96),
    "timm/convnextv2_atto": Entry(96),
    "timm/inception_next_atto": Entry(96),
    "timm/convmixer_768_32": Entry(96),
    "timm/mambaout_femto": Entry(96),
    # For small devices
    "torchvision/mnasnet0_5": Entry(96),
    "torchvision/mobilenet_v2": Entry(96),
    "torchvision/mobilenet_v3_large": Entry(128),
    "timm/mobilenetv3_small_100": Entry(96),
    "timm/mobilenetv4_conv_small": Entry(96),
    "timm/mobilenetv4_hybrid_medium": Entry(128),
    "torchvision/shufflenet_v2_x0_5": Entry(96),
    "timm/efficientnet_b0": Entry(128),
    "torchvision/efficientnet_v2_s": Entry(96),
    "timm/mixnet_s": Entry(96),
    "timm/ghostnet_100": Entry(96),
    "timm/lcnetv2_small": Entry(96),
    "timm/hardcorenas_a": Entry(96),
    "timm/rexnet_100": Entry(96),
    "timm/mobileone_s0": Entry(96),
    "timm/repghostnet_050": Entry(96),
    "timm/repvit_m0_9": Entry(96),
    "timm/fasternet_t0": Entry(96),
    "timm/starnet_s1": Entry(96),
    "timm/cpubone_nano": Entry(96),
    "timm/shvit_s1": Entry(128),
    "timm/iformer_t": Entry(96),
    "timm/lowformer_b0": Entry(96),
    # Convolution with attention
    "timm/botnet26t_256": Entry(128, {"img_size": 128}),
    "timm/halonet26t": Entry(256),
    "timm/lambda_resnet26t": Entry(128),
    "timm/mobilevit_xxs": Entry(128),
    "timm/mobilevitv2_050": Entry(128),
    "timm/edgenext_xx_small": Entry(96),
    "timm/fastvit_t8": Entry(128),
    "timm/efficientformer_l1": Entry(224),
    "timm/efficientformerv2_s0": Entry(96),
    "timm/efficientvit_b0": Entry(96),
    "timm/efficientvit_m0": Entry(96),
    "timm/efficientvim_m1": Entry(96),
    "timm/swiftformer_xs": Entry(128),
    "timm/nextvit_small": Entry(96),
    "timm/poolformer_s12": Entry(96),
    "timm/caformer_s18": Entry(96),
    "timm/focalnet_tiny_srf": Entry(96),
    "timm/levit_128s": Entry(96),
    "timm/visformer_tiny": Entry(96),
    "timm/coatnet_nano_rw_224": Entry(96),
    "timm/maxvit_rmlp_pico_rw_256": Entry(96),
    "timm/vit_tiny_r_s16_p8_224": Entry(96),
    "timm/csatv2": Entry(96),
    "timm/vitamin_small_224": Entry(96),
    # Transformers and mixers
    "timm/vit_tiny_patch16_224": Entry(224),
    "timm/deit_tiny_distilled_patch16_224": Entry(96),
    "timm/beitv2_base_patch16_224": _transformer(96),
    "timm/eva02_tiny_patch14_224": Entry(96),
    "timm/vit_relpos_small_patch16_224": Entry(96, {"depth": 6}),
    "timm/samvit_base_patch16_224": _transformer(96, global_attn_indexes=[2, 5]),
    "timm/naflexvit_base_patch16_gap": _transformer(96),
    "timm/swin_tiny_patch4_window7_224": Entry(224),
    "timm/swinv2_tiny_window8_256": Entry(96),
    "timm/swinv2_cr_tiny_ns_224": Entry(96),
    "timm/pit_ti_224": Entry(96),
    "timm/cait_xxs24_224": Entry(96),
    "timm/coat_lite_tiny": Entry(96),
    "timm/convit_tiny": Entry(96),
    "timm/crossvit_tiny_240": Entry(96),
    "timm/davit_tiny": Entry(96),
    "timm/gcvit_xxtiny": Entry(96),
    "timm/hiera_tiny_224": Entry(96),
    "timm/hieradet_small": Entry(96),
    "timm/mvitv2_tiny": Entry(96),
    "timm/nest_tiny": Entry(96),
    "timm/pvt_v2_b0": Entry(96),
    "timm/tiny_vit_5m_224": Entry(96),
    "timm/tnt_s_legacy_patch16_224": Entry(96),
    "timm/twins_svt_small": Entry(96),
    "timm/volo_d1_224": Entry(96),
    "timm/xcit_nano_12_p16_224": Entry(96),
    "timm/mixer_s32_224": Entry(96),
    "timm/resmlp_12_224": Entry(96),
    "timm/gmlp_ti16_224": Entry(96),
    "timm/sequencer2d_s": Entry(96),
    "torchvision/swin_v2_t": Entry(96),
}


def lively_model(name: str, entry: Entry) -> LoadedCheckpoint:
    """A model in which every parameter and statistic matters, as if it had been read from a checkpoint."""
    torch.manual_seed(0)
    size = entry.size_px
    recipe = Recipe().with_overrides(
        [
            f"model.backbone={name}",
            f"model.backbone_args={json.dumps(entry.arguments)}",
            f"data.image_size={size}",
            f"data.resize={size}",
        ]
    )
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


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    """Export one backbone in every way. One row for each, with ``error`` where it failed."""
    entry = BACKBONES[name]
    row: dict[str, Any] = {"backbone": name, "size_px": entry.size_px, "arguments": entry.arguments}
    start = time.perf_counter()
    try:
        loaded = lively_model(name, entry)
        assert loaded.preprocessing is not None
        graph = EncoderGraph(loaded.model, loaded.preprocessing)
        reference = build_reference(loaded, graph, loaded.preprocessing, None)
    except Exception as error:
        return [row | {"exporter": "model", "error": one_line(error)}]
    row |= {
        "parameters_backbone": sum(parameter.numel() for parameter in graph.backbone.parameters()),
        "warnings": list(reference.warnings),
    }
    print(f"{name}: reference after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    carried = _carried(loaded, graph, reference)
    rows = []
    for exporter in (*formats.available(), *PLAIN):
        if exporter == list(PLAIN)[-1] and rows[-1]["passed"]:
            continue
        start = time.perf_counter()
        format = formats.get("onnx" if exporter in PLAIN else exporter)
        path = folder / f"{exporter.replace(', ', '-').replace(' ', '-')}-model{format.suffix}"
        found: dict[str, Any] = {"exporter": exporter}
        try:
            if exporter in PLAIN:
                found |= plain_export(graph, entry.size_px, path, *PLAIN[exporter])
            else:
                format.export(graph, formats.Signature(entry.size_px, OUTPUTS), path, carried)
            found["export_s"] = time.perf_counter() - start
            files = sorted(folder.glob(f"{path.name}*"))
            found |= {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
            plain = exporter in PLAIN
            found |= judge_plain(path, reference) if plain else judge(path, format, reference, loaded, graph)
        except Exception as error:
            found |= {"error": one_line(error), "passed": False}
        print(f"{name}: {exporter} after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        rows.append(row | found)
    return rows


def plain_export(graph: EncoderGraph, size_px: int, path: Path, batch: int, dynamic: bool) -> dict[str, Any]:
    """What a user calls who follows PyTorch's documentation, with its own verification asked for.

    Its defaults otherwise; ``verify`` prints a verdict and writes the file whatever the verdict is.

    Args:
        graph: The module that byol-deploy exports too.
        size_px: Side of the images.
        path: File to write.
        batch: Of the example.
        dynamic: Ask for a dynamic batch.
    """
    example = torch.randint(0, 256, (batch, size_px, size_px, 3), dtype=torch.uint8)
    asked: dict[str, Any] = {"dynamic_shapes": ({0: "batch"},)} if dynamic else {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        torch.onnx.export(
            graph,
            (example,),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS),
            verify=True,
            **asked,
        )
    steps = ("Check the ONNX model", "Execute the model with ONNX Runtime", "Verify output accuracy")
    refused = [step for step in steps if f"{step}... ✅" not in printed.getvalue()]
    return {"own_verification": f"fail: {refused[0]}" if refused else "pass"}


def judge(
    path: Path, format: formats.Format, reference: Reference, loaded: LoadedCheckpoint, graph: EncoderGraph
) -> dict[str, Any]:
    """Compare a file of ours as an export does."""
    start = time.perf_counter()
    report = compare_file(path, format, reference, formats.RunOptions()).report
    proof = prove_branch(format.tensors(path), graph.tensors(), momentum_tensors(loaded))
    return {
        "compare_s": time.perf_counter() - start,
        "tensors_kept": f"{proof.kept}/{proof.total}",
        **summary(report, proof.faults),
    }


def judge_plain(path: Path, reference: Reference) -> dict[str, Any]:
    """Compare a file of the plain exporter on the same real images, with the same limits, at three batch sizes."""
    run = formats.get("onnx").load(path, formats.RunOptions())
    real = reference.real
    report = ParityReport.merged(
        compare_run(run, real.images, size, real.expected, real.limits, f"{path.name}, {real.name}, batch {size}")
        for size in PLAIN_BATCHES
    )
    return summary(report, ())


def summary(report: ParityReport, faults: Sequence[str]) -> dict[str, Any]:
    """What the table says of a report: where it could not run, what failed, and its errors in noise floors."""
    found: dict[str, Any] = {
        "passed": report.passed and not faults,
        "comparisons": len(report.rows),
        "cannot_run": list(dict.fromkeys(_words(row) for row in report.rows if "cannot run" in row.reason)),
        "failures": [f"{_words(row)}: {row.output}: {row.reason}" for row in report.rows if not row.passed] + [*faults],
    }
    for kind in KINDS:
        rows = [row for row in report.rows if kind in row.subject and row.floors is not None]
        if rows:
            worst = max(rows, key=lambda row: row.severity)
            assert isinstance(worst.limit, Limit)
            found[kind] = {
                "where": f"{_words(worst)}, {worst.output}, image {worst.image}",
                "floors": worst.floors,
                "rel_l2": worst.rel_l2,
                "limit_rel_l2": worst.limit.rel_l2,
                "noise_rel_l2": worst.limit.noise_rel_l2,
                # Each comparison's worst image, for the distribution that the limit's multiple is chosen from.
                "all_floors": [row.floors for row in rows],
            }
    shares = [row.neighbours.value for row in report.rows if row.neighbours is not None]
    return found | ({"neighbours": min(shares)} if shares else {})


def _words(row: ParityRow) -> str:
    return row.subject.partition(", ")[2]


def _carried(loaded: LoadedCheckpoint, graph: EncoderGraph, reference: Reference) -> dict[str, str]:
    from byol_deploy.bundle import carry
    from byol_deploy.pipeline.publishing import describe_export
    from byol_deploy.pipeline.reference import choose_golden

    assert loaded.preprocessing is not None
    assert loaded.recipe is not None
    golden, limits = choose_golden(reference)
    manifest = describe_export(loaded, graph, loaded.preprocessing, reference, limits, loaded.recipe.model.backbone)
    return carry(manifest, golden)


def one_line(error: BaseException) -> str:
    """The innermost exception in one line: an exporter wraps it in pages of advice for its authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def run_apart(name: str, limit_s: float, threads: int) -> list[dict[str, Any]]:
    """Measure one backbone in a process of its own."""
    entry = BACKBONES[name]
    row: dict[str, Any] = {"backbone": name, "size_px": entry.size_px, "arguments": entry.arguments}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--measure", name, "--folder", folder, "--threads", str(threads)]
        try:
            done = subprocess.run(command, timeout=limit_s, stdout=subprocess.PIPE, check=False)
        except subprocess.TimeoutExpired:
            return [row | {"exporter": "model", "error": f"not done after {limit_s:.0f} s"}]
        if done.returncode:
            return [row | {"exporter": "model", "error": f"the process ended with code {done.returncode}"}]
        rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=BACKBONES, help="measure this, and put it into the table")
    parser.add_argument("--missing", action="store_true", help="measure those that the table does not hold yet")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for one backbone")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="PyTorch's, fewer on a shared machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=BACKBONES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        torch.set_num_threads(arguments.threads)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        onnxruntime.set_default_logger_severity(4)
        print(json.dumps(measure(arguments.measure, arguments.folder)))
        return 0
    results = arguments.out.with_suffix(".json")
    rows: list[dict[str, Any]] = []
    if (arguments.only or arguments.missing) and results.exists():
        rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    there = {row["backbone"] for row in rows}
    chosen = arguments.only or [name for name in BACKBONES if not (arguments.missing and name in there)]
    for name in chosen:
        measured = run_apart(name, arguments.limit, arguments.threads)
        rows = [row for row in rows if row["backbone"] in BACKBONES and row["backbone"] != name] + measured
        rows.sort(key=lambda row: list(BACKBONES).index(row["backbone"]))
        results.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
        for row in measured:
            print(json.dumps(row), file=sys.stderr, flush=True)
    text = as_markdown(rows, machine())
    arguments.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
