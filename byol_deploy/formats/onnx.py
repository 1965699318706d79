"""ONNX, through PyTorch's ``torch.export`` based exporter.

What this file adds to the exporter: the parameters stay bit for bit in the file under their module paths (no folding of
batch norm, which ONNX Runtime does anyway when it loads), nodes and values are named after the module they come from,
the builder's stack traces and folders stay out, and exporter noise stays away from the user's terminal.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byol_deploy.errors import BundleError, ExportError, UsageError
from byol_deploy.formats import Opened, Port, RunOptions, Signature, _onnx_file, _onnx_waste
from byol_deploy.formats._layers import Call, LayeredFile
from byol_deploy.quantization import Calibration, Reducer

DEFAULT_OPSET = 18
"""Read by every ONNX Runtime since 1.14 (2023)."""
OPSETS = range(18, 24)
"""What the exporter writes natively or by conversion."""

EXTERNAL_ABOVE_BYTES = 1_500_000_000
"""Tensors go to a second file above this: one protobuf message cannot exceed 2 GiB, metadata and all."""

# Batch of the example that the graph is traced with. Neither 0 nor 1, which torch.export treats as constants, and not
# one of the batch sizes that the parity check runs.
_EXAMPLE_BATCH = 3
_SOURCE = "byol_deploy.source"
_TRACE_LINE = re.compile(r'File "([^"]+)", line (\d+)')


class _Onnx:
    name = "onnx"
    suffix = ".onnx"
    extra = "train"
    requires = ("torch", "onnx", "onnxscript", "onnxruntime")
    runs_with = ("onnxruntime",)
    opens_in_encoder = True
    precisions = ("fp32", "fp16", "int8")
    keeps_tensors = True
    shows_layers = True
    can_wait_idly = True
    can_fix_batches = False
    optimizations = ("none",)

    def export(self, graph: Any, signature: Signature, path: Path, carried: Mapping[str, str]) -> tuple[Path, ...]:
        """See :meth:`byol_deploy.formats.Format.export`."""
        opset = DEFAULT_OPSET if signature.opset is None else signature.opset
        if opset not in OPSETS:
            raise UsageError(f"opset is {opset}; use {OPSETS.start} to {OPSETS.stop - 1}")
        model = _trace(graph, signature, opset)
        parameters = set(model.graph.initializers)
        _tidy(model, parameters)
        _name_after_modules(model, parameters)
        model.metadata_props.update(carried)
        further = _save(model, path)
        _check(path)
        return further

    def reducer(
        self, graph: Any, signature: Signature, full: Path, precision: str, calibration: Calibration
    ) -> Reducer:
        """See :meth:`byol_deploy.formats.Format.reducer`. Made from the float32 file alone."""
        from byol_deploy.formats._onnx_reduced import reducer

        return reducer(full, precision, calibration)

    def load(self, path: Path, options: RunOptions) -> Opened:
        """See :meth:`byol_deploy.formats.Format.load`."""
        from byol_deploy.formats._onnx_cuda import runner
        from byol_deploy.providers import CPU, create_session

        # Asked of GPUs alone, so that what has no ONNX file's bytes (.ort) opens on the CPU too.
        half = options.provider.lower() not in ("cpu", CPU.lower()) and _onnx_file.holds_float16(path)
        part = None if options.outputs is None else _onnx_file.with_outputs(path, options.outputs)
        source = path if part is None else part
        session = create_session(source, options.provider, options.threads, options.optimization,
                                 allow_spinning=options.allow_spinning, channels_last=half)  # fmt: skip
        inputs = [_port(entry) for entry in session.get_inputs()]
        if len(inputs) != 1:
            raise BundleError(f"{path} takes {len(inputs)} inputs; an encoder takes one, the images")
        name, run = inputs[0].name, runner(session)

        every = [str(entry.name) for entry in session.get_outputs()]
        outputs = tuple(map(_port, session.get_outputs())) if part is None else _declared(path)

        def compute(images: np.ndarray, names: Sequence[str] | None) -> dict[str, np.ndarray]:
            wanted = every if names is None else names
            return dict(zip(wanted, run(wanted, {name: images}), strict=True))

        return Opened(compute, outputs, tuple(inputs), str(session.get_providers()[0]), session)

    def runs_here(self) -> str:
        """See :meth:`byol_deploy.formats.Format.runs_here`."""
        return ""

    def providers(self) -> tuple[str, ...]:
        """See :meth:`byol_deploy.formats.Format.providers`. Without those that would compile an engine for minutes."""
        from byol_deploy.providers import CPU, NEVER_AUTOMATIC, short_name, working_providers

        working = [name for name in working_providers() if name not in NEVER_AUTOMATIC and name != CPU]
        return tuple(map(short_name, [CPU, *working]))

    def tensors(self, path: Path) -> dict[str, np.ndarray]:
        """See :meth:`byol_deploy.formats.Format.tensors`. Initialisers and constants, of sub-graphs too."""
        import onnx
        from onnx import numpy_helper

        base = str(path.parent)
        found: dict[str, np.ndarray] = {}

        def visit(graph: Any) -> None:
            for tensor in graph.initializer:
                found[tensor.name] = numpy_helper.to_array(tensor, base)
            for node in graph.node:
                for attribute in node.attribute:
                    if attribute.type == onnx.AttributeProto.TENSOR:
                        found[f"{node.name}.{attribute.name}"] = numpy_helper.to_array(attribute.t, base)
                    elif attribute.type == onnx.AttributeProto.GRAPH:
                        visit(attribute.g)

        visit(_read_proto(path).graph)
        return found

    def carried(self, path: Path) -> dict[str, str]:
        """See :meth:`byol_deploy.formats.Format.carried`. Read from the file's bytes, without a session."""
        return _onnx_file.texts(path)

    def layers(
        self, path: Path, options: RunOptions, calls: Sequence[Call], slots: Sequence[np.ndarray], images: np.ndarray
    ) -> LayeredFile:
        """See :meth:`byol_deploy.formats.Format.layers`."""
        from byol_deploy.formats._onnx_layers import OnnxLayers

        return OnnxLayers(path, options, calls, slots, images)

    def content_hash(self, path: Path) -> str:
        """See :meth:`byol_deploy.formats.Format.content_hash`. Neither the package onnx nor a session is needed."""
        return _onnx_file.content_hash(path)

    def seal(self, path: Path, texts: Mapping[str, str]) -> None:
        """See :meth:`byol_deploy.formats.Format.seal`. Texts are appended; what lies before them stays."""
        _onnx_file.append_texts(path, texts)


def _declared(path: Path) -> tuple[Port, ...]:
    """The outputs of a file of which a session sees only some."""
    kinds = {1: "float32", 2: "uint8", 10: "float16", 11: "float64"}
    return tuple(
        Port(output.name, kinds.get(output.type, f"type {output.type}"), output.shape)
        for output in _onnx_file.outputs(path)
    )


def _port(declared: Any) -> Port:
    """An input or output of a session; sizes with a name instead of a number are open."""
    kind = str(declared.type).removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else None for size in declared.shape)
    return Port(str(declared.name), {"float": "float32", "double": "float64"}.get(kind, kind), shape)


def _trace(graph: Any, signature: Signature, opset: int) -> Any:
    """The graph as an ``onnx_ir.Model``, as the exporter leaves it before its own optimisations."""
    import torch

    size = signature.size_px
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, (_EXAMPLE_BATCH, size, size, 3), dtype=torch.uint8, generator=generator)
    try:
        with _quiet(), torch.no_grad():
            traced = _captured(graph, example)
            _onnx_waste.without_strides(traced)
            program = torch.onnx.export(
                traced,
                (),
                dynamo=True,
                opset_version=opset,
                # Would fold batch norm into convolutions: the file could no longer prove whose parameters it holds.
                optimize=False,
                input_names=["images"],
                output_names=list(signature.outputs),
                verbose=False,
            )
    except Exception as error:
        # Whatever an exporter raises on a stranger's module is that module's trouble, not a bug here.
        raise ExportError(f"the ONNX exporter of PyTorch {torch.__version__} failed: {_root_cause(error)}") from error
    model = program.model  # type: ignore[union-attr]
    _name_batch(model)
    return model


def _name_batch(model: Any) -> None:
    """Call the open size ``batch``; the exporter takes a program's own symbol, such as ``s34``."""
    import onnx_ir as ir

    symbol = re.compile(rf"\b{re.escape(str(model.graph.inputs[0].shape[0].value))}\b")
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        for place, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                value.shape[place] = ir.SymbolicDim(symbol.sub("batch", str(size.value)))


def _captured(graph: Any, example: Any) -> Any:
    """The ``torch.export.ExportedProgram``, for any batch size."""
    import torch

    batch = ({0: torch.export.Dim("batch")},)
    try:
        return torch.export.export(graph, (example,), dynamic_shapes=batch)
    except Exception:
        # The analysis of bytecode takes some modules that running them with symbolic sizes does not.
        return torch.export.export(graph, (example,), dynamic_shapes=batch, strict=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The one place where the exporter's prints, log lines and warnings about its own insides are silenced."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    """The innermost exception's first sentence; the outer ones of the exporter are pages of advice for its authors."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _tidy(model: Any, parameters: set[str]) -> None:
    """Fold what does not depend on parameters or images, and drop what is left without use."""
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    def may_fold(node: Any) -> bool | None:
        # None is the optimiser's own judgement. A folded parameter would vanish under an invented name.
        return False if any(value is not None and value.name in parameters for value in node.inputs) else None

    with _quiet():
        common.InlinePass()(model)
        for _ in range(2):
            optimizer.fold_constants(model, should_fold=may_fold)
            rewriter.RewritePass(
                [
                    rules.materialize_reshape_shape_rule,
                    rules.no_op_cast_rule,
                    rules.no_op_transpose_rule,
                    rules.no_op_expand_rule,
                    rules.collapse_slice_rule,
                    rules.collapse_slice2_rule,
                    rules.remove_optional_bias_from_conv_rule,
                    rules.remove_optional_bias_from_gemm_rule,
                ]
            )(model)
            common.RemoveUnusedNodesPass()(model)
        common.ShapeInferencePass()(model)
        _onnx_waste.remove(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.IdentityEliminationPass()(model)
        for unused in (common.RemoveUnusedNodesPass, common.RemoveUnusedFunctionsPass, common.RemoveUnusedOpsetsPass):
            unused()(model)
        common.OutputFixPass()(model)
    _hold_pads_before_pools(model)


def _hold_pads_before_pools(model: Any) -> None:
    """Put a Clip that clips nothing between a Pad and a MaxPool.

    ONNX Runtime (1.31 at least) merges the two when the padding is 0 (its PadFusion), but a MaxPool pads with minus
    infinity: wherever all values under the window's edge are negative the result is another one. timm's BiT networks
    are built so; one of them came out 25 % off.
    """
    import onnx_ir as ir

    for pad in list(model.graph.all_nodes()):
        if pad.op_type != "Pad":
            continue
        padded = pad.outputs[0]
        pools = [(user, place) for user, place in padded.uses() if user.op_type == "MaxPool"]
        if not pools or padded.dtype is None or not padded.dtype.is_floating_point():
            continue
        lowest = ir.val(f"{padded.name}_lowest", const_value=ir.tensor(-np.inf, dtype=padded.dtype))
        model.graph.register_initializer(lowest)
        held = ir.node("Clip", [padded, lowest], metadata_props=dict(pad.metadata_props))
        held.outputs[0].name = f"{padded.name}_held"
        held.outputs[0].type, held.outputs[0].shape = padded.type, padded.shape
        pad.graph.insert_after(pad, held)
        for pool, place in pools:
            pool.replace_input_with(place, held.outputs[0])


def _name_after_modules(model: Any, parameters: set[str]) -> None:
    """Name nodes and values after their module, and replace the exporter's metadata by one source line.

    ``backbone.layer1.0.conv1`` becomes the node ``backbone/layer1/0/conv1/Conv`` with the output
    ``backbone/layer1/0/conv1/Conv:0``. Parameters keep their names, which are state-dict keys; constants take the name
    of the node that uses them. Stack traces name the builder's folders: of each only one file, from its package on,
    and the line stay.
    """
    graph = model.graph
    named = parameters | _onnx_waste.NAMED
    constants = [value for name, value in graph.initializers.items() if name not in named]
    fixed = {value.name for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]}
    taken: dict[str, int] = {}
    for node in graph.all_nodes():
        scope = _scope(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        base = "/".join([*scope.split("."), node.op_type]) if scope else node.op_type
        count = taken[base] = taken.get(base, -1) + 1
        node.name = f"{base}_{count}" if count else base
        source = _source(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""))
        node.metadata_props.clear()
        node.doc_string = None
        if source:
            node.metadata_props[_SOURCE] = source
        for place, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if value.name and value.name not in fixed:
                value.name = f"{node.name}:{place}"
    for value in constants:
        user, place = next(iter(value.uses()))
        value.name = f"{user.name}/constant_{place}"
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    model.metadata_props.clear()
    graph.name = "byol_deploy_encoder"
    graph.doc_string = model.doc_string = None


def _scope(text: str) -> str:
    """The module path in the exporter's ``name_scopes``: ``['', 'backbone', 'backbone.conv1', 'conv2d']``."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list) or len(scopes) < 2 or scopes[0] != "":
        return ""
    return str(scopes[-2])  # the last one is the operation


def _source(trace: str) -> str:
    """``timm/models/resnet.py:241``: the innermost line that is not PyTorch's own.

    Of code outside site-packages the file's name alone.
    """
    found = ""
    for file, line in _TRACE_LINE.findall(trace):
        parts = file.replace("\\", "/").split("/")
        anchor = next((name for name in ("site-packages", "dist-packages") if name in parts), None)
        if "byol_deploy" in parts:
            inside = parts[parts.index("byol_deploy") :]
        else:
            inside = parts[parts.index(anchor) + 1 :] if anchor else parts[-1:]
        if inside[0] != "torch":
            found = f"{'/'.join(inside)}:{line}"
    return found


def _save(model: Any, path: Path) -> tuple[Path, ...]:
    """Write one file, or two where the tensors exceed :data:`EXTERNAL_ABOVE_BYTES`."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= EXTERNAL_ABOVE_BYTES:
        onnx_ir.save(model, path)
        return ()
    data = path.with_name(f"{path.name}.data")
    onnx_ir.save(model, path, external_data=data.name, size_threshold_bytes=1024)
    return (data,)


def _check(path: Path) -> None:
    """onnx's own checker and its full shape inference, on the file as it lies there."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the written ONNX file does not pass onnx's checker: {_root_cause(error)}") from error


def _read_proto(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise BundleError(f"{path} is not an ONNX file: {error}; export it again") from error


FORMAT = _Onnx()
