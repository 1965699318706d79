"""ONNX Runtime's own format ``.ort``, for phones and for builds of the runtime that cannot read ONNX (minimal builds).

Three files: ``model.ort``, the model; ``model.required_operators.config``, which operators it needs, as the runtime's
``build.py --minimal_build --include_ops_by_config`` takes it; and ``model.ort.byol.json``, the texts for byol-deploy.
Natively only the first is needed::

    session = onnxruntime.InferenceSession("model.ort")  # or Java, Swift, C++, JavaScript: the same call
    embedding = session.run(["embedding"], {"images": images})  # (N, H, W, 3) uint8

The graph is optimised when the file is written and never again. The level is *extended*: fusions into operators that
every CPU build has, on any processor. The last level, *layout*, arranges the weights for the vector registers of the
machine that writes, and is left out. Providers that take whole subgraphs (CoreML, NNAPI, XNNPACK) know the standard
operators alone and leave the fused ones to the CPU: for those convert the ONNX file at the level *basic*.

Made from the ONNX file, ``int8`` from its int8 file; the runtime keeps 8-bit convolutions as such only when they were
fused at writing. There is no fp16: the CPU's kernels mostly lack it, and what the optimiser then puts around every
operator would be frozen into the file. Two files of one graph differ in a few bytes: the runtime writes one of its
tables in the order of a hash map whose seed is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy import formats
from byol_deploy.errors import ExportError, ProviderError
from byol_deploy.formats import Opened, RunOptions, Signature, _ort_file
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.formats._through_onnx import ThroughOnnx, as_onnx
from byol_deploy.quantization import Calibration, Reducer

MAX_BYTES = (1 << 31) - (1 << 24)
"""Of the ONNX files together: offsets in a FlatBuffer have 31 bits, and the graph needs room beside the weights."""
_ON_CPU = ("cpu", "auto", "cpuexecutionprovider")
_ABOUT = """\
# The operators of the .ort file beside this one. A build of ONNX Runtime that holds no others:
#   build.py --config MinSizeRel --minimal_build --include_ops_by_config THIS_FILE --skip_tests
# See https://onnxruntime.ai/docs/build/custom.html. The package onnxruntime holds them all and needs no such file.
"""


class _Ort(SidecarFormat):
    name = "ort"
    suffix = ".ort"
    extra = "train"
    requires = ("torch", "onnx", "onnxscript", "onnxruntime")
    runs_with = ("onnxruntime",)
    opens_in_encoder = True
    precisions = ("fp32", "int8")
    can_wait_idly = True

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        with as_onnx(graph, signature) as source:
            return self.write(source, path, carried)

    def write(self, source: Path, path: Path, carried: Mapping[str, str], target: str = "x86") -> tuple[Path, ...]:
        """Write an ONNX file in this format, with its texts, for a processor of :data:`byol_deploy.quantization`."""
        _convert(source, path, target)
        needed = path.with_suffix(".required_operators.config")
        lines = [f"{domain};{version};{','.join(names)}" for (domain, version), names
                 in _ort_file.operators(path).items()]  # fmt: skip
        needed.write_text(_ABOUT + "\n".join(lines) + "\n", encoding="utf-8")
        return self.finish(path, carried, [needed])

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`: the ONNX reducer's files, each converted."""
        if precision not in self.precisions[1:]:
            raise ExportError(f"there is no {precision} in this format; it has {', '.join(self.precisions)}")
        return ThroughOnnx(
            graph,
            signature,
            precision,
            calibration,
            lambda source, path, carried: self.write(source, path, carried, calibration.target),
        )

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`. The same sessions as for ONNX, on the CPU."""
        self.carried(path)
        _ort_file.check(path)
        if options.provider.lower() not in _ON_CPU:
            raise ProviderError(
                f"an .ort file is optimised for the CPU, not for {options.provider!r}; use --provider cpu, or --format "
                "onnx"
            )
        return formats.get("onnx").load(path, replace(options, provider="cpu", outputs=None))

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`. A weight that took up a batch norm has another name."""
        return _ort_file.tensors(path)


def _convert(source: Path, path: Path, target: str) -> None:
    """Let ONNX Runtime read an ONNX file, optimise it and write it in its own format."""
    import onnxruntime

    from byol_deploy.providers import CPU

    size = sum(item.stat().st_size for item in source.parent.glob(f"{source.name}*"))
    if size > MAX_BYTES:
        raise ExportError(f"the model has {size / 1e9:.1f} GB, and an .ort file ends at 2 GiB; use --format onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    # Arm multiplies signed 8-bit numbers; x86 wants one side unsigned, and the optimiser rewrites the graph so.
    options.add_session_config_entry("session.qdqisint8allowed", "1" if target == "arm64" else "0")
    path.unlink(missing_ok=True)
    try:
        onnxruntime.InferenceSession(source, options, providers=[CPU], enable_fallback=0)
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(f"ONNX Runtime {onnxruntime.__version__} cannot write this graph as .ort: {words}") from error


FORMAT = _Ort()
