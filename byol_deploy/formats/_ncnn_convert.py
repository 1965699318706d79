"""From a PyTorch module to the two files of ncnn, by way of TorchScript and pnnx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byol_deploy.errors import ExportError
from byol_deploy.formats import Signature
from byol_deploy.formats._tracing import as_export_error, quiet
from byol_deploy.formats.ncnn import INPUT, blobs

_TIMEOUT_S = 1800
# In a process of its own: a graph that ncnn cannot run may end the process.
_TRIAL = """
import sys, ncnn, numpy
net = ncnn.Net()
if net.load_param(sys.argv[1]) or net.load_model(sys.argv[2]):
    sys.exit(1)
run, side = net.create_extractor(), int(sys.argv[3])
run.input("images", ncnn.Mat(numpy.zeros((3, side, side), numpy.float32)).clone())
sys.exit(int(any(run.extract(name)[0] for name in sys.argv[4:])))
"""


def trace(graph: Any, side: int, path: Path) -> None:
    """Write ``graph`` as TorchScript that takes one image, float32 (1, 3, H, W)."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Planes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = graph

        def forward(self, planes: torch.Tensor) -> Any:
            return self.encoder(planes.permute(0, 2, 3, 1))

    class FourDimensions(TorchFunctionMode):
        """Queries, keys and values in one tensor have five dimensions, and ncnn has four of which one is the batch."""

        def __torch_function__(self, call: Any, types: Any, values: Any = (), names: Any = None) -> Any:
            names = names or {}
            if call in (torch.Tensor.unbind, torch.unbind):
                value, dim = values[0], values[1] if len(values) > 1 else names.get("dim", 0)
                if value.ndim == 5 and value.shape[1] == 1 and dim == 0:
                    parts, _, heads, *rest = value.shape
                    return value.reshape(1, parts * heads, *rest).chunk(parts, 1)
            return call(*values, **names)

    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, (1, 3, side, side), generator=generator).to(torch.float32)
    module = Planes().eval()
    with as_export_error():
        with quiet(), torch.no_grad(), FourDimensions():
            traced = torch.jit.trace(module, (example,), check_trace=False)  # type: ignore[no-untyped-call]
        with quiet():
            torch.jit.save(traced, str(path))


def convert(folder: Path, signature: Signature) -> list[str]:
    """Run pnnx, which leaves eight files in ``folder``, and give the lines of the ``.param`` file with our names."""
    import ncnn
    import pnnx

    side = signature.size_px
    words = [pnnx.EXEC_PATH, "model.pt", f"inputshape=[1,3,{side},{side}]f32", "fp16=0", "device=cpu"]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"pnnx was still busy after {_TIMEOUT_S} s; the graph may be too large for it") from None
    param = folder / "model.ncnn.param"
    if done.returncode or not param.is_file():
        said = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(said) if line.strip()), "no reason given")
        raise ExportError(f"pnnx cannot take this graph: {last[:300]} (status {done.returncode})")
    lines = param.read_text(encoding="utf-8").splitlines()
    layers = [line.split() for line in lines[2:]]
    lacking = [f"{name} ({kind})" for kind, name, *_ in layers if ncnn.layer_to_index(kind) < 0]
    if lacking:
        raise ExportError(f"ncnn has no layer for {', '.join(lacking[:5])}; their names are pnnx's, with its operator")
    ours = {"in0": INPUT} | {f"out{place}": name for place, name in enumerate(signature.outputs)}
    named = [_named(words, ours) for words in layers]
    absent = sorted(set(ours.values()) - {name for words in named for name in blobs(words)})
    if absent:
        raise ExportError(
            f"pnnx left out {', '.join(absent)}: two outputs may be the same value, or depend on no image"
        )
    named[0] = ["Input", INPUT, "0", "1", INPUT, f"0={side}", f"1={side}", "2=3"]
    return [*lines[:2], *(" ".join(words) for words in named)]


def _named(words: Sequence[str], ours: Mapping[str, str]) -> list[str]:
    count = len(blobs(words))
    return [*words[:4], *(ours.get(name, name) for name in words[4 : 4 + count]), *words[4 + count :]]


def run_once(param: Path, weights: Path, signature: Signature) -> None:
    """Run once what pnnx wrote.

    Raises:
        ExportError: ncnn cannot.
    """
    words = [str(param), str(weights), str(signature.size_px), *signature.outputs]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _TRIAL, *words], capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").splitlines()
        last = next((line.strip() for line in reversed(said) if line.strip()), "it ended without a word")
        raise ExportError(f"ncnn cannot run what pnnx made of this graph: {last[:300]} (status {done.returncode})")
