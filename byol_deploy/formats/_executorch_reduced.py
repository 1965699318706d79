"""ExecuTorch files in int8: PT2E quantisation for XNNPACK, signed activations and one scale per output channel.

Batch norm goes into the convolutions before. The ranges of all activations are measured once for each method, with all
layers quantised, and used again where some layers are kept in float32: they are ranges of the float model either way.
Sums, products and means between the layers stay in float32: in int8 they measured no faster and moved the embeddings
of docs/experiments.md's encoders further. One file serves all processors; XNNPACK sums products of int8 in 32 bits
everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byol_deploy.errors import ExportError
from byol_deploy.formats import Signature
from byol_deploy.formats._torch_program import first_line, re_exported
from byol_deploy.formats.executorch import MAX_BATCH, folded, silent
from byol_deploy.quantization import Calibration, Reducer

if TYPE_CHECKING:
    from byol_deploy.formats.executorch import _ExecuTorch

_LAYERS = frozenset({"aten.conv2d.default", "aten.convolution.default", "aten.linear.default"})
_SUMS = frozenset({"aten.add.Tensor", "aten.mul.Tensor", "aten.cat.default", "aten.adaptive_avg_pool2d.default"})


def reducer(format: _ExecuTorch, graph: Any, signature: Signature, calibration: Calibration) -> Reducer:
    """See :meth:`byol_deploy.formats.Format.reducer`."""
    return _Int8(format, graph, signature, calibration.images)


class _Int8:
    methods: tuple[str, ...] = ("minmax", "histogram")

    def __init__(self, format: _ExecuTorch, graph: Any, signature: Signature, images: np.ndarray) -> None:
        self._format, self._signature, self._images = format, signature, images
        self._program = folded(graph, signature)
        self._ranges: dict[str, dict[str, Any]] = {}
        # Always in float32: sums, of which XNNPACK could take int8 too, and layers that are called more than once, as
        # their one bias would need a scale for each call.
        self._float: set[str] = set()
        self._nodes: dict[str, str] = {}
        for node in self._program.graph.nodes:
            if str(node.target) in _LAYERS and len(node.args[1].users) == 1:
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                layer = stack[-1][0] if stack else node.name
                self._nodes[f"{layer}.{node.name}" if layer in self._nodes else layer] = node.name
            elif str(node.target) in _LAYERS | _SUMS:
                self._float.add(node.name)
        self.layers = tuple(self._nodes)

    def write(self, path: Path, carried: Mapping[str, str], method: str, kept: Collection[str]) -> tuple[Path, ...]:
        import torch

        with silent(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

            try:
                ranges = self._calibrated(method)
                observed = self._observed(method, kept)
                observed(self._batches()[0])  # shows it the weights; what it saw of activations is replaced
                for node in observed.graph.nodes:
                    if node.op == "call_module" and node.args and node.args[0].name in ranges:
                        setattr(observed, node.target, ranges[node.args[0].name])
                _spell_out_norms(observed)
                made = convert_pt2e(observed)
            except Exception as error:
                # Whatever a quantiser raises on a stranger's graph is that graph's trouble, not a bug here.
                raise ExportError(f"int8 quantisation by PT2E failed: {first_line(error)}") from error
        program = re_exported(made, self._signature, max_batch=MAX_BATCH)
        return self._format.write(program, self._signature, path, carried)

    def _observed(self, method: str, kept: Collection[str]) -> Any:
        """The float model with observers where something will be quantised."""
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e import MinMaxObserver
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        config = get_symmetric_quantization_config(is_per_channel=True)
        if method == "minmax":
            observer = MinMaxObserver.with_args(eps=2**-12)
            spec = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=observer)
            config = dataclasses.replace(config, input_activation=spec, output_activation=spec)
        left_out = self._float | {self._nodes[name] for name in kept}
        quantizer = XNNPACKQuantizer().set_global(config)
        quantizer.set_filter_function(lambda node: node.name not in left_out)
        return prepare_pt2e(self._program.module(), quantizer)

    def _calibrated(self, method: str) -> dict[str, Any]:
        """The observers of the activations by the name of what they observed, after all images."""
        if method not in self._ranges:
            observed = self._observed(method, ())
            for batch in self._batches():
                observed(batch)
            self._ranges[method] = {
                node.args[0].name: getattr(observed, node.target)
                for node in observed.graph.nodes
                if node.op == "call_module" and "activation_post_process" in str(node.target)
                and node.args[0].op != "get_attr"
            }  # fmt: skip
        return self._ranges[method]

    def _batches(self) -> list[Any]:
        import torch

        pixels = torch.from_numpy(np.require(self._images, requirements=["C", "W"]))
        return list(torch.split(pixels, MAX_BATCH))


def _spell_out_norms(model: Any) -> None:
    """Batch norm that went into no convolution becomes a product and a sum.

    The quantiser takes any that is left for training's, and then looks for that by tracing a hundred patterns.
    """
    import torch

    for node in list(model.graph.nodes):
        if node.target is not torch.ops.aten._native_batch_norm_legit_no_training.default:
            continue
        values, *tensors, _, epsilon = node.args
        if any(item is None or item.op != "get_attr" for item in tensors):
            continue
        weight, bias, mean, variance = (_attribute(model, item.target) for item in tensors)
        factor = weight / torch.sqrt(variance + epsilon)
        shape = (1, -1, *[1] * (node.meta["val"][0].dim() - 2))
        with model.graph.inserting_before(node):
            parts = []
            for kind, tensor in (("factor", factor), ("shift", bias - mean * factor)):
                name = f"_{node.name}_{kind}"
                model.register_buffer(name, tensor.reshape(shape))
                parts.append(model.graph.get_attr(name))
            product = model.graph.call_function(torch.ops.aten.mul.Tensor, (values, parts[0]))
            total = model.graph.call_function(torch.ops.aten.add.Tensor, (product, parts[1]))
        for output in list(node.users):  # (values, and what training would save)
            for made in (product, total):
                made.meta = dict(output.meta)
            output.replace_all_uses_with(total)
            model.graph.erase_node(output)
        model.graph.erase_node(node)
    model.recompile()


def _attribute(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model
