"""The first convolution in int8 without loss at its input: it takes the pixels themselves.

Pixels are whole numbers from 0 to 255, so that 8 bits hold them exactly. Normalised first, each channel with numbers of
its own, they no longer lie on one grid, and quantising them again costs more neighbours than most layers do. Here the
scale goes into the weights and the shift into a map that is added behind: the padding, which is zero among normalised
values, is why it is a map and not a bias.

A pixel's neighbours are much like it, and rounding each weight to the nearest value ignores that. The weights are
rounded one after the other instead, each error made up for by those that follow, weighed by how the pixels of the
calibration images go together (GPTQ: Frantar et al., 2023, arXiv:2210.17323). docs/experiments.md has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_DAMPING = 1e-4
"""Share of the mean square of a value that is added to each one's own, so that images of one colour can be inverted."""


@dataclass(frozen=True, eq=False)
class Stem:
    """The first convolution on pixels, in int8.

    Attributes:
        name: Of the convolution.
        bias: Of the node that adds the bias behind it.
        source: Of the node that gives the pixels, (N, 3, H, W) float32 from 0 to 255.
        weights: (O, 3, h, w) float32, whole multiples of ``step``.
        step: (O, 1, 1, 1) float32.
        added: (1, O, H', W') float32: what takes the place of the bias.
    """

    name: str
    bias: str
    source: str
    weights: np.ndarray
    step: np.ndarray
    added: np.ndarray

    def put_into(self, model: Any) -> None:
        """Let a quantised copy of the model compute its first convolution so."""
        from openvino import opset13

        nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
        convolution, bias, source = nodes[self.name], nodes[self.bias], nodes[self.source]
        low, high, most = np.float32(0), np.float32(255), 127 * self.step
        pixels = opset13.fake_quantize(source.output(0), low, high, low, high, 256)
        weights = opset13.fake_quantize(opset13.constant(self.weights), -most, most, -most, most, 255)
        convolution.input(0).replace_source_output(pixels.output(0))
        convolution.input(1).replace_source_output(weights.output(0))
        bias.input(1).replace_source_output(opset13.constant(self.added).output(0))


def exact_stem(model: Any, images: np.ndarray, bits: int = 8) -> Stem | None:
    """Find the first convolution, and quantise its weights.

    Args:
        model: The float32 ``openvino.Model``.
        images: (N, H, W, 3) uint8, those that calibrate.
        bits: Of the weights: 7 where two products would overflow 16 bits.

    Returns:
        None where the model does not begin with normalised pixels and a convolution with a bias.
    """
    found = _beginning(model)
    if found is None:
        return None
    convolution, bias, source, scale, shift = found
    weights = _constant(convolution, 1).astype(np.float64)
    scaled = weights * scale
    products = _correlations(images, -shift / scale, convolution)
    most = 2 ** (bits - 1) - 1
    largest = np.abs(scaled).max(axis=(1, 2, 3), keepdims=True)
    # A filter that is zero everywhere: any step will do.
    step = np.where(largest > 0, largest, 1.0) / most
    rounded = _rounded(scaled.reshape(len(scaled), -1), step.reshape(-1, 1), products, most).reshape(scaled.shape)
    constant = np.broadcast_to(shift, (1, 3, *images.shape[1:3]))
    added = _convolved(constant, rounded / scale, convolution) + _constant(bias, 1)
    return Stem(convolution.get_friendly_name(), bias.get_friendly_name(), source.get_friendly_name(),
                rounded.astype(np.float32), step.astype(np.float32), added.astype(np.float32))  # fmt: skip


def _beginning(model: Any) -> tuple[Any, Any, Any, np.ndarray, np.ndarray] | None:
    """The first convolution, the node of its bias, the one of the pixels, and scale and shift of the pixels."""
    for convolution in model.get_ordered_ops():
        if convolution.get_type_name() != "Convolution" or convolution.get_attributes()["auto_pad"] != "explicit":
            continue
        add = convolution.input_value(0).get_node()
        if add.get_type_name() != "Add":
            return None
        multiply = add.input_value(0).get_node()
        if multiply.get_type_name() != "Multiply":
            return None
        source = multiply.input_value(0).get_node()
        layout = source.input_value(0).get_node() if source.get_type_name() == "Transpose" else source
        if layout.get_type_name() != "Convert" or layout.input_value(0).get_node().get_type_name() != "Parameter":
            return None
        readers = [port.get_node() for port in convolution.output(0).get_target_inputs()]
        if len(readers) != 1 or readers[0].get_type_name() != "Add":
            return None
        constants = [multiply.input_value(1), add.input_value(1), convolution.input_value(1), readers[0].input_value(1)]
        if any(value.get_node().get_type_name() != "Constant" for value in constants):
            return None
        scale, shift = _constant(multiply, 1).astype(np.float64), _constant(add, 1).astype(np.float64)
        if scale.size != 3 or shift.size != 3 or not scale.all():
            return None
        return convolution, readers[0], source, scale.reshape(1, 3, 1, 1), shift.reshape(1, 3, 1, 1)
    return None


def _constant(node: Any, place: int) -> np.ndarray:
    return np.array(node.input_value(place).get_node().data)


def _padded(values: np.ndarray, convolution: Any) -> Any:
    import torch

    attributes = convolution.get_attributes()
    (top, left), (bottom, right) = attributes["pads_begin"], attributes["pads_end"]
    return torch.nn.functional.pad(torch.from_numpy(values), (left, right, top, bottom))


def _convolved(values: np.ndarray, weights: np.ndarray, convolution: Any) -> np.ndarray:
    """(1, O, H', W') float64: the convolution of (1, 3, H, W) values that are zero outside."""
    import torch

    attributes = convolution.get_attributes()
    found = torch.nn.functional.conv2d(_padded(values.copy(), convolution), torch.from_numpy(weights),
                                       stride=attributes["strides"], dilation=attributes["dilations"])  # fmt: skip
    return np.asarray(found.numpy())


def _correlations(images: np.ndarray, centre: np.ndarray, convolution: Any) -> np.ndarray:
    """(K, K) float64: mean products of what the K weights of a filter are multiplied with, as they pass over images."""
    import torch

    attributes = convolution.get_attributes()
    size = tuple(convolution.input_value(1).get_shape())[2:]
    total, count = None, 0
    for image in images:
        pixels = image.transpose(2, 0, 1)[None].astype(np.float64) - centre
        patches = torch.nn.functional.unfold(_padded(pixels, convolution), size, dilation=attributes["dilations"],
                                             stride=attributes["strides"])[0]  # fmt: skip
        products = patches @ patches.T
        total, count = products if total is None else total + products, count + patches.shape[1]
    assert total is not None, "calibration images were counted before"
    return np.asarray(total.numpy()) / count


def _rounded(weights: np.ndarray, step: np.ndarray, products: np.ndarray, most: int) -> np.ndarray:
    """(O, K) rounded to multiples of ``step``, so that what the filters give for the images changes least."""
    damped = products + np.eye(len(products)) * (_DAMPING * products.diagonal().mean() or 1.0)
    # Row k of this factor says how an error in weight k is made up for by the weights behind it.
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, found = weights.copy(), np.zeros_like(weights)
    for place in range(weights.shape[1]):
        found[:, place] = (np.clip(np.round(left[:, place : place + 1] / step), -most, most) * step)[:, 0]
        error = (left[:, place] - found[:, place]) / factor[place, place]
        left[:, place:] -= np.outer(error, factor[place, place:])
    return found
