"""Variants that compute what was trained: a check that rejects them cries wolf."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch

from byol_deploy import formats
from byol_deploy.formats import Signature
from faults import runtimes
from faults.files import external, saved
from faults.making import Case, Made
from faults.reduced import folded, quiet, with_texts
from faults.subject import Subject, seal


def one_thread(subject: Subject, folder: Path) -> Made:
    """One thread inside an operator."""
    return Made(subject.clean, threads=1)


def two_threads(subject: Subject, folder: Path) -> Made:
    """Two threads inside an operator."""
    return Made(subject.clean, threads=2)


def not_optimised(subject: Subject, folder: Path) -> Made:
    """ONNX Runtime without graph optimisation."""
    return Made(subject.clean, runtime=runtimes.unoptimised("none"))


def basic(subject: Subject, folder: Path) -> Made:
    """ONNX Runtime with basic graph optimisation."""
    return Made(subject.clean, runtime=runtimes.unoptimised("basic"))


def other_engine(subject: Subject, folder: Path) -> Made:
    """OpenVINO computes the same file; where it is not installed, the ONNX project's own evaluator."""
    there = find_spec("openvino") is not None
    return Made(subject.clean, runtime=runtimes.openvino if there else runtimes.onnx_reference)


def reordered(subject: Subject, folder: Path) -> Made:
    """The same nodes in another topological order: of those that are ready always the one that was last."""
    model = with_texts(onnx.load(subject.clean), subject.carried)
    nodes = list(model.graph.node)
    known = {value.name for value in [*model.graph.input, *model.graph.initializer]} | {""}
    order = []
    while nodes:
        ready = max(place for place, node in enumerate(nodes) if set(node.input) <= known)
        node = nodes.pop(ready)
        known |= set(node.output)
        order.append(node)
    assert [node.name for node in order] != [node.name for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(order)
    return Made(saved(model, folder / "model.onnx"))


def folded_norms(subject: Subject, folder: Path) -> Made:
    """Batch norm folded into the convolutions before it, constants folded, by ONNX Runtime."""
    path = folded(subject.clean, folder / "model.onnx")
    return Made(saved(with_texts(onnx.load(path), subject.carried), path))


def optimised_offline(subject: Subject, folder: Path) -> Made:
    """The graph that ONNX Runtime made of the file, with its fused operators, saved as a file."""
    import onnxruntime

    path = folder / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(subject.clean), options, providers=["CPUExecutionProvider"])
    return Made(saved(with_texts(onnx.load(path), subject.carried), path))


def channels_last(subject: Subject, folder: Path) -> Made:
    """Weights and activations in channels-last memory, as TorchScript."""
    return Made(subject.write(subject.broken().to(memory_format=torch.channels_last), folder / "model.torchscript.pt"))


def torchscript(subject: Subject, folder: Path) -> Made:
    """The clean TorchScript file."""
    return Made(subject.bundle / "model.torchscript.pt")


def later_opset(subject: Subject, folder: Path) -> Made:
    """Opset 21 instead of 18."""
    path = folder / "model.onnx"
    signature = Signature(subject.graph.size_px, subject.graph.outputs, opset=21)
    formats.get("onnx").export(subject.broken(), signature, path, subject.carried)
    seal(path)
    return Made(path)


def two_files(subject: Subject, folder: Path) -> Made:
    """The weights in a second file."""
    path = external(with_texts(onnx.load(subject.clean), subject.carried), folder / "model.onnx")
    seal(path)
    return Made(path)


def simplified(subject: Subject, folder: Path) -> Made | None:
    """What onnxslim makes of it; nothing where it is not installed."""
    if find_spec("onnxslim") is None:
        return None
    import onnxslim

    with quiet():
        model = onnxslim.slim(onnx.load(subject.clean))
    return Made(saved(with_texts(model, subject.carried), folder / "model.onnx"))


def plain_export(subject: Subject, folder: Path) -> Made:
    """Plain ``torch.onnx.export`` with its own optimisations and a dynamic batch."""
    path = folder / "model.onnx"
    graph = subject.broken()
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph, (torch.from_numpy(np.array(subject.example())),), dynamo=True, opset_version=18,
            input_names=["images"], output_names=list(graph.outputs),
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)
    return Made(saved(with_texts(onnx.load(path), subject.carried), path))


CASES = (
    Case("one thread", "runtime", "one thread inside an operator", one_thread, harmless=True),
    Case("two threads", "runtime", "two threads inside an operator", two_threads, harmless=True),
    Case("no graph optimisation", "runtime", "ONNX Runtime computes the graph as it is written", not_optimised,
         harmless=True),
    Case("basic optimisation", "runtime", "ONNX Runtime with basic optimisations", basic, harmless=True),
    Case("another engine", "runtime", "OpenVINO in float32 (without it onnx.reference)", other_engine, harmless=True),
    Case("operator order", "file", "the same nodes in another topological order", reordered, harmless=True),
    Case("batch norm folded", "file", "folded into the convolutions before it", folded_norms, harmless=True),
    Case("optimised offline", "file", "ONNX Runtime's fused graph, saved", optimised_offline, harmless=True),
    Case("simplified", "file", "what onnxslim makes of it", simplified, harmless=True),
    Case("weights in a second file", "file", "external data", two_files, harmless=True),
    Case("plain exporter", "export", "torch.onnx.export with its own optimisations, batch dynamic", plain_export,
         harmless=True),
    Case("later opset", "export", "opset 21", later_opset, harmless=True),
    Case("TorchScript", "export", "the other format", torchscript, harmless=True),
    Case("channels last", "export", "channels-last memory, TorchScript", channels_last, harmless=True),
)  # fmt: skip
