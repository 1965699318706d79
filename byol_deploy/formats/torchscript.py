"""TorchScript, for C++ (libtorch) and for processes that have PyTorch but not the model's Python code.

Written by ``torch.jit.trace``; PyTorch calls that deprecated in favour of ``torch.export``, keeps it working, and has
no replacement yet that libtorch loads. The modules are not frozen, so that every parameter stays in the file, bit for
bit under its own name; whoever wants the speed calls ``torch.jit.freeze`` on what they load.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.bundle import CARRIED_MANIFEST_KEY, read_carried
from byol_deploy.errors import BundleError, ProviderError
from byol_deploy.formats import Opened, RunOptions, Signature, _torchscript_file
from byol_deploy.formats._defaults import Defaults
from byol_deploy.formats._layers import Call, LayeredFile
from byol_deploy.formats._torch_program import threads, without_tf32
from byol_deploy.formats._tracing import as_export_error, quiet

# Not a batch size that the parity check runs, and not 1, which broadcasts.
_EXAMPLE_BATCH = 3


class _TorchScript(Defaults):
    name = "torchscript"
    suffix = ".torchscript.pt"
    extra = "train"
    requires = ("torch",)
    runs_with = ("torch",)
    opens_in_encoder = False
    keeps_tensors = True
    shows_layers = True
    optimizations = ("none",)

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        import torch

        size = signature.size_px
        generator = torch.Generator().manual_seed(0)
        example = torch.randint(0, 256, (_EXAMPLE_BATCH, size, size, 3), dtype=torch.uint8, generator=generator)
        packed = io.BytesIO()
        # A trace writes down whether convolutions may round to TF32 on a GPU, as the process has it set.
        with as_export_error(), quiet(), torch.no_grad(), without_tf32():
            # Its own check runs the traced tensor again; ours runs other images at other batch sizes.
            traced = torch.jit.trace(graph, (example,), check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, packed, _extra_files=dict(carried))
        _torchscript_file.write(packed, path)
        return ()

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`.

        ``options.threads`` holds while the file runs; PyTorch has one number for the whole process. TF32 is off
        meanwhile, in the whole process too.
        """
        import torch

        device = _device(options.provider)
        module = _open(path, device)
        metadata = self.carried(path)
        outputs: list[str] = []
        if CARRIED_MANIFEST_KEY in metadata:
            outputs = [output.name for output in read_carried(metadata, path.name)[0].outputs]

        def compute(images: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
            optimized = torch.jit.optimized_execution(options.optimization != "none")  # type: ignore[attr-defined]
            with threads(options.threads), without_tf32(), torch.inference_mode(), quiet(), optimized:
                values = module(torch.from_numpy(np.require(images, requirements=["C", "W"])).to(device))
            # Left to the comparison where they are not as many: names that nobody expects fail there.
            numbered = [f"output_{place}" for place in range(len(values))]
            named = dict(zip(outputs if len(outputs) == len(values) else numbered, values, strict=True))
            return {name: named[name].cpu().numpy() for name in (named if names is None else names)}

        return Opened(compute, provider=str(device), session=module)

    def providers(self) -> tuple[str, ...]:
        """See :meth:`byol_deploy.formats.Format.providers`."""
        import torch

        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`. Parameters, buffers and constants of the traced code."""
        import torch

        module = _open(path, torch.device("cpu"))
        found = {name: _array(tensor) for name, tensor in module.state_dict().items()}
        with quiet():
            code = module.inlined_graph  # each access makes a new one, and nodes do not keep theirs alive
            for node in code.findAllNodes("prim::Constant"):
                output = node.output()
                if str(output.type()) == "Tensor":
                    found[f"constant.{output.debugName()}"] = _array(output.toIValue())
        return found

    def carried(self, path: Path) -> dict[str, str]:
        """See :meth:`byol_deploy.formats.Format.carried`. The file is a zip archive: PyTorch is not needed."""
        return _torchscript_file.texts(path)

    def layers(
        self, path: Path, options: RunOptions, calls: Sequence[Call], slots: Sequence[np.ndarray], images: np.ndarray
    ) -> LayeredFile:
        """See :meth:`byol_deploy.formats.Format.layers`."""
        from byol_deploy.formats._torchscript_layers import TorchScriptLayers

        @contextlib.contextmanager
        def settings() -> Iterator[None]:
            with threads(options.threads), without_tf32(), quiet():
                yield

        return TorchScriptLayers(_open(path, _device(options.provider)), calls, slots, images, settings)

    def content_hash(self, path: Path) -> str:
        """See :meth:`byol_deploy.formats.Format.content_hash`. PyTorch is not needed."""
        return _torchscript_file.content_hash(path)

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """See :meth:`byol_deploy.formats.Format.seal`."""
        _torchscript_file.add_texts(path, texts)


def _device(provider: str) -> Any:
    import torch

    name = provider.lower()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ProviderError(f"TorchScript runs on cpu or cuda, not on {provider!r}; choose one of them")
    if name == "cuda" and not torch.cuda.is_available():
        raise ProviderError("PyTorch finds no CUDA device here; use the provider cpu")
    return torch.device(name)


def _array(tensor: Any) -> np.ndarray:
    """As NumPy holds it; bfloat16, which NumPy lacks, as the same values in float32."""
    import torch

    values: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    return values


def _open(path: Path, device: Any) -> Any:
    import torch

    try:
        with quiet():
            return torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BundleError(
            f"{path} is not a TorchScript file, or is damaged: {reason[:300]}; export it again"
        ) from error


FORMAT = _TorchScript()
