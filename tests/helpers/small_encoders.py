"""Small untrained encoders of several families, and what the tests of all engines do with them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byol_deploy.graph import EncoderGraph
from byol_deploy.preprocess import Preprocessing
from byol_deploy.training.backbones import build_backbone
from byol_deploy.training.byol import BYOL

SIZE = 28
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("timm/test_resnet", {}),
    "vit": ("timm/vit_tiny_patch16_224", {"img_size": SIZE, "patch_size": 7, "depth": 2}),
    "mobile": ("timm/test_efficientnet", {}),
}


def images(n: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """(n, size, size, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def build(family: str) -> EncoderGraph:
    """One of :data:`FAMILIES`, see :func:`encoder`."""
    return encoder(*FAMILIES[family])


def encoder(name: str, arguments: Mapping[str, Any], size: int = SIZE) -> EncoderGraph:
    """An encoder whose every layer counts: timm begins with zeros at a branch's end, behind which nothing shows."""
    torch.manual_seed(0)
    model = BYOL(build_backbone(name, **arguments), projection_hidden=32, projection_size=16)
    with torch.no_grad():
        for key, values in model.named_parameters():
            if values.dim() == 1 and key.endswith("weight"):
                values.uniform_(0.5, 1.5)
        model.train()(torch.randn(8, 3, size, size))
    return EncoderGraph(model, Preprocessing(size))


def mixed_up(compute: Callable[[np.ndarray], np.ndarray], size: int = SIZE) -> list[int]:
    """The calls, of four threads at once, that do not give what the same images gave before; empty when all do."""
    given = [images(1 + seed % 3, size, seed) for seed in range(8)]
    expected = [compute(pixels) for pixels in given]
    wrong: list[int] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can

    def work(first: int) -> None:
        for place in range(first, first + 24):
            if not np.array_equal(compute(given[place % 8]), expected[place % 8]):
                wrong.append(place)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(before)
    return wrong


def golden_without_pytorch(path: Path, also: str = "True") -> str:
    """Whether an encoder's golden images come out right in a process without torch and the packages that export.

    Args:
        path: A bundle or a lone file.
        also: A Python expression that is printed too.

    Returns:
        ``True True`` where all is well; what the process wrote to stderr instead where it wrote anything there.
    """
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxscript', 'pnnx']));"
        "from byol_deploy import Encoder; import numpy as np;"
        "encoder = Encoder(sys.argv[1], threads=1); golden = encoder.golden;"
        "drift = np.abs(encoder.run(golden.images)['embedding'] - golden.outputs['embedding']).max();"
        f"print(drift < 1e-4, {also})"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(path)], capture_output=True, text=True)
    return done.stderr or done.stdout.strip()
