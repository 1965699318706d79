"""Export of a checkpoint that was trained on a GPU, and of a model that still lies there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here"),
]


def test_a_model_on_the_gpu_is_exported_and_stays_there() -> None:
    from byol_deploy.graph import EncoderGraph
    from byol_deploy.preprocess import Preprocessing
    from byol_deploy.training.backbones import build_backbone
    from byol_deploy.training.byol import BYOL

    torch.manual_seed(0)
    model = BYOL(build_backbone("timm/test_resnet"), projection_hidden=32, projection_size=16).cuda()
    preprocessing = Preprocessing(32)
    graph = EncoderGraph(model, preprocessing)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert {tensor.device.type for tensor in graph.state_dict().values()} == {"cpu"}
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(preprocessing.normalize(images)).cuda()
        there = model.eval().embed(x).cpu().numpy()
    # TF32 in cuDNN's convolutions: three decimal digits.
    assert np.allclose(graph.run(images)["embedding"], there, rtol=2e-2, atol=2e-3)


def test_a_checkpoint_trained_on_the_gpu_is_exported_and_verified(fashion: Path, tmp_path: Path) -> None:
    from byol_deploy import Recipe, export, fit, verify

    recipe = Recipe.load("default").with_overrides(
        [
            "model.backbone=timm/test_resnet",
            "model.projection_hidden=64",
            "model.projection_size=32",
            "data.image_size=32",
            "train.epochs=1",
            "train.batch_size=64",
            "train.precision=bf16",
        ]
    )
    run = fit(fashion, recipe, out=tmp_path / "run", accelerator="cuda", devices=1, progress=False)
    assert run.device.startswith("cuda")
    bundle = export(run.run_dir, formats=("onnx", "torchscript"), data=fashion)
    assert all(artefact.parity["passed"] for artefact in bundle.manifest.artefacts)
    assert verify(bundle.path, against=run.checkpoint).passed
