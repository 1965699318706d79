"""The tuned bundle beside PyTorch and beside what one would do otherwise: latency and fidelity, in interleaved runs.

    python benchmarks/speed.py [--only NAME]... [--work runs/speed] [--processes 3]

For each encoder of encoders.SPEED: ``export --tune`` on a part of the images, then everything else on images that took
part in nothing: neighbours and margin against PyTorch, kNN accuracy, and the latency at batch 1 and 8. The others are
made by the tools' own defaults: plain ``torch.onnx.export``, onnxruntime's ``quantize_static`` and
``quantize_dynamic``, NNCF's ``quantize``, ``torch.compile``. A bundle in ``--work`` is
kept, so that it can be measured again. PyTorch's own speed differs by a tenth and more between processes: the latency
is therefore measured in several fresh ones, each with all its rows interleaved. Results go to results/speed.json, from
which results/speed.md is written; an encoder that is measured again replaces its own rows only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
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
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.checkpoints import load_checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT, GALLERY, CALIBRATING = 400, 400, 128
EAGER, OURS, PLAIN = "PyTorch eager", "tuned bundle", "torch.onnx.export + ONNX Runtime"
BARE = "its bare session"
OTHERS_FILES = "plain.onnx", "static.onnx", "dynamic.onnx", "nncf.xml"

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


def others(graph: EncoderGraph, calibrating: np.ndarray, work: Path) -> dict[str, Callable[[], Run]]:
    """What a user would do otherwise, each by its tool's defaults: opens it, after making its file if there is none."""
    side = graph.size_px
    plain, static, dynamic, nncf_file = (work / file for file in OTHERS_FILES)
    example = torch.zeros((2, side, side, 3), dtype=torch.uint8)

    def plain_export() -> Run:
        if not plain.exists():
            shapes = ({0: torch.export.Dim("batch")},)
            with torch.no_grad():
                torch.onnx.export(graph, (example,), plain, dynamo=True, input_names=["images"],
                                  output_names=["embedding"], dynamic_shapes=shapes, external_data=False)  # fmt: skip
        return session(plain)

    def ort_static() -> Run:
        from onnxruntime.quantization import quantize_static

        if not static.exists():
            quantize_static(plain, static, Batches(calibrating))
        return session(static)

    def ort_dynamic() -> Run:
        from onnxruntime.quantization import quantize_dynamic

        if not dynamic.exists():
            quantize_dynamic(plain, dynamic)
        return session(dynamic)

    def nncf_default() -> Run:
        import openvino

        if not nncf_file.exists():
            import nncf

            images = nncf.Dataset([calibrating[place : place + 1] for place in range(len(calibrating))])
            openvino.save_model(nncf.quantize(openvino.convert_model(plain), images), nncf_file, compress_to_fp16=False)
        settings = {"INFERENCE_NUM_THREADS": usable_cores()}
        compiled = openvino.Core().compile_model(nncf_file, "CPU", settings)
        return lambda given: np.array(compiled([given])[0])

    def compiled() -> Run:
        function = torch.compile(graph)

        def run(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return function(torch.from_numpy(images))[0].numpy()

        run(calibrating[:1])
        return run

    return {
        PLAIN: plain_export,
        "torch.compile": compiled,
        "quantize_static, defaults": ort_static,
        "quantize_dynamic, defaults": ort_dynamic,
        "NNCF, defaults": nncf_default,
    }


def rows(name: str, work: Path, images: np.ndarray) -> dict[str, Callable[[], Run]]:
    """How each row of the table is opened, by its label; the bundle has to be there.

    Args:
        name: Of the encoder.
        work: Where its bundle lies and the other tools' files are put.
        images: (N, H, W, 3) uint8 for their calibration.
    """
    bundle = work / "bundle"
    manifest = Bundle.open(bundle).manifest
    entries = {entry.file: entry for entry in manifest.artefacts}
    assert manifest.tuned is not None
    graph, _ = trained_graph(name)

    def eager() -> Run:
        def run(given: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return graph(torch.from_numpy(given))[0].numpy()

        return run

    def artefact(file: str) -> Run:
        opened = formats.get(entries[file].format).load(bundle / file, RunOptions(threads=usable_cores()))
        return lambda given: opened.compute(given, ("embedding",))["embedding"]

    def ours() -> Run:
        encoder = Encoder(bundle)
        return lambda given: encoder.run(given)["embedding"]

    tuned = manifest.tuned
    return {
        EAGER: eager,
        **{f"ours, {file}": partial(artefact, file) for file in entries},
        OURS: ours,
        BARE: lambda: native(bundle / tuned.file, entries[tuned.file].format, tuned),
        **others(graph, images[:CALIBRATING], work),
    }


def opened(makers: dict[str, Callable[[], Run]], example: np.ndarray) -> dict[str, Run]:
    """Those that can be opened and run on ``example``; a tool that fails by its defaults is a result."""
    runs: dict[str, Run] = {}
    for label, make in makers.items():
        try:
            with quiet():
                run = make()
                run(example)
            runs[label] = run
        except Exception as error:
            print(f"  {label} failed: {type(error).__name__}: {str(error)[:150]}", flush=True)
    return runs


def trained_graph(name: str) -> tuple[EncoderGraph, Preprocessing]:
    loaded = load_checkpoint(encoders.trained(name))
    assert loaded.preprocessing is not None
    return EncoderGraph(loaded.model, loaded.preprocessing, ("embedding",)), loaded.preprocessing


def timed(name: str, work: Path, batch: int, budget_s: float) -> dict[str, Any]:
    """The latency of the rows in this process, interleaved; at batch 8 only of those that the ratios need."""
    images = np.load(work / "test.npy")
    makers = rows(name, work, images)
    # A round of all rows at batch 8 takes too long to repeat often.
    few = {label: make for label, make in makers.items() if batch == 1 or label in (EAGER, OURS, BARE, PLAIN)}
    given = np.ascontiguousarray(images[:batch])
    calls = {label: partial(run, given) for label, run in opened(few, given).items()}
    return measure_candidates(calls, budget_s=budget_s, rounds=15).to_dict()


def measured(name: str, work: Path, budget_s: float, processes: int) -> dict[str, Any]:
    began = time.perf_counter()
    run_dir = encoders.trained(name)
    encoder = encoders.SPEED[name]
    data = encoders.cells() if encoder.cells else encoders.images() / "test"
    work.mkdir(parents=True, exist_ok=True)
    folder, gallery, test = split(data, work)
    bundle = work / "bundle"
    if not bundle.exists():
        for made in OTHERS_FILES:
            (work / made).unlink(missing_ok=True)
        with (work / "export.log").open("w") as said:
            export(run_dir, formats=("onnx", "openvino"), precisions=("int8", "bf16"), tune_s=120, data=folder,
                   out=bundle, outputs=["embedding"], say=lambda line: print(line, file=said, flush=True))  # fmt: skip
    manifest = Bundle.open(bundle).manifest
    assert manifest.tuned is not None
    print(f"  exported in {time.perf_counter() - began:.0f} s: {manifest.tuned.file}", flush=True)

    graph, preprocessing = trained_graph(name)
    images = {part: preprocessing.batch(paths) for part, paths in (("gallery", gallery), ("test", test))}
    classes = sorted({path.parent.name for path in [*gallery, *test]})
    labels = {part: np.array([classes.index(path.parent.name) for path in paths])
              for part, paths in (("gallery", gallery), ("test", test))}  # fmt: skip
    np.save(work / "test.npy", images["test"][:8])
    entries = {entry.file: entry for entry in manifest.artefacts}
    makers = rows(name, work, images["gallery"])
    runs = opened({label: make for label, make in makers.items() if label != BARE}, images["gallery"][:1])

    fidelity: dict[str, dict[str, float | None]] = {}
    reference: dict[str, np.ndarray] = {}
    for label, run in runs.items():
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
    runs.clear()
    times: dict[str, list[dict[str, Any]]] = {}
    for batch in ("1", "8"):
        out = work / "timed.json"
        command = [sys.executable, __file__, "--only", name, "--work", work.parent, "--budget", str(budget_s),
                   "--time", batch, "--out", out]  # fmt: skip
        for _ in range(processes):
            subprocess.run(command, check=True)
            times.setdefault(batch, []).append(json.loads(out.read_text()))
    print(f"  timed after {time.perf_counter() - began:.0f} s", flush=True)
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
        "timed": times,
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
        "Rows are timed interleaved, in one process or in several fresh ones, as PyTorch's own speed differs between "
        "processes; a ratio is of the medians within a process, and of several processes the middle one with the least "
        "and the greatest in brackets. The A/A control "
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
        put_back = ", ".join(f"{file}: {count}" for file, count in kept.items())
        lines += [f"Tuned to {tuned['file']} with {tuned['threads']} thread(s){shapes}. "
                  + (f"Layers put back to float: {put_back}. " if kept else "No smaller file keeps the goal. ")
                  + f"Neighbours of {result.get('neighbours_of', HELD_OUT)} images.", ""]  # fmt: skip
        lines += ["| | times faster than eager, batch 1 | batch 8 | than plain ONNX Runtime, batch 1 | batch 8 | "
                  "neighbours | margin | kNN |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        # A result of before latency was measured in several processes holds one.
        runs = {batch: timed if isinstance(timed, list) else [timed] for batch, timed in result["timed"].items()}
        for label in [row["name"] for row in runs["1"][0]["candidates"]]:
            against = [_range(_ratios(runs[batch], base, label)) for base in (EAGER, PLAIN) for batch in ("1", "8")]
            facts = result["fidelity"].get(label)
            shown = ["", "", ""] if facts is None else [
                f"{facts['agreement']:.1%}", f"{facts['margin']:.3f}", f"{facts['knn']:.1%}"]  # fmt: skip
            bold = "**" if label == OURS else ""
            lines.append("| " + " | ".join([f"{bold}{label}{bold}", *against, *shown]) + " |")
        controls = [f"batch {batch}: {', '.join(f'{one:+.1%}' for one in ones)}" for batch, timed in runs.items()
                    if (ones := [one["control"]["ratio"] - 1 for one in timed if one["control"]])]  # fmt: skip
        over = [f"batch {batch}: {', '.join(f'{ratio - 1:+.1%}' for ratio in _ratios(timed, OURS, BARE))}"
                for batch, timed in runs.items()]  # fmt: skip
        lines += ["", f"A/A control, by process, {'; '.join(controls)}. `Encoder` over its bare session, by process, "
                      f"{'; '.join(over)}. Measured {result['machine']['date']}.", ""]  # fmt: skip
    return "\n".join(lines)


def _ratios(processes: list[dict[str, Any]], base: str, label: str) -> list[float]:
    """How many times the time of ``label`` the one of ``base`` is, in each process that measured both."""
    times = [{row["name"]: row["p50_ms"] for row in one["candidates"]} for one in processes]
    return [one[base] / one[label] for one in times if {base, label} <= set(one)]


def _range(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=encoders.SPEED)
    parser.add_argument("--work", type=Path, default=Path(__file__).parents[1] / "runs" / "speed")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for a process")
    parser.add_argument("--processes", type=int, default=3, help="for each batch size")
    parser.add_argument("--time", type=int, help="only the latency at this batch size, in this process, into --out")
    parser.add_argument("--out", type=Path, help="of --time")
    parser.add_argument("--page", action="store_true", help="only write results/speed.md from what is measured")
    options = parser.parse_args()
    if options.time:
        (name,) = options.only
        options.out.write_text(json.dumps(timed(name, options.work / name, options.time, options.budget)))
        return
    store = RESULTS / "speed.json"
    for name in [] if options.page else options.only or encoders.SPEED:
        print(name, flush=True)
        result = measured(name, options.work / name, options.budget, options.processes)
        found = json.loads(store.read_text()) if store.exists() else {}
        found[name] = result
        store.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "speed.md").write_text(page(json.loads(store.read_text())))


if __name__ == "__main__":
    main()
