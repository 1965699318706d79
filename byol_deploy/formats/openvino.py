"""OpenVINO, for Intel and other x86-64 processors: two files, ``.openvino.xml`` and ``.openvino.bin``.

Made from the ONNX file, whose names and tidied graph carry over. Reduced precision: ``bf16`` is the float32 file with a
note in it that the runtime computes in bfloat16 (it does so itself on processors that have the instructions; float32 is
therefore asked for explicitly everywhere else), ``int8`` is made by NNCF.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byol_deploy.cores import usable_cores
from byol_deploy.errors import BundleError, ExportError, ProviderError
from byol_deploy.formats import Opened, Port, RunOptions, Signature
from byol_deploy.formats._openvino_session import Session
from byol_deploy.formats._sidecar import SidecarFormat
from byol_deploy.formats._through_onnx import as_onnx
from byol_deploy.quantization import Calibration, Reducer

PRECISION_NOTE = "byol_deploy_precision"
"""Runtime information of the model: what the runtime computes in, where it is not float32."""


class _OpenVino(SidecarFormat):
    name = "openvino"
    suffix = ".openvino.xml"
    extra = "openvino"
    requires = ("openvino", "torch", "onnx", "onnxscript")
    runs_with = ("openvino",)
    opens_in_encoder = True
    precisions = ("fp32", "bf16", "int8")
    can_fix_batches = True

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        with as_onnx(graph, signature) as source:
            model = converted(source)
        return self.write(model, path, carried)

    def write(self, model: Any, path: Path, carried: Mapping[str, str], computes_in: str = "f32") -> tuple[Path, ...]:
        """Write an ``openvino.Model`` and its texts, and the note what the runtime computes in."""
        import openvino

        model.set_rt_info(computes_in, [PRECISION_NOTE])
        openvino.save_model(model, path, compress_to_fp16=False)
        return self.finish(path, carried, [path.with_suffix(".bin")])

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`."""
        from byol_deploy.formats._openvino_reduced import reducer

        return reducer(self, full, precision, calibration)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`."""
        self.carried(path)
        if options.provider not in ("cpu", "auto"):
            raise ProviderError(f"OpenVINO is used on the CPU here, not on {options.provider!r}; use --provider cpu")
        import openvino

        model = read(path)
        note = str(model.get_rt_info([PRECISION_NOTE]).astype(str)) if model.has_rt_info([PRECISION_NOTE]) else "f32"
        if note not in ("f32", "bf16"):
            raise BundleError(f"{path.name} asks to be computed in {note[:40]!r}, which is not known; export it again")
        declared = tuple(map(_port, model.outputs))
        if options.outputs is not None:
            wanted = [port for port in model.outputs if port.any_name in options.outputs]
            model = openvino.Model([port.get_node() for port in wanted] or model.get_results(), model.get_parameters())
        source = _port(model.inputs[0])
        threads = options.threads or usable_cores()
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": note}
        try:
            session = Session(core(), model, settings, options.batches, min(options.streams, threads))
        except RuntimeError as error:
            raise BundleError(
                f"{path.name} cannot be run by OpenVINO {openvino.__version__}: {_line(error)}"
            ) from error
        return Opened(session.run, declared, (source,), "CPU", session.compiled)


def converted(source: Path) -> Any:
    """An ONNX file as an ``openvino.Model``.

    Raises:
        ExportError: OpenVINO lacks an operator; the message names it.
    """
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    try:
        model = core().read_model(source)
        named = [node.get_friendly_name() for node in products(model)]
        # Folds batch norm into the convolutions. The runtime would do it too, but the quantiser must see it done.
        apply_moc_transformations(model, cf=True)
        folded = products(model)
        if len(folded) == len(named):
            # Folding gives a convolution the name of its batch norm's product, which nobody knows.
            for node, name in zip(folded, named, strict=True):
                node.set_friendly_name(name)
        return model
    except Exception as error:
        raise ExportError(f"OpenVINO {openvino.__version__} cannot take this graph: {_line(error)}") from error


def products(model: Any) -> list[Any]:
    """The convolutions and matrix products of a model, in the order of the graph."""
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    return [node for node in model.get_ordered_ops() if node.get_type_name() in kinds]


def read(path: Path) -> Any:
    """A written file as an ``openvino.Model``.

    Raises:
        BundleError: It is damaged.
    """
    try:
        return core().read_model(path)
    except RuntimeError as error:
        raise BundleError(
            f"{path.name} is not an OpenVINO file, or is damaged: {_line(error)}; export it again"
        ) from error


def core() -> Any:
    """OpenVINO's entry to its devices; one is enough for a process."""
    global _CORE
    if _CORE is None:
        import openvino

        _CORE = openvino.Core()
    return _CORE


_CORE: Any = None


def _port(port: Any) -> Port:
    kind = str(port.element_type.to_dtype())
    shape = tuple(int(size.get_length()) if size.is_static else None for size in port.partial_shape)
    return Port(port.any_name, kind, shape)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
    return (lines or [type(error).__name__])[-1][:300]


FORMAT = _OpenVino()
