"""ExecuTorch with XNNPACK (``.pte``), for phones and small ARM boards: one file, run without PyTorch by a C++ library.

Natively in C++ (in Kotlin and Swift alike; ``pip install executorch`` gives the same in Python)::

    Module module("model.pte");  // of extension/module, linked with the XNNPACK backend and the portable kernels
    auto outputs = module.forward(from_blob(pixels, {n, 224, 224, 3}, ScalarType::Byte));

Images go in as (N, H, W, 3) uint8, N from 1 to 8: ExecuTorch plans its memory ahead, and so needs a bound; more images
go in one after another. Two constant methods say what is inside: ``output_names`` (one text, comma-separated, in the
order of the outputs) and ``max_batch``. The type conversion and whatever else XNNPACK lacks runs in ExecuTorch's
portable kernels. What depends on parameters alone is computed at export. ``int8`` is made by PT2E quantisation.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.formats._torch_program import exported, first_line, quiet
from byol_deploy.images import printable
from byol_deploy.quantization import Calibration, Reducer

MAX_BATCH = 8
_BACKEND = "XnnpackBackend"
_NAMES, _BOUND, _FORWARD = "output_names", "max_batch", "forward"


class _ExecuTorch(SidecarFormat):
    name = "executorch"
    suffix = ".pte"
    extra = "executorch"
    requires = ("executorch", "torch", "torchao")
    runs_with = ("executorch", "torch")
    opens_in_encoder = False
    precisions = ("fp32", "int8")

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        return self.write(folded(graph, signature), signature, path, carried)

    def write(self, program: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """Write an ``ExportedProgram`` and its texts.

        Raises:
            ExportError: XNNPACK and the portable kernels cannot express it.
        """
        path.write_bytes(_lowered(program, signature))
        return self.finish(path, carried)

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`."""
        from byol_deploy.formats._executorch_reduced import reducer

        return reducer(self, graph, signature, calibration)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`.

        ExecuTorch has one pool of threads for the whole process, so files take turns.
        """
        self.carried(path)
        if options.provider.lower() not in ("cpu", "auto"):
            raise ProviderError(f"ExecuTorch is used with XNNPACK on the CPU, not on {options.provider!r}; use cpu")
        session = _Session(path, options.threads or usable_cores())

        def compute(images: np.ndarray, wanted: Sequence[str] | None) -> dict[str, np.ndarray]:
            values = session.run(images)
            return {name: values[name] for name in (values if wanted is None else wanted)}

        return Opened(compute, session.outputs, session.inputs, _BACKEND, session)


def folded(graph: Any, signature: Signature) -> Any:
    """A graph as an ``ExportedProgram`` in which all that depends on parameters alone is computed."""
    program = exported(graph, signature, max_batch=MAX_BATCH)
    with silent():
        from executorch.exir.passes.constant_prop_pass import constant_prop_pass

        try:
            # Without decompositions: only what writes in place becomes what gives a new value.
            return constant_prop_pass(program.run_decompositions({}))
        except Exception as error:
            raise ExportError(f"ExecuTorch cannot take this graph: {first_line(error)}") from error


def _lowered(program: Any, signature: Signature) -> bytes:
    """The bytes of a file."""
    constants = {_NAMES: ",".join(signature.outputs), _BOUND: MAX_BATCH}
    with silent():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            edge = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods=dict(constants)
            )
            made = edge.to_executorch()
        except Exception as error:
            # Whatever a compiler raises on a stranger's graph is that graph's trouble, not a bug here.
            raise ExportError(
                f"ExecuTorch {_version()} cannot express this graph: {_reason(program, error)}"
            ) from error
        _check_kernels(made.exported_program())
        content = bytes(made.buffer)
        try:
            from executorch.runtime import Runtime

            with _Session._turn:
                Runtime.get().load_program(content).load_method(_FORWARD)
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch {_version()} wrote a file that it cannot open: {first_line(error)}; use another precision "
                "or another format"
            ) from error
        return content


def _reason(program: Any, error: Exception) -> str:
    """What a compiler said, with the layer where it names an operator."""
    said = first_line(error).partition(" (http")[0]
    named = re.search(r"\baten\.\w+(?:\.\w+)?", said)
    found = [node for node in program.graph.nodes if named and str(node.target) == named.group()]
    return f"{said}{_place(found[0])}; use another backbone or another format" if found else said


def _place(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f" (in {stack[-1][0]})" if stack and stack[-1][0] else ""


def _check_kernels(program: Any) -> None:
    """Refuse operators that the runtime has no kernel for, which would show only when the file is opened."""
    import torch
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        if name not in known:
            raise ExportError(
                f"ExecuTorch {_version()} has no kernel for the operator {name}{_place(node)}; use another backbone or "
                "another format"
            )


class _Session:
    """An opened file, run with a number of threads of its own.

    ExecuTorch has one pool of threads for the whole process, and a loaded method keeps the pool that it found. So
    sessions take turns, and one that meets another number of threads makes the pool anew and loads its method again.
    """

    _turn = threading.RLock()
    _pools = 0  # how many pools there have been

    def __init__(self, path: Path, threads: int) -> None:
        self._threads, self._content = threads, path.read_bytes()
        self._loaded: Any = None
        self._pool = -1
        with _Session._turn, silent():
            from executorch.runtime import Runtime

            if not Runtime.get().backend_registry.is_available(_BACKEND):
                raise ProviderError(f"this ExecuTorch has no {_BACKEND}; install the package executorch from PyPI")
            try:
                program = self.use()
                (names,) = program.load_method(_NAMES).execute([])
                (self._bound,) = program.load_method(_BOUND).execute([])
                meta, self._names = program.metadata(_FORWARD), str(names).split(",")
                if meta.num_inputs() != 1 or meta.num_outputs() != len(self._names):
                    raise ValueError(f"it does not take one tensor and give {len(self._names)}")
                self.inputs = (_port("images", meta.input_tensor_meta(0)),)
                places = range(len(self._names))
                self.outputs = tuple(_port(self._names[place], meta.output_tensor_meta(place)) for place in places)
            except (RuntimeError, KeyError, ValueError) as error:
                raise BundleError(
                    f"{printable(path)} is not an ExecuTorch file of byol-deploy, is damaged, or is for another version"
                    f" than {_version()}: {first_line(error)}; export it again"
                ) from error

    def use(self) -> Any:
        """The program, with its method loaded for the pool that there is now. Only while it is this session's turn."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        other = portable_lib._threadpool_get_thread_count() != self._threads
        if other or self._pool != _Session._pools:
            with silent():
                if other:
                    portable_lib._unsafe_reset_threadpool(self._threads)
                    _Session._pools += 1
                # Replaced as a whole: a method does not keep the bytes alive that it reads, its program does.
                self._loaded = Runtime.get().load_program(self._content)
                self._loaded.load_method(_FORWARD)
                self._pool = _Session._pools
        return self._loaded

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Images (N, H, W, 3) uint8 to output name → (N, D) float32."""
        import torch

        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        with _Session._turn:
            method = self.use().load_method(_FORWARD)
            parts = [method.execute([part]) for part in torch.split(pixels, self._bound)]
        return {name: np.concatenate([part[place].numpy() for part in parts]) for place, name in enumerate(self._names)}


def _port(name: str, meta: Any) -> Port:
    import torch

    kinds = {0: torch.uint8, 1: torch.int8, 6: torch.float32}
    kind = str(kinds.get(meta.dtype(), "unknown")).removeprefix("torch.")
    return Port(name, kind, (None, *tuple(meta.sizes())[1:]))  # the batch size is a bound, not a size


def _version() -> str:
    from importlib.metadata import version

    return version("executorch")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The one place where ExecuTorch's log lines and warnings are silenced; its C++ half writes to both stderrs.

    Importing ExecuTorch sets a variable for a backend that is not used here; it goes again.
    """
    before = os.environ.get("OPENVINO_LIB_PATH")
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with (
            contextlib.redirect_stderr(io.StringIO()),
            quiet("torch.export", "torch._dynamo", "torch.fx", "torch.utils._pytree", "executorch", "torchao", "root"),
        ):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        if before is None:
            os.environ.pop("OPENVINO_LIB_PATH", None)


FORMAT = _ExecuTorch()
