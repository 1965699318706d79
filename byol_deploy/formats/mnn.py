"""MNN, for phones and small boards (ARM, x86; C++, Java, Python): one file, ``.mnn``.

Made from the ONNX file by MNN's converter. The input ``images`` stays uint8 (N, H, W, 3) for any N; MNN calls the order
of such a tensor NCHW, which for it only means "as it is". Natively, without byol-deploy::

    high = MNN.expr.PrecisionMode.High
    net = MNN.nn.load_module_from_file("model.mnn", ["images"], ["embedding"], precision_mode=high)
    (embedding,) = net.forward([MNN.expr.const(images, images.shape, MNN.expr.NCHW, MNN.expr.uint8)])

``PrecisionMode.High`` is float32 on every processor. ``int8`` files hold weights in 8 bits per output channel; loaded
with ``memory_mode=MNN.expr.MemoryMode.Low`` activations are brought to 8 bits as well, with a scale that MNN takes from
each input, so that nothing is calibrated. Without it MNN expands the weights when it loads, and computes in float32.

MNN's console program ``mnnconvert`` installs a package by pip and reports its use to its makers; it is not used here:
the compiled converter behind it does neither.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature
from byol_deploy.formats._native_output import captured, give_back
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.formats._through_onnx import as_onnx
from byol_deploy.quantization import Calibration, Reducer

INPUT = "images"
_GREETING = "The device supports:"
# In a process of its own: it prints to C's stdout, and a graph that it cannot take may end the process.
_CONVERTER = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
_UNSUPPORTED = re.compile(r"These Op Not Support:\s*(.+)")
_IDENTITY = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIMEOUT_S = 1800
_FLAG = "byol-deploy "


class _Mnn(SidecarFormat):
    name = "mnn"
    suffix = ".mnn"
    extra = "mnn"
    requires = ("MNN", "torch", "onnx", "onnxscript")
    runs_with = ("MNN",)
    opens_in_encoder = True
    precisions = ("fp32", "int8")

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        with as_onnx(graph, signature) as source:
            convert(source, path, "fp32")
        return self.finish(path, carried)

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`. Made from the float32 file alone."""
        from byol_deploy.formats._mnn_reduced import reducer

        return reducer(self, full)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`."""
        self.carried(path)
        if options.provider not in ("cpu", "auto"):
            raise ProviderError(f"MNN is used on the CPU here, not on {options.provider!r}; use --provider cpu")
        mnn = _engine()
        module = _open(path, options.threads or usable_cores())
        names: tuple[str, ...] = tuple(module.get_info()["outputNames"])
        # MNN holds Python's lock while it computes, but not between forward and read, and the memory is the module's.
        lock = threading.Lock()

        def compute(images: np.ndarray, wanted: Sequence[str] | None) -> dict[str, np.ndarray]:
            images = np.require(images, np.uint8, "C")
            with lock:
                source = mnn.expr.const(images, images.shape, mnn.expr.NCHW, mnn.expr.uint8)
                values = dict(zip(names, module.forward([source]), strict=False))
                if len(values) != len(names):
                    raise BundleError(
                        f"{path.name} cannot be run by MNN {mnn.version()} on images {images.shape}; see what MNN "
                        "printed, and export it again with this version of MNN"
                    )
                return {name: np.array(values[name].read()) for name in (names if wanted is None else wanted)}

        outputs = tuple(Port(name, "float32", (None, None)) for name in names)
        return Opened(compute, outputs, (Port(INPUT, "uint8", (None, None, None, 3)),), "CPU", module)


def convert(source: Path, path: Path, precision: str, *further: str) -> None:
    """Run MNN's converter on an ONNX or MNN file.

    Args:
        source: What to convert.
        path: What to write; replaced when it is there.
        precision: Noted in the file, for :meth:`_Mnn.load`.
        further: Options of the converter.

    Raises:
        ExportError: It cannot take this graph; the message names the operators, and a layer for each.
    """
    path.unlink(missing_ok=True)
    kind = "MNN" if source.suffix == ".mnn" else "ONNX"
    words = ["-f", kind, "--modelFile", str(source), "--MNNModel", str(path), "--bizCode", _FLAG + precision, *further]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CONVERTER, *words], capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"MNN's converter was still busy after {_TIMEOUT_S} s; its graph may be too large") from None
    # Its status is 0 whatever happens.
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    if "Converted Success" not in said or not path.is_file():
        path.unlink(missing_ok=True)
        raise ExportError(f"MNN's converter cannot take this graph: {_reason(said, done.returncode, source)}")
    _name_by_content(path)


def _reason(said: str, status: int, source: Path) -> str:
    unsupported = _UNSUPPORTED.search(said)
    if unsupported:
        operators = sorted({name.rpartition("::")[2].strip(",") for name in unsupported.group(1).split()})
        return "it lacks " + ", ".join(f"the operator {name}{_place(source, name)}" for name in operators)
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(_GREETING)]
    return f"{lines[-1][:300] if lines else 'no reason given'} (status {status})"


def _place(source: Path, operator: str) -> str:
    """Where an ONNX file uses an operator first, in words; empty for another file."""
    if source.suffix != ".onnx":
        return ""
    import onnx

    nodes = onnx.load(source, load_external_data=False).graph.node
    return next((f" (first in {node.name})" for node in nodes if node.op_type == operator and node.name), "")


def _name_by_content(path: Path) -> None:
    """Put a name made from the content in the place of the random one, so that equal graphs give equal bytes."""
    content = path.read_bytes()
    drawn = _engine().get_model_uuid(str(path)).encode()
    if not _IDENTITY.fullmatch(drawn) or content.count(drawn) != 1:
        return  # another version of MNN
    blank = content.replace(drawn, b"0" * len(drawn))
    named = uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(blank).hexdigest())
    path.write_bytes(content.replace(drawn, str(named).encode()))


def _open(path: Path, threads: int) -> Any:
    mnn = _engine()
    low = mnn.expr.MemoryMode.Low  # the one in which 8-bit weights are multiplied by 8-bit activations

    def load(outputs: list[str], mode: Any) -> Any:
        return mnn.nn.load_module_from_file(
            str(path),
            [INPUT],
            outputs,
            precision_mode=mnn.expr.PrecisionMode.High,
            memory_mode=mode,
            thread_num=threads,
        )

    said: list[str] = []
    fault: Exception | None = None
    with captured(said):
        try:
            module = load([], mnn.expr.MemoryMode.Normal)
            info = module.get_info()
            reduced = info["bizCode"] == f"{_FLAG}int8"
            module = load(list(info["outputNames"]), low) if reduced else module
        except Exception as error:  # SystemError around whatever it is
            fault = error
    if fault is not None:
        raise BundleError(
            f"{path.name} is not an MNN file, or is damaged: {said[-1].strip() if said else fault}; export it again"
        ) from fault
    give_back(said)
    return module


def _engine() -> Any:
    """The package MNN, which greets on standard output when it is imported."""
    if "MNN" not in sys.modules:
        said: list[str] = []
        with captured(said):
            import MNN
        give_back([line for line in said if not line.startswith(_GREETING)])
    import MNN

    return MNN


FORMAT = _Mnn()
