"""Backbones by name, and one form for whatever a backbone returns.

A new backbone needs no code here: a name of timm or torchvision, or ``module:callable``. Its width is probed.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet50

from byol_deploy.errors import UsageError

Layout = Literal["vector", "NCHW", "NHWC", "tokens"]

# Two old models add auxiliary classifiers, and warn about their slow initialisation, unless told otherwise.
_TORCHVISION_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


class DeepLabV3Backbone(nn.Module):
    """torchvision's dilated ResNet-50 without average pool and classifier, the default backbone of ``BYOL``.

    (N, 3, H, W) gives (N, 2048, H/8, W/8). The network is the attribute ``RN50model``: the state-dict keys are those
    of the reference class. Checkpoints trained there also hold the unused classifier (``RN50model.fc.*``); it is
    dropped when they are loaded.

    Source: Chen et al., arXiv:1706.05587 (the dilation of the last two stages).
    """

    def __init__(self) -> None:
        super().__init__()
        self.RN50model = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
        # An unused classifier would stall distributed training, which waits for every parameter's gradient.
        self.RN50model.avgpool = nn.Identity()
        self.RN50model.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) float. Returns (N, 2048, H/8, W/8)."""
        net = self.RN50model
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        features: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            state_dict.pop(f"{prefix}RN50model.fc.{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def build_backbone(name: str, **kwargs: Any) -> nn.Module:
    """Build a backbone without its classifier.

    Args:
        name: ``timm/x``, ``torchvision/x``, a bare ``x`` (looked up in timm, then in torchvision), ``deeplabv3``
            (the default of ``BYOL``), or ``module:callable`` for one's own code, called with ``kwargs``.
        **kwargs: Handed to the builder, e.g. ``img_size=96`` for a vision transformer.

    Returns:
        A module that takes (N, 3, H, W) float and gives (N, D), or a feature map (N, D, h, w).

    Raises:
        UsageError: The name is unknown (near matches are named), or the builder refuses the arguments.
    """
    if name == "deeplabv3":
        return _call(DeepLabV3Backbone, name, kwargs)
    if ":" in name:
        return _own(name, kwargs)
    library, _, model = name.rpartition("/")
    if library not in ("", "timm", "torchvision"):
        raise _unknown(name)
    if library != "torchvision" and timm.is_model(model):
        return _call(timm.create_model, name, {"num_classes": 0, **kwargs}, model)
    if library != "timm" and model in _torchvision_names():
        arguments = {**_TORCHVISION_ARGS.get(model, {}), **kwargs}
        return _without_classifier(_call(torchvision.models.get_model, name, arguments, model))
    raise _unknown(name)


def _call(builder: Any, name: str, kwargs: Mapping[str, Any], *args: Any) -> nn.Module:
    try:
        built = builder(*args, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"
        raise UsageError(
            f"backbone {name} cannot be built with {shown}: {error}; change model.backbone_args"
        ) from error
    if not isinstance(built, nn.Module):
        raise UsageError(f"backbone {name} gave a {type(built).__name__}; it must return a torch.nn.Module")
    return built


def _own(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        builder = importlib.import_module(module_name)
        for part in attribute.split("."):
            builder = getattr(builder, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"backbone {name} cannot be found: {error}; "
            "give an importable module and a callable in it, e.g. my_package.models:build"
        ) from error
    return _call(builder, name, kwargs)


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)  # the image classifiers alone
    return names


def _unknown(name: str) -> UsageError:
    library, _, model = name.rpartition("/")
    known: dict[str, str] = {}
    if library != "timm":
        known |= {n: f"torchvision/{n}" for n in _torchvision_names()}
    if library != "torchvision":
        known |= {n: f"timm/{n}" for n in timm.list_models()}
    near = difflib.get_close_matches(model.lower(), known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(known[n] for n in near)}?" if near else "use a name of timm.list_models()."
    return UsageError(
        f"backbone {name!r} is unknown; {hint} Names are timm/x, torchvision/x, or module:callable for your own code."
    )


def _without_classifier(model: nn.Module) -> nn.Module:
    """Replace the last linear layer of a torchvision classifier, and dropout before it, by nothing."""
    for attribute in ("fc", "classifier", "heads", "head"):
        head = getattr(model, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(model, attribute, nn.Identity())
            return model
        if isinstance(head, nn.Sequential):
            layers = list(head.children())
            if any(isinstance(layer, nn.Conv2d) for layer in layers):  # SqueezeNet classifies with a convolution
                setattr(model, attribute, nn.AdaptiveAvgPool2d(1))
                return model
            while layers and isinstance(layers[-1], (nn.Linear, nn.Dropout)):
                layers.pop()
                if layers and isinstance(layers[-1], nn.Linear):
                    break  # two linear layers in a row: only the last one classifies
            setattr(model, attribute, nn.Sequential(*layers))
            return model
    return model


def unwrap(output: Any) -> Tensor:
    """The features of a backbone's raw output.

    A dict gives its ``"out"`` (torchvision's segmentation backbones), a named tuple its ``logits`` (torchvision's
    GoogLeNet and Inception in training mode), a list or tuple its last entry (the deepest map of a pyramid).

    Raises:
        UsageError: It is none of these and not a tensor.
    """
    if isinstance(output, Mapping):
        if "out" not in output:
            raise UsageError(f'backbone returns a dict with the keys {sorted(output)}; it must have "out"')
        output = output["out"]
    elif isinstance(output, (tuple, list)) and output:
        output = output.logits if hasattr(output, "logits") else output[-1]
    if not isinstance(output, Tensor):
        raise UsageError(f"backbone returns a {type(output).__name__}; it must return a tensor")
    return output


@dataclass(frozen=True)
class Probe:
    """What a backbone gives: ``width`` features, laid out as ``layout``, after ``prefix_tokens`` special tokens."""

    width: int
    layout: Layout
    prefix_tokens: int = 0


def probe_backbone(module: nn.Module, size_px: int | None = None) -> Probe:
    """Find out what a backbone returns by running a copy of it on one black image.

    The copy is what runs: batch-norm statistics, mode, hooks' state and the random generator of the caller's module
    are left alone.

    Args:
        module: Takes (N, C, H, W) float.
        size_px: Side of the image; None tries the size that the module names itself, then common ones.

    Raises:
        UsageError: The module takes no such image, or returns something that is not understood.
    """
    twin = copy.deepcopy(module).eval()
    parameter = next(twin.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    sizes = [size_px] if size_px is not None else _likely_sizes(twin)
    failure = ""
    tried = _likely_channels(twin)
    for size, channels in itertools.product(sizes, tried):
        image = torch.zeros(1, channels, size, size, device=device, dtype=dtype)
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of a forward pass that the user did not ask for
            try:
                output = twin(image)
            except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                failure = failure or f"{size} px: {reason}"
                continue
        return _describe(unwrap(output), twin)
    raise UsageError(
        f"backbone {type(module).__name__} takes no image of shape "
        f"{' or '.join(f'(1, {channels}, H, W)' for channels in tried)} ({failure}); "
        "pass a backbone for images, or set its own size, e.g. img_size"
    )


def probe_width(module: nn.Module, size_px: int | None = None) -> int:
    """The number of features that a backbone gives for an image. See `probe_backbone`."""
    return probe_backbone(module, size_px).width


def _likely_sizes(module: nn.Module) -> list[int]:
    """The image side that a transformer insists on, then sizes that suit most convolutional networks."""
    sizes: list[int] = []
    for holder in (getattr(module, "patch_embed", None), module):
        for attribute in ("img_size", "image_size"):
            value = getattr(holder, attribute, None)
            if isinstance(value, (tuple, list)) and value:
                value = value[0]
            if isinstance(value, int):
                sizes.append(value)
    config = getattr(module, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("fixed_input_size"):
        sizes.append(int(config["input_size"][-1]))
    # Attention over a grid of one size, chosen by the builder's argument, can leave no attribute that says which.
    return list(dict.fromkeys([*sizes, 64, 224, 299, *range(32, 545, 32)]))


def _likely_channels(module: nn.Module) -> list[int]:
    """The channels that the first convolution takes, then 3: a stem may fold pixels into channels before it."""
    conv = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    return [3] if conv is None else list(dict.fromkeys([conv.in_channels, 3]))


def _describe(output: Tensor, module: nn.Module) -> Probe:
    shape = tuple(output.shape)
    if output.ndim == 2:
        return Probe(shape[1], "vector")
    if output.ndim == 3:
        prefix = getattr(module, "num_prefix_tokens", 0)
        prefix = prefix if isinstance(prefix, int) and 0 <= prefix < shape[1] else 0
        return Probe(shape[2], "tokens", prefix)
    if output.ndim == 4:
        # The image was square, so the two equal sides are the space. timm's models also say it themselves.
        named = getattr(module, "num_features", None)
        last = shape[1] == shape[2] != shape[3] or (len(set(shape[1:])) > 1 and shape[3] == named != shape[1])
        return Probe(shape[3], "NHWC") if last else Probe(shape[1], "NCHW")
    raise UsageError(
        f"backbone {type(module).__name__} returns shape {shape}; "
        "it must be (N, D), (N, D, h, w), (N, h, w, D) or tokens (N, T, D)"
    )


class FeatureMap(nn.Module):
    """Bring a backbone's raw output into one form. Has no parameters and no state-dict keys.

    ``(N, D)`` becomes ``(N, D, 1, 1)``; ``(N, h, w, D)`` is permuted; tokens ``(N, T, D)`` lose their class and
    register tokens and become ``(N, D, T, 1)``.
    """

    def __init__(self, layout: Layout = "NCHW", prefix_tokens: int = 0) -> None:
        super().__init__()
        self.layout = layout
        self.prefix_tokens = prefix_tokens

    @staticmethod
    def unwrap(output: Any) -> Tensor:
        """output: what the backbone returned. Returns its features, in the backbone's own layout."""
        return unwrap(output)

    def forward(self, output: Any) -> Tensor:
        """output: what the backbone returned. Returns (N, D, h, w)."""
        x = unwrap(output)
        if x.ndim == 2:
            return x[:, :, None, None]
        if x.ndim == 3:
            return x[:, self.prefix_tokens :].transpose(1, 2)[..., None]
        return x.permute(0, 3, 1, 2) if self.layout == "NHWC" else x

    def pool(self, output: Any) -> Tensor:
        """output: what the backbone returned. Returns the mean over space or tokens, (N, D)."""
        x = unwrap(output)
        return x if x.ndim == 2 else self(x).mean(dim=(2, 3))

    def extra_repr(self) -> str:
        """The settings, as ``print(model)`` shows them."""
        return f"layout={self.layout!r}, prefix_tokens={self.prefix_tokens}"
