"""OpenVINO files of reduced precision: bfloat16 as a note for the runtime, int8 by NNCF.

NNCF's post-training quantisation runs once for each method; a layer is put back to float by taking the quantisers off
its inputs, which costs a copy of the graph and not another calibration. Layers are not only those with weights: on the
way along the residual sums and into the pooling an encoder loses more than in most convolutions, and they cost little
(docs/experiments.md). NNCF's bias correction is off: it moves the
biases of all layers to make up for all the others, so that a layer put back would be corrected for what no longer
happens (and it measured worse on the encoders of docs/experiments.md). The first convolution is not left to NNCF: see
_openvino_stem.py. What is not int8 is computed in bfloat16 where the processor has it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_deploy.errors import ExportError, require_packages
from byol_deploy.formats._openvino_stem import exact_stem
from byol_deploy.quantization import Calibration, Reducer

if TYPE_CHECKING:
    from byol_deploy.formats.openvino import _OpenVino

_OPERATORS = ("Convolution", "GroupConvolution", "MatMul")


def reducer(format: _OpenVino, full: Path, precision: str, calibration: Calibration) -> Reducer:
    """See :meth:`byol_deploy.formats.Format.reducer`."""
    if precision == "bf16":
        return _Brain(format, full)
    require_packages("int8 for OpenVINO", format.extra, "nncf")
    return _Int8(format, full, calibration)


class _Brain:
    methods: tuple[str, ...] = ("",)
    layers: tuple[str, ...] = ()

    def __init__(self, format: _OpenVino, full: Path) -> None:
        self._format, self._full = format, full

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        return self._format.write(_read(self._full), path, carried, computes_in="bf16")


class _Int8:
    methods: tuple[str, ...] = ("mean of extremes", "histogram")

    def __init__(self, format: _OpenVino, full: Path, calibration: Calibration) -> None:
        self._format, self._full, self._calibration = format, full, calibration
        self._made: dict[str, Any] = {}
        self._weights: dict[str, np.ndarray] = {}
        for node in _read(full).get_ordered_ops():
            source = node.input_value(1).get_node() if node.get_type_name() in _OPERATORS else None
            if source is not None and source.get_type_name() == "Constant":
                self._weights[node.get_friendly_name()] = np.array(source.data)
        quantized = self._quantized(self.methods[0])
        bits = 7 if calibration.target == "x86" else 8
        self._stem = exact_stem(_read(full), calibration.images, bits)
        self.layers = tuple(
            node.get_friendly_name()
            for node in quantized.get_ordered_ops()
            if node.get_friendly_name() in self._weights
            or (node.get_type_name() != "FakeQuantize" and any(map(_quantizes_values, node.input_values())))
        )

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        from openvino import opset13

        model = self._quantized(method).clone()
        floats = set(kept)
        for node in model.get_ordered_ops():
            name = node.get_friendly_name()
            if name not in floats:
                continue
            for place, source in enumerate(node.input_values()):
                if _quantizes_values(source):
                    node.input(place).replace_source_output(source.get_node().input_value(0))
                    if node.get_type_name() == "MaxPool":
                        _quantize_behind(node, source.get_node(), floats)
            if name in self._weights:
                node.input(1).replace_source_output(opset13.constant(self._weights[name]).output(0))
        if self._stem is not None and self._stem.name not in floats:
            self._stem.put_into(model)
        # With one layer in int8 the search asks what that layer does: bfloat16 around it would hide the answer.
        brain = self._calibration.target == "x86-vnni" and len(self.layers) - len(floats) != 1
        return self._format.write(model, path, carried, computes_in="bf16" if brain else "f32")

    def _quantized(self, method: str) -> Any:
        if method not in self._made:
            import nncf
            from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
            from nncf.quantization.range_estimator import RangeEstimatorParametersSet

            images = self._calibration.images
            ranges = RangeEstimatorParametersSet.HISTOGRAM if method == "histogram" else None
            # Without VNNI two products saturate in 16 bits: NNCF then gives the weights 7 bits.
            fix = OverflowFix.ENABLE if self._calibration.target == "x86" else OverflowFix.DISABLE
            with _quiet():
                try:
                    self._made[method] = nncf.quantize(
                        _read(self._full),
                        nncf.Dataset([images[place : place + 1] for place in range(len(images))]),
                        preset=nncf.QuantizationPreset.PERFORMANCE,
                        target_device=nncf.TargetDevice.CPU,
                        subset_size=len(images),
                        advanced_parameters=AdvancedQuantizationParameters(
                            disable_bias_correction=True, overflow_fix=fix, activations_range_estimator_params=ranges
                        ),
                    )
                except Exception as error:
                    # Whatever NNCF raises on a stranger's graph is that graph's trouble, not a bug here.
                    lines = str(error).strip().splitlines() or ["no reason given"]
                    raise ExportError(
                        f"int8 quantisation by NNCF {nncf.__version__} failed: {type(error).__name__}: {lines[0][:300]}"
                    ) from error
        return self._made[method]


def _quantizes_values(source: Any) -> bool:
    """Whether this output is a quantiser's, and of values that depend on the images."""
    node = source.get_node()
    return bool(node.get_type_name() == "FakeQuantize" and node.input_value(0).get_node().get_type_name() != "Constant")


def _quantize_behind(pool: Any, quantizer: Any, floats: Collection[str]) -> None:
    """Quantise what a pooling hands on instead of what it takes: its readers without one of their own relied on it."""
    from openvino import opset13

    levels = quantizer.get_attributes()["levels"]
    for reader in pool.output(0).get_target_inputs():
        if reader.get_node().get_friendly_name() not in floats:
            again = opset13.fake_quantize(pool.output(0), *quantizer.input_values()[1:], levels)
            reader.replace_source_output(again.output(0))


def _read(path: Path) -> Any:
    from byol_deploy.formats.openvino import read

    return read(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The one place where NNCF's prints, progress bars, log lines and warnings are silenced."""
    log = logging.getLogger("nncf")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
