"""LiteRT, formerly TensorFlow Lite, for Android, iOS and microcontrollers with Linux: one file, ``.tflite``.

Made by litert-torch from the ``torch.export`` program. The signature takes ``images`` uint8 (1, H, W, 3), one image at
a time, and gives the outputs by name. Natively, without byol-deploy::

    run = ai_edge_litert.interpreter.Interpreter("model.tflite").get_signature_runner()
    embedding = run(images=image[None])["embedding"]

litert-torch brings JAX, transformers and older versions of packages that PyTorch's side needs newer, so it runs in an
environment of its own, see :mod:`byol_deploy.formats._own_environment`; running a file needs ``ai-edge-litert`` alone.
``int8`` is made by ai-edge-quantizer; its outputs stay float32.
"""

from __future__ import annotations

import importlib
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, DataError, ExportError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature
from byol_deploy.formats._native_output import captured, give_back
from byol_deploy.formats._own_environment import Environment, call
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.quantization import Calibration, Reducer

ENVIRONMENT = Environment(
    "litert",
    (
        "litert-torch==0.10.0",
        "litert-converter==0.5.0",
        "ai-edge-litert==2.3.0",
        "ai-edge-quantizer==0.10.0",
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "transformers==5.24.0",
    ),
    "about 1 GB beside the PyTorch that is there, some minutes",
)
WORKER = Path(__file__).with_name("_litert_worker.py")
INPUT = "images"
_SIGNATURE = "serving_default"
_GREETING = "INFO: Created TensorFlow Lite XNNPACK delegate"


class _LiteRt(SidecarFormat):
    name = "litert"
    suffix = ".tflite"
    extra = "litert"
    requires = ("ai_edge_litert", "torch")
    runs_with = ("ai_edge_litert",)
    opens_in_encoder = True
    precisions = ("fp32", "int8")

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "model.pt2", Path(folder) / "model.tflite"
            _save_program(graph, signature, source)
            request = {"task": "convert", "source": str(source), "target": str(target), "side": signature.size_px}
            try:
                call(ENVIRONMENT, WORKER, request)
            except ExportError as error:
                raise ExportError(f"litert-torch cannot take this graph: {error}") from error
            path.write_bytes(target.read_bytes())
        return self.finish(path, carried)

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`. Made from the float32 file alone."""
        from byol_deploy.formats._litert_reduced import reducer

        return reducer(self, full, calibration)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`."""
        self.carried(path)
        if options.provider not in ("cpu", "auto"):
            raise ProviderError(f"LiteRT is used on the CPU here, not on {options.provider!r}; use --provider cpu")
        threads = options.threads or usable_cores()
        first = _Interpreter(path, threads)
        local = threading.local()  # an interpreter holds the memory of one caller
        local.interpreter = first
        side = first.size_px

        def compute(images: np.ndarray, wanted: Sequence[str] | None) -> dict[str, np.ndarray]:
            if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
                raise DataError(
                    f"images are {images.shape} {images.dtype}; {path.name} takes (N, {side}, {side}, 3) uint8"
                )
            interpreter: _Interpreter | None = getattr(local, "interpreter", None)
            if interpreter is None:
                interpreter = local.interpreter = _Interpreter(path, threads)
            return interpreter.run(images, tuple(interpreter.places) if wanted is None else wanted)

        outputs = tuple(Port(name, "float32", (None, width)) for name, width in first.widths.items())
        return Opened(compute, outputs, (Port(INPUT, "uint8", (None, side, side, 3)),), "CPU", first.own)


class _Interpreter:
    """A file in the runtime's interpreter, which takes one image at a time.

    Attributes:
        own: The runtime's object.
        size_px: Side of the images.
        places: Where the outputs lie, by name and in the order of the graph.
        widths: Their widths.
    """

    def __init__(self, path: Path, threads: int) -> None:
        said: list[str] = []
        fault: Exception | None = None
        with captured(said, 2):
            try:
                module = importlib.import_module("ai_edge_litert.interpreter")
                self.own = module.Interpreter(str(path), num_threads=threads)
                self.own.allocate_tensors()
                runner = self.own.get_signature_runner(_SIGNATURE)
                ((name, taken),) = runner.get_input_details().items()
                given = runner.get_output_details()
            except (ValueError, RuntimeError) as error:
                fault = error
        if fault is not None:
            reason = str(fault).splitlines()[0][:300] if str(fault) else type(fault).__name__
            raise BundleError(
                f"{path.name} is not a LiteRT file of byol-deploy, or is damaged: {reason}; export it again"
            ) from fault
        give_back([line for line in said if not line.startswith(_GREETING)], 2)
        shape = [int(size) for size in taken["shape"]]
        if name != INPUT or taken["dtype"] is not np.uint8 or len(shape) != 4 or shape != [1, shape[1], shape[1], 3]:
            raise BundleError(
                f"{path.name} takes {name} {np.dtype(taken['dtype']).name} {tuple(shape)}, not images uint8 "
                "(1, H, H, 3); export it again"
            )
        order = [int(entry["index"]) for entry in self.own.get_output_details()]
        self.places = dict(
            sorted(((key, int(value["index"])) for key, value in given.items()), key=lambda item: order.index(item[1]))
        )
        self.widths = {key: int(given[key]["shape"][-1]) for key in self.places}
        self.size_px, self._input = shape[1], int(taken["index"])

    def run(self, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Outputs by name for (N, H, W, 3) uint8."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for image in np.ascontiguousarray(images):
            self.own.set_tensor(self._input, image[None])
            self.own.invoke()
            for name in names:
                found[name].append(self.own.get_tensor(self.places[name]).reshape(-1))
        return {name: np.stack(rows) for name, rows in found.items()}


def _save_program(graph: Any, signature: Signature, path: Path) -> None:
    """Write ``graph`` as a ``torch.export`` program that takes one image by name and gives a dict."""
    import torch

    from byol_deploy.formats._torch_program import first_line, quiet

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = graph

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return dict(zip(signature.outputs, self.encoder(images), strict=True))

    side = signature.size_px
    # Not zeros: a graph that looks at its values must not look at special ones.
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, generator=generator)
    try:
        with quiet("torch.export", "torch._dynamo", "torch.fx", "torch._export"), torch.no_grad():
            program = torch.export.export(Named().eval(), (), {"images": example})
            torch.export.save(program, path)
    except Exception as error:
        # Whatever tracing raises on a stranger's module is that module's trouble, not a bug here.
        raise ExportError(f"torch.export of PyTorch {torch.__version__} failed: {first_line(error)}") from error


FORMAT = _LiteRt()
