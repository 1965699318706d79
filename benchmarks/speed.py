"""The tuned bundle beside PyTorch and beside what one would do otherwise: latency and fidelity, in one interleaved run.

    python benchmarks/speed.py [--only NAME]... [--work runs/speed]

For each encoder of encoders.SPEED: ``export --tune`` on a part of the images, then everything else on images that took
part in nothing: neighbours and margin against PyTorch, kNN accuracy, and the latency at batch 1 and 8. The others are
made by the tools' own defaults: plain ``torch.onnx.export``, onnxruntime's ``quantize_static`` and
``quantize_dynamic``, NNCF's ``quantize``, ``torch.compile``. A bundle in ``--work`` is
kept, so that it can be measured again. Results go to results/speed.json, from which
results/speed.md is written; an encoder that is measured again replaces its own rows only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import torch
from machine import machine

from byol_deploy import Encoder, export, formats
from byol_deploy.bench import measure_candidates
from byol_deploy.bundle import Bundle
from byol_deploy.cores import usable_cores
from byol_deploy.evaluation import knn
from byol_deploy.formats import RunOptions
from byol_deploy.formats._onnx_reduced import Batches, quiet
from byol_deploy.graph import EncoderGraph
from byol_deploy.manifest import Tuned
from byol_deploy.parity import as_rows, neighbour_agreement, separation_margin
from byol_deploy.training.checkpoints import load_checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT, GALLERY, CALIBRATING = 400, 400, 128
EAGER, OURS, PLAIN = "PyTorch eager", "tuned bundle", "torch.onnx.export + ONNX Runtime"

Run = Callable[[np.ndarray], np.ndarray]


def split(data: Path, work: Path) -> tuple[Path, list[Path], list[Path]]:
    """A folder for the export, and files that take part in nothing: gallery and test, the same ones each time."""
    files = sorted(data.rglob("*.png"))
    order = [files[place] for place in np.random.default_rng(0).permutation(len(files))]
    test, gallery, rest = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + GALLERY], order[HELD_OUT + GALLERY :]
    folder = work / "images"
    if not folder.exists():
        for path in rest:
            link = folder / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return folder, gallery, test


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: opened.run(None, {"images": images})[0]


def others(graph: EncoderGraph, calibrating: np.ndarray, work: Path) -> dict[str, Run]:
    """What a user would do otherwise, each by its tool's defaults."""
    made: dict[str, Run] = {}
    side = graph.size_px
    plain, static, dynamic = work / "plain.onnx", work / "static.onnx", work / "dynamic.onnx"
    example = torch.zeros((2, side, side, 3), dtype=torch.uint8)

    def plain_export() -> Run:
        shapes = ({0: torch.export.Dim("batch")},)
        with torch.no_grad():
            torch.onnx.export(graph, (example,), plain, dynamo=True, input_names=["images"],
                              output_names=["embedding"], dynamic_shapes=shapes, external_data=False)  # fmt: skip
        return session(plain)

    def ort_static() -> Run:
        from onnxruntime.quantization import quantize_static

        quantize_static(plain, static, Batches(calibrating))
        return session(static)

    def ort_dynamic() -> Run:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(plain, dynamic)
        return session(dynamic)

    def nncf_default() -> Run:
        import nncf
        import openvino

        images = nncf.Dataset([calibrating[place : place + 1] for place in range(len(calibrating))])
        model = nncf.quantize(openvino.convert_model(plain), images)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": usable_cores()})
        return lambda given: np.array(compiled([given])[0])

    def compiled() -> Run:
        function = torch.compile(graph)

        def run(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return function(torch.from_numpy(images))[0].numpy()

        run(calibrating[:1])
        return run

    for name, make in {
        PLAIN: plain_export,
        "torch.compile": compiled,
        "quantize_static, defaults": ort_static,
        "quantize_dynamic, defaults": ort_dynamic,
        "NNCF, defaults": nncf_default,
    }.items():
        try:
            with quiet():
                run = make()
                run(calibrating[:1])
            made[name] = run
        except Exception as error:  # a tool that fails by its defaults is a result
            print(f"  {name} failed: {type(error).__name__}: {str(error)[:150]}", flush=True)
    return made


def measured(name: str, work: Path, budget_s: float) -> dict[str, Any]:
    began = time.perf_counter()
    run_dir = encoders.trained(name)
    encoder = encoders.SPEED[name]
    data = encoders.cells() if encoder.cells else encoders.images() / "test"
    work.mkdir(parents=True, exist_ok=True)
    folder, gallery, test = split(data, work)
    bundle = work / "bundle"
    if not bundle.exists():
        with (work / "export.log").open("w") as said:
            export(run_dir, formats=("onnx", "openvino"), precisions=("int8", "bf16"), tune_s=120, data=folder,
                   out=bundle, outputs=["embedding"], say=lambda line: print(line, file=said, flush=True))  # fmt: skip
    manifest = Bundle.open(bundle).manifest
    assert manifest.tuned is not None
    print(f"  exported in {time.perf_counter() - began:.0f} s: {manifest.tuned.file}", flush=True)

    loaded = load_checkpoint(run_dir)
    assert loaded.preprocessing is not None
    graph = EncoderGraph(loaded.model, loaded.preprocessing, ("embedding",))
    images = {part: loaded.preprocessing.batch(paths) for part, paths in (("gallery", gallery), ("test", test))}
    classes = sorted({path.parent.name for path in [*gallery, *test]})
    labels = {part: np.array([classes.index(path.parent.name) for path in paths])
              for part, paths in (("gallery", gallery), ("test", test))}  # fmt: skip

    def eager(given: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return graph(torch.from_numpy(given))[0].numpy()

    runs: dict[str, Run] = {EAGER: eager}
    entries = {entry.file: entry for entry in manifest.artefacts}
    for file, entry in entries.items():
        opened = formats.get(entry.format).load(bundle / file, RunOptions(threads=usable_cores()))
        runs[f"ours, {file}"] = lambda given, opened=opened: opened.compute(given, ("embedding",))["embedding"]
    ours = Encoder(bundle)
    runs[OURS] = lambda given: ours.run(given)["embedding"]
    tuned = entries[manifest.tuned.file]
    runs["its bare session"] = native(bundle / tuned.file, tuned.format, manifest.tuned)
    runs |= others(graph, images["gallery"][:CALIBRATING], work)

    fidelity: dict[str, dict[str, float | None]] = {}
    reference: dict[str, np.ndarray] = {}
    for label, run in runs.items():
        if label == "its bare session":
            continue
        found = {part: np.concatenate([run(pixels[start : start + 32]) for start in range(0, len(pixels), 32)])
                 for part, pixels in images.items()}  # fmt: skip
        reference = reference or found
        accuracy = float((knn(found["gallery"], labels["gallery"], found["test"]) == labels["test"]).mean())
        fidelity[label] = {
            # Among 400 images at a time, whose standard error near 98 % is .7 points: two such groups.
            "agreement": float(np.mean([neighbour_agreement(reference[part], found[part]) or 0.0 for part in found])),
            "margin": separation_margin(as_rows(found["test"]), as_rows(reference["test"])),
            "knn": accuracy,
        }
    print(f"  fidelity known after {time.perf_counter() - began:.0f} s", flush=True)
    timed = {}
    for batch in (1, 8):
        given = np.ascontiguousarray(images["test"][:batch])
        # At batch 8 only what the ratios need: a round of all rows takes too long to repeat often.
        few = [label for label in runs if batch == 1 or label in (EAGER, OURS, "its bare session", PLAIN)]
        calls = {label: partial(runs[label], given) for label in few}
        timed[str(batch)] = measure_candidates(calls, budget_s=budget_s, rounds=15).to_dict()
    return {
        "family": encoder.family,
        "images": "ELPV solar cells" if encoder.cells else "Fashion-MNIST",
        "size_px": graph.size_px,
        "tuned": {key: value for key, value in vars(manifest.tuned).items() if key != "evidence"},
        "bytes": {file: entry.bytes + sum(extra.bytes for extra in entry.extra_files)
                  for file, entry in entries.items()},
        "reduction": {file: {key: dict(entry.reduction)[key] for key in ("method", "kept", "trials")}
                      for file, entry in entries.items() if entry.reduction},
        "fidelity": fidelity,
        "neighbours_of": sum(map(len, images.values())),
        "timed": timed,
        "seconds": time.perf_counter() - began,
        "machine": machine(),
    }  # fmt: skip


def native(path: Path, format: str, tuned: Tuned) -> Run:
    """The engine called as its own documentation does, without our code, in the way that tuning chose."""
    if format != "openvino":
        options = RunOptions(threads=tuned.threads, allow_spinning=tuned.allow_spinning)
        opened = formats.get(format).load(path, options).session
        return lambda images: opened.run(["embedding"], {"images": images})[0]
    import openvino

    forms: dict[int, Run] = {}

    def compiled(count: int) -> Run:
        model = openvino.Core().read_model(path)
        note = model.get_rt_info(["byol_deploy_precision"]).astype(str)
        parts = tuned.streams if count in tuned.batches and count % tuned.streams == 0 else 1
        if count in tuned.batches:
            model.reshape([count // parts, *list(model.inputs[0].partial_shape)[1:]])
        form = openvino.Core().compile_model(model, "CPU", {
            "INFERENCE_NUM_THREADS": tuned.threads, "NUM_STREAMS": parts, "INFERENCE_PRECISION_HINT": note,
            "PERFORMANCE_HINT": "LATENCY" if parts == 1 else "THROUGHPUT",
        })  # fmt: skip
        requests = [form.create_infer_request() for _ in range(parts)]

        def run(images: np.ndarray) -> np.ndarray:
            for request, given in zip(requests, np.split(images, parts), strict=True):
                request.start_async([given], share_inputs=True)
            for request in requests:
                request.wait()
            return np.concatenate([request.get_output_tensor(0).data for request in requests])

        def whole(images: np.ndarray) -> np.ndarray:
            requests[0].infer([images], share_inputs=True, share_outputs=True)
            return requests[0].get_output_tensor(0).data.copy()

        return whole if parts == 1 else run

    def any_number(images: np.ndarray) -> np.ndarray:
        if len(images) not in forms:
            forms[len(images)] = compiled(len(images))
        return forms[len(images)](images)

    return any_number


def page(found: dict[str, Any]) -> str:
    lines = ["# Latency and fidelity of tuned bundles", ""]
    first = next(iter(found.values()))["machine"]
    lines += [
        f"{first['cpu']}, {first['cores']} cores, {first['system']}; torch {first['torch']}, onnxruntime "
        f"{first['onnxruntime']}; {first['date']}. Written by benchmarks/speed.py.",
        "",
        "All rows of a table are from one interleaved run in one process; a ratio is of the medians. The A/A control "
        "is the first row as a second candidate. Neighbours (share of images that keep their nearest one among "
        f"{HELD_OUT}) and margin ({HELD_OUT} images) are against PyTorch eager; kNN (k=20) is accuracy on {HELD_OUT} "
        f"images with {GALLERY} others as gallery. None of these took part in calibration, search or "
        "tuning; of the solar cells the training saw all, without labels.",
        "",
    ]
    for name, result in found.items():
        lines += [f"## {name}: {result['family']}, {result['size_px']} px, {result['images']}", ""]
        tuned = result["tuned"]
        kept = {file: len(entry["kept"]) for file, entry in result["reduction"].items()}
        shapes = ", shapes fixed" if tuned.get("batches") else ""
        shapes += f" in {tuned['streams']} streams" if tuned.get("streams", 1) > 1 else ""
        lines += [f"Tuned to {tuned['file']} with {tuned['threads']} thread(s){shapes}. Layers put back to float: "
                  + ", ".join(f"{file}: {count}" for file, count in kept.items())
                  + f". Neighbours of {result.get('neighbours_of', HELD_OUT)} images.", ""]  # fmt: skip
        lines += ["| | times faster than eager, batch 1 | batch 8 | than plain ONNX Runtime, batch 1 | batch 8 | "
                  "neighbours | margin | kNN |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        times = {batch: {row["name"]: row for row in timed["candidates"]} for batch, timed in result["timed"].items()}
        for label in times["1"]:
            against = [_ratio(times[batch], base, label) for base in (EAGER, PLAIN) for batch in ("1", "8")]
            facts = result["fidelity"].get(label)
            shown = ["", "", ""] if facts is None else [
                f"{facts['agreement']:.1%}", f"{facts['margin']:.3f}", f"{facts['knn']:.1%}"]  # fmt: skip
            bold = "**" if label == OURS else ""
            lines.append("| " + " | ".join([f"{bold}{label}{bold}", *against, *shown]) + " |")
        controls = [f"batch {batch}: {timed['control']['ratio'] - 1:+.1%}" for batch, timed in result["timed"].items()
                    if timed["control"]]  # fmt: skip
        over = [f"batch {batch}: {times[batch][OURS]['p50_ms'] / times[batch]['its bare session']['p50_ms'] - 1:+.1%}"
                for batch in times if {OURS, "its bare session"} <= set(times[batch])]  # fmt: skip
        lines += ["", f"A/A control {', '.join(controls)}. `Encoder` over its bare session: {', '.join(over)}.", ""]
    return "\n".join(lines)


def _ratio(times: dict[str, Any], base: str, label: str) -> str:
    if base not in times or label not in times:
        return "–"
    return f"{times[base]['p50_ms'] / times[label]['p50_ms']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=encoders.SPEED)
    parser.add_argument("--work", type=Path, default=Path(__file__).parents[1] / "runs" / "speed")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds for each batch size")
    options = parser.parse_args()
    store = RESULTS / "speed.json"
    for name in options.only or encoders.SPEED:
        print(name, flush=True)
        result = measured(name, options.work / name, options.budget)
        found = json.loads(store.read_text()) if store.exists() else {}
        found[name] = result
        store.write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "speed.md").write_text(page(found))


if __name__ == "__main__":
    main()
