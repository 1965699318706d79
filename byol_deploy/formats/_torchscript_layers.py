"""A TorchScript file layer by layer.

Hooks do not fire inside traced code, so the file's graph is walked node by node, each node computed by PyTorch's own
operator: what the file computes, with every value at hand, and each value known by the module whose code holds it. A
file with control flow (scripted, not traced) is not walked; its modules are then called one by one on the reference's
input, which shows what each adds and not how it adds up.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.formats._layers import ROOT, Call, Cut, CutInput, Layout, Point, class_at, find_layout, leaf_calls

_Values = dict[str, Any]
_NO_WORK = ("/dropout", "/size", "/Int")


class _Unknown(Exception):
    """A node that the walk does not know, control flow above all."""


class TorchScriptLayers:
    """See :class:`byol_deploy.formats._layers.LayeredFile`."""

    points: tuple[Point, ...]
    unmatched: tuple[tuple[str, str], ...]
    adds_up: bool

    def __init__(
        self,
        module: Any,
        calls: Sequence[Call],
        slots: Sequence[np.ndarray],
        images: np.ndarray,
        settings: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._module, self._settings = module, settings
        self._calls = {(call.path, call.number): call for call in leaf_calls(calls)}
        self._all = {(call.path, call.number): call for call in calls}
        self._classes = class_at(calls)
        self._device = next((tensor.device for tensor in module.state_dict().values()), None)
        self._shapes = {number: values.shape for number, values in enumerate(slots)}
        found: dict[tuple[str, int, str], tuple[Point, np.ndarray]] = {}
        self.adds_up = True
        try:
            with self._settings():
                for key, point, value in self._walk(images, None):
                    found.setdefault(key, (point, value))
        except _Unknown:
            self.adds_up, found = False, {}
            with self._settings():
                for key, point, value in self._one_by_one(slots):
                    found[key] = (point, value)
        self._layouts: dict[tuple[str, int, str], Layout] = {}
        points, unmatched = [], []
        for key, (point, value) in found.items():
            layout = find_layout(self._shapes[point.slot], value.shape)
            if layout is not None:
                self._layouts[key] = layout
                points.append(point)
            elif point.kind == "module":
                shapes = f"{list(self._shapes[point.slot])} in PyTorch, {list(value.shape)} in the file"
                unmatched.append((_shown(self._all[key[0], key[1]]), shapes))
        there = {key[:2] for key in found if key[2] == "module"}
        unmatched += [
            (_shown(call), "the file does not call it") for key, call in self._calls.items() if key not in there
        ]
        self._keys = list(self._layouts)
        self.points, self.unmatched = tuple(points), tuple(unmatched)

    def values(self, images: np.ndarray, slots: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.values`."""
        with self._settings():
            if self.adds_up:
                return self._ordered(self._walk(images, None))
            return self._ordered(self._one_by_one(slots))

    def fed(self, images: np.ndarray, slots: Sequence[np.ndarray]) -> list[np.ndarray] | None:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.fed`."""
        with self._settings():
            return self._ordered(self._walk(images, slots) if self.adds_up else self._one_by_one(slots))

    def cut(self, place: int, folder: Path) -> Cut | None:
        """See :meth:`byol_deploy.formats._layers.LayeredFile.cut`. A module of its own; an operation is in none."""
        import torch

        point = self.points[place]
        if point.kind != "module" or point.number > 0:
            return None
        call = self._all[point.path, max(point.number, 0)]
        if call.input is None:
            return None
        with self._settings():
            torch.jit.save(_submodule(self._module, point.path), str(folder / "layer.torchscript.pt"))
        layout = self._layouts[point.path, max(point.number, 0), "module"]
        return Cut("layer.torchscript.pt", (CutInput("input", call.input, "float32", Layout()),), layout)

    def prefix(self, place: int, folder: Path) -> Cut | None:
        """Nothing smaller than the whole file can be written here."""
        return None

    def _ordered(self, found: Iterator[tuple[tuple[str, int, str], Point, np.ndarray]]) -> list[np.ndarray]:
        values: dict[tuple[str, int, str], np.ndarray] = {}
        for key, point, value in found:
            if key in self._layouts and key not in values:
                values[key] = self._layouts[key].to_reference(value, self._shapes[point.slot][1:])
        return [values[key] for key in self._keys]

    def _one_by_one(self, slots: Sequence[np.ndarray]) -> Iterator[tuple[tuple[str, int, str], Point, np.ndarray]]:
        import torch

        with torch.inference_mode():
            for (path, number), call in self._calls.items():
                if call.input is None or number:
                    continue
                given = slots[call.input]
                given = given.astype(np.float32) if given.dtype == np.float64 else given
                try:
                    value = _submodule(self._module, path)(torch.from_numpy(given.copy()).to(self._device))
                except (AttributeError, RuntimeError):
                    continue  # not in the file, or of another signature: it is listed as without a place
                if isinstance(value, torch.Tensor):
                    shown = Point(call.outputs[0], path, call.class_name, number if call.of > 1 else -1, "module",
                                  (path,), path)  # fmt: skip
                    yield (path, number, "module"), shown, value.float().cpu().numpy()

    def _walk(
        self, images: np.ndarray, slots: Sequence[np.ndarray] | None
    ) -> Iterator[tuple[tuple[str, int, str], Point, np.ndarray]]:
        """Walk the file; with ``slots`` every known value is replaced by the reference's once it was shown."""
        import torch

        given = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self._device)
        walk = _Walk(self, slots)
        with torch.no_grad():  # not inference mode: its tensors count no versions
            outputs = walk.call(self._module, "forward", [given], ROOT)
        whole = self._all[ROOT, 0]
        for place, (slot, value) in enumerate(zip(whole.outputs, _flat(outputs), strict=False)):
            if (id(value), value._version) not in walk.known:
                walk.show((ROOT, place, "output"), slot, value, ROOT, "output", ())
        yield from walk.shown


class _Walk:
    """One walk through a file's graph."""

    def __init__(self, file: TorchScriptLayers, slots: Sequence[np.ndarray] | None) -> None:
        self.file, self.slots = file, slots
        self.shown: list[tuple[tuple[str, int, str], Point, np.ndarray]] = []
        # Tensors that stand for a point already, by id and version: an operation in place makes another value of one.
        # The tensors are kept, so that their ids stay theirs.
        self.known: dict[tuple[int, int], tuple[Any, int]] = {}
        self._numbers: Counter[str] = Counter()
        # Memory of the file's own tensors, which must stay as they are.
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in file._module.state_dict().values()}
        self._since: list[str] = []

    def show(self, key: tuple[str, int, str], slot: int, value: Any, path: str, kind: str, after: Any) -> Any:
        """Note a value, and give what goes on from here: itself, or the reference's in its place."""
        import torch

        call = self.file._all.get((path, key[1]))
        number = key[1] if kind == "module" and call is not None and call.of > 1 else -1
        nodes = (path,) if kind == "module" else tuple(self._since)
        point = Point(slot, path, self.file._classes.get(path, ""), number, kind, nodes, path, "", after)
        seen = value.float().cpu().numpy().copy()
        self.shown.append((key, point, seen))
        self._since = []
        if self.slots is not None:
            layout = self.file._layouts.get(key)
            if layout is not None:
                fed = torch.from_numpy(np.ascontiguousarray(layout.to_file(self.slots[slot])))
                if value.untyped_storage().data_ptr() in self._kept or 0 in value.stride():
                    value = fed.to(value.device, value.dtype)
                else:
                    # In place: others than the module that is called next may read it, a residual addition above all.
                    value.copy_(fed)
        self.known[id(value), value._version] = (value, len(self.shown) - 1)
        return value

    def call(self, module: Any, method: str, given: list[Any], path: str) -> Any:
        """Compute a method of a module, showing its value when it is a module of the reference that calls no other."""
        import torch

        number = self._numbers[path]
        self._numbers[path] += 1
        ours = self.file._calls.get((path, number))
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if ours is None:
            return self._compute(module, method, given, path)
        if ours.input is not None and tensors and (id(tensors[0]), tensors[0]._version) not in self.known:
            taken = tensors[0]
            if taken.is_floating_point():  # the images are no operation's
                fed = self.show((path, number, "input"), ours.input, taken, self._worked(), "operation", ())
                given = [fed if value is taken else value for value in given]
        result = self._compute(module, method, given, path)
        first = next(iter(_flat(result)), None)
        if first is None:
            return result
        shown = self.show((path, number, "module"), ours.outputs[0], first, path, "module", ())
        return shown if result is first else type(result)([shown, *list(result)[1:]])

    def _worked(self) -> str:
        """The module whose code worked last; dropout and the like do no work."""
        done = [name for name in self._since if not name.endswith(_NO_WORK)] or self._since
        return ".".join(done[-1].split("/")[:-1]) if done else ROOT

    def _compute(self, module: Any, method: str, given: list[Any], path: str) -> Any:
        graph = module._c._get_method(method).graph
        values: _Values = {}
        for place, value in zip(graph.inputs(), [module, *given], strict=True):
            values[place.debugName()] = value
        paths: dict[str, str] = {next(iter(graph.inputs())).debugName(): path}
        for node in graph.nodes():
            self._node(node, values, paths)
        results = [values[output.debugName()] for output in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    def _node(self, node: Any, values: _Values, paths: dict[str, str]) -> None:
        import torch

        kind = node.kind()
        given = [values[value.debugName()] for value in node.inputs()]
        names = [value.debugName() for value in node.outputs()]
        if kind == "prim::Constant":
            constant = values[names[0]] = node.output().toIValue()
            if isinstance(constant, torch.Tensor):
                self._kept.add(constant.untyped_storage().data_ptr())
        elif kind == "prim::GetAttr":
            name = node.s("name")
            owner = paths[node.input().debugName()]
            values[names[0]] = getattr(given[0], name)
            paths[names[0]] = f"{owner}.{name}" if owner else name
        elif kind == "prim::CallMethod":
            owner = next(iter(node.inputs())).debugName()
            values[names[0]] = self.call(given[0], node.s("name"), given[1:], paths[owner])
        elif kind in ("prim::ListConstruct", "prim::TupleConstruct"):
            values[names[0]] = list(given) if kind == "prim::ListConstruct" else tuple(given)
        elif kind in ("prim::ListUnpack", "prim::TupleUnpack"):
            values.update(zip(names, given[0], strict=True))
        elif kind == "prim::NumToTensor":
            values[names[0]] = torch.tensor(given[0])
        elif kind.startswith("aten::") and not list(node.blocks()):
            results = self._operate(node, given)
            values.update(zip(names, [results] if len(names) == 1 else results, strict=True))
            self._since.append("/".join([*paths[next(iter(paths))].split("."), kind.removeprefix("aten::")]))
        else:
            raise _Unknown(kind)

    def _operate(self, node: Any, given: list[Any]) -> Any:
        """Call the very overload that the file names, with its keyword-only arguments as such."""
        import torch

        schema = torch._C.parse_schema(node.schema())
        operator = getattr(
            getattr(torch.ops.aten, node.kind().removeprefix("aten::")), schema.overload_name or "default"
        )
        positional, keywords = [], {}
        for argument, value in zip(schema.arguments, given, strict=True):
            if argument.kwarg_only:
                keywords[argument.name] = value
            else:
                positional.append(value)
        return operator(*positional, **keywords)


def _submodule(module: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def _flat(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, list | tuple) else []


def _shown(call: Call) -> str:
    return f"{call.path} (call {call.number + 1})" if call.of > 1 else call.path
