"""ONNX files of reduced precision, made from the float32 file by ONNX Runtime's own tools.

int8 is static: activations and weights are int8 around convolutions and matrix products, in the QDQ form, weights per
channel. Which signs and how many bits follows the processor, see :data:`byol_deploy.quantization.TARGETS`. Everything
between them stays in float32: quantising the residual sums too saves little in ONNX Runtime and costs most of the
fidelity (docs/experiments.md).

float16 keeps types of inputs and outputs. Nodes whose values leave float16's range on the calibration images stay in
float32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import ExportError
from byol_deploy.quantization import Calibration, Reducer

_OPERATORS = ("Conv", "Gemm", "MatMul")
# Largest activation that float16 is trusted with: half of its largest number, for images that calibration did not see.
_HALF_RANGE = 65504 / 2
_BATCH = 16
_PERCENTILE = 99.99


def reducer(full: Path, precision: str, calibration: Calibration) -> Reducer:
    """See :meth:`byol_deploy.formats.Format.reducer`."""
    return _Int8(full, calibration) if precision == "int8" else _Half(full, calibration)


class _Int8:
    methods: tuple[str, ...] = ("minmax", "percentile", "entropy")

    def __init__(self, full: Path, calibration: Calibration) -> None:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folded = Path(self._folder) / "folded.onnx"
        with quiet(), _as_export_error("preparing"):
            # Batch norm goes into the convolutions: a scale per channel then covers both.
            quant_pre_process(str(full), str(self._folded), skip_symbolic_shape=True)
        self._images = calibration.images
        self._ranges: dict[str, Any] = {}
        self._settings = {
            "x86-vnni": (QuantType.QUInt8, QuantType.QInt8, False),
            "x86": (QuantType.QUInt8, QuantType.QInt8, True),
            "arm64": (QuantType.QInt8, QuantType.QInt8, False),
        }[calibration.target]
        graph = _load(self._folded).graph
        weights = {tensor.name for tensor in graph.initializer}
        self.layers = tuple(node.name for node in graph.node if node.op_type in _OPERATORS and node.input[1] in weights)

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        activations, weights, seven_bits = self._settings
        names = [name for name in self.layers if name not in set(kept)]
        with quiet(), _as_export_error("int8 quantisation"):
            made = _load(self._folded)
            if names:
                quantizer = QDQQuantizer(
                    made,
                    per_channel=True,
                    reduce_range=seven_bits,
                    weight_qType=weights,
                    activation_qType=activations,
                    tensors_range=self._calibrated(method),
                    nodes_to_quantize=names,
                    nodes_to_exclude=[],
                    op_types_to_quantize=list(_OPERATORS),
                    extra_options={"ActivationSymmetric": activations == weights},
                )
                quantizer.quantize_model()
                made = quantizer.model.model
            _save(made, path, carried)
        return ()

    def _calibrated(self, method: str) -> Any:
        """The ranges of all activations; the float model is run once for each method."""
        if method not in self._ranges:
            from onnxruntime.quantization import CalibrationMethod
            from onnxruntime.quantization.calibrate import create_calibrator

            chosen, options = {
                "minmax": (CalibrationMethod.MinMax, {}),
                "percentile": (CalibrationMethod.Percentile, {"percentile": _PERCENTILE}),
                "entropy": (CalibrationMethod.Entropy, {}),
            }[method]
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                calibrator = create_calibrator(
                    self._folded,
                    list(_OPERATORS),
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=chosen,
                    extra_options=options,
                )
                calibrator.collect_data(Batches(self._images))
                self._ranges[method] = calibrator.compute_data()
                del calibrator
        return self._ranges[method]


class _Half:
    methods: tuple[str, ...] = ("",)

    def __init__(self, full: Path, calibration: Calibration) -> None:
        self._full = full
        model = _load(full)
        too_large = _too_large(model, calibration.images)
        self._blocked = tuple(node.name for node in model.graph.node if too_large & {*node.input, *node.output})
        # Those that must stay are no choice; the others go back one by one where the goal asks for it.
        self.layers = tuple(
            node.name
            for node in model.graph.node
            if node.name not in self._blocked and node.op_type in (*_OPERATORS, "Softmax", "LayerNormalization")
        )

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        with quiet(), _as_export_error("conversion to float16"):
            made = convert_float_to_float16(
                _load(self._full), keep_io_types=True, node_block_list=[*self._blocked, *kept]
            )
            _join(made)
            _save(made, path, carried)
        return ()


class Batches:
    """The calibration images in batches, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = iter([images[start : start + _BATCH] for start in range(0, len(images), _BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def _too_large(model: Any, images: np.ndarray) -> set[str]:
    """The names of the values and weights that leave float16's range, on these images."""
    import onnx
    from onnx import numpy_helper

    from byol_deploy.providers import create_session

    found = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and np.abs(numpy_helper.to_array(tensor)).max(initial=0.0) > _HALF_RANGE
    }
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = [
        value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]
    shown = onnx.ModelProto()
    shown.CopyFrom(inferred)
    given = {output.name for output in shown.graph.output}
    shown.graph.output.extend(value for value in inferred.graph.value_info if value.name in {*floats} - given)
    session = create_session(shown.SerializeToString(), optimization="none")
    for start in range(0, len(images), _BATCH):
        values = session.run(floats, {"images": images[start : start + _BATCH]}) if floats else []
        found |= {
            name for name, array in zip(floats, values, strict=True) if np.abs(array).max(initial=0.0) > _HALF_RANGE
        }
    return found


def _join(model: Any) -> None:
    """Let two neighbours that stay in float32 hand over float32: the converter rounds between them all the same."""
    import onnx

    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    kinds = {name: node.attribute[0].i for name, node in casts.items()}
    source = {}
    for name, node in casts.items():
        before = node.input[0]
        if kinds[name] == onnx.TensorProto.FLOAT and kinds.get(before) == onnx.TensorProto.FLOAT16:
            source[name] = casts[before].input[0]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in source:
                node.input[place] = source[name]
    while True:
        used = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
        idle = [node for node in model.graph.node if node.op_type == "Cast" and node.output[0] not in used]
        if not idle:
            return
        for node in idle:
            model.graph.node.remove(node)


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def _save(model: Any, path: Path, carried: Mapping[str, str]) -> None:
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    # ONNX wants nodes in the order of their values, which ONNX Runtime's own tools do not keep.
    ONNXModel(model).topological_sort()
    model.producer_name = model.producer_version = ""
    onnx.helper.set_model_props(model, dict(carried))
    onnx.save(model, path)


@contextlib.contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Whatever these tools raise on a stranger's graph is that graph's trouble, not a bug here.
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise ExportError(f"{what} by ONNX Runtime failed: {type(error).__name__}: {lines[0][:300]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The one place where the quantiser's prints, log lines and warnings are silenced."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
