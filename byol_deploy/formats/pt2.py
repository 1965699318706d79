"""``torch.export`` programs (``.pt2``), PyTorch's successor of TorchScript: a graph of ATen operators and its tensors.

For processes that have PyTorch but not the model's Python code, and as the source of further compilers::

    model = torch.export.load("model.pt2").module()
    embedding = model(images)["embedding"]  # images (N, H, W, 3) uint8, any N

The outputs carry their names, every parameter lies in the file bit for bit under its own name, and the texts are extra
files of the archive, so there is one file. ``torch.export.load`` trusts what it opens; files of strangers are therefore
read by :mod:`byol_deploy.formats._pt2_check` first, and refused where they hold more than data.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError, ExportError
from byol_deploy.formats import Opened, Port, RunOptions, Signature, _pt2_check, _torchscript_file
from byol_deploy.formats._torch_archive import ArchiveFormat
from byol_deploy.formats._torch_program import exported, first_line, quiet, threads
from byol_deploy.images import printable

# Of a node: what its arguments are, and which module it belongs to. The rest names lines of the builder's sources.
_KEPT = frozenset({"val", "tensor_meta", "nn_module_stack"})


class _Pt2(ArchiveFormat):
    name = "pt2"
    kind = "a torch.export file"
    suffix = ".pt2"
    keeps_tensors = True

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        import torch

        program = exported(graph, signature, named=True)
        program.example_inputs = None  # would be written as a pickle
        for module in program.graph_module.modules():
            for node in getattr(getattr(module, "graph", None), "nodes", ()):
                node.meta = {key: value for key, value in node.meta.items() if key in _KEPT}
        packed = io.BytesIO()
        try:
            with quiet("torch.export", "torch._export"):
                torch.export.save(program, packed, extra_files=dict(carried))
        except Exception as error:
            raise ExportError(f"torch.export.save cannot write this graph: {first_line(error)}") from error
        packed.seek(0)
        _torchscript_file.write(packed, path)
        try:
            _pt2_check.read(path)  # what we write must be what we open
        except ValueError as error:
            raise ExportError(f"this graph cannot be a safe {self.suffix} file: {error}") from error
        return ()

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`.

        ``options.threads`` holds while the file runs; PyTorch has one number for the whole process.
        """
        self.check_provider(options)
        import torch

        program = _open(path)
        inputs = [_port(name, program) for name in program.graph_signature.user_inputs]
        places = [_port(str(name), program) for name in program.graph_signature.user_outputs]
        spec = program.call_spec.out_spec
        names = list(spec.context) if spec.type is dict else [f"output_{place}" for place in range(len(places))]
        if len(inputs) != 1 or len(names) != len(places) or None in inputs or None in places:
            raise BundleError(
                f"{printable(path)} does not map one tensor to tensors, so it is no encoder; export it again"
            )
        outputs = [Port(name, port.dtype, port.shape) for name, port in zip(names, filter(None, places), strict=True)]
        with quiet("torch.export"):
            module = program.module()

        def compute(images: np.ndarray, wanted: Sequence[str] | None) -> dict[str, np.ndarray]:
            with threads(options.threads), torch.inference_mode():
                values = module(torch.from_numpy(np.require(images, requirements=["C", "W"])))
            flat = list(values.values()) if isinstance(values, dict) else torch.utils._pytree.tree_leaves(values)
            named = dict(zip(names, flat, strict=True))
            return {name: named[name].numpy() for name in (names if wanted is None else wanted)}

        return Opened(compute, tuple(outputs), tuple(filter(None, inputs)), "cpu", module)

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`. Parameters, buffers and constants."""
        import torch

        program = _open(path)
        held = {**program.constants, **program.state_dict}
        return {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
            for name, tensor in held.items()
        }


def _open(path: Path) -> Any:
    """A file as an ``ExportedProgram``, once it is known to be nothing but data."""
    import torch

    if not path.is_file():
        raise BundleError(f"{printable(path)} does not exist; pass a file that byol-deploy export wrote")
    try:
        packed = _pt2_check.read(path)
    except (ValueError, RecursionError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError,
            AttributeError, KeyError, TypeError) as error:  # fmt: skip
        # The latter three: JSON of another shape.
        raise BundleError(
            f"{printable(path)} is not a torch.export file that is safe to open, or is damaged: {error}; "
            "export it again"
        ) from error
    try:
        with quiet("torch.export", "torch._export"):
            return torch.export.load(packed)
    except Exception as error:
        # A program of a newer PyTorch, or damage that only its reader sees, ends in any kind of error.
        raise BundleError(
            f"{printable(path)} cannot be opened by PyTorch {torch.__version__}: {first_line(error)}; export it again, "
            "or use the version of PyTorch that wrote it"
        ) from error


def _port(name: str, program: Any) -> Port | None:
    import torch

    value = next((node.meta.get("val") for node in program.graph.nodes if node.name == name), None)
    if not isinstance(value, torch.Tensor):
        return None
    shape = tuple(int(size) if isinstance(size, int) else None for size in value.shape)
    return Port(name, str(value.dtype).removeprefix("torch."), shape)


FORMAT = _Pt2()
