"""TensorRT, for NVIDIA GPUs: what a machine with a GPU needs to build the engine, prepared anywhere.

``model.tensorrt.json`` says how the engine is built (shapes, precision, the command), ``model.tensorrt.onnx`` is the
graph as TensorRT's parser takes it, and ``model.tensorrt.json.byol.json`` carries the texts for byol-deploy. Natively,
with TensorRT 10 or later, the command in the first file (key ``trtexec``) makes the plan, and C++ or Python run it::

    engine = tensorrt.Runtime(tensorrt.Logger()).deserialize_cuda_engine(open("model.plan", "rb").read())
    context = engine.create_execution_context()  # then set_tensor_address(...) and execute_async_v3(stream)

Input ``images`` (N, H, W, 3) uint8, 1 to 32 at once; outputs (N, D) float32.

A plan is machine code for one kind of GPU and one version of TensorRT: it is built on the machine that runs it, and
never read from a bundle, where it would be a stranger's code. ``load`` builds it, once for each file and process;
:meth:`_TensorRt.build` gives it to whoever wants to keep it. Networks are strongly typed, so the ONNX file alone says
what is ``fp16`` or ``int8`` (it comes from the ONNX reducer; int8 signed, symmetric, biases in float32), and no builder
flag changes numbers behind our back: TF32 is off.

Without an NVIDIA GPU nothing of this is run; :meth:`_TensorRt.runs_here` says so. The ONNX file that was prepared is
compared with PyTorch there all the same, through ONNX Runtime on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy import formats
from byol_deploy.errors import BundleError, ExportError, MissingExtraError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature, _tensorrt_graph
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.formats._tensorrt_graph import INPUT, Run
from byol_deploy.formats._through_onnx import ThroughOnnx, as_onnx
from byol_deploy.images import printable
from byol_deploy.quantization import Calibration, Reducer

BATCHES = (1, 8, 32)
"""Smallest, usual and largest batch of the optimisation profile."""
CHECKED = "byol_deploy.checked"
"""Key of the text that says how far a file could be checked where it was written."""
_NOT_RUN = "not run by TensorRT when it was written; its ONNX file was computed by ONNX Runtime and compared"
_ON_GPU = ("cpu", "auto", "cuda", "tensorrt")  # "cpu" is what RunOptions says when nobody chose
_SCHEMA = 1
_MAX_BYTES = 1 << 20
# Of an output's length, on the CPU. Float32 against PyTorch; the others against the reduced ONNX file, where a bias
# that is no longer rounded to an integer moves int8 activations by a step here and there.
_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "int8": 5e-2}


class _TensorRt(SidecarFormat):
    name = "tensorrt"
    suffix = ".tensorrt.json"
    extra = "tensorrt"
    requires = ("torch", "onnx", "onnxscript", "onnxruntime")
    # The buffers on the device are PyTorch's. TensorRT itself is not listed: files are prepared without it, and
    # runs_here asks for it.
    runs_with = ("torch",)
    # Where the file cannot be run, Encoder must take another file of the bundle.
    opens_in_encoder = False
    precisions = ("fp32", "fp16", "int8")
    keeps_tensors = True

    def __init__(self) -> None:
        self._plans: dict[str, bytes] = {}

    def runs_here(self) -> str:
        """Why a file of this format cannot be run on this machine; empty where it can."""
        if find_spec("torch") is None:
            return "TensorRT's buffers are PyTorch's here, and PyTorch is not installed; built here, not run here"
        import torch

        if not torch.cuda.is_available():
            return "TensorRT runs on NVIDIA GPUs alone, and PyTorch finds none; built here, not run here"
        if find_spec("tensorrt") is None:
            return "the package tensorrt is not installed; built here, not run here"
        return ""

    def providers(self) -> tuple[str, ...]:
        """See :meth:`byol_deploy.formats.Format.providers`."""
        return ("cuda",)

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        import torch

        def expected(images: np.ndarray) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                values = graph(torch.from_numpy(images))
            return {name: value.numpy() for name, value in zip(signature.outputs, values, strict=True)}

        with as_onnx(graph, signature) as source:
            return self._write(source, expected, signature, "fp32", path, carried)

    def _write(
        self, source: Path, expected: Run, signature: Signature, precision: str, path: Path, carried: Mapping[str, str]
    ) -> tuple[Path, ...]:
        """Prepare an ONNX file, compare it, and say how the engine is built."""
        prepared = _onnx_of(path)
        further = _tensorrt_graph.prepare(source, prepared)
        _tensorrt_graph.check(prepared, expected, signature.size_px, _TOLERANCE[precision])
        path.write_text(json.dumps(_plan_of(prepared, signature, precision), indent=1) + "\n", encoding="utf-8")
        return self.finish(path, {**carried, CHECKED: _NOT_RUN}, [prepared, *further])

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`: the ONNX reducer's files, each prepared."""
        if precision not in self.precisions[1:]:
            raise ExportError(f"there is no {precision} in this format; it has {', '.join(self.precisions)}")

        def convert(source: Path, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
            reduced = formats.get("onnx").load(source, RunOptions())
            return self._write(source, reduced, signature, precision, path, carried)

        # TensorRT's 8-bit numbers are signed, with zero in the middle: as for Arm.
        return ThroughOnnx(graph, signature, precision, replace(calibration, target="arm64"), convert)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`. Always on the GPU; the engine is built on the first call.

        ``Opened.session`` is a :class:`byol_deploy.formats._tensorrt_engine.Engine`, which takes and gives tensors that
        lie on the device.
        """
        self.carried(path)
        described = _read(path)
        if options.provider.lower() not in _ON_GPU:
            raise ProviderError(f"TensorRT runs on cuda, not on {options.provider!r}; leave --provider out")
        plan = self.build(path)
        from byol_deploy.formats._tensorrt_engine import Engine

        shapes = described["profile"]
        engine = Engine(plan, shapes[2][0], _device())
        outputs = tuple(Port(name, "float32", (None, None)) for name in engine.outputs)

        def compute(images: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
            return dict(engine.from_host(images, names))

        taken = Port(engine.input, "uint8", (None, *shapes[0][1:]))
        return Opened(compute, outputs, (taken,), "TensorRT", engine)

    def build(self, path: Path) -> bytes:
        """The plan of a file for the GPU of this machine. Takes a while, once for each file and process.

        Raises:
            BundleError: The file is damaged.
            ProviderError: There is no NVIDIA GPU.
            MissingExtraError: TensorRT is not installed.
            ExportError: TensorRT cannot take the graph.
        """
        described = _read(path)
        reason = self.runs_here()
        if "package tensorrt" in reason:
            raise MissingExtraError(f"the file {printable(path.name)}", "tensorrt", self.extra)
        if reason:
            raise ProviderError(f"{printable(path.name)}: {reason}; verify it on a machine with an NVIDIA GPU")
        key = self.content_hash(path)
        if key not in self._plans:
            from byol_deploy.formats._tensorrt_engine import build

            self._plans[key] = build(_onnx_of(path), INPUT, described["profile"])
        return self._plans[key]

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`: those of the ONNX file."""
        self.carried(path)
        return formats.get("onnx").tensors(_onnx_of(path))


def _device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def _onnx_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".json") + ".onnx")


def _plan_of(prepared: Path, signature: Signature, precision: str) -> dict[str, Any]:
    """How the engine is built: for this code, and as a command."""
    shapes = [[batch, signature.size_px, signature.size_px, 3] for batch in BATCHES]
    words = [f"--{which}Shapes={INPUT}:{'x'.join(map(str, shape))}" for which, shape in
             zip(("min", "opt", "max"), shapes, strict=True)]  # fmt: skip
    command = ["trtexec", f"--onnx={prepared.name}", "--saveEngine=model.plan", *words, "--stronglyTyped", "--noTF32"]
    return {
        "schema": _SCHEMA,
        "onnx": prepared.name,
        "precision": precision,
        "input": INPUT,
        "outputs": list(signature.outputs),
        "profile": shapes,
        "flags": {"strongly_typed": True, "tf32": False},
        "trtexec": " ".join(command),
    }


def _read(path: Path) -> dict[str, Any]:
    again = f"{printable(path)} is not a TensorRT build description, or is damaged; copy or export it again"
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        found = json.loads(content.decode("utf-8"))
        shapes = found["profile"]
        right = (
            len(content) <= _MAX_BYTES
            and found["schema"] == _SCHEMA
            and found["input"] == INPUT
            and [len(shape) for shape in shapes] == [4, 4, 4]
            and all(type(size) is int and 0 < size <= 1 << 16 for shape in shapes for size in shape)
            and shapes[0][1:] == shapes[1][1:] == shapes[2][1:]
            and shapes[0][0] <= shapes[1][0] <= shapes[2][0]
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(again) from error
    if not right:
        raise BundleError(again)
    return dict(found)


FORMAT = _TensorRt()
