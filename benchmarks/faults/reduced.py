"""Files of reduced precision, well made and badly made, all by ONNX Runtime's and PyTorch's own tools."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from byol_deploy import export, formats
from byol_deploy.bundle import CARRIED_GOLDEN_KEY, CARRIED_MANIFEST_KEY
from byol_deploy.formats._onnx_reduced import Batches, quiet
from byol_deploy.graph import EncoderGraph
from byol_deploy.training.checkpoints import load_checkpoint
from faults.making import Case, Compute, Made
from faults.subject import Subject, seal


def with_texts(model: onnx.ModelProto, texts: Mapping[str, str]) -> onnx.ModelProto:
    """The same model with these texts as its metadata."""
    onnx.helper.set_model_props(model, dict(texts))
    return model


def folded(source: Path, target: Path) -> Path:
    """ONNX Runtime's own preparation for quantisation: batch norm folded, constants folded."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    return target


def int8(source: Path, target: Path, images: np.ndarray, texts: Mapping[str, str], **options: Any) -> Path:
    """Static int8 by ``onnxruntime.quantization``: activations uint8, weights int8, QDQ.

    Args:
        source: A float32 ONNX file.
        target: The int8 file.
        images: (N, H, W, 3) uint8 to calibrate with.
        texts: What the file carries.
        options: On top of what careful people choose for x86-64, see the code.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    prepared = folded(source, target.with_suffix(".prepared.onnx"))
    settings: dict[str, Any] = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "calibrate_method": CalibrationMethod.MinMax,
        "op_types_to_quantize": ["Conv", "MatMul", "Gemm"],
        **options,
    }
    with quiet():
        quantize_static(str(prepared), str(target), Batches(images), **settings)
    prepared.unlink()
    onnx.save(with_texts(onnx.load(target), texts), target)
    seal(target, precision="int8")
    return target


def half(source: Path, target: Path, texts: Mapping[str, str]) -> Path:
    """Float16 by ``onnxruntime.transformers.float16``; input and outputs keep their types."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=False)
    onnx.save(with_texts(model, texts), target)
    seal(target, precision="fp16")
    return target


class Brain(EncoderGraph):
    """An encoder that multiplies in bfloat16: all of the network, or what autocast chooses."""

    def __init__(self, graph: EncoderGraph, whole: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(graph.__dict__)
        self.whole = whole
        if whole:
            for part in (self.backbone, self.projection_head, self.prediction_head):
                part.bfloat16()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (N, H, W, 3) uint8. Returns the outputs as float32."""
        if not self.whole:
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
                return tuple(value.float() for value in super().forward(images))
        assert self.projection_head is not None and self.prediction_head is not None  # noqa: PT018
        y = self.feature_map.unwrap(self.backbone(self.preprocessing(images).bfloat16()))
        z = self.projection_head(self.feature_map(y) if self._head_takes_map else y)
        return tuple(value.float() for value in (self.feature_map.pool(y), z, self.prediction_head(z)))


# Two layers with channels between them that a positive factor passes through unchanged: (scaled up, scaled down).
# Batch norm → ReLU → linear map, since relu(s x) = s relu(x); in attention the values, since softmax sums to one.
_PAIRS = (
    (r"(backbone\.stages\..*)\.norm2\.(weight|bias)", r"{}.conv2.weight"),  # timm's ResNetV2
    (r"(backbone\.layer\d.*)\.bn1\.(weight|bias)", r"{}.conv2.weight"),  # ResNets
    (r"(backbone\.blocks\.1\..*)\.bn2\.(weight|bias)", r"{}.conv_pwl.weight"),  # MobileNetV3's part with ReLU
    (r"(backbone\.blocks\..*\.attn)\.qkv\.(weight|bias)", r"{}.proj.weight"),  # transformers
)


def rescaled_run(run: Path, target: Path, scale_of: Callable[[int], Tensor]) -> Path:
    """A run directory whose encoder computes the same, with other numbers between its layers.

    Args:
        run: A trained encoder's.
        target: Made here.
        scale_of: Number of channels to their factors (channels,), powers of two, so that nothing is rounded.
    """
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, Tensor] = content["state_dict"]
    factors: dict[str, Tensor] = {}
    for key in list(state):
        for pattern, following in _PAIRS:
            found = re.fullmatch(pattern, key)
            if found is None:
                continue
            down = following.format(found[1])
            channels = state[down].shape[1]
            factor = factors.setdefault(down, scale_of(channels))
            values = state[key].clone()
            # Of a transformer's joint weight of queries, keys and values the last third.
            values[-channels:] *= factor.view(-1, *[1] * (values.ndim - 1))
            state[key] = values
    if not factors:
        raise ValueError(f"{run} has no pair of layers that can be rescaled")
    for key, factor in factors.items():
        state[key] = state[key] / factor.view(1, -1, *[1] * (state[key].ndim - 2))
    (target / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "recipe.yaml", target)
    torch.save(content, target / "checkpoints" / "last.ckpt")
    return target


def _unbalanced(subject: Subject, folder: Path, scale_of: Callable[[int], Tensor]) -> tuple[Path, Path]:
    """A rescaled run and its clean export in float32."""
    run = rescaled_run(subject.run, folder / "run", scale_of)
    bundle = export(run, out=folder / "bundle", data=subject.data).path
    return run, bundle / "model.onnx"


def half_overflow(subject: Subject, folder: Path) -> Made:
    """Channels scaled by 2^17 between two layers: exact in float32, beyond float16's 65504 on the way."""
    run, clean = _unbalanced(subject, folder, lambda channels: torch.full((channels,), 2.0**17))
    return Made(half(clean, folder / "model.onnx", contract(clean)), against=run, module=reference(run))


def per_tensor(subject: Subject, folder: Path) -> Made:
    """Channels between layers scaled by 2^0 to 2^10: exact in float32, too far apart for one int8 scale."""
    draw = torch.Generator().manual_seed(0)
    run, clean = _unbalanced(
        subject, folder, lambda channels: 2.0 ** torch.randint(0, 11, (channels,), generator=draw).float()
    )
    path = int8(clean, folder / "model.onnx", subject.training_images, contract(clean), per_channel=False)
    return Made(path, against=run, module=reference(run))


def contract(path: Path) -> dict[str, str]:
    """What a clean file carries about its encoder, without its seal."""
    texts = formats.get("onnx").carried(path)
    return {key: texts[key] for key in (CARRIED_MANIFEST_KEY, CARRIED_GOLDEN_KEY)}


def reference(run: Path) -> Compute:
    """The trained encoder of a run directory."""
    loaded = load_checkpoint(run)
    assert loaded.preprocessing is not None
    graph = EncoderGraph(loaded.model, loaded.preprocessing)
    return graph.run


def int8_noise(subject: Subject, folder: Path) -> Made:
    """Good settings, calibrated on random pixels."""
    noise = np.random.default_rng(0).integers(0, 256, subject.training_images.shape, dtype=np.uint8)
    return Made(int8(subject.clean, folder / "model.onnx", noise, subject.carried))


def int8_dark(subject: Subject, folder: Path) -> Made:
    """Good settings, calibrated on images that were scaled to 0..1 before they became uint8: black ones."""
    dark = (subject.training_images / 255).astype(np.uint8)
    return Made(int8(subject.clean, folder / "model.onnx", dark, subject.carried))


def int8_good(subject: Subject, folder: Path) -> Made:
    """Per channel, calibrated on training images."""
    return Made(int8(subject.clean, folder / "model.onnx", subject.training_images, subject.carried))


def int8_per_tensor_plain(subject: Subject, folder: Path) -> Made:
    """One scale for all channels of a weight, calibrated on training images."""
    return Made(int8(subject.clean, folder / "model.onnx", subject.training_images, subject.carried, per_channel=False))


def half_good(subject: Subject, folder: Path) -> Made:
    """Float16 of the encoder as it was trained."""
    return Made(half(subject.clean, folder / "model.onnx", subject.carried))


def brain_whole(subject: Subject, folder: Path) -> Made:
    """Everything after the normalisation in bfloat16, as TorchScript."""
    path = subject.write(Brain(subject.broken(), whole=True), folder / "model.torchscript.pt", precision="bf16")
    return Made(path)


def brain_autocast(subject: Subject, folder: Path) -> Made:
    """What autocast chooses in bfloat16, as TorchScript."""
    path = subject.write(Brain(subject.broken(), whole=False), folder / "model.torchscript.pt", precision="bf16")
    return Made(path)


CASES = (
    Case("float16 overflow", "precision", "float16 of an encoder with large numbers between two layers", half_overflow),
    Case("int8 calibrated on noise", "precision", "good settings, random pixels", int8_noise),
    Case("int8 calibrated on 0..1", "precision", "good settings, images that became black as uint8", int8_dark),
    Case("int8 per tensor, unequal channels", "precision", "one scale for channels 2^0 to 2^10 apart", per_tensor),
    Case("int8 per tensor", "precision", "one scale a weight, training images", int8_per_tensor_plain, on_merit=True),
    Case("int8 per channel", "precision", "good settings, training images", int8_good, on_merit=True),
    Case("float16", "precision", "float16 of the encoder as trained", half_good, harmless=True),
    Case("bfloat16", "precision", "all of the network in bfloat16", brain_whole, harmless=True),
    Case("bfloat16 autocast", "precision", "what autocast chooses in bfloat16", brain_autocast, harmless=True),
)
