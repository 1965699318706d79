"""Faults in a written ONNX file: a pass that went wrong, or a file that was damaged after it was published."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from byol_deploy.bundle import read_carried
from faults.making import Case, Made
from faults.modules import compute
from faults.reduced import quiet, with_texts
from faults.subject import Subject, carried_with, seal


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """Write and seal a changed model, as a pass does."""
    onnx.save(model, path)
    seal(path)
    return path


def _loaded(subject: Subject) -> onnx.ModelProto:
    return with_texts(onnx.load(subject.clean), subject.carried)


def signed_cast(subject: Subject, folder: Path) -> Made:
    """Pixels cast to int8 on their way to float: values above 127 become negative."""
    model = _loaded(subject)
    nodes = model.graph.node
    place, cast = next((place, node) for place, node in enumerate(nodes) if node.op_type == "Cast")
    signed = helper.make_node("Cast", [cast.input[0]], ["signed:0"], "signed", to=TensorProto.INT8)
    cast.input[0] = "signed:0"
    nodes.insert(place, signed)
    return Made(saved(model, folder / "model.onnx"))


def baked_batch(subject: Subject, folder: Path) -> Made:
    """Plain ``torch.onnx.export`` of one image, as it stands in a tutorial: the file takes one image at a time."""
    graph = subject.broken()
    path = folder / "model.onnx"
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.from_numpy(subject.example(1)),),
            dynamo=True,
            opset_version=18,
            input_names=["images"],
            output_names=list(graph.outputs),
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
    model = with_texts(onnx.load(path), subject.carried)
    for leftover in folder.iterdir():
        leftover.unlink()
    return Made(saved(model, path), compute(graph, graph.outputs), traced_batch=1)


def _other_contract(subject: Subject, folder: Path, **changes: Any) -> Made:
    manifest = read_carried(subject.carried, "the clean file")[0]
    contract = replace(manifest.input, preprocessing=replace(manifest.preprocessing, **changes))
    return Made(saved(
        with_texts(onnx.load(subject.clean), carried_with(subject.carried, input=contract)), folder / "model.onnx"
    ))  # fmt: skip


def stale_statistics(subject: Subject, folder: Path) -> Made:
    """The graph is right; the contract that it carries names another recipe's mean and deviation."""
    mean, std = subject.other_statistics
    return _other_contract(subject, folder, mean=mean, std=std)


def stale_resize(subject: Subject, folder: Path) -> Made:
    """The graph is right; the contract that it carries says to resize to 8/7 and then crop."""
    return _other_contract(subject, folder, resize_px=subject.graph.size_px * 8 // 7)


def _weight_bytes(path: Path, flip: int, place: int) -> None:
    """Flip bits in one byte of the middle number of the first layer's weight, in the file's own bytes."""
    first = next(tensor for tensor in onnx.load(path).graph.initializer
                 if tensor.name.startswith("backbone.") and len(tensor.dims) == 4)  # fmt: skip
    content = bytearray(path.read_bytes())
    start = content.find(first.raw_data)
    assert content.count(first.raw_data) == 1
    content[start + len(first.raw_data) // 8 * 4 + place] ^= flip
    path.write_bytes(bytes(content))


def high_byte(subject: Subject, folder: Path) -> Made:
    """One bit of one weight's exponent flipped on disk."""
    path = Path(shutil.copy(subject.clean, folder / "model.onnx"))
    _weight_bytes(path, 0x40, 3)
    return Made(path)


def low_byte(subject: Subject, folder: Path) -> Made:
    """The last bit of one weight flipped on disk: no output shows it beyond rounding."""
    path = Path(shutil.copy(subject.clean, folder / "model.onnx"))
    _weight_bytes(path, 0x01, 0)
    return Made(path)


def external(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model as two files."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    return path


def stale_external_data(subject: Subject, folder: Path) -> Made:
    """Two files, and the second one is from an earlier checkpoint of the same training."""
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.training.checkpoints import load_checkpoint

    path = external(_loaded(subject), folder / "model.onnx")
    seal(path)
    assert subject.loaded.preprocessing is not None
    earlier = EncoderGraph(load_checkpoint(subject.earlier).model, subject.loaded.preprocessing).tensors()
    model = _loaded(subject)
    for tensor in model.graph.initializer:
        if tensor.name in earlier:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(earlier[tensor.name]), tensor.name))
    other = folder / "other"
    other.mkdir()
    external(model, other / "model.onnx")
    shutil.move(other / "model.onnx.data", folder / "model.onnx.data")
    shutil.rmtree(other)
    return Made(path)


def dropout_left_on(subject: Subject, folder: Path) -> Made:
    """A Dropout of 10 % in training mode before the embedding: each run gives something else."""
    model = _loaded(subject)
    nodes = model.graph.node
    place, node = next((place, node) for place, node in enumerate(nodes) if "embedding" in node.output)
    inner = "before dropout:0"
    for other in nodes:
        for position, name in enumerate(other.input):
            if name == "embedding":
                other.input[position] = inner
    node.output[list(node.output).index("embedding")] = inner
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.1), "ratio"), numpy_helper.from_array(np.bool_(True), "training")]
    )
    nodes.insert(place + 1, helper.make_node("Dropout", [inner, "ratio", "training"], ["embedding"], "dropout"))
    return Made(saved(model, folder / "model.onnx"))


CASES = (
    Case("int8 cast of pixels", "file", "pixels above 127 become negative on their way to float", signed_cast),
    Case("baked batch", "file", "plain torch.onnx.export of one image: takes one image at a time", baked_batch),
    Case("stale contract: mean", "file", "carries another recipe's mean and deviation; the graph is right",
         stale_statistics),
    Case("stale contract: resize", "file", "carries another recipe's resize; the graph is right", stale_resize),
    Case("flipped high bit", "file", "one exponent bit of one weight, on disk", high_byte),
    Case("flipped lowest bit", "file", "the last bit of one weight, on disk: no output shows it", low_byte),
    Case("stale external data", "file", "the .data file of an earlier checkpoint beside the .onnx",
         stale_external_data),
    Case("dropout left on", "file", "Dropout in training mode before the embedding", dropout_left_on),
)  # fmt: skip
