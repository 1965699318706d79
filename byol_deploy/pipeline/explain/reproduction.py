"""A minimal folder for a bug report: a layer of the file, the same in PyTorch, its input, a script that compares.

It runs where NumPy, PyTorch and (for ONNX) ONNX Runtime are installed; neither this package nor the model's code.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_deploy import formats
from byol_deploy.atomic import publish_folder
from byol_deploy.errors import OutputError, UsageError
from byol_deploy.formats import RunOptions
from byol_deploy.formats._layers import ROOT, Call, Cut, CutInput, LayeredFile, Layout
from byol_deploy.pipeline.explain.drift import Explanation, Layer, relative_l2

if TYPE_CHECKING:
    from torch import nn

    from byol_deploy.pipeline.explain.recording import Recording

_SCRIPT = '''"""Compares one layer of an exported file with the same layer in PyTorch.

Needs numpy, torch and, for layer.onnx, onnxruntime. Exits with 1 when they differ by more than the budget, else with 0.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch

FILE = {file!r}
TORCH = {torch!r}
LAYER = {layer!r}
BUDGET = {budget!r}  # relative L2
OUTPUT = {output!r}  # which output of the file
ORDER = {order!r}  # axes of the file's layer in the order of PyTorch's, None for the same

here = Path(__file__).resolve().parent
warnings.simplefilter("ignore")
with np.load(here / "input.npz", allow_pickle=False) as arrays:
    torch_inputs = [torch.from_numpy(arrays[name]) for name in sorted(arrays) if name.startswith("torch_")]
    file_inputs = [arrays[name] for name in sorted(arrays) if name.startswith("file_")]

if TORCH.endswith(".pt2"):
    module = torch.export.load(str(here / TORCH)).module()
else:
    module = torch.jit.load(str(here / TORCH))
with torch.no_grad():
    expected = module(*torch_inputs)
expected = (expected[OUTPUT] if isinstance(expected, (tuple, list)) else expected).double().numpy()

if FILE.endswith(".onnx"):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(here / FILE), options, providers=["CPUExecutionProvider"])
    feeds = {{entry.name: value for entry, value in zip(session.get_inputs(), file_inputs)}}
    actual = session.run(None, feeds)[OUTPUT]
else:
    with torch.no_grad():
        actual = torch.jit.load(str(here / FILE), map_location="cpu")(*map(torch.from_numpy, file_inputs))
    actual = (actual[OUTPUT] if isinstance(actual, (tuple, list)) else actual).float().numpy()

actual = np.asarray(actual, np.float64)
actual = (actual if ORDER is None else actual.transpose(ORDER)).reshape(expected.shape)
size = np.linalg.norm(expected)
difference = np.linalg.norm(actual - expected) / (size if size else 1.0)
differs = not difference <= BUDGET
print(f"{{LAYER}}: relative L2 {{difference:.3g}}, budget {{BUDGET:.3g}}: {{'DIFFERS' if differs else 'the same'}}")
print(f"largest single difference {{np.abs(actual - expected).max():.3g}} of {{np.abs(expected).max():.3g}}")
sys.exit(1 if differs else 0)
'''

_README = """{verdict}

{file}  {what} of {origin}
{torch}  the same in PyTorch
input.npz  one input: torch_00 ... for PyTorch, file_00 ... the same values as the file takes them

    python reproduce.py

compares the two and exits with 1 where they differ by more than {budget:.3g} (relative L2), else with 0.
When this folder was written they differed by {difference:.3g}.

Layer: {layer}
PyTorch class: {class_name}
Python source: {source}
Nodes: {nodes}
Versions: {versions}
"""


@dataclass(frozen=True)
class Reproduction:
    """What :func:`write_reproduction` wrote.

    Attributes:
        path: The folder.
        layer: Which layer.
        kind: ``layer``: it alone; ``prefix``: the file up to it; ``whole``: the whole file, nothing smaller shows it.
        difference: Relative L2 between file and PyTorch in this folder.
        budget: What it may be.
    """

    path: Path
    layer: str
    kind: str
    difference: float
    budget: float

    @property
    def shows(self) -> bool:
        """Whether the folder shows a difference past the budget."""
        return not self.difference <= self.budget


def write_reproduction(
    folder: str | os.PathLike[str],
    path: Path,
    format: formats.Format,
    graph: nn.Module,
    images: np.ndarray,
    explanation: Explanation,
    *,
    layer: Layer | None = None,
    options: RunOptions = RunOptions(),  # noqa: B008 - frozen
    force: bool = False,
) -> Reproduction:
    """Write a folder that shows what one layer of a file makes of its input, and what PyTorch makes of it.

    In it: ``layer.onnx`` (or ``layer.torchscript.pt``), ``layer.pt2`` (or, where ``torch.export`` cannot,
    ``layer.torch.pt`` in TorchScript), ``input.npz``, ``reproduce.py`` and ``README.txt``. It is the layer alone where
    that is at fault by itself; where it is not, or cannot be cut out, the file up to it; and the whole file where that
    cannot be done either.

    Args:
        folder: The folder to be. It appears when it is complete.
        path: The written file.
        format: Its format.
        graph: The trained model.
        images: (n, H, W, 3) uint8: the images of the explanation. The one that shows it best is taken.
        explanation: Of :func:`byol_deploy.pipeline.explain.drift.explain_file`.
        layer: One of the explanation's layers; None takes the culprit.
        options: How the file is run.
        force: Replace a folder that is there.

    Raises:
        UsageError: Nothing is past its budget, or the layer is not the explanation's.
        OutputError: The folder cannot be written.
    """
    from byol_deploy.pipeline.explain.recording import doubled, record_both

    chosen = explanation.culprit if layer is None else layer
    if chosen is not None and layer is None and not (chosen.own_past or chosen.past):
        chosen = explanation.first  # no layer is at fault by itself: what is shown is the sum
    place = next((place for place, item in enumerate(explanation.layers) if item is chosen), None)
    if chosen is None or place is None:
        raise UsageError(f"{explanation.file} has no layer past its budget; name one to write it nevertheless")
    double_graph = doubled(graph)
    file: LayeredFile | None = None
    worst, image = -1.0, images[:1]
    for start in range(len(images)):
        candidate = np.ascontiguousarray(images[start : start + 1])
        single, double = record_both(graph, candidate, double_graph)
        if file is None:
            file = format.layers(path, options, single.calls, single.slots, candidate)
        values = file.fed(candidate, double.slots) if chosen.own_past else None
        values = file.values(candidate, double.slots) if values is None else values
        found = relative_l2(values[place], double.slots[file.points[place].slot])
        if found > worst:
            worst, image = found, candidate
    single, double = record_both(graph, image, double_graph)
    assert file is not None  # an explanation has an image at least
    slot = file.points[place].slot

    def may_replace(target: Path) -> None:
        if not (force and (target / "reproduce.py").is_file()):
            raise OutputError(f"{target} is there already; choose another folder")

    with publish_folder(folder, may_replace) as out:
        attempts = [("layer", file.cut), ("prefix", file.prefix)] if chosen.own_past else [("prefix", file.prefix)]
        for kind, attempt in attempts:
            cut = attempt(place, out)
            if cut is None:
                continue
            given = [np.asarray(image if item.slot is None else double.slots[item.slot]) for item in cut.inputs]
            given = [value.astype(np.float32) if value.dtype == np.float64 else value for value in given]
            part = _part(graph, single, [item.slot for item in cut.inputs], slot, image, kind)
            if part is None:
                continue
            torch_file = _save_module(part, given, out)
            made = _finish(out, path, explanation, chosen, kind, cut, torch_file, given, part, 0, chosen.budget)
            if made.shows or kind == "prefix":
                break
        else:
            made = _whole(out, path, explanation, graph, image)
    return Reproduction(Path(folder), made.layer, made.kind, made.difference, made.budget)


def _whole(out: Path, path: Path, explanation: Explanation, graph: nn.Module, image: np.ndarray) -> Reproduction:
    """The whole file, compared at its last place; external data is not copied, the file must be one."""
    for leftover in out.iterdir():
        leftover.unlink()
    name = f"layer{''.join(path.suffixes[-2:]) if path.name.endswith('.torchscript.pt') else path.suffix}"
    shutil.copyfile(path, out / name)
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        shutil.copyfile(data, out / data.name)
    last = explanation.layers[-1]
    cut = Cut(name, (CutInput("images", None, "uint8", Layout()),), Layout())
    count = len(_outputs(graph, [image]))
    torch_file = _save_module(graph, [image], out)
    return _finish(out, path, explanation, last, "whole", cut, torch_file, [image], graph, count - 1, last.budget)


def _finish(
    out: Path,
    path: Path,
    explanation: Explanation,
    layer: Layer,
    kind: str,
    cut: Cut,
    torch_file: str,
    given: Sequence[np.ndarray],
    module: nn.Module,
    output: int,
    budget: float,
) -> Reproduction:
    fed = [np.ascontiguousarray(item.layout.to_file(value)).astype(item.type) if item.slot is not None else value
           for item, value in zip(cut.inputs, given, strict=True)]  # fmt: skip
    arrays = {f"torch_{place:02}": value for place, value in enumerate(given)}
    arrays |= {f"file_{place:02}": value for place, value in enumerate(fed)}
    np.savez(out / "input.npz", **arrays)  # type: ignore[arg-type]  # the stub has its option's type for all keywords
    order = cut.layout.permutation
    wanted = _outputs(module, given)[output]
    actual = np.asarray(_run_file(out / cut.file, fed)[output], np.float64)
    if order is not None:
        order = tuple(int(axis) for axis in np.argsort(order))
        actual = actual.transpose(order)
    difference = relative_l2(actual.reshape(wanted.shape), wanted)
    what = {"layer": "the layer alone, cut out", "prefix": "the file up to the layer, cut out", "whole": "a copy"}[kind]
    script = _SCRIPT.format(
        file=cut.file, torch=torch_file, layer=layer.title, budget=budget, output=output, order=order
    )
    (out / "reproduce.py").write_text(script, encoding="utf-8")
    (out / "README.txt").write_text(
        _README.format(
            verdict=explanation.verdict(),
            file=cut.file,
            what=what,
            origin=path.name,
            torch=torch_file,
            budget=budget,
            difference=difference,
            layer=layer.title,
            class_name=layer.class_name or "unknown",
            source=layer.source or "unknown",
            nodes=", ".join(layer.nodes),
            versions=_versions(),
        ),
        encoding="utf-8",
    )
    return Reproduction(out, layer.title, kind, difference, budget)


def _part(
    graph: nn.Module, recorded: Recording, slots: Sequence[int | None], target: int, image: np.ndarray, kind: str
) -> nn.Module | None:
    """The PyTorch side: a module from the tensors ``slots`` to the tensor ``target``; None where it is not isolated."""
    whole = next(
        (call for call in recorded.calls if call.inner and call.outputs[:1] == (target,) and not call.idle), None
    )
    if whole is not None and whole.path != ROOT and list(slots) in ([whole.input], [None]):
        fed_directly = list(slots) == [whole.input] or _is_image(recorded, whole.input, image)
        if fed_directly:
            return graph.get_submodule(whole.path)
    part = _rewired(graph, recorded.calls, slots, target, image)
    given = [image if slot is None else recorded.slots[slot] for slot in slots]
    wanted = recorded.slots[target]
    if kind == "layer":
        # Fed other images underneath, the part must give the same: else something in it still reads them.
        other = _rewired(graph, recorded.calls, slots, target, 255 - image)
        if relative_l2(_outputs(other, given)[0], wanted) > 1e-5:
            return None
    return part if relative_l2(_outputs(part, given)[0], wanted) <= 1e-5 else None


def _is_image(recorded: Recording, slot: int | None, image: np.ndarray) -> bool:
    return (
        slot is not None and recorded.slots[slot].dtype == image.dtype and np.array_equal(recorded.slots[slot], image)
    )


def _rewired(
    graph: nn.Module, calls: Sequence[Call], slots: Sequence[int | None], target: int, image: np.ndarray
) -> nn.Module:
    """``graph`` with tensors replaced where modules hand them on, and stopped at another tensor."""
    import torch

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = graph
            self.register_buffer("image", torch.from_numpy(image.copy()))

        def forward(self, *given: Any) -> Any:
            images = next((value for value, slot in zip(given, slots, strict=True) if slot is None), self.image)
            feeds = {slot: value for slot, value in zip(slots, given, strict=True) if slot is not None}
            return _run_rewired(self.graph, calls, feeds, target, images)

    return Part().eval()


def _run_rewired(graph: nn.Module, calls: Sequence[Call], feeds: dict[int, Any], target: int, images: Any) -> Any:
    """Run ``graph`` on ``images`` with some tensors replaced, and give the tensor ``target``."""
    by_key = {(call.path, call.number): call for call in calls}
    numbers: dict[str, int] = {}
    caught: list[Any] = []
    names = {id(module): path for path, module in graph.named_modules()}
    under_way: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        path = names[id(module)]
        under_way.append(numbers.get(path, 0))
        numbers[path] = under_way[-1] + 1
        call = by_key[path, under_way[-1]]
        if call.input == target and not caught:
            caught.append(args[0].clone())  # before an operation in place changes it
        return (feeds[call.input].clone(), *args[1:]) if call.input in feeds and args else None

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = by_key[names[id(module)], under_way.pop()]
        if call.outputs and call.outputs[0] == target and not caught:
            caught.append((output[0] if isinstance(output, tuple | list) else output).clone())
        return feeds[call.outputs[0]].clone() if len(call.outputs) == 1 and call.outputs[0] in feeds else None

    handles = []
    try:
        for module in graph.modules():
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
        outputs = graph(images)
    finally:
        for handle in handles:
            handle.remove()
    if caught:
        return caught[0]
    whole = calls[-1].outputs
    return outputs[whole.index(target)] if isinstance(outputs, tuple | list) else outputs


def _save_module(module: nn.Module, given: Sequence[np.ndarray], out: Path) -> str:
    """Save a module with what it needs and nothing else: as a ``torch.export`` program, or as TorchScript."""
    import torch

    example = tuple(torch.from_numpy(value.copy()) for value in given)
    rewired = hasattr(module, "graph")  # its parts that are overwritten would be saved too; freezing drops them
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if not rewired:
            try:
                torch.export.save(torch.export.export(module, example), out / "layer.pt2")
                return "layer.pt2"
            except Exception:  # whatever export raises on a stranger's module: TorchScript is the other way
                (out / "layer.pt2").unlink(missing_ok=True)
        traced = torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(traced.eval(), optimize_numerics=False)
        torch.jit.save(frozen, str(out / "layer.torch.pt"))
    return "layer.torch.pt"


def _outputs(module: nn.Module, given: Sequence[np.ndarray]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        values = module(*(torch.from_numpy(value.copy()) for value in given))
    return [value.numpy() for value in (values if isinstance(values, tuple | list) else (values,))]


def _run_file(path: Path, given: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As the script runs it."""
    if path.suffix == ".onnx":
        from byol_deploy.providers import create_session

        session = create_session(path, "cpu", 1, "none")
        feed = {entry.name: value for entry, value in zip(session.get_inputs(), given, strict=True)}
        return list(session.run(None, feed))
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _outputs(torch.jit.load(str(path), map_location="cpu"), given)  # type: ignore[no-untyped-call]


def _versions() -> str:
    import onnxruntime
    import torch

    return f"PyTorch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, NumPy {np.__version__}"
