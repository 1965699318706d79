"""Encoders on an NVIDIA GPU: PyTorch, ONNX Runtime with CUDA and TensorRT, and TensorRT itself, side by side.

    python benchmarks/gpu.py [--backbone timm/resnet50]... [--run RUN] [--batch 1]... [--out benchmarks/results/gpu.md]

What is measured, interleaved in one process (byol_deploy.bench), for each batch size:

* from the host's memory and back: PyTorch eager, ONNX Runtime as it is called everywhere (``session.run``), and with
  buffers that stay on the device (what ``Encoder(provider="cuda")`` does);
* on tensors that lie on the device and stay there: PyTorch eager and ``torch.compile``, ONNX Runtime with bound
  tensors, with a CUDA graph, through its TensorRT provider, and the engine that the format ``tensorrt`` builds;
* most of these in float16 too, and ONNX Runtime with convolutions channels last, as byol-deploy opens float16 files.

TF32 is off everywhere, so that float32 means float32. Beside the speed stands what each row computes, on 64
photographs, compared with the same model in PyTorch on the CPU: error in noise floors, neighbours, margin
(byol_deploy.parity).

Encoders are untrained ones in which every parameter matters (benchmarks/backbones.py), or a trained one by ``--run``.
What cannot be made or run here is a row that says why. An encoder that is measured again replaces its own tables only,
and each is written as soon as it is measured: where a GPU is lent for minutes, measure one at a time. Compilers build
anew for each batch size, which takes most of the time.

Without a GPU nothing is measured and nothing written; with ``--rehearse`` the script itself is tried on the CPU and
prints a page that it does not keep.
"""

from __future__ import annotations

import os

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read by NVIDIA's libraries when they are loaded

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbones import Entry, lively_model
from machine import machine

from byol_deploy import formats
from byol_deploy.bench import measure_candidates
from byol_deploy.environment import gpus, installed_version
from byol_deploy.errors import ByolDeployError, UsageError
from byol_deploy.formats import RunOptions, Signature
from byol_deploy.formats._onnx_cuda import OnDevice
from byol_deploy.graph import EncoderGraph
from byol_deploy.parity import NOISE_MULTIPLE, derive_limits, neighbour_agreement, relative_l2, separation_margin
from byol_deploy.pipeline.reference import real_images
from byol_deploy.preprocess import Preprocessing
from byol_deploy.providers import create_session, probe_provider
from byol_deploy.quantization import Calibration
from byol_deploy.training.checkpoints import load_checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
BACKBONES = ("timm/resnet18", "timm/resnet50")
BATCHES = (1, 8, 64)
PHOTOGRAPHS, CALIBRATING = 64, 64
OUTPUT = "embedding"
EAGER = "PyTorch eager"

Given = Callable[[Any], Any]
"""Images to embeddings: both arrays in the host's memory, or both tensors on the device."""


class Way:
    """One row: what it takes, and how it is made. ``make`` may raise, which is a result."""

    def __init__(self, name: str, place: str, make: Callable[[], Given]) -> None:
        self.name, self.place, self.make = name, place, make

    @property
    def label(self) -> str:
        return f"{self.name}, {self.place}"


def ways(graph: EncoderGraph, files: dict[str, Path], device: str) -> list[Way]:
    """Every row. ``files`` are the exported files by format and precision, e.g. ``onnx fp32``."""
    kind = device.partition(":")[0]
    host, there = "host", "device"

    def eager(half: bool = False, compiled: bool = False, captured: bool = False) -> Given:
        import copy

        model: Any = copy.deepcopy(graph).to(device)
        model = model.half() if half else model
        mode = "reduce-overhead" if captured else None
        model = torch.compile(model, dynamic=False, mode=mode) if compiled else model

        def run(images: Any) -> Any:
            with torch.inference_mode():
                return model(images)[0].float()

        return run

    def from_host(run: Given) -> Given:
        return lambda images: run(torch.from_numpy(images).to(device)).cpu().numpy()

    def file(what: str) -> Path:
        if what not in files:
            raise LookupError(f"{what} was not written")
        return files[what]

    def plain(what: str) -> Given:
        session = create_session(file(what), kind)
        return lambda images: session.run([OUTPUT], {"images": images})[0]

    def staying(what: str) -> Given:
        run = OnDevice(create_session(file(what), kind), kind)
        return lambda images: run([OUTPUT], {"images": images})[0]

    def bound(what: str, provider: str = kind, channels_last: bool = False) -> Given:
        run = OnDevice(create_session(file(what), provider, channels_last=channels_last), kind)
        return lambda images: run.tensors(images, [OUTPUT])[OUTPUT]

    def captured(what: str, channels_last: bool = False) -> Given:
        graphs = {"enable_cuda_graph": "1"}
        session = create_session(file(what), kind, channels_last=channels_last, provider_options=graphs)
        run = OnDevice(session, captured=True)
        return lambda images: run.tensors(images, [OUTPUT])[OUTPUT]

    def engine(what: str) -> Given:
        opened = formats.get("tensorrt").load(file(what), RunOptions()).session
        size = opened.largest
        return lambda images: torch.cat([opened(part)[OUTPUT] for part in images.split(size)])

    found = [
        Way(EAGER, there, eager),
        Way("torch.compile", there, partial(eager, compiled=True)),
        Way("ONNX Runtime CUDA, bound tensors", there, partial(bound, "onnx fp32")),
        Way("ONNX Runtime CUDA, bound tensors, channels last", there, partial(bound, "onnx fp32", channels_last=True)),
        Way("ONNX Runtime CUDA, CUDA graph", there, partial(captured, "onnx fp32")),
        Way("ONNX Runtime TensorRT, bound tensors", there, partial(bound, "onnx fp32", "tensorrt")),
        Way("TensorRT engine", there, partial(engine, "tensorrt fp32")),
        Way("PyTorch eager, fp16", there, partial(eager, half=True)),
        Way("torch.compile, fp16", there, partial(eager, half=True, compiled=True)),
        Way("torch.compile, CUDA graph, fp16", there, partial(eager, half=True, compiled=True, captured=True)),
        Way("ONNX Runtime CUDA, bound tensors, fp16", there, partial(bound, "onnx fp16")),
        Way("ONNX Runtime CUDA, CUDA graph, fp16", there, partial(captured, "onnx fp16")),
        Way(
            "ONNX Runtime CUDA, bound tensors, channels last, fp16",
            there,
            partial(bound, "onnx fp16", channels_last=True),
        ),
        Way(
            "ONNX Runtime CUDA, CUDA graph, channels last, fp16",
            there,
            partial(captured, "onnx fp16", channels_last=True),
        ),
        Way("ONNX Runtime TensorRT, bound tensors, fp16", there, partial(bound, "onnx fp16", "tensorrt")),
        Way("TensorRT engine, fp16", there, partial(engine, "tensorrt fp16")),
        Way("TensorRT engine, int8", there, partial(engine, "tensorrt int8")),
        Way(EAGER, host, lambda: from_host(eager())),
        Way("ONNX Runtime CUDA, session.run", host, partial(plain, "onnx fp32")),
        Way("ONNX Runtime CUDA, buffers that stay", host, partial(staying, "onnx fp32")),
    ]
    return found


def write_files(graph: EncoderGraph, calibrating: np.ndarray, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Export everything that is measured; gives the files, and why one is not there."""
    signature = Signature(graph.size_px, graph.outputs)
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    # TensorRT's files take signed, symmetric int8 whatever is asked for; fp16 is calibrated for overflow alone.
    calibration = Calibration(calibrating, "x86-vnni")
    for name, precisions in (("onnx", ("fp16",)), ("tensorrt", ("fp16", "int8"))):
        format = formats.get(name)
        reason = format.runs_here()
        if reason:
            missing |= {f"{name} {precision}": reason for precision in ("fp32", *precisions)}
            continue
        full = folder / f"model{format.suffix}"
        format.export(graph, signature, full, {})
        found[f"{name} fp32"] = full
        for precision in precisions:
            path = folder / f"model.{precision}{format.suffix}"
            try:
                reducer = format.reducer(graph, signature, full, precision, calibration)
                reducer.write(path, {}, reducer.methods[0], ())
                found[f"{name} {precision}"] = path
            except ByolDeployError as error:
                missing[f"{name} {precision}"] = str(error)
    return found, missing


def fidelity(
    run: Given, images: np.ndarray, batch: int, place: str, device: str, reference: dict[str, Any]
) -> dict[str, Any]:
    """What a row computes, ``batch`` photographs at a time: for each further shape, compilers would begin anew."""
    parts = []
    for start in range(0, len(images), batch):
        chunk = np.ascontiguousarray(images[start : start + batch])
        values = run(chunk if place == "host" else torch.from_numpy(chunk).to(device))
        parts.append(values if place == "host" else values.cpu().numpy())
    actual = np.concatenate(parts).astype(np.float32)
    expected, limit = reference["expected"], reference["limit"]
    errors = relative_l2(expected, actual)
    floors = errors / limit.noise_of_images(len(errors))
    return {
        "rel_l2": float(errors.max()),
        "floors": float(floors.max()),
        "agreement": neighbour_agreement(expected, actual),
        "margin": separation_margin(actual, expected),
        "within": bool((floors <= NOISE_MULTIPLE).all()),
    }


def measure(graph: EncoderGraph, preprocessing: Preprocessing, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one encoder."""
    device = "cpu" if options.rehearse else "cuda:0"
    sources, described = real_images(options.data, preprocessing, PHOTOGRAPHS + CALIBRATING)
    pixels = preprocessing.batch(sources)
    batch = sorted(options.batch)[len(options.batch) // 2]
    images, calibrating = pixels[: max(PHOTOGRAPHS // batch, 1) * batch], pixels[-CALIBRATING:]
    expected = graph.run(images)
    limits = derive_limits([expected, graph.run(images, batch_size=1)], graph.doubled().run(images))
    reference = {"expected": expected[OUTPUT], "limit": limits[OUTPUT]}
    failed: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    made: dict[str, tuple[Way, Given]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, missing = write_files(graph, calibrating, Path(folder))
        for way in ways(graph, files, device):
            print(f"  {way.label}", flush=True)
            try:
                run = way.make()
                facts[way.label] = fidelity(run, images, batch, way.place, device, reference)
                made[way.label] = (way, run)
            except Exception as error:  # what cannot be made here is a row that says why
                reason = reason_of(error)
                failed[way.label] = next((why for what, why in missing.items() if f"{what} was not" in reason), reason)
        timed = {str(size): timing(made, images, size, device, options, failed) for size in options.batch}
    return {
        "size_px": graph.size_px,
        "parameters": graph.parameter_count(),
        "images": f"{len(images)} of {described}",
        "fidelity": facts,
        "failed": failed,
        "timed": timed,
    }


def timing(
    made: dict[str, tuple[Way, Given]],
    images: np.ndarray,
    batch: int,
    device: str,
    options: argparse.Namespace,
    failed: dict[str, str],
) -> dict[str, Any]:
    """The interleaved run of one batch size. What a shape needs once (compiling, capturing) is done before."""
    given = np.ascontiguousarray(np.resize(images, (batch, *images.shape[1:])))
    on_device = torch.from_numpy(given).to(device)
    calls: dict[str, Callable[[], None]] = {}

    def call(run: Given, place: str) -> None:
        run(given if place == "host" else on_device)
        if not options.rehearse:
            torch.cuda.synchronize()

    for label, (way, run) in made.items():
        try:
            call(run, way.place)
            calls[label] = partial(call, run, way.place)
        except Exception as error:
            failed[f"{label}, batch {batch}"] = reason_of(error)
    try:
        return measure_candidates(calls, budget_s=options.budget, rounds=options.rounds).to_dict()
    except UsageError as error:  # too little time: what the others took must not be lost
        return {"control": None, "rounds": 0, "candidates": [], "failed": {}, "warnings": [str(error)]}


def reason_of(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it gave no reason"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def encoders(options: argparse.Namespace) -> dict[str, tuple[EncoderGraph, Preprocessing]]:
    """The encoders that are measured, by name."""
    if options.run is not None:
        loaded = {options.run.name: load_checkpoint(options.run)}
    else:
        loaded = {name: lively_model(name, Entry(options.size)) for name in options.backbone or BACKBONES}
    found = {}
    for name, checkpoint in loaded.items():
        assert checkpoint.preprocessing is not None
        found[name] = (EncoderGraph(checkpoint.model, checkpoint.preprocessing, (OUTPUT,)), checkpoint.preprocessing)
    return found


def environment() -> dict[str, Any]:
    """The machine, its GPU and the libraries that compute there."""
    found = machine()
    found["gpu"] = "; ".join(gpus()) or (torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    found["cuda"] = torch.version.cuda or "none"
    found["cudnn"] = str(torch.backends.cudnn.version() or "none")
    found["tensorrt"] = installed_version("tensorrt") or "not installed"
    for provider in ("cuda", "tensorrt"):
        works, reason = probe_provider(provider)
        found[f"provider_{provider}"] = "works" if works else reason
    return found


def as_markdown(found: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Encoders on a GPU",
        "",
        "Written by `python benchmarks/gpu.py`.",
        "",
        "All rows of a batch size are from one interleaved run in one process. A ratio says how many times as fast as "
        f"{EAGER} on the device a row is: the median over the rounds, and its 95 % interval. TF32 is off everywhere. "
        "*device*: tensors lie on the GPU and stay there. *host*: from the host's memory and back. Error in noise "
        "floors of the image (the worst one), share of photographs that keep their nearest neighbour, and margin: "
        f"against the same model in PyTorch on the CPU; float32 may have {NOISE_MULTIPLE:g} floors.",
        "",
    ]
    for name, result in found.items():
        here = result["machine"]
        batches = list(result["timed"])
        lines += [f"## {name}, {result['size_px']} px, {result['parameters'] / 1e6:.1f} M parameters", "",
                  f"{here['date']}. {here['gpu']}; {here['cpu']}, {here['cores']} cores, {here['system']}; PyTorch "
                  f"{here['torch']} (CUDA {here['cuda']}, cuDNN {here['cudnn']}), ONNX Runtime {here['onnxruntime']} "
                  f"(CUDA provider: {here['provider_cuda']}; TensorRT provider: {here['provider_tensorrt']}), TensorRT "
                  f"{here['tensorrt']}. Compared on {result['images']}.", "",
                  f"| | {' | '.join(f'batch {batch}' for batch in batches)} | error, floors | neighbours | margin |",
                  f"|---|{'---|' * (len(batches) + 3)}"]  # fmt: skip
        rows = {batch: {row["name"]: row for row in timed["candidates"]} for batch, timed in result["timed"].items()}
        for label, facts in result["fidelity"].items():
            cells = [speed(rows[batch].get(label)) for batch in batches]
            cells += [f"{facts['floors']:.1f}", share(facts["agreement"]), number(facts["margin"])]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
        for batch, timed in result["timed"].items():
            control = timed["control"]
            told = "none" if control is None else f"{control['ratio'] - 1:+.1%} ({control['low'] - 1:+.1%} to " \
                f"{control['high'] - 1:+.1%})"  # fmt: skip
            eager = rows[batch].get(f"{EAGER}, device")
            median = "" if eager is None else f"{EAGER}'s median {eager['p50_ms']:.2f} ms. "
            lines.append(f"Batch {batch}: {median}A/A control {told}, {timed['rounds']} rounds. "
                         f"{' '.join(timed['warnings'])}")  # fmt: skip
            lines += [f"Batch {batch}, {label} broke off: {why}" for label, why in timed["failed"].items()]
            lines.append("")
        if result["failed"]:
            lines += ["Not measured:", "", *(f"- {label}: {why}" for label, why in result["failed"].items()), ""]
    return "\n".join(lines)


def speed(row: dict[str, Any] | None) -> str:
    """A ratio of times turned round: times as fast, and its interval."""
    if row is None or row["ratio"] is None:
        return "–"
    return f"{1 / row['ratio']:.2f} ({1 / row['high']:.2f} to {1 / row['low']:.2f})"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backbone", action="append", help=f"default: {', '.join(BACKBONES)}")
    parser.add_argument("--run", type=Path, help="a trained run, in place of untrained backbones")
    parser.add_argument(
        "--data", type=Path, help="images for the comparison; default: those that ship with byol-deploy"
    )
    parser.add_argument("--size", type=int, default=224, help="side of the images of untrained backbones")
    parser.add_argument("--batch", action="append", type=int, help=f"default: {', '.join(map(str, BATCHES))}")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each batch size")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true", help="try the script on the CPU; nothing is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.md")
    options = parser.parse_args()
    options.batch = options.batch or list(BATCHES)
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("there is no NVIDIA GPU that PyTorch can use here: nothing was measured, and nothing written")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    store = options.out.with_suffix(".json")
    keep = not options.rehearse
    found: dict[str, Any] = json.loads(store.read_text(encoding="utf-8")) if keep and store.exists() else {}
    here = environment()
    for name, (graph, preprocessing) in encoders(options).items():
        print(name, flush=True)
        found[name] = measure(graph, preprocessing, options) | {"machine": here}
        if keep:
            store.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            options.out.write_text(as_markdown(found), encoding="utf-8")
    if options.rehearse:
        print("A rehearsal on the CPU: nothing here is a result, whatever the rows are called.\n")
    print(as_markdown(found))


if __name__ == "__main__":
    main()
