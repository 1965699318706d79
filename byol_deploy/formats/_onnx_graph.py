"""The graph of an ONNX file, and which of its values is which module's: told by names, by weights, or by order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError
from byol_deploy.formats._layers import Call, chunks, leaf_calls

_SHAPE_ONLY = frozenset({"Shape", "Size"})
# Inserted by quantizers and type converters: they change a value's type, not what it stands for.
TYPE_CHANGES = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
# `backbone/layer1/0/conv1/Conv:0` (ours) and `/backbone/layer1/layer1.0/conv1/Conv_output_0` (PyTorch's old exporter).
_VALUE = re.compile(r"^/?(?:(.*)/)?[A-Z][A-Za-z0-9]*(?:_\d+)?(?::\d+|_output_\d+)$")
_NODE = re.compile(r"^/?(?:(.*)/)?[A-Z][A-Za-z0-9]*(?:_\d+)?$")
# The nodes that hold a module's weights, by the beginning of the class's name: what is left when names are lost.
_KINDS = {"Conv": ("Conv",), "Linear": ("Gemm", "MatMul"), "BatchNorm": ("BatchNormalization",),
          "LayerNorm": ("LayerNormalization",)}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A value of the file that may be a tensor of the reference."""

    value: str
    slot: int
    path: str
    number: int
    kind: str


class Graph:
    """The graph of a file: who makes a value, who reads it, which values depend on the pixels."""

    def __init__(self, graph: Any) -> None:
        stored = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in stored]
        if len(inputs) != 1:
            raise BundleError(f"the file takes {len(inputs)} inputs; an encoder takes one, the images")
        self.input = inputs[0]
        self.nodes = list(graph.node)
        self.outputs = [value.name for value in graph.output]
        self.maker: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        # Shapes depend on the images' size and not on what is in them.
        self.dynamic = {self.input.name}
        for place, node in enumerate(self.nodes):
            reads = reads_of(node)
            for name in reads:
                self.readers.setdefault(name, []).append(place)
            depends = node.op_type not in _SHAPE_ONLY and not self.dynamic.isdisjoint(reads)
            for name in node.output:
                self.maker[name] = place
                if depends:
                    self.dynamic.add(name)

    def fixed_batch(self) -> int:
        """The batch that the file insists on; 0 where it takes any."""
        dims = self.input.type.tensor_type.shape.dim
        return int(dims[0].dim_value) if dims else 0

    def scope(self, node: Any) -> str:
        """The module path in the names of a node and its value; the value's counts more.

        Where batch norm was folded into a convolution, the node keeps the convolution's name and the value batch
        norm's, which is what the value is.
        """
        for pattern, name in ((_VALUE, node.output[0]), (_NODE, node.name)):
            match = pattern.match(name)
            if match:
                return _dotted(match.group(1) or "")
        return ""

    def effective(self, name: str) -> str:
        """The value as its readers see it: behind the type changes that stand between it and all of them."""
        seen_by_all = name
        while name not in self.outputs:
            readers = self.readers.get(name, [])
            kinds = {self.nodes[place].op_type for place in readers}
            if len(kinds) != 1 or not kinds <= TYPE_CHANGES or self.scope(self.nodes[readers[0]]):
                break
            name = str(self.nodes[readers[0]].output[0])
            if kinds != {"QuantizeLinear"}:  # integers mean nothing without their scale
                seen_by_all = name
        return seen_by_all

    def segment(self, name: str, ends: Mapping[str, int]) -> tuple[list[Any], tuple[int, ...]]:
        """The nodes that compute ``name`` from the values ``ends``, in order, and which of these they reach."""
        needed: set[int] = set()
        reached: set[int] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop()
            if current != name and current in ends:
                reached.add(ends[current])
                continue
            if current == self.input.name:
                reached.add(-1)
            place = self.maker.get(current)
            if place is not None and place not in needed:
                needed.add(place)
                waiting += reads_of(self.nodes[place])
        return [self.nodes[place] for place in sorted(needed)], tuple(sorted(reached))


def find_values(
    graph: Graph, calls: Sequence[Call], slots: Sequence[np.ndarray]
) -> tuple[list[Found], dict[tuple[str, int], str]]:
    """The values of the file that should hold tensors of the reference, in the file's order; and what has none."""
    leaves = leaf_calls(calls)
    by_path: dict[str, list[Call]] = {}
    for call in leaves:
        by_path.setdefault(call.path, []).append(call)
    belongs = _belongs(graph, by_path)
    found: dict[str, Found] = {}
    unmatched: dict[tuple[str, int], str] = {}
    firsts: dict[tuple[str, int], int] = {}
    for path, ours in by_path.items():
        parts = chunks(belongs.get(path, []), len(ours))
        for place, call in enumerate(ours):
            key = (path, call.number if call.of > 1 else 0)
            if parts is None:
                many = f"{len(belongs[path])} nodes for {len(ours)} calls" if path in belongs else "no node of its own"
                unmatched[key] = f"{many} in the file: folded into a neighbour, or renamed"
                continue
            part = parts[place]
            firsts[key] = part[0]
            value = graph.effective(_result(graph, part))
            number = call.number if call.of > 1 else -1
            found.setdefault(value, Found(value, call.outputs[0], path, number, "module"))
    for path, ours in by_path.items():
        for call in ours:
            first = firsts.get((path, call.number if call.of > 1 else 0))
            # The images themselves are no operation's, even where a file casts them first.
            if first is None or call.input is None or not np.issubdtype(slots[call.input].dtype, np.floating):
                continue
            named = _NODE.match(graph.nodes[first].name)
            if named and named.group(1) and _owner(_dotted(named.group(1)), by_path) != path:
                continue  # merged with another module's node, whose input it takes
            reads = [name for name in reads_of(graph.nodes[first]) if name in graph.dynamic]
            # What a functional operation made and a module takes.
            if len(set(reads)) == 1 and reads[0] in graph.maker and reads[0] not in found:
                found[reads[0]] = Found(reads[0], call.input, "", -1, "operation")
    whole = calls[-1]
    for name, slot in zip(graph.outputs, whole.outputs, strict=False):
        if name not in found:
            found[name] = Found(name, slot, "", -1, "output")
    ordered = sorted(
        (item for item in found.values() if item.value in graph.maker), key=lambda item: graph.maker[item.value]
    )
    return ordered, unmatched


def _result(graph: Graph, part: Sequence[int]) -> str:
    """What a module's nodes hand on: the one value that others read, else the last one."""
    inside = set(part)
    read = [
        name
        for place in part
        for name in graph.nodes[place].output
        if name in graph.outputs or any(reader not in inside for reader in graph.readers.get(name, []))
    ]
    return str(read[0] if len(read) == 1 else graph.nodes[part[-1]].output[0])


def _belongs(graph: Graph, by_path: Mapping[str, list[Call]]) -> dict[str, list[int]]:
    """Nodes that depend on the pixels, by the module that they belong to: by name, else by weight, else by order."""
    found: dict[str, list[int]] = {}
    for place, node in enumerate(graph.nodes):
        if node.output[0] in graph.dynamic:
            path = _owner(graph.scope(node), by_path)
            if path:
                found.setdefault(path, []).append(place)
    if found:
        return found
    for place, node in enumerate(graph.nodes):
        if node.output[0] in graph.dynamic:
            owners = {_owner(name.rpartition(".")[0], by_path) for name in node.input if "." in name} - {""}
            if len(owners) == 1:
                found.setdefault(owners.pop(), []).append(place)
    return found or _by_order(graph, by_path)


def _owner(scope: str, by_path: Mapping[str, list[Call]]) -> str:
    """The module that a scope in the file names: itself, a part of it, or the only one that ends so."""
    parts = scope.split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        if path in by_path:
            return path
    ends = [path for path in by_path if scope and (path.endswith(f".{scope}") or scope.endswith(f".{path}"))]
    return ends[0] if len(ends) == 1 else ""


def _by_order(graph: Graph, by_path: Mapping[str, list[Call]]) -> dict[str, list[int]]:
    """Without names, layers with weights can be told by their order, where each kind is there equally often."""
    found: dict[str, list[int]] = {}
    for kind, operators in _KINDS.items():
        ours = [call.path for calls in by_path.values() for call in calls if call.class_name.startswith(kind)]
        theirs = [
            place
            for place, node in enumerate(graph.nodes)
            if node.op_type in operators
            and node.output[0] in graph.dynamic
            and sum(name in graph.dynamic for name in node.input) == 1
        ]
        if len(ours) == len(theirs):
            for path, place in zip(ours, theirs, strict=True):
                found.setdefault(path, []).extend([place, *_bias(graph, place)])
    return found


def _bias(graph: Graph, place: int) -> list[int]:
    """The addition of a constant right behind a matrix product."""
    readers = graph.readers.get(graph.nodes[place].output[0], [])
    if graph.nodes[place].op_type != "MatMul" or len(readers) != 1 or graph.nodes[readers[0]].op_type != "Add":
        return []
    return readers if sum(name in graph.dynamic for name in graph.nodes[readers[0]].input) == 1 else []


def _dotted(scope: str) -> str:
    """``backbone/layer1/0`` as a module path; ``layer1/layer1.0`` of PyTorch's old exporter is one step."""
    parts = scope.split("/")
    kept = [part for part, following in zip(parts, [*parts[1:], ""], strict=True)
            if not following.startswith(f"{part}.")]  # fmt: skip
    return ".".join(kept)


def reads_of(node: Any) -> list[str]:
    """Values that a node reads, those of its sub-graphs too."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            made = {name for inner in graph.node for name in inner.output}
            made |= {value.name for value in (*graph.input, *graph.initializer)}
            names += [name for inner in graph.node for name in reads_of(inner) if name not in made]
            names += [value.name for value in graph.output if value.name not in made]
    return names
