"""What PyTorch's exporter computes in a roundabout way, said directly: fewer operators for the same numbers.

The passes of onnxscript's optimiser come first (:func:`byol_deploy.formats.onnx._tidy`); these know what the exporter
writes for the modules of vision backbones. Every rule looks at the shapes and constants that make it right, and leaves
alone what it does not know. Parameters are not touched: a file must be able to prove whose they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NAMED = frozenset({"preprocessing.scale", "preprocessing.shift"})
"""Constants that :func:`remove` makes and that keep their names: what pixels are multiplied by, and what is added."""


def without_strides(program: Any) -> None:
    """Pool to one pixel by a mean, before the exporter takes the program.

    PyTorch decomposes ``adaptive_avg_pool2d(x, 1)`` into a mean and ``as_strided``, which becomes a Gather whose
    indices are computed from the batch size: eleven operators.

    Args:
        program: A ``torch.export.ExportedProgram``, changed in place.
    """
    import torch

    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.adaptive_avg_pool2d.default or list(node.args[1]) != [1, 1]:
            continue
        with graph.inserting_before(node):
            mean = graph.call_function(aten.mean.dim, (node.args[0], [-1, -2], True))
        mean.meta = dict(node.meta)
        node.replace_all_uses_with(mean)
        graph.erase_node(node)
        for spec in program.graph_signature.output_specs:
            if spec.arg.name == node.name:
                spec.arg.name = mean.name
    program.graph_module.recompile()


def remove(model: Any) -> None:
    """Apply all rules to a model, in place.

    Args:
        model: An ``onnx_ir.Model`` with inferred types and shapes.
    """
    for rule in (_casts_of_constants, _transposed_keys, _picked_slices, _one_attention_scale, _normalization):
        for node in list(model.graph):
            if node.graph is model.graph:  # an earlier application may have taken it out
                rule(model.graph, node)


def _casts_of_constants(graph: Any, node: Any) -> None:
    """CastLike of a float32 constant to float32: the constant."""
    if node.op_type != "CastLike" or _constant(node.inputs[0]) is None:
        return
    value, like = node.inputs
    if like.dtype is not None and value.const_value.dtype == like.dtype:
        _replace(graph, node, value)


def _transposed_keys(graph: Any, node: Any) -> None:
    """The keys of an attention, (B, H, N, D) to (B, H, D, N): reshaped to three axes, transposed, and reshaped back."""
    before = _maker(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    first = _maker(before.inputs[0], "Reshape") if before is not None else None
    if first is None or list(_ints(before, "perm")) != [0, 2, 1]:
        return
    source, flat, made = first.inputs[0], first.outputs[0], node.outputs[0]
    sizes = [_sizes(value) for value in (source, flat, made)]
    if any(found is None for found in sizes) or [len(found or ()) for found in sizes] != [4, 3, 4]:
        return
    given, middle, result = (list(found or ()) for found in sizes)
    if result != [given[0], given[1], given[3], given[2]] or middle[1:] != given[2:]:
        return
    if not all(isinstance(size, int) for size in given[1:]):
        return
    import onnx_ir as ir

    _put(graph, node, ir.node("Transpose", [source], {"perm": [0, 1, 3, 2]}))


def _picked_slices(graph: Any, node: Any) -> None:
    """One slice along an axis that then goes away: picked."""
    before = _maker(node.inputs[0], "Slice") if node.op_type == "Squeeze" else None
    if before is None or len(before.outputs[0].uses()) != 1 or len(node.inputs) < 2 or len(before.inputs) < 4:
        return
    starts, ends, axes = (_constant(value) for value in before.inputs[1:4])
    steps = np.ones(1) if len(before.inputs) < 5 else _constant(before.inputs[4])
    squeezed = _constant(node.inputs[1])
    if any(found is None or found.size != 1 for found in (starts, ends, axes, steps, squeezed)):
        return
    start, end, axis = (int(found.item()) for found in (starts, ends, axes) if found is not None)
    if axis < 0 or start < 0 or end != start + 1 or squeezed is None or int(squeezed.item()) != axis:
        return
    import onnx_ir as ir

    index = ir.val(f"{node.outputs[0].name}_index", const_value=ir.tensor(np.array(start, np.int64)))
    graph.register_initializer(index)
    _put(graph, node, ir.node("Gather", [before.inputs[0], index], {"axis": axis}))


def _one_attention_scale(graph: Any, node: Any) -> None:
    """Queries and keys are both scaled by the root: the queries alone by the whole."""
    if node.op_type != "MatMul":
        return
    left, right = (_maker(value, "Mul") for value in node.inputs)
    if left is None or right is None or any(len(side.outputs[0].uses()) != 1 for side in (left, right)):
        return
    factors = [_constant(side.inputs[1]) for side in (left, right)]
    if any(found is None or found.size != 1 or found.dtype != np.float32 for found in factors):
        return
    import onnx_ir as ir

    # The exporter rounds the root of 1/8 to float32; its square is 1/8 but for a bit.
    whole = float(np.prod([np.float64(found.item()) for found in factors if found is not None]))
    shorter = float(np.float32(f"{whole:.6g}"))
    if abs(shorter / whole - 1) < 2e-7:
        whole = shorter
    shape = () if factors[0] is None else factors[0].shape
    scale = ir.val(f"{left.outputs[0].name}_scale", const_value=ir.tensor(np.full(shape, whole, np.float32)))
    graph.register_initializer(scale)
    left.replace_input_with(1, scale)
    node.replace_input_with(1, right.inputs[0])
    graph.remove(right, safe=True)


def _normalization(graph: Any, node: Any) -> None:
    """Pixels divided by 255, less the mean, divided by the deviation: one factor and one shift for each channel.

    Both are computed in float64 and rounded once, which is no farther from the true values than three roundings.
    """
    middle = _maker(node.inputs[0], "Sub") if node.op_type == "Div" else None
    first = _maker(middle.inputs[0], "Div") if middle is not None else None
    if middle is None or first is None or _maker(first.inputs[0], "Cast") is None:
        return
    if any(len(side.outputs[0].uses()) != 1 for side in (first, middle)) or NAMED & set(graph.initializers):
        return
    largest, mean, deviation = (_constant(side.inputs[1]) for side in (first, middle, node))
    if largest is None or mean is None or deviation is None or largest.size != 1 or mean.shape != deviation.shape:
        return
    import onnx_ir as ir

    wide = deviation.astype(np.float64)
    scale = ir.val("preprocessing.scale", const_value=ir.tensor((1.0 / (largest.item() * wide)).astype(np.float32)))
    shift = ir.val("preprocessing.shift", const_value=ir.tensor((-mean.astype(np.float64) / wide).astype(np.float32)))
    graph.register_initializer(scale)
    graph.register_initializer(shift)
    scaled = ir.node("Mul", [first.inputs[0], scale], metadata_props=dict(node.metadata_props))
    scaled.outputs[0].name = f"{node.outputs[0].name}_scaled"
    scaled.outputs[0].type, scaled.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, scaled)
    _put(graph, node, ir.node("Add", [scaled.outputs[0], shift]))


def _maker(value: Any, kind: str) -> Any:
    """The node that makes a value, where it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and node.domain == "" else None


def _constant(value: Any) -> np.ndarray | None:
    """A value that depends on nothing, as an array."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def _ints(node: Any, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())


def _sizes(value: Any) -> list[int | str | None] | None:
    """Sizes of a value: numbers where they are fixed, otherwise the symbol; None where they are unknown."""
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _put(graph: Any, old: Any, new: Any) -> None:
    """Put a node in the place of another: its output, type and origin."""
    new.outputs[0].name = old.outputs[0].name
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    _replace(graph, old, new.outputs[0])


def _replace(graph: Any, node: Any, value: Any) -> None:
    """Let the readers of a node's output read ``value``, and take the node out; what fed it alone goes later."""
    old = node.outputs[0]
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = value
    for user, index in list(old.uses()):
        user.replace_input_with(index, value)
    graph.remove(node, safe=True)
