"""Backbones by name; probing leaves the module as it was."""

from __future__ import annotations

import copy
import sys
import types
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byol_deploy.errors import UsageError
from byol_deploy.training.backbones import (
    DeepLabV3Backbone,
    FeatureMap,
    Probe,
    build_backbone,
    probe_backbone,
    probe_width,
    unwrap,
)

# Name, width, and a side that the network takes. Published widths of the layer before the classifier.
NAMES = [
    ("resnet18", 512, 64),
    ("timm/resnet10t", 512, 64),
    ("torchvision/resnet18", 512, 64),
    ("timm/mobilenetv3_small_050", 1024, 64),
    ("torchvision/mobilenet_v3_small", 1024, 64),
    ("torchvision/shufflenet_v2_x0_5", 1024, 64),
    ("torchvision/squeezenet1_1", 512, 64),
    ("torchvision/densenet121", 1024, 64),
    ("timm/convnext_atto", 320, 64),
    ("timm/vit_tiny_patch16_224", 192, 224),
]


@pytest.mark.parametrize(("name", "width", "side"), NAMES)
def test_build_and_probe(name: str, width: int, side: int) -> None:
    backbone = build_backbone(name).eval()
    assert probe_width(backbone) == width
    with torch.inference_mode():
        assert backbone(torch.randn(2, 3, side, side)).shape == (2, width)
    # The classifier over 1000 classes is gone.
    assert not any(p.shape[0] == 1000 for p in backbone.parameters())


def test_timm_comes_before_torchvision() -> None:
    assert type(build_backbone("resnet18")).__module__.startswith("timm.")
    assert type(build_backbone("torchvision/resnet18")).__module__.startswith("torchvision.")
    assert type(build_backbone("shufflenet_v2_x0_5")).__module__.startswith("torchvision.")
    assert isinstance(build_backbone("deeplabv3"), DeepLabV3Backbone)


def test_arguments_reach_the_builder() -> None:
    assert probe_width(build_backbone("timm/vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=96)) == 96
    with pytest.raises(UsageError, match=r"timm/resnet10t cannot be built with .*no_such=1.*backbone_args"):
        build_backbone("timm/resnet10t", no_such=1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", "timm/resnet18"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("timm/convnext_nanno", "timm/convnext_nano"),
        ("keras/resnet18", "timm/resnet18"),
        ("xyzzyxyzzy", "timm.list_models"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{name}.*unknown.*{hint}"):
        build_backbone(name)


def test_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_backbones_for_a_test")
    module.build = lambda width=4: nn.Conv2d(3, width, 3)  # type: ignore[attr-defined]
    module.wrong = lambda: "no module"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert probe_backbone(build_backbone("own_backbones_for_a_test:build", width=6)) == Probe(6, "NCHW")
    with pytest.raises(UsageError, match="gave a str"):
        build_backbone("own_backbones_for_a_test:wrong")
    for name in ("own_backbones_for_a_test:nothing", "no_such_module_anywhere:build", ":build", "a:"):
        with pytest.raises(UsageError, match="cannot be found"):
            build_backbone(name)


class Noisy(nn.Module):
    """Everything that a probe could disturb: batch norm, dropout, a counter, the random generator, a mixed mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(self.bn(self.conv(x))) + torch.rand(())


def test_probe_leaves_everything_as_it_was() -> None:
    module = Noisy().train()
    module.bn.eval()
    before = copy.deepcopy(module.state_dict())
    rng = torch.get_rng_state()
    assert probe_backbone(module) == Probe(5, "NCHW")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert (module.training, module.conv.training, module.bn.training) == (True, True, False)
    assert all(p.grad is None for p in module.parameters())


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x.shape[0])


Outputs = namedtuple("Outputs", ["logits", "aux"])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda n: torch.zeros(n, 7), Probe(7, "vector")),
        (lambda n: torch.zeros(n, 7, 2, 2), Probe(7, "NCHW")),
        (lambda n: torch.zeros(n, 7, 1, 1), Probe(7, "NCHW")),
        (lambda n: torch.zeros(n, 2, 2, 7), Probe(7, "NHWC")),
        (lambda n: torch.zeros(n, 1, 1, 7), Probe(7, "NHWC")),
        (lambda n: torch.zeros(n, 5, 7), Probe(7, "tokens")),
        (lambda n: {"aux": None, "out": torch.zeros(n, 7, 2, 2)}, Probe(7, "NCHW")),
        (lambda n: [torch.zeros(n, 3, 4, 4), torch.zeros(n, 7, 2, 2)], Probe(7, "NCHW")),
        (lambda n: Outputs(torch.zeros(n, 7), torch.zeros(n, 3)), Probe(7, "vector")),
    ],
)
def test_forms_of_output(make: Any, expected: Probe) -> None:
    module = Returns(make)
    probe = probe_backbone(module)
    assert probe == expected
    to_map = FeatureMap(probe.layout, probe.prefix_tokens)
    output = module(torch.zeros(2, 3, 4, 4))
    assert to_map(output).shape[:2] == (2, 7)
    assert to_map.pool(output).shape == (2, 7)


def test_feature_map_values() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    torch.testing.assert_close(FeatureMap("NHWC").pool(x), x.mean((1, 2)))
    torch.testing.assert_close(FeatureMap("NCHW").pool(x), x.mean((2, 3)))
    tokens = x.reshape(2, 12, 5)
    torch.testing.assert_close(FeatureMap("tokens", 2).pool(tokens), tokens[:, 2:].mean(1))
    assert FeatureMap("tokens", 2)(tokens).shape == (2, 5, 10, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: {"features": torch.zeros(n, 7)}, r"keys \['features'\]; it must have \"out\""),
        (lambda n: "text", "returns a str"),
        (lambda n: (), "returns a tuple"),
        (lambda n: torch.zeros(7), r"returns shape \(7,\)"),
    ],
)
def test_output_that_is_not_understood(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probe_backbone(Returns(make))


def test_unwrap_takes_the_deepest_map() -> None:
    deepest = torch.ones(1, 2)
    assert unwrap([torch.zeros(1), deepest]) is deepest


def test_probe_of_other_channels_and_sizes() -> None:
    assert probe_width(nn.Sequential(nn.Conv2d(1, 6, 3))) == 6
    assert probe_width(nn.Conv2d(3, 6, 9), size_px=9) == 6
    with pytest.raises(UsageError, match=r"takes no image of shape \(1, 3, H, W\) \(4 px: "):
        probe_width(nn.Conv2d(3, 6, 9), size_px=4)
    with pytest.raises(UsageError, match="takes no image"):
        probe_width(nn.Linear(5, 4))


def test_probe_of_a_stem_that_folds_pixels_into_channels_before_its_convolution() -> None:
    stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 6, 3))
    assert probe_backbone(stem) == Probe(6, "NCHW")
    # Neither 3 channels nor what the first convolution takes: both are named.
    with pytest.raises(UsageError, match=r"shape \(1, 48, H, W\) or \(1, 3, H, W\)"):
        probe_backbone(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(48, 6, 3)))


def test_probe_of_a_size_that_only_the_builders_argument_says() -> None:
    # Bottleneck attention holds one number per place of its grid, and timm's default_cfg still says 256.
    backbone = build_backbone("timm/botnet26t_256", img_size=128)
    assert probe_backbone(backbone) == Probe(2048, "vector")


def test_deeplab_shapes_and_keys() -> None:
    backbone = DeepLabV3Backbone().eval()
    with torch.inference_mode():
        assert backbone(torch.randn(1, 3, 40, 64)).shape == (1, 2048, 5, 8)
    keys = set(backbone.state_dict())
    assert "RN50model.layer1.0.downsample.0.weight" in keys
    assert not any(".fc." in key for key in keys)
    assert probe_width(backbone) == 2048
