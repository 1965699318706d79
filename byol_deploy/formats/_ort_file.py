"""An ``.ort`` file as data: which operators it needs, and which tensors it holds.

The file is a FlatBuffer, whose generated readers come with ONNX Runtime (``onnxruntime.tools.ort_format_model``).
Neither PyTorch nor the package onnx is needed.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError
from byol_deploy.images import printable

# FlatBuffers puts four letters of the writer's choice behind the offset of the root table.
_IDENTIFIER = slice(4, 8)
_ORT = b"ORTM"
# TensorDataType of onnxruntime's ort.fbs, whose numbers are those of onnx.proto.
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8",
           12: "<u4", 13: "<u8"}  # fmt: skip
_TENSOR, _GRAPH = 4, 5  # AttributeType


def check(path: Path) -> None:
    """Refuse what is no ``.ort`` file before a runtime sees it.

    Raises:
        BundleError: It is none.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_IDENTIFIER.stop)
    except OSError as error:
        raise BundleError(f"{printable(path)} cannot be read: {error.strerror}") from error
    if start[_IDENTIFIER] != _ORT:
        raise BundleError(f"{printable(path)} is not an .ort file of ONNX Runtime, or is damaged; export it again")


def operators(path: Path) -> dict[tuple[str, int], list[str]]:
    """The operators that a file needs, by domain and version of the operator set; sorted."""
    found: dict[tuple[str, int], set[str]] = {}
    with _graph(path) as graph:
        for inner in _graphs(graph):
            for node in _each(inner, "Nodes"):
                key = (node.Domain().decode() or "ai.onnx", int(node.SinceVersion()))
                found.setdefault(key, set()).add(node.OpType().decode())
    return {key: sorted(found[key]) for key in sorted(found)}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of numbers in a file, by its name there."""
    found = {}
    with _graph(path) as graph:
        for inner in _graphs(graph):
            for tensor in _each(inner, "Initializers"):
                found[tensor.Name().decode()] = _array(tensor)
            for node in _each(inner, "Nodes"):
                for attribute in _each(node, "Attributes"):
                    if attribute.Type() == _TENSOR:
                        found[f"{node.Name().decode()}.{attribute.Name().decode()}"] = _array(attribute.T())
    return {name: values for name, values in found.items() if values is not None}


@contextlib.contextmanager
def _graph(path: Path) -> Iterator[Any]:
    """The main graph. The readers import each other by a path that their package adds; it is taken away again."""
    check(path)
    before = list(sys.path)
    try:
        import onnxruntime.tools.ort_format_model as package

        # Added only by the first import of a process.
        sys.path.append(str(Path(package.__file__).parent))
        from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession  # type: ignore[import-not-found]

        yield InferenceSession.GetRootAs(path.read_bytes(), 0).Model().Graph()
    except (AttributeError, IndexError, TypeError, ValueError, OverflowError, struct.error) as error:
        # What the readers raise on offsets that lead nowhere.
        raise BundleError(f"{printable(path)} is damaged; copy or export it again") from error
    finally:
        sys.path[:] = before


def _each(owner: Any, what: str) -> Iterator[Any]:
    read = getattr(owner, what)
    return (read(place) for place in range(getattr(owner, f"{what}Length")()))


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in _each(graph, "Nodes"):
        for attribute in _each(node, "Attributes"):
            if attribute.Type() == _GRAPH:
                yield from _graphs(attribute.G())


def _array(tensor: Any) -> np.ndarray | None:
    kind = _DTYPES.get(tensor.DataType())
    if kind is None or tensor.RawDataIsNone():  # texts, or a type that NumPy lacks
        return None
    shape = [int(tensor.Dims(place)) for place in range(tensor.DimsLength())]
    values: np.ndarray = np.frombuffer(tensor.RawDataAsNumpy().tobytes(), kind).reshape(shape)
    return values
