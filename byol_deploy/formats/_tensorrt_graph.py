"""An ONNX file as TensorRT's parser takes it. The numbers stay; the package onnx is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import ExportError

INPUT = "images"
_FLOAT = "images_as_float"
# What may stand between the images and the step that makes them float: whatever moves values and does not compute.
_MOVING = ("Transpose", "Reshape", "Slice", "Gather", "Identity", "Squeeze", "Unsqueeze")
_ENDING = ("Cast", "Shape")
_EXTERNAL_ABOVE_BYTES = 1_500_000_000

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def prepare(source: Path, target: Path) -> tuple[Path, ...]:
    """Write ``source`` so that TensorRT takes it.

    TensorRT knows uint8 only as an input that goes straight into a cast, and 8-bit integers only as QuantizeLinear and
    DequantizeLinear of int8: a bias that ONNX Runtime's quantiser stored as int32 becomes the float32 that it stands
    for.

    Returns:
        The file that holds the weights, where they are too large for one.

    Raises:
        ExportError: The graph computes with the images before it makes them float, or has unsigned or shifted integers.
    """
    import onnx

    model = onnx.load(source)
    _cast_first(model.graph)
    _plain_biases(model.graph)
    _only_symmetric(model.graph)
    _sort(model.graph)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= _EXTERNAL_ABOVE_BYTES:
        onnx.save(model, target)
        further: tuple[Path, ...] = ()
    else:
        data = target.with_name(f"{target.name}.data")
        onnx.save(model, target, save_as_external_data=True, location=data.name, size_threshold=1024)
        further = (data,)
    onnx.checker.check_model(str(target), full_check=True)
    return further


def _cast_first(graph: Any) -> None:
    from onnx import TensorProto, helper

    moved = {INPUT}
    for node in graph.node:
        touched = moved & set(node.input)
        if not touched:
            continue
        if node.op_type in _MOVING:
            moved |= set(node.output)
        elif node.op_type not in _ENDING:
            raise ExportError(
                f"TensorRT cannot take this graph: {node.name} ({node.op_type}) computes with uint8 images; make them "
                "float first"
            )
        node.input[:] = [_FLOAT if name == INPUT else name for name in node.input]
    graph.node.insert(0, helper.make_node("Cast", [INPUT], [_FLOAT], "images/Cast", to=TensorProto.FLOAT))
    for value in [value for value in graph.value_info if value.name in moved]:
        graph.value_info.remove(value)  # it says uint8


def _plain_biases(graph: Any) -> None:
    from onnx import TensorProto, numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        bias = stored.get(node.input[0])
        if bias is None or bias.data_type != TensorProto.INT32:
            continue
        values = numpy_helper.to_array(bias).astype(np.float32) * numpy_helper.to_array(stored[node.input[1]])
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _only_symmetric(graph: Any) -> None:
    from onnx import TensorProto, numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = stored.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.data_type != TensorProto.INT8 or numpy_helper.to_array(zero).any():
            raise ExportError(f"TensorRT cannot take this graph: {node.name} is not of int8 with a zero point of 0")


def _sort(graph: Any) -> None:
    """Every node after those that it takes from, as ONNX demands; quantisers append theirs at the end."""
    known = {"", *(tensor.name for tensor in graph.initializer), *(port.name for port in graph.input)}
    waiting: list[Any] = list(graph.node)
    ordered: list[Any] = []
    while waiting:
        left = []
        for node in waiting:
            if set(node.input) <= known:
                ordered.append(node)
                known |= set(node.output)
            else:
                left.append(node)
        if len(left) == len(waiting):
            raise ExportError(f"TensorRT cannot take this graph: {left[0].name} takes a value that no node gives")
        waiting = left
    del graph.node[:]
    graph.node.extend(ordered)


def check(path: Path, expected: Run, size_px: int, tolerance: float) -> None:
    """Run a prepared file with ONNX Runtime on the CPU, and compare.

    Args:
        path: The prepared file.
        expected: What it must compute.
        size_px: H and W of the images.
        tolerance: Largest difference of an output, of its length.

    Raises:
        ExportError: It differs, or ONNX Runtime does not take it.
    """
    from byol_deploy.errors import BundleError
    from byol_deploy.providers import create_session

    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    fold = -(-size_px // 4)
    images = np.concatenate(
        [
            coarse.repeat(fold, 1).repeat(fold, 2)[:, :size_px, :size_px],
            draw.integers(0, 256, (1, size_px, size_px, 3), dtype=np.uint8),
        ]
    )
    try:
        session = create_session(path)
        names = [output.name for output in session.get_outputs()]
        actual = dict(zip(names, session.run(names, {INPUT: images}), strict=True))
    except BundleError as error:
        raise ExportError(f"the ONNX file that was prepared for TensorRT is damaged: {error}") from error
    for name, values in expected(images).items():
        lengths = np.linalg.norm(values, axis=1)
        off = np.linalg.norm(actual[name] - values, axis=1) / np.maximum(lengths, 1e-30)
        if not (off <= tolerance).all():
            raise ExportError(f"the ONNX file that was prepared for TensorRT is not the graph: {name} is "
                              f"{off.max():.1e} of its length off")  # fmt: skip
