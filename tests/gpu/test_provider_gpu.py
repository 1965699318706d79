"""The CUDA provider against the CPU, on the same file. Skipped, with the reason, where CUDA does not work."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from byol_deploy.runtime import Encoder, create_session, probe_provider

works, reason = probe_provider("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not works, reason=f"the CUDA provider: {reason}")]
tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_encoder.py"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_bundle"](tmp_path_factory.mktemp("whole") / "bundle", side=64)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_cuda_computes_what_the_cpu_computes(count: int, whole: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    on_gpu = Encoder(whole, provider="cuda", outputs="all")
    assert on_gpu.provider == "CUDAExecutionProvider"
    expected = Encoder(whole, outputs="all").run(images)
    for name, value in on_gpu.run(images).items():
        # TF32 is off: what remains is the order of float32 sums.
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_cuda_reproduces_the_golden_cases(whole: Path) -> None:
    encoder = Encoder(whole, provider="cuda", outputs="all")
    for name, value in encoder.run(encoder.golden.images).items():
        np.testing.assert_allclose(value, encoder.golden.outputs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_auto_takes_cuda(whole: Path) -> None:
    assert Encoder(whole, provider="auto").provider == "CUDAExecutionProvider"
    assert create_session(whole / "model.onnx", "cuda").get_providers()[0] == "CUDAExecutionProvider"
