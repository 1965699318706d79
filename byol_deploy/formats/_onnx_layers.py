"""An ONNX file layer by layer: which of its values is which module's, and what it computes there.

Two copies of the graph are run, both with optimisations off, so that no value is fused away. In the first every point
becomes an output: the drift as it adds up. In the second the nodes behind a point read the reference's value instead of
the file's, so each layer shows what it alone adds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError
from byol_deploy.formats import RunOptions
from byol_deploy.formats._layers import (
    ROOT,
    Call,
    Cut,
    CutInput,
    Layout,
    Point,
    class_at,
    find_layout,
)
from byol_deploy.formats._onnx_graph import TYPE_CHANGES, Found, Graph, find_values, reads_of

_SOURCE = "byol_deploy.source"
_DOMAINS = ("", "ai.onnx")
_CAST_LIKE_SINCE = 15


class OnnxLayers:
    """See :class:`byol_deploy.formats._layers.LayeredFile` and :meth:`byol_deploy.formats.Format.layers`."""

    points: tuple[Point, ...]
    unmatched: tuple[tuple[str, str], ...]
    adds_up = True

    def __init__(
        self, path: Path, options: RunOptions, calls: Sequence[Call], slots: Sequence[np.ndarray], images: np.ndarray
    ) -> None:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            self._model = onnx.load(path, load_external_data=False)
        except (DecodeError, ValueError) as error:
            raise BundleError(f"{path} is not an ONNX file: {error}; export it again") from error
        self._path, self._options = path, options
        self._graph = Graph(self._model.graph)
        self._shapes = {number: values.shape for number, values in enumerate(slots)}
        found, unmatched = find_values(self._graph, calls, slots)
        self._input = _input_slot(self._graph.input, calls)
        self._preprocessed = slots[self._input] if self._input is not None else None
        self._observed: Any = None
        self._fed: Any = None
        self._layouts: list[Layout] = []
        self.points = tuple(Point(item.slot, item.path, "", item.number, item.kind, (), item.value) for item in found)
        self._observed = self._session(self._observing())
        kept = []
        for item, values in zip(found, self._run(self._observed, images, {}), strict=True):
            layout = find_layout(self._shapes[item.slot], values.shape)
            if layout is None:
                if item.kind == "module":
                    reason = f"{list(self._shapes[item.slot])} in PyTorch, {list(values.shape)} in the file"
                    unmatched[(item.path, item.number)] = reason
                continue
            kept.append(item)
            self._layouts.append(layout)
        self.unmatched = tuple(
            (path if call_of[path] < 2 else f"{path} (call {number + 1})", reason)
            for call_of in [{call.path: call.of for call in calls}]
            for (path, number), reason in unmatched.items()
        )
        self.points = self._describe(kept, calls)
        self._observed = self._session(self._observing())

    def values(self, images: np.ndarray, slots: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.values`."""
        if self._input is not None:
            self._preprocessed = slots[self._input]
        return self._in_layout(self._run(self._observed, images, {}))

    def fed(self, images: np.ndarray, slots: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.fed`."""
        opset = max([entry.version for entry in self._model.opset_import if entry.domain in _DOMAINS], default=0)
        if opset < _CAST_LIKE_SINCE or not self.points:
            return None
        if self._fed is None:
            self._fed = self._session(self._feeding())
        if self._input is not None:
            self._preprocessed = slots[self._input]
        feeds = {
            f"explain/fed/{place}": layout.to_file(np.asarray(slots[point.slot], np.float32))
            for place, (point, layout) in enumerate(zip(self.points, self._layouts, strict=True))
        }
        return self._in_layout(self._run(self._fed, images, feeds))

    def cut(self, place: int, folder: Path) -> Cut | None:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.cut`."""
        return self._extract(place, folder, self.points[place].after)

    def prefix(self, place: int, folder: Path) -> Cut | None:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.prefix`."""
        return self._extract(place, folder, (-1,))

    def _in_layout(self, values: list[np.ndarray]) -> list[np.ndarray]:
        return [
            layout.to_reference(value, self._shapes[point.slot][1:])
            for point, layout, value in zip(self.points, self._layouts, values, strict=True)
        ]

    def _describe(self, found: Sequence[Found], calls: Sequence[Call]) -> tuple[Point, ...]:
        classes = class_at(calls)
        ends = {item.value: place for place, item in enumerate(found)}
        points = []
        for item in found:
            nodes, after = self._graph.segment(item.value, ends)
            # The type changes behind an operation are not what a reader looks for first.
            last = next((node for node in reversed(nodes) if node.op_type not in TYPE_CHANGES), None)
            source = next((entry.value for entry in last.metadata_props if entry.key == _SOURCE), "") if last else ""
            path = item.path
            if not path and item.kind == "operation" and last is not None:
                path = self._graph.scope(last) or ROOT
            names = tuple(node.name or node.output[0] for node in nodes)
            points.append(
                Point(item.slot, path, classes.get(path, ""), item.number, item.kind, names, item.value, source, after)
            )
        return tuple(points)

    def _observing(self) -> Any:
        from onnx import TensorProto, helper

        model = _copy(self._model)
        graph = model.graph
        del graph.output[:]
        for place, point in enumerate(self.points):
            seen = f"explain/seen/{place}"
            graph.node.append(helper.make_node("Cast", [point.name], [seen], to=TensorProto.FLOAT))
            graph.output.append(helper.make_tensor_value_info(seen, TensorProto.FLOAT, None))
        return model

    def _feeding(self) -> Any:
        from onnx import TensorProto, helper

        model = self._observing()
        graph = model.graph
        place_of = {point.name: place for place, point in enumerate(self.points)}
        nodes = []
        for node in list(graph.node):
            if not node.output[0].startswith("explain/seen/"):
                for position, name in enumerate(node.input):
                    if name in place_of:
                        node.input[position] = f"explain/as/{place_of[name]}"
            nodes.append(node)
            for name in node.output:
                if name in place_of:
                    place = place_of[name]
                    # As the type that the file computes in; the types are not always written down.
                    nodes.append(helper.make_node("CastLike", [f"explain/fed/{place}", name], [f"explain/as/{place}"]))
        for place in place_of.values():
            graph.input.append(helper.make_tensor_value_info(f"explain/fed/{place}", TensorProto.FLOAT, None))
        ordered = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(ordered)
        return model

    def _extract(self, place: int, folder: Path, after: Sequence[int]) -> Cut | None:
        """Slice the nodes between the points ``after`` and the one at ``place`` out of the file."""
        import onnx
        from onnx import TensorProto, helper

        point = self.points[place]
        names = {(self.points[item].name if item >= 0 else self._graph.input.name): item for item in after}
        nodes, reached = self._graph.segment(point.name, names)
        if not nodes or set(reached) - set(names.values()) or self._graph.fixed_batch() > 1:
            return None
        types = self._types([name for name, item in names.items() if item >= 0])
        model = _copy(self._model)
        graph = model.graph
        for field in ("node", "initializer", "sparse_initializer", "input", "output", "value_info"):
            del getattr(graph, field)[:]
        del model.metadata_props[:]
        graph.node.extend(nodes)
        used = {name for node in nodes for name in reads_of(node)}
        # Read with their external data: the part must stand alone.
        base = str(self._path.parent)
        for tensor in self._model.graph.initializer:
            if tensor.name in used:
                copied = graph.initializer.add()
                copied.CopyFrom(tensor)
                if onnx.external_data_helper.uses_external_data(copied):
                    onnx.external_data_helper.load_external_data_for_tensor(copied, base)
                    copied.data_location = TensorProto.DEFAULT
                    del copied.external_data[:]
        inputs = []
        for name, item in names.items():
            if item >= 0:
                slot: int | None = self.points[item].slot
                elem, layout = types[name], self._layouts[item]
                graph.input.append(helper.make_tensor_value_info(name, elem, None))
            else:
                elem, layout, slot = self._graph.input.type.tensor_type.elem_type, Layout(), self._input
                graph.input.append(self._graph.input)
            inputs.append(CutInput(name, slot, str(np.dtype(helper.tensor_dtype_to_np_dtype(elem))), layout))
        graph.node.append(helper.make_node("Cast", [point.name], ["layer"], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info("layer", TensorProto.FLOAT, None))
        (folder / "layer.onnx").write_bytes(model.SerializeToString())
        return Cut("layer.onnx", tuple(inputs), self._layouts[place])

    def _types(self, names: Sequence[str]) -> dict[str, int]:
        """ONNX's element type of values, as ONNX Runtime infers them."""
        import onnx

        if not names:
            return {}
        model = _copy(self._model)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        kinds = {"tensor(float)": onnx.TensorProto.FLOAT, "tensor(float16)": onnx.TensorProto.FLOAT16,
                 "tensor(bfloat16)": onnx.TensorProto.BFLOAT16, "tensor(double)": onnx.TensorProto.DOUBLE}  # fmt: skip
        session = self._session(model)
        return {output.name: kinds.get(output.type, onnx.TensorProto.FLOAT) for output in session.get_outputs()}

    def _session(self, model: Any) -> Any:
        from byol_deploy.providers import create_session

        with _readable(model, self._path) as source:
            return create_session(source, self._options.provider, self._options.threads, "none")

    def _run(self, session: Any, images: np.ndarray, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if not session.get_outputs():
            return []
        given = images if self._preprocessed is None else np.asarray(self._preprocessed, np.float32)
        feed = {self._graph.input.name: np.ascontiguousarray(given), **feeds}
        repeat = self._graph.fixed_batch()
        if repeat > 1:
            feed = {name: np.repeat(value, repeat, axis=0) for name, value in feed.items()}
        try:
            values = session.run(None, feed)
        except Exception as error:
            # The runtime's own words for a file that opens and cannot compute.
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BundleError(f"{self._path.name} cannot be run layer by layer: {first[:300]}") from error
        return [np.atleast_1d(value)[:1] for value in values]


def _input_slot(declared: Any, calls: Sequence[Call]) -> int | None:
    """For a file that takes normalised images, the slot that holds them; None for one that takes uint8."""
    from onnx import TensorProto

    if declared.type.tensor_type.elem_type == TensorProto.UINT8:
        return None
    return next((call.outputs[0] for call in calls if call.path == "preprocessing" and call.outputs), None)


def _copy(model: Any) -> Any:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


@contextlib.contextmanager
def _readable(model: Any, path: Path) -> Iterator[bytes | Path]:
    """What ONNX Runtime can open: the bytes, or a file that lies beside the model's external data."""
    files = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
             if entry.key == "location"}  # fmt: skip
    if not files:
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="byol-deploy-layers-") as name:
        folder = Path(name)
        for file in files:
            target = folder / file
            if not target.resolve().is_relative_to(folder.resolve()):
                raise BundleError(f"{path} keeps its data in {file}, outside its folder; export it again")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.parent / file, target)
            except FileNotFoundError:
                raise BundleError(f"{path} needs its data file {file}, which is not beside it; copy both") from None
            except OSError:  # another file system
                shutil.copyfile(path.parent / file, target)
        source = folder / "model.onnx"
        source.write_bytes(model.SerializeToString())
        yield source
